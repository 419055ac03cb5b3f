"""What a sweep shows while it works: a live display on a terminal, plain lines elsewhere, nothing when quiet."""

import contextlib
import math
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live as Screen
from rich.text import Text

from peftbench.pace import Durations, Kind, Pace, clock
from peftbench.record import RunRecord, RunSpec

REDRAWS_PER_SECOND = 2
"""A redraw takes the interpreter from the training loop for about a millisecond."""
LOSSES = 30
"""Losses in the sparkline."""
LOSS_SECONDS = 0.5
"""Losses of that long become one value of the sparkline."""
NAMED_METHODS = 3
"""Methods of a pack that are named; the others are counted."""
PHASES = {
    "load": "loading",
    "profile": "measuring cost",
    "train": "training",
    "evaluate": "evaluating",
    "test": "testing",
}
STYLES = {"completed": "green", "diverged": "yellow", "out_of_memory": "red", "failed": "red"}


def headline(record: RunRecord) -> str:
    """Return one line about a finished run: its id and its test metric or what went wrong."""
    if record.status == "completed" and record.quality:
        metric = record.quality.get("primary_metric")
        value = (record.quality.get("test") or {}).get(metric)
        return f"{record.run_id}: {metric} {value:.4f}" if isinstance(value, float) else f"{record.run_id}: done"
    reason = (record.error or "").strip().splitlines()
    return f"{record.run_id}: {record.status.replace('_', ' ')}{': ' + reason[-1] if reason else ''}"


def described(specs: Sequence[RunSpec]) -> str:
    """Return how many runs of which methods on which tasks with which models."""
    methods = Counter(str(spec.method["name"]) for spec in specs)
    named = [f"{count} × {name}" for name, count in methods.items()]
    if len(named) > NAMED_METHODS + 1:
        rest = len(named) - NAMED_METHODS
        named = [f"{len(specs)} runs: {named[0]}", *named[1:NAMED_METHODS], f"{rest} more methods"]
    tasks, models = (dict.fromkeys(str(getattr(s, part)["name"]) for s in specs) for part in ("task", "model"))
    return f"{', '.join(named)} on {', '.join(tasks)} with {', '.join(models)}"


def sparkline(values: Sequence[float], ascii_only: bool = False) -> str:
    """Return one character a value, from the lowest to the highest of them."""
    levels = "_.-=^" if ascii_only else "▁▂▃▄▅▆▇█"
    if not values:
        return ""
    low, high = min(values), max(values)
    scale = (len(levels) - 1) / (high - low) if high > low else 0.0
    return "".join(levels[round((v - low) * scale)] for v in values)


class Quiet:
    """A listener that says nothing; what a listener may be told. The others overrule what they show."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        return None

    def pack(self, specs: Sequence[RunSpec]) -> None:
        """A pack begins; its runs train side by side, or some of them after others."""

    def phase(self, name: str) -> None:
        """Something else begins: load, profile, train, evaluate, test."""

    def members(self, specs: Sequence[RunSpec]) -> None:
        """From now on these runs of the pack train side by side, and steps are counted anew."""

    def steps(self, done: int, total: int, losses: Sequence[float] | None) -> None:
        """`done` of `total` optimizer steps of the members; losses per run, or None where nobody looked."""

    def evaluated(self, step: int, metric: str, values: Sequence[float | None], greater_is_better: bool) -> None:
        """The members' values of a validation metric after `step`; None for one that is not defined."""

    def record(self, record: RunRecord) -> None:
        """A run's record was written."""

    def note(self, line: str) -> None:
        """Something worth a line happened."""


class Lines(Quiet):
    """One plain line per run, pack and note, for logs and for packs in other processes."""

    def __init__(self, packs: Sequence[Sequence[RunSpec]], console: Console) -> None:
        self.packs, self.console = packs, console
        self.runs = sum(len(pack) for pack in packs)
        self.counts: Counter[str] = Counter()
        self.position = -1
        self._positions = {spec.run_id: i for i, pack in enumerate(packs) for spec in pack}

    @property
    def done(self) -> int:
        """How many runs have a record now."""
        return self.counts.total()

    def _say(self, line: str) -> None:
        # an error's text may hold anything
        line = "".join(c if c.isprintable() else " " for c in line)
        self.console.print(line, markup=False, highlight=False, emoji=False, soft_wrap=True)

    def _move(self, specs: Sequence[RunSpec]) -> None:
        """Find the place of a pack: those that another process trains are passed over."""
        self.position = self._positions.get(specs[0].run_id, self.position + 1)

    def pack(self, specs: Sequence[RunSpec]) -> None:
        self._move(specs)
        which = f"pack {self.position + 1}/{len(self.packs)}" if len(self.packs) > 1 else "pack"
        self._say(f"{which}: {described(specs)}")

    def record(self, record: RunRecord) -> None:
        self.counts[record.status] += 1
        self._say(f"  [{self.done}/{self.runs}] {headline(record)}")

    def note(self, line: str) -> None:
        self._say(line)


class Live(Lines):
    """The sweep, the pack in hand and its training, redrawn at the foot of the terminal below the lines.

    What is told is only noted; a thread draws. So the parts that work wait neither for the terminal nor, since nothing
    here asks for a value that was not handed over, for the device.
    """

    def __init__(
        self,
        packs: Sequence[Sequence[RunSpec]],
        console: Console,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(packs, console)
        self.now = now
        self.started = now()
        self.packs_done = 0
        self.durations = Durations()
        self.waiting = _kinds(packs)
        self.specs: Sequence[RunSpec] = ()
        self.phase_name = ""
        self._forget()

    def _forget(self) -> None:
        """Nothing is known of the pack in hand yet."""
        self.begun = self.now()
        self.training: Sequence[RunSpec] = self.specs
        self.recorded: dict[str, str] = {}
        self.trained: set[str] = set()
        self.metric: Text | None = None
        self._restart()

    def _restart(self) -> None:
        """Nothing is known of the members' training yet."""
        self.since = self.now()
        self.pace = Pace()
        self.losses: tuple[float, ...] = ()
        self._sum, self._count, self._told, self._last = 0.0, 0, -math.inf, math.nan

    def __enter__(self) -> Self:
        self.screen = Screen(
            self,
            console=self.console,
            refresh_per_second=REDRAWS_PER_SECOND,
            transient=True,
            redirect_stdout=sys.stdout.isatty(),  # a pipe or file keeps what is printed for it
        )
        self.screen.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.screen.stop()

    def pack(self, specs: Sequence[RunSpec]) -> None:
        self._move(specs)
        self.waiting = _kinds(self.packs[self.position + 1 :])
        self.specs = specs
        self._forget()

    def phase(self, name: str) -> None:
        self.phase_name = name
        self.pace.pause()

    def members(self, specs: Sequence[RunSpec]) -> None:
        self.training = specs
        self._restart()

    def steps(self, done: int, total: int, losses: Sequence[float] | None) -> None:
        now = self.now()
        if done < self.pace.done:
            self._restart()
        if self.pace.total == 0:
            self.trained.update(spec.run_id for spec in self.training)
        self.pace.at(now, done, total)
        finite = [x for x in losses or () if x is not None and math.isfinite(x)]
        if not finite:
            return
        mean = sum(finite) / len(finite)
        if mean == self._last:
            return  # the same look told again
        self._last = mean
        self._sum, self._count = self._sum + mean, self._count + 1
        if now - self._told >= LOSS_SECONDS or done == total:
            # a new tuple: the thread that draws may be reading the old one
            self.losses = (*self.losses[1 - LOSSES :], self._sum / self._count)
            self._sum, self._count, self._told = 0.0, 0, now

    def evaluated(self, step: int, metric: str, values: Sequence[float | None], greater_is_better: bool) -> None:
        known = [v for v in values if v is not None and math.isfinite(v)]
        best = (max if greater_is_better else min)(known, default=None)
        if best is None:
            shown = "–"
        elif len(values) == 1:
            shown = f"{best:.4f}"
        else:
            shown = f"{best:.4f} best, {statistics.median(known):.4f} median"
        self.metric = _field(f"{metric} ", shown)

    def record(self, record: RunRecord) -> None:
        super().record(record)
        self.recorded[record.run_id] = record.status
        if not {spec.run_id for spec in self.specs} <= self.recorded.keys():
            return
        # a pack that failed at once says nothing about how long others take
        if self.specs and "completed" in self.recorded.values():
            self.durations.add(_kind(self.specs[0]), self.now() - self.begun, len(self.specs))
        self.packs_done += 1
        self.specs = ()
        self._forget()

    def _pack_left(self, now: float) -> tuple[float | None, float | None]:
        """Return the seconds left for the pack in hand, and those that each of its runs takes in all, if measured."""
        left = self.pace.left if self.phase_name in ("train", "evaluate") else None
        if left is None:
            usual = self.durations.per_run(_kind(self.specs[0]))
            return None if usual is None else max(0.0, usual * len(self.specs) - (now - self.begun)), usual
        over = self.trained | self.recorded.keys() | {spec.run_id for spec in self.training}
        later = sum(spec.run_id not in over for spec in self.specs)
        left += later * (now - self.since + left) / len(self.training)
        return left, (now - self.begun + left) / len(self.specs)

    def left(self, now: float) -> tuple[float | None, float | None, bool]:
        """Return the seconds left for the pack in hand and for the sweep, and whether the latter are all of them."""
        hand, per_run = self._pack_left(now) if self.specs else (None, None)
        in_hand = None if per_run is None else (_kind(self.specs[0]), per_run)
        rest, complete = self.durations.of(self.waiting, in_hand)
        known = not self.specs or hand is not None
        total = rest + (hand or 0.0)
        begun = self.position >= 0 and (hand is not None or rest > 0)
        return hand, total if begun else None, complete and known

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width, ascii_only, now = options.max_width, options.ascii_only, self.now()
        bar = 20 if width >= 80 else 10
        pack_left, left, complete = self.left(now)
        sweep = [
            _field("packs ", f"{self.packs_done}/{len(self.packs)}"),
            _field("runs ", f"{self.done}/{self.runs}"),
            _bar(self.done, self.runs, bar, ascii_only),
            *(
                Text(f"{self.counts[status]} {status.replace('_', ' ')}", style)
                for status, style in STYLES.items()
                if status == "completed" or self.counts[status]
            ),
            _field("elapsed ", clock(now - self.started)),
            _field("left " if complete or left is None else "left at least ", clock(left)),
        ]
        phase = PHASES.get(self.phase_name, self.phase_name)
        blocks = [sweep]
        if not self.specs:
            blocks.append([Text(phase)])
        else:
            blocks.append([Text(described(self.training), "bold"), Text(phase)])
            pace = self.pace
            rates = [
                _field("", f"{_number(pace.rate)} steps/s"),
                _field("", f"{_number(pace.rate, len(self.training))} runs × steps/s"),
            ]
            if pace.total:
                step = [_field("steps ", f"{pace.done}/{pace.total}"), _bar(pace.done, pace.total, bar, ascii_only)]
                blocks.append([*step, *rates, _field("left ", clock(pack_left))])
                loss = f"{sparkline(self.losses, ascii_only)} {self.losses[-1]:.4f}" if self.losses else "–"
                blocks.append([_field("loss ", loss), *([self.metric] if self.metric else [])])
        for fields in blocks:
            yield from _flow(fields, width)


def _kind(spec: RunSpec) -> Kind:
    return str(spec.model["name"]), str(spec.task["name"])


def _kinds(packs: Sequence[Sequence[RunSpec]]) -> Counter[Kind]:
    return Counter(_kind(spec) for pack in packs for spec in pack)


def _number(rate: float | None, times: int = 1) -> str:
    if rate is None:
        return "–"
    return f"{rate * times:.0f}" if rate * times >= 100 else f"{rate * times:.3g}"


def _field(label: str, value: str) -> Text:
    return Text.assemble((label, "dim"), value)


def _bar(done: int, total: int, width: int, ascii_only: bool) -> Text:
    full, empty = ("#", "-") if ascii_only else ("━", "─")
    filled = width * done // max(total, 1)
    return Text.assemble((full * filled, "green"), (empty * (width - filled), "dim"))


def _flow(fields: Sequence[Text], width: int) -> Iterator[Text]:
    """Put fields side by side, two blanks apart, as many as a line holds; what is wider than a line is cut."""
    line = Text()
    for field in fields:
        if line and line.cell_len + 2 + field.cell_len > width:
            yield line
            line = Text()
        line = Text.assemble(line, "  ", field) if line else field.copy()
        line.truncate(width, overflow="ellipsis")
    yield line


_CURRENT: Any = None


@contextlib.contextmanager
def display(packs: Sequence[Sequence[RunSpec]], quiet: bool, here: bool = True) -> Iterator[Quiet]:
    """Show a sweep's progress; `current` finds the display within.

    Packs that are not trained `here` write lines of their own, to a terminal that nothing else may draw on.
    """
    global _CURRENT
    console = Console(stderr=True)
    if quiet:
        shown: Quiet = Quiet()
    elif here and console.is_interactive and console.file.isatty():  # colours may be forced on what is no terminal
        shown = Live(packs, console)
    else:
        shown = Lines(packs, console)
    with shown:
        _CURRENT = shown
        try:
            yield shown
        finally:
            _CURRENT = None


def current(specs: Sequence[RunSpec], quiet: bool = False) -> Quiet:
    """Return the display of this process; in a launcher's worker process, plain lines unless `quiet`."""
    if _CURRENT is not None:
        return _CURRENT
    return Quiet() if quiet else Lines([specs], Console(stderr=True))
