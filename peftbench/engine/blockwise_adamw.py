"""AdamW with 8-bit moments for parameters without a runs axis: those of the base, in full fine-tuning.

The rule is `PackedAdamW`'s, the storage `moments.Blockwise`'s. Parameters are cut into pieces of whole blocks (the last
one filled up with zeros) and pieces gathered into buckets, so that a step is a few kernels a bucket and never holds an
fp32 copy of more than one bucket's moments. No block holds two parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftbench.engine.moments import CHUNK, Moments, Storage, whole_blocks


@dataclass(frozen=True)
class Piece:
    """Elements `start` to `stop` of a parameter."""

    parameter: nn.Parameter
    start: int
    stop: int

    @property
    def width(self) -> int:
        """Elements in whole blocks."""
        return whole_blocks(self.stop - self.start)


def buckets(parameters: Sequence[nn.Parameter], size: int) -> list[list[Piece]]:
    """Cut parameters into pieces of at most `size` elements and gather them, in order, into lists of at most `size`."""
    found: list[list[Piece]] = []
    room = 0
    for p in parameters:
        for start in range(0, p.numel(), size):
            piece = Piece(p, start, min(start + size, p.numel()))
            if piece.width > room:
                found.append([])
                room = size
            found[-1].append(piece)
            room -= piece.width
    return found


class BlockwiseAdamW(torch.optim.Optimizer):
    """AdamW whose moments are in 8 bits. A missing gradient counts as zero.

    Attributes:
        found_inf: tensor of one element, 1 where this step must change no parameter; None: always 0. Gradients may then
            hold anything.
        corrections: 1 − β₁ᵗ and 1 − β₂ᵗ of this step, tensors of one element; None: from the steps counted here.
    """

    found_inf: Tensor | None = None
    corrections: tuple[Tensor | float, Tensor | float] | None = None

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        storage: Storage,
        *,
        lr: float | Tensor,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        """Take groups of parameters on one device, each with its `weight_decay`."""
        assert storage.eight_bits, storage
        super().__init__(list(groups), {"lr": lr, "betas": betas, "eps": eps})
        device = self.param_groups[0]["params"][0].device
        self.steps = 0
        self._buckets: list[tuple[dict[str, Any], list[Piece], Moments]] = []
        for group in self.param_groups:
            for pieces in buckets(group["params"], CHUNK):
                moments = storage.moments(1, sum(p.width for p in pieces), device)
                self.state[len(self._buckets)] = dict(enumerate(moments.tensors()))  # type: ignore[index]
                self._buckets.append((group, pieces, moments))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update all parameters."""
        assert closure is None, "gradients come from outside"
        self.steps += 1
        for group, pieces, moments in self._buckets:
            rate = group["lr"] if self.found_inf is None else group["lr"] * (1 - self.found_inf)
            gradient = torch.cat([part for piece in pieces for part in self._gradient(piece)])
            if self.found_inf is not None:
                gradient = torch.where(self.found_inf > 0, 0.0, gradient)
            update = (self._direction(gradient.unsqueeze(0), moments, group) * rate).view(-1)
            places = [p.parameter.view(-1)[p.start : p.stop] for p in pieces]
            if group["weight_decay"]:
                torch._foreach_mul_(places, 1 - rate * group["weight_decay"])
            parts = update.split([p.width for p in pieces])
            torch._foreach_sub_(places, [u[: p.stop - p.start] for u, p in zip(parts, pieces, strict=True)])

    @staticmethod
    def _gradient(piece: Piece) -> list[Tensor]:
        p, count = piece.parameter, piece.stop - piece.start
        if p.grad is None:
            return [torch.zeros(piece.width, device=p.device)]
        return [p.grad.reshape(-1)[piece.start : piece.stop], torch.zeros(piece.width - count, device=p.device)]

    def _direction(self, gradient: Tensor, moments: Moments, group: dict[str, Any]) -> Tensor:
        """Return Adam's normalised step for the gradient [1, N] of a bucket."""
        beta1, beta2 = group["betas"]
        with moments.opened(slice(0, gradient.shape[1])) as (mean, square):
            mean.lerp_(gradient, 1 - beta1)
            square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            first, second = self.corrections or (1 - beta1**self.steps, 1 - beta2**self.steps)
            root = (square / second).sqrt_().add_(group["eps"])
            return (mean / first).div_(root)
