"""Figures that papers and repositories report, with where they stand and how far they were confirmed.

The tables beside this file hold facts: `values.csv` one reported figure a row, `counts.csv` one parameter count a row,
`papers.csv` the citations, `protocols.csv` how rows were obtained (by the longest prefix of their ids), `metrics.csv`,
`models.csv`, `methods.csv` and `tasks.csv` what a reported name is called here (empty: not here), `architectures.csv`
the shapes of the models, `claims.csv` orderings and ratios with their criteria, `reasons.csv` what no run could decide,
`texts.csv` longer texts that other tables name by key. Imports no torch.
"""

import csv
import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peftbench.errors import UserError, nearest

FOLDER = Path(__file__).resolve().parent
CONFIDENCES = ("high", "medium", "low")
"""high: read in the source itself; medium: in a copy, or recalled with certainty; low: recalled."""
SELECTIONS = ("", "best on the reported split", "held out", "last")
"""Which step a score is taken at, and on what data that was decided; empty: not stated."""
STATISTICS = ("", "mean", "median")
SPREADS = ("", "standard error", "interquartile range")
SPLITS = ("", "validation", "half of validation", "test", "test server")


def table(name: str) -> Iterator[dict[str, str]]:
    """Yield the rows of one table."""
    with (FOLDER / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        yield from csv.DictReader(file)


@dataclass(frozen=True)
class Paper:
    """A source; `key` is what rows name it by."""

    key: str
    authors: str
    title: str
    venue: str
    arxiv: str
    url: str

    @property
    def citation(self) -> str:
        """Return authors, title and where to find it."""
        where = [f"arXiv:{self.arxiv}" if self.arxiv else "", self.venue, self.url]
        return ". ".join([self.authors, self.title, ", ".join(filter(None, where))])


@dataclass(frozen=True)
class Metric:
    """A reported metric: its unit, what records call it, and when two values of it count as equal.

    `ours` may join metrics: "a+b" is their mean, "a|b" either of them (the source does not say which), "a@p+q" the mean
    over two parts of the data. Reported =
    `factor` · ours. `better` is "higher", "lower" or empty. `tolerance` is in the unit reported, with the `reason`.
    """

    name: str
    unit: str
    ours: str
    factor: float | None
    better: str
    tolerance: float | None
    reason: str


@dataclass(frozen=True)
class Protocol:
    """What is known of how rows were obtained; empty where the source does not say.

    `spread` is what the column `std` holds: a standard deviation over seeds where nothing else is said. `start` is
    "none", or what weights or adapters some tasks start from: "mnli: mrpc rte stsb".
    """

    prefix: str = ""
    selection: str = ""
    statistic: str = ""
    start: str = ""
    spread: str = ""
    note: str = ""

    def starts_from(self, task: str) -> str:
        """Return what training starts from on `task`: "pretrained", a task's name, or "" where it is not stated."""
        if self.start in ("", "none"):
            return "pretrained" if self.start else ""
        source, _, tasks = self.start.partition(": ")
        return source if task in tasks.split() else "pretrained"


@dataclass(frozen=True)
class Here:
    """What a reported name is called here; empty where this collection has nothing of the kind.

    `weights` is "same" or "other", where only the shape is the same.
    """

    model: str = ""
    weights: str = ""
    method: str = ""
    task: str = ""
    split: str = ""
    part: str = ""
    note: str = ""


@dataclass(frozen=True)
class Value:
    """One reported figure. `number` is None where it is a bound, a range or words."""

    id: str
    paper: Paper
    table: str
    model: str
    method: str
    settings: dict[str, Any] = field(hash=False)
    task: str
    metric: Metric
    value: str
    std: float | None
    seeds: int | None
    trainable: str
    confidence: str
    confirmed: str
    notes: str
    protocol: Protocol
    here: Here

    @property
    def number(self) -> float | None:
        """Return the value as a number."""
        try:
            return float(self.value)
        except ValueError:
            return None

    @property
    def rounding(self) -> float:
        """Return half a unit of the last digit printed."""
        return half_unit(self.value)

    def to_dict(self) -> dict[str, Any]:
        """Return the row as plain data."""
        return {
            "paper": self.paper.key,
            "citation": self.paper.citation,
            "table": self.table,
            "model": self.model,
            "method": self.method,
            "settings": self.settings,
            "task": self.task,
            "metric": self.metric.name,
            "unit": self.metric.unit,
            "value": self.value if self.number is None else self.number,
            "std": self.std,
            "seeds": self.seeds,
            "confidence": self.confidence,
            "confirmed": self.confirmed,
            "notes": self.notes,
            "protocol": {
                "selection": self.protocol.selection,
                "statistic": self.protocol.statistic,
                "start": self.protocol.start,
                "spread": self.protocol.spread,
                "note": self.protocol.note,
            },
        }


@dataclass(frozen=True)
class Count:
    """One reported number of trained parameters; `printed` is how a paper rounds it, `total` counts the base too."""

    id: str
    model: str
    method: str
    settings: dict[str, Any] = field(hash=False)
    printed: str
    trainable: int
    total: int | None
    confirmed: str
    notes: str


def half_unit(text: str) -> float:
    """Return half a unit of the last digit of a decimal number: "91.5" → 0.05; whole numbers are taken as exact."""
    _, dot, digits = text.partition(".")
    return 0.5 * 10 ** -len(digits) if dot and digits.isdigit() else 0.0


@functools.cache
def texts() -> dict[str, str]:
    """Return key → text."""
    return {row["key"]: row["text"] for row in table("texts")}


@functools.cache
def papers() -> dict[str, Paper]:
    """Return key → paper."""
    return {row["paper"]: Paper(*row.values()) for row in table("papers")}


@functools.cache
def metrics() -> dict[str, Metric]:
    """Return reported name → metric."""
    return {
        r["metric"]: Metric(
            r["metric"], r["unit"], r["ours"], _number(r["factor"]), r["better"], _number(r["tolerance"]), r["reason"]
        )
        for r in table("metrics")
    }


@functools.cache
def architectures() -> dict[str, dict[str, Any]]:
    """Return model → its shape: `config_class` and settings of the `transformers` config."""
    return {row["model"]: json.loads(row["config"]) for row in table("architectures")}


@functools.cache
def protocols() -> tuple[Protocol, ...]:
    """Return what is known of how rows were obtained, the most particular first."""
    return tuple(sorted((Protocol(*row.values()) for row in table("protocols")), key=lambda p: -len(p.prefix)))


def _number(text: str) -> float | None:
    return float(text) if text else None


def _settings(text: str) -> dict[str, Any]:
    return json.loads(text) if text else {}


@functools.cache
def values() -> dict[str, Value]:
    """Return id → reported figure, in the order of the table."""
    models, methods, tasks = ({row[n]: row for row in table(f"{n}s")} for n in ("model", "method", "task"))
    found, known, words = {}, papers(), texts()
    for r in table("values"):
        model, method, task = models.get(r["model"], {}), methods[r["method"]], tasks[r["task"]]
        found[r["id"]] = Value(
            r["id"], known[r["paper"]], r["table"], r["model"], r["method"], _settings(words.get(r["settings"], "")),
            r["task"], metrics()[r["metric"]], r["value"], _number(r["std"]), int(r["seeds"]) if r["seeds"] else None,
            r["trainable"], r["confidence"], words.get(r["confirmed"], ""), words.get(r["notes"], ""),
            next((p for p in protocols() if r["id"].startswith(p.prefix)), Protocol()),
            Here(
                model.get("ours", ""), model.get("weights", ""), method["ours"], task["ours"], task["split"],
                task["part"], model.get("note", ""),
            ),
        )  # fmt: skip
    return found


@functools.cache
def counts() -> dict[str, Count]:
    """Return id → reported parameter count, in the order of the table."""
    return {
        r["id"]: Count(
            r["id"], r["model"], r["method"], _settings(r["settings"]), r["printed"], int(r["trainable"]),
            int(r["total"]) if r["total"] else None, texts()[r["confirmed"]], texts().get(r["notes"], ""),
        )
        for r in table("counts")
    }  # fmt: skip


def chosen(names: list[str]) -> list[Value]:
    """Return the rows that `names` ask for: papers' keys, rows' ids, beginnings of ids that end in "-", or "all".

    Raises:
        UserError: a name fits nothing, no claim either.
    """
    known = values()
    found: dict[str, Value] = {}
    for name in names or ["all"]:
        fits = [
            v
            for v in known.values()
            if name in ("all", v.id, v.paper.key) or (name.endswith("-") and v.id.startswith(name))
        ]
        if not fits and not chosen_claims([name]):
            near = nearest(name, [*papers(), *known, *claims()])
            raise UserError(f"{name}: no such paper or row{near} (python -m peftbench reproduce --list lists them)")
        found.update((v.id, v) for v in fits)
    return list(found.values())


@dataclass(frozen=True)
class Claim:
    """A claim of a paper that is no figure: what is said, which rule judges it, and by which experiment here.

    The rule and its settings are the criterion, written down before any run.
    """

    id: str
    paper: Paper
    rows: tuple[str, ...]
    statement: str
    experiment: str
    rule: str
    settings: dict[str, Any] = field(hash=False)
    models: str


@functools.cache
def claims() -> dict[str, Claim]:
    """Return id → claim."""
    return {
        r["claim"]: Claim(
            r["claim"],
            papers()[r["paper"]],
            tuple(r["rows"].split()),
            r["statement"],
            r["experiment"],
            r["rule"],
            json.loads(r["settings"]),
            r["models"],
        )
        for r in table("claims")
    }


def chosen_claims(names: list[str]) -> list[Claim]:
    """Return the claims that `names` ask for beside rows: those named, and of papers those that no row stands for."""
    found: dict[str, Claim] = {}
    for name in names or ["all"]:
        for claim in claims().values():
            alone = not claim.rows and name in ("all", claim.paper.key)
            if alone or name == claim.id or (name.endswith("-") and claim.id.startswith(name)):
                found[claim.id] = claim
    return [claim for claim in found.values() if claim.id not in values()]


@functools.cache
def reasons() -> dict[str, str]:
    """Return id → why no run could decide that row."""
    return {r["row"]: r["reason"] for r in table("reasons")}
