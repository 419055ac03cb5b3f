"""Claims: orderings and ratios that a paper states, and the rules that records are judged by.

Each rule was written down before any run. A rule sees the completed runs of the claim's experiment on one task and says
*claim holds*, *claim contradicted* or *claim undecided*. Over several tasks a claim holds if it does on all, and is
contradicted if it is on one. Scores are in points (a metric times 100; losses in nats, smaller is better, stay as they
are and margins are then a hundredth). Learning rates are always chosen on validation, results compared on test.
Intervals are those of the difference of two means over seeds that have nothing to do with each other (Welch), see
`analysis.intervals`, wide enough for all that a claim compares to hold together at 95 % (Bonferroni, over tasks as
well); with fewer than two seeds on a side nothing is decided. Where a best learning rate is at an edge of its grid, the
side might do better still, and what that could overturn is not said.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from peftbench.published import Claim
from peftbench.reproduce import ratios, trends
from peftbench.reproduce.arms import (
    EDGE,
    Arm,
    Found,
    arms,
    at_edge,
    best,
    decided,
    described,
    ends_text,
    good_rates,
    ids_of,
    in_unit,
    interval,
    missing,
    of,
    reaches_edge,
)
from peftbench.reproduce.records import Configuration
from peftbench.reproduce.verdicts import CONTRADICTED, HOLDS, NOT_RUN, UNDECIDED, Verdict


def rank_insensitive(
    found: Sequence[Arm], *, method: str, ranks: Sequence[int], margin: float, tasks: int = 1
) -> Found:
    """Say whether no rank is worse than the best one by more than `margin`, each at its own learning rate.

    Holds if every interval of (best rank − rank) ends at or below the margin and the best rank's learning rate is not
    at an edge, is contradicted if one begins above it for a rank whose learning rate is not at an edge. The best rank
    is the best on validation.
    """
    by_rank = {r: of(found, method, rank=r) for r in ranks}
    if lacking := [r for r, candidates in by_rank.items() if not candidates]:
        return missing(f"rank {', '.join(map(str, lacking))}")
    chosen = {r: best(candidates) for r, candidates in by_rank.items()}
    top = max(chosen, key=lambda r: chosen[r].merit)
    limit, ids = in_unit(found, margin), ids_of(*chosen.values())
    comparisons = tasks * (len(ranks) - 1)
    ends = {r: interval(chosen[top].test, chosen[r].test, comparisons) for r in ranks if r != top}
    if any(e is None for e in ends.values()):
        return Found(UNDECIDED, "needs two seeds a rank", ids)
    known = {r: e for r, e in ends.items() if e is not None}
    if beaten := [r for r, e in known.items() if e[0] > limit and not at_edge(by_rank[r])]:
        worst = max(beaten, key=lambda r: known[r][0])
        return Found(
            CONTRADICTED, f"rank {top} beats rank {worst} by {ends_text(known[worst])}, more than {limit:g}", ids
        )
    widest = max(known, key=lambda r: known[r][1])
    told = f"rank {top} over rank {widest}: {ends_text(known[widest])}"
    if known[widest][1] > limit:
        return Found(UNDECIDED, f"{told} reaches beyond {limit:g}", ids)
    if at_edge(by_rank[top]):
        return Found(UNDECIDED, f"{told}, but rank {top} is best at the edge of its learning rates", ids)
    return Found(HOLDS, f"{told}, no rank is worse than rank {top} by more than {limit:g}", ids)


def not_worse(found: Sequence[Arm], *, method: str, rank: int, reference: str, margin: float, tasks: int = 1) -> Found:
    """Say whether `method` is at most `margin` worse than `reference`, each at its own learning rate.

    Holds if the interval of the difference begins at or above −margin, is contradicted if it ends below it, neither
    where the learning rate of the side that came off worse by that is at an edge.
    """
    sides = of(found, method, rank=rank), of(found, reference)
    if not all(sides):
        return missing(reference if sides[0] else f"{method} at rank {rank}")
    mine, theirs = best(sides[0]), best(sides[1])
    limit, ends = in_unit(found, margin), interval(mine.test, theirs.test, tasks)
    if ends is None:
        return Found(UNDECIDED, "needs two seeds a side", ids_of(mine, theirs))
    verdict, edge = decided(ends[0] >= -limit, ends[1] < -limit, *sides)
    return Found(verdict, f"{method} − {reference}: {ends_text(ends)}, margin {limit:g}{edge}", ids_of(mine, theirs))


def difference_within(
    found: Sequence[Arm],
    *,
    first: Mapping[str, Any],
    second: Mapping[str, Any],
    low: float,
    high: float | None = None,
    tasks: int = 1,
) -> Found:
    """Say whether `first` less `second`, each at its own learning rate, is between `low` and `high` points.

    Sides are named by settings of the method, its `name` among them. Without `high` there is no upper limit. Holds if
    the interval of the difference is within, is contradicted if it is outside, neither where the learning rate of the
    side that came off worse by that is at an edge.
    """
    sides = [of(found, side["name"], **{k: v for k, v in side.items() if k != "name"}) for side in (first, second)]
    names = [described(side) for side in (first, second)]
    if not all(sides):
        return missing(names[0] if not sides[0] else names[1])
    mine, theirs = best(sides[0]), best(sides[1])
    limits = in_unit(found, low), None if high is None else in_unit(found, high)
    ends, ids = interval(mine.test, theirs.test, tasks), ids_of(mine, theirs)
    if ends is None:
        return Found(UNDECIDED, "needs two seeds a side", ids)
    holds = ends[0] >= limits[0] and (limits[1] is None or ends[1] <= limits[1])
    below, above = ends[1] < limits[0], limits[1] is not None and ends[0] > limits[1]
    # with an upper limit either side's edge could overturn what holds, and the lower side's what does not
    edge = (holds and at_edge(sides[1])) or (below and at_edge(sides[0])) or (above and at_edge(sides[1]))
    edge = edge or (holds and high is not None and at_edge(sides[0]))
    verdict = UNDECIDED if edge else HOLDS if holds else CONTRADICTED if below or above else UNDECIDED
    claimed = f"at least {limits[0]:g}" if limits[1] is None else f"{limits[0]:g} to {limits[1]:g}"
    told = f"{names[0]} − {names[1]}: {ends_text(ends)}, claimed {claimed}"
    return Found(verdict, told + ("; a side is best at the edge of its learning rates" if edge else ""), ids)


def gain(found: Sequence[Arm], *, method: str, key: str, baseline: float, least: float, tasks: int = 1) -> Found:
    """Say whether the best value of the setting `key` gains over `baseline`, each at its own learning rate.

    The best value is the best on validation among those other than the baseline. Holds if the interval of the gain lies
    above 0 and reaches `least`, is contradicted if it ends below `least`, neither where the learning rate of the side
    that came off worse by that is at an edge.
    """
    base = of(found, method, **{key: baseline})
    others = [a for a in of(found, method) if a.settings.get(key) != baseline]
    if not base or not others:
        return missing(f"{key}={baseline:g}" if others else f"{key} other than {baseline:g}")
    mine, theirs = best(others), best(base)
    limit, ends = in_unit(found, least), interval(mine.test, theirs.test, tasks)
    if ends is None:
        return Found(UNDECIDED, "needs two seeds a side", ids_of(mine, theirs))
    same = [a for a in others if a.settings[key] == mine.settings[key]]
    verdict, edge = decided(ends[0] > 0 and ends[1] >= limit, ends[1] < limit, same, base)
    told = f"{key}={mine.settings[key]:g} gains {ends_text(ends)}, claimed {limit:g}{edge}"
    return Found(verdict, told, ids_of(mine, theirs))


def better_at_largest(found: Sequence[Arm], *, method: str, reference: str, tasks: int = 1) -> Found:
    """Say whether `method` beats `reference` at the largest rank that both have, at one learning rate.

    The rate is the one that suits the reference at its smallest rank. Holds if the interval of the difference lies
    above 0, is contradicted if it lies below. What both give at their own best rates is said, and decides nothing.
    """
    shared = {a.settings["rank"] for a in of(found, method)} & {a.settings["rank"] for a in of(found, reference)}
    lowest = min((a.settings["rank"] for a in of(found, reference)), default=None)
    if not shared or lowest is None or max(shared) == lowest:
        return missing("two ranks of the reference and the larger one of both methods")
    largest = max(shared)
    rate = best(of(found, reference, rank=lowest)).rate
    curves = [of(found, name, rank=largest) for name in (method, reference)]
    sides = [[a for a in curve if a.rate == rate] for curve in curves]
    if not all(sides):
        return missing(f"both methods at rank {largest} and learning rate {rate:g}")
    ends = interval(sides[0][0].test, sides[1][0].test, tasks)
    ids = ids_of(sides[0][0], sides[1][0])
    if ends is None:
        return Found(UNDECIDED, "needs two seeds a side", ids)
    verdict = HOLDS if ends[0] > 0 else CONTRADICTED if ends[1] < 0 else UNDECIDED
    told = f"rank {largest}, learning rate {rate:g}: {method} − {reference} {ends_text(ends)}"
    own = interval(best(curves[0]).test, best(curves[1]).test, tasks)
    rates = " and ".join(f"{best(curve).rate:g}" for curve in curves)
    return Found(verdict, told if own is None else f"{told}; at their own best rates ({rates}) {ends_text(own)}", ids)


def rate_ratio(found: Sequence[Arm], *, method: str, reference: str, low: float, high: float, tasks: int = 1) -> Found:
    """Say whether the best learning rate of `method` is `low` to `high` times that of `reference`.

    `method` is taken at each of its ranks. Holds if the ratio of best rates is within for every rank; is contradicted
    if for one rank no pair of rates that cannot be told from the best ones is within. Where such rates reach an edge of
    their grid, the best one is not known to be inside, and neither is said.
    """
    theirs = of(found, reference)
    ranks = sorted({a.settings.get("rank", 0) for a in of(found, method)})
    if not theirs or not ranks:
        return missing(reference if ranks else method)
    curves = {r: [a for a in of(found, method) if a.settings.get("rank", 0) == r] for r in ranks}
    if min(len(theirs), *(len(c) for c in curves.values())) < 3:
        return missing("three learning rates a side")
    ids = ids_of(*theirs, *(a for c in curves.values() for a in c))
    ratios = {r: best(c).rate / best(theirs).rate for r, c in curves.items()}
    told = ", ".join(f"{v:.3g} at rank {r}" for r, v in ratios.items())
    compared = tasks * (len(curves) + 1)
    bottom = good_rates(theirs, compared)
    good = {r: good_rates(curve, compared) for r, curve in curves.items()}
    bounded = {r: not reaches_edge(curves[r], rates) for r, rates in good.items()}
    inside = not reaches_edge(theirs, bottom)
    for r, rates in good.items():
        if inside and bounded[r] and not any(low <= a / b <= high for a, b in product(rates, bottom)):
            return Found(CONTRADICTED, f"ratio of best rates {told}; at rank {r} none in [{low:g}, {high:g}]", ids)
    if not (inside and all(bounded.values())):
        return Found(UNDECIDED, f"ratio of best rates {told}; {EDGE}", ids)
    verdict = HOLDS if all(low <= v <= high for v in ratios.values()) else UNDECIDED
    return Found(verdict, f"ratio of best rates {told}, claimed [{low:g}, {high:g}]", ids)


def rates_agree(found: Sequence[Arm], *, method: str, ranks: Sequence[int], factor: float, tasks: int = 1) -> Found:
    """Say whether the best learning rates of all `ranks` lie within a `factor`.

    Holds if they do; is contradicted if no choice of rates that cannot be told from the best ones does. Where such
    rates reach an edge of their grid, the best one is not known to be inside: the rank contradicts nothing, and nothing
    holds.
    """
    curves = {r: of(found, method, rank=r) for r in ranks}
    if lacking := [r for r, c in curves.items() if len(c) < 3]:
        return missing(f"three learning rates at rank {', '.join(map(str, lacking))}")
    ids = ids_of(*(a for c in curves.values() for a in c))
    chosen = {r: best(c).rate for r, c in curves.items()}
    told = ", ".join(f"{v:.3g} at rank {r}" for r, v in chosen.items())
    limit = factor * (1 + 1e-9)
    good = {r: good_rates(c, tasks * len(curves)) for r, c in curves.items()}
    sets = [rates for r, rates in good.items() if not reaches_edge(curves[r], rates)]
    starts = {rate for rates in sets for rate in rates}
    if sets and not any(all(any(s <= rate <= s * limit for rate in rates) for rates in sets) for s in starts):
        return Found(CONTRADICTED, f"best rates {told}: no choice within a factor of {factor:g}", ids)
    if len(sets) < len(curves):
        return Found(UNDECIDED, f"best rates {told}; {EDGE}", ids)
    verdict = HOLDS if max(chosen.values()) <= min(chosen.values()) * limit else UNDECIDED
    return Found(verdict, f"best rates {told}, claimed within a factor of {factor:g}", ids)


RULES: dict[str, Callable[..., Found]] = (
    {
        rule.__name__: rule
        for rule in (rank_insensitive, not_worse, difference_within, gain, better_at_largest, rate_ratio, rates_agree)
    }
    | ratios.RULES
    | trends.RULES
)


def judge(claim: Claim, configurations: Sequence[Configuration]) -> tuple[Verdict, tuple[str, ...]]:
    """Judge a claim by the records of its experiment, told by the folder's name; returns the run ids too."""
    own = [c for c in configurations if Path(c.folder).name == claim.experiment]
    tasks = sorted({c.spec["task"]["name"] for c in own if c.completed})
    needs = f"needs python -m peftbench sweep experiment={claim.experiment}"
    if not tasks or claim.rule not in RULES:
        return Verdict(NOT_RUN, needs), ()
    by_task = {task: RULES[claim.rule](arms(own, task), **claim.settings, tasks=len(tasks)) for task in tasks}
    verdicts = [f.verdict for f in by_task.values()]
    verdict = CONTRADICTED if CONTRADICTED in verdicts else UNDECIDED if UNDECIDED in verdicts else HOLDS
    reason = "; ".join(f"{task}: {f.reason}" for task, f in by_task.items())
    records = tuple(i for f in by_task.values() for i in f.records)
    if not records:
        return Verdict(NOT_RUN, f"{reason}; {needs}"), ()
    used = set(records)
    here = ", ".join(sorted({c.spec["model"]["name"] for c in own if used & {r["run_id"] for r in c.completed}}))
    return Verdict(verdict, reason, transfer="" if here in claim.models else here), records
