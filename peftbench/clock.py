"""Seconds by phase of a pack: what loading, training steps and evaluation take of its time, and each run's share."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol


class Phases(Protocol):
    """What hears of phases."""

    def phase(self, name: str) -> None: ...


class Member(Protocol):
    """A run, as far as clocks know it."""

    @property
    def run_id(self) -> str: ...


UNSHARED = "profile"
"""The phase that is no run's: a cost that others copy is measured."""


class Clock:
    """Passes on whatever a listener is told, and keeps the seconds spent in each phase.

    Time is shared alike by the runs that train side by side, and what comes before the first of them by all that ever
    do; what follows a stretch until the next one begins by those that trained in it.

    Args:
        listener: who is told.
        settle: waits for the device, so that steps still queued count for the phase that queued them.
    """

    def __init__(self, listener: Phases, settle: Callable[[], object] = lambda: None) -> None:
        self._listener, self._settle = listener, settle
        self._seconds: dict[str, float] = {}
        self._current: str | None = None
        self._since = time.perf_counter()
        self._members: list[str] = []
        self._divided = 0.0
        self._before = 0.0
        self._shares: dict[str, float] = {}

    def _turn(self, name: str | None) -> None:
        """End the phase in hand and begin that called `name`."""
        if self._current is not None:
            self._settle()
        now = time.perf_counter()
        if self._current is not None:
            self._seconds[self._current] = self._seconds.get(self._current, 0.0) + now - self._since
        self._current, self._since = name, now

    def seconds(self) -> dict[str, float]:
        """End the phase in hand and return phase → seconds, in order of first appearance."""
        self._turn(None)
        return {name: round(seconds, 4) for name, seconds in self._seconds.items()}

    def phase(self, name: str) -> None:
        self._turn(name)
        self._listener.phase(name)

    def members(self, specs: Sequence[Member]) -> None:
        """Take the runs that train side by side from now on."""
        self._turn(self._current)
        self._divide()
        self._members = [spec.run_id for spec in specs]
        self._listener.members(specs)  # type: ignore[attr-defined]

    def _divide(self) -> None:
        """Charge what has passed since the last time to those who trained."""
        spent = sum(seconds for name, seconds in self._seconds.items() if name != UNSHARED)
        if self._members:
            for run_id in self._members:
                part = (spent - self._divided) / len(self._members)
                self._shares[run_id] = self._shares.get(run_id, 0.0) + part
        else:
            self._before += spent - self._divided
        self._divided = spent

    def share(self, run_id: str, runs: int) -> float:
        """Return the seconds that a run of a pack of `runs` took so far; to be asked after `seconds`."""
        self._divide()
        return round(self._shares.get(run_id, 0.0) + self._before / runs, 4)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._listener, name)
