"""Restoring 4-bit weights: the Triton kernel is the reference bit for bit, and compiled layers keep no dense weight."""

import importlib
import json
import logging
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from peftbench.kernels import backend, nf4
from peftbench.kernels.backend import interpreted
from peftbench.kernels.blockwise import KINDS, codebook, dynamic_map, quantize_4bit, quantize_8bit
from peftbench.models.quantized import QuantizedLinear, Scheme
from tests.test_blockwise import DEVICES, DTYPES, NAMES, matrix

devices = pytest.mark.parametrize("device", DEVICES)
kinds = pytest.mark.parametrize("kind", KINDS)
scales = pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
# 4096 weights are a program's, 16384 share a scale of scales
COUNTS = (0, 1, 2, 7, 63, 64, 65, 128, 4095, 4096, 4097, 3 * 16384, 16384 + 64, 3 * 16384 + 8 * 64 + 5)


def packed(x: Tensor, kind: str, double: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return codes, absmax, scale and offset of a flat tensor."""
    codes, absmax = quantize_4bit(x, kind)
    if not double:
        return codes, absmax, None, None
    offset = absmax.mean()
    small, scale = quantize_8bit(absmax - offset, dynamic_map(device=x.device))
    return codes, small, scale, offset


def same(found: Tensor, want: Tensor, exact: Tensor) -> bool:
    """Whether the bits are equal; Triton's interpreter cuts the digits off that bf16 lacks, where a GPU rounds."""
    if found.dtype == torch.bfloat16 and interpreted() and found.device.type == "cpu":
        want = (exact.view(torch.int32) & -(2**16)).view(torch.float32).bfloat16()
    return found.dtype == want.dtype and torch.equal(found, want)


# the kernel: on a GPU, and in the interpreter


def reaches(device: str) -> None:
    """Skip where no kernel runs on the device in this process."""
    if device == "cpu" and not interpreted():
        pytest.skip("in Triton's interpreter alone: see the test that starts it")
    assert backend.use_triton(torch.empty(0, device=device))


@devices
@kinds
@scales
@dtypes
def test_kernel_is_the_reference_bit_for_bit(kind, double, dtype, device):
    reaches(device)
    for i, count in enumerate(COUNTS):
        parts = packed(matrix(NAMES[i % len(NAMES)], (count,), device), kind, double)
        want, exact = (nf4.reference(*parts, kind, (count,), d) for d in (dtype, torch.float32))
        assert same(nf4.dequantize(*parts, kind, (count,), dtype), want, exact), count


@devices
@kinds
def test_kernel_rounds_product_and_sum_apart(kind, device):
    reaches(device)
    count = 64 * 2048
    g = torch.Generator().manual_seed(0)
    codes, absmax = (torch.randint(0, 256, (n,), generator=g, dtype=torch.uint8) for n in (count // 2, count // 64))
    scale, offset = torch.rand(8, generator=g) + 0.5, torch.tensor(0.3371)
    fused = (dynamic_map().double()[absmax.long()] * scale.double().repeat_interleave(256) + offset.double()).float()
    apart = dynamic_map()[absmax.long()] * scale.repeat_interleave(256) + offset
    assert (fused != apart).sum() > 100
    parts = [t.to(device) for t in (codes, absmax, scale, offset)]
    found = nf4.dequantize(*parts, kind, (count,), torch.float32)
    assert torch.equal(found, nf4.reference(*parts, kind, (count,), torch.float32))
    pairs = torch.stack([codes >> 4, codes & 15], 1).long().view(-1)
    assert torch.equal(found.cpu(), codebook(kind)[pairs] * apart.repeat_interleave(64))


@devices
def test_kernel_reads_tensors_that_begin_anywhere(device):
    reaches(device)
    parts = packed(matrix("normal", (5000,), device), "nf4", True)
    shifted = [torch.cat([t.new_zeros(1), t.view(-1)])[1:].view(t.shape) for t in parts]
    assert any(t.data_ptr() % 16 for t in shifted)
    want = nf4.reference(*parts, "nf4", (50, 100), torch.float16)
    assert torch.equal(nf4.dequantize(*shifted, "nf4", (50, 100), torch.float16), want)


@devices
def test_kernel_is_what_runs(device, monkeypatch):
    reaches(device)

    def forbidden(*_: object) -> None:
        raise AssertionError("the reference ran")

    monkeypatch.setattr(nf4, "reference", forbidden)
    parts = packed(matrix("normal", (65,), device), "nf4", True)
    assert nf4.dequantize(*parts, "nf4", (65,), torch.float32).shape == (65,)


@devices
def test_kernel_gives_the_same_however_the_work_is_cut(device):
    reaches(device)
    from peftbench.kernels.nf4_triton import Config, dequantize

    parts = packed(matrix("normal", (9001,), device), "nf4", True)
    want = nf4.reference(*parts, "nf4", (9001,), torch.float16)
    for rows in (128, 512, 1024):
        assert torch.equal(dequantize(*parts, "nf4", (9001,), torch.float16, Config(rows, 4)), want)


@pytest.mark.skipif(interpreted() or find_spec("triton") is None, reason="runs the tests above in the interpreter")
def test_the_tests_above_in_tritons_interpreter():
    """In a process of its own: what Triton does is settled when it is first imported."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", "kernel and cpu", "--no-header", __file__],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert " skipped" not in done.stdout


@cuda
def test_kernel_places_beyond_32_bits():
    tail = 3 * 16384 + 77
    count, skipped = 2**31 + tail, (2**30, 2**25, 2**17)
    g = torch.Generator("cuda").manual_seed(0)
    codes = torch.randint(0, 256, (count // 2 + 1,), device="cuda", dtype=torch.uint8, generator=g)
    absmax = torch.randint(0, 256, (-(-count // 64),), device="cuda", dtype=torch.uint8, generator=g)
    scale = torch.rand(-(-absmax.numel() // 256), device="cuda", generator=g)
    parts = [codes, absmax, scale, torch.tensor(0.5, device="cuda")]
    found = nf4.dequantize(*parts, "nf4", (count,), torch.bfloat16)
    ends = [t[n:] for t, n in zip(parts, skipped, strict=False)]
    assert torch.equal(found[-tail:], nf4.reference(*ends, parts[3], "nf4", (tail,), torch.bfloat16))
    starts = [t[: n // 2**11] for t, n in zip(parts, skipped, strict=False)]
    assert torch.equal(found[: 2**20], nf4.reference(*starts, parts[3], "nf4", (2**20,), torch.bfloat16))


# memory


def cuda_peak(call) -> int:
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


@cuda
@scales
def test_kernel_takes_nothing_but_the_result(double):
    parts = packed(torch.randn(2**22, device="cuda"), "nf4", double)
    result = 2 * 2**22
    peak = cuda_peak(lambda: nf4.dequantize(*parts, "nf4", (2048, 2048), torch.bfloat16))
    assert result <= peak < result + 2**20


@cuda
def test_a_step_holds_one_dense_weight_at_a_time():
    linear = [nn.Linear(2048, 2048, bias=False, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    model = nn.Sequential(*[QuantizedLinear.of(part.requires_grad_(False), Scheme()) for part in linear])
    x = torch.randn(8, 2048, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = 2 * 2048 * 2048
    assert weight <= cuda_peak(lambda: model(x).sum().backward()) < weight + 2**20


class Calls(TorchDispatchMode):
    """Notes the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("fake", [True, False])
def test_without_data_only_the_result_is_made(fake):
    parts = packed(matrix("normal", (70 * 48,), "cpu"), "nf4", True)
    mode = FakeTensorMode()
    parts = [mode.from_tensor(t) if fake else t.to("meta") for t in parts]
    with mode, Calls() as calls:
        found = nf4.dequantize(*parts, "nf4", (70, 48), torch.bfloat16)
    assert (found.shape, found.dtype, found.device) == ((70, 48), torch.bfloat16, parts[0].device)
    assert [name for name in calls.names if not name.startswith("prim.")] == ["aten.empty.memory_format"]


# without Triton


@kinds
@scales
def test_values_are_the_formula_s(kind, double):
    x = matrix("small", (3 * 16384 + 5,), "cpu")
    codes, absmax, scale, offset = packed(x, kind, double)
    largest = absmax.double()
    if double:
        largest = dynamic_map().double()[absmax.long()] * scale.double().repeat_interleave(256)[: len(absmax)] + offset
    pairs = torch.stack([codes >> 4, codes & 15], 1).long().view(-1)[: x.numel()]
    exact = codebook(kind).double()[pairs] * largest.repeat_interleave(64)[: x.numel()]
    found = nf4.reference(codes, absmax, scale, offset, kind, (x.numel(),), torch.float32)
    # three roundings; what the offset cancels is as large as the offset
    assert (found - exact).abs().max() <= 2.0**-24 * (3 * exact.abs().max() + (offset if double else 0))


def test_a_gpu_without_triton_is_said_once(monkeypatch, caplog):
    tensor = SimpleNamespace(is_meta=False, device=torch.device("cuda"))
    monkeypatch.setattr(backend, "_installed", lambda: False)
    backend._say_missing.cache_clear()
    with caplog.at_level(logging.WARNING, "peftbench"):
        assert not backend.use_triton(tensor)
        assert not backend.use_triton(tensor)
    assert [record.message for record in caplog.records if "Triton is not installed" in record.message] == [
        "Triton is not installed: kernels run in plain PyTorch, slower (pip install 'peftbench[gpu]')"
    ]
    backend._say_missing.cache_clear()


# compiled


@scales
def test_the_operation_keeps_torch_s_rules_for_operations(double):
    parts = packed(matrix("normal", (70 * 48,), "cpu"), "fp4", double)
    torch.library.opcheck(nf4._compiled, (*parts, "fp4", (70, 48), torch.bfloat16, None))


def compiled(call, graphs: list):
    """Compile a function as one graph, by the partitioner that real compilers use; notes forward and backward graph."""
    from torch._dynamo.backends.common import aot_autograd

    def note(graph, inputs):
        from torch._dynamo.backends.debugging import boxed_nop

        graphs.append(graph)
        return boxed_nop(graph, inputs)

    torch._dynamo.reset()
    rules = aot_autograd(fw_compiler=note, bw_compiler=note, partition_fn=min_cut_rematerialization_partition)
    return torch.compile(call, backend=rules, fullgraph=True)


@devices
@pytest.mark.parametrize("bias", ["frozen", "trained", "none"])
@scales
def test_compiled_layers_compute_the_same_and_keep_no_dense_weight(double, bias, device):
    plain = [nn.Linear(64, 64, bias=bias != "none").requires_grad_(False) for _ in range(3)]
    model = nn.Sequential(*[QuantizedLinear.of(part, Scheme("nf4", double)) for part in plain]).to(device)
    if bias == "trained":
        model[1].bias.requires_grad_(True)
    x = torch.randn(5, 64, device=device, requires_grad=True)
    learnt = [x, *(p for p in model.parameters() if p.requires_grad)]
    want = model(x * x).square()
    gradients = torch.autograd.grad(want.sum(), learnt)
    graphs: list[torch.fx.GraphModule] = []
    got = compiled(lambda t: model(t * t).square(), graphs)(x)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got.sum(), learnt), gradients)

    forward, backward = graphs
    made = [[n for n in graph.graph.nodes if n.target is DEQUANTIZE] for graph in graphs]
    assert [len(nodes) for nodes in made] == [3, 3]
    for graph in (forward, backward):
        (output,) = [n for n in graph.graph.nodes if n.op == "output"]
        handed_on = [n for n in output.all_input_nodes if n.op != "placeholder"]
        assert all(n.meta["val"].numel() < 64 * 64 for n in handed_on)
    given = [n.meta["val"] for n in backward.graph.nodes if n.op == "placeholder"]
    assert all(t.numel() < 64 * 64 for t in given)


DEQUANTIZE = torch.ops.peftbench.dequantize_4bit.default


def test_a_layer_whose_weight_is_overridden_compiles_too():
    model = QuantizedLinear.of(nn.Linear(64, 48).requires_grad_(False), Scheme())
    model.override(model.dense() + 1, None)
    x = torch.randn(3, 64)
    assert torch.equal(compiled(model, [])(x), model(x))


def test_a_compiled_layer_under_autocast():
    model = QuantizedLinear.of(nn.Linear(64, 48).requires_grad_(False), Scheme())
    x = torch.randn(3, 64)
    with torch.autocast("cpu", torch.bfloat16):
        want, got = model(x), compiled(model, [])(x)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, want)


# the comparison with bitsandbytes


def test_the_comparison_counts_bytes_and_writes_records(monkeypatch, tmp_path, capsys):
    peers = Path(__file__).parent.parent / "experiments" / "peers"
    if not peers.is_dir():
        pytest.skip("no experiments folder beside the tests")
    monkeypatch.syspath_prepend(str(peers))
    script = importlib.import_module("dequantize")
    out = tmp_path / "dequantize.jsonl"
    # bitsandbytes compiles what it has no kernel for on a CPU
    with torch.compiler.set_stance("force_eager"):
        options = ["--device", "cpu", "--sizes", "64x512", "--rounds", "2", "--calls", "2", "--out", str(out)]
        script.main(options)
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert {r["contestant"] for r in records} <= {"ours", "bitsandbytes"}
    ours = records[0]
    assert ours["contestant"] == "ours"
    assert ours["equal_to_reference"]
    # codes, absmax, scale, offset, result
    assert ours["moved_bytes"] == 64 * 512 // 2 + 512 + 2 * 4 + 4 + 2 * 64 * 512
    assert ours["bytes_per_second"] == pytest.approx(ours["moved_bytes"] / ours["seconds"]["p50"], rel=1e-3)
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(records)
