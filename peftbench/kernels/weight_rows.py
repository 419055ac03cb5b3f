"""Two passes over a frozen weight by rows: how its squared norm changes with a low-rank product, and rows scaled.

    Δ_j = ‖W_j + (a b)ᵀ_j‖² − ‖W_j‖² = Σ_k d_jk (2 W_jk + d_jk),   d = (a b)ᵀ
    V_jk = g_j W_jk

W [D_out, D_in], a [R, D_in, r], b [R, r, D_out], Δ [R, D_out], g [D_out]. Both are bound by reading W once: d is made
tile by tile and never stored. Δ is summed in fp32, and exactly zero where b is; V is rounded once.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from peftbench.kernels.backend import interpreted, kernel_shapes, use_triton

ROWS, COLUMNS = 16, 128
"""Elements of the weight that a program holds at a time."""
SMALLEST = 16
"""Least inner width of a matrix product in Triton."""


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
        w_ptr, a_ptr, b_ptr, out_ptr, d_out, d_in, r, w_row, w_column, rank: tl.constexpr, rows: tl.constexpr,
        columns: tl.constexpr, exact: tl.constexpr,
    ):  # fmt: skip
        run = tl.program_id(1).to(tl.int64)
        row = tl.program_id(0) * rows + tl.arange(0, rows)
        inner = tl.arange(0, rank)
        b_place = (run * r + inner[None, :]) * d_out + row[:, None]
        b_valid = (inner < r)[None, :] & (row < d_out)[:, None]
        b = tl.load(b_ptr + b_place, mask=b_valid, other=0.0).to(tl.float32)
        total = tl.zeros((rows,), dtype=tl.float32)
        for start in range(0, d_in, columns):
            column = start + tl.arange(0, columns)
            a_place = (run * d_in + column[None, :]) * r + inner[:, None]
            a = tl.load(a_ptr + a_place, mask=(inner < r)[:, None] & (column < d_in)[None, :], other=0.0)
            place = row.to(tl.int64)[:, None] * w_row + column.to(tl.int64)[None, :] * w_column
            valid = (row < d_out)[:, None] & (column < d_in)[None, :]
            w = tl.load(w_ptr + place, mask=valid, other=0.0)
            if exact:
                d = tl.dot(b, a.to(tl.float32), input_precision="ieee")
            else:
                d = tl.dot(b.to(w.dtype), a.to(w.dtype))
            total += tl.sum(d * (2 * w.to(tl.float32) + d), axis=1)
        tl.store(out_ptr + run * d_out + row, total, mask=row < d_out)

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


def norm_change(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return Δ [R, D_out] in fp32 for factors in fp32; products are taken in the weight's dtype, without gradients."""
    weight, a, b = weight.detach(), a.detach(), b.detach()
    if torch.compiler.is_compiling():
        return _norm_change_op(weight, a, b)
    if kernel_shapes(weight):
        return b.new_empty((a.shape[0], weight.shape[0]))
    if not use_triton(weight) or weight.dtype == torch.float64:
        return norm_change_reference(weight, a, b)
    import triton

    (d_out, d_in), (runs, _, r) = weight.shape, a.shape
    out = torch.empty((runs, d_out), dtype=torch.float32, device=weight.device)
    rank = max(SMALLEST, triton.next_power_of_2(r))
    with torch.cuda.device_of(weight):
        _norm_kernel()[(triton.cdiv(d_out, ROWS), runs)](
            weight, a.contiguous(), b.contiguous(), out, d_out, d_in, r, *weight.stride(),
            rank=rank, rows=ROWS, columns=COLUMNS, exact=weight.dtype == torch.float32 or interpreted(),
        )  # fmt: skip
    return out


@torch.library.custom_op("peftbench::norm_change", mutates_args=())
def _norm_change_op(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return norm_change(weight, a, b)


@_norm_change_op.register_fake
def _(weight, a, b):  # type: ignore[no-untyped-def]
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
