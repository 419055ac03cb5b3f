"""Compiled layers: one compilation for all of a stack, the same numbers, and nothing left behind."""

from __future__ import annotations

import dataclasses
import functools
from contextlib import nullcontext

import pytest
import torch
from torch._dynamo.utils import counters

import peftbench
from peftbench import assembly, registry
from peftbench.engine.compiling import compiled_layers, repeated_layers
from peftbench.kernels.noise import Noise, checkpoint_contexts
from peftbench.models import attention
from peftbench.models.load import load
from peftbench.models.quantized import Scheme, quantize
from peftbench.verify.bench import stirred
from tests.conformance.conftest import METHODS, batch, config, disturb, fits, fresh, small
from tests.test_run import same_traces, tiny


@pytest.mark.parametrize("family", ["tiny-llama", "tiny-bert", "tiny-gpt2", "tiny-t5"])
def test_the_repeated_layers_are_those_of_all_stacks(family):
    model = fresh(family, formulation="text" if family == "tiny-t5" else "head")
    stacks = 2 if family == "tiny-t5" else 1
    assert len(repeated_layers(model)) == model.config.num_hidden_layers * stacks


def _step(model, adapter, ids, mask):
    for p in adapter.parameters():
        p.grad = None
    out = model(input_ids=ids, attention_mask=mask)
    loss = (out.logits if hasattr(out, "logits") else out.last_hidden_state).float().square().mean()
    if loss.requires_grad:
        loss.backward()
    return loss.detach(), [p.grad.clone() for p in adapter.parameters() if p.grad is not None]


# A break in the graph changes no number, it only takes the speed away: every method is looked at
SAME_CODE = ("lora_plus", "rslora")
"""lora with another learning rate or scale."""
CASES = [("tiny-llama", method) for method in METHODS if method not in SAME_CODE]
CASES += [("tiny-bert", method) for method in ("bitfit", "dora", "houlsby", "prefix")]


@pytest.mark.parametrize(("family", "method"), CASES)
def test_one_compilation_serves_all_layers_and_changes_no_gradient(family, method):
    torch._dynamo.reset()
    counters.clear()
    model, chosen = fresh(family), small(method)
    fits(chosen, model)
    if registry.section("method", method).get("requires"):
        quantize(model, Scheme())
    adapter = peftbench.attach(model, chosen)
    disturb(adapter)
    attention.use(model.config)
    inputs = batch(2)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    with attention.right_padded():
        loss, gradients = _step(model, adapter, ids, mask)
        with compiled_layers(model, backend="aot_eager"):
            compiled_loss, compiled_gradients = _step(model, adapter, ids, mask)
            with torch.no_grad():
                model(input_ids=ids, attention_mask=mask)
    torch.testing.assert_close(compiled_loss, loss, rtol=1e-6, atol=1e-7)
    for ours, theirs in zip(compiled_gradients, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    # Two where the first layer's input needs no gradient and the others' does
    assert 1 <= counters["frames"]["ok"] <= 2
    assert not counters["graph_break"]
    assert not any("forward" in layer.__dict__ for layer in repeated_layers(model))


# Dropout

DROPPING = [("tiny-bert", "lora"), ("tiny-gpt2", "houlsby"), ("tiny-llama", "lora"), ("tiny-t5", "lora")]


def _steps(family, method, layers, runs, compiled, checkpointing=False, lengths=(12, 12)):
    """Return the runs' losses and all gradients, step by step, with dropout everywhere."""
    built = config(family)
    changed = {name: layers for name in ("num_hidden_layers", "num_layers") if name in built.architecture}
    built = dataclasses.replace(built, architecture={**built.architecture, **changed})
    model = stirred(load(built, "text" if family == "tiny-t5" else "head", torch.float32).model)
    chosen = small(method, **({"dropout": 0.3} if method == "lora" else {}))
    adapter = peftbench.attach(model, [chosen] * len(runs), seeds=[0] * len(runs))
    disturb(adapter)
    attention.use(model.config)
    model.train()
    adapter.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.2
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": checkpoint_contexts})
    noise, found = Noise(runs, torch.device("cpu")), []
    ids = torch.randint(4, 500, (2, max(lengths)), generator=torch.Generator().manual_seed(7)).repeat(len(runs), 1)
    with attention.right_padded(), compiled_layers(model, compiled) if compiled else nullcontext():
        for length in lengths:
            rows = {"input_ids": ids[:, :length], "attention_mask": torch.ones(len(ids), length, dtype=torch.long)}
            if family == "tiny-t5":
                rows["decoder_input_ids"] = rows["input_ids"]
            with noise.drawing():
                out = model(**rows)
                out = out.logits if hasattr(out, "logits") else out.last_hidden_state
                losses = out.float().square().reshape(len(runs), -1).mean(dim=1)
                gradients = torch.autograd.grad(losses.sum(), list(adapter.parameters()))
            noise.advance()
            found.append((losses.detach(), gradients))
    return found


def _same(found, wanted):
    for (losses, gradients), (eager_losses, eager_gradients) in zip(found, wanted, strict=True):
        torch.testing.assert_close(losses, eager_losses, rtol=1e-5, atol=0)
        for ours, theirs in zip(gradients, eager_gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6 + 1e-5 * theirs.abs().max().item())


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize(("family", "method"), DROPPING)
def test_compiled_layers_drop_what_eager_ones_do(family, method, checkpointing):
    torch._dynamo.reset()
    counters.clear()
    eager = _steps(family, method, 2, [3, 5], "", checkpointing)
    assert not torch.equal(eager[0][0], eager[1][0])
    before = torch.get_rng_state()
    _same(_steps(family, method, 2, [3, 5], "aot_eager", checkpointing), eager)
    assert torch.equal(torch.get_rng_state(), before)
    if not (checkpointing and family == "tiny-t5"):  # it breaks the graph itself, to make a bias train
        assert not counters["graph_break"]


def test_deep_stacks_and_other_lengths_are_not_compiled_without_end():
    torch._dynamo.reset()
    counters.clear()
    lengths = (12, 12, 16, 20, 24, 12)
    eager = _steps("tiny-llama", "lora", 5, [3, 5], "", lengths=lengths)
    _same(_steps("tiny-llama", "lora", 5, [3, 5], "aot_eager", lengths=lengths), eager)
    # the first layer's input needs no gradient; the second length makes lengths an unknown
    assert counters["frames"]["ok"] <= 4


def test_packs_of_compiled_layers_train_as_their_runs_do_alone(tmp_path, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(assembly, "compiled_layers", functools.partial(compiled_layers, backend="aot_eager"))
    given = {"train__execution": "compiled", "train__steps": 3, "train__dropout": 0.3}
    same_traces(tiny(method="lora", seed=[0, 1], **given), tmp_path)


def test_inductor_keeps_draws_apart_and_in_order():
    torch._dynamo.reset()
    eager = _steps("tiny-bert", "lora", 2, [3, 5], "")
    _same(_steps("tiny-bert", "lora", 2, [3, 5], "inductor"), eager)
