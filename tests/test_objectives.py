"""The loss on answer tokens: made chunk by chunk it equals the one made of all logits, and gives the same gradients."""

import contextlib
import logging
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

import peftbench
from peftbench.engine import objectives
from peftbench.engine.batches import TokenTable
from peftbench.engine.evaluation import ChoiceEvaluator, LossEvaluator
from peftbench.engine.heads import PackedHead
from peftbench.engine.objectives import HeadObjective, TextObjective
from peftbench.errors import UserError
from peftbench.kernels import cross_entropy
from peftbench.methods.adapter import named_method
from peftbench.models.output import hidden_states, plain_output_layer
from peftbench.models.quantized import QuantizedLinear, Scheme
from peftbench.tasks.base import Encoded
from peftbench.verify.bench import stirred
from tests.conformance.conftest import FAMILIES, batch, disturb, fresh

TEXT = [name for name in FAMILIES if name not in ("tiny-bert", "tiny-roberta", "tiny-deberta")]
families = pytest.mark.parametrize("family", TEXT)
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 2},
    "prompt": {"length": 3},
    "prefix": {"length": 3},
    "full": {},
}


@pytest.fixture
def always(monkeypatch):
    """However few the logits, make them chunk by chunk; a few rows at a time."""
    monkeypatch.setattr(objectives, "LOGITS_BYTES", 0)
    monkeypatch.setattr(cross_entropy, "chunk_rows", lambda *_: 5)


def plain(monkeypatch) -> None:
    """However many the logits, make them all at once."""
    monkeypatch.setattr(objectives, "LOGITS_BYTES", math.inf)


def labelled(rows: int, seed: int = 0, *, seq2seq: bool = False) -> dict[str, Tensor]:
    """Return a batch whose labels leave out the first tokens and the padding."""
    inputs = batch(rows, seed)
    labels = inputs["input_ids"].clone()
    if seq2seq:
        labels = labels[:, :5].contiguous()
        labels[-1, 4:] = -100
    else:
        labels[:, :3] = -100
        labels[inputs["attention_mask"] == 0] = -100
    return inputs | {"labels": labels}


def built(architecture: dict[str, Any]) -> nn.Module:
    """Return a tiny model of a family that the suite has no yaml for, or with settings of its own."""
    settings = {"vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    settings |= {"intermediate_size": 64, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3} | architecture
    chosen = AutoConfig.for_model(settings.pop("model_type"), **settings)
    auto = AutoModelForSeq2SeqLM if chosen.is_encoder_decoder else AutoModelForCausalLM
    torch.manual_seed(0)
    return stirred(auto.from_config(chosen)).eval()


def outcome(model: nn.Module, method: str, settings: dict[str, Any], runs: int = 1) -> dict[str, Tensor]:
    """Return losses and gradients of one pass, each run's loss weighted in its own way."""
    adapter = peftbench.attach(model, named_method(method, settings), runs=runs, seeds=list(range(runs)))
    disturb(adapter)
    seq2seq = model.config.is_encoder_decoder
    parts = [labelled(2, seed, seq2seq=seq2seq) for seed in range(runs)]
    inputs = {k: torch.cat([p[k] for p in parts]) for k in parts[0]}
    objective = TextObjective(model, adapter, runs, seq2seq=seq2seq)
    losses = objective.loss_sum(inputs)
    (losses / objective.count(inputs) * torch.arange(1, runs + 1)).sum().backward()
    found = {name: p.grad.clone() for name, p in adapter.named_parameters() if p.grad is not None}
    with torch.no_grad():
        found |= {"losses": losses.detach(), "by token": objective.token_losses(inputs)}
    for parameter in model.parameters():
        parameter.grad = None
    adapter.detach()
    return found


def same(found: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """Assert that losses agree within 1e-6, and every gradient within 1e-5 of its largest entry or of 1e-2."""
    assert found.keys() == want.keys()
    for name, right in want.items():
        share, floor = (1e-6, 1e-2) if name in ("losses", "by token") else (1e-5, 1e-2)
        assert right.abs().max() > 0 or name.endswith("bias"), name
        assert found[name].shape == right.shape
        assert (found[name] - right).abs().max() <= share * max(right.abs().max().item(), floor), name


class Largest(TorchDispatchMode):
    """The most elements that any tensor made has."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor))])
        return out


@families
@pytest.mark.parametrize("method", METHODS)
def test_chunked_losses_and_gradients_are_those_of_all_logits(method, family, always, monkeypatch):
    model = fresh(family, formulation="text")
    try:
        found = outcome(model, method, METHODS[method])
    except UserError as error:
        pytest.skip(f"declared: {error}")
    plain(monkeypatch)
    same(found, outcome(fresh(family, formulation="text"), method, METHODS[method]))
    assert not any(m._forward_hooks or "forward" in vars(m) for m in model.modules())


VARIANTS = {
    "OPT with a projection": {"model_type": "opt", "ffn_dim": 64, "word_embed_proj_dim": 16},
    "T5, tied": {"model_type": "t5", "d_model": 32, "d_kv": 8, "d_ff": 64, "decoder_start_token_id": 0},
    "T5, untied": {"model_type": "t5", "d_model": 32, "d_kv": 8, "d_ff": 64, "decoder_start_token_id": 0}
    | {"tie_word_embeddings": False},
    "Llama, tied": {"model_type": "llama", "tie_word_embeddings": True},
    "Llama, untied": {"model_type": "llama", "tie_word_embeddings": False},
    "Phi, whose output has a bias": {"model_type": "phi"},
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("method", ["lora", "full"])
def test_tied_projected_scaled_and_biased_outputs_give_the_same(name, method, always, monkeypatch):
    settings = {"targets": r".*\.(q|q_proj)"} if method == "lora" else {}
    found = outcome(built(VARIANTS[name]), method, settings)
    plain(monkeypatch)
    same(found, outcome(built(VARIANTS[name]), method, settings))


@families
def test_logits_are_not_made_where_they_would_be_large_and_are_where_they_are_not(family, always, monkeypatch):
    model = fresh(family, formulation="text")
    adapter = peftbench.attach(model, "lora", rank=2)
    seq2seq = model.config.is_encoder_decoder
    inputs = labelled(16, seq2seq=seq2seq)
    objective = TextObjective(model, adapter, 1, seq2seq=seq2seq)
    logits = inputs["labels"].numel() * model.config.vocab_size
    with Largest() as chunked:
        objective.loss_sum(inputs).sum().backward()
    assert chunked.elements < logits
    monkeypatch.setattr(objectives, "LOGITS_BYTES", 4 * logits)
    with Largest() as whole:
        objective.loss_sum(inputs).sum().backward()
    assert whole.elements == logits


@families
def test_a_pack_of_three_equals_three_alone(family, always):
    packed = outcome(fresh(family, formulation="text"), "lora", {"rank": 2}, runs=3)
    for run in range(3):
        model = fresh(family, formulation="text")
        adapter = peftbench.attach(model, named_method("lora", {"rank": 2}), runs=3, seeds=[0, 1, 2])
        disturb(adapter)
        state = adapter.state_dict(run)
        adapter.detach()
        alone = peftbench.attach(model, named_method("lora", {"rank": 2}), seeds=[run])
        alone.load_state_dict(state)
        seq2seq = model.config.is_encoder_decoder
        inputs = labelled(2, run, seq2seq=seq2seq)
        objective = TextObjective(model, alone, 1, seq2seq=seq2seq)
        losses = objective.loss_sum(inputs)
        ((run + 1) * losses / objective.count(inputs)).sum().backward()
        torch.testing.assert_close(losses[0].detach(), packed["losses"][run], rtol=1e-6, atol=0)
        for name, parameter in alone.named_parameters():
            torch.testing.assert_close(parameter.grad[0], packed[name][run], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "architecture",
    [
        {"model_type": "gemma2", "final_logit_softcapping": 3.0, "head_dim": 8, "num_key_value_heads": 2},
        {"model_type": "gemma3_text", "final_logit_softcapping": 3.0, "head_dim": 8, "num_key_value_heads": 1},
        {"model_type": "granite", "logits_scaling": 4.0},
        {"model_type": "cohere", "logit_scale": 0.25},
    ],
    ids=lambda a: a["model_type"],
)
def test_models_that_change_their_logits_are_found_out_once(architecture, always, monkeypatch, caplog):
    model = built(architecture)
    adapter = peftbench.attach(model, "lora", targets=["q_proj"], rank=2)
    objective = TextObjective(model, adapter, 1, seq2seq=False)
    with caplog.at_level(logging.WARNING, "peftbench"):
        losses = [objective.loss_sum(labelled(4)) for _ in range(2)]
    assert [type(model).__name__ in r.getMessage() for r in caplog.records] == [True]
    assert "forward" not in vars(model.get_output_embeddings())
    plain(monkeypatch)
    want = TextObjective(model, adapter, 1, seq2seq=False).loss_sum(labelled(4))
    assert all(torch.equal(found, want) for found in losses)


def test_outputs_with_hooks_other_modules_and_trained_biases_are_left_alone():
    model = fresh("tiny-llama", formulation="text")
    layer = model.get_output_embeddings()
    assert plain_output_layer(model) is layer
    handle = layer.register_forward_hook(lambda *_: None)
    assert plain_output_layer(model) is None
    handle.remove()
    adapter = peftbench.attach(model, "lora", targets=["lm_head"], rank=2)
    assert plain_output_layer(model) is None
    adapter.detach()
    layer.forward = layer.forward
    assert plain_output_layer(model) is None
    del layer.forward
    model.set_output_embeddings(QuantizedLinear.of(layer, Scheme.parse("nf4")))
    assert plain_output_layer(model) is None
    biased = built(VARIANTS["Phi, whose output has a bias"]).requires_grad_(False)
    layer = biased.get_output_embeddings()
    assert plain_output_layer(biased) is layer
    layer.bias.requires_grad_()
    assert plain_output_layer(biased) is None


def test_a_pass_that_fails_leaves_the_output_layer_as_it_was():
    model = fresh("tiny-llama", formulation="text")
    layer = model.get_output_embeddings()
    with contextlib.suppress(TypeError):
        hidden_states(model, layer, {"input_ids": "no tensor"})
    assert "forward" not in vars(layer)
    assert model(torch.tensor([[1, 2]])).logits.shape == (1, 2, model.config.vocab_size)


def test_logits_changed_in_place_are_seen():
    class Scaling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 9)

        def forward(self, x: Tensor) -> Any:
            logits = self.layer(x + 1)
            return type("Output", (), {"logits": logits.mul_(2)})

    model = Scaling()
    assert hidden_states(model, model.layer, {"x": torch.ones(2, 3, 4)}) is None


@pytest.mark.parametrize("family", ["tiny-llama", "tiny-t5"])
def test_evaluators_give_the_same_losses_and_choices(family, always, monkeypatch):
    model = fresh(family, formulation="text")
    seq2seq = model.config.is_encoder_decoder
    adapter = peftbench.attach(model, "lora", rank=2)
    disturb(adapter)
    objective = TextObjective(model, adapter, 1, seq2seq=seq2seq)
    ids = torch.randint(10, 60, (6, 8), generator=torch.Generator().manual_seed(1)).tolist()
    labels = [row[:5] if seq2seq else [-100] * 3 + row[3:] for row in ids]
    table = TokenTable(Encoded(ids, None, None, labels), 0, torch.device("cpu"))

    def predictions() -> tuple[Any, Any]:
        losses = LossEvaluator(objective, table, 4, 8).predict()
        return losses, ChoiceEvaluator([0, 0, 1, 1, 2, 2], objective, table, 4, 8).predict()

    losses, choices = predictions()
    plain(monkeypatch)
    right, right_choices = predictions()
    assert choices == right_choices
    assert [n for _, n in losses[0]] == [n for _, n in right[0]] == [5] * 6
    assert [v for v, _ in losses[0]] == pytest.approx([v for v, _ in right[0]], rel=1e-6)


def test_losses_label_by_label_of_a_trained_output_layer_are_made_of_all_logits(always):
    model = fresh("tiny-llama", formulation="text")
    adapter = peftbench.attach(model, "full")
    losses = TextObjective(model, adapter, 1, seq2seq=False).token_losses(labelled(2))
    losses.sum().backward()
    assert model.get_output_embeddings().weight.grad is not None


# Label smoothing, a run's own.

RATES = (0.1, 0.0, 0.4)


class Still:
    """An adapter that changes nothing."""

    def penalty(self) -> None: ...

    def condition(self, tasks: Tensor | None) -> None: ...


def head_case(classes: list[range] | None) -> tuple[HeadObjective, dict[str, Tensor], Tensor, Tensor]:
    """Return an objective of three runs, rows, and the weights and outputs that its losses follow from."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    head = PackedHead("linear", 8, 5, generators, 0.0)
    head.out.data.mul_(50)
    states = torch.randn(12, 1, 8, generator=torch.Generator().manual_seed(3))

    class Model(nn.Linear):
        def forward(self, **_: Any) -> Any:
            return type("Output", (), {"last_hidden_state": states})

    objective = HeadObjective(Model(1, 1), Still(), head, "first", classes, smoothing=RATES)
    tasks = torch.tensor([0, 1, 0, 1] * 3)
    targets = torch.tensor([0, 3, 1, 4] * 3)
    rows = {"input_ids": torch.zeros(12, 1), "attention_mask": torch.ones(12, 1), "targets": targets, "task_ids": tasks}
    weight = head.out.detach().double().requires_grad_()
    return objective, rows, weight, torch.bmm(states.view(3, 4, 8).double(), weight)


@pytest.mark.parametrize("classes", [None, [range(2), range(2, 5)]], ids=["one task", "two tasks"])
def test_smoothed_losses_of_a_head_are_pytorch_s_run_by_run(classes):
    """In a mixture a row's classes are those of its task, and so is what its label is spread over."""
    objective, rows, weight, outputs = head_case(classes)
    losses = objective.loss_sum(rows)
    own = [range(5)] if classes is None else classes
    tasks = [0] * 12 if classes is None else rows["task_ids"].tolist()
    want = torch.stack(
        [
            sum(
                nn.functional.cross_entropy(
                    outputs[run, i, list(own[tasks[4 * run + i]])],
                    rows["targets"][4 * run + i] - own[tasks[4 * run + i]].start,
                    label_smoothing=RATES[run],
                )
                for i in range(4)
            )
            for run in range(3)
        ]
    )
    torch.testing.assert_close(losses.double(), want, rtol=1e-6, atol=1e-6)
    factors = torch.tensor([1.0, 3.0, 0.5])
    (losses @ factors).backward()
    (right,) = torch.autograd.grad(want @ factors.double(), weight)
    torch.testing.assert_close(objective.head.out.grad.double(), right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunked", [False, True], ids=["all logits", "by chunks"])
@pytest.mark.parametrize("family", ["tiny-llama", "tiny-t5"])
def test_smoothed_losses_of_text_are_pytorch_s_run_by_run(family, chunked, monkeypatch):
    monkeypatch.setattr(objectives, "LOGITS_BYTES", 0 if chunked else math.inf)
    model = fresh(family, formulation="text").double()
    adapter = peftbench.attach(model, named_method("lora", {"rank": 2}), runs=3, seeds=[0, 1, 2])
    disturb(adapter)
    for delta in adapter.parameters():
        delta.data = delta.data.double()
    seq2seq = model.config.is_encoder_decoder
    parts = [labelled(2, seed, seq2seq=seq2seq) for seed in range(3)]
    rows = {k: torch.cat([p[k] for p in parts]) for k in parts[0]}
    objective = TextObjective(model, adapter, 3, seq2seq=seq2seq, smoothing=RATES)

    def gradients(losses: Tensor) -> list[Tensor]:
        factors = torch.tensor([1.0, 3.0, 0.5], dtype=losses.dtype)
        return list(torch.autograd.grad(losses @ factors, adapter.parameters()))

    losses = objective.loss_sum(rows)
    labels = rows["labels"] if seq2seq else nn.functional.pad(rows["labels"][:, 1:], (0, 1), value=-100)
    inputs = {k: v for k, v in rows.items() if k != "labels"}
    inputs |= {"decoder_input_ids": model._shift_right(labels)} if seq2seq else {}
    logits = model(**inputs, use_cache=False).logits
    want = torch.stack(
        [
            nn.functional.cross_entropy(z.flatten(0, 1), y.flatten(), label_smoothing=e, reduction="sum")
            for z, y, e in zip(logits.chunk(3), labels.chunk(3), RATES, strict=True)
        ]
    )
    torch.testing.assert_close(losses.double(), want, rtol=1e-6, atol=0)
    for found, right in zip(gradients(losses), gradients(want), strict=True):
        assert (found - right).abs().max() <= 1e-5 * max(right.abs().max().item(), 1e-2)
    # evaluation is of plain losses
    plain = TextObjective(model, adapter, 3, seq2seq=seq2seq)
    with torch.no_grad():
        assert torch.equal(objective.token_losses(rows), plain.token_losses(rows))
        assert not torch.allclose(plain.loss_sum(rows)[0].double(), losses[0].double())
