"""``report``: the tables and plots of a folder of records."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from peftbench.cli.sweep import show, show_table, write_report
from peftbench.errors import UserError, nearest
from peftbench.store import Store

HELP = """\
Write tables (Markdown, CSV, LaTeX) and plots (png, pdf, svg) of a sweep's records to <folder>/report/, print the table.

index.html there is the whole report in one file, with charts that answer to controls (pip install 'peftbench[report]').
--compare A B reports B and adds what changed since A: the same configurations in both, with significance.
Where a search is there, its own report goes to <folder>/search/report/.

examples:
  python -m peftbench report results/default
  python -m peftbench report results/glue-minilm --consolidate
  python -m peftbench report --compare results/before results/after"""


def report(
    folder: str | None, consolidate: bool = False, slim: bool = False, compare: Sequence[str] | None = None
) -> int:
    """Write and print the report; `consolidate` also writes one file of all records, `slim` without items and traces.

    Args:
        compare: two folders: report the second, with what changed since the first.

    Raises:
        UserError: there are no records, `slim` is asked for alone, or not one folder or two different ones are given.
    """
    from peftbench.analysis import changes, search_report

    if slim and not consolidate:
        raise UserError("--slim says how to --consolidate: give both")
    if (folder is None) == (compare is None):
        raise UserError("report takes a folder, or --compare and two folders (python -m peftbench report --help)")
    if compare is not None and Path(compare[0]).expanduser().resolve() == Path(compare[1]).expanduser().resolve():
        raise UserError(f"--compare {compare[0]} {compare[1]}: one folder; expected two sweeps")
    store, records = _opened(str(folder if compare is None else compare[1]))
    sections = [] if compare is None else [_changes(compare[0], store, records)]
    found = search_report.read_plan(store.folder)
    shown = records if found is None else search_report.compared(records, found)
    show(shown)
    if len(shown) < len(records):
        print(f"{len(records) - len(shown)} runs of a search's trials are in its own report alone")
    for section in sections:
        for table in map(changes.without_identical, section.tables):
            if table.rows:
                show_table(table, Console(width=None if Console().is_terminal else 200))
        print("\n".join(line.replace("**", "") for line in section.text))
    write_report(store, sections)
    if consolidate:
        print(f"records: {store.consolidate(slim)}")
    return 0


def _opened(folder: str) -> tuple[Store, list[dict[str, Any]]]:
    """Return the store of a folder and its records; raises UserError where there are none."""
    path = Path(folder).expanduser()
    if not path.is_dir():
        beside = [str(p) for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
        raise UserError(f"{folder}: no such folder{nearest(folder, beside)}")
    store = Store(path.absolute())
    records = store.records()
    if not records:
        raise UserError(f"{folder}: holds no records (expected {path / 'runs'}/*.json or {path / 'records.jsonl.gz'})")
    return store, records


def _changes(before: str, store: Store, records: Sequence[dict[str, Any]]) -> Any:
    """Return the section on what changed in `store` since the folder `before`."""
    from peftbench.analysis import changes

    old, older = _opened(before)
    names = [old.folder.name, store.folder.name]
    if names[0] == names[1]:
        names = [f"{folder.parent.name}/{folder.name}" for folder in (old.folder, store.folder)]
    return changes.section(changes.side(names[0], older), changes.side(names[1], records))
