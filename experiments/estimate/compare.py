"""How close predictions come: predicted against measured peak memory, whole and by component.

    python experiments/estimate/compare.py results/<sweep> ... [--out results/estimate/compare.jsonl] [--bar 0.1]

Reads the records of sweeps whose cost was measured (`runs/*.json`, else `records.jsonl.gz`), predicts each
configuration once from its spec alone, on whatever machine this runs, and prints both side by side in MiB. Exit code 1
if a peak is off by more than the bar.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftbench.errors import UserError
from peftbench.estimate import predict, setting_of
from peftbench.profiling.replay import COMPONENTS
from peftbench.record import RunSpec

MIB = 2**20


@dataclass(frozen=True)
class Task:
    """The shapes of a recorded run's task."""

    formulation: str
    num_labels: int
    num_tasks: int = 1
    task_classes: None = None


def records(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a sweep's folder.

    Raises:
        UserError: there are none.
    """
    paths = sorted((folder / "runs").glob("*.json"))
    kept = folder / "records.jsonl.gz"
    if paths:
        yield from (json.loads(path.read_text()) for path in paths)
    elif kept.is_file():
        with gzip.open(kept, "rt") as lines:
            yield from map(json.loads, lines)
    else:
        raise UserError(f"{folder}: no records; expected runs/*.json or records.jsonl.gz")


def measured(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Return one record of each configuration whose memory was measured."""
    found: dict[str, dict[str, Any]] = {}
    for folder in folders:
        for record in records(folder):
            cost = record["cost"] or {}
            if cost.get("memory"):
                found.setdefault(f"{cost['profile_id']} {cost['device_kind']}", record)
    return list(found.values())


def compared(record: dict[str, Any]) -> dict[str, Any]:
    """Return what was measured and what is predicted for one record, in bytes, and their ratio."""
    spec, cost = RunSpec.from_dict(record["spec"]), record["cost"]
    shapes = spec.identity["task"]
    task = Task(shapes["formulation"], shapes["num_labels"], shapes.get("tasks", 1))
    memory = cost["memory"]
    kind = "cuda" if memory["kind"] == "cuda" else "cpu"
    prediction = predict(setting_of(spec, task), kind)
    found = prediction.to_dict()
    return {
        "model": spec.model["name"],
        "method": spec.method["name"],
        "settings": {k: v for k, v in spec.method.items() if k not in ("name", "_target_")},
        "shape": cost["shape"],
        "precision": spec.train["precision"],
        "execution": cost.get("execution", "eager"),
        "device_kind": cost["device_kind"],
        "versions": record["environment"].get("versions"),
        "git_commit": record["environment"].get("git_commit"),
        "measured": {name: memory.get(name) for name in ("peak", *COMPONENTS)},
        "predicted": {name: found["memory"][name] for name in ("peak", *COMPONENTS)},
        "ratio": prediction.peak / memory["peak"],
        "checkpoint_equal": prediction.checkpoint_bytes == cost["checkpoint_bytes"],
        "flops_ratio": prediction.flops_per_token / cost["flops_per_token"] if cost.get("flops_per_token") else None,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the comparison as Markdown: predicted / measured in MiB."""
    headers = ["model", "method", "batch", "precision", "peak", "ratio", *COMPONENTS, "FLOPs"]
    lines = [" | ".join(headers), " | ".join("---" for _ in headers)]
    for row in rows:
        pairs = {
            name: f"{row['predicted'][name] / MIB:.1f} / "
            + ("–" if row["measured"][name] is None else f"{row['measured'][name] / MIB:.1f}")
            for name in row["predicted"]
        }
        shape = f"{row['shape']['batch_size']} × {row['shape']['length']}"
        cells = [row["model"], row["method"], shape, row["precision"], pairs["peak"], f"{row['ratio']:.3f}"]
        flops = "–" if row["flops_ratio"] is None else f"{row['flops_ratio']:.3f}"
        lines.append(" | ".join([*cells, *(pairs[name] for name in COMPONENTS), flops]))
    return "\n".join(f"| {line} |" for line in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="<results>/<sweep>")
    parser.add_argument("--out", type=Path, help="also write one json object a configuration")
    parser.add_argument("--bar", type=float, default=0.1, help="largest share that a peak may be off by")
    given = parser.parse_args(arguments)
    try:
        rows = [compared(record) for record in measured(given.folders)]
    except UserError as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    if not rows:
        print("compare: no record holds a measured peak", file=sys.stderr)
        return 2
    rows.sort(key=lambda row: (row["device_kind"], row["model"], row["method"], row["execution"]))
    print(table(rows))
    worst = max(rows, key=lambda row: abs(row["ratio"] - 1))
    off = [row for row in rows if abs(row["ratio"] - 1) > given.bar]
    print(f"\n{len(rows)} configurations, {len(rows) - len(off)} within {given.bar:.0%}; ", end="")
    print(f"furthest off: {worst['method']} on {worst['model']}, {worst['ratio']:.3f}")
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return 1 if off else 0


if __name__ == "__main__":
    sys.exit(main())
