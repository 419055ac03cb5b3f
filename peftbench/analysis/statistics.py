"""Small statistics over seeds, each checkable by hand. Missing is None, never a stand-in number."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Summary:
    """Mean over `n` seeds; `std` has ddof 1 and is None below two seeds, as are the ends of the t interval."""

    n: int
    mean: float | None
    std: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Gap:
    """Difference to a reference, in the metric's own unit.

    Paired: `std` is that of the per-seed differences and `n` the number of pairs. Unpaired: `std` is
    sqrt(s_a^2 + s_b^2), the spread of a difference of two independent runs, and `n` the smaller sample.
    """

    mean: float
    std: float | None
    low: float | None
    high: float | None
    n: int
    paired: bool


def mean(values: Sequence[float]) -> float | None:
    """Arithmetic mean; None for no values."""
    return math.fsum(values) / len(values) if values else None


def std(values: Sequence[float]) -> float | None:
    """Sample standard deviation (ddof 1); None below two values."""
    if len(values) < 2:
        return None
    centre = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((v - centre) ** 2 for v in values) / (len(values) - 1))


def t_quantile(degrees: float, confidence: float = CONFIDENCE) -> float:
    """Two-sided Student t quantile, e.g. 12.706 for 1 degree of freedom at 0.95."""
    from scipy.special import stdtrit  # what scipy.stats.t.ppf calls, without the second that importing that takes

    return float(stdtrit(degrees, 0.5 + confidence / 2))


def t_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float] | None:
    """Student t interval of the mean: m -/+ t(n-1) * s / sqrt(n); None below two values."""
    spread, centre = std(values), mean(values)
    if spread is None or centre is None:
        return None
    half = t_quantile(len(values) - 1, confidence) * spread / math.sqrt(len(values))
    return centre - half, centre + half


def summarize(values: Sequence[float], confidence: float = CONFIDENCE) -> Summary:
    """Mean, standard deviation and t interval of `values`."""
    low, high = t_interval(values, confidence) or (None, None)
    return Summary(len(values), mean(values), std(values), low, high)


def gap(values: Mapping[int, float], reference: Mapping[int, float], confidence: float = CONFIDENCE) -> Gap | None:
    """`values` minus `reference`, both seed → metric. None when either is empty.

    Seeds that both sides hold are paired (the same data order and head initialisation, so their difference varies
    less); with no seed in common the means are compared with Welch's interval.
    """
    if not values or not reference:
        return None
    shared = sorted(values.keys() & reference.keys())
    if shared:
        s = summarize([values[seed] - reference[seed] for seed in shared], confidence)
        assert s.mean is not None
        return Gap(s.mean, s.std, s.low, s.high, s.n, paired=True)
    a, b = list(values.values()), list(reference.values())
    difference = math.fsum(a) / len(a) - math.fsum(b) / len(b)
    n, spread_a, spread_b = min(len(a), len(b)), std(a), std(b)
    if spread_a is None or spread_b is None:
        return Gap(difference, None, None, None, n, paired=False)
    spread = math.hypot(spread_a, spread_b)
    error_a, error_b = spread_a**2 / len(a), spread_b**2 / len(b)
    error = error_a + error_b
    if error == 0:
        return Gap(difference, spread, difference, difference, n, paired=False)
    # Welch-Satterthwaite degrees of freedom.
    degrees = error**2 / (error_a**2 / (len(a) - 1) + error_b**2 / (len(b) - 1))
    half = t_quantile(degrees, confidence) * math.sqrt(error)
    return Gap(difference, spread, difference - half, difference + half, n, paired=False)
