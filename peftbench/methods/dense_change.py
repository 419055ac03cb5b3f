"""A change of the weight that only exists as a whole matrix, multiplied without keeping the matrix.

Methods whose change has no cheap factors (a Hadamard product, a Fourier transform) build it, ΔW [R, D_out, D_in], from
few parameters. It is built again in the backward pass instead of being kept from the forward pass: what a step keeps is
the parameters and the input, however many sites there are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Make = Callable[..., Tensor]
"""Parameters → ΔW [R, D_out, D_in]; nothing random."""


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, make: Make, x: Tensor, y: Tensor, *parameters: Tensor) -> Tensor:
        ctx.make, ctx.dtypes = make, (x.dtype, y.dtype)
        ctx.save_for_backward(x, *parameters)
        return torch.baddbmm(y, x, make(*parameters).to(x.dtype).transpose(1, 2))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        x, *saved = ctx.saved_tensors
        with torch.enable_grad():
            leaves = [
                p.detach().requires_grad_(needed) for p, needed in zip(saved, ctx.needs_input_grad[3:], strict=True)
            ]
            change = ctx.make(*leaves)
        # Under autocast input, output and gradient may be of different types.
        grad_x = (grad @ change.detach().to(grad.dtype)).to(ctx.dtypes[0]) if ctx.needs_input_grad[1] else None
        grad_y = grad.to(ctx.dtypes[1]) if ctx.needs_input_grad[2] else None
        trained = [leaf for leaf in leaves if leaf.requires_grad]
        found = iter(
            torch.autograd.grad(change, trained, (grad.transpose(1, 2) @ x.to(grad.dtype)).to(change.dtype))
            if trained
            else ()
        )
        return None, grad_x, grad_y, *(next(found) if leaf.requires_grad else None for leaf in leaves)


def add_product(make: Make, x: Tensor, y: Tensor, *parameters: Tensor) -> Tensor:
    """Return y + x ΔWᵀ for x [R, N, D_in] and y [R, N, D_out], ΔW = `make(*parameters)`.

    Compiled, the matrix is made again too; `_Product` would end the compiled region, for Dynamo does not trace the
    gradient that its backward pass takes.
    """
    if torch.compiler.is_compiling():

        def product(x: Tensor, y: Tensor, *parameters: Tensor) -> Tensor:
            return torch.baddbmm(y, x, make(*parameters).to(x.dtype).transpose(1, 2))

        again: Tensor = checkpoint(product, x, y, *parameters, use_reentrant=False, preserve_rng_state=False)
        return again
    return _Product.apply(make, x, y, *parameters)  # type: ignore[no-any-return, no-untyped-call]
