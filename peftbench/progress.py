"""What a sweep shows while it works: a live display on a terminal, plain lines elsewhere, nothing when quiet."""

import contextlib
import math
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live as Screen
from rich.text import Text

from peftbench.pace import Course, Durations, Kind, Rate, clock
from peftbench.record import RunRecord, RunSpec

REDRAWS_PER_SECOND = 2
"""Each takes the interpreter from the training loop for one or two milliseconds."""
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
STYLES = {"completed": "green", "pruned": "dim", "diverged": "yellow", "out_of_memory": "red", "failed": "red"}


def headline(record: RunRecord) -> str:
    """Return one line about a finished run: its id and its test metric or what went wrong.

    A search's trials show the metric of validation, by which they are judged: nobody is to choose among them by test.
    """
    if record.status == "completed" and record.quality:
        metric = record.quality.get("primary_metric")
        split = "test" if record.search is None else "validation"
        value = (record.quality.get(split) or {}).get(metric)
        name = metric if record.search is None else f"validation {metric}"
        return f"{record.run_id}: {name} {value:.4f}" if isinstance(value, float) else f"{record.run_id}: done"
    if record.status == "pruned" and record.quality:
        stopped = record.quality["stopped"]
        return f"{record.run_id}: pruned after {stopped['step']} of {stopped['of']} steps"
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


_MEANWHILE: list[Callable[[Sequence[RunSpec]], None]] = []


def meanwhile(work: Callable[[Sequence[RunSpec]], None]) -> None:
    """Have `work` called once, with the runs, when the first steps of this process are about to be made."""
    _MEANWHILE[:] = [work]


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

    def planned(self, specs: Sequence[RunSpec], steps: Sequence[int]) -> None:
        """Training of these runs of the pack begins from nothing; each has so many steps to make, or ends early."""

    def members(self, specs: Sequence[RunSpec]) -> None:
        """From now on these of the planned runs train side by side, and steps are counted anew."""
        while _MEANWHILE:
            _MEANWHILE.pop()(specs)

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
        # Never held while something is printed: printing waits for the thread that draws, which waits for this.
        self.lock = threading.RLock()
        self.started = now()
        self.packs_done = 0
        self.durations = Durations()
        self.waiting = _kinds(packs)
        self.phase_name = ""
        self._take(())

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

    def _take(self, specs: Sequence[RunSpec]) -> None:
        """Take a pack, or none, in hand: nothing is known of it yet."""
        self.specs = self.training = specs
        self.begun = self.now()
        self.recorded: dict[str, str] = {}
        self.rate = Rate()
        self.planned((), ())

    def pack(self, specs: Sequence[RunSpec]) -> None:
        with self.lock:
            self._move(specs)
            self.waiting = _kinds(self.packs[self.position + 1 :])
            self._take(specs)

    def planned(self, specs: Sequence[RunSpec], steps: Sequence[int]) -> None:
        with self.lock:
            self.plan = {spec.run_id: count for spec, count in zip(specs, steps, strict=True)}
            self.made: Counter[str] = Counter()
            self.course = Course()
            self.metric: Text | None = None
            self.losses: tuple[float, ...] = ()
            self._sum, self._count, self._told, self._last = 0.0, 0, -math.inf, math.nan
            self.done_steps = self.all_steps = 0
            self._settle()

    def _settle(self) -> None:
        """Add the members' steps up to now to what each run has made."""
        self.made.update({spec.run_id: self.done_steps for spec in self.training})
        self.done_steps = 0
        self.before = sum(self.made[run_id] for run_id in self.plan)
        # a run that ended early makes no more steps
        self.work = sum(self.made[i] if i in self.recorded else total for i, total in self.plan.items())

    def phase(self, name: str) -> None:
        with self.lock:
            self.phase_name = name
            (self.rate.resume if name == "train" else self.rate.pause)(self.now())

    def members(self, specs: Sequence[RunSpec]) -> None:
        super().members(specs)
        with self.lock:
            self._settle()
            self.training = specs
            self.all_steps = 0
            self.rate.restart()

    def steps(self, done: int, total: int, losses: Sequence[float] | None) -> None:
        with self.lock:
            now, runs = self.now(), len(self.training)
            self.done_steps, self.all_steps = done, total
            self.rate.at(now, done)
            self.course.at(now, self.before + done * runs, self.work or total * runs)
            if losses is not None:
                self._note_losses(now, losses, done == total)

    def _note_losses(self, now: float, losses: Sequence[float], last: bool) -> None:
        finite = [x for x in losses if x is not None and math.isfinite(x)]
        mean = sum(finite) / len(finite) if finite else math.nan
        if not finite or mean == self._last:
            return  # nothing, or what was told before
        self._last = mean
        self._sum, self._count = self._sum + mean, self._count + 1
        if now - self._told >= LOSS_SECONDS or last:
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
        with self.lock:
            self.recorded[record.run_id] = record.status
            self._settle()
            if not self.specs or not {spec.run_id for spec in self.specs} <= self.recorded.keys():
                return
            # a pack that failed at once says nothing about how long others take
            if "completed" in self.recorded.values():
                self.durations.add(_kind(self.specs[0]), self.now() - self.begun, len(self.specs))
            self.packs_done += 1
            self._take(())

    def _pack_left(self, now: float) -> tuple[float | None, float | None]:
        """Return the seconds left for the pack in hand, and those that each of its runs takes in all, if measured."""
        course, runs = self.course, len(self.specs)
        if course.left is None or course.done >= course.total:
            usual = self.durations.per_run(_kind(self.specs[0]))
            return None if usual is None else max(0.0, usual * runs - (now - self.begun)), usual
        left = course.left
        if self.plan:
            # the other half of a pack that memory did not hold is not planned yet
            later = sum(spec.run_id not in self.plan and spec.run_id not in self.recorded for spec in self.specs)
            left += later * (left / (course.total - course.done)) * course.total / len(self.plan)
        return left, (now - self.begun + left) / runs

    def left(self, now: float) -> tuple[float | None, float | None, bool]:
        """Return the seconds left for the pack in hand and for the sweep, and whether the latter are all of them."""
        with self.lock:
            hand, per_run = self._pack_left(now) if self.specs else (None, None)
            in_hand = None if per_run is None else (_kind(self.specs[0]), per_run)
            rest, complete = self.durations.of(self.waiting, in_hand)
            if self.specs and hand is None:
                complete = False
        known = self.position >= 0 and (hand is not None or rest > 0)
        return hand, rest + (hand or 0.0) if known else None, complete

    def view(self, width: int, ascii_only: bool = False) -> list[Text]:
        """Return the lines for a terminal of `width` columns."""
        bar = 20 if width >= 100 else 10
        with self.lock:
            now = self.now()
            pack_left, left, complete = self.left(now)
            phase = Text(PHASES.get(self.phase_name, self.phase_name))
            blocks = [self._sweep_line(now, left, complete, bar, ascii_only)]
            if not self.specs:
                blocks.append([phase])
            else:
                busy = self.recorded.keys() | {spec.run_id for spec in self.training}
                waiting = sum(spec.run_id not in busy for spec in self.specs)
                others = [Text(f"{waiting} more wait")] if waiting > 0 else []
                blocks.append([Text(described(self.training), "bold"), phase, *others])
                if self.course.total:
                    blocks += [self._steps_line(pack_left, bar, ascii_only), self._loss_line(ascii_only)]
        return [line for fields in blocks for line in _flow(fields, width)]

    def _sweep_line(self, now: float, left: float | None, complete: bool, bar: int, ascii_only: bool) -> list[Text]:
        statuses = [s for s in STYLES if s == "completed" or self.counts[s]]
        return [
            _field("packs ", f"{self.packs_done}/{len(self.packs)}"),
            _field("runs ", f"{self.done}/{self.runs}"),
            _bar(self.done, self.runs, bar, ascii_only),
            *(Text(f"{self.counts[s]} {s.replace('_', ' ')}", STYLES[s]) for s in statuses),
            _field("elapsed ", clock(now - self.started)),
            _field("left " if complete or left is None else "left at least ", clock(left)),
        ]

    def _steps_line(self, left: float | None, bar: int, ascii_only: bool) -> list[Text]:
        done, total, runs = self.course.done, self.course.total, len(self.training)
        counted = ("steps ", f"{done // runs}/{total // runs}")
        if total != self.all_steps * runs:  # others make steps before or after these runs
            counted = ("runs × steps ", f"{done}/{total}")
        return [
            _field(*counted),
            _bar(done, total, bar, ascii_only),
            _field("left ", clock(left)),
            _field("", f"{_number(self.rate.value)} steps/s"),
            _field("", f"{_number(self.rate.value, runs)} runs × steps/s"),
        ]

    def _loss_line(self, ascii_only: bool) -> list[Text]:
        loss = f"{sparkline(self.losses, ascii_only)} {self.losses[-1]:.4f}" if self.losses else "–"
        return [_field("loss ", loss), *([self.metric] if self.metric else [])]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from self.view(options.max_width, options.ascii_only)


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
