"""Roles: sites are where the model uses them, fused matrices are cut rightly, targets select what PEFT would select."""

import logging
from types import SimpleNamespace

import peft
import pytest
import torch
from torch import nn
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTextEncoding,
    PreTrainedModel,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from peftbench.errors import UserError
from peftbench.models import roles
from peftbench.models.roles import (
    LINEAR_ROLES,
    embedding_site,
    family_of,
    find_sites,
    first_input,
    linear_sites,
    register_family,
    supports_attention_interface,
)

logging.getLogger("transformers").setLevel(logging.ERROR)

BERT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
LLAMA = BERT | {"num_key_value_heads": 2, "head_dim": 12, "bos_token_id": 1, "eos_token_id": 2}
DEBERTA = BERT | {
    "relative_attention": True,
    "position_buckets": 8,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
    "type_vocab_size": 0,
}
GPT2 = {"vocab_size": 64, "n_positions": 40, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}
OPT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_dim": 48,
    "max_position_embeddings": 40,
    "word_embed_proj_dim": 32,
    "init_std": 0.3,
}
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 12, "d_ff": 48, "num_layers": 2, "num_heads": 4, "pad_token_id": 0}
SETTINGS = {
    "bert": ("bert", BERT),
    "roberta": ("roberta", BERT | {"type_vocab_size": 1}),
    "deberta-v2": ("deberta-v2", DEBERTA),
    "gpt2": ("gpt2", GPT2 | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}),
    "opt": ("opt", OPT | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}),
    "opt-post-norm": ("opt", OPT | {"do_layer_norm_before": False, "pad_token_id": 0}),
    "gpt_neox": ("gpt_neox", BERT | {"bos_token_id": 1, "eos_token_id": 2}),
    "gpt_neox-serial": ("gpt_neox", BERT | {"use_parallel_residual": False, "bos_token_id": 1, "eos_token_id": 2}),
    "bloom": ("bloom", {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}),
    "t5": ("t5", T5),
    "t5-gated": ("t5", T5 | {"feed_forward_proj": "gated-gelu"}),
    "llama": ("llama", LLAMA),
    "mistral": ("mistral", LLAMA),
    "qwen2": ("qwen2", LLAMA | {"head_dim": 8}),
    "qwen3": ("qwen3", LLAMA),
    "phi3": ("phi3", LLAMA | {"head_dim": 8}),
    "gemma": ("gemma", LLAMA),
    "gemma2": ("gemma2", LLAMA | {"query_pre_attn_scalar": 12}),
    "gemma3_text": ("gemma3_text", LLAMA | {"query_pre_attn_scalar": 12, "sliding_window": 8}),
}
FUSED = ("gpt2", "gpt_neox", "bloom", "phi3")
ENCODERS = ("bert", "roberta", "deberta-v2")
EAGER_ONLY = ("deberta-v2", "bloom")


def make(name: str, auto=AutoModel, attention: str | None = None, device: str = "cpu"):
    model_type, settings = SETTINGS[name]
    config = AutoConfig.for_model(model_type, **settings)
    torch.manual_seed(0)
    with torch.device(device):
        model = auto.from_config(config, attn_implementation=attention or "eager")
    if device != "meta":
        # scales of exactly one and biases of exactly zero would hide mistakes
        for parameter in model.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()


def inputs(model: nn.Module) -> dict[str, torch.Tensor]:
    ids = torch.arange(3, 21).reshape(2, 9)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    decoder = getattr(model.config, "is_encoder_decoder", False) and hasattr(model, "decoder")
    return batch | ({"decoder_input_ids": ids.flip(1)[:, :5]} if decoder else {})


def kept_calls(model: nn.Module, modules: dict) -> dict:
    """(first input, output) of the last call of every module while the model runs once."""
    calls: dict = {}

    def keep(key):
        def hook(module, args, kwargs, output):
            calls[key] = (
                first_input(args, kwargs) if args or "hidden_states" in kwargs else None,
                output[0] if isinstance(output, tuple) else output,
            )

        return hook

    handles = [module.register_forward_hook(keep(key), with_kwargs=True) for key, module in modules.items()]
    with torch.no_grad():
        model(**inputs(model))
    for handle in handles:
        handle.remove()
    return calls


def weight_of(site) -> torch.Tensor:
    """The role's own weight, [out, in]."""
    weight = site.module.weight.T if site.transposed else site.module.weight
    return (
        weight if site.columns is None else weight[site.columns if isinstance(site.columns, slice) else [*site.columns]]
    )


# the table fits the architecture


def test_every_mapped_family_is_tested():
    assert {model_type for model_type, _ in SETTINGS.values()} | {"xlm-roberta"} == set(roles.families())


@pytest.mark.parametrize("name", SETTINGS)
def test_every_layer_has_every_role_once(name):
    model = make(name, device="meta")
    sites = find_sites(model, "linear")
    layers = {site.layer for site in sites}
    assert layers == set(range(4 if name.startswith("t5") else 2))
    for layer in layers:
        found = sorted(site.role for site in sites if site.layer == layer)
        expected = {role for role in LINEAR_ROLES if not role.startswith("cross")} - {"mlp.gate"}
        if name in ("t5-gated", "llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "gemma2", "gemma3_text"):
            expected |= {"mlp.gate"}
        if name.startswith("t5") and layer >= 2:
            expected |= {role for role in LINEAR_ROLES if role.startswith("cross")}
        assert found == sorted(expected)
    assert len({site.key for site in sites}) == len(sites)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_weight_of_a_layer_belongs_to_a_site(name):
    model = make(name, device="meta")
    claimed = {id(site.module) for kind in ("linear", "norm", "embedding") for site in find_sites(model, kind)}
    table = {module: where for where, module in model.named_modules()}
    unclaimed = {
        where for module, where in table.items() if id(module) not in claimed and list(module.parameters(False))
    }
    # position and token-type tables, poolers, and T5's other names for its one embedding
    allowed = (
        "position",
        "wpe",
        "token_type",
        "pooler",
        "rel_embeddings",
        "relative_attention_bias",
        "shared",
        "embed_tokens",
    )
    assert not [where for where in unclaimed if not any(word in where for word in allowed)]


@pytest.mark.parametrize("name", SETTINGS)
def test_widths_are_those_of_the_weights(name):
    model = make(name)
    for site in find_sites(model, "linear"):
        assert tuple(weight_of(site).shape) == (site.out_features, site.in_features)
        assert site.transposed == isinstance(site.module, Conv1D)
        assert dict(model.named_modules())[site.name] is site.module
    for site in find_sites(model, "norm"):
        assert tuple(site.module.weight.shape) == (site.width,)
        assert dict(model.named_modules())[site.name] is site.module


@pytest.mark.parametrize("name", SETTINGS)
def test_names_resolve_with_every_head(name):
    text = AutoModelForSeq2SeqLM if name.startswith("t5") else AutoModelForCausalLM
    plain = make(name, device="meta")
    autos = [AutoModelForSequenceClassification] + ([] if name in ENCODERS else [text])
    for auto in autos:
        model = make(name, auto, device="meta")
        names = dict(model.named_modules())
        wrapped = nn.ModuleDict({"inner": model})
        for kind in roles.KINDS:
            sites = find_sites(model, kind)
            assert all(names[site.name] is site.module for site in sites)
            assert len(sites) == len(find_sites(plain, kind))
            assert [f"inner.{site.name}" for site in sites] == [site.name for site in find_sites(wrapped, kind)]
    if name.startswith("t5"):
        encoder = make(name, AutoModelForTextEncoding, device="meta")
        assert {site.layer for site in find_sites(encoder, "linear")} == {0, 1}
        assert embedding_site(encoder).decoder_module is None


# fused matrices


def _split_projection(site, calls) -> torch.Tensor:
    """What the role's own weight makes of the module's input, [batch, tokens, out]."""
    bias = site.module.bias
    if bias is not None and site.columns is not None:
        bias = bias[site.columns if isinstance(site.columns, slice) else [*site.columns]]
    return nn.functional.linear(calls[id(site.module)][0], weight_of(site), bias)


@pytest.mark.parametrize("name", [name for name in SETTINGS if name not in EAGER_ONLY])
def test_projections_are_what_attention_receives(name):
    """Query, key and value of the attention interface are the sites' projections, rotation set aside."""
    model = make(name)
    received: dict = {}

    def record(module, query, key, value, attention_mask, **kwargs):
        received[module] = (query, key, value)
        kwargs.pop("softcap", None)  # the result does not matter here
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("recording", record)
    ALL_MASK_ATTENTION_FUNCTIONS.register("recording", sdpa_mask)
    _no_rotation(model)
    for module in model.modules():
        # T5's stacks hold copies of the config
        if isinstance(module, PreTrainedModel):
            module.config._attn_implementation = "recording"
    assert supports_attention_interface(model)
    linears = {(site.layer, site.role): site for site in find_sites(model, "linear")}
    calls = kept_calls(model, {id(site.module): site.module for site in linears.values()})
    sites = find_sites(model, "attention")
    assert {site.module for site in sites} == set(received)
    for site in sites:
        query, key, value = received[site.module]
        assert tuple(key.shape[:2]) == (2, site.key_heads)
        assert key.shape[-1] == value.shape[-1] == site.head_dim
        for part, tensor in (("query", query), ("key", key), ("value", value)):
            linear = linears[site.layer, f"{site.role}.{part}"]
            own = _split_projection(linear, calls)
            own = own.unflatten(-1, (-1, site.head_dim)).transpose(1, 2)
            norm = {n.role: n.module for n in find_sites(model, "norm") if n.layer == site.layer}.get(f"norm.{part}")
            own = norm(own) if norm is not None else own
            # OPT scales the query itself
            scale = site.head_dim**-0.5 if name.startswith("opt") and part == "query" else 1.0
            torch.testing.assert_close(own * scale, tensor, rtol=1e-4, atol=1e-5)


def _no_rotation(model: nn.Module) -> None:
    """Make rotary position embeddings the identity, so that the projections arrive as they are."""
    for module in model.modules():
        if hasattr(module, "inv_freq") or any(
            name.endswith("inv_freq") for name, _ in module.named_buffers(recurse=False)
        ):
            for _, buffer in module.named_buffers(recurse=False):
                buffer.zero_()


@pytest.mark.parametrize("name", EAGER_ONLY)
def test_models_without_the_attention_interface_say_so(name):
    assert not supports_attention_interface(make(name, device="meta"))
    assert {site.head_dim * 4 for site in find_sites(make(name, device="meta"), "attention")} == {32}


def test_bloom_query_key_value_are_interleaved_per_head():
    """Rebuild the layer's attention from the three sites alone."""
    model = make("bloom")
    sites = {site.role: site for site in find_sites(model, "linear") if site.layer == 0}
    calls = kept_calls(model, {id(site.module): site.module for site in sites.values()})
    mask = inputs(model)["attention_mask"]
    heads = [
        _split_projection(sites[f"attention.{part}"], calls).unflatten(-1, (4, 8)).transpose(1, 2)
        for part in ("query", "key", "value")
    ]
    scores = heads[0] @ heads[1].transpose(2, 3) / 8**0.5
    slopes = torch.tensor([2.0 ** (-2 * (h + 1)) for h in range(4)])
    scores = scores + slopes[None, :, None, None] * ((mask.cumsum(-1) - 1) * mask)[:, None, None, :]
    causal = torch.ones(9, 9).tril().bool()
    scores = scores.masked_fill(~(causal & mask[:, None, None, :].bool()), torch.finfo(torch.float32).min)
    context = (scores.softmax(-1) @ heads[2]).transpose(1, 2).flatten(2)
    torch.testing.assert_close(context, calls[id(sites["attention.output"].module)][0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in FUSED if name in SETTINGS])
def test_parts_of_a_shared_matrix_cover_it_once(name):
    model = make(name, device="meta")
    by_module: dict = {}
    for site in find_sites(model, "linear"):
        if site.columns is not None:
            by_module.setdefault(site.name, []).append(site)
    assert by_module
    for parts in by_module.values():
        width = roles._linear_site("", None, "", parts[0].module, model.config).out_features
        covered = [c for s in parts for c in (range(width)[s.columns] if isinstance(s.columns, slice) else s.columns)]
        assert sorted(covered) == list(range(width))


def test_phi3_gate_and_up():
    model = make("phi3")
    sites = {site.role: site for site in find_sites(model, "linear") if site.layer == 0}
    calls = kept_calls(model, {id(site.module): site.module for site in sites.values()})
    gate, up = (_split_projection(sites[f"mlp.{part}"], calls) for part in ("gate", "up"))
    torch.testing.assert_close(nn.functional.silu(gate) * up, calls[id(sites["mlp.down"].module)][0])


def test_t5_gate_and_up():
    model = make("t5-gated")
    sites = {site.role: site for site in find_sites(model, "linear") if site.layer == 3}
    calls = kept_calls(model, {id(site.module): site.module for site in sites.values()})
    gate, up = (_split_projection(sites[f"mlp.{part}"], calls) for part in ("gate", "up"))
    expected = nn.functional.gelu(gate, approximate="tanh") * up
    torch.testing.assert_close(expected, calls[id(sites["mlp.down"].module)][0])


@pytest.mark.parametrize("name", SETTINGS)
def test_mlp_up_feeds_mlp_down(name):
    """Zeroing the role's own rows (and bias) of mlp.up leaves mlp.down an input of act(0), which is zero everywhere."""
    model = make(name)
    sites = find_sites(model, "linear")
    with torch.no_grad():
        for site in sites:
            if site.role == "mlp.up":
                rows = slice(None) if site.columns is None else site.columns
                (site.module.weight.T if site.transposed else site.module.weight)[rows] = 0
                if site.module.bias is not None:
                    site.module.bias[rows] = 0
    calls = kept_calls(model, {site.name: site.module for site in sites if site.role == "mlp.down"})
    assert all(not calls[key][0].any() for key in calls)


# sublayers


def _residual_sum(name: str, model: nn.Module) -> None:
    family = family_of(model)
    base_name, base = roles._base(model)
    layers = {index: layer for index, _, layer, _ in roles._layers(base_name, base, family)}
    hidden = find_sites(model, "hidden")
    norms = {(site.layer, site.role): site.module for site in find_sites(model, "norm")}
    modules = {("layer", index): layer for index, layer in layers.items()}
    modules |= {(site.layer, site.role): site.module for site in hidden}
    modules |= {(site.layer, site.role, "source"): site.source for site in hidden}
    calls = kept_calls(model, modules)
    for index in layers:
        stream, result = calls["layer", index]
        own = [site.role for site in hidden if site.layer == index]
        assert own == (["attention", "cross_attention", "mlp"] if "cross_attention" in own else ["attention", "mlp"])
        parallel = name == "gpt_neox"
        post = name in ENCODERS or name == "opt-post-norm"
        start = stream
        for role in own:
            norm = norms[index, f"norm.{role}"]
            fed = start if parallel else stream
            fed = fed if post else norm(fed)
            source, output = calls[index, role, "source"][0], calls[index, role][1]
            assert source.shape == output.shape
            torch.testing.assert_close(source.view(fed.shape), fed)
            stream = stream + output.view(stream.shape)
            stream = norm(stream) if post else stream
        torch.testing.assert_close(stream, result, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SETTINGS)
def test_hidden_sites_are_the_summands_of_the_residual_stream(name):
    with torch.no_grad():
        _residual_sum(name, make(name))


@pytest.mark.parametrize("name", SETTINGS)
def test_an_offset_added_by_a_hook_on_a_hidden_site_reaches_the_output(name):
    model = make(name)
    batch = inputs(model)
    with torch.no_grad():
        before = model(**batch).last_hidden_state
        for site in find_sites(model, "hidden"):
            handle = site.module.register_forward_hook(
                lambda module, args, output: output + 1.5 * torch.randn(output.shape[-1])
            )
            changed = model(**batch).last_hidden_state
            handle.remove()
            assert not torch.allclose(before, changed)
        assert torch.equal(before, model(**batch).last_hidden_state)


# norms


@pytest.mark.parametrize("name", SETTINGS)
def test_norm_offset(name):
    """offset + weight is the scale: with weight = -offset everything but the bias vanishes."""
    model = make(name)
    for site in find_sites(model, "norm"):
        with torch.no_grad():
            site.module.weight.fill_(-site.offset)
            out = site.module(torch.randn(3, site.width))
        bias = getattr(site.module, "bias", None)
        assert torch.equal(out, torch.zeros(3, site.width) if bias is None else bias.detach().expand(3, -1))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bert", {"attention", "mlp", "embedding"}),
        ("deberta-v2", {"attention", "mlp", "embedding", "position"}),
        ("gpt2", {"attention", "mlp", "final"}),
        ("t5", {"attention", "cross_attention", "mlp", "final"}),
        ("qwen3", {"attention", "mlp", "query", "key", "final"}),
        ("gemma3_text", {"attention", "attention_output", "mlp", "mlp_output", "query", "key", "final"}),
    ],
)
def test_norm_roles(name, expected):
    assert {site.role for site in find_sites(make(name, device="meta"), "norm")} == {f"norm.{e}" for e in expected}


# embedding


@pytest.mark.parametrize("name", SETTINGS)
def test_embedding_site(name):
    """Lengthen the input at input_module, cut the output at output_module: an unattended prefix changes nothing."""
    model = make(name)
    site = embedding_site(model)
    batch = inputs(model)
    assert tuple(site.module.weight.shape) == (64, site.width)
    extra = 3

    def longer(module, args, kwargs):
        kwargs = dict(kwargs)
        ids = kwargs.pop("input_ids", args[0] if args else None)
        words = site.module(ids)
        # on the right, so that no position moves
        kwargs["inputs_embeds"] = torch.cat([words, torch.randn(2, extra, site.width)], dim=1)
        mask = kwargs["attention_mask"]
        kwargs["attention_mask"] = torch.cat([mask, mask.new_zeros(2, extra)], dim=1)
        return (), kwargs

    def cut(module, args, kwargs, output):
        assert output.last_hidden_state.shape[1] == 9 + extra
        output.last_hidden_state = output.last_hidden_state[:, :-extra]
        return output

    def attend(module, args, kwargs):
        mask = kwargs["encoder_attention_mask"]
        return args, kwargs | {"encoder_attention_mask": torch.cat([mask, mask.new_zeros(2, extra)], dim=1)}

    with torch.no_grad():
        plain = model(**batch).last_hidden_state
        site.input_module.register_forward_pre_hook(longer, with_kwargs=True)
        if site.decoder_module is None:
            site.output_module.register_forward_hook(cut, with_kwargs=True)
        else:
            site.decoder_module.register_forward_pre_hook(attend, with_kwargs=True)
        changed = model(**batch).last_hidden_state
    real = slice(None) if site.decoder_module is not None else batch["attention_mask"].bool()
    torch.testing.assert_close(plain[real], changed[real], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "longest"), [("bert", 40), ("roberta", 39), ("gpt2", 40), ("opt", 40), ("llama", None), ("t5", None)]
)
def test_max_positions(name, longest):
    model = make(name)
    assert embedding_site(model).max_positions == longest
    if longest is not None:
        ids = torch.full((1, longest + 1), 5)
        with torch.no_grad():
            model(input_ids=ids[:, :-1], attention_mask=torch.ones(1, longest, dtype=torch.long))
            with pytest.raises((IndexError, RuntimeError)):
                model(input_ids=ids, attention_mask=torch.ones_like(ids))


# targets

PEFT_TARGETS = {
    "bert": [["query", "value"], ["dense"], ["attention.output.dense"], r".*layer\.1.*(query|key)", "all-linear"],
    "roberta": [["query", "intermediate.dense"], "all-linear"],
    "deberta-v2": [["query_proj", "value_proj"], "all-linear"],
    "gpt2": [["c_attn"], ["c_attn", "mlp.c_proj"], r".*h\.0\.mlp\.c_.*", "all-linear"],
    "opt": [["q_proj", "v_proj"], ["fc1", "fc2"], "all-linear"],
    "gpt_neox": [["query_key_value"], "all-linear"],
    "bloom": [["query_key_value", "dense_4h_to_h"], "all-linear"],
    "t5": [["q", "v"], ["EncDecAttention.q"], r".*decoder.*\.wo", "all-linear"],
    "llama": [["q_proj", "v_proj"], ["layers.0.self_attn.q_proj"], r".*\.(up|down)_proj", "all-linear"],
    "phi3": [["qkv_proj"], "all-linear"],
    "gemma3_text": [["q_proj"], "all-linear"],
}
PEFT_CASES = [(name, targets) for name, cases in PEFT_TARGETS.items() for targets in cases]


@pytest.mark.parametrize(("name", "targets"), PEFT_CASES, ids=[f"{n}-{t}" for n, t in PEFT_CASES])
@pytest.mark.parametrize("head", ["none", "classification", "language"])
def test_module_names_select_what_peft_selects(name, targets, head):
    text = AutoModelForSeq2SeqLM if name == "t5" else AutoModelForCausalLM
    auto = {"none": AutoModel, "classification": AutoModelForSequenceClassification, "language": text}[head]
    if head == "language" and name in ENCODERS:
        pytest.skip("an encoder has no language-model head here")
    model = make(name, auto)
    sites = linear_sites(model, targets)
    assert all(site.columns is None for site in sites)
    task = {"classification": "SEQ_CLS", "language": "SEQ_2_SEQ_LM" if name == "t5" else "CAUSAL_LM"}.get(head)
    config = peft.LoraConfig(target_modules=targets, task_type=task, fan_in_fan_out=name == "gpt2")
    wrapped = peft.get_peft_model(model, config)
    expected = set(wrapped.base_model.targeted_module_names)
    if targets == "all-linear" and head == "classification":
        # PEFT leaves out the last linear layer of a classifier alone, here none of the head is taken
        expected = {where for where in expected if not where.startswith(("classifier", "classification_head", "score"))}
        expected.discard("pooler.dense")
    assert {site.name for site in sites} == expected


@pytest.mark.parametrize("name", SETTINGS)
def test_role_prefixes(name):
    model = make(name, device="meta")
    everything = find_sites(model, "linear")

    def names(targets):
        return {site.key for site in linear_sites(model, targets)}

    assert names(["all"]) == names("all") == {site.key for site in everything}
    assert names(["attention"]) == {s.key for s in everything if s.role.startswith("attention.")}
    assert names(["mlp"]) == names("mlp") == {s.key for s in everything if s.role.startswith("mlp.")}
    assert names(["attention.query", "attention"]) == names(["attention"])
    assert names(["attention.query"]) == {s.key for s in everything if s.role == "attention.query"}
    assert all(site.role == "attention.query" for site in linear_sites(model, "attention.query"))


def test_order_is_the_models_and_not_the_targets():
    model = make("llama", device="meta")
    one = [site.key for site in linear_sites(model, ["attention.value", "mlp.down", "attention.query"])]
    assert one == [site.key for site in linear_sites(model, ["down_proj", "q_proj", "v_proj"])]
    assert one[0].endswith("layers.0.self_attn.q_proj")
    gpt2 = make("gpt2", device="meta")
    keys = [site.key for site in linear_sites(gpt2, ["attention.value", "attention.query"])]
    assert keys[:2] == ["h.0.attn.c_attn.query", "h.0.attn.c_attn.value"]


def test_whole_modules_know_their_role_and_layer():
    sites = linear_sites(make("bert", device="meta"), ["query", "pooler.dense"])
    assert [(s.role, s.layer) for s in sites] == [("attention.query", 0), ("attention.query", 1), ("module", None)]
    (fused, _) = linear_sites(make("gpt2", device="meta"), ["c_attn"])
    assert (fused.role, fused.layer, fused.columns, fused.out_features) == ("module", 0, None, 96)


def test_the_head_is_taken_only_by_name():
    model = make("llama", AutoModelForCausalLM, device="meta")
    assert "lm_head" not in {site.name for site in linear_sites(model, ["all", "k_proj"])}
    assert [site.name for site in linear_sites(model, ["lm_head"])] == ["lm_head"]
    t5 = make("t5", AutoModelForSeq2SeqLM, device="meta")
    assert "lm_head" not in {site.name for site in linear_sites(t5, "all-linear")}


def test_targets_that_match_nothing_are_refused():
    bert = make("bert", device="meta")
    with pytest.raises(UserError, match=r"bert has no 'mlp\.gate'; it has attention\.key, .*mlp\.up"):
        linear_sites(bert, ["mlp.gate"])
    with pytest.raises(UserError, match=r"'cross_attention'"):
        linear_sites(bert, ["cross_attention"])
    with pytest.raises(UserError, match=r"'querry' matches no linear module.*did you mean 'query'"):
        linear_sites(bert, ["querry"])
    with pytest.raises(UserError, match=r"did you mean 'attention\.query'"):
        linear_sites(bert, ["attention.qury"])
    with pytest.raises(UserError, match=r"'word_embeddings' matches no linear module"):
        linear_sites(bert, ["word_embeddings"])
    with pytest.raises(UserError, match="is no regular expression"):
        linear_sites(bert, "layer.(")
    with pytest.raises(UserError, match="as regular expression"):
        linear_sites(bert, "query")
    with pytest.raises(UserError, match="targets is empty"):
        linear_sites(bert, [])
    with pytest.raises(UserError, match=r"'h\.0\.attn\.c_attn' as a whole and its part 'attention\.query'"):
        linear_sites(make("gpt2", device="meta"), ["c_attn", "attention.query"])
    with pytest.raises(UserError, match=r"site kind 'liner' is unknown.*did you mean 'linear'"):
        find_sites(bert, "liner")


# unmapped architectures


def _unmapped() -> nn.Module:
    config = AutoConfig.for_model("stablelm", **(LLAMA | {"head_dim": 8}))
    with torch.device("meta"):
        return AutoModel.from_config(config)


def test_unmapped_architecture_shows_how_to_map_it(monkeypatch):
    model = _unmapped()
    with pytest.raises(UserError) as caught:
        find_sites(model, "linear")
    message = str(caught.value)
    assert "'stablelm' has no role table" in message
    assert "\n" not in message
    # module names work without a table, and the example in the message is code that runs
    assert len(linear_sites(model, ["q_proj"])) == 2
    monkeypatch.setattr(roles, "_FAMILIES", dict(roles._FAMILIES))
    program = message.partition("or map it: ")[2]
    exec(program, {})
    assert [site.role for site in find_sites(model, "linear")] == ["attention.query", "mlp.down"] * 2
    assert len(find_sites(model, "hidden")) == 2
    assert embedding_site(model).name == "embed_tokens"
    register_family("stablelm", family_of(make("llama", device="meta")))
    assert len(find_sites(model, "linear")) == 14


def test_a_module_without_a_transformers_model_is_refused():
    with pytest.raises(UserError, match="no transformers model found in Linear"):
        find_sites(nn.Linear(2, 2), "linear")


def test_first_input():
    assert first_input((1,), {}) == 1
    assert first_input((), SimpleNamespace(hidden_states=2).__dict__) == 2


@pytest.mark.parametrize("name", SETTINGS)
def test_dense_weight_and_bias_are_the_roles_own_part(name):
    model = make(name)
    for site in find_sites(model, "linear"):
        x = torch.randn(3, site.in_features, generator=torch.Generator().manual_seed(0))
        rows = slice(None) if site.columns is None else site.columns
        whole = site.module(x)
        own = whole[:, list(rows)] if isinstance(rows, tuple) else whole[:, rows]
        weight, bias = site.dense_weight(), site.dense_bias()
        assert weight.dtype == torch.float32
        assert not weight.requires_grad
        assert weight.shape == (site.out_features, site.in_features)
        product = torch.nn.functional.linear(x, weight, bias)
        torch.testing.assert_close(product, own, rtol=1e-5, atol=1e-5)
    with torch.device("meta"):
        meta = make(name)
    for site in find_sites(meta, "linear"):
        assert site.dense_weight().shape == (site.out_features, site.in_features)
        assert (site.dense_bias() is None) == (site.module.bias is None)
