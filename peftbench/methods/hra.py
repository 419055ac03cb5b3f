"""HRA: reflect the input of a frozen map in r learned hyperplanes, one after another.

    y = W H x + b,    H = (I - 2 u_1 u_1ᵀ)(I - 2 u_2 u_2ᵀ) … (I - 2 u_r u_rᵀ),    |u_i| = 1

Source: Yuan, Liu and Xu 2024, arXiv:2405.17484, section 3. H is orthogonal and W H = W + a matrix of rank r. The
u_i start in equal pairs, whose reflections cancel, so r is even and a fresh adapter changes nothing; they are kept
unnormalised, drawn uniformly from ±1/sqrt(r / 2) as in the authors' code. `orthogonality` is the paper's λ: it adds
λ ‖I - UᵀU‖² of every map to the loss. The paper's limit λ → ∞ makes the u_i orthogonal by Gram-Schmidt: `hra_gs`,
H = I - 2 U (UᵀU)⁻¹ Uᵀ. That is never the identity, so its u_i are r independent draws from ±1/sqrt(r).

No reflection is done on its own: H = I - U T Uᵀ with T⁻¹ = I/2 + the part of UᵀU above its diagonal (the compact WY
form of Schreiber and Van Loan 1989), which costs two thin products a step, as LoRA does. Where roles share a matrix
the whole of it is adapted (see `rotation.py`).

Deviation: PEFT's Gram-Schmidt starts from equal pairs when r is even and so normalises rounding errors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftbench.methods.base import Card, LinearDelta, Method, Targets, Traits, require, uniform
from peftbench.methods.peft_format import same
from peftbench.methods.rotation import RotationFormat, whole_maps
from peftbench.models.roles import Site


class Reflections(LinearDelta, ABC):
    """x ← x - (x U) Tᵀ Uᵀ in row form, U normalised [R, D_in, r]."""

    directions: nn.Parameter

    def units(self) -> tuple[Tensor, Tensor]:
        """Return U [R, D_in, r] and UᵀU [R, r, r]; a padded direction is zero in U and one in UᵀU's diagonal."""
        norms = self.directions.norm(dim=1, keepdim=True)
        padded = (norms == 0).to(norms.dtype)
        units = self.directions / (norms + padded)
        return units, units.mT @ units + torch.diag_embed(padded.squeeze(1))

    @abstractmethod
    def core(self, gram: Tensor) -> Tensor:
        """Return T [R, r, r] for UᵀU."""

    def before(self, x: Tensor) -> Tensor:
        units, gram = self.units()
        left, right = units.to(x.dtype), (self.core(gram).mT @ units.mT).to(x.dtype)
        return torch.baddbmm(x, x @ left, right, alpha=-1)

    def merged(self, weight: Tensor, bias: Tensor | None, run: int) -> tuple[Tensor, Tensor | None]:
        units, gram = self.units()
        right = (self.core(gram) @ units.mT)[run]
        return (weight.float() - (weight.float() @ units[run]) @ right).to(weight.dtype), bias


class Chain(Reflections):
    """Reflections one after another."""

    weight: Tensor

    def __init__(self, site: Site, methods: Sequence[HRA], generators: Sequence[torch.Generator]) -> None:
        super().__init__(len(methods))
        halves = [
            uniform((site.in_features, m.rank // 2), (m.rank // 2) ** -0.5, g)
            for m, g in zip(methods, generators, strict=True)
        ]
        self.stack("directions", [half.repeat_interleave(2, dim=1) for half in halves])
        self.regular = any(m.orthogonality for m in methods)
        self.constant("weight", [m.orthogonality for m in methods], dimensions=1)

    def core(self, gram: Tensor) -> Tensor:
        eye = torch.eye(gram.shape[-1], device=gram.device, dtype=gram.dtype)
        return torch.linalg.solve_triangular(eye / 2 + gram.triu(1), eye.expand_as(gram), upper=True)

    def penalty(self) -> Tensor | None:
        if not self.regular:
            return None
        gram = self.units()[1]
        eye = torch.eye(gram.shape[-1], device=gram.device, dtype=gram.dtype)
        return self.weight * (eye - gram).square().sum(dim=(1, 2))


class OrthogonalChain(Reflections):
    """Reflections in orthogonal directions that span what U's columns do."""

    def __init__(self, site: Site, methods: Sequence[GramSchmidtHRA], generators: Sequence[torch.Generator]) -> None:
        super().__init__(len(methods))
        pairs = zip(methods, generators, strict=True)
        self.stack("directions", [uniform((site.in_features, m.rank), m.rank**-0.5, g) for m, g in pairs])

    def core(self, gram: Tensor) -> Tensor:
        eye = torch.eye(gram.shape[-1], device=gram.device, dtype=gram.dtype)
        # The checked form of solve waits for the device.
        return torch.linalg.solve_ex(gram, 2 * eye.expand_as(gram)).result


class HraFormat(RotationFormat):
    """PEFT's HRA, with or without Gram-Schmidt."""

    peft_type = "HRA"
    names = {"directions": ("hra_u", same, same)}

    def __init__(self, gram_schmidt: bool) -> None:
        self.gram_schmidt = gram_schmidt

    def matches(self, config: Mapping[str, Any]) -> bool:
        return super().matches(config) and bool(config.get("apply_GS", False)) == self.gram_schmidt

    def config(self, method: HRA | GramSchmidtHRA, model: nn.Module, sites: Sequence[Site]) -> dict[str, Any]:
        return super().config(method, model, sites) | {"r": method.rank, "apply_GS": self.gram_schmidt}

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return super().settings(config) | {"rank": config["r"]}


@dataclass(frozen=True)
class HRA(Method):
    """A chain of learned reflections of the inputs of frozen linear maps."""

    rank: int = 8
    targets: Targets = ("attention.query", "attention.value")
    orthogonality: float = 0.0

    traits = Traits(
        sites=("linear",),
        mergeable=True,
        identity_at_init=True,
        free_in_pack=frozenset({"rank", "orthogonality"}),
    )
    card = Card(
        equation="y = W H x + b, H = Π (I - 2 u_i u_iᵀ)",
        paper="Yuan et al. 2024, arXiv:2405.17484",
        parameters="r D_in a map",
    )
    peft = HraFormat(gram_schmidt=False)

    def __post_init__(self) -> None:
        even = self.rank >= 2 and self.rank % 2 == 0
        require(even, "rank", self.rank, "an even number of at least 2, whose reflections cancel in pairs at first")
        require(self.orthogonality >= 0, "orthogonality", self.orthogonality, "a number of at least 0")

    def sites(self, model: nn.Module) -> list[Site]:
        return whole_maps(model, self.targets)

    def check_site(self, site: Site) -> None:
        _fits(self.rank, site)

    @classmethod
    def delta(cls, site: Site, methods: Sequence[HRA], generators: Sequence[torch.Generator]) -> Chain:
        return Chain(site, methods, generators)

    def count(self, site: Site) -> int:
        return self.rank * site.in_features


@dataclass(frozen=True)
class GramSchmidtHRA(Method):
    """Learned reflections of the inputs of frozen linear maps in directions made orthogonal."""

    rank: int = 8
    targets: Targets = ("attention.query", "attention.value")

    traits = Traits(sites=("linear",), mergeable=True, identity_at_init=False, free_in_pack=frozenset({"rank"}))
    card = Card(
        equation="y = W H x + b, H = I - 2 U (UᵀU)⁻¹ Uᵀ",
        paper="Yuan et al. 2024, arXiv:2405.17484",
        parameters="r D_in a map",
    )
    peft = HraFormat(gram_schmidt=True)

    def __post_init__(self) -> None:
        require(self.rank >= 1, "rank", self.rank, "a whole number of at least 1")

    def sites(self, model: nn.Module) -> list[Site]:
        return whole_maps(model, self.targets)

    def check_site(self, site: Site) -> None:
        _fits(self.rank, site)

    @classmethod
    def delta(
        cls, site: Site, methods: Sequence[GramSchmidtHRA], generators: Sequence[torch.Generator]
    ) -> OrthogonalChain:
        return OrthogonalChain(site, methods, generators)

    def count(self, site: Site) -> int:
        return self.rank * site.in_features


def _fits(rank: int, site: Site) -> None:
    require(rank <= site.in_features, "rank", rank, f"at most {site.in_features}, the input width of {site.name}")
