"""VeRA: scale the rows of two random matrices that all adapted maps share, and train the scales alone.

    y = W x + b₀ + b ⊙ (B (d ⊙ (A x))),    A: r×D_in and B: D_out×r random and frozen, d = d_init, b = 0

Source: Kopiczko, Blankevoort and Asano 2024, arXiv:2310.11454, eq. 2 and section 3.2. One pair A, B a run serves every
site; it is drawn for the largest input and output among them, and a smaller site uses its first columns of A and rows
of B. It follows from the run's seed and is not saved. Entries are uniform with variance 2 / (columns), He et al.'s
initialisation (section 3.2), which keeps the product's size for any rank.

Deviation: where sites differ in width the paper does not say how they share; slicing is HF PEFT's way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftbench.errors import UserError
from peftbench.methods.base import (
    Card,
    Delta,
    Factors,
    LowRankDelta,
    Method,
    RunDropout,
    Targets,
    Traits,
    require,
    uniform,
)
from peftbench.methods.peft_format import SiteFormat, fan_in_fan_out, refuse, same, target_modules, targets
from peftbench.models.roles import Site, linear_sites


class Projections(Delta):
    """A [R, r, largest D_in] and B [R, largest D_out, r], frozen."""

    A: Tensor
    B: Tensor

    def __init__(self, sites: Sequence[Site], methods: Sequence[Vera], generators: Sequence[torch.Generator]) -> None:
        super().__init__(len(methods))
        widest = max(site.in_features for site in sites), max(site.out_features for site in sites)
        pairs = list(zip(methods, generators, strict=True))
        self.draw("A", [_kaiming(m.rank, widest[0], g) for m, g in pairs])
        self.draw("B", [_kaiming(widest[1], m.rank, g) for m, g in pairs])


def _kaiming(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return uniform((rows, columns), math.sqrt(6 / columns), generator)


class VeraDelta(LowRankDelta):
    """b ⊙ (B (d ⊙ (A x))) beside the frozen product."""

    b: nn.Parameter
    d: nn.Parameter
    shared: Projections

    def __init__(self, site: Site, methods: Sequence[Vera], shared: Projections) -> None:
        super().__init__(len(methods))
        self.stack("b", [torch.zeros(site.out_features) for _ in methods])
        self.stack("d", [torch.full((m.rank,), m.d_init) for m in methods])
        self.refer("shared", shared)
        self.widths = site.in_features, site.out_features
        self.dropout = RunDropout([m.dropout for m in methods])

    def _projections(self) -> tuple[Tensor, Tensor]:
        """Return this site's part of A [R, r, D_in] and B [R, D_out, r]."""
        columns, rows = self.widths
        return self.shared.A[..., :columns], self.shared.B[:, :rows]

    def factors(self, dtype: torch.dtype) -> Factors:
        a, b = self._projections()
        return Factors(a.transpose(1, 2), b.transpose(1, 2) * self.b.unsqueeze(1), inner=self.d)

    def merged(self, weight: Tensor, bias: Tensor | None, run: int) -> tuple[Tensor, Tensor | None]:
        a, b = (part[run] for part in self._projections())
        change = (self.b[run].unsqueeze(1) * b) @ (self.d[run].unsqueeze(1) * a)
        return (weight.float() + change).to(weight.dtype), bias


class VeraFormat(SiteFormat):
    """PEFT's VeRA, with the projections in the file: PEFT's own seed gives others than ours."""

    peft_type = "VERA"
    names = {"b": ("vera_lambda_b", same, same), "d": ("vera_lambda_d", same, same)}
    shared = {"shared.A": "base_model.vera_A", "shared.B": "base_model.vera_B"}

    def config(self, method: Vera, model: nn.Module, sites: Sequence[Site]) -> dict[str, Any]:
        return {
            "r": method.rank,
            "d_initial": method.d_init,
            "vera_dropout": method.dropout,
            "save_projection": True,
            "target_modules": target_modules(model, sites),
            "fan_in_fan_out": fan_in_fan_out(sites),
            "bias": "none",
        }

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        refuse(config, bias="none", save_projection=True)
        return {
            "rank": config["r"],
            "d_init": config.get("d_initial", 0.1),
            "dropout": float(config.get("vera_dropout", 0.0)),
            "targets": targets(config),
        }

    def tensors(self, method: Vera, sites: Sequence[Site], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        drawn = {theirs: state[ours] for ours, theirs in self.shared.items() if ours in state}
        return super().tensors(method, sites, state) | drawn

    def state(self, method: Vera, sites: Sequence[Site], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        missing = [theirs for theirs in self.shared.values() if theirs not in tensors]
        if missing:
            raise UserError(f"the file lacks {missing[0]!r}: expected projections saved with the adapter")
        return super().state(method, sites, tensors) | {ours: tensors[theirs] for ours, theirs in self.shared.items()}


@dataclass(frozen=True)
class Vera(Method):
    """Trained scales around frozen random matrices shared by all sites."""

    rank: int = 256
    d_init: float = 0.1
    dropout: float = 0.0
    targets: Targets = ("attention.query", "attention.value")

    traits = Traits(
        sites=("linear",),
        mergeable=True,
        identity_at_init=True,
        free_in_pack=frozenset({"rank", "d_init", "dropout"}),
        cost_free=frozenset({"d_init"}),
    )
    card = Card(
        equation="y = W x + b₀ + b ⊙ (B (d ⊙ (A x))),  A and B random, frozen, shared by all sites",
        paper="Kopiczko et al. 2024, arXiv:2310.11454",
        parameters="D_out + r a map",
    )
    peft = VeraFormat()

    def __post_init__(self) -> None:
        require(self.rank >= 1, "rank", self.rank, "a whole number of at least 1")
        require(self.d_init != 0, "d_init", self.d_init, "a number other than 0 (d and b would never train)")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "a number in [0, 1)")

    def sites(self, model: nn.Module) -> list[Site]:
        return linear_sites(model, self.targets)

    @classmethod
    def build(
        cls, sites: Sequence[Site], methods: Sequence[Vera], generators: Sequence[torch.Generator]
    ) -> tuple[list[Delta], Delta | None]:
        shared = Projections(sites, methods, generators)
        return [VeraDelta(site, methods, shared) for site in sites], shared

    def count(self, site: Site) -> int:
        return site.out_features + self.rank
