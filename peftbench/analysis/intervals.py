"""Intervals and p values of means over seeds × items, with few seeds.

A configuration's scores y[s, i] over seeds s = 1 … n and test items i = 1 … m are read as

    y[s, i] = μ + seed_s + item_i + rest[s, i],

all random: another seed would train another model, another test set would hold other items. The mean over all cells
errs from two sources, each with a variance and degrees of freedom of its own:

    seeds   s² / n            s² the variance of the seeds' means              n − 1
    items   S² / m − R        S² the variance of the items' means              m − 1
                              R = MS_rest / (n m), which both of them contain

An interval at level 1 − α reaches as far as Σ over sources of t²(1 − α/2, degrees) · variance, under a root (Banerjee
1961, Sankhyā A 23:359-378). It covers at least 1 − α whatever the sources' shares; pooling the degrees of freedom
(Welch-Satterthwaite) between a source with 2 degrees and one with 1000 covers less far out in the tails, where tests
corrected for many comparisons look. One source alone gives Student's interval. A p value is the α at which the
interval just reaches 0.

Methods meet the same items, so the difference of two methods is taken item by item; their seeds are read as independent
runs (`difference`) or as pairs (`paired_difference`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Source:
    """One source of error: the `variance` that it adds to an estimate, known to `degrees` degrees of freedom."""

    variance: float
    degrees: float


@dataclass(frozen=True)
class Estimate:
    """A value and its sources of error; none of them where it has no interval (a single seed)."""

    value: float
    seeds: Source | None = None
    items: Source | None = None

    @property
    def sources(self) -> tuple[Source, ...]:
        """Return those that are known; none without the seeds' one, as items alone are not the whole error."""
        return () if self.seeds is None else tuple(s for s in (self.seeds, self.items) if s is not None)

    @property
    def error(self) -> float | None:
        """Return the standard error."""
        return math.sqrt(sum(s.variance for s in self.sources)) if self.sources else None


@dataclass(frozen=True)
class Sample:
    """Runs of one configuration on one task.

    Args:
        seeds: their seeds [n].
        runs: the metric of each [n].
        items: contributions of items to it [n, m], each row with its run's metric for a mean; None where unknown.
    """

    seeds: tuple[int, ...]
    runs: Array
    items: Array | None = None

    @property
    def spread(self) -> Source | None:
        """Return the error that seeds bring to the mean of the runs; None for a single one."""
        n = len(self.runs)
        return Source(float(self.runs.var(ddof=1)) / n, n - 1) if n > 1 else None


def sample(seeds: Sequence[int], runs: ArrayLike, items: ArrayLike | None = None) -> Sample:
    """Return a `Sample` of whatever numpy takes for arrays."""
    return Sample(
        tuple(seeds), np.asarray(runs, dtype=float), None if items is None else np.asarray(items, dtype=float)
    )


def residual(items: Array) -> float:
    """Return MS_rest / (n m) of scores [n, m]: what is neither the seed's nor the item's."""
    n, m = items.shape
    rest = items - items.mean(axis=1, keepdims=True) - items.mean(axis=0) + items.mean()
    return float((rest**2).sum() / ((n - 1) * (m - 1)) / (n * m))


def _items_source(means: Array, rest: float) -> Source:
    """Error of the items, from the items' means [m] and what of it the seeds' source holds already."""
    return Source(max(float(means.var(ddof=1)) / len(means) - rest, 0.0), len(means) - 1)


def mean(one: Sample) -> Estimate:
    """Return the mean over seeds and items of one configuration."""
    value, seeds = float(one.runs.mean()), one.spread
    if seeds is None or one.items is None:
        return Estimate(value, seeds)
    return Estimate(value, seeds, _items_source(one.items.mean(axis=0), residual(one.items)))


def difference(first: Sample, second: Sample) -> Estimate:
    """Return `first` less `second`: the same items, seeds that have nothing to do with each other.

    The seeds' variance is the sum of both sides', its degrees of freedom are Welch's.
    """
    value = float(first.runs.mean() - second.runs.mean())
    mine, theirs = first.spread, second.spread
    if mine is None or theirs is None:
        return Estimate(value)
    seeds = total([mine, theirs])
    if first.items is None or second.items is None:
        return Estimate(value, seeds)
    rest = residual(first.items) + residual(second.items)
    return Estimate(value, seeds, _items_source(first.items.mean(axis=0) - second.items.mean(axis=0), rest))


def paired_difference(first: Sample, second: Sample) -> Estimate | None:
    """Return `first` less `second` over the seeds that both have, pair by pair and item by item; None without any.

    n seeds leave n − 1 degrees of freedom, which pays where a seed moves both methods alike.
    """
    shared = sorted(set(first.seeds) & set(second.seeds))
    if not shared:
        return None
    mine, theirs = ([one.seeds.index(seed) for seed in shared] for one in (first, second))
    runs = first.runs[mine] - second.runs[theirs]
    items = None if first.items is None or second.items is None else first.items[mine] - second.items[theirs]
    return mean(sample(shared, runs, items))


def total(parts: Sequence[Source]) -> Source:
    """Return one source for several independent ones: variances add, degrees of freedom by Welch and Satterthwaite."""
    variance = math.fsum(p.variance for p in parts)
    squares = math.fsum(p.variance**2 / p.degrees for p in parts)
    return Source(variance, variance**2 / squares if squares > 0 else math.fsum(p.degrees for p in parts))


def over_tasks(estimates: Sequence[Estimate]) -> Estimate:
    """Return the mean over tasks: each is a stratum with seeds and items of its own, the tasks themselves are fixed.

    Its seeds' source is known only where every task's is, the same for items.
    """
    share = 1 / len(estimates)

    def joined(parts: list[Source | None]) -> Source | None:
        known = [Source(p.variance * share**2, p.degrees) for p in parts if p is not None]
        return total(known) if len(known) == len(parts) else None

    return Estimate(
        math.fsum(e.value for e in estimates) * share,
        joined([e.seeds for e in estimates]),
        joined([e.items for e in estimates]),
    )


# -- intervals and p values, many at a time ----------------------------------------------------------------------------


def _columns(estimates: Sequence[Estimate]) -> tuple[Array, Array, Array]:
    """Values [P], and variances and degrees of freedom [2, P] with nothing for a source that is not known."""
    variances, degrees = np.zeros((2, len(estimates))), np.ones((2, len(estimates)))
    for p, estimate in enumerate(estimates):
        for k, source in enumerate(estimate.sources):
            variances[k, p], degrees[k, p] = source.variance, source.degrees
    return np.array([e.value for e in estimates]), variances, degrees


def quantile(alpha: ArrayLike, degrees: ArrayLike) -> Any:
    """Return Student's two-sided quantile t(1 − α/2, degrees), exact for very small α too."""
    from scipy.special import stdtrit

    return -stdtrit(degrees, np.asarray(alpha) / 2)


def half_widths(estimates: Sequence[Estimate], alpha: ArrayLike = 1 - CONFIDENCE) -> Array:
    """Return how far each interval reaches from its value [P]; NaN where an estimate has no sources.

    Args:
        alpha: one for all, or one each [P].
    """
    _, variances, degrees = _columns(estimates)
    reach = np.sqrt((quantile(alpha, degrees) ** 2 * variances).sum(axis=0))
    return np.where([bool(e.sources) for e in estimates], reach, np.nan)


def interval(estimate: Estimate, confidence: float = CONFIDENCE) -> tuple[float, float] | None:
    """Return its two ends; None where it has no sources."""
    if not estimate.sources:
        return None
    reach = float(half_widths([estimate], 1 - confidence)[0])
    return estimate.value - reach, estimate.value + reach


def p_values(estimates: Sequence[Estimate]) -> Array:
    """Return the two-sided p values of "it is 0" [P]; NaN where an estimate has no sources.

    A value other than 0 without any variance has p = 0, a value of 0 has p = 1.
    """
    values, variances, degrees = _columns(estimates)
    low, high = np.full(len(values), -300.0), np.zeros(len(values))  # of log α; e^-300 is as good as 0
    for _ in range(70):
        middle = (low + high) / 2
        reached = (quantile(np.exp(middle), degrees) ** 2 * variances).sum(axis=0) >= values**2
        low, high = np.where(reached, middle, low), np.where(reached, high, middle)
    p = np.where(variances.sum(axis=0) == 0, 0.0, np.exp(high))
    p = np.where(values == 0, 1.0, p)
    return np.where([bool(e.sources) for e in estimates], p, np.nan)
