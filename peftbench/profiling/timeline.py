"""What a training step holds after each of its operations, and what a deeper model would: lines through two depths.

The layers of a transformer repeat, so at any one point of the step (the fifth operation of the last layer's backward
pass, say) the bytes of every component grow by the same amount with each layer. Two shallow models therefore give every
point of a deep one, and the largest of these is its peak. Layers in the middle lie on a line between the first and the
last, and a line has its largest value at an end: they are left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.flop_counter import flop_registry, shape_wrapper

from peftbench.profiling.flops import own_formulas
from peftbench.profiling.memory import ROUNDING, TensorTracker
from peftbench.profiling.replay import COMPONENTS, Alloc, Event, Free, lives
from peftbench.profiling.shapes import scratch_bytes

Levels = np.ndarray
"""Bytes [points, components]."""


class InLayer(NamedTuple):
    """Label of a stretch within one of the layers that repeat."""

    phase: str
    stack: int
    layer: Any
    event: str


@dataclass(frozen=True)
class Timeline:
    """One training step.

    Attributes:
        levels: bytes in use when each operation is done, by component, [operations, components].
        labels: what each stretch of operations is.
        starts: its first operation.
        flops: floating-point operations of the whole step.
    """

    levels: Levels
    labels: list[Hashable]
    starts: list[int]
    flops: int

    def stretches(self, depth: int, shortest: int) -> dict[Hashable, Levels]:
        """Return the levels of each stretch of a model of `depth` layers by its label.

        Layers are named as in a model of the `shortest` depth, those in the middle left out. Stretches with the same
        label (accumulated batches) are told apart by how often it came before.
        """
        found: dict[Hashable, Levels] = {}
        seen: Counter[Hashable] = Counter()
        for label, start, stop in zip(self.labels, self.starts, [*self.starts[1:], len(self.levels)], strict=True):
            if isinstance(label, InLayer):
                place = near(label.layer, depth, shortest)
                if place is None:
                    continue
                label = label._replace(layer=place)
            found[label, seen[label]] = self.levels[start:stop]
            seen[label] += 1
        return found


class Tape(TensorTracker):
    """Records a step's allocations, where its operations and stretches end, and its FLOPs.

    `rounding`: the allocator gives whole multiples of this many bytes. `gpu`: kernels' own scratch space counts.
    """

    def __init__(self, existing: Iterable[torch.Tensor], *, rounding: int = ROUNDING, gpu: bool = True) -> None:
        super().__init__(existing)
        self.rounding, self.gpu = rounding, gpu
        self.flops = 0
        self._ends: list[int] = []
        self._labels: list[tuple[int, Hashable]] = []
        own = {operation: shape_wrapper(formula) for operation, formula in own_formulas().items()}
        self._formulas: dict[Any, Any] = {**flop_registry, **own}

    def label(self, label: Hashable) -> None:
        """Note that the operations from here on are part of another stretch."""
        self._labels.append((len(self._ends), label))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        formula = self._formulas.get(func.overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        scratch = scratch_bytes(func, args) if self.gpu else 0
        if scratch:
            self.events.append(Alloc(-1, scratch))
        self._ends.append(len(self.events))
        if scratch:
            self.events.append(Free(-1))
        return out

    def timeline(self, known: Mapping[int, str], flat_gradient: int) -> Timeline:
        """Return what was recorded; `known` and `flat_gradient` as for `replay`."""
        before = {address: self._rounded(size) for address, size in self.before.items()}
        events: list[Event] = [
            Alloc(event.address, self._rounded(event.size)) if isinstance(event, Alloc) else event
            for event in self.events
        ]
        levels = levels_of(before, known, events, flat_gradient)[np.asarray(self._ends, dtype=int)]
        starts = [start for start, _ in self._labels]
        return Timeline(levels, [label for _, label in self._labels], starts, self.flops)

    def _rounded(self, size: int) -> int:
        return -(-size // self.rounding) * self.rounding


def levels_of(
    before: Mapping[int, int], known: Mapping[int, str], events: Sequence[Event], flat_gradient: int = 0
) -> Levels:
    """Return the bytes in use by component before the first event and after each, [events + 1, components]."""
    changes = np.zeros((len(events) + 1, len(COMPONENTS)))
    for block in lives(before, known, events, flat_gradient):
        column = COMPONENTS.index(block.component)
        changes[block.born + 1, column] += block.size
        if block.died is not None:
            changes[block.died + 1, column] -= block.size
    return changes.cumsum(axis=0)


def near(layer: int, depth: int, shortest: int) -> Hashable:
    """Return which of the `shortest` model's layers a layer corresponds to, from its nearer end; None in the middle."""
    first = (shortest + 1) // 2
    if layer < first:
        return "first", layer
    if depth - 1 - layer < shortest - first:
        return "last", depth - 1 - layer
    return None


def deepened(short: Timeline, long: Timeline, depths: tuple[int, int], depth: int) -> Levels:
    """Return the levels at all points of a model of `depth` layers from those of two shallower ones.

    A stretch in which both make equally many operations is followed operation by operation; of one in which the number
    depends on depth (an optimizer's loop over tensors) only the largest level is.
    """
    low, high = depths
    share = (depth - low) / (high - low)
    points = []
    others = long.stretches(high, low)
    for label, levels in short.stretches(low, low).items():
        more = others.get(label, levels[:0])
        if not len(levels) or not len(more):
            continue
        if len(levels) != len(more):
            levels, more = _top(levels), _top(more)
        points.append(levels + share * (more - levels))
    return np.concatenate(points)


def _top(levels: Levels) -> Levels:
    return levels[levels.sum(axis=1).argmax()][None]


def peak(levels: Levels) -> dict[str, int]:
    """Return the bytes by component where their sum is largest."""
    row = _top(levels)[0]
    return {name: round(float(value)) for name, value in zip(COMPONENTS, row, strict=True)}
