"""Simulated experiments whose truth is known: do intervals cover it as often as they say, do tests keep to α?

Seeded, a second or two each. Bounds are the nominal figure with three standard errors of the simulation about it, and
room on the safe side only, where the method is conservative by design.
"""

import itertools

import numpy as np
import pytest
from scipy.stats import norm

from peftbench.analysis.comparisons import judge
from peftbench.analysis.intervals import (
    Estimate,
    Source,
    difference,
    half_widths,
    mean,
    over_tasks,
    p_values,
    paired_difference,
    sample,
)
from peftbench.analysis.items import pearson
from peftbench.analysis.paired import mcnemar
from peftbench.analysis.power import detectable, with_seeds
from peftbench.analysis.resampling import draw_runs, improvement, interquartile_mean, percentiles
from peftbench.analysis.tiers import letters, matrix


def slack(share, trials):
    """Three standard errors of a share seen in so many trials."""
    return 3 * np.sqrt(share * (1 - share) / trials)


def numbers(generator, seeds, items, seed_std, item_std=0.3, rest_std=0.2, hard=None):
    """Return scores [seeds, items] about 0 with independent errors of seeds, items and their product."""
    item = item_std * generator.normal(size=items) if hard is None else hard
    rest = rest_std * generator.normal(size=(seeds, items))
    x = seed_std * generator.normal(size=(seeds, 1)) + item + rest
    return sample(range(seeds), x.mean(axis=1), x)


def answers(generator, hard, skill, seeds, seed_std):
    """Return right and wrong answers of runs whose skill varies with the seed, to items of given difficulty."""
    own = skill + seed_std * generator.normal(size=(seeds, 1))
    right = (generator.random((seeds, len(hard))) < norm.cdf(own - hard)).astype(float)
    return sample(range(seeds), right.mean(axis=1), right)


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("seed_std", [0.0, 0.03, 0.15])  # against 0.3 / √300 = 0.017 of the items
def test_intervals_of_means_cover(seeds, seed_std):
    generator, trials = np.random.default_rng(seeds), 800
    found = [mean(numbers(generator, seeds, 300, seed_std)) for _ in range(trials)]
    covered = np.mean(np.abs([e.value for e in found]) <= half_widths(found))
    assert 0.95 - slack(0.95, trials) <= covered <= 0.99


def test_students_interval_over_seeds_alone_misses_the_test_set():
    """What the items' error is for: with the seeds' alone the truth for other test sets is missed half the time."""
    generator, trials = np.random.default_rng(1), 400
    made = [numbers(generator, 5, 300, 0.01) for _ in range(trials)]
    bare = [mean(sample(s.seeds, s.runs)) for s in made]
    assert np.mean(np.abs([e.value for e in bare]) <= half_widths(bare)) < 0.7
    whole = [mean(s) for s in made]
    assert np.mean(np.abs([e.value for e in whole]) <= half_widths(whole)) > 0.93


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("seed_std", [0.0, 0.1, 0.3])
def test_equal_methods_are_told_apart_as_often_as_alpha(seeds, seed_std):
    generator, trials = np.random.default_rng(seeds), 1500
    found = []
    for _ in range(trials):
        hard = generator.normal(size=400)
        found.append(difference(*(answers(generator, hard, 0.8, seeds, seed_std) for _ in range(2))))
    p = p_values(found)
    for alpha in (0.05, 0.01):
        assert (p < alpha).mean() <= alpha + slack(alpha, trials)
    assert (p < 0.05).mean() >= 0.01


def test_a_method_that_varies_more_does_not_mislead():
    generator, trials = np.random.default_rng(2), 1500
    found = []
    for _ in range(trials):
        hard = 0.3 * generator.normal(size=300)
        steady, wild = (numbers(generator, 3, 300, s, hard=hard) for s in (0.005, 0.3))
        found.append(difference(steady, wild))
    assert 0.03 <= (p_values(found) < 0.05).mean() <= 0.05 + slack(0.05, trials)


def test_seeds_in_pairs_pay_where_seeds_go_together():
    generator, trials = np.random.default_rng(3), 800
    apart, paired = [], []
    for _ in range(trials):
        shared = 0.05 * generator.normal(size=(5, 1))
        hard = 0.3 * generator.normal(size=300)
        made = []
        for _ in range(2):
            x = shared + 0.01 * generator.normal(size=(5, 1)) + hard + 0.05 * generator.normal(size=(5, 300))
            made.append(sample(range(5), x.mean(axis=1), x))
        apart.append(difference(*made))
        paired.append(paired_difference(*made))
    assert (p_values(apart) < 0.05).mean() < 0.01  # safe, but blind
    assert 0.02 <= (p_values(paired) < 0.05).mean() <= 0.05 + slack(0.05, trials)
    assert np.median(half_widths(paired)) < 0.5 * np.median(half_widths(apart))


@pytest.mark.parametrize(("methods", "seeds", "spread"), [(8, 5, 0.0), (8, 3, 1.0), (14, 3, 0.0)])
def test_tiers_of_equal_methods_seldom_split(methods, seeds, spread):
    """The chance of a single false split among all pairs is at most α, whether methods vary alike or not."""
    generator, trials = np.random.default_rng(methods), 250
    pairs = list(itertools.combinations(range(methods), 2))
    split = 0
    for trial in range(trials):
        stds = 0.02 * np.exp(spread * generator.normal(size=methods))
        hard = 0.3 * generator.normal(size=200)
        made = [numbers(generator, seeds, 200, s, hard=hard) for s in stds]
        found = [difference(made[i], made[j]) for i, j in pairs]
        false = p_values(found).min() < 0.05 / len(pairs)  # Holm's first step, without which nothing is told apart
        split += false
        if false or trial < 5:
            told = [v.apart for v in judge(pairs, found)]
            assert (len(set(letters(matrix(methods, pairs, told)))) > 1) == false
    assert split / trials <= 0.05 + slack(0.05, trials)


def test_over_tasks_too_equal_methods_are_told_apart_as_often_as_alpha():
    generator, trials = np.random.default_rng(4), 800
    found = []
    for _ in range(trials):
        gaps = []
        for seed_std, items in ((0.01, 300), (0.1, 200), (0.03, 100)):
            hard = 0.3 * generator.normal(size=items)
            gaps.append(difference(*(numbers(generator, 3, items, seed_std, hard=hard) for _ in range(2))))
        found.append(over_tasks(gaps))
    assert 0.01 <= (p_values(found) < 0.05).mean() <= 0.05 + slack(0.05, trials)


@pytest.mark.parametrize(("seed_std", "items"), [(0.05, None), (0.03, 300), (0.002, 300)])
def test_a_difference_of_the_detectable_size_is_found_four_times_in_five(seed_std, items):
    generator, trials, seeds = np.random.default_rng(5), 800, 5

    def one(shift, hard):
        if items is None:
            return sample(range(seeds), shift + seed_std * generator.normal(size=seeds))
        own = numbers(generator, seeds, items, seed_std, hard=hard + 0.15 * generator.normal(size=items))
        return sample(own.seeds, own.runs + shift, own.items + shift)

    def pair(shift):
        hard = None if items is None else 0.3 * generator.normal(size=items)
        return difference(one(shift, hard), one(0.0, hard))

    # The design's own figure: variances as they are, which a long experiment shows.
    long = [pair(0.0) for _ in range(400)]
    true = Estimate(
        0.0,
        Source(float(np.mean([e.seeds.variance for e in long])), 2 * (seeds - 1)),
        None if items is None else Source(float(np.mean([e.items.variance for e in long])), items - 1),
    )
    shift = float(detectable([true])[0])
    found = (p_values([pair(shift) for _ in range(trials)]) < 0.05).mean()
    assert 0.8 - 0.05 - slack(0.8, trials) <= found <= 0.8 + 0.03 + slack(0.8, trials)
    assert float(detectable([with_seeds(true, 5, 10)])[0]) < shift


def test_correlations_are_covered_through_contributions():
    generator, trials = np.random.default_rng(6), 600
    # Labels 1 with chance 0.7, predicted right with chance 0.75: Matthews' correlation in the population.
    right, share = 0.75, 0.7
    said = right * share + (1 - right) * (1 - share)
    truth = (right * share - share * said) / np.sqrt(share * (1 - share) * said * (1 - said))
    found = []
    for _ in range(trials):
        labels = generator.random(400) < share
        # All seeds predict the same, so that the items' error is all there is.
        common = np.where(generator.random(400) < right, labels, ~labels)
        runs = np.array([pearson(common, labels)] * 3)
        found.append(mean(sample(range(3), runs.mean(axis=1), runs)))
    covered = np.mean(np.abs(np.array([e.value for e in found]) - truth) <= half_widths(found))
    assert covered == pytest.approx(0.95, abs=slack(0.95, trials))


def test_mcnemars_exact_test_keeps_to_alpha():
    generator, trials = np.random.default_rng(7), 500
    p = []
    for _ in range(trials):
        hard = generator.normal(size=200)
        first, second = (generator.random((2, 200)) < norm.cdf(0.8 - hard)).astype(float)
        p.append(mcnemar(first, second).p)
    assert (np.array(p) < 0.05).mean() <= 0.05 + slack(0.05, trials)


def test_mcnemars_test_of_one_seed_is_no_test_of_methods():
    """With seeds that vary, single runs of equal methods differ more often than α: the trained models do differ."""
    generator, trials = np.random.default_rng(8), 400
    p = []
    for _ in range(trials):
        hard = generator.normal(size=800)
        first, second = (answers(generator, hard, 0.8, 1, 0.3).items[0] for _ in range(2))
        p.append(mcnemar(first, second).p)
    assert (np.array(p) < 0.05).mean() > 0.3


def test_bootstrap_percentiles_need_more_seeds_than_students_interval():
    generator, trials = np.random.default_rng(9), 300
    covered = {}
    for seeds in (3, 12):
        inside = []
        for _ in range(trials):
            (drawn,) = draw_runs([numbers(generator, seeds, 100, 0.1)], 400, int(generator.integers(1 << 30)))
            low, high = percentiles(drawn.mean(axis=1))
            inside.append(low <= 0 <= high)
        covered[seeds] = np.mean(inside)
    assert covered[12] >= 0.90 - slack(0.90, trials)
    assert 0.70 <= covered[3] < covered[12]


def test_aggregates_over_tasks_cover():
    generator, trials = np.random.default_rng(10), 200
    centres = np.array([0.2, 0.4, 0.6, 0.8])
    # With symmetric errors about symmetric centres the interquartile mean of the population is the centre of all.
    inside, even = [], []
    for _ in range(trials):
        drawn, other = [], []
        for c in centres:
            made = [numbers(generator, 5, 100, 0.05) for _ in range(2)]
            made = [sample(s.seeds, s.runs + c, s.items + c) for s in made]
            first, second = draw_runs(made, 400, int(generator.integers(1 << 30)))
            drawn.append(first)
            other.append(second)
        low, high = percentiles(interquartile_mean(np.concatenate(drawn, axis=1)))
        inside.append(low <= 0.5 <= high)
        low, high = percentiles(improvement(drawn, other))
        even.append(low <= 0.5 <= high)
    assert np.mean(inside) >= 0.90 - slack(0.90, trials)
    assert np.mean(even) >= 0.90 - slack(0.90, trials)
