"""Parallel adapters: a scaled bottleneck network beside the feed-forward part, added to its output.

    h' = h + s · (W_up · act(W_down x + b_down) + b_up)

x is the residual stream that enters the feed-forward part, h that part's output.

Source: He et al. 2022, "Towards a unified view of parameter-efficient transfer learning", arXiv:2110.04366, table 1,
row "Scaled PA": h ← h + s · f(x W_down) W_up, at the feed-forward part, with s = 4 and f = ReLU. It starts as LoRA
does, W_down uniform in ±1/sqrt(D), W_up and both biases zero, so a fresh adapter is the identity. The authors' runs
use s = 4 and 512 of 1024 units for summarisation, s = 2 and 16 of 768 for GLUE; 64 units compare with Houlsby's.

In models that normalise before the sublayer (GPT-2, Llama) x is the stream before that normalisation, as in the
`adapters` library's `par_bn`. Where the layer normalises after the sum, as in the paper's BART and RoBERTa, x is the
feed-forward part's own input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peftbench.methods.base import Card, Delta, Method, Traits, require, uniform
from peftbench.methods.bottleneck import (
    BottleneckDelta,
    count_bottleneck,
    require_bottleneck,
    stream_sites,
)
from peftbench.models.roles import Site


class ParallelDelta(BottleneckDelta):
    """h + s · bottleneck(x)."""

    def read(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        return inputs


@dataclass(frozen=True)
class Parallel(Method):
    """A scaled bottleneck network beside each feed-forward part."""

    bottleneck: int = 64
    scale: float = 4.0
    activation: str = "relu"

    traits = Traits(
        sites=("hidden",),
        mergeable=False,
        identity_at_init=True,
        free_in_pack=frozenset({"bottleneck", "scale"}),
        cost_free=frozenset({"scale"}),
    )
    card = Card(
        equation="h' = h + s (W_up act(W_down x + b_down) + b_up)",
        paper="He et al. 2022, arXiv:2110.04366",
        parameters="L (2Dr + D + r)",
    )

    def __post_init__(self) -> None:
        require_bottleneck(self.bottleneck, self.activation)
        require(self.scale > 0, "scale", self.scale, "a number above 0")

    def sites(self, model: nn.Module) -> list[Site]:
        return stream_sites(model, ("mlp",))

    @classmethod
    def delta(cls, site: Site, methods: Sequence[Parallel], generators: Sequence[torch.Generator]) -> Delta:
        pairs = list(zip(methods, generators, strict=True))
        downs = [uniform((site.width, m.bottleneck), site.width**-0.5, g) for m, g in pairs]
        ups = [torch.zeros(m.bottleneck, site.width) for m in methods]
        return ParallelDelta(downs, ups, methods[0].activation, [m.scale for m in methods])

    def count(self, site: Site) -> int:
        return count_bottleneck(self.bottleneck, site)
