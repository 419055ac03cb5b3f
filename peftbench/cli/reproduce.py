"""``reproduce``: published figures beside ours, with a verdict by stated rules."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from peftbench.cli.sweep import show_table
from peftbench.errors import UserError
from peftbench.sweep import say

HELP = """\
Compare published figures with records here. Every verdict names the records that it rests on; without one a row says
what a run would take.

examples:
  python -m peftbench reproduce --list
  python -m peftbench reproduce minilm
  python -m peftbench reproduce lora-t2-roberta-base-lora- --results results/reproduce-lora
  python -m peftbench reproduce all --json
  python -m peftbench reproduce counts
  python -m peftbench reproduce counts roberta-base --markdown
  python -m peftbench reproduce claims
  python -m peftbench reproduce found > docs/found.md
  python -m peftbench reproduce lora --run

names:  a paper's key, a row's or a claim's id, the beginning of ids that ends in "-", all;
        or counts (parameter counts, rebuilt from shapes), claims (orderings, ratios, memory, speed) and found (a page
        of all verdicts, the most surprising ones explained, and what is open)
--list       the papers and their number of rows; of a paper, its rows
--run        train experiments/reproduce-<paper> (or a claim's experiment; all: every one), after its cost has been
             printed
--cost       print that cost alone
--results    a folder of sweeps, or of one; may be repeated (default: results)
--markdown, --latex, --json   the same as a page, a LaTeX table, plain data
exit code: 0 whatever the verdicts, 1 where a run failed, 2 bad input"""

DEFAULT_RESULTS = "results"


def reproduce(
    names: Sequence[str],
    *,
    results: Sequence[str] | None = None,
    listed: bool = False,
    run: bool = False,
    cost: bool = False,
    rate: float | None = None,
    form: str = "table",
) -> int:
    """Print what is asked for; returns the exit code.

    Args:
        form: table, json, markdown or latex.

    Raises:
        UserError: a name that fits nothing, or `run` without one paper that has an experiment.
    """
    asked = list(names)
    kind = asked[0] if asked and asked[0] in ("counts", "claims", "found") else "values"
    if listed and (run or cost):
        raise UserError(f"--list: expected without {'--run' if run else '--cost'}")
    if rate is not None and not (run or cost):
        raise UserError(f"--rate {rate:g}: expected with --cost or --run")
    if run or cost:
        return _run(asked, run, rate, form)
    if kind == "counts":
        return _counts(asked[1:], form)
    if kind in ("claims", "found"):
        if len(asked) > 1:
            raise UserError(f"{asked[1]}: {kind} takes no further name")
        return _claims(results, form) if kind == "claims" else _found(results, form)
    return _values(asked, results, listed, form)


def _configurations(results: Sequence[str] | None) -> list[Any]:
    from peftbench.reproduce.records import configurations

    if results:
        return configurations(results, say)
    return configurations([DEFAULT_RESULTS], lambda line: None) if Path(DEFAULT_RESULTS).is_dir() else []


def _measurements(results: Sequence[str] | None) -> list[Any]:
    from peftbench.reproduce import measured

    return measured.load(results or [DEFAULT_RESULTS])


def _values(names: list[str], results: Sequence[str] | None, listed: bool, form: str) -> int:
    from peftbench import published
    from peftbench.reproduce import pages

    if listed and not names:
        return _print([pages.list_table()], form)
    rows, claims = published.chosen(names), published.chosen_claims(names)
    after = pages.bibliography([*rows, *claims])
    if listed:
        plain = [{"id": row.id, "published": row.to_dict()} for row in rows]
        return _print([(pages.rows_table(rows), plain), pages.stated_table(claims)], form, after=after)
    known = _configurations(results), _measurements(results)
    found = pages.judged(rows, *known)
    table = pages.values_table(found, "Published figures and ours")
    return _print([(table, [one.to_dict() for one in found]), pages.claims_table(*known, claims)], form, after=after)


def _counts(names: list[str], form: str) -> int:
    from peftbench.reproduce import counts, pages

    found = counts.rebuild_all(names)
    rules = sorted({rule for r in found for rule in r.rules})
    after = "\n".join(f"- *{rule}*: {counts.RULES[rule]}" for rule in rules)
    return _print([(pages.counts_table(found), [r.to_dict() for r in found])], form, after=after, always=True)


def _claims(results: Sequence[str] | None, form: str) -> int:
    from peftbench.reproduce import pages

    judged = pages.claims_table(_configurations(results), _measurements(results))
    return _print([judged, pages.reasons_table()], form)


def _found(results: Sequence[str] | None, form: str) -> int:
    from peftbench.reproduce import counts, findings

    if form not in ("table", "markdown"):
        raise UserError(f"--{form}: found is a page in Markdown; take claims, counts or all for that form")
    print(findings.page(_configurations(results), _measurements(results), counts.rebuild_all([])), end="")
    return 0


def _print(parts: Sequence[tuple[Any, list[dict[str, Any]]]], form: str, after: str = "", always: bool = False) -> int:
    """Print tables that have rows, one after another, or all of their plain data as one list.

    Args:
        parts: tables and the same as plain data.
        after: what follows the tables on a page; `always` on the terminal too.
    """
    from peftbench.analysis.tables import to_latex, to_markdown

    if form == "json":
        print(json.dumps([row for _, plain in parts for row in plain], indent=1, ensure_ascii=False))
        return 0
    tables = [table for table, _ in parts if table.rows]
    if form == "latex":
        print("\n".join(map(to_latex, tables)))
    elif form == "markdown":
        pages = [f"{'#' * (1 + bool(i))} {one.title}\n\n{to_markdown(one)}" for i, one in enumerate(tables)]
        print("\n\n".join([*pages, *([after] if after else [])]))
    else:
        console = Console()
        for table in tables:
            show_table(table, console if console.is_terminal else Console(width=220))
        if after and always:
            print(after)
    return 0


def _run(names: list[str], run: bool, rate: float | None, form: str) -> int:
    from peftbench import environment
    from peftbench.reproduce import budget

    if len(names) != 1:
        raise UserError(f"{'--run' if run else '--cost'}: expected one paper, row, claim or experiment, or all")
    every = names[0] == "all"
    asked = _ready() if every else [_experiment(names[0])]
    estimated = [budget.cost(experiment, budget.RATE if rate is None else rate) for experiment in asked]
    if form == "json" and not run:
        plain = [one.to_dict() for one in estimated]
        print(json.dumps(plain if every else plain[0], indent=1))
        return 0
    lines = [line for one in estimated for line in one.lines()]
    if every:
        hours, runs = sum(one.hours for one in estimated), sum(one.runs for one in estimated)
        lines.append(f"all: {runs:,} runs, {hours:,.1f} GPU-hours")
    for line in lines:
        print(line, file=sys.stderr if run else sys.stdout, flush=True)
    if not run:
        return 0
    if environment.pick_device("auto") == "cpu":
        print("no GPU here: it trains on the CPU, which takes far longer than that", file=sys.stderr, flush=True)
    return max(_train(experiment, every) for experiment in asked)


def _train(experiment: str, onward: bool) -> int:
    """Run an experiment's sweep; returns its exit code. With `onward` one that cannot start is said and passed over."""
    from peftbench.cli.sweep import sweep
    from peftbench.reproduce import budget

    kept = ["save_adapters=true"] if budget.starts_others(experiment) else []
    try:
        return sweep([f"experiment={experiment}", *kept])
    except UserError as error:
        if not onward:
            raise
        say(f"left out: {experiment}: {' '.join(str(error).split())}")
        return 2


def _ready() -> list[str]:
    from peftbench import registry

    return [n for n in registry.experiments() if n.startswith(("reproduce-", "claims-"))]


def _experiment(name: str) -> str:
    """Return the experiment that a paper, a row, a claim or its own name stands for."""
    from peftbench import published, registry
    from peftbench.reproduce.budget import experiment_of
    from peftbench.reproduce.measured import FOLDER

    claims = published.claims()
    claim = claims.get(name) or next((c for c in claims.values() if name in c.rows), None)
    own = {c.experiment for c in claims.values() if name in (c.paper.key, c.id, *c.rows)}
    if name == FOLDER or own == {FOLDER}:
        raise UserError(f"{name}: no sweep; it is measured by python experiments/{FOLDER}/measure.py")
    if name in published.reasons():
        raise UserError(f"{name}: {published.reasons()[name]}")
    for found in (name, f"reproduce-{name}", claim.experiment if claim is not None else None):
        if found is not None and found in registry.experiments():
            return found
    rows = published.chosen([name])
    found = experiment_of(rows[0]) if rows else None
    if found is None and own:
        raise UserError(
            f"{name}: there is no experiment reproduce-{name}; its claims have {', '.join(sorted(own - {FOLDER}))}"
        )
    if found is None:
        raise UserError(f"{name}: there is no experiment reproduce-{name} to run (there are {', '.join(_ready())})")
    return found
