"""Pfeiffer adapters: one bottleneck network a layer, after the feed-forward part, reading the layer's own result.

    h' = h + W_up · act(W_down u + b_down) + b_up,    u = norm(x + h),    layer output = norm(x + h')

x is the residual stream that enters the feed-forward part, h that part's output.

Source: Pfeiffer et al. 2020, MAD-X, arXiv:2005.00052, eq. 1 and the paragraph below it: the adapter reads the output of
the layer normalisation that follows the feed-forward part (u), its residual connection is the feed-forward part's
output (h), and the frozen normalisation is applied once more to the sum. The place was chosen by search in Pfeiffer et
al. 2021, AdapterFusion, arXiv:2005.00247, whose reduction by 16 (48 of BERT's 768) is the default here. The frozen
normalisations stay frozen.

Beyond the papers, which use BERT and its kin: in models that normalise before the sublayer (GPT-2, Llama) no
normalisation follows the sum, and u = x + h. Weights start from a normal distribution with standard deviation 0.02 and
biases from zero, as BERT's do; the papers do not say. Both agree with the `adapters` library's `seq_bn`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peftbench.methods.base import Card, Delta, Method, Traits, normal, require
from peftbench.methods.bottleneck import (
    BottleneckDelta,
    StreamSite,
    count_bottleneck,
    require_bottleneck,
    stream_sites,
)
from peftbench.models.roles import Site


class PfeifferDelta(BottleneckDelta):
    """h + bottleneck(norm(x + h)), or h + bottleneck(x + h) where no norm follows the sum."""

    norm: nn.Module

    def __init__(self, norm: nn.Module, downs: Sequence[Tensor], ups: Sequence[Tensor], activation: str) -> None:
        super().__init__(downs, ups, activation)
        self.refer("norm", norm)

    def read(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        # the frozen norm, whatever other methods of a pack have put in there
        return type(self.norm).forward(self.norm, inputs + outputs)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Pfeiffer(Method):
    """One bottleneck network a layer, after the feed-forward part and its normalisation."""

    bottleneck: int = 48
    activation: str = "relu"
    init_std: float = 0.02

    traits = Traits(
        sites=("hidden",),
        mergeable=False,
        identity_at_init=False,
        free_in_pack=frozenset({"bottleneck", "init_std"}),
        cost_free=frozenset({"init_std"}),
    )
    card = Card(
        equation="h' = h + W_up act(W_down norm(x + h) + b_down) + b_up",
        paper="Pfeiffer et al. 2020, arXiv:2005.00052; 2021, arXiv:2005.00247",
        parameters="L (2Dr + D + r)",
    )

    def __post_init__(self) -> None:
        require_bottleneck(self.bottleneck, self.activation)
        require(self.init_std > 0, "init_std", self.init_std, "a number above 0")

    def sites(self, model: nn.Module) -> list[Site]:
        return stream_sites(model, ("mlp",))

    @classmethod
    def delta(cls, site: Site, methods: Sequence[Pfeiffer], generators: Sequence[torch.Generator]) -> Delta:
        assert isinstance(site, StreamSite)
        pairs = list(zip(methods, generators, strict=True))
        downs = [normal((site.width, m.bottleneck), m.init_std, g) for m, g in pairs]
        ups = [normal((m.bottleneck, site.width), m.init_std, g) for m, g in pairs]
        return PfeifferDelta(site.norm, downs, ups, methods[0].activation)

    def count(self, site: Site) -> int:
        return count_bottleneck(self.bottleneck, site)
