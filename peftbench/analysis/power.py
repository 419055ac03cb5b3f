"""What a design could have seen: the smallest difference that its test finds with a given power.

"No difference found" says little without it. For one source of error with ν degrees of freedom the test rejects where
|value| / error exceeds t(1 − α/2, ν), and a true difference of δ errors does so with the probability that a
noncentral t(ν, δ) exceeds it; the smallest detectable difference is δ · error at power 0.8. With two sources (seeds
and items) ν is the one that gives the interval its width: t(1 − α/2, ν) · error = half width.

The error is the one observed, so the figure is as uncertain as that (with 3 seeds by a factor of two, easily). It never
says that there is no difference, and a difference found is not made more credible by it.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike

from peftbench.analysis.intervals import Array, Estimate, Source, half_widths, quantile

ALPHA, POWER = 0.05, 0.8


def detectable(estimates: Sequence[Estimate], alpha: ArrayLike = ALPHA, power: float = POWER) -> Array:
    """Return the minimum detectable effect of each test [P], in the metric's unit; NaN without sources.

    Args:
        alpha: of the two-sided test, one or one each [P]; α over the number of comparisons is the hurdle that the
            first of Holm's corrected tests has to take.
    """
    from scipy.special import nctdtrinc

    errors = np.array([np.nan if e.error is None else e.error for e in estimates])
    with np.errstate(invalid="ignore", divide="ignore"):
        reach = half_widths(estimates, alpha) / errors
    reach = np.where(errors > 0, reach, np.nan)
    shifts = nctdtrinc(_degrees(reach, alpha), 1 - power, reach)
    return np.where(errors == 0, 0.0, shifts * errors)


def _degrees(reach: Array, alpha: ArrayLike) -> Array:
    """Return ν with t(1 − α/2, ν) = `reach`, by halving an interval of log ν."""
    low, high = np.full(reach.shape, np.log(0.5)), np.full(reach.shape, np.log(1e6))
    for _ in range(60):
        middle = (low + high) / 2
        wider = quantile(alpha, np.exp(middle)) > reach
        low, high = np.where(wider, middle, low), np.where(wider, high, middle)
    return np.exp(high)


def with_seeds(estimate: Estimate, have: int, want: int | None) -> Estimate:
    """Return an estimate as `want` seeds on each side would have it, in place of `have`; None for any number of them.

    The spread between seeds is taken as observed, the items stay.
    """
    if estimate.seeds is None:
        return estimate
    if want is None:
        return replace(estimate, seeds=Source(0.0, estimate.seeds.degrees))
    scaled = Source(estimate.seeds.variance * have / want, estimate.seeds.degrees * (want - 1) / (have - 1))
    return replace(estimate, seeds=scaled)


def design(
    seeds: int,
    items: int | None,
    seed_std: float,
    item_std: float = 0.0,
    alpha: float = ALPHA,
    power: float = POWER,
) -> float:
    """Return the minimum detectable difference of two methods in a design that is only planned.

    Args:
        seeds: of each method, 2 or more.
        items: in the test set; None where it is taken as it is.
        seed_std: standard deviation of one run's metric between seeds.
        item_std: standard deviation over items of the difference between the methods' scores, each the mean of many
            seeds; at most about √(share of items on which they differ) for an accuracy.

    Raises:
        ValueError: fewer than 2 seeds or items.
    """
    if seeds < 2 or (items is not None and items < 2):
        raise ValueError(f"a design of {seeds} seeds and {items} items: expected 2 or more of each")
    between = Source(2 * seed_std**2 / seeds, 2 * (seeds - 1))
    within = None if items is None else Source(item_std**2 / items, items - 1)
    return float(detectable([Estimate(0.0, between, within)], alpha, power)[0])
