"""Energy of training steps from the GPU's own counter (NVML); there is none elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from peftbench.profiling.nvml import Gpu


@dataclass(frozen=True)
class Energy:
    """What the GPU as a whole used over some steps."""

    joules: float
    steps: int
    seconds: float


def energy_of(step: Callable[[], object], device: torch.device, seconds: float) -> Energy | None:
    """Measure over at least `seconds` of steps; None without a GPU or its counter, or for 0 seconds.

    The device must be idle at the start. The counter moves every few tens of milliseconds at best: over 10 s that is a
    matter of per mille.
    """
    gpu = Gpu.of(device) if seconds > 0 else None
    begin = None if gpu is None else gpu.millijoules()
    if gpu is None or begin is None:
        return None
    start, steps = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        for _ in range(5):
            step()
        steps += 5
        torch.cuda.synchronize(device)
    end, spent = gpu.millijoules(), time.perf_counter() - start
    return None if end is None else Energy((end - begin) / 1000, steps, spent)
