"""How long is a training step, and how much memory does it take, beside HF PEFT's and full fine-tuning's?

    python experiments/peers/steps.py --model llama-3.2-1b --batch 8 --length 1024 --out results/peers/llama-1b.jsonl
    python experiments/peers/steps.py --model smollm2-135m --weights pretrained --contestants lora --bars
    python experiments/peers/steps.py --table results/peers/*.jsonl --bars

One process; the contestants take turns, A B C … A B C …, on the same frozen base and the same batch. See README.md.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bars
import common
import torch
from common import say
from contestants import BUILDERS, GROUPS, Arena, Contestant
from torch import Tensor

from peftbench.errors import UserError

BLOCK = 512
"""Bytes to whose multiple the allocator rounds."""
PARKED_FROM = 2**30
"""Contestants that keep more bytes than this for themselves wait on the host between turns."""
SMALLEST_PARKED = 2**20


class Parked:
    """Storages whose contents wait on the host while their memory is free; every tensor on them stays what it is."""

    def __init__(self, tensors: Iterable[Tensor], keep: Iterable[Tensor] = ()) -> None:
        """Send away the storages of `tensors` of at least `SMALLEST_PARKED` bytes, but none that `keep` lie on."""
        kept = {t.untyped_storage()._cdata for t in keep}
        storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors}
        self.places: list[tuple[torch.UntypedStorage, Tensor]] = []
        for key, storage in storages.items():
            if key in kept or storage.nbytes() < SMALLEST_PARKED or not storage.resizable():
                continue
            host = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=storage.device.type == "cuda")
            host.copy_(_bytes(storage))
            self.places.append((storage, host))
        for storage, _ in self.places:
            storage.resize_(0)

    def back(self) -> None:
        """Put everything back."""
        for storage, host in self.places:
            storage.resize_(host.numel())
            _bytes(storage).copy_(host)
        self.places.clear()


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


@dataclass
class Entry:
    """A contestant in the race: what it is, what it keeps, what was measured."""

    name: str
    contestant: Contestant | None = None
    own_bytes: int = 0
    build_seconds: float | None = None
    parked: Parked | None = None
    undo: ExitStack | None = None
    samples: list[list[float]] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    status: str = "completed"
    error: str | None = None

    def fail(self, error: BaseException) -> None:
        """Note why there is no result."""
        self.status = "out_of_memory" if isinstance(error, torch.OutOfMemoryError) else "failed"
        self.error = " ".join(f"{type(error).__name__}: {error}".split())[:400]
        say(f"{self.name}: {self.status.replace('_', ' ')}: {self.error}")


class Race:
    """Builds contestants one after the other and lets them take turns."""

    def __init__(self, arena: Arena, *, exclusive: bool, warmup: int) -> None:
        self.arena, self.exclusive, self.warmup = arena, exclusive, warmup
        self.entries: list[Entry] = []
        self._compiled = False
        base = {t.untyped_storage()._cdata: t.untyped_storage() for t in arena.base_tensors()}
        gc.freeze()  # what is there by now stays: collecting between turns need not look at it again
        self.base_bytes = sum(-(-s.nbytes() // BLOCK) * BLOCK for s in base.values())

    def build(self, name: str) -> None:
        """Set one up and make its first steps; a failure is noted, not raised."""
        entry = Entry(name)
        self.entries.append(entry)
        begin, others, graphs = time.perf_counter(), self._allocated(), _graphs()
        with ExitStack() as around:
            with ExitStack() as own:
                contestant = None
                try:
                    contestant = own.enter_context(BUILDERS[name](self.arena))
                    around.enter_context(self._base_away(contestant))
                    if contestant.uses_base or self._base_goes(contestant):
                        others -= self.base_bytes
                    self._reset_peak()
                    entry.losses.append(float(contestant.step()))
                    for _ in range(self.warmup):
                        contestant.step()
                    common.synchronize(self.arena.device)
                    if name.endswith("-compiled") and name.startswith("ours-"):
                        self._compiled |= _graphs() > graphs
                        # the same code may have been compiled for an earlier one, but then for somebody
                        if not self._compiled:
                            raise RuntimeError("train.execution=compiled compiled nothing")
                    entry.contestant = contestant
                    entry.undo = own.pop_all()
                except Exception as error:  # noqa: BLE001  it is a result
                    entry.fail(error)
                    contestant = None  # it goes before the base comes back
            if contestant is not None:
                if self.arena.device.type == "cuda":
                    gc.collect()
                entry.own_bytes = self._allocated() - others - (self.base_bytes if contestant.uses_base else 0)
                if not contestant.movable:
                    # what a graph uses between its steps counts as allocated while it is captured, and never again
                    entry.peaks.append(self._peak() - others)
                entry.build_seconds = time.perf_counter() - begin
                say(f"{name}: ready after {entry.build_seconds:.1f} s, loss {entry.losses[0]:.4f}")
            self._park(entry)

    def turn(self, entry: Entry, steps: int) -> None:
        """Let one make `steps` timed steps after the warm-up ones."""
        device, contestant = self.arena.device, entry.contestant
        if contestant is None or entry.status != "completed":
            return
        try:
            with self._present(entry):
                others = self._allocated() - entry.own_bytes - (self.base_bytes if contestant.uses_base else 0)
                self._reset_peak()
                for _ in range(self.warmup):
                    loss = contestant.step()
                entry.samples.append(common.time_calls(contestant.step, device, steps))
                entry.peaks.append(self._peak() - others)
                entry.losses.append(float(loss))
        except Exception as error:  # noqa: BLE001  it is a result
            entry.fail(error)

    def close(self) -> None:
        """Take everything apart again, one after the other: all of them may not fit on the device at once."""
        for entry in self.entries:
            entry.contestant = None
            if entry.parked is not None:
                entry.parked.back()
            if entry.undo is not None:
                entry.undo.close()
        gc.unfreeze()

    @contextmanager
    def _present(self, entry: Entry) -> Iterator[None]:
        """Have one contestant's tensors on the device, and no more of the others' than there must be."""
        assert entry.contestant is not None
        with self._base_away(entry.contestant):
            try:
                if entry.parked is not None:
                    entry.parked.back()
                yield
            finally:
                self._park(entry)

    def _base_goes(self, contestant: Contestant) -> bool:
        """Whether the base has no business on the device; it comes back elsewhere, where no captured graph finds it."""
        fixed = any(e.contestant is not None and not e.contestant.movable for e in self.entries)
        return self.exclusive and not contestant.uses_base and not fixed

    @contextmanager
    def _base_away(self, contestant: Contestant) -> Iterator[None]:
        """Keep the base off the device, if it is to be empty and the contestant does not compute with the base."""
        if not self._base_goes(contestant):
            yield
            return
        base = Parked(self.arena.base_tensors())
        try:
            yield
        finally:
            base.back()

    def _reset_peak(self) -> None:
        if self.arena.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.arena.device)

    def _peak(self) -> int:
        return torch.cuda.max_memory_allocated(self.arena.device) if self.arena.device.type == "cuda" else 0

    def _park(self, entry: Entry) -> None:
        large = self.exclusive or entry.own_bytes > PARKED_FROM
        if entry.contestant is not None and entry.contestant.movable and large:
            entry.parked = Parked(entry.contestant.tensors(), self.arena.base_tensors())
        if self.arena.device.type == "cuda":
            gc.collect()
            # every turn begins with an empty cache: what the one before left behind must not matter
            torch.cuda.empty_cache()

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated(self.arena.device) if self.arena.device.type == "cuda" else 0


def _graphs() -> int:
    """Return how many graphs torch.compile has made so far."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def _allow_many_graphs() -> None:
    """Let one function be compiled for every contestant, and make running out of room an error.

    By default `torch.compile` gives up after eight versions of a function and goes on eagerly.
    """
    from torch._dynamo import config

    config.recompile_limit = config.accumulated_recompile_limit = 4096
    config.fail_on_recompile_limit_hit = True


def names(text: str) -> list[str]:
    """Return the contestants that a comma list of names and groups stands for; raises UserError for an unknown one."""
    found: list[str] = []
    for part in text.split(","):
        if part not in GROUPS and part not in BUILDERS:
            raise UserError(f"--contestants {part}: expected some of {', '.join((*GROUPS, *BUILDERS))}")
        found += GROUPS.get(part, (part,))
    return list(dict.fromkeys(found))


def records(race: Race, origin: dict[str, Any], ceilings: dict[str, float]) -> list[dict[str, Any]]:
    """Return one record a contestant."""
    arena = race.arena
    setting = {
        "model": arena.model,
        "weights": f"{arena.weights} weights",
        "batch": arena.ids.shape[0],
        "length": arena.ids.shape[1],
        "precision": arena.precision,
        "rank": arena.rank,
        "alpha": arena.alpha,
        "matrix_parameters": arena.matrix_parameters,
        "exclusive": race.exclusive,
        "ceilings": ceilings,
    }
    cuda = arena.device.type == "cuda"
    made = []
    for entry in race.entries:
        if entry.contestant is not None and entry.status == "completed" and not entry.contestant.ran():
            entry.fail(RuntimeError("steps ran eagerly"))
    for entry in race.entries:
        c, done = entry.contestant, entry.status == "completed"
        made.append(
            {
                **origin,
                **setting,
                "contestant": entry.name,
                "status": entry.status,
                "error": entry.error,
                "note": None if c is None else c.note,
                "trained_parameters": None if c is None else c.trained,
                "flops_rule": None if c is None else 6 if c.trains_base else 4,
                "step_seconds": common.summary(entry.samples) if done else None,
                "peak_bytes": max(entry.peaks) if done and cuda else None,
                "own_bytes": entry.own_bytes if cuda else None,
                "base_bytes": race.base_bytes if c is not None and c.uses_base else 0,
                "build_seconds": None if entry.build_seconds is None else common.rounded(entry.build_seconds, 3),
                "losses": entry.losses,
            }
        )
    return made


def profile(arena: Arena, name: str, path: Path, steps: int = 3) -> None:
    """Write the kernels that one contestant's steps spend their time in to a text file."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    cuda = arena.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with BUILDERS[name](arena) as contestant:
        for _ in range(3):
            contestant.step()
        common.synchronize(arena.device)
        with profiler(activities=activities, record_shapes=True) as found:
            for _ in range(steps):
                contestant.step()
            common.synchronize(arena.device)
    averages = found.key_averages(group_by_input_shape=not cuda)
    key = "self_device_time_total" if cuda else "self_cpu_time_total"
    parts = [f"{name} on {arena.model}, {tuple(arena.ids.shape)} tokens, {steps} steps"]
    if cuda:
        kernels = [e for e in found.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        parts.append(f"{len(kernels) / steps:.0f} kernels and copies a step")
    parts.append(averages.table(sort_by=key, row_limit=60, max_name_column_width=110))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print(f"profile: {path}")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    p.add_argument("--model", default="llama-3.2-1b", help="an option of conf/model/ with Llama's layer names")
    p.add_argument("--weights", choices=("random", "pretrained"), default="random")
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--length", type=int, default=1024)
    p.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    p.add_argument("--rank", type=int, default=16)
    p.add_argument("--alpha", type=float, default=32.0)
    p.add_argument("--contestants", default="all", help=f"comma list of names or of {', '.join(GROUPS)}")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--steps", type=int, default=4, help="timed steps in each round")
    p.add_argument("--warmup", type=int, default=2, help="steps before the timed ones of every turn")
    p.add_argument("--build-limit", type=float, default=None, help="seconds after which nothing more is set up")
    p.add_argument("--device", default="auto")
    p.add_argument("--exclusive", action="store_true", help="nothing of the others stays on the device")
    p.add_argument("--out", type=Path, help="records are added to this file, one a line")
    p.add_argument("--bars", action="store_true", help="print the bars and verdicts")
    p.add_argument("--profile", metavar="CONTESTANT", help="write one contestant's top kernels instead of racing")
    p.add_argument("--profile-out", type=Path)
    p.add_argument("--table", type=Path, nargs="+", metavar="FILE", help="print the table of these records instead")
    return p


def run(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Hold the race and return its records."""
    chosen = names(given.contestants)
    device = common.pick_device(given.device)
    origin = common.header("steps", device)
    arena = Arena.of(
        given.model,
        given.weights,
        given.batch,
        given.length,
        device,
        given.precision,
        given.rank,
        given.alpha,
    )
    say(f"{given.model}: base ready on {origin['device']}")
    # before anything is measured, so that the libraries' own workspaces belong to nobody
    ceilings = common.ceilings(device, arena.dtype)
    say(f"ceilings: {ceilings}")
    _allow_many_graphs()
    race = Race(arena, exclusive=given.exclusive, warmup=given.warmup)
    try:
        for name in chosen:
            if given.build_limit is not None and time.monotonic() - common.START > given.build_limit:
                race.entries.append(Entry(name, status="skipped", error=f"--build-limit {given.build_limit:g} reached"))
                continue
            race.build(name)
        for number in range(given.rounds):
            for entry in race.entries:
                race.turn(entry, given.steps)
            say(f"round {number + 1} of {given.rounds} done")
        return records(race, origin, ceilings)
    finally:
        race.close()


def main(arguments: Sequence[str] | None = None) -> None:
    given = parser().parse_args(arguments)
    if given.table:
        for call in bars.calls(common.read(given.table)):
            print(bars.results(call) + "\n")
            if given.bars:
                print(bars.judged(call) + "\n")
        return
    if given.profile:
        (name,) = names(given.profile)
        device = common.pick_device(given.device)
        arena = Arena.of(given.model, given.weights, given.batch, given.length, device, given.precision, given.rank)
        profile(arena, name, given.profile_out or Path("results/peers") / f"profile-{given.model}-{name}.txt")
        return
    found = run(given)
    common.append(given.out, found)
    print(bars.results(found))
    if given.bars:
        print("\n" + bars.judged(found))
    say("done")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(str(error)) from error
