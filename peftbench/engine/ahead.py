"""Triton kernels compiled side by side, before the first step asks for them one after another.

A step asks for a kernel, waits a good part of a second until it is compiled, and goes on to the next: ten of them are
as long as hundreds of steps. So the first pack of a process rehearses: a forward and backward pass for each class of
lengths, in which kernels are handed to threads that compile them instead of being launched. What would have come of
them is whatever lies in memory; nobody looks at it, and nothing of it is kept. What was compiled by an earlier command
comes from Triton's cache, as it always does.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from peftbench.engine.batches import PackedBatch, TokenTable
from peftbench.engine.loop import parts_of
from peftbench.engine.objectives import Objective
from peftbench.engine.optimizer import PackedAdamW
from peftbench.kernels.backend import use_triton

MOST_THREADS = 8

_rehearsed = False


def rehearse(
    objective: Objective,
    optimizer: PackedAdamW,
    table: TokenTable,
    batches: Sequence[PackedBatch],
    *,
    accumulation: int = 1,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    running: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> None:
    """Compile the kernels that steps on `batches` launch, once in a process and on a GPU with Triton; else nothing.

    Parameters, optimizer, random streams and gradients are as they were afterwards.

    Args:
        running: the context that steps run in.

    Raises:
        torch.OutOfMemoryError: a step does not fit into memory.
    """
    global _rehearsed
    if _rehearsed or not batches or not use_triton(table.input_ids) or not table.input_ids.is_cuda:
        return
    _rehearsed = True
    # not every system says which cores are this process's
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = min(MOST_THREADS, cores)
    with ThreadPoolExecutor(threads, "compile") as pool, compiling_on(pool, table.device):
        passes(objective, optimizer, table, batches, accumulation=accumulation, autocast=autocast, running=running)


def passes(
    objective: Objective,
    optimizer: PackedAdamW,
    table: TokenTable,
    batches: Sequence[PackedBatch],
    *,
    accumulation: int,
    autocast: Callable[[], AbstractContextManager[object]],
    running: Callable[[], AbstractContextManager[object]],
) -> None:
    """Make a forward and backward pass for each class of lengths, and leave everything as it was."""
    devices = [table.device] if table.device.type == "cuda" else []
    noise = objective.noise
    objective.train(True)
    with torch.random.fork_rng(devices), running():
        for batch in of_each_class(batches):
            rows = table.gather(parts_of(batch.items, accumulation)[0], batch.length)
            with nullcontext() if noise is None else noise.drawing():
                with autocast():
                    losses = objective.loss_sum(rows)
                losses.sum().backward()
            optimizer.rehearse(losses.detach())
    objective.train(False)


def of_each_class(batches: Sequence[PackedBatch]) -> list[PackedBatch]:
    """Return a batch, the largest, of each class of lengths: kernels are made for lengths up to a power of two."""
    found: dict[int, PackedBatch] = {}
    for batch in batches:
        kind = (batch.length - 1).bit_length()
        if kind not in found or batch.items.size * batch.length > found[kind].items.size * found[kind].length:
            found[kind] = batch
    return list(found.values())


@contextmanager
def compiling_on(pool: Executor, device: torch.device) -> Iterator[dict[Hashable, Future[None]]]:
    """Within the context a Triton kernel is compiled by `pool` for what it is called with, instead of being launched.

    Gives what was asked for, and waits at the end. A kernel that cannot be compiled says so when it is launched.
    """
    from triton.runtime.jit import JITFunction

    launched = JITFunction.run
    asked: dict[Hashable, Future[None]] = {}

    def compile_one(kernel: Any, arguments: tuple[Any, ...], grid: Any, options: dict[str, Any]) -> None:
        with torch.cuda.device(device if device.type == "cuda" else -1):
            launched(kernel, *arguments, grid=grid, warmup=True, **options)

    def run(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kinds = [_kind(value, p.do_not_specialize) for p, value in zip(self.params, arguments, strict=False)]
        key = (self, *kinds, *sorted(options.items()))
        if key not in asked:
            asked[key] = pool.submit(compile_one, self, arguments, grid, options)

    JITFunction.run = run
    try:
        yield asked
    finally:
        JITFunction.run = launched
        for future in asked.values():
            with contextlib.suppress(Exception):
                future.result()


def _kind(value: Any, any_number: bool) -> Hashable:
    """Return what of an argument a kernel is compiled for, as Triton's documentation of specialization has it."""
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if isinstance(value, int) and not isinstance(value, bool):
        wide = value.bit_length() > 31
        return (wide,) if any_number else (wide, value == 1, value % 16 == 0)
    return type(value).__name__ if isinstance(value, float) else str(value)
