"""Blockwise quantization: bitsandbytes' codes, scales and values bit for bit; each value has a nearest code."""

import itertools
import math

import pytest
import torch
from scipy.stats import norm

from peftbench.kernels import blockwise
from peftbench.kernels.blockwise import (
    codebook,
    dequantize_4bit,
    dequantize_8bit,
    dynamic_map,
    quantize_4bit,
    quantize_8bit,
)

try:
    from bitsandbytes import functional
except ImportError:
    functional = None

needs_bitsandbytes = pytest.mark.skipif(functional is None, reason="bitsandbytes is not installed")
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")),
]
devices = pytest.mark.parametrize("device", DEVICES)
kinds = pytest.mark.parametrize("kind", blockwise.KINDS)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 1), (7, 9), (33, 65), (64, 64), (65, 64), (128, 100), (768, 3072))


def matrix(name: str, shape: tuple[int, ...], device: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Weights as they occur, and as they break things."""
    g = torch.Generator().manual_seed(math.prod(shape))
    x = torch.randn(shape, generator=g)
    if name == "small":
        x *= 0.02
    elif name == "outliers":
        x *= 0.02
        x.view(-1)[::997] *= 100
    elif name == "heavy":
        x = x / torch.rand(shape, generator=g).clamp(min=1e-3)
    elif name == "zeros":
        x.view(-1)[: min(192, x.numel())] = 0
    elif name == "edges":  # within a few digits of the boundary between two codes, where every rounding shows
        blocks = -(-x.numel() // 64)
        largest = torch.rand(blocks, 1, generator=g) + 0.5
        values = torch.cat([codebook(kind).sort().values for kind in blockwise.KINDS])
        middles = (values[1:] + values[:-1]) / 2
        chosen = middles[torch.randint(0, len(middles), (blocks, 64), generator=g)] * largest
        chosen = chosen * (1 + torch.randint(-2, 3, chosen.shape, generator=g) * 2.0**-24)
        chosen[:, :1] = largest
        x = chosen.view(-1)[: x.numel()].view(shape)
    elif name == "grid":  # many values lie on a boundary between two codes, or are a zero of either sign
        x = (x * 8).round() / 8
    return x.to(device, dtype)


@pytest.fixture(autouse=True)
def _not_compiled():
    # bitsandbytes compiles what it has no kernel for, which takes longer than all of these tests
    with torch.compiler.set_stance("force_eager"):
        yield


def same_values(found: torch.Tensor, want: torch.Tensor, exact: torch.Tensor) -> bool:
    """Whether the tensors are equal, but for fp16 on the CPU: there some of bitsandbytes' builds round ties upwards."""
    if found.dtype != torch.float16 or found.device.type != "cpu":
        return torch.equal(found, want)
    tie = (found.double() - exact).abs() == (want.double() - exact).abs()
    return found.dtype == want.dtype and bool(((found == want) | tie).all())


NAMES = ("normal", "small", "outliers", "heavy", "zeros", "grid", "edges")


# codebooks


def test_nf4_has_the_quantiles_of_the_normal_distribution():
    values = codebook("nf4").double()
    offset = (31 / 32 + 29 / 30) / 2
    upper = [norm.ppf(offset + (0.5 - offset) * i / 8) for i in range(8)]
    lower = [-norm.ppf(offset + (0.5 - offset) * i / 7) for i in range(7)]
    exact = torch.tensor(sorted([*upper, *lower, 0.0]), dtype=torch.float64) / norm.ppf(offset)
    assert (values - exact).abs().max() < 1e-6
    assert values[7] == 0
    assert (values[0], values[-1]) == (-1, 1)


def test_fp4_has_a_sign_two_exponent_bits_and_one_mantissa_bit():
    values = codebook("fp4") * 12
    assert values[:8].tolist() == [0, 0.0625, 8, 12, 4, 6, 2, 3]
    assert torch.equal(values[8:], -values[:8])


@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_map_is_ascending_and_reaches_from_a_millionth_to_one(signed):
    values = dynamic_map(signed)
    assert values.shape == (256,)
    assert (values.diff() > 0).all()
    assert values[-1] == 1
    assert 0 in values
    assert values[values > 0].min() == pytest.approx(5.5e-7 if signed else 3.25e-7)


@needs_bitsandbytes
@devices
def test_codebooks_are_bitsandbytes_own(device):
    for kind in blockwise.KINDS:
        assert torch.equal(codebook(kind, device), functional.get_4bit_type(kind, device=device))
    for signed in (True, False):
        assert torch.equal(dynamic_map(signed), functional.create_dynamic_map(signed))


# against bitsandbytes


@needs_bitsandbytes
@devices
@kinds
@pytest.mark.parametrize("name", NAMES)
def test_codes_scales_and_values_are_bitsandbytes_own(name, kind, device):
    for shape, dtype in itertools.product(SHAPES, DTYPES):
        x = matrix(name, shape, device, dtype)
        want, state = functional.quantize_4bit(x, blocksize=64, quant_type=kind)
        codes, absmax = quantize_4bit(x, kind)
        assert torch.equal(codes, want.view(-1)), (shape, dtype)
        assert torch.equal(absmax, state.absmax), (shape, dtype)
        for compute in DTYPES:
            state.dtype = compute
            restored = dequantize_4bit(codes, absmax, kind, shape, compute)
            exact = dequantize_4bit(codes, absmax, kind, shape, torch.float32).double()
            assert restored.dtype == compute
            assert same_values(restored, functional.dequantize_4bit(want, state), exact), (shape, dtype, compute)


@needs_bitsandbytes
@devices
@kinds
def test_large_matrices_are_bitsandbytes_own(kind, device):
    # of 2^28 elements several lie so near to a boundary that the last digit of a reciprocal decides
    count = 2**28 if device == "cuda" else 2**22
    x = torch.randn(count, device=device, generator=torch.Generator(device).manual_seed(0))
    want, state = functional.quantize_4bit(x, blocksize=64, quant_type=kind)
    codes, absmax = quantize_4bit(x, kind)
    assert torch.equal(codes, want.view(-1))
    assert torch.equal(absmax, state.absmax)


@needs_bitsandbytes
@devices
def test_eight_bit_codes_are_bitsandbytes_own(device):
    for count in (1, 255, 256, 257, 100_000, 2**26 if device == "cuda" else 2**20):
        for scale in (1.0, 1e-3):
            x = scale * torch.randn(count, device=device, generator=torch.Generator(device).manual_seed(count))
            want, state = functional.quantize_blockwise(x, blocksize=256)
            codes, absmax = quantize_8bit(x, dynamic_map(device=device))
            assert torch.equal(codes, want)
            assert torch.equal(absmax, state.absmax)
            restored = dequantize_8bit(codes, absmax, dynamic_map(device=device))
            assert torch.equal(restored, functional.dequantize_blockwise(want, state))
    zeros = torch.zeros(300, device=device)
    assert torch.equal(quantize_8bit(zeros, dynamic_map(device=device))[0], functional.quantize_blockwise(zeros)[0])


# on their own


@devices
@kinds
@pytest.mark.parametrize("name", NAMES)
def test_every_value_gets_a_nearest_code(name, kind, device):
    # Reciprocal (two of the last digit's halves on CUDA), product and boundary are rounded, and a value that falls on
    # the other side of a boundary is further from its code by twice as much; the restored value is rounded once.
    slack = (2 * (2 + 1 + 1) + 1) * 2.0**-24
    if (kind, device) == ("fp4", "cuda"):
        slack += 2 * (7 / 12 - 0.583333)  # the boundary there
    for shape in SHAPES:
        x = matrix(name, shape, device).double()
        codes, absmax = quantize_4bit(x, kind)
        restored = dequantize_4bit(codes, absmax, kind, shape, torch.float32).double()
        scale = absmax.double().repeat_interleave(64)[: x.numel()].view(shape)
        distance = (x.unsqueeze(-1) - scale.unsqueeze(-1) * codebook(kind, device).double()).abs().amin(-1)
        assert ((x - restored).abs() <= distance + slack * scale).all()
        blocks = torch.nn.functional.pad(x.view(-1), (0, -x.numel() % 64)).view(-1, 64)
        torch.testing.assert_close(absmax.double(), blocks.abs().amax(1), rtol=1e-7, atol=1e-37)


@kinds
def test_codes_are_packed_with_the_first_in_the_high_half(kind):
    values = codebook(kind)
    low, high = values.argmin(), values.argmax()
    codes, absmax = quantize_4bit(torch.tensor([-3.0, 3.0, 3.0]), kind)
    assert codes.tolist() == [low << 4 | high, high << 4 | quantize_4bit(torch.zeros(2), kind)[0].item() & 15]
    assert absmax.tolist() == [3.0]


@kinds
def test_blocks_do_not_touch_each_other(kind):
    x = matrix("normal", (4, 64), "cpu")
    alone = [quantize_4bit(row, kind) for row in x]
    x[1] *= 1000
    codes, absmax = quantize_4bit(x, kind)
    for row in (0, 2, 3):
        assert torch.equal(codes.view(4, 32)[row], alone[row][0])
        assert absmax[row] == alone[row][1]
    assert torch.equal(codes.view(4, 32)[1], alone[1][0])


@kinds
def test_parts_quantized_apart_are_the_whole(kind, monkeypatch):
    x = matrix("normal", (33, 65), "cpu")
    whole = quantize_4bit(x, kind)
    monkeypatch.setattr(blockwise, "CHUNK", 256)
    assert all(torch.equal(a, b) for a, b in zip(whole, quantize_4bit(x, kind), strict=True))


@devices
@kinds
def test_zeros_stay_zeros(kind, device):
    x = torch.zeros(3, 70, device=device)
    codes, absmax = quantize_4bit(x, kind)
    assert torch.equal(dequantize_4bit(codes, absmax, kind, x.shape, torch.bfloat16), x.bfloat16())


@kinds
def test_restored_values_are_products_rounded_once(kind):
    x = matrix("normal", (64, 100), "cpu")
    codes, absmax = quantize_4bit(x, kind)
    nibbles = torch.stack([codes >> 4, codes & 15], 1).view(-1)[: x.numel()].long()
    exact = codebook(kind).double()[nibbles] * absmax.double().repeat_interleave(64)[: x.numel()]
    for dtype in DTYPES:
        restored = dequantize_4bit(codes, absmax, kind, x.shape, dtype)
        torch.testing.assert_close(restored.view(-1), exact.float().to(dtype), rtol=0, atol=0)


def test_nf4_loses_less_of_normal_weights_than_fp4_does():
    x = matrix("normal", (512, 512), "cpu").double()
    errors = {}
    for kind in blockwise.KINDS:
        restored = dequantize_4bit(*quantize_4bit(x, kind), kind, x.shape, torch.float32)
        errors[kind] = ((x - restored).norm() / x.norm()).item()
    assert 0.08 < errors["nf4"] < 0.1
    assert errors["nf4"] < errors["fp4"]


def test_eight_bit_errors_are_within_half_a_step():
    x = matrix("normal", (1000,), "cpu")
    codes, absmax = quantize_8bit(x, dynamic_map())
    restored = dequantize_8bit(codes, absmax, dynamic_map())
    scale = absmax.repeat_interleave(256)[:1000]
    grid = 1 / 2**16  # the CPU's
    step = dynamic_map().diff().max() / 2 + grid
    # the map begins at -0.993
    assert ((x - restored).abs() <= scale * (step + 1e-6)).all()
