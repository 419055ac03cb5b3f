"""DoRA: train a weight's magnitude and its direction apart, the direction by a low-rank update.

    W' = m ⊙ V / ‖V‖,    V = W + (alpha / r) · B A,    ‖V‖: one norm per output feature,    m = ‖W‖ at first
    y  = W x + b + (g − 1) ⊙ (W x) + g ⊙ (alpha / r) · B A x,    g = m / ‖V‖

Source: Liu et al. 2024, arXiv:2402.09353, eq. 5; the norm is a constant to the backward pass (section 4.3). The second
line is the first without a dense V: the frozen product is there already, and the norm follows from the factors,

    ‖V‖² = ‖W‖² + Σ_r s B ∘ (2 W Aᵀ + s B A Aᵀ),    s = alpha / r, Σ_r: over the rank,

whose one large product W Aᵀ costs D_out·D_in·r a step, however many rows there are. It is taken in the precision that
the pass computes with; all else about the norm is fp32. Factors are stored transposed, as in LoRA.

Deviation: dropout acts on the low-rank part's input alone. HF PEFT drops from the frozen product's input too, where it
is scaled by g − 1, which takes a second product with W; the paper does not mention dropout. Without it both agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftbench.kernels.piecewise import Terms
from peftbench.kernels.weight_rows import norms
from peftbench.methods.base import Card, Factors, LowRankDelta, Method, RunDropout, Targets, Traits, require, uniform
from peftbench.methods.lora import KEEPS_BASE, VARIANTS
from peftbench.methods.peft_format import SiteFormat, fan_in_fan_out, refuse, same, target_modules, targets, transposed
from peftbench.models.roles import Site, linear_sites

CHEAP_AGAIN = ("attention.query", "attention.key", "attention.value", "attention.output")
"""Roles whose output, which the magnitude's gradient needs, is made again: narrow, and kept by nobody else as it is
before the gain and rotary positions."""


class DoraDelta(LowRankDelta):
    """g ⊙ (W x + scale · x A B), where g = magnitude / norm."""

    A: nn.Parameter
    B: nn.Parameter
    magnitude: nn.Parameter
    scale: Tensor
    square: Tensor

    def __init__(self, site: Site, methods: Sequence[Dora], generators: Sequence[torch.Generator]) -> None:
        super().__init__(len(methods))
        self.site = site
        bound = site.in_features**-0.5
        self.stack(
            "A", [uniform((site.in_features, m.rank), bound, g) for m, g in zip(methods, generators, strict=True)]
        )
        self.stack("B", [torch.zeros(m.rank, site.out_features) for m in methods])
        norm = site.dense_weight().norm(dim=1)
        self.stack("magnitude", [norm] * self.runs)
        # Squared from the rounded norm: its root is the fresh magnitude to the last bit, and g is one. Above zero for a
        # row without weights.
        square = norm.square().clamp(min=torch.finfo(torch.float32).tiny)
        self.register_buffer("square", square, persistent=False)
        self.constant("scale", [m.alpha / m.rank for m in methods])
        self.alpha = self.shared_value("scale")
        self.keep_output = site.role not in CHEAP_AGAIN
        self.dropout = RunDropout([m.dropout for m in methods])

    @torch.no_grad()
    def norm(self, dtype: torch.dtype) -> Tensor:
        """Return ‖W + BA‖ per output feature, [R, D_out], with the product W A taken in `dtype`."""
        # Where BA cancels W, the difference has no digits left; this far down g stays bounded instead.
        floor = torch.finfo(dtype).eps
        return norms(self.site.dense_weight(dtype), self.A, self.B, self.scale, self.square, floor)

    def factors(self, dtype: torch.dtype) -> Factors:
        gain = self.magnitude / self.norm(dtype)
        return Factors(self.A, self.B, self.scale, gain=gain, keep_output=self.keep_output, alpha=self.alpha)

    def gain(self, dtype: torch.dtype) -> Tensor:
        """Return g − 1, [R, 1, D_out]; its distance from zero keeps its digits in half precision, g would not."""
        return (self.magnitude / self.norm(dtype) - 1).unsqueeze(1).to(dtype)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        z = torch.baddbmm(y, self.dropout(x) @ self.A.to(x.dtype), (self.B * self.scale).to(x.dtype))
        gain, bias = self.gain(y.dtype), self.site.dense_bias(y.dtype)
        return torch.addcmul(z if bias is None else z - gain * bias, gain, z)

    def linear_terms(self, dtype: torch.dtype) -> Terms | None:
        if self.dropout.acts:
            return None
        change, bias = self.magnitude / self.norm(dtype) - 1, self.site.dense_bias(torch.float32)
        return Terms(
            a=self.A, b=self.B, scale=self.scale, change=change, shift=None if bias is None else -change * bias
        )

    def merged(self, weight: Tensor, bias: Tensor | None, run: int) -> tuple[Tensor, Tensor | None]:
        state = self.run_state(run)
        directed = weight.float() + (state["A"] @ state["B"]).T * self.scale[run]
        norm = directed.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
        return (directed * (state["magnitude"] / norm)[:, None]).to(weight.dtype), bias


class DoraFormat(SiteFormat):
    """PEFT's LoRA with `use_dora`."""

    peft_type = "LORA"
    note = "dropout on the low-rank part's input alone"
    names = {
        "A": ("lora_A.weight", transposed, transposed),
        "B": ("lora_B.weight", transposed, transposed),
        "magnitude": ("lora_magnitude_vector", same, same),
    }

    def matches(self, config: Mapping[str, Any]) -> bool:
        keeps = config.get("init_lora_weights") in KEEPS_BASE
        return super().matches(config) and keeps and bool(config.get("use_dora"))

    def config(self, method: Dora, model: nn.Module, sites: Sequence[Site]) -> dict[str, Any]:
        return {
            "r": method.rank,
            "lora_alpha": method.alpha,
            "lora_dropout": method.dropout,
            "use_dora": True,
            "target_modules": target_modules(model, sites),
            "fan_in_fan_out": fan_in_fan_out(sites),
            "bias": "none",
        }

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        refuse(config, use_rslora=False, **VARIANTS)
        return {
            "rank": config["r"],
            "alpha": float(config["lora_alpha"]),
            "dropout": float(config.get("lora_dropout", 0.0)),
            "targets": targets(config),
        }

    def parameters(self, method: Any, sites: Sequence[Site], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        tensors = self.tensors(method, sites, state)
        return {f"{n}.weight" if n.endswith("magnitude_vector") else n: t for n, t in tensors.items()}


@dataclass(frozen=True)
class Dora(Method):
    """Low-rank update of a weight's direction beside a trained magnitude."""

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
    card = Card(
        equation="W' = m ⊙ V / ‖V‖,  V = W + (alpha / r) · B A",
        paper="Liu et al. 2024, arXiv:2402.09353",
        parameters="r (D_in + D_out) + D_out a map",
    )
    peft = DoraFormat()

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
    def delta(cls, site: Site, methods: Sequence[Dora], generators: Sequence[torch.Generator]) -> DoraDelta:
        return DoraDelta(site, methods, generators)

    def count(self, site: Site) -> int:
        return self.rank * (site.in_features + site.out_features) + site.out_features
