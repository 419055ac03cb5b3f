"""Predicted beside measured peaks (`experiments/estimate`) → values and a table."""

from peftbench.analysis.tables import human_bytes
from peftbench.paper.names import method, model
from peftbench.paper.peers import put_origin
from peftbench.paper.sources import Source
from peftbench.paper.values import Sheet, Values, cells, decimals, key

COMPONENTS = ("weights", "adapter", "gradients", "optimizer", "activations", "workspace")


def put(source: Source, values: Values) -> dict[str, Sheet]:
    """Keep each ratio of predicted to measured, and the worst; returns the table."""
    records = source.lines()
    off = {(r["model"], r["method"]): abs(r["ratio"] - 1) for r in records}
    values.count(f"{source.name}/configurations", len(records))
    values.count(f"{source.name}/models", len({r["model"] for r in records}))
    values.count(f"{source.name}/methods", len({r["method"] for r in records}))
    values.number(f"{source.name}/worst", 100 * max(off.values()), 1)
    for name in dict.fromkeys(r["model"] for r in records):
        own = [error for (of, _), error in off.items() if of == name]
        values.number(f"{source.name}/{key(name)}/worst", 100 * max(own), 1)
    put_origin(source, {**records[0], "device": records[0]["device_kind"]}, values)
    return {source.name: sheet(records)}


def sheet(records: list[dict[str, object]]) -> Sheet:
    """Return measured and predicted peaks, a model after the other."""
    rows: list[list[str] | None] = []
    before = None
    order = {m: max(_peak(r) for r in records if r["model"] == m) for m in {r["model"] for r in records}}
    for r in sorted(records, key=lambda r: (order[r["model"]], _peak(r))):
        if before is not None and r["model"] != before:
            rows.append(None)
        before = r["model"]
        shape: dict[str, int] = r["shape"]  # type: ignore[assignment]
        line = [
            f"{model(r['model'])}, {shape['batch_size']} × {shape['length']}, {r['precision']}",
            method(r["method"]),
        ]
        measured: dict[str, int] = r["measured"]  # type: ignore[assignment]
        predicted: dict[str, int] = r["predicted"]  # type: ignore[assignment]
        line += [human_bytes(measured["peak"]), human_bytes(predicted["peak"])]
        rows.append(cells([*line, decimals(predicted["peak"] / measured["peak"], 3)]))
    return Sheet("llrrr", ["model, rows, tokens, precision", "method", "measured", "predicted", "ratio"], rows)


def _peak(record: dict[str, object]) -> int:
    return int(record["measured"]["peak"])  # type: ignore[index]
