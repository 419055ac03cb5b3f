"""DoRA's norm, which is never computed from a dense V, against the dense formula; and what it costs."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import peftbench
from peftbench.methods.dora import Dora, DoraDelta
from peftbench.models.roles import Site
from tests.conformance.conftest import batch, disturb, fresh, hidden

FAMILIES = ["tiny-bert", "tiny-gpt2", "tiny-neox"]
"""A plain linear map, a slice of a Conv1D, and interleaved rows of a linear map."""


def site_of(module: nn.Linear) -> Site:
    return Site("linear", "attention.query", 0, "map", module, module.in_features, module.out_features)


def delta_of(module: nn.Linear, *methods: Dora) -> DoraDelta:
    return DoraDelta(site_of(module), methods, [torch.Generator().manual_seed(i) for i in range(len(methods))])


def dense(delta: DoraDelta, weight: torch.Tensor, run: int, *, constant_norm: bool = True) -> torch.Tensor:
    """Equation 5 on a dense weight [out, in]."""
    v = weight + delta.scale[run, 0, 0] * (delta.A[run] @ delta.B[run]).T
    norm = v.norm(dim=1, keepdim=True)
    return delta.magnitude[run, :, None] * v / (norm.detach() if constant_norm else norm)


def test_a_worked_value():
    module = nn.Linear(2, 2)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
        module.bias.copy_(torch.tensor([1.0, -1.0]))
    delta = delta_of(module, Dora(rank=1, alpha=2.0))
    assert delta.magnitude.tolist() == [[5.0, 2.0]]
    with torch.no_grad():
        delta.A.copy_(torch.tensor([[[1.0], [0.0]]]))
        delta.B.copy_(torch.tensor([[[1.5, 0.75]]]))
        delta.magnitude.copy_(torch.tensor([[10.0, 5.0]]))
    # V = W + 2·BA = [[6, 4], [1.5, 2]]: norms √52 and 2.5.
    x = torch.tensor([[[1.0, 1.0]]])
    want = torch.tensor([[[10 * 10 / 52**0.5 + 1, 5 * 3.5 / 2.5 - 1]]])
    torch.testing.assert_close(delta.after(x, module(x)), want)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_norm_from_the_factors_is_the_dense_norm(family):
    model = fresh(family)
    adapter = peftbench.attach(model, [Dora(rank=2), Dora(rank=4, alpha=3.0), Dora(rank=1)])
    disturb(adapter)
    for site, delta in adapter.deltas:
        weight = site.dense_weight().double()
        for run in range(3):
            change = delta.scale[run, 0, 0].double() * (delta.A[run].double() @ delta.B[run].double()).T
            torch.testing.assert_close(
                delta.norm(torch.float32)[run].double(), (weight + change).norm(dim=1), rtol=1e-5, atol=0
            )


def test_the_norm_is_a_constant_to_the_backward_pass():
    torch.manual_seed(0)
    module = nn.Linear(6, 5)
    delta = delta_of(module, Dora(rank=2))
    with torch.no_grad():
        for p in delta.parameters():
            p.add_(0.3 * torch.randn_like(p))
    x, target = torch.randn(1, 7, 6), torch.randn(1, 7, 5)

    def gradients(y: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad((y - target).square().sum(), list(delta.parameters())))

    weight, bias = module.weight.detach(), module.bias.detach()
    own = gradients(delta.after(x, nn.functional.linear(x, weight, bias)))
    detached = gradients(nn.functional.linear(x, dense(delta, weight, 0), bias))
    through = gradients(nn.functional.linear(x, dense(delta, weight, 0, constant_norm=False), bias))
    for a, b in zip(own, detached, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(own[0], through[0], rtol=1e-2)


def test_a_step_costs_one_product_of_the_weight_with_the_factor_more_than_lora():
    """However many rows: no second product of the rows with W, no identity matrix through the adapter."""
    rank, runs = 4, 2
    module = nn.Linear(32, 48)
    delta = delta_of(module, *[Dora(rank=rank)] * runs)
    for rows in (10, 1000):
        x = torch.randn(runs, rows, 32)
        y = module(x).detach()
        with FlopCounterMode(display=False) as counter:
            delta.after(x, y)
        lora = 2 * runs * rows * rank * (32 + 48)
        norm = 2 * 48 * 32 * runs * rank + 2 * runs * (32 * rank * rank + 48 * rank * rank)
        assert counter.get_total_flops() == lora + norm


def test_half_precision_keeps_the_norm_and_a_small_gain():
    torch.manual_seed(1)
    module = nn.Linear(256, 64).to(torch.bfloat16)
    delta = delta_of(module, Dora(rank=8))
    with torch.no_grad():
        delta.B.normal_(std=0.02)
    true_norm = (module.weight.double() + 2.0 * (delta.A[0].double() @ delta.B[0].double()).T).norm(dim=1)
    error = (delta.norm(torch.bfloat16)[0] / true_norm - 1).abs().max()
    assert error < 5e-4
    # A gain of one in a thousand is below bf16's resolution around one, and still acts.
    with torch.no_grad():
        delta.B.zero_()
        delta.magnitude.mul_(1.001)
    torch.testing.assert_close(delta.gain(torch.bfloat16).float(), torch.full((1, 1, 64), 1e-3), rtol=0.01, atol=0)


def test_a_row_of_zeros_and_a_cancelled_weight_stay_finite():
    module = nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        module.weight.copy_(torch.diag(torch.tensor([1.0, 2.0, 3.0, 0.0])))
    delta = delta_of(module, Dora(rank=4, alpha=4.0))
    with torch.no_grad():
        delta.A.copy_(torch.eye(4))
        delta.B.copy_(-module.weight)
    x = torch.randn(1, 3, 4)
    y = delta.after(x, module(x).detach())
    y.square().sum().backward()
    assert y.isfinite().all()
    assert y.abs().max() < 1e-3
    assert all(p.grad is not None and p.grad.isfinite().all() for p in delta.parameters())


def test_dropout_leaves_the_frozen_product_alone():
    torch.manual_seed(2)
    module = nn.Linear(6, 5)
    delta = delta_of(module, Dora(rank=2, dropout=0.5)).train()
    with torch.no_grad():
        delta.magnitude.mul_(2)
    x = torch.randn(1, 7, 6)
    y = module(x).detach()
    torch.testing.assert_close(delta.after(x, y), y + (y - module.bias.detach()))


@pytest.mark.parametrize("family", ["tiny-bert", "tiny-gpt2"])
def test_a_folder_that_peft_wrote_loads(family, tmp_path):
    peft = pytest.importorskip("peft")
    names = ["query", "value"] if family == "tiny-bert" else ["c_attn"]
    config = peft.LoraConfig(
        r=3, lora_alpha=5, use_dora=True, target_modules=names, init_lora_weights=False, fan_in_fan_out=len(names) == 1
    )
    theirs = peft.get_peft_model(fresh(family), config).eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "magnitude" in name:
                p.mul_(1.5)
    theirs.save_pretrained(tmp_path)
    model = fresh(family)
    adapter = peftbench.load_adapter(model, tmp_path)
    method = adapter.methods[0]
    assert isinstance(method, Dora)
    assert (method.rank, method.alpha, sorted(method.targets)) == (3, 5.0, names)
    torch.testing.assert_close(hidden(model, batch(3)), hidden(theirs, batch(3)), rtol=0, atol=1e-5)
