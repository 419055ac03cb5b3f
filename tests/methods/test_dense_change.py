"""Products with a change of the weight that is built twice instead of being kept."""

from __future__ import annotations

import pytest
import torch

from peftbench.methods.dense_change import add_product


def outer(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a [R, O, 1], b [R, 1, I] → [R, O, I], not linear in either."""
    return torch.sin(a @ b) * a


def arguments(**options: bool) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (2, 5, 3), "y": (2, 5, 4), "a": (2, 4, 1), "b": (2, 1, 3)}
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_(options.get(name, True))
        for name, shape in shapes.items()
    ]


def test_value_and_gradients_are_those_of_the_plain_product():
    x, y, a, b = arguments()
    torch.testing.assert_close(add_product(outer, x, y, a, b), y + x @ outer(a, b).transpose(1, 2))
    assert torch.autograd.gradcheck(lambda *args: add_product(outer, *args), (x, y, a, b))


def test_only_what_needs_a_gradient_gets_one():
    x, y, a, b = arguments(x=False, a=False)
    add_product(outer, x, y, a, b).square().sum().backward()
    assert x.grad is None
    assert a.grad is None
    assert y.grad is not None
    assert b.grad is not None
    frozen = arguments(x=False, y=False, a=False, b=False)
    assert not add_product(outer, *frozen).requires_grad


def test_no_whole_matrix_is_kept_for_the_backward_pass():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        x, y, a, b = arguments()
        add_product(outer, x, y, a, b)
    assert kept == [x.shape, a.shape, b.shape]


@pytest.mark.parametrize("cast", [False, True])
def test_compiled_is_one_graph_that_keeps_no_matrix_either(cast):
    torch._dynamo.reset()
    compiled = torch.compile(add_product, backend="aot_eager", fullgraph=True)
    results, kept = [], []
    for work in (add_product, compiled):
        x, y, a, b = leaves = [t.detach().float().requires_grad_(True) for t in arguments()]
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t)
        with hooks, torch.autocast("cpu", torch.bfloat16, enabled=cast):
            out = work(outer, x, y.bfloat16() if cast else y, a, b)
        results.append((out, *torch.autograd.grad(out.float().square().sum(), leaves)))
    assert all(shape.numel() != outer(a, b).numel() for shape in kept)
    for ours, theirs in zip(*results, strict=True):
        # The product of the two directions is rounded to halves at different places
        torch.testing.assert_close(ours, theirs, rtol=2e-2 if cast else 1e-6, atol=2e-2 if cast else 1e-6)


def test_a_narrow_input_is_multiplied_in_its_own_type():
    x, y, a, b = (t.detach().float() for t in arguments())
    a.requires_grad_(True)
    out = add_product(outer, x.bfloat16(), y.bfloat16(), a, b)
    out.float().square().sum().backward()
    assert out.dtype == torch.bfloat16
    assert a.grad.dtype == torch.float32


def test_autocast_mixes_types():
    x, y, a, b = (t.detach().float().requires_grad_(True) for t in arguments())
    with torch.autocast("cpu", torch.bfloat16):
        out = add_product(outer, x, y.bfloat16(), a, b)
    out.float().square().sum().backward()
    assert (out.dtype, x.grad.dtype, a.grad.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    narrow = a.grad.clone()
    a.grad = None
    add_product(outer, x, y, a, b).square().sum().backward()
    torch.testing.assert_close(narrow, a.grad, rtol=0.05, atol=0.05)
