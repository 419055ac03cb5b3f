"""The cost of one configuration, measured alone on fixed shapes; `results/README.md` says what each field means."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from peftbench.engine.stepping import Stepper
from peftbench.profiling.energy import energy_of
from peftbench.profiling.flops import analytic_flops_per_token, counted_flops
from peftbench.profiling.memory import memory_of
from peftbench.profiling.timing import clock, copy_bandwidth, matmul_ceiling, step_shares, time_steps
from peftbench.profiling.trace import kernels_per_step
from peftbench.profiling.traffic import traffic_of


@dataclass(frozen=True)
class Trial:
    """One run, alone, ready to step on a batch of fixed shape.

    Attributes:
        step: makes one whole training step without waiting for the device.
        by_operations: makes the same step operation by operation, which a replayed graph does not; for instruments
        that look at operations or phases.
        stepper: what `step` runs; says what really ran.
        objective, optimizer: what `by_operations` calls `loss_sum` and `step` of; instruments listen there.
        persistent: gives the tensors alive between steps by component, the adapter's before the base's.
        gradients: gives the gradients there are now.
        flat_gradient: gives the bytes of all packed gradients in one block.
        loaded_bytes, attached_bytes: in use with the base alone, and with all that a step needs.
        rows, length: the batch's shape in tokens.
        adapter_parameters and the like: counts.
    """

    step: Callable[[], object]
    by_operations: Callable[[], object]
    stepper: Stepper
    objective: Any
    optimizer: Any
    persistent: Callable[[], Mapping[str, Iterable[torch.Tensor]]]
    gradients: Callable[[], Iterable[torch.Tensor]]
    flat_gradient: Callable[[], int]
    loaded_bytes: int
    attached_bytes: int
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


class Watched:
    """A trial's step that notes its seconds, for steps that an instrument looks at."""

    def __init__(self, step: Callable[[], object], device: torch.device) -> None:
        self._step, self._device = step, device
        self.seconds: list[float] = []

    def __call__(self) -> None:
        self.seconds.append(clock(self._step, self._device))


class Stopwatch:
    """Wall-clock seconds spent on each part of measuring, waits for the device included."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[part] = time.perf_counter() - begin


def measure(
    prepare: Callable[[], AbstractContextManager[Trial]],
    device: torch.device,
    *,
    min_warmup: int,
    steps: int,
    max_seconds: float,
    energy_seconds: float,
    looks: int = 3,
) -> dict[str, Any]:
    """Set a trial up and measure it: time first, then shares, memory, FLOPs, traffic, kernels and energy.

    Nothing but the trial may be alive on the device. Each instrument runs in steps that no other one sees;
    what it slows them down by is under `observer`, what it takes in all under `instrument_seconds`.

    Args:
        prepare: sets the trial up.
        min_warmup, steps, max_seconds: of `time_steps`.
        energy_seconds: of `energy_of`.
        looks: steps that shares and what instruments cost are medians of; slow steps get one.
    """
    spent = Stopwatch()
    begin = time.perf_counter()
    with prepare() as trial:
        first = clock(trial.step, device)
        startup = time.perf_counter() - begin
        with spent("timing"):
            timing = time_steps(trial.step, device, min_warmup=min_warmup, steps=steps, max_seconds=max_seconds)
        seconds = timing.percentile(50)
        instruments = ("phases", "memory", "flops", "traffic", "kernels")
        plain, single = Watched(trial.step, device), Watched(trial.by_operations, device)
        watched = {name: Watched(trial.by_operations, device) for name in instruments}
        watched["kernels"] = Watched(trial.step, device)
        looks = looks if 30 * seconds < max_seconds else 1
        with spent("plain"):
            for _ in range(looks):
                plain()
                single()
        with spent("phases"):
            shares = step_shares(watched["phases"], device, trial.objective, trial.optimizer, looks)
        with spent("memory"):
            memory = memory_of(trial, trial.by_operations, device, watched["memory"])
        with spent("flops"):
            flops = counted_flops(watched["flops"])
        with spent("traffic"):
            traffic = traffic_of(watched["traffic"])
        with spent("kernels"):
            kernels = kernels_per_step(watched["kernels"], device)
        with spent("energy"):
            energy = energy_of(trial.step, device, energy_seconds)
        after = Watched(trial.step, device)
        with spent("afterwards"):
            for _ in range(looks):
                after()
        execution, capture = trial.stepper.execution, trial.stepper.capture_seconds
    # made once the trial is over: their large matrices need room
    with spent("ceilings"):
        ceiling, bandwidth = matmul_ceiling(device, trial.compute_dtype), copy_bandwidth(device)
    base, slow = median(plain.seconds), median(single.seconds)
    tokens = trial.rows * trial.length
    analytic = analytic_flops_per_token(
        trial.frozen_matrices, trial.trained_matrices, backward_through_base=trial.backward_through_base
    )
    memory["phases"] = {"load": trial.loaded_bytes, "attach": trial.attached_bytes, **memory["phases"]}
    return {
        "trainable_parameters": trial.adapter_parameters + trial.head_parameters,
        "adapter_parameters": trial.adapter_parameters,
        "head_parameters": trial.head_parameters,
        "total_parameters": trial.total_parameters,
        "checkpoint_bytes": trial.checkpoint_bytes,
        "step_seconds": {
            "p10": timing.percentile(10),
            "p50": seconds,
            "p90": timing.percentile(90),
            "samples": timing.samples,
            "warmup_steps": timing.warmup_steps + 1,
            "stable": timing.stable,
        },
        "step_share": shares,
        "padded_tokens_per_second": tokens / seconds,
        "flops_per_token": flops / tokens,
        "analytic_flops_per_token": analytic,
        "model_flops_utilization": analytic * tokens / seconds / ceiling,
        "matmul_ceiling_flops_per_second": ceiling,
        "memory_traffic_bytes": traffic.bytes,
        "memory_bandwidth_utilization": traffic.bytes / seconds / bandwidth,
        "copy_bandwidth_bytes_per_second": bandwidth,
        "operations_per_step": traffic.operations,
        "kernels_per_step": kernels,
        "memory": memory,
        "energy_joules_per_1k_tokens": None if energy is None else energy.joules / (energy.steps * tokens) * 1000,
        "energy_window_seconds": None if energy is None else energy.seconds,
        "startup_seconds": startup,
        "execution": execution,
        "compile_seconds": max(first - base, 0.0) if execution.startswith("compiled") else capture or None,
        "observer": {
            **{
                name: median(w.seconds) / (base if name == "kernels" else slow) if w.seconds else None
                for name, w in watched.items()
            },
            "afterwards": median(after.seconds) / base,
        },
        "instrument_seconds": spent.seconds,
        "shape": {"batch_size": trial.rows, "length": trial.length},
    }
