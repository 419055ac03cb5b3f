"""Quantized bases: both back ends give the same layer, gradients are the dense weight's, loading never holds it all."""

import gc
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import peftbench
from peftbench import registry, run
from peftbench.config import QUANTIZATIONS, ModelConfig, build
from peftbench.errors import UserError
from peftbench.kernels.blockwise import quantize_4bit
from peftbench.models import load as load_module
from peftbench.models import quantized, streaming
from peftbench.models.load import build_meta, load
from peftbench.models.quantized import QuantizedLinear, Scheme, dense_parameter_count, stored_bytes
from peftbench.models.roles import linear_sites
from tests.conformance.conftest import FAMILIES, batch, disturb
from tests.test_blockwise import DTYPES, devices, needs_bitsandbytes, same_values

SCHEMES = [Scheme(kind, double) for kind in ("nf4", "fp4") for double in (True, False)]
schemes = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: f"{s.kind}{'' if s.double else '-single'}")


@pytest.fixture(autouse=True)
def _not_compiled():
    with torch.compiler.set_stance("force_eager"):
        yield


def config_of(name: str, **changes) -> ModelConfig:
    return build(ModelConfig, registry.section("model", name) | changes, "model")


def formulation(name: str) -> str:
    return "head" if config_of(name).kind == "encoder" else "text"


def layer(kind: type = nn.Linear, rows: int = 48, columns: int = 70, bias: bool = True, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = nn.Linear(columns, rows, bias=bias) if kind is nn.Linear else Conv1D(rows, columns)
        nn.init.normal_(made.weight, std=0.1)
        if made.bias is not None:
            nn.init.normal_(made.bias)
    return made.requires_grad_(False)


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


# names


def test_names_of_schemes():
    assert len(set(QUANTIZATIONS)) == 8
    parsed = {Scheme.parse(name) for name in QUANTIZATIONS}
    assert len(parsed) == 8
    assert Scheme.parse("nf4") == Scheme("nf4", True, "own")
    assert Scheme.parse("fp4-single-bnb") == Scheme("fp4", False, "bitsandbytes")
    with pytest.raises(UserError, match="model.quantization=nf5: expected one of nf4, .*did you mean 'nf4'"):
        config_of("tiny-bert", quantization="nf5")


def test_a_back_end_that_is_not_installed_is_one_clear_line(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    quantized._bitsandbytes.cache_clear()
    with pytest.raises(UserError, match="bitsandbytes is not installed"):
        load(config_of("tiny-bert", quantization="nf4-bnb"), "head")
    quantized._bitsandbytes.cache_clear()


# the layer


@needs_bitsandbytes
@devices
@schemes
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_back_ends_give_the_same_bits(scheme, dtype, device):
    for rows, columns, outliers in ((48, 70, False), (65, 33, True), (512, 768, True)):
        made = layer(rows=rows, columns=columns).to(device, dtype)
        if outliers:
            made.weight.data.view(-1)[::97] *= 50
        own = QuantizedLinear.of(made, scheme)
        other = QuantizedLinear.of(made, Scheme(scheme.kind, scheme.double, "bitsandbytes"))
        assert own.packed.keys() == other.packed.keys()
        assert all(torch.equal(t, other.packed[name]) for name, t in own.packed.items())
        assert all(t.dtype == other.packed[name].dtype for name, t in own.packed.items())
        x = torch.randn(3, columns, device=device, dtype=dtype)
        for compute in DTYPES:
            assert same_values(own.dense(compute), other.dense(compute), own.dense().double())
        if (device, dtype) != ("cpu", torch.float16):
            assert torch.equal(own(x), other(x))


@devices
@schemes
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_forward_and_gradient_are_the_dense_weight_s(kind, scheme, device):
    made = layer(kind).to(device)
    own = QuantizedLinear.of(made, scheme)
    assert (own.in_features, own.out_features) == (70, 48)
    original = made.weight.T if kind is Conv1D else made.weight
    assert 0.02 < (own.dense() - original).norm() / original.norm() < 0.25
    for dtype in DTYPES:
        if device == "cpu" and dtype == torch.float16:
            continue
        x = torch.randn(2, 5, 70, device=device).to(dtype).requires_grad_()
        twin = x.detach().clone().requires_grad_()
        weight = own.dense(dtype)
        want = nn.functional.linear(twin, weight, made.bias.to(dtype))
        got = own(x)
        assert got.dtype == dtype
        assert torch.equal(got, want)
        pull = torch.randn_like(got)
        got.backward(pull)
        want.backward(pull)
        torch.testing.assert_close(x.grad, twin.grad, rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=1e-5)
        exact = pull.double() @ own.dense(dtype).double()
        assert (x.grad.double() - exact).norm() / exact.norm() < (1e-6 if dtype == torch.float32 else 1e-2)


def test_no_dense_weight_is_kept_for_the_backward_pass():
    own = QuantizedLinear.of(layer(rows=200, columns=300), Scheme())
    kept = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    x = torch.randn(2, 300, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        y = own(x)
    assert not [n for n in kept if n >= 200 * 300]
    y.sum().backward()
    assert x.grad.norm() > 0


def test_a_bias_may_train():
    own = QuantizedLinear.of(layer(), Scheme())
    own.bias.requires_grad_(True)
    own(torch.randn(4, 3, 70)).sum().backward()
    torch.testing.assert_close(own.bias.grad, torch.full((48,), 12.0))


def test_autocast_computes_in_its_dtype():
    own = QuantizedLinear.of(layer(), Scheme())
    x = torch.randn(3, 70)
    with torch.autocast("cpu", torch.bfloat16):
        y = own(x)
    assert torch.equal(y, own(x.bfloat16()))


@schemes
def test_moves_keep_scales_and_state_round_trips(scheme):
    own = QuantizedLinear.of(layer(), scheme)
    before = tensors(own)
    half = own.to(torch.bfloat16)
    assert half.bias.dtype == torch.bfloat16
    assert all(t.dtype == before[name].dtype for name, t in half.packed.items())
    own.to(torch.float32)
    assert all(torch.equal(t, before[name]) for name, t in own.packed.items())
    other = QuantizedLinear.of(layer(seed=1), scheme)
    assert not torch.equal(other.dense(), own.dense())
    other.load_state_dict(own.state_dict())
    assert torch.equal(other.dense(), own.dense())
    meta = QuantizedLinear.of(layer().to("meta"), scheme)
    assert {n: (t.shape, t.dtype) for n, t in meta.state_dict().items()} == {
        n: (t.shape, t.dtype) for n, t in own.state_dict().items()
    }
    assert meta(torch.empty(3, 70, device="meta")).shape == (3, 48)


def test_storage_is_a_little_over_four_bits():
    count = 1024 * 1024
    made = layer(rows=1024, columns=1024, bias=False)
    assert QuantizedLinear.of(made, Scheme()).storage_bytes() * 8 / count == pytest.approx(4.127, abs=0.001)
    assert QuantizedLinear.of(made, Scheme(double=False)).storage_bytes() * 8 / count == 4.5


@devices
def test_override_and_restore(device):
    own = QuantizedLinear.of(layer().to(device), Scheme())
    x = torch.randn(3, 70, device=device)
    before, kept = own(x), tensors(own)
    weight, bias = own.dense() + 1, own.bias + 1
    own.override(weight, bias)
    assert torch.equal(own(x), nn.functional.linear(x, weight, bias))
    assert torch.equal(own.dense(), weight)
    assert own.state_dict().keys() == kept.keys()
    y = x.clone().requires_grad_()
    own(y).sum().backward()
    torch.testing.assert_close(y.grad, weight.sum(0).expand(3, -1))
    own.restore()
    assert torch.equal(own(x), before)
    assert all(torch.equal(t, kept[name]) for name, t in own.state_dict().items())


# models


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_loads_quantized_and_close_to_its_dense_self(name):
    form = formulation(name)
    dense = load(config_of(name), form).model
    model = load(config_of(name, quantization="nf4"), form).model
    linears = quantized.body_linears(dense)
    assert {n for n, m in model.named_modules() if isinstance(m, QuantizedLinear)} == set(linears)
    assert linears
    for name_, module in linears.items():
        own = model.get_submodule(name_)
        codes, _ = quantize_4bit(quantized.dense_of(module), "nf4")
        assert torch.equal(own.codes, codes)
    rest = {n: p for n, p in dense.state_dict().items() if n.rpartition(".")[0] not in linears}
    assert all(torch.equal(p, model.state_dict()[n]) for n, p in rest.items())
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(m.training for m in model.modules())
    assert dense_parameter_count(model) == sum(p.numel() for p in dense.parameters())
    assert stored_bytes(model) < stored_bytes(dense)
    inputs = batch(3)
    if config_of(name).kind == "seq2seq":
        inputs["labels"] = inputs["input_ids"]
    want, got = (getattr(m(**inputs), "logits" if form == "text" else "last_hidden_state") for m in (dense, model))
    assert 0 < (got - want).norm() / want.norm() < 0.5


@pytest.mark.parametrize("name", FAMILIES)
def test_meta_is_the_same_module_and_has_the_same_sites(name):
    real = load(config_of(name, quantization="fp4"), formulation(name)).model
    meta = build_meta(config_of(name, quantization="fp4"), formulation(name))
    assert {n: (t.shape, t.dtype) for n, t in meta.state_dict().items()} == {
        n: (t.shape, t.dtype) for n, t in real.state_dict().items()
    }
    assert all(t.is_meta for t in meta.state_dict().values())
    for a, b in zip(linear_sites(real, ["all"]), linear_sites(meta, ["all"]), strict=True):
        assert (a.key, a.in_features, a.out_features, a.columns) == (b.key, b.in_features, b.out_features, b.columns)
        assert b.dense_weight().shape == (b.out_features, b.in_features)


@pytest.mark.parametrize("name", FAMILIES)
def test_sites_give_the_part_that_their_role_computes_with(name):
    dense = load(config_of(name), formulation(name)).model
    model = load(config_of(name, quantization="nf4"), formulation(name)).model
    for site, twin in zip(linear_sites(model, ["all"]), linear_sites(dense, ["all"]), strict=True):
        assert (site.key, site.role, site.in_features, site.out_features) == (
            twin.key,
            twin.role,
            twin.in_features,
            twin.out_features,
        )
        assert not site.transposed
        x = torch.randn(2, site.in_features)
        rows = slice(None) if site.columns is None else site.columns
        out = site.module(x)[:, rows if isinstance(rows, slice) else list(rows)]
        torch.testing.assert_close(out, nn.functional.linear(x, site.dense_weight(), site.dense_bias()))
        error = (site.dense_weight() - twin.dense_weight()).norm() / twin.dense_weight().norm()
        assert 0 < error < 0.2


def saved(folder: Path, name: str) -> Path:
    backbone = load(config_of(name), formulation(name))
    backbone.model.save_pretrained(folder, max_shard_size="20KB")
    backbone.tokenizer.save_pretrained(folder)
    return folder


@devices
@pytest.mark.parametrize("name", FAMILIES)
def test_checkpoints_load_as_quantizing_them_afterwards(name, device, tmp_path):
    folder = saved(tmp_path / "checkpoint", name)
    changes = {"checkpoint": str(folder), "pooling": config_of(name).pooling}
    for dtype in (torch.float32, torch.bfloat16):
        after = load(config_of("hub", **changes), formulation(name), dtype, device).model
        quantized.quantize(after, Scheme())
        model = load(config_of("hub", quantization="nf4", **changes), formulation(name), dtype, device).model
        assert {t.device.type for t in model.state_dict().values()} == {device}
        want = after.state_dict()
        assert all(torch.equal(t, want[n]) for n, t in model.state_dict().items())
        assert model.state_dict().keys() == want.keys()
        assert {n: b.dtype for n, b in model.named_buffers()} == {n: b.dtype for n, b in after.named_buffers()}
        assert not hasattr(model.config, "quantization_config")
        assert not getattr(model, "is_quantized", False)


def test_missing_tensors_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "checkpoint"
    backbone = load(config_of("tiny-bert"), "head")
    backbone.model.save_pretrained(folder)
    backbone.tokenizer.save_pretrained(folder)
    held = load_file(folder / "model.safetensors")
    held.pop("encoder.layer.1.output.dense.weight")
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 tensors of BertModel, 'encoder.layer.1.output.dense.weight'"):
        load(config_of("hub", checkpoint=str(folder), pooling="pooler", quantization="nf4"), "head")


@pytest.mark.parametrize("name", FAMILIES)
def test_large_random_models_are_drawn_as_their_class_draws_them(name, monkeypatch):
    form = formulation(name)
    small_one = load(config_of(name), form, torch.bfloat16).model
    monkeypatch.setattr(load_module, "LARGE", 1000)
    dense = load(config_of(name), form, torch.bfloat16).model
    model, again = (load(config_of(name, quantization="nf4"), form, torch.bfloat16).model for _ in range(2))
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in model.state_dict().items())
    buffers = dict(model.named_buffers())
    assert all(torch.equal(b, buffers[n]) and b.dtype == buffers[n].dtype for n, b in dense.named_buffers())
    for name_, module in small_one.named_modules():
        if not list(module.parameters(recurse=False)):
            continue
        own = model.get_submodule(name_)
        weight = own.dense() if isinstance(own, QuantizedLinear) else own.weight.float()
        want = quantized.dense_of(module) if isinstance(own, QuantizedLinear) else module.weight.float()
        assert weight.std() == pytest.approx(want.float().std().item(), rel=0.25, abs=1e-6)
        assert weight.mean() == pytest.approx(want.float().mean().item(), abs=0.3 * want.float().std().item() + 1e-6)
    tied = {p.data_ptr() for p in small_one.parameters()}
    assert len({p.data_ptr() for p in model.parameters()}) == len(tied) - len(quantized.body_linears(small_one))


# memory


def live_bytes(device: str) -> int:
    """Bytes of all tensors of a device that are alive, each storage once."""
    gc.collect()
    storages = {}
    for item in gc.get_objects():
        # the type as it is: compilers leave tensors without storage, and some objects run code when asked for theirs
        if type(item) in (torch.Tensor, nn.Parameter) and item.device.type == device:
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


class Watch:
    """Notes the most bytes alive, above those at the start, when every fourteenth layer is about to be quantized."""

    def __init__(self, monkeypatch, device: str) -> None:
        self.device, self.start, self.peak, self.calls = device, live_bytes(device), 0, 0
        pack = quantized.Own.pack

        def watched(own, weight, scheme):
            self.calls += 1
            if self.calls % 14:
                return pack(own, weight, scheme)
            self.peak = max(self.peak, live_bytes(device) - self.start)
            return pack(own, weight, scheme)

        monkeypatch.setattr(quantized.Own, "pack", watched)


WIDE = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 4, "head_dim": 32}


def wide(**changes) -> ModelConfig:
    architecture = {**config_of("tiny-llama").architecture, **WIDE, "num_key_value_heads": 4}
    return config_of("tiny-llama", architecture=architecture, **changes)


def test_a_checkpoint_never_lies_dense_in_memory(tmp_path, monkeypatch):
    backbone = load(wide(), "text")
    dense = stored_bytes(backbone.model)
    backbone.model.save_pretrained(tmp_path)
    backbone.tokenizer.save_pretrained(tmp_path)
    del backbone
    watch = Watch(monkeypatch, "cpu")
    model = load(config_of("hub", checkpoint=str(tmp_path), quantization="nf4"), "text").model
    largest = max(m.in_features * m.out_features * 4 for m in model.modules() if isinstance(m, QuantizedLinear))
    assert watch.calls == 6 * 7
    assert stored_bytes(model) < 0.3 * dense
    assert watch.peak < stored_bytes(model) + 2 * largest + 20_000


@devices
def test_a_large_random_model_never_lies_dense_in_memory(device, monkeypatch):
    dense = stored_bytes(load(wide(), "text").model)
    monkeypatch.setattr(load_module, "LARGE", 1000)
    watch = Watch(monkeypatch, device)
    model = load(wide(quantization="nf4"), "text", device=device).model
    one = sum(m.in_features * m.out_features * 4 for m in model.model.layers[0].modules() if hasattr(m, "codes"))
    assert watch.calls == 6 * 7
    assert watch.peak < stored_bytes(model) + one + 20_000 < 0.6 * dense


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_device_never_holds_the_dense_model(tmp_path):
    architecture = {**wide().architecture, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8}
    backbone = load(config_of("tiny-llama", architecture=architecture), "text")
    dense = stored_bytes(backbone.model)
    backbone.model.save_pretrained(tmp_path)
    backbone.tokenizer.save_pretrained(tmp_path)
    del backbone
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = load(config_of("hub", checkpoint=str(tmp_path), quantization="nf4"), "text", device="cuda").model
    largest = 1024 * 4096 * 4
    # quantizing makes a few tensors of the layer's size
    assert torch.cuda.max_memory_allocated() - before < stored_bytes(model) + 6 * largest < 0.6 * dense


# training


@pytest.mark.parametrize("family", ["tiny-gpt2", "tiny-llama"])
def test_gradient_checkpointing_changes_no_gradient(family):
    model = load(config_of(family, quantization="nf4"), "head").model
    load_module.set_dropout(model, 0.0)
    adapter = peftbench.attach(model, "qlora", rank=4, dropout=0.0)
    disturb(adapter)
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        model(**batch(4)).last_hidden_state.square().mean().backward()
        grads.append([p.grad.clone() for p in adapter.parameters()])
        for p in adapter.parameters():
            p.grad = None
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, recomputed)


# from the command line's side


def test_qlora_asks_for_a_quantized_base_and_unquantized_runs_keep_their_ids():
    from peftbench.resolve import Resolver

    point = {
        "model": "tiny-bert",
        "task": "tiny",
        "train": "smoke",
        "profile": "skip",
        "seed": 0,
        "protocol": "held_out",
    }
    resolver = Resolver("cpu")
    spec = resolver.spec({**point, "method": "qlora"})
    assert spec.model["quantization"] == "nf4"
    assert spec.method["targets"] == ["all"]
    with pytest.raises(UserError, match="model.quantization=fp4: method qlora requires model.quantization=nf4"):
        resolver.spec({**point, "method": "qlora", "model.quantization": "fp4"})
    other = resolver.spec({**point, "method": "lora", "model.quantization": "fp4"})
    plain = resolver.spec({**point, "method": "lora"})
    assert plain.model["quantization"] is None
    assert len({spec.run_id, other.run_id, plain.run_id}) == 3
    backbone = load(build(ModelConfig, spec.model, "model"), "head")
    assert any(isinstance(m, QuantizedLinear) for m in backbone.model.modules())
    assert run.Setting.of([spec]).methods[0].rank == 16


def test_a_run_trains_on_a_quantized_base(tmp_path):
    from peftbench.__main__ import main

    options = ["model=tiny-llama", "task=tiny", "train=smoke", "profile=skip", f"results={tmp_path}"]
    assert main(["run", "method=qlora", "method.rank=4", *options]) == 0
    (record,) = [json.loads(p.read_text()) for p in tmp_path.rglob("runs/*.json")]
    assert record["status"] == "completed"
    assert record["spec"]["model"]["quantization"] == "nf4"


def test_layers_of_a_stack_are_drawn_once():
    model = build_meta(config_of("tiny-t5"), "text")
    names = streaming._layers(model)
    assert len(names) == len(set(names))
    assert all(name.count(".") == 2 for name in names)
