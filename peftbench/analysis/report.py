"""A folder's report: Markdown with its tables and figures, CSV and LaTeX tables, png, pdf and svg figures, and a page.

A pure function of records: the same records give the same bytes. Nothing is dropped without a word: runs that did not
complete are counted in the tables and listed with their reasons.
"""

import fcntl
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd

from peftbench.analysis import commands, comparisons, evidence, extras, html, plots, tables
from peftbench.analysis.frame import (
    STATUSES,
    configurations,
    dig,
    flatten,
    frame,
    pruned,
    rows_of,
    selected,
    task_titles,
)
from peftbench.analysis.html import Section, Texts
from peftbench.analysis.tables import Table
from peftbench.errors import UserError

Record = Mapping[str, Any]
MOST_ROWS = 60  # longer tables stay in tables/ and are shortened in report.md
MOST_VALUES = 4  # of one environment field
VARYING = ("created", "pid", "host", "time")

MEMORY_TEXT = {
    "cuda": "Peak VRAM is the allocator's `max_memory_allocated` over warm training steps, after a reset.",
    "tracked_tensors": (
        "Peak memory (tracked tensors) is the largest sum of live tensor storages during warm training steps: weights, "
        "adapter, gradients, optimizer state and activations, without scratch space inside kernels. It is not VRAM and "
        "not the size of the process."
    ),
}


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Let one process at a time write in `folder`: those that share a sweep end at the same time."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def write_report(
    records: Sequence[Record],
    folder: Path,
    defaults: commands.Defaults | None = None,
    sections: Sequence[Section] = (),
) -> list[Path]:
    """Write `<folder>/report/` anew and return the paths written, `report.md` first.

    `report.md`, `index.html` (where plotly is installed), `tables/*.csv` (raw numbers in base units), `tables/*.tex`,
    `figures/*.{png,pdf,svg}`.

    Args:
        defaults: settings of the named models, methods, tasks and recipes, which commands then leave out.
        sections: further ones, shown after the costs. Their tables are written here; their figures must be there.

    Raises:
        UserError: no records, none of them completed, or the folder cannot be written to.
    """
    folder = Path(folder)
    if not records:
        raise UserError(f"{folder}: no records, so nothing to report; run a sweep first")
    runs = frame(records)
    if runs.empty:
        raise UserError(f"{folder}: all {pruned(records)} runs were pruned by a search, so nothing to report")
    if not (runs["status"] == "completed").any():
        raise UserError(
            f"{folder}: none of {len(runs)} runs completed ({_status_counts(runs)}); first: {_first_error(runs)}"
        )
    table = configurations(runs)
    chosen = selected(table)
    target = folder / "report"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            for part in ("tables", "figures"):  # a rerun leaves no table or figure of an earlier state behind
                shutil.rmtree(target / part, ignore_errors=True)
                (target / part).mkdir(parents=True)
            all_tables = _tables(runs, table, chosen)
            written, panels = [], []
            if not extras.missing():
                panels = comparisons.panels(records, runs, chosen)
                suites = comparisons.suites(panels)
                all_tables |= {one.name: one for one in evidence.evidence(panels, suites)}
                for name, pairs in evidence.pair_frames(panels, suites).items():
                    written += _write_csv(pairs, target / "tables" / f"{name}.csv")
            further = [one for section in sections for one in section.tables]
            written += [
                path for one in (*all_tables.values(), *further) for path in _write_table(one, target / "tables")
            ]
            written += _write_csv(runs, target / "tables" / "runs.csv")
            written += _write_csv(tables.raw_numbers(rows_of(table)), target / "tables" / "configurations.csv")
            figures = []
            for plot in plots.all_plots(table):
                written += plots.save(plot, target / "figures")
                figures.append((plot.name, plot.caption))
            texts = _texts(records, runs, table, chosen, all_tables, sections, folder)
            report, page = target / "report.md", target / "index.html"
            report.write_text(_markdown(texts, runs, all_tables, figures, target), encoding="utf-8")
            page.unlink(missing_ok=True)
            if html.missing() is None:
                text = html.page(texts, records, runs, table, chosen, panels, all_tables, defaults or {})
                page.write_text(text, encoding="utf-8")
                written.insert(0, page)
    except OSError as error:
        raise UserError(f"{target}: cannot write the report ({error.strerror or error})") from error
    return [report, *written]


def _tables(runs: pd.DataFrame, table: pd.DataFrame, chosen: pd.DataFrame) -> dict[str, Table]:
    found = [tables.overview(chosen), *tables.leaderboards(chosen)]
    if len(table) > len(chosen):
        found += [_renamed(one) for one in tables.leaderboards(table, label="label")]
    found += [*tables.memory(chosen), tables.every_metric(runs, chosen), tables.unfinished(runs)]
    return {one.name: one for one in found if one is not None}


def _renamed(one: Table) -> Table:
    name = one.name.replace("leaderboard-", "tried-", 1)
    return Table(
        name, f"{one.title}, every learning rate tried", one.headers, one.rows, one.raw, one.text_columns, one.notes
    )


def _write_table(one: Table, folder: Path) -> list[Path]:
    csv, tex = folder / f"{one.name}.csv", folder / f"{one.name}.tex"
    csv.write_text(tables.to_csv(one), encoding="utf-8")
    tex.write_text(tables.to_latex(one), encoding="utf-8")
    return [csv, tex]


def _write_csv(data: pd.DataFrame, path: Path) -> list[Path]:
    data.to_csv(path, index=False, lineterminator="\n")
    return [path]


# -- text --------------------------------------------------------------------------------------------------------------


def _texts(
    records: Sequence[Record],
    runs: pd.DataFrame,
    table: pd.DataFrame,
    chosen: pd.DataFrame,
    all_tables: Mapping[str, Table],
    sections: Sequence[Section],
    folder: Path,
) -> Texts:
    rows, notes = _provenance(records, runs)
    return Texts(
        title=folder.name or str(folder),
        summary=_summary(runs, table, pruned(records)),
        reading=_reading(table, chosen),
        evidence=_evidence_text(all_tables),
        cost=_cost_text(records, runs),
        provenance=rows,
        provenance_notes=notes,
        commands=_commands(records, folder),
        sections=sections,
    )


def _markdown(
    texts: Texts, runs: pd.DataFrame, all_tables: Mapping[str, Table], figures: Sequence[tuple[str, str]], target: Path
) -> str:
    lost = all_tables.get("unfinished")
    lines = [f"# {texts.title}", "", texts.summary, ""]
    lines += [html.missing() or "The same with charts that answer to controls: [index.html](index.html).", ""]
    if lost is not None:
        lines += [
            f"**{len(lost.rows)} of {len(runs)} runs did not complete** "
            "([listed below](#runs-that-did-not-complete)); they are counted under seeds and enter no mean.",
            "",
        ]
    lines += ["## Results", "", *texts.reading, ""]
    for name, one in all_tables.items():
        if name == "overview" or name.startswith("leaderboard-"):
            lines += _section(one)
    lines += _evidence(texts, all_tables)
    lines += ["## Figures", ""]
    for name, caption in figures:
        lines += [
            f"![{name}](figures/{name}.png)",
            "",
            f"{caption} ([pdf](figures/{name}.pdf), [svg](figures/{name}.svg))",
            "",
        ]
    tried = [one for name, one in all_tables.items() if name.startswith("tried-")]
    if tried:
        lines += [
            "## Every learning rate tried",
            "",
            "Best on *test* first; that order played no part in the selection.",
            "",
        ]
        lines += [line for one in tried for line in _section(one)]
    for name, one in all_tables.items():
        if name == "memory" or name.startswith("memory-"):
            lines += [f"## {one.title}", "", *_section(one, titled=False)]
    if "metrics" in all_tables:
        lines += ["## Every metric", "", *_section(all_tables["metrics"], titled=False)]
    if lost is not None:
        lines += ["## Runs that did not complete", "", *_section(lost, titled=False)]
    lines += ["## How cost was measured", "", *texts.cost, ""]
    for section in texts.sections:
        lines += _further(section, target)
    provenance = [f"| {what} | {_cell(value)} |" for what, value in texts.provenance]
    lines += ["## Provenance", "", "| what | value (runs) |", "| --- | --- |", *provenance, ""]
    lines += [line for note in texts.provenance_notes for line in (note, "")]
    lines += [
        "## Make this again",
        "",
        "Each record's `spec` holds its run, resolved.",
        "",
        "```",
        *texts.commands,
        "```",
        "",
    ]
    return "\n".join(lines)


def _evidence_text(all_tables: Mapping[str, Table]) -> list[str]:
    """Return how to read intervals and tiers, or what it takes to have some."""
    if lacking := extras.missing():
        return [f"Not computed: {', '.join(lacking)} not installed. {extras.INSTALL}"]
    if not any(name.startswith(("evidence-", "profile-")) for name in all_tables):
        return ["One method alone: nothing to tell apart."]
    return [evidence.READING]


def _evidence(texts: Texts, all_tables: Mapping[str, Table]) -> list[str]:
    found = [one for name, one in all_tables.items() if name.startswith(("evidence-", "profile-"))]
    said = [line for text in texts.evidence for line in (text, "")]
    return ["## What the data can tell apart", "", *said, *(line for one in found for line in _section(one))]


def _further(section: Section, target: Path) -> list[str]:
    lines = [f"## {section.title}", "", *(line for text in section.text for line in (text, ""))]
    lines += [line for one in section.tables for line in _section(one)]
    for path, caption in section.figures:
        lines += [f"![{path.stem}]({os.path.relpath(path, target)})", "", caption, ""]
    return lines


def _section(one: Table, titled: bool = True) -> list[str]:
    lines = [f"### {one.title}", ""] if titled else []
    short = one
    if len(one.rows) > MOST_ROWS:
        short = Table(one.name, one.title, one.headers, one.rows[:MOST_ROWS], one.raw, one.text_columns, one.notes)
    lines += [tables.to_markdown(short)]
    if short is not one:
        lines += [f"The first {MOST_ROWS} of {len(one.rows)} rows; all of them are in the files.", ""]
    for note in one.notes:
        lines += [note, ""]
    return [*lines, f"Raw numbers: [csv](tables/{one.name}.csv), [tex](tables/{one.name}.tex)", ""]


def _summary(runs: pd.DataFrame, table: pd.DataFrame, cut: int) -> str:
    def some(values: Iterable[Any], what: str) -> str:
        names = sorted({str(v) for v in values})
        return f"{len(names)} {what}{'s' if len(names) != 1 else ''} ({_some(names, 12)})"

    return (
        f"{len(runs)} runs of {len(table)} configurations: {some(table['method'], 'method')}, "
        f"{some(task_titles(table), 'task')}, {some(table['model'], 'model')}; {_status_counts(runs)}."
        + (f" {cut} more were pruned by a search and are in no table or figure." if cut else "")
    )


def _status_counts(runs: pd.DataFrame) -> str:
    counts = Counter(runs["status"])
    return ", ".join(f"{counts[status]} {status.replace('_', ' ')}" for status in STATUSES if counts[status])


def _first_error(runs: pd.DataFrame) -> str:
    lost = tables.unfinished(runs)
    assert lost is not None
    return lost.rows[0][lost.headers.index("reason")]


def _reading(table: pd.DataFrame, chosen: pd.DataFrame) -> list[str]:
    lines = [
        "Test metrics are means over seeds ± one standard deviation (ddof 1); 95 % t intervals are in the csv files. "
        "The gap is to full fine-tuning on the same model, task, protocol and kind of device, paired by seed where "
        "seeds match; its ± is the standard deviation of the paired differences. Adapter parameters are those trained "
        "outside the task head. The training step kept for a run is the best one on validation.",
    ]
    if len(table) > len(chosen):
        lines += [
            "",
            "Learning rates were tried: each row shows the one with the best mean of the primary metric on "
            "*validation* (the test split plays no part), among those run with the most seeds; fewest lost runs first.",
        ]
    if (table["protocol"] == "paper").any():
        lines += ["", tables.PAPER]
    return lines


def _cost_text(records: Sequence[Record], runs: pd.DataFrame) -> list[str]:
    measured = [r["cost"] for r in records if dig(r, ("cost", "step_seconds"))]
    if not measured:
        return ["Nothing was timed: parameters and checkpoints are counted, everything else is missing."]
    kinds = sorted({str(kind) for kind in runs["memory_kind"].dropna()})
    devices = sorted({str(c.get("device_kind")) for c in measured})
    clock = []
    if "cpu" in devices:
        clock.append("the clock around each step on CPU")
    if any(device != "cpu" for device in devices):
        clock.append("CUDA events around whole steps on GPU")
    samples = sorted({len(dig(c, ("step_seconds", "samples")) or []) for c in measured} - {0})
    warm = sorted({w for c in measured if (w := dig(c, ("step_seconds", "warmup_steps"))) is not None})
    shapes = sorted({(s["batch_size"], s["length"]) for c in measured if (s := c.get("shape"))})
    profiles = {c.get("profile_id") for c in measured}
    lines = [
        f"Each of {len(profiles)} cost-equivalent configurations was measured once, alone and before training, on a "
        "batch of fixed shape, with no evaluation, tokenization or compilation inside the clock; every run of it "
        "carries a copy.",
        "",
        f"- Step time: {' and '.join(clock)}; {_span(samples)} timed steps after {_span(warm)} of warm-up; the table "
        "shows the median.",
        f"- Shapes (rows × tokens): {_some([f'{rows} × {length}' for rows, length in shapes])}.",
        "- Tokens/s counts real tokens; the csv also has all tokens with padding.",
    ]
    lines += [f"- {MEMORY_TEXT.get(kind, f'Memory kind {kind}.')}" for kind in kinds]
    restless = {c.get("profile_id") for c in measured if dig(c, ("step_seconds", "stable")) is False}
    if restless:
        lines.append(
            f"- {len(restless)} of them had not settled when warm-up ended (steps still more than 5 % apart): another "
            "load on the machine, or steps of a few milliseconds. Read their times as rough."
        )
    unmeasured = int(runs["step_seconds_p50"].isna().sum())
    if unmeasured:
        lines.append(f"- {unmeasured} of {len(runs)} runs carry no measured cost: it was off, or they ended before.")
    return lines


def _span(values: Sequence[int]) -> str:
    if not values:
        return "an unrecorded number of"
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"


def _some(values: Sequence[str], most: int = 8) -> str:
    if not values:
        return "not recorded"
    return ", ".join(values[:most]) + (f" and {len(values) - most} more" if len(values) > most else "")


def _provenance(records: Sequence[Record], runs: pd.DataFrame) -> tuple[list[tuple[str, str]], list[str]]:
    """Return what the records were made with, each with its values, and sentences on what a reader must know."""
    values: dict[str, Counter[str]] = {}
    for record in records:
        for key, value in flatten(record.get("environment") or {}).items():
            if value is not None and key not in VARYING and key not in ("command", "argv"):
                values.setdefault(key, Counter())[str(value)] += 1
    for key in ("weights", "engine"):
        counted = Counter(str(v) for r in records if (v := dig(r, ("spec", "identity", key))) is not None)
        if counted:
            values[f"{key} (identity)"] = counted
    rows = [("runs by status", _status_counts(runs)), ("kind of device", _counted(Counter(runs["device_kind"])))]
    for key in sorted(values, key=lambda k: (not k.startswith("git"), k)):
        if key != "device_kind":
            rows.append((key.replace("_", " "), _counted(values[key])))
    notes = []
    if len(values.get("git_commit", ())) > 1:
        notes.append("The records were made by more than one commit; run ids differ wherever that changes results.")
    if values.get("git_dirty", Counter())["True"]:
        notes.append(f"{values['git_dirty']['True']} runs were made with uncommitted changes in the checkout.")
    return rows, notes


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _counted(values: Mapping[str, int]) -> str:
    ordered = sorted(values.items(), key=lambda item: (-item[1], item[0]))
    if len(ordered) == 1:
        text = ordered[0][0]
    else:
        text = ", ".join(f"{value} ({count})" for value, count in ordered[:MOST_VALUES])
        text += f" and {len(ordered) - MOST_VALUES} more" if len(ordered) > MOST_VALUES else ""
    return text


def _commands(records: Sequence[Record], folder: Path) -> list[str]:
    commands: dict[str, None] = {}
    for record in records:
        environment = record.get("environment") or {}
        command = environment.get("command") or environment.get("argv")
        if command:
            commands[command if isinstance(command, str) else " ".join(map(str, command))] = None
    # Where the results lie differs from machine to machine: the sweep's own folder and its parent say enough.
    shown = f"{folder.parent.name}/{folder.name}" if folder.is_absolute() else str(folder)
    return [*sorted(commands), f"python -m peftbench report {shown}"]
