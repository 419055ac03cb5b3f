"""How long a training step takes: events on the GPU's own timeline, or the clock after a synchronisation."""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from peftbench.profiling.phases import phases
from peftbench.profiling.replay import PHASES

STABLE = 0.05
"""Warm-up ends when the last three steps lie within this share of their median."""
MAX_WARMUP = 15
WINDOW = 0.02
"""Seconds that are long enough for timing by events or the clock."""


@dataclass(frozen=True)
class Timing:
    """Seconds of each timed step, how many steps came before, and whether these had become stable."""

    samples: list[float]
    warmup_steps: int
    stable: bool

    def percentile(self, q: float) -> float:
        """Return the q-th percentile in seconds."""
        return float(np.percentile(self.samples, q))


def clock(step: Callable[[], object], device: torch.device) -> float:
    """Return the seconds from an idle device to an idle device."""
    _settle(device)
    start = time.perf_counter()
    step()
    _settle(device)
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
        warm.append(clock(step, device))
        spent += warm[-1]
        last = sorted(warm[-3:])
        stable = len(warm) >= 3 and last[-1] - last[0] <= STABLE * last[1]
        enough = len(warm) >= MAX_WARMUP or spent > max_seconds / 3
        if len(warm) >= min_warmup and (stable or enough):
            break
    count = max(3, min(steps, int((max_seconds - spent) / max(np.median(warm[-3:]), 1e-9))))
    if device.type != "cuda":
        return Timing([clock(step, device) for _ in range(count)], len(warm), stable)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    torch.cuda.synchronize(device)
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize(device)
    samples = [a.elapsed_time(b) / 1000 for a, b in itertools.pairwise(events)]
    return Timing(samples, len(warm), stable)


def step_shares(
    step: Callable[[], object], device: torch.device, objective: Any, optimizer: Any, repeats: int
) -> dict[str, float] | None:
    """Return the shares of forward, backward and optimizer in a step's time, in steps of their own.

    Medians over `repeats` steps, so that they add up to 1. The forward pass begins with the step; what a method does
    after the optimizer counts with it. None where the step hides its phases.
    """
    spent: dict[str, list[float]] = {}
    for _ in range(repeats):
        names: list[str] = []
        moments: list[Any] = []

        def enter(name: str, names: list[str] = names, moments: list[Any] = moments) -> None:
            names.append(name)
            moments.append(_moment(device))

        _settle(device)
        enter("forward")
        with phases(objective, optimizer, enter):
            step()
        enter("end")
        _settle(device)
        if set(names) != {*PHASES, "end"}:
            return None
        seconds = dict.fromkeys(PHASES, 0.0)
        for name, (begin, end) in zip(names, itertools.pairwise(moments), strict=False):
            seconds[name] += _between(begin, end)
        for name, value in seconds.items():
            spent.setdefault(name, []).append(value)
    medians = {name: float(np.median(values)) for name, values in spent.items()}
    total = sum(medians.values())
    return {SHARES[name]: value / total for name, value in medians.items()}


SHARES = {"forward": "forward", "backward": "backward", "step": "optimizer"}


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _moment(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(begin: Any, end: Any) -> float:
    """Return the seconds between two moments of `_moment`; on CUDA the second must have come."""
    return end - begin if isinstance(begin, float) else float(begin.elapsed_time(end)) / 1000


def best_of_windows(work: Callable[[], object], device: torch.device, windows: int = 5) -> float:
    """Return seconds per call: the best of `windows`, each of calls without waiting between them.

    A window holds as many calls as fill `WINDOW` seconds, one to ten.
    """
    for _ in range(2):
        work()
    times = min(10, math.ceil(WINDOW / clock(work, device)))
    found = []
    for _ in range(windows):
        _settle(device)
        begin = _moment(device)
        for _ in range(times):
            work()
        end = _moment(device)
        _settle(device)
        found.append(_between(begin, end) / times)
    return min(found)


@functools.cache
def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of large square matrix products on random data, measured once per process.

    The best of two sizes: which one a library is fastest at differs between chips and precisions.
    """
    rates = []
    for size in (4096, 8192) if device.type == "cuda" else (512, 1024):
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        out = torch.empty_like(a)
        rates.append(2 * size**3 / best_of_windows(functools.partial(torch.mm, a, b, out=out), device))
    return max(rates)


@functools.cache
def copy_bandwidth(device: torch.device) -> float:
    """Return the B/s of a large copy within the device, bytes read and bytes written, measured once per process."""
    size = 2**28 if device.type == "cuda" else 2**27
    source, target = (torch.empty(size, dtype=torch.uint8, device=device).fill_(i) for i in (1, 2))
    return 2 * size / best_of_windows(functools.partial(target.copy_, source), device)
