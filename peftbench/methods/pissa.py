"""PiSSA: a low-rank update that starts from the weight's principal singular values and vectors.

    y = W x + b + s · (B A − B₀ A₀) x,    s = alpha / r,    W = U Σ Vᵀ
    A₀ = √(Σ_r / s) V_rᵀ,    B₀ = U_r √(Σ_r / s),    A, B start at A₀, B₀

Source: Meng, Wang and Zhang 2024, arXiv:2404.02948, eq. 2 to 4, where alpha = r and the frozen weight is the residual
W − B₀ A₀. Here W itself stays as it is, so that a base can be shared and stored in 4 bits, and the difference is taken
between the factors,

    B A − B₀ A₀ = (B − B₀) A + B₀ (A − A₀),

which is exactly zero at first and keeps its digits in half precision: it is a LoRA of rank 2r. A₀ and B₀ follow from W
and are not saved. An SVD leaves the sign of a pair of singular vectors open: the right one's largest entry is positive.

Deviation: on a quantized base the paper quantizes the residual; here the base is quantized as for any method, and the
singular vectors are those of the quantized weight. Dropout acts on the difference's input, so a fresh adapter changes
nothing in training either; HF PEFT drops from B A x but not from B₀ A₀ x. The paper trains without dropout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftbench.methods.base import Card, Factors, LowRankDelta, Method, RunDropout, Targets, Traits, require
from peftbench.methods.lora import VARIANTS
from peftbench.methods.peft_format import SiteFormat, fan_in_fan_out, refuse, target_modules, targets, transposed
from peftbench.models.roles import Site, linear_sites


@torch.no_grad()
def principal_factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return √Σ_r V_rᵀ [r, in] and U_r √Σ_r [out, r] of a weight [out, in]; their product is its best rank-r part."""
    u, sigma, v = torch.linalg.svd(weight, full_matrices=False)
    u, root, v = u[:, :rank], sigma[:rank].sqrt(), v[:rank]
    largest = v.gather(1, v.abs().argmax(dim=1, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0)
    return sign * root[:, None] * v, u * root * sign.T


class PissaDelta(LowRankDelta):
    """scale · x (A B − A₀ B₀) beside the frozen product; factors transposed, A [R, D_in, r] and B [R, r, D_out]."""

    A: nn.Parameter
    B: nn.Parameter
    A0: Tensor
    B0: Tensor
    scale: Tensor

    def __init__(self, site: Site, methods: Sequence[Pissa]) -> None:
        super().__init__(len(methods))
        scales = [m.alpha / m.rank for m in methods]
        a, b = (t.cpu() for t in principal_factors(site.dense_weight(), max(m.rank for m in methods)))
        self.stack("A", [a[: m.rank].T / s**0.5 for m, s in zip(methods, scales, strict=True)])
        self.stack("B", [b[:, : m.rank].T / s**0.5 for m, s in zip(methods, scales, strict=True)])
        self.register_buffer("A0", self.A.detach().clone(), persistent=False)
        self.register_buffer("B0", self.B.detach().clone(), persistent=False)
        self.constant("scale", scales)
        self.alpha = self.shared_value("scale")
        self.dropout = RunDropout([m.dropout for m in methods])

    def _joined(self) -> tuple[Tensor, Tensor]:
        """Return [A | A − A₀], [R, D_in, 2r], and [B − B₀ ; B₀], [R, 2r, D_out]: their product is A B − A₀ B₀."""
        return torch.cat([self.A, self.A - self.A0], dim=2), torch.cat([self.B - self.B0, self.B0], dim=1)

    def factors(self, dtype: torch.dtype) -> Factors:
        return Factors(*self._joined(), self.scale, alpha=self.alpha)

    def merged(self, weight: Tensor, bias: Tensor | None, run: int) -> tuple[Tensor, Tensor | None]:
        a, b = self._joined()
        return (weight.float() + (a[run] @ b[run]).T * self.scale[run]).to(weight.dtype), bias


class PissaFormat(SiteFormat):
    """PEFT's LoRA with `init_lora_weights="pissa"`: A and B are the same, B₀ A₀ is taken off the base as it loads."""

    peft_type = "LORA"
    note = "dropout on the whole difference's input"
    names = {"A": ("lora_A.weight", transposed, transposed), "B": ("lora_B.weight", transposed, transposed)}

    def matches(self, config: Mapping[str, Any]) -> bool:
        return super().matches(config) and config.get("init_lora_weights") == "pissa" and not config.get("use_dora")

    def config(self, method: Pissa, model: nn.Module, sites: Sequence[Site]) -> dict[str, Any]:
        return {
            "r": method.rank,
            "lora_alpha": method.alpha,
            "lora_dropout": method.dropout,
            "init_lora_weights": "pissa",
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


@dataclass(frozen=True)
class Pissa(Method):
    """Low-rank update that starts from the weight's principal singular vectors."""

    rank: int = 8
    alpha: float = 8.0
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
        equation="y = W x + b + (alpha / r) · (B A − B₀ A₀) x",
        paper="Meng et al. 2024, arXiv:2404.02948",
        parameters="r (D_in + D_out) a map",
    )
    peft = PissaFormat()

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
    def delta(cls, site: Site, methods: Sequence[Pissa], generators: Sequence[torch.Generator]) -> PissaDelta:
        return PissaDelta(site, methods)

    def count(self, site: Site) -> int:
        return self.rank * (site.in_features + site.out_features)
