"""ReLoRA against the gate's plain loop; restarts, pruning and rates by themselves; what is saved and taken off."""

import math

import pytest
import torch
from torch import nn

import peftbench
from peftbench.engine.optimizer import PackedAdamW, Recipe
from peftbench.errors import UserError
from peftbench.methods import relora
from peftbench.methods.relora import Relora, ReloraDelta, pruned_moments, restart_steps
from peftbench.selection import Scores, Selection
from peftbench.verify import loops
from tests.conformance.conftest import batch, fresh, hidden

STEPS = 20
TARGETS = {"tiny-bert": ("attention.query", "mlp.up"), "tiny-gpt2": ("attention.value",)}


def test_restarts_divide_training_into_equal_parts():
    assert restart_steps(3, 100) == (25, 50, 75)
    assert restart_steps(2, 20) == (7, 13)
    assert restart_steps(0, 20) == ()
    assert restart_steps(5, 3) == (1, 2)  # more restarts than steps: at most one a step, none before or after all


def test_the_rate_falls_to_zero_at_a_restart_and_climbs_back():
    method = Relora(restarts=1, restart_warmup=0.2)
    factors = [method.rate_factor(step, 40) for step in range(40)]
    assert factors[:20] == [1.0] * 20
    assert factors[20:25] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert factors[25:] == [1.0] * 15
    jagged = Recipe(1.0, schedule="cosine", factor=method.rate_factor)
    assert jagged.rate(22, 40) == pytest.approx(0.5 * 0.5 * (1 + math.cos(math.pi * 22 / 40)))
    assert Relora(restarts=1, restart_warmup=0.0).rate_factor(20, 40) == 1.0


def test_pruning_keeps_the_entries_with_the_largest_first_moment():
    mean = torch.tensor([[[0.1, -5.0, 2.0, 0.0], [3.0, -0.2, -4.0, 1.0]]])
    square = torch.arange(1.0, 9.0).reshape(1, 2, 4)
    m, v = pruned_moments(mean, square, 0.75)
    assert m.tolist() == [[[0.0, -5.0, 0.0, 0.0], [0.0, 0.0, -4.0, 0.0]]]
    assert v.tolist() == [[[0.0, 2.0, 0.0, 0.0], [0.0, 0.0, 7.0, 0.0]]]
    assert not any(t.any() for t in pruned_moments(mean, square, 1.0))
    assert all(torch.equal(a, b) for a, b in zip(pruned_moments(mean, square, 0.0), (mean, square), strict=True))
    # The share is what lies above a quantile of the sizes.
    mean = torch.randn(1, 40, 25, generator=torch.Generator().manual_seed(0))
    above = mean.abs() > mean.abs().flatten().quantile(0.99)
    assert torch.equal(pruned_moments(mean, mean.square(), 0.99)[0] != 0, above)


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    states = hidden(model, batch(3, step % 4))
    target = torch.randn(states.shape, generator=torch.Generator().manual_seed(step % 4))
    return (states - target).square().mean()


def trained(family: str, method: Relora, lr: float = 1e-2, seed: int = 3, steps: int = STEPS):
    """Train and return model, adapter and losses."""
    model = fresh(family)
    adapter = peftbench.attach(model, method, seeds=[seed])
    recipe = Recipe(lr, schedule="cosine", factor=method.rate_factor)
    optimizer = PackedAdamW(adapter.packed_parameters(), [], [recipe], STEPS, keep_gradients=True)
    losses = []
    for step in range(steps):
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step(loss.detach().reshape(1))
        adapter.after_step(optimizer.end())
        losses.append(loss.item())
    return model, adapter, losses


@pytest.mark.parametrize("family", list(TARGETS))
def test_training_is_the_plain_loop_s(family):
    found = loops.relora("relora", family, targets=TARGETS[family])
    assert found.passed, found
    assert set(found.deviations) == {"outputs", "gradients", "trace", "merged"}


MISTAKES = [
    (Relora, "rate_factor", lambda self, step, steps: 1.0),
    (relora, "restart_steps", lambda restarts, steps: (4, 9, 14)),
    (relora, "pruned_moments", lambda mean, square, pruned: (mean.clone(), square.clone())),
    (relora, "pruned_moments", lambda mean, square, pruned: pruned_moments(mean, square, 0.8)),
    (ReloraDelta, "restart", lambda self, site: None),
]


@pytest.mark.parametrize(("owner", "name", "wrong"), MISTAKES)
def test_the_plain_loop_finds_mistakes(monkeypatch, owner, name, wrong):
    monkeypatch.setattr(owner, name, wrong)
    assert not loops.relora("relora", "tiny-bert").passed


def test_a_restart_changes_the_weights_and_not_the_outputs():
    method = Relora(rank=2, restarts=3, targets=("attention.query", "attention.value"))
    model, adapter, _ = trained("tiny-gpt2", method, steps=4)
    states = hidden(model, batch(3))
    weights = {n: p.clone() for n, p in adapter.rewritten.items()}
    for site, delta in adapter.deltas:
        delta.restart(site)
        assert not delta.B.any()
    torch.testing.assert_close(hidden(model, batch(3)), states, rtol=1e-4, atol=1e-5)
    width = model.config.hidden_size
    for name, p in adapter.rewritten.items():
        changed = (p != weights[name]).any(dim=0)
        assert changed[:width].all()  # the query's columns
        assert not changed[width : 2 * width].any()  # the key's are nobody's
        assert changed[2 * width :].all()


def test_a_trained_adapter_is_saved_loaded_merged_and_taken_off(tmp_path):
    method = Relora(rank=2, restarts=3)
    original = {k: v.clone() for k, v in fresh("tiny-gpt2").state_dict().items()}
    model, adapter, _ = trained("tiny-gpt2", method)
    states = hidden(model, batch(3))
    assert any(not torch.equal(p, original[n]) for n, p in adapter.rewritten.items())
    adapter.save(tmp_path)
    adapter.merge()
    torch.testing.assert_close(hidden(model, batch(3)), states, rtol=1e-4, atol=1e-5)
    adapter.unmerge()
    assert torch.equal(hidden(model, batch(3)), states)
    adapter.detach()
    assert all(torch.equal(v, original[k]) for k, v in model.state_dict().items())
    loaded = peftbench.load_adapter(model, tmp_path)
    assert torch.equal(hidden(model, batch(3)), states)
    loaded.detach()
    assert all(torch.equal(v, original[k]) for k, v in model.state_dict().items())


def test_the_best_evaluation_s_weights_come_back():
    class Better:
        primary_metric, greater_is_better = "accuracy", True

    method = Relora(rank=2, restarts=3)
    model, adapter, _ = trained("tiny-bert", method, steps=0)
    recipe = Recipe(1e-2, schedule="constant", factor=method.rate_factor)
    optimizer = PackedAdamW(adapter.packed_parameters(), [], [recipe], STEPS, keep_gradients=True)
    selection = Selection(Better(), optimizer, [Scores()], list(adapter.rewritten.values()))
    seen = []
    for step in range(STEPS):
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step(loss.detach().reshape(1))
        adapter.after_step(optimizer.end())
        if step in (7, 14):  # one restart lies before the better evaluation, one before the worse
            selection.consider({0: step}, {0: {"accuracy": 1.0 if step == 7 else 0.5}})
            seen.append(hidden(model, batch(3)))
    assert not torch.equal(hidden(model, batch(3)), seen[0])
    selection.restore()
    assert torch.equal(hidden(model, batch(3)), seen[0])


def test_restarts_of_the_same_seed_draw_the_same():
    first, second = (trained("tiny-bert", Relora(rank=2), seed=5)[1].state_dict() for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_under_autocast_the_base_stays_in_fp32():
    model = fresh("tiny-bert")
    adapter = peftbench.attach(model, Relora(rank=2))
    with torch.autocast("cpu", torch.bfloat16):
        hidden(model, batch(2)).square().mean().backward()
    assert all(p.dtype == torch.float32 for p in adapter.rewritten.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in adapter.parameters())


@pytest.mark.parametrize(
    "wrong", [{"restarts": -1}, {"restart_warmup": 1.5}, {"pruned": -0.1}, {"rank": 0}, {"dropout": 1.0}]
)
def test_bad_settings_are_refused(wrong):
    with pytest.raises(UserError, match=f"method.{next(iter(wrong))}="):
        Relora(**wrong)
