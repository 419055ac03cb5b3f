"""The profiler's instruments against figures worked out by hand."""

from __future__ import annotations

import time

import pytest
import torch

from peftbench.profiling.energy import energy_joules
from peftbench.profiling.flops import analytic_flops_per_token, counted_flops
from peftbench.profiling.memory import TensorTracker, peak_memory
from peftbench.profiling.timing import matmul_ceiling, time_steps

CPU = torch.device("cpu")


def test_a_linear_map_costs_two_flops_a_weight_forward_and_four_backward() -> None:
    x, w = torch.randn(5, 7, requires_grad=True), torch.randn(7, 3, requires_grad=True)
    assert counted_flops(lambda: x @ w) == 2 * 5 * 7 * 3
    assert counted_flops(lambda: (x @ w).sum().backward()) == 6 * 5 * 7 * 3


@pytest.mark.parametrize("key_heads", [8, 2], ids=["equal heads", "grouped heads"])
def test_attention_costs_its_two_products(key_heads: int) -> None:
    q = torch.randn(2, 8, 16, 32, requires_grad=True)
    k, v = (torch.randn(2, key_heads, 16, 32, requires_grad=True) for _ in range(2))

    def step() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=key_heads != 8)

    forward = 2 * 2 * 8 * 16 * 16 * 32 * 2
    assert counted_flops(step) == forward
    # the backward of a fused kernel computes the scores again: five products to the forward's two
    assert counted_flops(lambda: step().sum().backward()) in (forward * 3, forward * 7 // 2)


def test_analytic_flops_by_hand() -> None:
    assert analytic_flops_per_token(10, 3, backward_through_base=True) == 58
    assert analytic_flops_per_token(10, 3, backward_through_base=False) == 38


def test_tracked_memory_counts_live_storages_once() -> None:
    weight = torch.zeros(1000)
    with TensorTracker([weight, weight.view(10, 100)]) as tracker:
        a = weight + 1
        b = a.view(10, 100)
        del a
        c = b * 2
        del b, c
        weight + 1
    assert tracker.peak == 3 * 4000
    assert tracker.live == 4000


def test_peak_memory_says_what_it_counts() -> None:
    weight = torch.zeros(1000)
    memory = peak_memory(lambda: weight + 1, CPU, [weight])
    assert memory["kind"] == "tracked_tensors"
    assert memory["peak"] == 8000
    assert memory["reserved"] is None


def test_timing_takes_the_steps_asked_for_within_the_time_given() -> None:
    timing = time_steps(lambda: time.sleep(0.002), CPU, min_warmup=3, steps=7, max_seconds=5)
    assert len(timing.samples) == 7
    assert timing.warmup_steps >= 3
    assert 0.002 <= timing.percentile(10) <= timing.percentile(50) <= timing.percentile(90)
    assert len(time_steps(lambda: time.sleep(0.02), CPU, min_warmup=1, steps=1000, max_seconds=0.2).samples) < 20


def test_there_is_no_energy_without_a_gpu() -> None:
    assert energy_joules(lambda: None, CPU, 10) is None


def test_the_ceiling_is_measured_once() -> None:
    assert matmul_ceiling(CPU, torch.float32) == matmul_ceiling(CPU, torch.float32) > 1e8
