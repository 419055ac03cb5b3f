"""Cross-entropy of a linear layer in chunks: against plain PyTorch in float64, forward and backward."""

import importlib
import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from peftbench.kernels import cross_entropy as kernel
from peftbench.kernels.backend import interpreted, traced_for
from peftbench.kernels.cross_entropy import chunk_rows, linear_cross_entropy
from tests.conftest import triton_interprets_loops

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")),
]
devices = pytest.mark.parametrize("device", DEVICES)
# rows, width, vocabulary, rows at a time
SHAPES = [(1, 8, 5, None), (7, 16, 64, 3), (130, 16, 1001, 128), (6, 32, 1000, 4), (5, 24, 9001, 2), (8, 8, 1, 8)]
# of the largest entry of the exact result; halves: logits, gradients by them and products are each rounded once
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))


@pytest.fixture(autouse=True)
def _fresh_memory_is_nan(request):
    """On the CPU: what is read without having been written shows. (A GPU's products would need a setting of cuBLAS.)"""
    settings = getattr(request.node, "callspec", None)
    on_cpu = settings is None or settings.params.get("device", "cpu") == "cpu"
    torch.use_deterministic_algorithms(on_cpu)
    yield
    torch.use_deterministic_algorithms(False)


def problem(rows: int, width: int, vocabulary: int, dtype: torch.dtype, device: str, bias: bool = False):
    """Return hidden states, weight, labels (a third of them ignored) and, if asked for, a bias."""
    g = torch.Generator().manual_seed(rows + vocabulary)
    hidden = torch.randn(rows, width, generator=g)
    weight = torch.randn(vocabulary, width, generator=g) * 2 / width**0.5
    labels = torch.randint(0, vocabulary, (rows,), generator=g)
    labels[1::3] = -100
    offset = torch.randn(vocabulary, generator=g).to(device, dtype) if bias else None
    return hidden.to(device, dtype).requires_grad_(), weight.to(device, dtype), labels.to(device), offset


def exact(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, upstream: Tensor):
    """Return losses and the gradients of `upstream` times them by hidden states and weight, all in float64."""
    x, w = (t.detach().double().requires_grad_() for t in (hidden, weight))
    logits = x @ w.t() if bias is None else x @ w.t() + bias.double()
    losses = cross_entropy(logits, labels, ignore_index=-100, reduction="none")
    return losses.detach(), *torch.autograd.grad(losses @ upstream.double(), (x, w))


def close(found: Tensor, want: Tensor, share: float) -> None:
    """Assert that no entry is off by more than a share of the largest."""
    assert found.shape == want.shape
    assert (found.double() - want).abs().max() <= share * max(want.abs().max().item(), 1e-2)


@devices
@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_kernel_row_losses_and_gradients_are_those_of_float64(shape, dtype, bias, device):
    hidden, weight, labels, offset = problem(*shape[:3], dtype, device, bias)
    upstream = torch.linspace(0.5, 2, shape[0], device=device)
    losses = linear_cross_entropy(hidden, weight, labels, offset, chunk=shape[3])
    assert losses.dtype == torch.float32
    (gradient,) = torch.autograd.grad(losses @ upstream, hidden)
    want, by_hidden, _ = exact(hidden, weight, labels, offset, upstream)
    close(losses, want, TOLERANCE[dtype])
    close(gradient, by_hidden, TOLERANCE[dtype])
    assert gradient.dtype == dtype
    ignored = labels == -100
    assert not losses[ignored].any()
    assert not gradient[ignored].any()
    with torch.no_grad():
        # compiled apart from the kernel that writes gradients
        close(linear_cross_entropy(hidden, weight, labels, offset, chunk=shape[3]), losses.double(), 1e-6)


@devices
@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_sum_and_weights_gradient_are_those_of_float64(shape, dtype, device, monkeypatch):
    monkeypatch.setattr(kernel, "CHUNK_BYTES", 2**12)  # cuts the weight's gradient in halves into blocks too
    hidden, weight, labels, _ = problem(*shape[:3], dtype, device)
    weight.requires_grad_()
    total = linear_cross_entropy(hidden, weight, labels, groups=1, chunk=shape[3])
    found = torch.autograd.grad(3 * total.sum(), (hidden, weight))
    want, *gradients = exact(hidden, weight, labels, None, torch.full((shape[0],), 3.0, device=device))
    close(total, want.sum()[None], TOLERANCE[dtype])
    for own, right, parameter in zip(found, gradients, (hidden, weight), strict=True):
        close(own, right, TOLERANCE[dtype])
        assert own.dtype == parameter.dtype


@devices
def test_kernel_groups_are_sums_of_their_rows_and_keep_their_own_factor(device):
    hidden, weight, labels, _ = problem(12, 8, 70, torch.float32, device)
    factors = torch.tensor([0.5, 0.0, 7.0], device=device)
    sums = linear_cross_entropy(hidden, weight, labels, groups=3, chunk=5)
    (gradient,) = torch.autograd.grad(sums @ factors, hidden)
    want, by_hidden, _ = exact(hidden, weight, labels, None, factors.repeat_interleave(4))
    close(sums, want.view(3, 4).sum(1), 2e-6)
    close(gradient, by_hidden, 2e-6)


@devices
def test_kernel_all_labels_ignored_give_zeros(device):
    hidden, weight, labels, _ = problem(5, 8, 70, torch.float32, device)
    hidden.data[2] = torch.nan  # what is ignored may hold anything
    losses = linear_cross_entropy(hidden, weight, labels.fill_(-100), chunk=2)
    losses.sum().backward()
    assert not losses.any()
    assert not hidden.grad.any()


@devices
def test_kernel_a_row_that_is_not_finite_spoils_no_other(device):
    hidden, weight, labels, _ = problem(6, 8, 9000, torch.float32, device)
    labels[:] = torch.arange(6)
    hidden.data[2] = torch.nan
    losses = linear_cross_entropy(hidden, weight, labels)
    losses.sum().backward()
    bad = torch.arange(6, device=device) == 2
    assert torch.equal(losses.isnan(), bad)
    assert torch.equal(hidden.grad.isnan().any(1), bad)


@devices
def test_kernel_logits_far_from_zero_neither_overflow_nor_lose_digits(device):
    hidden = torch.tensor([[300.0, 1.0], [-300.0, 1.0]], device=device, requires_grad=True)
    weight = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, -1.0], [-torch.inf, 0.0]], device=device)[:3]
    labels = torch.tensor([1, 2], device=device)
    losses = linear_cross_entropy(hidden, weight, labels)
    losses.sum().backward()
    want, by_hidden, _ = exact(hidden, weight, labels, None, torch.ones(2, device=device))
    torch.testing.assert_close(losses.double(), want, rtol=1e-6, atol=0)
    torch.testing.assert_close(hidden.grad.double(), by_hidden, rtol=1e-5, atol=1e-5)


@devices
def test_kernel_blocks_of_minus_infinity_count_for_nothing(device):
    hidden, weight, labels, _ = problem(2, 8, 9000, torch.float32, device)
    labels[:] = 8999
    bias = torch.zeros(9000, device=device)
    bias[:8990] = -torch.inf
    losses = linear_cross_entropy(hidden, weight, labels, bias)
    want, _, _ = exact(hidden, weight[8990:], labels - 8990, None, torch.ones(2, device=device))
    close(losses, want, 2e-6)


@devices
def test_kernel_a_label_outside_of_the_vocabulary_is_not_silent(device):
    hidden, weight, labels, _ = problem(3, 8, 70, torch.float32, device)
    labels[0] = 70
    if device == "cpu" and not interpreted():
        with pytest.raises(RuntimeError, match="out of bounds"):
            linear_cross_entropy(hidden, weight, labels)
    else:
        assert linear_cross_entropy(hidden, weight, labels)[0].isnan()


@pytest.mark.skipif(interpreted(), reason="runs the tests above in the interpreter")
@pytest.mark.skipif(not triton_interprets_loops(), reason="needs Triton 3.7, or Triton and NumPy before 2.4")
def test_the_kernel_in_tritons_interpreter():
    """In a process of its own: what Triton does is settled when it is first imported."""
    options = ["-p", "no:cacheprovider", "-k", "kernel and cpu", "--no-header"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, __file__],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


@pytest.mark.skipif(not interpreted(), reason="in Triton's interpreter alone")
def test_kernel_it_is_the_kernel_that_runs_on_the_cpu(monkeypatch):
    def forbidden(*_: object) -> None:
        raise AssertionError("the reference ran")

    monkeypatch.setattr(kernel, "reference_softmax_loss_", forbidden)
    hidden, weight, labels, _ = problem(3, 8, 70, torch.float32, "cpu")
    linear_cross_entropy(hidden, weight, labels)


@devices
def test_under_autocast_logits_have_its_dtype_and_gradients_their_owners(device):
    hidden, weight, labels, _ = problem(9, 16, 200, torch.float32, device)
    weight.requires_grad_()
    with torch.autocast(device, torch.bfloat16):
        total = linear_cross_entropy(hidden, weight, labels, groups=1, chunk=4)
    gradients = torch.autograd.grad(total.sum(), (hidden, weight))
    halves = (hidden.bfloat16().float().requires_grad_(), weight.bfloat16().float())
    want, *right = exact(*halves, labels, None, torch.ones(9, device=device))
    close(total, want.sum()[None], 1.5e-2)
    assert abs(total.item() - want.sum().item()) > 1e-6, "computed in fp32"
    for own, exactly in zip(gradients, right, strict=True):
        assert own.dtype == torch.float32
        close(own, exactly, 1.5e-2)


class Largest(TorchDispatchMode):
    """The most elements, and bytes, that any tensor made has."""

    elements = 0
    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        self.elements = max([self.elements, *(t.untyped_storage().nbytes() // t.element_size() for t in made)])
        self.bytes = max([self.bytes, *(t.untyped_storage().nbytes() for t in made)])
        return out


@pytest.mark.parametrize("shapes", [None, "cpu", "cuda"])
@dtypes
def test_no_tensor_holds_all_logits(dtype, shapes):
    with ExitStack() as stack:
        if shapes:
            stack.enter_context(traced_for(shapes))
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        hidden = torch.zeros(64, 4, dtype=dtype, requires_grad=True)
        weight = torch.zeros(1024, 4, dtype=dtype, requires_grad=True)
        labels = torch.zeros(64, dtype=torch.long)
        with Largest() as largest:
            linear_cross_entropy(hidden, weight, labels, groups=1, chunk=8).sum().backward()
    assert largest.elements == 8 * 1024
    # only plain PyTorch copies a chunk to compute in fp32
    assert largest.bytes == 8 * 1024 * (dtype.itemsize if shapes == "cuda" else 4)
    assert hidden.grad.shape == hidden.shape
    assert weight.grad.shape == weight.shape


def test_on_the_meta_device_only_a_chunk_of_logits_is_made():
    hidden = torch.zeros(64, 8, device="meta", dtype=torch.bfloat16, requires_grad=True)
    with Largest() as largest:
        losses = linear_cross_entropy(
            hidden, hidden.new_zeros(1001, 8), hidden.new_zeros(64, dtype=torch.long), chunk=8
        )
        losses.sum().backward()
    assert largest.elements == 8 * 1024  # rows begin at multiples of 64 elements


@dtypes
@pytest.mark.parametrize("trains", [False, True])
def test_all_products_are_counted(dtype, trains):
    hidden, weight, labels, _ = problem(20, 8, 70, dtype, "cpu")
    weight.requires_grad_(trains)
    with FlopCounterMode(display=False) as counter:
        linear_cross_entropy(hidden, weight, labels, groups=1, chunk=7).sum().backward()
    assert counter.get_total_flops() == (3 if trains else 2) * 2 * 20 * 8 * 70


@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 9), (8192, 128256), (8192, 49152), (5000, 50257), (10**6, 10**7)])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_chunks_are_of_bounded_and_even_size(rows, vocabulary, itemsize):
    chunk = chunk_rows(rows, vocabulary, itemsize)
    assert chunk % kernel.ROWS == 0
    assert chunk == kernel.ROWS or chunk * vocabulary * itemsize <= kernel.CHUNK_BYTES
    count = -(-rows // chunk)
    assert count * chunk - rows < count * kernel.ROWS
    fewest = -(-rows * vocabulary * itemsize // kernel.CHUNK_BYTES)
    assert count <= max(2 * fewest, -(-rows // kernel.ROWS) if chunk == kernel.ROWS else 1)


def test_what_cannot_be_computed_is_refused():
    hidden, weight, labels, _ = problem(4, 8, 70, torch.float32, "cpu")
    with pytest.raises(ValueError, match="groups=3: expected a divisor"):
        linear_cross_entropy(hidden, weight, labels, groups=3)
    with pytest.raises(ValueError, match="bias"):
        linear_cross_entropy(hidden, weight, labels, torch.zeros(70, requires_grad=True))
    weight.requires_grad_()
    with pytest.raises(ValueError, match="groups=None: expected 1"):
        linear_cross_entropy(hidden, weight, labels)
    total = linear_cross_entropy(hidden, weight, labels, groups=1).sum()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        total.backward()


def test_no_rows_give_no_losses():
    assert linear_cross_entropy(torch.zeros(0, 4), torch.zeros(9, 4), torch.zeros(0, dtype=torch.long)).shape == (0,)


def test_the_script_that_compares_it_runs_and_keeps_its_records(monkeypatch, tmp_path, capsys):
    peers = Path(__file__).parent.parent / "experiments" / "peers"
    if not peers.is_dir():
        pytest.skip("no experiments folder beside the tests")
    monkeypatch.syspath_prepend(str(peers))
    script = importlib.import_module("cross_entropy")
    out = tmp_path / "cross_entropy.jsonl"
    options = ["--device", "cpu", "--sizes", "300x16x1001", "--rounds", "2", "--calls", "2", "--out", str(out)]
    script.main(options)
    script.main([*options, "--weight-trains"])
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r["contestant"] for r in records] == ["plain", "ours", "products"] * 2
    for all_logits, chunked, _ in (records[:3], records[3:]):
        assert chunked["loss"] == pytest.approx(all_logits["loss"], rel=1e-3)
        assert chunked["gradient_error"] < 1.2 * all_logits["gradient_error"] < 0.01
        assert chunked["over_plain"] == pytest.approx(chunked["seconds"]["p50"] / all_logits["seconds"]["p50"], 1e-3)
    assert capsys.readouterr().out.count("300x16x1001") == 6


SMOOTHING = (0.1, 0.0, 0.7)


def smoothed(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, upstream: Tensor):
    """Return PyTorch's sums of three equal parts of the rows, smoothed as above, and gradients, all in float64."""
    x, w = (t.detach().double().requires_grad_() for t in (hidden, weight))
    logits = x @ w.t() if bias is None else x @ w.t() + bias.double()
    parts = zip(logits.chunk(len(upstream)), labels.chunk(len(upstream)), SMOOTHING, strict=False)
    sums = torch.stack([cross_entropy(z, y, label_smoothing=e, reduction="sum") for z, y, e in parts])
    return sums.detach(), *torch.autograd.grad(sums @ upstream.double(), (x, w))


@devices
@dtypes
@pytest.mark.parametrize("shape", [(12, 16, 70, 5), (6, 32, 1000, 2), (9, 24, 9001, None)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_smoothed_sums_and_gradients_are_those_of_float64_for_each_group(shape, dtype, bias, device):
    hidden, weight, labels, offset = problem(*shape[:3], dtype, device, bias)
    upstream = torch.tensor([0.5, 2.0, 1.0], device=device)
    rates = torch.tensor(SMOOTHING, device=device)
    sums = linear_cross_entropy(hidden, weight, labels, offset, groups=3, chunk=shape[3], smoothing=rates)
    (gradient,) = torch.autograd.grad(sums @ upstream, hidden)
    want, by_hidden, _ = smoothed(hidden, weight, labels, offset, upstream)
    close(sums, want, TOLERANCE[dtype])
    close(gradient, by_hidden, TOLERANCE[dtype])
    assert gradient.dtype == dtype
    with torch.no_grad():
        again = linear_cross_entropy(hidden, weight, labels, offset, groups=3, chunk=shape[3], smoothing=rates)
    close(again, sums.double(), 1e-6)
    plain = linear_cross_entropy(hidden, weight, labels, offset, groups=3, chunk=shape[3])
    assert torch.equal(sums[1], plain[1])


@devices
@dtypes
def test_smoothing_reaches_a_weight_that_trains(dtype, device):
    hidden, weight, labels, offset = problem(12, 16, 70, dtype, device, True)
    weight.requires_grad_()
    rates = torch.tensor(SMOOTHING[:1], device=device)
    total = linear_cross_entropy(hidden, weight, labels, offset, groups=1, chunk=5, smoothing=rates)
    found = torch.autograd.grad(3 * total.sum(), (hidden, weight))
    want, *gradients = smoothed(hidden, weight, labels, offset, torch.tensor([3.0], device=device))
    close(total, want, TOLERANCE[dtype])
    for own, right, parameter in zip(found, gradients, (hidden, weight), strict=True):
        close(own, right, TOLERANCE[dtype])
        assert own.dtype == parameter.dtype


@devices
def test_smoothing_passes_by_what_is_ignored(device):
    hidden, weight, labels, offset = problem(6, 8, 70, torch.float32, device, True)
    hidden.data[1] = torch.nan
    rates = torch.tensor([0.3], device=device)
    total = linear_cross_entropy(hidden, weight, labels, offset, groups=1, chunk=2, smoothing=rates)
    total.sum().backward()
    assert total.isfinite().all()
    assert hidden.grad.isfinite().all()
    assert not hidden.grad[labels == -100].any()


def test_smoothing_wants_one_number_for_each_group():
    hidden, weight, labels, _ = problem(12, 16, 70, torch.float32, "cpu")
    for groups in (None, 2):
        with pytest.raises(ValueError, match=f"smoothing: expected one number for each of groups={groups}, not 3"):
            linear_cross_entropy(hidden, weight, labels, groups=groups, smoothing=torch.tensor(SMOOTHING))
