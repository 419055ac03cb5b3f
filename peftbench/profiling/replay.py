"""What memory was used for when most of it was in use: a step's allocations played again, one by one.

A pure function of a list of events, whoever recorded them: a GPU's allocator or the tensor tracker.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

COMPONENTS = ("weights", "adapter", "gradients", "optimizer", "activations", "workspace")
PHASES = ("forward", "backward", "step")
"""Parts of a training step in their order; `step` is the optimizer's."""


class Alloc(NamedTuple):
    """A block of `size` bytes comes to be at `address`."""

    address: int
    size: int


class Free(NamedTuple):
    """The block at `address` goes."""

    address: int


class Mark(NamedTuple):
    """A phase begins.

    `sizes` corrects the sizes of blocks that are alive now: an allocator may give more than it was asked for.
    `gradients` are the addresses that hold gradients now.
    """

    phase: str
    sizes: Mapping[int, int] = {}
    gradients: Collection[int] = ()


Event = Alloc | Free | Mark


@dataclass
class Block:
    """A block's life: events `born` (-1: before the first) to `died` (None: after the last)."""

    address: int
    size: int
    born: int
    phase: str
    died: int | None = None
    component: str = "workspace"


@dataclass(frozen=True)
class Peak:
    """The moment at which most bytes were in use.

    Attributes:
        bytes: the sum of `components`.
        phase: the phase it fell in.
        components: bytes by what they were for, one of `COMPONENTS` each.
        phases: the largest number of bytes in use in each phase.
    """

    bytes: int
    phase: str
    components: dict[str, int] = field(default_factory=dict)
    phases: dict[str, int] = field(default_factory=dict)


def replay(
    before: Mapping[int, int], known: Mapping[int, str], events: Sequence[Event], flat_gradient: int = 0
) -> Peak:
    """Find the peak within one training step and say what each block alive then was for.

    - What `known` names (weights, adapter, optimizer) is that; other blocks alive before the step are workspace.
    - Gradients: blocks that a mark says hold them, and the one copy of all packed gradients that the optimizer makes,
      known by its size.
    - Activations: allocated in the forward pass and alive when it ends: kept for the backward pass.
    - Workspace: everything else, which is temporary (recomputed activations too) or a library's own.

    Args:
        before: size of each block alive before the step, by address.
        known: component of each persistent block, by address.
        events: what happened, in order; the first is the mark of the first phase.
        flat_gradient: bytes of all packed gradients in one block.
    """
    blocks = lives(before, known, events, flat_gradient)
    changes = [0] * (len(events) + 2)
    for block in blocks:
        changes[block.born + 1] += block.size
        if block.died is not None:
            changes[block.died + 1] -= block.size
    phases: dict[str, int] = {}
    phase, total, best, moment, where = "", 0, -1, 0, ""
    for i in range(-1, len(events)):
        event = events[i] if i >= 0 else None
        phase = event.phase if isinstance(event, Mark) else phase
        total += changes[i + 1]
        if phase:
            phases[phase] = max(phases.get(phase, 0), total)
        if total > best:
            best, moment, where = total, i, phase
    components = dict.fromkeys(COMPONENTS, 0)
    for block in blocks:
        if block.born <= moment and (block.died is None or block.died > moment):
            components[block.component] += block.size
    return Peak(best, where or next(iter(phases), ""), components, phases)


def lives(
    before: Mapping[int, int], known: Mapping[int, str], events: Sequence[Event], flat_gradient: int
) -> list[Block]:
    """Return every block with its size, life and component."""
    live = {a: Block(a, size, -1, "", component=known.get(a, "workspace")) for a, size in before.items()}
    blocks = list(live.values())
    phase = ""
    for i, event in enumerate(events):
        if isinstance(event, Mark):
            for address, size in event.sizes.items():
                if address in live:
                    live[address].size = size
            if phase == "forward" and event.phase != "forward":
                _survivors(live.values())
            for address in event.gradients:
                if address in live:
                    live[address].component = "gradients"
            phase = event.phase
            continue
        gone = live.pop(event.address, None)
        if gone is not None:
            gone.died = i
        if isinstance(event, Alloc):
            block = Block(event.address, event.size, i, phase)
            if phase == "step" and flat_gradient and 0 <= event.size - flat_gradient < 512:
                block.component, flat_gradient = "gradients", 0
            live[event.address] = block
            blocks.append(block)
    return blocks


def _survivors(alive: Iterable[Block]) -> None:
    """Note that the forward pass ends with these alive."""
    for block in alive:
        if block.phase == "forward":
            block.component = "activations"
