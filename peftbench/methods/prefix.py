"""Prefix tuning: learned keys and values in front of every attention's own.

    head = Attn(Q, [P_k; K], [P_v; V]),    [P_k; P_v] of a layer: length×2·D_kv
    reparameterization "mlp":  P_layer = tanh(E W_1 + b_1) W_layer + b_layer,    E: length×D_kv
    reparameterization "none": P_layer trains itself

Source: Li and Liang 2021, arXiv:2101.00190, sections 4.2 and 4.3; the first line is eq. 4 of He et al. 2022,
arXiv:2110.04366. The network makes training stable (section 4.3) and is dropped afterwards: `format="peft"` exports the
prefix it has come to, while a folder of this package keeps what was trained, so that training can go on. E and W_1 are
shared by all layers; each layer owns its part of the last matrix. Without the network every layer's prefix trains
itself, which is P-tuning v2 (Liu et al. 2022, arXiv:2110.07602, section 3): deep prompts, a classification head on the
task's own pooled token.

E is as wide as a layer's keys, as in HF PEFT (the authors' models have keys as wide as the model). It starts normal
with standard deviation 1 and the matrices uniform in ±1/sqrt(rows), PyTorch's defaults, which the authors' code leaves
alone; a prefix that trains itself starts with standard deviation `init_std`.

Deviation: the model's own tokens keep their positions, where implementations that pass the prefix as a cache shift them
by `length`. The prefix has no position of its own, and a shift costs a learned position table `length` places. With
`position_ids` shifted by hand the outputs are those of HF PEFT.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftbench.errors import UserError
from peftbench.methods.base import AttentionDelta, Card, Delta, Method, Traits, normal, require, uniform
from peftbench.methods.peft_format import PeftFormat
from peftbench.methods.prompt import prompt_config, renamed, virtual_tokens
from peftbench.models.roles import Site, find_sites, supports_attention_interface


class PrefixDelta(AttentionDelta):
    """Keys and values of `length` virtual positions, trained as they are."""

    key: nn.Parameter
    value: nn.Parameter

    def __init__(self, site: Site, methods: Sequence[PrefixTuning], generators: Sequence[torch.Generator]) -> None:
        super().__init__(len(methods))
        pairs = list(zip(methods, generators, strict=True))
        self.stack("key", [normal((m.length, site.key_heads, site.head_dim), m.init_std, g) for m, g in pairs])
        self.stack("value", [normal((m.length, site.key_heads, site.head_dim), m.init_std, g) for m, g in pairs])

    def prefix(self) -> tuple[Tensor, Tensor]:
        return self.key, self.value


class PrefixNetwork(Delta):
    """What all layers share of the reparameterization: tanh(E W_1 + b_1)."""

    embedding: nn.Parameter
    weight: nn.Parameter
    bias: nn.Parameter

    def __init__(self, width: int, methods: Sequence[PrefixTuning], generators: Sequence[torch.Generator]) -> None:
        super().__init__(len(methods))
        pairs = list(zip(methods, generators, strict=True))
        self.stack("embedding", [normal((m.length, width), 1.0, g) for m, g in pairs])
        self.stack("weight", [uniform((width, m.hidden), width**-0.5, g) for m, g in pairs])
        self.stack("bias", [uniform((m.hidden,), width**-0.5, g) for m, g in pairs])

    def hidden(self) -> Tensor:
        """Return the hidden layer [R, P, H]; cheap, so every layer asks anew (a kept one would outlive its graph)."""
        return torch.tanh(torch.baddbmm(self.bias.unsqueeze(1), self.embedding, self.weight))


class ProjectedPrefix(AttentionDelta):
    """Keys and values from the shared hidden layer through this layer's own part of the last matrix."""

    weight: nn.Parameter
    bias: nn.Parameter
    network: PrefixNetwork

    def __init__(
        self,
        site: Site,
        network: PrefixNetwork,
        methods: Sequence[PrefixTuning],
        generators: Sequence[torch.Generator],
    ) -> None:
        super().__init__(len(methods))
        self.refer("network", network)
        self.heads = (2, site.key_heads, site.head_dim)
        width = 2 * site.key_heads * site.head_dim
        pairs = list(zip(methods, generators, strict=True))
        self.stack("weight", [uniform((m.hidden, width), m.hidden**-0.5, g) for m, g in pairs])
        self.stack("bias", [uniform((width,), m.hidden**-0.5, g) for m, g in pairs])

    def prefix(self) -> tuple[Tensor, Tensor]:
        both = torch.baddbmm(self.bias.unsqueeze(1), self.network.hidden(), self.weight)
        key, value = both.unflatten(-1, self.heads).unbind(2)
        return key, value


class PrefixFormat(PeftFormat):
    """PEFT's prefix tuning: columns run over layers, then key and value, then heads.

    A file holds the prefix alone, and is read as one that trains itself.
    """

    peft_type = "PREFIX_TUNING"
    note = "own tokens keep their positions; compared with positions shifted by hand"

    def config(self, method: PrefixTuning, model: nn.Module, sites: Sequence[Site]) -> dict[str, Any]:
        config: Any = model.config
        if config.is_encoder_decoder:
            raise UserError("PEFT gives only one stack of an encoder-decoder a prefix: save it with format='peftbench'")
        return {
            **prompt_config(model, method.length),
            "token_dim": sites[0].key_heads * sites[0].head_dim,
            "num_attention_heads": sites[0].key_heads,
            "prefix_projection": method.reparameterization == "mlp",
            "encoder_hidden_size": method.hidden if method.reparameterization == "mlp" else None,
        }

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return {"length": virtual_tokens(config), "reparameterization": "none"}

    def tensors(self, method: PrefixTuning, sites: Sequence[Site], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not state:
            return {}
        if method.reparameterization == "none":
            parts = [state[f"{site.key}.{name}"].flatten(1) for site in sites for name in ("key", "value")]
            return {"prompt_embeddings": torch.cat(parts, dim=1)}
        hidden = torch.tanh(state["shared.embedding"] @ state["shared.weight"] + state["shared.bias"])
        return {"prompt_embeddings": hidden @ _columns(sites, state, "weight") + _columns(sites, state, "bias")}

    def state(self, method: PrefixTuning, sites: Sequence[Site], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if "prompt_embeddings" not in tensors:
            return {}
        parts = tensors["prompt_embeddings"].chunk(2 * len(sites), dim=1)
        names = [f"{site.key}.{name}" for site in sites for name in ("key", "value")]
        heads = (sites[0].key_heads, sites[0].head_dim)
        return {name: part.unflatten(1, heads) for name, part in zip(names, parts, strict=True)}

    def parameters(self, method: PrefixTuning, sites: Sequence[Site], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if method.reparameterization == "none" or not state:
            return renamed(self.tensors(method, sites, state))
        return {
            "prompt_encoder.embedding.weight": state["shared.embedding"],
            "prompt_encoder.transform.0.weight": state["shared.weight"].T,
            "prompt_encoder.transform.0.bias": state["shared.bias"],
            "prompt_encoder.transform.2.weight": _columns(sites, state, "weight").T,
            "prompt_encoder.transform.2.bias": _columns(sites, state, "bias"),
        }

    def shared_inputs(self, method: PrefixTuning, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        ids = inputs["input_ids"]
        return {"position_ids": torch.arange(method.length, method.length + ids.shape[1]).expand(ids.shape)}


def _columns(sites: Sequence[Site], state: Mapping[str, Tensor], name: str) -> Tensor:
    """Return the last matrix (or its bias) of all layers side by side."""
    return torch.cat([state[f"{site.key}.{name}"] for site in sites], dim=-1)


@dataclass(frozen=True)
class PrefixTuning(Method):
    """Learned keys and values in front of every self-attention's own."""

    length: int = 20
    reparameterization: str = "mlp"
    hidden: int = 512
    init_std: float = 0.02

    traits = Traits(
        sites=("attention",),
        mergeable=False,
        identity_at_init=False,
        free_in_pack=frozenset({"hidden", "init_std"}),
        cost_free=frozenset({"init_std"}),
    )
    card = Card(
        equation="Attn(Q, [P_k; K], [P_v; V]),  P = MLP(E)",
        paper="Li and Liang 2021, arXiv:2101.00190",
        parameters="2 · P · D_kv a layer; with the MLP P · D_kv + H (D_kv + 1), and 2 · D_kv (H + 1) a layer",
    )
    version = 2
    peft = PrefixFormat()

    def __post_init__(self) -> None:
        require(self.length >= 1, "length", self.length, "a whole number of at least 1")
        accepted = ("mlp", "none")
        require(self.reparameterization in accepted, "reparameterization", self.reparameterization, "'mlp' or 'none'")
        require(self.hidden >= 1, "hidden", self.hidden, "a whole number of at least 1")
        require(self.init_std > 0, "init_std", self.init_std, "a number above 0")

    def sites(self, model: nn.Module) -> list[Site]:
        if not supports_attention_interface(model):
            raise UserError(f"{type(model).__name__} does not use the attention interface: prefixes cannot enter it")
        return [s for s in find_sites(model, "attention") if s.role == "attention"]

    @classmethod
    def build(
        cls, sites: Sequence[Site], methods: Sequence[PrefixTuning], generators: Sequence[torch.Generator]
    ) -> tuple[list[Delta], Delta | None]:
        if methods[0].reparameterization == "none":
            return [PrefixDelta(site, methods, generators) for site in sites], None
        network = PrefixNetwork(sites[0].key_heads * sites[0].head_dim, methods, generators)
        return [ProjectedPrefix(site, network, methods, generators) for site in sites], network

    def count(self, site: Site) -> int:
        width = 2 * site.key_heads * site.head_dim
        return width * (self.length if self.reparameterization == "none" else self.hidden + 1)

    def shared_count(self, sites: Sequence[Site]) -> int:
        width = sites[0].key_heads * sites[0].head_dim
        return 0 if self.reparameterization == "none" else self.length * width + self.hidden * (width + 1)
