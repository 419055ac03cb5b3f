"""Values of a tensor kept in 4 bits, its scales in 8 bits or in fp32: one pass over memory where Triton runs.

    absmax_b = map[m_b] · scale_⌊b/256⌋ + offset,  x̂_i = book[c_i] · absmax_b        (block b of 64 elements)

Source: Dettmers et al. 2023 (QLoRA), arXiv:2305.14314, section 3. Product and sum are rounded apart, each to fp32, and
the values once more to the result's type, so that the result is `peftbench.kernels.blockwise`'s bit for bit, which is
the reference and what runs without Triton.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peftbench.kernels.backend import kernel_shapes, use_triton
from peftbench.kernels.blockwise import dequantize_4bit, dequantize_8bit, dynamic_map


def dequantize(
    codes: Tensor,
    absmax: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    kind: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    after: Tensor | None = None,
) -> Tensor:
    """Return the tensor of `shape` (n elements) in fp32, bf16 or fp16.

    Args:
        codes: [ceil(n / 2)] bytes, the first of two codes in the high half.
        absmax: [ceil(n / 64)] fp32; bytes with `scale` [ceil(n / 64 / 256)] and `offset` [], both fp32 (else None).
        kind: "nf4" or "fp4".
        shape: of the result.
        dtype: of the result.
        after: a tensor that a compiled program must have before it dequantizes; its values are not read.
    """
    if torch.compiler.is_compiling():
        return _compiled(codes, absmax, scale, offset, kind, shape, dtype, after)
    if kernel_shapes(codes):
        return torch.empty(shape, dtype=dtype, device=codes.device)
    if use_triton(codes):
        from peftbench.kernels import nf4_triton

        return nf4_triton.dequantize(codes, absmax, scale, offset, kind, shape, dtype)
    return reference(codes, absmax, scale, offset, kind, shape, dtype)


def reference(
    codes: Tensor,
    absmax: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    kind: str,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """Return the same in plain PyTorch."""
    if scale is not None:
        assert offset is not None
        absmax = dequantize_8bit(absmax, scale, dynamic_map(device=absmax.device)) + offset
    return dequantize_4bit(codes, absmax, kind, shape, dtype)


@torch.library.custom_op("peftbench::dequantize_4bit", mutates_args=())
def _compiled(
    codes: Tensor,
    absmax: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    kind: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    after: Tensor | None,
) -> Tensor:
    return dequantize(codes, absmax, scale, offset, kind, shape, dtype)


@_compiled.register_fake
def _(
    codes: Tensor,
    absmax: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    kind: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    after: Tensor | None,
) -> Tensor:
    return codes.new_empty(shape, dtype=dtype)
