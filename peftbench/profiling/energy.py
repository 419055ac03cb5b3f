"""Energy of training steps from the GPU's own counter (NVML); there is none elsewhere."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable

import torch


def energy_joules(step: Callable[[], object], device: torch.device, seconds: float) -> tuple[float, int] | None:
    """Return (joules, steps) over at least `seconds` of steps; None without a GPU or its counter, or for 0 seconds."""
    if device.type != "cuda" or seconds <= 0:
        return None
    read = _counter(device)
    if read is None:
        return None
    torch.cuda.synchronize(device)
    begin, start, steps = read(), time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        for _ in range(5):
            step()
        steps += 5
        torch.cuda.synchronize(device)
    return (read() - begin) / 1000, steps


def _counter(device: torch.device) -> Callable[[], int] | None:
    """Return a function that reads the total-energy counter in millijoules."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    handle = ctypes.c_void_p()
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()
    total = ctypes.c_ulonglong()
    failed = (
        nvml.nvmlInit_v2()
        or nvml.nvmlDeviceGetHandleByUUID(uuid, ctypes.byref(handle))
        or nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(total))
    )
    if failed:
        return None

    def read() -> int:
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(total))
        return total.value

    return read
