"""Methods grouped into tiers that the data can tell apart: not a ranking.

The rule: two methods share a letter if, and only if, the test of their difference, corrected for all pairs, does not
tell them apart (a compact letter display: Piepho 2004, J. Comput. Graph. Stat. 13:456-466, insert and absorb). "Not
told apart" is not transitive: where a and c differ but b differs from neither, b carries both letters and belongs to
both tiers. Sharing a letter says that these runs cannot separate two methods, never that they are equal.

Letters go to tiers in the order of their best methods, so `a` holds the best one and all that it was not told apart
from. scikit-posthocs makes such displays too, against which the tests compare these, but none of more than 52 tiers, as
a sweep of a hundred variants may have.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike


def tiers(apart: ArrayLike) -> list[tuple[int, ...]]:
    """Return the tiers, each with its methods' places in rising order, best tier first.

    Args:
        apart: symmetric, true where two methods were told apart [C, C], the methods in order of merit.
    """
    differ = np.asarray(apart, dtype=bool)
    groups = {frozenset(range(len(differ)))}
    for i in range(len(differ)):
        for j in np.flatnonzero(differ[i, i + 1 :]) + i + 1:
            kept = {g for g in groups if not {i, j} <= g}
            halves = {g - {k} for g in groups - kept for k in (i, int(j))}
            # Only halves can lie within another group: what is kept did not lie within the whole.
            groups = kept | {half for half in halves if not any(half < other for other in kept | halves)}
    return _needed(sorted(tuple(sorted(g)) for g in groups))


def _needed(groups: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Drop tiers, last first, whose every pair of methods shares another tier anyway."""
    kept = list(groups)
    for group in reversed(groups):
        others = [set(g) for g in kept if g != group]
        if all(any({i, j} <= other for other in others) for i in group for j in group):
            kept.remove(group)
    return kept


def letters(apart: ArrayLike) -> list[str]:
    """Return each method's letters [C], such as "ab"; the 27th tier is written (27)."""
    found = tiers(apart)
    return [
        "".join(letter(k) for k, group in enumerate(found) if method in group)
        for method in range(len(np.asarray(apart)))
    ]


def letter(index: int) -> str:
    """Return the letter of tier 0, 1, …"""
    return chr(ord("a") + index) if index < 26 else f"({index + 1})"


def matrix(count: int, pairs: Sequence[tuple[int, int]], told: Sequence[bool]) -> np.ndarray:
    """Return pairs (i, j) and whether each was told apart as a symmetric matrix [count, count]."""
    apart = np.zeros((count, count), dtype=bool)
    for (i, j), differ in zip(pairs, told, strict=True):
        apart[i, j] = apart[j, i] = differ
    return apart
