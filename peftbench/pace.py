"""How fast training goes and how long the rest will take, from what was measured; None until something was."""

import math
from collections import deque
from collections.abc import Mapping

Kind = tuple[str, str]
"""Model and task: packs of one kind take about as long, run for run."""

BETWEEN_SECONDS = 0.25
"""Time between two looks at the rate: a step may take a hundredth of that."""
RECENT = 40
"""Looks that the rate of the moment is taken over: ten seconds or more."""
ENOUGH_SECONDS = 2.0
"""Training shorter than that says nothing about what is left."""


class Rate:
    """Steps per second of training, without what comes between the steps."""

    def __init__(self) -> None:
        self.value: float | None = None
        self._recent: deque[tuple[float, int]] = deque(maxlen=RECENT)
        self._looked = -math.inf
        self._paused: float | None = None
        self._pauses = 0.0

    def restart(self) -> None:
        """Steps are counted anew; the rate stands until there is another."""
        self._recent.clear()
        self._looked = -math.inf

    def pause(self, now: float) -> None:
        """Something else than training begins: that is no slow step."""
        if self._paused is None:
            self._paused = now

    def resume(self, now: float) -> None:
        """Training goes on."""
        if self._paused is not None:
            self._pauses += now - self._paused
            self._paused = None

    def at(self, now: float, done: int) -> None:
        """`done` steps are made at `now` seconds; called after any or every step, hence cheap."""
        if now - self._looked < BETWEEN_SECONDS:
            return
        self._looked = now
        trained = now - self._pauses
        self._recent.append((trained, done))
        since, before = self._recent[0]
        if trained - since >= BETWEEN_SECONDS and done > before:
            self.value = (done - before) / (trained - since)


class Course:
    """How much of some work is done, and the time left at the pace so far, with all that comes between the steps."""

    def __init__(self) -> None:
        self.done, self.total = 0, 0
        self.left: float | None = None
        self._begun: tuple[float, int] | None = None

    def at(self, now: float, done: int, total: int) -> None:
        """`done` of `total` is done at `now` seconds."""
        self.done, self.total = done, total
        if self._begun is None:
            # what comes before the first step is no training, and that step may hold a compilation
            self._begun = (now, done)
        began, before = self._begun
        if now - began >= ENOUGH_SECONDS and done > before:
            self.left = (now - began) / (done - before) * (total - done)


class Durations:
    """Seconds per run of the packs that are through, by their kind."""

    def __init__(self) -> None:
        self._seconds: dict[Kind, tuple[float, int]] = {}

    def add(self, kind: Kind, seconds: float, runs: int) -> None:
        """A pack of `runs` runs took `seconds`."""
        before, count = self._seconds.get(kind, (0.0, 0))
        self._seconds[kind] = (before + seconds, count + runs)

    def per_run(self, kind: Kind, in_hand: tuple[Kind, float] | None = None) -> float | None:
        """Return the mean over packs of that kind, else over other tasks of its model, else None.

        `in_hand` is the kind of the pack being trained and what a run of it is going to take; what is through counts
        first.
        """
        if kind in self._seconds:
            seconds, runs = self._seconds[kind]
            return seconds / runs
        if in_hand is not None and in_hand[0] == kind:
            return in_hand[1]
        same = [v for k, v in self._seconds.items() if k[0] == kind[0]]
        if same:
            return sum(seconds for seconds, _ in same) / sum(runs for _, runs in same)
        return in_hand[1] if in_hand is not None and in_hand[0][0] == kind[0] else None

    def of(self, waiting: Mapping[Kind, int], in_hand: tuple[Kind, float] | None) -> tuple[float, bool]:
        """Return the seconds that runs of known kinds are going to take, and whether those are all that wait."""
        times = {kind: self.per_run(kind, in_hand) for kind in waiting}
        known = sum(seconds * waiting[kind] for kind, seconds in times.items() if seconds is not None)
        return known, None not in times.values()


def clock(seconds: float | None) -> str:
    """Return a length of time as 0:07, 12:40, 3:02:11 or 2d 03:40, or a dash for one that is not known."""
    if seconds is None:
        return "–"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02}:{minute:02}"
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minutes}:{second:02}"
