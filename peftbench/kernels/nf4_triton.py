"""The Triton kernel of `peftbench.kernels.nf4`: from codes to values in one pass over memory.

Every thread reads the codes that make up 16 bytes of output, so that loads and stores of a warp are whole cache lines
and no thread needs what another one has read. Bound by memory: 0.516 bytes read and 2 written for each weight in bf16.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftbench.kernels.blockwise import BLOCK, DYNAMIC_BLOCK, codebook, dynamic_map

STORE = 16
"""Bytes a thread writes at a time, the most there are."""


@dataclass(frozen=True)
class Config:
    """How the work is cut: `rows` times 16 bytes of output a program, done by 32·`warps` threads."""

    rows: int = 256
    warps: int = 4


CONFIG = Config()
"""The fastest of those tried on an H100 for matrices of 4 to 60 million weights; larger ones do not care."""


@triton.jit
def _tile(
    codes,
    absmax,
    nested,
    scale,
    offset,
    book,
    out,
    start,
    left,
    rows: tl.constexpr,
    width: tl.constexpr,
    block: tl.constexpr,
    group: tl.constexpr,
    double: tl.constexpr,
    partial: tl.constexpr,
):
    """Restore [rows, 2 width] weights from weight `start` on; `partial`: only `left` of them exist."""
    row = tl.arange(0, rows)
    byte = row[:, None] * width + tl.arange(0, width)[None, :]
    # what a masked load leaves undefined is a byte, so it is found in either table
    pair = tl.load(codes + start // 2 + byte, mask=2 * byte < left if partial else None).to(tl.int32)

    first = start // block
    own = row // (block // (2 * width))
    exists = own * block < left if partial else None
    if double:
        small = tl.load(absmax + first + own, mask=exists).to(tl.int32)
        # two roundings, as where each is a kernel: launched with enable_fp_fusion=False
        largest = tl.load(nested + small) * tl.load(scale + (first + own) // group, mask=exists) + tl.load(offset)
    else:
        largest = tl.load(absmax + first + own, mask=exists)

    high, low = pair >> 4, pair & 15
    # looked up in shared memory: loads through the first-level cache are a few percent slower
    value = tl.gather(tl.load(book + tl.arange(0, 16)), tl.join(high, low).reshape(rows * width * 2), 0)
    value = value.reshape(rows, width * 2) * largest[:, None]
    place = row[:, None] * (2 * width) + tl.arange(0, 2 * width)[None, :]
    tl.store(out + start + place, value.to(out.dtype.element_ty), mask=place < left if partial else None)


@triton.jit(do_not_specialize=["count"])
def _dequantize(
    codes,
    absmax,
    nested,
    scale,
    offset,
    book,
    out,
    count,
    rows: tl.constexpr,
    width: tl.constexpr,
    block: tl.constexpr,
    group: tl.constexpr,
    double: tl.constexpr,
):
    tile: tl.constexpr = rows * width * 2
    start = tl.program_id(0).to(tl.int64) * tile
    if start + tile <= count:
        # unmasked, whatever `count` is divisible by: a mask would cut loads and stores into single elements
        _tile(
            codes, absmax, nested, scale, offset, book, out, start, tile,
            rows, width, block, group, double, False,
        )  # fmt: skip
    else:
        left = (count - start).to(tl.int32)
        _tile(
            codes, absmax, nested, scale, offset, book, out, start, left,
            rows, width, block, group, double, True,
        )  # fmt: skip


@functools.cache
def _tables(kind: str, device: torch.device) -> tuple[Tensor, Tensor]:
    return codebook(kind, device), dynamic_map(device=device)


def dequantize(
    codes: Tensor,
    absmax: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    kind: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    config: Config = CONFIG,
) -> Tensor:
    """Return what `nf4.dequantize` does, for contiguous tensors that Triton can reach; takes nothing but the result."""
    out = torch.empty(shape, dtype=dtype, device=codes.device)
    count = math.prod(shape)
    if not count:
        return out
    book, nested = _tables(kind, codes.device)
    width = STORE // out.element_size() // 2
    grid = (-(-count // (config.rows * width * 2)),)
    with torch.cuda.device(codes.device if codes.is_cuda else -1):
        _dequantize[grid](
            codes, absmax, nested, scale, offset, book, out, count,
            rows=config.rows, width=width, block=BLOCK, group=DYNAMIC_BLOCK,
            double=scale is not None, num_warps=config.warps, enable_fp_fusion=False,
        )  # fmt: skip
    return out
