"""What share of a step is the optimizer's: clipping, schedule and update of all runs of a pack?

    python experiments/packing/optimizer.py --out results/packing/optimizer.jsonl
    python experiments/packing/optimizer.py --table results/packing/optimizer.jsonl

LoRA alone, 16 × LoRA and 16 methods in one pack on MiniLM-L6, 32 texts of 64 tokens a run and step. On a GPU the
device's own clock is read before and after the optimizer's turn, inside replayed graphs too.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import sweeps  # noqa: F401  makes the other comparisons' modules known
import torch
from sweeps import common

from peftbench import registry, resolve
from peftbench.assembly import Assembly, Setting, assembled, free
from peftbench.engine.batches import PackedBatch, TokenTable
from peftbench.engine.stepping import stepper
from peftbench.record import RunSpec
from peftbench.tasks.base import Encoded

MIXED = (
    "lora", "rslora", "lora_plus", "lora_fa", "dora", "pissa", "adalora", "vera", "loha", "ia3", "ssf", "bitfit",
    "layernorm", "houlsby", "pfeiffer", "parallel",
)  # fmt: skip
"""The methods of `packing-mixed`."""
CASES: dict[str, dict[str, Sequence[Any]]] = {
    "1 lora": {"method": ["lora"]},
    "4 lora": {"method": ["lora"], "seed": range(4)},
    "16 lora": {"method": ["lora"], "seed": range(16)},
    "16 methods": {"method": MIXED},
}
"""Name → grid."""
ITEMS, BATCH = 512, 32
WARMUP = 5


class Clock:
    """Reads the device's clock (the host's on a CPU) at two marks around the optimizer's turn and around the step."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        if self.cuda:
            # external: their times can be read although a graph records them
            self.inside = [torch.cuda.Event(enable_timing=True, external=True) for _ in range(2)]
            self.outside = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        self.times: dict[int, float] = {}

    def mark(self, place: int) -> None:
        """Place 0 and 1 are around the optimizer's turn."""
        if self.cuda:
            self.inside[place].record()
        else:
            self.times[place] = time.perf_counter()

    def seconds(self, step: Callable[[], object]) -> tuple[float, float]:
        """Make a step; return the seconds of all of it and of the optimizer's turn."""
        begin = time.perf_counter()
        if not self.cuda:
            step()
            return time.perf_counter() - begin, self.times[1] - self.times[0]
        self.outside[0].record()
        step()
        self.outside[1].record()
        torch.cuda.synchronize()
        whole, turn = (pair[0].elapsed_time(pair[1]) / 1000 for pair in (self.outside, self.inside))
        return whole, turn


@contextmanager
def watched(optimizer: Any, clock: Clock) -> Iterator[None]:
    """Mark the begin and end of the optimizer's turn."""
    real = optimizer.step

    def step(losses: torch.Tensor) -> None:
        clock.mark(0)
        real(losses)
        clock.mark(1)

    optimizer.step = step
    try:
        yield
    finally:
        del optimizer.step


def texts(vocabulary: int, length: int) -> Encoded:
    """Return made-up texts of one length with two classes."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(5, vocabulary, (ITEMS, length)).tolist()
    return Encoded(input_ids=tokens, targets=generator.integers(0, 2, ITEMS).tolist())


def specs_of(
    grid: Mapping[str, Sequence[Any]], execution: str, options: argparse.Namespace, device: torch.device
) -> list[RunSpec]:
    """Return the runs of a grid on made-up texts of one length, a random MiniLM unless told otherwise."""
    settings: dict[str, Any] = {
        "model": options.model,
        "model.weights": "random",
        "model.tokenizer": "builtin",
        "task": "tiny",
        "profile": "skip",
        "train.precision": options.precision,
        "train.optimizer": options.optimizer,
        "train.max_length": options.length,
        "train.steps": 1000,
        "train.execution": execution,
        "train.learning_rate": 1e-4,
    }
    whole = {**{name: [value] for name, value in settings.items()}, **grid}
    return resolve.plan(resolve.demand(whole, None), device.type).specs


def measure(grid: Mapping[str, Sequence[Any]], execution: str, options: argparse.Namespace) -> dict[str, Any]:
    """Time the steps of a grid's runs in one pack and return the median seconds."""
    device = common.pick_device(options.device)
    specs = specs_of(grid, execution, options, device)
    with assembled(Setting.of(specs)) as assembly:
        found = steps(assembly, execution, options, device)
    free(device)
    return {"runs": len(specs), **found}


def steps(assembly: Assembly, execution: str, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Time the steps of an assembled pack."""
    runs = len(assembly.setting.specs)
    table = TokenTable(texts(int(assembly.backbone.model.config.vocab_size), options.length), 0, device)
    optimizer = assembly.optimizer([1000] * runs)
    clock = Clock(device)
    batch = batches(runs, options)
    with watched(optimizer, clock):
        make = stepper(execution, assembly.objective, optimizer, table)
        assembly.objective.train(True)
        for _ in range(WARMUP):
            make(batch())
        drawn = [batch() for _ in range(options.calls)]
        samples = [clock.seconds(partial(make, one)) for one in drawn]
        if make.execution != execution:
            raise RuntimeError(f"steps ran {make.execution}")
    whole, turn = (statistics.median(values) for values in zip(*samples, strict=True))
    return {
        "step_seconds": common.rounded(whole),
        "optimizer_seconds": common.rounded(turn),
        "share": common.rounded(turn / whole),
    }


def batches(runs: int, options: argparse.Namespace) -> Callable[[], PackedBatch]:
    """Return what draws a batch for each run."""
    order = [np.random.default_rng(run) for run in range(runs)]

    def batch() -> PackedBatch:
        items = np.stack([generator.permutation(ITEMS)[: min(BATCH, options.batch)] for generator in order])
        return PackedBatch(items, options.length, 0)

    return batch


def report(records: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of records."""
    rows = [
        (
            r["case"], r["execution"], r["optimizer"],
            common.shown(1000 * r["step_seconds"]), common.shown(1000 * r["optimizer_seconds"], 3),
            f"{100 * r['share']:.1f} %",
        )
        for r in records
    ]  # fmt: skip
    return common.table(("pack", "execution", "optimizer", "ms a step", "ms optimizer", "share"), rows)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    return checked(parser, arguments)


def checked(parser: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    """Return the options of a measurement of `CASES`."""
    parser.add_argument("--out", help="file that records are added to, one a line")
    parser.add_argument("--table", nargs="+", metavar="FILE", help="show the records of these files; measure nothing")
    parser.add_argument("--cases", default=",".join(CASES), help=f"comma list of {', '.join(CASES)}")
    parser.add_argument("--execution", help="comma list of eager and graphs; both on a GPU, else eager")
    parser.add_argument("--model", default="minilm-l6", help="an encoder among conf/model/")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--optimizer", default="adamw", help="comma list of adamw and adamw8bit")
    parser.add_argument("--length", type=int, default=64, help="tokens of a text")
    parser.add_argument("--batch", type=int, default=BATCH, help=f"texts a run and step, at most {BATCH}")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--calls", type=int, default=15, help="timed steps")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.cases.split(",")) - set(CASES))
    if unknown:
        parser.error(f"--cases {unknown[0]}: expected some of {', '.join(CASES)}")
    registry.section("model", options.model)
    return options


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Measure (or read), print the table and return the records."""
    options = parse(arguments)

    def found(execution: str) -> Iterator[dict[str, Any]]:
        for name in options.optimizer.split(","):
            chosen = argparse.Namespace(**{**vars(options), "optimizer": name})
            for case in options.cases.split(","):
                yield {"case": case, "optimizer": name, **measure(CASES[case], execution, chosen)}

    return kept("packing-optimizer", options, found, report)


def kept(
    comparison: str,
    options: argparse.Namespace,
    found: Callable[[str], Iterable[dict[str, Any]]],
    report: Callable[[Sequence[Mapping[str, Any]]], str],
) -> list[dict[str, Any]]:
    """Measure each way of running steps (or read), keep a record of each finding at once, print and return them."""
    if options.table:
        records = [r for r in common.read(options.table) if r.get("comparison") == comparison]
    else:
        device = common.pick_device(options.device)
        origin = {**common.header(comparison, device), "model": options.model, "length": options.length}
        ways = options.execution.split(",") if options.execution else ["eager", *["graphs"] * (device.type == "cuda")]
        records = []
        for execution in ways:
            for finding in found(execution):
                records.append({**origin, "execution": execution, **finding})
                common.append(options.out, records[-1:])
    print(f"{records[0]['device']}, {records[0]['model']} (random weights), {records[0]['date'][:10]}")
    print(report(records))
    return records


if __name__ == "__main__":
    main()
