"""The nine GLUE tasks (Wang et al. 2018, arXiv:1804.07461) with their official metrics.

GLUE's test labels are not public: the official validation split is the test split here, and validation is carved out
of train (protocol ``held_out``). Checkpoints are chosen by Matthews for CoLA, by Spearman for STS-B, and by accuracy
elsewhere. MRPC and QQP report accuracy and F1, STS-B Pearson and Spearman; GLUE's leaderboard averages the two. MNLI's
test split is the matched one, and ``test_mismatched`` is there where the data holds it.

As text, the prompts below end in ``Answer:`` and the label words are scored. STS-B is then a choice among the whole
scores 0 to 5, trained on the rounded score and measured against the real one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peftbench.errors import UserError, nearest
from peftbench.tasks.base import Task, carve_validation
from peftbench.tasks.source import Dataset, Row


@dataclass(frozen=True)
class Facts:
    """What is particular to one GLUE task."""

    columns: tuple[str, ...]
    num_labels: int
    metrics: tuple[str, ...]
    primary: str
    words: tuple[str, ...]
    prompt: str


PAIR = ("sentence1", "sentence2")
TASKS = {
    "cola": Facts(
        ("sentence",),
        2,
        ("matthews_correlation", "accuracy"),
        "matthews_correlation",
        ("no", "yes"),
        "Sentence: {sentence}\nIs this sentence grammatically acceptable, yes or no?\nAnswer:",
    ),
    "sst2": Facts(
        ("sentence",),
        2,
        ("accuracy",),
        "accuracy",
        ("negative", "positive"),
        "Review: {sentence}\nIs the sentiment negative or positive?\nAnswer:",
    ),
    "mrpc": Facts(
        PAIR,
        2,
        ("accuracy", "f1"),
        "accuracy",
        ("no", "yes"),
        "Sentence 1: {sentence1}\nSentence 2: {sentence2}\nDo both sentences mean the same, yes or no?\nAnswer:",
    ),
    "stsb": Facts(
        PAIR,
        1,
        ("pearson", "spearmanr"),
        "spearmanr",
        ("0", "1", "2", "3", "4", "5"),
        "Sentence 1: {sentence1}\nSentence 2: {sentence2}\nHow similar are they, from 0 to 5?\nAnswer:",
    ),
    "rte": Facts(
        PAIR,
        2,
        ("accuracy",),
        "accuracy",
        ("yes", "no"),
        "First: {sentence1}\nSecond: {sentence2}\nDoes the first entail the second, yes or no?\nAnswer:",
    ),
    "wnli": Facts(
        PAIR,
        2,
        ("accuracy",),
        "accuracy",
        ("no", "yes"),
        "First: {sentence1}\nSecond: {sentence2}\nDoes the first entail the second, yes or no?\nAnswer:",
    ),
    "qnli": Facts(
        ("question", "sentence"),
        2,
        ("accuracy",),
        "accuracy",
        ("yes", "no"),
        "Question: {question}\nSentence: {sentence}\nDoes the sentence answer the question, yes or no?\nAnswer:",
    ),
    "mnli": Facts(
        ("premise", "hypothesis"),
        3,
        ("accuracy",),
        "accuracy",
        ("yes", "maybe", "no"),
        "First: {premise}\nSecond: {hypothesis}\nDoes the first entail the second, yes, maybe or no?\nAnswer:",
    ),
    "qqp": Facts(
        ("question1", "question2"),
        2,
        ("accuracy", "f1"),
        "accuracy",
        ("no", "yes"),
        "Question 1: {question1}\nQuestion 2: {question2}\nDo both questions ask the same, yes or no?\nAnswer:",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Glue(Task):
    """One GLUE task: the one called `data`, or `name` when that is null, so that a variant can have a name of its own.

    `prompt` and `label_words` (one word per class) replace the built-in ones when given.
    """

    data: str | None = None
    prompt: str | None = None
    label_words: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.key not in TASKS:
            raise UserError(f"task.data={self.key}: expected one of {', '.join(TASKS)}{nearest(self.key, TASKS)}")
        super().__post_init__()
        if self.label_words is not None:
            # yaml gives a list; a tuple keeps the settings hashable.
            object.__setattr__(self, "label_words", tuple(str(word) for word in self.label_words))
        if len(set(self.words)) != len(self.facts.words):
            raise UserError(f"task.label_words={list(self.words)}: expected {len(self.facts.words)} different words")
        try:
            self.prompt_answer(dict.fromkeys((*self.facts.columns, "label"), 0))
        except (KeyError, IndexError, ValueError) as error:
            columns = ", ".join(f"{{{column}}}" for column in self.facts.columns)
            raise UserError(f"task.prompt={self.prompt!r}: expected a text with {columns} ({error!r})") from error

    @property
    def key(self) -> str:
        """GLUE's own name of the task."""
        return self.name if self.data is None else self.data

    @property
    def facts(self) -> Facts:
        """What is particular to this task."""
        return TASKS[self.key]

    @property
    def words(self) -> tuple[str, ...]:
        """The label words in use, by class."""
        return self.label_words if self.label_words is not None else self.facts.words

    @property
    def primary_metric(self) -> str:
        return self.facts.primary

    @property
    def num_labels(self) -> int:
        return self.facts.num_labels

    @property
    def dataset(self) -> Dataset:
        """Where the rows come from."""
        return Dataset(f"glue/{self.key}", repo="nyu-mll/glue", config=self.key)

    @property
    def test_splits(self) -> dict[str, str]:
        """Our name of each test split → the official split that plays it."""
        if self.key == "mnli":
            return {"test": "validation_matched", "test_mismatched": "validation_mismatched"}
        return {"test": "validation"}

    def load(self, protocol: str) -> dict[str, list[Row]]:
        columns = (*self.facts.columns, "label")
        tests = {
            ours: self.dataset.rows(theirs, columns)
            for ours, theirs in self.test_splits.items()
            if ours == "test" or self.dataset.has(theirs)
        }
        train = self.dataset.rows("train", columns)
        validation = tests["test"]
        if protocol == "held_out":
            train, validation = carve_validation(train, self.texts)
        splits = {"train": train, "validation": validation, **tests}
        for split, rows in splits.items():
            self._check_labels(split, rows)
        return splits

    def _check_labels(self, split: str, rows: Sequence[Row]) -> None:
        for row in rows:
            label = row["label"]
            valid = label is not None and (0 <= label <= 5 if self.num_labels == 1 else label in range(self.num_labels))
            if not valid:
                expected = "0 to 5" if self.num_labels == 1 else f"0 to {self.num_labels - 1}"
                raise UserError(f"{self.origin} ({split}): column 'label' holds {label}; expected {expected}")

    def data_fingerprint(self) -> str:
        return self.dataset.fingerprint(["train", *self.test_splits.values()])

    def subset(self) -> bool | None:
        return self.dataset.subset(["train", *self.test_splits.values()])

    @property
    def origin(self) -> str:
        return self.dataset.origin

    def texts(self, row: Row) -> tuple[str, ...]:
        return tuple(row[column] for column in self.facts.columns)

    def target(self, row: Row) -> int | float:
        return float(row["label"]) if self.num_labels == 1 else int(row["label"])

    def prompt_answer(self, row: Row) -> tuple[str, str]:
        prompt = self.facts.prompt if self.prompt is None else self.prompt
        label = int(float(row["label"]) + 0.5) if self.num_labels == 1 else int(row["label"])
        return prompt.format_map({column: row[column] for column in self.facts.columns}), f" {self.words[label]}"

    def choices(self, row: Row) -> list[str] | None:
        return [f" {word}" for word in self.words]

    def references(self, rows: Sequence[Row]) -> list[Any]:
        return [self.target(row) for row in rows]

    def metrics(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float | None]:
        from peftbench.tasks.metrics import compute

        return compute(self.facts.metrics, predictions, references)

    def item_scores(self, predictions: Sequence[Any], references: Sequence[Any]) -> list[float]:
        """Return 1.0 or 0.0 per item; for STS-B the negative absolute error in points of the 0-5 scale."""
        if self.num_labels == 1:
            return [-abs(float(p) - float(r)) for p, r in zip(predictions, references, strict=True)]
        return super().item_scores(predictions, references)
