"""Judged rows as tables, plain data, Markdown and LaTeX."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from peftbench import published
from peftbench.analysis.tables import MISSING, Table
from peftbench.published import Claim, Value
from peftbench.reproduce import claims
from peftbench.reproduce import measured as measured_claims
from peftbench.reproduce.budget import experiment_of, experiments_of
from peftbench.reproduce.records import Configuration, best_answer
from peftbench.reproduce.verdicts import NOT_RUN, VERDICTS, Difference, Measured, Verdict, judge

if TYPE_CHECKING:
    from peftbench.reproduce.counts import Rebuilt


@dataclass(frozen=True)
class Judged:
    """One published row, what answers it here, how that differs, and the verdict."""

    row: Value
    measured: Measured | None
    differences: tuple[Difference, ...]
    verdict: Verdict
    records: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        m, v = self.measured, self.verdict
        ours = None if m is None else {
            "value": m.value, "low": m.low, "high": m.high, "seeds": list(m.seeds), "statistic": _statistic(self.row),
            "unit": self.row.metric.unit, "configuration": m.label, "folder": m.folder, "incomplete": m.incomplete,
        }  # fmt: skip
        return {
            "id": self.row.id,
            "published": self.row.to_dict(),
            "measured": ours,
            "verdict": v.verdict,
            "transfer": v.transfer or None,
            "reason": v.reason,
            "difference": v.difference,
            "band": v.band,
            "differences": [
                {"what": d.what, "published": d.published or None, "ours": d.ours, "decides": d.decides}
                for d in self.differences
            ],
            "record": list(self.records) or None,
        }


def _statistic(row: Value) -> str:
    return row.protocol.statistic or "mean"


def needs(row: Value) -> list[str]:
    """Return what a run of this row would take here."""
    here, found = row.here, []
    if row.id in published.reasons():
        return [published.reasons()[row.id]]
    for what, name, ours in (("model", row.model, here.model), ("method", row.method, here.method)):
        if not ours:
            found.append(f"the {what} {name}" if name else f"a {what} that is named")
    if not here.task:
        found.append(f"the task {row.task}")
    if not row.metric.ours:
        found.append(f"the metric {row.metric.name}")
    if row.metric.unit == "count":
        return ["a count: see python -m peftbench reproduce counts"]
    if found:
        return [f"nothing here answers to {', '.join(found)}"]
    experiment = experiment_of(row)
    if experiment is not None:
        return [f"needs python -m peftbench sweep experiment={experiment} (weights of {row.model}, a GPU)"]
    start = row.protocol.starts_from(here.task)
    beginning = "" if start in ("", "pretrained") else f", from the {start} adapter"
    return [f"needs a run of {here.method} on {here.model} and {here.task}{beginning}"]


def judged(
    rows: Sequence[Value], found: Sequence[Configuration], measurements: Sequence[Mapping[str, Any]] = ()
) -> list[Judged]:
    """Judge every row by the records found, one that a claim speaks for by the claim's rule.

    Of several claims the first that has been tried speaks. `measurements`: see `judged_claims`.
    """
    spoken: dict[str, list[Claim]] = {}
    for claim in published.claims().values():
        for row_id in claim.rows:
            spoken.setdefault(row_id, []).append(claim)
    results = []
    for row in rows:
        if row.id in spoken:
            said = [_judged_claim(claim, found, measurements) for claim in spoken[row.id]]
            verdict, records = next((one for one in said if one[0].verdict != NOT_RUN), said[0])
            results.append(Judged(row, None, (), verdict, records))
            continue
        measured, differences = best_answer(row, found)
        verdict = judge(row, measured, differences, needs(row))
        records = () if measured is None else measured.records
        assert records or verdict.verdict == NOT_RUN
        results.append(Judged(row, measured, tuple(differences), verdict, records))
    return results


def number(value: float | None, like: str = "") -> str:
    """Return a number with two decimals, or as many as `like` has."""
    if value is None:
        return MISSING
    _, _, digits = like.partition(".")
    return f"{value:.{max(len(digits), 2) if digits.isdigit() else 2}f}"


def _cells(one: Judged) -> list[str]:
    row, m = one.row, one.measured
    theirs = row.value + (f" ± {row.std:g}" if row.std is not None else "")
    ours = MISSING if m is None else number(m.value, row.value)
    if m is not None and m.low is not None and m.high is not None:
        ours += f" [{number(m.low, row.value)}, {number(m.high, row.value)}]"
    return [row.id, row.metric.unit, theirs, ours, str(one.verdict), one.verdict.reason]


def values_table(results: Sequence[Judged], title: str) -> Table:
    """Return judged rows as a table; each verdict's number of rows stands below it."""
    headers = ["row", "unit", "published", "ours", "verdict", "reason"]
    raw = pd.DataFrame([_raw(one) for one in results])
    counted = Counter(one.verdict.verdict for one in results)
    summary = ", ".join(f"{counted[v]} {v}" for v in VERDICTS if counted[v])
    return Table(
        "reproduce", title, headers, [_cells(one) for one in results], raw, 6, [f"{_rows(len(results))}: {summary}"]
    )


def _rows(count: int) -> str:
    return f"{count:,} row{'' if count == 1 else 's'}"


def _raw(one: Judged) -> dict[str, Any]:
    m = one.measured
    return {
        "id": one.row.id,
        "published": one.row.number,
        "published_std": one.row.std,
        "ours": None if m is None else m.value,
        "ours_low": None if m is None else m.low,
        "ours_high": None if m is None else m.high,
        "verdict": one.verdict.verdict,
        "records": " ".join(one.records),
    }


def judged_claims(
    found: Sequence[Configuration],
    measurements: Sequence[Mapping[str, Any]] = (),
    chosen: Sequence[Claim] | None = None,
) -> list[tuple[Claim, Verdict, tuple[str, ...]]]:
    """Return claims with their verdicts and the records that these rest on.

    Args:
        measurements: of single configurations (`measured.load`), for claims that no training decides.
        chosen: which claims; None for all.
    """
    asked = published.claims().values() if chosen is None else chosen
    return [(claim, *_judged_claim(claim, found, measurements)) for claim in asked]


def _judged_claim(
    claim: Claim, found: Sequence[Configuration], measurements: Sequence[Mapping[str, Any]]
) -> tuple[Verdict, tuple[str, ...]]:
    if claim.rule in measured_claims.RULES:
        return measured_claims.judge(claim, measurements)
    return claims.judge(claim, found)


def claims_table(
    found: Sequence[Configuration],
    measurements: Sequence[Mapping[str, Any]] = (),
    chosen: Sequence[Claim] | None = None,
) -> tuple[Table, list[dict[str, Any]]]:
    """Return claims judged, as a table and as plain data; `chosen`: which, None for all."""
    rows, plain = [], []
    for claim, verdict, records in judged_claims(found, measurements, chosen):
        rows.append([claim.id, claim.statement, str(verdict), verdict.reason])
        plain.append({
            "id": claim.id, "published": _stated(claim),
            "measured": {"rule": claim.rule, "criterion": claim.settings, "experiment": claim.experiment},
            "verdict": verdict.verdict, "transfer": verdict.transfer or None, "reason": verdict.reason,
            "record": list(records) or None,
        })  # fmt: skip
    table = Table("claims", "Claims", ["claim", "statement", "verdict", "reason"], rows, pd.DataFrame(plain), 4)
    return table, plain


def reasons_table() -> tuple[Table, list[dict[str, Any]]]:
    """Return what papers state and no run could decide, as a table and as plain data."""
    rows, plain = [], []
    for row_id, reason in published.reasons().items():
        row = published.values()[row_id]
        statement = f"{row.method}, {row.task}: {row.metric.name} {row.value}."
        rows.append([row.id, statement, NOT_RUN, reason])
        plain.append({
            "id": row.id, "published": row.to_dict(), "measured": None, "verdict": NOT_RUN, "transfer": None,
            "reason": reason, "record": None,
        })  # fmt: skip
    headers = ["row", "statement", "verdict", "reason"]
    return Table("reasons", "Statements that no run could decide", headers, rows, pd.DataFrame(plain), 4), plain


def counts_table(found: Sequence[Rebuilt]) -> Table:
    """Return rebuilt counts as a table."""
    from peftbench.reproduce.counts import tally  # loads torch

    rows = []
    for r in found:
        theirs = r.count.printed or f"{r.count.trainable:,}"
        ours = MISSING if r.ours is None else f"{r.ours:,}"
        rules = " ".join(f"{rule} ({n:+,})" if n else rule for rule, n in (*r.terms, *r.total_terms))
        rows.append([r.count.id, theirs, ours, r.status, rules or MISSING, r.why or MISSING])
    summary = ", ".join(f"{n} {status}" for status, n in tally(found).items() if n)
    headers = ["row", "published", "closed form", "verdict", "rules", "why"]
    raw = pd.DataFrame([r.to_dict() for r in found])
    return Table("counts", "Parameter counts", headers, rows, raw, 6, [f"{_rows(len(found))}: {summary}"])


def list_table() -> tuple[Table, list[dict[str, Any]]]:
    """Return what there is, a paper a row, as a table and as plain data."""
    rows = Counter(row.paper.key for row in published.values().values())
    stated = published.claims().values()
    claimed = Counter(claim.paper.key for claim in stated)
    cells, plain = [], []
    for p in published.papers().values():
        own = dict.fromkeys([*experiments_of(p.key), *(c.experiment for c in stated if c.paper.key == p.key)])
        if rows[p.key] or claimed[p.key]:
            cells.append([p.key, str(rows[p.key]), str(claimed[p.key]), p.citation, " ".join(own) or MISSING])
            plain.append({
                "paper": p.key, "rows": rows[p.key], "claims": claimed[p.key], "experiments": list(own),
                "citation": p.citation,
            })  # fmt: skip
    headers = ["paper", "rows", "claims", "citation", "experiments"]
    return Table("papers", "Published figures", headers, cells, pd.DataFrame(plain), 5), plain


def stated_table(chosen: Sequence[Claim]) -> tuple[Table, list[dict[str, Any]]]:
    """Return claims as they are published, without judging them, as a table and as plain data."""
    rows = [[c.id, c.statement, c.models, c.experiment] for c in chosen]
    plain = [{"id": c.id, "published": _stated(c)} for c in chosen]
    return Table(
        "stated", "Claims", ["claim", "statement", "models", "experiment"], rows, pd.DataFrame(plain), 4
    ), plain


def _stated(claim: Claim) -> dict[str, Any]:
    return {
        "paper": claim.paper.key,
        "citation": claim.paper.citation,
        "statement": claim.statement,
        "models": claim.models,
        "rows": list(claim.rows),
    }


def rows_table(rows: Sequence[Value]) -> Table:
    """Return rows as they are published, without judging them."""
    headers = ["row", "table", "model", "method", "task", "metric", "published", "seeds", "confidence", "here"]
    cells = []
    for row in rows:
        spread = f" ± {row.std:g}" if row.std is not None else ""
        here = " ".join(filter(None, (row.here.method, row.here.model, row.here.task)))
        cells.append([
            row.id, row.table, row.model or MISSING, row.method, row.task, row.metric.name, row.value + spread,
            MISSING if row.seeds is None else str(row.seeds), row.confidence, here or MISSING,
        ])  # fmt: skip
    raw = pd.DataFrame([{"id": row.id, **row.to_dict()} for row in rows])
    return Table("published", "Published figures", headers, cells, raw, len(headers), [_rows(len(rows))])


def bibliography(rows: Sequence[Value | Claim]) -> str:
    """Return the citations of the rows' papers as a Markdown list."""
    keys = dict.fromkeys(row.paper.key for row in rows)
    return "\n".join(f"- **{key}**: {published.papers()[key].citation}" for key in keys)
