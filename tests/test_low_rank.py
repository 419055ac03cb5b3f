"""Frozen maps with low-rank products beside them, and the passes over memory they use: against float64, both ways."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftbench
from peftbench.kernels import column_dot, low_rank, weight_rows
from peftbench.kernels.backend import interpreted
from peftbench.kernels.low_rank import DENSE, TRANSPOSED, Frozen, low_rank_linear
from peftbench.models.quantized import QuantizedLinear, Scheme
from tests.conformance.conftest import disturb, fresh
from tests.conftest import triton_interprets_loops

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")),
]
devices = pytest.mark.parametrize("device", DEVICES)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""‖found − exact‖ / ‖exact‖: half precision rounds inputs, inner products and outputs once each."""
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))


def error(found: Tensor, want: Tensor) -> float:
    return float((found.double() - want.double()).norm() / want.double().norm().clamp(min=1e-6))


def problem(runs: int, maps: int, dtype: torch.dtype, device: str, *, gain: bool, inner: bool, bias: bool) -> Any:
    """Return x, maps, factors a and b, inner factors and gains, each leaf taking a gradient."""
    g = torch.Generator().manual_seed(runs + 10 * maps)

    def draw(*shape: int, leaf: bool = True, wide: bool = True) -> Tensor:
        kind = dtype if not wide or dtype == torch.float64 else torch.float32
        return torch.randn(*shape, generator=g).to(device, kind).requires_grad_(leaf)

    width, outs = 12, [8, 5, 9][:maps]
    x = draw(runs, 7, width, wide=False)
    frozen = []
    for i, out in enumerate(outs):
        weight, kind = (draw(width, out, leaf=False, wide=False), TRANSPOSED) if i == 1 else (None, DENSE)
        weight = draw(out, width, leaf=False, wide=False) if weight is None else weight
        offset = draw(out, leaf=False, wide=False) if bias else None
        frozen.append(Frozen((weight,), kind, offset, keep=i != 2))
    a = [draw(runs, width, 2 + i) for i in range(maps)]
    b = [draw(runs, 2 + i, out) for i, out in enumerate(outs)]
    d = [draw(runs, 2 + i) for i in range(maps)] if inner else []
    gains = [draw(runs, out) for out in outs] if gain else []
    return x, frozen, a, b, d, gains


def exact(x: Tensor, frozen: list[Frozen], a: Any, b: Any, scale: Tensor, d: Any, gains: Any) -> Any:
    """Return the formula's outputs and leaves in float64."""
    wide = [[t.detach().double().requires_grad_() for t in group] for group in ([x], a, b, d, gains)]
    maps = [
        Frozen(tuple(p.double() for p in f.parts), f.kind, None if f.bias is None else f.bias.double()) for f in frozen
    ]
    outputs = low_rank.reference(wide[0][0], maps, wide[1], wide[2], scale.double(), wide[3], wide[4])
    return outputs, [t for group in wide for t in group]


CASES = [
    dict(zip(("runs", "maps", "gain", "inner", "bias"), case, strict=True))
    for case in product((1, 3), (1, 3), (False, True), (False, True), (False, True))
]


@devices
@dtypes
@pytest.mark.parametrize(
    "case", CASES, ids=lambda c: "-".join(k if v is True else f"{k}{v}" for k, v in c.items() if v)
)
def test_outputs_and_gradients_are_those_of_the_formula(case, dtype, device):
    sizes = case["runs"], case["maps"]
    x, frozen, a, b, d, gains = problem(
        *sizes, dtype, device, **{k: v for k, v in case.items() if k not in ("runs", "maps")}
    )
    even = case["runs"] == 1
    scale = torch.tensor([0.7] if even else [0.5, 2.0, 0.7], dtype=torch.float64).reshape(-1, 1, 1)
    scale = scale.to(device, torch.promote_types(dtype, torch.float32))
    found = low_rank_linear(x, frozen, a, b, scale, d, gains, 0.7 if even else None)
    want, leaves = exact(x, frozen, a, b, scale, d, gains)
    upstream = [torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(device) for y in want]
    mine = torch.autograd.grad(
        sum((y.double() * w).sum() for y, w in zip(found, upstream, strict=True)), [x, *a, *b, *d, *gains]
    )
    theirs = torch.autograd.grad(sum((y * w).sum() for y, w in zip(want, upstream, strict=True)), leaves)
    start = 0
    for size in (len(found), 1, len(a), len(b), len(d), len(gains)):  # outputs, then the gradients of each kind
        pairs = list(zip((*found, *mine), (*want, *theirs), strict=True))[start : start + size]
        assert all(f.shape == w.shape for f, w in pairs)
        if pairs:
            together = [torch.cat([t.flatten().double() for t in side]) for side in zip(*pairs, strict=True)]
            assert error(*together) < TOLERANCE[dtype]
        start += size
    assert start == len(found) + len(mine)


@pytest.mark.parametrize(("gain", "runs"), [(False, 1), (True, 1), (True, 2)])
def test_compiled_equals_eager(gain, runs):
    torch._dynamo.reset()
    x, frozen, a, b, d, gains = problem(runs, 3, torch.float32, "cpu", gain=gain, inner=False, bias=True)
    compiled = torch.compile(low_rank_linear, backend="aot_eager", fullgraph=True)
    scale = torch.full((runs, 1, 1), 0.7)
    results = []
    for work in (low_rank_linear, compiled):
        outputs = work(x, frozen, a, b, scale, d, gains, 0.7)
        results.append((*outputs, *torch.autograd.grad(sum(y.square().sum() for y in outputs), [x, *a, *b, *gains])))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_what_trains_decides_what_is_kept():
    """The input is saved once for all maps, and not at all where no first factor trains."""
    x, frozen, a, b, _, _ = problem(1, 3, torch.float32, "cpu", gain=False, inner=False, bias=False)
    for train_a, times in ((True, 1), (False, 0)):
        saved: list[Tensor] = []
        first = a if train_a else [t.detach() for t in a]

        def note(tensor: Tensor, into: list[Tensor] = saved) -> Tensor:
            into.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            low_rank_linear(x, frozen, first, b)
        assert sum(t.data_ptr() == x.data_ptr() for t in saved) == times
        assert not any(t.data_ptr() == f.parts[0].data_ptr() for t in saved for f in frozen)


@pytest.mark.parametrize("scheme", ["nf4", "fp4-single"])
def test_a_weight_in_4_bits(scheme):
    torch.manual_seed(0)
    module = QuantizedLinear.of(nn.Linear(64, 48), Scheme.parse(scheme))
    parts, kind = module.frozen_parts()
    x, a, b = torch.randn(1, 9, 64), torch.randn(1, 64, 4), torch.randn(1, 4, 48)
    (y,) = low_rank_linear(x, [Frozen(parts, kind, module.bias)], [a], [b])
    torch.testing.assert_close(y, module(x) + x @ a @ b, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("family", ["tiny-llama", "tiny-bert", "tiny-gpt2"])
def test_a_module_called_with_another_input_computes_with_that(family):
    """Maps that share an input in the model may be called apart: nothing of an earlier call gets in."""
    model = fresh(family)
    adapter = peftbench.attach(model, "lora", targets=("all",))
    disturb(adapter)
    modules = [site.module for site, _ in adapter.deltas][:3]
    width = modules[0].weight.shape[0 if family == "tiny-gpt2" else 1]
    x, other = torch.randn(2, 5, width), torch.randn(2, 5, width)
    first = modules[0](x)
    for module in modules[1:]:
        if module.weight.shape == modules[0].weight.shape:
            torch.testing.assert_close(module(other), module(other.clone()))
    torch.testing.assert_close(modules[0](x), first)


@devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 77, 130, 5), (1, 700, 257, 16)], ids=str)
@pytest.mark.parametrize("shifted", [False, True])
def test_column_sums(shape, dtype, device, shifted):
    runs, rows, width, rank = shape
    g = torch.Generator().manual_seed(rows)
    x, y = (torch.randn(runs, rows, width, generator=g).to(device, dtype) for _ in range(2))
    u = torch.randn(runs, rows, 2 * rank, generator=g).to(device, dtype)[..., rank:]
    offset = torch.randn(width, generator=g).to(device) if shifted else None
    want = (x.double() * (y.double() - (0 if offset is None else offset.double()))).sum(dim=1)
    divisor = torch.randn(runs, width, generator=g).to(device)
    inner, total = column_dot.product_and_dot(u, x, y, offset)
    divided = column_dot.product_and_dot(u, x, y, offset, divisor)[1]
    for found in (column_dot.column_dot(x, y, offset), total, divided * divisor):
        assert found.dtype == torch.float32
        assert error(found, want) < 1e-5
    factor = torch.randn(runs, rank, width, generator=g).to(device, dtype)
    whole = column_dot.product_and_dot(u, x, y, offset, divisor, factor, 0.5)[1] * divisor
    more = want + 0.5 * (x.double() * (u.double() @ factor.double())).sum(dim=1)
    assert error(whole, more) < (TOLERANCE[dtype] if device == "cpu" and not interpreted() else 1e-5)
    held = column_dot.product_and_dot(u, x, y, offset, torch.zeros_like(divisor))[1]
    assert not held.isnan().any(), "a divisor of 0 stands for the smallest number"
    assert inner.dtype == dtype
    assert error(inner, u.double().mT @ x.double()) < TOLERANCE[dtype]


@devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (33, 130, 5, 2), (64, 257, 16, 1), (17, 40, 24, 3)], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_rows_of_a_weight(shape, dtype, device, transposed):
    d_out, d_in, rank, runs = shape
    g = torch.Generator().manual_seed(d_in)
    weight = torch.randn(d_out, d_in, generator=g).to(device, dtype)
    weight = weight.t().contiguous().t() if transposed else weight
    a, b = (torch.randn(*s, generator=g).to(device) for s in ((runs, d_in, rank), (runs, rank, d_out)))
    scale = torch.arange(1, runs + 1, device=device) / 2
    d = (a.double() @ b.double()).mT * scale.double().reshape(-1, 1, 1)
    share = 1e-5 if dtype == torch.float32 else 1e-2
    change = (d * (2 * weight.double() + d)).sum(dim=2)
    assert error(weight_rows.norm_change_reference(weight, a, b * scale.reshape(-1, 1, 1)), change) < share
    norm = weight.float().norm(dim=1)
    square = norm.square()
    want = (weight.double() + d).norm(dim=2)
    assert error(weight_rows.norms(weight, a, b, scale, square, 1e-7), want) < share
    zero = torch.zeros_like(b)
    assert weight_rows.norms(weight, a, zero, scale, square, 1e-7).equal(norm.expand(runs, -1)), "without a change"
    assert weight_rows.norms(weight, a, zero, scale, square, 4.0).equal(2 * norm.expand(runs, -1)), "the floor"
    gain = torch.rand(d_out, generator=g).to(device) + 0.5
    scaled = weight_rows.scaled_rows(weight, gain)
    # Triton's interpreter cuts bf16 where it should round
    rounded = (weight.double() * gain.double().unsqueeze(1)).to(dtype)
    exact_bits = not (interpreted() and dtype == torch.bfloat16)
    assert scaled.equal(rounded) if exact_bits and dtype != torch.float32 else error(scaled, rounded) < 1e-2


@pytest.mark.skipif(not triton_interprets_loops(), reason="needs Triton 3.7, or Triton and NumPy before 2.4")
@pytest.mark.skipif(interpreted(), reason="is the run that this test starts")
def test_the_kernels_in_tritons_interpreter():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "column_sums or rows_of"],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:]
