"""Which runs of a pack train side by side, and for how long: a run leaves when it is done, a waiting one takes over.

Training goes in *stretches* with the same members throughout. A stretch ends when a run ends, and at the end of an
epoch where a place is free and a run waits. Runs join at the beginning of an epoch alone: all runs of a pack go through
the buckets in one order (`engine.batches`), so members differ by whole epochs. The longest runs begin, which leaves the
fewest places empty at the end. Runs of equal length that fill their places train in a single stretch.
"""

from __future__ import annotations

from collections.abc import Sequence


class Relay:
    """Tells who trains next.

    Attributes:
        members: the runs that train now, in the pack's order.
        done: steps made so far, by run.
    """

    def __init__(self, totals: Sequence[int], per_epoch: int, places: int) -> None:
        """Take runs of `totals` steps each, of which at most `places` train side by side."""
        assert places >= 1, places
        self.totals, self.per_epoch, self.places = list(totals), per_epoch, places
        self.members: list[int] = []
        self.done = [0] * len(self.totals)
        self._waiting = sorted(range(len(self.totals)), key=lambda run: -self.totals[run])

    @property
    def waits(self) -> bool:
        """Whether a run waits for a place."""
        return bool(self._waiting)

    @property
    def _place(self) -> int:
        """Steps since the epoch began, the same for all members."""
        return self.done[self.members[0]] % self.per_epoch if self.members else 0

    def begin(self) -> list[int]:
        """Let runs join where they may, and return the members of the next stretch; none: all runs are done."""
        if self._place == 0:
            free = self.places - len(self.members)
            self.members = sorted(self.members + self._waiting[:free])
            del self._waiting[:free]
        return list(self.members)

    def length(self) -> int:
        """Return how many steps the stretch has, unless a run ends before its time."""
        left = min(self.totals[run] - self.done[run] for run in self.members)
        if self._waiting and len(self.members) < self.places:
            left = min(left, self.per_epoch - self._place)
        return left

    def advance(self, steps: int) -> None:
        """Count steps that all members made."""
        for run in self.members:
            self.done[run] += steps

    def leave(self, runs: Sequence[int]) -> None:
        """Take runs out for good."""
        self.members = [run for run in self.members if run not in runs]
