"""LoHa: add the elementwise product of two low-rank products, whose rank is up to r², to a frozen weight.

    W' = W + (alpha / r) · (B₁ A₁) ∘ (B₂ A₂),    A: r×D_in, B: D_out×r

Source: Hyeon-Woo, Ye-Bin and Oh 2022 (FedPara), arXiv:2108.06098, proposition 1, for changes of a frozen weight as in
LyCORIS (Yeh et al. 2024, arXiv:2309.14859). A₂ is zero and the rest uniform within 1/√columns, HF PEFT's
way. The elementwise product has no cheap factors: the change is one whole matrix a run and site, built anew in forward
and backward and never kept (`dense_change`). Factors are stored transposed, A [r, D_in] and B [D_out, r], as the matrix
needs them.

Deviation: LyCORIS draws normally (B₁ 0.1, A 1) with zeros in B₂, and FedPara trains the whole weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftbench.errors import UserError
from peftbench.methods.base import Card, LinearDelta, Method, Targets, Traits, require, uniform
from peftbench.methods.dense_change import add_product
from peftbench.methods.peft_format import SiteFormat, refuse, same, target_modules, targets
from peftbench.models.roles import Site, linear_sites


def _change(b1: Tensor, a1: Tensor, b2: Tensor, a2: Tensor, scale: Tensor) -> Tensor:
    return (b1 @ a1) * (b2 @ a2) * scale


class LohaDelta(LinearDelta):
    """scale · x ((B₁ A₁) ∘ (B₂ A₂))ᵀ beside the frozen product."""

    B1: nn.Parameter
    A1: nn.Parameter
    B2: nn.Parameter
    A2: nn.Parameter
    scale: Tensor

    def __init__(self, site: Site, methods: Sequence[Loha], generators: Sequence[torch.Generator]) -> None:
        super().__init__(len(methods))
        pairs = list(zip(methods, generators, strict=True))
        for side in ("1", "2"):
            self.stack("B" + side, [uniform((site.out_features, m.rank), m.rank**-0.5, g) for m, g in pairs])
            bound = site.in_features**-0.5 if side == "1" else 0.0
            self.stack("A" + side, [uniform((m.rank, site.in_features), bound, g) for m, g in pairs])
        self.constant("scale", [m.alpha / m.rank for m in methods])

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return add_product(_change, x, y, self.B1, self.A1, self.B2, self.A2, self.scale)

    def merged(self, weight: Tensor, bias: Tensor | None, run: int) -> tuple[Tensor, Tensor | None]:
        state = self.run_state(run)
        change = _change(state["B1"], state["A1"], state["B2"], state["A2"], self.scale[run])
        return (weight.float() + change).to(weight.dtype), bias


class LohaFormat(SiteFormat):
    """PEFT's LoHa, which adapts `nn.Linear` alone."""

    peft_type = "LOHA"
    names = {
        "B1": ("hada_w1_a", same, same),
        "A1": ("hada_w1_b", same, same),
        "B2": ("hada_w2_a", same, same),
        "A2": ("hada_w2_b", same, same),
    }

    def config(self, method: Loha, model: nn.Module, sites: Sequence[Site]) -> dict[str, Any]:
        plain_linears(sites)
        return {"r": method.rank, "alpha": method.alpha, "target_modules": target_modules(model, sites)}

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        refuse(config, rank_pattern={}, alpha_pattern={}, rank_dropout=0.0, module_dropout=0.0)
        return {"rank": config["r"], "alpha": float(config["alpha"]), "targets": targets(config)}


def plain_linears(sites: Sequence[Site]) -> None:
    """Raise UserError if a module keeps its weight as [in, out]: PEFT's LyCORIS methods take `nn.Linear` alone."""
    odd = next((site for site in sites if site.transposed), None)
    if odd is not None:
        raise UserError(f"HF PEFT has this method for nn.Linear alone: {odd.name} is a {type(odd.module).__name__}")


@dataclass(frozen=True)
class Loha(Method):
    """Elementwise product of two low-rank products beside frozen linear maps."""

    rank: int = 8
    """Rank of each of the two products; the change's is up to its square."""
    alpha: float = 8.0
    targets: Targets = ("attention.query", "attention.value")

    traits = Traits(
        sites=("linear",),
        mergeable=True,
        identity_at_init=True,
        free_in_pack=frozenset({"rank", "alpha"}),
        cost_free=frozenset({"alpha"}),
    )
    card = Card(
        equation="y = W x + b + (alpha / r) · ((B₁ A₁) ∘ (B₂ A₂)) x",
        paper="Hyeon-Woo et al. 2022, arXiv:2108.06098",
        parameters="2 r (D_in + D_out) a map",
    )
    peft = LohaFormat()

    def __post_init__(self) -> None:
        require(self.rank >= 1, "rank", self.rank, "a whole number of at least 1")
        require(self.alpha > 0, "alpha", self.alpha, "a number above 0")

    def sites(self, model: nn.Module) -> list[Site]:
        return linear_sites(model, self.targets)

    def check_site(self, site: Site) -> None:
        limit = min(site.in_features, site.out_features)
        require(self.rank <= limit, "rank", self.rank, f"at most {limit}, the smaller side of {site.name}")

    @classmethod
    def delta(cls, site: Site, methods: Sequence[Loha], generators: Sequence[torch.Generator]) -> LohaDelta:
        return LohaDelta(site, methods, generators)

    def count(self, site: Site) -> int:
        return 2 * self.rank * (site.in_features + site.out_features)
