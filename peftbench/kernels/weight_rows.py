"""Two passes over a frozen weight by rows: its norm with a low-rank product added, and its rows scaled.

    ‖W_j + s (a b)ᵀ_j‖² = ‖W_j‖² + Δ_j,    Δ_j = Σ_k d_jk (2 W_jk + d_jk),    d = s (a b)ᵀ
    V_jk = g_j W_jk

W [D_out, D_in], a [R, D_in, r], b [R, r, D_out], s [R], Δ [R, D_out], g [D_out]. Both are bound by reading W once: d is
made tile by tile and never stored. Δ is summed in fp32, and exactly zero where b is; V is rounded once.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from peftbench.kernels.backend import interpreted, kernel_shapes, use_triton

ROWS, COLUMNS = 32, 128
"""Elements of the weight that a program holds at a time."""
SMALLEST = 16
"""Least inner width of a matrix product in Triton."""
PROGRAMS = 1024
"""About how many programs share the work."""
WARPS, STAGES = 4, 3
"""Warps of a program, and how many loads of its loop are under way at once."""


def norm_change_reference(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return Δ through W a and aᵀ a: Σ over the rank of b ∘ (2 W a + b aᵀ a), in fp32 but for W a, as `weight` is."""
    runs = a.shape[0]
    # W a for all runs in one product: [D_out, D_in] × [D_in, R·r]
    image = weight @ a.to(weight.dtype).transpose(0, 1).flatten(1)
    image = image.to(b.dtype).unflatten(1, (runs, -1)).transpose(0, 1)
    b = b.mT
    return (b * torch.baddbmm(image, b, a.mT @ a, beta=2)).sum(dim=2)


@functools.cache
def _norm_kernel() -> Any:
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(  # type: ignore[no-untyped-def]
        w_ptr, a_ptr, b_ptr, s_ptr, out_ptr, d_out, d_in, r, span, w_row, w_column, rank: tl.constexpr,
        rows: tl.constexpr, columns: tl.constexpr, exact: tl.constexpr,
    ):  # fmt: skip
        run = tl.program_id(2).to(tl.int64)
        split = tl.program_id(1)
        row = tl.program_id(0) * rows + tl.arange(0, rows)
        inner = tl.arange(0, rank)
        b_place = (run * r + inner[None, :]) * d_out + row[:, None]
        b_valid = (inner < r)[None, :] & (row < d_out)[:, None]
        b = tl.load(b_ptr + b_place, mask=b_valid, other=0.0).to(tl.float32) * tl.load(s_ptr + run)
        total = tl.zeros((rows, columns), dtype=tl.float32)
        stop = tl.minimum((split + 1) * span, d_in)
        for start in range(split * span, stop, columns):
            column = start + tl.arange(0, columns)
            a_place = (run * d_in + column[None, :]) * r + inner[:, None]
            a = tl.load(a_ptr + a_place, mask=(inner < r)[:, None] & (column < stop)[None, :], other=0.0)
            place = row.to(tl.int64)[:, None] * w_row + column.to(tl.int64)[None, :] * w_column
            valid = (row < d_out)[:, None] & (column < stop)[None, :]
            w = tl.load(w_ptr + place, mask=valid, other=0.0)
            if exact:
                d = tl.dot(b, a.to(tl.float32), input_precision="ieee")
            else:
                d = tl.dot(b.to(w.dtype), a.to(w.dtype))
            total += d * (2 * w.to(tl.float32) + d)
        first = (split.to(tl.int64) * tl.num_programs(2) + run) * d_out
        tl.store(out_ptr + first + row, tl.sum(total, axis=1), mask=row < d_out)

    return kernel


@functools.cache
def _root_kernel() -> Any:
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(part_ptr, square_ptr, out_ptr, d_out, splits, floor, rows: tl.constexpr):  # type: ignore[no-untyped-def]
        run = tl.program_id(1).to(tl.int64)
        row = tl.program_id(0) * rows + tl.arange(0, rows)
        inside = row < d_out
        square = tl.load(square_ptr + row, mask=inside, other=0.0)
        total = tl.zeros((rows,), dtype=tl.float32)
        for split in range(splits):
            first = (split * tl.num_programs(1) + run) * d_out
            total += tl.load(part_ptr + first + row, mask=inside, other=0.0)
        tl.store(out_ptr + run * d_out + row, tl.sqrt_rn(tl.maximum(square + total, floor * square)), mask=inside)

    return kernel


@functools.cache
def _scale_kernel() -> Any:
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(w_ptr, g_ptr, out_ptr, d_in, w_row, w_column, columns: tl.constexpr):  # type: ignore[no-untyped-def]
        row = tl.program_id(0).to(tl.int64)
        gain = tl.load(g_ptr + row).to(tl.float32)
        for start in range(0, d_in, columns):
            column = start + tl.arange(0, columns).to(tl.int64)
            w = tl.load(w_ptr + row * w_row + column * w_column, mask=column < d_in, other=0.0)
            tl.store(out_ptr + row * d_in + column, (w.to(tl.float32) * gain).to(w.dtype), mask=column < d_in)

    return kernel


def norms(weight: Tensor, a: Tensor, b: Tensor, scale: Tensor, square: Tensor, floor: float) -> Tensor:
    """Return the norms √max(‖W_j‖² + Δ_j, floor · ‖W_j‖²), [R, D_out] in fp32, without gradients.

    Args:
        weight: [D_out, D_in]; products are taken in its dtype.
        a, b, scale: [R, D_in, r], [R, r, D_out] and R numbers, in fp32.
        square: ‖W_j‖² [D_out] in fp32.
        floor: the least share of ‖W_j‖² that counts.
    """
    given = (weight.detach(), a.detach(), b.detach(), scale, square, floor)
    return _norms_op(*given) if torch.compiler.is_compiling() else _norms(*given)


def _norms(weight: Tensor, a: Tensor, b: Tensor, scale: Tensor, square: Tensor, floor: float) -> Tensor:
    if kernel_shapes(weight):
        return b.new_empty((a.shape[0], weight.shape[0]))
    if not use_triton(weight) or weight.dtype == torch.float64:
        change = norm_change_reference(weight, a, b * scale.reshape(-1, 1, 1))
        return (square + change).maximum(floor * square).sqrt()
    import triton

    (d_out, d_in), (runs, _, r) = weight.shape, a.shape
    blocks = triton.cdiv(d_out, ROWS)
    splits = max(1, min(triton.cdiv(d_in, COLUMNS), PROGRAMS // (blocks * runs)))
    span = triton.cdiv(triton.cdiv(d_in, splits), COLUMNS) * COLUMNS
    splits = triton.cdiv(d_in, span)
    partial = torch.empty((splits, runs, d_out), dtype=torch.float32, device=weight.device)
    out = partial.new_empty((runs, d_out))
    rank = max(SMALLEST, triton.next_power_of_2(r))
    with torch.cuda.device_of(weight):
        _norm_kernel()[(blocks, splits, runs)](
            weight, a.contiguous(), b.contiguous(), scale.contiguous(), partial, d_out, d_in, r, span,
            *weight.stride(), rank=rank, rows=ROWS, columns=COLUMNS,
            exact=weight.dtype == torch.float32 or interpreted(), num_warps=WARPS, num_stages=STAGES,
        )  # fmt: skip
        _root_kernel()[(triton.cdiv(d_out, 256), runs)](partial, square, out, d_out, splits, floor, rows=256)
    return out


@torch.library.custom_op("peftbench::low_rank_norms", mutates_args=())
def _norms_op(weight: Tensor, a: Tensor, b: Tensor, scale: Tensor, square: Tensor, floor: float) -> Tensor:
    return _norms(weight, a, b, scale, square, floor)


@_norms_op.register_fake
def _(weight, a, b, scale, square, floor):  # type: ignore[no-untyped-def]
    return b.new_empty((a.shape[0], weight.shape[0]))


def scaled_rows(weight: Tensor, gain: Tensor) -> Tensor:
    """Return diag(gain) W [D_out, D_in] in the weight's dtype, each element rounded once."""
    if not use_triton(weight) or weight.dtype == torch.float64:
        return torch.mul(weight, gain.unsqueeze(1), out=torch.empty_like(weight))
    import triton

    d_out, d_in = weight.shape
    out = torch.empty((d_out, d_in), dtype=weight.dtype, device=weight.device)
    columns = min(triton.next_power_of_2(d_in), 4096)
    with torch.cuda.device_of(weight):
        _scale_kernel()[(d_out,)](weight, gain.contiguous(), out, d_in, *weight.stride(), columns=columns, num_warps=8)
    return out
