"""Houlsby adapters: a small bottleneck network after each sublayer, before the residual sum.

    h' = h + W_up · act(W_down h + b_down) + b_up

Source: Houlsby et al. 2019, arXiv:1902.00751, section 2.1 and figure 2: one adapter after attention and one after the
feed-forward part of every layer; the layers' normalisations train as well (`norms`). Weights start from a normal
distribution with standard deviation 0.01 truncated at two deviations, so a fresh adapter is close to, not exactly, the
identity (section 3.6). Without further word in the paper the nonlinearity is GELU (the base's own in BERT).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peftbench.methods.base import Delta, HiddenDelta, Method, NormDelta, Traits, require
from peftbench.models.roles import Site, find_sites

# Each maps 0 to 0, so that padded bottleneck units of a pack stay silent.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": nn.functional.gelu,
    "relu": nn.functional.relu,
    "silu": nn.functional.silu,
    "tanh": torch.tanh,
}


class BottleneckDelta(HiddenDelta):
    """outputs + up(act(down(outputs)))."""

    down: nn.Parameter
    down_bias: nn.Parameter
    up: nn.Parameter
    up_bias: nn.Parameter

    def __init__(self, site: Site, methods: Sequence[Houlsby], generators: Sequence[torch.Generator]) -> None:
        super().__init__(len(methods))
        pairs = list(zip(methods, generators, strict=True))
        self.activation = ACTIVATIONS[methods[0].activation]
        self.stack("down", [_truncated((site.width, m.bottleneck), m.init_std, g) for m, g in pairs])
        self.stack("down_bias", [torch.zeros(m.bottleneck) for m in methods])
        self.stack("up", [_truncated((m.bottleneck, site.width), m.init_std, g) for m, g in pairs])
        self.stack("up_bias", [torch.zeros(site.width) for m in methods])

    def forward(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        dtype = outputs.dtype
        inner = torch.baddbmm(self.down_bias.to(dtype).unsqueeze(1), outputs, self.down.to(dtype))
        change = torch.baddbmm(self.up_bias.to(dtype).unsqueeze(1), self.activation(inner), self.up.to(dtype))
        return outputs + change


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

    def __post_init__(self) -> None:
        require(self.bottleneck >= 1, "bottleneck", self.bottleneck, "a whole number of at least 1")
        require(self.activation in ACTIVATIONS, "activation", self.activation, f"one of {', '.join(ACTIVATIONS)}")
        require(self.init_std > 0, "init_std", self.init_std, "a number above 0")

    def sites(self, model: nn.Module) -> list[Site]:
        bottlenecks = [s for s in find_sites(model, "hidden") if s.role in ("attention", "mlp")]
        return bottlenecks + (find_sites(model, "norm") if self.norms else [])

    def check_site(self, site: Site) -> None:
        if site.kind == "hidden":
            require(self.bottleneck <= site.width, "bottleneck", self.bottleneck, f"at most {site.width}, the width")

    @classmethod
    def delta(cls, site: Site, methods: Sequence[Houlsby], generators: Sequence[torch.Generator]) -> Delta:
        if site.kind == "norm":
            return NormDelta(site, len(methods), weight=True, bias=True)
        return BottleneckDelta(site, methods, generators)

    def count(self, site: Site) -> int:
        if site.kind == "norm":
            return NormDelta.count(site, weight=True, bias=True)
        return 2 * self.bottleneck * site.width + self.bottleneck + site.width
