"""Pareto fronts in any number of dimensions, how sure membership of them is, and hypervolumes (moocore).

`pareto.front` draws the two-dimensional front of a figure; here each objective has a direction of its own.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from peftbench.analysis.extras import load
from peftbench.analysis.intervals import Array


def members(points: ArrayLike, maximise: Sequence[bool]) -> NDArray[np.bool_]:
    """Return which of the points [C, D] no other point beats: as good on all objectives, better on one.

    Equal points do not beat each other: all of them are members.

    Raises:
        ValueError: a coordinate is missing, or `maximise` does not give each objective's direction.
        UserError: moocore is missing.
    """
    table = _checked(points, maximise)
    return np.asarray(load("moocore").is_nondominated(table, maximise=list(maximise), keep_weakly=True), dtype=bool)


def membership(quality: ArrayLike, costs: ArrayLike, greater_is_better: bool = True) -> Array:
    """Return the share of draws in which each configuration is on the front of quality against costs [C].

    Args:
        quality: drawn, of each configuration [draws, C].
        costs: less is better, the same in every draw [C, K]: counts are exact, and times and peaks of memory were
            measured once.

    A share near 1 or 0 says that noise in quality does not decide; it is no probability that a method is best.
    """
    drawn, fixed = np.asarray(quality, dtype=float), np.asarray(costs, dtype=float)
    maximise = [greater_is_better, *[False] * fixed.shape[1]]
    return np.mean([members(np.column_stack([q, fixed]), maximise) for q in drawn], axis=0)


def hypervolume(points: ArrayLike, reference: ArrayLike, maximise: Sequence[bool]) -> float:
    """Return the volume that points [C, D] dominate, as far as `reference` [D]: points no better than it add nothing.

    It depends on the reference and on the objectives' units; compare it only where both are the same.
    """
    table = _checked(points, maximise)
    return float(load("moocore").hypervolume(table, ref=np.asarray(reference, dtype=float), maximise=list(maximise)))


def hypervolume_losses(points: ArrayLike, reference: ArrayLike, maximise: Sequence[bool]) -> Array:
    """Return how much of the hypervolume would go with each point alone [C]; 0 for points off the front."""
    table, corner = _checked(points, maximise), np.asarray(reference, dtype=float)
    load_contributions = load("moocore").hv_contributions
    return np.asarray(load_contributions(table, ref=corner, maximise=list(maximise), ignore_dominated=False))


def _checked(points: ArrayLike, maximise: Sequence[bool]) -> Array:
    table = np.ascontiguousarray(points, dtype=float)
    if table.ndim != 2 or table.shape[1] != len(maximise) or np.isnan(table).any():
        raise ValueError(f"points of shape {table.shape} for {len(maximise)} directions: expected [C, D], none missing")
    return table
