"""Peak memory of training steps and what it consists of: the allocator's account on CUDA, tracked tensors elsewhere.

Two plain steps give the peak. One more, recorded, gives the components at the moment of its own peak (`replay`), so
that the two can be held against each other: what they differ by is the residual.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from peftbench.engine.paging import managed_bytes
from peftbench.profiling.nvml import Gpu
from peftbench.profiling.phases import phases
from peftbench.profiling.replay import COMPONENTS, PHASES, Alloc, Event, Free, Mark, Peak, replay

ROUNDING = 512
"""CUDA's caching allocator gives whole multiples of this many bytes."""


class Subject(Protocol):
    """What is measured: a training step's parts and the tensors that outlive it."""

    @property
    def objective(self) -> Any: ...

    @property
    def optimizer(self) -> Any: ...

    def persistent(self) -> Mapping[str, Iterable[torch.Tensor]]:
        """Yield the tensors alive between steps by component; a tensor belongs to the first that has its storage."""

    def gradients(self) -> Iterable[torch.Tensor]:
        """Yield the gradients there are now."""

    def flat_gradient(self) -> int:
        """Return the bytes of all packed gradients in one block."""


class TensorTracker(TorchDispatchMode):
    """Counts the bytes of live tensor storages: those given at the start and all that operations create.

    Scratch space inside a kernel is not seen, as it is in the peak of a GPU's allocator. `before` and `events` are what
    `replay` takes; a storage's address is that of its object, which no two have at a time.
    """

    def __init__(self, existing: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}
        self._watches: dict[int, weakref.finalize[Any, Any]] = {}
        self.events: list[Event] = []
        for tensor in existing:
            self._track(tensor)
        self.before = dict(self._sizes)
        self.events.clear()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for watch in self._watches.values():
            watch.detach()

    def mark(self, phase: str, gradients: Iterable[torch.Tensor] = ()) -> None:
        """Note that a phase begins, with the gradients there are."""
        self.events.append(Mark(phase, gradients=[address_of(g) for g in gradients]))

    def _track(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        size = storage.nbytes()
        self._sizes[key] = size
        self.events.append(Alloc(key, size))
        self.live += size
        self.peak = max(self.peak, self.live)
        self._watches[key] = weakref.finalize(storage, self._release, key)

    def _release(self, key: int) -> None:
        self.events.append(Free(key))
        self.live -= self._sizes.pop(key)
        del self._watches[key]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_flatten(out)[0]:
            if isinstance(leaf, torch.Tensor):
                self._track(leaf)
        return out


def address_of(tensor: torch.Tensor) -> int:
    """Return what tells the tensor's storage from all others alive."""
    return int(tensor.untyped_storage()._cdata)


def held(tensors: Iterable[torch.Tensor], device: torch.device) -> int:
    """Return the bytes in use now: all that the allocator gave on CUDA, the storages of `tensors` elsewhere."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return sum({address_of(t): t.untyped_storage().nbytes() for t in tensors}.values())


def memory_of(
    subject: Subject, step: Callable[[], object], device: torch.device, recorded: Callable[[], object]
) -> dict[str, Any]:
    """Return the peak over two warm steps, its components, and what the process or allocator holds beside.

    Args:
        step: a whole training step.
        recorded: the same, to be called while allocations are recorded.
    """
    every = [t for tensors in subject.persistent().values() for t in tensors]
    result: dict[str, Any]
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        for _ in range(2):
            step()
        torch.cuda.synchronize(device)
        gpu = Gpu.of(device)
        result = {
            "kind": "cuda",
            "peak": torch.cuda.max_memory_allocated(device),
            "reserved": torch.cuda.max_memory_reserved(device),
            "device_used": None if gpu is None else gpu.used_bytes(),
            "managed": managed_bytes(every),
            "process_peak": None,
        }
        found = recorded_cuda(subject, recorded, device)
    else:
        with TensorTracker(every) as tracker:
            for _ in range(2):
                step()
        result = {
            "kind": "tracked_tensors",
            "peak": tracker.peak,
            "reserved": None,
            "device_used": None,
            "managed": None,
            "process_peak": process_peak(),
        }
        found = recorded_tensors(subject, recorded, every)
    return {**result, **_described(found, result["peak"])}


def _described(found: Peak | None, peak: int) -> dict[str, Any]:
    """Return the fields that a recorded step gives; all null without one."""
    if found is None:
        return {**dict.fromkeys(COMPONENTS), "residual": None, "peak_phase": None, "phases": dict.fromkeys(PHASES)}
    return {
        **found.components,
        "residual": peak - found.bytes,
        "peak_phase": found.phase,
        "phases": {phase: found.phases[phase] for phase in PHASES},
    }


def recorded_tensors(subject: Subject, step: Callable[[], object], every: Iterable[torch.Tensor]) -> Peak | None:
    """Play the tracked tensors of one step again; None for a step that hides its phases."""
    known = _known(subject, address_of)
    with TensorTracker(every) as tracker:

        def enter(phase: str) -> None:
            tracker.mark(phase, subject.gradients() if phase == "step" else ())

        tracker.mark("forward")
        with phases(subject.objective, subject.optimizer, enter):
            step()
    return _replayed(tracker.before, known, tracker.events, subject.flat_gradient())


def recorded_cuda(subject: Subject, step: Callable[[], object], device: torch.device) -> Peak | None:
    """Play the allocator's history of one step again; None without one, or for a step that hides its phases."""
    if torch.cuda.memory.get_allocator_backend() != "native":
        return None
    known = _known(subject, lambda t: t.untyped_storage().data_ptr())
    marks: list[tuple[int, Mark]] = []
    torch.cuda.synchronize(device)
    torch.cuda.memory._record_memory_history("all", context=None, stacks="python", clear_history=True)
    try:

        def enter(phase: str) -> None:
            snapshot = torch.cuda.memory._snapshot(device)
            gradients = [g.untyped_storage().data_ptr() for g in subject.gradients()] if phase == "step" else []
            count = len(snapshot["device_traces"][_index(device)])
            marks.append((count, Mark(phase, blocks_of(snapshot, _index(device)), gradients)))

        enter("forward")
        with phases(subject.objective, subject.optimizer, enter):
            step()
        torch.cuda.synchronize(device)
        trace = torch.cuda.memory._snapshot(device)["device_traces"][_index(device)]
    finally:
        torch.cuda.memory._record_memory_history(None)
    events = events_of(trace[marks[0][0] :], [(at - marks[0][0], mark) for at, mark in marks])
    return _replayed(marks[0][1].sizes, known, events, subject.flat_gradient())


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def blocks_of(snapshot: Mapping[str, Any], device: int) -> dict[int, int]:
    """Return the size of each block in use in a snapshot of CUDA's allocator, by address.

    A block may be larger than what was asked for: the rest of a cached one below a certain size is not split off.
    """
    return {
        block["address"]: block["size"]
        for segment in snapshot["segments"]
        if segment["device"] == device
        for block in segment["blocks"]
        if block["state"] == "active_allocated"
    }


def events_of(trace: Iterable[Mapping[str, Any]], marks: Iterable[tuple[int, Mark]]) -> list[Event]:
    """Turn the history of CUDA's allocator into events, with each mark before the entry of its index."""
    pending = list(marks)
    events: list[Event] = []
    for i, entry in enumerate(trace):
        while pending and pending[0][0] <= i:
            events.append(pending.pop(0)[1])
        if entry["action"] == "alloc":
            events.append(Alloc(entry["addr"], -(-entry["size"] // ROUNDING) * ROUNDING))
        elif entry["action"] == "free_requested":
            events.append(Free(entry["addr"]))
    return [*events, *(mark for _, mark in pending)]


def _known(subject: Subject, address: Callable[[torch.Tensor], int]) -> dict[int, str]:
    known: dict[int, str] = {}
    for component, tensors in subject.persistent().items():
        for tensor in tensors:
            known.setdefault(address(tensor), component)
    return known


def _replayed(
    before: Mapping[int, int], known: Mapping[int, str], events: list[Event], flat_gradient: int
) -> Peak | None:
    """Replay unless the step hid its phases, as one that is launched as a whole does."""
    seen = {event.phase for event in events if isinstance(event, Mark)}
    return replay(before, known, events, flat_gradient) if seen == set(PHASES) else None


def process_peak() -> int | None:
    """Return the process's largest resident size so far in bytes (all it ever held, libraries included)."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    line = next((x for x in status.read_text().splitlines() if x.startswith("VmHWM:")), None)
    return int(line.split()[1]) * 1024 if line else None
