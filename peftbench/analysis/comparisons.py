"""Records → what can be said of methods beside each other: on one task (`Panel`), and over tasks (`Suite`).

Every pair is tested for a difference of means over seeds and items (`intervals.difference`), corrected by Holm for
all pairs, which makes the tiers. Differences from full fine-tuning were asked for beforehand, so they are a family of
their own, corrected for their number alone: a method may be told apart from full fine-tuning and yet share a letter
with it.
"""

import itertools
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from peftbench.analysis.frame import PANEL, Record, dig, number, rows_of, task_title
from peftbench.analysis.intervals import (
    Array,
    Estimate,
    Sample,
    difference,
    mean,
    over_tasks,
    p_values,
    paired_difference,
    sample,
)
from peftbench.analysis.items import verified
from peftbench.analysis.paired import adjusted
from peftbench.analysis.power import ALPHA, detectable
from peftbench.analysis.resampling import DRAWS, draw_runs
from peftbench.analysis.tiers import letters, matrix

Row = Mapping[Any, Any]


@dataclass(frozen=True)
class Verdict:
    """One comparison: `first` less `second` in the metric's unit.

    `p` alone, `holm` and `hochberg` (Benjamini-Hochberg) corrected for the `family` of comparisons that it is one of;
    `apart`: Holm's below `ALPHA`. `alone` and `among` are the minimum detectable effects at `ALPHA` and at `ALPHA`
    over the family's size, the hurdle of Holm's first test. NaN where there was nothing to test (a single seed).
    """

    first: int
    second: int
    estimate: Estimate
    p: float
    holm: float
    hochberg: float
    apart: bool
    alone: float
    among: float
    family: int


def judge(places: Sequence[tuple[int, int]], estimates: Sequence[Estimate]) -> list[Verdict]:
    """Return the verdicts on differences `estimates`, which are one family, between the configurations at `places`."""
    if not estimates:
        return []
    p = p_values(estimates)
    holm, hochberg = adjusted(p.tolist()), adjusted(p.tolist(), "benjamini-hochberg")
    family = int((~np.isnan(p)).sum())
    alone, among = detectable(estimates), detectable(estimates, ALPHA / max(family, 1))
    return [
        Verdict(
            *places[k], e, float(p[k]), float(holm[k]), float(hochberg[k]), bool(holm[k] < ALPHA), float(alone[k]),
            float(among[k]), family,
        )
        for k, e in enumerate(estimates)
    ]  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """Configurations beside each other, in order of merit; a base of `Panel` and `Suite`.

    `rows` name them and hold their costs; `greater_is_better` is the metric's direction.
    """

    rows: list[dict[Any, Any]]
    greater_is_better: bool

    def estimate(self, index: int) -> Estimate:
        """Return the mean of one configuration."""
        raise NotImplementedError

    def gap(self, first: int, second: int) -> Estimate:
        """Return the mean of the one less that of the other."""
        raise NotImplementedError

    def drawn(self) -> Array:
        """Return bootstrap draws of all means [draws, C]."""
        raise NotImplementedError

    @property
    def seed_counts(self) -> set[int]:
        """Return how many seeds there are, of every configuration and task."""
        raise NotImplementedError

    @cached_property
    def estimates(self) -> list[Estimate]:
        """Return the mean of each configuration."""
        return [self.estimate(i) for i in range(len(self.rows))]

    @cached_property
    def pairs(self) -> list[Verdict]:
        """Return every pair's verdict, the better one first."""
        places = list(itertools.combinations(range(len(self.rows)), 2))
        return judge(places, [self.gap(i, j) for i, j in places])

    @cached_property
    def letters(self) -> list[str | None]:
        """Return the tiers of each configuration; None for one that could not be tested."""
        tested = [i for i, e in enumerate(self.estimates) if e.sources]
        place = {i: k for k, i in enumerate(tested)}
        told = [v for v in self.pairs if v.first in place and v.second in place]
        apart = matrix(len(tested), [(place[v.first], place[v.second]) for v in told], [v.apart for v in told])
        found = dict(zip(tested, letters(apart), strict=True)) if tested else {}
        return [found.get(i) for i in range(len(self.rows))]

    @cached_property
    def reference(self) -> int | None:
        """Return the place of full fine-tuning; None where there is none."""
        return next((i for i, row in enumerate(self.rows) if row["is_reference"]), None)

    @cached_property
    def gaps(self) -> dict[int, Verdict]:
        """Return each configuration's verdict against full fine-tuning, by its place."""
        if self.reference is None:
            return {}
        places = [(i, self.reference) for i in range(len(self.rows)) if i != self.reference]
        return {v.first: v for v in judge(places, [self.gap(i, j) for i, j in places])}


@dataclass(frozen=True)
class Panel(Comparison):
    """One model on one task, under one protocol, on one kind of device.

    `samples` are those of `rows`; `items` in the test set as far as errors of items are known, else None and `reason`.
    """

    samples: list[Sample] = field(default_factory=list)
    items: int | None = None
    reason: str = ""

    def estimate(self, index: int) -> Estimate:
        return mean(self.samples[index])

    def gap(self, first: int, second: int) -> Estimate:
        return difference(self.samples[first], self.samples[second])

    @property
    def seed_counts(self) -> set[int]:
        return {len(s.runs) for s in self.samples}

    def paired_gap(self, index: int) -> Estimate | None:
        """Return the gap to full fine-tuning with seeds in pairs; None without a seed in common."""
        return None if self.reference is None else paired_difference(self.samples[index], self.samples[self.reference])

    @cached_property
    def runs_drawn(self) -> list[Array]:
        """Return draws of each configuration's runs [draws, n]."""
        # The same records give the same draws, and no two tasks share theirs.
        seed = zlib.crc32(repr([str(self.rows[0][column]) for column in PANEL]).encode())
        return draw_runs(self.samples, DRAWS, seed)

    def drawn(self) -> Array:
        return np.column_stack([runs.mean(axis=1) for runs in self.runs_drawn])

    @property
    def title(self) -> str:
        """Return the task's name with what a reader must know about it."""
        return task_title(self.rows[0])

    @cached_property
    def seed_correlation(self) -> float | None:
        """Return how alike the same seeds are across methods, on average over pairs; None with fewer than 3 in common.

        Near 0, seeds are independent runs, as `gap` reads them; well above, gaps are surer than their intervals say.
        """
        shared = sorted(set.intersection(*(set(s.seeds) for s in self.samples)))
        if len(shared) < 3 or len(self.samples) < 2:
            return None
        runs = np.array([s.runs[[s.seeds.index(seed) for seed in shared]] for s in self.samples])
        runs = runs[np.ptp(runs, axis=1) > 0]
        if len(runs) < 2:
            return None
        found = np.corrcoef(runs)
        return float((found.sum() - len(found)) / (len(found) * (len(found) - 1)))


@dataclass(frozen=True)
class Suite(Comparison):
    """One model on all tasks of a folder: methods with a score on each of them, and their panels.

    `places[c][t]` is where configuration c stands in `panels[t]`.
    """

    panels: list[Panel] = field(default_factory=list)
    places: list[list[int]] = field(default_factory=list)

    def estimate(self, index: int) -> Estimate:
        return over_tasks([p.estimates[i] for p, i in zip(self.panels, self.places[index], strict=True)])

    def gap(self, first: int, second: int) -> Estimate:
        ends = zip(self.panels, self.places[first], self.places[second], strict=True)
        return over_tasks([panel.gap(i, j) for panel, i, j in ends])

    @property
    def seed_counts(self) -> set[int]:
        return {len(runs) for c in range(len(self.rows)) for runs in self.runs(c)}

    def runs(self, index: int) -> list[Array]:
        """Return the runs of each task [n]."""
        return [p.samples[i].runs for p, i in zip(self.panels, self.places[index], strict=True)]

    def runs_drawn(self, index: int) -> list[Array]:
        """Return draws of the runs of each task [draws, n]."""
        return [p.runs_drawn[i] for p, i in zip(self.panels, self.places[index], strict=True)]

    def drawn(self) -> Array:
        return np.column_stack(
            [np.mean([runs.mean(axis=1) for runs in self.runs_drawn(c)], axis=0) for c in range(len(self.rows))]
        )

    @property
    def scores(self) -> Array:
        """Return the mean of each method on each task [T, C]."""
        return np.array([[float(r.mean()) for r in self.runs(c)] for c in range(len(self.rows))]).T


def panels(records: Sequence[Record], runs: pd.DataFrame, chosen: pd.DataFrame) -> list[Panel]:
    """Return the panels of `selected` rows, in order of task, model and device; those without a score are left out.

    Args:
        records: those that `runs` is the frame of.
    """
    # As `frame` has it: of a run recorded twice, the completed record.
    by_id: dict[str, Record] = {}
    for record in sorted(records, key=lambda r: (str(r.get("run_id")), r.get("status") != "completed")):
        by_id.setdefault(str(record.get("run_id")), record)
    scored: dict[str, list[dict[Any, Any]]] = {}
    for run in rows_of(runs[runs["test"].notna()]):  # completed ones, as `frame` has it
        scored.setdefault(run["configuration"], []).append(run)
    found = []
    for _, group in chosen[chosen["seeds"] > 0].groupby(PANEL, sort=True, dropna=False):
        rows = rows_of(group)
        sign = -1.0 if rows[0]["greater_is_better"] else 1.0
        rows.sort(key=lambda r: (sign * float(r["test_mean"]), r["method"], r["label"]))
        found.append(_panel(rows, [scored[r["configuration"]] for r in rows], by_id))
    return found


def _panel(rows: list[dict[Any, Any]], runs: list[list[dict[Any, Any]]], by_id: Mapping[str, Record]) -> Panel:
    # One run a seed: two records of one configuration and seed are the same run on two versions of something.
    kept = [
        sorted({int(run["seed"]): run for run in group}.values(), key=lambda run: int(run["seed"])) for group in runs
    ]
    flat = [run for group in kept for run in group]
    parts, reason = contributions([by_id[run["run_id"]] for run in flat], flat)
    samples, at = [], 0
    for group in kept:
        items = None if parts is None else np.array(parts[at : at + len(group)])
        samples.append(sample([int(r["seed"]) for r in group], [float(r["test"]) for r in group], items))
        at += len(group)
    count = None if parts is None else len(parts[0])
    return Panel(rows, bool(rows[0]["greater_is_better"]), samples, count, reason)


def contributions(records: Sequence[Record], runs: Sequence[Row]) -> tuple[list[Array] | None, str]:
    """Return contributions of items to each run's metric, or None and why there are none."""
    items = [dig(record, ("quality", "items", "test")) for record in records]
    without = sum(not one for one in items)
    if without:
        return None, f"{without} of {len(items)} runs were kept without their items"
    if len({str(dig(record, ("spec", "identity", "data"))) for record in records}) > 1:
        return None, "the runs were tested on different versions of the data"
    metric = str(runs[0]["primary_metric"])
    found = verified(metric, [float(run["test"]) for run in runs], items)
    return (
        found,
        "" if found is not None else f"{metric.replace('_', ' ')} does not follow from the items that were kept",
    )


def suites(found: Sequence[Panel]) -> list[Suite]:
    """Return one suite a model and kind of device, of panels with one direction on two or more tasks."""
    grouped: dict[tuple[str, str], list[Panel]] = {}
    for panel in found:
        first = panel.rows[0]
        grouped.setdefault((str(first["model"]), str(first["device_kind"])), []).append(panel)
    whole = {panel.title for panel in found}
    out = []
    for group in grouped.values():
        if len(group) < 2 or {p.title for p in group} != whole or len({p.greater_is_better for p in group}) > 1:
            continue
        where = [{row["variant"]: i for i, row in enumerate(panel.rows)} for panel in group]
        common = [v for v in where[0] if all(v in place for place in where)]
        suite = [[place[v] for place in where] for v in common]
        if len(common) < 2:
            continue
        sign = -1.0 if group[0].greater_is_better else 1.0
        means = [float(np.mean([p.samples[i].runs.mean() for p, i in zip(group, at, strict=True)])) for at in suite]
        order = sorted(range(len(common)), key=lambda c: (sign * means[c], common[c]))
        rows = [_over_tasks_row([p.rows[i] for p, i in zip(group, suite[c], strict=True)]) for c in order]
        out.append(Suite(rows, group[0].greater_is_better, list(group), [suite[c] for c in order]))
    return out


def _over_tasks_row(rows: Sequence[Row]) -> dict[Any, Any]:
    """Return one row for all tasks: costs are means over tasks, None where one is missing."""
    row = dict(rows[0])
    row["is_reference"] = all(r["is_reference"] for r in rows)
    for column in COSTS:
        costs = [number(r[column]) for r in rows]
        known = [c for c in costs if c is not None]
        row[column] = sum(known) / len(known) if len(known) == len(costs) else None
    return row


COSTS = {
    "adapter_parameters": "parameters",
    "step_seconds_p50": "step time",
    "memory_peak_bytes": "peak memory",
}
"""Columns that are costs, less is better, and what a front against each is called."""


def costs_of(rows: Sequence[Row]) -> list[str]:
    """Return the costs that all rows have and that differ between them, peaks of memory of one kind only."""
    found = []
    for column in COSTS:
        known = [number(row[column]) for row in rows]
        if column == "memory_peak_bytes" and len({row["memory_kind"] for row in rows}) > 1:
            continue
        if None not in known and len(set(known)) > 1:
            found.append(column)
    return found
