"""Column sums of an elementwise product, out = Σ_n x_n ⊙ (y_n − c), and uᵀ x beside it, reading x once for both.

The Triton kernels sum blocks of rows into [splits, R, D] in fp32, which are added up: two launches, and the same bits
every time. They are bound by reading x and y, and so add up rows in registers, element by element, until the very end.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from peftbench.kernels.backend import interpreted, kernel_shapes, use_triton

ROWS, COLUMNS = 64, 64
"""Elements a program holds at a time."""
LAST, DEPTH = 16, 512
"""Columns that a program adds the last sums of, and how many of those of a column it holds at a time."""
SMALLEST = 16
"""Least inner width of a matrix product in Triton."""
PROGRAMS = 512
"""About how many programs share the work."""
WARPS, STAGES = 4, 3
"""Warps of a program, and how many loads of its loop are under way at once."""


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
        total = tl.zeros((rows, columns), dtype=tl.float32)
        stop = tl.minimum((split + 1) * span, n)
        for start in range(split * span, stop, rows):
            row = start + tl.arange(0, rows)
            place = (run * n + row[:, None]) * d + column[None, :]
            valid = (row < stop)[:, None] & inside[None, :]
            x = tl.load(x_ptr + place, mask=valid, other=0.0).to(tl.float32)
            y = tl.load(y_ptr + place, mask=valid, other=0.0).to(tl.float32)
            # A masked row counts as 0 · (0 − c)
            total += x * (y - shift[None, :])
        runs = tl.num_programs(2)
        tl.store(out_ptr + (split.to(tl.int64) * runs + run) * d + column, tl.sum(total, axis=0), mask=inside)

    return kernel


def column_dot(x: Tensor, y: Tensor, offset: Tensor | None = None) -> Tensor:
    """Return Σ over rows of x ⊙ (y − offset), [R, D] in fp32, for x and y [R, N, D] and offset [D] (None: 0)."""
    if kernel_shapes(x):
        return x.new_empty((x.shape[0], x.shape[2]), dtype=torch.float32)
    if not use_triton(x) or x.dtype == torch.float64:
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
            x, y, shift, out, n, d, span, shifted=offset is not None, rows=ROWS, columns=COLUMNS,
            num_warps=WARPS, num_stages=STAGES,
        )  # fmt: skip
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
        total = tl.zeros((rows, columns), dtype=tl.float32)
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
            total += x.to(tl.float32) * (y - shift[None, :])
            if exact:
                product += tl.dot(u.to(tl.float32), x.to(tl.float32), input_precision="ieee")
            else:
                product += tl.dot(u, x)
        first = (split.to(tl.int64) * tl.num_programs(2) + run) * (r + 1)
        tl.store(out_ptr + first * d + column, tl.sum(total, axis=0), mask=inside)
        places = out_ptr + (first + 1 + inner[:, None]) * d + column[None, :]
        tl.store(places, product, mask=(inner < r)[:, None] & inside[None, :])

    return kernel


@functools.cache
def _finish_kernel() -> Any:
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(  # type: ignore[no-untyped-def]
        part_ptr, gain_ptr, factor_ptr, product_ptr, dot_ptr, d, r, splits, tiny, alpha, scaled: tl.constexpr,
        factored: tl.constexpr, lines: tl.constexpr, depth: tl.constexpr, columns: tl.constexpr,
    ):  # fmt: skip
        run = tl.program_id(1).to(tl.int64)
        runs = tl.num_programs(1)
        column = tl.program_id(0) * columns + tl.arange(0, columns)
        inside = column < d
        line = tl.arange(0, lines)
        deep = tl.arange(0, depth)
        total = tl.zeros((lines, columns), dtype=tl.float32)
        for start in range(0, splits, depth):
            split = start + deep
            place = ((split[:, None, None] * runs + run) * (r + 1) + line[None, :, None]) * d + column[None, None, :]
            valid = (split < splits)[:, None, None] & (line <= r)[None, :, None] & inside[None, None, :]
            total += tl.sum(tl.load(part_ptr + place, mask=valid, other=0.0), axis=0)
        place = (run * r + line[:, None] - 1) * d + column[None, :]
        valid = ((line >= 1) & (line <= r))[:, None] & inside[None, :]
        tl.store(product_ptr + place, total.to(product_ptr.dtype.element_ty), mask=valid)
        weight = tl.where(line == 0, 1.0, 0.0)[:, None] + tl.zeros((lines, columns), dtype=tl.float32)
        if factored:
            weight += alpha * tl.load(factor_ptr + place, mask=valid, other=0.0).to(tl.float32)
        dot = tl.sum(weight * total, axis=0)
        if scaled:
            gain = tl.load(gain_ptr + run * d + column, mask=inside, other=1.0)
            dot = dot / tl.where(tl.abs(gain) < tiny, tiny, gain)
        tl.store(dot_ptr + run * d + column, dot, mask=inside)

    return kernel


TINY = torch.finfo(torch.float32).tiny
"""Stands in for a divisor nearer to 0."""


def product_and_dot(
    u: Tensor,
    x: Tensor,
    y: Tensor,
    offset: Tensor | None = None,
    divisor: Tensor | None = None,
    factor: Tensor | None = None,
    alpha: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Return uᵀ x [R, r, D] in the dtype of x, and Σ over rows of x ⊙ (y − offset + alpha · u factor), over `divisor`.

    The second is [R, D] in fp32. Its last term is a sum over the rank of factor ⊙ uᵀ x, and costs no pass of its own.

    Args:
        u: [R, N, r], rows contiguous.
        x, y: [R, N, D].
        offset: [D], or None for 0.
        divisor: [R, D] in fp32, or None for 1.
        factor: [R, r, D], or None for 0.
    """
    runs, n, d = x.shape
    r = u.shape[2]
    if kernel_shapes(x):
        x.new_empty((runs, r + 1, d), dtype=torch.float32)  # what the kernel leaves behind and then adds up
        return x.new_empty((runs, r, d)), x.new_empty((runs, d), dtype=torch.float32)
    if not use_triton(x) or x.dtype == torch.float64 or u.stride(2) != 1 or u.dtype != x.dtype:
        product, dot = torch.bmm(u.transpose(1, 2), x), column_dot(x, y, offset)
        if factor is not None:
            dot = dot + alpha * (factor.to(dot.dtype) * product.to(dot.dtype)).sum(dim=1)
        if divisor is not None:
            dot = dot / torch.where(divisor.abs() < TINY, TINY, divisor)
        return product, dot
    import triton

    x, y = x.contiguous(), y.contiguous()
    blocks = triton.cdiv(d, COLUMNS)
    splits = max(1, min(triton.cdiv(n, ROWS), PROGRAMS // (blocks * runs)))
    span = triton.cdiv(triton.cdiv(n, splits), ROWS) * ROWS
    splits = triton.cdiv(n, span)
    partial = torch.empty((splits, runs, r + 1, d), dtype=torch.float32, device=x.device)
    product, dot = x.new_empty((runs, r, d)), partial.new_empty((runs, d))
    exact = x.dtype == torch.float32 or interpreted()
    rank = max(SMALLEST, triton.next_power_of_2(r))
    with torch.cuda.device_of(x):
        _both_kernel()[(blocks, splits, runs)](
            u, x, y, x if offset is None else offset.contiguous(), partial, n, d, r, u.stride(0), u.stride(1), span,
            shifted=offset is not None, exact=exact, rank=rank, rows=ROWS, columns=COLUMNS,
            num_warps=WARPS, num_stages=STAGES,
        )  # fmt: skip
        _finish_kernel()[(triton.cdiv(d, LAST), runs)](
            partial, dot if divisor is None else divisor.contiguous(), x if factor is None else factor.contiguous(),
            product, dot, d, r, splits, TINY, alpha, scaled=divisor is not None, factored=factor is not None,
            lines=triton.next_power_of_2(r + 1), depth=max(1, DEPTH // triton.next_power_of_2(r + 1)), columns=LAST,
        )  # fmt: skip
    return product, dot
