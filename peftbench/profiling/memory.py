"""Peak memory of training steps: the allocator's own peak on CUDA, live tensors tracked one by one elsewhere."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from peftbench.engine.paging import managed_bytes


class TensorTracker(TorchDispatchMode):
    """Counts the bytes of live tensor storages: those given at the start and all that operations create.

    Scratch space inside a kernel is not seen, as it is in the peak of a GPU's allocator.
    """

    def __init__(self, existing: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._seen: set[int] = set()
        for tensor in existing:
            self._track(tensor)

    def _track(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        self._seen.add(key)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_flatten(out)[0]:
            if isinstance(leaf, torch.Tensor):
                self._track(leaf)
        return out


def peak_memory(step: Callable[[], object], device: torch.device, existing: Iterable[torch.Tensor]) -> dict[str, Any]:
    """Return the peak over two warm steps: bytes, what they count, and what the process or allocator holds beside.

    `existing` are the tensors alive before a step (weights, adapter, optimizer state), needed where there is no
    allocator to ask, and for managed memory, which the allocator knows nothing of.
    """
    if device.type == "cuda":
        managed = managed_bytes(existing)
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        for _ in range(2):
            step()
        torch.cuda.synchronize(device)
        return {
            "kind": "cuda",
            "peak": torch.cuda.max_memory_allocated(device),
            "reserved": torch.cuda.max_memory_reserved(device),
            "managed": managed,
            "process_peak": None,
        }
    with TensorTracker(existing) as tracker:
        for _ in range(2):
            step()
    return {
        "kind": "tracked_tensors",
        "peak": tracker.peak,
        "reserved": None,
        "managed": None,
        "process_peak": process_peak(),
    }


def process_peak() -> int | None:
    """Return the process's largest resident size so far in bytes (all it ever held, libraries included)."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    line = next((x for x in status.read_text().splitlines() if x.startswith("VmHWM:")), None)
    return int(line.split()[1]) * 1024 if line else None
