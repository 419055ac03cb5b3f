"""Metrics as `evaluate.Metric` classes that need neither the network nor a script from the hub.

Each has the name and result key of its counterpart on the hub and takes ``compute(predictions=..., references=...)``.
Undefined values are None, never nan: a correlation is None when either side is constant or a prediction is not finite.
Matthews is 0.0 for constant predictions and F1 is 0.0 without true positives, as scikit-learn defines them.
"""

import math
import os
import tempfile
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

from peftbench.errors import UserError, nearest

INTEGER = {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
NUMBER = {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
TEXT = {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
TEXTS = {"predictions": datasets.Value("string"), "references": datasets.Sequence(datasets.Value("string"))}


class LocalMetric(evaluate.Metric):
    """A metric computed in memory; subclasses give `description`, `citation`, `columns` and `_compute`."""

    description = ""
    citation = ""
    columns: dict[str, Any] = INTEGER

    def __init__(self) -> None:
        # `evaluate` makes its folder even for metrics kept in memory; a temporary one also works without a home.
        folder = os.path.join(tempfile.gettempdir(), f"peftbench-metrics-{os.getuid() if hasattr(os, 'getuid') else 0}")
        super().__init__(keep_in_memory=True, cache_dir=folder, seed=0)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.description,
            citation=self.citation,
            inputs_description="",
            features=datasets.Features(self.columns),
        )


class Accuracy(LocalMetric):
    """Share of predictions equal to their reference."""

    description = "Share of predictions equal to their reference."

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float | None]:
        hits = sum(p == r for p, r in zip(predictions, references, strict=True))
        return {"accuracy": hits / len(references)}


class F1(LocalMetric):
    """Harmonic mean of precision and recall of class 1; 0.0 when there is no true positive."""

    description = "F1 of class 1, as GLUE reports it for MRPC and QQP."

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float | None]:
        from sklearn.metrics import f1_score

        return {"f1": float(f1_score(references, predictions, pos_label=1, average="binary", zero_division=0.0))}


class MatthewsCorrelation(LocalMetric):
    """Matthews correlation coefficient; 0.0 when predictions or references are constant."""

    description = "Matthews correlation coefficient, as GLUE reports it for CoLA."
    citation = "Matthews 1975, Biochimica et Biophysica Acta 405(2)"

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float | None]:
        from sklearn.metrics import matthews_corrcoef

        return {"matthews_correlation": float(matthews_corrcoef(references, predictions))}


def _correlatable(predictions: Sequence[float], references: Sequence[float]) -> bool:
    finite = all(math.isfinite(value) for values in (predictions, references) for value in values)
    return finite and len(set(predictions)) > 1 and len(set(references)) > 1


class Pearson(LocalMetric):
    """Pearson correlation; None when undefined."""

    description = "Pearson correlation, as GLUE reports it for STS-B."
    columns = NUMBER

    def _compute(self, predictions: Sequence[float], references: Sequence[float]) -> dict[str, float | None]:
        from scipy.stats import pearsonr

        if not _correlatable(predictions, references):
            return {"pearson": None}
        return {"pearson": _finite(pearsonr(predictions, references).statistic)}


class Spearman(LocalMetric):
    """Spearman rank correlation with ties averaged; None when undefined."""

    description = "Spearman rank correlation, as GLUE reports it for STS-B."
    columns = NUMBER

    def _compute(self, predictions: Sequence[float], references: Sequence[float]) -> dict[str, float | None]:
        from scipy.stats import spearmanr

        if not _correlatable(predictions, references):
            return {"spearmanr": None}
        return {"spearmanr": _finite(spearmanr(predictions, references).statistic)}


class ExactMatch(LocalMetric):
    """Share of predicted strings equal to their reference."""

    description = "Share of predicted strings equal to their reference, character by character."
    columns = TEXT

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float | None]:
        hits = sum(p == r for p, r in zip(predictions, references, strict=True))
        return {"exact_match": hits / len(references)}


class Bleu(LocalMetric):
    """Corpus BLEU in [0, 100] by sacrebleu (13a tokens, exponential smoothing), any number of references per item."""

    description = "Corpus BLEU (sacrebleu, 13a tokens), from 0 to 100."
    citation = "Papineni et al. 2002; Post 2018, arXiv:1804.08771"
    columns = TEXTS

    def _compute(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float | None]:
        from sacrebleu.metrics import BLEU

        # sacrebleu wants one stream per reference position, with None where an item has fewer references.
        depth = max(len(each) for each in references)
        streams: list[Any] = [[each[i] if i < len(each) else None for each in references] for i in range(depth)]
        return {"bleu": float(BLEU().corpus_score(list(predictions), streams).score)}


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """Return the best ROUGE-L F-measure of a prediction against its references, in [0, 1] (rouge-score, stemmed)."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return float(scorer.score_multi(list(references), prediction)["rougeL"].fmeasure)


class RougeL(LocalMetric):
    """Mean over items of the best ROUGE-L F-measure against the item's references, in [0, 1]."""

    description = "Mean ROUGE-L F-measure (rouge-score, stemmed), best of an item's references, from 0 to 1."
    citation = "Lin 2004, Text Summarization Branches Out"
    columns = TEXTS

    def _compute(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float | None]:
        scores = [rouge_l(p, r) for p, r in zip(predictions, references, strict=True)]
        return {"rouge_l": sum(scores) / len(scores)}


METRICS: dict[str, type[LocalMetric]] = {
    "accuracy": Accuracy,
    "f1": F1,
    "matthews_correlation": MatthewsCorrelation,
    "pearson": Pearson,
    "spearmanr": Spearman,
    "exact_match": ExactMatch,
    "bleu": Bleu,
    "rouge_l": RougeL,
}


def load(name: str) -> LocalMetric:
    """Return a fresh metric by name; UserError for an unknown one."""
    if name not in METRICS:
        raise UserError(f"metric {name!r}: expected one of {', '.join(METRICS)}{nearest(name, METRICS)}")
    return METRICS[name]()


def compute(names: Sequence[str], predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float | None]:
    """Return metric name → value for several metrics over the same items; every value None when there are no items."""
    if not references:
        return dict.fromkeys(names)
    values: dict[str, float | None] = {}
    for name in names:
        values |= load(name).compute(predictions=list(predictions), references=list(references))
    return values


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
