"""Seconds by phase of a pack: what loading, training steps and evaluation take of its time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol


class Phases(Protocol):
    """What hears of phases."""

    def phase(self, name: str) -> None: ...


class Clock:
    """Passes on whatever a listener is told, and keeps the seconds spent in each phase.

    Args:
        listener: who is told.
        settle: waits for the device, so that steps still queued count for the phase that queued them.
    """

    def __init__(self, listener: Phases, settle: Callable[[], object] = lambda: None) -> None:
        self._listener, self._settle = listener, settle
        self._seconds: dict[str, float] = {}
        self._current: str | None = None
        self._since = time.perf_counter()

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

    def __getattr__(self, name: str) -> Any:
        return getattr(self._listener, name)
