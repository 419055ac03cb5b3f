"""How fast training goes and how long the rest will take, from what was measured; None until something was."""

import math
from collections import deque
from collections.abc import Mapping

Kind = tuple[str, str]
"""Model and task: packs of one kind take about as long, run for run."""

BETWEEN_SECONDS = 0.25
"""Time between two looks at the pace: a step may take a hundredth of that."""
RECENT = 40
"""Looks that the pace of the moment is taken over: ten seconds."""
ENOUGH_SECONDS = 2.0
"""Training shorter than that says nothing about what is left."""


class Pace:
    """Steps of the runs that train side by side: per second now, and seconds until the last one."""

    def __init__(self) -> None:
        self.done, self.total = 0, 0
        self.rate: float | None = None
        self.left: float | None = None
        self._begun = (0.0, 0)
        self._looked = -math.inf
        self._recent: deque[tuple[float, int]] = deque(maxlen=RECENT)

    def at(self, now: float, done: int, total: int) -> None:
        """`done` of `total` steps are made at `now` seconds; called after any or every step, hence cheap."""
        first = self.total == 0
        self.done, self.total = done, total
        if first:
            # what comes before the first step is no training, and that step may hold a compilation
            self._begun = (now, done)
        if now - self._looked < BETWEEN_SECONDS and done < total:
            return
        self._looked = now
        self._recent.append((now, done))
        since, before = self._recent[0]
        if now - since >= BETWEEN_SECONDS and done > before:
            self.rate = (done - before) / (now - since)
        began, first_done = self._begun
        if now - began >= ENOUGH_SECONDS and done > first_done:
            # evaluations between the steps come again in what is left
            self.left = (now - began) / (done - first_done) * (total - done)

    def pause(self) -> None:
        """Something else than training begins: it does not count as slow steps."""
        self._recent.clear()
        self._looked = -math.inf


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
