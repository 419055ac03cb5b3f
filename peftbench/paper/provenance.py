"""Where each source's records come from → the table of records, and the date of the newest."""

from collections.abc import Iterable, Sequence

from peftbench.paper.sources import Record, Source
from peftbench.paper.values import Sheet, Values, cells
from peftbench.store import Store

NO_COMMIT = "not recorded"


def put(sources: Sequence[Source], values: Values) -> dict[str, Sheet]:
    """Keep counts of all records and the newest date; returns the table, missing sources with it."""
    rows, dates, total = [], [], 0
    for source in sources:
        if source.there is None:
            rows.append(cells([source.path, "not measured", None, None, None, None]))
            continue
        records = _records(source)
        total += len(records)
        dates += [date for r in records if (date := str(r.get("created") or r.get("date") or "")[:10])]
        places = _found(r.get("device") if "comparison" in r else _environment(r, "device_kind") for r in records)
        versions = _found(_torch(r) for r in records)
        commits = {str(c)[:7] for r in records if (c := r.get("git_commit") or _environment(r, "git_commit"))}
        shown = ", ".join(sorted(commits)) if len(commits) < 3 else f"{len(commits)} commits"
        line = [source.path, f"{len(records):,}", places, versions, shown or NO_COMMIT, source.fingerprint()[:8]]
        rows.append(cells(line))
    values.count("records/count", total)
    values.put("records/newest", max(dates, default=None))
    values.count("records/sources", len(sources))
    values.count("records/there", sum(one.there is not None for one in sources))
    headers = ["below results/", "records", "device", "torch", "commit", "sha256"]
    return {"provenance": Sheet("lrlllr", headers, rows)}


def _records(source: Source) -> Sequence[Record]:
    assert source.there is not None
    return Store(source.there.absolute()).records() if source.kind in ("runs", "search") else source.lines()


def _environment(record: Record, key: str) -> str | None:
    found = (record.get("environment") or {}).get(key) or record.get(key)
    return None if found is None else str(found)


def _torch(record: Record) -> str | None:
    versions = (record.get("environment") or {}).get("versions") or record.get("versions") or {}
    return versions.get("torch")


def _found(values: Iterable[str | None]) -> str | None:
    return ", ".join(sorted({str(v) for v in values if v})) or None
