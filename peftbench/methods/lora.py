"""LoRA: add a trained low-rank product to a frozen weight.

    y = W x + b + (alpha / r) · B A x,    A: r×D_in random, B: D_out×r zero

Source: Hu et al. 2021, arXiv:2106.09685, eq. 3 and section 4.1. Applied by default to the query and value projections
(section 4.2). A is drawn uniformly from ±1/sqrt(D_in), as in the authors' code (the paper says Gaussian); dropout acts
on the adapter's input, as in the authors' code (the paper does not mention it). Factors are stored transposed, A [D_in,
r] and B [r, D_out], so that rows multiply from the left.

Two variants are settings. rsLoRA (Kalajdzievski 2023, arXiv:2312.03732, theorem 3.2) scales by alpha / sqrt(r), which
keeps the update's size as ranks grow. LoRA+ (Hayou, Ghosh and Yu 2024, arXiv:2402.12354, section 4) gives B a learning
rate `b_rate_ratio` times A's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftbench.methods.base import Card, Factors, LowRankDelta, Method, RunDropout, Targets, Traits, require, uniform
from peftbench.methods.peft_format import SiteFormat, fan_in_fan_out, refuse, target_modules, targets, transposed
from peftbench.models.roles import Site, linear_sites


class LoraDelta(LowRankDelta):
    """scale · x A B beside the frozen product."""

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
        self.rate_ratios["B"] = [m.b_rate_ratio for m in methods]
        self.constant("scale", [m.scale for m in methods])
        self.alpha = self.shared_value("scale")
        self.dropout = RunDropout([m.dropout for m in methods])

    def factors(self, dtype: torch.dtype) -> Factors:
        return Factors(self.A, self.B, self.scale, alpha=self.alpha)

    def merged(self, weight: Tensor, bias: Tensor | None, run: int) -> tuple[Tensor, Tensor | None]:
        state = self.run_state(run)
        change = (state["A"] @ state["B"]).T * self.scale[run]
        return (weight.float() + change).to(weight.dtype), bias


VARIANTS: dict[str, Any] = {
    "bias": "none",
    "rank_pattern": {},
    "alpha_pattern": {},
    "lora_bias": False,
    "target_parameters": None,
    "trainable_token_indices": None,
    "layer_replication": None,
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "kasa_config": None,
    "monteclora_config": None,
    "velora_config": None,
    "use_bdlora": None,
    "use_qalora": False,
}
"""Keys of PEFT's LoRA that make another function of it, with the value that leaves it as it is."""
KEEPS_BASE = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
"""Values of PEFT's `init_lora_weights` that leave the base's weights as they are."""


class LoraFormat(SiteFormat):
    """PEFT's LoRA without DoRA and without an initialisation that changes the base."""

    peft_type = "LORA"
    names = {"A": ("lora_A.weight", transposed, transposed), "B": ("lora_B.weight", transposed, transposed)}

    def matches(self, config: Mapping[str, Any]) -> bool:
        keeps = config.get("init_lora_weights") in KEEPS_BASE
        return super().matches(config) and keeps and not config.get("use_dora")

    def config(self, method: Lora, model: nn.Module, sites: Sequence[Site]) -> dict[str, Any]:
        return {
            "r": method.rank,
            "lora_alpha": method.alpha,
            "lora_dropout": method.dropout,
            "use_rslora": method.rank_stabilized,
            "target_modules": target_modules(model, sites),
            "fan_in_fan_out": fan_in_fan_out(sites),
            "bias": "none",
        }

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        refuse(config, **VARIANTS)
        return {
            "rank": config["r"],
            "alpha": float(config["lora_alpha"]),
            "dropout": float(config.get("lora_dropout", 0.0)),
            "rank_stabilized": bool(config.get("use_rslora", False)),
            "targets": targets(config),
        }


@dataclass(frozen=True)
class Lora(Method):
    """Low-rank update beside frozen linear maps: W + (alpha/r)·BA."""

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: Targets = ("attention.query", "attention.value")
    rank_stabilized: bool = False
    b_rate_ratio: float = 1.0

    traits = Traits(
        sites=("linear",),
        mergeable=True,
        identity_at_init=True,
        free_in_pack=frozenset({"rank", "alpha", "dropout", "rank_stabilized", "b_rate_ratio"}),
        cost_free=frozenset({"alpha", "rank_stabilized", "b_rate_ratio"}),
    )
    card = Card(
        equation="y = W x + b + (alpha / r) · B A x",
        paper="Hu et al. 2021, arXiv:2106.09685",
        parameters="r (D_in + D_out) a map",
    )
    peft = LoraFormat()

    def __post_init__(self) -> None:
        require(self.rank >= 1, "rank", self.rank, "a whole number of at least 1")
        require(self.alpha > 0, "alpha", self.alpha, "a number above 0")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "a number in [0, 1)")
        require(self.b_rate_ratio > 0, "b_rate_ratio", self.b_rate_ratio, "a number above 0")

    @property
    def scale(self) -> float:
        """Factor on the product of the factors."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

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
