"""``methods``, ``models`` and ``tasks``: what there is to choose from."""

import json
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

from peftbench import registry
from peftbench.errors import UserError

METHODS_HELP = """\
List the methods: idea, settings with defaults, what each can and cannot do.

examples:
  python -m peftbench methods
  python -m peftbench methods --json"""

MODELS_HELP = """\
List the models and where their weights would come from. Any other checkpoint works by its hub name or folder:
model=<owner>/<name>.

examples:
  python -m peftbench models
  python -m peftbench models --json
  PEFTBENCH_MODELS=/data/models python -m peftbench models"""

TASKS_HELP = """\
List the tasks: metric, formulation, where the rows come from.

examples:
  python -m peftbench tasks
  PEFTBENCH_DATA=/data/peft python -m peftbench tasks --json"""


def _all(group: str, describe: Callable[[str], dict[str, Any]]) -> list[dict[str, Any]]:
    return [describe(name) for name in registry.options(group)]


def _print_json(rows: list[dict[str, Any]]) -> int:
    print(json.dumps(rows, indent=1, ensure_ascii=False, default=str))
    return 0


def _print_table(headers: list[str], rows: list[list[str]]) -> int:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, header in enumerate(headers):
        table.add_column(header, overflow="fold", no_wrap=index == 0)
    for row in rows:
        table.add_row(*row)
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    console.print(table, highlight=False, markup=False)
    return 0


def _short(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(_short(v) for v in value) + "]"
    return "null" if value is None else str(value)


def methods(as_json: bool) -> int:
    """Print the methods."""
    rows = _all("method", registry.describe_method)
    if as_json:
        return _print_json(rows)
    lines = []
    for row in rows:
        settings = " ".join(f"{k}={_short(v)}" for k, v in row["settings"].items())
        packable = "packs" if row["traits"].get("packable") else "alone"
        mergeable = "merges" if row["traits"].get("mergeable") else "–"
        rate = _short(row["suggested"].get("learning_rate"))
        lines.append([row["name"], row["idea"], settings or "–", rate, packable, mergeable])
    return _print_table(["method", "idea", "settings", "learning rate", "runs", "merge"], lines)


def models(as_json: bool) -> int:
    """Print the models."""
    rows = _all("model", registry.describe_model)
    if as_json:
        return _print_json(rows)
    lines = [[r["name"], _short(r["kind"]), _short(r["family"]), _short(r["checkpoint"]), r["source"]] for r in rows]
    return _print_table(["model", "kind", "family", "checkpoint", "weights from"], lines)


def _described(name: str) -> dict[str, Any]:
    try:
        return registry.describe_task(name)
    except UserError as error:
        return {"name": name, "metric": None, "formulation": None, "labels": None, "missing": str(error)}


def tasks(as_json: bool) -> int:
    """Print the tasks."""
    rows = _all("task", _described)
    if as_json:
        return _print_json(rows)
    lines = []
    for row in rows:
        counts = (
            ", ".join(f"{k} {v}" for k, v in (row.get("rows") or {}).items())
            or row.get("missing", "–").partition(";")[0]
        )
        part = " (a part of it)" if row.get("subset") else ""
        lines.append(
            [row["name"], _short(row["metric"]), _short(row["formulation"]), f"{row.get('source', '–')}{part}", counts]
        )
    return _print_table(["task", "metric", "formulation", "source", "rows"], lines)
