"""IA3: rescale keys, values and the feed-forward's inner activations by learned vectors.

    k' = l_k ⊙ k,    v' = l_v ⊙ v,    y = W_down (l_ff ⊙ h)

Source: Liu et al. 2022 (T-Few), arXiv:2205.05638, section 3.3. All vectors start at one, so a fresh adapter changes
nothing. `targets` are scaled at their output, `feedforward` at their input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peftbench.methods.base import Card, LinearDelta, Method, Targets, Traits, require
from peftbench.models.roles import Site, linear_sites


class InputSite(Site):
    """A linear map that is scaled at its input instead of its output."""


class OutputScale(LinearDelta):
    """y ← l ⊙ y."""

    scale: nn.Parameter

    def __init__(self, site: Site, runs: int) -> None:
        super().__init__(runs)
        self.stack("scale", [torch.ones(site.out_features)] * runs)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return y * self.scale.to(y.dtype).unsqueeze(1)

    def merged(self, weight: Tensor, bias: Tensor | None, run: int) -> tuple[Tensor, Tensor | None]:
        scale = self.scale[run].to(weight.dtype)
        return weight * scale[:, None], None if bias is None else bias * scale


class InputScale(LinearDelta):
    """x ← l ⊙ x."""

    scale: nn.Parameter

    def __init__(self, site: Site, runs: int) -> None:
        super().__init__(runs)
        self.stack("scale", [torch.ones(site.in_features)] * runs)

    def before(self, x: Tensor) -> Tensor:
        return x * self.scale.to(x.dtype).unsqueeze(1)

    def merged(self, weight: Tensor, bias: Tensor | None, run: int) -> tuple[Tensor, Tensor | None]:
        return weight * self.scale[run].to(weight.dtype), bias


@dataclass(frozen=True)
class IA3(Method):
    """Learned vectors rescale keys, values and feed-forward activations."""

    targets: Targets = ("attention.key", "attention.value")
    feedforward: Targets = ("mlp.down",)

    traits = Traits(sites=("linear",), mergeable=True, identity_at_init=True)
    card = Card(
        equation="k' = l_k ⊙ k,  v' = l_v ⊙ v,  y = W_down (l_ff ⊙ h)",
        paper="Liu et al. 2022, arXiv:2205.05638",
        parameters="D_out a scaled output, D_in a scaled input",
    )

    def __post_init__(self) -> None:
        require(bool(self.targets or self.feedforward), "targets", self.targets, "at least one role")

    def sites(self, model: nn.Module) -> list[Site]:
        outputs = linear_sites(model, self.targets) if self.targets else []
        inputs = linear_sites(model, self.feedforward) if self.feedforward else []
        return outputs + [InputSite(**vars(site)) for site in inputs]

    @classmethod
    def delta(cls, site: Site, methods: Sequence[IA3], generators: Sequence[torch.Generator]) -> LinearDelta:
        return InputScale(site, len(methods)) if isinstance(site, InputSite) else OutputScale(site, len(methods))

    def count(self, site: Site) -> int:
        return site.in_features if isinstance(site, InputSite) else site.out_features
