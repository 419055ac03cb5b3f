"""Rules on more than best scores: on steps of training, batch sizes, several settings, and trained factors.

They are told as those of `claims` are, and were written down before any run as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from peftbench.analysis import intervals
from peftbench.reproduce.arms import (
    Arm,
    Found,
    at_edge,
    best,
    decided,
    described,
    ends_text,
    ids_of,
    in_unit,
    interval,
    missing,
    of,
)
from peftbench.reproduce.verdicts import CONTRADICTED, HOLDS, UNDECIDED
from peftbench.starts import WEIGHTS_FILE

# -- steps of training -------------------------------------------------------------------------------------------------


def _at_one_rate(found: Sequence[Arm], method: str, ranks: Sequence[int]) -> dict[int, Arm] | Found:
    """Return rank → arm, all at the learning rate that is best for the largest rank."""
    curves = {r: of(found, method, rank=r) for r in ranks}
    if lacking := [r for r, c in curves.items() if not c]:
        return missing(f"rank {', '.join(map(str, lacking))}")
    rate = best(curves[max(ranks)]).rate
    sides = {r: next((a for a in c if a.rate == rate), None) for r, c in curves.items()}
    if lacking := [r for r, a in sides.items() if a is None]:
        return missing(f"learning rate {rate:g} at rank {', '.join(map(str, lacking))}")
    return {r: a for r, a in sides.items() if a is not None}


def _at_step(arm: Arm, step: int) -> tuple[float, ...]:
    """Return the scores on validation at a step, of the seeds that were evaluated there."""
    return tuple(curve[step] for curve in arm.curves if step in curve)


def curves_meet(
    found: Sequence[Arm], *, method: str, ranks: Sequence[int], step: int, margin: float, tasks: int = 1
) -> Found:
    """Say whether at `step` all ranks are within a `margin` of the largest, at the learning rate best for that.

    Holds if every interval is within ± the margin, is contradicted if one is outside.
    """
    sides = _at_one_rate(found, method, ranks)
    if isinstance(sides, Found):
        return sides
    top, limit, ids = max(ranks), in_unit(found, margin), ids_of(*sides.values())
    values = {r: _at_step(a, step) for r, a in sides.items()}
    if not all(values.values()):
        return missing(f"an evaluation at step {step}")
    ends = {r: interval(values[top], values[r], tasks * (len(ranks) - 1)) for r in ranks if r != top}
    if any(e is None for e in ends.values()):
        return Found(UNDECIDED, "needs two seeds a rank", ids)
    known = {r: e for r, e in ends.items() if e is not None}
    widest = max(known, key=lambda r: max(map(abs, known[r])))
    outside = [r for r, e in known.items() if e[0] > limit or e[1] < -limit]
    verdict = CONTRADICTED if outside else HOLDS if max(map(abs, known[widest])) <= limit else UNDECIDED
    rank = outside[0] if outside else widest
    told = f"step {step}, learning rate {sides[top].rate:g}: rank {top} over rank {rank} {ends_text(known[rank])}"
    return Found(verdict, f"{told}, claimed within ±{limit:g}", ids)


def leave_in_order(
    found: Sequence[Arm],
    *,
    method: str,
    ranks: Sequence[int],
    steps: Sequence[int],
    margin: float,
    tasks: int = 1,
) -> Found:
    """Say whether the lower a rank the sooner it falls behind the largest, at the one learning rate best for that.

    A rank falls behind at the first of `steps` from which on every interval of (largest − rank) begins above the
    margin. Holds if no rank does so before a lower one, and the lowest before the highest of the others; is
    contradicted if one does so before a lower one.
    """
    sides = _at_one_rate(found, method, ranks)
    if isinstance(sides, Found):
        return sides
    top, limit, ids = max(ranks), in_unit(found, margin), ids_of(*sides.values())
    others = sorted(r for r in ranks if r != top)
    left = {}
    for rank in others:
        behind = []
        for step in steps:
            values = [_at_step(sides[r], step) for r in (top, rank)]
            if not all(values):
                return missing(f"an evaluation at step {step}")
            ends = interval(values[0], values[1], tasks * len(others) * len(steps))
            if ends is None:
                return Found(UNDECIDED, "needs two seeds a rank", ids)
            behind.append(ends[0] > limit)
        left[rank] = next((s for i, s in enumerate(steps) if all(behind[i:])), math.inf)
    told = "rank " + ", ".join(f"{r} {'never' if math.isinf(s) else f'from step {s}'}" for r, s in left.items())
    told = f"behind rank {top} by more than {limit:g}: {told}; learning rate {sides[top].rate:g}"
    times = [left[r] for r in others]
    if any(high < low for low, high in pairwise(times)):
        return Found(CONTRADICTED, told, ids)
    return Found(HOLDS if times[0] < times[-1] else UNDECIDED, told, ids)


def sooner(found: Sequence[Arm], *, method: str, key: str, baseline: float, least: float, tasks: int = 1) -> Found:
    """Say whether the best value of the setting `key` comes to the baseline's score in `least` times fewer steps.

    Each side is taken at its own learning rate and as its curves on validation are; the score is the mean that the
    baseline ends with. A run that never comes to it counts as one that would at the evaluation after its last. The
    ratio's interval is that of the difference of mean logarithms. Holds if it lies above 1 and reaches `least`, is
    contradicted if it ends below `least`, neither where the learning rate of the side that came off worse by that is at
    an edge.
    """
    base = of(found, method, **{key: baseline})
    others = [a for a in of(found, method) if a.settings.get(key) != baseline]
    if not base or not others:
        return missing(f"{key}={baseline:g}" if others else f"{key} other than {baseline:g}")
    mine, theirs = best(others), best(base)
    ids = ids_of(mine, theirs)
    if any(len(curve) < 2 for a in (mine, theirs) for curve in a.curves) or not (mine.curves and theirs.curves):
        return missing("evaluations along training")
    goal = math.fsum(curve[max(curve)] for curve in theirs.curves) / len(theirs.curves)
    first, second = ([math.log(_reached(c, goal)) for c in a.curves] for a in (theirs, mine))
    ends = interval(first, second, tasks)
    if ends is None:
        return Found(UNDECIDED, "needs two seeds a side", ids)
    same = [a for a in others if a.settings[key] == mine.settings[key]]
    limit = math.log(least)
    verdict, edge = decided(ends[0] > 0 and ends[1] >= limit, ends[1] < limit, same, base)
    low, high = map(math.exp, ends)
    told = (
        f"{key}={mine.settings[key]:g} is there in [{low:.3g}, {high:.3g}] times fewer steps, claimed {least:g}{edge}"
    )
    return Found(verdict, told, ids)


def _reached(curve: Mapping[int, float], goal: float) -> int:
    """Return the first step that comes to `goal`, or that of an evaluation after the last."""
    steps = sorted(curve)
    return next((s for s in steps if curve[s] >= goal), 2 * steps[-1] - steps[-2])


# -- batch sizes -------------------------------------------------------------------------------------------------------


def _by_batch(found: Sequence[Arm], methods: Sequence[str]) -> dict[str, tuple[list[Arm], list[Arm]]] | Found:
    """Return method → arms at the smallest batch size that all have, and at the largest."""
    shared = set.intersection(*({a.batch for a in of(found, m)} for m in methods))
    if len(shared) < 2:
        return missing(f"two batch sizes of {' and '.join(methods)}")
    small, large = ([a for a in found if a.batch == pick(shared)] for pick in (min, max))
    return {m: (of(small, m), of(large, m)) for m in methods}


def gap_grows(found: Sequence[Arm], *, method: str, reference: str, tasks: int = 1) -> Found:
    """Say whether `method` falls further behind `reference` at the largest batch size than at the smallest.

    Each side is at its own learning rate for that batch size. Holds if the interval of (gap at the largest − gap at the
    smallest) lies above 0, is contradicted if it lies below, neither where more rates could overturn it.
    """
    sides = _by_batch(found, (method, reference))
    if isinstance(sides, Found):
        return sides
    chosen = {m: (best(small), best(large)) for m, (small, large) in sides.items()}
    ids = ids_of(*(a for pair in chosen.values() for a in pair))
    gaps = []
    for at in (0, 1):
        samples = [intervals.sample(range(len(chosen[m][at].test)), chosen[m][at].test) for m in (reference, method)]
        gaps.append(intervals.difference(*samples))
    errors = [g.seeds for g in gaps if g.seeds is not None]
    if len(errors) < 2:
        return Found(UNDECIDED, "needs two seeds a side", ids)
    growth = intervals.Estimate(gaps[1].value - gaps[0].value, intervals.total(errors))
    ends = intervals.interval(growth, 1 - (1 - intervals.CONFIDENCE) / tasks)
    assert ends is not None
    low, high = chosen[method][0].batch, chosen[method][1].batch
    told = f"{reference} − {method}: {gaps[0].value:+.3g} at batch {low}, {gaps[1].value:+.3g} at {high}"
    told = f"{told}, grows by {ends_text(ends)}"
    # what could do better with more rates: at one end of the batch sizes one side, at the other the other
    worse = [sides[method][1], sides[reference][0]] if ends[0] > 0 else [sides[method][0], sides[reference][1]]
    verdict = HOLDS if ends[0] > 0 else CONTRADICTED if ends[1] < 0 else UNDECIDED
    if verdict != UNDECIDED and any(map(at_edge, worse)):
        return Found(UNDECIDED, f"{told}; a side is best at the edge of its learning rates", ids)
    return Found(verdict, told, ids)


def smaller_batch(found: Sequence[Arm], *, methods: Sequence[str], tasks: int = 1) -> Found:
    """Say whether the smallest batch size does better than the largest, for every one of `methods`.

    Each at its own learning rate. Holds if every interval of (smallest − largest) lies above 0, is contradicted if one
    lies below, neither where the learning rate of the one that came off worse by that is at an edge.
    """
    sides = _by_batch(found, methods)
    if isinstance(sides, Found):
        return sides
    told, verdicts, used = [], [], []
    for name, (small, large) in sides.items():
        mine, theirs = best(small), best(large)
        used += [mine, theirs]
        ends = interval(mine.test, theirs.test, tasks * len(methods))
        if ends is None:
            return Found(UNDECIDED, "needs two seeds a side", ids_of(*used))
        verdict, edge = decided(ends[0] > 0, ends[1] < 0, small, large)
        verdicts.append(verdict)
        told.append(f"{name}: batch {mine.batch} − batch {theirs.batch} {ends_text(ends)}{edge}")
    verdict = CONTRADICTED if CONTRADICTED in verdicts else UNDECIDED if UNDECIDED in verdicts else HOLDS
    return Found(verdict, "; ".join(told), ids_of(*used))


# -- settings and trained factors --------------------------------------------------------------------------------------


def not_beaten(
    found: Sequence[Arm],
    *,
    first: Mapping[str, Any],
    others: Sequence[Mapping[str, Any]],
    margin: float,
    tasks: int = 1,
) -> Found:
    """Say whether none of `others` does better than `first` by more than a `margin`, each at its own learning rate.

    Sides are named by settings of the method, its `name` among them. Holds if every interval of (other − first) ends at
    or below the margin and no other one's learning rate is at an edge, is contradicted if one begins above it while the
    learning rate of `first` is not at an edge.
    """

    def side(settings: Mapping[str, Any]) -> list[Arm]:
        return of(found, settings["name"], **{k: v for k, v in settings.items() if k != "name"})

    mine, theirs = side(first), {described(o): side(o) for o in others}
    if lacking := [*([] if mine else [described(first)]), *(name for name, arms in theirs.items() if not arms)]:
        return missing("; ".join(lacking))
    top, limit = best(mine), in_unit(found, margin)
    ids = ids_of(top, *(best(arms) for arms in theirs.values()))
    ends = {name: interval(best(arms).test, top.test, tasks * len(theirs)) for name, arms in theirs.items()}
    if any(e is None for e in ends.values()):
        return Found(UNDECIDED, "needs two seeds a side", ids)
    known = {name: e for name, e in ends.items() if e is not None}
    highest = max(known, key=lambda name: known[name][1])
    beaten = [name for name, e in known.items() if e[0] > limit]
    name = beaten[0] if beaten else highest
    told = f"{name} − {described(first)}: {ends_text(known[name])}, margin {limit:g}"
    edges = [other for other, arms in theirs.items() if at_edge(arms)]
    if beaten:
        edge = at_edge(mine)
        told += "; the latter is best at the edge of its learning rates" if edge else ""
        return Found(UNDECIDED if edge else CONTRADICTED, told, ids)
    if known[highest][1] <= limit and edges:
        return Found(UNDECIDED, f"{told}; {', '.join(edges)}: best at the edge of its learning rates", ids)
    return Found(HOLDS if known[highest][1] <= limit else UNDECIDED, told, ids)


def second_factor_larger(found: Sequence[Arm], *, method: str, ranks: Sequence[int], tasks: int = 1) -> Found:
    """Say whether B's spectral norm is larger than A's after training, at each rank with its best learning rate.

    Of each kept adapter the mean of log(‖B‖ / ‖A‖) over adapted maps is taken. Holds if its interval over seeds lies
    above 0 at every rank, is contradicted if it lies below at one.
    """
    sides = {r: of(found, method, rank=r) for r in ranks}
    if lacking := [r for r, c in sides.items() if not c]:
        return missing(f"rank {', '.join(map(str, lacking))}")
    chosen = {r: best(c) for r, c in sides.items()}
    kept = {r: [n for f in a.adapters if (n := _log_norms(f / WEIGHTS_FILE)) is not None] for r, a in chosen.items()}
    if not all(kept.values()):
        return missing("adapters: save_adapters=true keeps them")
    ids = ids_of(*chosen.values())
    ends = {
        r: intervals.interval(
            intervals.mean(intervals.sample(range(len(values)), values)),
            1 - (1 - intervals.CONFIDENCE) / (tasks * len(ranks)),
        )
        for r, values in kept.items()
    }
    if any(e is None for e in ends.values()):
        return Found(UNDECIDED, "needs two seeds a rank", ids)
    known = {r: e for r, e in ends.items() if e is not None}
    told = ", ".join(f"[{math.exp(low):.3g}, {math.exp(high):.3g}] at rank {r}" for r, (low, high) in known.items())
    below, above = any(e[1] < 0 for e in known.values()), all(e[0] > 0 for e in known.values())
    return Found(CONTRADICTED if below else HOLDS if above else UNDECIDED, f"norm of B / norm of A: {told}", ids)


def _log_norms(file: Path) -> float | None:
    """Return the mean of log(‖B‖ / ‖A‖) over the maps of a kept adapter; None where there is none."""
    if not file.is_file():
        return None
    import torch
    from safetensors.torch import load_file

    tensors = load_file(file)

    def norm(name: str) -> float:
        return math.log(float(torch.linalg.matrix_norm(tensors[name].float(), ord=2)) or math.ulp(0.0))

    maps = [name.removesuffix(".B") for name in tensors if name.endswith(".B")]
    return math.fsum(norm(f"{m}.B") - norm(f"{m}.A") for m in maps) / len(maps) if maps else None


RULES: dict[str, Callable[..., Found]] = {
    rule.__name__: rule
    for rule in (
        curves_meet,
        leave_in_order,
        sooner,
        gap_grows,
        smaller_batch,
        not_beaten,
        second_factor_larger,
    )
}
