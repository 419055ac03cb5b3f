"""MiSS: add one small trained matrix to every shard of a frozen weight.

    y = W x + b + Dᵀ · Σ_k x_k,    x = (x_1, …, x_K) in shards of width r,    D: r×D_out zero

Source: Kang and Yin 2025, arXiv:2409.15371 (versions 8 and later; earlier ones call it Bone and DiSHA). The update of
W repeats Dᵀ along the inputs; since all shards share it, the shards of x are summed first and multiplied once. This is
the paper's efficient form, and the default of PEFT's `miss`: unlike Bat, which multiplies D into W itself, it needs no
second product with W and leaves W in whatever form it is stored. A last shard that is not full is taken as filled up
with zeros. Dropout acts on x.

Why it is here beside the many other changes of LoRA: one matrix instead of two, so no product of two trained factors
whose scales trade off, and no scale to tune.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftbench.errors import UserError
from peftbench.methods.base import Card, LinearDelta, Method, RunDropout, Targets, Traits, require
from peftbench.methods.peft_format import SiteFormat, refuse, same, target_modules, targets
from peftbench.models.roles import Site, linear_sites


class MissDelta(LinearDelta):
    """(Σ_k x_k) D beside the frozen product."""

    D: nn.Parameter

    def __init__(self, site: Site, methods: Sequence[MiSS]) -> None:
        super().__init__(len(methods))
        self.rank = methods[0].rank
        self.stack("D", [torch.zeros(self.rank, site.out_features)] * len(methods))
        self.dropout = RunDropout([m.dropout for m in methods])

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        x = nn.functional.pad(self.dropout(x), (0, -x.shape[-1] % self.rank))
        return torch.baddbmm(y, x.unflatten(-1, (-1, self.rank)).sum(dim=-2), self.D.to(x.dtype))

    def merged(self, weight: Tensor, bias: Tensor | None, run: int) -> tuple[Tensor, Tensor | None]:
        change = self.D[run].T.repeat(1, -(-weight.shape[1] // self.rank))
        return (weight.float() + change[:, : weight.shape[1]]).to(weight.dtype), bias


class MissFormat(SiteFormat):
    """PEFT's MiSS in its default form; PEFT adapts `nn.Linear` alone."""

    peft_type = "MISS"
    names = {"D": ("miss_block", same, same)}

    def config(self, method: MiSS, model: nn.Module, sites: Sequence[Site]) -> dict[str, Any]:
        other = next((site for site in sites if site.transposed), None)
        if other is not None:
            raise UserError(f"{other.name} is a Conv1D, which PEFT's MISS does not adapt: expected nn.Linear")
        return {
            "r": method.rank,
            "miss_dropout": method.dropout,
            "target_modules": target_modules(model, sites),
            "init_weights": True,
            "bias": "none",
        }

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        refuse(config, bias="none")
        if isinstance(config.get("init_weights"), str):
            refuse(config, init_weights=True)  # "bat" and "mini" are methods of their own
        return {
            "rank": config["r"],
            "dropout": float(config.get("miss_dropout", 0.0)),
            "targets": targets(config),
        }


@dataclass(frozen=True)
class MiSS(Method):
    """One small matrix shared by all shards of a frozen weight."""

    rank: int = 16
    dropout: float = 0.0
    targets: Targets = ("attention.query", "attention.value")

    traits = Traits(sites=("linear",), mergeable=True, identity_at_init=True, free_in_pack=frozenset({"dropout"}))
    card = Card(
        equation="y = W x + b + Dᵀ · Σ_k x_k",
        paper="Kang and Yin 2025, arXiv:2409.15371",
        parameters="r D_out a map",
    )
    peft = MissFormat()

    def __post_init__(self) -> None:
        require(self.rank >= 1, "rank", self.rank, "a whole number of at least 1")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "a number in [0, 1)")

    def sites(self, model: nn.Module) -> list[Site]:
        return linear_sites(model, self.targets)

    def check_site(self, site: Site) -> None:
        width = site.in_features
        require(self.rank <= width, "rank", self.rank, f"at most {width}, the input width of {site.name}")

    @classmethod
    def delta(cls, site: Site, methods: Sequence[MiSS], generators: Sequence[torch.Generator]) -> MissDelta:
        return MissDelta(site, methods)

    def count(self, site: Site) -> int:
        return self.rank * site.out_features
