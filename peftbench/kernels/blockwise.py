"""Blockwise quantization: store a tensor as small codes and one scale a block.

    absmax_b = max |x_i|,  c_i = nearest code to x_i / absmax_b,  x̂_i = code[c_i] · absmax_b      (block b of 64 or 256)

Source: Dettmers et al. 2023 (QLoRA), arXiv:2305.14314, section 3 and appendix E for NF4; Dettmers et al. 2022,
arXiv:2110.02861, section 2.1 for the dynamic 8-bit map. Every tensor is read in its row-major order; the last block may
be shorter. Two 4-bit codes share a byte, the first in the high half.

Codes, scales and restored values are those of bitsandbytes 0.50 bit for bit, device by device (FP4's two zeros aside,
which are both positive here). Its CPU and its CUDA kernels differ in how they take reciprocals, in the last digit of
some boundaries between codes, in blocks of zeros, in FP4's zeros, and in the 8-bit map, which the CPU looks up on a
grid of 2^16 points; each difference is followed and named below. Not followed are blocks whose largest value is
subnormal, ties in the last rounding to fp16, which its CPU library breaks by processor (here they go to even), and the
wrong scales that its CPU library restores matrices with whose width is an odd multiple of 32 (seen with AVX-512).
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from peftbench.kernels.backend import constant

logger = logging.getLogger(__name__)

KINDS = ("nf4", "fp4")
BLOCK = 64
"""Elements that share a scale in a 4-bit tensor."""

DYNAMIC_BLOCK = 256
"""Elements that share a scale in an 8-bit tensor."""

OFFSET = 0.9677083
"""Probability of NF4's outermost quantile, (31/32 + 29/30) / 2, to the digits its authors' code gives."""

GRID = 2**16 - 1
CHUNK = 2**24
"""Elements quantized at a time, a multiple of every block: bounds the temporary tensors."""


@constant
def codebook(kind: str, device: torch.device | str = "cpu") -> Tensor:
    """Return the 16 values of "nf4" or "fp4", fp32, in the order of their codes; do not write into it.

    NF4 has the quantiles of N(0, 1) at 8 evenly spaced probabilities above one half and 7 below, and zero, divided by
    the largest (appendix E). The table in use everywhere comes of probabilities and quantiles rounded to fp32, so
    they are here. FP4 has a sign, two exponent bits e that count down and one mantissa bit m: (1 + m/2) · 2^(4-e),
    or m/16 for e = 0, divided by the largest, 12.
    """
    # not on the device of the caller's context, whose functions round in other ways
    with torch.device("cpu"):
        if kind == "nf4":
            upper, lower = (torch.linspace(OFFSET, 0.5, n, dtype=torch.float32)[:-1].double() for n in (9, 8))
            quantiles = [torch.special.ndtri(upper), -torch.special.ndtri(lower), torch.zeros(1).double()]
            values = torch.cat(quantiles).sort().values.float()
        else:
            assert kind == "fp4", kind
            sizes = [m / 16 if e == 0 else (1 + m / 2) * 2 ** (4 - e) for e in range(4) for m in range(2)]
            values = torch.tensor(sizes + [0.0 - size for size in sizes])
    return (values / values.max()).to(device)


@constant
def dynamic_map(signed: bool = True, device: torch.device | str = "cpu") -> Tensor:
    """Return the 256 values of the dynamic 8-bit map, fp32, ascending; do not write into it.

    Decade 10^(i-6), i = 0..6, is cut into 2^i parts (2^(i+1) without a sign) between a tenth and the whole of it, each
    part represented by its middle; zero and one complete the map.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        parts = 2 ** (decade if signed else decade + 1)
        edges = torch.linspace(0.1, 1, parts + 1, dtype=torch.float32, device="cpu")
        middles = (10 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        values += middles + ([-m for m in middles] if signed else [])
    values += [0.0] * (256 - len(values))
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


@constant
def _boundaries(kind: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return ascending boundaries [15] and codes [16]: code i is for values above boundary i - 1, up to boundary i."""
    with torch.device("cpu"):
        bounds, codes = _host_boundaries(kind, device.type == "cuda")
    return bounds.to(device), codes.to(device, torch.uint8)


def _host_boundaries(kind: str, cuda: bool) -> tuple[Tensor, Tensor]:
    values = codebook(kind)
    codes = values.sort(stable=True).indices
    values = values[codes]
    if not cuda:
        return (values[1:] + values[:-1]) / 2, codes
    if kind == "nf4":
        middles = (values[1:].double() + values[:-1].double()) / 2
        return torch.tensor([_from_digits(m) for m in middles.tolist()]), codes
    # There sign and magnitude are coded apart: a boundary belongs to the smaller magnitude, and a negative value near
    # zero to the negative zero, if it is not flushed. Three boundaries are given with fewer digits than fp32 holds.
    sizes = torch.tensor([0, 1 / 16, 2, 3, 4, 6, 8, 12], dtype=torch.float64)
    upper = ((sizes[1:] + sizes[:-1]) / 24).float()
    upper[0], upper[4], upper[5] = 0.00260417, 0.4166667, 0.583333
    lower = torch.nextafter(-upper.flip(0), torch.tensor(-math.inf))
    bounds = torch.cat([lower, torch.tensor([-torch.finfo(torch.float32).tiny]), upper])
    ranks = codebook(kind)[:8].sort().indices
    return bounds, torch.cat([ranks.flip(0) + 8, ranks])


def _from_digits(middle: float) -> float:
    """Return the fp32 number nearest to the shortest digits of `middle`.

    The middle of two fp32 numbers is mostly a tie, which the digits printed in CUDA's source decide either way.
    """
    digits, near = Fraction(repr(middle)), np.float32(middle)
    around = [np.nextafter(near, np.float32(-2)), near, np.nextafter(near, np.float32(2))]
    return float(min(around, key=lambda number: abs(Fraction(float(number)) - digits)))


def _reciprocal(x: Tensor) -> Tensor:
    if x.device.type != "cuda":
        return 1 / x.clamp(min=1e-38)
    try:
        from peftbench.kernels.reciprocal import reciprocal
    except ImportError:
        _warn_once()
        return 1 / x
    return reciprocal(x)


@functools.cache
def _warn_once() -> None:
    logger.warning("Triton is not installed: about one code in ten million may differ from bitsandbytes'")


def _blocks(x: Tensor, block: int) -> Tensor:
    """View a flat tensor as [blocks, block] in fp32, the last one filled up with zeros."""
    return torch.nn.functional.pad(x.float(), (0, -x.numel() % block)).view(-1, block)


@torch.no_grad()
def quantize_4bit(x: Tensor, kind: str, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """Return codes [ceil(n / 2)] in bytes and absmax [ceil(n / block)] in fp32 of x (n elements, any float type)."""
    flat = x.detach().reshape(-1)
    bounds, codes = _boundaries(kind, flat.device)
    packed, scales = [], []
    for part in flat.split(CHUNK):
        blocks = _blocks(part, block)
        absmax = blocks.abs().amax(1)
        scaled = blocks * _reciprocal(absmax)[:, None]
        if part.numel() % block and x.device.type == "cpu":
            # the CPU divides where everything else multiplies by the reciprocal
            absmax[-1].clamp_(min=1e-38)
            scaled[-1] = blocks[-1] / absmax[-1]
        chosen = codes[torch.bucketize(scaled, bounds, out_int32=True)]
        if x.device.type == "cuda":
            # there 0 · 1/0 has the first code
            chosen[absmax == 0] = 0
        # half a byte without an element is coded as zero
        chosen = chosen.view(-1)[: part.numel() + part.numel() % 2]
        packed.append(chosen[0::2] << 4 | chosen[1::2])
        scales.append(absmax)
    return torch.cat(packed), torch.cat(scales)


def dequantize_4bit(
    codes: Tensor, absmax: Tensor, kind: str, shape: Sequence[int], dtype: torch.dtype, block: int = BLOCK
) -> Tensor:
    """Return the tensor of `shape` that codes and absmax stand for: products in fp32, rounded to `dtype` once."""
    values = _pairs(kind, codes.device).index_select(0, codes.int()).view(-1)[: math.prod(shape)]
    return _rescaled(values, absmax, block).view(*shape).to(dtype)


@constant
def _pairs(kind: str, device: torch.device) -> Tensor:
    """Return the two values that each byte stands for, [256, 2]."""
    values, byte = codebook(kind), torch.arange(256, device="cpu")
    return torch.stack([values[byte >> 4], values[byte & 15]], 1).to(device)


def _rescaled(values: Tensor, absmax: Tensor, block: int) -> Tensor:
    whole = values.numel() // block
    values[: whole * block].view(-1, block).mul_(absmax[:whole, None])
    if values.numel() % block:
        values[whole * block :].mul_(absmax[whole])
    return values


@torch.no_grad()
def quantize_8bit(x: Tensor, code: Tensor, block: int = DYNAMIC_BLOCK) -> tuple[Tensor, Tensor]:
    """Return codes like x in bytes and absmax [ceil(n / block)] in fp32; `code` [256] ascending (see `dynamic_map`)."""
    blocks = _blocks(x.detach().reshape(-1), block)
    absmax = blocks.abs().amax(1)
    scaled = blocks * _reciprocal(absmax)[:, None]
    bounds = (code[1:] + code[:-1]) / 2
    if x.device.type == "cpu":
        # the CPU looks values up on a grid
        scaled = ((scaled + 1) * 0.5 * GRID + 0.5).floor() / GRID * 2 - 1
    else:
        # there a value on a boundary goes to the code of even index
        below = torch.nextafter(bounds, torch.full_like(bounds, -math.inf))
        bounds = torch.where(torch.arange(255, device=bounds.device) % 2 == 1, below, bounds)
    codes = torch.bucketize(scaled, bounds, out_int32=True).to(torch.uint8)
    # a block of zeros has code 0, the lowest
    codes[absmax == 0] = 0
    return codes.view(-1)[: x.numel()].view(x.shape), absmax


def dequantize_8bit(codes: Tensor, absmax: Tensor, code: Tensor, block: int = DYNAMIC_BLOCK) -> Tensor:
    """Return the fp32 tensor, shaped like `codes`, that codes and absmax stand for."""
    values = code.index_select(0, codes.view(-1).int())
    return _rescaled(values, absmax, block).view(codes.shape)
