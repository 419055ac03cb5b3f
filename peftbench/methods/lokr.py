"""LoKr: add a Kronecker product of a small matrix and a low-rank one to a frozen weight.

    W' = W + (alpha / r) · W₁ ⊗ W₂,    W₁: o₁×i₁,  W₂ = B₂ A₂: o₂×i₂ of rank r,  o₁ o₂ = D_out,  i₁ i₂ = D_in

Source: Edalati et al. 2022 (KronA), arXiv:2212.10650, with the low-rank factor of LyCORIS (Yeh et al. 2024,
arXiv:2309.14859). Each side D is split into the two divisors nearest √D, or with `factor` > 0 into
`factor` and the rest if it divides D, else at the largest divisor up to `factor`. W₂ stays whole where r is no less
than half its longer side; W₁ is split too, as B₁ A₁, if `decompose_both` is on and r less than half its longer side.
The product is never built: with x as [i₁, i₂] it is W₁ x W₂ᵀ, low-rank factors first.

W₁ (or B₁) is zero at first and the rest uniform within 1/√columns, HF PEFT's way.

Deviation: LyCORIS leaves alpha / r out where both factors are whole, and starts with zeros in W₂ instead; KronA has a
free scale and no low-rank factor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftbench.methods.base import Card, LinearDelta, Method, Targets, Traits, require, uniform
from peftbench.methods.loha import plain_linears
from peftbench.methods.peft_format import SiteFormat, refuse, same, target_modules, targets
from peftbench.models.roles import Site, linear_sites


def split(size: int, factor: int) -> tuple[int, int]:
    """Return the two divisors of `size` that W₁ and W₂ take (see the module)."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    largest = math.isqrt(size) if factor < 0 else min(factor, math.isqrt(size))
    first = next(d for d in range(largest, 0, -1) if size % d == 0)
    return first, size // first


class LokrDelta(LinearDelta):
    """scale · W₁ x W₂ᵀ beside the frozen product, x and y seen as [i₁, i₂] and [o₁, o₂]."""

    scale: Tensor

    def __init__(self, site: Site, methods: Sequence[Lokr], generators: Sequence[torch.Generator]) -> None:
        super().__init__(len(methods))
        for name, (rows, columns) in methods[0].shapes(site).items():
            bound = 0.0 if name in ("W1", "B1") else columns**-0.5
            self.stack(name, [uniform((rows, columns), bound, g) for g in generators])
        self.constant("scale", [m.alpha / m.rank for m in methods])

    def factors(self, side: str) -> list[Tensor]:
        """Return W₁ or W₂ [R, o, i] as it is, or as its factors B, A."""
        names = ["W" + side] if "W" + side in self.shapes else ["B" + side, "A" + side]
        return [getattr(self, name) for name in names]

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        left, right = self.factors("1"), self.factors("2")
        left[0] = left[0] * self.scale
        x = x.unflatten(2, (left[-1].shape[2], right[-1].shape[2]))
        for factor in right[:0:-1]:
            x = _times(x, factor)
        x = x.transpose(2, 3)
        for factor in reversed(left):
            x = _times(x, factor)
        last = right[0].to(x.dtype).transpose(1, 2)
        rows = x.transpose(2, 3).flatten(1, 2)
        return torch.baddbmm(y.reshape(*rows.shape[:2], -1), rows, last).reshape(y.shape)

    def merged(self, weight: Tensor, bias: Tensor | None, run: int) -> tuple[Tensor, Tensor | None]:
        left, right = (
            torch.linalg.multi_dot(parts) if len(parts) > 1 else parts[0]
            for parts in ([factor[run] for factor in self.factors(side)] for side in ("1", "2"))
        )
        change = torch.kron(left.contiguous(), right.contiguous()) * self.scale[run]
        return (weight.float() + change).to(weight.dtype), bias


def _times(x: Tensor, factor: Tensor) -> Tensor:
    """Multiply rows: x [R, N, k, i], factor [R, o, i] → [R, N, k, o]."""
    return (x.flatten(1, 2) @ factor.to(x.dtype).transpose(1, 2)).unflatten(1, x.shape[1:3])


class LokrFormat(SiteFormat):
    """PEFT's LoKr, which adapts `nn.Linear` alone."""

    peft_type = "LOKR"
    names = {
        "W1": ("lokr_w1", same, same),
        "B1": ("lokr_w1_a", same, same),
        "A1": ("lokr_w1_b", same, same),
        "W2": ("lokr_w2", same, same),
        "B2": ("lokr_w2_a", same, same),
        "A2": ("lokr_w2_b", same, same),
    }

    def config(self, method: Lokr, model: nn.Module, sites: Sequence[Site]) -> dict[str, Any]:
        plain_linears(sites)
        return {
            "r": method.rank,
            "alpha": method.alpha,
            "decompose_factor": method.factor,
            "decompose_both": method.decompose_both,
            "target_modules": target_modules(model, sites),
        }

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        refuse(config, rank_pattern={}, alpha_pattern={}, rank_dropout=0.0, module_dropout=0.0)
        return {
            "rank": config["r"],
            "alpha": float(config["alpha"]),
            "factor": config.get("decompose_factor", -1),
            "decompose_both": bool(config.get("decompose_both", False)),
            "targets": targets(config),
        }


@dataclass(frozen=True)
class Lokr(Method):
    """Kronecker product of a small matrix and a low-rank one beside frozen linear maps."""

    rank: int = 8
    alpha: float = 8.0
    factor: int = -1
    """Size of W₁ along each side where it divides it; -1: near the square root."""
    decompose_both: bool = False
    """Split W₁ into low-rank factors too."""
    targets: Targets = ("attention.query", "attention.value")

    traits = Traits(
        sites=("linear",),
        mergeable=True,
        identity_at_init=True,
        free_in_pack=frozenset({"alpha"}),
        cost_free=frozenset({"alpha"}),
    )
    card = Card(
        equation="y = W x + b + (alpha / r) · (W₁ ⊗ B₂ A₂) x",
        paper="Yeh et al. 2024, arXiv:2309.14859",
        parameters="o₁ i₁ + r (o₂ + i₂) a map, o₁ o₂ = D_out, i₁ i₂ = D_in",
    )
    peft = LokrFormat()

    def __post_init__(self) -> None:
        require(self.rank >= 1, "rank", self.rank, "a whole number of at least 1")
        require(self.alpha > 0, "alpha", self.alpha, "a number above 0")
        require(self.factor == -1 or self.factor >= 1, "factor", self.factor, "-1 or a whole number of at least 1")

    def shapes(self, site: Site) -> dict[str, tuple[int, int]]:
        """Return name and shape [o, i] of every factor at `site`, W₁ and W₂ or their own factors B, A."""
        sides = zip(split(site.out_features, self.factor), split(site.in_features, self.factor), strict=True)
        found: dict[str, tuple[int, int]] = {}
        for number, ((rows, columns), splits) in enumerate(zip(sides, (self.decompose_both, True), strict=True), 1):
            if splits and 2 * self.rank < max(rows, columns):
                found |= {f"B{number}": (rows, self.rank), f"A{number}": (self.rank, columns)}
            else:
                found[f"W{number}"] = rows, columns
        return found

    def sites(self, model: nn.Module) -> list[Site]:
        return linear_sites(model, self.targets)

    @classmethod
    def delta(cls, site: Site, methods: Sequence[Lokr], generators: Sequence[torch.Generator]) -> LokrDelta:
        return LokrDelta(site, methods, generators)

    def count(self, site: Site) -> int:
        return sum(rows * columns for rows, columns in self.shapes(site).values())
