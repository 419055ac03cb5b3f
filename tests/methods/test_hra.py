"""HRA: chains of reflections are orthogonal, its packs of mixed rank, its penalty."""

import pytest
import torch

import peftbench
from peftbench.errors import UserError
from peftbench.methods.hra import HRA, GramSchmidtHRA
from tests.conformance.conftest import batch, disturb, fresh, hidden
from tests.methods.formulas import parity


@pytest.mark.parametrize("name", ["hra", "hra_gs"])
@pytest.mark.parametrize("family", ["tiny-bert", "tiny-gpt2", "tiny-llama"])
def test_it_equals_its_formula_on_dense_weights(name, family, monkeypatch):
    assert parity(monkeypatch, name, family).passed


@pytest.mark.parametrize("method", [HRA(2), HRA(8), HRA(32), GramSchmidtHRA(1), GramSchmidtHRA(8)], ids=str)
def test_chains_are_orthogonal_and_keep_norms(method):
    adapter = peftbench.attach(fresh("tiny-bert"), method, runs=2)
    disturb(adapter)
    for _, delta in adapter.deltas:
        with torch.no_grad():
            delta.directions[1] *= 1e-3  # their length does not matter
        turn = delta.before(torch.eye(32).expand(2, -1, -1)).detach()
        assert (turn @ turn.mT - torch.eye(32)).abs().max() < 1e-5
        assert torch.linalg.matrix_rank(turn[0] - torch.eye(32)) == method.rank
        x = torch.randn(2, 50, 32, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(delta.before(x).norm(dim=-1), x.norm(dim=-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cls", [HRA, GramSchmidtHRA])
def test_ranks_may_differ_in_a_pack(cls):
    """Trained together each run goes as alone, and padding stays zero."""
    ranks = [2, 8, 4]
    model = fresh("tiny-llama")
    adapter = peftbench.attach(model, [cls(rank) for rank in ranks])
    disturb(adapter)
    states = [adapter.state_dict(run) for run in range(3)]

    def train(adapter, runs):
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
        for step in range(3):
            parts = {k: torch.cat([v] * runs) for k, v in batch(2, step).items()}
            out = model(**parts).last_hidden_state
            optimizer.zero_grad()
            (
                out * torch.randn(out[:2].shape, generator=torch.Generator().manual_seed(step)).repeat(runs, 1, 1)
            ).sum().backward()
            optimizer.step()

    train(adapter, 3)
    together = [adapter.state_dict(run) for run in range(3)]
    for _, delta in adapter.deltas:
        assert not delta.directions[0, :, 2:].any()
        assert not delta.directions[2, :, 4:].any()
    adapter.detach()
    for rank, before, after in zip(ranks, states, together, strict=True):
        alone = peftbench.attach(model, cls(rank))
        alone.load_state_dict(before)
        train(alone, 1)
        for name, tensor in alone.state_dict().items():
            torch.testing.assert_close(tensor, after[name], rtol=1e-3, atol=1e-4)
        alone.detach()


def test_the_penalty_is_the_paper_s():
    """λ ‖I - UᵀU‖² over all maps; equal pairs of unit vectors give 2 for each of the r / 2 pairs, and 0 without λ."""
    adapter = peftbench.attach(fresh("tiny-bert"), [HRA(2, orthogonality=0.5), HRA(4), HRA(2, orthogonality=2.0)])
    torch.testing.assert_close(adapter.penalty(), torch.tensor([0.5, 0.0, 2.0]) * 2 * len(adapter.deltas))
    disturb(adapter)
    want = torch.zeros(3)
    for run, weight in enumerate([0.5, 0.0, 2.0]):
        for directions in adapter.state_dict(run).values():
            units = directions / directions.norm(dim=0)
            want[run] += weight * (torch.eye(units.shape[1]) - units.T @ units).norm() ** 2
    torch.testing.assert_close(adapter.penalty().detach(), want)
    adapter.penalty().sum().backward()
    assert not adapter.deltas[0][1].directions.grad[1].any()
    assert peftbench.attach(fresh("tiny-bert"), HRA(2)).penalty() is None


def test_peft_s_two_forms_are_told_apart(tmp_path):
    peft = pytest.importorskip("peft")
    for name, cls in (("plain", HRA), ("orthogonal", GramSchmidtHRA)):
        config = peft.HRAConfig(r=4, apply_GS=name == "orthogonal", target_modules=["query"], init_weights=False)
        theirs = peft.get_peft_model(fresh("tiny-bert"), config)
        theirs.save_pretrained(tmp_path / name)
        model = fresh("tiny-bert")
        adapter = peftbench.load_adapter(model, tmp_path / name)
        assert type(adapter.methods[0]) is cls
        torch.testing.assert_close(hidden(model, batch(3)), hidden(theirs, batch(3)), rtol=1e-4, atol=1e-5)


def test_ranks_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="rank=3: expected an even number"):
        HRA(3)
    with pytest.raises(UserError, match="rank=40: expected at most 32"):
        peftbench.attach(fresh("tiny-bert"), GramSchmidtHRA(40))
    with pytest.raises(UserError, match="orthogonality=-1.0"):
        HRA(orthogonality=-1.0)
