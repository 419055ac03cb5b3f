"""Head only: the base stays as it is and the task head alone trains (linear probing).

The lower reference: what the frozen representation gives without any adaptation. It trains nothing outside the head, so
its adapter is empty and it needs a task that has a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from peftbench.errors import UserError
from peftbench.methods.base import Card, Delta, Method, Traits
from peftbench.models.roles import Site


@dataclass(frozen=True)
class HeadOnly(Method):
    """Nothing but the task head trains."""

    traits = Traits(sites=(), mergeable=True, identity_at_init=True)
    card = Card(
        equation="y = H · pool(f(x)), H trained",
        paper="—",
        parameters="0 (the head is counted apart)",
    )

    def sites(self, model: nn.Module) -> list[Site]:
        return []

    def check(self, model: nn.Module) -> None:
        if getattr(model, "lm_head", None) is not None:
            raise UserError("head-only training needs a task with a head: use task.formulation=head")

    @classmethod
    def delta(cls, site: Site, methods: Sequence[HeadOnly], generators: Sequence[torch.Generator]) -> Delta:
        raise AssertionError("head-only training adds nothing at any site")

    def count(self, site: Site) -> int:
        return 0
