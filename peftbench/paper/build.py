"""Records and prose → a folder that LaTeX can read, and its check: every value, table and figure that prose names."""

import hashlib
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from peftbench.analysis.intervals import CONFIDENCE
from peftbench.analysis.power import ALPHA, POWER
from peftbench.errors import UserError, nearest
from peftbench.paper import figures, kept, memory, packing, peers, provenance, run_sheets, runs, search
from peftbench.paper.sources import FILE, Source, read
from peftbench.paper.values import Sheet, Values, typed
from peftbench.store import Store

MAIN = "main.tex"
KEPT = ("methods", "parity", "published", "claims", "build", "command", "records")
"""First parts of keys that are no sources'."""
JUDGED = ("verdicts", "claims")
"""Tables that are there once a record has a verdict."""
EDITION = 12
"""Hexadecimal digits that name an edition; in the PDF's information, too."""
NAMED = re.compile(r"\\(val|recordtable|longrecordtable|recordfigure|ifrecords|rerun)\s*(?:\[[^]]*\])?\s*\{([^{}#]*)\}")
COMMENT = re.compile(r"(?<!\\)%.*")


@dataclass
class Paper:
    """What was built: values by key, tables and what draws figures by name, and the sources."""

    values: Values
    sheets: dict[str, Sheet]
    figures: dict[str, Callable[[], Any]]
    sources: Sequence[Source]
    digest: str = ""
    written: list[Path] = field(default_factory=list)

    @property
    def missing(self) -> list[Source]:
        """Return the sources without records here."""
        return [one for one in self.sources if one.there is None]


COMPARED: dict[str, Callable[[Source, Values], dict[str, Sheet]]] = {
    "steps": peers.put_steps,
    "small": peers.put_small,
    "loss": peers.put_loss,
    "dequantize": peers.put_dequantize,
    "operations": peers.put_operations,
    "memory": memory.put,
}
PACKING: dict[str, Callable[[Source, Values], dict[str, Sheet]]] = {
    "packing-wall": packing.put_wall,
    "packing-curve": packing.put_curve,
    "packing-pairs": packing.put_pairs,
}
"""These say of a value that it is missing even where there are no records at all."""
DRAWN: dict[str, Callable[[Any], Any]] = {
    "steps": figures.steps,
    "memory": figures.components,
    "packing-wall": figures.wall,
    "packing-curve": figures.gains,
}


def collect(folder: Path, results: Path) -> Paper:
    """Return all that the records say.

    Raises:
        UserError: `folder` has no `records.yaml`, or records cannot be read.
    """
    values = Values()
    sheets: dict[str, Sheet] = {}
    drawn: dict[str, Callable[[], Any]] = {}
    sources = read(folder, results)
    for source in sources:
        values.raw(f"command/{source.name}", typed(source.command))
        if source.kind in PACKING:
            sheets |= PACKING[source.kind](source, values)
        if source.there is None:
            continue
        if source.kind in ("runs", "search"):
            store = Store(source.there.absolute())
            if source.kind == "search":
                sheets |= search.put(source, store.records(), values)
                continue
            study = runs.Study(source.name, store.records())
            runs.put(study, values)
            sheets |= run_sheets.sheets(study)
            drawn |= figures.of_study(study)
        elif source.kind in COMPARED:
            sheets |= COMPARED[source.kind](source, values)
        if source.kind in DRAWN and (source.kind not in PACKING or source.name in sheets):
            drawn[source.name] = partial(DRAWN[source.kind], source.lines())
    values.put("build/confidence", f"{100 * CONFIDENCE:.0f} %")
    values.put("build/alpha", f"{ALPHA:g}")
    values.put("build/power", f"{POWER:g}")
    sheets |= kept.put_methods(values)
    sheets |= kept.put_verdicts(sources, values)
    sheets |= provenance.put(sources, values)
    return Paper(values, sheets, drawn, sources)


def prose(folder: Path) -> dict[Path, str]:
    """Return the text of the paper's own files, comments left out.

    Raises:
        UserError: there is no `main.tex`.
    """
    if not (folder / MAIN).is_file():
        raise UserError(f"{folder}: no paper here (expected {folder / MAIN}); start in the checkout's folder")
    paths = [folder / MAIN, *sorted((folder / "sections").glob("*.tex"))]
    return {path: COMMENT.sub("", path.read_text(encoding="utf-8")) for path in paths}


def check(paper: Paper, texts: dict[Path, str]) -> set[str]:
    """Return the keys of values, and the names of figures and tables, that prose names.

    Raises:
        UserError: prose names a value, a table, a figure or a source that is none.
    """
    absent = {one.name for one in paper.missing}
    names = {one.name for one in paper.sources}
    used: set[str] = set()
    for path, text in texts.items():
        for what, name in NAMED.findall(text):
            if what == "val":
                used.add(name)
                fits = name in paper.values.found or name.partition("/")[0] in absent
                known: Sequence[str] = list(paper.values.found)
            elif what in ("rerun", "ifrecords"):
                known = sorted(names)
                fits = name in names
                used |= {f"command/{name}"}
            else:
                held = paper.figures if what == "recordfigure" else paper.sheets
                owner = max((n for n in names if name == n or name.startswith(f"{n}-")), key=len, default="")
                fits, known = name in held or owner in absent or name in JUDGED, list(held)
                used.add(name)
            if not fits:
                raise UserError(f"{path}: \\{what}{{{name}}}: no such thing in the records{nearest(name, known)}")
    return used


def build(folder: Path, results: Path, out: Path) -> Paper:
    """Write `out` anew: prose, bibliography, values, tables and figures; returns what was built.

    Raises:
        UserError: there is no paper, its prose names what is not there, or `out` cannot be written to.
    """
    texts = prose(folder)
    paper = collect(folder, results)
    paper.digest = digest(folder, paper.sources)
    paper.values.put("build/digest", paper.digest[:EDITION])
    used = check(paper, texts)
    generated = out / "generated"
    try:
        shutil.rmtree(generated, ignore_errors=True)
        (generated / "tables").mkdir(parents=True)
        for path in (*texts, folder / "references.bib"):
            target = out / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
            paper.written.append(target)
        _write(generated / "values.tex", paper, _definitions(paper, used))
        _write(generated / "values.tsv", paper, _listing(paper))
        for name, sheet in sorted(paper.sheets.items()):
            _write(generated / "tables" / f"{name}.tex", paper, sheet.tex())
            _write(generated / "tables" / f"{name}.long.tex", paper, sheet.tex(long=True))
        for name in sorted(used & set(paper.figures)):
            path = generated / "figures" / f"{name}.pdf"
            figures.save(paper.figures[name](), path)
            paper.written.append(path)
    except OSError as error:
        raise UserError(f"{out}: cannot write the paper ({error.strerror or error})") from error
    return paper


def _write(path: Path, paper: Paper, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    paper.written.append(path)


def _definitions(paper: Paper, used: set[str]) -> str:
    held = Values({name: text for name, text in paper.values.found.items() if name in used})
    flags = [f"\\paperrecords{{{one.name}}}" for one in paper.sources if one.there is not None]
    return held.tex() + "\n".join([*sorted(flags), f"\\def\\paperedition{{{paper.digest[:EDITION]}}}", ""])


def _listing(paper: Paper) -> str:
    lines = [f"{name}\t{'' if text is None else text}" for name, text in sorted(paper.values.found.items())]
    return "\n".join(["key\tvalue", *lines, ""])


def digest(folder: Path, sources: Sequence[Source]) -> str:
    """Return what tells a paper from another: its prose and the records that it is made from."""
    found = hashlib.sha256()
    for path in (*sorted(prose(folder)), folder / "references.bib", folder / FILE):
        found.update(path.name.encode() + b"\0" + path.read_bytes())
    for source in sources:
        found.update(f"{source.name}\0{source.fingerprint()}\0".encode())
    return found.hexdigest()
