"""Sentences on what runs did and did not tell apart; with every "no" the difference that they could have found."""

from collections.abc import Sequence

import numpy as np

from peftbench.analysis.comparisons import Comparison, Panel, Suite, Verdict
from peftbench.analysis.paired import Friedman
from peftbench.analysis.power import ALPHA, detectable, with_seeds

CORRELATED = 0.3
MOST_NAMES = 8
MORE_SEEDS = (5, 10)


def scope(panel: Panel) -> str:
    """Return what the intervals of a panel are over."""
    counts = sorted({len(s.runs) for s in panel.samples})
    seeds = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    if panel.items is None:
        return f"Over {seeds} seeds alone, the test set taken as it is: {panel.reason}."
    return f"Over {seeds} seeds × {panel.items} test items; both methods of a difference meet the same items."


def findings(comparison: Comparison, digits: int, link: str) -> list[str]:
    """Return what was and what was not told apart, with what would have been; `link` is the csv of all pairs."""
    lines = []
    gaps = [v for v in comparison.gaps.values() if v.estimate.sources]
    same = [v for v in gaps if not v.apart]
    if same:
        named = [f"{comparison.rows[v.first]['variant']} (MDE {v.among:.{digits}f})" for v in same]
        which = (
            f": {', '.join(named)}" if len(named) <= MOST_NAMES else f", MDE {_range([v.among for v in same], digits)}"
        )
        lines.append(
            f"No difference from full fine-tuning was found for {len(same)} of {len(gaps)}{which}. That allows for "
            f"{gaps[0].family} comparisons; planned alone: MDE {_range([v.alone for v in same], digits)}."
        )
    elif gaps:
        lines.append(f"All {len(gaps)} differ from full fine-tuning, corrected for {gaps[0].family} comparisons.")
    pairs = [v for v in comparison.pairs if v.estimate.sources]
    if pairs:
        lines.append(_pair_sentence(comparison, pairs, digits, link))
    return lines


def _pair_sentence(comparison: Comparison, pairs: Sequence[Verdict], digits: int, link: str) -> str:
    same = [v for v in pairs if not v.apart]
    parts = [f"{len(pairs) - len(same)} of {len(pairs)} pairs were told apart ([csv]({link}))."]
    if same:
        names = [row["variant"] for row in comparison.rows]
        named = [f"{names[v.first]} and {names[v.second]} (MDE {v.among:.{digits}f})" for v in same]
        which = (
            f"No difference was found between {', '.join(named)}; for a pair planned alone MDE "
            if len(same) <= MOST_NAMES
            else f"For the others no difference was found, MDE {_range([v.among for v in same], digits)}; for a pair "
            "planned alone "
        )
        parts.append(f"{which}{_range([v.alone for v in same], digits)}.")
    counts = comparison.seed_counts
    if same and len(counts) == 1:
        (have,), family = counts, ALPHA / pairs[0].family
        told = []
        for want in (*(w for w in MORE_SEEDS if w > have), None):
            if want is None and not any(v.estimate.items for v in same):
                continue
            median = float(np.median(detectable([with_seeds(v.estimate, have, want) for v in same], family)))
            if float(f"{median:.{digits}f}") == 0:  # the spread of items is drowned by that of seeds, not absent
                continue
            told.append(f"{median:.{digits}f} with {'any number of' if want is None else want} seeds")
        if told:
            parts.append(f"At this spread the median would be {', '.join(told)}.")
    return " ".join(parts)


def _range(values: Sequence[float], digits: int) -> str:
    """Return "0.021 to 0.048, median 0.030", one number for values that look the same."""
    low, middle, high = (f"{v:.{digits}f}" for v in np.quantile(values, [0, 0.5, 1]))
    return low if low == high else f"{low} to {high}" + (f", median {middle}" if len(values) > 2 else "")


def cautions(panel: Panel) -> list[str]:
    """Return what a reader must know before trusting them: lost runs, seeds that go together, single seeds."""
    lines = []
    lost = [
        f"{row['variant']} ({len(s.runs)} of {row['runs']})"
        for row, s in zip(panel.rows, panel.samples, strict=True)
        if len(s.runs) < row["runs"]
    ]
    if lost:
        lines.append(
            f"Lost runs are in none of these figures, which flatters methods that lose some: {', '.join(lost)}."
        )
    correlation = panel.seed_correlation
    if correlation is not None and abs(correlation) > CORRELATED:
        effect = "wider" if correlation > 0 else "narrower"
        lines.append(
            f"A seed's results go together across methods (correlation {correlation:.2f}) while gaps read seeds as "
            f"independent: their intervals are {effect} than they should be. The csv has gaps with seeds in pairs."
        )
    if any(not e.sources for e in panel.estimates):
        lines.append("A single seed has no interval and no tier: one run cannot tell methods apart.")
    return lines


def over_new_tasks(suite: Suite, found: Friedman | None) -> list[str]:
    """Return what Friedman's and Nemenyi's tests say, for which tasks are the sample."""
    if found is None:
        return []
    tasks, methods = suite.scores.shape
    apart = sum(
        abs(found.mean_ranks[i] - found.mean_ranks[j]) > found.critical_difference
        for i in range(methods)
        for j in range(i)
    )
    return [
        f"As a sample of all tasks, these {tasks} say less. Friedman: χ²({methods - 1}) = {found.chi_square:.1f}, "
        f"p = {found.p:.2g}; Iman and Davenport: F = {found.f:.2f}, p = {found.f_p:.2g}. Nemenyi: mean ranks must "
        f"differ by {found.critical_difference:.1f}, as those of {apart} of {methods * (methods - 1) // 2} pairs do."
    ]
