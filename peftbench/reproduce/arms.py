"""What a claim's rule sees: the runs of one configuration as an arm, and what may be asked of arms.

Scores are larger for better: points (a metric times 100) or negative losses. Intervals are those of the difference of
two means over seeds that have nothing to do with each other (Welch), see `analysis.intervals`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftbench.analysis import intervals
from peftbench.analysis.frame import number
from peftbench.reproduce.records import Configuration
from peftbench.reproduce.verdicts import CONTRADICTED, HOLDS, UNDECIDED
from peftbench.store import Store

EDGE = "a rate at the edge of its grid cannot be told from the best"


@dataclass(frozen=True)
class Arm:
    """The runs of one configuration: its learning rate, and scores by seed, larger for better.

    Attributes:
        settings: of the method.
        point: what a margin of one point is in their unit.
        curves: step → score on validation, a seed each.
        adapters: where the trained adapters lie if they were kept, a seed each.
    """

    settings: Mapping[str, Any]
    rate: float
    validation: tuple[float, ...]
    test: tuple[float, ...]
    records: tuple[str, ...]
    point: float = 1.0
    model: str = ""
    batch: int = 0
    curves: tuple[Mapping[int, float], ...] = ()
    adapters: tuple[Path, ...] = ()

    @property
    def merit(self) -> float:
        """Return the mean on validation."""
        return sum(self.validation) / len(self.validation)


@dataclass(frozen=True)
class Found:
    """What a rule says of one task, and the records that it looked at."""

    verdict: str
    reason: str
    records: tuple[str, ...] = ()


def arms(configurations: Sequence[Configuration], task: str) -> list[Arm]:
    """Return the configurations of a task that completed, as a rule sees them."""
    found = []
    for c in configurations:
        spec = c.spec
        if spec["task"]["name"] != task or not c.completed:
            continue
        quality = c.completed[0]["quality"]
        metric, up = quality["primary_metric"], quality.get("greater_is_better", True)
        factor = 100.0 if up else -1.0
        validation, test = c.scores("validation", metric), c.scores("test", metric)
        by_seed = {int(r["spec"]["seed"]): r for r in c.completed}
        if not (seeds := sorted(set(validation) & set(test))):
            continue
        kept = Store(Path(c.folder).expanduser())
        sides = [tuple(factor * side[s] for s in seeds) for side in (validation, test)]
        found.append(
            Arm(
                spec["method"],
                float(spec["train"]["learning_rate"]),
                sides[0],
                sides[1],
                tuple(r["run_id"] for r in c.completed),
                1.0 if up else 0.01,
                spec["model"]["name"],
                int(spec["train"].get("batch_size", 0)),
                tuple(_curve(by_seed[s], metric, factor) for s in seeds),
                tuple(kept.adapter(by_seed[s]["run_id"]) for s in seeds),
            )
        )
    return found


def _curve(record: Mapping[str, Any], metric: str, factor: float) -> dict[int, float]:
    """Return step → score of the evaluations of a run."""
    evaluations = record["quality"].get("evaluations") or ()
    scores = {int(e["step"]): number((e.get("metrics") or {}).get(metric)) for e in evaluations}
    return {step: factor * score for step, score in scores.items() if score is not None}


def of(found: Sequence[Arm], method: str, **settings: Any) -> list[Arm]:
    """Return the arms of a method with these settings, by learning rate."""
    chosen = [
        a for a in found if a.settings["name"] == method and all(a.settings.get(k) == v for k, v in settings.items())
    ]
    return sorted(chosen, key=lambda a: a.rate)


def best(candidates: Sequence[Arm]) -> Arm:
    """Return the arm that does best on validation among those with the most seeds."""
    most = max(len(a.validation) for a in candidates)
    return max((a for a in candidates if len(a.validation) == most), key=lambda a: a.merit)


def interval(first: Sequence[float], second: Sequence[float], comparisons: int = 1) -> tuple[float, float] | None:
    """Return the ends of the interval of mean(first) − mean(second); None with a single seed on a side.

    It is one of so many `comparisons` that shall hold together.
    """
    samples = [intervals.sample(range(len(side)), list(side)) for side in (first, second)]
    confidence = 1 - (1 - intervals.CONFIDENCE) / max(comparisons, 1)
    return intervals.interval(intervals.difference(samples[0], samples[1]), confidence)


def at_edge(candidates: Sequence[Arm]) -> bool:
    """Tell whether the best of three learning rates or more is the least or the largest."""
    rates = [a.rate for a in candidates]
    return len(set(rates)) > 2 and best(candidates).rate in (min(rates), max(rates))


def reaches_edge(candidates: Sequence[Arm], rates: Sequence[float]) -> bool:
    """Tell whether one of `rates` is the least or the largest of the candidates'."""
    every = [a.rate for a in candidates]
    return min(rates) == min(every) or max(rates) == max(every)


def ids_of(*chosen: Arm) -> tuple[str, ...]:
    return tuple(dict.fromkeys(i for arm in chosen for i in arm.records))


def missing(what: str) -> Found:
    return Found(UNDECIDED, f"lacks {what}")


def ends_text(ends: tuple[float, float]) -> str:
    return f"[{ends[0]:+.3g}, {ends[1]:+.3g}]"


def in_unit(found: Sequence[Arm], points: float) -> float:
    """Return a margin in the unit of the scores: points, or hundredths of a nat where scores are negative losses."""
    return points * found[0].point


def good_rates(candidates: Sequence[Arm], curves: int = 1) -> list[float]:
    """Return the learning rates whose validation cannot be told from the best one's; that one is among them.

    Args:
        curves: so many are looked at like this.
    """
    comparisons = curves * (len(candidates) - 1)
    top = best(candidates)
    found = [top.rate]
    for arm in candidates:
        ends = interval(top.validation, arm.validation, comparisons)
        if arm is not top and (ends is None or ends[0] <= 0):
            found.append(arm.rate)
    return sorted(found)


def described(side: Mapping[str, Any]) -> str:
    """Return a side's settings in words: "lora of rank 8 on mlp.up, mlp.down with alpha=8"."""
    words = [str(side["name"])]
    words += [f"of rank {side['rank']}"] if "rank" in side else []
    words += [f"on {', '.join(side['targets'])}"] if "targets" in side else []
    rest = [f"{k}={v:g}" for k, v in side.items() if k not in ("name", "rank", "targets")]
    return " ".join([*words, *(["with"] if rest else []), *rest])


def decided(holds: bool, contradicted: bool, mine: Sequence[Arm], theirs: Sequence[Arm]) -> tuple[str, str]:
    """Return the verdict on `mine` against `theirs`, unless an edge could overturn it, and then a word on that."""
    if holds and at_edge(theirs):
        return UNDECIDED, "; the reference is best at the edge of its learning rates"
    if contradicted and at_edge(mine):
        return UNDECIDED, "; it is best at the edge of its learning rates"
    return HOLDS if holds else CONTRADICTED if contradicted else UNDECIDED, ""
