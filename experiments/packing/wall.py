"""How many runs an hour, as whole commands: packed, one at a time, and with Hugging Face's `Trainer`?

    python experiments/packing/wall.py rte --out results/packing/wall.jsonl
    python experiments/packing/wall.py rte mixed smollm2 --arms 16,1 --out results/packing/wall.jsonl
    python experiments/packing/wall.py --table results/packing/wall.jsonl

Each arm is one command, started anew and timed from outside, start-up and report included: `hf` is
`experiments/peers/trainer.py` on a base in bf16, `hf-autocast` the same on fp32 weights under autocast (what
`TrainingArguments(bf16=True)` does), a number or `auto` is `python -m peftbench sweep experiment=… pack=<that>`,
`16-eager` the same in eager steps, `eager` with `pack=1 train.execution=eager`, the settings that runs have unless
told otherwise. Arms that go one run at a time train some runs only; the rest is extrapolated at the mean of those
after the first, and the table says so. See README.md.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sweeps
from sweeps import Swept, common, timed

SPENT = {"training": ("train",), "evaluation": ("evaluate", "test"), "loading": ("load", "set_up", "profile")}
"""What a run's time is spent on → the phases that count for it."""
PEERS = {"hf": (), "hf-autocast": ("--precision", "autocast")}
"""Arms that are `trainer.py` → their arguments beside the case's."""
ALONE = {"1": (), "eager": ("train.execution=eager",)}
"""Arms that go one run at a time → their settings beside the case's."""
EAGER = "-eager"
"""What an arm's size of packs ends with where steps are eager."""
OTHERS = {"hf": "× HF", "hf-autocast": "× HF, autocast", "1": "× alone", "eager": "× alone, eager"}
"""Arms that the others are held against → headers."""
ONCE = "start, report"
"""The rest of a command's time: imports, planning, choosing the size of packs, the report."""


@dataclass(frozen=True)
class Case:
    """What is timed.

    Attributes:
        experiment: its folder under experiments/.
        runs: how many runs it holds.
        arms: what is timed unless others are named.
        few: what of it is trained one run at a time, as overrides.
        peer: the same for `trainer.py`, as arguments.
    """

    experiment: str
    runs: int
    arms: tuple[str, ...]
    few: tuple[str, ...]
    peer: tuple[str, ...]


CASES = {
    "rte": Case(
        "packing-rte",
        16,
        ("hf", "hf-autocast", "16", "1", "eager"),
        ("train.learning_rate=1e-3", "seed=0,1"),
        ("--seeds", "0,1"),
    ),
    "mixed": Case(
        "packing-mixed", 16, ("16", "1", "eager"), ("method=lora,dora,vera,ia3,houlsby",), ("--seeds", "0,1")
    ),
    "smollm2": Case(
        "packing-smollm2",
        8,
        ("hf", "8", "1", "eager"),
        ("train.learning_rate=1e-3", "seed=0,1"),
        (
            *("--task", "alpaca", "--model", "smollm2-135m", "--batch", "4", "--eval-batch", "64"),
            *("--steps", "200", "--seeds", "0,1"),
        ),
    ),
    "default": Case("default", 14, ("auto", "1"), (), ()),
}


def measure(case: Case, arm: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run one arm and return what its record says."""
    if arm in PEERS:
        return _peer(case, arm, options, folder)
    if arm in ALONE:
        overrides = [*case.few, *options.set, *ALONE[arm]]
        return of_sweep(sweeps.swept(case.experiment, "1", folder, overrides, options.limit, name=arm))
    size, overrides = arm.removesuffix(EAGER), [*options.set]
    if size != arm:
        overrides += ALONE["eager"]
    return of_sweep(sweeps.swept(case.experiment, size, folder, overrides, options.limit, name=arm))


def of_sweep(found: Swept) -> dict[str, Any]:
    """Return what is known of a sweep's command: its time as a whole, and its packs' by phase."""
    packs = found.pack_seconds
    busy = sum(sum(seconds.values()) for seconds in packs)
    after = None if found.last_written is None else found.command.ended - found.last_written
    completed = [r for r in found.records if r["status"] == "completed"]
    metrics = [r["quality"]["test"][r["quality"]["primary_metric"]] for r in completed]
    steps = [len(r["trace"]["loss"]) for r in completed]
    return {
        "subcommand": found.command.shown,
        "status": "completed" if completed and not found.command.error else "failed",
        "error": found.command.error or (None if completed else "no run completed"),
        "output": found.command.output if found.command.error else None,
        "wall_seconds": common.rounded(found.command.wall_seconds),
        "runs_timed": len(found.records),
        "statuses": {r["run_id"]: r["status"] for r in found.records},
        "pack_sizes": [len(members) for members in found.packs],
        "pack_seconds": packs,
        "start_seconds": None if after is None else common.rounded(found.command.wall_seconds - busy - after),
        "after_seconds": None if after is None else common.rounded(after),
        "steps": statistics.median(steps) if steps else None,
        "execution": sorted({(r["trace"] or {}).get("execution", "eager") for r in completed}),
        "metric": completed[0]["quality"]["primary_metric"] if completed else None,
        "test": {r["run_id"]: value for r, value in zip(completed, metrics, strict=True)},
    }


def _peer(case: Case, arm: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    out = folder / f"trainer-{case.experiment}-{arm}.jsonl"
    script = str((sweeps.PEERS / "trainer.py").relative_to(sweeps.ROOT))
    command = timed(
        [script, *case.peer, *PEERS[arm], "--out", str(out), *shlex.split(options.peer)], folder, options.limit
    )
    found = common.read([out]) if out.is_file() else []
    named = ("load", "set_up", "train", "evaluate", "test")
    packs = [{name: r["seconds"][name] for name in named} for r in found]
    if packs:
        packs[0]["load"] += found[0]["data_seconds"]  # reading and tokenizing: the first pack of a sweep does it too
    busy = sum(sum(seconds.values()) for seconds in packs)
    return {
        "subcommand": command.shown,
        "status": "completed" if found and not command.error else "failed",
        "error": command.error or (None if found else "no run completed"),
        "output": command.output if command.error else None,
        "wall_seconds": common.rounded(command.wall_seconds),
        "runs_timed": len(found),
        "pack_sizes": [1] * len(found),
        "pack_seconds": packs,
        "start_seconds": common.rounded(command.wall_seconds - busy),
        "after_seconds": 0.0,
        "steps": statistics.median(r["steps"] for r in found) if found else None,
        "execution": ["Trainer"],
        "precision": found[0]["precision"] if found else None,
        "metric": found[0]["metric"] if found else None,
        "test": {f"lr {r['learning_rate']:g}, seed {r['seed']}": r["test"] for r in found},
    }


def spent(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the seconds of the whole case by what they are spent on: those measured, and of the runs left out.

    A run left out counts with the mean of those after the first pack, which pays for what is done once. If there is no
    other, its loading is not counted again: most of that is reading and tokenizing.
    """
    left = max(0, record["runs"] - record["runs_timed"])
    later, runs = _later(record)
    if len(record["pack_seconds"]) == 1:
        later = [{name: value for name, value in later[0].items() if name not in SPENT["loading"]}]

    def over(packs: Sequence[Mapping[str, float]], phases: Sequence[str]) -> float:
        return sum(seconds.get(name, 0.0) for seconds in packs for name in phases)

    busy = sum(sum(seconds.values()) for seconds in record["pack_seconds"])
    return {
        **{
            what: over(record["pack_seconds"], names) + left * over(later, names) / runs
            for what, names in SPENT.items()
        },
        ONCE: record["wall_seconds"] - busy,
    }


def whole_seconds(record: Mapping[str, Any]) -> float:
    """Return the seconds of the whole case."""
    return sum(spent(record).values())


def step_seconds(record: Mapping[str, Any]) -> float | None:
    """Return the mean seconds a run and step, captures included."""
    seconds, runs = _later(record)
    return float(sum(phases["train"] for phases in seconds) / runs / record["steps"]) if record["steps"] else None


def _later(record: Mapping[str, Any]) -> tuple[Sequence[Mapping[str, float]], int]:
    """Return the seconds of the packs after the first, and their number of runs; of the first if it is the only one."""
    seconds, sizes = record["pack_seconds"], record["pack_sizes"]
    return (seconds[1:], sum(sizes[1:])) if len(sizes) > 1 else (seconds, sum(sizes))


def report(records: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of one call: its cases' arms, and how each compares with `Trainer` and with one at a time."""
    rows = []
    for record in records:
        name = f"{record['case']}: {_named(record)}"
        if record["status"] != "completed":
            rows.append((name, "failed", *["–"] * (4 + len(OTHERS) + len(SPENT))))
            continue
        parts, whole = spent(record), whole_seconds(record)
        rate = 3600 * record["runs"] / whole
        over = [_rate(records, record["case"], other) for other in OTHERS]
        step = step_seconds(record)
        rows.append(
            (
                name,
                f"{record['runs_timed']} of {record['runs']}",
                common.shown(record["wall_seconds"], 1),
                f"{rate:.0f}",
                *(common.shown(None if other is None else rate / other) for other in over),
                common.shown(None if step is None else 1000 * step),
                *(f"{100 * seconds / whole:.0f} %" for seconds in parts.values()),
            )
        )
    headers = ("arm", "runs timed", "seconds", "runs/h", *OTHERS.values(), "ms a run and step")
    return common.table((*headers, *SPENT, ONCE), rows)


def _named(record: Mapping[str, Any]) -> str:
    if record["arm"] in PEERS:
        return f"HF Trainer ({record.get('precision')})"
    how = "+".join(record["execution"]) if record.get("execution") else "?"
    if record["arm"] in ALONE:
        return f"alone ({how})"
    chosen = f": {max(record['pack_sizes'])}" if record["arm"] == "auto" and record["pack_sizes"] else ""
    return f"pack={record['arm'].removesuffix(EAGER)}{chosen} ({how})"


def _rate(records: Iterable[Mapping[str, Any]], case: str, arm: str) -> float | None:
    found = [r for r in records if r["case"] == case and r["arm"] == arm and r["status"] == "completed"]
    return 3600 * found[0]["runs"] / whole_seconds(found[0]) if found else None


def draw(records: Sequence[Mapping[str, Any]], path: Path) -> list[Path]:
    """Draw what a run of each arm takes, by what it is spent on, of calls with several; returns the files written."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    calls_done = [[r for r in call if r["status"] == "completed"] for call in calls_of(records)]
    done = [r for call in calls_done if len(call) > 1 for r in call] or [r for call in calls_done for r in call]
    figure, axes = pyplot.subplots(figsize=(6.2, 1.2 + 0.34 * len(done)), layout="constrained")
    calls = [(r["date"], r["command"]) for r in done]  # with a gap between them: arms of one call compare
    places = [i + 0.6 * len(dict.fromkeys(calls[: i + 1])) for i in range(len(done))]
    left = [0.0] * len(done)
    for what in (*SPENT, ONCE):
        width = [spent(r)[what] / r["runs"] for r in done]
        axes.barh(places, width, left=left, label=what, color="0.7" if what == ONCE else None)
        left = [a + b for a, b in zip(left, width, strict=True)]
    axes.set_yticks(places, [f"{r['case']}: {_named(r)}" for r in done])
    axes.invert_yaxis()
    axes.set_xlabel(f"seconds a run ({done[0]['device']})")
    figure.legend(loc="outside upper center", ncols=4, fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    written = [path.with_suffix(suffix) for suffix in (".png", ".svg")]
    for file in written:
        figure.savefig(file, dpi=200)
    pyplot.close(figure)
    return written


def calls_of(records: Iterable[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Return this script's records by the call that made them: ratios hold within one only."""
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for record in records:
        if record.get("comparison") == "packing-wall":
            found.setdefault((record["date"], record["command"]), []).append(record)
    return list(found.values())


def compare(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Run the arms of all cases and return a record of each, kept as soon as it is there."""
    origin = common.header("packing-wall", common.pick_device(options.device))
    records = []
    for name in options.cases:
        case = CASES[name]
        for arm in options.arms.split(",") if options.arms else case.arms:
            found = measure(case, arm, options, folder)
            record = {**origin, "case": name, "arm": arm, "runs": case.runs, **found}
            common.append(options.out, [record])
            records.append(record)
            common.say(f"{name}, {arm}: {found['wall_seconds']:.1f} s, {found['runs_timed']} runs, {found['status']}")
    return records


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="case", help=f"{', '.join(CASES)}; rte by default")
    parser.add_argument("--out", help="file that records are added to, one a line")
    parser.add_argument("--table", nargs="+", metavar="FILE", help="show the records of these files; time nothing")
    parser.add_argument("--figure", type=Path, help="where to draw, without suffix")
    parser.add_argument(
        "--arms",
        help=f"comma list of auto, sizes of packs (16; eager steps: 16{EAGER}), {', '.join((*PEERS, *ALONE))}; "
        "1: one run at a time",
    )
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings for every sweep")
    parser.add_argument("--peer", default="", metavar="ARGUMENTS", help="more arguments for trainer.py, in one word")
    parser.add_argument("--limit", type=float, help="seconds a command may take")
    parser.add_argument("--keep", type=Path, help="folder that the sweeps' records stay in; a temporary one by default")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="for the records' header")
    options = parser.parse_args(arguments)
    options.cases = options.cases or ["rte"]
    unknown = sorted(set(options.cases) - set(CASES))
    if unknown:
        parser.error(f"{unknown[0]}: expected some of {', '.join(CASES)}")
    for arm in options.arms.split(",") if options.arms else ():
        size = arm.removesuffix(EAGER)
        if arm not in (*PEERS, *ALONE) and size != "auto" and not (size.isdecimal() and int(size)):
            parser.error(f"--arms {arm}: expected a size, auto, either with {EAGER}, or {', '.join((*PEERS, *ALONE))}")
    return options


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Time (or read), print the table and return the records."""
    options = parse(arguments)
    if options.table:
        records = common.read(options.table)
    elif options.keep:
        records = compare(options, options.keep.resolve())
    else:
        with tempfile.TemporaryDirectory() as folder:
            records = compare(options, Path(folder))
    for call in calls_of(records):
        first = call[0]
        print(f"{first['device']}, torch {first['versions'].get('torch')}, {first['date'][:10]}")
        print(report(call))
    if options.figure and any(r["status"] == "completed" for r in records):
        print("\n".join(map(str, draw([r for call in calls_of(records) for r in call], options.figure))))
    return records


if __name__ == "__main__":
    main()
