"""Dropout by a hash: kernel against plain PyTorch, its statistics, and that a run's masks are its own."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peftbench.kernels.backend import interpreted, traced_for
from peftbench.kernels.dropout import _dropped, kept, run_dropout
from peftbench.kernels.noise import STRIDE, Noise, active, adapter_dropout, checkpoint_contexts
from tests.conftest import pass_in_interpreter, triton_interprets_loops

F = nn.functional
DEVICE = "cuda" if torch.cuda.is_available() and not interpreted() else "cpu"
runs_here = pytest.mark.skipif(DEVICE == "cpu" and not interpreted(), reason="needs a GPU, or Triton's interpreter")
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
SEEDS = [5, -7, 2**62 + 12345]


def seeds(numbers: list[int] = SEEDS) -> Tensor:
    return torch.tensor(numbers, device=DEVICE)


@runs_here
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rates", [(0.1, 0.1, 0.1), (0.0, 0.3, 0.999)], ids=["one rate", "a rate each"])
@pytest.mark.parametrize("shape", [(3, 5), (6, 7, 11), (3, 40, 64)], ids=str)
def test_the_kernel_drops_what_plain_pytorch_drops(shape, rates, dtype):
    x = torch.randn(shape, device=DEVICE).to(dtype).requires_grad_()
    out = run_dropout(x, seeds(), 77, rates)
    (gradient,) = torch.autograd.grad(out, x, torch.ones_like(out))
    mask = kept(seeds(), 77, x.numel() // 3, rates).reshape(shape)
    scale = torch.tensor([1 / (1 - p) for p in rates], device=DEVICE).reshape(3, *[1] * (len(shape) - 1))
    factor = mask.reshape(3, -1, *shape[1:]) * scale.unsqueeze(1)
    assert torch.equal(out, (x.float().reshape_as(factor) * factor).to(dtype).reshape(shape))
    assert torch.equal(gradient, factor.to(dtype).reshape(shape))


def test_a_share_is_dropped_and_nothing_hangs_together():
    """Of 200 seeds, calls and steps, and of neighbours: means and correlations are those of fair draws."""
    n, p = 20_000, 0.1
    noise = Noise([0], torch.device("cpu"))
    rows = [kept(torch.arange(60), 3, n, [p] * 60)]
    for call in range(60):
        rows.append(kept(noise.seeds, noise.site(), n, [p]))
        if call % 2:
            noise.advance()
    rows.append(kept(torch.arange(1, 41) * 2**32, 3, n, [p] * 40))
    rows.append(torch.cat([kept(torch.tensor([-1]), site, n, [p]) for site in range(40)]))
    draws = torch.cat(rows).double()
    deviations = (1 - draws.mean(dim=1) - p) / (p * (1 - p) / n) ** 0.5
    assert deviations.abs().max() < 4.5
    assert 0.8 < deviations.std() < 1.2
    assert abs(deviations.mean()) < 4 / len(draws) ** 0.5
    correlations = torch.corrcoef(draws).fill_diagonal_(0).abs() * n**0.5
    assert correlations.max() < 5.5  # of 20 000 pairs
    centred = draws[:20] - draws[:20].mean(dim=1, keepdim=True)
    for lag in (1, 2, 3, 4, 8, 16, 32, 64, 128, 384, 1024):
        along = (centred[:, :-lag] * centred[:, lag:]).mean(dim=1) / centred.square().mean(dim=1)
        assert along.abs().max() * n**0.5 < 4.5, lag


def test_masks_and_gradients_of_a_run_are_those_it_has_alone():
    x = torch.randn(6, 5, 8, requires_grad=True)
    rates = [0.2, 0.2, 0.5]
    together = run_dropout(x, torch.tensor(SEEDS), 9, rates)
    for run, own in enumerate(x.detach().split(2)):
        own.requires_grad_()
        alone = run_dropout(own, torch.tensor(SEEDS[run : run + 1]), 9, rates[run : run + 1])
        assert torch.equal(alone, together[2 * run : 2 * run + 2])
        (gradient,) = torch.autograd.grad(alone.square().sum(), own)
        assert torch.equal(
            gradient, torch.autograd.grad(together.square().sum(), x, retain_graph=True)[0][2 * run :][:2]
        )
    assert 0 < (together == 0).float().mean() < 0.6


def test_no_bit_is_lost_without_dropout():
    x = torch.randn(2, 9)
    assert torch.equal(run_dropout(x, torch.tensor([1, 2]), 4, [0.0, 0.0]), x)


def asked(noise: Noise, part: int = 0) -> list[Tensor]:
    """Return what a little step's dropouts keep: of the base, of an adapter on the last run, of attention."""
    ones = torch.ones(2 * noise.runs, 3, 4, 8)
    with noise.drawing(part):
        own = adapter_dropout(ones[-2:], [0.5], 3, noise.runs - 1)
        found = [F.dropout(ones, 0.5), F.dropout(ones, 0.5), own]
        found.append(F.scaled_dot_product_attention(ones, ones, ones, dropout_p=0.5))
    return found


@pytest.mark.parametrize("part", [0, 1])
def test_a_step_s_draws_follow_from_the_runs_seed_and_step(part):
    pack, alone = Noise([3, 8], torch.device("cpu")), Noise([8], torch.device("cpu"))
    first = asked(pack, part)
    assert all(torch.equal(a, b) for a, b in zip(first, asked(pack, part), strict=True))
    for ours, theirs in zip(first, asked(alone, part), strict=True):
        assert torch.equal(ours[-2:], theirs)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], asked(pack, 1 - part)[0])
    for _ in range(3):
        pack.advance()
    later = asked(pack, part)
    assert not torch.equal(later[0], first[0])
    alone.begin([3])
    for ours, theirs in zip(later, asked(alone, part), strict=True):
        assert torch.equal(ours[-2:], theirs)


def test_seeds_go_round_at_64_bits():
    noise = Noise([1], torch.device("cpu"))
    for _ in range(5):
        noise.advance()
    other = Noise([1], torch.device("cpu"))
    other.begin([5])
    assert torch.equal(noise.seeds, other.seeds)
    assert STRIDE % 2 == 1


def test_adapters_of_one_pack_do_not_count_for_each_other():
    x = torch.ones(1, 400)
    noise = Noise([1, 1], torch.device("cpu"))
    with noise.drawing():
        one, other, again = (adapter_dropout(x, [0.5], 1, first) for first in (0, 1, 0))
    assert torch.equal(one, other)
    assert not torch.equal(one, again)


def test_outside_a_step_pytorch_s_own_functions_stand():
    before = F.dropout, F.scaled_dot_product_attention
    noise = Noise([1], torch.device("cpu"))

    def broken() -> None:
        with noise.drawing():
            assert active() is noise
            assert F.dropout is not before[0]
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        broken()
    assert (F.dropout, F.scaled_dot_product_attention) == before
    assert active() is None
    assert adapter_dropout(torch.ones(1, 2), [0.5], 1, 0) is None


def test_what_has_no_rows_and_what_is_switched_off_is_left_to_pytorch():
    noise = Noise([1, 2], torch.device("cpu"))
    x = torch.ones(3, 50)
    with noise.drawing():
        torch.manual_seed(0)
        ours = F.dropout(x, 0.5)
        assert torch.equal(F.dropout(x, 0.5, training=False), x)
        assert F.dropout(torch.ones(()), 0.5) in (0.0, 2.0)  # no axis at all
        flat = torch.ones(2, 6, 4)
        assert F.scaled_dot_product_attention(flat, flat, flat, dropout_p=0.5).shape == flat.shape
    torch.manual_seed(0)
    assert torch.equal(ours, F.dropout(x, 0.5))


@pytest.mark.parametrize("kind", ["plain", "causal", "truth values", "bias", "grouped heads", "a row sees nothing"])
def test_attention_on_a_cpu_is_pytorch_s_with_its_mask_by_hash(kind):
    g = torch.Generator().manual_seed(1)
    query = torch.randn(4, 4, 5, 8, generator=g, requires_grad=True)
    key, value = (torch.randn(4, 2 if kind == "grouped heads" else 4, 5, 8, generator=g) for _ in range(2))
    given = {"causal": {"is_causal": True}, "grouped heads": {"enable_gqa": True}}.get(kind, {})
    if kind in ("truth values", "a row sees nothing"):
        given["attn_mask"] = torch.rand(4, 1, 5, 5, generator=g) < (0.7 if kind == "truth values" else 0.2)
    if kind == "bias":
        given["attn_mask"] = torch.randn(4, 1, 1, 5, generator=g)
    noise, p = Noise([1, 2], torch.device("cpu")), 0.3
    with noise.drawing():
        found = F.scaled_dot_product_attention(query, key, value, dropout_p=p, **given)
        sure = F.scaled_dot_product_attention(query, key, value, dropout_p=0.0, **given)
    assert torch.equal(sure, F.scaled_dot_product_attention(query, key, value, **given))
    with noise.drawing():
        mask = kept(noise.seeds, noise.site(), 2 * 4 * 5 * 5, [p, p]).reshape(4, 4, 5, 5)
    gqa = {"enable_gqa": given.get("enable_gqa", False)}
    added = given.get("attn_mask")
    if added is not None and added.dtype == torch.bool:
        added = torch.zeros(added.shape).masked_fill_(added.logical_not(), -torch.inf)
    wanted = torch.ops.aten._scaled_dot_product_attention_math(
        query, key, value, added, p, given.get("is_causal", False), mask, **gqa
    )[0]
    torch.testing.assert_close(found, wanted)
    ours, theirs = (torch.autograd.grad(out.sum(), query, retain_graph=True)[0] for out in (found, wanted))
    torch.testing.assert_close(ours, theirs)


def test_a_checkpointed_part_draws_the_same_once_more():
    x = torch.ones(2, 500, requires_grad=True)
    noise = Noise([1, 2], torch.device("cpu"))

    def part(x: Tensor) -> Tensor:
        return F.dropout(F.dropout(x, 0.5).square(), 0.5).square()

    found = []
    for how in (part, lambda x: checkpoint(part, x, use_reentrant=False, context_fn=checkpoint_contexts)):
        with noise.drawing():
            out = F.dropout(how(F.dropout(x, 0.5)), 0.5)
            found.append((out, *torch.autograd.grad(out.sum(), x)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_nothing_is_kept_for_the_backward_pass_where_shapes_stand_for_a_gpu_s():
    x = torch.empty(4, 6, device="meta", requires_grad=True)
    held: list[Tensor] = []
    with traced_for("cuda"), torch.autograd.graph.saved_tensors_hooks(lambda t: (held.append(t), t)[1], lambda t: t):
        out = run_dropout(x, torch.empty(2, dtype=torch.int64, device="meta"), 1, [0.1, 0.1])
        (gradient,) = torch.autograd.grad(out, x, torch.empty_like(out))
    assert [tuple(t.shape) for t in held] == [(2,)]
    assert gradient.shape == x.shape


@runs_here
def test_long_runs_have_more_than_one_program():
    x = torch.ones(2, 5000, device=DEVICE)
    mask = kept(seeds(SEEDS[:2]), 1, 5000, [0.25, 0.25])
    assert torch.equal(_dropped(x, seeds(SEEDS[:2]), 1, (0.25, 0.25)) > 0, mask)


@pytest.mark.skipif(interpreted(), reason="runs the tests above in the interpreter")
@pytest.mark.skipif(not triton_interprets_loops(), reason="needs Triton 3.7, or Triton and NumPy before 2.4")
def test_the_kernel_in_tritons_interpreter():
    pass_in_interpreter(__file__)
