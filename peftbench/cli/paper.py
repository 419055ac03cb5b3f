"""``paper``: sources of the paper from records, and the PDF where LaTeX is installed."""

import calendar
import time
from pathlib import Path

from peftbench.errors import UserError

HELP = """\
Make the paper from records alone: every number, table and figure anew, beside its prose, and the PDF where LaTeX is
installed. What no record holds is printed as "not measured".

examples:
  python -m peftbench paper
  python -m peftbench paper --results results --out paper/build
  python -m peftbench paper --no-pdf

folder       where main.tex, sections/, references.bib and records.yaml lie (default: paper)
--results    the folder that records.yaml's paths begin from (default: results)
--out        where sources and PDF go (default: <folder>/build); generated/values.tsv there lists every value by its key
--no-pdf     sources alone"""

FOLDER, RESULTS, BUILD = "paper", "results", "build"


def paper(folder: str | None, results: str | None, out: str | None, pdf: bool = True) -> int:
    """Write the sources, make the PDF if there is LaTeX, and print where they are.

    Raises:
        UserError: no paper or no records there, prose that names what no record holds, or LaTeX failed.
    """
    from peftbench.paper import latex
    from peftbench.paper.build import MAIN, build

    home, where = Path(folder or FOLDER).expanduser(), Path(results or RESULTS).expanduser()
    target = Path(out).expanduser() if out else home / BUILD
    if target.resolve() == home.resolve() or target.resolve() in home.resolve().parents:
        raise UserError(f"--out {target}: holds the paper's own files; choose another folder")
    made = build(home, where, target)
    (target / f"{latex.JOB}.pdf").unlink(missing_ok=True)  # of earlier sources
    for source in made.missing:
        print(f"not measured: {source.shown} ({source.command})")
    print(f"sources: {target / MAIN} ({len(made.values.found)} values, {len(made.sheets)} tables)")
    lacking = latex.missing()
    if not pdf or lacking:
        if pdf and lacking:
            print(lacking)
        return 0
    path, said = latex.compile_pdf(target, MAIN, _epoch(made.values.found.get("records/newest")))
    for line in said:
        print(f"LaTeX: {line}")
    print(f"PDF: {path}")
    return 0


def _epoch(day: str | None) -> int:
    """Return a day as seconds, the day of the newest record; 0 where there is none."""
    return calendar.timegm(time.strptime(day.replace("{-}", "-"), "%Y-%m-%d")) if day else 0
