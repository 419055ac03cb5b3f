"""Timelines and allocator histories of a few steps, for looking at: Perfetto and pytorch.org/memory_viz read them."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from peftbench.profiling.phases import phases


@contextlib.contextmanager
def _recording(activities: Sequence[ProfilerActivity]) -> Iterator[profile]:
    # the library behind it says on stderr when it starts and stops, whatever happens; it reads this at its first use
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    with warnings.catch_warnings():
        # older PyTorch says this of a single cycle too; the remedy it names, acc_events, makes an object of every event
        # at the end, which takes seconds for a step
        warnings.filterwarnings("ignore", "Warning: Profiler clears events")
        with profile(activities=activities) as recorded:
            yield recorded


def kernels_per_step(step: Callable[[], object], device: torch.device) -> int | None:
    """Return how many kernels one step launches on the GPU; None without one, or where they cannot be traced."""
    if device.type != "cuda":
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        with _recording([ProfilerActivity.CUDA]) as recorded:
            step()
            torch.cuda.synchronize(device)
        recorded.export_chrome_trace(str(path))
        return count_kernels(json.loads(path.read_bytes())) or None


def count_kernels(trace: dict[str, Any]) -> int:
    """Return the number of kernels in a Chrome trace of PyTorch's; copies and fills by the driver are not kernels."""
    return sum(event.get("cat") == "kernel" for event in trace["traceEvents"])


def write_timeline(
    path: Path, step: Callable[[], object], device: torch.device, objective: Any, optimizer: Any, steps: int = 3
) -> None:
    """Write a gzipped Chrome trace of `steps` steps with ranges forward, backward and optimizer in each.

    Raises:
        OSError: it cannot be written whole.
    """
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with _recording(activities) as recorded:
        for i in range(steps):
            with record_function(f"training step {i + 1}"), _ranges(objective, optimizer):
                step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    plain = path.with_suffix("")
    recorded.export_chrome_trace(str(plain))
    try:
        # the writer does not complain of a full disk: what it left must at least be whole
        content = plain.read_bytes()
        try:
            json.loads(content)
        except ValueError as error:
            raise OSError(28, "the trace was cut short: no space left on the disk?") from error
        path.write_bytes(gzip.compress(content, 5, mtime=0))
    finally:
        plain.unlink(missing_ok=True)


@contextlib.contextmanager
def _ranges(objective: Any, optimizer: Any) -> Iterator[None]:
    """Open a named range in the timeline for each phase."""
    with contextlib.ExitStack() as current:

        def begin(name: str) -> None:
            current.close()
            current.enter_context(record_function(name))

        def enter(phase: str) -> None:
            # the backward pass announces itself from another thread: its range begins where the loss is known
            if phase != "backward":
                begin("optimizer" if phase == "step" else phase)

        with phases(objective, optimizer, enter, lambda: begin("backward")):
            yield


def write_allocations(path: Path, step: Callable[[], object], device: torch.device) -> None:
    """Write the CUDA allocator's history of one step, with the stack of each allocation.

    Raises:
        OSError: it cannot be written.
    """
    torch.cuda.synchronize(device)
    torch.cuda.memory._record_memory_history("all", context="alloc", stacks="python", clear_history=True)
    try:
        step()
        torch.cuda.synchronize(device)
        torch.cuda.memory._dump_snapshot(str(path))
    finally:
        torch.cuda.memory._record_memory_history(None)
