"""What changed between two sweeps: the same configurations in both, their difference with an interval, and a verdict.

A configuration is the same where model, method, task, recipe and protocol agree setting by setting; code, weights, data
and device may differ, which is what a comparison is for, and is said. Where the same seeds ran on both sides they are
compared in pairs, as the same seed sets the same order of data and the same adapter; else seeds count as independent.
All differences are one family, corrected by Holm. Runs that came out the same in every recorded item are no part of
it: what changed nothing for them cannot have made them better or worse.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from peftbench.analysis.comparisons import Verdict, contributions, judge
from peftbench.analysis.frame import Record, configurations, content, dig, frame, number, rows_of, task_title
from peftbench.analysis.html import Section
from peftbench.analysis.intervals import Estimate, difference, interval, paired_difference, sample
from peftbench.analysis.tables import MISSING, Table, metric_digits, plus_minus, slug
from peftbench.errors import UserError

Row = Mapping[Any, Any]
COSTS = {"step_seconds_p50": "step time", "memory_peak_bytes": "peak memory", "checkpoint_bytes": "checkpoint"}
"""Costs whose ratio is shown."""
IDENTITY = ("engine", "method", "weights", "data", "device_kind")
MOST_NAMES = 12


@dataclass(frozen=True)
class Side:
    """One sweep: its name, and of each configuration its row, its runs and their records."""

    name: str
    rows: dict[str, Row]
    runs: dict[str, list[Row]]
    records: dict[str, Record]


@dataclass(frozen=True)
class Change:
    """One configuration in both sweeps: `estimate` is the second's mean less the first's; `pairs` of seeds, or 0.

    `over` says what of the test items is known; `differs` names parts of the identity; `identical`: the seeds compared
    are the same on both sides and came out the same in every metric and item that was kept of the test.
    """

    first: Row
    second: Row
    estimate: Estimate
    pairs: int
    over: str
    differs: tuple[str, ...]
    identical: bool


def same(spec: Mapping[str, Any]) -> str:
    """Return a text equal for all runs of one configuration, whatever code, weights, data and device they used."""
    kept = content(spec)
    return json.dumps({key: kept[key] for key in kept if key != "identity"}, sort_keys=True, default=str)


def side(name: str, records: Sequence[Record]) -> Side:
    """Return one sweep ready to be compared.

    Raises:
        UserError: none of its runs completed.
    """
    runs = frame(records) if records else pd.DataFrame()
    if runs.empty or not (runs["status"] == "completed").any():
        raise UserError(f"{name}: no completed run, so nothing to compare")
    by_id = {str(r["run_id"]): r for r in sorted(records, key=lambda r: r.get("status") == "completed")}
    rows: dict[str, Row] = {}
    found: dict[str, list[Row]] = {}
    keys = {row["run_id"]: same(by_id[row["run_id"]]["spec"]) for row in rows_of(runs[["run_id"]])}
    of: dict[str, str] = {}
    for run in rows_of(runs):
        of[run["configuration"]] = keys[run["run_id"]]
        if run["test"] is not None:
            found.setdefault(run["configuration"], []).append(run)
    # One sweep may hold a configuration twice, made by two versions of the code: the one with the most runs stands.
    for row in sorted(rows_of(configurations(runs)), key=lambda r: (r["seeds"], r["configuration"])):
        rows[of[row["configuration"]]] = row
    return Side(name, rows, {key: found.get(row["configuration"], []) for key, row in rows.items()}, by_id)


def changes(first: Side, second: Side) -> list[Change]:
    """Return what both sweeps have a score of, by task, model and method."""
    found = []
    for key in first.rows.keys() & second.rows.keys():
        if first.runs[key] and second.runs[key]:
            found.append(_change(first, second, key))
    return sorted(found, key=lambda c: (task_title(c.second), c.second["model"], c.second["method"], c.second["label"]))


def _change(first: Side, second: Side, key: str) -> Change:
    kept = [
        sorted({int(run["seed"]): run for run in side.runs[key]}.values(), key=lambda run: int(run["seed"]))
        for side in (first, second)
    ]
    records = [[side.records[run["run_id"]] for run in runs] for side, runs in zip((first, second), kept, strict=True)]
    flat = [run for runs in kept for run in runs]
    items, reason = contributions([r for side in records for r in side], flat)
    cut = len(kept[0])
    parts = (None, None) if items is None else (np.array(items[:cut]), np.array(items[cut:]))
    old, new = (
        sample([int(r["seed"]) for r in runs], [float(r["test"]) for r in runs], part)
        for runs, part in zip(kept, parts, strict=True)
    )
    shared = set(old.seeds) & set(new.seeds)
    paired = paired_difference(new, old) if len(shared) > 1 else None
    differs = [
        name
        for name in IDENTITY
        if {str(dig(r, ("spec", "identity", name))) for r in records[0]}
        != {str(dig(r, ("spec", "identity", name))) for r in records[1]}
    ]
    over = reason if items is None else f"{len(items[0])} items"
    outcomes = [_outcomes(side, shared) for side in records]
    return Change(
        first.rows[key], second.rows[key], paired or difference(new, old), len(shared) if paired else 0, over,
        tuple(differs),
        (paired is not None or old.seeds == new.seeds) and outcomes[0] == outcomes[1],
    )  # fmt: skip


def _outcomes(records: Sequence[Record], seeds: set[int]) -> list[tuple[Any, Any]]:
    kept = [r for r in records if int(r["spec"]["seed"]) in seeds]
    return [(dig(r, ("quality", "test")), dig(r, ("quality", "items", "test"))) for r in kept]


def verdicts_of(found: Sequence[Change]) -> list[Verdict | None]:
    """Return the verdict on each change, those that are not identical being one family; None for identical ones."""
    places = [i for i, change in enumerate(found) if not change.identical]
    judged = iter(judge([(i, i) for i in places], [found[i].estimate for i in places]))
    return [None if change.identical else next(judged) for change in found]


def section(first: Side, second: Side) -> Section:
    """Return the comparison as a section of the second sweep's report.

    Raises:
        UserError: no configuration is in both.
    """
    found = changes(first, second)
    if not found:
        raise UserError(
            f"{first.name} and {second.name} share no configuration with a score: expected equal settings of "
            "model, method, task, train and protocol in both"
        )
    verdicts = verdicts_of(found)
    return Section(
        f"Changes since {first.name}",
        _sentences(first, second, found, verdicts),
        [_table(first, second, found, verdicts)],
    )


def _better(change: Change) -> bool:
    return (change.estimate.value > 0) == bool(change.second["greater_is_better"])


def _sentences(first: Side, second: Side, found: Sequence[Change], verdicts: Sequence[Verdict | None]) -> list[str]:
    apart = [c for c, v in zip(found, verdicts, strict=True) if v is not None and v.apart]
    judged = [v for v in verdicts if v is not None]
    tested = [v for v in judged if v.estimate.sources]
    better = sum(map(_better, apart))
    lines = [
        f"{len(found)} configurations ran in both {first.name} and {second.name} with equal settings; a change is the "
        f"mean of {second.name} less that of {first.name}."
    ]
    if same_ones := len(found) - len(judged):
        lines.append(f"{same_ones} came out the same in all that was recorded of their tests.")
    if tested:
        lines.append(
            f"Of {len(tested)} that were tested, {better} got better and {len(apart) - better} got worse, corrected "
            f"for {len(tested)} comparisons (Holm, α = 0.05); for {len(tested) - len(apart)} no change was found "
            "(MDE: the smallest that would have been)."
        )
    if len(tested) < len(judged):
        lines.append(f"{len(judged) - len(tested)} could not be tested: a single seed on one side.")
    differs = sorted({name for c in found for name in c.differs})
    if differs:
        what = ", ".join(f"{n.replace('_', ' ')} ({sum(n in c.differs for c in found)})" for n in differs)
        lines.append(f"Between them, beside the settings, these differ (configurations): {what}.")
    said = (_commits(first, second), _only(first, second), _only(second, first))
    lines += [line for line in (*said, _lost(first, second), _lost(second, first)) if line]
    paired = sum(c.pairs > 0 for c in found)
    lines.append(f"{paired} are compared seed by seed, {len(found) - paired} by their means as independent runs.")
    return lines


def _commits(first: Side, second: Side) -> str:
    def of(side: Side) -> str:
        commits = sorted({str(c)[:10] for r in side.records.values() if (c := dig(r, ("environment", "git_commit")))})
        return ", ".join(commits[:4]) + (" and more" if len(commits) > 4 else "") if commits else "not recorded"

    return f"Commits: {of(first)} → {of(second)}."


def _only(here: Side, there: Side) -> str:
    rows = [row for key, row in here.rows.items() if key not in there.rows]
    if not rows:
        return ""
    names = sorted({f"{row['label']} on {task_title(row)}" for row in rows})
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return f"Only in {here.name}: {len(rows)} configurations ({'; '.join(names[:MOST_NAMES])}{more})."


def _lost(completed: Side, here: Side) -> str:
    """Return a line on runs that completed on the one side and are there, but did not complete, on the other."""
    scored = _by_run(completed)
    lost = {key: r for key, r in _by_run(here).items() if r["status"] != "completed" and key in scored}
    lost = {key: r for key, r in lost.items() if scored[key]["status"] == "completed"}
    if not lost:
        return ""
    names = sorted(f"{r['status'].replace('_', ' ')}: {r['run_id']}" for r in lost.values())
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    what = f"**{len(lost)} run{'s' * (len(lost) > 1)} did not complete in {here.name} that did in {completed.name}**"
    return f"{what} ({'; '.join(names[:MOST_NAMES])}{more})."


def _by_run(side: Side) -> dict[tuple[str, Any], Record]:
    """Return each run's record; of several, a completed one."""
    return {(same(r["spec"]), r["spec"]["seed"]): r for r in side.records.values()}


def without_identical(table: Table) -> Table:
    """Return a comparison's table without the rows in which nothing changed, and a note on how many these are."""
    verdict = table.headers.index("changed")
    kept = [row for row in table.rows if row[verdict] != "identical"]
    left = len(table.rows) - len(kept)
    note = [f"{left} identical ones are in the report."] if left else []
    return replace(table, rows=kept, notes=[*table.notes, *note])


def _table(first: Side, second: Side, found: Sequence[Change], verdicts: Sequence[Verdict | None]) -> Table:
    digits = metric_digits([c.second["test_mean"] for c in found])
    several = [(c, h) for c, h in (("model", "model"),) if len({x.second[c] for x in found}) > 1]
    costs = [c for c in COSTS if any(_ratio(x, c) is not None for x in found)]
    rows, raws = [], []
    # What changed stands first, what could not be told next, what is identical last; each by task, model and method.
    for change, verdict in sorted(zip(found, verdicts, strict=True), key=lambda pair: _rank(pair[1])):
        ends = interval(change.estimate)
        shown = MISSING if ends is None else f"[{', '.join(plus_minus(e, None, digits, signed=True) for e in ends)}]"
        rows.append(
            [
                str(change.second["label"]), task_title(change.second), *(str(change.second[c]) for c, _ in several),
                plus_minus(change.first["test_mean"], change.first["test_std"], digits),
                plus_minus(change.second["test_mean"], change.second["test_std"], digits),
                plus_minus(change.estimate.value, None, digits, signed=True),
                shown,
                _verdict(change, verdict, digits),
                f"{change.pairs} pairs" if change.pairs else f"{change.first['seeds']}, {change.second['seeds']}",
                *(MISSING if (r := _ratio(change, c)) is None else f"{r:.2f}" for c in costs),
            ]
        )  # fmt: skip
        raws.append(_raw(change, verdict, ends))
    return Table(
        name=f"changes-{slug(first.name)}",
        title=f"{first.name} → {second.name}: test metric of the same configurations",
        headers=["configuration", "task", *(h for _, h in several), first.name, second.name, "change", "95 % interval",
                 "changed", "seeds", *(f"{COSTS[c]} ×" for c in costs)],
        rows=rows,
        raw=pd.DataFrame(raws),
        text_columns=2 + len(several),
        notes=["Test metrics are means ± standard deviation over seeds. × is the second's cost over the first's."],
    )  # fmt: skip


def _rank(verdict: Verdict | None) -> int:
    return 2 if verdict is None else int(not verdict.apart)


def _verdict(change: Change, verdict: Verdict | None, digits: int) -> str:
    if verdict is None:
        return "identical"
    if not change.estimate.sources:
        return MISSING
    if not verdict.apart:
        return f"no (MDE {verdict.among:.{digits}f})"
    return "better" if _better(change) else "worse"


def _ratio(change: Change, column: str) -> float | None:
    old, new = number(change.first[column]), number(change.second[column])
    if column == "memory_peak_bytes" and change.first["memory_kind"] != change.second["memory_kind"]:
        return None
    return new / old if old and new is not None else None


def _raw(change: Change, verdict: Verdict | None, ends: tuple[float, float] | None) -> dict[str, Any]:
    second = change.second
    named = {key: second[key] for key in ("label", "method", "task", "model", "protocol", "data_subset")}
    both = {
        f"{which}_{key}": row[f"test_{key}"] if key != "seeds" else row["seeds"]
        for which, row in (("first", change.first), ("second", second))
        for key in ("mean", "std", "seeds")
    }
    tested = verdict is not None and bool(change.estimate.sources)
    return {
        **named,
        **both,
        "change": change.estimate.value,
        "error": change.estimate.error,
        "low": ends and ends[0],
        "high": ends and ends[1],
        "identical": change.identical,
        "p": verdict and verdict.p,
        "p_holm": verdict and verdict.holm,
        "p_benjamini_hochberg": verdict and verdict.hochberg,
        "changed": verdict and (verdict.apart if tested else None),
        "better": _better(change) if verdict and verdict.apart else None,
        "detectable": verdict and verdict.among,
        "pairs": change.pairs,
        "over": change.over,
        "differs": " ".join(change.differs),
        **{f"{column}_ratio": _ratio(change, column) for column in COSTS},
    }
