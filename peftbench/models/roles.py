"""Names for the places of a transformer: a small table per architecture maps each role to its module.

A *site* is a place a method may change: a linear map, the output of a sublayer, a norm, the input embedding, or an
attention module. Methods ask for sites by role (``attention.query``, ``mlp.down``, ``norm.final``), so the same method
runs on every mapped architecture. Several roles may share one matrix (GPT-2's ``c_attn`` holds query, key and value
side by side, GPT-NeoX interleaves them per head); a site then names the output features that belong to its role.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peftbench.errors import UserError, nearest
from peftbench.models.quantized import QuantizedLinear

LINEAR_ROLES = (
    "attention.query",
    "attention.key",
    "attention.value",
    "attention.output",
    "cross_attention.query",
    "cross_attention.key",
    "cross_attention.value",
    "cross_attention.output",
    "mlp.gate",
    "mlp.up",
    "mlp.down",
)
"""Every linear role; an architecture has some of them."""

KINDS = ("linear", "hidden", "norm", "embedding", "attention")

Columns = slice | tuple[int, ...] | None


@dataclass(frozen=True, eq=False)
class Site:
    """One place in a model.

    linear: `in_features`, `out_features` (of the role's own part), `columns` (which output features of `module` belong
    to the role; None: all), `transposed` (the weight is [in, out], as in Conv1D, not [out, in]).
    hidden: the output of `module` is the sublayer's output before the residual sum, [batch, tokens, `width`] (OPT's
    mlp: [batch * tokens, `width`]); the first input of `source` (see `first_input`) is the sublayer's input, of the
    same shape.
    norm: `width`, and `offset` (the scale is offset + weight: 1 in Gemma, else 0).
    attention: `module` is what the attention interface receives first; keys and values are
    [batch, `key_heads`, tokens, `head_dim`].
    embedding: see `EmbeddingSite`.
    """

    kind: str
    role: str
    layer: int | None
    name: str
    module: nn.Module
    in_features: int = 0
    out_features: int = 0
    columns: Columns = None
    transposed: bool = False
    source: nn.Module | None = None
    width: int = 0
    key_heads: int = 0
    head_dim: int = 0
    offset: float = 0.0

    @property
    def key(self) -> str:
        """Prefix of this site's tensors in a saved adapter: unique among the linear sites of a model."""
        return self.name if self.columns is None else f"{self.name}.{self.role.rpartition('.')[2]}"

    @torch.no_grad()
    def dense_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight of a linear site's own part, [out_features, in_features], whatever way its module holds it.

        On the module's device, detached; it may share memory with the module's own weight, so do not write into it.
        On the meta device: zeros on the CPU.
        """
        if isinstance(self.module, QuantizedLinear):
            weight: Any = self.module.dense(dtype)
        else:
            weight = cast(Any, self.module.weight).detach()
            weight = weight.T if self.transposed else weight
        if weight.is_meta:
            return torch.zeros(self.out_features, self.in_features, dtype=dtype)
        return weight[self._rows()].to(dtype)

    @torch.no_grad()
    def dense_bias(self, dtype: torch.dtype = torch.float32) -> Tensor | None:
        """The bias of a linear site's own part, [out_features], or None; otherwise as `dense_weight`."""
        quantized = isinstance(self.module, QuantizedLinear)
        bias: Any = self.module.dense_bias() if quantized else self.module.bias  # type: ignore[operator]
        if bias is None:
            return None
        if bias.is_meta:
            return torch.zeros(self.out_features, dtype=dtype)
        return bias.detach()[self._rows()].to(dtype)

    def _rows(self) -> Any:
        if self.columns is None:
            return slice(None)
        return self.columns if isinstance(self.columns, slice) else list(self.columns)


@dataclass(frozen=True, eq=False)
class EmbeddingSite(Site):
    """The input embedding, and where a longer input has to be followed.

    `module` maps token ids to vectors of `width` (its own scaling included). `input_module` is called with input_ids or
    inputs_embeds, attention_mask and, where it has them, position_ids. The output sequence of `output_module` is as
    long as the input of `input_module`: cut there, what comes later (BERT's pooler) sees the original tokens only. With
    a `decoder_module` (T5) nothing need be cut: it attends to the longer sequence through `encoder_attention_mask`,
    which has to grow alike.
    `max_positions` is the longest input that the learned position table allows (None: no such table).
    """

    input_module: nn.Module = field(default_factory=nn.Identity)
    output_module: nn.Module = field(default_factory=nn.Identity)
    decoder_module: nn.Module | None = None
    max_positions: int | None = None


def first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The first input of a call as a forward hook with kwargs sees it: some layers pass `hidden_states` by keyword."""
    return args[0] if args else kwargs["hidden_states"]


@dataclass(frozen=True)
class Linear:
    """A linear role of a layer: its module's path inside the layer, and in a shared matrix, the role's output features.

    `columns(config, width)` gives them for a matrix of `width` output features; None: the whole matrix.
    """

    role: str
    path: str
    columns: Callable[[Any, int], Columns] | None = None


@dataclass(frozen=True)
class Hidden:
    """A sublayer: paths in the layer of the module that gets its input, and of the last one before the residual sum."""

    role: str
    source: str
    output: str


@dataclass(frozen=True)
class Layer:
    """What one layer of a stack holds, paths relative to the layer; entries whose module a layer lacks are skipped."""

    linear: tuple[Linear, ...]
    hidden: tuple[Hidden, ...]
    norm: dict[str, str]
    attention: dict[str, str]


@dataclass(frozen=True)
class Family:
    """The role table of an architecture; all paths are relative to the base model.

    stacks: (path of the list of layers, its layer), in the order in which layers are numbered.
    norm: norms outside the layers, as (role, path).
    embedding: path of the token embedding. input, output, decoder: paths of EmbeddingSite's modules ("" is the base
    model itself). positions(config): the longest input its position table allows, or None.
    norm_offset: what is added to a norm's weight. supports_attention_interface: whether attention goes through the
    functions registered with `transformers.AttentionInterface`. packable: whether every linear map and norm sees the
    batch's rows in its first axis, as runs that share a pass need.
    """

    stacks: tuple[tuple[str, Layer], ...]
    embedding: str
    norm: tuple[tuple[str, str], ...] = ()
    input: str = ""
    output: str = ""
    decoder: str | None = None
    positions: Callable[[Any], int | None] = lambda config: None
    norm_offset: float = 0.0
    supports_attention_interface: bool = True
    packable: bool = True


def block(index: int, of: int) -> Callable[[Any, int], slice]:
    """Block `index` of `of` equal blocks side by side, as GPT-2's c_attn and Phi-3's gate_up_proj hold them."""

    def columns(config: Any, width: int) -> slice:
        step = width // of
        return slice(index * step, (index + 1) * step)

    return columns


def interleaved(index: int, of: int = 3) -> Callable[[Any, int], tuple[int, ...]]:
    """Part `index` of every head, the heads one after another: [head 0: q k v, head 1: q k v, …] (GPT-NeoX, BLOOM)."""

    def columns(config: Any, width: int) -> tuple[int, ...]:
        heads = config.num_attention_heads
        size = width // heads // of
        return tuple(c for h in range(heads) for c in range((h * of + index) * size, (h * of + index + 1) * size))

    return columns


def grouped(index: int) -> Callable[[Any, int], slice]:
    """Query, key or value of a matrix whose key and value blocks hold fewer heads than its query block (Phi-3)."""

    def columns(config: Any, width: int) -> slice:
        heads, key_heads, size = _heads(config)
        edges = (0, heads * size, (heads + key_heads) * size, (heads + 2 * key_heads) * size)
        return slice(edges[index], edges[index + 1])

    return columns


def _split(path: str, prefix: str = "attention", query: str = "q_proj", key: str = "k_proj", value: str = "v_proj"):
    names = (("query", query), ("key", key), ("value", value))
    return tuple(Linear(f"{prefix}.{role}", f"{path}.{name}") for role, name in names)


def _fused(path: str, layout: Callable[[int], Callable[[Any, int], Columns]]):
    return tuple(Linear(f"attention.{role}", path, layout(i)) for i, role in enumerate(("query", "key", "value")))


def _encoder_layer(query: str, key: str, value: str) -> Layer:
    return Layer(
        linear=(
            *_split("attention.self", query=query, key=key, value=value),
            Linear("attention.output", "attention.output.dense"),
            Linear("mlp.up", "intermediate.dense"),
            Linear("mlp.down", "output.dense"),
        ),
        hidden=(
            Hidden("attention", "attention.self", "attention.output.dropout"),
            Hidden("mlp", "intermediate", "output.dropout"),
        ),
        norm={"norm.attention": "attention.output.LayerNorm", "norm.mlp": "output.LayerNorm"},
        attention={"attention": "attention.self"},
    )


def _padded_positions(config: Any) -> int:
    # RoBERTa counts positions from the padding index on, so the table's first rows are never reached
    return config.max_position_embeddings - config.pad_token_id - 1


_BERT = Family(
    stacks=(("encoder.layer", _encoder_layer("query", "key", "value")),),
    embedding="embeddings.word_embeddings",
    norm=(("norm.embedding", "embeddings.LayerNorm"),),
    output="encoder",
    positions=lambda config: config.max_position_embeddings,
)

_ROBERTA = Family(
    stacks=_BERT.stacks, embedding=_BERT.embedding, norm=_BERT.norm, output="encoder", positions=_padded_positions
)

_DEBERTA = Family(
    stacks=(("encoder.layer", _encoder_layer("query_proj", "key_proj", "value_proj")),),
    embedding="embeddings.word_embeddings",
    norm=(("norm.embedding", "embeddings.LayerNorm"), ("norm.position", "encoder.LayerNorm")),
    positions=lambda config: config.max_position_embeddings if config.position_biased_input else None,
    supports_attention_interface=False,
    # query_proj and key_proj also project the relative positions, which the rows of a batch share
    packable=False,
)

_GPT2 = Family(
    stacks=(
        (
            "h",
            Layer(
                linear=(
                    *_fused("attn.c_attn", lambda i: block(i, 3)),
                    Linear("attention.output", "attn.c_proj"),
                    Linear("mlp.up", "mlp.c_fc"),
                    Linear("mlp.down", "mlp.c_proj"),
                ),
                hidden=(Hidden("attention", "attn", "attn.resid_dropout"), Hidden("mlp", "mlp", "mlp.dropout")),
                norm={"norm.attention": "ln_1", "norm.mlp": "ln_2"},
                attention={"attention": "attn"},
            ),
        ),
    ),
    embedding="wte",
    norm=(("norm.final", "ln_f"),),
    positions=lambda config: config.max_position_embeddings,
)

_OPT = Family(
    stacks=(
        (
            "decoder.layers",
            Layer(
                linear=(
                    *_split("self_attn"),
                    Linear("attention.output", "self_attn.out_proj"),
                    Linear("mlp.up", "fc1"),
                    Linear("mlp.down", "fc2"),
                ),
                # the dropout that follows is a function, not a module
                hidden=(Hidden("attention", "self_attn", "self_attn.out_proj"), Hidden("mlp", "fc1", "fc2")),
                norm={"norm.attention": "self_attn_layer_norm", "norm.mlp": "final_layer_norm"},
                attention={"attention": "self_attn"},
            ),
        ),
    ),
    embedding="decoder.embed_tokens",
    # the language model calls the decoder itself, past the model around it
    input="decoder",
    output="decoder",
    norm=(("norm.final", "decoder.final_layer_norm"),),
    positions=lambda config: config.max_position_embeddings,
)

_GPT_NEOX = Family(
    stacks=(
        (
            "layers",
            Layer(
                linear=(
                    *_fused("attention.query_key_value", interleaved),
                    Linear("attention.output", "attention.dense"),
                    Linear("mlp.up", "mlp.dense_h_to_4h"),
                    Linear("mlp.down", "mlp.dense_4h_to_h"),
                ),
                hidden=(
                    Hidden("attention", "attention", "post_attention_dropout"),
                    Hidden("mlp", "mlp", "post_mlp_dropout"),
                ),
                norm={"norm.attention": "input_layernorm", "norm.mlp": "post_attention_layernorm"},
                attention={"attention": "attention"},
            ),
        ),
    ),
    embedding="embed_in",
    norm=(("norm.final", "final_layer_norm"),),
)

_BLOOM = Family(
    stacks=(
        (
            "h",
            Layer(
                linear=(
                    *_fused("self_attention.query_key_value", interleaved),
                    Linear("attention.output", "self_attention.dense"),
                    Linear("mlp.up", "mlp.dense_h_to_4h"),
                    Linear("mlp.down", "mlp.dense_4h_to_h"),
                ),
                # dropout and residual sum are one function inside the sublayer
                hidden=(
                    Hidden("attention", "self_attention", "self_attention.dense"),
                    Hidden("mlp", "mlp", "mlp.dense_4h_to_h"),
                ),
                norm={"norm.attention": "input_layernorm", "norm.mlp": "post_attention_layernorm"},
                attention={"attention": "self_attention"},
            ),
        ),
    ),
    embedding="word_embeddings",
    norm=(("norm.embedding", "word_embeddings_layernorm"), ("norm.final", "ln_f")),
    supports_attention_interface=False,
)


def _t5_layer(cross: bool) -> Layer:
    mlp = "layer.2" if cross else "layer.1"
    linear = [*_split("layer.0.SelfAttention", query="q", key="k", value="v")]
    linear.append(Linear("attention.output", "layer.0.SelfAttention.o"))
    hidden = [Hidden("attention", "layer.0.SelfAttention", "layer.0.dropout")]
    norm = {"norm.attention": "layer.0.layer_norm"}
    attention = {"attention": "layer.0.SelfAttention"}
    if cross:
        linear.extend(_split("layer.1.EncDecAttention", "cross_attention", query="q", key="k", value="v"))
        linear.append(Linear("cross_attention.output", "layer.1.EncDecAttention.o"))
        hidden.append(Hidden("cross_attention", "layer.1.EncDecAttention", "layer.1.dropout"))
        norm["norm.cross_attention"] = "layer.1.layer_norm"
        attention["cross_attention"] = "layer.1.EncDecAttention"
    # the first T5 has wi alone, T5 v1.1 gates: gelu(wi_0 x) * wi_1 x
    linear.append(Linear("mlp.gate", f"{mlp}.DenseReluDense.wi_0"))
    linear.append(Linear("mlp.up", f"{mlp}.DenseReluDense.wi"))
    linear.append(Linear("mlp.up", f"{mlp}.DenseReluDense.wi_1"))
    linear.append(Linear("mlp.down", f"{mlp}.DenseReluDense.wo"))
    hidden.append(Hidden("mlp", f"{mlp}.DenseReluDense", f"{mlp}.dropout"))
    norm["norm.mlp"] = f"{mlp}.layer_norm"
    return Layer(tuple(linear), tuple(hidden), norm, attention)


_T5 = Family(
    stacks=(("encoder.block", _t5_layer(cross=False)), ("decoder.block", _t5_layer(cross=True))),
    embedding="encoder.embed_tokens",
    norm=(("norm.final", "encoder.final_layer_norm"), ("norm.final", "decoder.final_layer_norm")),
    input="encoder",
    output="encoder",
    decoder="decoder",
)


def _llama_layer(
    norm: dict[str, str],
    attention_output: str = "self_attn.o_proj",
    mlp_output: str = "mlp.down_proj",
    fused: bool = False,
) -> Layer:
    query_key_value = _fused("self_attn.qkv_proj", grouped) if fused else _split("self_attn")
    gate_up = (
        (Linear("mlp.gate", "mlp.gate_up_proj", block(0, 2)), Linear("mlp.up", "mlp.gate_up_proj", block(1, 2)))
        if fused
        else (Linear("mlp.gate", "mlp.gate_proj"), Linear("mlp.up", "mlp.up_proj"))
    )
    return Layer(
        linear=(
            *query_key_value,
            Linear("attention.output", "self_attn.o_proj"),
            *gate_up,
            Linear("mlp.down", "mlp.down_proj"),
        ),
        hidden=(Hidden("attention", "self_attn", attention_output), Hidden("mlp", "mlp", mlp_output)),
        norm=norm | {"norm.query": "self_attn.q_norm", "norm.key": "self_attn.k_norm"},
        attention={"attention": "self_attn"},
    )


_TWO_NORMS = {"norm.attention": "input_layernorm", "norm.mlp": "post_attention_layernorm"}
_FOUR_NORMS = {
    "norm.attention": "input_layernorm",
    "norm.attention_output": "post_attention_layernorm",
    "norm.mlp": "pre_feedforward_layernorm",
    "norm.mlp_output": "post_feedforward_layernorm",
}


def _llama_like(layer: Layer, norm_offset: float = 0.0) -> Family:
    return Family(
        stacks=(("layers", layer),), embedding="embed_tokens", norm=(("norm.final", "norm"),), norm_offset=norm_offset
    )


_LLAMA = _llama_like(_llama_layer(_TWO_NORMS))
_PHI3 = _llama_like(_llama_layer(_TWO_NORMS, "resid_attn_dropout", "resid_mlp_dropout", fused=True))
_GEMMA = _llama_like(_llama_layer(_TWO_NORMS), norm_offset=1.0)
_GEMMA2 = _llama_like(
    _llama_layer(_FOUR_NORMS, "post_attention_layernorm", "post_feedforward_layernorm"), norm_offset=1.0
)

_FAMILIES: dict[str, Family] = {
    "bert": _BERT,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "deberta-v2": _DEBERTA,
    "gpt2": _GPT2,
    "opt": _OPT,
    "gpt_neox": _GPT_NEOX,
    "bloom": _BLOOM,
    "t5": _T5,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "phi3": _PHI3,
    "gemma": _GEMMA,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA2,
}


def register_family(model_type: str, family: Family) -> None:
    """Map an architecture: `model_type` as in its transformers config; replaces a mapping of the same name."""
    _FAMILIES[model_type] = family


def families() -> tuple[str, ...]:
    """The mapped model types."""
    return tuple(_FAMILIES)


def _heads(config: Any) -> tuple[int, int, int]:
    """(query heads, key and value heads, width of a head)."""
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    return heads, key_heads, getattr(config, "head_dim", None) or config.hidden_size // heads


def _base(model: nn.Module) -> tuple[str, PreTrainedModel]:
    """Name and module of the base model in `model`: itself, a task model's body, or of the first model it holds."""
    for _, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            base = module.base_model
            for name, candidate in model.named_modules():
                if candidate is base:
                    return name, base
    raise UserError(f"no transformers model found in {type(model).__name__}: pass a transformers.PreTrainedModel")


def family_of(model: nn.Module) -> Family:
    """The role table of `model`'s architecture; UserError with an example of a table if there is none."""
    model_type = _base(model)[1].config.model_type
    if model_type not in _FAMILIES:
        raise UserError(
            f"model type {model_type!r} has no role table (mapped: {', '.join(sorted(_FAMILIES))}); name modules in "
            "`targets` for linear sites, or map it: from peftbench.models.roles import Family, Hidden, Layer, Linear, "
            f'register_family; register_family("{model_type}", Family(stacks=(("layers", Layer(linear=('
            'Linear("attention.query", "self_attn.q_proj"), Linear("mlp.down", "mlp.down_proj")), '
            'hidden=(Hidden("mlp", "mlp", "mlp.down_proj"),), '
            'norm={"norm.attention": "input_layernorm"}, attention={"attention": "self_attn"})),), '
            'embedding="embed_tokens", norm=(("norm.final", "norm"),)))'
        )
    return _FAMILIES[model_type]


def supports_attention_interface(model: nn.Module) -> bool:
    """Whether attention of this architecture calls the functions registered with `transformers.AttentionInterface`."""
    return family_of(model).supports_attention_interface


def packable(model_type: str | None) -> bool:
    """Whether runs can share a pass through models of this type; taken for granted of unmapped ones."""
    return model_type not in _FAMILIES or _FAMILIES[model_type].packable


def _child(module: nn.Module, path: str) -> nn.Module | None:
    for part in filter(None, path.split(".")):
        children = module._modules
        found = children.get(part)
        if found is None:
            return None
        module = found
    return module


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _layers(name: str, base: nn.Module, family: Family) -> Iterator[tuple[int, str, nn.Module, Layer]]:
    """(running index over all stacks, name in the whole model, module, table) of every layer."""
    index = 0
    for path, table in family.stacks:
        stack = _child(base, path)
        for number, module in enumerate(stack.children() if stack is not None else ()):
            yield index, _join(name, path, str(number)), module, table
            index += 1


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D, QuantizedLinear))


def _linear_site(role: str, layer: int | None, name: str, module: nn.Module, config: Any, columns: Any = None) -> Site:
    if isinstance(module, Conv1D):
        in_features, out_features = int(module.nx), int(module.nf)
    else:
        assert isinstance(module, (nn.Linear, QuantizedLinear))
        in_features, out_features = module.in_features, module.out_features
    own: Columns = columns(config, out_features) if columns is not None else None
    if own is not None:
        out_features = len(range(*own.indices(out_features))) if isinstance(own, slice) else len(own)
    return Site(
        "linear",
        role,
        layer,
        name,
        module,
        in_features=in_features,
        out_features=out_features,
        columns=own,
        transposed=isinstance(module, Conv1D),
    )


def _table_linears(model: nn.Module) -> list[Site]:
    name, base = _base(model)
    sites = []
    for index, layer_name, layer, table in _layers(name, base, family_of(model)):
        for entry in table.linear:
            module = _child(layer, entry.path)
            if module is not None:
                site_name = _join(layer_name, entry.path)
                sites.append(_linear_site(entry.role, index, site_name, module, base.config, entry.columns))
    return sites


_SHARED = {
    "attention.query": "attention",
    "attention.key": "attention",
    "attention.value": "attention",
    "mlp.gate": "mlp",
    "mlp.up": "mlp",
}
"""Roles whose modules a layer calls with one and the same tensor."""


def shared_inputs(model: nn.Module) -> dict[str, str]:
    """Return, by module name, one name for all linear modules of a layer that get the same input.

    A model without a role table has none.
    """
    try:
        sites = _table_linears(model)
    except UserError:
        return {}
    whole = [site for site in sites if site.columns is None and site.role in _SHARED]
    return {site.name: f"{site.name.rpartition('.')[0]}:{_SHARED[site.role]}" for site in whole}


def _norm_site(role: str, layer: int | None, name: str, module: nn.Module, offset: float) -> Site:
    weight = module.weight
    return Site("norm", role, layer, name, module, width=int(weight.shape[-1]), offset=offset)  # type: ignore[index, arg-type]


def find_sites(model: nn.Module, kind: str) -> list[Site]:
    """All sites of a kind that the architecture's role table names, layer by layer.

    `model` is any transformers model, with or without a task head, or a module that holds one; names are relative to
    it. Raises UserError for an unmapped architecture or an unknown kind.
    """
    if kind not in KINDS:
        raise UserError(f"site kind {kind!r} is unknown: one of {', '.join(KINDS)}{nearest(kind, KINDS)}")
    if kind == "linear":
        return _table_linears(model)
    if kind == "embedding":
        return [embedding_site(model)]
    family = family_of(model)
    name, base = _base(model)
    width = base.config.hidden_size
    _, key_heads, head_dim = _heads(base.config)
    sites: list[Site] = []
    for index, layer_name, layer, table in _layers(name, base, family):
        if kind == "hidden":
            for entry in table.hidden:
                source, output = _child(layer, entry.source), _child(layer, entry.output)
                if source is not None and output is not None:
                    full = _join(layer_name, entry.output)
                    sites.append(Site("hidden", entry.role, index, full, output, source=source, width=width))
        elif kind == "attention":
            for role, path in table.attention.items():
                module = _child(layer, path)
                if module is not None:
                    full = _join(layer_name, path)
                    sites.append(Site(kind, role, index, full, module, key_heads=key_heads, head_dim=head_dim))
        else:
            for role, path in table.norm.items():
                module = _child(layer, path)
                if module is not None:
                    sites.append(_norm_site(role, index, _join(layer_name, path), module, family.norm_offset))
    if kind == "norm":
        for role, path in family.norm:
            module = _child(base, path)
            if module is not None:
                sites.append(_norm_site(role, None, _join(name, path), module, family.norm_offset))
    return sites


def embedding_site(model: nn.Module) -> EmbeddingSite:
    """Where the input embedding is and which modules a longer input passes; UserError for an unmapped architecture."""
    family = family_of(model)
    name, base = _base(model)
    module, input_module, output_module = (_child(base, p) for p in (family.embedding, family.input, family.output))
    if module is None or input_module is None or output_module is None:
        raise UserError(f"{type(base).__name__} has no module {family.embedding!r}: its role table does not fit")
    return EmbeddingSite(
        kind="embedding",
        role="embedding",
        layer=None,
        name=_join(name, family.embedding),
        module=module,
        width=int(module.weight.shape[-1]),  # type: ignore[index, union-attr, arg-type]
        input_module=input_module,
        output_module=output_module,
        decoder_module=None if family.decoder is None else _child(base, family.decoder),
        max_positions=family.positions(base.config),
    )


def _role_names(roles: Sequence[str]) -> set[str]:
    return {"all", *roles, *(role.partition(".")[0] for role in roles)}


def _suffix_match(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith(f".{suffix}")


def linear_sites(model: nn.Module, targets: str | Sequence[str]) -> list[Site]:
    """The linear sites that `targets` names, in the model's order, each once.

    `targets` is a list whose entries are roles ("attention.query"), prefixes of roles ("attention", "mlp", "all"), or
    suffixes of module names ("q_proj", "attn.c_attn"); or one string: a role, "all-linear" (every linear module but the
    task head), or a regular expression that matches whole module names. Roles give the role's own part of a shared
    matrix; module names give whole modules, as PEFT's `target_modules` does, the head only if it is named.
    Raises UserError for a target that matches nothing.
    """
    entries = [targets] if isinstance(targets, str) else [str(target) for target in targets]
    if not entries:
        raise UserError("targets is empty: give roles, suffixes of module names, or one regular expression")
    known = _role_names(LINEAR_ROLES)
    whole = {name: module for name, module in model.named_modules() if _is_linear(module)}
    chosen: list[Site] = []
    if any(entry in known for entry in entries):
        table = _table_linears(model)
        present = sorted({site.role for site in table})
        for entry in (e for e in entries if e in known):
            found = [s for s in table if entry in ("all", s.role, s.role.partition(".")[0])]
            if not found:
                raise UserError(
                    f"targets: {_base(model)[1].config.model_type} has no {entry!r}; it has {', '.join(present)}"
                )
            chosen.extend(found)
    for entry in (e for e in entries if e not in known):
        if entry == "all-linear":
            names = _body_linears(model, whole)
        elif isinstance(targets, str):
            names = _regex_names(entry, whole)
        else:
            names = [name for name in whole if _suffix_match(name, entry)]
        if not names:
            accepted = sorted({name.rpartition(".")[2] for name in whole} | known)
            form = "regular expression" if isinstance(targets, str) else "role or suffix"
            raise UserError(
                f"targets: {entry!r} matches no linear module of {type(model).__name__} (as {form}); "
                f"names here: {', '.join(accepted)}{nearest(entry, accepted)}"
            )
        chosen.extend(_whole_sites(model, names, whole))
    return _in_order(chosen, list(whole))


def _regex_names(pattern: str, names: Sequence[str] | dict[str, nn.Module]) -> list[str]:
    try:
        return [name for name in names if re.fullmatch(pattern, name)]
    except re.error as error:
        raise UserError(f"targets: {pattern!r} is no regular expression ({error})") from error


def _body_linears(model: nn.Module, whole: dict[str, nn.Module]) -> list[str]:
    prefix, base = _base(model)
    # a model that is its own base (T5 with its language-model head) holds the head inside
    head = base.get_output_embeddings()
    return [n for n, module in whole.items() if (n.startswith(f"{prefix}.") if prefix else True) and module is not head]


def _whole_sites(model: nn.Module, names: Sequence[str], whole: dict[str, nn.Module]) -> list[Site]:
    base = _base(model)[1]
    table = _table_linears(model) if base.config.model_type in _FAMILIES else []
    roles = {site.name: site for site in table}
    sites = []
    for name in names:
        known = roles.get(name)
        # a matrix that several roles share has no role of its own
        role = known.role if known is not None and known.columns is None else "module"
        layer = known.layer if known is not None else None
        sites.append(_linear_site(role, layer, name, whole[name], base.config))
    return sites


def _in_order(sites: list[Site], order: list[str]) -> list[Site]:
    unique = {site.key: site for site in sites}
    fully = {site.name for site in unique.values() if site.columns is None}
    clash = [site for site in unique.values() if site.columns is not None and site.name in fully]
    if clash:
        raise UserError(
            f"targets name {clash[0].name!r} as a whole and its part {clash[0].role!r} too: give one of them"
        )
    rank = {name: i for i, name in enumerate(order)}
    part = {role: i for i, role in enumerate(LINEAR_ROLES)}
    return sorted(unique.values(), key=lambda s: (rank[s.name], part.get(s.role, 0)))
