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
  python -m peftbench methods --json
  python -m peftbench methods --markdown > docs/methods.md"""

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


def methods(as_json: bool, as_markdown: bool = False) -> int:
    """Print the methods."""
    if as_markdown:
        print(markdown(), end="")
        return 0
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


MARKDOWN_HEAD = """\
# Methods

Written by `python -m peftbench methods --markdown` from the methods' own declarations and the parity gate's kept
results (`python -m peftbench verify --write`); not edited by hand.

D_in and D_out are the sides of an adapted linear map, D the model's width, r the rank, P virtual tokens, L layers.
*Sites* are the kinds of place a method fills. *Packs*: several runs share one pass through the frozen base. *4 bits*:
works on a base quantized to NF4 or FP4.

| method | idea | equation | paper | sites | trained parameters | identity at init | merges | packs | 4 bits |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""

PARITY_HEAD = """
## Parity

Each line is the worst deviation over the models of the gate: outputs and merged weights absolute, gradients (of every
adapter parameter) and the losses of 20 AdamW steps relative; fp32 on a CPU, the same weights on both sides.

| method | reference | models | outputs | gradients | 20 steps | merged | trained parameters | verdict |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""


def markdown() -> str:
    """Return the documentation's tables of methods and of the parity gate's kept results."""
    from peftbench import verify

    yes = {True: "yes", False: "no"}
    lines, notes = [], []
    for row in _all("method", registry.describe_method):
        traits = row["traits"]
        cells = [f"`{row['name']}`", row["idea"], row["equation"], row["paper"], ", ".join(traits["sites"]) or "none"]
        cells += [row["parameters"]]
        cells += [yes[traits[k]] for k in ("identity_at_init", "mergeable", "packable", "quantized_base")]
        lines.append("| " + " | ".join(str(c).replace("|", "\\|") for c in cells) + " |")
    parity = []
    for name, kept in verify.results()["methods"].items():
        for reference in dict.fromkeys(c["reference"] for c in kept["checks"]):
            checks = [c for c in kept["checks"] if c["reference"] == reference]
            worst = []
            for key in verify.TOLERANCES:
                values = [c[key] for c in checks if c[key] is not None]
                worst.append(f"{max(values):.1e}" if values else "–")
            counts = all(c["trainable"] is None or len(set(c["trainable"])) == 1 for c in checks)
            verdict = "equal" if all(c["passed"] for c in checks) else "differs"
            models = ", ".join(c["model"] for c in checks)
            cells = [f"`{name}`", reference, models, *worst, "equal" if counts else "differ", verdict]
            parity.append("| " + " | ".join(cells) + " |")
            note = next((c["note"] for c in checks if c["note"]), "")
            if note:
                notes.append(f"- `{name}` against {reference}: {note}")
    text = MARKDOWN_HEAD + "\n".join(lines) + "\n" + PARITY_HEAD + "\n".join(parity) + "\n"
    return text + ("\nDifferences by decision:\n\n" + "\n".join(notes) + "\n" if notes else "")


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
