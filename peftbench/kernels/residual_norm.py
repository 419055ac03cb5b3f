"""What ends a sublayer of BERT and its kin, in one pass over memory: LayerNorm(dropout(x) + residual).

Done one by one these are three passes forward, and as many back: as long as the sublayer's products, where its width
is a few hundred. Here the sum is kept for the backward pass, which makes the statistics and dropout's mask again.
Layer normalisation is that of Ba et al. 2016 (arXiv:1607.06450); its weight and bias do not train.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftbench.kernels.backend import kernel_shapes, use_triton
from peftbench.kernels.dropout import run_dropout, threshold

WIDEST = 4096
"""Width of a row that a program holds."""
HELD = 2048
"""Entries that a program holds, of several rows where they are short."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def fits(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """Return whether the kernels take x and residual [..., D], weight and bias [D]."""
    return (
        x.dtype in DTYPES
        and x.dtype == residual.dtype == weight.dtype == bias.dtype
        and x.shape == residual.shape
        and weight.shape == bias.shape == x.shape[-1:]
        and x.shape[-1] <= WIDEST
        and not weight.requires_grad
        and not bias.requires_grad
        and (use_triton(x) or kernel_shapes(x))
    )


def residual_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    p: float = 0.0,
    seeds: Tensor | None = None,
    site: int = 0,
) -> Tensor:
    """Return LayerNorm(dropout(x) + residual) [R·B, ..., D] for what `fits`.

    Args:
        x, residual: [R·B, ..., D], the rows of R runs one after another.
        p: share of x that is dropped.
        seeds, site: as in `kernels.dropout`; for p > 0.
    """
    output: Tensor = _ResidualNorm.apply(x, residual, weight, bias, eps, p, seeds if p else None, site)
    return output


def reference(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    p: float = 0.0,
    seeds: Tensor | None = None,
    site: int = 0,
) -> Tensor:
    """Return the same in plain PyTorch."""
    if p and seeds is not None:
        x = run_dropout(x, seeds, site, [p] * seeds.shape[0])
    return torch.nn.functional.layer_norm(x + residual, weight.shape, weight, bias, eps)


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        p: float,
        seeds: Tensor | None,
        site: int,
    ) -> Tensor:
        x, residual = x.contiguous(), residual.contiguous()
        total, out = torch.empty_like(x), torch.empty_like(x)
        ctx.save_for_backward(total, weight, seeds)
        ctx.numbers = eps, p, site
        if not kernel_shapes(x):
            from peftbench.kernels.residual_norm_triton import residual_norm_forward

            grid, numbers, sizes = _launch(x, eps, p, seeds, site)
            with torch.cuda.device_of(x):
                residual_norm_forward[grid](
                    x, residual, weight, bias, x if seeds is None else seeds, total, out, *numbers, **sizes
                )
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        total, weight, seeds = ctx.saved_tensors
        eps, p, site = ctx.numbers
        gradient = gradient.contiguous()
        by_residual = torch.empty_like(total)
        by_x = by_residual if seeds is None else torch.empty_like(total)
        if not kernel_shapes(total):
            from peftbench.kernels.residual_norm_triton import residual_norm_backward

            grid, numbers, sizes = _launch(total, eps, p, seeds, site)
            with torch.cuda.device_of(total):
                residual_norm_backward[grid](
                    gradient, total, weight, total if seeds is None else seeds, by_residual, by_x, *numbers, **sizes
                )
        return by_x, by_residual, None, None, None, None, None, None


def _launch(
    x: Tensor, eps: float, p: float, seeds: Tensor | None, site: int
) -> tuple[tuple[int], tuple[float, ...], dict[str, Any]]:
    """Return the programs, and the kernels' numbers and sizes."""
    import triton

    width = x.shape[-1]
    rows = x.numel() // width
    held = triton.next_power_of_2(width)
    block = max(1, HELD // held)
    run_rows = rows if seeds is None else rows // seeds.shape[0]
    numbers = (rows, run_rows, site, threshold(p), 1 / (1 - p), eps)
    sizes = {"dropped": seeds is not None, "width": width, "held": held, "block": block, "num_warps": 4}
    return (-(-rows // block),), numbers, sizes
