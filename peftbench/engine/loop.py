"""The training loop: one for every method and every pack size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from peftbench.engine.batches import PackedBatch, TokenTable
from peftbench.engine.objectives import Objective
from peftbench.engine.optimizer import PackedAdamW


@dataclass
class Trace:
    """Loss per step and run, kept on the device until somebody asks."""

    losses: list[Tensor] = field(default_factory=list)

    def values(self) -> np.ndarray:
        """Return losses [steps, R] on the host."""
        return torch.stack(self.losses).cpu().numpy() if self.losses else np.zeros((0, 0))


Evaluate = Callable[[int], bool]
"""Called with the number of steps done; returns whether to go on."""


def train_step(
    objective: Objective,
    optimizer: PackedAdamW,
    table: TokenTable,
    batch: PackedBatch,
    *,
    accumulation: int = 1,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Tensor:
    """Make one optimizer step for all runs and return their losses [R], without waiting for the device."""
    parts = parts_of(batch.items, accumulation)
    losses = step_on([table.gather(part, batch.length) for part in parts], objective, optimizer, autocast)
    after_step(objective, optimizer)
    return losses


def parts_of(items: np.ndarray, accumulation: int) -> list[np.ndarray]:
    """Cut items [R, B] into those that go through the model one after another, [R, B / accumulation] each."""
    return [items] if accumulation == 1 else np.array_split(items, min(accumulation, items.shape[1]), axis=1)


def step_on(
    chunks: Sequence[dict[str, Tensor]],
    objective: Objective,
    optimizer: PackedAdamW,
    autocast: Callable[[], AbstractContextManager[object]],
) -> Tensor:
    """Make one optimizer step on the rows of all `chunks`; work on the device alone, in an order that never changes."""
    counts = torch.stack([objective.count(c) for c in chunks]).sum(dim=0)
    total: Tensor | None = None
    noise = objective.noise
    for part, chunk in enumerate(chunks):
        with nullcontext() if noise is None else noise.drawing(part):
            with autocast():
                losses = objective.loss_sum(chunk) / counts
            penalty = objective.adapter.penalty() if total is None else None
            if penalty is not None:
                losses = losses + penalty
            # Runs own disjoint slices of every parameter, so the gradient of the sum is each run's own gradient.
            losses.sum().backward()
        total = losses.detach() if total is None else total + losses.detach()
    assert total is not None
    optimizer.step(total)
    if noise is not None:
        noise.advance()
    return total


def after_step(objective: Objective, optimizer: PackedAdamW) -> None:
    """Give the method its turn once a step is made; it may go by a plan on the host."""
    if objective.adapter.watches_steps:
        objective.adapter.after_step(optimizer.end())


def train(
    objective: Objective,
    make_step: Callable[[PackedBatch], Tensor],
    batches: Sequence[PackedBatch],
    *,
    evaluate_at: frozenset[int],
    evaluate: Evaluate,
    on_step: Callable[[int, Tensor], None] = lambda step, losses: None,
) -> Trace:
    """Train on `batches`, one optimizer step each (see `stepping`), evaluating after the steps in `evaluate_at`."""
    trace = Trace()
    objective.train(True)
    for step, batch in enumerate(batches, start=1):
        trace.losses.append(make_step(batch))
        on_step(step, trace.losses[-1])
        if step in evaluate_at:
            objective.train(False)
            proceed = evaluate(step)
            objective.train(True)
            if not proceed:
                break
    objective.train(False)
    return trace
