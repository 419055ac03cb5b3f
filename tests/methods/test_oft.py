"""OFT: rotations stay rotations, its options, and both parameterisations against HF PEFT."""

import pytest
import torch

import peftbench
from peftbench.errors import UserError
from peftbench.methods.oft import OFT
from tests.conformance.conftest import batch, disturb, fresh, hidden
from tests.methods.formulas import parity


def rotation(delta, run=0):
    """Return R [D, D] of one run: what the rows of the identity become."""
    return delta.before(torch.eye(32).expand(delta.runs, -1, -1))[run].detach()


@pytest.mark.parametrize("name", ["oft", "oftv2"])
@pytest.mark.parametrize("family", ["tiny-bert", "tiny-gpt2", "tiny-llama"])
def test_it_equals_its_formula_on_dense_weights(name, family, monkeypatch):
    assert parity(monkeypatch, name, family).passed


@pytest.mark.parametrize("size", [2, 8, 32])
def test_rotations_are_orthogonal_and_keep_norms(size):
    adapter = peftbench.attach(fresh("tiny-bert"), OFT(block_size=size), runs=2)
    disturb(adapter)
    for site, delta in adapter.deltas:
        for run in range(2):
            turn = rotation(delta, run)
            assert (turn @ turn.T - torch.eye(32)).abs().max() < 1e-5
            assert torch.linalg.det(turn) > 0.99
            rows = turn.unflatten(0, (-1, size))[0]
            assert not rows[:, size:].any()
            assert rows[:, :size].triu(1).any()
        x = torch.randn(2, 50, 32, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(delta.before(x).norm(dim=-1), x.norm(dim=-1), rtol=1e-5, atol=1e-5)
        new, _ = delta.merged(site.dense_weight(), None, 1)
        torch.testing.assert_close(new @ new.T, site.dense_weight() @ site.dense_weight().T, rtol=1e-5, atol=1e-5)


def test_more_terms_of_the_series_come_closer_to_a_rotation():
    """The error of n terms is of the order of |Q|^(n - 1); the two forms take Q with opposite signs."""
    errors = []
    for terms in (4, 5, 7, 12):
        adapter = peftbench.attach(fresh("tiny-bert"), OFT(block_size=4, neumann_terms=terms))
        exact = peftbench.attach(fresh("tiny-bert"), OFT(block_size=4))
        for (_, ours), (_, other) in zip(adapter.deltas, exact.deltas, strict=True):
            with torch.no_grad():
                ours.skew.fill_(0.05)
                other.skew.fill_(-0.05)
        errors.append((rotation(adapter.deltas[0][1]) - rotation(exact.deltas[0][1])).abs().max().item())
    assert errors[0] > 5 * errors[1] > 25 * errors[2]
    assert errors[3] < 1e-6


def test_one_block_may_serve_all_places():
    adapter = peftbench.attach(fresh("tiny-bert"), OFT(block_size=8, share=True))
    disturb(adapter)
    turn = rotation(adapter.deltas[0][1])
    torch.testing.assert_close(turn, torch.block_diag(*[turn[:8, :8]] * 4))
    assert adapter.parameter_count() == 4 * 28


@pytest.mark.parametrize("bad", [{"block_size": 1}, {"epsilon": 0.0}, {"neumann_terms": 3}, {"neumann_terms": -1}])
def test_settings_out_of_range_are_refused(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        OFT(**bad)


def test_a_block_size_that_does_not_divide_the_width_is_refused():
    with pytest.raises(UserError, match="block_size=5: expected a divisor of 32"):
        peftbench.attach(fresh("tiny-bert"), OFT(block_size=5))


def test_a_role_that_shares_its_input_brings_the_whole_module():
    model = fresh("tiny-gpt2")
    adapter = peftbench.attach(model, OFT(block_size=4, targets=("attention.query", "mlp.down")))
    assert [site.name for site, _ in adapter.deltas][:2] == ["h.0.attn.c_attn", "h.0.mlp.c_proj"]
    assert all(site.columns is None for site, _ in adapter.deltas)


@pytest.mark.parametrize(
    "settings",
    [{}, {"neumann_terms": 5}, {"neumann_terms": 4}, {"neumann_terms": 7}, {"share": True}, {"epsilon": 0.01}]
    + [{"share": True, "epsilon": 0.01, "neumann_terms": 5}],
    ids=str,
)
def test_training_equals_peft_s_with_every_option(settings, tmp_path):
    """A constrained rotation is scaled back after a step here, before the next one there."""
    peft = pytest.importorskip("peft")
    from peftbench.methods.base import StepEnd

    model = fresh("tiny-bert")
    adapter = peftbench.attach(model, OFT(block_size=8, **settings))
    adapter.save(tmp_path / "start", format="peft")
    theirs = peft.PeftModel.from_pretrained(fresh("tiny-bert"), tmp_path / "start", is_trainable=True)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    ours, other = (torch.optim.SGD(ps, lr=1.0) for ps in (adapter.parameters(), trained))
    for step in range(6):
        for net, optimizer in ((model, ours), (theirs, other)):
            optimizer.zero_grad()
            out = hidden(net, batch(4, step))
            (out - torch.randn(out.shape, generator=torch.Generator().manual_seed(step))).square().mean().backward()
            optimizer.step()
        adapter.after_step(StepEnd([step + 1], [6], lambda p: p, lambda p: (p, p), lambda p, a, b: None, torch.ones(1)))
    want = hidden(theirs, batch(4))
    torch.testing.assert_close(hidden(model, batch(4)), want, rtol=1e-4, atol=1e-5)
    assert (want - hidden(fresh("tiny-bert"), batch(4))).abs().max() > 1e-3
    theirs.save_pretrained(tmp_path / "end")
    adapter.detach()
    loaded = peftbench.load_adapter(model, tmp_path / "end")
    assert loaded.methods[0].settings() | {"targets": ()} == OFT(block_size=8, **settings).settings() | {"targets": ()}
    torch.testing.assert_close(hidden(model, batch(4)), want, rtol=1e-4, atol=1e-5)


def test_the_constraint_bounds_every_run_by_its_own_epsilon():
    adapter = peftbench.attach(fresh("tiny-bert"), [OFT(8, epsilon=e) for e in (0.1, 0.5, None)])
    disturb(adapter)
    free = [delta.skew[2].clone() for _, delta in adapter.deltas]
    adapter.after_step(None)
    for (_, delta), before in zip(adapter.deltas, free, strict=True):
        upper = torch.zeros(3, 4, 8, 8)
        upper[..., delta.rows, delta.columns] = delta.skew.detach()
        norms = (upper - upper.mT).norm(dim=(2, 3))
        torch.testing.assert_close(norms[:2], torch.tensor([[0.05], [0.25]]).expand(2, 4))
        assert torch.equal(delta.skew[2], before)
