"""The cost of one configuration, measured alone on fixed shapes; `results/README.md` says what each field means."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from peftbench.profiling.energy import energy_joules
from peftbench.profiling.flops import analytic_flops_per_token, counted_flops
from peftbench.profiling.memory import peak_memory
from peftbench.profiling.timing import matmul_ceiling, time_steps


@dataclass(frozen=True)
class Trial:
    """One run, alone, ready to step on a batch of fixed shape.

    Attributes:
        step: makes one whole training step without waiting for the device.
        existing: yields the tensors alive between steps.
        rows, length: the batch's shape in tokens.
        counts: parameters: adapter, head, trained matrices, frozen matrices, total.
    """

    step: Callable[[], object]
    existing: Callable[[], Iterable[torch.Tensor]]
    rows: int
    length: int
    adapter_parameters: int
    head_parameters: int
    total_parameters: int
    trained_matrices: int
    frozen_matrices: int
    backward_through_base: bool
    checkpoint_bytes: int
    compute_dtype: torch.dtype


def measure(
    prepare: Callable[[], AbstractContextManager[Trial]],
    device: torch.device,
    *,
    min_warmup: int,
    steps: int,
    max_seconds: float,
    energy_seconds: float,
) -> dict[str, Any]:
    """Set a trial up and measure it: time first, then memory, FLOPs and energy in steps of their own.

    Nothing but the trial may be alive on the device. Each instrument runs in steps that no other one sees.
    """
    begin = time.perf_counter()
    with prepare() as trial:
        trial.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        startup = time.perf_counter() - begin
        timing = time_steps(trial.step, device, min_warmup=min_warmup, steps=steps, max_seconds=max_seconds)
        memory = peak_memory(trial.step, device, trial.existing())
        flops = counted_flops(trial.step)
        energy = energy_joules(trial.step, device, energy_seconds)
        tokens = trial.rows * trial.length
        median = timing.percentile(50)
        analytic = analytic_flops_per_token(
            trial.frozen_matrices, trial.trained_matrices, backward_through_base=trial.backward_through_base
        )
        ceiling = matmul_ceiling(device, trial.compute_dtype)
        return {
            "trainable_parameters": trial.adapter_parameters + trial.head_parameters,
            "adapter_parameters": trial.adapter_parameters,
            "head_parameters": trial.head_parameters,
            "total_parameters": trial.total_parameters,
            "checkpoint_bytes": trial.checkpoint_bytes,
            "step_seconds": {
                "p10": timing.percentile(10),
                "p50": median,
                "p90": timing.percentile(90),
                "samples": timing.samples,
                "warmup_steps": timing.warmup_steps + 1,
                "stable": timing.stable,
            },
            "padded_tokens_per_second": tokens / median,
            "flops_per_token": flops / tokens,
            "analytic_flops_per_token": analytic,
            "model_flops_utilization": analytic * tokens / median / ceiling,
            "matmul_ceiling_flops_per_second": ceiling,
            "memory": memory,
            "energy_joules_per_1k_tokens": None if energy is None else energy[0] / (energy[1] * tokens) * 1000,
            "startup_seconds": startup,
            "compile_seconds": None,
            "shape": {"batch_size": trial.rows, "length": trial.length},
        }
