"""Triton kernels of a sublayer's end; `peftbench.kernels.residual_norm` says what they compute."""

import triton
import triton.language as tl

from peftbench.kernels.dropout_triton import keeps, placed

NUMBERS = ("rows", "run_rows", "site", "threshold", "scale", "eps")
"""Arguments that no kernel is compiled for."""


@triton.jit
def kept_entries(  # type: ignore[no-untyped-def]
    seed_ptr, row, rows, run_rows, column, site, threshold, width: tl.constexpr
):
    """Return which entries of the rows dropout keeps [block, held]."""
    run = row // run_rows
    seed = tl.load(seed_ptr + run, mask=row < rows, other=0)
    start, key = placed(seed, site + 0 * row, 0 * row)
    place = (row - run * run_rows)[:, None] * width + column[None, :]
    return keeps(place, start[:, None], key[:, None], threshold)


@triton.jit(do_not_specialize=NUMBERS)
def residual_norm_forward(  # type: ignore[no-untyped-def]
    x_ptr, residual_ptr, weight_ptr, bias_ptr, seed_ptr, sum_ptr, out_ptr,
    rows, run_rows, site, threshold, scale, eps,
    dropped: tl.constexpr, width: tl.constexpr, held: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * block + tl.arange(0, block)
    column = tl.arange(0, held)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    place = row.to(tl.int64)[:, None] * width + column[None, :]
    x = tl.load(x_ptr + place, mask=inside, other=0.0)
    if dropped:
        keep = kept_entries(seed_ptr, row, rows, run_rows, column, site, threshold, width)
        x = tl.where(keep, x.to(tl.float32) * scale, 0.0).to(x_ptr.dtype.element_ty)
    residual = tl.load(residual_ptr + place, mask=inside, other=0.0)
    total = (x.to(tl.float32) + residual.to(tl.float32)).to(sum_ptr.dtype.element_ty)
    tl.store(sum_ptr + place, total, mask=inside)
    centred = total.to(tl.float32)
    centred = tl.where(inside, centred - (tl.sum(centred, axis=1) / width)[:, None], 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / width + eps)
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    out = centred * inverse[:, None] * weight[None, :] + bias[None, :]
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=NUMBERS)
def residual_norm_backward(  # type: ignore[no-untyped-def]
    gradient_ptr, sum_ptr, weight_ptr, seed_ptr, by_residual_ptr, by_x_ptr,
    rows, run_rows, site, threshold, scale, eps,
    dropped: tl.constexpr, width: tl.constexpr, held: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * block + tl.arange(0, block)
    column = tl.arange(0, held)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    place = row.to(tl.int64)[:, None] * width + column[None, :]
    total = tl.load(sum_ptr + place, mask=inside, other=0.0).to(tl.float32)
    centred = tl.where(inside, total - (tl.sum(total, axis=1) / width)[:, None], 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / width + eps)
    normal = centred * inverse[:, None]
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    gradient = tl.load(gradient_ptr + place, mask=inside, other=0.0).to(tl.float32) * weight[None, :]
    along = tl.sum(gradient * normal, axis=1) / width
    level = tl.sum(gradient, axis=1) / width
    change = (gradient - normal * along[:, None] - level[:, None]) * inverse[:, None]
    rounded = change.to(by_residual_ptr.dtype.element_ty)
    tl.store(by_residual_ptr + place, rounded, mask=inside)
    if dropped:
        keep = kept_entries(seed_ptr, row, rows, run_rows, column, site, threshold, width)
        by_x = tl.where(keep, rounded.to(tl.float32) * scale, 0.0)
        tl.store(by_x_ptr + place, by_x.to(by_x_ptr.dtype.element_ty), mask=inside)
