"""Claims on memory, speed and size: the rules that measurements of single configurations are judged by.

A measurement is a line that `experiments/claims-memory/measure.py` writes: one configuration's training steps
(`kind: step`) or forward passes in turns (`kind: forward`), with what it was made on. Only those made on a GPU count:
the claims are about GPUs. Of several lines of one case the last counts. Each rule was written down before any
measurement, and says *claim holds*, *claim contradicted* or *claim undecided*.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from peftbench.analysis import intervals
from peftbench.errors import UserError
from peftbench.published import Claim
from peftbench.reproduce.arms import Found
from peftbench.reproduce.verdicts import CONTRADICTED, HOLDS, NOT_RUN, UNDECIDED, Verdict

FOLDER = "claims-memory"
GIB = 2**30
Measurement = Mapping[str, Any]


def load(roots: Iterable[str | Path]) -> list[Measurement]:
    """Return the last line of each case in `<root>/claims-memory/*.jsonl`, or in `<root>/*.jsonl` of such a folder.

    Raises:
        UserError: a line is no measurement.
    """
    found: dict[str, Measurement] = {}
    for root in roots:
        path = Path(root).expanduser()
        folder = path if path.name == FOLDER else path / FOLDER
        for file in sorted(folder.glob("*.jsonl")):
            for number, text in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
                try:
                    line = json.loads(text)
                    whole = line["comparison"] == FOLDER and isinstance(line["case"], str)
                except (ValueError, KeyError, TypeError):
                    whole = False
                if not whole:
                    raise UserError(f"{file}:{number}: no measurement of {FOLDER}; remove the line")
                shown = str(Path(root) / file.relative_to(path))
                found[line["case"]] = {**line, "record": f"{shown}#{line['case']}"}
    return list(found.values())


def _steps(found: Sequence[Measurement], method: str) -> dict[str, Measurement]:
    """Return the completed training steps of a family of cases, `<method>/<model>/<shape>`, by model and shape."""
    own = [m for m in found if m["case"].startswith(f"{method}/") and m["outcome"] == "completed"]
    return {m["case"].removeprefix(f"{method}/"): m for m in own}


def _pairs(found: Sequence[Measurement], first: str, second: str) -> dict[str, tuple[Measurement, Measurement]]:
    """Return both measurements wherever two families of cases have the same model and shape."""
    theirs = _steps(found, second)
    return {name: (one, theirs[name]) for name, one in _steps(found, first).items() if name in theirs}


def _records(*some: Measurement) -> tuple[str, ...]:
    return tuple(dict.fromkeys(m["record"] for m in some))


def _all_or_none(values: Mapping[str, bool]) -> str:
    """Return the verdict on a claim that is meant of every case: undecided where some cases agree and some do not."""
    return HOLDS if all(values.values()) else UNDECIDED if any(values.values()) else CONTRADICTED


def _listed(values: Mapping[str, float], unit: str = "") -> str:
    return ", ".join(f"{name}: {value:.3g}{unit}" for name, value in values.items())


def fits(found: Sequence[Measurement], *, cases: Sequence[str], card: float) -> Found:
    """Say whether training steps of one of the cases ran on a card of `card` GiB; it was that small when measured.

    Holds if one ran, is contradicted if memory ran out in all.
    """
    own = [m for m in found if m["card_bytes"] == round(card * GIB) and m["held_back_bytes"]]
    own = [m for case in cases for m in own if m["case"] == case]
    if not own:
        return Found(UNDECIDED, f"lacks {' and '.join(cases)} with all but {card:g} GiB of a GPU held back")
    outcomes = [m["outcome"] for m in own]
    told = "; ".join(_fit(m, card) for m in own)
    if "completed" in outcomes:
        return Found(HOLDS, told, _records(*own))
    empty = outcomes == ["out_of_memory"] * len(cases)
    return Found(CONTRADICTED if empty else UNDECIDED, told, _records(*own))


def _fit(m: Measurement, card: float) -> str:
    """Return what came of steps on a card in words."""
    weights = m["weights_bytes"] / GIB
    if m["outcome"] == "out_of_memory":
        return f"rank {m['rank']} runs out of {card:g} GiB at {m['stage']} (weights alone {weights:.1f} GiB)"
    if m["outcome"] != "completed":
        return f"rank {m['rank']}: {m['error']}"
    memory, paged = m["memory"], (m["memory"].get("managed") or 0) / GIB
    return (
        f"rank {m['rank']} steps on {m['batch']} × {m['length']} tokens in {card:g} GiB: peak "
        f"{memory['peak'] / GIB:.1f} GiB (weights {weights:.1f}), {paged:.1f} GiB paged beside it, "
        f"{m['step_seconds']['p50']:.2f} s a step"
    )


def memory_saved(found: Sequence[Measurement], *, method: str, reference: str, least: float) -> Found:
    """Say whether `method` needs up to `least` times less memory than `reference`, peak against peak.

    "Up to" is meant of the best case: holds if the largest ratio reaches `least`, is contradicted if none does.
    """
    ratios, used = _ratios(found, method, reference, lambda m: float(m["memory"]["peak"]))
    if not ratios:
        return Found(UNDECIDED, f"lacks {reference} and {method} of one shape")
    verdict = HOLDS if max(ratios.values()) >= least else CONTRADICTED
    return Found(
        verdict, f"peak of {reference} / {method}: {_listed(ratios)}; claimed up to {least:g}", _records(*used)
    )


def _ratios(
    found: Sequence[Measurement], method: str, reference: str, value: Callable[[Measurement], float]
) -> tuple[dict[str, float], list[Measurement]]:
    pairs = _pairs(found, reference, method)
    ratios = {name: value(theirs) / value(mine) for name, (theirs, mine) in pairs.items()}
    return ratios, [m for pair in pairs.values() for m in pair]


def memory_ratio(
    found: Sequence[Measurement], *, method: str, reference: str, least: float, beside: Sequence[str] = ()
) -> Found:
    """Say whether `reference` needs `least` times the memory of `method`, in every case.

    Holds if all ratios reach it, is contradicted if none does. Methods named in `beside` are shown and decide nothing.
    """
    ratios, used = _ratios(found, method, reference, lambda m: float(m["memory"]["peak"]))
    if not ratios:
        return Found(UNDECIDED, f"lacks {reference} and {method} of one shape")
    told = f"peak of {reference} / {method}: {_listed(ratios)}; claimed {least:g}"
    for other in beside:
        more, others = _ratios(found, other, reference, lambda m: float(m["memory"]["peak"]))
        if more:
            told, used = f"{told}; / {other}: {_listed(more)}", [*used, *others]
    return Found(_all_or_none({name: r >= least for name, r in ratios.items()}), told, _records(*used))


def faster(found: Sequence[Measurement], *, method: str, reference: str, least: float) -> Found:
    """Say whether a training step of `method` is `least` times as fast as one of `reference`, on the same batch.

    Holds if it is in every case, is contradicted if it is in none. A ratio of medians: what is claimed is so far beyond
    the noise of a clock that no interval is asked for.
    """
    ratios, used = _ratios(found, method, reference, lambda m: float(m["step_seconds"]["p50"]))
    if not ratios:
        return Found(UNDECIDED, f"lacks {reference} and {method} of one shape")
    verdict = _all_or_none({name: r >= least for name, r in ratios.items()})
    return Found(verdict, f"step of {reference} / {method}: {_listed(ratios)}; claimed {least:g}", _records(*used))


def bytes_per_parameter(found: Sequence[Measurement], *, method: str, claimed: float, tolerance: float) -> Found:
    """Say whether weights, gradients and optimizer state together take `claimed` bytes for each parameter.

    They are counted when the optimizer begins its step. Holds if every case is within `tolerance`, is contradicted if
    none is. The peak, activations included, is shown and decides nothing.
    """
    own = _steps(found, method)
    if not own:
        return Found(UNDECIDED, f"lacks {method}")
    state = {name: sum(m["state_bytes"].values()) / m["total_parameters"] for name, m in own.items()}
    peaks = {name: m["memory"]["peak"] / m["total_parameters"] for name, m in own.items()}
    verdict = _all_or_none({name: abs(v - claimed) <= tolerance for name, v in state.items()})
    told = f"bytes a parameter: {_listed(state)}, claimed {claimed:g}; at the peak {_listed(peaks)}"
    return Found(verdict, told, _records(*own.values()))


def adapter_below(found: Sequence[Measurement], *, methods: Sequence[str], limit: float) -> Found:
    """Say whether saved adapters take less than `limit` MB (of a million bytes).

    Meant of adapters as such: holds if all do, is contradicted if one does not. A `method` is the first word of a case.
    """
    own = [m for m in found if m["case"].split("/")[0] in methods and m.get("checkpoint_bytes")]
    if not own:
        return Found(UNDECIDED, f"lacks {', '.join(methods)}")
    sizes = {m["case"]: m["checkpoint_bytes"] / 1e6 for m in own}
    largest, least = max(sizes, key=lambda c: sizes[c]), min(sizes, key=lambda c: sizes[c])
    ranks = {m["case"]: m["rank"] for m in own}
    told = (
        f"{len(own)} adapters from {sizes[least]:.3g} MB ({least}, rank {ranks[least]}) to {sizes[largest]:.4g} MB "
        f"({largest}, rank {ranks[largest]}); claimed below {limit:g} MB"
    )
    return Found(HOLDS if sizes[largest] < limit else CONTRADICTED, told, _records(*own))


def no_overhead(found: Sequence[Measurement], *, margin: float) -> Found:
    """Say whether a forward pass with folded weights takes as long as one of the bare base, within `margin` of it.

    The ratio's interval is that of the mean of logarithms over turns. Holds if it lies within the margin in every case,
    is contradicted if in one it begins above it. What an unmerged adapter costs is shown and decides nothing.
    """
    own = [m for m in found if m["kind"] == "forward" and "folded" in (m.get("forward_seconds") or {})]
    if not own:
        return Found(UNDECIDED, "lacks forward passes with folded weights")
    ends = {m["case"]: _log_ratio(m, "folded", "base") for m in own}
    if any(e is None for e in ends.values()):
        return Found(UNDECIDED, "needs two turns a case", _records(*own))
    known = {case: e for case, e in ends.items() if e is not None}
    top = math.log1p(margin)
    above = [case for case, e in known.items() if e[0] > top]
    within = all(-top <= e[0] and e[1] <= top for e in known.values())
    percents = {case: [100 * math.expm1(x) for x in e] for case, e in known.items()}
    told = ", ".join(f"{case}: [{low:+.2g} %, {high:+.2g} %]" for case, (low, high) in percents.items())
    beside = {m["case"]: 100 * (_median(m, "beside") / _median(m, "base") - 1) for m in own}
    reason = f"folded / bare − 1: {told}, margin {100 * margin:g} %; unmerged {_listed(beside, ' %')}"
    return Found(CONTRADICTED if above else HOLDS if within else UNDECIDED, reason, _records(*own))


def _median(m: Measurement, arm: str) -> float:
    return float(np.median(m["forward_seconds"][arm]))


def _log_ratio(m: Measurement, first: str, second: str) -> tuple[float, float] | None:
    """Return the interval of the mean of log(first / second) over turns, in which both were timed one after another."""
    sides = [np.log(m["forward_seconds"][arm]) for arm in (first, second)]
    return intervals.interval(intervals.mean(intervals.sample(range(len(sides[0])), list(sides[0] - sides[1]))))


RULES: dict[str, Callable[..., Found]] = {
    rule.__name__: rule
    for rule in (fits, memory_saved, memory_ratio, faster, bytes_per_parameter, adapter_below, no_overhead)
}


def judge(claim: Claim, measurements: Sequence[Measurement]) -> tuple[Verdict, tuple[str, ...]]:
    """Judge a claim by what was measured on a GPU; returns the records too."""
    own = [m for m in measurements if m["device_type"] == "cuda"]
    needs = f"needs a GPU: python experiments/{FOLDER}/measure.py --out results/{FOLDER}/measurements.jsonl"
    if not own:
        return Verdict(NOT_RUN, needs), ()
    found = RULES[claim.rule](own, **claim.settings)
    if not found.records:
        return Verdict(NOT_RUN, f"{found.reason}; {needs}"), ()
    devices = sorted({str(m["device"]) for m in own if m["record"] in found.records})
    models = sorted({str(m["model"]) for m in own if m["record"] in found.records})
    meant = {name.strip().lower() for name in re.split("[,;]", claim.models)}
    same = meant == {"any"} or all(name.lower() in meant for name in models)
    told = f"{found.reason} ({', '.join(devices)})"
    return Verdict(found.verdict, told, transfer="" if same else ", ".join(models)), found.records
