"""RandLoRA: add a full-rank sum of random low-rank products, of which only diagonal scales are trained.

    W' = W + s · Σᵢ Bᵢ Λᵢ A Γᵢ,    i = 1 … n = ⌈d / r⌉,  d the smaller and D the larger side of W

Source: Albert et al. 2025, arXiv:2502.00987, section 4. A: r×d and all Bᵢ: D×r are random, frozen, shared by every site
of a run (drawn for the widest site and sliced) and follow from the run's seed; Λᵢ (r numbers, zero) and Γᵢ (d numbers,
1 / max(n, d)) are trained at each site. Where D_out is the smaller side the whole sum is transposed. Bases have unit
standard deviation; `bases` draws them uniformly, or from -1, 0 and 1 with a chance of 1/6 ("sparse") or 1/(2√d)
("very_sparse") for each sign.

A Γ and B have about d columns each, so the sum is applied in whichever way costs less: over rows as two products, or as
one matrix a run and site, built anew in forward and backward and never kept (`dense_change`).

Deviation: as in the authors' code and HF PEFT's, row ρ of A in term i meets column ρ n + i of B₁ … Bₙ laid side by
side, and not column ρ of Bᵢ; all columns are drawn alike, so only their labels differ. `scale` stands for alpha / r,
for which HF PEFT has 20 and the authors divide by √n too; it is 2 here, with a learning rate ten times as large: the
change's first steps are the same, and half precision has smaller numbers to carry.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftbench.errors import UserError
from peftbench.methods.base import Card, Delta, LinearDelta, Method, RunDropout, Targets, Traits, require, uniform
from peftbench.methods.dense_change import add_product
from peftbench.methods.peft_format import PREFIX, SiteFormat, fan_in_fan_out, refuse, same, target_modules, targets
from peftbench.models.roles import Site, linear_sites

BASES = ("uniform", "sparse", "very_sparse")


class Bases(Delta):
    """A [R, r, largest d] and B [R, largest D, n, r], frozen."""

    A: Tensor
    B: Tensor

    def __init__(
        self, sites: Sequence[Site], methods: Sequence[RandLora], generators: Sequence[torch.Generator]
    ) -> None:
        super().__init__(len(methods))
        widest = max(site.in_features for site in sites), max(site.out_features for site in sites)
        short, long = min(widest), max(widest)
        pairs = list(zip(methods, generators, strict=True))
        self.draw("A", [_basis((m.rank, short), m.bases, short, g) for m, g in pairs])
        self.draw("B", [_basis((long, m.terms(short), m.rank), m.bases, short, g) for m, g in pairs])


def _basis(shape: tuple[int, ...], kind: str, short: int, generator: torch.Generator) -> Tensor:
    """Draw a basis of unit standard deviation."""
    basis = uniform(shape, 1.0, generator)
    if kind != "uniform":
        chance = 1 / 6 if kind == "sparse" else 1 / (2 * math.sqrt(short))
        basis = torch.where(basis.abs() > 1 - 2 * chance, basis.sign(), 0.0)
    deviation = basis.std() if basis.numel() > 1 else torch.tensor(0.0)
    return basis / torch.where(deviation > 0, deviation, 1.0)


class RandLoraDelta(LinearDelta):
    """scale · x (Σᵢ Bᵢ Λᵢ A Γᵢ)ᵀ beside the frozen product."""

    lambda_: nn.Parameter
    gamma: nn.Parameter
    scale: Tensor
    shared: Bases

    def __init__(self, site: Site, methods: Sequence[RandLora], shared: Bases) -> None:
        super().__init__(len(methods))
        self.long, self.short = max(site.out_features, site.in_features), min(site.out_features, site.in_features)
        self.wide = site.out_features < site.in_features
        terms, rank = methods[0].terms(self.short), methods[0].rank
        self.stack("lambda_", [torch.zeros(rank, terms) for _ in methods])
        self.stack("gamma", [torch.full((terms, self.short), 1 / max(terms, self.short)) for _ in methods])
        self.constant("scale", [m.scale for m in methods])
        self.refer("shared", shared)
        self.dropout = RunDropout([m.dropout for m in methods])

    def _bases(self) -> tuple[Tensor, Tensor]:
        """Return this site's part of A [R, r, d] and of B [R, D, n r], its columns term by term."""
        terms = self.gamma.shape[1]
        return self.shared.A[..., : self.short], self.shared.B[:, : self.long, :terms].flatten(2)

    def _scaled(self, lambda_: Tensor, gamma: Tensor, a: Tensor, scale: Tensor) -> Tensor:
        """Return scale · Λᵢ A Γᵢ of all terms [R, r n, d], rows in the order (ρ, i)."""
        rows = (lambda_ * scale).unsqueeze(3) * gamma.unsqueeze(1) * a.unsqueeze(2)
        return rows.flatten(1, 2)

    def change(self, lambda_: Tensor, gamma: Tensor, a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        """Return ΔW [R, D_out, D_in]."""
        whole = b @ self._scaled(lambda_, gamma, a, scale)
        return whole.transpose(1, 2) if self.wide else whole

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        a, b = self._bases()
        x = self.dropout(x)
        # Multiplications of forward and backward: N d (3 d + 2 D) as two products, 3 N d D + 3 d² D as one matrix.
        if x.shape[1] * (3 * self.short - self.long) > 3 * self.short * self.long:
            return add_product(self.change, x, y, self.lambda_, self.gamma, a, b, self.scale)
        scaled = self._scaled(self.lambda_, self.gamma, a, self.scale).to(x.dtype)
        b = b.to(x.dtype)
        if self.wide:
            return torch.baddbmm(y, x @ b, scaled)
        return torch.baddbmm(y, x @ scaled.transpose(1, 2), b.transpose(1, 2))

    def merged(self, weight: Tensor, bias: Tensor | None, run: int) -> tuple[Tensor, Tensor | None]:
        one = slice(run, run + 1)
        a, b = self._bases()
        change = self.change(self.lambda_[one], self.gamma[one], a[one], b[one], self.scale[one])[0]
        return (weight.float() + change).to(weight.dtype), bias


class RandLoraFormat(SiteFormat):
    """PEFT's RandLoRA, with the bases in the file: PEFT's own seed gives others than ours.

    PEFT repeats the bases at every module; here they are written once, which is enough for PEFT to read.
    """

    peft_type = "RANDLORA"
    names = {"lambda_": ("randlora_lambda", same, same), "gamma": ("randlora_gamma", same, same)}

    def config(self, method: RandLora, model: nn.Module, sites: Sequence[Site]) -> dict[str, Any]:
        return {
            "r": method.rank,
            "randlora_alpha": method.scale * method.rank,
            "randlora_dropout": method.dropout,
            "sparse": method.bases == "sparse",
            "very_sparse": method.bases == "very_sparse",
            "save_projection": True,
            "target_modules": target_modules(model, sites),
            "fan_in_fan_out": fan_in_fan_out(sites),
            "bias": "none",
        }

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        refuse(config, bias="none", save_projection=True)
        return {
            "rank": config["r"],
            "scale": config["randlora_alpha"] / config["r"],
            "dropout": float(config.get("randlora_dropout", 0.0)),
            "bases": "very_sparse" if config.get("very_sparse") else "sparse" if config.get("sparse") else "uniform",
            "targets": targets(config),
        }

    def tensors(self, method: RandLora, sites: Sequence[Site], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = super().tensors(method, sites, state)
        if "shared.A" in state:
            found |= {"base_model.randlora_A": state["shared.A"].unsqueeze(1)}
            found |= {"base_model.randlora_B": state["shared.B"]}
        return found

    def state(self, method: RandLora, sites: Sequence[Site], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = super().state(method, sites, tensors)
        for name in ("A", "B"):
            whole = tensors.get(f"base_model.randlora_{name}")
            if whole is None:
                raise UserError(f"the file lacks 'base_model.randlora_{name}': expected bases saved with the adapter")
            for repeated in [k for k in tensors if k.startswith(PREFIX) and k.endswith(f".randlora_{name}")]:
                if not torch.equal(tensors[repeated], whole):
                    raise UserError(f"{repeated}: expected the same basis as base_model.randlora_{name}")
                # Taken out so that what is left are the names that `tensors` gives.
                cast(dict[str, Tensor], tensors).pop(repeated)
            found[f"shared.{name}"] = whole.squeeze(1) if name == "A" else whole
        return found


@dataclass(frozen=True)
class RandLora(Method):
    """Trained diagonal scales of random low-rank products that sum to full rank."""

    rank: int = 32
    """Rank of each random product; the fewer, the more of them and the more parameters."""
    scale: float = 2.0
    """Factor on the sum: HF PEFT's alpha over its r."""
    dropout: float = 0.0
    bases: str = "uniform"
    targets: Targets = ("attention.query", "attention.value")

    traits = Traits(
        sites=("linear",),
        mergeable=True,
        identity_at_init=True,
        free_in_pack=frozenset({"scale", "dropout", "bases"}),
        cost_free=frozenset({"scale", "bases"}),
    )
    card = Card(
        equation="y = W x + b + s · Σᵢ Bᵢ Λᵢ A Γᵢ x,  A and Bᵢ random, frozen, shared by all sites",
        paper="Albert et al. 2025, arXiv:2502.00987",
        parameters="⌈d / r⌉ (r + d) a map, d the smaller of D_in and D_out",
    )
    peft = RandLoraFormat()

    def __post_init__(self) -> None:
        require(self.rank >= 1, "rank", self.rank, "a whole number of at least 1")
        require(self.scale > 0, "scale", self.scale, "a number above 0")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "a number in [0, 1)")
        require(self.bases in BASES, "bases", self.bases, f"one of {', '.join(BASES)}")

    def terms(self, short: int) -> int:
        """Return how many products it takes to full rank of a map with this smaller side."""
        return -(-short // self.rank)

    def sites(self, model: nn.Module) -> list[Site]:
        return linear_sites(model, self.targets)

    @classmethod
    def build(
        cls, sites: Sequence[Site], methods: Sequence[RandLora], generators: Sequence[torch.Generator]
    ) -> tuple[list[Delta], Delta | None]:
        shared = Bases(sites, methods, generators)
        return [RandLoraDelta(site, methods, shared) for site in sites], shared

    def count(self, site: Site) -> int:
        short = min(site.in_features, site.out_features)
        return self.terms(short) * (self.rank + short)
