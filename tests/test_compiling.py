"""Compiled layers: one compilation for all of a stack, the same numbers, and nothing left behind."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

import peftbench
from peftbench import registry
from peftbench.engine.compiling import compiled_layers, repeated_layers
from peftbench.models import attention
from peftbench.models.quantized import Scheme, quantize
from tests.conformance.conftest import METHODS, batch, disturb, fits, fresh, small


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
