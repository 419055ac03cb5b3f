"""Records and configurations → the data inside `index.html`: columns of plain numbers, and blobs of compressed JSON.

What is drawn at once is one blob; runs' settings and environments, each distinct one kept once, are another; losses and
evaluations lie in blobs of `CHUNK` runs, which a browser unpacks when one of these runs is opened.
"""

import base64
import gzip
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from peftbench.analysis import commands
from peftbench.analysis.comparisons import Panel
from peftbench.analysis.frame import (
    COMPONENTS,
    PRUNED,
    REFERENCE,
    Record,
    content,
    dig,
    number,
    over_tasks,
    rows_of,
    task_title,
)
from peftbench.analysis.intervals import interval
from peftbench.analysis.plots import FILLS, MARKERS, PARTS, Styles
from peftbench.analysis.tables import accounted, metric_title

CHUNK = 50
MOST_POINTS = 160
"""Points of a loss curve: of longer ones, means over equal parts."""
MOST_RATES = 24
SYMBOLS = dict(
    zip(
        MARKERS,
        ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x", "triangle-left",
         "triangle-right", "pentagon", "hexagon"),
        strict=True,
    )
)  # fmt: skip
FILLED = dict(zip(FILLS, ("", "-open", "-open-dot", "-dot", "-open", "-open-dot"), strict=True))
COSTS = {
    "adapter_parameters": "adapter_parameters",
    "trainable_parameters": "trainable_parameters",
    "step_seconds": "step_seconds_p50",
    "memory_bytes": "memory_peak_bytes",
    "energy_joules": "energy_joules_per_1k_tokens",
    "checkpoint_bytes": "checkpoint_bytes",
}
"""What a point's costs are called in the page → the column of `configurations`."""


def packed(data: Any) -> str:
    """Return data as JSON, gzip, base64: text that may stand in an element of the page; the same for the same data."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()


def short(value: Any, digits: int = 6) -> float | int | None:
    """Return a number with so many significant digits, whole ones as integers; None for anything else."""
    found = number(value)
    if found is None:
        return None
    return int(found) if found == int(found) and abs(found) < 2**53 else float(f"{found:.{digits}g}")


# -- configurations ----------------------------------------------------------------------------------------------------


def points(
    table: pd.DataFrame,
    chosen: pd.DataFrame,
    panels: Sequence[Panel],
    by_configuration: Mapping[str, Record],
    defaults: commands.Defaults,
) -> list[dict[str, Any]]:
    """Return a row a configuration, and one for each that was scored on every task (task "")."""
    picked = {row["configuration"] for row in rows_of(chosen[["configuration"]])}
    ends = {
        row["configuration"]: interval(estimate)
        for panel in panels
        for row, estimate in zip(panel.rows, panel.estimates, strict=True)
    }
    lines, found = {}, []
    for row in rows_of(table):
        key = row["configuration"]
        lines[key] = commands.command(by_configuration[key], defaults, sorted(row["tried_seeds"]))
        point = _point(row, task_title(row), lines[key], key in picked)
        low, high = ends.get(key) or (None, None)
        found.append(point | {"low": short(low), "high": short(high)})
    return found + _means(chosen, lines)


def _means(chosen: pd.DataFrame, lines: Mapping[str, str]) -> list[dict[str, Any]]:
    averages = over_tasks(chosen)
    if averages.empty:
        return []
    names = ["model", "device_kind", "variant"]
    of: dict[tuple[Any, ...], dict[str, str]] = {}
    for row in rows_of(chosen[[*names, "task", "configuration"]]):
        of.setdefault(tuple(row[n] for n in names), {})[str(row["task"])] = lines[row["configuration"]]
    found = []
    for row in rows_of(averages):
        row |= {"runs": row["seeds"], "completed": row["seeds"], "validation_mean": None, "validation_std": None}
        point = _point(row, "", commands.over_tasks(of[tuple(row[n] for n in names)]), True)
        named = {"label": row["variant"], "lr": None, "metric": "score, mean over tasks"}
        found.append(point | {"low": None, "high": None} | named)
    return found


def _point(row: Mapping[Any, Any], task: str, line: str, picked: bool) -> dict[str, Any]:
    return {
        "id": row["configuration"],
        "model": row["model"],
        "device": row["device_kind"],
        "task": task,
        "method": row["method"],
        "variant": row["variant"],
        "line": row["line"],
        "label": row["label"],
        "rank": short(row["rank"]),
        "lr": short(row["learning_rate"]),
        "chosen": picked,
        "metric": metric_title(row["primary_metric"]),
        "greater": bool(row["greater_is_better"]),
        "runs": int(row["runs"]),
        "seeds": int(row["seeds"]),
        "lost": int(row["runs"]) - int(row["completed"]),
        "test": short(row["test_mean"]),
        "test_std": short(row["test_std"]),
        "validation": short(row["validation_mean"]),
        "validation_std": short(row["validation_std"]),
        "memory_kind": row["memory_kind"],
        **{name: short(row[column]) for name, column in COSTS.items()},
        "command": line,
    }


def columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return rows of the same keys as ``{"keys", "rows"}``, without the keys in each row."""
    keys = list(rows[0]) if rows else []
    return {"keys": keys, "rows": [[row[key] for key in keys] for row in rows]}


def looks(table: pd.DataFrame) -> dict[str, Any]:
    """Return colours and symbols of methods and variants, those of the figures."""
    styles = Styles(table)
    methods: dict[str, Any] = {
        m: {"colour": colour, "symbol": SYMBOLS[marker]} for m, (colour, marker) in styles.method.items()
    }
    if (table["method"] == REFERENCE).any():
        methods[REFERENCE] = {"colour": None, "symbol": "star"}
    fills = {variant: FILLED[fill] for variant, fill in styles.fill.items()}
    return {"methods": methods, "fills": fills, "parts": PARTS, "reference": REFERENCE}


def memory(chosen: pd.DataFrame) -> list[dict[str, Any]]:
    """Return a row for each cost profile whose peak is known by component; bytes."""
    keys = ("variant", "model", "device_kind", "memory_kind", "tasks", "shape")
    return [
        {key: row[key] for key in keys}
        | {part: short(row[f"memory_{part}_bytes"]) for part in (*COMPONENTS, "residual", "peak")}
        for row in accounted(chosen)
    ]


# -- runs --------------------------------------------------------------------------------------------------------------


class Interned:
    """Distinct values, each kept once, and where each of them stands."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self._places: dict[str, int] = {}

    def place(self, value: Any) -> int:
        """Return the place of `value`, which it gets where it is new."""
        text = json.dumps(value, sort_keys=True, default=str)
        if text not in self._places:
            self._places[text] = len(self.values)
            self.values.append(value)
        return self._places[text]


SECTIONS = ("model", "method", "task", "train", "profile", "identity")


def unique(records: Sequence[Record]) -> list[Record]:
    """Return each run once, by run id: its completed record where there is one, a pruned one last."""
    order = {"completed": 0, PRUNED: 2}
    found: dict[str, Record] = {}
    for record in sorted(records, key=lambda r: (str(r.get("run_id")), order.get(str(r.get("status")), 1))):
        found.setdefault(str(record.get("run_id")), record)
    return list(found.values())


def runs(
    records: Sequence[Record], frame: pd.DataFrame, defaults: commands.Defaults
) -> tuple[dict[str, Any], list[list[dict[str, Any]]]]:
    """Return the index of all runs, pruned ones too, and their traces in chunks.

    The index has ``runs`` (as `columns`), and ``parts``: the distinct sections, environments and costs that they name
    by place.
    """
    known = {row["run_id"]: row for row in rows_of(frame[["run_id", "configuration", "label", "data_subset"]])}
    parts = Interned()
    rows, traces = [], []
    for record in unique(records):
        row, trace = _run(record, known.get(str(record["run_id"])), parts, defaults)
        rows.append(row)
        traces.append(trace)
    chunks = [traces[at : at + CHUNK] for at in range(0, len(traces), CHUNK)]
    return {"runs": columns(rows), "parts": parts.values}, chunks


def _run(
    record: Record, known: Mapping[Any, Any] | None, parts: Interned, defaults: commands.Defaults
) -> tuple[dict[str, Any], dict[str, Any]]:
    spec, quality = record["spec"], record.get("quality") or {}
    environment = dict(record.get("environment") or {})
    typed = environment.pop("command", None) or environment.pop("argv", None)
    primary = quality.get("primary_metric")
    task = {
        "task": dig(spec, ("task", "name")),
        "data_subset": bool(known and known["data_subset"]),
        "protocol": quality.get("protocol") or spec.get("protocol") or "held_out",
    }
    scores = {
        split: {name: short(v) for name, v in (metrics or {}).items()}
        for split, metrics in quality.items()
        if split == "validation" or split == "test" or split.startswith("test_")
    }
    row = {
        "id": record["run_id"],
        "status": record["status"],
        "error": record.get("error"),
        "method": spec["method"]["name"],
        "label": known["label"] if known else _pruned_label(spec),
        "task": task_title(task),
        "model": dig(spec, ("model", "name")),
        "seed": spec.get("seed"),
        "metric": metric_title(primary),
        "test": dig(scores, ("test", primary)) if primary else None,
        "validation": dig(scores, ("validation", primary)) if primary else None,
        "scores": scores,
        "selected_step": quality.get("selected_step"),
        "created": record.get("created"),
        "command": commands.command(record, defaults),
        "typed": typed if isinstance(typed, str) or typed is None else " ".join(map(str, typed)),
        "spec": {key: parts.place(spec[key]) for key in SECTIONS if spec.get(key) is not None},
        "protocol": spec.get("protocol"),
        "device": spec.get("device"),
        "environment": parts.place(environment),
        "cost": parts.place(_cost(record.get("cost"))) if record.get("cost") else None,
        "more": {k: record[k] for k in ("pack", "parity", "search") if record.get(k)},
    }
    return row, trace(record)


def _pruned_label(spec: Mapping[str, Any]) -> str:
    """Return a name for a run that is in no table: method, rank, learning rate."""
    kept = content(spec)
    pairs = (("r", dig(kept, ("method", "rank"))), ("lr", dig(kept, ("train", "learning_rate"))))
    return " ".join([str(spec["method"]["name"]), *(f"{name}={v:g}" for name, v in pairs if number(v) is not None)])


def _cost(cost: Any) -> Any:
    """Return a cost without its raw samples, numbers with six digits."""
    if isinstance(cost, Mapping):
        return {key: _cost(v) for key, v in cost.items() if key != "samples"}
    found = short(cost)
    return cost if found is None else found


def trace(record: Record) -> dict[str, Any]:
    """Return losses by step, the schedule of learning rates, and evaluations of the primary metric.

    Of long runs `loss` holds means over `every` steps (null where none of them was finite).
    """
    recorded = record.get("trace") or {}
    losses, rates = recorded.get("loss") or [], recorded.get("learning_rate") or []
    every = max(1, math.ceil(len(losses) / MOST_POINTS))
    apart = max(1, math.ceil(len(rates) / MOST_RATES))
    places = sorted({*range(0, len(rates), apart), len(rates) - 1} - {-1})
    primary = dig(record, ("quality", "primary_metric"))
    evaluations = dig(record, ("quality", "evaluations")) or []
    return {
        "steps": len(losses),
        "every": every,
        "loss": [_mean(losses[at : at + every]) for at in range(0, len(losses), every)],
        "rates": [[place + 1, short(rates[place], 3)] for place in places],
        "evaluations": [[e.get("step"), short(dig(e, ("metrics", str(primary))))] for e in evaluations],
    }


def _mean(values: Sequence[Any]) -> float | int | None:
    known = [v for v in map(number, values) if v is not None]
    return short(sum(known) / len(known), 4) if known else None
