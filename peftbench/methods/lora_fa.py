"""LoRA-FA: LoRA whose first factor stays as it was drawn.

    y = W x + b + (alpha / r) · B A x,    A: r×D_in random and frozen, B: D_out×r zero at first, trained

Source: Zhang et al. 2023, arXiv:2308.03303, version 1. With A frozen the backward pass needs A x, r numbers a row, and
not x, which LoRA has to keep for A's gradient; that holds where nothing else needs x and without dropout, whose mask is
as large. A is drawn as LoRA's is (see `lora`), so the two differ in what trains alone, and only B is saved. Factors are
stored transposed, A [D_in, r] and B [r, D_out].

`corrected` is the paper's version 2: B gets the gradient whose change of the product is closest to what full
fine-tuning's gradient asks for,

    argmin_g ‖s · g A − ∂L/∂W‖_F = (1 / s²) · ∂L/∂B (A Aᵀ)⁻¹,    s = alpha / r

Deviation: HF PEFT has no plain LoRA-FA; its LoRA-FA optimizer always corrects, in bf16, and after the user has clipped.
Here the correction is fp32, and clipping and AdamW see the corrected gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftbench.methods.base import Card, Factors, LowRankDelta, Method, RunDropout, Targets, Traits, require, uniform
from peftbench.methods.peft_format import SiteFormat, fan_in_fan_out, target_modules, transposed
from peftbench.models.roles import Site, linear_sites


class LoraFaDelta(LowRankDelta):
    """scale · x A B beside the frozen product, with A frozen."""

    A: Tensor
    B: nn.Parameter
    scale: Tensor
    correction: Tensor | None

    def __init__(self, site: Site, methods: Sequence[LoraFa], generators: Sequence[torch.Generator]) -> None:
        super().__init__(len(methods))
        bound = site.in_features**-0.5
        self.draw(
            "A", [uniform((site.in_features, m.rank), bound, g) for m, g in zip(methods, generators, strict=True)]
        )
        self.stack("B", [torch.zeros(m.rank, site.out_features) for m in methods])
        self.constant("scale", [m.scale for m in methods])
        self.alpha = self.shared_value("scale")
        self.dropout = RunDropout([m.dropout for m in methods])
        self.corrected = [m.corrected for m in methods]
        self.register_buffer("correction", self._correction(), persistent=False)

    @torch.no_grad()
    def _correction(self) -> Tensor | None:
        """Return what B's gradient [R, r, D_out] is multiplied with from the left, [R, r, r]; None: nothing."""
        if not any(self.corrected):
            return None
        found = torch.eye(self.A.shape[2]).repeat(self.runs, 1, 1)
        for run, corrected in enumerate(self.corrected):
            if corrected:
                a = self.run_drawn(run)["A"].to("cpu", torch.float64)
                rank = a.shape[1]
                found[run, :rank, :rank] = torch.linalg.pinv(a.T @ a, hermitian=True) / self.scale[run].item() ** 2
        return found.to(self.A.device)

    def load_run_state(self, state: dict[str, Tensor], run: int) -> None:
        super().load_run_state(state, run)
        self.correction = self._correction()

    def factors(self, dtype: torch.dtype) -> Factors:
        b: Tensor = self.B
        if self.correction is not None:
            # The same value; its gradient reaches B through the correction.
            b = b.detach() + self.correction @ (b - b.detach())
        return Factors(self.A, b, self.scale, alpha=self.alpha)

    def merged(self, weight: Tensor, bias: Tensor | None, run: int) -> tuple[Tensor, Tensor | None]:
        change = (self.run_drawn(run)["A"] @ self.run_state(run)["B"]).T * self.scale[run]
        return (weight.float() + change).to(weight.dtype), bias


class LoraFaFormat(SiteFormat):
    """Written as PEFT's plain LoRA, which it is once trained, and read as that."""

    peft_type = "LORA"
    names = {"A": ("lora_A.weight", transposed, transposed), "B": ("lora_B.weight", transposed, transposed)}

    def matches(self, config: Mapping[str, Any]) -> bool:
        return False

    def config(self, method: LoraFa, model: nn.Module, sites: Sequence[Site]) -> dict[str, Any]:
        return {
            "r": method.rank,
            "lora_alpha": method.alpha,
            "lora_dropout": method.dropout,
            "target_modules": target_modules(model, sites),
            "fan_in_fan_out": fan_in_fan_out(sites),
            "bias": "none",
        }

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        raise AssertionError("a folder of PEFT's does not say that A was frozen")


@dataclass(frozen=True)
class LoraFa(Method):
    """Low-rank update whose first factor stays random."""

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: Targets = ("attention.query", "attention.value")
    corrected: bool = False

    traits = Traits(
        sites=("linear",),
        mergeable=True,
        identity_at_init=True,
        free_in_pack=frozenset({"rank", "alpha", "dropout", "corrected"}),
        cost_free=frozenset({"alpha"}),
    )
    card = Card(
        equation="y = W x + b + (alpha / r) · B A x, A random and frozen",
        paper="Zhang et al. 2023, arXiv:2308.03303",
        parameters="r D_out a map",
    )
    peft = LoraFaFormat()

    def __post_init__(self) -> None:
        require(self.rank >= 1, "rank", self.rank, "a whole number of at least 1")
        require(self.alpha > 0, "alpha", self.alpha, "a number above 0")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "a number in [0, 1)")

    @property
    def scale(self) -> float:
        """Factor on the product of the factors."""
        return self.alpha / self.rank

    def sites(self, model: nn.Module) -> list[Site]:
        return linear_sites(model, self.targets)

    def check_site(self, site: Site) -> None:
        limit = min(site.in_features, site.out_features)
        require(self.rank <= limit, "rank", self.rank, f"at most {limit}, the smaller side of {site.name}")

    @classmethod
    def delta(cls, site: Site, methods: Sequence[LoraFa], generators: Sequence[torch.Generator]) -> LoraFaDelta:
        return LoraFaDelta(site, methods, generators)

    def count(self, site: Site) -> int:
        return self.rank * site.out_features
