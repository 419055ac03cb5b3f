"""A folder of runs → its tables: all tasks side by side, and one comparison with intervals, gaps and tiers."""

import math

from peftbench.analysis.comparisons import Comparison
from peftbench.analysis.frame import number, rows_of
from peftbench.analysis.intervals import interval
from peftbench.analysis.tables import human_bytes, human_count, human_seconds, metric_digits, metric_title, plus_minus
from peftbench.paper.names import method
from peftbench.paper.runs import HEAD, Study, ends, over, place_of
from peftbench.paper.values import Sheet, between, cells, decimals, tex

TASKS = {
    "cola": "CoLA", "mrpc": "MRPC", "rte": "RTE", "sst2": "SST-2", "stsb": "STS-B", "qnli": "QNLI", "qqp": "QQP",
    "mnli": "MNLI", "wnli": "WNLI",
}  # fmt: skip


def sheets(study: Study) -> dict[str, Sheet]:
    """Return the tables by name: `<study>-tasks`, `<study>-mean` and `<study>-<task>`, `<study>-cost`."""
    alone = len(study.parts) == 1  # a single task has room for what is said against the head
    found = {f"{study.name}-{part}": comparison_sheet(one, alone) for part, one in study.parts if len(one.rows) > 1}
    if study.suite is not None:
        found[f"{study.name}-tasks"] = tasks_sheet(study)
    cost = cost_sheet(study)
    return found if cost is None else found | {f"{study.name}-cost": cost}


def tasks_sheet(study: Study) -> Sheet:
    """Return mean ± standard deviation over seeds of every method on every task, with its tiers there."""
    assert study.suite is not None
    panels = study.suite.panels
    digits = metric_digits([e.value for p in panels for e in p.estimates])
    rows = []
    for row, mean in zip(study.suite.rows, study.suite.estimates, strict=True):
        line = [method(row["variant"]), human_count(row["adapter_parameters"])]
        line += [decimals(mean.value, digits) or ""]
        written = cells(line)
        for panel in panels:
            place = place_of(panel, row["variant"])
            one = None if place is None else panel.rows[place]
            text = "--" if one is None else tex(plus_minus(one["test_mean"], one["test_std"], digits))
            tier = None if place is None else panel.letters[place]
            written.append(text if tier is None else rf"{text}\tier{{{tex(tier)}}}")
        rows.append(written)
    headers = ["method", "parameters", f"mean of {len(panels)}"]
    headers += [TASKS.get(str(p.rows[0]["task"]), p.title) for p in panels]
    titles = [metric_title(p.rows[0]["primary_metric"]).removesuffix(" correlation") for p in panels]
    measures = ["", "", *map(tex, titles)]
    return Sheet("lrr" + "l" * len(panels), [*map(tex, headers)], [["", "", *measures[1:]], None, *rows])


def comparison_sheet(comparison: Comparison, heads_too: bool) -> Sheet:
    """Return each method's value with its interval, its gaps with theirs, and its tiers."""
    digits = metric_digits([e.value for e in comparison.estimates])
    heads = over(comparison) if heads_too and place_of(comparison, HEAD) is not None else {}
    headers = ["method", "parameters", "test", r"95\,\% interval"]
    if comparison.reference is not None:
        headers += ["gap to full", r"95\,\% interval", "$p$ (Holm)", "MDE"]
    if heads:
        headers += ["over the head", r"95\,\% interval"]
    rows = []
    for i, (row, estimate) in enumerate(zip(comparison.rows, comparison.estimates, strict=True)):
        line = [method(row["variant"]), human_count(row["adapter_parameters"]), decimals(estimate.value, digits)]
        line.append(between(interval(estimate), digits))
        gap = comparison.gaps.get(i)
        if gap is not None:
            line += [decimals(gap.estimate.value, digits, True), between(ends(gap), digits), _p(gap.holm)]
            line.append(decimals(gap.among, digits))
        elif comparison.reference is not None:
            line += ["reference", "", "", ""]
        if heads:
            above = heads.get(i)
            line += ["reference", ""] if above is None else [
                decimals(above.estimate.value, digits, True), between(ends(above), digits)
            ]  # fmt: skip
        rows.append(cells([*line, comparison.letters[i]]))
    return Sheet("l" + "r" * (len(headers) - 1) + "l", [*headers, "tier"], rows)


def _p(value: float) -> str | None:
    if math.isnan(value):
        return None
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def cost_sheet(study: Study) -> Sheet | None:
    """Return what each method costs, the largest over tasks; None where nothing was measured."""
    groups: dict[str, list[dict[object, object]]] = {}
    for row in rows_of(study.chosen):
        groups.setdefault(str(row["variant"]), []).append(row)
    rows = []
    for variant, members in groups.items():

        def most(column: str, members: list[dict[object, object]] = members) -> float | None:
            return max((v for m in members if (v := number(m[column])) is not None), default=None)

        if most("memory_peak_bytes") is None:
            continue
        steps = [v for m in members if (v := number(m["step_seconds_p50"])) is not None]
        span = " to ".join(dict.fromkeys([human_seconds(min(steps)), human_seconds(max(steps))])) if steps else None
        line: list[str | None] = [
            method(variant),
            human_count(most("adapter_parameters")),
            human_bytes(most("checkpoint_bytes")),
        ]
        line += [_mega(most("flops_per_token")), human_bytes(most("memory_peak_bytes")), span]
        rows.append((most("memory_peak_bytes") or 0.0, cells(line)))
    if not rows:
        return None
    headers = ["method", "parameters", "checkpoint", "MFLOP a token", "peak memory", "step, median"]
    return Sheet("lrrrrr", headers, [line for _, line in sorted(rows, reverse=True)])


def _mega(value: float | None) -> str | None:
    return None if value is None else f"{value / 1e6:.1f}"
