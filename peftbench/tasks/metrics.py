"""Metrics that need neither the network nor a script from the hub: functions, and `evaluate.Metric`s that call them.

Each has the name and result key of its counterpart on the hub. A run's predictions are judged by the functions
(`compute`): what `evaluate` adds, a table of the predictions in Arrow, takes longer than most metrics, and a sweep
judges every run of a pack after every epoch. `load` gives the `evaluate.Metric`, for ``compute(predictions=...,
references=...)`` and whatever else takes one.

Undefined values are None, never nan: a correlation is None when either side is constant or a prediction is not finite.
Matthews is 0.0 for constant predictions and F1 is 0.0 without true positives, as scikit-learn defines them.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from peftbench.errors import UserError, nearest

if TYPE_CHECKING:
    import evaluate


def accuracy(predictions: Sequence[int], references: Sequence[int]) -> float:
    """Return the share of predictions equal to their reference."""
    return sum(p == r for p, r in zip(predictions, references, strict=True)) / len(references)


def f1(predictions: Sequence[int], references: Sequence[int]) -> float:
    """Return the harmonic mean of precision and recall of class 1; 0.0 when there is no true positive."""
    from sklearn.metrics import f1_score

    return float(f1_score(references, predictions, pos_label=1, average="binary", zero_division=0.0))


def matthews_correlation(predictions: Sequence[int], references: Sequence[int]) -> float:
    """Return Matthews' correlation coefficient; 0.0 when predictions or references are constant."""
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(references, predictions))


def pearson(predictions: Sequence[float], references: Sequence[float]) -> float | None:
    """Return Pearson's correlation; None when undefined."""
    from scipy.stats import pearsonr

    if not _correlatable(predictions, references):
        return None
    return _finite(pearsonr(predictions, references).statistic)


def spearmanr(predictions: Sequence[float], references: Sequence[float]) -> float | None:
    """Return Spearman's rank correlation with ties averaged; None when undefined."""
    from scipy.stats import spearmanr as correlation

    if not _correlatable(predictions, references):
        return None
    return _finite(correlation(predictions, references).statistic)


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Return the share of predicted strings equal to their reference, character by character."""
    return sum(p == r for p, r in zip(predictions, references, strict=True)) / len(references)


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return corpus BLEU in [0, 100] by sacrebleu (13a tokens, exponential smoothing), any references an item."""
    from sacrebleu.metrics import BLEU

    # sacrebleu wants one stream per reference position, with None where an item has fewer references.
    depth = max(len(each) for each in references)
    streams: list[Any] = [[each[i] if i < len(each) else None for each in references] for i in range(depth)]
    return float(BLEU().corpus_score(list(predictions), streams).score)


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """Return the best ROUGE-L F-measure of a prediction against its references, in [0, 1] (rouge-score, stemmed)."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return float(scorer.score_multi(list(references), prediction)["rougeL"].fmeasure)


def mean_rouge_l(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return the mean over items of the best ROUGE-L F-measure against the item's references, in [0, 1]."""
    return sum(rouge_l(p, r) for p, r in zip(predictions, references, strict=True)) / len(references)


class Metric(NamedTuple):
    """A metric: its function of predictions and references, what these hold, and what is said of it."""

    function: Callable[[Sequence[Any], Sequence[Any]], float | None]
    holds: str
    description: str
    citation: str = ""


METRICS: dict[str, Metric] = {
    "accuracy": Metric(accuracy, "classes", "Share of predictions equal to their reference."),
    "f1": Metric(f1, "classes", "F1 of class 1, as GLUE reports it for MRPC and QQP."),
    "matthews_correlation": Metric(
        matthews_correlation,
        "classes",
        "Matthews correlation coefficient, as GLUE reports it for CoLA.",
        "Matthews 1975, Biochimica et Biophysica Acta 405(2)",
    ),
    "pearson": Metric(pearson, "numbers", "Pearson correlation, as GLUE reports it for STS-B."),
    "spearmanr": Metric(spearmanr, "numbers", "Spearman rank correlation, as GLUE reports it for STS-B."),
    "exact_match": Metric(
        exact_match, "text", "Share of predicted strings equal to their reference, character by character."
    ),
    "bleu": Metric(
        bleu,
        "text and references",
        "Corpus BLEU (sacrebleu, 13a tokens), from 0 to 100.",
        "Papineni et al. 2002; Post 2018, arXiv:1804.08771",
    ),
    "rouge_l": Metric(
        mean_rouge_l,
        "text and references",
        "Mean ROUGE-L F-measure (rouge-score, stemmed), best of an item's references, from 0 to 1.",
        "Lin 2004, Text Summarization Branches Out",
    ),
}


def load(name: str) -> evaluate.Metric:
    """Return a metric as a fresh `evaluate.Metric`, computed in memory; UserError for an unknown name."""
    import datasets
    import evaluate

    metric = _named(name)
    classes, numbers, text = (datasets.Value(kind) for kind in ("int64", "float64", "string"))
    predictions, references = {
        "classes": (classes, classes),
        "numbers": (numbers, numbers),
        "text": (text, text),
        "text and references": (text, datasets.Sequence(text)),
    }[metric.holds]

    class Local(evaluate.Metric):  # type: ignore[misc, unused-ignore]
        def _info(self) -> evaluate.MetricInfo:
            return evaluate.MetricInfo(
                description=metric.description,
                citation=metric.citation,
                inputs_description="",
                features=datasets.Features({"predictions": predictions, "references": references}),
            )

        def _compute(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float | None]:
            return {name: metric.function(predictions, references)}

    # `evaluate` makes its folder even for metrics kept in memory; a temporary one also works without a home.
    folder = os.path.join(tempfile.gettempdir(), f"peftbench-metrics-{os.getuid() if hasattr(os, 'getuid') else 0}")
    return Local(keep_in_memory=True, cache_dir=folder, seed=0)


def compute(names: Sequence[str], predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float | None]:
    """Return metric name → value for several metrics over the same items; every value None when there are no items.

    Raises:
        UserError: an unknown metric.
    """
    metrics = {name: _named(name) for name in names}
    if not references:
        return dict.fromkeys(names)
    return {name: metric.function(list(predictions), list(references)) for name, metric in metrics.items()}


def _named(name: str) -> Metric:
    if name not in METRICS:
        raise UserError(f"metric {name!r}: expected one of {', '.join(METRICS)}{nearest(name, METRICS)}")
    return METRICS[name]


def _correlatable(predictions: Sequence[float], references: Sequence[float]) -> bool:
    finite = all(math.isfinite(value) for values in (predictions, references) for value in values)
    return finite and len(set(predictions)) > 1 and len(set(references)) > 1


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
