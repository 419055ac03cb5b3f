"""LayerNorm tuning: train the scale and the shift of every normalisation and nothing else.

    y = w ⊙ (x - mean(x)) / sqrt(var(x) + ε) + b,    w and b trained, ε fixed

Source: Zhao et al. 2023, arXiv:2312.11420 (in a decoder's attention blocks); Qi et al. 2022, arXiv:2211.08682
(LN-tuning), for BERT. RMS norms, which subtract no mean and have no b, are treated alike, and Gemma's, which scale by
1 + w, train that w. `weight` and `bias` choose which of the two train; both start from the base's own values. All
normalisations with a role are taken: those of every layer, of the embeddings, of queries and keys where a model has
them, and the final one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from peftbench.errors import UserError
from peftbench.methods.base import Card, Method, NormDelta, Traits, require
from peftbench.methods.peft_format import SiteFormat, refuse, same, target_modules
from peftbench.models.roles import Site, find_sites


class LayerNormFormat(SiteFormat):
    """PEFT's LN tuning, which trains whatever parameters a normalisation has."""

    peft_type = "LN_TUNING"
    names = {"weight": ("ln_tuning_layers.weight", same, same), "bias": ("ln_tuning_layers.bias", same, same)}

    def config(self, method: LayerNormTuning, model: nn.Module, sites: Sequence[Site]) -> dict[str, Any]:
        for name in ("weight", "bias"):
            if not getattr(method, name) and any(getattr(site.module, name, None) is not None for site in sites):
                raise UserError(f"method.{name}=False: PEFT trains every parameter of a normalisation: expected True")
        return {"target_modules": target_modules(model, sites)}

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        # Which normalisations the folder holds shows in its tensors: fewer than all of them do not load.
        refuse(config, exclude_modules=None)
        return {}


@dataclass(frozen=True)
class LayerNormTuning(Method):
    """Only the scales and shifts of the normalisations train."""

    weight: bool = True
    bias: bool = True

    traits = Traits(sites=("norm",), mergeable=True, identity_at_init=True)
    card = Card(
        equation="y = w ⊙ norm(x) + b, w and b trained",
        paper="Zhao et al. 2023, arXiv:2312.11420",
        parameters="D a scale, D a shift",
    )
    peft = LayerNormFormat()

    def __post_init__(self) -> None:
        require(self.weight or self.bias, "weight", self.weight, "true where bias is false")

    def sites(self, model: nn.Module) -> list[Site]:
        found = [site for site in find_sites(model, "norm") if self.count(site)]
        if not found:
            raise UserError(
                f"method.weight={self.weight}, bias={self.bias}: no normalisation of {type(model).__name__} has such a "
                "parameter (RMS norms have no bias)"
            )
        return found

    @classmethod
    def delta(cls, site: Site, methods: Sequence[LayerNormTuning], generators: Sequence[torch.Generator]) -> NormDelta:
        return NormDelta(site, len(methods), weight=methods[0].weight, bias=methods[0].bias)

    def count(self, site: Site) -> int:
        return NormDelta.count(site, weight=self.weight, bias=self.bias)
