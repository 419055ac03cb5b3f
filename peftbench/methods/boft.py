"""BOFT: rotate the input of a frozen map by a product of sparse rotations that mixes features as a fast Fourier
transform does, and scale its output.

    y = s ⊙ W R x + b,    R = B_1 B_2 … B_m applied to x from the right,    s one and every B the identity at first

Source: Liu et al. 2024, arXiv:2311.06243, section 4 and figure 3 (butterfly factors). Features come in half-blocks of
width b / 2. Factor i = 0, …, m - 1 joins half-blocks that are 2^i apart to blocks of width b and rotates each block by
a Cayley matrix (I - Q)(I + Q)⁻¹ with Q = (A - Aᵀ) / 2; the last factor turns x first. One factor is OFT with blocks of
width b. As in the authors' code, which PEFT's follows, all of A trains though only its skew part acts, and a scale s
for every output trains beside the rotation; the bias is not scaled. No factor is ever written out: joining half-blocks
swaps two axes of x. Where roles share a matrix the whole of it is adapted (see `rotation.py`).

Deviation: PEFT takes more than one factor only where it can compile a CUDA extension of its own, and one elsewhere
whatever is asked for. Here any device does; adapters of several factors are read from PEFT's folders but not written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftbench.errors import UserError
from peftbench.methods.base import Card, LinearDelta, Method, Targets, Traits, require
from peftbench.methods.peft_format import refuse, same
from peftbench.methods.rotation import RotationFormat, cayley_change, turned, whole_maps
from peftbench.models.roles import Site


def butterfly(x: Tensor, change: Tensor, factor: int) -> Tensor:
    """Return x [R, N, D] turned by factor `factor` whose blocks are the identity plus `change` [R, K, b, b].

    D splits into groups of two times 2^factor half-blocks; block k joins the k-th half-blocks of both.
    """
    joined = x.unflatten(-1, (-1, 2, 2**factor, change.shape[-1] // 2)).transpose(-3, -2)
    return turned(joined.reshape(x.shape), change).view(joined.shape).transpose(-3, -2).reshape(x.shape)


class BoftDelta(LinearDelta):
    """x ← x B_m … B_1 (the last factor first),  y ← s ⊙ (y - b) + b."""

    blocks: nn.Parameter
    """A of every block [R, m, K, b, b]."""
    scale: nn.Parameter
    bias: Tensor | None

    def __init__(self, site: Site, methods: Sequence[BOFT]) -> None:
        super().__init__(len(methods))
        size, factors = methods[0].block_size, methods[0].factors
        shape = (factors, site.in_features // size, size, size)
        self.stack("blocks", [torch.zeros(shape)] * len(methods))
        self.stack("scale", [torch.ones(site.out_features)] * len(methods))
        bias = site.dense_bias()
        self.register_buffer("bias", None if bias is None else bias.clone(), persistent=False)

    def changes(self) -> Tensor:
        """Return every block's rotation minus the identity, [R, m, K, b, b]."""
        return cayley_change(0.5 * (self.blocks - self.blocks.mT))

    def before(self, x: Tensor) -> Tensor:
        changes = self.changes()
        for factor in reversed(range(changes.shape[1])):
            x = butterfly(x, changes[:, factor], factor)
        return x

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        scale = self.scale.unsqueeze(1)
        if self.bias is None:
            return y * scale.to(y.dtype)
        return torch.addcmul((self.bias * (1 - scale)).to(y.dtype), y, scale.to(y.dtype))

    def merged(self, weight: Tensor, bias: Tensor | None, run: int) -> tuple[Tensor, Tensor | None]:
        changes = self.changes()[run : run + 1].mT
        rows = weight.float().unsqueeze(0)
        for factor in range(changes.shape[1]):
            rows = butterfly(rows, changes[:, factor], factor)
        return (rows[0] * self.scale[run].unsqueeze(1)).to(weight.dtype), bias


class BoftFormat(RotationFormat):
    """PEFT's BOFT, with the scale as a column [D_out, 1]; written with one factor alone, as PEFT has it everywhere."""

    peft_type = "BOFT"
    names = {
        "blocks": ("boft_R", same, same),
        "scale": ("boft_s", lambda s: s.unsqueeze(1), lambda s: s.squeeze(1)),
    }

    def config(self, method: BOFT, model: nn.Module, sites: Sequence[Site]) -> dict[str, Any]:
        if method.factors > 1:
            raise UserError(f"method.factors={method.factors}: PEFT needs its CUDA extension for several: expected 1")
        return super().config(method, model, sites) | {
            "boft_block_size": method.block_size,
            "boft_block_num": 0,
            "boft_n_butterfly_factor": method.factors,
        }

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        refuse(config, boft_block_num=0, boft_dropout=0.0)
        return super().settings(config) | {
            "block_size": config["boft_block_size"],
            "factors": config.get("boft_n_butterfly_factor", 1),
        }


@dataclass(frozen=True)
class BOFT(Method):
    """Products of butterfly rotations of the inputs of frozen linear maps, and a scale of their outputs."""

    block_size: int = 8
    factors: int = 2
    targets: Targets = ("attention.query", "attention.value")

    traits = Traits(sites=("linear",), mergeable=True, identity_at_init=True)
    card = Card(
        equation="y = s ⊙ W R x + b, R = B_m … B_1 a product of butterfly rotations",
        paper="Liu et al. 2024, arXiv:2311.06243",
        parameters="m D_in b + D_out a map, for m factors with blocks of width b",
    )
    peft = BoftFormat()

    def __post_init__(self) -> None:
        require(self.factors >= 1, "factors", self.factors, "a whole number of at least 1")
        even = self.block_size >= 2 and (self.block_size % 2 == 0 or self.factors == 1)
        require(even, "block_size", self.block_size, "an even number of at least 2")

    def sites(self, model: nn.Module) -> list[Site]:
        return whole_maps(model, self.targets)

    def check_site(self, site: Site) -> None:
        group = self.block_size * 2 ** (self.factors - 1)
        of = f"{site.in_features}, the input width of {site.name}"
        fits = f"block_size · 2^(factors - 1), here {group}, a divisor of {of}"
        require(site.in_features % group == 0, "block_size", self.block_size, fits)

    @classmethod
    def delta(cls, site: Site, methods: Sequence[BOFT], generators: Sequence[torch.Generator]) -> BoftDelta:
        return BoftDelta(site, methods)

    def count(self, site: Site) -> int:
        return self.factors * site.in_features * self.block_size + site.out_features
