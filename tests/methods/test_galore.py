"""GaLore's optimizer against the authors' package, a plain loop and AdamW; its state; runs no longer finite."""

import sys
import types

import pytest
import torch
from torch import nn

import peftbench
from peftbench.engine.optimizer import PackedAdamW, Recipe
from peftbench.errors import UserError
from peftbench.methods import galore
from peftbench.methods.galore import Galore, ProjectedAdamW, leading_directions
from peftbench.verify import loops
from tests.conformance.conftest import batch, fresh, hidden

SHAPES = [(12, 7), (7, 12), (9, 9), (3, 20), (11,)]
"""Tall, wide, square, no larger than the rank, a vector."""
RANK, SCALE, LR = 3, 0.5, 1e-2


def gradients(steps: int) -> list[list[torch.Tensor]]:
    """Return gradients whose first directions stand out and turn slowly."""
    g = torch.Generator().manual_seed(0)
    found = []
    for _ in range(steps):
        row = []
        for shape in SHAPES:
            noise = torch.randn(shape, generator=g)
            row.append(noise + 3 * torch.ones(shape) if len(shape) == 2 else noise)
        found.append(row)
    return found


def fresh_parameters() -> list[nn.Parameter]:
    g = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=g)) for shape in SHAPES]


def run(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: int) -> list[list[torch.Tensor]]:
    trace = []
    for row in gradients(steps):
        for p, g in zip(parameters, row, strict=True):
            p.grad = g.clone()
        optimizer.step()
        trace.append([p.detach().clone() for p in parameters])
    return trace


def own_trace(update_every: int, steps: int = 20, weight_decay: float = 0.0) -> list[list[torch.Tensor]]:
    parameters = fresh_parameters()
    optimizer = ProjectedAdamW(
        parameters, rank=RANK, update_every=update_every, scale=SCALE, lr=LR, weight_decay=weight_decay
    )
    return run(optimizer, parameters, steps)


@pytest.fixture
def galore_torch(monkeypatch):
    """Return the authors' package; its 8-bit optimizer, which is not used here, imports what a CPU may not have."""
    if "bitsandbytes" not in sys.modules:
        stub = types.ModuleType("bitsandbytes")
        optim = types.ModuleType("bitsandbytes.optim")
        inner = types.ModuleType("bitsandbytes.optim.optimizer")
        inner.Optimizer2State = object
        for name, module in (("", stub), (".optim", optim), (".optim.optimizer", inner)):
            monkeypatch.setitem(sys.modules, f"bitsandbytes{name}", module)
        monkeypatch.setitem(sys.modules, "bitsandbytes.functional", types.ModuleType("bitsandbytes.functional"))
    return pytest.importorskip("galore_torch")


def their_trace(galore_torch, update_every: int, steps: int = 20) -> list[list[torch.Tensor]]:
    parameters = fresh_parameters()
    projected = [p for p in parameters if p.dim() == 2 and min(p.shape) > RANK]
    others = [p for p in parameters if all(p is not q for q in projected)]
    about = {"rank": RANK, "update_proj_gap": update_every, "scale": SCALE, "proj_type": "std"}
    groups = [{"params": others}, {"params": projected, **about}]
    optimizer = galore_torch.GaLoreAdamW(groups, lr=LR, eps=1e-8, no_deprecation_warning=True)
    return run(optimizer, parameters, steps)


def test_training_is_the_authors_in_one_subspace(galore_torch):
    ours, theirs = own_trace(update_every=100), their_trace(galore_torch, update_every=100)
    for step, (own, their) in enumerate(zip(ours, theirs, strict=True)):
        for a, b in zip(own, their, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=f"step {step}, {tuple(a.shape)}")


def test_training_is_the_authors_in_changing_subspaces_once_their_signs_follow_on(galore_torch, monkeypatch):
    from galore_torch.galore_projector import GaLoreProjector

    chosen = GaLoreProjector.get_orthogonal_matrix

    def aligned(self, weights, rank, type):
        found, before = chosen(self, weights, rank, type), self.ortho_matrix
        if before is None:
            return found
        along = 1 if type == "right" else 0
        return found * torch.where((found * before).sum(dim=along, keepdim=True) < 0, -1.0, 1.0)

    bare = their_trace(galore_torch, update_every=6)
    monkeypatch.setattr(GaLoreProjector, "get_orthogonal_matrix", aligned)
    ours, theirs = own_trace(update_every=6), their_trace(galore_torch, update_every=6)
    for own, their in zip(ours, theirs, strict=True):
        for a, b in zip(own, their, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    one = own_trace(update_every=100)
    assert not torch.allclose(one[-1][0], ours[-1][0], rtol=1e-3)
    # Whatever signs the library returns, nothing differs before the first change of subspace.
    torch.testing.assert_close(bare[5], ours[5], rtol=1e-4, atol=1e-6)


def _kept(gradient, rank, before=None):
    return leading_directions(gradient, rank) if before is None else before


def _without_the_first(gradient, rank, before=None):
    return leading_directions(gradient, rank + 1, None)[:, 1:]


def _with_any_sign(gradient, rank, before=None):
    return leading_directions(gradient, rank, None if before is None else -before)


def test_training_is_the_plain_loop_s(monkeypatch):
    assert loops.galore("galore", "tiny-gpt2").passed
    for wrong in (_kept, _without_the_first, _with_any_sign):
        monkeypatch.setattr(galore, "leading_directions", wrong)
        assert not loops.galore("galore", "tiny-gpt2").passed, wrong


@pytest.mark.parametrize("shape", [(12, 7), (9, 9), (5000, 6)])
def test_the_directions_are_the_first_right_singular_vectors(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    found = leading_directions(matrix, 3)
    want = torch.linalg.svd(matrix.double(), full_matrices=False).Vh[:3].T.float()
    torch.testing.assert_close((found.T @ want).abs(), torch.eye(3), rtol=0, atol=1e-5)
    turned = leading_directions(matrix, 3, -found)
    torch.testing.assert_close(turned, -found)


def test_without_a_smaller_subspace_it_is_adamw():
    parameters, same = fresh_parameters(), fresh_parameters()
    optimizer = ProjectedAdamW(parameters, rank=20, update_every=5, scale=9.0, lr=LR, weight_decay=0.1)
    groups = [{"params": same[:-1], "weight_decay": 0.1}, {"params": same[-1:], "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=LR)
    for own, their in zip(run(optimizer, parameters, 10), run(reference, same, 10), strict=True):
        for a, b in zip(own, their, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)  # AdamW decays before its step


def test_state_is_low_rank():
    parameters = fresh_parameters()
    optimizer = ProjectedAdamW(parameters, rank=RANK, update_every=5, scale=1.0)
    run(optimizer, parameters, 1)
    shapes = [{k: tuple(v.shape) for k, v in optimizer.state[p].items() if k != "step"} for p in parameters]
    moments = [(12, 3), (12, 3), (9, 3), (3, 20), (11,)]
    assert [s["mean"] for s in shapes] == [s["square"] for s in shapes] == moments
    assert [s.get("basis") for s in shapes] == [(7, 3), (7, 3), (9, 3), None, None]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_run_that_is_no_longer_finite_stays_put(bad):
    parameters = fresh_parameters()
    optimizer = ProjectedAdamW(parameters, rank=RANK, update_every=2, scale=1.0, lr=torch.tensor(LR), weight_decay=0.1)
    optimizer.found_inf = torch.tensor(0.0)
    before = run(optimizer, parameters, 3)[-1]
    optimizer.found_inf = torch.tensor(1.0)
    for _ in range(3):
        for p in parameters:
            p.grad = torch.full_like(p, bad)
        optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(parameters, before, strict=True))
    assert all(v.isfinite().all() for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor))


def test_it_trains_a_model_under_the_engine_s_optimizer_and_stops_where_the_loss_does():
    method = Galore(rank=4, update_every=5)
    model = fresh("tiny-bert")
    original = {k: v.clone() for k, v in model.state_dict().items()}
    adapter = peftbench.attach(model, method)
    plain = list(adapter.trained.values())
    optimizer = PackedAdamW([], plain, [Recipe(1e-3, schedule="constant")], 40, base=method.base_optimizer(plain))
    target = torch.randn(hidden(model, batch(3)).shape, generator=torch.Generator().manual_seed(0))
    losses = []
    for step in range(12):
        loss = (hidden(model, batch(3)) - target).square().mean()
        loss.backward()
        optimizer.step(loss.detach().reshape(1) * (float("nan") if step == 10 else 1.0))
        losses.append(loss.item())
        if step == 9:
            kept = {k: v.clone() for k, v in model.state_dict().items()}
    assert losses[10] < 0.9 * losses[0]
    assert not optimizer.alive.any()
    assert all(torch.equal(v, kept[k]) for k, v in model.state_dict().items())
    moments = sum(t.numel() for t in optimizer.state_tensors())
    assert moments < sum(p.numel() for p in plain)
    adapter.detach()
    assert all(torch.equal(v, original[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"update_every": 0}, {"scale": 0.0}])
def test_bad_settings_are_refused(wrong):
    with pytest.raises(UserError, match=f"method.{next(iter(wrong))}="):
        Galore(**wrong)
