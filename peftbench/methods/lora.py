"""LoRA: add a trained low-rank product to a frozen weight.

    y = W x + b + (alpha / r) · B A x,    A: r×D_in random, B: D_out×r zero

Source: Hu et al. 2021, arXiv:2106.09685, eq. 3 and section 4.1. Applied by default to the query and value projections
(section 4.2). A is drawn uniformly from ±1/sqrt(D_in), as in the authors' code (the paper says Gaussian); dropout acts
on the adapter's input, as in the authors' code (the paper does not mention it). Factors are stored transposed, A [D_in,
r] and B [r, D_out], so that rows multiply from the left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peftbench.methods.base import LinearDelta, Method, RunDropout, Targets, Traits, require, uniform
from peftbench.models.roles import Site, linear_sites


class LoraDelta(LinearDelta):
    """(alpha / r) · x A B beside the frozen product."""

    A: nn.Parameter
    B: nn.Parameter
    scale: Tensor

    def __init__(self, site: Site, methods: Sequence[Lora], generators: Sequence[torch.Generator]) -> None:
        super().__init__(len(methods))
        bound = site.in_features**-0.5
        self.stack(
            "A", [uniform((site.in_features, m.rank), bound, g) for m, g in zip(methods, generators, strict=True)]
        )
        self.stack("B", [torch.zeros(m.rank, site.out_features) for m in methods])
        self.constant("scale", [m.alpha / m.rank for m in methods])
        self.dropout = RunDropout([m.dropout for m in methods])

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        a = self.A.to(x.dtype)
        b = (self.B * self.scale).to(x.dtype)
        return torch.baddbmm(y, self.dropout(x) @ a, b)

    def merged(self, weight: Tensor, bias: Tensor | None, run: int) -> tuple[Tensor, Tensor | None]:
        state = self.run_state(run)
        change = (state["A"] @ state["B"]).T * self.scale[run]
        return (weight.float() + change).to(weight.dtype), bias


@dataclass(frozen=True)
class Lora(Method):
    """Low-rank update beside frozen linear maps: W + (alpha/r)·BA."""

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: Targets = ("attention.query", "attention.value")

    traits = Traits(
        sites=("linear",),
        mergeable=True,
        identity_at_init=True,
        free_in_pack=frozenset({"rank", "alpha", "dropout"}),
        cost_free=frozenset({"alpha"}),
    )

    def __post_init__(self) -> None:
        require(self.rank >= 1, "rank", self.rank, "a whole number of at least 1")
        require(self.alpha > 0, "alpha", self.alpha, "a number above 0")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "a number in [0, 1)")

    def sites(self, model: nn.Module) -> list[Site]:
        return linear_sites(model, self.targets)

    def check_site(self, site: Site) -> None:
        limit = min(site.in_features, site.out_features)
        require(self.rank <= limit, "rank", self.rank, f"at most {limit}, the smaller side of {site.name}")

    @classmethod
    def delta(cls, site: Site, methods: Sequence[Lora], generators: Sequence[torch.Generator]) -> LoraDelta:
        return LoraDelta(site, methods, generators)

    def count(self, site: Site) -> int:
        return self.rank * (site.in_features + site.out_features)
