"""Claims: orderings and ratios that a paper states, and the rules that records are judged by.

Each rule was written down before any run. A rule sees the completed runs of the claim's experiment on one task and says
*claim holds*, *claim contradicted* or *claim undecided*. Over several tasks a claim holds if it does on all, and is
contradicted if it is on one. Scores are in points (a metric times 100; losses in nats, smaller is better, stay as they
are and margins are then a hundredth). Learning rates are always chosen on validation, results compared on test.
Intervals are 95 %, of the difference of two means over seeds that have nothing to do with each other (Welch), see
`analysis.intervals`; with fewer than two seeds on a side nothing is decided.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from peftbench.analysis import intervals
from peftbench.published import Claim
from peftbench.reproduce.records import Configuration
from peftbench.reproduce.verdicts import CONTRADICTED, HOLDS, NOT_RUN, UNDECIDED, Verdict


@dataclass(frozen=True)
class Arm:
    """The runs of one configuration: its learning rate, and scores by seed, larger for better.

    `point` is what a margin of one point is in their unit.
    """

    settings: Mapping[str, Any]
    rate: float
    validation: tuple[float, ...]
    test: tuple[float, ...]
    records: tuple[str, ...]
    point: float = 1.0

    @property
    def merit(self) -> float:
        """Return the mean on validation."""
        return sum(self.validation) / len(self.validation)


@dataclass(frozen=True)
class Found:
    """What a rule says of one task, and the records that it looked at."""

    verdict: str
    reason: str
    records: tuple[str, ...] = ()


def arms(configurations: Sequence[Configuration], task: str) -> list[Arm]:
    """Return the configurations of a task that completed, as a rule sees them."""
    found = []
    for c in configurations:
        spec = c.spec
        if spec["task"]["name"] != task or not c.completed:
            continue
        quality = c.completed[0]["quality"]
        metric, up = quality["primary_metric"], quality.get("greater_is_better", True)
        factor = 100.0 if up else -1.0
        validation, test = c.scores("validation", metric), c.scores("test", metric)
        seeds = sorted(set(validation) & set(test))
        if seeds:
            ids = tuple(r["run_id"] for r in c.completed)
            scores = [tuple(factor * side[s] for s in seeds) for side in (validation, test)]
            rate = float(spec["train"]["learning_rate"])
            found.append(Arm(spec["method"], rate, scores[0], scores[1], ids, 1.0 if up else 0.01))
    return found


def of(found: Sequence[Arm], method: str, **settings: Any) -> list[Arm]:
    """Return the arms of a method with these settings, by learning rate."""
    chosen = [
        a for a in found if a.settings["name"] == method and all(a.settings.get(k) == v for k, v in settings.items())
    ]
    return sorted(chosen, key=lambda a: a.rate)


def best(candidates: Sequence[Arm]) -> Arm:
    """Return the arm that does best on validation among those with the most seeds."""
    most = max(len(a.validation) for a in candidates)
    return max((a for a in candidates if len(a.validation) == most), key=lambda a: a.merit)


def interval(first: Sequence[float], second: Sequence[float]) -> tuple[float, float] | None:
    """Return the ends of the interval of mean(first) − mean(second); None with a single seed on a side."""
    samples = [intervals.sample(range(len(side)), list(side)) for side in (first, second)]
    return intervals.interval(intervals.difference(samples[0], samples[1]))


def _ids(*chosen: Arm) -> tuple[str, ...]:
    return tuple(dict.fromkeys(i for arm in chosen for i in arm.records))


def _missing(what: str) -> Found:
    return Found(UNDECIDED, f"lacks {what}")


def _text(ends: tuple[float, float]) -> str:
    return f"[{ends[0]:+.3g}, {ends[1]:+.3g}]"


def _margin(found: Sequence[Arm], points: float) -> float:
    """Return a margin in the unit of the scores: points, or hundredths of a nat where scores are negative losses."""
    return points * found[0].point


def rank_insensitive(found: Sequence[Arm], *, method: str, ranks: Sequence[int], margin: float) -> Found:
    """Say whether no rank is worse than the best one by more than `margin`, each at its own learning rate.

    Holds if every interval of (best rank − rank) ends below the margin, is contradicted if one begins above it. The
    best rank is the best on validation.
    """
    by_rank = {r: of(found, method, rank=r) for r in ranks}
    if lacking := [r for r, candidates in by_rank.items() if not candidates]:
        return _missing(f"rank {', '.join(map(str, lacking))}")
    chosen = {r: best(candidates) for r, candidates in by_rank.items()}
    top = max(chosen, key=lambda r: chosen[r].merit)
    limit, ids = _margin(found, margin), _ids(*chosen.values())
    ends = {r: interval(chosen[top].test, chosen[r].test) for r in ranks if r != top}
    if any(e is None for e in ends.values()):
        return Found(UNDECIDED, "needs two seeds a rank", ids)
    known = {r: e for r, e in ends.items() if e is not None}
    worst = max(known, key=lambda r: known[r][0])
    if known[worst][0] > limit:
        return Found(CONTRADICTED, f"rank {top} beats rank {worst} by {_text(known[worst])}, more than {limit:g}", ids)
    widest = max(known, key=lambda r: known[r][1])
    if known[widest][1] <= limit:
        return Found(HOLDS, f"no rank is worse than rank {top} by more than {limit:g}", ids)
    return Found(UNDECIDED, f"rank {top} over rank {widest}: {_text(known[widest])} reaches beyond {limit:g}", ids)


def not_worse(found: Sequence[Arm], *, method: str, rank: int, reference: str, margin: float) -> Found:
    """Say whether `method` is at most `margin` worse than `reference`, each at its own learning rate.

    Holds if the interval of the difference begins above −margin, is contradicted if it ends below it.
    """
    sides = of(found, method, rank=rank), of(found, reference)
    if not all(sides):
        return _missing(reference if sides[0] else f"{method} at rank {rank}")
    mine, theirs = best(sides[0]), best(sides[1])
    limit, ends = _margin(found, margin), interval(mine.test, theirs.test)
    if ends is None:
        return Found(UNDECIDED, "needs two seeds a side", _ids(mine, theirs))
    verdict = HOLDS if ends[0] >= -limit else CONTRADICTED if ends[1] < -limit else UNDECIDED
    return Found(verdict, f"{method} − {reference}: {_text(ends)}, margin {limit:g}", _ids(mine, theirs))


def gain(found: Sequence[Arm], *, method: str, key: str, baseline: float, least: float) -> Found:
    """Say whether the best value of the setting `key` gains over `baseline`, each at its own learning rate.

    The best value is the best on validation among those other than the baseline. Holds if the interval of the gain lies
    above 0 and reaches `least`, is contradicted if it ends below `least`.
    """
    base = of(found, method, **{key: baseline})
    others = [a for a in of(found, method) if a.settings.get(key) != baseline]
    if not base or not others:
        return _missing(f"{key}={baseline:g}" if others else f"{key} other than {baseline:g}")
    mine, theirs = best(others), best(base)
    limit, ends = _margin(found, least), interval(mine.test, theirs.test)
    if ends is None:
        return Found(UNDECIDED, "needs two seeds a side", _ids(mine, theirs))
    verdict = CONTRADICTED if ends[1] < limit else HOLDS if ends[0] > 0 else UNDECIDED
    return Found(verdict, f"{key}={mine.settings[key]:g} gains {_text(ends)}, claimed {limit:g}", _ids(mine, theirs))


def better_at_largest(found: Sequence[Arm], *, method: str, reference: str) -> Found:
    """Say whether `method` beats `reference` at the largest rank that both have, at one learning rate.

    The rate is the one that suits the reference at its smallest rank. Holds if the interval of the difference lies
    above 0, is contradicted if it lies below.
    """
    ranks = sorted({a.settings["rank"] for a in of(found, method)} & {a.settings["rank"] for a in of(found, reference)})
    if len(ranks) < 2:
        return _missing("two ranks of both methods")
    rate = best(of(found, reference, rank=ranks[0])).rate
    sides = [[a for a in of(found, name, rank=ranks[-1]) if a.rate == rate] for name in (method, reference)]
    if not all(sides):
        return _missing(f"both methods at rank {ranks[-1]} and learning rate {rate:g}")
    ends = interval(sides[0][0].test, sides[1][0].test)
    ids = _ids(sides[0][0], sides[1][0])
    if ends is None:
        return Found(UNDECIDED, "needs two seeds a side", ids)
    verdict = HOLDS if ends[0] > 0 else CONTRADICTED if ends[1] < 0 else UNDECIDED
    return Found(verdict, f"rank {ranks[-1]}, learning rate {rate:g}: {method} − {reference} {_text(ends)}", ids)


def good_rates(candidates: Sequence[Arm]) -> list[float]:
    """Return the learning rates whose validation cannot be told from the best one's; that one is among them."""
    top = best(candidates)
    found = [top.rate]
    for arm in candidates:
        ends = interval(top.validation, arm.validation)
        if arm is not top and (ends is None or ends[0] <= 0):
            found.append(arm.rate)
    return sorted(found)


def _at_edge(candidates: Sequence[Arm]) -> bool:
    rates = [a.rate for a in candidates]
    return best(candidates).rate in (min(rates), max(rates))


def rate_ratio(found: Sequence[Arm], *, method: str, reference: str, low: float, high: float) -> Found:
    """Say whether the best learning rate of `method` is `low` to `high` times that of `reference`.

    `method` is taken at each of its ranks. Holds if the ratio of best rates is within, for every rank, with no best
    rate at the edge of its grid; is contradicted if for one rank no pair of rates that cannot be told from the best
    ones is within.
    """
    theirs = of(found, reference)
    ranks = sorted({a.settings.get("rank", 0) for a in of(found, method)})
    if not theirs or not ranks:
        return _missing(reference if ranks else method)
    curves = {r: [a for a in of(found, method) if a.settings.get("rank", 0) == r] for r in ranks}
    if min(len(theirs), *(len(c) for c in curves.values())) < 3:
        return _missing("three learning rates a side")
    ids = _ids(*theirs, *(a for c in curves.values() for a in c))
    ratios = {r: best(c).rate / best(theirs).rate for r, c in curves.items()}
    told = ", ".join(f"{v:.3g} at rank {r}" for r, v in ratios.items())
    bottom = good_rates(theirs)
    for r, curve in curves.items():
        if not any(low <= a / b <= high for a, b in product(good_rates(curve), bottom)):
            return Found(CONTRADICTED, f"ratio of best rates {told}; at rank {r} none in [{low:g}, {high:g}]", ids)
    if any(_at_edge(c) for c in (theirs, *curves.values())):
        return Found(UNDECIDED, f"ratio of best rates {told}; a best rate is at the edge of its grid", ids)
    verdict = HOLDS if all(low <= v <= high for v in ratios.values()) else UNDECIDED
    return Found(verdict, f"ratio of best rates {told}, claimed [{low:g}, {high:g}]", ids)


def rates_agree(found: Sequence[Arm], *, method: str, ranks: Sequence[int], factor: float) -> Found:
    """Say whether the best learning rates of all `ranks` lie within a `factor`.

    Holds if they do and none is at the edge of its grid; is contradicted if no choice of rates that cannot be told from
    the best ones does.
    """
    curves = {r: of(found, method, rank=r) for r in ranks}
    if lacking := [r for r, c in curves.items() if len(c) < 3]:
        return _missing(f"three learning rates at rank {', '.join(map(str, lacking))}")
    ids = _ids(*(a for c in curves.values() for a in c))
    chosen = {r: best(c).rate for r, c in curves.items()}
    told = ", ".join(f"{v:.3g} at rank {r}" for r, v in chosen.items())
    limit = factor * (1 + 1e-9)
    sets = [good_rates(c) for c in curves.values()]
    starts = {rate for rates in sets for rate in rates}
    if not any(all(any(s <= rate <= s * limit for rate in rates) for rates in sets) for s in starts):
        return Found(CONTRADICTED, f"best rates {told}: no choice within a factor of {factor:g}", ids)
    if any(_at_edge(c) for c in curves.values()):
        return Found(UNDECIDED, f"best rates {told}: one is at the edge of its grid", ids)
    verdict = HOLDS if max(chosen.values()) <= min(chosen.values()) * limit else UNDECIDED
    return Found(verdict, f"best rates {told}, claimed within a factor of {factor:g}", ids)


RULES: dict[str, Callable[..., Found]] = {
    rule.__name__: rule for rule in (rank_insensitive, not_worse, gain, better_at_largest, rate_ratio, rates_agree)
}


def judge(claim: Claim, configurations: Sequence[Configuration]) -> tuple[Verdict, tuple[str, ...]]:
    """Judge a claim by the records of its experiment, told by the folder's name; returns the run ids too."""
    own = [c for c in configurations if Path(c.folder).name == claim.experiment]
    tasks = sorted({c.spec["task"]["name"] for c in own if c.completed})
    models = sorted({c.spec["model"]["name"] for c in own})
    if not tasks:
        return Verdict(NOT_RUN, f"needs python -m peftbench sweep experiment={claim.experiment}"), ()
    by_task = {task: RULES[claim.rule](arms(own, task), **claim.settings) for task in tasks}
    verdicts = [f.verdict for f in by_task.values()]
    verdict = CONTRADICTED if CONTRADICTED in verdicts else UNDECIDED if UNDECIDED in verdicts else HOLDS
    reason = "; ".join(f"{task}: {f.reason}" for task, f in by_task.items())
    records = tuple(i for f in by_task.values() for i in f.records)
    if not records:
        return Verdict(NOT_RUN, reason), ()
    here = ", ".join(models)
    return Verdict(verdict, reason, transfer="" if here in claim.models else here), records
