"""Full fine-tuning: every parameter of the base trains.

    θ = θ₀ + Δθ,    nothing frozen

The reference every other method is measured against. Parameters of the base train as they are, so runs cannot share a
base and a pack holds one run. The task head is trained beside it and counted apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from peftbench.methods.base import Card, Delta, Method, Traits, base_parameters
from peftbench.models.roles import Site


@dataclass(frozen=True)
class FullFineTuning(Method):
    """Every parameter of the base trains."""

    traits = Traits(sites=("weight",), mergeable=False, identity_at_init=True, packable=False, quantized_base=False)
    card = Card(
        equation="θ = θ₀ + Δθ",
        paper="—",
        parameters="all of the base's",
    )

    def sites(self, model: nn.Module) -> list[Site]:
        return []

    def trained_weights(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return base_parameters(model)

    @classmethod
    def delta(cls, site: Site, methods: Sequence[FullFineTuning], generators: Sequence[torch.Generator]) -> Delta:
        raise AssertionError("full fine-tuning adds nothing at any site")

    def count(self, site: Site) -> int:
        return 0
