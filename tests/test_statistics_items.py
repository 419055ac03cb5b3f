"""Metrics as means over items: against the metrics themselves, the jackknife, and what records allow."""

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score, matthews_corrcoef

from peftbench.analysis.items import classes, contributions, f1, pearson, ratio, spearman, values, verified

GENERATOR = np.random.default_rng(7)
GOLD = np.round(np.clip(GENERATOR.normal(2.5, 1.2, 300), 0, 5) * 5) / 5  # ties, as in STS-B
GUESS = GOLD + GENERATOR.normal(0, 1, 300)
LABELS = (GENERATOR.random(300) < 0.7).astype(int)
SAID = np.where(GENERATOR.random(300) < 0.75, LABELS, 1 - LABELS)
METRICS = {
    "spearmanr": (spearman, lambda p, r: spearmanr(p, r).statistic, GUESS, GOLD),
    "spearmanr of ties": (spearman, lambda p, r: spearmanr(p, r).statistic, GUESS.round(), GOLD.round()),
    "pearson": (pearson, lambda p, r: pearsonr(p, r).statistic, GUESS, GOLD),
    "matthews_correlation": (pearson, lambda p, r: matthews_corrcoef(r, p), SAID, LABELS),
    "f1": (f1, lambda p, r: f1_score(r, p), SAID, LABELS),
}


@pytest.mark.parametrize("name", METRICS)
def test_mean_is_the_metric_and_variance_is_the_jackknifes(name):
    written, metric, predictions, references = METRICS[name]
    found = written(predictions, references)
    assert found.mean() == pytest.approx(metric(predictions, references), abs=1e-12)
    m = len(found)
    without = np.array([metric(np.delete(predictions, i), np.delete(references, i)) for i in range(m)])
    # Leaving item i out takes its contribution, to first order.
    assert np.corrcoef(without.mean() - without, found)[0, 1] > 0.999
    jackknife = (m - 1) / m * ((without - without.mean()) ** 2).sum()
    assert found.var(ddof=1) / m == pytest.approx(jackknife, rel=0.02)


def test_f1_by_hand():
    # TP, FP, FN, TN: F1 = 2 / (2 + 1 + 1) = 1/2; the mean of 2 TP + FP + FN is 1.
    assert f1([1, 1, 0, 0], [1, 0, 1, 0]).tolist() == [0.5 + 2 - 1, 0.5 - 0.5, 0.5 - 0.5, 0.5]


def test_constant_sides_have_no_correlation_and_no_spread():
    for written in (pearson, spearman):
        assert not written(np.full(20, 0.1), np.arange(20)).any()
    assert not f1(np.zeros(5), np.zeros(5)).any()


def test_a_loss_is_a_ratio_of_sums():
    found = ratio([3.0, 1.0, 8.0], [1.0, 1.0, 2.0])
    assert found.mean() == pytest.approx(12 / 4)
    runs = [{"scores": [-3.0, -1.0, -4.0], "predictions": [[3.0, 1], [1.0, 1], [8.0, 2]]}]
    (loss,) = contributions("loss", runs)
    assert loss.tolist() == found.tolist()
    (perplexity,) = contributions("perplexity", runs)
    assert perplexity.mean() == pytest.approx(np.exp(3))


def test_classes_follow_from_right_and_wrong():
    first, second = np.array([1, 0, 1.0]), np.array([0, 0, 1.0])
    assert classes([first, second], [np.array([1, 0, 0.0]), np.array([0, 0, 0.0])]).tolist() == [1, 1, 0]
    assert classes([first, second], [np.array([1, 0, 0.0]), np.array([1, 0, 0.0])]) is None  # both cannot be right
    assert classes([np.array([2.0])], [np.array([0.0])]) is None  # three classes


def test_values_follow_from_the_errors_of_two_runs():
    guesses = [GUESS, GOLD + GENERATOR.normal(0, 1, 300)]
    errors = [-np.abs(g - GOLD) for g in guesses]
    assert values(guesses, errors).tolist() == GOLD.round(6).tolist()
    assert values(guesses[:1], errors[:1]) is None  # above or below
    assert values(guesses, [errors[0], errors[0]]) is None


def correlation_runs():
    guesses = [GUESS, GOLD + GENERATOR.normal(0, 1, 300)]
    return guesses, [{"scores": list(-np.abs(g - GOLD)), "predictions": list(g)} for g in guesses]


def test_contributions_are_used_only_where_they_give_the_recorded_metric():
    guesses, runs = correlation_runs()
    recorded = [spearmanr(g, GOLD).statistic for g in guesses]
    assert verified("spearmanr", recorded, runs) is not None
    assert verified("spearmanr", [recorded[0], recorded[1] + 1e-4], runs) is None
    assert verified("accuracy", [0.75], [{"scores": [1, 1, 1, 0]}])[0].tolist() == [1, 1, 1, 0]
    assert verified("accuracy", [0.8], [{"scores": [1, 1, 1, 0]}]) is None


@pytest.mark.parametrize(
    ("metric", "runs"),
    [
        ("bleu", [{"scores": [0.1, 0.2], "predictions": ["a", "b"]}]),
        ("accuracy", [{"scores": [1, 0, 1]}, {"scores": [1, 0]}]),
        ("accuracy", [{"scores": []}]),
        ("accuracy", []),
        ("matthews_correlation", [{"scores": [1.0, 0.0]}]),
        ("matthews_correlation", [{"scores": [1.0, 0.0], "predictions": [[1, 2], [0, 1]]}]),
        ("mean_primary", [{"scores": [1.0, 0.0], "predictions": [1, 1]}]),
    ],
)
def test_what_items_do_not_give(metric, runs):
    assert contributions(metric, runs) is None
