"""Column sums of an elementwise product, out = Σ_n x_n ⊙ y_n, never written out as a product.

The Triton kernel sums blocks of rows into [splits, R, D] in fp32, which are added up: two launches, and the same bits
every time. It is bound by reading x and y.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from peftbench.kernels.backend import use_triton

ROWS, COLUMNS = 32, 128
"""Elements a program holds at a time."""
PROGRAMS = 1024
"""About how many programs share the work."""


def reference(x: Tensor, y: Tensor) -> Tensor:
    """Return the sums [R, D] in fp32 of x and y [R, N, D], a block of columns at a time."""
    parts = [
        (p.float() * q.float()).sum(dim=1) for p, q in zip(x.split(1024, dim=2), y.split(1024, dim=2), strict=True)
    ]
    return torch.cat(parts, dim=1)


@functools.cache
def _kernel() -> Any:
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(x_ptr, y_ptr, out_ptr, n, d, span, rows: tl.constexpr, columns: tl.constexpr):  # type: ignore[no-untyped-def]
        run = tl.program_id(2).to(tl.int64)
        split = tl.program_id(1)
        column = tl.program_id(0) * columns + tl.arange(0, columns)
        inside = column < d
        total = tl.zeros((columns,), dtype=tl.float32)
        stop = tl.minimum((split + 1) * span, n)
        for start in range(split * span, stop, rows):
            row = start + tl.arange(0, rows)
            place = (run * n + row[:, None]) * d + column[None, :]
            valid = (row < stop)[:, None] & inside[None, :]
            x = tl.load(x_ptr + place, mask=valid, other=0.0).to(tl.float32)
            y = tl.load(y_ptr + place, mask=valid, other=0.0).to(tl.float32)
            total += tl.sum(x * y, axis=0)
        runs = tl.num_programs(2)
        tl.store(out_ptr + (split.to(tl.int64) * runs + run) * d + column, total, mask=inside)

    return kernel


def column_dot(x: Tensor, y: Tensor) -> Tensor:
    """Return Σ over rows of x ⊙ y, [R, D] in fp32, for x and y [R, N, D]."""
    if not use_triton(x):
        return reference(x, y)
    import triton

    x, y = x.contiguous(), y.contiguous()
    runs, n, d = x.shape
    blocks = triton.cdiv(d, COLUMNS)
    splits = max(1, min(triton.cdiv(n, ROWS), PROGRAMS // (blocks * runs)))
    span = triton.cdiv(triton.cdiv(n, splits), ROWS) * ROWS
    splits = triton.cdiv(n, span)
    out = torch.empty((splits, runs, d), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _kernel()[(blocks, splits, runs)](x, y, out, n, d, span, rows=ROWS, columns=COLUMNS)
    return out.sum(dim=0)
