"""Attention of any length with dropout by run: against its formula with the mask given, and its kernels against it."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from peftbench.kernels import long_attention as module
from peftbench.kernels.backend import interpreted, traced_for
from peftbench.kernels.dropout import hashed, kept, placed
from peftbench.kernels.long_attention import long_attention
from peftbench.kernels.noise import Noise
from peftbench.profiling.shapes import shapes_alone
from tests.conftest import pass_in_interpreter, triton_interprets_loops

F = nn.functional
KINDS = ["plain", "causal", "truth values", "a row sees nothing", "bias", "bias by query", "grouped heads"]
RUNS = 2
DEVICE = "cuda" if torch.cuda.is_available() and not interpreted() else "cpu"
runs_here = pytest.mark.skipif(DEVICE == "cpu" and not interpreted(), reason="needs a GPU, or Triton's interpreter")
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def problem(kind: str, rows: int, heads: int, queries: int, keys: int, width: int, dtype: torch.dtype, device="cpu"):
    """Return query, key and value, the mask and an upstream gradient."""
    g = torch.Generator().manual_seed(queries + keys)

    def drawn(length: int, count: int) -> Tensor:
        made = torch.randn(rows, length, count, width, generator=g).to(device, dtype)
        return made.transpose(1, 2).requires_grad_()

    shared = heads // 2 if kind == "grouped heads" else heads
    query, key, value = drawn(queries, heads), drawn(keys, shared), drawn(keys, shared)
    mask = None
    if kind in ("truth values", "a row sees nothing"):
        mask = torch.rand(rows, 1, queries, keys, generator=g) < 0.6
        mask[..., 0] = True
        if kind == "a row sees nothing":
            mask[0, :, 1] = False
    elif kind == "bias":
        lengths = torch.randint(1, keys + 1, (rows, 1), generator=g)
        mask = torch.zeros(rows, keys, dtype=dtype)
        mask = mask.masked_fill_(torch.arange(keys) >= lengths, torch.finfo(dtype).min)[:, None, None]
    elif kind == "bias by query":
        mask = torch.randn(1, heads, queries, keys, generator=g).to(dtype)
    return query, key, value, None if mask is None else mask.to(device), drawn(queries, heads).detach()


def formula(query, key, value, mask, upstream, causal: bool, scale: float, factors: Tensor) -> list[Tensor]:
    """Return outputs and gradients in float64, by autograd through all scores; `factors` [N, H, T, T'] drop."""
    given = [t.detach().double().requires_grad_() for t in (query, key, value)]
    q, k, v = given
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    scores = q @ k.transpose(2, 3) * scale
    if causal:
        mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -1e6) + torch.where(mask.any(dim=-1, keepdim=True), 0.0, math.nan)
    elif mask is not None:
        scores = scores + mask.double()
    shares = torch.softmax(scores, dim=-1)
    out = torch.where(shares.isnan(), 0.0, shares) * factors @ v
    return [out, *torch.autograd.grad(out, given, upstream.double())]


def close(found: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    for name, ours, theirs in zip(("out", "query", "key", "value"), found, wanted, strict=True):
        assert ours.shape == theirs.shape, name
        worst = (ours.double() - theirs).abs().max() / theirs.abs().max()
        assert worst < tolerance, f"{name}: {worst:.1e} of the largest entry"


def passed(query, key, value, mask, upstream, seeds, p, causal) -> list[Tensor]:
    given = [t.detach().requires_grad_() for t in (query, key, value)]
    out = long_attention(*given, mask, seeds, 11, 0.3, p, causal)
    return [out, *torch.autograd.grad(out, given, upstream)]


def factors(seeds: Tensor, p: float, n: int, heads: int, queries: int, keys: int) -> Tensor:
    mask = kept(seeds, 11, n // RUNS * heads * queries * keys, [p] * RUNS)
    return mask.view(n, heads, queries, keys).double() / (1 - p)


# rows, heads and queries of a chunk are 4, 4, 6; then parts of each
@pytest.mark.parametrize("scores", [10**6, 2 * 4 * 6 * 9, 2 * 6 * 9, 4 * 9], ids=["whole", "rows", "heads", "queries"])
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_are_the_formula_with_the_mask_given(kind, scores, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * scores)
    seeds, p, sizes = Noise([3, 8], torch.device("cpu")).seeds, 0.3, (4, 4, 6, 9)
    *given, upstream = problem(kind, *sizes, 5, torch.float64)
    found = passed(*given, upstream, seeds, p, kind == "causal")
    close(found, formula(*given, upstream, kind == "causal", 0.3, factors(seeds, p, *sizes)), 1e-12)
    assert found[0].transpose(1, 2).is_contiguous()


def test_no_chunk_holds_more_scores_than_it_may(monkeypatch):
    for shape in ((4, 4, 6, 9), (1, 3, 50, 70), (7, 1, 3, 300)):
        for scores in (10, 100, 1000, 10**6):
            monkeypatch.setattr(module, "CHUNK_BYTES", 4 * scores)
            seen = torch.zeros(shape[:3])
            for chunk in module._chunks(*shape):
                seen[chunk] += 1
                assert seen[chunk].numel() * shape[3] <= max(scores, shape[3])
            assert bool((seen == 1).all())


def test_places_are_numbered_modulo_two_to_the_32():
    start, key = placed(torch.tensor([5, -7]), 3)
    whole = hashed(start, key, 100)
    assert torch.equal(hashed(start + 2**31 - 1, key, 60)[:, 41:], hashed(start - 2**31 + 40, key, 19))
    assert torch.equal(hashed(start + 60, key, 40), whole[:, 60:])
    many = module._Kept(torch.tensor([5]), 3, 0.5, (40, 2**9, 2**9, 2**10))  # more than 2³² places
    chunk = (slice(20, 21), slice(3, 4), slice(1, 2))
    first = ((20 * 2**9 + 3) * 2**9 + 1) * 2**10 % 2**32
    first -= 2**32 if first >= 2**31 else 0
    start, key = placed(torch.tensor([5]), 3)
    assert torch.equal(many.of(chunk).flatten(), hashed(start + first, key, 2**10)[0] >= 0)


def test_neither_scores_nor_what_is_kept_stay_for_the_backward_pass():
    *given, upstream = problem("causal", 4, 2, 20, 20, 4, torch.float64)
    held: list[Tensor] = []
    with saved_tensors_hooks(lambda t: (held.append(t), t)[1], lambda t: t):
        passed(*given, upstream, torch.tensor([1, 2]), 0.5, True)
    assert max(t.numel() for t in held) == given[0].numel() < 4 * 2 * 20 * 20


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.skipif(interpreted(), reason="the interpreter does not multiply bf16")
@pytest.mark.parametrize("width", [32, 160], ids=["kernels", "chunks"])
def test_a_predicted_step_on_a_gpu_goes_the_same_way(width, autocast):
    asked: list[str] = []

    class Noted(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            asked.append(str(func))
            return func(*args, **(kwargs or {}))

    with shapes_alone("cuda"), Noted():
        given = [torch.empty(4, 2, 150, width, requires_grad=True) for _ in range(3)]
        with Noise([1, 2], torch.device("cpu")).drawing(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = F.scaled_dot_product_attention(*given, dropout_p=0.1, is_causal=True)
            gradients = torch.autograd.grad(out, given, torch.empty_like(out))
    assert (out.shape, out.dtype) == (given[0].shape, torch.bfloat16 if autocast else torch.float32)
    assert [(g.shape, g.dtype) for g in gradients] == [(t.shape, t.dtype) for t in given]
    assert not any("scaled_dot_product" in name or "dropout" in name for name in asked)
    assert ("peftbench.long_attention.default" in asked) == (width == 32)
    assert ("peftbench.long_attention_backward.default" in asked) == (width == 32)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_drops_what_it_drops_alone(kind):
    noise, p = Noise([3, 8], torch.device(DEVICE)), 0.5
    query, key, value, mask, upstream = problem(kind, 4, 2, 20, 20, 16, torch.float32, DEVICE)
    together = passed(query, key, value, mask, upstream, noise.seeds, p, kind == "causal")
    for run in range(RUNS):
        rows = slice(2 * run, 2 * run + 2)
        own = mask if mask is None or len(mask) == 1 else mask[rows]
        given = (query[rows], key[rows], value[rows], own, upstream[rows])
        alone = passed(*given, noise.seeds[run : run + 1], p, kind == "causal")
        close([t[rows] for t in together], [t.double() for t in alone], 1e-5)
        other = passed(*given, noise.seeds[1 - run : 2 - run], p, kind == "causal")
        assert not torch.allclose(other[0], alone[0], atol=1e-3)


# The kernels.

# rows, heads, queries, keys, width of a head: one block and several, none of them full
SHAPES = [(4, 2, 20, 20, 16), (2, 2, 70, 67, 24), (2, 2, 1, 9, 5)]
if DEVICE == "cuda":
    SHAPES += [(4, 4, 300, 300, 64), (4, 4, 257, 257, 32), (2, 4, 150, 280, 40)]
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]


def _is_tried(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Return whether to try this; in the interpreter two shapes with all masks, and rounding once."""
    if shape[2] == 1 and kind in ("causal", "a row sees nothing"):
        return False  # one key in sight: gradients are zero; no second row
    if DEVICE == "cuda":
        return dtype != torch.float32 or shape[4] <= module.WIDEST_EXACT
    if dtype != torch.float32:
        return shape == SHAPES[0] and kind in ("causal", "bias")
    return shape[2] in (20, 70) or kind == "bias"


CASES = [
    (kind, shape, dtype) for shape in SHAPES for kind in KINDS for dtype in DTYPES if _is_tried(kind, shape, dtype)
]
CASES += [("causal", (2, 2, 17, 90, 64), torch.float16)]


@runs_here
@pytest.mark.parametrize(("kind", "shape", "dtype"), CASES, ids=str)
def test_the_kernels_compute_the_formula_with_the_hash_s_mask(kind, shape, dtype):
    seeds, p = Noise([3, 8], torch.device(DEVICE)).seeds, 0.3
    *given, upstream = problem(kind, *shape, dtype, DEVICE)
    assert module._fits(*given)
    found = passed(*given, upstream, seeds, p, kind == "causal")
    wanted = formula(*given, upstream, kind == "causal", 0.3, factors(seeds, p, *shape[:4]))
    close(found, wanted, TOLERANCE[dtype])
    assert found[0].transpose(1, 2).is_contiguous()


def test_what_the_kernels_do_not_take():
    query = torch.empty(2, 2, 12, 16, dtype=torch.float16, device="meta")
    wide = query.new_empty(2, 2, 12, 80)
    exact = query.new_empty(2, 2, 12, 40, dtype=torch.float32)
    with traced_for("cuda"):
        assert module._fits(query, query, query, None)
        assert not module._fits(wide, wide, wide, None)
        assert not module._fits(exact, exact, exact, None)
        assert not module._fits(query, query.float(), query, None)
        assert not module._fits(*[query.double()] * 3, None)
    with traced_for("cpu"):
        assert not module._fits(query, query, query, None)


@runs_here
def test_the_kernels_take_any_layout_and_great_masks():
    seeds, p, sizes = Noise([3, 8], torch.device(DEVICE)).seeds, 0.3, (4, 2, 20, 20)
    query, key, value, _, upstream = problem("plain", *sizes, 16, torch.float32, DEVICE)
    turned = [t.detach().transpose(2, 3).contiguous().transpose(2, 3) for t in (query, key, value)]
    mask = 300.0 * (torch.arange(20, device=DEVICE) % 2).expand(4, 1, 1, 20)  # two to the power of it is infinite
    wanted = formula(query, key, value, mask, upstream, False, 0.3, factors(seeds, p, *sizes))
    close(passed(*turned, mask, upstream.transpose(2, 3).contiguous().transpose(2, 3), seeds, p, False), wanted, 2e-4)


@runs_here
def test_a_step_asks_no_generator_and_goes_through_the_kernels():
    query, key, value, _, upstream = problem("causal", 4, 2, 20, 20, 16, torch.float16, DEVICE)
    noise = Noise([1, 2], torch.device(DEVICE))
    before = torch.get_rng_state(), *([torch.cuda.get_rng_state()] if DEVICE == "cuda" else [])
    with noise.drawing(), FlopCounterMode(display=False) as counter:
        out = F.scaled_dot_product_attention(query, key, value, dropout_p=0.3, is_causal=True)
        torch.autograd.grad(out, (query, key, value), upstream)
    after = torch.get_rng_state(), *([torch.cuda.get_rng_state()] if DEVICE == "cuda" else [])
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    product = 2 * 4 * 2 * 20 * 20 * 16
    assert counter.get_total_flops() == 2 * product + 5 * product  # scores once more in the backward pass


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("width", [64, 160], ids=["kernels", "chunks"])
def test_on_a_gpu_a_replayed_step_draws_each_run_s_own_in_bf16(width):
    given = problem("causal", 4, 4, 300, 300, width, torch.bfloat16, "cuda")
    query, key, value = (t.detach() for t in given[:3])
    noise = Noise([1, 2], torch.device("cuda"))

    def attended(rows: slice, noise: Noise) -> Tensor:
        with noise.drawing():
            given = (query[rows], key[rows], value[rows])
            return F.scaled_dot_product_attention(*given, dropout_p=0.3, is_causal=True)

    state, together = torch.cuda.get_rng_state(), attended(slice(None), noise)
    with noise.drawing():
        site = noise.site()
    plain, _, _ = module._chunked_forward(query, key, value, None, noise.seeds, site, width**-0.5, 0.3, True)
    close([together], [plain.transpose(1, 2).double()], TOLERANCE[torch.bfloat16])
    for run in range(RUNS):
        rows = slice(2 * run, 2 * run + 2)
        alone = attended(rows, Noise([run + 1], torch.device("cuda")))
        close([together[rows]], [alone.double()], TOLERANCE[torch.bfloat16])
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        attended(slice(None), noise)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        found = attended(slice(None), noise)
    graph.replay()
    assert torch.equal(found, together)
    noise.advance()
    graph.replay()
    assert not torch.equal(found, together)
    assert torch.equal(found, attended(slice(None), noise))
    assert torch.equal(torch.cuda.get_rng_state(), state)


@pytest.mark.skipif(interpreted(), reason="compiles nothing")
@pytest.mark.parametrize("width", [32, 64])
def test_the_kernels_compile_for_a_gpu_that_is_not_there(width):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from peftbench.kernels import long_attention_triton as kernels

    query = torch.empty(2, 2, 300, width, dtype=torch.bfloat16)
    mask = torch.ones(2, 1, 300, 300, dtype=torch.bool)
    _, _, options = module._launch(query, query, mask, False)
    how = {name: options.pop(name) for name in ("num_warps", "num_stages")}
    types = {"seed_ptr": "*i64", "mask_ptr": "*u8", "scale": "fp32", "p": "fp32"}
    types |= dict.fromkeys(("most_ptr", "total_ptr", "delta_ptr"), "*fp32")
    for name in ("long_attention_forward", "long_attention_by_query", "long_attention_by_key"):
        kernel = getattr(kernels, name)
        signature = {
            argument: "constexpr"
            if argument in options
            else types.get(argument, "*bf16" if "ptr" in argument else "i32")
            for argument in kernel.arg_names
        }
        source = ASTSource(fn=kernel, signature=signature, constexprs=options)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=how)
        assert compiled.metadata.shared < 100 * 2**10  # two programs and more on each of an H100's processors


@pytest.mark.skipif(interpreted(), reason="runs the tests above in the interpreter")
@pytest.mark.skipif(not triton_interprets_loops(), reason="needs Triton 3.7, or Triton and NumPy before 2.4")
def test_the_kernels_in_tritons_interpreter():
    pass_in_interpreter(__file__)
