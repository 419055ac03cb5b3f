"""The operations of a training step and the bytes that they read and write, as PyTorch dispatches them.

Every operation counts for itself: its input tensors are read once, its outputs written once. Code that fuses operations
or finds its inputs in a cache moves less, a kernel that reads an input several times moves more, and what a kernel of
one's own does is seen only where it is called as a registered operation. Views move nothing; a look-up reads the rows
it returns, not the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

LOOK_UPS = ("embedding", "index_select", "gather", "index")
UNWRITTEN = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
OVERWRITING = ("copy_", "fill_", "zero_", "bernoulli_", "normal_", "uniform_")
"""Operations that do not read what they write to."""


class Traffic(TorchDispatchMode):
    """Counts `operations` that compute or move something, and their `bytes`."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs, outputs = list(_tensors((args, kwargs or {}))), list(_tensors(out))
        name = func.overloadpacket.__name__
        if name in UNWRITTEN or _is_view(func, inputs, outputs):
            return out
        self.operations += 1
        written = sum(map(touched_bytes, _written(func, args, kwargs or {}) if func._schema.is_mutable else outputs))
        if name in LOOK_UPS:
            self.bytes += 2 * written + sum(map(touched_bytes, inputs[1:]))
        else:
            read = inputs[1:] if name in OVERWRITING else inputs
            self.bytes += written + sum(map(touched_bytes, read))
        return out


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    """Yield the arguments that an operation changes; the fused optimizers return nothing."""
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from _tensors(args[i] if i < len(args) else kwargs.get(argument.name))


def _is_view(func: Any, inputs: Iterable[torch.Tensor], outputs: Iterable[torch.Tensor]) -> bool:
    """Whether the operation only looks at its input's memory in another way."""
    if func._schema.is_mutable:
        return False
    there = {t.untyped_storage()._cdata for t in inputs}
    made = [t.untyped_storage()._cdata for t in outputs]
    return bool(made) and all(key in there for key in made)


def touched_bytes(tensor: torch.Tensor) -> int:
    """Return the bytes of a tensor's elements, those that it repeats (expanded dimensions) once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride or not size else 1
    return count * tensor.element_size()


def traffic_of(step: Callable[[], object]) -> Traffic:
    """Return the operations and bytes of one step."""
    with Traffic() as traffic:
        step()
    return traffic
