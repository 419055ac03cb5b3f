"""SSF against scales and shifts put after the modules of a plain copy by hand."""

import pytest
import torch

import peftbench
from peftbench.errors import UserError
from peftbench.methods.ssf import SSF
from tests.conformance.conftest import batch, fresh, hidden
from tests.methods.formulas import parity

MODULES = {
    "tiny-bert": ("query", "key", "value", "dense", "LayerNorm"),
    "tiny-llama": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "norm", "layernorm"),
}


def by_hand(family):
    """Return a copy of the model and its scales and shifts by the adapter's names."""
    model, trained = fresh(family), {}
    for name, module in model.named_modules():
        if not name.endswith(MODULES[family]) or "pooler" in name:
            continue
        width = module.weight.shape[0]
        trained[f"{name}.scale"] = torch.ones(width, requires_grad=True)
        if getattr(module, "bias", None) is not None:
            trained[f"{name}.shift"] = torch.zeros(width, requires_grad=True)

        def change(_, args, y, name=name):
            return trained[f"{name}.scale"] * y + trained.get(f"{name}.shift", 0)

        module.register_forward_hook(change)
    return model, trained


@pytest.mark.parametrize("family", sorted(MODULES))
def test_training_equals_scales_and_shifts_put_in_by_hand(family):
    model = fresh(family)
    plain, trained = by_hand(family)
    adapter = peftbench.attach(model, "ssf")
    assert set(adapter.state_dict()) == set(trained)
    optimizers = [torch.optim.SGD(ps, lr=0.1) for ps in (adapter.parameters(), list(trained.values()))]
    for step in range(4):
        for net, optimizer in zip((model, plain), optimizers, strict=True):
            optimizer.zero_grad()
            out = hidden(net, batch(4, step))
            (out - torch.randn(out.shape, generator=torch.Generator().manual_seed(step))).square().mean().backward()
            optimizer.step()
    for name, found in adapter.state_dict().items():
        torch.testing.assert_close(found, trained[name].detach(), rtol=1e-4, atol=1e-5)
    assert max((t - torch.ones_like(t)).abs().max() for n, t in trained.items() if n.endswith("scale")) > 0.01


@pytest.mark.parametrize("family", ["tiny-bert", "tiny-gpt2", "tiny-llama", "tiny-gemma3"])
def test_it_equals_its_formula_on_dense_weights(family, monkeypatch):
    assert parity(monkeypatch, "ssf", family).passed


def test_settings_choose_the_sites():
    adapter = peftbench.attach(fresh("tiny-bert"), SSF(targets=("mlp",), norms=False))
    assert {site.role for site, _ in adapter.deltas} == {"mlp.up", "mlp.down"}
    assert adapter.parameter_count() == 2 * 2 * (64 + 32)
    with pytest.raises(UserError, match="at least one role where norms is false"):
        SSF(targets=(), norms=False)
