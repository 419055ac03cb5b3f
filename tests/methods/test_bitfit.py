"""BitFit against plain training of the same bias tensors of a copy of the model."""

import copy

import pytest
import torch

import peftbench
from peftbench.methods.bitfit import BitFit
from tests.conformance.conftest import batch, fresh, hidden

FIRST_HALF = {  # of the names that end in "bias", those of b_q and b_m2
    "tiny-bert": ("query.bias", "intermediate.dense.bias"),
    "tiny-opt": ("q_proj.bias", "fc1.bias"),
}


def names(model, family, biases):
    found = [n for n, _ in model.named_parameters() if n.endswith("bias") and "pooler" not in n]
    return found if biases == "all" else [n for n in found if n.endswith(FIRST_HALF[family])]


@pytest.mark.parametrize(
    ("family", "biases"),
    [("tiny-bert", "all"), ("tiny-gpt2", "all"), ("tiny-opt", "all"), ("tiny-bert", "query_mlp")]
    + [("tiny-opt", "query_mlp")],
)
def test_training_equals_training_the_biases_of_the_model(family, biases):
    model = fresh(family)
    plain = copy.deepcopy(model)
    adapter = peftbench.attach(model, BitFit(biases))
    chosen = [plain.get_parameter(name) for name in names(plain, family, biases)]
    assert adapter.parameter_count() == sum(p.numel() for p in chosen)
    for p in chosen:
        p.requires_grad_(True)
    # Not Adam: it makes whole steps of rounding errors where a gradient is zero, as that of a key's bias is.
    optimizers = [torch.optim.SGD(ps, lr=0.3) for ps in (adapter.parameters(), chosen)]
    for step in range(5):
        for net, optimizer in zip((model, plain), optimizers, strict=True):
            optimizer.zero_grad()
            out = hidden(net, batch(4, step))
            (out - torch.randn(out.shape, generator=torch.Generator().manual_seed(step))).square().mean().backward()
            optimizer.step()
    with torch.no_grad():
        assert (hidden(plain, batch(4)) - hidden(fresh(family), batch(4))).abs().max() > 0.01
        torch.testing.assert_close(hidden(model, batch(4)), hidden(plain, batch(4)), rtol=1e-4, atol=1e-5)
        adapter.merge()
    for name, p in plain.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), p, rtol=1e-4, atol=1e-5)
