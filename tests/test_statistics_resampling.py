"""The bootstrap over seeds × items, and figures over tasks, by hand and against scipy."""

import numpy as np
import pytest
from scipy.stats import mannwhitneyu

from peftbench.analysis.intervals import mean, sample
from peftbench.analysis.resampling import (
    bootstrap_p,
    draw_runs,
    improvement,
    interquartile_mean,
    percentiles,
    profile,
    shortfall_profile,
)


def made(seeds=6, items=200, seed_std=0.02, seed=0):
    generator = np.random.default_rng(seed)
    hard = generator.normal(0.7, 0.3, items)
    x = hard + seed_std * generator.normal(size=(seeds, 1)) + 0.1 * generator.normal(size=(seeds, items))
    return sample(range(seeds), x.mean(axis=1), x)


def test_draws_scatter_as_the_closed_form_says():
    one = made()
    (drawn,) = draw_runs([one], 4000)
    assert drawn.shape == (4000, 6)
    means = drawn.mean(axis=1)
    assert means.mean() == pytest.approx(one.runs.mean(), abs=1e-3)
    # Seeds times items counts what is neither's up to three times (Owen 2007); here that is a small part.
    assert means.std() == pytest.approx(mean(one).error, rel=0.06)


def test_seeds_are_drawn_to_their_full_spread():
    runs = np.array([0.2, 0.5, 0.8])
    (drawn,) = draw_runs([sample(range(3), runs)], 20_000)
    assert drawn.mean(axis=1).var() == pytest.approx(runs.var(ddof=1) / 3, rel=0.03)


def test_methods_meet_the_same_items_in_a_draw():
    one = made()
    twin = sample(one.seeds, one.runs + 0.1, one.items + 0.1)
    flat = sample((0,), [one.runs[0]], one.items[:1])
    first, second, single = draw_runs([one, twin, flat], 500)
    # Their seeds are drawn apart, their items together: far closer than two test sets would be.
    assert np.corrcoef(first.mean(axis=1), second.mean(axis=1))[0, 1] > 0.8
    assert single.shape == (500, 1)
    assert single.std() > 0


def test_without_items_only_seeds_are_drawn():
    one = made()
    bare = sample(one.seeds, one.runs)
    first, second = draw_runs([one, bare], 300)
    assert set(second.ravel().round(6)) <= set(
        (one.runs.mean() + np.sqrt(6 / 5) * (one.runs - one.runs.mean())).round(6)
    )
    assert first.std() < one.runs.std() * 1.3


def test_the_same_seed_draws_the_same():
    one = made()
    assert (draw_runs([one], 50, 3)[0] == draw_runs([one], 50, 3)[0]).all()
    assert (draw_runs([one], 50, 3)[0] != draw_runs([one], 50, 4)[0]).any()


def test_percentiles_and_p_by_hand():
    drawn = np.arange(-2, 98) / 100
    assert percentiles(drawn, 0.9) == pytest.approx((0.0295, 0.9205))
    # Three of 100 draws at or below 0, one added to both: 2 · 4 / 101.
    assert bootstrap_p(drawn) == pytest.approx(8 / 101)
    assert bootstrap_p(np.zeros(10)) == 1.0


def test_interquartile_mean_by_hand():
    assert interquartile_mean([0.0, 0.5, 0.7, 9.0]) == pytest.approx(0.6)
    # A quarter of ten is two and a half, of which two are cut off at either end.
    assert interquartile_mean(np.arange(10.0)) == pytest.approx(4.5)
    assert interquartile_mean(np.arange(24.0).reshape(2, 3, 4)).shape == (2, 3)


def test_improvement_by_hand_and_as_mann_and_whitney_count():
    # Of 2 × 2 pairs: 0.9 beats both, 0.5 ties with one and loses to none.
    assert improvement([[0.9, 0.5]], [[0.5, 0.4]]) == pytest.approx((2 + 1.5) / 4)
    assert improvement([[0.9, 0.5]], [[0.5, 0.4]], greater_is_better=False) == pytest.approx(0.5 / 4)
    generator = np.random.default_rng(0)
    x, y = generator.normal(0.2, 1, (2, 7)), generator.normal(0, 1, (2, 9))
    known = np.mean([mannwhitneyu(a, b).statistic / 63 for a, b in zip(x, y, strict=True)])
    assert improvement(x, y) == pytest.approx(known)
    assert improvement([np.stack([x[0], x[1]])], [np.stack([y[0], y[1]])]).shape == (2,)


def test_profiles_by_hand():
    tasks = [[0.5, 0.7], [0.9, 0.9, 0.3]]
    assert profile(tasks, [0.0, 0.5, 0.8, 1.0]) == pytest.approx([1, (1 / 2 + 2 / 3) / 2, (0 + 2 / 3) / 2, 0])
    # Best means: 0.6 and 0.8. The first method is within 0.1 on one run of task 1, on both of task 2.
    methods = [[[0.5, 0.7], [0.8, 0.8]], [[0.2, 0.4], [0.75, 0.55]]]
    found = shortfall_profile(methods, [0.0, 0.1, 0.5])
    assert found.tolist() == [[pytest.approx(0.75), 1.0, 1.0], [0.0, pytest.approx(0.25), 1.0]]
    losses = [[[2.0, 2.2]], [[2.05, 3.0]]]
    assert shortfall_profile(losses, [0.1], greater_is_better=False).ravel().tolist() == [0.5 + 0.5, 0.5]
