"""Attention of short sequences without causality: a program holds all keys of a row and head at once.

softmax(q kᵀ · scale + bias) v (Vaswani et al. 2017, arXiv:1706.03762, eq. 1), with dropout on the softmax. As in
FlashAttention (Dao et al. 2022, arXiv:2205.14135), scores, softmax and dropout's mask are made again in the backward
pass; but a hundred keys fit a program's registers, so that there is no loop over keys, and a gradient is written once.
Gradients and outputs lie in memory as [N, T, H, D], which the linear layers around attention read without a copy.

Dropout asks a hash of the place (`kernels.dropout`) instead of a Philox generator, whose ten rounds would be most of
the work.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula, sdpa_backward_flop_count, sdpa_flop_count

from peftbench.kernels.backend import interpreted, kernel_shapes, use_triton
from peftbench.kernels.dropout import threshold

LONGEST = 128
"""Queries and keys that a program holds."""
WIDEST = 64
"""Width of a head that a program holds."""
HALVES = (torch.bfloat16, torch.float16)
INTERPRETED = (torch.float32, torch.float16)
"""What Triton's interpreter can multiply."""
EXACT_WIDEST = 32
"""Width of a head in fp32; these are taken for their dropout alone, which is then a run's own."""
SMALLEST = 16
"""Least width of a matrix product in Triton."""
BLOCK = 64
"""Queries at a time."""


def fits(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, dropout: float) -> bool:
    """Return whether the kernels take these: short, on a GPU, one key head a query head, no bias by query.

    Args:
        query: [N, H, T, D].
        key, value: [N, H, T', D].
        bias: added to the scores, [N, 1, 1, T'], or None.
        dropout: share of the softmax that is dropped.
    """
    n, heads, queries, width = query.shape
    keys = key.shape[2]
    return (
        _computes(query.dtype, width, dropout)
        and query.dtype == key.dtype == value.dtype
        and max(queries, keys) <= LONGEST
        and SMALLEST <= width <= WIDEST
        and width & (width - 1) == 0
        and key.shape == value.shape == (n, heads, keys, width)
        and all(t.stride(3) == 1 for t in (query, key, value))
        and (bias is None or (bias.is_floating_point() and not bias.requires_grad and bias.shape == (n, 1, 1, keys)))
        and (use_triton(query) or kernel_shapes(query))
    )


def _computes(dtype: torch.dtype, width: int, dropout: float) -> bool:
    if interpreted():
        return dtype in INTERPRETED
    return dtype in HALVES or (dtype == torch.float32 and dropout > 0 and width <= EXACT_WIDEST)


def short_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    scale: float,
    dropout: float,
    seeds: Tensor | None = None,
    site: int = 0,
) -> Tensor:
    """Return attention's outputs [N, H, T, D], a view of [N, T, H, D], for what `fits`.

    Args:
        seeds: int64 [R], of R runs whose rows come one after another, and `site` as in `kernels.dropout`. None: one
            seed for all rows that the device draws, so that a captured step drops anew at every replay.
    """
    if not dropout:
        seeds = None
    elif seeds is None:
        seeds = torch.empty(1, dtype=torch.int64, device=query.device).random_()
    output: Tensor = _ShortAttention.apply(query, key, value, bias, seeds, scale, dropout, site)
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
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        seeds: Tensor | None,
        scale: float,
        p: float,
        site: int,
    ) -> Tensor:
        out, logs = forward(q, k, v, bias, seeds, scale, p, site)
        ctx.save_for_backward(q, k, v, bias, seeds, logs)
        ctx.numbers = scale, p, site
        return out.transpose(1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        if gradient.stride(3) != 1:
            gradient = gradient.contiguous()
        gradients = backward(gradient, *ctx.saved_tensors, *ctx.numbers)
        return (*(g.transpose(1, 2) for g in gradients), None, None, None, None, None)


def _options(k: Tensor, bias: Tensor | None, seeds: Tensor | None) -> dict[str, Any]:
    import triton

    held = max(SMALLEST, triton.next_power_of_2(k.shape[2]))
    return {
        "biased": bias is not None,
        "dropped": seeds is not None,
        "exact": k.dtype == torch.float32,
        "width": k.shape[3],
        "block": min(held, BLOCK),
        "keys_held": held,
        "num_warps": 4 if held > 32 else 2,
        "num_stages": 1,
    }


def _rows(t: Tensor) -> tuple[int, int, int]:
    return t.stride(0), t.stride(1), t.stride(2)


def _programs(q: Tensor, seeds: Tensor | None) -> int:
    """Return how many rows and heads share a seed."""
    return q.shape[0] * q.shape[1] // (1 if seeds is None else seeds.shape[0])


def _bias(bias: Tensor | None, other: Tensor) -> tuple[Tensor, int]:
    """Return the bias [N, 1, 1, T'] with its keys side by side, and its stride over rows."""
    if bias is None:
        return other, 0
    bias = bias if bias.stride(3) == 1 else bias.contiguous()
    return bias, bias.stride(0)


# Operations, so that what counts products and memory sees them.


@torch.library.custom_op("peftbench::short_attention", mutates_args=())
def forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, seeds: Tensor | None, scale: float, p: float, site: int
) -> tuple[Tensor, Tensor]:
    """Return outputs [N, T, H, D] and the logarithms of the softmax's denominators [N, H, T]."""
    from peftbench.kernels.attention_triton import short_attention_forward

    n, heads, queries, width = q.shape
    out, logs = q.new_empty((n, queries, heads, width)), q.new_empty((n, heads, queries), dtype=torch.float32)
    added, bias_row = _bias(bias, q)
    options = _options(k, bias, seeds)
    with torch.cuda.device_of(q):
        short_attention_forward[(n * heads, -(-queries // options["block"]))](
            q, k, v, added, q if seeds is None else seeds, out, logs, heads, queries, k.shape[2],
            scale, p, threshold(p), site, _programs(q, seeds), *_rows(q), *_rows(k), *_rows(v), bias_row, **options,
        )  # fmt: skip
    return out, logs


@forward.register_fake
def _(q, k, v, bias, seeds, scale, p, site):  # type: ignore[no-untyped-def]
    n, heads, queries, width = q.shape
    return q.new_empty((n, queries, heads, width)), q.new_empty((n, heads, queries), dtype=torch.float32)


@torch.library.custom_op("peftbench::short_attention_backward", mutates_args=())
def backward(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    seeds: Tensor | None,
    logs: Tensor,
    scale: float,
    p: float,
    site: int,
) -> list[Tensor]:
    """Return the gradients by q, k and v, [N, T, H, D]."""
    from peftbench.kernels.attention_triton import short_attention_backward

    n, heads, queries, width = q.shape
    dq, dk, dv = (t.new_empty((n, t.shape[2], heads, width)) for t in (q, k, v))
    added, bias_row = _bias(bias, q)
    with torch.cuda.device_of(q):
        short_attention_backward[(n * heads,)](
            gradient, q, k, v, added, q if seeds is None else seeds, logs, dq, dk, dv, heads, queries, k.shape[2],
            scale, p, threshold(p), site, _programs(q, seeds),
            *_rows(gradient), *_rows(q), *_rows(k), *_rows(v), bias_row,
            **_options(k, bias, seeds),
        )  # fmt: skip
    return [dq, dk, dv]


@backward.register_fake
def _(gradient, q, k, v, bias, seeds, logs, scale, p, site):  # type: ignore[no-untyped-def]
    return [t.new_empty((t.shape[0], t.shape[2], t.shape[1], t.shape[3])) for t in (q, k, v)]


@register_flop_formula(torch.ops.peftbench.short_attention)
def _forward_flops(q: Any, k: Any, v: Any, *rest: Any, **options: Any) -> int:
    return int(sdpa_flop_count(q, k, v))


@register_flop_formula(torch.ops.peftbench.short_attention_backward)
def _backward_flops(gradient: Any, q: Any, k: Any, v: Any, *rest: Any, **options: Any) -> int:
    return int(sdpa_backward_flop_count(gradient, q, k, v))
