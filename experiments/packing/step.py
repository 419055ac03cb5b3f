"""What does a device do during a step of a pack, and what would it take at least?

    python experiments/packing/step.py --out results/packing/step.jsonl
    python experiments/packing/step.py --table results/packing/step.jsonl

LoRA alone, 16 × LoRA and 16 methods in one pack on MiniLM-L6, 32 texts a run and step. PyTorch's profiler times every
kernel of replayed steps; kernels are put together by what they do. Beside them stand two times that no step of these
products and these saved tensors can go below: its products at the rate of a large product, and what the backward pass
needs, written once and read once, at the rate of a large copy, both measured in the same call.
"""

from __future__ import annotations

import argparse
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import optimizer as turns
import torch
from sweeps import common
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from peftbench.assembly import Setting, assembled, free
from peftbench.engine.batches import TokenTable
from peftbench.engine.stepping import stepper

KINDS = {
    "attention": r"attention|fmha|flash|sdpa",
    "products": r"gemm|gemv|nvjet|xmma|cutlass|wgmma|splitk|cublas|addmm|bmm|::mm\b|_mm\b|low_rank",
    "normalization": r"layer_?norm|rms_?norm|residual_norm",
    "dropout": r"dropout|bernoulli",
    "optimizer": r"multi_tensor|foreach|adam",
    "copies": r"memcpy|memset|copy|catarray|::cat\b|fill",
    "elementwise": r"elementwise|gelu|tanh|::add|::mul|vectorized",
    "reductions": r"reduce|softmax|::sum|norm",
}
"""What kernels do → what their names hold; the first that matches counts."""
OTHER = "other"
SHOWN = 12
"""Kernels a record names."""


def kind_of(name: str) -> str:
    """Return what the kernel of this name does."""
    return next((kind for kind, held in KINDS.items() if re.search(held, name.lower())), OTHER)


def busy(intervals: Sequence[tuple[float, float]]) -> float:
    """Return how long at least one of the intervals lasts."""
    total, end = 0.0, float("-inf")
    for begin, until in sorted(intervals):
        total += max(0.0, until - max(begin, end))
        end = max(end, until)
    return total


def profiled(step: Callable[[], object], steps: int, device: torch.device) -> dict[str, Any]:
    """Return the kernels' seconds a step, by kind and the longest by name, and how long the device was busy."""
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as recorded:
        for _ in range(steps):
            step()
        common.synchronize(device)
    kinds: Counter[str] = Counter()
    names: Counter[str] = Counter()
    intervals, launched = [], 0
    for event in recorded.events():
        if (event.device_type == torch.autograd.DeviceType.CUDA) != cuda:
            continue
        seconds = (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6 / steps
        kinds[kind_of(event.name)] += seconds
        names[event.name[:100]] += seconds
        intervals.append((event.time_range.start / 1e6, event.time_range.end / 1e6))
        launched += 1
    return {
        "kernel_seconds": {kind: common.rounded(seconds) for kind, seconds in kinds.most_common()},
        "longest": {name: common.rounded(seconds) for name, seconds in names.most_common(SHOWN)},
        "kernels": launched / steps,
        "busy_seconds": common.rounded(busy(intervals) / steps),
    }


def least(step: Callable[[], object], parameters: set[int]) -> dict[str, int]:
    """Return the operations of an eager step's products, and the bytes that its forward pass saves for the backward."""
    kept: dict[int, int] = {}

    def saved(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with FlopCounterMode(display=False) as counter, saved_tensors_hooks(saved, lambda tensor: tensor):
        step()
    return {"flops": counter.get_total_flops(), "saved_bytes": sum(kept.values())}


def measure(
    grid: Mapping[str, Sequence[Any]], execution: str, options: argparse.Namespace, reached: Mapping[str, float]
) -> dict[str, Any]:
    """Profile the steps of a grid's runs in one pack."""
    device = common.pick_device(options.device)
    specs = turns.specs_of(grid, execution, options, device)
    with assembled(Setting.of(specs)) as assembly:
        model = assembly.backbone.model
        table = TokenTable(turns.texts(int(model.config.vocab_size), options.length), 0, device)
        optimizer = assembly.optimizer([1000] * len(specs))
        batch = turns.batches(len(specs), options)
        assembly.objective.train(True)
        eager = stepper("eager", assembly.objective, optimizer, table)
        eager(batch())
        tensors = (*model.parameters(), *model.buffers())
        found = least(lambda: eager(batch()), {t.untyped_storage().data_ptr() for t in tensors})
        make = stepper(execution, assembly.objective, optimizer, table)
        for _ in range(turns.WARMUP):
            make(batch())
        seconds = statistics.median(common.time_calls(lambda: make(batch()), device, options.calls))
        found |= profiled(lambda: make(batch()), options.calls, device)
        if make.execution != execution:
            raise RuntimeError(f"steps ran {make.execution}")
    free(device)
    return {
        "runs": len(specs),
        "step_seconds": common.rounded(seconds),
        **found,
        "products_at_least": common.rounded(found["flops"] / reached["matmul_flops_per_second"]),
        "memory_at_least": common.rounded(2 * found["saved_bytes"] / reached["copy_bytes_per_second"]),
        **reached,
    }


def report(records: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of records, in ms a step."""
    kinds = [*KINDS, OTHER]
    rows = [
        (
            f"{r['case']}, {r['length']} tokens", r["execution"],
            *(common.shown(1000 * r[name]) for name in ("step_seconds", "busy_seconds")),
            *(common.shown(1000 * r["kernel_seconds"].get(kind, 0.0)) for kind in kinds),
            *(common.shown(1000 * r[name]) for name in ("products_at_least", "memory_at_least")),
        )
        for r in records
    ]  # fmt: skip
    return common.table(("pack", "execution", "step", "busy", *kinds, "products ≥", "memory ≥"), rows)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    return turns.checked(parser, arguments)


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Profile (or read), print the table and return the records."""
    options = parse(arguments)
    reached: dict[str, float] = {}

    def found(execution: str) -> Iterator[dict[str, Any]]:
        if not reached:
            dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
            reached.update(common.ceilings(common.pick_device(options.device), dtype))
        for case in options.cases.split(","):
            yield {"case": case, **measure(turns.CASES[case], execution, options, reached)}

    return turns.kept("packing-step", options, found, report)


if __name__ == "__main__":
    main()
