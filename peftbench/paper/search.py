"""A folder with methods tuned on an equal budget → values and tables; its final runs are compared as other runs are."""

from collections.abc import Sequence

from peftbench.analysis import comparisons, frame, search_report
from peftbench.analysis.tables import MISSING, human_seconds
from peftbench.analysis.tuning import tuning
from peftbench.paper import run_sheets, runs
from peftbench.paper.names import method
from peftbench.paper.sources import Record, Source
from peftbench.paper.values import RAGGED, Sheet, Values, cells, tex


def put(source: Source, records: Sequence[Record], values: Values) -> dict[str, Sheet]:
    """Keep what the final runs say and what tuning took; returns their tables, `<source>-tuned` among them."""
    assert source.there is not None
    plan = search_report.read_plan(source.there)
    assert plan is not None
    final = search_report.compared(records, plan)
    study = runs.Study(source.name, final)
    runs.put(study, values)
    by_id = {str(r.get("run_id")): r for r in records}
    costs = tuning(search_report.read_studies(source.there, records), by_id)
    values.put(f"{source.name}/budget", plan.statement)
    values.count(f"{source.name}/trial-runs", len(records) - len(final))
    values.count(f"{source.name}/trials", sum(cost.trials for cost in costs))
    values.put(f"{source.name}/tuning-seconds", human_seconds(sum(cost.charge.seconds or 0 for cost in costs)))
    panels = comparisons.panels(final, study.runs, frame.selected(study.table))
    rows: list[list[str] | None] = []
    for model, task in dict.fromkeys((entry.model, entry.task) for entry in plan.entries):
        table = search_report.equal_budget_table(plan, model, task, panels, by_id, costs)
        rows += [None] if rows else []
        for row in table.rows:
            first, settings, *rest = row[: 2 + 4]
            rows.append(
                [tex(task), tex(method(first)), tex(settings), *cells([None if c == MISSING else c for c in rest])]
            )
    headers = ["task", "method", "best settings", "test", r"95\,\% interval", "tier", "validation, tuned"]
    tuned = Sheet(rf"ll{RAGGED}p{{0.3\textwidth}}rrlr", headers, rows)
    return run_sheets.sheets(study) | {f"{source.name}-tuned": tuned}
