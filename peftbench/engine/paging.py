"""Managed memory: CUDA moves its pages between GPU and host, so that what a step touches last gives way to activations.

Source: Dettmers et al. 2023 (QLoRA), arXiv:2305.14314, section 3, paged optimizers. Memory comes from the driver's
`cuMemAllocManaged` and goes back with the last tensor on it. Pages move on demand; nothing is fetched ahead.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from peftbench.errors import UserError

ATTACH_GLOBAL = 1
OUT_OF_MEMORY = 2

_live: dict[int, int] = {}
"""Bytes of each block in use, by address."""


@functools.cache
def _driver() -> Any:
    """Return the CUDA driver's library, or None where there is none."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


def check(setting: str, device: torch.device) -> None:
    """Raise UserError, which begins with `setting`, unless memory can be paged on `device`."""
    if device.type != "cuda":
        raise UserError(
            f"{setting}: pages between GPU and host memory; expected device=cuda, or a value without paged_"
        )
    if torch.version.cuda is None or _driver() is None:
        raise UserError(f"{setting}: needs NVIDIA's driver (libcuda.so.1); expected a value without paged_")


class Block:
    """Bytes of managed memory, in the form in which PyTorch takes CUDA memory from others; freed with its last tensor.

    Raises:
        torch.OutOfMemoryError: neither GPU nor host has that much.
    """

    def __init__(self, count: int) -> None:
        driver, pointer = _driver(), ctypes.c_uint64()
        code = driver.cuMemAllocManaged(ctypes.byref(pointer), ctypes.c_size_t(count), ctypes.c_uint(ATTACH_GLOBAL))
        if code == OUT_OF_MEMORY:
            raise torch.OutOfMemoryError(f"managed memory: {count} bytes are not to be had")
        if code:
            raise RuntimeError(f"managed memory: cuMemAllocManaged gave error {code} for {count} bytes")
        self.address = pointer.value
        # kept here, since a module's globals may be gone when the last tensor goes
        self._free, self._registry = driver.cuMemFree_v2, _live
        self._registry[self.address] = count
        self.__cuda_array_interface__ = {
            "shape": (count,),
            "typestr": "|u1",
            "data": (self.address, False),
            "strides": None,
            "version": 2,
        }

    def __del__(self) -> None:
        address = getattr(self, "address", None)
        if address is not None:
            self._registry.pop(address, None)
            self._free(ctypes.c_uint64(address))


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a tensor of zeros on the GPU `device` whose memory is managed.

    Raises:
        UserError: memory cannot be paged on `device`.
        torch.OutOfMemoryError: neither GPU nor host has that much.
    """
    check("paged optimizer state", device)
    count = math.prod(shape) * dtype.itemsize
    if count == 0:
        return torch.zeros(tuple(shape), dtype=dtype, device=device)
    with torch.cuda.device(device):
        # the driver allocates in the thread's current context, which this makes PyTorch's
        torch.cuda.synchronize(device)
        block = Block(count)
        tensor = torch.as_tensor(block, device=device)
    assert tensor.data_ptr() == block.address, "PyTorch copied managed memory"
    return tensor.view(dtype).view(tuple(shape)).zero_()


def managed_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of managed memory under `tensors`, each block once."""
    return sum(_live.get(address, 0) for address in {t.untyped_storage().data_ptr() for t in tensors})
