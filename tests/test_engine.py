"""The engine: batches, optimizer, and that a run in a pack gives the trace it gives alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from peftbench.engine import moments
from peftbench.engine.batches import TokenTable, evaluation_batches, make_buckets, packed_batches, steps_per_epoch
from peftbench.engine.heads import PackedHead, pool
from peftbench.engine.optimizer import PackedAdamW, Recipe, rate_factor
from peftbench.tasks.base import Encoded

LENGTHS = [3 + (7 * i) % 40 for i in range(203)]


def test_every_epoch_visits_every_item_once_for_every_run() -> None:
    buckets = make_buckets(LENGTHS, 8, 64)
    steps = steps_per_epoch(buckets, 8)
    batches = list(packed_batches(buckets, 8, [0, 1], 2 * steps))
    assert len(batches) == 2 * steps
    for epoch in range(2):
        for run in range(2):
            seen = np.concatenate([b.items[run] for b in batches if b.epoch == epoch])
            assert sorted(seen) == list(range(203))


def test_order_depends_on_the_seed_alone_and_buckets_are_shared() -> None:
    buckets = make_buckets(LENGTHS, 8, 64)
    alone = list(packed_batches(buckets, 8, [5], 30))
    packed = list(packed_batches(buckets, 8, [2, 5, 9], 30))
    for a, p in zip(alone, packed, strict=True):
        assert np.array_equal(a.items[0], p.items[1])
        assert a.length == p.length >= max(LENGTHS[i] for i in p.items.reshape(-1))
    assert not all(np.array_equal(p.items[0], p.items[1]) for p in packed)


@pytest.mark.parametrize("done", [[0, 0, 0], [0, 26, 52], [5, 31, 5]], ids=["fresh", "epochs apart", "within one"])
def test_batches_are_those_of_one_run_after_another(done: list[int]) -> None:
    """Every run permutes every bucket, in order, anew in each epoch; the batch of a step holds a row of items a run."""
    buckets, seeds = make_buckets(LENGTHS, 8, 64), [2, 5, 9]
    visits = [(b, k) for b, bucket in enumerate(buckets) for k in range(math.ceil(len(bucket.items) / 8))]
    visits = [visits[i] for i in np.random.default_rng([7, len(visits)]).permutation(len(visits))]
    assert len(visits) == steps_per_epoch(buckets, 8) == 26
    for step, batch in enumerate(packed_batches(buckets, 8, seeds, 60, done)):
        b, k = visits[(done[0] + step) % len(visits)]
        rows = []
        for seed, before in zip(seeds, done, strict=True):
            generator = np.random.default_rng([11, seed, (before + step) // len(visits)])
            permuted = [generator.permutation(bucket.items) for bucket in buckets]
            rows.append(permuted[b][k * 8 : (k + 1) * 8])
        plain = np.stack(rows)
        assert (batch.items.dtype, batch.items.shape) == (plain.dtype, plain.shape)
        assert batch.items.tobytes() == plain.tobytes()
        assert batch.items.flags.c_contiguous
        assert batch.items.base is None, "a batch that is kept keeps no other alive"
        assert (batch.length, batch.epoch) == (buckets[b].length, (done[0] + step) // len(visits))


def test_buckets_keep_padding_small() -> None:
    buckets = make_buckets(LENGTHS, 4, 64)
    padded = sum(b.length * len(b.items) for b in buckets)
    assert padded < 1.35 * sum(LENGTHS)
    assert max(LENGTHS) * len(LENGTHS) > 1.7 * sum(LENGTHS)


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_token_table_pads_on_the_side_asked_for(left: bool) -> None:
    encoded = Encoded([[5, 6, 7], [8]], None, [1, 0], None)
    batch = TokenTable(encoded, 0, "cpu", left=left).gather(np.array([[1, 0]]), 4)
    assert batch["input_ids"].tolist() == ([[0, 0, 8], [5, 6, 7]] if left else [[8, 0, 0], [5, 6, 7]])
    assert batch["attention_mask"].tolist() == ([[0, 0, 1], [1, 1, 1]] if left else [[1, 0, 0], [1, 1, 1]])
    assert batch["targets"].tolist() == [0, 1]


def test_evaluation_covers_every_item_once() -> None:
    batches = list(evaluation_batches(LENGTHS, 16, 64))
    assert sorted(np.concatenate([items for items, _ in batches])) == list(range(203))
    assert all(length >= max(LENGTHS[i] for i in items) for items, length in batches)


@pytest.mark.parametrize(
    ("schedule", "last"), [("constant", 1.0), ("linear", 0.1), ("cosine", 0.5 * (1 + math.cos(0.9 * math.pi)))]
)
def test_schedules_warm_up_and_fall_as_named(schedule: str, last: float) -> None:
    factors = [rate_factor(s, 12, schedule, 2 / 12) for s in range(12)]
    assert factors[:3] == [0.5, 1.0, 1.0]
    assert factors[-1] == pytest.approx(last)
    assert rate_factor(0, 10, schedule, 0.0) == 1.0


def _packed_and_solos(
    decay: float, clip: float
) -> tuple[PackedAdamW, list[torch.optim.AdamW], list[list[torch.nn.Parameter]]]:
    g = torch.Generator().manual_seed(0)
    shapes = [(4, 3), (5,)]
    rates = [1e-2, 3e-3, 1e-1]
    packed = [torch.nn.Parameter(torch.randn(3, *s, generator=g)) for s in shapes]
    solos = [[torch.nn.Parameter(p[r].detach().clone()) for p in packed] for r in range(3)]
    ours = PackedAdamW(packed, [], [Recipe(lr, decay, clip, "constant") for lr in rates], 10)
    theirs = []
    for lr, (matrix, vector) in zip(rates, solos, strict=True):
        groups = [{"params": [matrix], "weight_decay": decay}, {"params": [vector], "weight_decay": 0.0}]
        theirs.append(torch.optim.AdamW(groups, lr=lr))
    return ours, theirs, solos


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_packed_adamw_equals_pytorchs_run_by_run(decay: float, clip: float) -> None:
    ours, theirs, solos = _packed_and_solos(decay, clip)
    g = torch.Generator().manual_seed(1)
    for _ in range(10):
        for i, p in enumerate(ours.packed):
            p.grad = torch.randn(p.shape, generator=g)
            for run in range(3):
                solos[run][i].grad = p.grad[run].clone()
        for run in range(3):
            if clip:
                torch.nn.utils.clip_grad_norm_(solos[run], clip)
            theirs[run].step()
        ours.step(torch.zeros(3))
        for i, p in enumerate(ours.packed):
            for run in range(3):
                torch.testing.assert_close(p[run], solos[run][i], rtol=1e-5, atol=1e-6)


RECIPES = [
    Recipe(1e-2, 0.1, 0.5, "linear", 0.2),
    Recipe(3e-3, 0.0, 0.0, "cosine", 0.0),
    Recipe(1e-1, 0.2, 1.0, "constant", factor=lambda step, steps: 1 + step / steps),
]


def _trained(steps: int, recipes: list[Recipe], wild: int | None = None) -> PackedAdamW:
    """Return the optimizer after `steps` of random gradients, those of run `wild` infinite from the third on."""
    g = torch.Generator().manual_seed(0)
    packed = [torch.nn.Parameter(torch.randn(len(recipes), *s, generator=g)) for s in [(4, 30), (50,)]]
    ratios = [[1.0, 1.0, 1.0], [2.0, 1.0, 0.5]]
    ours = PackedAdamW(packed, [], recipes, steps, ratios=ratios, keep_gradients=True)
    for step in range(steps):
        for p in packed:
            p.grad = torch.randn(p.shape, generator=g)
            if wild is not None and step >= 2:
                p.grad[wild] = math.inf
        ours.step(torch.zeros(len(recipes)))
    return ours


@pytest.mark.parametrize("wild", [None, 1])
def test_a_step_is_the_formula_with_the_hosts_own_numbers_bit_for_bit(wild: int | None) -> None:
    steps = 25
    ours = _trained(steps, RECIPES, wild)
    g = torch.Generator().manual_seed(0)
    parts = [torch.randn(3, *s, generator=g).flatten(1) for s in [(4, 30), (50,)]]
    theta = torch.cat(parts, dim=1)
    mean, square = torch.zeros_like(theta), torch.zeros_like(theta)
    alive = torch.ones(3, 1, dtype=torch.bool)
    clip = torch.tensor([0.5, math.inf, 1.0])
    decay = torch.tensor([[0.1], [0.0], [0.2]]) * (torch.arange(170) < 120)
    ratios = torch.ones(3, 170)
    ratios[0, 120:], ratios[2, 120:] = 2.0, 0.5
    for step in range(steps):
        grad = torch.cat([torch.randn(3, *s, generator=g).flatten(1) for s in [(4, 30), (50,)]], dim=1)
        if wild is not None and step >= 2:
            grad[wild] = math.inf
        norms = torch.linalg.vector_norm(grad, dim=1)
        alive &= torch.isfinite(norms)[:, None]
        shrink = (clip / (norms + 1e-6)).clamp(max=1.0)[:, None]
        grad = torch.where(alive, grad * shrink, 0.0)
        mean.lerp_(grad, 1 - 0.9)
        square.mul_(0.999).addcmul_(grad, grad, value=1 - 0.999)
        t, rates = step + 1, [r.rate(step, steps) for r in RECIPES]
        first = torch.tensor([[rate / (1 - 0.9**t)] for rate in rates])
        root = square.sqrt() * (1 - 0.999**t) ** -0.5 + 1e-8
        shrunk = torch.where(alive, decay * torch.tensor(rates)[:, None] * ratios, 0.0)
        theta = torch.addcmul(theta, shrunk, theta, value=-1)
        theta = torch.addcdiv(theta, mean * torch.where(alive, first, 0.0) * ratios, root, value=-1)
    assert torch.equal(ours.flat, theta)
    assert torch.equal(ours.end().gradient(ours.packed[1]), grad[:, 120:])
    assert ours.alive.tolist() == [run != wild for run in range(3)]
    assert ours.step_count == int(ours._row) == steps


def test_a_large_update_by_chunks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    unclipped = [Recipe(r.learning_rate, r.weight_decay) for r in RECIPES]
    whole = _trained(5, unclipped)
    assert len(list(whole._moments.chunks())) == 1
    monkeypatch.setattr(moments, "WHOLE", 170 * 3)
    monkeypatch.setattr(moments, "CHUNK", 48)
    chunked = _trained(5, unclipped)
    assert len(list(chunked._moments.chunks())) == 11
    assert torch.equal(whole.flat, chunked.flat)


def test_the_largest_temporary_is_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    monkeypatch.setattr(moments, "WHOLE", 4096)
    monkeypatch.setattr(moments, "CHUNK", 512)
    p = torch.nn.Parameter(torch.randn(2, 40, 60))
    optimizer = PackedAdamW([p], [], [Recipe(1e-2)] * 2, 3)
    made: list[int] = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            old = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
            if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in old:
                made.append(out.numel())
            return out

    p.grad = torch.ones_like(p)
    with Sizes():
        optimizer.step(torch.zeros(2))
    assert sorted(made)[-1] == p.numel()  # the gradients of all parameters, joined
    assert sorted(made)[-2] <= 512


def test_no_step_goes_beyond_the_plan() -> None:
    optimizer = _trained(2, RECIPES)
    with pytest.raises(AssertionError, match="more steps"):
        optimizer.step(torch.zeros(3))


def test_plain_parameters_follow_the_same_rule() -> None:
    g = torch.Generator().manual_seed(0)
    packed = torch.nn.Parameter(torch.randn(1, 4, 3, generator=g))
    plain = torch.nn.Parameter(packed[0].detach().clone())
    recipe = Recipe(1e-2, 0.1, 0.5, "linear", 0.2)
    a = PackedAdamW([packed], [], [recipe], 10)
    b = PackedAdamW([], [plain], [recipe], 10)
    for _ in range(10):
        grad = torch.randn(4, 3, generator=g)
        packed.grad, plain.grad = grad[None].clone(), grad.clone()
        a.step(torch.zeros(1))
        b.step(torch.zeros(1))
    torch.testing.assert_close(packed[0], plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_run_that_is_no_longer_finite_freezes_and_its_neighbours_never_notice(where: str) -> None:
    (ours, _, _), (twin, _, _) = _packed_and_solos(0.1, 1.0), _packed_and_solos(0.1, 1.0)
    g = torch.Generator().manual_seed(1)
    for step in range(6):
        losses = torch.zeros(3)
        for p, q in zip(ours.packed, twin.packed, strict=True):
            p.grad = torch.randn(p.shape, generator=g)
            q.grad = p.grad.clone()
            if step >= 2 and where == "gradient":
                p.grad[1] = float("nan") if step % 2 else float("inf")
        if step >= 2 and where == "loss":
            losses[1] = float("nan")
        if step == 2:
            frozen = ours.flat[1].clone()
        ours.step(losses)
        twin.step(torch.zeros(3))
    assert ours.alive.tolist() == [True, False, True]
    assert torch.equal(ours.flat[1], frozen)
    assert torch.equal(ours.flat[[0, 2]], twin.flat[[0, 2]])


def test_a_plain_run_that_is_no_longer_finite_freezes() -> None:
    plain = torch.nn.Parameter(torch.ones(4, 3))
    optimizer = PackedAdamW([], [plain], [Recipe(1e-2)], 10)
    plain.grad = torch.full((4, 3), float("nan"))
    optimizer.step(torch.zeros(1))
    assert torch.equal(plain.detach(), torch.ones(4, 3))
    assert not optimizer.alive.item()


def test_pooling_by_hand() -> None:
    hidden = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [9.0, 9.0]]])
    mask = torch.tensor([[1, 1, 0]])
    assert pool(hidden, mask, "mean").tolist() == [[2.0, 3.0]]
    assert pool(hidden, mask, "first").tolist() == [[1.0, 2.0]]
    assert pool(hidden, mask, "last").tolist() == [[3.0, 4.0]]


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_a_packed_head_is_three_heads(kind: str) -> None:
    def head(seeds: list[int]) -> PackedHead:
        return PackedHead(kind, 6, 3, [torch.Generator().manual_seed(s) for s in seeds], 0.0)

    x = torch.randn(3 * 4, 6)
    together = head([1, 2, 3])(x)
    for run in range(3):
        alone = head([run + 1])
        torch.testing.assert_close(alone(x[4 * run : 4 * run + 4])[0], together[run])
        assert alone.parameter_count() == (6 * 3 + 3 if kind == "linear" else 6 * 6 + 6 + 6 * 3 + 3)
