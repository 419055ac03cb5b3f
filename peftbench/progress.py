"""What a sweep shows while it works: a live display on a terminal, plain lines elsewhere, nothing when quiet."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from peftbench.record import RunRecord, RunSpec


class Listener(Protocol):
    """What the parts that work tell about it."""

    def phase(self, name: str) -> None:
        """Something else begins: loading, profiling, training, evaluating."""

    def steps(self, done: int, total: int, losses: Sequence[float] | None) -> None:
        """`done` of `total` optimizer steps of the pack in hand; losses per run where they are known."""

    def record(self, record: RunRecord) -> None:
        """A run's record was written."""


def headline(record: RunRecord) -> str:
    """Return one line about a finished run: its id and its test metric or what went wrong."""
    if record.status == "completed" and record.quality:
        metric = record.quality.get("primary_metric")
        value = (record.quality.get("test") or {}).get(metric)
        return f"{record.run_id}: {metric} {value:.4f}" if isinstance(value, float) else f"{record.run_id}: done"
    reason = (record.error or "").strip().splitlines()
    return f"{record.run_id}: {record.status.replace('_', ' ')}{': ' + reason[-1] if reason else ''}"


class Quiet:
    """A listener that says nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        return None

    def pack(self, specs: Sequence[RunSpec]) -> None:
        """A pack begins."""

    def phase(self, name: str) -> None:
        """Say nothing."""

    def steps(self, done: int, total: int, losses: Sequence[float] | None) -> None:
        """Say nothing."""

    def record(self, record: RunRecord) -> None:
        """Say nothing."""

    def note(self, line: str) -> None:
        """Say nothing."""


class Lines(Quiet):
    """One plain line per run and one per pack, for logs and for packs in other processes."""

    def __init__(self, packs: int, runs: int, console: Console) -> None:
        self.packs, self.runs, self.console = packs, runs, console
        self.pack_index = self.done = 0

    def _say(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def pack(self, specs: Sequence[RunSpec]) -> None:
        self.pack_index += 1
        first = specs[0]
        self._say(
            f"pack {self.pack_index}/{self.packs}: {len(specs)} × {first.method['name']} on {first.task['name']}"
            f" with {first.model['name']}"
        )

    def record(self, record: RunRecord) -> None:
        self.done += 1
        self._say(f"  [{self.done}/{self.runs}] {headline(record)}")

    def note(self, line: str) -> None:
        self._say(line)


class Live(Lines):
    """Bars for runs and for the steps of the pack in hand, with steps per second, loss and time left."""

    def __enter__(self) -> Self:
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[info]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        self.all = self.bars.add_task("runs", total=self.runs, info="")
        self.current = self.bars.add_task("steps", total=None, info="", visible=False)
        self.started = time.monotonic()
        self.bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bars.stop()

    def pack(self, specs: Sequence[RunSpec]) -> None:
        self.pack_index += 1
        first = specs[0]
        many = f"{len(specs)} × " if len(specs) > 1 else ""
        name = f"{many}{first.method['name']} · {first.task['name']} · {first.model['name']}"
        self.bars.update(self.all, info=f"pack {self.pack_index}/{self.packs}")
        self.bars.reset(self.current, total=None, description=name, info="", visible=True)

    def phase(self, name: str) -> None:
        self.bars.update(self.current, info=name)
        self.started = time.monotonic()

    def steps(self, done: int, total: int, losses: Sequence[float] | None) -> None:
        rate = done / max(time.monotonic() - self.started, 1e-9)
        shown = [x for x in (losses or ()) if x is not None]
        loss = f" · loss {sum(shown) / len(shown):.3f}" if shown else ""
        self.bars.update(self.current, completed=done, total=total, info=f"{rate:.1f} steps/s{loss}")

    def record(self, record: RunRecord) -> None:
        super().record(record)
        self.bars.update(self.all, completed=self.done)


_CURRENT: Any = None


@contextlib.contextmanager
def display(packs: int, runs: int, quiet: bool) -> Iterator[Quiet]:
    """Show a sweep's progress; `current` finds the display within."""
    global _CURRENT
    console = Console(stderr=True)
    if quiet:
        shown: Quiet = Quiet()
    elif console.is_terminal:
        shown = Live(packs, runs, console)
    else:
        shown = Lines(packs, runs, console)
    with shown:
        _CURRENT = shown
        try:
            yield shown
        finally:
            _CURRENT = None


def current(runs: int) -> Quiet:
    """Return the display of this process; in a launcher's worker process, plain lines."""
    return _CURRENT if _CURRENT is not None else Lines(1, runs, Console(stderr=True))
