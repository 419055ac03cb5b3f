"""NVML through ctypes: the two figures of the GPU itself that PyTorch does not give."""

from __future__ import annotations

import ctypes
from typing import Any

import torch


class _Memory(ctypes.Structure):
    _fields_ = [(name, ctypes.c_ulonglong) for name in ("total", "free", "used")]


class Gpu:
    """One GPU as NVML knows it; `of` returns None where NVML or the GPU is not to be had."""

    def __init__(self, library: Any, handle: ctypes.c_void_p) -> None:
        self._library, self._handle = library, handle

    @classmethod
    def of(cls, device: torch.device) -> Gpu | None:
        if device.type != "cuda":
            return None
        try:
            library = ctypes.CDLL("libnvidia-ml.so.1")
        except OSError:
            return None
        handle = ctypes.c_void_p()
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()
        if library.nvmlInit_v2() or library.nvmlDeviceGetHandleByUUID(uuid, ctypes.byref(handle)):
            return None
        return cls(library, handle)

    def millijoules(self) -> int | None:
        """Return the total-energy counter; None where the GPU has none."""
        total = ctypes.c_ulonglong()
        failed = self._library.nvmlDeviceGetTotalEnergyConsumption(self._handle, ctypes.byref(total))
        return None if failed else total.value

    def used_bytes(self) -> int | None:
        """Return the memory in use on the whole GPU: contexts and libraries too, and whoever else is on it."""
        memory = _Memory()
        failed = self._library.nvmlDeviceGetMemoryInfo(self._handle, ctypes.byref(memory))
        return None if failed else memory.used
