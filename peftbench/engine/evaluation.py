"""Predictions of a pack on one split: labels, the likeliest candidate answer, generated text, or held-out loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peftbench.engine.batches import TokenTable, evaluation_batches
from peftbench.engine.generation import generate
from peftbench.engine.objectives import HeadObjective, TextObjective
from peftbench.tasks.base import Decoding

Autocast = Callable[[], AbstractContextManager[object]]


class Evaluator(ABC):
    """Predicts every item of a split for every run of a pack.

    Args:
        table: the encoded split.
        items: how many items go through the model at once (times the runs of the pack).
        max_length: the longest batch in tokens.
    """

    def __init__(self, table: TokenTable, items: int, max_length: int, autocast: Autocast = nullcontext) -> None:
        self.table = table
        self.items = items
        self.max_length = max_length
        self.autocast = autocast

    @abstractmethod
    def predict(self) -> list[list[Any]]:
        """Return predictions [R][n] in the split's order. Waits for the device once, at the end."""

    @torch.no_grad()
    def _collect(self, runs: int, output: Callable[[dict[str, Tensor]], Tensor]) -> np.ndarray:
        """Return output [R, n, ...] on the host, computed batch by batch on rows ordered run by run."""
        parts, order = [], []
        for items, length in evaluation_batches(self.table.lengths, self.items, self.max_length):
            with self.autocast():
                rows = output(self.table.gather(np.tile(items, runs), length))
            parts.append(rows.reshape(runs, len(items), *rows.shape[1:]))
            order.append(items)
        values = torch.cat(parts, dim=1).float().cpu().numpy()
        back = np.empty(values.shape[1], dtype=np.int64)
        back[np.concatenate(order)] = np.arange(values.shape[1])
        return values[:, back]


class HeadEvaluator(Evaluator):
    """Arg-max class, or the value where the head has one output."""

    def __init__(self, objective: HeadObjective, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.objective = objective

    def predict(self) -> list[list[Any]]:
        outputs = self._collect(self.objective.runs, lambda batch: self.objective.outputs(batch).flatten(0, 1))
        if outputs.shape[-1] == 1:
            return [[float(v) for v in run] for run in outputs[..., 0]]
        return [[int(v) for v in run] for run in outputs.argmax(axis=-1)]


class LossEvaluator(Evaluator):
    """Summed negative log-likelihood (nats) and count of answer tokens, per item."""

    def __init__(self, objective: TextObjective, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.objective = objective

    def _sums(self, batch: dict[str, Tensor]) -> Tensor:
        losses = self.objective.token_losses(batch)
        labels = batch["labels"] if self.objective.seq2seq else batch["labels"][:, 1:]
        return torch.stack([losses.sum(dim=1), (labels != -100).sum(dim=1).float()], dim=-1)

    def predict(self) -> list[list[Any]]:
        return [[(float(a), int(n)) for a, n in run] for run in self._collect(self.objective.runs, self._sums)]


class ChoiceEvaluator(LossEvaluator):
    """Index of the candidate answer with the highest summed log-probability.

    `owners` gives the item of each row of the table; the candidates of an item are adjacent and in order.
    """

    def __init__(self, owners: list[int], objective: TextObjective, *args: Any, **kwargs: Any) -> None:
        super().__init__(objective, *args, **kwargs)
        self.starts = [i for i, owner in enumerate(owners) if i == 0 or owners[i - 1] != owner]

    def predict(self) -> list[list[Any]]:
        losses = self._collect(self.objective.runs, self._sums)[..., 0]
        ends = [*self.starts[1:], losses.shape[1]]
        return [[int(run[a:b].argmin()) for a, b in zip(self.starts, ends, strict=True)] for run in losses]


class GenerationEvaluator(Evaluator):
    """Generated answers, cut at the end token and parsed by the task.

    Args:
        decode: makes a prediction of an answer's tokens.
        decoding: how answers are generated.
    """

    def __init__(
        self,
        objective: TextObjective,
        decode: Callable[[list[int]], Any],
        decoding: Decoding,
        max_new_tokens: int,
        end_id: int,
        pad_id: int,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.objective = objective
        self.decode = decode
        self.decoding = decoding
        self.max_new_tokens = max_new_tokens
        self.end_id = end_id
        self.pad_id = pad_id

    def _generate(self, batch: dict[str, Tensor]) -> Tensor:
        if self.decoding != Decoding():
            return generate(self.objective, batch, self.decoding, self.max_new_tokens, self.end_id)
        model: Any = self.objective.model
        self.objective.condition(batch)
        tokens = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            do_sample=False,
            num_beams=1,
            use_cache=True,
            max_new_tokens=self.max_new_tokens,
            eos_token_id=self.end_id,
            pad_token_id=self.pad_id,
        )
        start = 1 if self.objective.seq2seq else batch["input_ids"].shape[1]
        new = tokens[:, start:]
        missing = self.max_new_tokens - new.shape[1]
        return torch.nn.functional.pad(new, (0, missing), value=self.end_id)

    def predict(self) -> list[list[Any]]:
        rows = self._collect(self.objective.runs, self._generate).astype(np.int64)
        return [[self.decode(self._cut(tokens)) for tokens in run] for run in rows]

    def _cut(self, tokens: np.ndarray) -> list[int]:
        ends = np.flatnonzero(tokens == self.end_id)
        return [int(t) for t in (tokens[: ends[0]] if len(ends) else tokens)]
