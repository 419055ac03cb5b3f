"""One self-contained `index.html`: what report.md says, charts that answer to controls, and a view of every run.

Charts are drawn by plotly.js, which lies in the page compressed, as do the data: the page asks for nothing else, which
its content security policy makes sure of. Whatever a chart shows stands in a table too.
"""

import base64
import functools
import gzip
import importlib.resources
import importlib.util
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup, escape

from peftbench.analysis import commands, page_data
from peftbench.analysis.comparisons import Panel
from peftbench.analysis.frame import COST_PATHS, Record, rows_of, task_title
from peftbench.analysis.tables import (
    MISSING,
    Table,
    human_bytes,
    human_count,
    human_seconds,
    memory_title,
    slug,
)

INSTALL = "pip install 'peftbench[report]'"
ORDER = ("completed", "diverged", "out_of_memory", "failed", "pruned")


@dataclass(frozen=True)
class Section:
    """A section of its own in report.md and index.html: text in paragraphs, tables, and figures with their captions."""

    title: str
    text: Sequence[str] = ()
    tables: Sequence[Table] = ()
    figures: Sequence[tuple[Path, str]] = ()


@dataclass(frozen=True)
class Texts:
    """What report.md says in words, in its Markdown: one entry a paragraph or list item."""

    title: str
    summary: str
    reading: Sequence[str]
    evidence: Sequence[str]
    cost: Sequence[str]
    provenance: Sequence[tuple[str, str]]
    provenance_notes: Sequence[str] = ()
    commands: Sequence[str] = ()
    sections: Sequence[Section] = field(default_factory=list)


def missing() -> str | None:
    """Return the line that says why there is no page, or None where nothing is missing."""
    if importlib.util.find_spec("plotly") is None:
        return f"index.html not written: plotly is not installed; {INSTALL}"
    return None


def page(
    texts: Texts,
    records: Sequence[Record],
    runs: pd.DataFrame,
    table: pd.DataFrame,
    chosen: pd.DataFrame,
    panels: Sequence[Panel],
    tables: Mapping[str, Table],
    defaults: commands.Defaults,
) -> str:
    """Return the page: the same records give the same text.

    Args:
        runs: `frame` of the records.
        table: its `configurations`.
        chosen: those `selected`.
        panels: of the chosen ones; none where statistics were not computed.
        tables: all tables of the report by name.
        defaults: what the yamls say, to leave it out of commands.
    """
    order = {run_id: place for place, run_id in enumerate(runs["run_id"])}
    ranked = sorted(
        (r for r in page_data.unique(records) if r["run_id"] in order), key=lambda r: order[str(r["run_id"])]
    )
    by_configuration: dict[str, Record] = {}
    for record, configuration in zip(ranked, runs["configuration"], strict=True):
        by_configuration.setdefault(str(configuration), record)
    index, chunks = page_data.runs(records, runs, defaults)
    core = {
        "points": page_data.columns(page_data.points(table, chosen, panels, by_configuration, defaults)),
        "memory": page_data.columns(page_data.memory(chosen)),
        "looks": page_data.looks(table),
        "chunk": page_data.CHUNK,
    }
    blobs = {"core": core, "runs": index, **{f"trace-{i}": chunk for i, chunk in enumerate(chunks)}}
    return (
        _environment()
        .get_template("index.html.j2")
        .render(
            texts=texts,
            statuses=_statuses(records),
            groups=_groups(tables, chosen),
            cost=cost_table(chosen),
            metrics=tables.get("metrics"),
            memory=[one for name, one in tables.items() if name == "memory" or name.startswith("memory-")],
            tried=[one for name, one in tables.items() if name.startswith("tried-")],
            unfinished=unfinished(records, runs),
            images=[(s, [(_data_uri(path), caption) for path, caption in s.figures]) for s in texts.sections],
            blobs={name: page_data.packed(data) for name, data in blobs.items()},
            plotly=_plotly(),
        )
    )


# -- parts -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """The leaderboard's tables of one task, or of all of them together."""

    name: str
    title: str
    tables: list[Table]


def _groups(tables: Mapping[str, Table], chosen: pd.DataFrame) -> list[Group]:
    """Return the leaderboards with what the data can tell apart first: over tasks, then task by task."""
    titles = sorted({task_title(row) for row in rows_of(chosen)})
    named = [("overview", "All tasks"), *((slug(title), title) for title in titles)]
    found = []
    for stem, title in named:
        mine = [one for name, one in tables.items() if name == f"evidence-{stem}"]
        # Several models or kinds of device have a table each, named after them.
        others = {f"evidence-{other}" for other, _ in named if other != stem and other.startswith(stem)}
        mine += [
            one
            for name, one in tables.items()
            if name.startswith(f"evidence-{stem}-") and not any(name == o or name.startswith(f"{o}-") for o in others)
        ]
        mine += [
            tables[name] for name in ("overview" if stem == "overview" else f"leaderboard-{stem}",) if name in tables
        ]
        if stem == "overview":
            mine += [one for name, one in tables.items() if name.startswith("profile-overview")]
        if mine:
            found.append(Group(stem, title, mine))
    return found


def _statuses(records: Sequence[Record]) -> list[tuple[str, int]]:
    counts = Counter(str(r["status"]) for r in page_data.unique(records))
    return [(status.replace("_", " "), counts[status]) for status in ORDER if counts[status]]


def unfinished(records: Sequence[Record], runs: pd.DataFrame) -> list[dict[str, str]]:
    """Return the runs that diverged, failed, ran out of memory or were pruned, each with its reason."""
    labels = dict(zip(runs["run_id"], runs["label"], strict=True))
    found = []
    for record in page_data.unique(records):
        if record["status"] == "completed":
            continue
        spec, error = record["spec"], record.get("error")
        unsaid = {"diverged": "loss became non-finite", "pruned": "pruned by a search"}
        lines = str(error or "").strip().splitlines() or [unsaid.get(str(record["status"]), "no reason recorded")]
        found.append(
            {
                "status": str(record["status"]).replace("_", " "),
                "configuration": str(labels.get(record["run_id"]) or spec["method"]["name"]),
                "task": str(spec["task"]["name"]),
                "model": str(spec["model"]["name"]),
                "seed": str(spec.get("seed")),
                "reason": lines[-1],
                "run_id": str(record["run_id"]),
            }
        )
    return sorted(found, key=lambda row: (ORDER.index(row["status"].replace(" ", "_")), row["run_id"]))


COST_COLUMNS = (
    ("adapter_parameters", "adapter params", human_count),
    ("head_parameters", "head params", human_count),
    ("total_parameters", "all params", human_count),
    ("checkpoint_bytes", "checkpoint", human_bytes),
    ("step_seconds_p10", "step p10", human_seconds),
    ("step_seconds_p50", "step p50", human_seconds),
    ("step_seconds_p90", "step p90", human_seconds),
    ("tokens_per_second", "tokens/s", human_count),
    ("memory_peak_bytes", "peak", human_bytes),
    ("energy_joules_per_1k_tokens", "J per 1k tokens", lambda v: MISSING if v is None else f"{v:.3g}"),
    ("flops_per_token", "FLOP per token", human_count),
    ("model_flops_utilization", "MFU", lambda v: MISSING if v is None else f"{v:.1%}"),
    ("startup_seconds", "startup", human_seconds),
    ("compile_seconds", "compile", human_seconds),
)


def cost_table(chosen: pd.DataFrame) -> Table:
    """Return all costs of `selected` rows, a row for each configuration that costs something of its own."""
    found: dict[Any, dict[Any, Any]] = {}
    for row in rows_of(chosen):
        key = (row["model"], row["device_kind"], row["variant"], *(row[column] for column, _, _ in COST_COLUMNS))
        kept = found.setdefault(key, {**row, "tasks": []})
        kept["tasks"].append(task_title(row))
    rows = sorted(found.values(), key=lambda r: (r["model"], r["device_kind"], r["variant"], r["tasks"]))
    shown = [c for c in COST_COLUMNS if any(row[c[0]] is not None for row in rows)]
    several = [(c, h) for c, h in (("model", "model"), ("device_kind", "device")) if chosen[c].nunique() > 1]
    kinds = sorted({str(row["memory_kind"]) for row in rows if row["memory_kind"]})
    return Table(
        name="costs",
        title="Costs of each configuration",
        headers=["method", *(h for _, h in several), "tasks", *(header for _, header, _ in shown)],
        rows=[
            [
                str(r["variant"]),
                *(str(r[c]) for c, _ in several),
                ", ".join(r["tasks"]),
                *(f(r[c]) for c, _, f in shown),
            ]
            for r in rows
        ],
        raw=pd.DataFrame(rows, columns=["variant", "model", "device_kind", *COST_PATHS]),
        text_columns=2 + len(several),
        notes=[f"Peak: {', '.join(map(memory_title, kinds))}."] if kinds else [],
    )


@functools.cache
def _plotly() -> str:
    """Return plotly.js, compressed, as text."""
    source = importlib.resources.files("plotly").joinpath("package_data/plotly.min.js").read_bytes()
    return base64.b64encode(gzip.compress(source, 9, mtime=0)).decode()


def _data_uri(path: Path) -> str:
    kind = {".png": "image/png", ".svg": "image/svg+xml"}[path.suffix]
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


# -- template ----------------------------------------------------------------------------------------------------------

INLINE = re.compile(
    r"`(?P<code>[^`]+)`|\[(?P<text>[^\]]+)\]\((?P<link>[^)\s]+)\)|\*\*(?P<strong>[^*]+)\*\*|\*(?P<em>[^*\s][^*]*)\*"
)


def inline(text: str) -> Markup:
    """Return the Markdown that our sentences use (code, links, emphasis) as HTML; all else is escaped."""
    parts, at = [], 0
    for match in INLINE.finditer(text):
        parts.append(escape(text[at : match.start()]))
        at = match.end()
        if match["link"] is not None:
            parts.append(Markup('<a href="{}">{}</a>').format(match["link"], match["text"]))
        else:
            (tag, inner) = next((t, match[t]) for t in ("code", "strong", "em") if match[t] is not None)
            parts.append(Markup(f"<{tag}>{{}}</{tag}>").format(inner))
    return Markup("").join([*parts, escape(text[at:])])


def _environment() -> jinja2.Environment:
    found = jinja2.Environment(
        loader=jinja2.PackageLoader("peftbench.analysis"), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    found.filters["inline"] = inline
    found.globals["source"] = lambda name: Markup(found.loader.get_source(found, name)[0])  # type: ignore[union-attr]
    return found
