"""How long is a report of a thousand runs? Makes up a folder of records and times `report` on it, part by part.

    OMP_NUM_THREADS=1 python experiments/report/thousand.py --folder /tmp/thousand
    OMP_NUM_THREADS=1 python experiments/report/thousand.py --folder /tmp/thousand --profile

20 methods, 5 tasks, 2 learning rates, 5 seeds, 600 test items and 1200 steps a run, some runs lost in each way. The
numbers are drawn at random: nothing can be learnt from the report itself.
"""

import argparse
import cProfile
import gzip
import json
import pstats
import time
from pathlib import Path

import numpy as np

METHODS = ("full", "head", *(f"made-up-{i:02}" for i in range(18)))
TASKS = ("cola", "mrpc", "rte", "sst2", "stsb")
COMPONENTS = ("weights", "adapter", "gradients", "optimizer", "activations", "workspace")
ITEMS, STEPS = 600, 1200


def record(method: str, task: str, rate: float, seed: int) -> dict[str, object]:
    """Return one made-up record with all that a real one holds."""
    place = METHODS.index(method)
    draw = np.random.default_rng((place, TASKS.index(task), int(rate * 1e6), seed))
    right = (draw.random(ITEMS) < 0.6 + 0.015 * place + 0.01 * draw.normal()).astype(float)
    share = draw.random()
    status = "diverged" if share < 0.01 else "failed" if share < 0.015 else "pruned" if share < 0.02 else "completed"
    loss = (np.exp(-np.arange(STEPS) / 300) + 0.1 * draw.random(STEPS)).round(6)
    peak = 200 * 2**20 + place * 2**22
    scores = {"accuracy": float(right.mean())}
    return {
        "schema_version": 1,
        "run_id": f"{method}-{task}-made-up-s{seed}-{int(rate * 1e6):012x}",
        "status": status,
        "error": {"failed": "ValueError: made up", "diverged": "gradient was no longer finite"}.get(status),
        "spec": {
            "model": {"name": "minilm-l6", "checkpoint": "made/up", "pooling": "mean"},
            "method": {"name": method, "_target_": "made.Up", **({"rank": 4 + 4 * (place % 3)} if place > 1 else {})},
            "task": {"name": task, "_target_": "made.Up", "max_length": 128},
            "train": {"learning_rate": rate, "epochs": 3.0, "batch_size": 32, "precision": "bf16"},
            "profile": {"enabled": True},
            "seed": seed,
            "protocol": "held_out",
            "device": "cpu",
            "identity": {"weights": "a" * 64, "data": task, "engine": 1, "method": 1, "device_kind": "cpu"},
        },
        "quality": {
            "primary_metric": "accuracy",
            "greater_is_better": True,
            "validation": scores,
            "test": scores,
            "selected_step": STEPS,
            "protocol": "held_out",
            "data_subset": False,
            "evaluations": [{"step": s, "metrics": scores} for s in (400, 800, 1200)],
            "items": {"test": {"scores": right.tolist(), "predictions": right.astype(int).tolist()}},
        }
        if status == "completed"
        else None,
        "trace": {"loss": loss.tolist(), "learning_rate": np.linspace(rate, 0, STEPS).round(9).tolist()},
        "cost": {
            "profile_id": f"p-{method}",
            "device_kind": "cpu",
            "adapter_parameters": 0 if method == "head" else 4000 * place + 1000,
            "head_parameters": 770,
            "trainable_parameters": 4000 * place + 1770,
            "total_parameters": 22_700_000,
            "checkpoint_bytes": 16_000 * place + 5000,
            "step_seconds": {"p10": 0.08, "p50": 0.09 + 0.001 * place, "p90": 0.1, "samples": [0.09] * 20},
            "tokens_per_second": 15_000.0,
            "energy_joules_per_1k_tokens": 0.9 + 0.01 * place,
            "memory": {"kind": "tracked_tensors", "peak": peak, "residual": 0, "peak_phase": "backward"}
            | {part: peak // len(COMPONENTS) for part in COMPONENTS},
            "shape": {"batch_size": 32, "length": 64},
        },
        "environment": {"git_commit": "0" * 40, "git_dirty": False, "python": "3.11", "device_kind": "cpu"},
    }


def make(folder: Path) -> int:
    """Write the records of the folder as a sweep keeps them; returns how many."""
    folder.mkdir(parents=True, exist_ok=True)
    all_of = [(m, t, r, s) for m in METHODS for t in TASKS for r in (1e-3, 3e-3) for s in range(5)]
    with gzip.open(folder / "records.jsonl.gz", "wt", encoding="utf-8", compresslevel=1) as lines:
        for one in all_of:
            lines.write(json.dumps(record(*one)) + "\n")
    return len(all_of)


def main() -> None:
    """Make the folder where it is not there, and time its report."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--folder", type=Path, required=True)
    options.add_argument("--profile", action="store_true", help="print where the time goes")
    given = options.parse_args()
    if not (given.folder / "records.jsonl.gz").exists():
        print(f"made up {make(given.folder)} runs in {given.folder}")
    began = time.perf_counter()
    from peftbench.analysis.report import write_report
    from peftbench.cli import vocabulary
    from peftbench.store import Store

    imported = time.perf_counter()
    records = Store(given.folder).records()
    defaults = vocabulary.defaults(records)
    read = time.perf_counter()
    profile = cProfile.Profile()
    if given.profile:
        profile.enable()
    write_report(records, given.folder, defaults)
    profile.disable()
    done = time.perf_counter()
    size = (given.folder / "report" / "index.html").stat().st_size
    print(
        f"{len(records)} runs: importing {imported - began:.1f} s, reading {read - imported:.1f} s, "
        f"writing {done - read:.1f} s, in all {done - began:.1f} s; index.html {size / 1e6:.1f} MB"
    )
    if given.profile:
        pstats.Stats(profile).sort_stats("cumtime").print_stats(45)


if __name__ == "__main__":
    main()
