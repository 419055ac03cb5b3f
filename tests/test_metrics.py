"""Metrics against scikit-learn, SciPy, sacrebleu and values worked out by hand, and where they are undefined."""

import math
import subprocess
import sys

import evaluate
import numpy
import pytest
import sacrebleu
from scipy import stats
from sklearn import metrics as sklearn_metrics

from peftbench.errors import UserError
from peftbench.tasks import metrics

CLASSES = numpy.random.default_rng(0).integers(0, 2, size=(2, 200)).tolist()
VALUES = numpy.random.default_rng(1).normal(size=(2, 200)).round(1).tolist()


def value(name, predictions, references):
    return metrics.compute([name], predictions, references)[name]


TEXTS = ["a b c d", "the cat sat"], [["a c d", "x"], ["the cat sat on it"]]
INPUTS = {
    "classes": CLASSES,
    "numbers": VALUES,
    "text": (["18", "3"], ["18", "4"]),
    "text and references": TEXTS,
}


@pytest.mark.parametrize("name", metrics.METRICS)
def test_every_metric_is_an_evaluate_metric_with_its_own_name_that_says_what_the_function_says(name):
    metric = metrics.load(name)
    assert isinstance(metric, evaluate.Metric)
    predictions, references = INPUTS[metrics.METRICS[name].holds]
    found = metric.compute(predictions=predictions, references=references)
    assert found == metrics.compute([name], predictions, references)
    assert found[name] is not None


def test_judging_runs_needs_no_tables():
    """The packages behind them take a second to import."""
    code = "import sys; from peftbench.tasks.metrics import compute; compute(['accuracy'], [1], [1])"
    code += "; assert not {'evaluate', 'datasets', 'pyarrow'} & set(sys.modules), 'imported'"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_classification_metrics_agree_with_scikit_learn():
    predictions, references = CLASSES
    assert value("accuracy", predictions, references) == sklearn_metrics.accuracy_score(references, predictions)
    assert value("f1", predictions, references) == pytest.approx(sklearn_metrics.f1_score(references, predictions))
    assert value("matthews_correlation", predictions, references) == pytest.approx(
        sklearn_metrics.matthews_corrcoef(references, predictions)
    )


def test_classification_metrics_by_hand():
    predictions, references = [1, 1, 1, 0, 0], [1, 1, 0, 1, 0]
    assert value("accuracy", predictions, references) == pytest.approx(3 / 5)
    assert value("f1", predictions, references) == pytest.approx(2 / 3)
    assert value("matthews_correlation", predictions, references) == pytest.approx(1 / 6)


def test_correlations_agree_with_scipy_ties_included():
    predictions, references = VALUES
    assert len(set(predictions)) < len(predictions)
    assert value("pearson", predictions, references) == pytest.approx(stats.pearsonr(predictions, references)[0])
    assert value("spearmanr", predictions, references) == pytest.approx(stats.spearmanr(predictions, references)[0])


@pytest.mark.parametrize("name", ["pearson", "spearmanr"])
@pytest.mark.parametrize("predictions", [[2.0, 2.0, 2.0], [1.0, math.nan, 3.0], [1.0, math.inf, 3.0]])
def test_a_correlation_without_meaning_is_none(name, predictions):
    assert value(name, predictions, [1.0, 2.0, 4.0]) is None
    assert value(name, [1.0, 2.0, 4.0], [3.0, 3.0, 3.0]) is None


def test_constant_predictions_have_zero_matthews_and_no_positive_has_zero_f1():
    assert value("matthews_correlation", [1, 1, 1], [1, 0, 1]) == 0.0
    assert value("matthews_correlation", [1, 0, 1], [1, 1, 1]) == 0.0
    assert value("f1", [0, 0, 0], [1, 0, 1]) == 0.0
    assert value("f1", [0, 0], [0, 0]) == 0.0


def test_no_items_give_none_for_every_metric():
    assert metrics.compute(["accuracy", "pearson"], [], []) == {"accuracy": None, "pearson": None}


def test_exact_match_is_character_by_character():
    assert value("exact_match", ["18", "", "3"], ["18", "18", "3.0"]) == pytest.approx(1 / 3)


def test_bleu_agrees_with_sacrebleu_for_unequal_numbers_of_references():
    predictions = ["the cat sat on the mat today", "there is a dog in the house"]
    references = [["the cat sat on the mat", "a cat sat on the mat today"], ["there is a dog in the house now"]]
    streams = [["the cat sat on the mat", "there is a dog in the house now"], ["a cat sat on the mat today", None]]
    expected = sacrebleu.corpus_bleu(predictions, streams).score
    assert value("bleu", predictions, references) == pytest.approx(expected)
    assert 50 < expected < 100
    assert value("bleu", ["the cat sat on the mat"], [["the cat sat on the mat"]]) == pytest.approx(100)
    assert value("bleu", ["", ""], references) == 0.0


def test_rouge_l_by_hand_takes_the_best_reference():
    # longest common subsequence "a c d" of 4 predicted and 3 reference tokens: precision 3/4, recall 1
    assert value("rouge_l", ["a b c d"], [["x y", "a c d"]]) == pytest.approx(2 * 0.75 / 1.75)
    assert value("rouge_l", ["a b", ""], [["a b"], ["a b"]]) == pytest.approx(0.5)


def test_an_unknown_metric_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'accuracy'"):
        metrics.load("acuracy")
