"""A search's report: `<folder>/search/report/`, and where methods were tuned on an equal budget what came of it.

A pure function of studies, records and the file `search/budget.json`, which says how the budget was made equal and
which runs are the final comparison (see `peftbench.budget`).
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd

from peftbench.analysis import comparisons, evidence, extras, plots, search_plots, search_tables, tables
from peftbench.analysis.comparisons import Panel
from peftbench.analysis.frame import Record, configurations, frame, number, selected
from peftbench.analysis.html import Section
from peftbench.analysis.intervals import interval
from peftbench.analysis.studies import Importance, Study, importance, of_optuna, of_records
from peftbench.analysis.tables import (
    MISSING,
    Table,
    human_count,
    human_seconds,
    metric_digits,
    metric_title,
    plus_minus,
    slug,
)
from peftbench.analysis.tuning import Tuning, training_flops, tuning
from peftbench.errors import UserError

FOLDER, BUDGET = "search", "budget.json"
R = TypeVar("R", bound=Mapping[str, Any])
SHOWN = ("search-overview", "search-cost", "search-importance")
"""Tables that the folder's own report has too."""
STORAGES = ("study.db", "journal.log")
CHARGED = (
    "Tuning cost is charged to each method: steps, real tokens and seconds of the device over all its trials, pruned "
    "and failed ones included; a run's seconds are its share of its pack's. Measuring cost and the final runs are not "
    "in it. A dash: not known (cost or energy was not measured)."
)


@dataclass(frozen=True)
class Entry:
    """What a budget says of one method on one model and task."""

    method: str
    model: str
    task: str
    status: str
    note: str | None
    settings: str | None
    validation: float | None
    wanted: float | None
    had: float | None
    matched: bool | None
    final: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """An equal budget: what was held equal in a sentence, the seeds of the final runs, and each method's entry."""

    budget: str
    statement: str
    unit: str | None
    seeds: tuple[int, ...]
    tuning_seeds: tuple[int, ...]
    entries: tuple[Entry, ...]
    lines: tuple[str, ...] = ()


def read_plan(folder: Path) -> Plan | None:
    """Return what `search/budget.json` says; None where there is none.

    Raises:
        UserError: it cannot be read.
    """
    path = folder / FOLDER / BUDGET
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        entries = tuple(Entry(**{**e, "final": tuple(e["final"])}) for e in content["entries"])
        lists = {key: tuple(content[key]) for key in ("seeds", "tuning_seeds", "lines")}
        return Plan(content["budget"], content["statement"], content["unit"], entries=entries, **lists)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: unreadable ({type(error).__name__}: {error}); run the search again") from error


def has_search(folder: Path) -> bool:
    """Whether a search left anything in `folder`."""
    return (folder / FOLDER).is_dir()


def compared(records: Sequence[R], plan: Plan) -> list[R]:
    """Return the records that are not those of a search's trials, its final runs included; all if nothing is left.

    A trial is one of many tries on one seed: beside final runs it would be one more method to compare.
    """
    final = {run_id for entry in plan.entries for run_id in entry.final}
    kept = [r for r in records if not r.get("search") or str(r.get("run_id")) in final]
    return kept if any(r.get("status") == "completed" for r in kept) else list(records)


def read_studies(folder: Path, records: Sequence[Record]) -> list[Study]:
    """Return the studies of a folder: from its storage where that is a file in it, else from what records say.

    Raises:
        UserError: the storage cannot be opened.
    """
    for name in STORAGES:
        path = folder / FOLDER / name
        if path.exists():
            found = _stored(path)
            if found:
                return found
    return of_records(records)


def _stored(path: Path) -> list[Study]:
    import optuna

    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        storage: Any = f"sqlite:///{path}"
        if path.suffix == ".log":
            from optuna.storages.journal import JournalFileBackend

            storage = optuna.storages.JournalStorage(JournalFileBackend(str(path)))
        names = sorted(optuna.get_all_study_names(storage))
        return [of_optuna(optuna.load_study(study_name=name, storage=storage)) for name in names]
    except Exception as error:  # storages raise errors of their own libraries
        raise UserError(f"{path}: no readable study ({type(error).__name__}: {error})") from error
    finally:
        optuna.logging.set_verbosity(level)


# -- writing -----------------------------------------------------------------------------------------------------------


def write_search_report(folder: Path, records: Sequence[Record], studies: Sequence[Study] | None = None) -> list[Path]:
    """Write `<folder>/search/report/` anew and return the paths written, `report.md` first; nothing without studies.

    Args:
        studies: those to report; None: those that are in the folder.

    Raises:
        UserError: storage or folder cannot be read or written.
    """
    return _report(folder, records, studies)[0]


def for_report(folder: Path, records: Sequence[Record]) -> tuple[list[Record], list[Section]]:
    """Write the search's own report if there is a search, and return what the folder's report takes of it.

    Returns:
        records to compare, and a section on the search; all records and no section where there is none.

    Raises:
        UserError: storage or folder cannot be read or written.
    """
    if not has_search(folder):
        return list(records), []
    section = _report(folder, records, None)[1]
    plan = read_plan(folder)
    shown = list(records) if plan is None else compared(records, plan)
    if section is None:
        return shown, []
    left = len(records) - len(shown)
    note = [f"The {left} runs of its trials are in that report alone: here are those that compare methods."]
    return shown, [replace(section, text=[*section.text, *(note if left else [])])]


def _report(
    folder: Path, records: Sequence[Record], studies: Sequence[Study] | None
) -> tuple[list[Path], Section | None]:
    folder = Path(folder)
    studies = read_studies(folder, records) if studies is None else list(studies)
    if not studies:
        return [], None
    target = folder / FOLDER / "report"
    plan, by_id = read_plan(folder), {str(r.get("run_id")): r for r in records}
    costs = tuning(studies, by_id)
    found = [importance(study) for study in studies]
    try:
        for part in ("tables", "figures"):
            shutil.rmtree(target / part, ignore_errors=True)
            (target / part).mkdir(parents=True)
        first: list[Table] = []
        lines: list[str] = []
        written: list[Path] = []
        if plan is not None:
            first, lines, written = _final(plan, by_id, costs, target)
        all_tables = [*first, *_tables(studies, found, costs)]
        written += [path for one in all_tables for path in _write(one, target / "tables")]
        trials = target / "tables" / "search-trials.csv"
        search_tables.trials_frame(studies).to_csv(trials, index=False, lineterminator="\n")
        written.append(trials)
        figures = []
        for plot in search_plots.all_plots(studies, found):
            written += plots.save(plot, target / "figures")
            figures.append((plot.name, plot.caption))
        report = target / "report.md"
        report.write_text(_markdown(folder, studies, plan, first, lines, all_tables, figures), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{target}: cannot write the report ({error.strerror or error})") from error
    count = sum(len(s.trials) for s in studies)
    where = "[the search's own report](../search/report/report.md)"
    link = f"{count} trials in {len(studies)} searches; all of it is in {where}."
    section = Section(
        "Search",
        [link, *lines],
        [one for one in all_tables if one.name.startswith("equal-budget") or one.name in SHOWN],
        [(target / "figures" / f"{name}.png", caption) for name, caption in figures],
    )
    return [report, *written], section


def _tables(studies: Sequence[Study], found: Sequence[Importance | None], costs: Sequence[Tuning]) -> list[Table]:
    made = [
        search_tables.overview(studies), cost_table(costs), search_tables.optima(studies),
        search_tables.importances(studies, found),
    ]  # fmt: skip
    return [one for one in made if one is not None]


def _write(one: Table, folder: Path) -> list[Path]:
    csv, tex = folder / f"{one.name}.csv", folder / f"{one.name}.tex"
    csv.write_text(tables.to_csv(one), encoding="utf-8")
    tex.write_text(tables.to_latex(one), encoding="utf-8")
    return [csv, tex]


# -- tuning cost -------------------------------------------------------------------------------------------------------

COST_HEADERS = ["trials", "steps", "tokens", "seconds", "energy", "FLOPs"]


def _cost_cells(one: Tuning | None) -> list[str]:
    if one is None:
        return [MISSING] * len(COST_HEADERS)
    c = one.charge
    return [
        str(one.trials) if one.complete == one.trials else f"{one.trials} ({one.pruned} pruned, {one.failed} failed)",
        human_count(c.steps),
        human_count(c.tokens),
        human_seconds(c.seconds),
        MISSING if c.joules is None else f"{c.joules / 1000:.3g} kJ",
        MISSING if c.flops is None else f"{c.flops:.2e}",
    ]


def _cost_numbers(one: Tuning | None) -> dict[str, Any]:
    c = None if one is None else one.charge
    return {
        "tuning_trials": None if one is None else one.trials,
        "tuning_runs": None if one is None else one.runs,
        "tuning_steps": None if c is None else c.steps,
        "tuning_tokens": _short(None if c is None else c.tokens),
        "tuning_seconds": _short(None if c is None else c.seconds),
        "tuning_joules": _short(None if c is None else c.joules),
        "tuning_flops": _short(None if c is None else c.flops),
    }


def _short(value: Any) -> float | None:
    v = number(value)
    return None if v is None else float(f"{v:.6g}")


def cost_table(costs: Sequence[Tuning]) -> Table:
    """One row a method: what its tuning took."""
    notes = [CHARGED]
    shared = [f"{c.method} ({c.trials - c.runs - c.lost})" for c in costs if c.trials > c.runs + c.lost]
    if shared:
        notes.append(f"Trials that asked for a configuration tried before, or made no run: {', '.join(shared)}.")
    lost = [f"{c.method} ({c.lost})" for c in costs if c.lost]
    if lost:
        notes.append(f"Runs without a record, not charged: {', '.join(lost)}.")
    return Table(
        name="search-cost",
        title="What tuning cost",
        headers=["method", *COST_HEADERS],
        rows=[[c.method, *_cost_cells(c)] for c in costs],
        raw=pd.DataFrame([{"method": c.method, **_cost_numbers(c)} for c in costs]),
        notes=notes,
    )


# -- the final comparison ----------------------------------------------------------------------------------------------


def _final(
    plan: Plan, by_id: Mapping[str, Record], costs: Sequence[Tuning], target: Path
) -> tuple[list[Table], list[str], list[Path]]:
    """Return the tables of the final comparison, lines on it, and the files written besides."""
    wanted = [run_id for entry in plan.entries for run_id in entry.final]
    records = [by_id[run_id] for run_id in wanted if run_id in by_id]
    panels, evidence_tables, written = [], [], []
    if any(r.get("status") == "completed" for r in records):
        runs = frame(records)
        chosen = selected(configurations(runs))
        panels = comparisons.panels(records, runs, chosen)
        if not extras.missing():
            suites = comparisons.suites(panels)
            evidence_tables = evidence.evidence(panels, suites)
            for name, pairs in evidence.pair_frames(panels, suites).items():
                path = target / "tables" / f"{name}.csv"
                pairs.to_csv(path, index=False, lineterminator="\n")
                written.append(path)
    lines = [f"Equal budget: {plan.statement}.", *plan.lines]
    absent = len(wanted) - len(records)
    if absent:
        lines.append(f"{absent} of {len(wanted)} final runs are not there yet: run the same command again.")
    if extras.missing():
        lines.append(f"No intervals and tiers: {', '.join(extras.missing())} not installed. {extras.INSTALL}")
    keys = dict.fromkeys((entry.model, entry.task) for entry in plan.entries)
    tables_ = [equal_budget_table(plan, model, task, panels, by_id, costs, len(keys) > 1) for model, task in keys]
    return [*tables_, *evidence_tables], lines, written


def equal_budget_table(
    plan: Plan,
    model: str,
    task: str,
    panels: Sequence[Panel],
    by_id: Mapping[str, Record],
    costs: Sequence[Tuning],
    several: bool = False,
) -> Table:
    """Quality on test beside what tuning cost, one row a method, best first; those left out last, with the reason."""
    entries = [e for e in plan.entries if (e.model, e.task) == (model, task)]
    panel = next((p for p in panels if (p.rows[0]["model"], p.rows[0]["task"]) == (model, task)), None)
    place = {} if panel is None else {str(row["method"]): i for i, row in enumerate(panel.rows)}
    by_method = {c.method: c for c in costs}
    digits = metric_digits([] if panel is None else [e.value for e in panel.estimates])
    metric = metric_title(None if panel is None else panel.rows[0]["primary_metric"])
    tested = panel is not None and not extras.missing()
    held = plan.unit is not None
    rows, raw = [], []
    for entry in sorted(entries, key=lambda e: (place.get(e.method, len(place)), e.method)):
        at = place.get(entry.method)
        row = None if panel is None or at is None else panel.rows[at]
        ends = interval(panel.estimates[at]) if tested and panel is not None and at is not None else None
        tier = panel.letters[at] if tested and panel is not None and at is not None else None
        quality = MISSING if row is None else plus_minus(row["test_mean"], row["test_std"], digits)
        between = (
            MISSING if ends is None else f"[{plus_minus(ends[0], None, digits)}, {plus_minus(ends[1], None, digits)}]"
        )
        cost = by_method.get(entry.method)
        cells = [entry.method, entry.settings or MISSING, quality, between, tier or MISSING]
        cells += [
            plus_minus(entry.validation, None, digits),
            f"{0 if row is None else row['seeds']} of {len(entry.final)}",
        ]
        cells += [_held(entry, plan.unit)] if held else []
        rows.append([*cells, *_cost_cells(cost)])
        raw.append(
            {
                "method": entry.method,
                "model": model,
                "task": task,
                "status": entry.status,
                "settings": entry.settings,
                "test_mean": None if row is None else _short(row["test_mean"]),
                "test_std": None if row is None else _short(row["test_std"]),
                "low": None if ends is None else _short(ends[0]),
                "high": None if ends is None else _short(ends[1]),
                "tier": tier,
                "validation_of_the_search": _short(entry.validation),
                "final_seeds": 0 if row is None else row["seeds"],
                "adapter_parameters": None if row is None else row["adapter_parameters"],
                "training_flops": _short(_flops(entry, by_id)),
                "budget": plan.budget,
                "budget_unit": plan.unit,
                "wanted": _short(entry.wanted),
                "had": _short(entry.had),
                "matched": entry.matched,
                "note": entry.note,
                **_cost_numbers(cost),
            }
        )
    headers = ["method", "best settings", f"test {metric}", "95 % interval", "tier", "validation, tuned", "seeds"]
    headers += [f"{'peak memory' if plan.unit == 'bytes' else plan.unit}, matched"] if held else []
    return Table(
        name="equal-budget" + (f"-{slug(f'{task}-{model}')}" if several else ""),
        title=f"Equal budget, {task} on {model}: test {metric} beside the cost of tuning",
        headers=[*headers, *COST_HEADERS],
        rows=rows,
        raw=pd.DataFrame(raw),
        text_columns=2,
        notes=_notes(plan, entries),
    )


def _notes(plan: Plan, entries: Sequence[Entry]) -> list[str]:
    seeds, before = (", ".join(map(str, s)) for s in (plan.seeds, plan.tuning_seeds))
    notes = [
        f"Settings were selected on validation, carved out of train, with seed {before}; each winner ran again with "
        f"seeds {seeds}, which no trial had, and is tested on those runs alone. *Validation, tuned* is the winning "
        "trial's own value: the best of many, so higher than it should be.",
        "Methods that share a letter under *tier* were not told apart (Holm's correction for all pairs, α = 0.05).",
        CHARGED,
    ]
    return notes + [f"{e.method}: {e.note}." for e in entries if e.note]


def _held(entry: Entry, unit: str | None) -> str:
    """Return what a method had of what was to be equal, and whether that is a match."""
    if entry.had is None:
        return MISSING if entry.matched is None else "no"
    shown = human_seconds(entry.had) if unit == "seconds" else _amount(entry.had, unit)
    share = "" if not entry.wanted else f" ({100 * entry.had / entry.wanted:.0f} %)"
    return f"{shown}{share}, {'yes' if entry.matched else 'no'}"


def _amount(value: float, unit: str | None) -> str:
    if unit == "bytes":
        return tables.human_bytes(value)
    return f"{value:.2e}" if unit == "FLOPs" else human_count(value)


def _flops(entry: Entry, by_id: Mapping[str, Record]) -> float | None:
    found = [f for run_id in entry.final if run_id in by_id and (f := training_flops(by_id[run_id])) is not None]
    return sum(found) / len(found) if found else None


# -- text --------------------------------------------------------------------------------------------------------------


def _markdown(
    folder: Path,
    studies: Sequence[Study],
    plan: Plan | None,
    first: Sequence[Table],
    lines: Sequence[str],
    all_tables: Sequence[Table],
    figures: Sequence[tuple[str, str]],
) -> str:
    trials = sum(len(s.trials) for s in studies)
    text = [f"# {folder.name}: search", "", f"{trials} trials in {len(studies)} searches.", ""]
    if plan is not None:
        text += ["## The comparison", ""]
        for line in lines:
            text += [line, ""]
        for one in first:
            text += section(one)
    text += ["## The searches", ""]
    for one in all_tables:
        if one not in first:
            text += section(one)
    text += ["Every trial: [csv](tables/search-trials.csv)", "", "## Figures", ""]
    for name, caption in figures:
        text += [f"![{name}](figures/{name}.png)", "", caption, ""]
    return "\n".join(text)


def section(one: Table) -> list[str]:
    """Return a table as Markdown, with its notes and links to its files."""
    notes = [line for note in one.notes for line in (note, "")]
    files = f"Raw numbers: [csv](tables/{one.name}.csv), [tex](tables/{one.name}.tex)"
    return [f"### {one.title}", "", tables.to_markdown(one), *notes, files, ""]
