"""The setting that decides how many parameters a method trains, solved for a wanted number from its closed form.

Nothing is loaded: counts are `Method.parameter_count` on a model of the meta device.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from peftbench import registry
from peftbench.config import ModelConfig, build
from peftbench.errors import UserError
from peftbench.plan import Point
from peftbench.record import canonical
from peftbench.resolve import Resolver

SIZES = ("bottleneck", "length", "frequencies", "target_rank", "rank", "block_size", "group_size", "angles", "hidden")
"""Settings that decide a size, in the order in which they are tried."""
LARGEST = 2**16
"""Largest value that is tried."""
NEAR = 64
"""Between two values this close, of which one is not accepted, all are looked at."""

Count = Callable[[int], int | None]
"""Value of a setting → number of parameters; None where the value is not accepted."""


@dataclass(frozen=True)
class Solved:
    """The value of `setting` whose count is closest to what was wanted; `setting` None: the count is fixed."""

    setting: str | None
    value: int | None
    parameters: int

    def off(self, target: int) -> float:
        """Return by what share of `target` the count misses it."""
        return abs(self.parameters - target) / target

    @property
    def chosen(self) -> dict[str, int]:
        """The dotted key of the setting, and its value."""
        return {} if self.setting is None or self.value is None else {f"method.{self.setting}": self.value}


def closest(count: Count, target: int, tolerance: float = 0.0, most: int = LARGEST) -> tuple[int, int] | None:
    """Return (value, count) of the whole number from 1 to `most` whose count is closest to `target`; None if none goes.

    Of equals the smaller value. Where counts fall and rise again, so that far apart values come close, the smallest of
    those that miss by a share `tolerance` of the target at most. Values are tried on a ladder of powers of two and half
    as much again; where two neighbours there have the target between them, the numbers between are bisected, which
    supposes that counts rise or fall all the way from the one to the other. After the last accepted rung it is looked
    how far values go.
    """
    known: dict[int, int | None] = {}

    def at(value: int) -> int | None:
        if value not in known:
            known[value] = count(value)
        return known[value]

    ladder = sorted({v for e in range(most.bit_length()) for v in (2**e, 3 * 2**e) if v <= most} | {most})
    for low, high in itertools.pairwise(ladder):
        _between(low, high, at, target)
    found = [(abs(c - target), v, c) for v, c in sorted(known.items()) if c is not None]
    if not found:
        return None
    misses = [math.inf, *(miss for miss, _, _ in found), math.inf]
    valleys = [
        f for f, before, after in zip(found, misses, misses[2:], strict=False) if f[0] < before and f[0] <= after
    ]
    best = next((f for f in valleys if f[0] <= tolerance * target), min(found))
    return best[1], best[2]


def _between(low: int, high: int, at: Count, target: int) -> None:
    """Look between two neighbours for the values closest to `target`."""
    first, last = at(low), at(high)
    if high - low < 2 or (first is None and last is None):
        return
    if first is None or last is None:
        if high - low <= NEAR:  # divisors, say: what is accepted lies apart
            for value in range(low + 1, high):
                at(value)
        elif first is not None:
            _between(low, _last_accepted(low, high, at), at, target)
        return
    if first == target or (first - target) * (last - target) > 0:  # nothing between is closer, or as close and smaller
        return
    middle = (low + high) // 2
    if at(middle) is None and high - low > NEAR:
        middle = next((v for v in range(middle, high) if at(v) is not None), high)
        if middle == high:
            return
    _between(low, middle, at, target)
    _between(middle, high, at, target)


def _last_accepted(low: int, high: int, at: Count) -> int:
    """Return the largest accepted value below `high`, which is not, from `low`, which is; bisected."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if at(middle) is not None else (low, middle)
    return low


class Solver:
    """Solves the sizes of points, each combination of a method's other settings once."""

    def __init__(self, resolver: Resolver, target: int, tolerance: float) -> None:
        """Take what is wanted: `target` adapter parameters, up to a share `tolerance` of them more or fewer."""
        self.resolver, self.target, self.tolerance = resolver, target, tolerance
        self._known: dict[str, Solved] = {}

    def matches(self, solved: Solved) -> bool:
        """Whether a count is within the tolerance."""
        return solved.off(self.target) <= self.tolerance

    def solve(self, point: Point, settings: Sequence[str] = SIZES) -> Solved:
        """Return the size at which the method of `point` trains a number of parameters closest to the target.

        Those of its settings that are in `settings` are solved for one at a time, the others as `point` has them: the
        first that brings a match is taken, else the closest of all. Without one it is told by its count.

        Raises:
            UserError: the method does not fit the model at any size.
        """
        about = {k: v for k, v in point.items() if k.partition(".")[0] in ("model", "method", "task")}
        key = canonical([about, list(settings)])
        if key not in self._known:
            found = []
            for solved in self._sizes(point, settings):
                found.append(solved)
                if self.matches(solved):
                    break
            if not found:
                raise UserError(f"method={point['method']}: no value of {', '.join(settings)} fits {point['model']}")
            self._known[key] = min(found, key=lambda s: s.off(self.target))
        return self._known[key]

    def _sizes(self, point: Point, settings: Sequence[str]) -> Iterator[Solved]:
        """Give what each of `settings` can bring that changes the count."""
        spec, task = self._sketch(point)
        model = self.resolver.shapes(build(ModelConfig, spec.model, "model"), task.formulation)

        def count(changes: dict[str, int]) -> int | None:
            try:
                method = registry.build_method({**spec.method, **changes}).with_tasks(task.num_tasks)
                method.check(model)
                return int(method.parameter_count(model))
            except UserError:
                return None

        fixed = count({})
        for name in settings:
            value = spec.method.get(name)
            if not isinstance(value, int) or isinstance(value, bool):
                continue
            if all(count({name: v}) in (None, fixed) for v in (1, 2, value * 2, value // 2, value + 1, value - 1)):
                continue
            found = closest(lambda v, name=name: count({name: v}), self.target, self.tolerance)  # type: ignore[misc]
            if found is not None:
                yield Solved(name, *found)
        if fixed is not None:
            yield Solved(None, None, fixed)

    def _sketch(self, point: Point) -> tuple[Any, Any]:
        """Return the point's run as far as shapes go; at the first size that is accepted, should its own not be."""
        try:
            return self.resolver.sketch(point)
        except UserError as error:
            for name in registry.declared(str(point["method"])) & set(SIZES):
                for exponent in range(LARGEST.bit_length()):
                    try:
                        return self.resolver.sketch({**point, f"method.{name}": 2**exponent})
                    except UserError:
                        continue
            raise error
