"""Tables and verdicts made from the records of `steps.py`: pure functions, no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from common import shown, table

Record = Mapping[str, Any]

GIB = 2**30
HEADERS = (
    "contestant",
    "ms p50",
    "× hf-lora",
    "× hf-full",
    "TFLOP/s",
    "of ceiling",
    "peak GiB",
    "× hf-lora peak",
    "trained",
)

BARS: tuple[tuple[str, str, str, float], ...] = (
    *(
        ("time", f"ours-lora{mode}", other, most)
        for mode in ("-compiled", "-compiled-graphs")
        for other, most in (("hf-lora", 0.54), ("hf-full", 0.79), ("hf-full-compiled", 0.85))
    ),
    ("time", "ours-lora", "hf-lora", 0.62),
    ("time", "ours-lora", "frozen", 1.12),
    *(
        ("time", f"ours-{method}{mode}", f"ours-lora{mode}", most)
        for method, most in (("dora", 1.10), ("adalora", 1.15), ("vera", 1.15), ("lora_plus", 1.15), ("qlora", 1.12))
        for mode in ("", "-compiled", "-compiled-graphs")
    ),
    *(("memory", f"ours-lora{mode}", "hf-lora", 0.4) for mode in ("", "-compiled", "-compiled-graphs")),
    *(("memory", f"ours-dora{mode}", f"ours-lora{mode}", 1.05) for mode in ("", "-compiled", "-compiled-graphs")),
)
"""(what is compared, contestant, whom with, largest ratio that passes)."""
LEAST_TOKENS = {"qlora": 4096}
"""A method's bar holds from so many tokens a step: below, making the dense weights costs more than using them."""


def calls(records: Iterable[Record]) -> list[list[Record]]:
    """Return the records of `steps.py` grouped by the call that made them: ratios hold within one only."""
    found: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        if record.get("comparison") == "steps":
            found.setdefault((record["date"], record["command"]), []).append(record)
    return list(found.values())


def measured(records: Iterable[Record], what: str) -> dict[str, float]:
    """Return contestant → median seconds ("time") or peak bytes ("memory") of those that completed and have one."""
    values: dict[str, float] = {}
    for r in records:
        if r["status"] == "completed":
            value = r["step_seconds"]["p50"] if what == "time" else r["peak_bytes"]
            if value is not None:
                values[r["contestant"]] = value
    return values


def flops_per_second(record: Record) -> float:
    """Return the rate counted at 4N FLOPs a token, 6N where the base trains."""
    per_token = record["flops_rule"] * record["matrix_parameters"]
    return float(per_token * record["batch"] * record["length"] / record["step_seconds"]["p50"])


def results(call: Sequence[Record]) -> str:
    """Return a call's table in Markdown, with a title and a line for each contestant that has no result."""
    first = call[0]
    times, peaks = measured(call, "time"), measured(call, "memory")
    rows, absent = [], []
    for r in call:
        name = r["contestant"]
        if name not in times:
            absent.append(f"- {name}: {r['status']} ({r['error']})")
            continue
        rate = flops_per_second(r)
        rows.append(
            [
                name,
                shown(1000 * times[name], 1),
                shown(_over(times, name, "hf-lora")),
                shown(_over(times, name, "hf-full")),
                shown(rate / 1e12, 1),
                shown(rate / r["ceilings"]["matmul_flops_per_second"]),
                shown(peaks[name] / GIB if name in peaks else None, 1),
                shown(_over(peaks, name, "hf-lora")),
                f"{r['trained_parameters']:,}",
            ]
        )
    ceilings = first["ceilings"]
    versions = ", ".join(f"{k} {v}" for k, v in first["versions"].items() if k in ("torch", "transformers", "peft"))
    title = (
        f"{first['model']} ({first['weights']}), {first['batch']} × {first['length']} tokens, {first['precision']}, "
        f"rank {first['rank']}; {first['device']}: {ceilings['matmul_flops_per_second'] / 1e12:.3g} TFLOP/s in matrix "
        f"products, {ceilings['copy_bytes_per_second'] / 1e9:.4g} GB/s copying; {versions}; {first['date'][:10]}, "
        f"commit {(first['git_commit'] or 'unknown')[:10]}"
    )
    return "\n".join([title, "", table(HEADERS, rows), *(["", *absent] if absent else [])])


def _over(values: Mapping[str, float], name: str, other: str) -> float | None:
    return values[name] / values[other] if name in values and other in values else None


def verdicts(call: Sequence[Record]) -> list[tuple[str, str, str, float, float | None, bool | None]]:
    """Return (what, contestant, whom with, bar, ratio, passed) of every bar; None where it cannot be judged."""
    tokens = call[0]["batch"] * call[0]["length"]
    values = {what: measured(call, what) for what in ("time", "memory")}
    found = []
    for what, name, other, most in BARS:
        ratio = _over(values[what], name, other)
        least = max((n for method, n in LEAST_TOKENS.items() if f"-{method}" in name), default=0)
        passed = None if ratio is None or tokens < least else ratio <= most
        found.append((what, name, other, most, ratio, passed))
    return found


def judged(call: Sequence[Record]) -> str:
    """Return the bars that this call can judge as a table in Markdown."""
    words = {True: "passed", False: "missed", None: "not judged"}
    rows = [
        [f"{what}: {name} / {other}", f"{most:.2f}", shown(ratio, 3), words[passed]]
        for what, name, other, most, ratio, passed in verdicts(call)
        if ratio is not None
    ]
    return table(("ratio", "at most", "measured", "verdict"), rows)
