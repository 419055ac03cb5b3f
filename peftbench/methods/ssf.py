"""SSF: scale and shift the features that leave every linear map and every normalisation.

    y' = γ ⊙ y + β,    y = W x + b  or  y = w ⊙ norm(x) + b

Source: Lian et al. 2022, arXiv:2210.08823, section 3; folding both into the map before them is its
re-parameterisation. `targets` are the linear maps, all with a role by default; `norms` says whether the normalisations
are taken too. The paper works on images and also treats the patch embedding, which has no counterpart here.

Deviation: γ starts at one and β at zero, so that a fresh adapter changes nothing; the authors' code adds noise of
standard deviation 0.02 to both. A map or normalisation without bias (Llama's family, RMS norms) gets no β: there would
be nothing to fold it into, and the merged model has to be one of its own architecture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peftbench.kernels.piecewise import Terms
from peftbench.methods.base import Card, LinearDelta, Method, Targets, Traits, require
from peftbench.models.roles import Site, find_sites, linear_sites


class ScaleShift(LinearDelta):
    """y ← γ ⊙ y + β at a linear map or, which is a diagonal one of the normalised input, at a normalisation."""

    scale: nn.Parameter
    shift: nn.Parameter | None

    def __init__(self, site: Site, runs: int) -> None:
        super().__init__(runs)
        width = _width(site)
        self.offset = site.offset
        self.stack("scale", [torch.ones(width)] * runs)
        if _has_bias(site):
            self.stack("shift", [torch.zeros(width)] * runs)
        else:
            self.shift = None

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        scale = self.scale.to(y.dtype).unsqueeze(1)
        return y * scale if self.shift is None else torch.addcmul(self.shift.to(y.dtype).unsqueeze(1), y, scale)

    def linear_terms(self, dtype: torch.dtype) -> Terms:
        return Terms(change=self.scale - 1, shift=self.shift)

    def merged(self, weight: Tensor, bias: Tensor | None, run: int) -> tuple[Tensor, Tensor | None]:
        scale = self.scale[run]
        rows = scale.unsqueeze(1) if weight.dim() == 2 else scale
        new = rows * (weight.float() + self.offset) - self.offset
        if bias is None or self.shift is None:
            return new.to(weight.dtype), bias
        return new.to(weight.dtype), (scale * bias.float() + self.shift[run]).to(bias.dtype)


def _width(site: Site) -> int:
    return site.width if site.kind == "norm" else site.out_features


def _has_bias(site: Site) -> bool:
    return getattr(site.module, "bias", None) is not None


@dataclass(frozen=True)
class SSF(Method):
    """Learned scales and shifts after linear maps and normalisations."""

    targets: Targets = ("all",)
    norms: bool = True

    traits = Traits(sites=("linear", "norm"), mergeable=True, identity_at_init=True)
    card = Card(
        equation="y' = γ ⊙ y + β",
        paper="Lian et al. 2022, arXiv:2210.08823",
        parameters="2 D_out a map and 2 D a norm (half of it without bias)",
    )

    def __post_init__(self) -> None:
        require(bool(self.targets) or self.norms, "targets", self.targets, "at least one role where norms is false")

    def sites(self, model: nn.Module) -> list[Site]:
        found = linear_sites(model, self.targets) if self.targets else []
        return found + (find_sites(model, "norm") if self.norms else [])

    @classmethod
    def delta(cls, site: Site, methods: Sequence[SSF], generators: Sequence[torch.Generator]) -> ScaleShift:
        return ScaleShift(site, len(methods))

    def count(self, site: Site) -> int:
        return _width(site) * (2 if _has_bias(site) else 1)
