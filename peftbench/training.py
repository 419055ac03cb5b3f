"""Training of a pack's runs, stretch by stretch (see `relay`), and what comes of each.

A stretch has an assembly of its own, so that what is padded, compiled or captured is always that of the members. A run
goes from one to the next through `carry`. Runs that end while others go on are tested in an assembly of their own, at
once: a record is written when its run is done. Where all members end together nothing is taken apart.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from peftbench.assembly import Assembly, Setting, assembled, backbone_of
from peftbench.carry import Carried, Tensors, best_of, carried, load, resume
from peftbench.config import TrainConfig
from peftbench.engine.ahead import rehearse
from peftbench.engine.batches import Bucket, TokenTable, make_buckets, packed_batches, steps_per_epoch
from peftbench.engine.glance import Glance
from peftbench.engine.loop import train
from peftbench.engine.optimizer import PackedAdamW
from peftbench.engine.stepping import stepper
from peftbench.record import DEFAULT_EXECUTION, RunSpec
from peftbench.relay import Relay
from peftbench.selection import Scores, Selection
from peftbench.splits import Split, pad_id, split
from peftbench.store import Store
from peftbench.tasks.base import Encoded

HEAD_FILE = "head.safetensors"
"""The task head beside a kept adapter."""


class Listener(Protocol):
    """What hears how training gets on."""

    def phase(self, name: str) -> None: ...

    def planned(self, specs: Sequence[RunSpec], steps: Sequence[int]) -> None: ...

    def members(self, specs: Sequence[RunSpec]) -> None: ...

    def steps(self, done: int, total: int, losses: Sequence[float] | None) -> None: ...

    def evaluated(self, step: int, metric: str, values: Sequence[float | None], greater_is_better: bool) -> None: ...


@dataclass(frozen=True)
class Evaluation:
    """A run's metrics on validation after `step`; `last` if none will follow."""

    spec: RunSpec
    step: int
    metrics: Mapping[str, float | None]
    last: bool


class Watch(Protocol):
    """What follows runs while they train, and may end them early."""

    def evaluated(self, found: Sequence[Evaluation]) -> Sequence[str | None]:
        """Hear of the members that were evaluated together; why each of them is to stop there, or None."""

    def about(self, spec: RunSpec) -> dict[str, Any] | None:
        """Return what the run's record is to say of who asked for it."""


@dataclass(frozen=True)
class Outcome:
    """What training gave one run; `stretches` are the step it began each at, and how many runs it had."""

    run: int
    status: str
    error: str | None = None
    quality: dict[str, Any] | None = None
    trace: dict[str, Any] | None = None
    stretches: list[dict[str, int]] = field(default_factory=list)


@dataclass
class Course:
    """One run: what it is to do and what came of it so far."""

    total: int
    patience: int | None
    evaluate_at: frozenset[int]
    scores: Scores = field(default_factory=Scores)
    alive: bool = True
    losses: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    stretches: list[dict[str, int]] = field(default_factory=list)
    execution: str = ""
    replayed: int = 0
    carried: Carried | None = None
    pruned: str | None = None

    @property
    def out_of_patience(self) -> bool:
        """Whether the last evaluations brought nothing better."""
        return self.patience is not None and self.scores.since >= self.patience

    @property
    def ended(self) -> bool:
        """Whether nothing is left to train."""
        return self.lost or len(self.losses) >= self.total or self.out_of_patience

    @property
    def lost(self) -> bool:
        """Whether the run ended without anything to be tested: it diverged, or was pruned for the reason given."""
        return not self.alive or self.pruned is not None


@dataclass
class Pack:
    """What the stretches of a pack share."""

    setting: Setting
    splits: dict[str, list[dict[str, Any]]]
    buckets: list[Bucket]
    table: TokenTable
    relay: Relay
    courses: list[Course]
    listener: Listener
    keep: Store | None
    watch: Watch | None = None
    begun: bool = False


def _evaluation_steps(steps: int, per_epoch: int, every: int | None) -> frozenset[int]:
    """Return the steps after which validation is measured: every `every`, or once an epoch, and at the end."""
    return frozenset([*range(every or per_epoch, steps, every or per_epoch), steps])


def schedule(spec: RunSpec) -> tuple[int, int]:
    """Return the steps after which a run is evaluated first and last; loads its model's tokenizer and its texts."""
    setting = Setting.of([spec])
    config, backbone = setting.train, backbone_of(setting)
    rows = setting.task.splits(spec.protocol)["train"]
    encoded = setting.task.encode(rows, backbone.tokenizer, setting.max_length, backbone.kind)
    buckets = make_buckets(encoded.lengths, config.batch_size, setting.max_length)
    per_epoch = steps_per_epoch(buckets, config.batch_size)
    steps = _evaluation_steps(_total(config, per_epoch), per_epoch, config.evaluate_every)
    return min(steps), max(steps)


def _total(config: TrainConfig, per_epoch: int) -> int:
    return config.steps or max(1, round(config.epochs * per_epoch))


def train_runs(
    setting: Setting,
    splits: dict[str, list[dict[str, Any]]],
    encoded: Encoded,
    listener: Listener,
    keep: Store | None = None,
    places: int | None = None,
    watch: Watch | None = None,
) -> Iterator[list[Outcome]]:
    """Train runs, at most `places` side by side (None: all), and yield what came of those that are done.

    Args:
        keep: the store that keeps the parameters each run was tested with.
        watch: hears of every evaluation, and ends runs that need not go on.
    """
    config = setting.train
    buckets = make_buckets(encoded.lengths, config.batch_size, setting.max_length)
    per_epoch = steps_per_epoch(buckets, config.batch_size)
    totals = [_total(c, per_epoch) for c in setting.configs]
    courses = [
        Course(total, c.patience, _evaluation_steps(total, per_epoch, config.evaluate_every))
        for total, c in zip(totals, setting.configs, strict=True)
    ]
    table = TokenTable(encoded, pad_id(backbone_of(setting).tokenizer), setting.device)
    relay = Relay(totals, per_epoch, places or len(totals))
    pack = Pack(setting, splits, buckets, table, relay, courses, listener, keep, watch)
    listener.planned(setting.specs, totals)
    while members := relay.begin():
        if pack.begun:
            listener.phase("load")
        with assembled(setting.chosen(members)) as assembly:
            best = _stretch(pack, assembly, members)
            if not relay.members:
                yield _outcomes(pack, assembly, members)
                continue
        del assembly
        left = [run for run in members if run not in relay.members]
        if best:
            with assembled(setting.chosen(list(best))) as assembly:
                for i, tensors in enumerate(best.values()):
                    load(assembly, i, tensors)
                yield _outcomes(pack, assembly, left)
            del assembly
        elif left:
            yield _outcomes(pack, None, left)


def _stretch(pack: Pack, assembly: Assembly, members: Sequence[int]) -> dict[int, Tensors]:
    """Train `members` until one of them ends or another may join, and let those that ended leave.

    Returns the parameters to be tested of those that completed; none if all left: the assembly then has them.
    """
    relay, courses = pack.relay, [pack.courses[run] for run in members]
    done, length = [relay.done[run] for run in members], relay.length()
    optimizer = assembly.optimizer([c.total for c in courses], done, length)
    if assembly.objective.noise is not None:
        assembly.objective.noise.begin(done)
    if not pack.begun:
        # What the runs' own streams of dropout leave to PyTorch's generator (`kernels.noise`)
        torch.manual_seed(int(np.random.default_rng([s.seed for s in assembly.setting.specs]).integers(2**31)))
        pack.begun = True
    validation = split(assembly, pack.splits["validation"])
    changed = [*assembly.adapter.trained.values(), *assembly.adapter.rewritten.values()]
    selection = Selection(pack.setting.task, optimizer, [c.scores for c in courses], changed)
    travelled = {i: c.carried for i, c in enumerate(courses) if c.carried is not None}
    resume(assembly, optimizer, selection.packed, travelled)
    for course in courses:
        course.carried = None
        course.stretches.append({"step": len(course.losses), "runs": len(members)})
    _steps(pack, assembly, optimizer, validation, selection, members, length)
    relay.leave([run for run, course in zip(members, courses, strict=True) if course.ended])
    if not relay.members:
        selection.restore()
        return {}
    for i, course in enumerate(courses):
        if not course.ended:
            course.carried = carried(assembly, optimizer, selection.packed, i)
    return {
        run: best_of(assembly, optimizer, selection.packed, i)
        for i, (run, course) in enumerate(zip(members, courses, strict=True))
        if course.ended and not course.lost
    }


def _steps(
    pack: Pack,
    assembly: Assembly,
    optimizer: PackedAdamW,
    validation: Split,
    selection: Selection,
    members: Sequence[int],
    length: int,
) -> None:
    """Make the steps of a stretch, at most `length`, and note on every member's course what came of them."""
    setting, config, task, listener = assembly.setting, assembly.setting.train, assembly.setting.task, pack.listener
    courses, done = [pack.courses[run] for run in members], optimizer.done
    evaluate_at = frozenset(
        step - before
        for course, before in zip(courses, done, strict=True)
        for step in course.evaluate_at
        if before < step <= before + length
    )
    last_shown, glance = [0.0], Glance()

    def evaluate(step: int) -> bool:
        listener.phase("evaluate")
        predictions = validation.evaluator.predict()
        due = {i: done[i] + step for i, course in enumerate(courses) if done[i] + step in course.evaluate_at}
        metrics = {i: task.metrics(predictions[i], validation.references) for i in due}
        selection.consider(due, metrics)
        primary = task.primary_metric
        listener.evaluated(step, primary, [m.get(primary) for m in metrics.values()], task.greater_is_better)
        alive = optimizer.alive.tolist()
        if pack.watch is not None:
            heard = {i: courses[i] for i in due if alive[i]}
            reasons = pack.watch.evaluated(
                [
                    Evaluation(setting.specs[i], due[i], metrics[i], due[i] == c.total or c.out_of_patience)
                    for i, c in heard.items()
                ]
            )
            for course, reason in zip(heard.values(), reasons, strict=True):
                course.pruned = reason
        listener.phase("train")
        # A run no longer finite stays, frozen, unless another wants its place: with as many rows as before, its
        # neighbours' sums round as they would have.
        leaves = not any(alive) or (pack.relay.waits and not all(alive))
        return not leaves and not any(course.out_of_patience or course.pruned for course in courses)

    def on_step(step: int, losses: Tensor) -> None:
        now = time.monotonic()
        if now - last_shown[0] > 0.5 or step in evaluate_at or step == length:
            last_shown[0] = now
            listener.steps(step, length, glance(losses))

    listener.members(setting.specs)
    listener.phase("train")
    parts = (assembly.objective, optimizer, pack.table)
    how: dict[str, Any] = {"accumulation": config.accumulation, "autocast": setting.autocast}
    make_step = stepper(config.execution, *parts, **how)
    seeds = [s.seed for s in setting.specs]
    batches = list(packed_batches(pack.buckets, config.batch_size, seeds, length, done))
    if not config.execution.startswith("compiled"):
        rehearse(*parts, batches, **how, running=make_step.running)
    trace = train(
        assembly.objective,
        make_step,
        batches,
        evaluate_at=evaluate_at,
        evaluate=evaluate,
        on_step=on_step,
    ).values()
    pack.relay.advance(len(trace))
    alive = optimizer.alive.tolist()
    for i, course in enumerate(courses):
        course.alive = alive[i]
        course.losses += trace[:, i].tolist()
        course.rates += [rates[i] for rates in optimizer.rates[: len(trace)]]
        if make_step.replayed or not course.replayed:
            course.execution = make_step.execution
        course.replayed += make_step.replayed


def _outcomes(pack: Pack, assembly: Assembly | None, runs: Sequence[int]) -> list[Outcome]:
    """Test those of `runs` that completed and return what came of all of them.

    Args:
        assembly: of all `runs`, or of those that completed; None: none did.
    """
    courses = {run: pack.courses[run] for run in runs}
    tested: dict[str, tuple[list[list[Any]], list[Any]]] = {}
    completed = [run for run, course in courses.items() if not course.lost]
    if assembly is not None and completed:
        pack.listener.phase("test")
        tested = {name: _tested(assembly, rows) for name, rows in pack.splits.items() if name.startswith("test")}
    everybody = assembly is not None and len(assembly.setting.specs) == len(runs)
    place = {run: i for i, run in enumerate(runs if everybody else completed)}
    found = []
    for run, course in courses.items():
        quality = None
        if course.alive:
            quality = _quality(pack.setting, course, {} if course.lost else tested, place.get(run, 0), run)
        if assembly is not None and pack.keep is not None and not course.lost:
            pack.keep.write_adapter(pack.setting.specs[run].run_id, functools.partial(_save, assembly, place[run]))
        status = "completed" if not course.lost else "pruned" if course.alive else "diverged"
        trace = _trace(course, pack.setting.train.execution)
        found.append(Outcome(run, status, _error(course), quality, trace, course.stretches))
    return found


def _error(course: Course) -> str | None:
    if course.alive:
        return None
    broken = ~np.isfinite(course.losses)
    if broken.any():
        return f"loss or gradient was no longer finite (loss from step {int(np.argmax(broken)) + 1})"
    return "gradient was no longer finite"


def _save(assembly: Assembly, run: int, folder: Path) -> None:
    """Write one run's adapter, and its task head beside it."""
    assembly.adapter.save(folder, run)
    if assembly.head is not None:
        tensors = {name: t.cpu().contiguous() for name, t in assembly.head.state_dict_of(run).items()}
        save_file(tensors, folder / HEAD_FILE)


def _tested(assembly: Assembly, rows: list[dict[str, Any]]) -> tuple[list[list[Any]], list[Any]]:
    test = split(assembly, rows)
    return test.evaluator.predict(), test.references


def _quality(
    setting: Setting, course: Course, tested: dict[str, tuple[list[list[Any]], list[Any]]], place: int, run: int
) -> dict[str, Any]:
    """Return the metrics of a run, whose predictions are at `place` of those in `tested`."""
    task, scores = setting.task, course.scores
    quality: dict[str, Any] = {
        "primary_metric": task.primary_metric,
        "greater_is_better": task.greater_is_better,
        "protocol": setting.specs[run].protocol,
        "data_subset": task.subset(),
        "selected_step": scores.step,
        "validation": scores.metrics,
        "evaluations": scores.history,
        "items": {},
    }
    if len(course.losses) < course.total:
        impatient = f"no better {task.primary_metric} in {course.patience} evaluations"
        quality["stopped"] = {
            "step": len(course.losses),
            "of": course.total,
            "reason": course.pruned or impatient,
        }
    for name, (predictions, references) in tested.items():
        quality[name] = task.metrics(predictions[place], references)
        items = task.item_scores(predictions[place], references)
        quality["items"][name] = {"scores": items, "predictions": predictions[place]}
    return quality


def _trace(course: Course, execution: str) -> dict[str, Any]:
    """Return loss and learning rate per step; nine digits give a float32 back exactly."""
    trace: dict[str, Any] = {
        "loss": [float(f"{v:.9g}") if np.isfinite(v) else None for v in course.losses],
        "learning_rate": [float(f"{v:.6g}") for v in course.rates],
    }
    if execution != DEFAULT_EXECUTION:
        trace |= {"execution": course.execution, "replayed_steps": course.replayed}
    return trace
