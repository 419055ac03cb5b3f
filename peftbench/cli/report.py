"""``report``: the tables and plots of a folder of records."""

from pathlib import Path

from peftbench.cli.sweep import show, write_report
from peftbench.errors import UserError, nearest
from peftbench.store import Store

HELP = """\
Write tables (Markdown, CSV, LaTeX) and plots (png, pdf, svg) of a sweep's records to <folder>/report/, print the table.

Where a search is there, its own report goes to <folder>/search/report/.

examples:
  python -m peftbench report results/default
  python -m peftbench report results/glue-minilm --consolidate"""


def report(folder: str, consolidate: bool = False, slim: bool = False) -> int:
    """Write and print the report; `consolidate` also writes one file of all records, `slim` without items and traces.

    Raises:
        UserError: there are none, or `slim` is asked for alone.
    """
    from peftbench.analysis import search_report

    if slim and not consolidate:
        raise UserError("--slim says how to --consolidate: give both")
    path = Path(folder).expanduser()
    if not path.is_dir():
        beside = [str(p) for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
        raise UserError(f"{folder}: no such folder{nearest(folder, beside)}")
    store = Store(path.absolute())
    records = store.records()
    if not records:
        raise UserError(f"{folder}: holds no records (expected {path / 'runs'}/*.json or {path / 'records.jsonl.gz'})")
    found = search_report.read_plan(store.folder)
    shown = records if found is None else search_report.compared(records, found)
    show(shown)
    if len(shown) < len(records):
        print(f"{len(records) - len(shown)} runs of a search's trials are in its own report alone")
    write_report(store)
    if consolidate:
        print(f"records: {store.consolidate(slim)}")
    return 0
