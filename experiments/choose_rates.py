"""Write `experiments/<name>/experiment.yaml`: several seeds at the learning rate that seed 0 found best.

    python experiments/choose_rates.py glue-minilm --seeds 5
    python experiments/choose_rates.py method-zoo --seeds 3 --results results

The rates tried are those of `experiments/<name>-rates`, whose records are read from the sweep it names. The choice is
made per method and task on the split carved out of train; test metrics are not looked at. A method that finished on no
rate is left out, and said so.
"""

import argparse
from pathlib import Path

from omegaconf import OmegaConf

from peftbench.store import Store

HERE = Path(__file__).resolve().parent


def chosen(folder: Path) -> dict[tuple[str, str], float]:
    """Return (task, method) → the learning rate with the best primary metric on validation; ties: the smaller."""
    best: dict[tuple[str, str], tuple[float, float]] = {}
    for record in Store(folder).records():
        spec = record["spec"]
        if spec["seed"] != 0 or record["status"] != "completed":
            continue
        quality = record["quality"]
        value = quality["validation"][quality["primary_metric"]]
        worst = -float("inf")
        score = worst if value is None else value if quality["greater_is_better"] else -value
        key = spec["task"]["name"], spec["method"]["name"]
        best[key] = max(best.get(key, (worst, 0.0)), (score, -spec["train"]["learning_rate"]))
    return {key: -rate for key, (_, rate) in best.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("name", help="the experiment to write")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--results", default="results", help="the folder of sweeps")
    given = parser.parse_args()
    path = HERE / given.name / "experiment.yaml"
    rates = OmegaConf.to_container(OmegaConf.load(HERE / f"{given.name}-rates" / "experiment.yaml"))
    best = chosen(Path(given.results) / rates["sweep"])
    grids = []
    for grid in rates["grids"]:
        for task in grid["task"] if isinstance(grid["task"], list) else [grid["task"]]:
            for method in rates["common"]["method"]:
                if (task, method) not in best:
                    print(f"left out: {method} on {task} finished on no rate")
                    continue
                rest = {k: v for k, v in grid.items() if k != "task"}
                own = (rates.get("per_method") or {}).get(method) or {}
                rest |= {k: v for k, v in own.items() if k != "train.learning_rate"}
                grids.append({"task": task, "method": method, "train.learning_rate": best[task, method], **rest})
    common = {k: v for k, v in rates["common"].items() if k != "method"} | {"seed": list(range(given.seeds))}
    known = OmegaConf.to_container(OmegaConf.load(path)) if path.is_file() else {}
    question = known.get("question") or f"How do the methods of {given.name} compare at their best learning rates?"
    content = {"question": question, "sweep": given.name, "common": common, "grids": grids}
    header = (
        f"# python -m peftbench sweep experiment={given.name} hydra/launcher=joblib hydra.launcher.n_jobs=8\n"
        f"# Written by experiments/choose_rates.py from the records of the sweep {rates['sweep']}.\n"
    )
    path.parent.mkdir(exist_ok=True)
    path.write_text(header + OmegaConf.to_yaml(OmegaConf.create(content), sort_keys=False))
    print(f"{len(grids)} choices → {path}")


if __name__ == "__main__":
    main()
