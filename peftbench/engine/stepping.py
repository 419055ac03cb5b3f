"""How training steps are run, by the name that `train.execution` gives it: one after another, or replayed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from torch import Tensor

from peftbench.engine.batches import PackedBatch, TokenTable
from peftbench.engine.graphs import GraphSteps
from peftbench.engine.loop import train_step
from peftbench.engine.objectives import Objective
from peftbench.engine.optimizer import PackedAdamW


class Stepper(Protocol):
    """Makes one optimizer step for all runs on a batch and returns their losses [R], without waiting for the device."""

    @property
    def execution(self) -> str:
        """What really ran so far: what was asked for, or eager."""

    @property
    def replayed(self) -> int:
        """Steps that were replays of a CUDA graph."""

    @property
    def capture_seconds(self) -> float:
        """Time spent on capturing graphs."""

    def running(self) -> AbstractContextManager[object]:
        """Return the context that steps run in."""

    def __call__(self, batch: PackedBatch) -> Tensor: ...


class EagerSteps:
    """`train_step` on every batch, on modules as they are: plain, or compiled by whoever put them together."""

    replayed = 0
    capture_seconds = 0.0

    def __init__(
        self,
        objective: Objective,
        optimizer: PackedAdamW,
        table: TokenTable,
        *,
        accumulation: int = 1,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
        execution: str = "eager",
    ) -> None:
        self.execution = execution
        self._arguments = (objective, optimizer, table)
        self._accumulation, self._autocast = accumulation, autocast

    def running(self) -> AbstractContextManager[object]:
        """Return the context that steps run in."""
        return nullcontext()

    def __call__(self, batch: PackedBatch) -> Tensor:
        return train_step(*self._arguments, batch, accumulation=self._accumulation, autocast=self._autocast)


def stepper(
    execution: str,
    objective: Objective,
    optimizer: PackedAdamW,
    table: TokenTable,
    *,
    accumulation: int = 1,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Stepper:
    """Return what runs steps as `execution` says, one of `peftbench.config.EXECUTIONS`."""
    if execution.endswith("graphs"):
        compiled = execution.startswith("compiled")
        recipe: dict[str, Any] = {"accumulation": accumulation, "autocast": autocast, "compiled": compiled}
        return GraphSteps(objective, optimizer, table, **recipe)
    return EagerSteps(objective, optimizer, table, accumulation=accumulation, autocast=autocast, execution=execution)
