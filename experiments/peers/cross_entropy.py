"""What do the loss over a large vocabulary and its gradient cost when logits are never all in memory?

    python experiments/peers/cross_entropy.py --out results/peers/cross_entropy.jsonl
    python experiments/peers/cross_entropy.py --sweep --sizes 8192x2048x128256
    python experiments/peers/cross_entropy.py --weight-trains --sizes 8192x2048x128256

From hidden states to their gradient (with `--weight-trains`, also the output layer's, which is then kept in fp32 under
autocast), mean loss over all rows, forward and backward; contestants take turns. `plain` does as the language models of
`transformers` do: all logits, in fp32 as well, `cross_entropy` on them. `products` are the two (three) matrix products
alone, with all logits in memory: what is left when the loss itself costs nothing. Memory is the peak above what inputs
take. Errors are those of the first rows' gradient against float64, over the norm of it.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import common
import torch
from torch import Tensor
from torch.nn import functional as F

from peftbench.kernels.backend import use_triton
from peftbench.kernels.cross_entropy import chunk_rows, linear_cross_entropy

SIZES = "8192x2048x128256,8192x576x49152,4096x4096x128256,2048x576x49152"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CHECKED = 256
"""Rows whose gradient is held against float64."""

CHUNKS = (256, 512, 1024, 2048, 4096, 8192)
CUTS = ((2048, 4), (4096, 8), (8192, 8), (8192, 16), (16384, 16), (16384, 32))
"""Logits at a time and warps of the kernel's programs, for `--sweep`."""

Step = Callable[[], tuple[Tensor, ...]]


class Problem:
    """Random hidden states, output layer and labels of one size."""

    def __init__(
        self, size: tuple[int, int, int], dtype: torch.dtype, device: torch.device, weight_trains: bool
    ) -> None:
        rows, width, vocabulary = size
        self.dtype, self.device = dtype, device
        self.hidden = torch.randn(rows, width, device=device, dtype=dtype).requires_grad_()
        kept = torch.float32 if weight_trains else dtype
        self.weight = torch.randn(vocabulary, width, device=device, dtype=kept).mul_(2 * width**-0.5)
        self.weight.requires_grad_(weight_trains)
        self.labels = torch.randint(0, vocabulary, (rows,), device=device)
        self.trained = (self.hidden, self.weight) if weight_trains else (self.hidden,)

    def autocast(self) -> torch.autocast:
        """Return the precision context of the forward pass."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.weight.dtype != self.dtype)

    def gradients(self, loss: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        """Return what `loss()` and its backward pass give: the loss, and gradients of hidden states and weight."""
        with self.autocast():
            value = loss()
        return value.detach(), *torch.autograd.grad(value, self.trained)

    def exact(self) -> Tensor:
        """Return the gradient of the first rows' hidden states in float64."""
        x, total = self.hidden[:CHECKED].detach().double(), len(self.hidden)
        weight = self.weight.detach().to(self.dtype).double()
        probabilities = (x @ weight.t()).softmax(1)
        probabilities[torch.arange(len(x)), self.labels[:CHECKED]] -= 1
        return probabilities @ weight / total


def plain(problem: Problem) -> Tensor:
    """Return the mean loss made of all logits, in fp32."""
    logits = F.linear(problem.hidden, problem.weight).float()
    return F.cross_entropy(logits, problem.labels, ignore_index=-100)


def ours(problem: Problem, chunk: int | None = None) -> Tensor:
    """Return the mean loss made chunk by chunk."""
    total = linear_cross_entropy(problem.hidden, problem.weight, problem.labels, groups=1, chunk=chunk)
    return total[0] / len(problem.labels)


def products(problem: Problem) -> tuple[Tensor, ...]:
    """Return the matrix products alone: logits, and what stands for gradients."""
    hidden, weight = (t.detach().to(problem.dtype) for t in (problem.hidden, problem.weight))
    logits = hidden @ weight.t()
    made = (logits[0, 0], logits @ weight)
    return (*made, (logits.t() @ hidden).float()) if problem.weight.requires_grad else made


@contextmanager
def cut(block: int, warps: int) -> Iterator[None]:
    """Let the kernel's programs hold `block` logits at a time, with so many warps."""
    from peftbench.kernels import cross_entropy_triton as kernel

    before = kernel.BLOCK, kernel.WARPS
    kernel.BLOCK, kernel.WARPS = block, warps
    try:
        yield
    finally:
        kernel.BLOCK, kernel.WARPS = before


def cut_step(problem: Problem, block: int, warps: int) -> tuple[Tensor, ...]:
    """Return a step of ours with the kernel cut otherwise."""
    with cut(block, warps):
        return problem.gradients(lambda: ours(problem))


def contestants(problem: Problem, sweep: bool) -> dict[str, Step]:
    """Return by name what makes one forward and backward pass."""
    steps: dict[str, Step] = {
        "plain": functools.partial(problem.gradients, lambda: plain(problem)),
        "ours": functools.partial(problem.gradients, lambda: ours(problem)),
        "products": functools.partial(products, problem),
    }
    if sweep:
        for chunk in (c for c in CHUNKS if c <= len(problem.labels)):
            steps[f"ours, {chunk} rows"] = functools.partial(problem.gradients, functools.partial(ours, problem, chunk))
        if use_triton(problem.hidden):
            for block, warps in CUTS:
                steps[f"ours, {block}/{warps}"] = functools.partial(cut_step, problem, block, warps)
    return steps


def compare(
    size: tuple[int, int, int], dtype: torch.dtype, device: torch.device, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Return a record for each contestant at one size."""
    problem = Problem(size, dtype, device, options.weight_trains)
    steps = contestants(problem, options.sweep)
    exact = problem.exact()
    errors: dict[str, float | None] = {}
    losses: dict[str, float | None] = {}
    peaks: dict[str, int | None] = {}
    for name, step in steps.items():
        before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        peak = common.peak_of(step, device)
        peaks[name] = None if peak is None else peak - before
        loss, gradient = step()[:2]
        errors[name] = losses[name] = None
        if name != "products":
            errors[name] = float((gradient[:CHECKED].double() - exact).norm() / exact.norm())
            losses[name] = float(loss)
        del loss, gradient
    samples = common.alternate(steps, device, rounds=options.rounds, calls=options.calls)
    times = {name: common.summary(rounds) for name, rounds in samples.items()}
    shared = common.header("cross_entropy", device) | {
        "rows": size[0],
        "width": size[1],
        "vocabulary": size[2],
        "dtype": str(dtype).removeprefix("torch."),
        "weight_trains": options.weight_trains,
        "triton": use_triton(problem.hidden),
        "chunk_rows": chunk_rows(size[0], size[2], dtype.itemsize),
    }
    return [
        shared
        | {
            "contestant": name,
            "seconds": seconds,
            "over_plain": common.rounded(seconds["p50"] / times["plain"]["p50"]),
            "peak_bytes": peaks[name],
            "loss": losses[name],
            "gradient_error": None if errors[name] is None else common.rounded(errors[name], 3),
        }
        for name, seconds in times.items()
    ]


def report(records: list[dict[str, Any]]) -> str:
    """Return the table of records: one line for each size and contestant."""
    headers = ("rows x width x vocabulary", "contestant", "ms", "over plain", "peak MiB", "loss", "gradient's error")
    rows = [
        (
            f"{r['rows']}x{r['width']}x{r['vocabulary']}",
            r["contestant"],
            common.shown(1e3 * r["seconds"]["p50"]),
            common.shown(r["over_plain"]),
            common.shown(None if r["peak_bytes"] is None else r["peak_bytes"] / 2**20, 0),
            common.shown(r["loss"], 4),
            "–" if r["gradient_error"] is None else f"{r['gradient_error']:.1e}",
        )
        for r in records
    ]
    return common.table(headers, rows)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="file that records are added to, one a line")
    parser.add_argument("--sizes", default=SIZES, help="rows x width x vocabulary, with commas between")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of hidden states and products")
    parser.add_argument("--weight-trains", action="store_true", help="also the output layer's gradient, in fp32")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contestant")
    parser.add_argument("--calls", type=int, default=5, help="timed passes a turn")
    parser.add_argument("--sweep", action="store_true", help="also other chunks and ways to cut the kernel's work")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Measure, print the table, write the records and return them."""
    options = parse(arguments)
    device = common.pick_device(options.device)
    records = []
    torch.manual_seed(0)
    for size in options.sizes.split(","):
        rows, width, vocabulary = (int(n) for n in size.split("x"))
        common.say(f"{rows} rows, width {width}, vocabulary {vocabulary}")
        records += compare((rows, width, vocabulary), DTYPES[options.dtype], device, options)
    print(report(records))
    common.append(options.out, records)
    return records


if __name__ == "__main__":
    main()
