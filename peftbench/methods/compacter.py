"""Compacter: Houlsby's bottleneck networks with matrices made of Kronecker products, one factor shared by all layers.

    h' = h + W_up · act(W_down h + b_down) + b_up,    W = Σ_{i=1..n} A_i ⊗ (s_i t_i)

A_i [n, n] is the same in both matrices of every layer; s_i [D_in/n, k] and t_i [k, D_out/n] are each matrix's own, of
rank k = 1, so a matrix W [D_in, D_out] costs k (D_in + D_out) parameters.

Source: Karimi Mahabadi, Henderson and Ruder 2021, arXiv:2106.04647: the sum of Kronecker products is eq. 4, A_i shared
and s_i t_i in place of a full factor eq. 5 and 6, the adapter's place section 4 (after attention and after the
feed-forward part, as Houlsby's); n = 4 and a bottleneck of 24 = 768/32 as in section 5. `sublayers: [mlp]` is
Compacter++. The layers' normalisations train as well (`norms`), as in the authors' runs: without them the count of
0.073 % of T5-base in table 1 does not come out.

As in the authors' code A_i starts from a normal distribution with standard deviation 0.0001 and s_i, t_i from Glorot's
uniform one with a gain of √2: a product so small that a fresh adapter is the identity to rounding. They compute GELU by
its tanh approximation; here it is exact. The `adapters` library's `compacter` is the same function with `norms=false`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peftbench.methods.base import Card, Delta, HiddenDelta, Method, NormDelta, Traits, normal, require, uniform
from peftbench.methods.bottleneck import ACTIVATIONS, bottleneck, require_bottleneck, sublayer_sites
from peftbench.models.roles import Site, find_sites

SUBLAYERS = ("attention", "mlp")


class RuleDelta(Delta):
    """The shared factors A [R, n, n, n]."""

    A: nn.Parameter

    def __init__(self, methods: Sequence[Compacter], generators: Sequence[torch.Generator]) -> None:
        super().__init__(len(methods))
        pairs = zip(methods, generators, strict=True)
        self.stack("A", [normal((m.n, m.n, m.n), m.init_std, g) for m, g in pairs])


def kronecker_sum(a: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return Σ_i A_i ⊗ (s_i t_i) [R, n·p, n·q] of A [R, n, n, n], s [R, n, p, k] and t [R, n, k, q]."""
    blocks = torch.einsum("ziab,zipq->zapbq", a, left @ right)
    return blocks.flatten(3, 4).flatten(1, 2)


def _glorot(shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """Draw n matrices [n, rows, columns]."""
    return uniform(shape, math.sqrt(2.0) * math.sqrt(6.0 / (shape[1] + shape[2])), generator)


class CompacterDelta(HiddenDelta):
    """h + bottleneck(h) with both matrices summed from Kronecker products."""

    shared: RuleDelta
    down_left: nn.Parameter
    down_right: nn.Parameter
    down_bias: nn.Parameter
    up_left: nn.Parameter
    up_right: nn.Parameter
    up_bias: nn.Parameter

    def __init__(
        self, site: Site, methods: Sequence[Compacter], generators: Sequence[torch.Generator], shared: RuleDelta
    ) -> None:
        super().__init__(len(methods))
        self.refer("shared", shared)
        self.activation = ACTIVATIONS[methods[0].activation]
        n, k, wide = methods[0].n, methods[0].rank, site.width // methods[0].n
        pairs = [(m.bottleneck // n, g) for m, g in zip(methods, generators, strict=True)]
        self.stack("down_left", [_glorot((n, wide, k), g) for _, g in pairs])
        self.stack("down_right", [_glorot((n, k, narrow), g) for narrow, g in pairs])
        # In n parts, as the columns of W_down come: narrower runs of a pack are padded within each part.
        self.stack("down_bias", [torch.zeros(n, narrow) for narrow, _ in pairs])
        self.stack("up_left", [_glorot((n, narrow, k), g) for narrow, g in pairs])
        self.stack("up_right", [_glorot((n, k, wide), g) for _, g in pairs])
        self.stack("up_bias", [torch.zeros(site.width) for _ in pairs])

    def forward(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        down = kronecker_sum(self.shared.A, self.down_left, self.down_right)
        up = kronecker_sum(self.shared.A, self.up_left, self.up_right)
        return outputs + bottleneck(outputs, down, self.down_bias.flatten(1), up, self.up_bias, self.activation)


@dataclass(frozen=True)
class Compacter(Method):
    """Bottleneck networks made of Kronecker products with factors shared by all layers."""

    bottleneck: int = 24
    n: int = 4
    rank: int = 1
    activation: str = "gelu"
    sublayers: tuple[str, ...] = SUBLAYERS
    norms: bool = True
    init_std: float = 0.0001

    traits = Traits(
        sites=("hidden", "norm"),
        mergeable=False,
        identity_at_init=True,
        free_in_pack=frozenset({"bottleneck", "init_std"}),
        cost_free=frozenset({"init_std"}),
    )
    card = Card(
        equation="h' = h + W_up act(W_down h + b_down) + b_up, W = Σ A_i ⊗ (s_i t_i), A shared",
        paper="Karimi Mahabadi et al. 2021, arXiv:2106.04647",
        parameters="n³ + 2L (2k (D + r) + D + r) + 2D a norm",
    )

    def __post_init__(self) -> None:
        require_bottleneck(self.bottleneck, self.activation)
        require(self.n >= 1, "n", self.n, "a whole number of at least 1")
        require(self.rank >= 1, "rank", self.rank, "a whole number of at least 1")
        require(self.bottleneck % self.n == 0, "bottleneck", self.bottleneck, f"a multiple of n={self.n}")
        known = bool(self.sublayers) and set(self.sublayers) <= set(SUBLAYERS)
        require(known, "sublayers", self.sublayers, f"some of {', '.join(SUBLAYERS)}")
        require(self.init_std > 0, "init_std", self.init_std, "a number above 0")

    def sites(self, model: nn.Module) -> list[Site]:
        return sublayer_sites(model, self.sublayers) + (find_sites(model, "norm") if self.norms else [])

    def check_site(self, site: Site) -> None:
        if site.kind == "hidden":
            require(site.width % self.n == 0, "n", self.n, f"a divisor of {site.width}, the width")

    @classmethod
    def build(
        cls, sites: Sequence[Site], methods: Sequence[Compacter], generators: Sequence[torch.Generator]
    ) -> tuple[list[Delta], Delta | None]:
        shared = RuleDelta(methods, generators)
        deltas: list[Delta] = []
        for site in sites:
            if site.kind == "norm":
                deltas.append(NormDelta(site, len(methods), weight=True, bias=True))
            else:
                deltas.append(CompacterDelta(site, methods, generators, shared))
        return deltas, shared

    def count(self, site: Site) -> int:
        if site.kind == "norm":
            return NormDelta.count(site, weight=True, bias=True)
        return (2 * self.rank + 1) * (site.width + self.bottleneck)

    def shared_count(self, sites: Sequence[Site]) -> int:
        return self.n**3
