"""Records of `experiments/peers` → values and tables: whole steps, small models, kernels, operations.

Ratios are taken within one call, whose contestants took turns in one process; their intervals are bootstraps of both
medians over the timed steps, and so say how steady that machine was then, not how another one would be.
"""

import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from peftbench.paper.names import contestant, model
from peftbench.paper.sources import Record, Source
from peftbench.paper.values import Sheet, Values, between, cells, decimals, key

GIB, MIB = 2**30, 2**20
DRAWS = 2000
WITH = (
    *("hf-lora", "hf-lora-bf16", "hf-lora-compiled", "hf-full", "hf-full-compiled", "frozen"),
    *("ours-lora", "ours-lora-compiled-graphs"),
)
"""Whom others are compared with."""
FIRST = "hf-lora"


def calls(records: Iterable[Record]) -> list[list[Record]]:
    """Return completed records by the call that made them, in order of date."""
    found: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        if record.get("status", "completed") == "completed":
            found.setdefault((str(record["date"]), str(record["command"])), []).append(record)
    return [found[call] for call in sorted(found)]


def latest(every: Sequence[Sequence[Record]], *names: str) -> dict[str, Record] | None:
    """Return the records of `names` in the last call that has them all."""
    for call in reversed(every):
        found = {str(r["contestant"]): r for r in call}
        if all(name in found for name in names):
            return {name: found[name] for name in names}
    return None


def representative(every: Sequence[Sequence[Record]], name: str) -> Record:
    """Return a contestant's record beside `FIRST` where there is one, else its last."""
    found = latest(every, name, FIRST) or latest(every, name)
    assert found is not None
    return found[name]


def samples(record: Record) -> np.ndarray:
    """Return the seconds of all timed steps."""
    return np.array([s for turn in record["step_seconds"]["samples"] for s in turn])


def ratio_interval(first: Record, second: Record) -> tuple[float, float]:
    """Return the 95 % interval of the ratio of medians, from draws that the two records alone decide."""
    mine, theirs = samples(first), samples(second)
    rng = np.random.default_rng(zlib.crc32(f"{first['contestant']} {second['contestant']}".encode()))
    medians = [np.median(rng.choice(s, (DRAWS, len(s))), axis=1) for s in (mine, theirs)]
    low, high = np.percentile(medians[0] / medians[1], [2.5, 97.5])
    return float(low), float(high)


def seconds(record: Record) -> float:
    """Return the median seconds of a step."""
    return float(record["step_seconds"]["p50"])


def of_ceiling(record: Record) -> float | None:
    """Return the rate at 4N or 6N operations a token over the best matrix product's."""
    if not record.get("ceilings"):
        return None
    rate = record["flops_rule"] * record["matrix_parameters"] * record["batch"] * record["length"] / seconds(record)
    return float(rate / record["ceilings"]["matmul_flops_per_second"])


def put_steps(source: Source, values: Values) -> dict[str, Sheet]:
    """Keep every contestant's time and memory, and its ratios to others; returns the table."""
    every = calls(source.lines())
    names = list(dict.fromkeys(str(r["contestant"]) for call in every for r in call))
    for name in names:
        one, prefix = representative(every, name), f"{source.name}/{key(name)}"
        values.number(f"{prefix}/ms", 1000 * seconds(one), 1)
        values.put(f"{prefix}/ms-range", between([1000 * one["step_seconds"][p] for p in ("p10", "p90")], 1))
        values.number(f"{prefix}/gib", _over(one.get("peak_bytes"), GIB), 1)
        values.number(f"{prefix}/ceiling", of_ceiling(one), 2)
        medians = [seconds(r) for call in every for r in call if r["contestant"] == name]
        values.number(f"{prefix}/repeat", 100 * (max(medians) / min(medians) - 1), 1)
        values.count(f"{prefix}/calls", len(medians))
        for other in WITH:
            found = None if other == name else latest(every, name, other)
            if found is None:
                continue
            mine, theirs = found[name], found[other]
            values.number(f"{prefix}/{other}/time", seconds(mine) / seconds(theirs), 2)
            values.number(f"{prefix}/{other}/faster", seconds(theirs) / seconds(mine), 1)
            values.number(f"{prefix}/{other}/more-ms", 1000 * (seconds(mine) - seconds(theirs)), 1)
            values.interval(f"{prefix}/{other}/time-interval", ratio_interval(mine, theirs), 2)
            if mine.get("peak_bytes") and theirs.get("peak_bytes"):
                values.number(f"{prefix}/{other}/memory", mine["peak_bytes"] / theirs["peak_bytes"], 2)
    _setting(source, every[-1][0], values)
    return {source.name: steps_sheet(every, names)}


def _over(value: float | None, unit: float) -> float | None:
    return None if value is None else value / unit


def _setting(source: Source, record: Record, values: Values) -> None:
    for what in ("batch", "length", "rank"):
        values.count(f"{source.name}/{what}", record.get(what))
    values.put(f"{source.name}/model", model(record["model"]))
    values.put(f"{source.name}/precision", record.get("precision"))
    values.put(f"{source.name}/weights", record.get("weights"))
    put_origin(source, record, values)
    ceilings = record.get("ceilings") or {}
    values.number(f"{source.name}/teraflops", _over(ceilings.get("matmul_flops_per_second"), 1e12), 0)
    values.number(f"{source.name}/terabytes", _over(ceilings.get("copy_bytes_per_second"), 1e12), 2)
    parameters = record.get("matrix_parameters")
    values.put(f"{source.name}/billions", None if parameters is None else f"{parameters / 1e9:.2f}")


def put_origin(source: Source, record: Record, values: Values) -> None:
    """Keep where a record of a script was made."""
    values.put(f"{source.name}/device", record.get("device"))
    for package in ("torch", "transformers", "peft"):
        values.put(f"{source.name}/{package}", record.get("versions", {}).get(package))


def steps_sheet(every: Sequence[Sequence[Record]], names: Sequence[str]) -> Sheet:
    """Return whole steps, each ratio within the last call that has both."""
    rows = []
    for name in names:
        one = representative(every, name)
        line = [contestant(name), decimals(1000 * seconds(one), 1)]
        line += [_ratio(every, name, FIRST), _ratio(every, name, "hf-full")]
        own = "ours-lora-compiled-graphs" if name.endswith("-compiled-graphs") else "ours-lora"
        line.append(_ratio(every, name, own) if name.startswith("ours-") else None)
        line += [decimals(of_ceiling(one), 2), decimals(_over(one.get("peak_bytes"), GIB), 1)]
        line.append(_ratio(every, name, FIRST, memory=True))
        rows.append((name.startswith("ours-"), cells(line)))
    ours = [line for mine, line in rows if mine]
    others = [line for mine, line in rows if not mine]
    headers = ["contestant", "ms", r"$\times$ HF LoRA", r"$\times$ full", r"$\times$ own LoRA", "of ceiling", "GiB"]
    return Sheet("lrrrrrrr", [*headers, r"$\times$ HF LoRA"], [*others, None, *ours])


def _ratio(every: Sequence[Sequence[Record]], name: str, other: str, memory: bool = False) -> str | None:
    found = latest(every, name, other)
    if found is None:
        return None
    mine, theirs = found[name], found[other]
    if memory:
        both = mine.get("peak_bytes") and theirs.get("peak_bytes")
        return decimals(mine["peak_bytes"] / theirs["peak_bytes"], 2) if both else None
    return decimals(seconds(mine) / seconds(theirs), 2)


def put_small(source: Source, values: Values) -> dict[str, Sheet]:
    """Keep the times of a small encoder's steps, and how many times as fast as HF PEFT's in the same precision."""
    every = calls(source.lines())
    names = list(dict.fromkeys(str(r["contestant"]) for call in every for r in call))
    rows = []
    for name in names:
        one, prefix = representative(every, name), f"{source.name}/{key(name)}"
        other = "hf-lora-bf16" if "bf16" in name else "hf-lora"
        found = None if name == other else latest(every, name, other)
        faster = None if found is None else seconds(found[other]) / seconds(found[name])
        ends = None if found is None else ratio_interval(found[other], found[name])
        values.number(f"{prefix}/ms", 1000 * seconds(one), 2)
        values.number(f"{prefix}/faster", faster, 1)
        values.interval(f"{prefix}/faster-interval", ends, 1)
        values.number(f"{prefix}/time", None if faster is None else 1 / faster, 2)
        spread = between([1000 * one["step_seconds"][p] for p in ("p10", "p90")], 2)
        rows.append(
            cells([contestant(name), decimals(1000 * seconds(one), 2), spread, decimals(faster, 2), between(ends, 2)])
        )
    _setting(source, every[-1][0], values)
    headers = ["contestant", "ms", "10th to 90th percentile", "times as fast", r"95\,\% interval"]
    return {source.name: Sheet("lrrrr", headers, rows)}


def put_loss(source: Source, values: Values) -> dict[str, Sheet]:
    """Keep what the loss over a large vocabulary costs, against all logits in memory."""
    shapes: dict[tuple[int, ...], dict[str, Record]] = {}
    for record in source.lines():
        sides = (record["rows"], record["width"], record["vocabulary"])
        shapes.setdefault(sides, {})[record["contestant"]] = record
    rows = []
    put_origin(source, next(iter(next(iter(shapes.values())).values())), values)
    for shape, found in shapes.items():
        plain, ours, products = (found.get(name) for name in ("plain", "ours", "products"))
        if plain is None or ours is None:
            continue
        prefix = f"{source.name}/{'x'.join(map(str, shape))}"
        times = [None if r is None else 1000 * r["seconds"]["p50"] for r in (plain, ours, products)]
        for what, one in (("plain", plain), ("ours", ours)):
            values.number(f"{prefix}/{what}/ms", 1000 * one["seconds"]["p50"], 1)
            values.count(f"{prefix}/{what}/mib", one["peak_bytes"] / MIB)
        share = ours["seconds"]["p50"] / plain["seconds"]["p50"]
        values.number(f"{prefix}/time", share, 2)
        values.number(f"{prefix}/products/ms", times[2], 1)
        line = [" × ".join(map(str, shape)), *(decimals(t, 2) for t in times), decimals(share, 2)]
        rows.append(cells([*line, *(f"{one['peak_bytes'] / MIB:,.0f}" for one in (plain, ours))]))
    headers = ["rows, width, vocabulary", "ms, all logits", "ms, here", "ms, products alone", "ratio"]
    return {source.name: Sheet("lrrrrrr", [*headers, "MiB, all logits", "MiB, here"], rows)}


def put_dequantize(source: Source, values: Values) -> dict[str, Sheet]:
    """Keep how close 4-bit weights come to a copy's speed on their way to bf16; ours is the fastest of its tilings."""
    shapes: dict[tuple[int, ...], list[Mapping[str, Any]]] = {}
    for record in source.lines():
        shapes.setdefault(tuple(record["shape"]), []).append(record)
    rows = []
    put_origin(source, next(iter(shapes.values()))[0], values)
    for shape, found in shapes.items():
        ours = [r for r in found if r["contestant"] == "ours 256/4/shared"] or [
            r for r in found if r["contestant"] == "ours"
        ]
        theirs = [r for r in found if r["contestant"] == "bitsandbytes"]
        if not ours or not theirs:
            continue
        prefix = f"{source.name}/{'x'.join(map(str, shape))}"
        faster = theirs[-1]["seconds"]["p50"] / ours[-1]["seconds"]["p50"]
        values.number(f"{prefix}/share", ours[-1]["share_of_copy"], 2)
        values.number(f"{prefix}/faster", faster, 2)
        line = [" × ".join(map(str, shape)), decimals(1e6 * ours[-1]["seconds"]["p50"], 1)]
        line += [decimals(ours[-1]["share_of_copy"], 2), decimals(theirs[-1]["share_of_copy"], 2), decimals(faster, 2)]
        rows.append(cells(line))
    headers = ["weight", r"$\mu$s, here", "of a copy, here", "of a copy, bitsandbytes", "times as fast"]
    return {source.name: Sheet("lrrrr", headers, rows)}


def put_operations(source: Source, values: Values) -> dict[str, Sheet]:
    """Keep how many operations a decoder layer dispatches."""
    found = {str(r["contestant"]): r for r in source.lines()}
    for name, record in found.items():
        values.count(f"{source.name}/{key(name)}", record["operations"])
    return {}
