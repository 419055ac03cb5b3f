"""RoAd: rotate and stretch the output of a frozen map two features at a time.

    (y_1', y_2') = α (y_1 cos θ - y_2 sin θ,  y_1 sin θ + y_2 cos θ),    y = W x + b,    θ zero and α one at first

Source: Liao and Monz 2024, arXiv:2409.00119, section 3. `angles` is the paper's variant: 1 has one θ and α for a pair
of features, 2 one for each feature (the two rows of a pair's matrix differ), 4 one for each of the four entries. The
paper pairs neighbours; as in PEFT, features come in groups of `group_size` and the i-th of a group's first half is
paired with the i-th of its second, which for a trained map is a matter of order alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftbench.errors import UserError
from peftbench.methods.base import Card, LinearDelta, Method, Targets, Traits, require
from peftbench.methods.peft_format import SiteFormat, same, target_modules, targets
from peftbench.models.roles import Site, linear_sites


class RoadDelta(LinearDelta):
    """y ← p ⊙ y + q ⊙ turn(y), where turn takes every pair (y_1, y_2) to (-y_2, y_1)."""

    theta: nn.Parameter
    """[R, angles · D_out / 2]; for 4 angles, each group's p entries and then its q entries. `alpha` likewise."""
    alpha: nn.Parameter

    def __init__(self, site: Site, methods: Sequence[RoAd]) -> None:
        super().__init__(len(methods))
        self.angles, self.pairs = methods[0].angles, methods[0].group_size // 2
        width = self.angles * site.out_features // 2
        self.stack("theta", [torch.zeros(width)] * len(methods))
        self.stack("alpha", [torch.ones(width)] * len(methods))

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return p and q, both [R, 1, D_out]."""
        theta, alpha = (
            t.unflatten(1, (-1, self.angles, self.pairs)).expand(-1, -1, max(self.angles, 2), -1)
            for t in (self.theta, self.alpha)
        )
        cosines, sines = theta[:, :, :2], theta[:, :, -2:]
        p, q = alpha[:, :, :2] * cosines.cos(), alpha[:, :, -2:] * sines.sin()
        return p.flatten(1).unsqueeze(1), q.flatten(1).unsqueeze(1)

    def turn(self, y: Tensor) -> Tensor:
        """Return (-y_2, y_1) of every pair, along the last axis."""
        first, second = y.unflatten(-1, (-1, 2, self.pairs)).unbind(-2)
        return torch.stack((-second, first), dim=-2).flatten(-3)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        p, q = (t.to(y.dtype) for t in self.factors())
        return p * y + q * self.turn(y)

    def merged(self, weight: Tensor, bias: Tensor | None, run: int) -> tuple[Tensor, Tensor | None]:
        p, q = (t[run] for t in self.factors())

        def mixed(columns: Tensor) -> Tensor:
            return (p * columns.float() + q * self.turn(columns.float())).to(columns.dtype)

        return mixed(weight.T).T, None if bias is None else mixed(bias.unsqueeze(0))[0]


class RoadFormat(SiteFormat):
    """PEFT's RoAd, which adapts `nn.Linear` alone."""

    peft_type = "ROAD"
    names = {"theta": ("road_theta", same, same), "alpha": ("road_alpha", same, same)}

    def config(self, method: RoAd, model: nn.Module, sites: Sequence[Site]) -> dict[str, Any]:
        other = next((site for site in sites if site.transposed), None)
        if other is not None:
            raise UserError(f"{other.name} is a Conv1D, which PEFT's ROAD does not adapt: expected nn.Linear")
        return {
            "variant": f"road_{method.angles}",
            "group_size": method.group_size,
            "target_modules": target_modules(model, sites),
        }

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "angles": int(str(config.get("variant", "road_1")).removeprefix("road_")),
            "group_size": config.get("group_size", 64),
            "targets": targets(config),
        }


@dataclass(frozen=True)
class RoAd(Method):
    """Rotations and scales of the outputs of frozen linear maps, two features at a time."""

    angles: int = 1
    group_size: int = 64
    targets: Targets = ("all",)

    traits = Traits(sites=("linear",), mergeable=True, identity_at_init=True)
    card = Card(
        equation="(y_1', y_2') = α (y_1 cos θ - y_2 sin θ, y_1 sin θ + y_2 cos θ)",
        paper="Liao and Monz 2024, arXiv:2409.00119",
        parameters="v D_out a map, for v angles a pair",
    )
    peft = RoadFormat()

    def __post_init__(self) -> None:
        require(self.angles in (1, 2, 4), "angles", self.angles, "1, 2 or 4")
        even = self.group_size >= 2 and self.group_size % 2 == 0
        require(even, "group_size", self.group_size, "an even number of at least 2")

    def sites(self, model: nn.Module) -> list[Site]:
        return linear_sites(model, self.targets)

    def check_site(self, site: Site) -> None:
        fits = site.out_features % self.group_size == 0
        width = f"{site.out_features}, the output width of {site.name}"
        require(fits, "group_size", self.group_size, f"a divisor of {width}")

    @classmethod
    def delta(cls, site: Site, methods: Sequence[RoAd], generators: Sequence[torch.Generator]) -> RoadDelta:
        return RoadDelta(site, methods)

    def count(self, site: Site) -> int:
        return self.angles * site.out_features
