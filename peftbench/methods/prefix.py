"""Prefix tuning: learned keys and values in front of every attention's own.

    head = Attn(Q, [P_k; K], [P_v; V]),    P_k, P_v: length×D_kv trained per layer

Source: Li and Liang 2021, arXiv:2101.00190, section 4.2; the form above is eq. 4 of He et al. 2022, arXiv:2110.04366.
The keys and values train directly (the paper's ablation without the reparameterising network, section 7.4). Deviation:
the model's own tokens keep their positions, where implementations that pass the prefix as a cache shift them by
`length`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peftbench.errors import UserError
from peftbench.methods.base import AttentionDelta, Card, Method, Traits, normal, require
from peftbench.models.roles import Site, find_sites, supports_attention_interface


class PrefixDelta(AttentionDelta):
    """Keys and values of `length` virtual positions."""

    key: nn.Parameter
    value: nn.Parameter

    def __init__(self, site: Site, methods: Sequence[PrefixTuning], generators: Sequence[torch.Generator]) -> None:
        super().__init__(len(methods))
        pairs = list(zip(methods, generators, strict=True))
        self.stack("key", [normal((m.length, site.key_heads, site.head_dim), m.init_std, g) for m, g in pairs])
        self.stack("value", [normal((m.length, site.key_heads, site.head_dim), m.init_std, g) for m, g in pairs])

    def prefix(self) -> tuple[Tensor, Tensor]:
        return self.key, self.value


@dataclass(frozen=True)
class PrefixTuning(Method):
    """Learned keys and values in front of every self-attention's own."""

    length: int = 20
    init_std: float = 0.02

    traits = Traits(
        sites=("attention",),
        mergeable=False,
        identity_at_init=False,
        free_in_pack=frozenset({"init_std"}),
        cost_free=frozenset({"init_std"}),
    )
    card = Card(
        equation="Attn(Q, [P_k; K], [P_v; V])",
        paper="Li and Liang 2021, arXiv:2101.00190",
        parameters="2 · P · D_kv a layer",
    )

    def __post_init__(self) -> None:
        require(self.length >= 1, "length", self.length, "a whole number of at least 1")
        require(self.init_std > 0, "init_std", self.init_std, "a number above 0")

    def sites(self, model: nn.Module) -> list[Site]:
        if not supports_attention_interface(model):
            raise UserError(f"{type(model).__name__} does not use the attention interface: prefixes cannot enter it")
        return [s for s in find_sites(model, "attention") if s.role == "attention"]

    @classmethod
    def delta(cls, site: Site, methods: Sequence[PrefixTuning], generators: Sequence[torch.Generator]) -> PrefixDelta:
        return PrefixDelta(site, methods, generators)

    def count(self, site: Site) -> int:
        return 2 * self.length * site.key_heads * site.head_dim
