"""The evaluations of a run: which was best, with which parameters, and when to stop waiting for a better one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from peftbench.engine.optimizer import PackedAdamW
from peftbench.tasks.base import Task


@dataclass
class Scores:
    """What came of one run's evaluations so far.

    Attributes:
        best: the best primary metric, negated where less is better.
        step, metrics: when that was, and all metrics then.
        since: evaluations without improvement since.
        history: all evaluations.
    """

    best: float = -math.inf
    step: int = 0
    metrics: dict[str, float | None] = field(default_factory=dict)
    since: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)

    def add(self, task: Task, step: int, metrics: dict[str, float | None]) -> bool:
        """Note the metrics after `step`; returns whether they are the best. An undefined one counts as worst."""
        self.history.append({"step": step, "metrics": metrics})
        value = metrics.get(task.primary_metric)
        score = -math.inf if value is None or not math.isfinite(value) else float(value)
        score = score if task.greater_is_better or score == -math.inf else -score
        if score > self.best or self.step == 0:
            self.best, self.step, self.metrics, self.since = score, step, metrics, 0
            return True
        self.since += 1
        return False


class Selection:
    """Keeps each run's parameters from the evaluation with its best primary metric.

    Attributes:
        packed: those parameters, laid out as `PackedAdamW.flat`.
    """

    def __init__(
        self, task: Task, optimizer: PackedAdamW, scores: Sequence[Scores], base: Sequence[Tensor] = ()
    ) -> None:
        self.task, self.scores, self.base = task, list(scores), base
        self._flat = optimizer.flat
        self.packed = optimizer.flat.clone()
        self._plain: list[Tensor] = []

    @torch.no_grad()
    def consider(self, step: Mapping[int, int], metrics: Mapping[int, dict[str, float | None]]) -> None:
        """Note the metrics of some runs, each after its own `step`."""
        for run, values in metrics.items():
            if self.scores[run].add(self.task, step[run], values):
                self.packed[run] = self._flat[run]
                self._plain = [p.detach().to("cpu", copy=True) for p in self.base]

    @torch.no_grad()
    def restore(self) -> None:
        """Put every run back to its best parameters."""
        self._flat.copy_(self.packed)
        for p, kept in zip(self.base, self._plain, strict=True):
            p.copy_(kept)
