"""How fast do 4-bit weights become dense, against a plain copy and against bitsandbytes?

    python experiments/peers/dequantize.py --out results/peers/dequantize.jsonl
    python experiments/peers/dequantize.py --sweep --sizes 4096x4096,4096x14336

A weight is read (codes, scales) and written once, so a copy of as many bytes is the best there is. On a GPU each
contestant is a CUDA graph of calls on buffer after buffer, several times as large together as the second-level cache,
so neither launching nor a warm cache is measured; graphs take turns, the copy of a large block among them. The table
says how many bytes had to move, over the time taken, as a share of the copy's; and bitsandbytes' time over ours.
Codes and scales are random; that every contestant restores the same bits is checked first.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

import common
import numpy as np
import torch
from torch import Tensor

from peftbench.kernels import nf4
from peftbench.kernels.backend import use_triton
from peftbench.kernels.blockwise import BLOCK, DYNAMIC_BLOCK
from peftbench.models.quantized import Packed, Scheme, backend

SIZES = "576x1536,2048x2048,2048x8192,4096x4096,4096x14336,8192x28672"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CACHES = 4
"""Buffers that take turns are together at least so many times as large as the second-level cache."""

COPY = 2**30
"""Bytes of the block whose copy sets the bar."""

SWEEP = [(256, 4), (512, 4), (1024, 4), (1024, 8), (2048, 8)]
"""Rows and warps; see `peftbench.kernels.nf4_triton.Config`."""

Restore = Callable[[Packed], Tensor]


def random_weight(shape: tuple[int, int], double: bool, device: torch.device) -> Packed:
    """Return a packed weight of `shape` with random codes and scales."""
    count = shape[0] * shape[1]
    blocks = -(-count // BLOCK)
    codes = torch.randint(0, 256, (-(-count // 2),), dtype=torch.uint8, device=device)
    if not double:
        return {"codes": codes, "absmax": torch.rand(blocks, device=device)}
    return {
        "codes": codes,
        "absmax": torch.randint(0, 256, (blocks,), dtype=torch.uint8, device=device),
        "scale": torch.rand(-(-blocks // DYNAMIC_BLOCK), device=device),
        "offset": torch.rand((), device=device),
    }


def moved_bytes(packed: Packed, shape: tuple[int, int], dtype: torch.dtype) -> int:
    """Return the fewest bytes to read and write: every part once, and the result."""
    return sum(t.numel() * t.element_size() for t in packed.values()) + shape[0] * shape[1] * dtype.itemsize


def contestants(
    scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, sweep: bool
) -> dict[str, Restore]:
    """Return by name what restores a weight: ours as the product does it, bitsandbytes', with `sweep` ours cut anew."""
    size = torch.Size(shape)

    def through(name: str) -> Restore:
        return lambda packed: backend(name).unpack(packed, scheme, size, dtype)

    found = {"ours": through("own")}
    if common.installed("bitsandbytes"):
        found["bitsandbytes"] = through("bitsandbytes")
    if sweep and use_triton(torch.empty(0, device=device)):
        from peftbench.kernels.nf4_triton import Config, dequantize

        def cut(packed: Packed, config: Config) -> Tensor:
            scale, offset = packed.get("scale"), packed.get("offset")
            return dequantize(packed["codes"], packed["absmax"], scale, offset, scheme.kind, shape, dtype, config)

        for rows, warps in SWEEP:
            name = f"ours {rows}/{warps}"
            found[name] = functools.partial(cut, config=Config(rows, warps))
    return found


def graph_of(calls: list[Callable[[], Tensor]], device: torch.device) -> Callable[[], object]:
    """Return what makes all calls in turn, each into memory of its own: on a GPU the replay of a graph."""
    if device.type != "cuda":
        return lambda: [call() for call in calls]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]
    return functools.partial(_replay, graph, kept)


def _replay(graph: Any, kept: list[Tensor]) -> None:
    graph.replay()


def copy_call(device: torch.device) -> tuple[Callable[[], object], int]:
    """Return a copy of a large block of random bytes, and the bytes that it reads and writes."""
    size = COPY if device.type == "cuda" else 2**24
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2 * size


def compare(
    shape: tuple[int, int], scheme: Scheme, dtype: torch.dtype, device: torch.device, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Return a record for each contestant at one size."""
    first = random_weight(shape, scheme.double, device)
    moved = moved_bytes(first, shape, dtype)
    buffers = 1
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        buffers = max(2, -(-CACHES * cache // moved))
    weights = [first, *(random_weight(shape, scheme.double, device) for _ in range(buffers - 1))]
    entrants = contestants(scheme, shape, dtype, device, options.sweep)
    want = nf4.reference(
        first["codes"], first["absmax"], first.get("scale"), first.get("offset"), scheme.kind, shape, dtype
    )
    equal = {name: torch.equal(restore(first), want) for name, restore in entrants.items()}
    del want

    copy, copied = copy_call(device)
    calls = {"copy": copy} | {
        name: graph_of([functools.partial(restore, w) for w in weights], device) for name, restore in entrants.items()
    }
    samples = common.alternate(calls, device, rounds=options.rounds, calls=options.calls)
    copy_rate = copied / float(np.median(samples.pop("copy")))
    times = {name: common.summary([[s / buffers for s in part] for part in rounds]) for name, rounds in samples.items()}
    records = []
    for name, seconds in times.items():
        rate = moved / seconds["p50"]
        peer = times.get("bitsandbytes")
        records.append(
            common.header("dequantize", device)
            | {
                "contestant": name,
                "shape": list(shape),
                "dtype": str(dtype).removeprefix("torch."),
                "kind": scheme.kind,
                "double": scheme.double,
                "graph": device.type == "cuda",
                "buffers": buffers,
                "moved_bytes": moved,
                "seconds": seconds,
                "bytes_per_second": common.rounded(rate),
                "copy_bytes_per_second": common.rounded(copy_rate),
                "share_of_copy": common.rounded(rate / copy_rate),
                "bitsandbytes_over_this": common.rounded(peer["p50"] / seconds["p50"]) if peer else None,
                "equal_to_reference": equal[name],
            }
        )
    return records


def report(records: list[dict[str, Any]]) -> str:
    """Return the table of records: one line for each size and contestant."""
    headers = ("weight", "contestant", "µs", "GB/s", "copy GB/s", "share of copy", "bitsandbytes / this", "same bits")
    rows = [
        (
            "x".join(map(str, r["shape"])),
            r["contestant"],
            common.shown(1e6 * r["seconds"]["p50"]),
            common.shown(r["bytes_per_second"] / 1e9, 0),
            common.shown(r["copy_bytes_per_second"] / 1e9, 0),
            common.shown(r["share_of_copy"]),
            common.shown(r["bitsandbytes_over_this"]),
            "yes" if r["equal_to_reference"] else "NO",
        )
        for r in records
    ]
    return common.table(headers, rows)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="file that records are added to, one a line")
    parser.add_argument("--sizes", default=SIZES, help="rows x columns of the weights, with commas between")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the dense weights")
    parser.add_argument("--kind", choices=("nf4", "fp4"), default="nf4")
    parser.add_argument("--single", action="store_true", help="scales in fp32 instead of 8 bits")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contestant")
    parser.add_argument("--calls", type=int, default=10, help="timed graphs, or calls, a turn")
    parser.add_argument("--sweep", action="store_true", help="also ways to cut the kernel's work")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Measure, print the table, write the records and return them."""
    options = parse(arguments)
    device = common.pick_device(options.device)
    scheme, records = Scheme(options.kind, not options.single), []
    torch.manual_seed(0)
    for size in options.sizes.split(","):
        rows, columns = (int(n) for n in size.split("x"))
        common.say(f"{rows} x {columns}")
        records += compare((rows, columns), scheme, DTYPES[options.dtype], device, options)
    print(report(records))
    common.append(options.out, records)
    return records


if __name__ == "__main__":
    main()
