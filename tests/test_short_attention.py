"""The kernel for attention on short sequences: against plain PyTorch in float64, on a GPU and in the interpreter."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from peftbench.kernels.attention import fits, reference, short_attention
from peftbench.kernels.backend import interpreted, traced_for
from peftbench.kernels.noise import Noise
from peftbench.models.attention import prefixable_attention
from tests.conftest import pass_in_interpreter, triton_interprets_loops

DEVICE = "cuda" if torch.cuda.is_available() and not interpreted() else "cpu"
runs_here = pytest.mark.skipif(DEVICE == "cpu" and not interpreted(), reason="needs a GPU, or Triton's interpreter")
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
DTYPES = [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float32, torch.float16]
# rows, heads, queries, keys, width of a head, whether keys are padded
SHAPES = [(2, 3, 5, 5, 16, True), (3, 2, 40, 40, 32, True), (1, 1, 16, 16, 64, False), (2, 1, 33, 70, 16, True)]


def problem(n: int, heads: int, queries: int, keys: int, width: int, padded: bool, dtype: torch.dtype):
    """Return query, key, value, the bias of padding (at least one key is seen) and an upstream gradient."""
    g = torch.Generator().manual_seed(queries + keys)

    def drawn(length: int) -> Tensor:
        return torch.randn(n, length, heads, width, generator=g).to(DEVICE, dtype).transpose(1, 2).requires_grad_()

    query, key, value = drawn(queries), drawn(keys), drawn(keys)
    bias = None
    if padded:
        lengths = torch.randint(1, keys + 1, (n, 1), generator=g)
        past = torch.arange(keys) >= lengths
        bias = torch.zeros(n, keys).masked_fill_(past, torch.finfo(dtype).min)[:, None, None].to(DEVICE, dtype)
    return query, key, value, bias, drawn(queries).detach()


def exact(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, upstream: Tensor, kept: Tensor | None = None):
    """Return the outputs and the gradients by query, key and value, in float64."""
    inputs = [t.detach().double().requires_grad_() for t in (query, key, value)]
    added = None if bias is None else bias.double()
    out = reference(*inputs, added, query.shape[3] ** -0.5, kept)
    return [out, *torch.autograd.grad(out, inputs, upstream.double())]


@runs_here
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_outputs_and_gradients(shape, dtype):
    query, key, value, bias, upstream = problem(*shape, dtype)
    assert fits(query, key, value, bias, 0.0)
    out = short_attention(query, key, value, bias, query.shape[3] ** -0.5, 0.0)
    found = [out, *torch.autograd.grad(out, (query, key, value), upstream)]
    wanted = exact(query, key, value, bias, upstream)
    for name, ours, theirs in zip(("out", "query", "key", "value"), found, wanted, strict=True):
        worst = (ours.double() - theirs).abs().max() / theirs.abs().max()
        assert worst < TOLERANCE[dtype], f"{name}: {worst:.1e} of the largest entry"
        assert ours.shape == theirs.shape


@runs_here
@pytest.mark.parametrize("dtype", list(dict.fromkeys([*DTYPES, torch.float32])), ids=str)
def test_dropout_drops_its_share_and_the_gradients_know_what(dtype):
    p, n = 0.25, 24
    query, key, _, _, upstream = problem(n, 2, 16, 16, 16, False, dtype)
    one = torch.eye(16, dtype=dtype, device=DEVICE).expand(n, 2, 16, 16).clone().requires_grad_()
    assert fits(query, key, one, None, p)
    torch.manual_seed(3)
    out = short_attention(query, key, one, None, 0.25, p)  # the dropped softmax itself
    found = [out, *torch.autograd.grad(out, (query, key, one), upstream)]
    shares = reference(query.double(), key.double(), one.double(), None, 0.25)
    kept = (out.double() / shares > 0.5).double() / (1 - p)
    dropped = (kept == 0).float().mean().item()
    deviation = (p * (1 - p) / kept.numel()) ** 0.5
    assert abs(dropped - p) < 5 * deviation
    for ours, theirs in zip(found, exact(query, key, one, None, upstream, kept), strict=True):
        assert (ours.double() - theirs).abs().max() / theirs.abs().max() < 2 * TOLERANCE[dtype]
    again = short_attention(query, key, one, None, 0.25, p)
    assert not torch.equal(out, again)  # another seed
    heads = kept.reshape(n * 2, -1)
    assert len({tuple(row.tolist()) for row in heads}) == len(heads)  # no two heads drop the same


@runs_here
def test_a_run_drops_what_it_drops_alone():
    dtype, p = DTYPES[0], 0.5
    query, key, value, bias, upstream = problem(6, 2, 20, 20, 16, True, dtype)
    noise = Noise([3, 5, 8], torch.device(DEVICE))

    def passed(rows: slice, seeds: Tensor, site: int) -> list[Tensor]:
        given = [t.detach()[rows].requires_grad_() for t in (query, key, value)]
        out = short_attention(*given, bias[rows], 0.25, p, seeds, site)
        return [out, *torch.autograd.grad(out, given, upstream[rows])]

    together = passed(slice(None), noise.seeds, 11)
    for run in range(3):
        rows = slice(2 * run, 2 * run + 2)
        alone = passed(rows, noise.seeds[run : run + 1], 11)
        assert all(torch.equal(a, b[rows]) for a, b in zip(alone, together, strict=True))
        assert not torch.equal(alone[0], passed(rows, noise.seeds[run : run + 1], 12)[0])


@runs_here
def test_a_model_s_attention_takes_it_and_its_products_are_counted():
    query, key, value, bias, _ = problem(2, 2, 12, 12, 16, True, DTYPES[0])
    module = SimpleNamespace(is_causal=False, training=False)
    with FlopCounterMode(display=False) as counter:
        out, _ = prefixable_attention(module, query, key, value, bias, dropout=0.0, scaling=0.25)
        out.sum().backward()
    theirs = exact(query, key, value, bias, torch.ones_like(query))[0].transpose(1, 2)
    assert (out.double() - theirs).abs().max() < TOLERANCE[DTYPES[0]]
    assert out.is_contiguous()
    products = 2 * 2 * 2 * 12 * 12 * 16
    assert counter.get_total_flops() == 2 * products + 5 * products  # scores once more in the backward pass


def test_what_it_does_not_take():
    query, key, value, bias, _ = problem(2, 2, 12, 12, 16, True, torch.float32)
    changed = {
        "a bias by query": (query, key, value, bias.expand(2, 1, 12, 12), 0.0),
        "fewer key heads": (query, key[:, :1], value[:, :1], bias, 0.0),
        "another type": (query, key.double(), value, bias, 0.0),
        "a mask of truth values": (query, key, value, bias == 0, 0.0),
        "float64": (query.double(), key.double(), value.double(), bias.double(), 0.0),
    }
    assert not [name for name, given in changed.items() if fits(*given)]
    assert fits(query, key, value, bias, 0.0) == interpreted()
    on_gpu = [t.to("meta") for t in (query, key, value)]
    with traced_for("cuda"):
        assert fits(*on_gpu, None, 0.1)  # fp32 with dropout, in narrow heads
        assert fits(*on_gpu, None, 0.0) == interpreted()
        wide = [t.new_empty(2, 2, 12, 64) for t in on_gpu]
        assert fits(*wide, None, 0.1) == interpreted()


def test_shapes_alone_go_its_way_where_they_stand_for_a_gpu():
    query, key, value, _, _ = (
        t if t is None else t.to("meta") for t in problem(2, 2, 12, 12, 16, False, torch.float16)
    )
    given = [t.detach().requires_grad_() for t in (query, key, value)]
    with traced_for("cpu"):
        assert not fits(*given, None, 0.1)
    with traced_for("cuda"):
        assert fits(*given, None, 0.1)
        kept = []
        with saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
            out = short_attention(*given, None, 0.25, 0.1)
        gradients = torch.autograd.grad(out, given, torch.empty_like(out))
    assert [g.shape for g in gradients] == [t.shape for t in given]
    assert [tuple(t.shape) for t in kept] == [*(tuple(t.shape) for t in given), (1,), (2, 2, 12)]  # not the outputs


@pytest.mark.skipif(interpreted(), reason="runs the tests above in the interpreter")
@pytest.mark.skipif(not triton_interprets_loops(), reason="needs Triton 3.7, or Triton and NumPy before 2.4")
def test_the_kernel_in_tritons_interpreter():
    pass_in_interpreter(__file__)
