"""Records of `experiments/packing` → values, tables and curves: whole commands, gain by tokens, pairs.

The arithmetic is the scripts' own (`wall.py`, `curve.py`), written here again since they are no part of the package; a
test holds both side by side.
"""

import math
from collections.abc import Mapping, Sequence

from peftbench.paper.names import model
from peftbench.paper.peers import put_origin
from peftbench.paper.sources import Record, Source
from peftbench.paper.values import Sheet, Values, between, cells, decimals

SPENT = {"training": ("train",), "evaluation": ("evaluate", "test"), "loading": ("load", "set_up", "profile")}
ONCE = "start, report"
NO_GAIN = 1.05
CASES = {
    "rte": "LoRA runs of MiniLM-L6",
    "mixed": "methods on MiniLM-L6",
    "smollm2": "LoRA runs of SmolLM2-135M",
}
SHORT = {"rte": "LoRA, RTE", "mixed": "mixed methods", "smollm2": "SmolLM2"}
PEERS = ("hf", "hf-autocast")
ALONE = (*PEERS, "eager", "1")
OVER = {
    "hf": r"$\times$ Trainer",
    "hf-autocast": r"$\times$ Trainer, autocast",
    "eager": r"$\times$ alone, eager",
    "1": r"$\times$ alone",
}
EAGER = "-eager"
"""What an arm ends with whose packs make eager steps."""
ARMS = (*ALONE, "packed", "auto")
WALL = ("rate", "seconds", "over-hf", "over-alone", "over-eager", "step-ms", "timed", "runs", "size")


def spent(record: Record) -> dict[str, float]:
    """Return the seconds of a whole case by what they go to; runs left out count as those after the first pack."""
    packs, left = record["pack_seconds"], max(0, record["runs"] - record["runs_timed"])
    later, runs = _later(record)
    if len(packs) == 1:
        later = [{name: s for name, s in later[0].items() if name not in SPENT["loading"]}]

    def over(some: Sequence[Mapping[str, float]], phases: Sequence[str]) -> float:
        return sum(seconds.get(name, 0.0) for seconds in some for name in phases)

    busy = sum(sum(seconds.values()) for seconds in packs)
    parts = {what: over(packs, names) + left * over(later, names) / runs for what, names in SPENT.items()}
    return {**parts, ONCE: record["wall_seconds"] - busy}


def _later(record: Record) -> tuple[Sequence[Mapping[str, float]], int]:
    seconds, sizes = record["pack_seconds"], record["pack_sizes"]
    return (seconds[1:], sum(sizes[1:])) if len(sizes) > 1 else (seconds, sum(sizes))


def whole_seconds(record: Record) -> float:
    """Return the seconds of a whole case."""
    return sum(spent(record).values())


def step_seconds(record: Record) -> float | None:
    """Return the mean seconds of a run and step."""
    seconds, runs = _later(record)
    return float(sum(phases["train"] for phases in seconds) / runs / record["steps"]) if record["steps"] else None


def arms(records: Sequence[Record]) -> dict[str, dict[str, Record]]:
    """Return case → arm → record, the arms of a case from one call: of those with most arms the newest, on one device.

    `packed` is the record of the largest given pack.
    """
    done = [r for r in records if r.get("comparison") == "packing-wall" and r["status"] == "completed"]
    done.sort(key=lambda r: str(r["date"]))
    calls: dict[str, dict[tuple[str, str], dict[str, Record]]] = {}
    for record in done:
        if record["device"] == done[-1]["device"]:
            call = (str(record["date"]), str(record["command"]))
            calls.setdefault(record["case"], {}).setdefault(call, {})[record["arm"]] = record
    found = {case: dict(max(of.items(), key=lambda item: (len(item[1]), item[0]))[1]) for case, of in calls.items()}
    for one in found.values():
        sizes = sorted((int(arm) for arm in one if arm.isdigit() and arm != "1"), reverse=True)
        if sizes:
            one["packed"] = one[str(sizes[0])]
    return found


def over_other(records: Sequence[Record], case: str, other: str) -> list[float]:
    """Return how many times another arm's runs an hour the largest pack made, of every call that has both, by date."""
    calls: dict[tuple[str, str], dict[str, Record]] = {}
    for record in sorted(records, key=lambda r: str(r["date"])):
        if record.get("comparison") == "packing-wall" and record["case"] == case and record["status"] == "completed":
            calls.setdefault((str(record["date"]), str(record["command"])), {})[record["arm"]] = record
    ratios = []
    for one in calls.values():
        sizes = [int(arm) for arm in one if arm.isdigit() and arm != "1"]
        if sizes and other in one:
            ratios.append(whole_seconds(one[other]) / whole_seconds(one[str(max(sizes))]))
    return ratios


def ordered(one: Mapping[str, Record]) -> list[str]:
    """Return the arms of a case, those that go one run at a time first."""
    return [*(arm for arm in ALONE if arm in one), *sorted(set(one) - {*ALONE, "packed"})]


def put_wall(source: Source, values: Values) -> dict[str, Sheet]:
    """Keep what whole commands took; returns the table."""
    records = source.lines() if source.there is not None else []
    found = arms(records)
    others = [other for other in ALONE if any(other in one for one in found.values())]
    rows: list[list[str] | None] = []
    for case, title in CASES.items():
        one = found.get(case, {})
        rates = {arm: 3600 * r["runs"] / whole_seconds(r) for arm, r in one.items()}
        for arm in ARMS:
            _wall(f"{source.name}/{case}/{arm}", arm, one, rates, values)
        for other in ALONE:
            every = [f"{ratio:.1f}" for ratio in over_other(records, case, other)]
            listed = " and ".join(filter(None, [", ".join(every[:-1]), *every[-1:]]))
            values.put(f"{source.name}/{case}/every-over-{other}", listed or None)
        shown = ordered(one)
        rows += [None] if rows and shown else []
        rows += [_wall_line(title, arm, one[arm], rates, others) for arm in shown]
    for what in ("device", "torch"):
        if not records:
            values.put(f"{source.name}/{what}", None)
    if not rows:
        return {}
    put_origin(source, records[-1], values)
    headers = ["case", "arm", "runs timed", "seconds", "runs an hour", *(OVER[other] for other in others)]
    headers.append("ms, run and step")
    return {source.name: Sheet("ll" + "r" * (len(headers) - 2), headers, rows)}


def _wall(prefix: str, arm: str, one: Mapping[str, Record], rates: Mapping[str, float], values: Values) -> None:
    record = one.get(arm)
    if record is None:
        for what in WALL:
            values.put(f"{prefix}/{what}", None)
        return
    step = step_seconds(record)
    values.number(f"{prefix}/rate", rates[arm], 0)
    values.number(f"{prefix}/seconds", record["wall_seconds"], 0)
    values.number(f"{prefix}/over-hf", rates[arm] / rates["hf"] if "hf" in rates else None, 1)
    values.number(f"{prefix}/over-alone", rates[arm] / rates["1"] if "1" in rates else None, 1)
    values.number(f"{prefix}/over-eager", rates[arm] / rates["eager"] if "eager" in rates else None, 1)
    values.number(f"{prefix}/step-ms", None if step is None else 1000 * step, 2)
    values.count(f"{prefix}/timed", record["runs_timed"])
    values.count(f"{prefix}/runs", record["runs"])
    values.count(f"{prefix}/size", max(record["pack_sizes"], default=None))


def named(arm: str, record: Record) -> str:
    """Return an arm in words."""
    if arm in PEERS:
        return f"HF Trainer, {record.get('precision')}"
    how = ", ".join(record.get("execution") or []).replace("_", ", ")
    if arm in ALONE:
        return f"one at a time, {how}"
    return f"pack={arm.removesuffix(EAGER)}" + (f": {max(record['pack_sizes'])}" if arm == "auto" else "") + f", {how}"


def _wall_line(title: str, arm: str, record: Record, rates: Mapping[str, float], others: Sequence[str]) -> list[str]:
    step, timed = step_seconds(record), f"{record['runs_timed']} of {record['runs']}"
    line = [
        f"{record['runs']} {title}",
        named(arm, record),
        timed,
        decimals(record["wall_seconds"], 1),
        f"{rates[arm]:.0f}",
    ]
    line += [decimals(rates[arm] / rates[other], 2) if other in rates else None for other in others]
    return cells([*line, decimals(None if step is None else 1000 * step, 2)])


def curves(records: Sequence[Record], execution: str) -> dict[int, list[tuple[int, float]]]:
    """Return pack size → (tokens a run and step, gain), of the last measurement of each point."""
    found: dict[int, dict[int, float]] = {}
    for r in records:
        if r.get("execution") == execution and r.get("gain") is not None and r["runs"] > 1:
            found.setdefault(r["runs"], {})[r["tokens"]] = r["gain"]
    return {runs: sorted(points.items()) for runs, points in sorted(found.items())}


def falls_to_one(points: Sequence[tuple[int, float]], least: float = NO_GAIN) -> float | None:
    """Return the tokens from which on the gain stays below `least`, between logarithms; None where it never does."""
    last = next((i for i in range(len(points) - 1, -1, -1) if points[i][1] >= least), None)
    if last is None:
        return float(points[0][0]) if points else None
    if last == len(points) - 1:
        return None
    (t0, g0), (t1, g1) = points[last], points[last + 1]
    part = (math.log(g0) - math.log(least)) / (math.log(g0) - math.log(g1))
    return math.exp(math.log(t0) + part * (math.log(t1) - math.log(t0)))


CURVE = ("most", "most-runs", "most-tokens", "largest-tokens", "largest-gain")
PER_SIZE = ("most", "most-tokens", "at-largest", "ends")
SIZES = (2, 4, 8, 16, 32, 64)


def put_curve(source: Source, values: Values) -> dict[str, Sheet]:
    """Keep where a step gains most from packing and where it stops to; returns the table."""
    records = [r for r in source.lines() if r.get("comparison") == "packing-curve"] if source.there else []
    executions = list(dict.fromkeys(r["execution"] for r in records)) or ["graphs"]
    fastest = "graphs" if "graphs" in executions else executions[0]
    found = curves(records, fastest)
    points = [(gain, runs, tokens) for runs, line in found.items() for tokens, gain in line]
    values.number(f"{source.name}/no-gain", NO_GAIN, 2)
    best, tokens = max(points, default=None), max((t for _, _, t in points), default=None)
    at_end = max((gain for gain, _, t in points if t == tokens), default=None)
    for what, number, digits in zip(
        CURVE, (*(best or (None, None, None)), tokens, at_end), (1, 0, 0, 0, 2), strict=True
    ):
        values.number(f"{source.name}/{what}", number, digits)
    for size in SIZES:
        values.count(f"{source.name}/{size}/runs", size if found else None)
        line = found.get(size, [])
        top = max(((gain, t) for t, gain in line), default=(None, None))
        end = falls_to_one(line) if line else None
        for what, text in zip(
            PER_SIZE,
            (
                decimals(top[0], 1),
                None if top[1] is None else f"{top[1]:,}",
                decimals(line[-1][1], 2) if line else None,
                None
                if not line
                else "no number of tokens that was measured"
                if end is None
                else f"about {float(f'{end:.2g}'):,.0f} tokens",
            ),
            strict=True,
        ):
            values.put(f"{source.name}/{size}/{what}", text)
    for what in ("device", "model", "precision"):
        text = records[0].get(what) if records else None
        values.put(f"{source.name}/{what}", model(text) if text and what == "model" else text)
    return {source.name: curve_sheet(records, executions)} if records else {}


def curve_sheet(records: Sequence[Record], executions: Sequence[str]) -> Sheet:
    """Return gains by tokens a run and step, a way of running steps after the other."""
    sizes = sorted({r["runs"] for r in records if r["runs"] > 1})
    rows: list[list[str] | None] = []
    for execution in executions:
        found = curves(records, execution)
        rows += [None] if rows else []
        for tokens in sorted({r["tokens"] for r in records if r["execution"] == execution}):
            gains = [dict(found.get(size, [])).get(tokens) for size in sizes]
            alone = [r for r in records if (r["execution"], r["tokens"], r["runs"]) == (execution, tokens, 1)]
            step = 1000 * alone[-1]["step_seconds"]["p50"] if alone and alone[-1].get("step_seconds") else None
            rows.append(cells([execution, f"{tokens:,}", decimals(step, 2), *(decimals(g, 2) for g in gains)]))
    headers = ["steps", "tokens, run and step", "ms alone", *(f"{size} runs" for size in sizes)]
    return Sheet("l" + "r" * (len(headers) - 1), headers, rows)


PAIRS = ("pairs", "packed", "alone", "difference", "interval", "largest", "spread", "p", "p-wilcoxon", "equal")


def put_pairs(source: Source, values: Values) -> dict[str, Sheet]:
    """Keep whether runs end packed where they end alone, of the last comparison; returns the table."""
    records = [r for r in source.lines() if r.get("comparison") == "packing-pairs"] if source.there else []
    if not records:
        for what in ("test", "loss"):
            for one in PAIRS:
                values.put(f"{source.name}/{what}/{one}", None)
        for one in ("device", "size", "metric"):
            values.put(f"{source.name}/{one}", None)
        return {}
    record, rows = records[-1], []
    values.put(f"{source.name}/device", record["device"])
    values.count(f"{source.name}/size", max(pair["pack_size"] for pair in record["pairs"]))
    metric = next((name for name in record["tests"] if name != "loss"), None)
    values.put(f"{source.name}/metric", metric and metric.removeprefix("test ").replace("_", " "))
    for name, found in record["tests"].items():
        prefix = f"{source.name}/{'loss' if name == 'loss' else 'test'}"
        ends = None if found["interval_low"] is None else (found["interval_low"], found["interval_high"])
        texts = [
            str(found["pairs"]),
            decimals(found["mean_packed"], 4),
            decimals(found["mean_alone"], 4),
            decimals(found["mean_difference"], 4, True),
            between(ends, 4),
            decimals(found["largest_difference"], 4),
            decimals(found["spread_over_seeds"], 4),
            decimals(found["p_sign_flips"], 3),
            decimals(found["p_wilcoxon"], 3),
            str(found["equal_pairs"]),
        ]
        for one, text in zip(PAIRS, texts, strict=True):
            values.put(f"{prefix}/{one}", text)
        rows.append(cells([name.replace("_", " "), *texts[:9]]))
    headers = ["what", "pairs", "packed", "alone", "difference", r"95\,\% interval", "largest", "spread over seeds"]
    return {source.name: Sheet("l" + "r" * 9, [*headers, "$p$, sign flips", "$p$, Wilcoxon"], rows)}
