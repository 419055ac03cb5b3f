"""AdamW's kernels over a pack: against the same steps in plain PyTorch, on a GPU and in the interpreter."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from peftbench.engine import optimizer as module
from peftbench.engine.moments import Storage
from peftbench.engine.optimizer import PackedAdamW, Recipe
from peftbench.kernels.adamw import boundaries
from peftbench.kernels.backend import interpreted
from peftbench.kernels.blockwise import dynamic_map
from tests.conftest import pass_in_interpreter, triton_interprets_loops

DEVICE = torch.device("cuda" if torch.cuda.is_available() and not interpreted() else "cpu")
runs_here = pytest.mark.skipif(
    DEVICE.type == "cpu" and not interpreted(), reason="needs a GPU, or Triton's interpreter"
)
STEPS = 12
ONE = [Recipe(1e-2, 0.0, 0.0)] * 3
UNLIKE = [
    Recipe(1e-2, 0.1, 0.5, "linear", 0.2),
    Recipe(3e-3, 0.0, 0.0, "cosine", 0.0, beta1=0.5, epsilon=1e-3),
    Recipe(1e-1, 0.2, 1.0, "constant", beta2=0.9),
]


def gradients(wild: int | None) -> Iterator[list[Tensor]]:
    g = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        parts = [torch.randn(3, *shape, generator=g) for shape in [(4, 70), (50,)]]
        if wild is not None and step >= 4:
            parts[1][wild, 3] = math.nan
        yield [part.to(DEVICE) for part in parts]


def trained(kernel: bool, recipes: list[Recipe], how: dict, wild: int | None, monkeypatch: pytest.MonkeyPatch):
    """Return the optimizer after some steps, through the kernels or in plain PyTorch, and how often they were asked."""
    asked = []
    real = module.adamw.step
    monkeypatch.setattr(module.adamw, "step", lambda *given: (asked.append(1), real(*given)))
    if not kernel:
        monkeypatch.setattr(module, "use_triton", lambda tensor: False)
    g = torch.Generator().manual_seed(1)
    packed = [torch.nn.Parameter(torch.randn(3, *shape, generator=g).to(DEVICE)) for shape in [(4, 70), (50,)]]
    ours = PackedAdamW(packed, [], recipes, STEPS, **how)
    for parts in gradients(wild):
        for p, part in zip(packed, parts, strict=True):
            p.grad = part
        ours.step(torch.zeros(3, device=DEVICE))
    monkeypatch.undo()
    return ours, len(asked)


HOWS = {
    "plain": {},
    "ratios and gradients": {"ratios": [[1.0, 1.0, 1.0], [2.0, 1.0, 0.5]], "keep_gradients": True},
}


@runs_here
@pytest.mark.parametrize("wild", [None, 1])
@pytest.mark.parametrize("recipes", [ONE, UNLIKE], ids=["alike", "unlike"])
@pytest.mark.parametrize("how", ["plain", "ratios and gradients"])
def test_the_kernels_are_the_plain_update(how, recipes, wild, monkeypatch):
    ours, asked = trained(True, recipes, HOWS[how], wild, monkeypatch)
    plain, none = trained(False, recipes, HOWS[how], wild, monkeypatch)
    assert (asked, none) == (STEPS, 0)
    torch.testing.assert_close(ours.flat, plain.flat, rtol=2e-6, atol=2e-6)
    for mine, theirs in zip(ours._moments.tensors(), plain._moments.tensors(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-6, atol=1e-7)
    assert ours.alive.tolist() == plain.alive.tolist() == [run != wild for run in range(3)]
    assert int(ours._row) == ours.step_count == STEPS
    if "keep_gradients" in HOWS[how]:
        torch.testing.assert_close(ours._gradient, plain._gradient, rtol=1e-6, atol=1e-8)


@runs_here
@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_freezes_its_run_bit_for_bit(loss, monkeypatch):
    p = torch.nn.Parameter(torch.ones(3, 5, device=DEVICE))
    ours = PackedAdamW([p], [], ONE, 3)
    p.grad = torch.ones_like(p)
    ours.step(torch.tensor([0.0, loss, 0.0], device=DEVICE))
    assert ours.alive.tolist() == [True, False, True]
    assert torch.equal(p[1], torch.ones(5, device=DEVICE))
    assert (p[0] < 1).all()
    assert torch.equal(p[0], p[2])


def nearest(scaled: Tensor, values: Tensor) -> Tensor:
    return (scaled.double()[..., None] - values.double()).abs().argmin(dim=-1)


@runs_here
@pytest.mark.parametrize("recipes", [ONE, UNLIKE], ids=["alike", "unlike"])
def test_moments_in_8_bits_are_updated_in_fp32_and_coded_by_the_nearest_value(recipes, monkeypatch):
    """A step from moments that are known, in float64; then a run of steps beside plain PyTorch's."""
    how = {"storage": Storage(eight_bits=True)}
    ours, asked = trained(True, recipes, how, None, monkeypatch)
    assert asked == STEPS
    codes, scales = ours._moments.tensors()[:2], ours._moments.tensors()[2:]
    before = [m.double().clone() for m in ours._moments.read(slice(0, ours.flat.shape[1]))]
    grad = torch.randn(ours.flat.shape, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    norms = torch.ones(3, device=DEVICE)
    ours._row.fill_(3)
    module.adamw.step(grad, norms, norms, ours.alive, ours.flat, ours._moments.tensors(), ours._fixed)
    shrink = torch.tensor([min((r.clip_norm or math.inf) / (1 + 1e-6), 1.0) for r in recipes], device=DEVICE)[:, None]
    betas = torch.tensor([(r.beta1, r.beta2) for r in recipes], device=DEVICE, dtype=torch.float64)
    g = grad.double() * shrink
    wanted = [
        b * beta + part * (1 - beta) for b, beta, part in zip(before, betas.T[..., None], (g, g * g), strict=True)
    ]
    for i, moment in enumerate(wanted):
        blocks = moment.reshape(-1, 256)
        most = blocks.abs().amax(dim=1)
        torch.testing.assert_close(scales[i].flatten().double(), most, rtol=1e-6, atol=0.0)
        chosen = nearest(blocks / most[:, None], dynamic_map(i == 0, DEVICE)).reshape(codes[i].shape)
        assert (codes[i] != chosen).float().mean() < 1e-2  # on a boundary, to rounding
        assert (codes[i].int() - chosen).abs().max() <= 1


@runs_here
def test_8_bits_stay_beside_plain_pytorch(monkeypatch):
    how = {"storage": Storage(eight_bits=True), "keep_gradients": True}
    ours, _ = trained(True, UNLIKE, how, 1, monkeypatch)
    plain, _ = trained(False, UNLIKE, how, 1, monkeypatch)
    exact, _ = trained(False, UNLIKE, {}, 1, monkeypatch)
    gap = (ours.flat - plain.flat).abs().max()
    moved = (exact.flat[:, :330] - plain.flat[:, :330]).abs().max()
    assert gap < (0.2 if DEVICE.type == "cuda" else 1.0) * moved  # a CPU codes on a grid of its own
    assert ours.alive.tolist() == [True, False, True]


@runs_here
def test_a_block_of_zeros_stays_one():
    p = torch.nn.Parameter(torch.zeros(1, 600, device=DEVICE))
    ours = PackedAdamW([p], [], ONE[:1], 3, storage=Storage(eight_bits=True))
    p.grad = torch.zeros_like(p)
    p.grad[0, 0] = 1.0
    ours.step(torch.zeros(1, device=DEVICE))
    codes, scales = ours._moments.tensors()[:2], ours._moments.tensors()[2:]
    assert all((c[0, 256:] == 0).all() for c in codes)
    assert all((s[0, 1:] == 0).all() for s in scales)
    assert torch.isfinite(ours.flat).all()
    assert (p[0, 1:] == 0).all()
    assert p[0, 0] < 0


@pytest.mark.parametrize("signed", [True, False])
def test_boundaries_lie_between_the_map_s_values(signed):
    values, bounds = dynamic_map(signed), boundaries(signed, torch.device("cpu"))
    assert bounds.shape == (255,)
    assert ((bounds >= values[:-1]) & (bounds <= values[1:])).all()
    assert (bounds[1:] >= bounds[:-1]).all()


@pytest.mark.skipif(interpreted(), reason="runs the tests above in the interpreter")
@pytest.mark.skipif(not triton_interprets_loops(), reason="needs Triton 3.7, or Triton and NumPy before 2.4")
def test_the_kernels_in_tritons_interpreter():
    pass_in_interpreter(__file__)
