"""Houlsby adapters: a small bottleneck network after each sublayer, before the residual sum.

    h' = h + W_up · act(W_down h + b_down) + b_up

Source: Houlsby et al. 2019, arXiv:1902.00751, section 2.1 and figure 2: one adapter after attention and one after the
feed-forward part of every layer; the layers' normalisations train as well (`norms`). Weights start from a normal
distribution with standard deviation 0.01 truncated at two deviations, so a fresh adapter is close to, not exactly, the
identity (section 3.6). Without further word in the paper the nonlinearity is GELU (the base's own in BERT). The adapter
sits on the sublayer's output alone, so nothing depends on where the layer normalises. The `adapters` library's
`double_seq_bn` is the same function with `activation=silu norms=false`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peftbench.methods.base import Card, Delta, Method, NormDelta, Traits, require
from peftbench.methods.bottleneck import (
    BottleneckDelta,
    count_bottleneck,
    require_bottleneck,
    sublayer_sites,
)
from peftbench.models.roles import Site, find_sites


class HoulsbyDelta(BottleneckDelta):
    """h + bottleneck(h)."""

    def read(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        return outputs


def _truncated(shape: Sequence[int], std: float, generator: torch.Generator) -> Tensor:
    """Draw from a normal distribution truncated at two standard deviations."""
    return nn.init.trunc_normal_(torch.empty(*shape), std=std, a=-2 * std, b=2 * std, generator=generator)


@dataclass(frozen=True)
class Houlsby(Method):
    """Bottleneck networks after attention and feed-forward, before the residual sum."""

    bottleneck: int = 64
    activation: str = "gelu"
    norms: bool = True
    init_std: float = 0.01

    traits = Traits(
        sites=("hidden", "norm"),
        mergeable=False,
        identity_at_init=False,
        free_in_pack=frozenset({"bottleneck", "init_std"}),
        cost_free=frozenset({"init_std"}),
    )
    card = Card(
        equation="h' = h + W_up act(W_down h + b_down) + b_up",
        paper="Houlsby et al. 2019, arXiv:1902.00751",
        parameters="2L (2Dr + D + r) + 2D a norm",
    )

    def __post_init__(self) -> None:
        require_bottleneck(self.bottleneck, self.activation)
        require(self.init_std > 0, "init_std", self.init_std, "a number above 0")

    def sites(self, model: nn.Module) -> list[Site]:
        return sublayer_sites(model, ("attention", "mlp")) + (find_sites(model, "norm") if self.norms else [])

    @classmethod
    def delta(cls, site: Site, methods: Sequence[Houlsby], generators: Sequence[torch.Generator]) -> Delta:
        if site.kind == "norm":
            return NormDelta(site, len(methods), weight=True, bias=True)
        pairs = list(zip(methods, generators, strict=True))
        downs = [_truncated((site.width, m.bottleneck), m.init_std, g) for m, g in pairs]
        ups = [_truncated((m.bottleneck, site.width), m.init_std, g) for m, g in pairs]
        return HoulsbyDelta(downs, ups, methods[0].activation)

    def count(self, site: Site) -> int:
        if site.kind == "norm":
            return NormDelta.count(site, weight=True, bias=True)
        return count_bottleneck(self.bottleneck, site)
