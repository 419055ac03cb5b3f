"""A made-up task of a few hundred short sentences, embedded, for tests and for trying things out without any data.

Each sentence says that someone likes or dislikes a few things. The class is whether more is liked than disliked, so
that a model has to read the verbs and learns it in a few dozen steps. The regression variant asks for the share of
things liked, from 0 to 5; the text variant for the words bad or good.
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peftbench.errors import UserError, nearest
from peftbench.tasks.base import Task, carve
from peftbench.tasks.source import Row

PEOPLE = ("anna", "ben", "carla", "david", "emma", "frank")
LIKED = ("loves", "likes", "enjoys", "adores")
DISLIKED = ("hates", "dislikes", "fears", "avoids")
THINGS = ("tea", "rain", "music", "bread", "snow", "chess", "cats", "trains", "soup", "maps")
WORDS = ("bad", "good")
TARGETS = ("class", "value")


def make_rows(count: int) -> list[Row]:
    """Return `count` different rows {"text", "label", "value"}, always the same ones, both classes equally often."""
    # Seen to give the same rows on Python 3.10 to 3.13; a test pins their fingerprint.
    generator = random.Random("peftbench tiny")
    rows: dict[str, Row] = {}
    while len(rows) < count:
        label = len(rows) % 2
        things = generator.choice((1, 3))
        liked = (things + 1) // 2 + int(things > 1 and generator.random() < 0.5)
        kinds = [label] * liked + [1 - label] * (things - liked)
        generator.shuffle(kinds)
        verbs = [generator.choice(LIKED if kind else DISLIKED) for kind in kinds]
        parts = [f"{verb} {generator.choice(THINGS)}" for verb in verbs]
        text = f"{generator.choice(PEOPLE)} {' and '.join(parts)}"
        rows.setdefault(text, {"text": text, "label": label, "value": 5.0 * sum(kinds) / things})
    return list(rows.values())


@dataclass(frozen=True, kw_only=True)
class Tiny(Task):
    """`size` rows, a fifth for validation and a fifth for test; `predict` is ``class`` or ``value`` (regression)."""

    max_length: int = 64
    max_new_tokens: int = 4
    size: int = 400
    predict: str = "class"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.predict not in TARGETS:
            raise UserError(
                f"task.predict={self.predict}: expected {' or '.join(TARGETS)}{nearest(self.predict, TARGETS)}"
            )
        if not 10 <= self.size <= 4000:
            raise UserError(f"task.size={self.size}: expected 10 to 4000 rows")
        if self.predict == "value" and self.formulation == "text":
            raise UserError("task.predict=value: expected class with task.formulation=text")

    @property
    def primary_metric(self) -> str:
        return "spearmanr" if self.predict == "value" else "accuracy"

    @property
    def num_labels(self) -> int:
        return 1 if self.predict == "value" else 2

    def load(self, protocol: str) -> dict[str, list[Row]]:
        rest, test = carve(make_rows(self.size), self.texts, self.size // 5)
        if protocol == "paper":
            return {"train": rest, "validation": test, "test": test}
        train, validation = carve(rest, self.texts, self.size // 5)
        return {"train": train, "validation": validation, "test": test}

    def data_fingerprint(self) -> str:
        return hashlib.sha256(repr(make_rows(self.size)).encode()).hexdigest()

    def texts(self, row: Row) -> tuple[str, ...]:
        return (row["text"],)

    def target(self, row: Row) -> int | float:
        return float(row["value"]) if self.predict == "value" else int(row["label"])

    def prompt_answer(self, row: Row) -> tuple[str, str]:
        return f"{row['text']} :", f" {WORDS[row['label']]}"

    def choices(self, row: Row) -> list[str] | None:
        return [f" {word}" for word in WORDS]

    def references(self, rows: Sequence[Row]) -> list[Any]:
        return [self.target(row) for row in rows]

    def metrics(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float | None]:
        from peftbench.tasks.metrics import compute

        return compute(["pearson", "spearmanr"] if self.predict == "value" else ["accuracy"], predictions, references)

    def item_scores(self, predictions: Sequence[Any], references: Sequence[Any]) -> list[float]:
        """Return 1.0 or 0.0 per item; with ``predict: value`` the negative absolute error."""
        if self.predict == "value":
            return [-abs(float(p) - float(r)) for p, r in zip(predictions, references, strict=True)]
        return super().item_scores(predictions, references)
