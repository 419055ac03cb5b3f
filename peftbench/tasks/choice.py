"""Multiple-choice sets in the wording of LLM-Adapters (Hu et al. 2023, arXiv:2304.01933): commonsense, and AQuA.

The prompt lists the candidates, the answer names one (``the correct answer is answer2``), and the candidates are scored
by the likelihood of the whole answer. LLM-Adapters generates and searches the text instead, which can find no answer.

Training rows whose text, case and punctuation aside, is also in the test split are dropped (2 of ARC-Easy, 1 of BoolQ).
Sets without a train split can be tested only, unless `train_sets` names others to train on.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peftbench.errors import UserError, nearest
from peftbench.tasks.base import Task, carve_validation, text_key
from peftbench.tasks.instruct import instruction_prompt
from peftbench.tasks.source import Dataset, Row

SETS = (
    "boolq",
    "piqa",
    "social_i_qa",
    "winogrande",
    "arc_easy",
    "arc_challenge",
    "openbookqa",
    "aqua",
)
FORMAT = re.compile(r"Answer format: (\S+)\s*$")
LETTERS = re.compile(r"\(([A-E])\)")
PUNCTUATION = re.compile(r"[^\w]+")


def candidates(instruction: str) -> list[str]:
    """Return the candidate answers that an instruction lists: ``answer1/answer2``, or the letters of AQuA's choices.

    Raises UserError when it lists none.
    """
    found = FORMAT.search(instruction)
    if found:
        return found.group(1).split("/")
    _, _, listed = instruction.rpartition("Answer Choices:")
    letters = list(dict.fromkeys(LETTERS.findall(listed)))
    if not letters:
        raise UserError(
            f"no candidates in {instruction[-60:]!r}: expected 'Answer format: a/b' or 'Answer Choices: (A) …'"
        )
    return letters


@dataclass(frozen=True, kw_only=True)
class Choice(Task):
    """One set: the one called `data`, or `name` when that is null.

    `train_sets` names the sets whose train splits are trained on; null means the set's own.
    """

    formulation: str = "text"
    max_length: int = 256
    max_new_tokens: int = 16
    data: str | None = None
    train_sets: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.train_sets is not None:
            object.__setattr__(self, "train_sets", tuple(self.train_sets))
        for key, name in [("data", self.key), *(("train_sets", name) for name in self.train_sets or ())]:
            if name not in SETS:
                raise UserError(f"task.{key}={name}: expected one of {', '.join(SETS)}{nearest(name, SETS)}")
        super().__post_init__()

    @property
    def formulations(self) -> tuple[str, ...]:
        return ("text",)

    @property
    def primary_metric(self) -> str:
        return "accuracy"

    @property
    def num_labels(self) -> int:
        return 0

    @property
    def split_hint(self) -> str:
        return "task.train_sets=[boolq,openbookqa] trains on other sets"

    @property
    def key(self) -> str:
        """The set's own name."""
        return self.name if self.data is None else self.data

    @property
    def dataset(self) -> Dataset:
        """Where the test rows come from."""
        return Dataset(f"instruct/llm_adapters/{self.key}")

    @property
    def train_datasets(self) -> list[Dataset]:
        """Where the training rows come from; empty when the set has none of its own."""
        if self.train_sets is None:
            return [self.dataset] if self.dataset.has("train") else []
        return [Dataset(f"instruct/llm_adapters/{name}") for name in self.train_sets]

    @property
    def origin(self) -> str:
        return self.dataset.origin

    def load(self, protocol: str) -> dict[str, list[Row]]:
        def texts(row: Row) -> tuple[str, ...]:
            return (PUNCTUATION.sub(" ", row["instruction"]),)

        columns = ("instruction", "answer")
        splits = {"test": self.dataset.rows("test", columns)}
        tested = {text_key(texts(row)) for row in splits["test"]}
        found = [row for dataset in self.train_datasets for row in dataset.rows("train", columns)]
        train = [row for row in found if text_key(texts(row)) not in tested]
        if train:
            rest, validation = carve_validation(train, texts)
            held_out = protocol == "held_out"
            splits = {
                "train": rest if held_out else train,
                "validation": validation if held_out else splits["test"],
                **splits,
            }
        for split, rows in splits.items():
            for row in rows:
                if row["answer"] not in candidates(row["instruction"]):
                    expected = "/".join(candidates(row["instruction"]))
                    raise UserError(f"{self.origin} ({split}): answer {row['answer']!r}; expected one of {expected}")
        return splits

    def data_fingerprint(self) -> str:
        trained = [f"{each.folder} {each.fingerprint(['train'])}" for each in self.train_datasets]
        return " ".join([self.dataset.fingerprint(["test"]), *trained])

    def subset(self) -> bool | None:
        known = [self.dataset.subset(["test"]), *(each.subset(["train"]) for each in self.train_datasets)]
        return True if any(known) else (None if None in known else False)

    def prompt_answer(self, row: Row) -> tuple[str, str]:
        return instruction_prompt(row["instruction"].strip()), f"the correct answer is {row['answer']}"

    def choices(self, row: Row) -> list[str] | None:
        return [f"the correct answer is {each}" for each in candidates(row["instruction"])]

    def references(self, rows: Sequence[Row]) -> list[Any]:
        return [candidates(row["instruction"]).index(row["answer"]) for row in rows]

    def metrics(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float | None]:
        from peftbench.tasks.metrics import compute

        return compute(["accuracy"], predictions, references)
