"""Column sums of an elementwise product, out = Σ_n x_n ⊙ (y_n − c), and uᵀ x beside it, reading x once for both.

The Triton kernels sum blocks of rows into [splits, R, D] in fp32, which are added up: two launches, and the same bits
every time. It is bound by reading x and y.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from peftbench.kernels.backend import interpreted, kernel_shapes, use_triton

ROWS, COLUMNS = 32, 128
"""Elements a program holds at a time."""
SMALLEST = 16
"""Least inner width of a matrix product in Triton."""
PROGRAMS = 1024
"""About how many programs share the work."""


def reference(x: Tensor, y: Tensor, offset: Tensor | None = None) -> Tensor:
    """Return the sums [R, D] of x and y [R, N, D], in fp32 or better, a block of columns at a time."""
    wide = torch.promote_types(x.dtype, torch.float32)
    sums = []
    for start in range(0, x.shape[2], 1024):
        block = slice(start, start + 1024)
        q = y[..., block].to(wide)
        sums.append((x[..., block].to(wide) * (q if offset is None else q - offset[block].to(wide))).sum(dim=1))
    return torch.cat(sums, dim=1)


@functools.cache
def _kernel() -> Any:
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(  # type: ignore[no-untyped-def]
        x_ptr, y_ptr, c_ptr, out_ptr, n, d, span, shifted: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr
    ):
        run = tl.program_id(2).to(tl.int64)
        split = tl.program_id(1)
        column = tl.program_id(0) * columns + tl.arange(0, columns)
        inside = column < d
        shift = tl.zeros((columns,), dtype=tl.float32)
        if shifted:
            shift = tl.load(c_ptr + column, mask=inside, other=0.0).to(tl.float32)
        total = tl.zeros((columns,), dtype=tl.float32)
        stop = tl.minimum((split + 1) * span, n)
        for start in range(split * span, stop, rows):
            row = start + tl.arange(0, rows)
            place = (run * n + row[:, None]) * d + column[None, :]
            valid = (row < stop)[:, None] & inside[None, :]
            x = tl.load(x_ptr + place, mask=valid, other=0.0).to(tl.float32)
            y = tl.load(y_ptr + place, mask=valid, other=0.0).to(tl.float32)
            total += tl.sum(x * (y - shift[None, :]), axis=0)
        runs = tl.num_programs(2)
        tl.store(out_ptr + (split.to(tl.int64) * runs + run) * d + column, total, mask=inside)

    return kernel


def column_dot(x: Tensor, y: Tensor, offset: Tensor | None = None) -> Tensor:
    """Return Σ over rows of x ⊙ (y − offset), [R, D] in fp32, for x and y [R, N, D] and offset [D] (None: 0)."""
    if kernel_shapes(x):
        return x.new_empty((x.shape[0], x.shape[2]), dtype=torch.float32)
    if not use_triton(x):
        return reference(x, y, offset)
    import triton

    x, y = x.contiguous(), y.contiguous()
    runs, n, d = x.shape
    blocks = triton.cdiv(d, COLUMNS)
    splits = max(1, min(triton.cdiv(n, ROWS), PROGRAMS // (blocks * runs)))
    span = triton.cdiv(triton.cdiv(n, splits), ROWS) * ROWS
    splits = triton.cdiv(n, span)
    out = torch.empty((splits, runs, d), dtype=torch.float32, device=x.device)
    shift = x if offset is None else offset.contiguous()
    with torch.cuda.device_of(x):
        _kernel()[(blocks, splits, runs)](
            x, y, shift, out, n, d, span, shifted=offset is not None, rows=ROWS, columns=COLUMNS
        )
    return out.sum(dim=0)


@functools.cache
def _both_kernel() -> Any:
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(  # type: ignore[no-untyped-def]
        u_ptr, x_ptr, y_ptr, c_ptr, out_ptr, n, d, r, u_run, u_row, span, shifted: tl.constexpr, exact: tl.constexpr,
        rank: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
    ):  # fmt: skip
        run = tl.program_id(2).to(tl.int64)
        split = tl.program_id(1)
        column = tl.program_id(0) * columns + tl.arange(0, columns)
        inside = column < d
        inner = tl.arange(0, rank)
        shift = tl.zeros((columns,), dtype=tl.float32)
        if shifted:
            shift = tl.load(c_ptr + column, mask=inside, other=0.0).to(tl.float32)
        total = tl.zeros((columns,), dtype=tl.float32)
        product = tl.zeros((rank, columns), dtype=tl.float32)
        stop = tl.minimum((split + 1) * span, n)
        for start in range(split * span, stop, rows):
            row = start + tl.arange(0, rows)
            place = (run * n + row[:, None]) * d + column[None, :]
            valid = (row < stop)[:, None] & inside[None, :]
            x = tl.load(x_ptr + place, mask=valid, other=0.0)
            y = tl.load(y_ptr + place, mask=valid, other=0.0).to(tl.float32)
            u_valid = (inner < r)[:, None] & (row < stop)[None, :]
            u = tl.load(u_ptr + run * u_run + row[None, :] * u_row + inner[:, None], mask=u_valid, other=0.0)
            total += tl.sum(x.to(tl.float32) * (y - shift[None, :]), axis=0)
            if exact:
                product += tl.dot(u.to(tl.float32), x.to(tl.float32), input_precision="ieee")
            else:
                product += tl.dot(u, x)
        first = (split.to(tl.int64) * tl.num_programs(2) + run) * (r + 1)
        tl.store(out_ptr + first * d + column, total, mask=inside)
        places = out_ptr + (first + 1 + inner[:, None]) * d + column[None, :]
        tl.store(places, product, mask=(inner < r)[:, None] & inside[None, :])

    return kernel


def product_and_dot(u: Tensor, x: Tensor, y: Tensor, offset: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return uᵀ x [R, r, D] in the dtype of x, and Σ over rows of x ⊙ (y − offset), [R, D] in fp32.

    Args:
        u: [R, N, r], rows contiguous.
        x, y: [R, N, D].
        offset: [D], or None for 0.
    """
    if kernel_shapes(x):
        whole = x.new_empty((x.shape[0], u.shape[2] + 1, x.shape[2]), dtype=torch.float32)
        return whole[:, 1:].to(x.dtype), whole[:, 0]
    if not use_triton(x) or x.dtype == torch.float64 or u.stride(2) != 1 or u.dtype != x.dtype:
        return torch.bmm(u.transpose(1, 2), x), column_dot(x, y, offset)
    import triton

    x, y = x.contiguous(), y.contiguous()
    (runs, n, d), r = x.shape, u.shape[2]
    blocks = triton.cdiv(d, COLUMNS)
    splits = max(1, min(triton.cdiv(n, ROWS), PROGRAMS // (blocks * runs)))
    span = triton.cdiv(triton.cdiv(n, splits), ROWS) * ROWS
    splits = triton.cdiv(n, span)
    out = torch.empty((splits, runs, r + 1, d), dtype=torch.float32, device=x.device)
    exact = x.dtype == torch.float32 or interpreted()
    rank = max(SMALLEST, triton.next_power_of_2(r))
    shift = x if offset is None else offset.contiguous()
    with torch.cuda.device_of(x):
        _both_kernel()[(blocks, splits, runs)](
            u, x, y, shift, out, n, d, r, u.stride(0), u.stride(1), span,
            shifted=offset is not None, exact=exact, rank=rank, rows=ROWS, columns=COLUMNS,
        )  # fmt: skip
    whole = out.sum(dim=0)
    return whole[:, 1:].to(x.dtype), whole[:, 0]
