"""Attention of short sequences without causality, a program for each row and head that holds all of it at once.

softmax(q kᵀ · scale + bias) v (Vaswani et al. 2017, arXiv:1706.03762, eq. 1), with dropout on the softmax. Where a
hundred keys fit a program's registers, nothing need be kept for the backward pass but the inputs: scores, softmax and
dropout's mask are made again, as in FlashAttention (Dao et al. 2022, arXiv:2205.14135), without its loop over keys.
Gradients and outputs lie in memory as [N, T, H, D], which the linear layers around attention read without a copy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula, sdpa_backward_flop_count, sdpa_flop_count

from peftbench.kernels.backend import interpreted, use_triton

LONGEST = 128
"""Queries and keys that a program holds."""
WIDEST = 64
"""Width of a head that a program holds."""
HALVES = (torch.bfloat16, torch.float16)
INTERPRETED = (torch.float32, torch.float16)
"""What Triton's interpreter can multiply."""
SMALLEST = 16
"""Least width of a matrix product in Triton."""
ROUNDS = 7
"""Rounds of the Philox generator: seven pass the usual batteries of tests (Salmon et al. 2011, table 2)."""
PLACES = 2**31
"""Places of dropout's mask that the generator tells apart."""


def fits(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, dropout: float) -> bool:
    """Return whether the kernels take these: halves on a GPU, short, one key head a query head, no bias by query.

    Args:
        query: [N, H, T, D].
        key, value: [N, H, T', D].
        bias: added to the scores, [N, 1, 1, T'], or None.
        dropout: share of the softmax that is dropped.
    """
    n, heads, queries, width = query.shape
    keys = key.shape[2]
    return (
        query.dtype in (INTERPRETED if interpreted() else HALVES)
        and query.dtype == key.dtype == value.dtype
        and max(queries, keys) <= LONGEST
        and SMALLEST <= width <= WIDEST
        and width & (width - 1) == 0
        and key.shape == value.shape == (n, heads, keys, width)
        and all(t.stride(3) == 1 for t in (query, key, value))
        and (bias is None or (bias.is_floating_point() and not bias.requires_grad and bias.shape == (n, 1, 1, keys)))
        and (not dropout or n * heads * LONGEST**2 < PLACES)
        and use_triton(query)
    )


def short_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float, dropout: float
) -> Tensor:
    """Return attention's outputs [N, H, T, D], a view of [N, T, H, D], for what `fits`.

    Dropout's mask comes from a seed that the device draws, so a captured step drops anew at every replay.
    """
    seed = None
    if dropout:
        seed = torch.empty(1, dtype=torch.int64, device=query.device).random_(2**31)
    output: Tensor = _ShortAttention.apply(query, key, value, bias, seed, scale, dropout)
    return output


def reference(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float, kept: Tensor | None = None
) -> Tensor:
    """Return the same in plain PyTorch; `kept` is what the softmax is multiplied by, [N, H, T, T']."""
    scores = query @ key.transpose(2, 3) * scale
    shares = torch.softmax(scores if bias is None else scores + bias, dim=-1)
    return (shares if kept is None else shares * kept) @ value


class _ShortAttention(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, seed: Tensor | None, scale: float, p: float
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, bias, seed)
        ctx.numbers = scale, p
        return _forward_op(q, k, v, bias, seed, scale, p).transpose(1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        if gradient.stride(3) != 1:
            gradient = gradient.contiguous()
        gradients = _backward_op(gradient, *ctx.saved_tensors, *ctx.numbers)
        return (*(g.transpose(1, 2) for g in gradients), None, None, None, None)


def _options(q: Tensor, k: Tensor, bias: Tensor | None, seed: Tensor | None) -> dict[str, Any]:
    import triton

    queries, keys = (max(SMALLEST, triton.next_power_of_2(t.shape[2])) for t in (q, k))
    return {
        "biased": bias is not None,
        "dropped": seed is not None,
        "exact": q.dtype == torch.float32,
        "rounds": ROUNDS,
        "width": q.shape[3],
        "queries_held": queries,
        "keys_held": keys,
        "num_warps": 8 if queries * keys > 64 * 64 else 4 if queries * keys > 32 * 32 else 2,
        "num_stages": 1,
    }


def _rows(t: Tensor) -> tuple[int, int, int]:
    return t.stride(0), t.stride(1), t.stride(2)


def _bias(bias: Tensor | None, other: Tensor) -> tuple[Tensor, int]:
    """Return the bias [N, 1, 1, T'] with its keys side by side, and its stride over rows."""
    if bias is None:
        return other, 0
    bias = bias if bias.stride(3) == 1 else bias.contiguous()
    return bias, bias.stride(0)


# Operations, so that what counts products and memory sees them.


@torch.library.custom_op("peftbench::short_attention", mutates_args=())
def _forward_op(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, seed: Tensor | None, scale: float, p: float
) -> Tensor:
    from peftbench.kernels.attention_triton import forward

    n, heads, queries, width = q.shape
    out = q.new_empty((n, queries, heads, width))
    added, bias_row = _bias(bias, q)
    with torch.cuda.device_of(q):
        forward[(n * heads,)](
            q, k, v, added, q if seed is None else seed, out, heads, queries, k.shape[2], scale, p,
            *_rows(q), *_rows(k), *_rows(v), bias_row, **_options(q, k, bias, seed),
        )  # fmt: skip
    return out


@_forward_op.register_fake
def _(q, k, v, bias, seed, scale, p):  # type: ignore[no-untyped-def]
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], q.shape[3]))


@torch.library.custom_op("peftbench::short_attention_backward", mutates_args=())
def _backward_op(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    scale: float,
    p: float,
) -> list[Tensor]:
    from peftbench.kernels.attention_triton import backward

    n, heads, queries, width = q.shape
    dq, dk, dv = (t.new_empty((n, t.shape[2], heads, width)) for t in (q, k, v))
    added, bias_row = _bias(bias, q)
    with torch.cuda.device_of(q):
        backward[(n * heads,)](
            gradient, q, k, v, added, q if seed is None else seed, dq, dk, dv, heads, queries, k.shape[2], scale, p,
            *_rows(gradient), *_rows(q), *_rows(k), *_rows(v), bias_row, **_options(q, k, bias, seed),
        )  # fmt: skip
    return [dq, dk, dv]


@_backward_op.register_fake
def _(gradient, q, k, v, bias, seed, scale, p):  # type: ignore[no-untyped-def]
    return [t.new_empty((t.shape[0], t.shape[2], t.shape[1], t.shape[3])) for t in (q, k, v)]


@register_flop_formula(torch.ops.peftbench.short_attention)
def _forward_flops(q: Any, k: Any, v: Any, *rest: Any, **options: Any) -> int:
    return int(sdpa_flop_count(q, k, v))


@register_flop_formula(torch.ops.peftbench.short_attention_backward)
def _backward_flops(gradient: Any, q: Any, k: Any, v: Any, *rest: Any, **options: Any) -> int:
    return int(sdpa_backward_flop_count(gradient, q, k, v))
