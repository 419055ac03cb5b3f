"""A run's metric written as a mean over test items, so that every test can look item by item.

Accuracy is a mean of its items' scores as it stands. A correlation or an F1 is not, but to first order it moves with
each item as its influence says: contributions of items whose mean is the metric, and whose variance over items / m is
the variance of the metric over test sets (the infinitesimal jackknife, Efron 1982, ch. 6). For Spearman's correlation
the items that an item passes in rank are counted too (Croux and Dehon 2010, Stat. Methods Appl. 19:497-515), with
ties at their middle ranks.

What items were compared with is not in a record, but follows from it: a class from a right prediction (or from a
wrong one of two), a value from predictions and absolute errors of two runs. Metrics computed from these must be those
of the record (`TOLERANCE`); where they are not, or where a metric is no function of items (BLEU), there are no
contributions, and intervals are over seeds alone.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from peftbench.analysis.intervals import Array

TOLERANCE = 1e-6
MEANS = ("accuracy", "exact_match", "rouge_l")
CLASSES = ("matthews_correlation", "f1")
VALUES = ("pearson", "spearmanr")
RATIOS = ("loss", "perplexity")


def ratio(numerators: ArrayLike, denominators: ArrayLike) -> Array:
    """Return contributions [m] to Σ numerators / Σ denominators; all 0 where the denominators are."""
    above, below = np.asarray(numerators, dtype=float), np.asarray(denominators, dtype=float)
    whole = below.mean()
    if whole == 0:
        return np.zeros(len(above))
    value = above.mean() / whole
    return value + (above - value * below) / whole


def f1(predictions: ArrayLike, references: ArrayLike) -> Array:
    """Return contributions [m] to F1 of class 1: 2 TP / (2 TP + FP + FN)."""
    said, true = (np.asarray(side) == 1 for side in (predictions, references))
    return ratio(2.0 * (said & true), said.astype(float) + true)


def pearson(predictions: ArrayLike, references: ArrayLike) -> Array:
    """Return contributions [m] to Pearson's correlation, Matthews' for two classes; all 0 where a side is constant."""
    sides = [np.asarray(side, dtype=float) for side in (predictions, references)]
    if any(np.ptp(side) == 0 for side in sides):
        return np.zeros(len(sides[0]))
    x, y = ((side - side.mean()) / side.std() for side in sides)
    value = (x * y).mean()
    return value + x * y - value * (x**2 + y**2) / 2


def spearman(predictions: ArrayLike, references: ArrayLike) -> Array:
    """Return contributions [m] to Spearman's correlation; all 0 where a side is constant.

    With u and v the middle ranks in (0, 1), less 1/2: ρ = C / √(A B), C = mean u v, A = mean u², B = mean v². An item
    adds to C by its own product, and by the share of u v that it lifts in rank; the same for A and B.
    """
    sides = [np.unique(np.asarray(side, dtype=float), return_inverse=True)[1] for side in (predictions, references)]
    u, v = (_middle_ranks(side) for side in sides)
    c, a, b = (u * v).mean(), (u**2).mean(), (v**2).mean()
    if min(a, b) == 0:
        return np.zeros(len(u))
    own_c = u * v + _lifted(sides[0], v) + _lifted(sides[1], u) - 3 * c
    own_a = u**2 + 2 * _lifted(sides[0], u) - 3 * a
    own_b = v**2 + 2 * _lifted(sides[1], v) - 3 * b
    value = c / np.sqrt(a * b)
    return value + own_c / np.sqrt(a * b) - value * (own_a / a + own_b / b) / 2


def _middle_ranks(order: np.ndarray) -> Array:
    """Return ranks over m of values numbered from 0 in rising order, ties at their middle, less 1/2."""
    counts = np.bincount(order)
    return ((np.cumsum(counts) - counts / 2) / len(order) - 0.5)[order]


def _lifted(order: np.ndarray, weights: Array) -> Array:
    """Return for each item the mean over items of weight · (1 above it in rank, 1/2 beside it)."""
    beside = np.bincount(order, weights)
    return ((beside.sum() - np.cumsum(beside) + beside / 2) / len(order))[order]


# -- from records ------------------------------------------------------------------------------------------------------


def contributions(metric: str, runs: Sequence[Mapping[str, Any]]) -> list[Array] | None:
    """Return each run's contributions [m] to `metric`; None where items do not give it.

    Args:
        runs: `quality.items.test` of runs on the same items: `scores` and `predictions`, one an item.
    """
    scores = [np.asarray(run.get("scores") or [], dtype=float) for run in runs]
    if not scores or len(scores[0]) < 2 or any(len(s) != len(scores[0]) for s in scores):
        return None
    if metric in MEANS:
        return scores
    predictions = [run.get("predictions") for run in runs]
    if any(p is None or len(p) != len(s) for p, s in zip(predictions, scores, strict=True)):
        return None
    try:
        said = [np.asarray(p, dtype=float) for p in predictions]
    except (TypeError, ValueError):  # generated texts
        return None
    if metric in RATIOS and all(p.ndim == 2 and p.shape[1] == 2 for p in said):
        losses = [ratio(p[:, 0], p[:, 1]) for p in said]
        # Perplexity is exp of the loss: an item moves it by exp(loss) times what it moves the loss.
        return losses if metric == "loss" else [np.exp(x.mean()) * (1 + x - x.mean()) for x in losses]
    if any(p.ndim != 1 for p in said):
        return None
    if metric in CLASSES and (true := classes(said, scores)) is not None:
        return [(f1 if metric == "f1" else pearson)(p, true) for p in said]
    if metric in VALUES and (wanted := values(said, scores)) is not None:
        return [(pearson if metric == "pearson" else spearman)(p, wanted) for p in said]
    return None


def classes(predictions: Sequence[Array], scores: Sequence[Array]) -> Array | None:
    """Return the two-class labels [m] that make each prediction right (1) or wrong (0); None where none do."""
    if not all(np.isin(p, (0, 1)).all() and np.isin(s, (0, 1)).all() for p, s in zip(predictions, scores, strict=True)):
        return None
    found = [np.where(s == 1, p, 1 - p) for p, s in zip(predictions, scores, strict=True)]
    return found[0] if all((labels == found[0]).all() for labels in found) else None


def values(predictions: Sequence[Array], scores: Sequence[Array]) -> Array | None:
    """Return the values [m] at distance −score of every run's prediction, to 6 decimals; None where there are none.

    One run leaves two candidates for each item, above and below its prediction; another one decides.
    """
    if len(predictions) < 2:
        return None
    p, distance = np.stack(predictions), -np.stack(scores)
    candidates = np.stack([p[0] - distance[0], p[0] + distance[0]])  # [2, m]
    misses = np.abs(np.abs(candidates[:, None] - p) - distance).max(axis=1)
    best = misses.argmin(axis=0)
    if misses.min(axis=0).max() > 1e-4:
        return None
    return np.take_along_axis(candidates, best[None], axis=0)[0].round(6)


def verified(metric: str, recorded: Sequence[float], runs: Sequence[Mapping[str, Any]]) -> list[Array] | None:
    """Return `contributions` whose means are the `recorded` metrics of the runs, None where one of them is not."""
    found = contributions(metric, runs)
    if found is None:
        return None
    close = [abs(float(x.mean()) - value) <= TOLERANCE for x, value in zip(found, recorded, strict=True)]
    return found if all(close) else None
