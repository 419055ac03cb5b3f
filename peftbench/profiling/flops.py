"""Floating-point operations of a training step: counted by PyTorch, and by the usual closed form."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils import flop_counter
from torch.utils.flop_counter import FlopCounterMode

Shape = Sequence[int]


def _forward(query: Shape, key: Shape, value: Shape, *rest: Any, **options: Any) -> int:
    return flop_counter.sdpa_flop(query, _heads(key, query), _heads(value, query))


def _backward(grad: Shape, query: Shape, key: Shape, value: Shape, *rest: Any, **options: Any) -> int:
    return flop_counter.sdpa_backward_flop(grad, query, _heads(key, query), _heads(value, query))


def _heads(shape: Shape, query: Shape) -> tuple[int, ...]:
    """Give keys and values that several query heads share the query's number of heads: the products are the same."""
    return (shape[0], query[1], *shape[2:])


def _added_product(total: Shape, left: Shape, right: Shape, *rest: Any, **options: Any) -> int:
    return 2 * math.prod(left) * right[-1]


def own_formulas() -> dict[Any, Callable[..., int]]:
    """Formulas that PyTorch lacks: products added in place, and grouped heads or the CPU's kernel in older SDPA."""
    aten = torch.ops.aten
    formulas: dict[Any, Callable[..., int]] = {aten.addmm_: _added_product, aten.baddbmm_: _added_product}
    for kernel in ("efficient_attention", "flash_attention", "cudnn_attention", "flash_attention_for_cpu"):
        for suffix, formula in (("", _forward), ("_backward", _backward)):
            operation = getattr(aten, f"_scaled_dot_product_{kernel}{suffix}", None)
            if operation is not None:
                formulas[operation] = formula
    return formulas


def counted_flops(step: Callable[[], object]) -> int:
    """Return the FLOPs of one step's matrix products and attention, forward and backward."""
    with FlopCounterMode(display=False, custom_mapping=own_formulas()) as counter:
        step()
    return int(counter.get_total_flops())


def analytic_flops_per_token(frozen: int, trained: int, *, backward_through_base: bool) -> int:
    """Return 4N per frozen and 6N per trained matrix parameter (2N forward, 2N for inputs' gradients, 2N for weights').

    Attention's own products are left out, as is usual (Kaplan et al. 2020, arXiv:2001.08361, section 2.1). Without a
    backward pass through the base (head only) a frozen parameter costs its forward 2N alone.

    Args:
        frozen: parameters of frozen matrices that every token passes, embeddings left out.
        trained: the same for trained ones.
    """
    return (4 if backward_through_base else 2) * frozen + 6 * trained
