"""Side by side or apart: do runs of different ranks, or of different methods, go in one pack, or in packs of their own?

    python experiments/packing/grouping.py --out results/packing/grouping.jsonl
    python experiments/packing/grouping.py --table results/packing/grouping.jsonl

Sixteen runs on MiniLM-L6, 32 texts of 64 tokens a run and step: in one pack (ranks padded to the largest, methods on
their own rows), against as many packs as there are ranks or methods, one after another. Each is timed in turn.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import optimizer
from optimizer import common

Grid = Mapping[str, Sequence[Any]]


@dataclasses.dataclass(frozen=True)
class Case:
    """Runs of a grid, and the setting whose values go in packs of their own when apart."""

    grid: Grid
    by: str

    @property
    def apart(self) -> list[Grid]:
        return [{**self.grid, self.by: [value]} for value in self.grid[self.by]]


SEEDS = range(4)
CASES = {
    "ranks 4, 8, 16, 32": Case({"method": ["lora"], "method.rank": [4, 8, 16, 32], "seed": SEEDS}, "method.rank"),
    "ranks 2, 8, 64, 256": Case({"method": ["lora"], "method.rank": [2, 8, 64, 256], "seed": SEEDS}, "method.rank"),
    "LoRA's kin": Case({"method": ["lora", "rslora", "lora_plus", "lora_fa"], "seed": SEEDS}, "method"),
    "four kinds": Case({"method": ["lora", "ia3", "houlsby", "bitfit"], "seed": SEEDS}, "method"),
    "16 methods": Case({"method": optimizer.MIXED, "seed": [0]}, "method"),
}


def measure(case: Case, execution: str, options: argparse.Namespace) -> dict[str, Any]:
    """Time one pack of all runs, and packs of those alike, in turns; return seconds of a step of all of them."""
    together: list[float] = []
    apart: list[float] = []
    for _ in range(options.rounds):
        together.append(optimizer.measure(case.grid, execution, options)["step_seconds"])
        apart.append(sum(optimizer.measure(grid, execution, options)["step_seconds"] for grid in case.apart))
    return {
        "packs_apart": len(case.apart),
        "together_seconds": common.rounded(min(together)),
        "apart_seconds": common.rounded(min(apart)),
        "gain": common.rounded(min(apart) / min(together)),
    }


def report(records: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of records."""
    rows = [
        (
            r["case"],
            r["execution"],
            common.shown(1000 * r["together_seconds"]),
            f"{common.shown(1000 * r['apart_seconds'])} in {r['packs_apart']} packs",
            common.shown(r["gain"]),
        )
        for r in records
    ]
    return common.table(("16 runs", "execution", "ms side by side", "ms apart", "gain"), rows)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="file that records are added to, one a line")
    parser.add_argument("--table", nargs="+", metavar="FILE", help="show the records of these files; measure nothing")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--execution", help="comma list of eager and graphs; both on a GPU, else eager")
    parser.add_argument("--model", default="minilm-l6", help="an encoder among conf/model/")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--length", type=int, default=64, help="tokens of a text")
    parser.add_argument(
        "--batch", type=int, default=optimizer.BATCH, help=f"texts a run and step, to {optimizer.BATCH}"
    )
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--calls", type=int, default=10, help="timed steps a turn")
    parser.add_argument("--rounds", type=int, default=2, help="turns; the fastest counts")
    return parser.parse_args(arguments, argparse.Namespace(optimizer="adamw"))


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Measure (or read), print the table and return the records."""
    options = parse(arguments)

    def found(execution: str) -> Iterator[dict[str, Any]]:
        for name in options.cases:
            yield {"case": name, **measure(CASES[name], execution, options)}

    return optimizer.kept("packing-grouping", options, found, report)


if __name__ == "__main__":
    main()
