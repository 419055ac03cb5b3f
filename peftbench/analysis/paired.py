"""Tests of two runs on the same items, tests of methods over tasks, and corrections for many of them.

Thin covers of statsmodels, scipy and scikit-posthocs that take arrays of scores. What each one asks:

- `mcnemar`: would these two *trained models* differ on other items? Training them again is no part of the question.
- `wilcoxon`, `friedman` and what follows it: would these *methods* differ on other tasks (Demšar 2006, JMLR 7:1-30)?
  Each task counts once, whatever its size; with 5 tasks the smallest p value that Wilcoxon's test can have is 0.0625.
- `peftbench.analysis.intervals.difference`: would these methods differ on this task with other seeds and items?
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from peftbench.analysis.extras import load
from peftbench.analysis.intervals import Array, Sample
from peftbench.analysis.resampling import DRAWS, bootstrap_p, draw_runs, percentiles

CORRECTIONS = {"holm": "holm", "benjamini-hochberg": "fdr_bh"}


@dataclass(frozen=True)
class Discordance:
    """Items that only the first (`first_only`) or only the second model got right; `p` of both shares being equal."""

    first_only: int
    second_only: int
    p: float


def mcnemar(first: ArrayLike, second: ArrayLike, exact: bool = True, corrected: bool = True) -> Discordance:
    """McNemar's test (1947, Psychometrika 12:153-157) of two models' right (1) and wrong (0) answers [m].

    Args:
        exact: the binomial test on the items on which they differ; otherwise chi-square with one degree of freedom,
            with the continuity correction if `corrected`. The exact test rejects less often than α.

    Raises:
        ValueError: other scores than 0 and 1, or of different items.
        UserError: statsmodels is missing, where it is not `exact`.
    """
    a, b = (np.asarray(scores, dtype=float) for scores in (first, second))
    if a.shape != b.shape or not (np.isin(a, (0, 1)).all() and np.isin(b, (0, 1)).all()):
        raise ValueError("McNemar's test is of right (1) and wrong (0) answers of two models to the same items")
    table = [[int(((a == i) & (b == j)).sum()) for j in (1, 0)] for i in (1, 0)]
    if table[0][1] + table[1][0] == 0:
        return Discordance(0, 0, 1.0)
    first_only, second_only = table[0][1], table[1][0]
    if exact:
        return Discordance(first_only, second_only, _sign_test(first_only, second_only))
    found = load("statsmodels.stats.contingency_tables").mcnemar(table, exact=False, correction=corrected)
    return Discordance(first_only, second_only, min(1.0, float(found.pvalue)))


def _sign_test(first: int, second: int) -> float:
    """Return the two-sided p value of one in two; a report needs no more of scipy.stats, a second of import time."""
    from scipy.special import bdtr

    return min(1.0, 2 * float(bdtr(min(first, second), first + second, 0.5)))


@dataclass(frozen=True)
class Drawn:
    """A difference of means, its percentile interval and two-sided p value over draws."""

    value: float
    low: float
    high: float
    p: float


def paired_bootstrap(first: Sample, second: Sample, draws: int = DRAWS, seed: int = 0) -> Drawn:
    """Return `first` less `second` over draws of seeds × items, both on the same items in each draw."""
    mine, theirs = draw_runs([first, second], draws, seed)
    differences = mine.mean(axis=1) - theirs.mean(axis=1)
    return Drawn(float(first.runs.mean() - second.runs.mean()), *percentiles(differences), bootstrap_p(differences))


def wilcoxon(first: ArrayLike, second: ArrayLike) -> float:
    """Return the two-sided p value of Wilcoxon's signed-rank test over tasks, of one score a task each [T].

    Ranks of zero differences are split evenly (Demšar 2006, section 3.1.3). 1.0 where no task differs.
    """
    from scipy.stats import wilcoxon as signed_rank

    differences = np.asarray(first, dtype=float) - np.asarray(second, dtype=float)
    if not differences.any():
        return 1.0
    return float(signed_rank(differences, zero_method="zsplit").pvalue)


@dataclass(frozen=True)
class Friedman:
    """Friedman's test: mean ranks of the methods [k] (1 is best), and whether they can all be the same.

    `chi_square` and its `p`; `f` is Iman and Davenport's (1980) less conservative form with its `f_p`, and
    `critical_difference` what Nemenyi's test asks of two mean ranks at α = 0.05.
    """

    mean_ranks: Array
    chi_square: float
    p: float
    f: float
    f_p: float
    critical_difference: float


def friedman(scores: ArrayLike, greater_is_better: bool = True) -> Friedman:
    """Friedman's test over tasks of scores [T, k]: k methods, at least 3, on T tasks, at least 2.

    Demšar 2006, section 3.2. Ties take their mean rank. The approximations want T > 10 and k > 5; with fewer, read it
    as an indication.

    Raises:
        ValueError: fewer methods or tasks.
    """
    from scipy.stats import f as f_distribution
    from scipy.stats import friedmanchisquare, rankdata, studentized_range

    table = np.asarray(scores, dtype=float) * (-1 if greater_is_better else 1)
    tasks, methods = table.shape
    if methods < 3 or tasks < 2:
        raise ValueError(f"Friedman's test of {methods} methods on {tasks} tasks: expected 3 or more and 2 or more")
    ranks = rankdata(table, axis=1).mean(axis=0)
    q = float(studentized_range.ppf(0.95, methods, np.inf)) / math.sqrt(2)
    critical = q * math.sqrt(methods * (methods + 1) / (6 * tasks))
    if (table == table[:, :1]).all():
        return Friedman(ranks, 0.0, 1.0, 0.0, 1.0, critical)
    found = friedmanchisquare(*table.T)
    chi_square = float(found.statistic)
    left = tasks * (methods - 1) - chi_square
    f = (tasks - 1) * chi_square / left if left > 1e-9 else math.inf
    f_p = float(f_distribution.sf(f, methods - 1, (methods - 1) * (tasks - 1)))
    return Friedman(ranks, chi_square, float(found.pvalue), f, f_p, critical)


def nemenyi(scores: ArrayLike) -> Array:
    """Return the p values [k, k] of Nemenyi's test after Friedman's, of scores [T, k]; UserError without library."""
    return np.asarray(load("scikit_posthocs").posthoc_nemenyi_friedman(np.asarray(scores, dtype=float)))


def conover(scores: ArrayLike, correction: str | None = "holm") -> Array:
    """Return the p values [k, k] of Conover's test after Friedman's, of scores [T, k]; UserError without the library.

    It finds more than Nemenyi's, and more than it should where Friedman's test itself found nothing.
    """
    method = None if correction is None else CORRECTIONS[correction]
    found: Any = load("scikit_posthocs").posthoc_conover_friedman(np.asarray(scores, dtype=float), p_adjust=method)
    return np.asarray(found)


def adjusted(p: Sequence[float], correction: str = "holm") -> Array:
    """Return p values corrected for their number, in the same order; NaN (not tested) stays NaN and is not counted.

    Both are a line of arithmetic; statsmodels, against which the tests compare them, takes a second to import, with
    which every sweep would end.

    Args:
        correction: ``holm`` bounds the chance of a single false finding among them (Holm 1979);
            ``benjamini-hochberg`` bounds the share of false ones among the findings (1995).

    Raises:
        ValueError: another correction.
    """
    if correction not in CORRECTIONS:
        raise ValueError(f"correction {correction!r}: expected one of {', '.join(CORRECTIONS)}")
    values = np.asarray(p, dtype=float)
    tested = np.flatnonzero(~np.isnan(values))
    order = tested[np.argsort(values[tested])]  # the smallest first
    rank, count = np.arange(1, len(order) + 1), len(order)
    if correction == "holm":
        corrected = np.maximum.accumulate(values[order] * (count + 1 - rank))
    else:
        corrected = np.minimum.accumulate((values[order] / (rank / count))[::-1])[::-1]
    out = np.full(values.shape, np.nan)
    out[order] = np.minimum(corrected, 1.0)
    return out
