"""Whole training steps as CUDA graphs: recorded once for each shape of batch, then launched as one.

A small model's step is a thousand kernels of a few microseconds each, and the host cannot launch them as fast as the
GPU runs them. A graph holds all of them, from gathering the batch to AdamW's update; per step the host copies the
batch's indices into a buffer and launches the graph. Batches come in few shapes, since lengths come in buckets. What a
method does once a step is made follows the host's plan, and so comes after the replay.

The numbers are those of eager steps: the same kernels on the same data, and dropout's generator goes on from replay to
replay as it does from step to step. Evaluation stays eager.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from peftbench.engine.batches import LENGTH_MULTIPLE, PackedBatch, TokenTable
from peftbench.engine.loop import after_step, parts_of, step_on
from peftbench.engine.objectives import Objective
from peftbench.engine.optimizer import PackedAdamW

logger = logging.getLogger("peftbench")

EAGER_STEPS = 2
"""Steps of the first shape before it is captured: they make what is made at first use, by autograd, cuBLAS and others.

Later shapes are captured after one step, in which kernels that differ by shape are made; a shape that comes only once
is not worth a capture.
"""

Work = Callable[[], object]


class Recorder(Protocol):
    """Records work on the device, to be done again and again."""

    def running(self) -> AbstractContextManager[object]:
        """Return the context that all work runs in, recorded or not."""

    def record(self, work: Work) -> Work:
        """Record `work` without doing it, and return what does it; RuntimeError where it cannot be recorded."""


class GraphRecorder:
    """Records CUDA graphs on a stream of its own; all share one pool of memory, since no two run at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run on the recorder's stream, after all that the caller has queued and before all that it will.

        Steps before a capture belong there too: autograd and cuBLAS keep what they make by stream.
        """
        caller = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(caller)
        with torch.cuda.stream(self._stream):
            yield
        caller.wait_stream(self._stream)

    def record(self, work: Work) -> Work:
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        # A capture that breaks leaves the generator's state in capture for good; this copy is not.
        spare = generator.clone_state()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                work()
        except BaseException:
            generator.graphsafe_set_state(spare)
            raise
        return graph.replay


@dataclass
class Shape:
    """Batches of one shape.

    Attributes:
        index: the table's rows of the batch, on the device, those of all parts one after another.
        sizes: how many rows each part has.
        length, label_length: tokens and labels that rows are padded to.
        steps: steps made so far.
        replay: does a step on the rows in `index`; None: not captured.
    """

    index: Tensor
    sizes: list[int]
    length: int
    label_length: int
    steps: int = 0
    replay: Work | None = None


class GraphSteps:
    """Makes training steps and returns losses [R] like `train_step`, replaying what it has captured.

    Every call is a real step. The first `eager_steps` of the shape captured first are eager, of later shapes one step;
    the next is captured and replayed. A capture that fails is announced once, and whatever is not captured by then
    stays eager.

    Attributes:
        replayed: steps that were replays.
        capture_seconds: time spent on captures.
        failure: why a capture failed, or None.
    """

    def __init__(
        self,
        objective: Objective,
        optimizer: PackedAdamW,
        table: TokenTable,
        *,
        accumulation: int = 1,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
        eager_steps: int = EAGER_STEPS,
        recorder: Recorder | None = None,
        compiled: bool = False,
    ) -> None:
        self.replayed = 0
        self.capture_seconds = 0.0
        self.failure: str | None = None
        self._compiled = compiled
        self._objective, self._optimizer, self._table = objective, optimizer, table
        self._accumulation, self._autocast, self._eager_steps = accumulation, autocast, eager_steps
        self._recorder = recorder or GraphRecorder(table.device)
        self._shapes: dict[tuple[object, ...], Shape] = {}
        self._losses = torch.zeros(objective.runs, device=table.device)

    @property
    def execution(self) -> str:
        """What really ran so far: graphs once a step was replayed, else what they would have been made of."""
        if self._compiled:
            return "compiled_graphs" if self.replayed else "compiled"
        return "graphs" if self.replayed else "eager"

    def running(self) -> AbstractContextManager[object]:
        """Return the context that steps run in."""
        return self._recorder.running()

    def __call__(self, batch: PackedBatch) -> Tensor:
        parts = parts_of(batch.items, self._accumulation)
        shape = self._shape(batch, [part.size for part in parts])
        rows = self._table.index(np.concatenate([part.reshape(-1) for part in parts]))
        with self.running():
            shape.index.copy_(rows, non_blocking=True)
            enough = min(1, self._eager_steps) if self.replayed else self._eager_steps
            if shape.replay is None and shape.steps >= enough and self.failure is None:
                shape.replay = self._captured(shape)
            done = self._optimizer.step_count
            if shape.replay is None:
                self._step(shape)
            else:
                shape.replay()
                self.replayed += 1
            self._optimizer.step_count = done + 1  # a replay passes the host's own count by
            after_step(self._objective, self._optimizer)
        shape.steps += 1
        # made where the caller works; the next step waits for it
        return self._losses.clone()

    def _shape(self, batch: PackedBatch, sizes: list[int]) -> Shape:
        labels = self._table.label_length(batch.items)
        if labels:
            # rounded up, shapes are fewer; what that adds is labelled "not trained on"
            assert self._table.labels is not None
            labels = min(math.ceil(labels / LENGTH_MULTIPLE) * LENGTH_MULTIPLE, self._table.labels.shape[1])
        key = (batch.items.shape, batch.length, labels)
        if key not in self._shapes:
            index = torch.zeros(batch.items.size, dtype=torch.int64, device=self._table.device)
            self._shapes[key] = Shape(index, sizes, batch.length, labels)
        return self._shapes[key]

    def _step(self, shape: Shape) -> None:
        """Make a step on the rows in the shape's index and leave the losses in their buffer."""
        chunks = [self._table.rows(part, shape.length, shape.label_length) for part in shape.index.split(shape.sizes)]
        self._losses.copy_(step_on(chunks, self._objective, self._optimizer, self._autocast))

    def _captured(self, shape: Shape) -> Work | None:
        """Capture the shape's step; None if that fails."""
        optimizer, done, begin = self._optimizer, self._optimizer.step_count, time.perf_counter()
        try:
            with optimizer.capturable():
                return self._recorder.record(lambda: self._step(shape))
        except RuntimeError as error:
            self.failure = _first_line(error)
            asked, left = ("compiled_graphs", "compiled") if self._compiled else ("graphs", "eagerly")
            logger.warning(
                "train.execution=%s: a step could not be captured, going on %s: %s", asked, left, self.failure
            )
            for p in (*optimizer.packed, *optimizer.plain):
                p.grad = None
            return None
        finally:
            # a capture does nothing on the device, and so is no step
            optimizer.step_count = done
            self.capture_seconds += time.perf_counter() - begin


def _first_line(error: BaseException) -> str:
    """Return in a line what went wrong first: ending a broken capture is an error of its own."""
    while isinstance(error.__context__, RuntimeError):
        error = error.__context__
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
