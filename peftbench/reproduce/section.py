"""A report's section on the published figures and claims that the runs of its folder answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from peftbench import published
from peftbench.analysis.html import Section
from peftbench.analysis.tables import Table
from peftbench.published import Value
from peftbench.reproduce import claims, pages
from peftbench.reproduce.records import Configuration, answers, grouped
from peftbench.reproduce.verdicts import NOT_RUN

RULES = (
    "What papers report, beside the runs of this folder that answer it; figures that nothing here answers are left "
    "out. *exact*: equal to the digits printed. *within interval*: the difference is within both sides' 95 % interval "
    "or the metric's tolerance. *differs*: it is not. *protocol mismatch*: the runs differ in something that decides."
)


def section(records: Sequence[Mapping[str, Any]], folder: str) -> Section | None:
    """Return the section, or None where the records answer no published figure and decide no claim.

    Args:
        folder: what the folder of these records is called.
    """
    found = grouped((folder, record) for record in records)
    judged = [one for one in pages.judged(_answered(found), found) if one.verdict.verdict != NOT_RUN]
    made = [pages.values_table(judged, "Published figures and ours")] if judged else []
    made += filter(None, [_claims(found)])
    if not made:
        return None
    text = [RULES] if judged else []
    text.append(
        "This folder alone is judged here: `python -m peftbench reproduce all` and `reproduce claims` look at all "
        "results, with the differences in protocol and where to read on."
    )
    papers = dict.fromkeys(one.row.paper.key for one in judged)
    text += [f"**{key}**: {published.papers()[key].citation}" for key in papers]
    return Section("Published figures", text, made)


def _answered(found: Sequence[Configuration]) -> list[Value]:
    """Return the rows that some configuration answers, but for those that a claim speaks for."""
    spoken = {row for claim in published.claims().values() for row in claim.rows}
    # Names first: of some thousand rows a folder answers a few.
    methods = {c.spec["method"]["name"] for c in found}
    rows = [row for row in published.chosen([]) if row.here.method in methods and row.id not in spoken]
    return [row for row in rows if any(answers(row, configuration) for configuration in found)]


def _claims(found: Sequence[Configuration]) -> Table | None:
    """Return the claims that the records decide, or could with more of them."""
    cells, plain = [], []
    for claim in published.claims().values():
        verdict, records = claims.judge(claim, found)
        if verdict.verdict != NOT_RUN and records:
            cells.append([claim.id, claim.statement, str(verdict), verdict.reason])
            plain.append({"id": claim.id, "verdict": verdict.verdict, "records": " ".join(records)})
    if not cells:
        return None
    return Table("claims", "Claims", ["claim", "statement", "verdict", "reason"], cells, pd.DataFrame(plain), 4)
