"""Figures of the paper, in vectors, at the page's width."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from peftbench.analysis import plots
from peftbench.analysis.comparisons import Comparison, Panel, Verdict
from peftbench.analysis.frame import COMPONENTS, number, over_tasks, rows_of
from peftbench.analysis.pareto import front
from peftbench.analysis.plots import COLOURS, GREY, INK, PAGE_INCHES, PARTS, RC
from peftbench.paper import packing, peers
from peftbench.paper.names import contestant, method, model
from peftbench.paper.run_sheets import TASKS
from peftbench.paper.runs import Study, ends
from peftbench.paper.sources import Record

WIDE = 0.155
"""Inches a method takes in a figure of intervals, with fewer than 12 of them; more take less."""


def save(figure: Figure, path: Path) -> None:
    """Write a pdf without dates: the same records give the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(RC):
        figure.savefig(path, metadata={"CreationDate": None})


def of_study(study: Study) -> dict[str, Callable[[], Figure]]:
    """Return what draws the figures of a folder of runs: gaps, quality against parameters, learning rates tried."""
    found: dict[str, Callable[[], Figure]] = {f"{study.name}-pareto-tasks": lambda: _tasks(study)}
    if any(one.gaps for _, one in study.parts):
        found[f"{study.name}-gaps"] = lambda: gaps(study)
    if study.suite is not None:
        found[f"{study.name}-pareto"] = lambda: pareto(study)
    if len(study.table) > len(study.chosen):
        found[f"{study.name}-rates"] = lambda: next(plots.learning_rate_plots(named(study.table))).figure
    return found


def _tasks(study: Study) -> Figure:
    every = plots.pareto_plots(named(study.chosen))
    return next(plot.figure for plot in every if plot.name == "pareto-parameters")


def pareto(study: Study) -> Figure:
    """Draw the mean over tasks against adapter parameters across the page, a name beside each point."""
    rows = rows_of(over_tasks(named(study.chosen)))
    rows = [r for r in rows if number(r["test_mean"]) is not None and number(r["adapter_parameters"]) is not None]
    styles = plots.Styles(named(study.chosen))
    scale = plots.Scale([float(r["adapter_parameters"]) for r in rows], "count", True)
    points = [(scale(float(r["adapter_parameters"])), float(r["test_mean"])) for r in rows]
    better = bool(rows[0]["greater_is_better"])
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(PAGE_INCHES, 3.9), layout="constrained")
        FigureCanvasAgg(figure)
        ax = figure.subplots()
        scale.apply(ax, "adapter parameters")
        best = front([r["test_mean"] for r in rows], [r["adapter_parameters"] for r in rows], better)
        line = [points[i] for i in best.members]
        line.append((ax.get_xlim()[1], line[-1][1]))
        ax.step(*zip(*line, strict=True), where="post", color=plots.FAINT, linewidth=1.4, zorder=2, gid="front")
        for row, (x, y) in zip(rows, points, strict=True):
            style = styles.marker(row, 4.2)
            if row["is_reference"]:
                ax.axhline(y, color=GREY, linewidth=0.7, linestyle=(0, (4, 3)), zorder=1, gid="reference")
            ax.plot(
                [x, x], [y - (row["test_std"] or 0), y + (row["test_std"] or 0)], color=style["color"], linewidth=0.7
            )
            ax.plot(x, y, zorder=5, **style)
        ax.set_ylabel(f"test metric, mean of {rows[0]['tasks']} tasks")
        ax.margins(y=0.06)
        figure.draw_without_rendering()
        figure.set_layout_engine(None)
        if not plots.place_labels(ax, points, [str(r["variant"]) for r in rows], size=6.0):
            labels = [str(r["variant"]) for r in rows]
            handles = [Line2D([], [], **styles.marker(r, 4.2)) for r in rows]
            ax.legend(handles, labels, ncols=3, fontsize=5.5, loc="lower right")
    return figure


def named(table: pd.DataFrame) -> pd.DataFrame:
    """Return configurations with their variants as the paper writes them."""
    tasks = table["task"].map(lambda task: TASKS.get(task, task))
    return table.assign(variant=table["variant"].map(method), task=tasks, model=table["model"].map(model))


def gaps(study: Study) -> Figure:
    """Draw each method's difference from full fine-tuning with its interval, a panel a task; filled: told apart."""
    parts = [(title(one), one) for _, one in study.parts if one.gaps]
    order = [str(row["variant"]) for row in parts[0][1].rows if not row["is_reference"]]
    many = len(order) > 12
    columns = len(parts) if many else min(len(parts), 3)
    lines = -(-len(parts) // columns)
    height = lines * (0.55 + len(order) * (0.125 if many else WIDE)) + 0.1
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(PAGE_INCHES, height), layout="constrained")
        FigureCanvasAgg(figure)
        grid = list(figure.subplots(lines, columns, squeeze=False, sharey=True).flat)
        for unused in grid[len(parts) :]:
            unused.remove()
        for ax, (name, one) in zip(grid, parts, strict=False):
            _gap_panel(ax, one, order)
            ax.set_title(name)
        for ax in grid[max(0, len(parts) - columns) : len(parts)]:
            ax.set_xlabel("gap to full fine-tuning" if columns < 4 else "gap to full")
        grid[0].set_yticks(range(len(order)), [method(variant) for variant in order], fontsize=6 if many else 7)
        grid[0].set_ylim(len(order) - 0.4, -0.6)
    return figure


def title(comparison: Comparison) -> str:
    """Return what a panel is headed with."""
    if isinstance(comparison, Panel):
        return TASKS.get(str(comparison.rows[0]["task"]), comparison.title)
    return f"mean of {len(getattr(comparison, 'panels', []))} tasks"


def _gap_panel(axes: Axes, comparison: Comparison, order: Sequence[str]) -> None:
    by_variant = {str(comparison.rows[i]["variant"]): v for i, v in comparison.gaps.items()}
    axes.axvline(0, color=GREY, linewidth=0.7, linestyle=(0, (4, 3)), zorder=1)
    for place, variant in enumerate(order):
        verdict = by_variant.get(variant)
        if verdict is None:
            continue
        between = ends(verdict)
        colour = COLOURS[1] if verdict.apart else COLOURS[0]
        if between is not None:
            axes.plot(between, [place, place], color=colour, linewidth=1.0, zorder=3)
        face = colour if verdict.apart else "white"
        axes.plot(verdict.estimate.value, place, "o", color=colour, markersize=3.4, markerfacecolor=face, zorder=4)
    axes.set_xlim(*_limits(list(by_variant.values())))
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", color="#EEEEEE", linewidth=0.5, zorder=0)


def _limits(verdicts: Sequence[Verdict]) -> tuple[float, float]:
    """Return what shows all values and intervals, but those many times as long as most: they leave the frame."""
    found = [between for v in verdicts if (between := ends(v)) is not None]
    usual = 4 * float(np.median([high - low for low, high in found])) if found else 0.0
    shown = [end for low, high in found if high - low <= usual for end in (low, high)]
    every = [0.0, *(v.estimate.value for v in verdicts), *shown]
    room = 0.06 * (max(every) - min(every)) or 1.0
    return min(every) - room, max(every) + room


def steps(records: Sequence[Record]) -> Figure:
    """Draw the time and the peak memory of a step, a bar a contestant."""
    every = peers.calls(records)
    names = list(dict.fromkeys(str(r["contestant"]) for call in every for r in call))
    rows = [(name, peers.representative(every, name)) for name in names]
    rows.sort(key=lambda row: -peers.seconds(row[1]))
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(PAGE_INCHES, 0.62 + 0.165 * len(rows)), layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2, sharey=True)
        for place, (name, one) in enumerate(rows):
            colour = COLOURS[0] if name.startswith("ours-") else "#AAAAAA"
            left.barh(place, 1000 * peers.seconds(one), height=0.7, color=colour)
            low, high = (1000 * one["step_seconds"][p] for p in ("p10", "p90"))
            left.plot([low, high], [place, place], color=INK, linewidth=0.9)
            if one.get("peak_bytes"):
                right.barh(place, one["peak_bytes"] / peers.GIB, height=0.7, color=colour)
        left.set_yticks(range(len(rows)), [contestant(name) for name, _ in rows])
        left.set_ylim(len(rows) - 0.4, -0.6)
        left.set_xlabel("ms a step, median (lines: 10th to 90th percentile)")
        right.set_xlabel("peak memory of a step (GiB)")
        for ax in (left, right):
            ax.tick_params(axis="y", length=0)
    return figure


def components(records: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw measured memory by component with a tick at the predicted peak, a panel a model."""
    models = list(dict.fromkeys(r["model"] for r in records))
    models.sort(key=lambda name: max(r["measured"]["peak"] for r in records if r["model"] == name))
    counts = [sum(r["model"] == name for r in records) for name in models]
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(PAGE_INCHES, 0.85 + 0.17 * max(counts)), layout="constrained")
        FigureCanvasAgg(figure)
        for ax, name in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
            rows = sorted((r for r in records if r["model"] == name), key=lambda r: r["measured"]["peak"])
            factor, unit = (2**30, "GiB") if rows[-1]["measured"]["peak"] > 2**30 else (2**20, "MiB")
            for place, row in enumerate(rows):
                left = 0.0
                for part in COMPONENTS:
                    width = (row["measured"].get(part) or 0) / factor
                    ax.barh(place, width, left=left, height=0.7, color=PARTS[part], linewidth=0)
                    left += width
                predicted = row["predicted"]["peak"] / factor
                ax.plot([predicted] * 2, [place - 0.42, place + 0.42], color=INK, linewidth=1.2)
            ax.set_yticks(range(len(rows)), [method(r["method"]) for r in rows])
            ax.set_ylim(max(counts) - 0.4, -0.6)
            shape = rows[0]["shape"]
            ax.set_title(
                f"{model(name)}, {shape['batch_size']} × {shape['length']}, {rows[0]['precision']}", fontsize=7
            )
            ax.set_xlabel(f"peak memory ({unit})")
            ax.tick_params(axis="y", length=0)
        handles = [Rectangle((0, 0), 1, 1, facecolor=PARTS[part]) for part in COMPONENTS]
        ticks = [Line2D([], [], color=INK, marker="|", linestyle="none", markersize=7)]
        figure.legend([*handles, *ticks], [*COMPONENTS, "predicted peak"], loc="outside lower center", ncols=7)
    return figure


def gains(records: Sequence[Record]) -> Figure:
    """Draw the gain of a step against tokens a run and step, a curve a number of runs."""
    shown = [r for r in records if r.get("comparison") == "packing-curve"]
    executions = list(dict.fromkeys(r["execution"] for r in shown))
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(PAGE_INCHES * (0.62 if len(executions) == 1 else 1), 2.7), layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(1, len(executions), squeeze=False, sharey=True)[0]
        for ax, execution in zip(grid, executions, strict=True):
            for k, (runs, points) in enumerate(packing.curves(shown, execution).items()):
                style = {"color": COLOURS[k % len(COLOURS)], "marker": plots.MARKERS[k % len(plots.MARKERS)]}
                ax.plot(*zip(*points, strict=True), label=f"{runs} runs", markersize=3.5, **style)
            ax.axhline(1, color=GREY, linewidth=0.7, linestyle=(0, (4, 3)))
            ax.set_xscale("log", base=2)
            ax.set_yscale("log", base=2)
            ticks = sorted({r["tokens"] for r in shown})
            ax.set_xticks(ticks, [f"{t // 1024}k" if t >= 1024 else str(t) for t in ticks])
            ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            ax.set_xlabel("tokens a run and step")
            ax.set_title(f"{model(shown[0]['model'])}, {shown[0]['precision']}, {execution}")
        grid[0].set_ylabel("gain over one after another")
        grid[-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def wall(records: Sequence[Record]) -> Figure:
    """Draw what a run of each arm takes, by what the time goes to."""
    bars: list[tuple[str, Record]] = []
    for case, found in packing.arms(records).items():
        label = packing.SHORT.get(case, case)
        bars += [(f"{label}: {packing.named(arm, found[arm])}", found[arm]) for arm in packing.ordered(found)]
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(PAGE_INCHES, 0.8 + 0.19 * len(bars)), layout="constrained")
        FigureCanvasAgg(figure)
        ax = figure.subplots()
        left = [0.0] * len(bars)
        for what, colour in zip((*packing.SPENT, packing.ONCE), (*COLOURS[:3], "#AAAAAA"), strict=True):
            width = [packing.spent(r)[what] / r["runs"] for _, r in bars]
            ax.barh(range(len(bars)), width, left=left, label=what, color=colour, height=0.7)
            left = [a + b for a, b in zip(left, width, strict=True)]
        ax.set_yticks(range(len(bars)), [name for name, _ in bars])
        ax.set_ylim(len(bars) - 0.4, -0.6)
        ax.tick_params(axis="y", length=0)
        ax.set_xlabel("seconds a run")
        figure.legend(loc="outside lower center", ncols=4)
    return figure
