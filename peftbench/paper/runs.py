"""A folder of runs → values of every method on every task, with intervals, tiers and gaps.

Keys, below the source's name: `runs`, `completed`, …; `<task>/<what>` of a panel, `mean/<what>` over tasks;
`<task>/<variant>/<what>` of a method in it; `cost/<variant>/<what>`.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from peftbench.analysis import comparisons, frame
from peftbench.analysis.comparisons import Comparison, Panel, Suite, Verdict, judge
from peftbench.analysis.frame import STATUSES, number, rows_of, short_float
from peftbench.analysis.fronts import membership
from peftbench.analysis.intervals import half_widths, interval
from peftbench.analysis.tables import human_bytes, human_count, human_seconds, metric_digits, metric_title
from peftbench.paper.names import method, model
from peftbench.paper.sources import Record
from peftbench.paper.values import Values, key, listed

MEAN = "mean"
HEAD = "head"
AGAINST = (HEAD, "lora")
"""Methods that all others are held against, beside full fine-tuning."""
FAMILIES = {
    "low-rank": ("lora", "dora", "pissa", "lora_plus", "rslora", "oft", "boft", "miss", "randlora", "relora"),
    "prompts": ("prompt", "mpt", "ptuning", "ptuning_v2", "prefix"),
}
"""Methods whose pairs are counted apart: those on query and value alike in size, and those that lengthen the input."""
FRONT_DRAWS = 1000


@dataclass(frozen=True)
class Study:
    """What a folder's records say, compared as a report compares them."""

    name: str
    records: Sequence[Record]

    @cached_property
    def runs(self) -> pd.DataFrame:
        """Return one row a run."""
        return frame.frame(self.records)

    @cached_property
    def table(self) -> pd.DataFrame:
        """Return one row a configuration."""
        return frame.configurations(self.runs)

    @cached_property
    def chosen(self) -> pd.DataFrame:
        """Return one row a method and task, at the learning rate that validation chose."""
        return frame.selected(self.table)

    @cached_property
    def panels(self) -> list[Panel]:
        """Return one panel a task."""
        return comparisons.panels(self.records, self.runs, self.chosen)

    @cached_property
    def suites(self) -> list[Suite]:
        """Return the panels of each model together, where there are several tasks."""
        return comparisons.suites(self.panels)

    @property
    def suite(self) -> Suite | None:
        """Return the only suite; None where there is none, or one a model."""
        return self.suites[0] if len(self.suites) == 1 else None

    @property
    def parts(self) -> list[tuple[str, Comparison]]:
        """Return the comparisons by the part of keys that names them, those over tasks first.

        It is the task's name, and where a folder has several models or devices theirs after it. Single seeds are not
        compared: there is nothing to compare them with.
        """
        if all(len(s.runs) < 2 for panel in self.panels for s in panel.samples):
            return []
        several = [c for c in ("model", "device_kind") if self.runs[c].nunique() > 1]

        def name(task: str, one: Comparison) -> str:
            return key("-".join([task, *(str(one.rows[0][c]) for c in several)]))

        return [*((name(MEAN, s), s) for s in self.suites), *((name(p.title, p), p) for p in self.panels)]


def place_of(comparison: Comparison, method: str) -> int | None:
    """Return where a variant stands in a comparison."""
    return next((i for i, row in enumerate(comparison.rows) if row["variant"] == method), None)


def over(comparison: Comparison, other: str = HEAD) -> dict[int, Verdict]:
    """Return each method's verdict against another one, by its place: a family of comparisons of its own."""
    there = place_of(comparison, other)
    if there is None:
        return {}
    places = [(i, there) for i in range(len(comparison.rows)) if i != there]
    return {v.first: v for v in judge(places, [comparison.gap(i, there) for i, _ in places])}


def ends(verdict: Verdict) -> tuple[float, float] | None:
    """Return the interval of a difference, not corrected for others; None where there is none."""
    reach = float(half_widths([verdict.estimate])[0])
    return None if math.isnan(reach) else (verdict.estimate.value - reach, verdict.estimate.value + reach)


def told(verdict: Verdict) -> str | None:
    """Return what a test said in words that fit "was … full fine-tuning"."""
    if not verdict.estimate.sources:
        return None
    return "told apart from" if verdict.apart else "not told apart from"


def put(study: Study, values: Values) -> None:
    """Keep everything that the study says."""
    name = study.name
    _counts(study, values)
    for part, comparison in study.parts:
        _comparison(f"{name}/{part}", comparison, values)
    _costs(study, values)
    _rates(study, values)


def _counts(study: Study, values: Values) -> None:
    name, runs = study.name, study.runs
    counts = Counter(runs["status"])
    values.count(f"{name}/runs", len(runs))
    for status in STATUSES:
        values.count(f"{name}/{key(status)}", counts[status])
    values.count(f"{name}/lost", len(runs) - counts["completed"])
    values.count(f"{name}/methods", runs["method"].nunique())
    values.count(f"{name}/tasks", runs["task"].nunique())
    seeds = {len(s.runs) for panel in study.panels for s in panel.samples}
    values.put(f"{name}/seeds", _span(sorted(seeds)))
    for what, path in (
        ("batch", ("spec", "train", "batch_size")),
        ("epochs", ("spec", "train", "epochs")),
        ("steps", ("spec", "train", "steps")),
        ("length", ("spec", "train", "max_length")),
        ("schedule", ("spec", "train", "schedule")),
        ("model", ("spec", "model", "name")),
        ("checkpoint", ("spec", "model", "checkpoint")),
        ("device", ("spec", "identity", "device_kind")),
        ("torch", ("environment", "versions", "torch")),
        ("transformers", ("environment", "versions", "transformers")),
    ):
        found = {v for r in study.records if (v := frame.dig(r, path)) is not None}
        texts = sorted(map(_plain, found), key=_numeric)
        values.put(f"{name}/{what}", listed([model(t) for t in texts]) if texts else None)
    total = [number(r["total_parameters"]) for r in rows_of(study.runs)]
    values.put(f"{name}/parameters", human_count(min((t for t in total if t is not None), default=None)))


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _numeric(text: str) -> tuple[float, str]:
    try:
        return float(text), text
    except ValueError:
        return math.inf, text


def _span(counts: Sequence[int]) -> str | None:
    if not counts:
        return None
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def _comparison(prefix: str, comparison: Comparison, values: Values) -> None:
    digits = metric_digits([e.value for e in comparison.estimates])
    rows = comparison.rows
    values.count(f"{prefix}/methods", len(rows))
    if isinstance(comparison, Panel):
        values.put(f"{prefix}/metric", metric_title(rows[0]["primary_metric"]))
        values.count(f"{prefix}/items", None if comparison.items is None else float(comparison.items))
        spreads = [s for row in rows if (s := number(row["test_std"])) is not None]
        values.number(f"{prefix}/spread-least", min(spreads, default=None), digits)
        values.number(f"{prefix}/spread-median", float(np.median(spreads)) if spreads else None, digits)
        values.number(f"{prefix}/spread-most", max(spreads, default=None), digits)
    pairs = [v for v in comparison.pairs if v.estimate.sources]
    values.count(f"{prefix}/pairs", len(pairs))
    values.count(f"{prefix}/pairs-apart", sum(v.apart for v in pairs))
    values.put(f"{prefix}/best", method(rows[0]["variant"]))
    _verdicts(prefix, "full", list(comparison.gaps.values()), comparison, digits, values)
    against = {other: over(comparison, other) for other in AGAINST}
    for other, found in against.items():
        _verdicts(prefix, key(other), list(found.values()), comparison, digits, values)
    for i, row in enumerate(rows):
        verdicts = {"gap": comparison.gaps.get(i)} | {f"over-{o}": found.get(i) for o, found in against.items()}
        _method(f"{prefix}/{key(row['variant'])}", comparison, i, verdicts, digits, values)
    for family, members in FAMILIES.items():
        _family(f"{prefix}/family/{family}", comparison, members, digits, values)
    _front(prefix, comparison, values)


def _verdicts(
    prefix: str, other: str, found: Sequence[Verdict], comparison: Comparison, digits: int, values: Values
) -> None:
    """Keep how many methods were told apart from `other`, which were not, and what could have been."""
    tested = [v for v in found if v.estimate.sources]
    same = [v for v in tested if not v.apart]
    sign = 1 if comparison.greater_is_better else -1
    start = f"{prefix}/{other}"
    values.count(f"{start}-compared", len(tested))
    values.count(f"{start}-apart", len(tested) - len(same))
    values.count(f"{start}-above", sum(v.apart and sign * v.estimate.value > 0 for v in tested))
    values.count(f"{start}-below", sum(v.apart and sign * v.estimate.value < 0 for v in tested))
    values.count(f"{start}-same", len(same))
    values.put(f"{start}-same-names", listed([method(comparison.rows[v.first]["variant"]) for v in same]))
    effects = [v.among for v in same]
    values.number(f"{start}-mde-least", min(effects, default=None), digits)
    values.number(f"{start}-mde-median", float(np.median(effects)) if effects else None, digits)
    values.number(f"{start}-mde-most", max(effects, default=None), digits)


def _method(
    prefix: str,
    comparison: Comparison,
    place: int,
    verdicts: Mapping[str, Verdict | None],
    digits: int,
    values: Values,
) -> None:
    row, estimate = comparison.rows[place], comparison.estimates[place]
    values.number(f"{prefix}/value", estimate.value, digits)
    values.interval(f"{prefix}/interval", interval(estimate), digits)
    values.put(f"{prefix}/tier", comparison.letters[place])
    values.put(f"{prefix}/params", human_count(row["adapter_parameters"]))
    values.count(f"{prefix}/parameters", number(row["adapter_parameters"]))
    if isinstance(comparison, Panel):
        runs = comparison.samples[place].runs
        values.number(f"{prefix}/std", number(row["test_std"]), digits)
        values.number(f"{prefix}/seed-least", float(runs.min()), digits)
        values.number(f"{prefix}/seed-second", float(np.sort(runs)[1]) if len(runs) > 1 else None, digits)
        values.number(f"{prefix}/seed-most", float(runs.max()), digits)
        rate = number(row["learning_rate"])
        values.put(f"{prefix}/rate", None if rate is None else short_float(rate))
    for what, verdict in verdicts.items():
        if verdict is None:
            continue
        values.number(f"{prefix}/{what}", verdict.estimate.value, digits, signed=True)
        values.number(f"{prefix}/{what}-size", abs(verdict.estimate.value), digits)
        values.interval(f"{prefix}/{what}-interval", ends(verdict), digits)
        values.number(f"{prefix}/{what}-mde", verdict.among, digits)
        values.put(f"{prefix}/{what}-told", told(verdict))


def _family(prefix: str, comparison: Comparison, members: Sequence[str], digits: int, values: Values) -> None:
    """Keep what the pairs within a family say, as judged among all pairs."""
    places = [i for i, row in enumerate(comparison.rows) if row["variant"] in members]
    pairs = [v for v in comparison.pairs if {v.first, v.second} <= set(places) and v.estimate.sources]
    values.count(f"{prefix}/count", len(places))
    values.put(f"{prefix}/names", listed([method(comparison.rows[i]["variant"]) for i in places]))
    values.count(f"{prefix}/pairs", len(pairs))
    values.count(f"{prefix}/pairs-apart", sum(v.apart for v in pairs))
    found = [comparison.estimates[i].value for i in places]
    values.number(f"{prefix}/least", min(found, default=None), digits)
    values.number(f"{prefix}/most", max(found, default=None), digits)
    values.number(f"{prefix}/range", max(found) - min(found) if found else None, digits)
    effects = [v.among for v in pairs if not v.apart]
    values.number(f"{prefix}/mde-median", float(np.median(effects)) if effects else None, digits)


def _front(prefix: str, comparison: Comparison, values: Values) -> None:
    """Keep the share of bootstrap draws in which a method is on the front of quality against adapter parameters."""
    costs = [number(row["adapter_parameters"]) for row in comparison.rows]
    if None in costs or len(costs) < 2:
        return
    table = np.array([[c or 0.0] for c in costs])
    shares = membership(comparison.drawn()[:FRONT_DRAWS], table, comparison.greater_is_better)
    often = [i for i, share in enumerate(shares) if share >= 0.5]
    often.sort(key=lambda i: costs[i] or 0.0)
    values.put(f"{prefix}/front-names", listed([method(comparison.rows[i]["variant"]) for i in often]))
    values.count(f"{prefix}/front-count", len(often))
    for row, share in zip(comparison.rows, shares, strict=True):
        values.number(f"{prefix}/{key(row['variant'])}/front", float(share), 2)


def _costs(study: Study, values: Values) -> None:
    groups: dict[str, list[Mapping[Any, Any]]] = {}
    for row in rows_of(study.chosen):
        groups.setdefault(key(row["variant"]), []).append(row)
    for variant, rows in groups.items():
        prefix = f"{study.name}/cost/{variant}"
        peaks = [v for r in rows if (v := number(r["memory_peak_bytes"])) is not None]
        steps = [v for r in rows if (v := number(r["step_seconds_p50"])) is not None]
        values.put(f"{prefix}/memory", human_bytes(max(peaks)) if peaks else None)
        values.put(f"{prefix}/step-least", human_seconds(min(steps)) if steps else None)
        values.put(f"{prefix}/step-most", human_seconds(max(steps)) if steps else None)
        values.number(f"{prefix}/step-spread", max(steps) / min(steps) if steps else None, 1)
        values.put(f"{prefix}/checkpoint", human_bytes(rows[0]["checkpoint_bytes"]))
    spreads = [
        max(steps) / min(steps)
        for rows in groups.values()
        if len(steps := [v for r in rows if (v := number(r["step_seconds_p50"])) is not None]) > 1
    ]
    values.number(f"{study.name}/step-spread-most", max(spreads, default=None), 1)
    shares = [v for r in rows_of(study.chosen) if (v := number(r["model_flops_utilization"])) is not None]
    values.number(f"{study.name}/utilization-most", 100 * max(shares) if shares else None, 1)


def _rates(study: Study, values: Values) -> None:
    """Keep how often the best learning rate on validation lies at the edge of those tried."""
    choices = low = high = 0
    panel = [*frame.PANEL, "variant"]
    best = {tuple(r[c] for c in panel): r for r in rows_of(study.chosen)}
    for group, tried in study.table.groupby(panel, sort=True, dropna=False):
        rates = sorted({float(r) for r in tried["learning_rate"].dropna()})
        chosen = best.get(tuple(group))
        if len(rates) < 2 or chosen is None or not chosen["seeds"]:
            continue
        means = list(tried["validation_mean"].dropna())
        several = [str(chosen[c]) for c in ("model", "device_kind") if study.runs[c].nunique() > 1]
        prefix = f"{study.name}/{key('-'.join([frame.task_title(chosen), *several]))}/{key(chosen['variant'])}"
        digits = metric_digits(means)
        values.number(f"{prefix}/tried-least", min(means, default=None), digits)
        values.number(f"{prefix}/tried-most", max(means, default=None), digits)
        choices += 1
        low += chosen["learning_rate"] == rates[0]
        high += chosen["learning_rate"] == rates[-1]
    tuned = choices or None
    values.count(f"{study.name}/choices", tuned)
    values.count(f"{study.name}/choices-low", low if tuned else None)
    values.count(f"{study.name}/choices-high", high if tuned else None)
    values.count(f"{study.name}/choices-edge", low + high if tuned else None)
    grid = study.table.groupby(panel, dropna=False)["learning_rate"].nunique()
    values.put(f"{study.name}/rates", _span(sorted({int(n) for n in grid if n > 1})))
    lost = study.runs[study.runs["status"] == "diverged"]
    values.put(f"{study.name}/diverged-names", listed(sorted(set(map(method, lost["variant"])))))
