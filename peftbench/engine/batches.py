"""Which items each run sees at each step, and the tables of tokens they are gathered from.

The sequence of length buckets follows from item lengths and batch size alone and is that of every epoch, so all runs of
a pack are always in the same bucket, whichever epoch each is in, and packing costs no padding. A run's seed permutes
items within buckets, anew in each of its epochs. Every batch is padded to its bucket's longest item, whoever else is in
the pack.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from peftbench.tasks.base import Encoded

BATCHES_PER_BUCKET = 8
"""Batches drawn from one bucket per epoch: more mixes items of more different lengths, fewer pads less."""
LENGTH_MULTIPLE = 8
"""Bucket lengths are rounded up to a multiple of this."""


@dataclass(frozen=True)
class Bucket:
    """Items of similar length: their indices and the length batches of them are padded to."""

    items: np.ndarray
    length: int


@dataclass(frozen=True)
class PackedBatch:
    """One optimizer step's items: indices [R, B] on the host, the length T to pad to, the first run's epoch."""

    items: np.ndarray
    length: int
    epoch: int


def make_buckets(lengths: Sequence[int], batch_size: int, max_length: int) -> list[Bucket]:
    """Cut items, sorted by length, into buckets of `BATCHES_PER_BUCKET` batches."""
    order = np.argsort(np.asarray(lengths), kind="stable")
    size = batch_size * BATCHES_PER_BUCKET
    buckets = []
    for start in range(0, len(order), size):
        items = order[start : start + size]
        longest = max(lengths[i] for i in items)
        rounded = math.ceil(longest / LENGTH_MULTIPLE) * LENGTH_MULTIPLE
        buckets.append(Bucket(items, max(longest, min(rounded, max_length))))
    return buckets


def steps_per_epoch(buckets: Sequence[Bucket], batch_size: int) -> int:
    """Return how many batches one pass over all items takes."""
    return sum(math.ceil(len(b.items) / batch_size) for b in buckets)


def packed_batches(
    buckets: Sequence[Bucket], batch_size: int, seeds: Sequence[int], steps: int, done: Sequence[int] | None = None
) -> Iterator[PackedBatch]:
    """Yield `steps` batches for runs with these seeds, epoch after epoch.

    Each epoch visits every item of every run once; only an epoch's last batch of a bucket may be smaller than
    `batch_size`.

    Args:
        done: steps each run has made before, which may differ by whole epochs; None: none.
    """
    visits = [(b, k) for b, bucket in enumerate(buckets) for k in range(math.ceil(len(bucket.items) / batch_size))]
    # Order of buckets: the same for every run and epoch, a function of the number of batches.
    visits = [visits[i] for i in np.random.default_rng([7, len(visits)]).permutation(len(visits))]
    begun = [divmod(before, len(visits)) for before in done or [0] * len(seeds)]
    assert len({place for _, place in begun}) == 1, "runs differ by parts of an epoch"
    epochs, place = [epoch for epoch, _ in begun], begun[0][1]
    left = steps
    while left > 0:
        generators = [np.random.default_rng([11, seed, epoch]) for seed, epoch in zip(seeds, epochs, strict=True)]
        # Each generator permutes the buckets in their order; all runs' permutations of one bucket are cut as one array.
        permuted = [np.stack([g.permutation(bucket.items) for g in generators]) for bucket in buckets]
        for b, k in visits[place : place + left]:
            items = permuted[b][:, k * batch_size : (k + 1) * batch_size].copy()
            yield PackedBatch(items, buckets[b].length, epochs[0])
        left -= len(visits) - place
        epochs, place = [epoch + 1 for epoch in epochs], 0


class TokenTable:
    """An encoded split as padded tensors on the device, from which batches are gathered without host work.

    Columns: input_ids [n, L], lengths [n], optionally token_type_ids [n, L], targets [n], labels [n, L'] (−100: not
    trained on), task_ids [n].
    """

    def __init__(self, encoded: Encoded, pad_id: int, device: torch.device | str, *, left: bool = False) -> None:
        self.device = torch.device(device)
        self.left = left
        self.lengths = [len(ids) for ids in encoded.input_ids]
        self._lengths = torch.tensor(self.lengths, device=self.device)
        self.input_ids = self._pad(encoded.input_ids, pad_id)
        self.token_type_ids = None if encoded.token_type_ids is None else self._pad(encoded.token_type_ids, 0)
        self.targets = None if encoded.targets is None else torch.tensor(encoded.targets, device=self.device)
        self.task_ids = None if encoded.task_ids is None else torch.tensor(encoded.task_ids, device=self.device)
        self.labels = None
        self.label_lengths: list[int] = []
        if encoded.labels is not None:
            self.labels = self._pad(encoded.labels, -100)
            self.label_lengths = [len(labels) for labels in encoded.labels]

    def __len__(self) -> int:
        return len(self.lengths)

    def tensors(self) -> list[Tensor]:
        """Return the table's columns."""
        columns = (self.input_ids, self._lengths, self.token_type_ids, self.targets, self.labels, self.task_ids)
        return [c for c in columns if c is not None]

    def _pad(self, rows: Sequence[Sequence[int]], value: int) -> Tensor:
        width = max((len(r) for r in rows), default=0)
        padded = np.full((len(rows), width), value, dtype=np.int32)
        for i, row in enumerate(rows):
            if self.left:
                padded[i, width - len(row) :] = row
            else:
                padded[i, : len(row)] = row
        return torch.from_numpy(padded).to(self.device)

    def _cut(self, table: Tensor, items: Tensor, length: int) -> Tensor:
        rows = table[items]
        return (rows[:, -length:] if self.left else rows[:, :length]).long()

    def gather(self, items: np.ndarray, length: int) -> dict[str, Tensor]:
        """Return the batch of `items` (any shape, flattened to rows) padded to `length` tokens.

        Keys: input_ids, attention_mask [rows, T]; where the split has them token_type_ids [rows, T], targets and
        task_ids [rows], labels.
        """
        index = self.index(items)
        if self.device.type == "cuda":
            index = index.to(self.device, non_blocking=True)
        return self.rows(index, length, self.label_length(items))

    def index(self, items: np.ndarray) -> Tensor:
        """Return `items` (any shape) as a flat index on the host, in memory that a GPU can fetch by itself."""
        index = torch.from_numpy(np.ascontiguousarray(items.reshape(-1)))
        return index.pin_memory() if self.device.type == "cuda" else index

    def label_length(self, items: np.ndarray) -> int:
        """Return how many labels the longest of `items` has; 0 without labels, or where they lie over the input."""
        if self.labels is None or self._labels_over_input:
            return 0
        return max(self.label_lengths[i] for i in items.reshape(-1))

    @property
    def _labels_over_input(self) -> bool:
        # A decoder-only model's labels lie over its input; an encoder-decoder's are a sequence of their own.
        return self.labels is not None and self.labels.shape == self.input_ids.shape

    def rows(self, index: Tensor, length: int, label_length: int) -> dict[str, Tensor]:
        """Return the batch of the rows in `index` (on the device), as `gather` does, by work on the device alone."""
        length = min(length, self.input_ids.shape[1])
        places = torch.arange(length, device=self.device)
        lengths = self._lengths[index].unsqueeze(1)
        mask = places >= length - lengths if self.left else places < lengths
        batch = {"input_ids": self._cut(self.input_ids, index, length), "attention_mask": mask.long()}
        if self.token_type_ids is not None:
            batch["token_type_ids"] = self._cut(self.token_type_ids, index, length)
        if self.targets is not None:
            batch["targets"] = self.targets[index]
        if self.task_ids is not None:
            batch["task_ids"] = self.task_ids[index]
        if self.labels is not None:
            batch["labels"] = self._cut(self.labels, index, length if self._labels_over_input else label_length)
        return batch


def evaluation_batches(lengths: Sequence[int], rows: int, max_length: int) -> Iterator[tuple[np.ndarray, int]]:
    """Yield (items, length) covering every item once, by length, at most `rows` items a batch."""
    order = np.argsort(np.asarray(lengths), kind="stable")
    for start in range(0, len(order), rows):
        items = order[start : start + rows]
        longest = max(lengths[i] for i in items)
        rounded = math.ceil(longest / LENGTH_MULTIPLE) * LENGTH_MULTIPLE
        yield items, max(longest, min(rounded, max_length))
