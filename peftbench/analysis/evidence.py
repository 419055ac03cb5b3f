"""What the data can tell apart, as tables and sentences: intervals, tiers, gaps to full fine-tuning, fronts.

Every "no" stands beside the smallest difference that would have been found. docs/statistics.md says what each figure
means.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from peftbench.analysis import fronts
from peftbench.analysis.comparisons import COSTS, Comparison, Panel, Suite, Verdict, costs_of
from peftbench.analysis.findings import cautions, findings, over_new_tasks, scope
from peftbench.analysis.frame import PANEL, number
from peftbench.analysis.intervals import Array, half_widths, interval
from peftbench.analysis.paired import friedman, mcnemar
from peftbench.analysis.power import ALPHA
from peftbench.analysis.resampling import improvement, interquartile_mean, percentiles, shortfall_profile
from peftbench.analysis.tables import MISSING, Table, human_count, metric_digits, metric_title, plus_minus, slug

Column = tuple[str, list[str]]
WITHIN = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2)
FRONT_DRAWS = 1000

READING = (
    "Intervals are at 95 % and cover seeds and test items alike: what another training run and another test set of the "
    "same size would change. Methods that share a letter under *tier* were not told apart (Holm's correction for all "
    "pairs, α = 0.05), which does not make them equal: a *no* comes with the minimum detectable effect (MDE), the "
    "smallest difference found with power 0.8 in a design like this one. *Front* is the share of bootstrap draws in "
    "which a method is on the Pareto front of quality against that cost. docs/statistics.md has the formulas and when "
    "not to trust them."
)


def evidence(panels: Sequence[Panel], suites: Sequence[Suite]) -> list[Table]:
    """Return the tables: over tasks first, then one a panel; panels of one method have none."""
    several = {c for c in ("model", "device_kind") if len({str(p.rows[0][c]) for p in panels}) > 1}
    tables = []
    for suite in suites:
        tables += [_suite(suite, several), _profile(suite, several)]
    tables += [_panel(panel, several) for panel in panels if len(panel.rows) > 1]
    return tables


def pair_frames(panels: Sequence[Panel], suites: Sequence[Suite]) -> dict[str, pd.DataFrame]:
    """Return every pair's verdict, by the stem of its file."""
    several = {c for c in ("model", "device_kind") if len({str(p.rows[0][c]) for p in panels}) > 1}
    named: list[tuple[str, Comparison]] = [(_stem("overview", s, several), s) for s in suites]
    named += [(_stem(p.title, p, several), p) for p in panels if len(p.rows) > 1]
    return {f"pairs-{stem}": _pairs(comparison) for stem, comparison in named}


def _stem(title: str, comparison: Comparison, several: set[str]) -> str:
    return slug("-".join([title, *(str(comparison.rows[0][c]) for c in sorted(several))]))


def _title(comparison: Comparison, several: set[str]) -> str:
    return "".join(f", {comparison.rows[0][c]}" for c in ("model", "device_kind") if c in several)


# -- tables ------------------------------------------------------------------------------------------------------------


def _panel(panel: Panel, several: set[str]) -> Table:
    metric, stem = metric_title(panel.rows[0]["primary_metric"]), _stem(panel.title, panel, several)
    digits = metric_digits([e.value for e in panel.estimates])
    columns, raw = _common(panel, f"test {metric}", digits)
    raw |= _panel_numbers(panel)
    fronts_columns, fronts_raw, fronts_notes = _fronts(panel)
    return Table(
        name=f"evidence-{stem}",
        title=f"{panel.title}{_title(panel, several)}: {metric} with intervals, tiers and gaps",
        headers=[header for header, _ in columns + fronts_columns],
        rows=[list(cells) for cells in zip(*(cells for _, cells in columns + fronts_columns), strict=True)],
        raw=_rounded(raw | fronts_raw),
        notes=[scope(panel), *findings(panel, digits, f"tables/pairs-{stem}.csv"), *cautions(panel), *fronts_notes],
    )


def _suite(suite: Suite, several: set[str]) -> Table:
    tasks, stem = len(suite.panels), _stem("overview", suite, several)
    digits = metric_digits([e.value for e in suite.estimates])
    columns, raw = _common(suite, f"mean of {tasks} tasks", digits)
    found = friedman(suite.scores, suite.greater_is_better) if len(suite.rows) > 2 else None
    extra, extra_raw = _aggregates(suite, digits)
    if found is not None:
        extra.append(("mean rank", [f"{r:.1f}" for r in found.mean_ranks]))
        extra_raw["mean_rank"] = found.mean_ranks.tolist()
    fronts_columns, fronts_raw, fronts_notes = _fronts(suite)
    columns = columns + extra + fronts_columns
    return Table(
        name=f"evidence-{stem}",
        title=f"Over {tasks} tasks{_title(suite, several)}: means with intervals, tiers and gaps",
        headers=[header for header, _ in columns],
        rows=[list(cells) for cells in zip(*(cells for _, cells in columns), strict=True)],
        raw=_rounded(raw | extra_raw | fronts_raw),
        notes=[
            "These tasks, each with the same weight: intervals, tiers and tests say nothing of other tasks.",
            *findings(suite, digits, f"tables/pairs-{stem}.csv"),
            *over_new_tasks(suite, found),
            *fronts_notes,
        ],
    )


def _common(comparison: Comparison, header: str, digits: int) -> tuple[list[Column], dict[str, list[Any]]]:
    """Return the columns that panels and suites share, and their numbers."""
    estimates, gaps = comparison.estimates, comparison.gaps
    ends = [interval(e) for e in estimates]
    places = range(len(estimates))
    columns: list[Column] = [
        ("method", [str(row["variant"]) for row in comparison.rows]),
        (header, [plus_minus(e.value, None, digits) for e in estimates]),
        ("95 % interval", [_ends(end, digits) for end in ends]),
        ("tier", [tier or MISSING for tier in comparison.letters]),
    ]
    raw: dict[str, list[Any]] = {"variant": columns[0][1]}
    raw |= {c: [row[c] for row in comparison.rows] for c in PANEL if c != "task" or isinstance(comparison, Panel)}
    raw |= {
        "mean": [e.value for e in estimates],
        "error": [e.error for e in estimates],
        "low": [end and end[0] for end in ends],
        "high": [end and end[1] for end in ends],
        "seeds_error": [e.seeds and np.sqrt(e.seeds.variance) for e in estimates],
        "items_error": [e.items and np.sqrt(e.items.variance) for e in estimates],
        "tier": list(comparison.letters),
    }
    drawn = comparison.drawn()
    boot = [percentiles(drawn[:, i]) if estimates[i].sources else (None, None) for i in places]
    raw |= {"bootstrap_low": [b[0] for b in boot], "bootstrap_high": [b[1] for b in boot]}
    if comparison.reference is None:
        return columns, raw
    gap_ends = {i: interval(v.estimate) for i, v in gaps.items()}
    columns += [
        ("gap to full", [_gap(gaps.get(i), digits) for i in places]),
        ("95 % interval of the gap", [_ends(gap_ends.get(i), digits) for i in places]),
        ("differs from full", [_verdict(gaps.get(i), digits) for i in places]),
    ]
    for name, get in (
        ("gap", lambda v: v.estimate.value), ("gap_error", lambda v: v.estimate.error),
        ("gap_low", lambda v: _end(v, 0)), ("gap_high", lambda v: _end(v, 1)), ("gap_p", lambda v: v.p),
        ("gap_p_holm", lambda v: v.holm), ("gap_p_benjamini_hochberg", lambda v: v.hochberg),
        ("differs_from_full", lambda v: v.apart if v.estimate.sources else None),
        ("gap_detectable", lambda v: v.alone), ("gap_detectable_corrected", lambda v: v.among),
        ("gap_comparisons", lambda v: v.family),
    ):  # fmt: skip
        raw[name] = [get(gaps[i]) if i in gaps else None for i in places]
    return columns, raw


def _end(verdict: Verdict, which: int) -> float | None:
    found = interval(verdict.estimate)
    return None if found is None else found[which]


def _panel_numbers(panel: Panel) -> dict[str, list[Any]]:
    """Return what only the csv has of a panel: counts, the gap with seeds in pairs, McNemar's test seed by seed."""
    paired = [panel.paired_gap(i) if i in panel.gaps else None for i in range(len(panel.rows))]
    ends = [p and interval(p) for p in paired]
    raw: dict[str, list[Any]] = {
        "seeds": [len(s.runs) for s in panel.samples],
        "items": [panel.items] * len(panel.rows),
        "gap_seed_paired": [p and p.value for p in paired],
        "gap_seed_paired_low": [end and end[0] for end in ends],
        "gap_seed_paired_high": [end and end[1] for end in ends],
    }
    tests = [_mcnemar(panel, i) if i in panel.gaps else None for i in range(len(panel.rows))]
    if any(tests):
        raw["mcnemar_seeds"] = [t and t[0] for t in tests]
        raw["mcnemar_p_below_alpha"] = [t and t[1] for t in tests]
    return raw


def _mcnemar(panel: Panel, index: int) -> tuple[int, int] | None:
    """Return the seeds that both have, and in how many McNemar's exact test tells the models apart."""
    assert panel.reference is not None
    mine, full = panel.samples[index], panel.samples[panel.reference]
    if mine.items is None or full.items is None:
        return None
    if not (np.isin(mine.items, (0, 1)).all() and np.isin(full.items, (0, 1)).all()):
        return None
    shared = sorted(set(mine.seeds) & set(full.seeds))
    p = [mcnemar(mine.items[mine.seeds.index(s)], full.items[full.seeds.index(s)]).p for s in shared]
    return (len(shared), sum(one < ALPHA for one in p)) if shared else None


def _aggregates(suite: Suite, digits: int) -> tuple[list[Column], dict[str, list[Any]]]:
    """Return the interquartile mean and the probability of beating full fine-tuning, with bootstrap intervals."""
    places = range(len(suite.rows))
    columns: list[Column] = []
    raw: dict[str, list[Any]] = {}
    enough = [all(len(runs) > 1 for runs in suite.runs(i)) for i in places]
    if _one_scale(suite):
        values = [float(interquartile_mean(np.concatenate(suite.runs(i)))) for i in places]
        ends = [
            percentiles(interquartile_mean(np.concatenate(suite.runs_drawn(i), axis=1))) if enough[i] else None
            for i in places
        ]
        cells = [f"{plus_minus(v, None, digits)} {_ends(e, digits)}" for v, e in zip(values, ends, strict=True)]
        columns.append(("IQM", cells))
        raw |= {"iqm": values, "iqm_low": [e and e[0] for e in ends], "iqm_high": [e and e[1] for e in ends]}
    if suite.reference is not None:
        greater, full = suite.greater_is_better, suite.reference
        chances = [None if i == full else float(improvement(suite.runs(i), suite.runs(full), greater)) for i in places]
        ends = [
            percentiles(improvement(suite.runs_drawn(i), suite.runs_drawn(full), greater))
            if i != full and enough[i] and enough[full]
            else None
            for i in places
        ]
        cells = [MISSING if c is None else f"{c:.2f} {_ends(e, 2)}" for c, e in zip(chances, ends, strict=True)]
        columns.append(("P(beats full)", cells))
        raw |= {"beats_full": chances, "beats_full_low": [e and e[0] for e in ends]}
        raw |= {"beats_full_high": [e and e[1] for e in ends]}
    return columns, raw


def _one_scale(suite: Suite) -> bool:
    """Whether the tasks' metrics may be sorted together: the same metric, or ratios and correlations all."""
    if len({p.rows[0]["primary_metric"] for p in suite.panels}) == 1:
        return True
    return bool(np.abs(suite.scores).max() <= 1)


def _profile(suite: Suite, several: set[str]) -> Table:
    shares = shortfall_profile(
        [suite.runs(i) for i in range(len(suite.rows))], WITHIN, greater_is_better=suite.greater_is_better
    )
    names = [str(row["variant"]) for row in suite.rows]
    return Table(
        name=f"profile-{_stem('overview', suite, several)}",
        title=f"Performance profile{_title(suite, several)}: share of runs within so much of the task's best method",
        headers=["method", *(f"{w:g}" for w in WITHIN)],
        rows=[[name, *(f"{share:.2f}" for share in row)] for name, row in zip(names, shares, strict=True)],
        raw=_rounded({"variant": names} | {f"within {w:g}": shares[:, k].tolist() for k, w in enumerate(WITHIN)}),
        notes=["In the metric's unit, from the best mean on a task; each task has the same weight."],
    )


def _pairs(comparison: Comparison) -> pd.DataFrame:
    verdicts = comparison.pairs
    names = [str(row["variant"]) for row in comparison.rows]
    reach = half_widths([v.estimate for v in verdicts])
    return _rounded(
        {
            "first": [names[v.first] for v in verdicts],
            "second": [names[v.second] for v in verdicts],
            "difference": [v.estimate.value for v in verdicts],
            "error": [v.estimate.error for v in verdicts],
            "low": [v.estimate.value - r for v, r in zip(verdicts, reach, strict=True)],
            "high": [v.estimate.value + r for v, r in zip(verdicts, reach, strict=True)],
            "p": [v.p for v in verdicts],
            "p_holm": [v.holm for v in verdicts],
            "p_benjamini_hochberg": [v.hochberg for v in verdicts],
            "told_apart": [v.apart if v.estimate.sources else None for v in verdicts],
            "detectable": [v.alone for v in verdicts],
            "detectable_corrected": [v.among for v in verdicts],
        }
    )


# -- fronts ------------------------------------------------------------------------------------------------------------


def _fronts(comparison: Comparison) -> tuple[list[Column], dict[str, list[Any]], list[str]]:
    """Return shares of draws on the front against each cost and all of them, and what hypervolume each method holds."""
    costs = costs_of(comparison.rows)
    if not costs or len(comparison.rows) < 2:
        return [], {}, []
    table = np.array([[float(row[c]) for c in costs] for row in comparison.rows])
    quality = comparison.drawn()[:FRONT_DRAWS]
    columns: list[Column] = []
    raw: dict[str, list[Any]] = {}
    sets = [(COSTS[c], [k]) for k, c in enumerate(costs)]
    if len(costs) > 1:
        sets.append(("all costs", list(range(len(costs)))))
    for name, which in sets:
        shares = fronts.membership(quality, table[:, which], comparison.greater_is_better)
        columns.append((f"front: {name}", [f"{share:.2f}" for share in shares]))
        raw[f"front_{name.replace(' ', '_')}"] = shares.tolist()
    volume, notes = _hypervolume(comparison)
    return columns, raw | volume, notes


def _hypervolume(comparison: Comparison) -> tuple[dict[str, list[Any]], list[str]]:
    """Return how much of the front's hypervolume each method alone holds, quality against log10(1 + parameters)."""
    parameters = [number(row["adapter_parameters"]) for row in comparison.rows]
    if None in parameters or len(set(parameters)) < 2:
        return {}, []
    cost: Array = np.log10(1 + np.array(parameters, dtype=float))
    quality = np.array([e.value for e in comparison.estimates])
    worst = float(quality.min() if comparison.greater_is_better else quality.max())
    points, maximise = np.column_stack([quality, cost]), [comparison.greater_is_better, False]
    corner = (worst, float(cost.max()))
    whole = fronts.hypervolume(points, corner, maximise)
    if whole <= 0:
        return {}, []
    losses = fronts.hypervolume_losses(points, corner, maximise) / whole
    named = sorted(
        ((loss, str(row["variant"])) for loss, row in zip(losses, comparison.rows, strict=True)), reverse=True
    )
    most = ", ".join(f"{name} {loss:.1%}".replace("%", " %") for loss, name in named[:5] if loss >= 0.0005)
    note = (
        f"Hypervolume of quality against log10(1 + adapter parameters): {whole:.4g}, reference point (the worst of "
        f"each): quality {worst:.4g}, {human_count(max(p for p in parameters if p is not None))} parameters."
    )
    if most:
        note += f" Lost with one method alone: {most}."
    return {"hypervolume_share": losses.tolist()}, [note]


# -- cells -------------------------------------------------------------------------------------------------------------


def _ends(found: tuple[float, float] | None, digits: int) -> str:
    return MISSING if found is None else f"[{plus_minus(found[0], None, digits)}, {plus_minus(found[1], None, digits)}]"


def _gap(verdict: Verdict | None, digits: int) -> str:
    return "reference" if verdict is None else plus_minus(verdict.estimate.value, None, digits, signed=True)


def _verdict(verdict: Verdict | None, digits: int) -> str:
    if verdict is None or not verdict.estimate.sources:
        return MISSING
    return "yes" if verdict.apart else f"no (MDE {verdict.among:.{digits}f})"


def _rounded(raw: dict[str, Any]) -> pd.DataFrame:
    """Return a frame with floats at 6 significant digits, as more are noise of the machine's summation."""

    def short(value: Any) -> Any:
        if value is None or isinstance(value, str | bool | np.bool_ | int):
            return value
        return float(f"{float(value):.6g}") if np.isfinite(value) else None

    return pd.DataFrame({name: [short(v) for v in values] for name, values in raw.items()})
