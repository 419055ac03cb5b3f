"""Rules on best learning rates on several models: their ratio to another method's, and rates recommended beforehand.

They are told as those of `claims` are, and were written down before any run as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from peftbench.reproduce.arms import (
    EDGE,
    Arm,
    Found,
    at_edge,
    best,
    ends_text,
    good_rates,
    ids_of,
    interval,
    missing,
    of,
    reaches_edge,
)
from peftbench.reproduce.verdicts import CONTRADICTED, HOLDS, UNDECIDED


@dataclass(frozen=True)
class _Ratio:
    """Best learning rate over best learning rate on one model, and what it may be by rates told from no best one."""

    best: float
    options: tuple[float, ...]
    bounded: bool


def _ratios(found: Sequence[Arm], method: str, reference: str, tasks: int) -> dict[str, _Ratio]:
    """Return model → ratio of best learning rates, on the models where both sides have three or more."""
    sides = {}
    for model in sorted({a.model for a in found}):
        pair = [[a for a in of(found, name) if a.model == model] for name in (method, reference)]
        if min(map(len, pair)) >= 3:
            sides[model] = pair
    ratios = {}
    for model, pair in sides.items():
        good = [good_rates(curve, 2 * tasks * len(sides)) for curve in pair]
        bounded = not any(reaches_edge(curve, rates) for curve, rates in zip(pair, good, strict=True))
        options = tuple(a / b for a, b in product(*good))
        ratios[model] = _Ratio(best(pair[0]).rate / best(pair[1]).rate, options, bounded)
    return ratios


def _ratios_told(ratios: Mapping[str, _Ratio]) -> str:
    return "ratio of best rates " + ", ".join(f"{r.best:.3g} on {model}" for model, r in ratios.items())


def _of_models(found: Sequence[Arm], models: Mapping[str, Any]) -> tuple[str, ...]:
    return ids_of(*(a for a in found if a.model in models))


def ratio_mean(found: Sequence[Arm], *, method: str, reference: str, low: float, high: float, tasks: int = 1) -> Found:
    """Say whether the ratio of best learning rates, its geometric mean over models, is `low` to `high`.

    Holds if it is, is contradicted if no choice of rates that cannot be told from the best ones gives such a mean.
    Where such rates reach an edge of their grid, neither is said.
    """
    ratios = _ratios(found, method, reference, tasks)
    if len(ratios) < 2:
        return missing(f"three learning rates of {method} and {reference} on two models")
    ids = _of_models(found, ratios)

    def mean(values: Sequence[float]) -> float:
        return math.exp(math.fsum(map(math.log, values)) / len(values))

    top = mean([r.best for r in ratios.values()])
    ends = mean([min(r.options) for r in ratios.values()]), mean([max(r.options) for r in ratios.values()])
    told = f"{_ratios_told(ratios)}; mean {top:.3g}, claimed [{low:g}, {high:g}]"
    if not all(r.bounded for r in ratios.values()):
        return Found(UNDECIDED, f"{told}; {EDGE}", ids)
    if ends[1] < low or ends[0] > high:
        return Found(CONTRADICTED, told, ids)
    return Found(HOLDS if low <= top <= high else UNDECIDED, told, ids)


def ratio_steady(found: Sequence[Arm], *, method: str, reference: str, factor: float, tasks: int = 1) -> Found:
    """Say whether the ratios of best learning rates on all models lie within a `factor`.

    Holds if they do, is contradicted if no choice of rates that cannot be told from the best ones does. A model where
    such rates reach an edge of their grid contradicts nothing, and nothing holds.
    """
    ratios = _ratios(found, method, reference, tasks)
    if len(ratios) < 2:
        return missing(f"three learning rates of {method} and {reference} on two models")
    ids, told = _of_models(found, ratios), f"{_ratios_told(ratios)}, claimed within a factor of {factor:g}"
    limit = factor * (1 + 1e-9)
    sets = [r.options for r in ratios.values() if r.bounded]
    starts = {o for options in sets for o in options}
    if sets and not any(all(any(s <= o <= s * limit for o in options) for options in sets) for s in starts):
        return Found(CONTRADICTED, told, ids)
    if len(sets) < len(ratios):
        return Found(UNDECIDED, f"{told}; {EDGE}", ids)
    known = [r.best for r in ratios.values()]
    return Found(HOLDS if max(known) <= min(known) * limit else UNDECIDED, told, ids)


def ratio_unlike(
    found: Sequence[Arm],
    *,
    method: str,
    reference: str,
    expected: Mapping[str, float],
    factor: float,
    tasks: int = 1,
) -> Found:
    """Say whether the ratios of best learning rates are not those `expected` by a rule that is said not to fit.

    Holds if on one model no choice of rates that cannot be told from the best ones comes within a `factor` of what the
    rule gives, is contradicted if on every model the best rates do. A model where such rates reach an edge of their
    grid decides nothing.
    """
    ratios = {m: r for m, r in _ratios(found, method, reference, tasks).items() if m in expected}
    if lacking := sorted(set(expected) - set(ratios)):
        return missing(f"three learning rates of {method} and {reference} on {', '.join(lacking)}")
    ids = _of_models(found, ratios)
    told = f"{_ratios_told(ratios)}; the rule gives {', '.join(f'{expected[m]:g} on {m}' for m in ratios)}"
    limit = factor * (1 + 1e-9)

    def near(ratio: float, model: str) -> bool:
        return expected[model] / limit <= ratio <= expected[model] * limit

    known = {m: r for m, r in ratios.items() if r.bounded}
    if any(not any(near(o, m) for o in r.options) for m, r in known.items()):
        return Found(HOLDS, told, ids)
    if len(known) < len(ratios):
        return Found(UNDECIDED, f"{told}; {EDGE}", ids)
    return Found(CONTRADICTED if all(near(r.best, m) for m, r in ratios.items()) else UNDECIDED, told, ids)


def rate_serves(
    found: Sequence[Arm], *, method: str, rates: Mapping[str, float], share: float, tasks: int = 1
) -> Found:
    """Say whether a recommended learning rate costs at most a `share` of the best one's score, on every model.

    `rates`: model → the recommended rate. Holds if the intervals of (best − recommended) end at or below that share and
    no best rate is at an edge, is contradicted if one begins above it.
    """
    curves = {m: [a for a in of(found, method) if a.model == m] for m in rates}
    pairs = {}
    for model, rate in rates.items():
        recommended = [a for a in curves[model] if math.isclose(a.rate, rate, rel_tol=1e-6)]
        if not recommended or len(curves[model]) < 3:
            return missing(f"{method} at {rate:g} and two other learning rates on {model}")
        pairs[model] = best(curves[model]), recommended[0]
    ids, told, verdicts = ids_of(*(a for c in curves.values() for a in c)), [], []
    for model, (top, named) in pairs.items():
        if named is top:
            told.append(f"{named.rate:g} is best on {model}")
            verdicts.append(UNDECIDED if at_edge(curves[model]) else HOLDS)
            continue
        ends = interval(top.test, named.test, tasks * len(rates))
        if ends is None:
            return Found(UNDECIDED, "needs two seeds a rate", ids)
        limit = share * abs(math.fsum(top.test) / len(top.test))
        told.append(f"{top.rate:g} over {named.rate:g} on {model}: {ends_text(ends)}, claimed at most {limit:.3g}")
        held = UNDECIDED if ends[1] > limit or at_edge(curves[model]) else HOLDS
        verdicts.append(CONTRADICTED if ends[0] > limit else held)
    verdict = CONTRADICTED if CONTRADICTED in verdicts else UNDECIDED if UNDECIDED in verdicts else HOLDS
    return Found(verdict, "; ".join(told), ids)


RULES: dict[str, Callable[..., Found]] = {
    rule.__name__: rule for rule in (ratio_mean, ratio_steady, ratio_unlike, rate_serves)
}
