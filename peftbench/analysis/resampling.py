"""The bootstrap over seeds × items, stratified by task, and what rliable's authors would have one report with it.

Each draw takes items with replacement, the same for all methods of a task, and seeds with replacement, each method and
task its own (Owen 2007, Ann. Appl. Stat. 1:386-411: rows and columns apart). Any figure may be made of the drawn runs:
their mean, the interquartile mean, a probability of improvement, membership of a Pareto front (Agarwal et al. 2021,
arXiv:2108.13264, who draw runs within tasks; items are added here).

Runs drawn from n seeds scatter √((n − 1) / n) as far as they should, a third too little in variance for three seeds, so
each draw's deviations from its mean are made √(n / (n − 1)) as large. Percentiles still reach less far than Student's
quantiles do for few seeds: for means of few seeds trust `intervals`, and these for what has no other interval.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from peftbench.analysis.intervals import CONFIDENCE, Array, Sample

DRAWS = 2000


def draw_runs(samples: Sequence[Sample], draws: int = DRAWS, seed: int = 0) -> list[Array]:
    """Return each sample's runs [draws, n] as drawn, for the samples of one task; a single seed stays as it is.

    Items are drawn where all samples have them, as many as there are.
    """
    generator = np.random.default_rng(seed)
    weights = _item_weights([s.items for s in samples], draws, generator)
    drawn = []
    for s in samples:
        n = len(s.runs)
        # [draws, n]: the metric of each run on the items drawn.
        runs = np.broadcast_to(s.runs, (draws, n)) if weights is None or s.items is None else weights @ s.items.T
        if n > 1:
            taken = np.take_along_axis(runs, generator.integers(0, n, (draws, n)), axis=1)
            centre = runs.mean(axis=1, keepdims=True)
            runs = centre + np.sqrt(n / (n - 1)) * (taken - centre)
        drawn.append(np.asarray(runs, dtype=float))
    return drawn


def _item_weights(items: Sequence[Array | None], draws: int, generator: np.random.Generator) -> Array | None:
    """Return how often each item was drawn, over m [draws, m]; None where a sample lacks items."""
    if any(one is None for one in items) or len({one.shape[1] for one in items if one is not None}) != 1:
        return None
    count = next(one.shape[1] for one in items if one is not None)
    return generator.multinomial(count, np.full(count, 1 / count), size=draws) / count


def percentiles(drawn: ArrayLike, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return the percentile interval of a figure's draws [draws]."""
    low, high = np.quantile(np.asarray(drawn), [0.5 - confidence / 2, 0.5 + confidence / 2])
    return float(low), float(high)


def bootstrap_p(drawn: ArrayLike) -> float:
    """Return the two-sided p value of "it is 0" from a difference's draws [draws]: twice the share beyond 0."""
    values = np.asarray(drawn)
    beyond = min((values <= 0).sum(), (values >= 0).sum())
    return min(1.0, 2 * float(beyond + 1) / (len(values) + 1))


# -- figures over tasks ------------------------------------------------------------------------------------------------


def interquartile_mean(scores: ArrayLike) -> Array:
    """Return the mean of the middle half of the last axis: [..., k] → [...], a quarter cut off at either end.

    Over all runs of all tasks together (Agarwal et al. 2021, section 4.3): less moved by a collapsed run than the mean,
    less blind than the median. The tasks' metrics should share a scale; so do ratios, not a BLEU beside an accuracy.
    """
    from scipy.stats import trim_mean

    return np.asarray(trim_mean(np.asarray(scores, dtype=float), 0.25, axis=-1))


def improvement(first: Sequence[ArrayLike], second: Sequence[ArrayLike], greater_is_better: bool = True) -> Array:
    """Return the probability that a run of `first` beats one of `second` on a task, averaged over tasks.

    P(X > Y) + P(X = Y) / 2 over all pairs of runs of a task (Agarwal et al. 2021, section 4.3). 0.5 for methods that
    are alike; it says how often, not by how much.

    Args:
        first, second: for each task its runs [..., n]; leading axes (draws) are kept.
    """
    wins = []
    for mine, theirs in zip(first, second, strict=True):
        x, y = np.asarray(mine, dtype=float)[..., :, None], np.asarray(theirs, dtype=float)[..., None, :]
        better = x > y if greater_is_better else x < y
        wins.append((better + 0.5 * (x == y)).mean(axis=(-2, -1)))
    return np.mean(wins, axis=0)


def profile(scores: Sequence[ArrayLike], thresholds: ArrayLike) -> Array:
    """Return the performance profile: the share of runs above each threshold, averaged over tasks [thresholds].

    The score distribution of Agarwal et al. 2021, equation 1; `scores` has for each task its runs [n].
    """
    levels = np.asarray(thresholds, dtype=float)
    return np.mean([(np.asarray(runs, dtype=float)[:, None] > levels).mean(axis=0) for runs in scores], axis=0)


def shortfall_profile(
    methods: Sequence[Sequence[ArrayLike]], within: ArrayLike, greater_is_better: bool = True
) -> Array:
    """Return for each method the share of its runs at most `within` short of the task's best method [methods, within].

    After Dolan and Moré 2002 (Math. Program. 91:201-213), with differences to the best mean in place of ratios, as a
    Matthews correlation may be 0 or less. Tasks weigh the same.

    Args:
        methods: for each method and task its runs [n].
    """
    sign, allowed = 1.0 if greater_is_better else -1.0, np.asarray(within, dtype=float)
    runs = [[sign * np.asarray(r, dtype=float) for r in tasks] for tasks in methods]
    best = [max(float(tasks[t].mean()) for tasks in runs) for t in range(len(runs[0]))]
    # A hair's breadth: a mean of equal runs may exceed each of them by rounding.
    return np.array(
        [
            np.mean([(best[t] - r[:, None] <= allowed + 1e-12).mean(axis=0) for t, r in enumerate(tasks)], axis=0)
            for tasks in runs
        ]
    )
