"""What does packing gain at a given number of tokens a run and step, and where does it stop gaining?

    python experiments/packing/curve.py --out results/packing/curve.jsonl --figure results/packing/curve
    python experiments/packing/curve.py --tokens 256,1024,4096 --packs 1,4,16 --execution graphs,eager
    python experiments/packing/curve.py --table results/packing/curve.jsonl --figure results/packing/curve

LoRA on MiniLM-L6, texts of 128 tokens, as many as it takes; packs put together and stepped as `run`, `sweep` and
`profile` do. At each number of tokens all packs take turns in one process. The gain of a pack of n runs is n times the
time of a step alone over the time of its own step: 1 means that side by side is no better than one after another.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import sweeps  # noqa: F401  makes the other comparisons' modules known
import torch
from sweeps import common

from peftbench import registry
from peftbench.config import ModelConfig, build
from peftbench.errors import UserError
from peftbench.models.load import Backbone, load

WARMUP = 5
"""First steps of a contestant: two eager ones, the capture, and two more."""
NO_GAIN = 1.05
"""A gain below this counts as none: less than what two measurements of one step may differ by."""


def level(
    options: argparse.Namespace, base: Backbone, weights: str, execution: str, tokens: int
) -> list[dict[str, Any]]:
    """Time packs of all sizes at one number of tokens a run and step; returns a record of each."""
    from small import Arena, ours

    device = common.pick_device(options.device)
    batch = max(1, tokens // options.length)
    arena = Arena(base, options.model, weights, batch, min(options.length, tokens), 0.0, device)
    found: dict[int, dict[str, Any]] = {}
    with ExitStack() as stack:
        ready: dict[str, Any] = {}
        for runs in options.packs:
            if runs * tokens > options.most_tokens:
                continue
            with ExitStack() as own:
                try:
                    contestant = own.enter_context(ours(options.precision, execution, runs)(arena))
                    for _ in range(WARMUP):
                        contestant.step()
                    common.synchronize(device)
                    if contestant.execution() != execution:
                        raise RuntimeError(f"steps ran {contestant.execution()}")
                except Exception as error:  # noqa: BLE001  it is a result
                    found[runs] = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
                    continue
                ready[str(runs)] = contestant
                stack.enter_context(own.pop_all())
        steps = {name: contestant.step for name, contestant in ready.items()}
        samples = common.alternate(steps, device, rounds=options.rounds, calls=options.calls, warmup=1)
        for name, rounds in samples.items():
            found[int(name)] = {"step_seconds": common.summary(rounds)}
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    alone = found.get(1, {}).get("step_seconds", {}).get("p50")
    records = []
    for runs, values in sorted(found.items()):
        seconds = values.get("step_seconds", {}).get("p50")
        gain = common.rounded(runs * alone / seconds) if seconds and alone else None
        records.append({"tokens": tokens, "batch": batch, "execution": execution, "runs": runs, "gain": gain, **values})
    shown = ", ".join(f"{r['runs']}: {common.shown(r['gain'])}" for r in records)
    common.say(f"{execution}, {tokens} tokens a run and step: {shown}")
    return records


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time all levels and return their records."""
    device = common.pick_device(options.device)
    executions = options.execution.split(",") if options.execution else ["graphs" if device.type == "cuda" else "eager"]
    config = build(ModelConfig, {**registry.section("model", options.model), "weights": options.weights}, "model")
    base = load(config, "head", torch.float32, device)
    origin = {
        **common.header("packing-curve", device),
        "model": options.model,
        "weights": f"{options.weights} weights",
        "precision": options.precision,
        "length": options.length,
    }
    records: list[dict[str, Any]] = []
    for execution, tokens in itertools.product(executions, options.tokens):
        made = [{**origin, **record} for record in level(options, base, options.weights, execution, tokens)]
        common.append(options.out, made)
        records += made
    return records


def curves(records: Iterable[Mapping[str, Any]], execution: str) -> dict[int, list[tuple[int, float]]]:
    """Return pack size → (tokens a run and step, gain) in order, for what was measured."""
    found: dict[int, list[tuple[int, float]]] = {}
    for r in records:
        if r["execution"] == execution and r.get("gain") is not None and r["runs"] > 1:
            found.setdefault(r["runs"], []).append((r["tokens"], r["gain"]))
    return {runs: sorted(points) for runs, points in sorted(found.items())}


def falls_to_one(points: Sequence[tuple[int, float]], least: float = NO_GAIN) -> float | None:
    """Return the tokens a run and step from which on the gain stays below `least`; None where it does not get there.

    Between two measurements the logarithms of tokens and gain lie on a line.
    """
    last = next((i for i in range(len(points) - 1, -1, -1) if points[i][1] >= least), None)
    if last is None:
        return float(points[0][0]) if points else None
    if last == len(points) - 1:
        return None
    (t0, g0), (t1, g1) = points[last], points[last + 1]
    part = (math.log(g0) - math.log(least)) / (math.log(g0) - math.log(g1))
    return math.exp(math.log(t0) + part * (math.log(t1) - math.log(t0)))


def findings(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line a pack size: from where on packing gains nothing."""
    lines = []
    for execution in dict.fromkeys(r["execution"] for r in records):
        for runs, points in curves(records, execution).items():
            end = falls_to_one(points)
            tokens, gain = points[-1]
            best = max(points, key=lambda p: p[1])
            until = (
                f"{gain:.2f} at {tokens}, the most that was measured"
                if end is None
                else f"below {NO_GAIN} from about {end:.0f} tokens a run and step"
            )
            lines.append(f"{execution}, {runs} runs: {best[1]:.2f} at {best[0]}; {until}")
    return lines


def report(records: Sequence[Mapping[str, Any]]) -> str:
    """Return a table for each way of running steps: gain by tokens and pack size."""
    tables = []
    for execution in dict.fromkeys(r["execution"] for r in records):
        here = [r for r in records if r["execution"] == execution]
        sizes = sorted({r["runs"] for r in here})
        rows = []
        for tokens in sorted({r["tokens"] for r in here}):
            by_size = {r["runs"]: r for r in here if r["tokens"] == tokens}
            alone = by_size.get(1, {}).get("step_seconds", {}).get("p50")
            gains = (common.shown(by_size.get(size, {}).get("gain")) for size in sizes if size > 1)
            rows.append((str(tokens), common.shown(None if alone is None else 1000 * alone), *gains))
        headers = ("tokens a run and step", "ms alone", *(f"gain of {size}" for size in sizes if size > 1))
        tables.append(f"{execution}\n{common.table(headers, rows)}")
    return "\n".join(tables)


def draw(records: Sequence[Mapping[str, Any]], path: Path) -> list[Path]:
    """Draw gain against tokens, one panel a way of running steps; returns the files written."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    executions = list(dict.fromkeys(r["execution"] for r in records))
    figure, panels = pyplot.subplots(
        1, len(executions), figsize=(4.2 * len(executions) + 0.6, 3.4), sharey=True, squeeze=False, layout="constrained"
    )
    markers = itertools.cycle("osD^vP")
    drawn = sorted({r["runs"] for r in records if r["runs"] > 1})
    styles = {runs: {"marker": next(markers), "color": f"C{i}"} for i, runs in enumerate(drawn)}
    for panel, execution in zip(panels[0], executions, strict=True):
        for runs, points in curves(records, execution).items():
            panel.plot(*zip(*points, strict=True), label=f"{runs} runs", markersize=4, **styles[runs])
        panel.axhline(1.0, color="0.4", linewidth=0.8, linestyle="--")
        panel.set_xscale("log", base=2)
        panel.set_yscale("log", base=2)
        ticks = sorted({r["tokens"] for r in records})
        panel.set_xticks(ticks, [f"{t // 1024}k" if t >= 1024 else str(t) for t in ticks])
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        panel.set_xlabel("tokens a run and step")
        panel.set_title(f"{records[0]['model']}, {records[0]['precision']}, {execution}", fontsize=9)
    panels[0][0].set_ylabel("gain of a step over one after another")
    panels[0][-1].legend(fontsize=8)
    figure.text(0.995, 0.005, records[0]["device"], ha="right", va="bottom", fontsize=6, color="0.4")
    path.parent.mkdir(parents=True, exist_ok=True)
    written = [path.with_suffix(suffix) for suffix in (".png", ".svg")]
    for file in written:
        figure.savefig(file, dpi=200)
    pyplot.close(figure)
    return written


def _numbers(text: str) -> list[int]:
    return [int(value) for value in text.split(",")]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="file that records are added to, one a line")
    parser.add_argument("--figure", type=Path, help="where to draw, without suffix")
    parser.add_argument("--table", nargs="+", metavar="FILE", help="show the records of these files; measure nothing")
    parser.add_argument("--tokens", type=_numbers, default=[256, 512, 1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--packs", type=_numbers, default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--most-tokens", type=int, default=131072, help="packs with more tokens a step are left out")
    parser.add_argument("--length", type=int, default=128, help="tokens of a text")
    parser.add_argument("--model", default="minilm-l6", help="an encoder among conf/model/")
    parser.add_argument("--weights", choices=("pretrained", "random"), default="random", help="time is the same")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--execution", help="comma list of eager and graphs; graphs on a GPU, else eager")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each pack")
    parser.add_argument("--calls", type=int, default=5, help="timed steps a turn")
    options = parser.parse_args(arguments)
    if 1 not in options.packs:
        parser.error("--packs: expected 1 among them, since gain is taken against it")
    return options


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Measure (or read), print tables and findings, draw, and return the records."""
    options = parse(arguments)
    read = common.read(options.table) if options.table else measure(options)
    records = [r for r in read if r.get("comparison") == "packing-curve"]
    if not records:
        raise UserError("no records of packing-curve")
    print(f"{records[0]['device']}, {records[0]['model']} ({records[0]['weights']}), {records[0]['precision']}")
    print(report(records))
    print("\n".join(findings(records)))
    if options.figure:
        print("\n".join(map(str, draw(records, options.figure))))
    return records


if __name__ == "__main__":
    main()
