"""Prompt tuning: learned embeddings in front of the input.

    f(x) = model([P; E(x)]),    P: length×D trained, everything else frozen

Source: Lester, Al-Rfou and Constant 2021, arXiv:2104.08691, sections 2 and 3.2. P starts uniform in ±0.5 ("random"), as
embeddings of sampled common tokens ("vocabulary"), or as the embeddings of a text ("text"), repeated or cut to `length`
tokens; the paper's text is the names of the classes. The text's ids become the setting `init_tokens`, so that a saved
adapter needs no tokenizer.

The paper prompts T5 only. Here the virtual tokens enter any model; the sequence is cut back to the task's own tokens at
the model's output, so pooled tokens, logits and labels keep their positions. Own tokens are shifted by `length`
positions, as if the prompt were text.

Deviations. On bidirectional classifiers the pooled token stays the task's own ([CLS]); HF PEFT leaves the prompt in the
sequence, so that BERT's pooler there reads the first virtual token. Special tokens are no part of an initial text here,
while PEFT's tokenizer call adds them: a [SEP] inside the prompt is no word of the user's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftbench.errors import UserError
from peftbench.methods.base import Card, EmbeddingDelta, Method, Traits, materialize, require, uniform
from peftbench.methods.peft_format import CONFIG_FILE, PeftFormat
from peftbench.models.roles import EmbeddingSite, Site, find_sites

COMMON_TOKENS = 5000
"""Vocabulary initialisation draws from this many of the lowest token ids (the paper's 5,000 most common tokens)."""


class PromptDelta(EmbeddingDelta):
    """Virtual tokens, the same for every input."""

    prompt_embeddings: nn.Parameter

    def __init__(self, site: Site, methods: Sequence[PromptTuning], generators: Sequence[torch.Generator]) -> None:
        super().__init__(len(methods))
        pairs = zip(methods, generators, strict=True)
        self.stack("prompt_embeddings", [initial_prompt(site, m.init, m.length, g, m.init_tokens) for m, g in pairs])

    def prompt(self) -> Tensor:
        return self.prompt_embeddings


def initial_prompt(
    site: Site, init: str, length: int, generator: torch.Generator, tokens: Sequence[int] = ()
) -> Tensor:
    """Return the first virtual tokens [length, D]; those of `tokens`, repeated or cut, for the initialisation "text".

    Raises:
        UserError: a text that no tokenizer has turned into tokens.
    """
    if init == "random":
        return uniform((length, site.width), 0.5, generator)
    vocabulary = cast(Tensor, site.module.weight)
    if init == "vocabulary":
        rows = torch.randint(min(COMMON_TOKENS, vocabulary.shape[0]), (length,), generator=generator)
    else:
        require(bool(tokens), "init", init, "a tokenizer for init_text (attach(..., tokenizer=...)), or init_tokens")
        rows = torch.tensor([tokens[i % len(tokens)] for i in range(length)])
    with torch.no_grad():  # through the module: some models scale what they look up
        return materialize(site.module(rows.to(vocabulary.device)))


def check_length(site: Site, length: int) -> None:
    """Raise UserError if `length` virtual tokens leave no room in the model's positions."""
    if isinstance(site, EmbeddingSite) and site.max_positions is not None:
        accepted = f"below {site.max_positions}, the model's longest sequence"
        require(length < site.max_positions, "length", length, accepted)


def prompt_config(model: nn.Module, length: int) -> dict[str, Any]:
    """Return what all of PEFT's prompt methods have in their configuration; without a task type they do nothing."""
    config: Any = model.config
    kind = "FEATURE_EXTRACTION"
    if "SequenceClassification" in type(model).__name__:
        kind = "SEQ_CLS"
    elif cast(Any, model).get_output_embeddings() is not None:
        kind = "SEQ_2_SEQ_LM" if config.is_encoder_decoder else "CAUSAL_LM"
    return {
        "task_type": kind,
        "num_virtual_tokens": length,
        "token_dim": config.hidden_size,
        "num_transformer_submodules": 1,
        "num_attention_heads": config.num_attention_heads,
        "num_layers": config.num_hidden_layers,
    }


def virtual_tokens(config: Mapping[str, Any]) -> int:
    """Return the number of virtual tokens in a PEFT configuration.

    Raises:
        UserError: there are more, for a decoder of its own.
    """
    submodules = config.get("num_transformer_submodules")
    if submodules not in (None, 1):
        raise UserError(f"{CONFIG_FILE}: num_transformer_submodules={submodules} is not read here: expected 1")
    return int(config["num_virtual_tokens"])


def renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the file's prompt by the name of PEFT's live parameter."""
    return {name.replace("prompt_embeddings", "prompt_encoder.embedding.weight"): t for name, t in tensors.items()}


class PromptFormat(PeftFormat):
    """PEFT's prompt tuning; its P-tuning too, whose files hold only the prompt that the encoder has come to."""

    peft_type = "PROMPT_TUNING"

    def matches(self, config: Mapping[str, Any]) -> bool:
        return config.get("peft_type") in (self.peft_type, "P_TUNING")

    def config(self, method: PromptTuning, model: nn.Module, sites: Sequence[Site]) -> dict[str, Any]:
        return {**prompt_config(model, method.length), "prompt_tuning_init": "RANDOM"}

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return {"length": virtual_tokens(config), "init": "random"}

    def tensors(self, method: Any, sites: Sequence[Site], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        own = f"{sites[0].key}.prompt_embeddings"
        return {"prompt_embeddings": state[own]} if own in state else {}

    def state(self, method: Any, sites: Sequence[Site], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {f"{sites[0].key}.prompt_embeddings": t for name, t in tensors.items() if name == "prompt_embeddings"}

    def parameters(self, method: Any, sites: Sequence[Site], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return renamed(self.tensors(method, sites, state))


@dataclass(frozen=True)
class PromptTuning(Method):
    """Learned virtual tokens in front of the input embeddings."""

    length: int = 20
    init: str = "vocabulary"
    init_text: str | None = None
    init_tokens: tuple[int, ...] = ()

    traits = Traits(
        sites=("embedding",),
        mergeable=False,
        identity_at_init=False,
        free_in_pack=frozenset({"init", "init_text", "init_tokens"}),
        cost_free=frozenset({"init", "init_text", "init_tokens"}),
    )
    card = Card(
        equation="f([P; E(x)])",
        paper="Lester et al. 2021, arXiv:2104.08691",
        parameters="P · D",
    )
    version = 2
    peft = PromptFormat()

    def __post_init__(self) -> None:
        require(self.length >= 1, "length", self.length, "a whole number of at least 1")
        accepted = ("vocabulary", "random", "text")
        require(self.init in accepted, "init", self.init, "'vocabulary', 'random' or 'text'")
        if self.init == "text":
            given = bool(self.init_tokens or (self.init_text or "").strip())
            require(given, "init_text", self.init_text, "a text, for init='text'")
        require(all(t >= 0 for t in self.init_tokens), "init_tokens", self.init_tokens, "token ids")

    def sites(self, model: nn.Module) -> list[Site]:
        return find_sites(model, "embedding")

    def check_site(self, site: Site) -> None:
        check_length(site, self.length)
        entries = int(cast(Tensor, site.module.weight).shape[0])
        require(max(self.init_tokens, default=0) < entries, "init_tokens", self.init_tokens, f"ids below {entries}")

    def with_tokenizer(self, tokenizer: Any) -> PromptTuning:
        if self.init != "text" or self.init_tokens:
            return self
        ids = tokenizer(self.init_text, add_special_tokens=False)["input_ids"]
        require(bool(ids), "init_text", self.init_text, "a text with at least one token")
        return dataclasses.replace(self, init_tokens=tuple(int(i) for i in ids[: self.length]))

    @classmethod
    def delta(cls, site: Site, methods: Sequence[PromptTuning], generators: Sequence[torch.Generator]) -> PromptDelta:
        return PromptDelta(site, methods, generators)

    def count(self, site: Site) -> int:
        return self.length * site.width
