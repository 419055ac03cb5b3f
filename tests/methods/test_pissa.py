"""PiSSA's start: the weight's principal part, taken as a difference that is exactly zero; and HF PEFT's folders."""

import pytest
import torch
from torch import nn

import peftbench
from peftbench.errors import UserError
from peftbench.methods.lora import Lora
from peftbench.methods.pissa import Pissa, PissaDelta, principal_factors
from peftbench.models.roles import Site
from tests.conformance.conftest import batch, disturb, fresh, hidden


def delta_of(module: nn.Linear, *methods: Pissa) -> PissaDelta:
    site = Site("linear", "attention.query", 0, "map", module, module.in_features, module.out_features)
    return PissaDelta(site, methods)


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9)])
def test_the_factors_hold_the_principal_part_evenly(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    a, b = principal_factors(weight, 3)
    sigma = torch.linalg.svdvals(weight.double())
    rest = torch.linalg.svdvals(weight.double() - b.double() @ a.double())
    torch.testing.assert_close(rest[: len(sigma) - 3], sigma[3:], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close((a @ a.T).double(), torch.diag(sigma[:3]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close((b.T @ b).double(), torch.diag(sigma[:3]), rtol=1e-5, atol=1e-5)
    assert (a.gather(1, a.abs().argmax(dim=1, keepdim=True)) > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_adapter_changes_nothing_at_all(dtype):
    model = fresh("tiny-bert", dtype)
    before = hidden(model, batch(4))
    adapter = peftbench.attach(model, [Pissa(rank=2), Pissa(rank=4, alpha=1.0, dropout=0.5)])
    adapter.train()
    assert torch.equal(hidden(model, batch(4)), before)


def test_a_small_change_keeps_its_digits_in_half_precision():
    torch.manual_seed(0)
    module = nn.Linear(64, 64, bias=False)
    delta = delta_of(module, Pissa(rank=8))
    step_a, step_b = 1e-4 * torch.randn_like(delta.A), 1e-4 * torch.randn_like(delta.B)
    with torch.no_grad():
        delta.A.add_(step_a)
        delta.B.add_(step_b)
        x, y = torch.randn(1, 10, 64), torch.zeros(1, 10, 64, dtype=torch.bfloat16)
        a, b, a0, b0 = (t.double() for t in (delta.A, delta.B, delta.A0, delta.B0))
        half = x.to(torch.bfloat16)
        want = half.double() @ (a @ b - a0 @ b0)
        own = delta.after(half, y).double()
        apart = half @ delta.A.to(half) @ delta.B.to(half) - half @ delta.A0.to(half) @ delta.B0.to(half)
    assert (own - want).norm() / want.norm() < 0.01
    assert (apart.double() - want).norm() / want.norm() > 0.5


@pytest.mark.parametrize(("family", "names"), [("tiny-bert", ["query", "value"]), ("tiny-gpt2", ["c_attn"])])
def test_the_start_is_peft_s_up_to_sign(family, names, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=names,
        init_lora_weights="pissa",
        fan_in_fan_out=family == "tiny-gpt2",
    )
    theirs = peft.get_peft_model(fresh(family), config).eval()
    model = fresh(family)
    adapter = peftbench.attach(model, Pissa(rank=3, alpha=6.0, targets=tuple(names)))
    found = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    assert len(found) == 2 * len(adapter.deltas)
    for site, delta in adapter.deltas:
        a = found[f"base_model.model.{site.name}.lora_A.default.weight"].T
        b = found[f"base_model.model.{site.name}.lora_B.default.weight"].T
        sign = (delta.A[0] * a).sum(dim=0).sign()
        torch.testing.assert_close(delta.A[0], a * sign, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(delta.B[0], b * sign[:, None], rtol=1e-4, atol=1e-5)
    # What PEFT trained and saved without converting it: its A and B mean the same here.
    adapter.detach()
    with torch.no_grad():
        for p in found.values():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    theirs.save_pretrained(tmp_path)
    loaded = peftbench.load_adapter(model, tmp_path)
    assert isinstance(loaded.methods[0], Pissa)
    torch.testing.assert_close(hidden(model, batch(3)), hidden(theirs, batch(3)), rtol=0, atol=1e-5)


def test_what_peft_converts_is_a_lora_of_twice_the_rank(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["query"], init_lora_weights="pissa")
    theirs = peft.get_peft_model(fresh("tiny-bert"), config).eval()
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    theirs.save_pretrained(tmp_path / "lora", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    model = fresh("tiny-bert")
    adapter = peftbench.load_adapter(model, tmp_path / "lora")
    assert isinstance(adapter.methods[0], Lora)
    assert adapter.methods[0].rank == 4
    torch.testing.assert_close(hidden(model, batch(3)), hidden(theirs, batch(3)), rtol=0, atol=1e-5)


def test_runs_of_different_rank_keep_their_padding_at_zero():
    model = fresh("tiny-bert")
    adapter = peftbench.attach(model, [Pissa(rank=2), Pissa(rank=4)])
    disturb(adapter)
    model(**batch(4)).last_hidden_state.square().sum().backward()
    for _, delta in adapter.deltas:
        assert not delta.A[0, :, 2:].any()
        assert not delta.B[0, 2:].any()
        assert not delta.A.grad[0, :, 2:].any()
        assert not delta.B.grad[0, 2:].any()
        assert delta.A.grad[0, :, :2].any()


def test_the_rank_is_at_most_the_smaller_side():
    with pytest.raises(UserError, match="at most 32"):
        peftbench.attach(fresh("tiny-bert"), Pissa(rank=33))
