"""Configurations → tables: text cells for people (terminal, Markdown, LaTeX) and raw numbers for CSV.

A spread after "±" is always the standard deviation over seeds (ddof 1). An en dash is a number that is missing.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from peftbench.analysis.frame import (
    COMPONENTS,
    COST_PATHS,
    PANEL,
    STATUSES,
    configurations,
    frame,
    over_tasks,
    rows_of,
    selected,
    short_float,
    task_title,
    task_titles,
)
from peftbench.analysis.human import MISSING, human_bytes, human_count, human_seconds, number, signed_bytes
from peftbench.analysis.statistics import summarize
from peftbench.errors import UserError

MEMORY_TITLES = {"cuda": "peak VRAM", "tracked_tensors": "peak memory (tracked tensors)"}
METRIC_TITLES = {
    "matthews_correlation": "Matthews correlation",
    "pearson": "Pearson correlation",
    "spearmanr": "Spearman correlation",
    "exact_match": "exact match",
    "f1": "F1",
    "bleu": "BLEU",
    "rougeL": "ROUGE-L",
    "rouge_l": "ROUGE-L",
}
ONE_SEED = "A single seed has no spread: one run cannot tell methods apart."
PAPER = (
    "Protocol paper: the reported split also chose the step (and the learning rate), so these numbers are optimistic."
)
MEMORY_PARTS = (
    "Weights are the base's, trained or not; the adapter includes the task head; gradients include the flat copy that "
    "the optimizer makes; activations are what the forward pass keeps for the backward pass; workspace is all else "
    "(temporaries, recomputation, libraries). The residual is the peak of plain steps less the sum found in a recorded "
    "one."
)
SUBSET = "Subset: computed on a part of the data set, not comparable with published numbers."


@dataclass(frozen=True)
class Table:
    """`rows` hold text for people, one string a header; `raw` the same rows as plain numbers in base units.

    `text_columns` leading columns are text (left aligned); the others are numbers (right aligned).
    """

    name: str
    title: str
    headers: list[str]
    rows: list[list[str]]
    raw: pd.DataFrame
    text_columns: int = 1
    notes: list[str] = field(default_factory=list)


# -- cells -------------------------------------------------------------------------------------------------------------


def metric_digits(values: Sequence[Any]) -> int:
    """Decimals that suit a metric: 3 for ratios and losses, 1 for scores out of 100."""
    return 1 if any(abs(v) >= 10 for v in map(number, values) if v is not None) else 3


def plus_minus(centre: Any, spread: Any, digits: int = 3, signed: bool = False) -> str:
    """Mean and spread as "0.812 ± 0.006"; no spread where there is none; a real minus sign."""
    c, s = number(centre), number(spread)
    if c is None:
        return MISSING
    text = f"{c:+.{digits}f}" if signed else f"{c:.{digits}f}"
    if float(text) == 0:
        text = f"{0:.{digits}f}"
    text = text.replace("-", "−")
    return text if s is None else f"{text} ± {s:.{digits}f}"


def run_counts(row: Mapping[Any, Any]) -> str:
    """ "5" when every run completed with a score, else "3 of 5 (1 diverged, 1 out of memory)"."""
    lost = [(int(row[status]), status.replace("_", " ")) for status in STATUSES[1:] if row[status]]
    unscored = int(row["completed"]) - int(row["seeds"])
    lost += [(unscored, "without a score")] if unscored else []
    if not lost:
        return f"{row['seeds']}"
    return f"{row['seeds']} of {row['runs']} ({', '.join(f'{n} {what}' for n, what in lost)})"


def metric_title(metric: Any) -> str:
    """How a metric is written in headers and on axes."""
    return "score" if not metric else METRIC_TITLES.get(str(metric), str(metric).replace("_", " "))


def memory_title(kind: Any) -> str:
    """How a peak is written: it says what was measured, and is called VRAM only where it is."""
    return MEMORY_TITLES.get(str(kind), f"peak memory ({kind or 'kind unknown'})")


# -- tables ------------------------------------------------------------------------------------------------------------


def ranked(table: pd.DataFrame) -> list[dict[Any, Any]]:
    """Rows by mean test score, best first, unscored last; ties by model, method and label."""

    def key(row: Mapping[Any, Any]) -> tuple[Any, ...]:
        value = number(row["test_mean"])
        merit = math.inf if value is None else (-value if row["greater_is_better"] else value)
        return row["model"], row["device_kind"], merit, row["method"], row["label"]

    return sorted(rows_of(table), key=key)


def leaderboards(chosen: pd.DataFrame, label: str = "variant") -> list[Table]:
    """One table a task (and protocol and data), of `configurations` or `selected` rows; best first within a model."""
    titles = [task_title(row) for row in rows_of(chosen)]
    tables = []
    for title in sorted(set(titles)):
        rows = ranked(chosen[[t == title for t in titles]])
        tables.append(_leaderboard(title, rows, chosen, label))
    return tables


def _leaderboard(title: str, rows: list[dict[Any, Any]], chosen: pd.DataFrame, label: str) -> Table:
    metric = metric_title(rows[0]["primary_metric"])
    digits = metric_digits([r["test_mean"] for r in rows])
    columns: list[tuple[str, list[str]]] = [("method", [str(r[label]) for r in rows])]
    for column, header in (("model", "model"), ("device_kind", "device")):
        if chosen[column].nunique() > 1:
            columns.append((header, [str(r[column]) for r in rows]))
    text_columns = len(columns)
    if label == "variant" and any(r.get("learning_rates", 1) > 1 for r in rows):
        rates = [number(r["learning_rate"]) for r in rows]
        columns.append(("selected lr", [MISSING if v is None else short_float(v) for v in rates]))
    if label == "label":
        cells = [plus_minus(r["validation_mean"], r["validation_std"], digits) for r in rows]
        columns.append((f"validation {metric}", cells))
    columns += [
        (f"test {metric}", [plus_minus(r["test_mean"], r["test_std"], digits) for r in rows]),
        ("seeds", [run_counts(r) for r in rows]),
    ]
    if any(r["is_reference"] for r in rows):
        columns.append(("gap to full", [_gap(r, digits) for r in rows]))
    columns += _cost_columns(rows) if label == "variant" else []
    return Table(
        name=f"leaderboard-{slug(title)}",
        title=f"{title}: test {metric}",
        headers=[header for header, _ in columns],
        rows=[list(cells) for cells in zip(*(cells for _, cells in columns), strict=True)],
        raw=raw_numbers(rows),
        text_columns=text_columns,
        notes=_notes(rows),
    )


def _cost_columns(rows: Sequence[Mapping[Any, Any]]) -> list[tuple[str, list[str]]]:
    columns = [
        ("adapter params", [human_count(r["adapter_parameters"]) for r in rows]),
        ("head params", [human_count(r["head_parameters"]) for r in rows]),
        ("checkpoint", [human_bytes(r["checkpoint_bytes"]) for r in rows]),
        ("step time p50", [human_seconds(r["step_seconds_p50"]) for r in rows]),
        ("tokens/s", [human_count(r["tokens_per_second"]) for r in rows]),
    ]
    # Several kinds of measurement never share a column.
    kinds = sorted({str(r["memory_kind"]) for r in rows if r["memory_kind"]})
    for kind in kinds or [""]:
        cells = [human_bytes(r["memory_peak_bytes"]) if kind in ("", r["memory_kind"]) else MISSING for r in rows]
        columns.append((memory_title(kind) if kind else "peak memory", cells))
    return columns


def _gap(row: Mapping[Any, Any], digits: int) -> str:
    return "reference" if row["is_reference"] else plus_minus(row["gap_mean"], row["gap_std"], digits, signed=True)


def _notes(rows: Sequence[Mapping[Any, Any]]) -> list[str]:
    notes = []
    if any(r["protocol"] == "paper" for r in rows):
        notes.append(PAPER)
    if any(r["data_subset"] for r in rows):
        notes.append(SUBSET)
    if any(not r["greater_is_better"] for r in rows):
        notes.append("Lower is better; a positive gap is worse than full fine-tuning.")
    if any(r["gap_paired"] is False for r in rows):
        notes.append("Where seeds do not match those of full fine-tuning, the gap is a difference of means (unpaired).")
    others = [
        f"{r['variant']} ({short_float(v)})" for r in rows if (v := number(r.get("validation_prefers"))) is not None
    ]
    if others:
        notes.append(
            "Shown is the learning rate run with the most seeds; over the seeds that all learning rates share, "
            f"validation prefers another one for {', '.join(others)}."
        )
    if any(r["seeds"] == 1 for r in rows):
        notes.append(ONE_SEED)
    return notes


def overview(chosen: pd.DataFrame) -> Table | None:
    """Methods × tasks of `selected` rows; the mean over tasks only in rows that have them all. None for one task."""
    tasks = task_titles(chosen)
    if len(tasks) < 2:
        return None
    averages = {_row_key(r): r for r in rows_of(over_tasks(chosen))}
    digits = metric_digits(list(chosen["test_mean"]))
    several = [(c, h) for c, h in (("model", "model"), ("device_kind", "device")) if chosen[c].nunique() > 1]
    entries = []
    for (model, device, variant), group in chosen.groupby(["model", "device_kind", "variant"], sort=False):
        by_task = {task_title(r): r for r in rows_of(group)}
        average = averages.get((model, device, variant))
        named = {"variant": variant, "model": model, "device_kind": device}
        cells = [str(variant), *(str(named[c]) for c, _ in several)]
        for task in tasks:
            row = by_task.get(task)
            cells.append(plus_minus(row["test_mean"], row["test_std"], digits) if row else MISSING)
        cells.append(plus_minus(average["test_mean"], average["test_std"], digits) if average else MISSING)
        raw: dict[str, Any] = {"method": variant, "model": model, "device_kind": device}
        for task in tasks:
            row = by_task.get(task, {})
            raw |= {f"{task} mean": row.get("test_mean"), f"{task} std": row.get("test_std")}
            raw[f"{task} seeds"] = row.get("seeds", 0)
        raw |= {"mean over tasks": average and average["test_mean"], "std over seeds": average and average["test_std"]}
        merit = number(average["test_mean"]) if average else None
        sign = -1 if average and average["greater_is_better"] else 1
        entries.append(((model, device, merit is None, sign * (merit or 0.0), variant), cells, raw))
    entries.sort(key=lambda entry: entry[0])
    metrics = {task_title(r): metric_title(r["primary_metric"]) for r in rows_of(chosen)}
    notes = ["Metrics: " + "; ".join(f"{task}: {metrics[task]}" for task in tasks) + "."]
    notes.append("The mean over tasks averages these metrics and is given only where every task has a score.")
    return Table(
        name="overview",
        title=f"Overview: test metric by task, and its mean over {len(tasks)} tasks",
        headers=["method", *(header for _, header in several), *tasks, f"mean of {len(tasks)} tasks"],
        rows=[cells for _, cells, _ in entries],
        raw=pd.DataFrame([raw for _, _, raw in entries]),
        text_columns=1 + len(several),
        notes=notes + [note for note in _notes(rows_of(chosen)) if note in (PAPER, SUBSET)],
    )


def _row_key(row: Mapping[Any, Any]) -> tuple[Any, ...]:
    return row["model"], row["device_kind"], row["variant"]


def every_metric(runs: pd.DataFrame, chosen: pd.DataFrame) -> Table | None:
    """Every metric on every reported split, of `selected` rows; None where the primary metric is all there is."""
    columns = [c for c in runs.columns if c.startswith("test.") or c.startswith("test_")]
    completed = runs[runs["status"] == "completed"]
    rows, raws = [], []
    for row in rows_of(chosen):
        group = completed[completed["configuration"] == row["configuration"]]
        for column in columns:
            values = [float(v) for v in group[column].dropna()]
            if not values:
                continue
            s, (split, metric) = summarize(values), column.split(".", 1)
            cell = plus_minus(s.mean, s.std, metric_digits(values))
            rows.append([task_title(row), row["variant"], row["model"], split, metric_title(metric), cell, str(s.n)])
            named = {"task": row["task"], "method": row["variant"], "model": row["model"]}
            raws.append(named | {"split": split, "metric": metric, "mean": s.mean, "std": s.std, "seeds": s.n})
    if len(rows) == len(chosen[chosen["seeds"] > 0]):
        return None
    headers = ["task", "method", "model", "split", "metric", "value", "seeds"]
    return Table("metrics", "Every metric", headers, rows, pd.DataFrame(raws), text_columns=5)


def accounted(chosen: pd.DataFrame) -> list[dict[Any, Any]]:
    """Rows of `selected` whose peak memory is known by component, one a cost profile: tasks of one shape share theirs.

    `tasks` joins the names of the tasks that share it, `shape` says rows × tokens. Ordered by model, kind of device,
    shape and peak.
    """
    found: dict[Any, dict[Any, Any]] = {}
    for row in rows_of(chosen):
        if any(number(row[f"memory_{part}_bytes"]) is None for part in (*COMPONENTS, "peak")):
            continue
        key = (row["model"], row["device_kind"], row["profile_id"], row["variant"])
        kept = found.setdefault(key, {**row, "tasks": ""})
        kept["tasks"] = ", ".join(sorted({*filter(None, kept["tasks"].split(", ")), str(row["task"])}))
    for row in found.values():
        rows, length = number(row["profile_batch_size"]) or 0, number(row["profile_length"]) or 0
        row |= {"shape": f"{rows:.0f} × {length:.0f}" if rows and length else MISSING, "tokens": rows * length}
    order = ("model", "device_kind", "memory_kind", "tokens", "shape", "memory_peak_bytes", "variant")
    return sorted(found.values(), key=lambda row: [row[column] for column in order])


def memory(chosen: pd.DataFrame) -> list[Table]:
    """Peak memory by component, a table for each kind of measurement; none where nothing was measured so."""
    rows = accounted(chosen)
    kinds = sorted({str(row["memory_kind"]) for row in rows})
    return [_memory([r for r in rows if r["memory_kind"] == kind], kind, len(kinds) > 1) for kind in kinds]


def _memory(rows: list[dict[Any, Any]], kind: str, several: bool) -> Table:
    text = {"variant": "method", "model": "model", "device_kind": "device", "tasks": "tasks", "shape": "rows × tokens"}
    always = ("variant", "shape")
    columns = [(c, h) for c, h in text.items() if c in always or len({r[c] for r in rows}) > 1]
    parts = ("peak", *COMPONENTS, "residual")
    cells = [
        [
            *(str(row[column]) for column, _ in columns),
            *(signed_bytes(row[f"memory_{part}_bytes"]) for part in parts),
            str(row["memory_peak_phase"] or MISSING),
        ]
        for row in rows
    ]
    numbers = [f"memory_{part}_bytes" for part in parts] + ["memory_peak_phase"]
    return Table(
        name=f"memory-{slug(kind)}" if several else "memory",
        title=f"Memory by component at the {memory_title(kind)}",
        headers=[*(header for _, header in columns), memory_title(kind), *COMPONENTS, "residual", "peak in"],
        rows=cells,
        raw=pd.DataFrame(rows, columns=["variant", "model", "device_kind", "tasks", "shape", "memory_kind", *numbers]),
        text_columns=len(columns),
        notes=[MEMORY_PARTS],
    )


def unfinished(runs: pd.DataFrame) -> Table | None:
    """Every run that did not complete, with its reason; None where all completed."""
    lost = runs[runs["status"] != "completed"]
    if lost.empty:
        return None
    columns = ["status", "task", "model", "label", "seed", "error", "run_id"]
    rows = [
        [
            str(r["status"]).replace("_", " "),
            task_title(r),
            r["model"],
            r["label"],
            str(r["seed"]),
            _reason(r),
            r["run_id"],
        ]
        for r in rows_of(lost)
    ]
    headers = ["status", "task", "model", "configuration", "seed", "reason", "run"]
    return Table("unfinished", "Runs that did not complete", headers, rows, lost[columns], text_columns=7)


def _reason(row: Mapping[Any, Any], width: int = 160) -> str:
    error = row["error"]
    if not isinstance(error, str) or not error.strip():
        return "loss became non-finite" if row["status"] == "diverged" else "no reason recorded"
    # The last line of a traceback names the error.
    line = error.strip().splitlines()[-1].strip()
    return line if len(line) <= width else line[: width - 1] + "…"


def raw_numbers(rows: Sequence[Mapping[Any, Any]]) -> pd.DataFrame:
    """Configuration rows without their dicts, in base units: counts, bytes, seconds, 1/s, the metric's own unit."""
    first = ["variant", "label", "method", *PANEL, "learning_rate", "rank", "primary_metric", "greater_is_better"]
    counted = ["runs", *STATUSES, "seeds"]
    scores = [f"{split}_{s}" for split in ("test", "validation") for s in ("mean", "std", "low", "high")]
    gaps = ["is_reference", "gap_mean", "gap_std", "gap_low", "gap_high", "gap_seeds", "gap_paired"]
    return pd.DataFrame(rows, columns=[*first, *counted, *scores, *gaps, *COST_PATHS, "configuration"])


def terminal_tables(records: Sequence[Mapping[str, Any]]) -> list[Table]:
    """What a sweep ends with: the leaderboard of each task, and the overview where there are several.

    `Table.title`, `.headers`, `.rows`, `.text_columns` and `.notes` are all that printing needs.

    Raises:
        UserError: no record, or a record that is not one.
    """
    if not records:
        raise UserError("there are no records to show: the results folder is empty; run a sweep first")
    runs = frame(records)
    if runs.empty:
        return []  # a search pruned them all
    chosen = selected(configurations(runs))
    whole = overview(chosen)
    return leaderboards(chosen) + ([whole] if whole else [])


# -- writing -----------------------------------------------------------------------------------------------------------


def slug(text: str) -> str:
    """Lower-case name safe for files, references and TeX labels."""
    kept = "".join(c if c.isalnum() or c in ".-_" else "-" for c in text.lower())
    return "-".join(part for part in kept.split("-") if part)


def to_csv(table: Table) -> str:
    """Raw numbers; a missing one is an empty field."""
    return table.raw.to_csv(index=False, lineterminator="\n")


def to_markdown(table: Table) -> str:
    """A pipe table; pipes in cells are escaped."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    rule = ["---" if i < table.text_columns else "---:" for i in range(len(table.headers))]
    return "\n".join([line(table.headers), line(rule), *(line(row) for row in table.rows)]) + "\n"


TEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}", "±": r"$\pm$",
    "−": r"$-$", "–": "--", "…": r"\ldots{}", "µ": r"$\mu$", "×": r"$\times$", "·": r"$\cdot$",
    "\n": " ",
}  # fmt: skip


def tex_escape(text: str) -> str:
    """Text that LaTeX prints as it is, with ±, − and their like as mathematics."""
    return "".join(TEX.get(c, c) for c in text)


SENTENCE = 60
"""A cell longer than this is one to wrap."""


def _tex_columns(table: Table) -> list[str]:
    """Return a column type each; where text has sentences, its columns wrap and share the line by how long they are."""
    plain = ["l"] * table.text_columns + ["r"] * (len(table.headers) - table.text_columns)
    longest = [max(map(len, column)) for column in zip(table.headers, *table.rows, strict=True)]
    if max(longest[: table.text_columns], default=0) <= SENTENCE:
        return plain
    shares = [math.sqrt(n) for n in longest]
    wrapped = r">{{\raggedright\arraybackslash}}p{{{:.2f}\linewidth}}"
    return [
        wrapped.format(0.8 * share / sum(shares)) if kind == "l" and n > 8 else kind
        for kind, n, share in zip(plain, longest, shares, strict=True)
    ]


def to_latex(table: Table) -> str:
    """A `tabular` with booktabs rules, for `\\input` inside a float; title and notes are comments."""
    columns = _tex_columns(table)
    packages = ["needs booktabs" + (" and array" if any("p{" in c for c in columns) else "")]
    spec = "".join(columns)
    body = [" & ".join(map(tex_escape, row)) + r" \\" for row in table.rows]
    return "\n".join(
        [
            *(f"% {line}" for line in (table.title, *table.notes, *packages)),
            rf"\begin{{tabular}}{{{spec}}}",
            r"\toprule",
            " & ".join(map(tex_escape, table.headers)) + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )
