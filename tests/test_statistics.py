"""Intervals, p values and detectable differences: small cases by hand, and against scipy and statsmodels."""

import math

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.power import TTestIndPower, TTestPower

from peftbench.analysis.intervals import (
    Estimate,
    Source,
    difference,
    half_widths,
    interval,
    mean,
    over_tasks,
    p_values,
    paired_difference,
    residual,
    sample,
    total,
)
from peftbench.analysis.power import design, detectable, with_seeds

RIGHT = [[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]]
"""Two seeds, three items: means of seeds 2/3 and 1/3, of items 1, 1/2 and 0."""


def test_both_sources_of_error_by_hand():
    found = mean(sample((0, 1), [2 / 3, 1 / 3], RIGHT))
    assert found.value == pytest.approx(1 / 2)
    # Seeds: ((1/6)² + (1/6)²) / 1 / 2. Items: variance of (1, 1/2, 0) is 1/4.
    assert found.seeds.variance == pytest.approx(1 / 36)
    assert (found.seeds.degrees, found.items.degrees) == (1, 2)
    # Rest: y less its row's and column's mean, plus 1/2: ±1/6 four times, ±1/3 twice: 1/3, over 1 · 2, over 6.
    assert residual(np.array(RIGHT)) == pytest.approx(1 / 36)
    assert found.items.variance == pytest.approx(1 / 4 / 3 - 1 / 36)


def test_both_sources_of_a_difference_by_hand():
    first, second = np.array([[4.0, 0.0], [0.0, 0.0]]), np.array([[0.0, 8.0], [0.0, 4.0]])
    found = difference(*(sample((0, 1), one.mean(axis=1), one) for one in (first, second)))
    assert found.value == 1 - 3
    # Seeds: runs 2 and 0, 4 and 2, each side's variance 2 over 2 seeds; Welch's degrees are 4 / (1 + 1).
    assert (found.seeds.variance, found.seeds.degrees) == (pytest.approx(2), pytest.approx(2))
    # Items: means 2 − 0 and 0 − 6 have a variance of 32, over 2 items. Rest: ±1 four times on each side, so 4 over 4.
    assert (residual(first), residual(second)) == (1, 1)
    assert found.items.variance == pytest.approx(16 - 1 - 1)


def test_one_source_is_students_interval():
    scores = [0.70, 0.74, 0.69, 0.75]
    found = mean(sample(range(4), scores))
    known = stats.ttest_1samp(scores, 0)
    assert interval(found) == pytest.approx(tuple(known.confidence_interval(0.95)))
    assert p_values([found])[0] == pytest.approx(known.pvalue, rel=1e-9)


def test_independent_seeds_without_items_are_welchs_test():
    a, b = [0.81, 0.84, 0.86, 0.80, 0.83], [0.78, 0.83, 0.79]
    found = difference(sample(range(5), a), sample(range(3), b))
    known = stats.ttest_ind(a, b, equal_var=False)
    assert p_values([found])[0] == pytest.approx(known.pvalue, rel=1e-9)
    assert interval(found) == pytest.approx(tuple(known.confidence_interval(0.95)))


def test_paired_seeds_without_items_are_the_paired_test():
    a, b = {0: 0.81, 1: 0.84, 2: 0.86, 7: 0.1}, {2: 0.80, 1: 0.83, 0: 0.79, 9: 0.9}
    found = paired_difference(sample(a, list(a.values())), sample(b, list(b.values())))
    shared = (0, 1, 2)
    known = stats.ttest_rel([a[s] for s in shared], [b[s] for s in shared])
    assert p_values([found])[0] == pytest.approx(known.pvalue, rel=1e-9)
    assert paired_difference(sample((0,), [0.5]), sample((1,), [0.5])) is None


def test_items_without_seeds_error_are_the_paired_test_over_items():
    """Seeds that agree on every item leave the items' error alone: the paired test over items."""
    generator = np.random.default_rng(0)
    x, y = generator.random((2, 50))
    first, second = (sample((0, 1), [v.mean()] * 2, [v, v]) for v in (x, y))
    found = difference(first, second)
    assert found.seeds.variance == 0
    assert p_values([found])[0] == pytest.approx(stats.ttest_rel(x, y).pvalue, rel=1e-9)


def test_two_sources_reach_as_far_as_banerjee_says():
    found = Estimate(0.5, Source(0.04, 2), Source(0.09, 100))
    reach = math.sqrt(4.302653**2 * 0.04 + 1.983972**2 * 0.09)
    assert interval(found) == pytest.approx((0.5 - reach, 0.5 + reach), abs=1e-6)
    # The p value is the level whose interval ends at 0.
    p = p_values([found])[0]
    assert half_widths([found], p)[0] == pytest.approx(0.5, rel=1e-9)


def test_tiny_p_values_are_exact():
    found = Estimate(1.0, Source(1e-4, 30))
    assert p_values([found])[0] == pytest.approx(2 * stats.t.sf(100, 30), rel=1e-8)


def test_what_cannot_be_tested_and_what_needs_no_test():
    single = mean(sample((0,), [0.8], [[1.0, 0.0, 1.0]]))
    assert single.items is None
    assert (interval(single), single.error) == (None, None)
    same, sure = Estimate(0.0, Source(0.0, 2)), Estimate(0.1, Source(0.0, 2))
    assert np.isnan(p_values([single, same, sure])).tolist() == [True, False, False]
    assert p_values([same, sure]).tolist() == [1.0, 0.0]
    assert np.isnan(half_widths([single])).all()


def test_tasks_are_strata():
    one, two = Estimate(0.8, Source(0.04, 2), Source(0.01, 99)), Estimate(0.6, Source(0.08, 4), Source(0.03, 9))
    whole = over_tasks([one, two])
    assert whole.value == pytest.approx(0.7)
    assert whole.seeds.variance == pytest.approx((0.04 + 0.08) / 4)
    assert whole.seeds.degrees == pytest.approx(0.12**2 / (0.04**2 / 2 + 0.08**2 / 4))
    assert whole.items.variance == pytest.approx(0.01)
    assert over_tasks([one, Estimate(0.6, Source(0.1, 2))]).items is None
    assert not over_tasks([one, Estimate(0.6)]).sources
    assert total([Source(0.0, 2), Source(0.0, 3)]).degrees == 5


# What could have been found.


@pytest.mark.parametrize("n", [3, 5, 34])
def test_detectable_difference_of_one_source_is_statsmodels(n):
    found = detectable([Estimate(0.0, Source(1 / n, n - 1))])[0]
    known = TTestPower().solve_power(effect_size=None, nobs=n, alpha=0.05, power=0.8)
    assert found == pytest.approx(known, rel=1e-4)


def test_cohens_medium_effect_takes_64_a_group():
    # Cohen 1988, table 2.4.1: d = 0.5, α = 0.05 two-sided, power 0.8.
    assert design(seeds=64, items=None, seed_std=1.0) == pytest.approx(0.5, abs=0.002)
    known = TTestIndPower().solve_power(effect_size=None, nobs1=5, alpha=0.05, power=0.8)
    assert design(seeds=5, items=None, seed_std=0.02) == pytest.approx(0.02 * known, rel=1e-4)


def test_more_seeds_or_items_detect_less():
    few, many = design(3, 400, 0.01, 0.3), design(10, 400, 0.01, 0.3)
    assert few > many > design(10, 4000, 0.01, 0.3)
    # With any number of seeds the test set stays: about (1.96 + 0.84) standard errors.
    floor = with_seeds(Estimate(0.0, Source(1.0, 4), Source(0.0001, 1e6)), 3, None)
    assert detectable([floor])[0] == pytest.approx(2.8016 * 0.01, rel=1e-3)
    with pytest.raises(ValueError, match="2 or more"):
        design(1, 100, 0.1)


def test_detectable_difference_grows_with_the_hurdle():
    estimate = Estimate(0.0, Source(0.01, 4), Source(0.02, 300))
    alone, among = detectable([estimate]), detectable([estimate], 0.05 / 28)
    assert alone < among
    assert np.isnan(detectable([Estimate(0.3)])[0])
    assert detectable([Estimate(0.0, Source(0.0, 3))])[0] == 0.0


def test_as_many_seeds_again():
    estimate = Estimate(0.0, Source(0.03, 4), Source(0.02, 300))
    more = with_seeds(estimate, 3, 6)
    assert (more.seeds.variance, more.seeds.degrees) == pytest.approx((0.015, 10))
    assert more.items == estimate.items
    assert with_seeds(Estimate(0.1), 3, 6) == Estimate(0.1)
