"""How long a training step takes: events on the GPU's own timeline, or the clock after a synchronisation."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

STABLE = 0.05
"""Warm-up ends when the last three steps lie within this share of their median."""
MAX_WARMUP = 15


@dataclass(frozen=True)
class Timing:
    """Seconds of each timed step, how many steps came before, and whether these had become stable."""

    samples: list[float]
    warmup_steps: int
    stable: bool

    def percentile(self, q: float) -> float:
        """Return the q-th percentile in seconds."""
        return float(np.percentile(self.samples, q))


def _clock(step: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def time_steps(
    step: Callable[[], object], device: torch.device, *, min_warmup: int, steps: int, max_seconds: float
) -> Timing:
    """Call `step` until it is warm, then `steps` times more, or until `max_seconds` are spent (at least 3 times).

    On CUDA, steps are queued without waiting and timed by events, so launch gaps count but host waits do not.
    """
    warm: list[float] = []
    spent = 0.0
    while True:
        warm.append(_clock(step, device))
        spent += warm[-1]
        last = sorted(warm[-3:])
        stable = len(warm) >= 3 and last[-1] - last[0] <= STABLE * last[1]
        enough = len(warm) >= MAX_WARMUP or spent > max_seconds / 3
        if len(warm) >= min_warmup and (stable or enough):
            break
    count = max(3, min(steps, int((max_seconds - spent) / max(np.median(warm[-3:]), 1e-9))))
    if device.type != "cuda":
        return Timing([_clock(step, device) for _ in range(count)], len(warm), stable)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    torch.cuda.synchronize(device)
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize(device)
    samples = [a.elapsed_time(b) / 1000 for a, b in itertools.pairwise(events)]
    return Timing(samples, len(warm), stable)


_CEILINGS: dict[tuple[str, str], float] = {}


def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of a large square matrix product on random data, measured once per process."""
    key = (str(device), str(dtype))
    if key not in _CEILINGS:
        size = 8192 if device.type == "cuda" else 1024
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        for _ in range(3):
            a @ b
        seconds = min(_clock(lambda: a @ b, device) for _ in range(5))
        _CEILINGS[key] = 2 * size**3 / seconds
    return _CEILINGS[key]
