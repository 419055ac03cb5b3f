"""Attention with dropout of any length, with any mask: scores are never all held, and every run drops by its own hash.

    out = (softmax(q kᵀ · scale + mask) ⊙ kept / (1 − p)) v        (Vaswani et al. 2017, arXiv:1706.03762, eq. 1)

What is kept is asked of the hash (`kernels.dropout`) by the place in the run's own [B, H, T, T'], wherever the run is
and whoever computes. Scores, softmax and what is kept are made again in the backward pass from each query's greatest
score and denominator (Dao et al. 2022, arXiv:2205.14135), with

    δ = Σ out ⊙ ∂out,    ∂scores = softmax ⊙ (kept ⊙ ∂out vᵀ / (1 − p) − δ)

On a GPU these are Triton kernels that go through blocks of keys (forward, and ∂q) or of queries (∂k and ∂v), as
FlashAttention-2 does (Dao 2023, arXiv:2307.08691). Heads that are too wide for them, float64 and machines without
Triton go through the rows in chunks, in plain PyTorch.

A query that sees no key at all gets zeros.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula, sdpa_backward_flop_count, sdpa_flop_count

from peftbench.kernels import attention as short
from peftbench.kernels.backend import interpreted, kernel_shapes, use_triton
from peftbench.kernels.dropout import hashed, placed, signed, threshold

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
INTERPRETED = (torch.float32, torch.float16)
"""What Triton's interpreter can multiply."""
WIDEST, WIDEST_EXACT = 64, 32
"""Width of a head that the kernels take, and in fp32.

In heads of 128 the keys' gradient was wrong on an H100 (bf16, Triton 3.6), though not in Triton's interpreter.
"""
SMALLEST = 16
"""Least width of a matrix product in Triton."""
CHUNK_BYTES = 2**27
"""Scores of a chunk, in fp32."""
AUTOCASTS = ("cpu", "cuda")
"""Devices whose products autocast may change."""


def long_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    seeds: Tensor,
    site: int,
    scale: float,
    dropout: float,
    causal: bool = False,
) -> Tensor:
    """Return attention's outputs [N, H, T, D'], a view of [N, T, H, D']. Masks get no gradient.

    Args:
        query: [N, H, T, D], the rows of R runs one after another.
        key, value: [N, H', T', D] and [N, H', T', D']; H is a multiple of H', and heads that follow one another
            share a key head.
        mask: what is seen (truth values), or added to the scores; of any shape that expands to [N, H, T, T'].
        seeds: int64 [R]; `site` as in `kernels.dropout`.
        dropout: share p of the softmax that is dropped, 0 ≤ p < 1.
        causal: whether query t sees keys up to the t-th alone.
    """
    output: Tensor = _LongAttention.apply(query, key, value, mask, seeds, site, scale, dropout, causal)
    return output


class _LongAttention(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        seeds: Tensor,
        site: int,
        scale: float,
        p: float,
        causal: bool,
    ) -> Tensor:
        out, most, total = forward(q, k, v, mask, seeds, site, scale, p, causal)
        ctx.save_for_backward(q, k, v, mask, seeds, out, most, total)
        ctx.numbers = site, scale, p, causal
        return out.transpose(1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        gradients = backward(gradient, *ctx.saved_tensors, *ctx.numbers)
        return (*(g.transpose(1, 2) for g in gradients), None, None, None, None, None, None)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    seeds: Tensor,
    site: int,
    scale: float,
    p: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return outputs [N, T, H, D'], and of each query the greatest score and the denominator, [N, H, T]."""
    if _fits(q, k, v, mask):
        return kernels_forward(q, k, v, mask, seeds, site, scale, p, causal)
    return _chunked_forward(q, k, v, mask, seeds, site, scale, p, causal)


def backward(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    seeds: Tensor,
    out: Tensor,
    most: Tensor,
    total: Tensor,
    site: int,
    scale: float,
    p: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients by q, k and v, [N, T, H, D], from that of the outputs [N, H, T, D']."""
    how = kernels_backward if _fits(q, k, v, mask) else _chunked_backward
    dq, dk, dv = how(gradient, q, k, v, mask, seeds, out, most, total, site, scale, p, causal)
    return dq, _by_key_head(dk, k), _by_key_head(dv, v)


def _by_key_head(gradient: Tensor, key: Tensor) -> Tensor:
    """Return the gradient [N, T', H', D] of key heads from that of all query heads, in the keys' type."""
    heads = key.shape[1]
    if gradient.shape[2] != heads:
        gradient = gradient.unflatten(2, (heads, -1)).sum(dim=3, dtype=_wide(key))
    return gradient.to(key.dtype)


# In plain PyTorch.

Chunk = tuple[slice, slice, slice]
"""Rows, heads and queries."""


def _chunked_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    seeds: Tensor,
    site: int,
    scale: float,
    p: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    n, heads, queries, _ = q.shape
    out, most, total = _results(q, v)
    kept = _Kept(seeds, site, p, (n, heads, queries, k.shape[2]))
    with _as_asked(q):
        for chunk in _chunks(n, heads, queries, k.shape[2]):
            rows, some, at = chunk
            scores = _scores(q, k, mask, scale, causal, chunk)
            greatest = scores.amax(dim=-1, keepdim=True)
            greatest.masked_fill_(greatest == -torch.inf, 0.0)
            shares = scores.sub_(greatest).exp_()
            sums = shares.sum(dim=-1, keepdim=True)
            sums.masked_fill_(sums == 0, 1.0)
            most[chunk], total[chunk] = greatest.squeeze(-1), sums.squeeze(-1)
            shares.mul_(kept.of(chunk))
            found = torch.matmul(shares, _part(v, q, chunk)).div_(sums.mul_(1 - p))
            out[rows, at, some] = found.transpose(1, 2).to(out.dtype)
    return out, most, total


def _chunked_backward(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    seeds: Tensor,
    out: Tensor,
    most: Tensor,
    total: Tensor,
    site: int,
    scale: float,
    p: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients, of keys and values by query head."""
    n, heads, queries, _ = q.shape
    keys, factor = k.shape[2], 1 / (1 - p)
    chunks = list(_chunks(n, heads, queries, keys))
    # what is summed over chunks of queries is not rounded between
    summed = _wide(q) if chunks[0][2] != slice(0, queries) else q.dtype
    dq = q.new_empty((n, queries, heads, q.shape[3]))
    dk, dv = (t.new_zeros((n, keys, heads, t.shape[3]), dtype=summed) for t in (k, v))
    kept = _Kept(seeds, site, p, (n, heads, queries, keys))
    with _as_asked(q):
        for chunk in chunks:
            rows, some, at = chunk
            shares = _scores(q, k, mask, scale, causal, chunk)
            shares.sub_(most[chunk].unsqueeze(-1)).exp_().div_(total[chunk].unsqueeze(-1))
            mask_kept, g = kept.of(chunk), gradient[chunk].to(_wide(q))
            used = shares * mask_kept
            dv[rows, :, some] += torch.matmul(used.transpose(2, 3), g).mul_(factor).transpose(1, 2).to(summed)
            del used
            delta = (g * out[rows, at, some].transpose(1, 2)).sum(dim=-1, keepdim=True).mul_(1 - p)
            by_share = torch.matmul(g, _part(v, q, chunk).transpose(2, 3)).mul_(mask_kept)
            by_score = by_share.sub_(delta).mul_(shares).mul_(scale * factor)
            dq[rows, at, some] = torch.matmul(by_score, _part(k, q, chunk)).transpose(1, 2).to(q.dtype)
            by_key = torch.matmul(by_score.transpose(2, 3), q[chunk].to(_wide(q)))
            dk[rows, :, some] += by_key.transpose(1, 2).to(summed)
    return dq, dk, dv


def _as_asked(t: Tensor) -> AbstractContextManager[object]:
    """Return a context in which products are of the type that they are asked for in."""
    return torch.autocast(t.device.type, enabled=False) if t.device.type in AUTOCASTS else nullcontext()


def _wide(t: Tensor) -> torch.dtype:
    """Return the type to compute in."""
    return torch.promote_types(t.dtype, torch.float32)


def _chunks(n: int, heads: int, queries: int, keys: int) -> Iterator[Chunk]:
    """Cut rows, then heads, then queries, until a chunk's scores are no more than `CHUNK_BYTES`."""
    line = 4 * keys
    some = min(n, max(1, CHUNK_BYTES // (line * queries * heads)))
    few = min(heads, max(1, CHUNK_BYTES // (line * queries)))
    at = min(queries, max(1, CHUNK_BYTES // line))
    cuts = ([slice(i, min(i + step, size)) for i in range(0, size, step)] for size, step in
            ((n, some), (heads, few), (queries, at)))  # fmt: skip
    return itertools.product(*cuts)  # type: ignore[return-value]


def _part(key: Tensor, query: Tensor, chunk: Chunk) -> Tensor:
    """Return a chunk's keys or values [rows, heads, T', D], of as many heads as there are of queries."""
    rows, some, _ = chunk
    key, times = key[rows], query.shape[1] // key.shape[1]
    if times > 1:
        key = key.repeat_interleave(times, dim=1)
    return key[:, some].to(_wide(query))


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, scale: float, causal: bool, chunk: Chunk) -> Tensor:
    """Return a chunk's scores [rows, heads, queries, T']."""
    scores = torch.matmul(q[chunk].to(_wide(q)) * scale, _part(k, q, chunk).transpose(2, 3))
    if mask is not None:
        mask = mask.expand(*q.shape[:3], k.shape[2])[chunk]
        if mask.dtype == torch.bool:
            scores.masked_fill_(mask.logical_not(), -torch.inf)
        else:
            scores.add_(mask)
    if causal:
        at, key = (torch.arange(length, device=q.device) for length in (q.shape[2], k.shape[2]))
        scores.masked_fill_(key > at[chunk[2], None], -torch.inf)
    return scores


class _Kept:
    """Which of the shares [N, H, T, T'] the hash keeps."""

    def __init__(self, seeds: Tensor, site: int, p: float, shape: tuple[int, int, int, int]) -> None:
        n, heads, queries, keys = shape
        rows = n // seeds.shape[0]
        start, self._key = (t.repeat_interleave(rows) for t in placed(seeds, site))
        first = (torch.arange(n, device=seeds.device) % rows).mul_(heads * queries * keys)
        self._start, self._least, self._shape = start + signed(first), threshold(p), shape

    def of(self, chunk: Chunk) -> Tensor:
        """Return it for a chunk, whose places follow one another in each row."""
        rows, *inner = chunk
        _, heads, queries, keys = self._shape
        some, at = (len(range(*part.indices(size))) for part, size in zip(inner, (heads, queries), strict=True))
        before = (chunk[1].start * queries + chunk[2].start) * keys
        start = self._start[rows] + ((before + 2**31) % 2**32 - 2**31)
        return (hashed(start, self._key[rows], some * at * keys) >= self._least).view(-1, some, at, keys)


# By kernels: operations, so that what counts products and memory sees them.


def _fits(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Return whether the kernels take these."""
    widest = WIDEST_EXACT if q.dtype == torch.float32 else WIDEST
    types = INTERPRETED if interpreted() else DTYPES
    return (
        q.dtype == k.dtype == v.dtype
        and q.dtype in types
        and q.shape[3] == v.shape[3] <= widest
        and (mask is None or mask.dtype == torch.bool or mask.is_floating_point())
        and (use_triton(q) or kernel_shapes(q))
    )


@torch.library.custom_op("peftbench::long_attention", mutates_args=())
def kernels_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    seeds: Tensor,
    site: int,
    scale: float,
    p: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `forward` does."""
    from peftbench.kernels.long_attention_triton import long_attention_forward

    q, k, v = (_side_by_side(t) for t in (q, k, v))
    out, most, total = _results(q, v)
    added, strides, options = _launch(q, k, mask, causal)
    with torch.cuda.device_of(q):
        long_attention_forward[_programs(q, q.shape[2], options["block"])](
            q, k, v, added, seeds, out, most, total, *_numbers(q, k, seeds, site, scale, p),
            *_rows(q), *_rows(k), *_rows(v), *strides, **options,
        )  # fmt: skip
    return out, most, total


@kernels_forward.register_fake
def _(q, k, v, mask, seeds, site, scale, p, causal):  # type: ignore[no-untyped-def]
    return _results(q, v)


@torch.library.custom_op("peftbench::long_attention_backward", mutates_args=())
def kernels_backward(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    seeds: Tensor,
    out: Tensor,
    most: Tensor,
    total: Tensor,
    site: int,
    scale: float,
    p: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients, of keys and values by query head."""
    from peftbench.kernels.long_attention_triton import long_attention_by_key, long_attention_by_query

    gradient, q, k, v = (_side_by_side(t) for t in (gradient, q, k, v))
    dq, dk, dv = _gradients(q, k, v)
    delta = torch.empty_like(most)
    added, strides, options = _launch(q, k, mask, causal)
    numbers = _numbers(q, k, seeds, site, scale, p)
    rows = (*_rows(gradient), *_rows(q), *_rows(k), *_rows(v), *strides)
    with torch.cuda.device_of(q):
        long_attention_by_query[_programs(q, q.shape[2], options["block"])](
            gradient, q, k, v, added, seeds, out, most, total, delta, dq, *numbers, *rows, **options
        )
        long_attention_by_key[_programs(q, k.shape[2], options["block"])](
            gradient, q, k, v, added, seeds, most, total, delta, dk, dv, *numbers, *rows, **options
        )
    return dq, dk, dv


@kernels_backward.register_fake
def _(gradient, q, k, v, mask, seeds, out, most, total, site, scale, p, causal):  # type: ignore[no-untyped-def]
    return _gradients(q, k, v)


def _gradients(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n, heads, queries, width = q.shape
    dk, dv = (q.new_empty((n, k.shape[2], heads, width)) for _ in range(2))
    return q.new_empty((n, queries, heads, width)), dk, dv


def _programs(q: Tensor, length: int, block: int) -> tuple[int, int]:
    return q.shape[0] * q.shape[1], -(-length // block)


def _numbers(q: Tensor, k: Tensor, seeds: Tensor, site: int, scale: float, p: float) -> tuple[float, ...]:
    n, heads, queries, _ = q.shape
    lengths = (heads, heads // k.shape[1], queries, k.shape[2])
    return (*lengths, scale, p, threshold(p), site, n // seeds.shape[0])


def _rows(t: Tensor) -> tuple[int, int, int]:
    return t.stride(0), t.stride(1), t.stride(2)


def _launch(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool) -> tuple[Tensor, tuple[int, ...], dict[str, Any]]:
    """Return the mask (or any tensor, where there is none) with its strides, and what kernels are compiled for."""
    import triton

    kind, strides = 0, (0, 0, 0, 0)
    if mask is not None:
        kind = 2 if mask.dtype == torch.bool else 1
        wide = mask.expand(*q.shape[:3], k.shape[2])
        strides = tuple(0 if size == 1 else step for size, step in zip(wide.shape, wide.stride(), strict=True))  # type: ignore[assignment]
        # truth values are bytes
        mask = wide.view(torch.uint8) if kind == 2 else wide
    width, exact = q.shape[3], q.dtype == torch.float32
    held = max(SMALLEST, triton.next_power_of_2(width))
    most, warps = (32, 8) if exact else (64, 4)
    # as many queries as keys at a time: other blocks were never right or never tried on a GPU
    block = min(most, max(SMALLEST, triton.next_power_of_2(max(q.shape[2], k.shape[2]))))
    options = {
        "kind": kind,
        "by_query": strides[2] != 0,
        "causal": causal,
        "exact": exact,
        "width": width,
        "held": held,
        "block": block,
        "key_block": block,
        "num_warps": warps,
        "num_stages": 2,
    }
    return q if mask is None else mask, strides, options


# Operations that a compiler takes whole. Their site stands first in a tensor on the CPU, made while the step runs.


@torch.library.custom_op("peftbench::drawn_attention", mutates_args=())
def drawn_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    seeds: Tensor,
    site: Tensor,
    scale: float,
    p: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `forward` does: by the kernels for short attention where they fit, as in eager steps."""
    q, k, v = (_side_by_side(t) for t in (q, k, v))
    if not causal and short.fits(q, k, v, mask, p):
        out, logs = short.forward(q, k, v, mask, seeds, scale, p, int(site[0]))
        return out, logs, torch.empty_like(logs)
    return forward(q, k, v, mask, seeds, int(site[0]), scale, p, causal)


@drawn_attention.register_fake
def _(q, k, v, mask, seeds, site, scale, p, causal):  # type: ignore[no-untyped-def]
    return _results(q, v)


@torch.library.custom_op("peftbench::drawn_attention_backward", mutates_args=())
def _drawn_backward(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    seeds: Tensor,
    out: Tensor,
    most: Tensor,
    total: Tensor,
    site: Tensor,
    scale: float,
    p: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    gradient, q, k, v = (_side_by_side(t) for t in (gradient, q, k, v))
    if not causal and short.fits(q, k, v, mask, p):
        dq, dk, dv = short.backward(gradient, q, k, v, mask, seeds, most, scale, p, int(site[0]))
        return dq, dk, dv
    return backward(gradient, q, k, v, mask, seeds, out, most, total, int(site[0]), scale, p, causal)


@_drawn_backward.register_fake
def _(gradient, q, k, v, *rest):  # type: ignore[no-untyped-def]
    return tuple(t.new_empty((t.shape[0], t.shape[2], t.shape[1], t.shape[3])) for t in (q, k, v))


def _keep_drawn(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *given, site, scale, p, causal = inputs
    ctx.save_for_backward(*given, *output, site)
    ctx.numbers = scale, p, causal


def _drawn_gradients(ctx: Any, gradient: Tensor, *unused: Tensor) -> tuple[Any, ...]:
    found = _drawn_backward(gradient.transpose(1, 2), *ctx.saved_tensors, *ctx.numbers)
    return (*(g.transpose(1, 2) for g in found), None, None, None, None, None, None)


drawn_attention.register_autograd(_drawn_gradients, setup_context=_keep_drawn)


@register_flop_formula([torch.ops.peftbench.long_attention, torch.ops.peftbench.drawn_attention])
def _forward_flops(q: Any, k: Any, v: Any, *rest: Any, **options: Any) -> int:
    return int(sdpa_flop_count(q, *(_with_heads(t, q) for t in (k, v))))


@register_flop_formula([torch.ops.peftbench.long_attention_backward, torch.ops.peftbench.drawn_attention_backward])
def _backward_flops(gradient: Any, q: Any, k: Any, v: Any, *rest: Any, **options: Any) -> int:
    return int(sdpa_backward_flop_count(gradient, q, *(_with_heads(t, q) for t in (k, v))))


def _with_heads(key: Any, query: Any) -> Any:
    """Return a shape of keys with as many heads as there are of queries."""
    return (key[0], query[1], *key[2:])


def _side_by_side(t: Tensor) -> Tensor:
    return t if t.stride(3) == 1 else t.contiguous()


def _results(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate outputs, greatest scores and denominators."""
    n, heads, queries, _ = q.shape
    most, total = (q.new_empty((n, heads, queries), dtype=_wide(q)) for _ in range(2))
    return q.new_empty((n, queries, heads, v.shape[3])), most, total
