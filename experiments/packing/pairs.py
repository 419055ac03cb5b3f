"""Do runs end where they end alone when others train beside them? Packed and alone, pair by pair.

    python experiments/packing/pairs.py --out results/packing/pairs.jsonl
    python experiments/packing/pairs.py --read <folder of packed runs> <folder of runs alone>
    python experiments/packing/pairs.py --table results/packing/pairs.jsonl

Trains `experiment=packing-pairs` twice, as a user would: `pack=20` and `pack=1`. A run has the same id both times,
since who trains beside it is no part of what it is; runs of one id make a pair. Differences of the final test metric
and of the training loss at the end are tested with a sign-flip permutation test on their mean (exact up to 20 pairs)
and with Wilcoxon's signed-rank test. A test that finds nothing does not show that nothing is there: the interval says
how large a difference could be, and the spread over seeds what it would be next to.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sweeps
from scipy import stats
from sweeps import common

EXACT = 20
"""Most pairs whose sign flips are all counted."""
DRAWS = 200_000
"""Flips drawn where there are more."""
TAIL = 0.1
"""Share of the steps, at the end, whose mean loss is a run's final one: single batches say little."""


def sign_flips(differences: np.ndarray) -> float:
    """Return the two-sided p value of a permutation test on the mean of paired differences [n].

    If neither side is better, each difference could as well have the other sign. All 2^n flips are counted up to
    `EXACT` pairs, else `DRAWS` of them and the one at hand.
    """
    n = len(differences)
    if not differences.any():
        return 1.0
    at_hand = abs(differences.sum())
    close = at_hand - 1e-12 * np.abs(differences).sum()
    if n > EXACT:
        signs = np.random.default_rng(0).choice([-1.0, 1.0], (DRAWS, n))
        return float((1 + (np.abs(signs @ differences) >= close).sum()) / (DRAWS + 1))
    sums = np.zeros(1)
    for value in differences:
        sums = np.concatenate([sums - value, sums + value])
    return float((np.abs(sums) >= close).mean())


def interval(differences: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Return Student's interval of the mean of paired differences [n]."""
    n = len(differences)
    half = stats.t.ppf((1 + level) / 2, n - 1) * differences.std(ddof=1) / np.sqrt(n)
    return float(differences.mean() - half), float(differences.mean() + half)


def values_of(record: Mapping[str, Any]) -> dict[str, float]:
    """Return what of a completed run is compared: its final test metric, and its loss at the end."""
    quality, losses = record["quality"], record["trace"]["loss"]
    tail = losses[-max(1, round(TAIL * len(losses))) :]
    return {
        f"test {quality['primary_metric']}": quality["test"][quality["primary_metric"]],
        "loss": float(np.mean(tail)),
    }


def paired(packed: Sequence[Mapping[str, Any]], alone: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a pair for each run id that completed on both sides, in order of ids."""
    sides = [{r["run_id"]: r for r in side if r["status"] == "completed"} for side in (packed, alone)]
    return [
        {
            "run_id": run_id,
            "method": sides[0][run_id]["spec"]["method"]["name"],
            "seed": sides[0][run_id]["spec"]["seed"],
            "pack_size": sides[0][run_id]["pack"]["size"],
            "packed": values_of(sides[0][run_id]),
            "alone": values_of(sides[1][run_id]),
            "selected_step": [side[run_id]["quality"]["selected_step"] for side in sides],
        }
        for run_id in sorted(sides[0].keys() & sides[1].keys())
    ]


def tested(pairs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return, by what is compared, how packed differs from alone over all pairs."""
    found = {}
    for name in pairs[0]["packed"]:
        differences = np.array([pair["packed"][name] - pair["alone"][name] for pair in pairs])
        spreads = []
        for method in dict.fromkeys(pair["method"] for pair in pairs):
            own = [pair["alone"][name] for pair in pairs if pair["method"] == method]
            spreads += [float(np.std(own, ddof=1))] if len(own) > 1 else []
        low, high = interval(differences) if len(differences) > 1 else (None, None)
        found[name] = {
            "pairs": len(differences),
            "mean_packed": float(np.mean([pair["packed"][name] for pair in pairs])),
            "mean_alone": float(np.mean([pair["alone"][name] for pair in pairs])),
            "mean_difference": float(differences.mean()),
            "interval_low": low,
            "interval_high": high,
            "largest_difference": float(np.abs(differences).max()),
            "equal_pairs": int((differences == 0).sum()),
            "p_sign_flips": sign_flips(differences),
            "p_wilcoxon": float(stats.wilcoxon(differences, zero_method="zsplit").pvalue) if differences.any() else 1.0,
            "spread_over_seeds": float(np.mean(spreads)) if spreads else None,
        }
    return found


def report(record: Mapping[str, Any]) -> str:
    """Return a table: one line for each thing compared."""
    rows = []
    for name, found in record["tests"].items():
        low, high = found["interval_low"], found["interval_high"]
        rows.append(
            (
                name,
                str(found["pairs"]),
                common.shown(found["mean_alone"], 4),
                common.shown(found["mean_packed"], 4),
                f"{found['mean_difference']:+.1e}",
                "–" if low is None else f"{low:+.1e} to {high:+.1e}",
                f"{found['largest_difference']:.1e}",
                "–" if found["spread_over_seeds"] is None else f"{found['spread_over_seeds']:.1e}",
                common.shown(found["p_sign_flips"], 3),
                common.shown(found["p_wilcoxon"], 3),
            )
        )
    headers = ("what", "pairs", "alone", "packed", "difference", "95 % interval", "largest", "spread over seeds")
    return common.table((*headers, "p sign flips", "p Wilcoxon"), rows)


def compared(packed: Sequence[dict[str, Any]], alone: Sequence[dict[str, Any]], origin: Mapping[str, Any]) -> Any:
    """Return the record of one comparison."""
    pairs = paired(packed, alone)
    if not pairs:
        raise SystemExit("no run completed both packed and alone")
    left = len({r["run_id"] for r in (*packed, *alone)}) - len(pairs)
    return {**origin, "pairs": pairs, "without_a_partner": left, "tests": tested(pairs)}


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train both sides, packed first, and compare them."""
    sides = [sweeps.swept("packing-pairs", pack, folder, options.set, options.limit) for pack in (options.pack, "1")]
    origin = common.header("packing-pairs", common.pick_device(options.device))
    commands = [side.command.shown for side in sides]
    seconds = [common.rounded(side.command.wall_seconds) for side in sides]
    found = compared(sides[0].records, sides[1].records, origin)
    return {**found, "subcommands": commands, "wall_seconds": seconds}


def _records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted((folder / "runs").glob("*.json"))]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="file that the record is added to")
    parser.add_argument("--table", nargs="+", metavar="FILE", help="show the records of these files; train nothing")
    parser.add_argument("--read", nargs=2, type=Path, metavar="FOLDER", help="sweeps' folders, packed and alone")
    parser.add_argument("--pack", default="20", help="how many runs train side by side")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings for both sweeps")
    parser.add_argument("--limit", type=float, help="seconds a sweep may take")
    parser.add_argument("--keep", type=Path, help="folder that the sweeps' records stay in; a temporary one by default")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="for the record's header")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Train (or read) both sides, print the tests, keep the record and return it."""
    options = parse(arguments)
    if options.table:
        records = [r for r in common.read(options.table) if r.get("comparison") == "packing-pairs"]
    elif options.read:
        origin = common.header("packing-pairs", common.pick_device(options.device))
        packed, alone = map(_records, options.read)
        records = [compared(packed, alone, origin)]
    elif options.keep:
        records = [measure(options, options.keep.resolve())]
    else:
        with tempfile.TemporaryDirectory() as folder:
            records = [measure(options, Path(folder))]
    if not options.table:
        common.append(options.out, records)
    for record in records:
        sizes = sorted({pair["pack_size"] for pair in record["pairs"]})
        print(f"{record['device']}, packs of {', '.join(map(str, sizes))}, {record['date'][:10]}")
        print(report(record))
        if record["without_a_partner"]:
            print(f"{record['without_a_partner']} runs did not complete on both sides")
    return records


if __name__ == "__main__":
    main()
