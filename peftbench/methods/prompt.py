"""Prompt tuning: learned embeddings in front of the input.

    f(x) = model([P; E(x)]),    P: length×D trained, everything else frozen

Source: Lester, Al-Rfou and Constant 2021, arXiv:2104.08691, section 2 and 3.2 (initialisation from sampled vocabulary,
or uniform in ±0.5). The paper prompts T5 only. Here the virtual tokens enter any model; the sequence is cut back to the
task's own tokens at the model's output, so pooled tokens, logits and labels keep their positions. Own tokens are
shifted by `length` positions, as if the prompt were text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from peftbench.methods.base import Card, EmbeddingDelta, Method, Traits, materialize, require, uniform
from peftbench.models.roles import EmbeddingSite, Site, find_sites

COMMON_TOKENS = 5000
"""Vocabulary initialisation draws from this many of the lowest token ids (the paper's 5,000 most common tokens)."""


class PromptDelta(EmbeddingDelta):
    """Virtual tokens, the same for every input."""

    prompt_embeddings: nn.Parameter

    def __init__(self, site: Site, methods: Sequence[PromptTuning], generators: Sequence[torch.Generator]) -> None:
        super().__init__(len(methods))
        self.stack("prompt_embeddings", [_initial(site, m, g) for m, g in zip(methods, generators, strict=True)])

    def prompt(self) -> Tensor:
        return self.prompt_embeddings


def _initial(site: Site, method: PromptTuning, generator: torch.Generator) -> Tensor:
    if method.init == "random":
        return uniform((method.length, site.width), 0.5, generator)
    vocabulary = cast(Tensor, site.module.weight)
    rows = torch.randint(min(COMMON_TOKENS, vocabulary.shape[0]), (method.length,), generator=generator)
    return materialize(vocabulary[rows.to(vocabulary.device)])


@dataclass(frozen=True)
class PromptTuning(Method):
    """Learned virtual tokens in front of the input embeddings."""

    length: int = 20
    init: str = "vocabulary"

    traits = Traits(sites=("embedding",), mergeable=False, identity_at_init=False, cost_free=frozenset({"init"}))
    card = Card(
        equation="f([P; E(x)])",
        paper="Lester et al. 2021, arXiv:2104.08691",
        parameters="P · D",
    )

    def __post_init__(self) -> None:
        require(self.length >= 1, "length", self.length, "a whole number of at least 1")
        require(self.init in ("vocabulary", "random"), "init", self.init, "'vocabulary' or 'random'")

    def sites(self, model: nn.Module) -> list[Site]:
        return find_sites(model, "embedding")

    def check_site(self, site: Site) -> None:
        if isinstance(site, EmbeddingSite) and site.max_positions is not None:
            accepted = f"below {site.max_positions}, the model's longest sequence"
            require(self.length < site.max_positions, "length", self.length, accepted)

    @classmethod
    def delta(cls, site: Site, methods: Sequence[PromptTuning], generators: Sequence[torch.Generator]) -> PromptDelta:
        return PromptDelta(site, methods, generators)

    def count(self, site: Site) -> int:
        return self.length * site.width
