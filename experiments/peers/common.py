"""What the comparisons in this folder share: where a record was made, timing in alternating rounds, records and tables.

A record is one line of JSON: `header(...)` merged with what a script measured. Times are seconds, sizes bytes.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import itertools
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from peftbench import environment
from peftbench.profiling import timing
from peftbench.record import plain

SCHEMA = 1
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "triton", "accelerate")


def header(comparison: str, device: torch.device) -> dict[str, Any]:
    """Return what every record says of its origin: comparison, date, command, commit, versions and device."""
    found = environment.describe(device.type)
    return {
        "schema": SCHEMA,
        "comparison": comparison,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *_shown(sys.argv)]),
        "git_commit": found["git_commit"],
        "git_dirty": found["git_dirty"],
        "device": found["device_kind"] if device.type == "cuda" else found["cpu"] or "cpu",
        "device_type": device.type,
        "gpu": found["gpu"],
        "python": found["python"],
        "versions": {name: version for name in PACKAGES if (version := environment.version(name))},
    }


def _shown(arguments: Sequence[str]) -> list[str]:
    """Return a command's arguments with the script's path as seen from the folder it was started in."""
    script = Path(arguments[0])
    try:
        script = script.resolve().relative_to(Path.cwd())
    except ValueError:
        script = Path(script.name)
    return [str(script), *arguments[1:]]


def installed(package: str) -> bool:
    """Whether `package` is installed, without importing it."""
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def pick_device(name: str = "auto") -> torch.device:
    """Return the device called `name`; "auto" takes the GPU where there is one."""
    return torch.device(environment.pick_device(name))


def synchronize(device: torch.device) -> None:
    """Wait for the device's queue to be empty."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_calls(call: Callable[[], object], device: torch.device, count: int) -> list[float]:
    """Return the seconds of `count` calls in a row: between events on CUDA, on the clock elsewhere.

    The calls are queued without waiting for one another, so that gaps between launches count and host waits do not.
    """
    if device.type != "cuda":
        seconds = []
        for _ in range(count):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        return seconds
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    torch.cuda.synchronize(device)
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize(device)
    return [a.elapsed_time(b) / 1000 for a, b in itertools.pairwise(events)]


def alternate(
    contestants: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    rounds: int,
    calls: int,
    warmup: int = 1,
) -> dict[str, list[list[float]]]:
    """Time every contestant `calls` times in each of `rounds` rounds, A B C … A B C …; returns [rounds][calls] each.

    `warmup` calls before the timed ones of every turn bring clocks and caches back after the one before.
    """
    samples: dict[str, list[list[float]]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, call in contestants.items():
            for _ in range(warmup):
                call()
            samples[name].append(time_calls(call, device, calls))
    return samples


def peak_of(call: Callable[[], object], device: torch.device, count: int = 2) -> int | None:
    """Return the largest number of bytes allocated on the GPU during `count` calls; None without a GPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    for _ in range(count):
        call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def summary(rounds: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Return median, 10th and 90th percentile over all rounds' samples, each round's median, and the samples."""
    every = [s for samples in rounds for s in samples]
    low, middle, high = (float(q) for q in np.percentile(every, [10, 50, 90]))
    return {
        "p10": rounded(low),
        "p50": rounded(middle),
        "p90": rounded(high),
        "round_medians": [rounded(float(np.median(samples))) for samples in rounds],
        "samples": [[rounded(s) for s in samples] for samples in rounds],
    }


def rounded(value: float, digits: int = 5) -> float:
    """Return `value` with so many significant digits: more say nothing about a time."""
    return float(f"{value:.{digits}g}")


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Return what this device does at best, measured in this process: matrix products (FLOP/s) and copies (B/s)."""
    return {
        "matmul_flops_per_second": rounded(timing.matmul_ceiling(device, dtype)),
        "copy_bytes_per_second": rounded(timing.copy_bandwidth(device)),
    }


def append(path: str | Path | None, records: Iterable[Mapping[str, Any]]) -> None:
    """Add records to the file at `path`, one a line; nothing without a path."""
    if path is None:
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(plain(record), sort_keys=True, allow_nan=False) + "\n" for record in records)
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def read(paths: Iterable[str | Path]) -> list[dict[str, Any]]:
    """Return the records of files written by `append`, in order."""
    lines = (line for path in paths for line in Path(path).read_text(encoding="utf-8").splitlines())
    return [json.loads(line) for line in lines if line.strip()]


def table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table whose columns line up: the first to the left, the others to the right."""
    rows = [list(row) for row in rows]
    widths = [max(len(row[i]) for row in [list(headers), *rows]) for i in range(len(headers))]

    def line(cells: Sequence[str]) -> str:
        padded = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join([line(headers), line(rule), *(line(row) for row in rows)])


def shown(value: float | None, digits: int = 2) -> str:
    """Return a number for a table; a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}f}"


START = time.monotonic()


def say(line: str) -> None:
    """Print one line of progress with the seconds since the start; results go to stdout, this does not."""
    print(f"[{time.monotonic() - START:6.1f} s] {line}", file=sys.stderr, flush=True)
