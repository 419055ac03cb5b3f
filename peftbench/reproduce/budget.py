"""What the full run of an experiment would cost, from shapes and the sizes of data sets alone.

FLOPs are 4N a token for frozen and 6N for trained matrix parameters (Kaplan et al. 2020, arXiv:2001.08361, section
2.1), tokens are counted as if every row filled `train.max_length`, and evaluation is left out: an upper bound of the
first two, a lower bound of the last. Runs that share a pass through the base cost less.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from peftbench import published, registry
from peftbench.config import ModelConfig, build
from peftbench.errors import UserError
from peftbench.plan import points
from peftbench.record import canonical
from peftbench.reproduce.protocol import METHOD_KEYS, WORDS, same
from peftbench.resolve import Resolver, demand
from peftbench.resolve import experiment as experiment_file

RATE = 1e14
"""FLOP/s that a GPU is taken to sustain where nobody says: about a tenth of one H100's bf16 peak."""


@dataclass(frozen=True)
class Cost:
    """Runs, optimizer steps, tokens at most and FLOPs of an experiment; `unknown` are tasks whose size is not known."""

    experiment: str
    runs: int
    steps: int
    tokens: float
    flops: float
    rate: float
    unknown: tuple[str, ...]

    @property
    def hours(self) -> float:
        """Return GPU-hours at `rate`."""
        return self.flops / self.rate / 3600

    def lines(self) -> list[str]:
        """Return it in words."""
        found = [
            f"{self.experiment}: {self.runs:,} runs, {self.steps:,} steps, at most {self.tokens:.3g} tokens, "
            f"{self.flops:.3g} FLOPs: {self.hours:,.1f} GPU-hours at {self.rate:.3g} FLOP/s, evaluation left out"
        ]
        if self.unknown:
            found.append(f"left out, as the size of their data is not known: {', '.join(self.unknown)}")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "experiment": self.experiment,
            "runs": self.runs,
            "steps": self.steps,
            "tokens": self.tokens,
            "flops": self.flops,
            "flops_per_second": self.rate,
            "gpu_hours": self.hours,
            "unknown": list(self.unknown),
        }


def sizes() -> dict[str, int]:
    """Return task → rows of its official training split."""
    return {row["task"]: int(row["rows"]) for row in published.table("sizes")}


def experiments_of(paper: str) -> list[str]:
    """Return the names of the experiments that reproduce a paper: ``reproduce-<paper>`` and ``reproduce-<paper>-…``."""
    name = f"reproduce-{paper}"
    return [n for n in registry.experiments() if n == name or n.startswith(f"{name}-")]


def experiment_of(row: published.Value) -> str | None:
    """Return the experiment that trains a row's configuration; None where there is none."""
    return next((name for name in experiments_of(row.paper.key) if trains(name, row)), None)


def trains(experiment: str, row: published.Value) -> bool:
    """Tell whether an experiment trains a row's method on its model and task, from its start, with its settings.

    Of the settings those of the method count, where both state them.
    """
    start = row.protocol.starts_from(row.here.task)
    wanted: dict[str, Any] = {"model": row.here.model, "method": row.here.method, "task": row.here.task}
    wanted["train.start_task"] = None if start in ("", "pretrained") else start
    for theirs, ours in METHOD_KEYS.items():
        value = row.settings.get(theirs)
        if not isinstance(value, str) or value in WORDS:
            wanted[f"method.{ours}"] = WORDS.get(value, value) if isinstance(value, str) else value
    return any(
        all(
            any(same(value, ours) for ours in grid.get(key, [None]))
            for key, value in wanted.items()
            if not key.startswith("method.") or (value is not None and key in grid)
        )
        for grid in _grids(str(registry.experiments()[experiment]))
    )


@functools.cache
def _grids(path: str) -> list[dict[str, list[Any]]]:
    return experiment_file(path)[0]


def starts_others(experiment: str) -> bool:
    """Tell whether another experiment starts from the adapters that this one's sweep would keep."""
    *_, sweep = experiment_file(experiment)
    files = map(str, registry.experiments().values())
    asked = {str(s) for file in files for grid in _grids(file) for s in grid.get("train.start", ())}
    return f"results/{sweep}" in asked


def cost(experiment: str, rate: float = RATE) -> Cost:
    """Return the cost of all runs of an experiment; nothing is loaded.

    Raises:
        UserError: no such experiment, settings that fit no model, or a rate that is none.
    """
    if not rate > 0:
        raise UserError(f"--rate {rate:g}: expected FLOP/s above 0")
    asked = demand({}, experiment)
    names = dict.fromkeys(str(m) for grid in asked.grids for m in grid["method"])
    found, _ = points(asked, {name: registry.declared(name) for name in names})
    resolver, rows, per_token = Resolver("cpu"), sizes(), _PerToken()
    steps = tokens = flops = 0.0
    unknown: dict[str, None] = {}
    for point in found:
        spec, task = resolver.sketch(point)
        train = spec.train
        size = rows.get(str(point["task"]))
        if size is None and not train["steps"]:
            unknown[str(point["task"])] = None
            continue
        batch = train["batch_size"]
        length = train["steps"] or round(train["epochs"] * -(-(size or 0) // batch))
        own = length * batch * train["max_length"]
        steps, tokens = steps + length, tokens + own
        flops += own * per_token(resolver, spec, task)
    return Cost(experiment, len(found), int(steps), tokens, flops, rate, tuple(unknown))


class _PerToken:
    """FLOPs a token of a configuration, each shape counted once."""

    def __init__(self) -> None:
        self.known: dict[tuple[Any, ...], float] = {}

    def __call__(self, resolver: Resolver, spec: Any, task: Any) -> float:
        from torch import nn

        key = (canonical(spec.model), canonical(spec.method), task.formulation)
        if key not in self.known:
            config = build(ModelConfig, spec.model, "model")
            model = resolver.shapes(config, task.formulation)
            method = registry.build_method(spec.method)
            tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
            matrices = sum(p.numel() for p in model.parameters() if p.dim() > 1 and id(p) not in tables)
            output = model.get_output_embeddings() if task.formulation == "text" else None
            if output is not None and id(output.weight) in tables:  # tied: a table that is multiplied with as well
                matrices += output.weight.numel()
            trains = "weight" in method.traits.sites
            adapter = 0 if trains else method.parameter_count(model)
            self.known[key] = (6 if trains else 4) * matrices + 6 * adapter
        return self.known[key]
