"""OFT: rotate the input of a frozen map by a learned block-diagonal orthogonal matrix.

    y = W (R x) + b,    R = diag(R_1, …, R_K),    R_k = (I - Q_k)(I + Q_k)⁻¹,    Q_k = -Q_kᵀ, zero at first

Source: Qiu et al. 2023, arXiv:2306.07280, section 3.2 (blocks and the Cayley form of an orthogonal matrix); on the side
of the input, where rows are turned instead of weights, as in OFTv2 (Qiu et al. 2025, arXiv:2506.19847). Only the
entries above Q's diagonal are kept, row by row. `share` has one block serve all places. `epsilon` constrains it (the
paper's COFT): after a step each block is scaled back to ‖Q_k‖ ≤ epsilon / sqrt(K), in Frobenius norm.

`neumann_terms` above 0 replaces the inverse by the first terms of its Neumann series (OFTv2, 5 there),
R ≈ (I + Q)(I + Q + Q² + …), which is orthogonal only as far as Q is small. Q has the opposite sign in this form; both
signs are PEFT's, whose adapters keep their meaning. Where roles share a matrix the whole of it is adapted (see
`rotation.py`).

Deviation: with 3 terms PEFT takes 4, and with 2 another series; at least 4 are asked for. PEFT also replaces a block
size that does not divide the width by one that does; here it is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftbench.errors import UserError
from peftbench.methods.base import Card, Delta, LinearDelta, Method, StepEnd, Targets, Traits, require
from peftbench.methods.peft_format import CONFIG_FILE, refuse, same
from peftbench.methods.rotation import RotationFormat, cayley_change, turned, whole_maps
from peftbench.models.roles import Site


class OftDelta(LinearDelta):
    """x ← x + x diag(R_k - I)."""

    skew: nn.Parameter
    """[R, K, b (b - 1) / 2], or one block of them."""
    bound: Tensor
    rows: Tensor
    columns: Tensor

    def __init__(self, site: Site, methods: Sequence[OFT]) -> None:
        super().__init__(len(methods))
        first = methods[0]
        self.size, self.terms = first.block_size, first.neumann_terms
        blocks = 1 if first.share else site.in_features // self.size
        self.stack("skew", [torch.zeros(blocks, self.size * (self.size - 1) // 2)] * len(methods))
        self.constant("bound", [math.inf if m.epsilon is None else m.epsilon * blocks**-0.5 for m in methods])
        rows, columns = torch.triu_indices(self.size, self.size, 1)
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("columns", columns, persistent=False)

    def change(self) -> Tensor:
        """Return R_k - I of every block, [R, K, b, b]."""
        upper = self.skew.new_zeros(*self.skew.shape[:2], self.size, self.size)
        upper[..., self.rows, self.columns] = self.skew
        skew = upper - upper.mT
        if not self.terms:
            return cayley_change(skew)
        power = skew
        total = 2 * power
        for _ in range(self.terms - 3):
            power = power @ skew
            total = total + 2 * power
        return total + power @ skew

    def before(self, x: Tensor) -> Tensor:
        return turned(x, self.change())

    def merged(self, weight: Tensor, bias: Tensor | None, run: int) -> tuple[Tensor, Tensor | None]:
        change = self.change()[run : run + 1].mT
        return turned(weight.float().unsqueeze(0), change)[0].to(weight.dtype), bias

    def constrain(self) -> None:
        """Scale blocks whose Q is too long back to the bound."""
        norms = math.sqrt(2) * self.skew.norm(dim=-1, keepdim=True)
        self.skew.mul_((self.bound / norms).clamp(max=1.0))


class OftFormat(RotationFormat):
    """PEFT's OFT since 0.18, whose blocks keep their size over all modules."""

    peft_type = "OFT"
    names = {"skew": ("oft_R.weight", same, same)}

    def config(self, method: OFT, model: nn.Module, sites: Sequence[Site]) -> dict[str, Any]:
        constraint = {} if method.epsilon is None else {"eps": method.epsilon}
        return super().config(method, model, sites) | {
            "r": 0,
            "oft_block_size": method.block_size,
            "block_share": method.share,
            "coft": method.epsilon is not None,
            "use_cayley_neumann": method.neumann_terms > 0,
            "num_cayley_neumann_terms": method.neumann_terms or 5,
            **constraint,
        }

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        refuse(config, r=0, module_dropout=0.0)
        if "oft_block_size" not in config:
            raise UserError(f"{CONFIG_FILE}: no oft_block_size: PEFT's OFT before 0.14 is not read here")
        return super().settings(config) | {
            "block_size": config["oft_block_size"],
            "share": bool(config.get("block_share", False)),
            "epsilon": float(config.get("eps", 6e-5)) if config.get("coft") else None,
            "neumann_terms": config.get("num_cayley_neumann_terms", 5) if config.get("use_cayley_neumann", True) else 0,
        }


@dataclass(frozen=True)
class OFT(Method):
    """Block-diagonal rotations of the inputs of frozen linear maps: W R."""

    block_size: int = 32
    targets: Targets = ("attention.query", "attention.value")
    share: bool = False
    epsilon: float | None = None
    neumann_terms: int = 0

    traits = Traits(
        sites=("linear",),
        mergeable=True,
        identity_at_init=True,
        free_in_pack=frozenset({"epsilon"}),
        cost_free=frozenset({"epsilon"}),
    )
    card = Card(
        equation="y = W (R x) + b, R block-diagonal, R_k = (I - Q_k)(I + Q_k)⁻¹",
        paper="Qiu et al. 2023, arXiv:2306.07280",
        parameters="D_in (b - 1) / 2 a map with blocks of width b",
    )
    peft = OftFormat()

    def __post_init__(self) -> None:
        require(self.block_size >= 2, "block_size", self.block_size, "a whole number of at least 2")
        require(self.epsilon is None or self.epsilon > 0, "epsilon", self.epsilon, "a number above 0, or null for none")
        terms = self.neumann_terms
        require(terms == 0 or terms >= 4, "neumann_terms", terms, "0 for the exact inverse, or at least 4")

    def sites(self, model: nn.Module) -> list[Site]:
        return whole_maps(model, self.targets)

    def check_site(self, site: Site) -> None:
        fits = site.in_features % self.block_size == 0
        require(fits, "block_size", self.block_size, f"a divisor of {site.in_features}, the input width of {site.name}")

    @classmethod
    def delta(cls, site: Site, methods: Sequence[OFT], generators: Sequence[torch.Generator]) -> OftDelta:
        return OftDelta(site, methods)

    @classmethod
    def after_step(
        cls, methods: Sequence[OFT], deltas: Sequence[tuple[Site, Delta]], shared: Delta | None, end: StepEnd
    ) -> None:
        if any(m.epsilon is not None for m in methods):
            for _, delta in deltas:
                assert isinstance(delta, OftDelta)
                delta.constrain()

    def count(self, site: Site) -> int:
        blocks = 1 if self.share else site.in_features // self.block_size
        return blocks * self.block_size * (self.block_size - 1) // 2
