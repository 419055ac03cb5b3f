"""Write `experiments/glue-minilm/experiment.yaml`: five seeds at the learning rate that seed 0 found best.

    python experiments/glue-minilm-rates/choose.py [results/glue-minilm]

The choice is made per method and task, on the split carved out of train; test metrics are not looked at.
"""

import sys
from pathlib import Path

from omegaconf import OmegaConf

from peftbench.store import Store

HERE = Path(__file__).resolve().parent
SEEDS = [0, 1, 2, 3, 4]


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "results/glue-minilm")
    rates = OmegaConf.to_container(OmegaConf.load(HERE / "experiment.yaml"))
    best: dict[tuple[str, str], tuple[float, float]] = {}
    for record in Store(folder).records():
        spec = record["spec"]
        if spec["seed"] != 0 or record["status"] != "completed":
            continue
        value = record["quality"]["validation"][record["quality"]["primary_metric"]]
        key = spec["task"]["name"], spec["method"]["name"]
        found = (-float("inf") if value is None else value, -spec["train"]["learning_rate"])
        best[key] = max(best.get(key, found), found)
    grids = []
    for grid in rates["grids"]:
        for task in grid["task"] if isinstance(grid["task"], list) else [grid["task"]]:
            for method in rates["common"]["method"]:
                rest = {k: v for k, v in grid.items() if k != "task"}
                grids.append({"task": task, "method": method, "train.learning_rate": -best[task, method][1], **rest})
    common = {k: v for k, v in rates["common"].items() if k != "method"} | {"seed": SEEDS}
    question = "How far is each method from full fine-tuning on five GLUE tasks, with its learning rate chosen fairly?"
    content = {"question": question, "sweep": rates["sweep"], "common": common, "grids": grids}
    path = HERE.parent / "glue-minilm" / "experiment.yaml"
    header = (
        "# python -m peftbench sweep experiment=glue-minilm hydra/launcher=joblib hydra.launcher.n_jobs=8\n"
        "# Written by experiments/glue-minilm-rates/choose.py from the records of the sweep of learning rates.\n"
    )
    path.parent.mkdir(exist_ok=True)
    path.write_text(header + OmegaConf.to_yaml(OmegaConf.create(content), sort_keys=False))
    print(f"{len(grids)} choices → {path}")


if __name__ == "__main__":
    main()
