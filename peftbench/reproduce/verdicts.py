"""What may be said of a published figure and a measured one: the rules, and nothing else.

Both sides are read as an estimate with an error. The published error comes from its spread s over n seeds, s/√n with
n − 1 degrees of freedom (a printed standard error as it is, an interquartile range as 1.349 standard deviations; with
no number of seeds, s itself). Ours comes from our seeds, in the same way. Where a figure is a median, its error is
√(π/2) times that of a mean, as for a normal distribution. The interval of the difference reaches as far as the root of
the sum of both half-widths squared, each with Student's t of its own degrees (Banerjee 1961), at 95 %.

Rules, the first that fits:

1. no record: *not run here*, with what it needs;
2. a difference in protocol that decides (see `protocol`): *protocol mismatch*;
3. equal to the digits printed: *exact*;
4. the difference is within the interval, or within the metric's stated tolerance: *within interval*;
5. otherwise: *differs*.

The tolerance is what software and hardware alone move a metric by (`metrics.csv` has the reasons); without any spread
on either side it is all there is. Claims (orderings, ratios) have rules of their own, see `claims`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from peftbench.analysis.intervals import quantile
from peftbench.published import Value

EXACT = "exact"
WITHIN = "within interval"
DIFFERS = "differs"
HOLDS = "claim holds"
CONTRADICTED = "claim contradicted"
UNDECIDED = "claim undecided"
MISMATCH = "protocol mismatch"
NOT_RUN = "not run here"
VERDICTS = (EXACT, WITHIN, DIFFERS, HOLDS, CONTRADICTED, UNDECIDED, MISMATCH, NOT_RUN)

CONFIDENCE = 0.95
MEDIAN_ERROR = math.sqrt(math.pi / 2)
"""Standard error of a median over that of a mean, of many values from a normal distribution."""
QUARTILES = 1.349
"""Interquartile range of a normal distribution in standard deviations."""


@dataclass(frozen=True)
class Difference:
    """One difference in protocol: what differs, both sides, and whether it decides.

    An empty `published` is a fact that the source does not state.
    """

    what: str
    published: str
    ours: str
    decides: bool = True

    def __str__(self) -> str:
        return f"{self.what}: {self.published or 'not stated'} there, {self.ours} here"


@dataclass(frozen=True)
class Measured:
    """Our side of a row, in the unit reported.

    Attributes:
        value: mean or median over `seeds`, whichever the row holds.
        half_width: half of the 95 % interval over seeds; None for a single seed.
        records: run ids.
        folder: where they lie.
        label: the configuration in words.
    """

    value: float
    half_width: float | None
    seeds: tuple[int, ...]
    records: tuple[str, ...]
    folder: str
    label: str
    incomplete: int = 0

    @property
    def low(self) -> float | None:
        """Return the lower end of the interval."""
        return None if self.half_width is None else self.value - self.half_width

    @property
    def high(self) -> float | None:
        """Return the upper end of the interval."""
        return None if self.half_width is None else self.value + self.half_width


@dataclass(frozen=True)
class Verdict:
    """A verdict with its reason and the records it rests on; `transfer` names the model where it is another's claim."""

    verdict: str
    reason: str
    difference: float | None = None
    band: float | None = None
    transfer: str = ""

    def __post_init__(self) -> None:
        assert self.verdict in VERDICTS, self.verdict

    def __str__(self) -> str:
        return f"{self.verdict} (transfer to {self.transfer})" if self.transfer else self.verdict


def reach(error: float, degrees: float) -> float:
    """Return half of the 95 % interval of an estimate with this standard error."""
    return float(error * quantile(1 - CONFIDENCE, degrees))


def half_width(values: Sequence[float], statistic: str = "mean") -> float | None:
    """Return half of the 95 % interval of the mean, or the median, of `values`; None for a single one."""
    n = len(values)
    if n < 2:
        return None
    mean = math.fsum(values) / n
    error = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n)
    return reach(error, n - 1) * (MEDIAN_ERROR if statistic == "median" else 1.0)


def centre(values: Sequence[float], statistic: str = "mean") -> float:
    """Return the mean or the median of `values`."""
    if statistic != "median":
        return math.fsum(values) / len(values)
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def published_half_width(row: Value) -> float | None:
    """Return half of the 95 % interval of the published figure; None where it has no spread."""
    if row.std is None:
        return None
    spread, degrees = row.std, math.inf if row.seeds is None else row.seeds - 1
    if row.protocol.spread == "interquartile range":
        spread /= QUARTILES
    if row.seeds is not None and row.protocol.spread != "standard error":
        spread /= math.sqrt(row.seeds)
    if degrees == 0:
        return None
    factor = MEDIAN_ERROR if row.protocol.statistic == "median" else 1.0
    return reach(spread, min(degrees, 1e9)) * factor


def judge(row: Value, measured: Measured | None, differences: Sequence[Difference], needs: Sequence[str]) -> Verdict:
    """Apply the rules to one row; `needs` says what a run here would take."""
    if measured is None or not measured.records:
        return Verdict(NOT_RUN, "; ".join(needs) or "needs a run")
    number = row.number
    if number is None:
        return Verdict(MISMATCH, f"the published value is no number: {row.value}")
    difference = measured.value - number
    decisive = [d for d in differences if d.decides]
    if decisive:
        return Verdict(MISMATCH, "; ".join(map(str, decisive)), difference)
    if abs(difference) <= row.rounding + 1e-9:
        return Verdict(EXACT, "equal to the digits printed", difference)
    tolerance = row.metric.tolerance or 0.0
    sides = [h for h in (measured.half_width, published_half_width(row)) if h is not None]
    interval = math.sqrt(math.fsum(h * h for h in sides))
    band = max(interval, tolerance) + row.rounding
    unit = row.metric.unit
    known = {0: "no spread on either side", 1: "a spread on one side", 2: "spreads on both sides"}[len(sides)]
    against = f"interval ±{interval:.2g} ({known})" if interval > tolerance else f"stated tolerance of {tolerance:g}"
    if abs(difference) <= band:
        return Verdict(WITHIN, f"{difference:+.2g} {unit} against {against}", difference, band)
    better = (difference > 0) == (row.metric.better == "higher")
    word = "better" if better else "worse"
    return Verdict(DIFFERS, f"{word} by {abs(difference):.2g} {unit} against {against}", difference, band)
