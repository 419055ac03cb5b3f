"""What was found: every verdict there is on one page, the most surprising ones explained, and what is left open.

The page is made from records alone. Explanations are kept with the verdict that they explain
(`published/surprises.csv`, the most surprising first); one whose row has another verdict by now is left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peftbench import published
from peftbench.published import Claim
from peftbench.reproduce import pages
from peftbench.reproduce.counts import Rebuilt
from peftbench.reproduce.measured import FOLDER
from peftbench.reproduce.records import Configuration
from peftbench.reproduce.verdicts import NOT_RUN, VERDICTS, Verdict

COMMAND = "python -m peftbench reproduce found > docs/found.md"
SHOWN = 3
"""Surprises that the page explains."""
WORDS = {"claim holds": "holds", "claim contradicted": "contradicted", "claim undecided": "undecided"}


@dataclass(frozen=True)
class Surprise:
    """One row, its verdict and why that is so, in words."""

    row: str
    said: str
    verdict: str
    reason: str
    text: str


def surprises(judged: Sequence[tuple[Claim, Verdict, tuple[str, ...]]], counted: Sequence[Rebuilt]) -> list[Surprise]:
    """Return the first explanations whose verdict is that of their row today."""
    known = {claim.id: (claim.statement, v.verdict, f"{v.reason}{_on(v)}") for claim, v, _ in judged}
    known |= {r.count.id: (_count_said(r), r.status, _count_reason(r)) for r in counted}
    found = []
    for line in published.table("surprises"):
        if (row := known.get(line["row"])) is not None and row[1] == line["verdict"]:
            found.append(Surprise(line["row"], *row, line["text"]))
    return found[:SHOWN]


def _on(verdict: Verdict) -> str:
    return f" (on {verdict.transfer})" if verdict.transfer else ""


def _count_said(r: Rebuilt) -> str:
    return f"{r.count.model}, {r.count.method}: {r.count.printed or format(r.count.trainable, ',')} trained parameters."


def _count_reason(r: Rebuilt) -> str:
    return r.why if r.ours is None else f"{r.ours:,} by the closed form; {r.why}" if r.why else f"{r.ours:,}"


def page(found: Sequence[Configuration], measurements: Sequence[Mapping[str, Any]], counted: Sequence[Rebuilt]) -> str:
    """Return the page as Markdown."""
    judged = pages.judged_claims(found, measurements)
    values = pages.judged(list(published.values().values()), found, measurements)
    decided = [one for one in judged if one[1].verdict != NOT_RUN]
    text = [
        "# What we found",
        "",
        f"Made from the records in `results/` by `{COMMAND}`;",
        "nothing here is written by hand. The rules are in [reproduce.md](reproduce.md), the criteria of claims in the",
        "README of each experiment; both were written down before the runs that they judge.",
        "",
        "## Claims",
        "",
        _summary(Counter(v.verdict for _, v, _ in judged), len(judged), "claims"),
        "",
    ]
    text += _claims(decided) if decided else ["No claim has been tried yet.", ""]
    text += [
        "A claim tried on other models than its authors' says something of those models alone: `transfer`.",
        "",
        "## The most surprising rows",
        "",
    ]
    told = surprises(judged, counted)
    for one in told:
        text += [f"**{one.said}** *{WORDS.get(one.verdict, one.verdict)}*: {one.reason}.", "", one.text, ""]
    text += [] if told else ["None can be named before there are records.", ""]
    text += [
        "## Published figures",
        "",
        _summary(Counter(o.verdict.verdict for o in values), len(values), "figures"),
        "",
    ]
    own = [o for o in values if o.verdict.verdict != NOT_RUN]
    if own:
        text += ["| row | published | ours | verdict | reason |", "| --- | ---: | ---: | --- | --- |"]
        text += [_row([o.row.id, o.row.value, _ours(o), str(o.verdict), o.verdict.reason]) for o in own]
        text += [""]
    tally = Counter(r.status for r in counted)
    text += [
        "## Parameter counts",
        "",
        f"{len(counted)} reported counts, rebuilt from shapes: {tally['equal']} equal, {tally['explained']} explained",
        f"to the parameter, {tally['differs']} unexplained, {tally['inconsistent']} inconsistent with any model of its",
        f"width, {tally['not here']} of methods or architectures not here.",
        "",
        "## What remains unverified",
        "",
        *_open(judged, values),
    ]
    return "\n".join(text).rstrip() + "\n"


def _summary(tally: Mapping[str, int], count: int, what: str) -> str:
    return f"{count:,} {what}: " + ", ".join(f"{tally[v]:,} {v}" for v in VERDICTS if tally.get(v)) + "."


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _ours(one: pages.Judged) -> str:
    return pages.number(one.measured.value if one.measured else None, one.row.value)


def _claims(judged: Sequence[tuple[Claim, Verdict, tuple[str, ...]]]) -> list[str]:
    lines = ["| claim | said by | verdict | what was seen |", "| --- | --- | --- | --- |"]
    for claim, verdict, _ in judged:
        lines.append(_row([f"{claim.statement} (`{claim.id}`)", claim.paper.authors, str(verdict), verdict.reason]))
    return [*lines, ""]


def _open(judged: Sequence[tuple[Claim, Verdict, tuple[str, ...]]], values: Sequence[pages.Judged]) -> list[str]:
    waiting: dict[str, list[Claim]] = {}
    for claim, verdict, _ in judged:
        if verdict.verdict == NOT_RUN:
            waiting.setdefault(claim.experiment, []).append(claim)
    lines = []
    for experiment, claims in waiting.items():
        how = f"`experiments/{FOLDER}/measure.py`" if experiment == FOLDER else f"`sweep experiment={experiment}`"
        lines.append(f"- {how} has not been run:")
        lines += [f"  - {claim.statement} (`{claim.id}`, {claim.paper.authors})" for claim in claims]
    undecided = [claim for claim, verdict, _ in judged if verdict.verdict == "claim undecided"]
    if undecided:
        lines.append(f"- Left open by the data: {', '.join(f'`{c.id}`' for c in undecided)}.")
    transfers = [claim for claim, verdict, _ in judged if verdict.transfer]
    if transfers:
        names = ", ".join(f"`{c.id}`" for c in transfers)
        lines.append(f"- Tried on other models than the authors', so that theirs remain untried: {names}.")
    missing = [one for one in values if one.verdict.verdict == NOT_RUN]
    named = [one.verdict.reason.partition("experiment=")[2].split() for one in missing]
    ready = Counter(words[0] for words in named if words)
    if ready:
        listed = ", ".join(f"`{name}` {count}" for name, count in ready.most_common())
        lines.append(
            f"- {sum(ready.values()):,} published figures wait for an experiment that is ready to run: {listed}."
        )
    if rest := len(missing) - sum(ready.values()):
        lines.append(f"- {rest:,} published figures have no experiment: mostly of models, tasks or metrics not here.")
    return lines or ["Nothing."]
