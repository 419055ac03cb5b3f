"""IA3: rescale keys, values and the feed-forward's inner activations by learned vectors.

    k' = l_k ⊙ k,    v' = l_v ⊙ v,    y = W_down (l_ff ⊙ h)

Source: Liu et al. 2022 (T-Few), arXiv:2205.05638, section 3.3. All vectors start at one, so a fresh adapter changes
nothing. `targets` are scaled at their output, bias included, `feedforward` at their input; a map that both name is
scaled at its input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftbench.kernels.piecewise import Terms
from peftbench.methods.base import Card, LinearDelta, Method, Targets, Traits, require
from peftbench.methods.peft_format import (
    PREFIX,
    PeftFormat,
    fan_in_fan_out,
    target_modules,
    targets,
    whole_modules,
)
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

    def linear_terms(self, dtype: torch.dtype) -> Terms:
        return Terms(change=self.scale - 1)

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

    def linear_terms(self, dtype: torch.dtype) -> Terms:
        return Terms(stretch=self.scale - 1)

    def merged(self, weight: Tensor, bias: Tensor | None, run: int) -> tuple[Tensor, Tensor | None]:
        return weight * self.scale[run].to(weight.dtype), bias


class IA3Format(PeftFormat):
    """PEFT's IA3: a column [D_out, 1] where outputs are scaled, a row [1, D_in] where inputs are."""

    peft_type = "IA3"

    def config(self, method: IA3, model: nn.Module, sites: Sequence[Site]) -> dict[str, Any]:
        outputs = [site for site in sites if not isinstance(site, InputSite)]
        # Full names: PEFT compares the ends of these, without regard to their parts, and wants them in both lists.
        inputs = [site.name for site in sites if isinstance(site, InputSite)]
        return {
            "target_modules": (target_modules(model, outputs) if outputs else []) + inputs,
            "feedforward_modules": inputs,
            "fan_in_fan_out": fan_in_fan_out(sites),
        }

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        inputs = targets(config, "feedforward_modules") if config.get("feedforward_modules") else ()
        everything = targets(config)
        if not isinstance(everything, str) and not isinstance(inputs, str):
            everything = tuple(name for name in everything if name not in inputs)
        return {"targets": everything, "feedforward": inputs}

    def tensors(self, method: IA3, sites: Sequence[Site], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        whole_modules(sites)
        return {
            f"{PREFIX}{site.name}.ia3_l": state[f"{site.key}.scale"].unsqueeze(0 if isinstance(site, InputSite) else 1)
            for site in sites
            if f"{site.key}.scale" in state
        }

    def state(self, method: IA3, sites: Sequence[Site], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        names = {f"{site.key}.scale": f"{PREFIX}{site.name}.ia3_l" for site in sites}
        return {ours: tensors[theirs].flatten() for ours, theirs in names.items() if theirs in tensors}


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
    peft = IA3Format()

    def __post_init__(self) -> None:
        require(bool(self.targets or self.feedforward), "targets", self.targets, "at least one role")

    def sites(self, model: nn.Module) -> list[Site]:
        outputs = linear_sites(model, self.targets) if self.targets else []
        inputs = linear_sites(model, self.feedforward) if self.feedforward else []
        taken = {site.key for site in inputs}
        return [s for s in outputs if s.key not in taken] + [InputSite(**vars(site)) for site in inputs]

    def check_site(self, site: Site) -> None:
        whole = site.columns is None or not isinstance(site, InputSite)
        require(whole, "feedforward", self.feedforward, f"a whole matrix: {site.name} serves other roles' inputs too")

    @classmethod
    def delta(cls, site: Site, methods: Sequence[IA3], generators: Sequence[torch.Generator]) -> LinearDelta:
        return InputScale(site, len(methods)) if isinstance(site, InputSite) else OutputScale(site, len(methods))

    def count(self, site: Site) -> int:
        return site.in_features if isinstance(site, InputSite) else site.out_features
