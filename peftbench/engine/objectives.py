"""What a pack of runs minimises and what it predicts: a head on pooled states, or the next token of an answer.

Losses come as sums and are divided by each run's own count of items (or answer tokens) in the *whole* step, so that
gradient accumulation changes nothing. Nothing here waits for the device.

Label smoothing ε (Szegedy et al. 2016, arXiv:1512.00567, section 7) takes the target (1 - ε) onehot(y) + ε / C over C
classes: with logits z the loss is the plain one plus ε (z_y - mean_c z_c). Each run has its own ε; evaluation has none.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from peftbench.engine.heads import PackedHead, pool
from peftbench.kernels.cross_entropy import linear_cross_entropy
from peftbench.kernels.noise import Noise
from peftbench.methods.base import StepEnd
from peftbench.models.output import hidden_states, plain_output_layer

logger = logging.getLogger("peftbench")

MODEL_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


class Adapter(Protocol):
    """What training needs of an adapter: dropout's switch, its loss term, the rows' tasks, its turn after a step."""

    def train(self, mode: bool = True) -> Any: ...

    def penalty(self) -> Tensor | None: ...

    def condition(self, tasks: Tensor | None) -> None: ...

    @property
    def watches_steps(self) -> bool: ...

    def after_step(self, end: StepEnd) -> None: ...


class Objective(ABC):
    """Loss per run and predictions of a pack of `runs` on `model`, whose rows come run by run."""

    def __init__(self, model: nn.Module, runs: int, adapter: Adapter, smoothing: Sequence[float] = ()) -> None:
        self.model = model
        self.runs = runs
        self.adapter = adapter
        self.smoothing: Tensor | None = None
        """Each run's label smoothing [R]; None: no run has any."""
        if any(smoothing):
            self.smoothing = torch.tensor(list(smoothing), device=next(model.parameters()).device)
        self.noise: Noise | None = None
        """Each run's stream of dropout; None: PyTorch's generator is asked."""

    @abstractmethod
    def count(self, batch: dict[str, Tensor]) -> Tensor:
        """Return what each run's loss is averaged over, [R]."""

    @abstractmethod
    def loss_sum(self, batch: dict[str, Tensor]) -> Tensor:
        """Return each run's summed loss [R] on rows [R·B, ...]."""

    def parameters(self) -> list[nn.Parameter]:
        """Return trained parameters outside the adapter, each with a leading runs axis."""
        return []

    def condition(self, batch: dict[str, Tensor]) -> None:
        """Tell the adapter which task each row of the batch belongs to; before every forward pass."""
        self.adapter.condition(batch.get("task_ids"))

    def train(self, mode: bool) -> None:
        """Switch dropout on or off."""
        self.model.train(mode)
        self.adapter.train(mode)


class HeadObjective(Objective):
    """Cross-entropy over classes, or squared error where the head has one output, on a pooled representation.

    Where rows come from several tasks, `classes` gives each task's in the head: a row is judged among its own.
    """

    def __init__(
        self,
        model: nn.Module,
        adapter: Adapter,
        head: PackedHead,
        pooling: str,
        classes: Sequence[range] | None = None,
        smoothing: Sequence[float] = (),
    ) -> None:
        super().__init__(model, head.runs, adapter, smoothing)
        self.head = head
        self.pooling = pooling
        self._others: Tensor | None = None
        """Classes of other tasks [K, C]."""
        if classes is not None:
            every = range(classes[-1].stop)
            others = [[c not in own for c in every] for own in classes]
            self._others = torch.tensor(others, device=head.out.device)

    def parameters(self) -> list[nn.Parameter]:
        return list(self.head.parameters())

    def train(self, mode: bool) -> None:
        super().train(mode)
        self.head.train(mode)

    def count(self, batch: dict[str, Tensor]) -> Tensor:
        rows = batch["input_ids"].shape[0] // self.runs
        return torch.full((self.runs,), float(rows), device=batch["input_ids"].device)

    def outputs(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the head's outputs [R, B, C] in fp32."""
        self.condition(batch)
        out: Any = self.model(**{k: batch[k] for k in MODEL_INPUTS if k in batch})
        pooled = pool(out.last_hidden_state, batch["attention_mask"], self.pooling, getattr(out, "pooler_output", None))
        with torch.autocast(pooled.device.type, enabled=False):
            outputs: Tensor = self.head(pooled)
        if self._others is None:
            return outputs
        others = self._others[batch["task_ids"]].reshape(outputs.shape)
        return outputs.masked_fill(others, -torch.inf)

    def loss_sum(self, batch: dict[str, Tensor]) -> Tensor:
        outputs = self.outputs(batch)
        targets = batch["targets"].reshape(self.runs, -1)
        if outputs.shape[-1] == 1:
            return (outputs.squeeze(-1) - targets.float()).square().sum(dim=1)
        losses = nn.functional.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="none")
        losses = losses.reshape(self.runs, -1)
        if self.smoothing is not None:
            losses = losses + self.smoothing[:, None] * self._above_mean(outputs, targets, batch)
        return losses.sum(dim=1)

    def _above_mean(self, outputs: Tensor, targets: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Return by how much the target's output exceeds the mean over the row's own classes, [R, B]."""
        own = outputs.gather(-1, targets[..., None])[..., 0]
        if self._others is None:
            return own - outputs.mean(dim=-1)
        others = self._others[batch["task_ids"]].reshape(outputs.shape)
        return own - outputs.masked_fill(others, 0).sum(dim=-1) / others.logical_not().sum(dim=-1)


LOGITS_BYTES = 2**27
"""More logits than fit here in fp32 are never held all at once; up to here, all together are smaller than one chunk."""


class TextObjective(Objective):
    """Cross-entropy on answer tokens only; prompts and padding carry the label −100."""

    def __init__(
        self, model: nn.Module, adapter: Adapter, runs: int, *, seq2seq: bool, smoothing: Sequence[float] = ()
    ) -> None:
        super().__init__(model, runs, adapter, smoothing)
        self.seq2seq = seq2seq
        self._needs_logits = False
        """Whether the model has been seen to do something to its logits."""

    def count(self, batch: dict[str, Tensor]) -> Tensor:
        labels = batch["labels"] if self.seq2seq else batch["labels"][:, 1:]
        return (labels != -100).reshape(self.runs, -1).sum(dim=1).float().clamp(min=1)

    def token_losses(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the cross-entropy of every label [rows, T], 0 where there is none."""
        return self._losses(batch, None)

    def loss_sum(self, batch: dict[str, Tensor]) -> Tensor:
        return self._losses(batch, self.runs, self.smoothing)

    def _losses(self, batch: dict[str, Tensor], groups: int | None, smoothing: Tensor | None = None) -> Tensor:
        """Return losses label by label [rows, T], or their sums over `groups` equal parts of the rows [G].

        Args:
            smoothing: [G].
        """
        self.condition(batch)
        inputs: dict[str, Any] = {k: batch[k] for k in MODEL_INPUTS if k in batch} | {"use_cache": False}
        if self.seq2seq:
            labels = batch["labels"]
            inputs["decoder_input_ids"] = cast(Any, self.model)._shift_right(labels)
        else:
            # the labels move, and not the logits: these would be copied
            labels = nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
        layer = self._output_layer(labels, groups)
        states = None if layer is None else hidden_states(self.model, layer, inputs)
        if layer is not None and states is not None:
            flat = linear_cross_entropy(
                states.flatten(0, 1), layer.weight, labels.flatten(), layer.bias, groups=groups, smoothing=smoothing
            )
            if groups is not None:
                return flat
        else:
            if layer is not None:
                self._needs_logits = True
                logger.warning("%s changes its logits: all are held at once", type(self.model).__name__)
            logits = self.model(**inputs).logits.float().flatten(0, 1)
            flat = nn.functional.cross_entropy(logits, labels.flatten(), ignore_index=-100, reduction="none")
            if smoothing is not None:
                rates = smoothing.repeat_interleave(labels.numel() // len(smoothing))
                flat = flat + rates * _above_mean(logits, labels.flatten())
        losses = flat.reshape(labels.shape)
        losses = losses if self.seq2seq else losses[:, :-1]
        return losses if groups is None else losses.reshape(groups, -1).sum(dim=1)

    def _output_layer(self, labels: Tensor, groups: int | None) -> nn.Linear | None:
        """Return the output layer where it pays, and is possible, to make its logits chunk by chunk."""
        layer = None if self._needs_logits else plain_output_layer(self.model)
        if layer is None or 4 * labels.numel() * layer.out_features <= LOGITS_BYTES:
            return None
        # the gradient of a weight that trains is made for one factor on all losses
        return None if layer.weight.requires_grad and torch.is_grad_enabled() and groups != 1 else layer


def _above_mean(logits: Tensor, labels: Tensor) -> Tensor:
    """Return by how much the label's logit exceeds the mean of all [n], 0 where there is no label."""
    counts = labels != -100
    own = logits.gather(1, labels.where(counts, 0)[:, None])[:, 0]
    return (own - logits.mean(dim=1)).where(counts, 0)
