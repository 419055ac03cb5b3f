"""A frozen map with terms by piece, against the formula; and which methods of a pack come to it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import peftbench
from peftbench.kernels.low_rank import DENSE, TRANSPOSED, Frozen
from peftbench.kernels.piecewise import Piece, Terms, affine_rows, piecewise_linear, reference
from peftbench.methods import sites
from peftbench.methods.adapter import named_method
from peftbench.methods.base import LinearDelta
from peftbench.methods.mixed import MixedLinear, joined
from tests.conformance.conftest import fresh

RUNS, ROWS, INPUTS, OUTPUTS = 7, 5, 6, 4
WIDE = torch.float64


def terms(*names: str, runs: int = 1, rank: int = 3) -> Terms:
    shapes = {"a": (INPUTS, rank), "b": (rank, OUTPUTS), "inner": (rank,), "change": (OUTPUTS,), "shift": (OUTPUTS,)}
    shapes |= {"stretch": (INPUTS,), "scale": (1, 1)}
    return Terms(**{name: torch.randn(runs, *shapes[name], dtype=WIDE) for name in names})


CASES: dict[str, list[Piece]] = {
    "nothing": [],
    "low rank": [(0, terms("a", "b", runs=2)), (4, terms("a", "b", rank=1))],
    "inner": [(1, terms("a", "b", "inner", runs=3)), (5, terms("a", "b", "scale", runs=2))],
    "gain": [(2, terms("change")), (6, terms("change"))],
    "bias": [(0, terms("shift", runs=7))],
    "input gain": [(1, terms("stretch", runs=2)), (4, terms("stretch", "change", "shift"))],
    "all": [(0, terms("a", "b", "inner", "scale", "change", "shift", runs=2)), (2, terms("change", "shift", runs=2)),
            (5, terms("a", "b", "change")), (6, terms("shift"))],
}  # fmt: skip


def found(frozen: Frozen, pieces: list[Piece], x: Tensor, make: Any) -> tuple[Tensor, list[Tensor | None]]:
    """Return the outputs, and the gradients of a weighted sum of them by x and all terms."""
    leaves = [x.clone().requires_grad_()]
    own: list[Piece] = []
    for first, one in pieces:
        given = {name: getattr(one, name).clone().requires_grad_(name != "scale") for name in one.given()}
        leaves += [t for t in given.values() if t.requires_grad]
        own.append((first, Terms(**given)))
    y = make(leaves[0], frozen, own)
    weights = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    return y.detach(), list(torch.autograd.grad((y * weights).sum(), leaves))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [DENSE, TRANSPOSED])
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_those_of_the_formula(case: str, kind: str, bias: bool) -> None:
    weight = torch.randn(*((OUTPUTS, INPUTS) if kind == DENSE else (INPUTS, OUTPUTS)), dtype=WIDE)
    frozen = Frozen((weight,), kind, torch.randn(OUTPUTS, dtype=WIDE) if bias else None)
    x = torch.randn(RUNS, ROWS, INPUTS, dtype=WIDE)
    y, gradients = found(frozen, CASES[case], x, piecewise_linear)
    expected, theirs = found(frozen, CASES[case], x, reference)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(gradients, theirs)
    with torch.no_grad():
        torch.testing.assert_close(piecewise_linear(x, frozen, CASES[case]), expected)


def test_what_does_not_train_gets_no_gradient_and_keeps_its_dtype() -> None:
    frozen = Frozen((torch.randn(OUTPUTS, INPUTS),), DENSE, None)
    x = torch.randn(RUNS, ROWS, INPUTS)
    a, b = torch.randn(2, INPUTS, 3), torch.randn(2, 3, OUTPUTS, dtype=WIDE, requires_grad=True)
    y = piecewise_linear(x, frozen, [(1, Terms(a=a, b=b))])
    y.sum().backward()
    assert b.grad is not None
    assert b.grad.dtype == WIDE
    u = x[1:3] @ a
    torch.testing.assert_close(b.grad.float(), u.sum(1).unsqueeze(2).expand(-1, -1, OUTPUTS))


def test_neighbours_with_terms_of_one_kind_are_one_piece() -> None:
    low = [terms("a", "b"), terms("a", "b", "scale", runs=2), terms("a", "b"), terms("a", "b", rank=4)]
    given = [(1, low[0]), (2, low[1]), (2, None), (1, low[2]), (1, low[3]), (1, terms("a", "b", "inner"))]
    assert [(first, one.runs) for first, one in joined(given)] == [(0, 3), (5, 1), (6, 1), (7, 1)]
    affine = [(1, terms("change")), (2, terms("shift", runs=2)), (1, terms("change", "shift")), (1, low[0])]
    pieces = joined(affine)
    assert [(first, one.runs, one.given()) for first, one in pieces] == [
        (0, 4, ("change", "shift")),
        (4, 1, ("a", "b")),
    ]
    for count, runs in ((4, [(0, low[0]), (1, low[1])]), (5, [(0, affine[0][1]), (1, affine[1][1])])):
        frozen = Frozen((torch.randn(OUTPUTS, INPUTS, dtype=WIDE),), DENSE, None)
        x = torch.randn(count, ROWS, INPUTS, dtype=WIDE)
        one = piecewise_linear(x, frozen, joined([(t.runs, t) for _, t in runs]))
        torch.testing.assert_close(one, reference(x, frozen, runs))


def test_rows_are_changed_in_place_and_others_keep_their_gradient() -> None:
    pieces: list[Piece] = [(0, terms("change")), (2, terms("change", "shift", runs=2)), (6, terms("shift"))]
    frozen = Frozen((torch.eye(OUTPUTS, dtype=WIDE),), DENSE, None)
    x = torch.randn(RUNS, ROWS, OUTPUTS, dtype=WIDE)
    for kept in (pieces, pieces[2:]):
        y, gradients = found(frozen, kept, x, lambda x, _, own: affine_rows(2 * x, own) + 0 * x)
        expected, theirs = found(frozen, kept, 2 * x, reference)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(gradients, [2 * theirs[0], *theirs[1:]])  # type: ignore[operator]


def test_a_gradient_that_others_hold_is_not_written_to() -> None:
    """A sum hands one gradient to all it adds."""
    x = torch.randn(RUNS, ROWS, OUTPUTS, dtype=WIDE, requires_grad=True)
    other = torch.randn(RUNS, ROWS, OUTPUTS, dtype=WIDE, requires_grad=True)
    (affine_rows(2 * x, [(0, terms("change"))]) + other).sum().backward()
    assert other.grad is not None
    torch.testing.assert_close(other.grad, torch.ones_like(other))


NAMED = ["lora", "rslora", "lora_fa", "dora", "pissa", "adalora", "vera", "ia3", "ssf", "bitfit"]


@pytest.mark.parametrize("family", ["tiny-bert", "tiny-llama"])
def test_nothing_is_taken_apart_for_methods_that_name_their_terms(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their outputs are those that each gives alone, once their parameters have moved."""
    calls: list[int] = []

    def counting(x: Tensor, frozen: Frozen, pieces: list[Piece]) -> Tensor:
        calls.append(len(pieces))
        return piecewise_linear(x, frozen, pieces)

    def whole(self: MixedLinear, dtype: torch.dtype) -> tuple[list[Piece], MixedLinear | None]:
        pieces, rest = named(self, dtype)
        assert rest is None
        return pieces, rest

    named = MixedLinear.named
    monkeypatch.setattr(MixedLinear, "named", whole)
    monkeypatch.setattr(sites, "piecewise_linear", counting)
    methods = [named_method(name, {}) for name in NAMED if family == "tiny-bert" or name != "bitfit"]
    model = fresh(family)
    adapter = peftbench.attach(model, methods, seeds=range(len(methods)))
    with torch.no_grad():
        for i, p in enumerate(adapter.parameters()):
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    linear = {s.name for s, d in adapter.deltas if isinstance(d, LinearDelta) and isinstance(s.module, torch.nn.Linear)}
    ids = torch.arange(24).reshape(2, 12) % 50
    with torch.no_grad():
        expected = []
        for run in range(len(methods)):
            adapter.merge(run)
            expected.append(model(ids).last_hidden_state)
            adapter.unmerge()
        packed = model(ids.repeat(len(methods), 1)).last_hidden_state
    assert len(calls) == len(linear)
    assert max(calls) < len(methods)
    torch.testing.assert_close(packed, torch.cat(expected), rtol=1e-3, atol=1e-4)
