"""Pareto front of quality (more is better unless said otherwise) against cost (less is better)."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Front:
    """`members`: indices into the input, by rising cost; `dropped`: points without a quality or a cost."""

    members: list[int]
    dropped: int


def front(quality: Sequence[float | None], cost: Sequence[float | None], greater_is_better: bool = True) -> Front:
    """Points that no other point beats.

    A point is beaten by one that is at least as good on both axes and better on one. Points equal on both axes do not
    beat each other, so all of them are members. None and NaN are dropped and counted.

    Raises:
        ValueError: `quality` and `cost` differ in length.
    """
    sign = 1.0 if greater_is_better else -1.0
    points = [
        (float(c), sign * float(q), i)
        for i, (q, c) in enumerate(zip(quality, cost, strict=True))
        if q is not None and c is not None and q == q and c == c
    ]
    members: list[int] = []
    best, best_cost = float("-inf"), float("nan")
    for c, q, i in sorted(points, key=lambda p: (p[0], -p[1], p[2])):
        if q > best or (q == best and c == best_cost):
            members.append(i)
            best, best_cost = q, c
    return Front(members, len(quality) - len(points))
