"""How many runs to train side by side (`pack=auto`): growing packs are timed on real steps, within predicted memory.

Runs of a pack share the frozen base's products. While a step leaves the device waiting for work, more rows are nearly
free and the time per run falls; once the device is busy it stays, and a larger pack wins nothing. Where that happens
depends on model, methods, batch, length and machine, so it is measured: 1, 4, 16, … runs of the group itself on a GPU
and 1, 2, 4, … on a CPU, in the group's order, on a batch of the length that training mostly pads to, against the same
runs one after another. With `train.execution` of the compiled kind steps are timed uncompiled: compiling each size
would take longer than it can win.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from peftbench import environment, registry
from peftbench.assembly import Setting, assembled, backbone_of, free
from peftbench.config import TrainConfig, build
from peftbench.cost import fixed_batch, trial_on
from peftbench.engine.batches import TokenTable, make_buckets
from peftbench.profiling.timing import time_steps
from peftbench.record import RunSpec, canonical, digest, profile_id, task_content
from peftbench.store import Store
from peftbench.tasks.base import Encoded

DEFAULT = {"cuda": 16, "cpu": 4}
"""Runs side by side where nothing was measured."""
FACTOR = {"cuda": 4, "cpu": 2}
"""How many times as many runs the next pack has; on a GPU a size takes longer to set up than to time."""
MOST = {"cuda": 64, "cpu": 8}
FALLING = 0.05
"""A pack grows while that lowers its time by at least this share, against the same runs one after another."""
EQUAL = 0.02
"""Sizes on a GPU whose shares of the time differ by less are equal; then the larger one: packs have their own costs."""
GAIN = 0.02
"""Packs that win less than this share of the time of runs alone are not worth it: then each goes alone."""
FEWEST = 1000
"""Steps of all runs together below which measuring takes longer than it can win."""
SHARE = {"cuda": 0.2, "cpu": 0.04}
"""Share of the training that is ahead, at the best size so far, which may be spent on measuring."""
LIMIT_SECONDS = 10.0
SLOW_SHARE = 0.01
"""On a GPU measuring ends after `LIMIT_SECONDS`, or this share of the training ahead if that is longer."""
TIMED: dict[str, dict[str, Any]] = {
    # the first two steps of a graph are eager, the third is captured
    "cuda": {"min_warmup": 4, "steps": 10, "max_seconds": 0.6},
    "cpu": {"min_warmup": 1, "steps": 3, "max_seconds": 0.0},
}
STEPS: dict[str, int] = {kind: how["min_warmup"] + how["steps"] for kind, how in TIMED.items()}


@dataclass(frozen=True)
class Step:
    """Seconds that one step of some runs takes side by side, and one step of each of them one after another."""

    together: float
    alone: float

    @property
    def share(self) -> float:
        """The time side by side as a share of that one after another."""
        return self.together / self.alone


Curve = dict[int, Step]
"""Runs side by side → what a step of them takes."""
Fitting = Callable[[Sequence[RunSpec], int], int]
"""Tells how many of some runs, up to a number, fit side by side into memory."""


def best(curve: Mapping[int, Step], kind: str) -> int:
    """Return the size that saves most time, on a GPU the largest that saves as much; 1 if that is less than `GAIN`."""
    size = min(curve, key=lambda runs: (curve[runs].share, runs))
    if curve[size].share > 1 - GAIN:
        return 1
    if kind == "cpu":
        return size
    return max(runs for runs, step in curve.items() if step.share <= (1 + EQUAL) * curve[size].share)


def grow(
    known: Mapping[int, Step],
    limit: int,
    fits: Callable[[int], int],
    step: Callable[[int], Step],
    affordable: Callable[[Curve, int], bool],
    factor: int = 2,
) -> tuple[Curve, str]:
    """Time packs of growing size and return the curve, and why it ends.

    Reasons: "flat" (the last size won less than `FALLING`), "runs" (`limit` is reached), "memory", "time".

    Args:
        known: what was timed before; it is not timed again.
        limit: the largest size wanted.
        fits: tells how many runs, up to a number, memory is predicted to hold.
        step: times a step of so many runs; may raise torch.OutOfMemoryError.
        affordable: whether the next size may be timed after a curve.
        factor: how many times as large the next size is.
    """
    curve, last, size = dict(known), 0, 1
    while True:
        if size not in curve:
            if not affordable(curve, size):
                return curve, "time"
            try:
                curve[size] = step(size)
            except torch.OutOfMemoryError:
                return curve, "memory"
        if last and curve[size].share > (1 - FALLING) * curve[last].share:
            return curve, "flat"
        if size >= limit:
            return curve, "runs"
        larger = fits(min(factor * size, limit))
        if larger <= size:
            return curve, "memory"
        last, size = size, larger


class Budget:
    """Whether a next size may be timed, for a group whose runs make `run_steps` steps in all.

    The first size is always timed, and its time not counted: what is made at first use comes with it, which training
    would make otherwise.
    """

    def __init__(self, kind: str, run_steps: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.kind, self.run_steps, self._clock = kind, run_steps, clock
        self._begin: float | None = None

    def __call__(self, curve: Curve, size: int) -> bool:
        if self.run_steps < FEWEST:
            return False
        if not curve:
            return True
        now = self._clock()
        self._begin = now if self._begin is None else self._begin
        last = max(curve)
        # at most: without any gain from packing
        next_seconds = STEPS[self.kind] * size * curve[last].together / last
        ahead = self.run_steps * min(step.together / runs for runs, step in curve.items())
        allowed = SHARE[self.kind] * ahead
        if self.kind == "cuda":
            allowed = min(allowed, max(LIMIT_SECONDS, SLOW_SHARE * ahead))
        return now - self._begin + next_seconds <= allowed


def typical_length(lengths: Sequence[int], batch_size: int, max_length: int) -> int:
    """Return the tokens that the median batch of training is padded to."""
    buckets = make_buckets(lengths, batch_size, max_length)
    batches = [b.length for b in buckets for _ in range(-(-len(b.items) // batch_size))]
    return max(4, int(np.percentile(batches, 50, method="higher")))


class Stopwatch:
    """Times steps of runs that can share a base."""

    def __init__(self, members: Sequence[RunSpec]) -> None:
        """Load the base of `members`, unless it is the one used last, and the texts they train on."""
        alone = Setting.of(members[:1])
        backbone = backbone_of(alone)
        rows = alone.task.splits(members[0].protocol)["train"]
        self._encoded: Encoded = alone.task.encode(rows, backbone.tokenizer, alone.max_length, backbone.kind)
        self.length = typical_length(self._encoded.lengths, alone.train.batch_size, alone.max_length)
        self.execution = {"compiled": "eager", "compiled_graphs": "graphs"}.get(
            alone.train.execution, alone.train.execution
        )
        self.device = alone.device

    def __call__(self, runs: Sequence[RunSpec]) -> float:
        """Return the seconds of a step of `runs` side by side: the median of a few."""
        free(self.device)
        try:
            return self._seconds(runs)
        finally:
            free(self.device)

    def _seconds(self, runs: Sequence[RunSpec]) -> float:
        setting = Setting.of(runs)
        shaped = dataclasses.replace(setting.train, max_length=self.length, execution=self.execution)
        with assembled(dataclasses.replace(setting, train=shaped)) as assembly:
            tokenizer: Any = assembly.backbone.tokenizer
            fixed = fixed_batch(self._encoded, len(runs) * shaped.batch_size, self.length, len(tokenizer))
            trial = trial_on(assembly, TokenTable(fixed, 0, self.device))
            return time_steps(trial.step, self.device, **TIMED[self.device.type]).percentile(50)


def run_steps(members: Sequence[RunSpec]) -> int:
    """Return how many optimizer steps all of the runs make, each counted by itself."""
    recipes: dict[tuple[int | None, float, int], int] = {}
    for spec in members:
        train = build(TrainConfig, spec.train, "train")
        key = (train.steps, train.epochs, train.batch_size)
        recipes[key] = recipes.get(key, 0) + 1
    total = 0
    for (steps, epochs, batch_size), runs in recipes.items():
        if steps is None:
            rows = len(Setting.of(members[:1]).task.splits(members[0].protocol)["train"])
            steps = max(1, round(epochs * -(-rows // batch_size)))
        total += runs * steps
    return total


def _versions() -> dict[str, str | None]:
    return {name: environment.version(name) for name in ("torch", "transformers", "triton")}


def packing_id(members: Sequence[RunSpec]) -> str:
    """Return the id shared by groups whose packs take the same time: 16 hex digits.

    Which configurations there are counts, and the texts, whose lengths decide; not how many runs of each.
    """
    kinds = {canonical([s.method, s.identity]): s for s in members}.values()
    costs = {profile_id(s, Setting.of([s]).methods[0].traits.cost_free) for s in kinds}
    first = members[0]
    return digest(
        {
            "costs": sorted(costs),
            "task": task_content(first.task),
            "data": first.identity.get("data"),
            "protocol": first.protocol,
            "versions": _versions(),
            "threads": torch.get_num_threads() if first.device == "cpu" else None,
        },
        16,
    )


@dataclass
class Packing:
    """Chooses the sizes of a sweep's packs; what was measured is kept in the store and not measured again.

    Attributes:
        store: keeps the measurements of this sweep's folder.
        kind: "cuda" or "cpu".
        fitting: decides by predicted memory.
        measure: off: what is known, or else the default.
        tell: hears a line about each choice that rests on a measurement.
        stopwatch: makes what times steps of some runs.
    """

    store: Store
    kind: str
    fitting: Fitting
    measure: bool = True
    tell: Callable[[str], None] = lambda line: None
    stopwatch: Callable[[Sequence[RunSpec]], Any] = Stopwatch
    clock: Callable[[], float] = time.perf_counter

    def size(self, members: Sequence[RunSpec]) -> int:
        """Return how many runs of `members`, which can share a base, go side by side: 1 to all of them.

        Raises:
            UserError: the disk is full or the store cannot be written.
        """
        runs = len(members)
        if runs < 2 or self.fitting(members, 2) < 2:
            return 1
        key = packing_id(members)
        kept = self.store.packing(key)
        known: Curve = {} if kept is None else _read(kept)
        if known and best(known, self.kind) >= runs:
            curve, ended = known, "runs"
        elif kept is not None and known and kept.get("runs", 0) >= runs:
            curve, ended = known, str(kept["ended"])  # a group no larger than the one it was measured for
        else:
            curve, ended = self._measured(members, key, known)
        size = best(curve, self.kind) if curve else 1
        if not curve or (ended == "time" and size == max(curve)):
            size = max(size, DEFAULT[self.kind])  # for all that is known a larger pack wins more
        size = self.fitting(members, min(size, runs))
        if len(curve) > 1:
            self.tell(line(members, curve, size, self.kind))
        return size

    def _measured(self, members: Sequence[RunSpec], key: str, known: Curve) -> tuple[Curve, str]:
        """Continue the curve as far as it goes, and keep what is new."""
        limit = min(MOST[self.kind], len(members))
        watch: list[Any] = []
        alone: dict[str, float] = {}

        def step(runs: int) -> Step:
            if not watch:
                watch.append(self.stopwatch(members))
            for spec in members[:runs]:
                if _kind(spec) not in alone:
                    alone[_kind(spec)] = watch[0]([spec])
            one_by_one = sum(alone[_kind(spec)] for spec in members[:runs])
            return Step(one_by_one if runs == 1 else watch[0](members[:runs]), one_by_one)

        budget = Budget(self.kind, run_steps(members) if self.measure else 0, self.clock)
        try:
            curve, ended = grow(known, limit, lambda most: self.fitting(members, most), step, budget, FACTOR[self.kind])
        except Exception as error:  # noqa: BLE001  the runs meet the same error and record it
            free(torch.device(members[0].device))
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            self.tell(f"pack=auto: {_named(members)} could not be timed ({reason})")
            return known, "time"
        if len(curve) > max(len(known), 1):
            self._keep(members, key, curve, ended, watch[0])
        return curve, ended

    def _keep(self, members: Sequence[RunSpec], key: str, curve: Curve, ended: str, watch: Any) -> None:
        sizes = sorted(curve)
        first = members[0]
        content = {
            "packing_id": key,
            "model": first.model["name"],
            "methods": _methods(members),
            "task": first.task["name"],
            "batch_size": first.train["batch_size"],
            "length": watch.length,
            "precision": first.train["precision"],
            "execution": watch.execution,
            "sizes": sizes,
            "step_seconds": [curve[size].together for size in sizes],
            "alone_seconds": [curve[size].alone for size in sizes],
            "chosen": best(curve, self.kind),
            "ended": ended,
            "runs": len(members),
            "device_kind": first.identity["device_kind"],
            "versions": _versions(),
        }
        self.store.write_packing(key, content)


def _read(kept: Mapping[str, Any]) -> Curve:
    rows = zip(kept["sizes"], kept["step_seconds"], kept["alone_seconds"], strict=True)
    return {size: Step(together, alone) for size, together, alone in rows}


def _kind(spec: RunSpec) -> str:
    """Return what of a run's method makes its steps alone as long as another's: all but what differs within packs."""
    method: Any = registry.load_class(spec.method["_target_"], "method")
    return canonical({key: value for key, value in spec.method.items() if key not in method.traits.free_in_pack})


def _methods(members: Sequence[RunSpec]) -> list[str]:
    return list(dict.fromkeys(str(spec.method["name"]) for spec in members))


def _named(members: Sequence[RunSpec]) -> str:
    names, first = _methods(members), members[0]
    shown = names[0] if len(names) == 1 else f"{len(names)} methods"
    return f"{shown} on {first.task['name']} with {first.model['name']}"


def line(members: Sequence[RunSpec], curve: Curve, size: int, kind: str) -> str:
    """Return what is said of a choice: the size, and the best pack measured against a run alone, on average."""
    shown = best(curve, kind)
    shown = shown if shown > 1 else max(curve)
    step = curve[shown]
    times = f"1 run {1000 * step.alone / shown:.1f} ms, {shown} runs {1000 * step.together:.1f} ms a step"
    gain = step.alone / step.together
    many = "1 run at a time" if size == 1 else f"{size} runs side by side"
    return f"pack=auto: {many} ({times}: {gain:.1f} x), {_named(members)}"
