"""Figures of configurations: Pareto plots against three costs, memory by component, rank and learning-rate curves.

Built on `matplotlib.figure.Figure` alone: no pyplot, no global state, the same bytes for the same records. Colours are
Okabe and Ito's (told apart by colour-blind readers), and no two methods differ by colour only.
"""

import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator, NullLocator
from numpy.typing import ArrayLike, NDArray

from peftbench.analysis.frame import (
    COMPONENTS,
    PANEL,
    REFERENCE,
    number,
    over_tasks,
    rows_of,
    selected,
    task_title,
    task_titles,
)
from peftbench.analysis.pareto import front
from peftbench.analysis.tables import accounted, memory_title, metric_title, slug

Row = Mapping[Any, Any]
Array = NDArray[np.float64]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h")
FILLS = ("full", "none", "left", "top", "right", "bottom")
INK, GREY, FAINT = "#222222", "#777777", "#BBBBBB"
COLUMN_INCHES, PAGE_INCHES = 3.5, 7.0
FORMATS = ("png", "pdf", "svg")
MOST_LABELS = 18  # more points than this in one panel are named in a legend
MOST_LEGEND = 36
MOST_BARS = 48
PARTS = dict(zip(COMPONENTS, ("#777777", "#0072B2", "#D55E00", "#E69F00", "#56B4E9", "#DDDDDD"), strict=True))
RC: Any = {  # matplotlib types the keys as literals
    "font.family": "DejaVu Sans",
    "font.size": 7.5,
    "axes.titlesize": 8,
    "axes.labelsize": 7.5,
    "axes.linewidth": 0.6,
    "axes.edgecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.fontsize": 6.5,
    "legend.frameon": False,
    "lines.linewidth": 1.0,
    "pdf.fonttype": 42,
    "svg.hashsalt": "peftbench",
    "figure.dpi": 100,
}


@dataclass(frozen=True)
class Plot:
    """A figure, the stem of its files, and a caption that says what is drawn and what is left out."""

    name: str
    figure: Figure
    caption: str


@dataclass(frozen=True)
class Cost:
    """A cost axis: the column it reads, its files' stem, how it is named, and `unit` count | seconds | bytes."""

    column: str
    stem: str
    title: str
    unit: str
    always_log: bool = False


COSTS = (
    Cost("adapter_parameters", "parameters", "adapter parameters", "count", always_log=True),
    Cost("step_seconds_p50", "step-time", "training step, median", "seconds"),
    Cost("memory_peak_bytes", "memory", "peak memory", "bytes"),
)
UNITS: dict[str, tuple[tuple[float, str], ...]] = {
    "count": ((1e9, "B"), (1e6, "M"), (1e3, "k"), (1.0, "")),
    "seconds": ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")),
    "bytes": ((1024.0**3, "GiB"), (1024.0**2, "MiB"), (1024.0, "KiB"), (1.0, "B")),
}


def save(plot: Plot, folder: Path) -> list[Path]:
    """Write png (200 dpi), pdf and svg without dates; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for extension in FORMATS:
        path = folder / f"{plot.name}.{extension}"
        metadata = {"png": {"Software": None}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}[extension]
        with matplotlib.rc_context(RC):
            plot.figure.savefig(path, dpi=200, metadata=metadata)
        paths.append(path)
    return paths


# -- axes --------------------------------------------------------------------------------------------------------------


class Scale:
    """Positions and ticks of one cost axis.

    Logarithmic where the positive values span more than a factor of eight (parameters: always), else linear. On a
    logarithmic axis zero has a place of its own, left of a break mark and half a decade below the smallest value.
    """

    def __init__(self, values: Sequence[float], unit: str, always_log: bool = False):
        positive = [v for v in values if v > 0]
        self.has_zero = any(v == 0 for v in values)
        low, high = (min(positive), max(positive)) if positive else (1.0, 10.0)
        self.log = always_log or high / low > 8
        self.zero = math.log10(low) - max(0.5, 0.16 * math.log10(high / low)) if self.log else 0.0
        self.unit, self.low, self.high = unit, low, high
        # A linear axis has one unit, named in its title; counts and logarithmic axes carry it in the tick labels.
        self.factor, self.suffix = _unit_of(high, unit)

    def __call__(self, value: float) -> float:
        """Position of a value in axis units (decades when logarithmic)."""
        if not self.log:
            return value / self.factor
        return math.log10(value) if value > 0 else self.zero

    def apply(self, axes: Axes, title: str) -> None:
        """Set limits, ticks, labels and the break mark."""
        if not self.log:
            axes.set_xlabel(_with_unit(title, self.suffix))
            low, high = self.low / self.factor, self.high / self.factor
            pad = 0.12 * (high - low) if high > low else 0.1 * high
            axes.set_xlim(0.0 if self.has_zero else low - pad, high + pad)
            axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
            return
        axes.set_xlabel(title)
        low, high = math.log10(self.low), math.log10(self.high)
        pad = max(0.06 * (high - (self.zero if self.has_zero else low)), 0.15)
        ticks = [t for t in log_ticks(self.low, self.high) if low - pad <= math.log10(t) <= high + pad]
        places = [math.log10(t) for t in ticks]
        labels = [_tick(t, self.unit) for t in ticks]
        left = low
        if self.has_zero:
            kept = [(p, text) for p, text in zip(places, labels, strict=True) if p >= low - 0.3 * (low - self.zero)]
            places, labels = [self.zero] + [p for p, _ in kept], ["0"] + [text for _, text in kept]
            left = self.zero
            middle = (self.zero + low) / 2
            axes.text(
                middle,
                0.0,
                "//",
                transform=axes.get_xaxis_transform(),
                ha="center",
                va="center",
                fontsize=7,
                color=INK,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.4},
                clip_on=False,
                zorder=9,
            )
        axes.set_xlim(left - pad, high + pad)
        axes.xaxis.set_major_locator(FixedLocator(places))
        axes.xaxis.set_major_formatter(FixedFormatter(labels))
        axes.xaxis.set_minor_locator(NullLocator())


def log_ticks(low: float, high: float) -> list[float]:
    """Three to six round values that cover [low, high]: decades (thinned when many), or 1-2-5 steps within a few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    decades = math.log10(high / low) if high > low else 0.0
    if decades > 1.7:
        step = max(1, math.ceil(decades / 5))
        return [10.0**e for e in range(first, last + 1, step)]
    steps = (1, 2, 5) if decades > 0.6 else (1, 1.5, 2, 3, 4, 5, 6, 8)
    return [m * 10.0**e for e in range(first - 1, last + 1) for m in steps]


def _unit_of(value: float, unit: str) -> tuple[float, str]:
    # Rounded so that 0.999... of a unit, as floating point has it, still counts as the unit.
    return next(((f, s) for f, s in UNITS[unit] if value >= f * 0.999), UNITS[unit][-1])


def _with_unit(title: str, suffix: str) -> str:
    if not suffix:
        return title
    return f"{title[:-1]}, {suffix})" if title.endswith(")") else f"{title} ({suffix})"


def _tick(value: float, unit: str) -> str:
    factor, suffix = _unit_of(value, unit)
    return f"{value / factor:.3g}{'' if unit == 'count' else ' '}{suffix}".strip()


# -- style of methods --------------------------------------------------------------------------------------------------


class Styles:
    """Colour and marker a method, fill a variant; the same in every figure of a folder."""

    def __init__(self, table: pd.DataFrame):
        methods = sorted(set(table["method"]) - {REFERENCE})
        self.method = {m: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i, m in enumerate(methods)}
        self.fill: dict[str, str] = {}
        for _, group in table.groupby("method", sort=False):
            for i, variant in enumerate(dict.fromkeys(group["variant"])):
                self.fill[variant] = FILLS[i % len(FILLS)]

    def marker(self, row: Row, size: float = 5.0) -> dict[str, Any]:
        """Keyword arguments of `Axes.plot` for one point."""
        if row["method"] == REFERENCE:
            return {
                "marker": "*",
                "markersize": size * 2.0,
                "color": INK,
                "markerfacecolor": INK,
                "linestyle": "none",
                "markeredgecolor": "white",
                "markeredgewidth": 0.5,
            }
        colour, marker = self.method[row["method"]]
        return {
            "marker": marker,
            "markersize": size,
            "color": colour,
            "fillstyle": self.fill[row["variant"]],
            "markerfacecoloralt": "white",
            "markeredgecolor": colour,
            "markeredgewidth": 0.9,
            "linestyle": "none",
        }

    def line(self, method: str, index: int) -> dict[str, Any]:
        """Keyword arguments for the curve of one variant."""
        colour, marker = self.method.get(method, (INK, "*"))
        return {
            "color": colour,
            "marker": marker,
            "markersize": 4,
            "linestyle": ("-", "--", ":", "-.")[index % 4],
            "fillstyle": FILLS[index % len(FILLS)],
            "markerfacecoloralt": "white",
        }


# -- labels ------------------------------------------------------------------------------------------------------------


def place_labels(axes: Axes, points: Sequence[tuple[float, float]], texts: Sequence[str], size: float = 6.3) -> bool:
    """Write each text beside its point so that no text meets a text, a marker, an error bar or the frame.

    Greedy over sixteen directions and six distances, most crowded points first, then two rounds of improvement.
    Distances are in points, so the places hold at any resolution; the layout of the figure must be final. A text that
    had to go far gets a leader line. Returns False, drawing nothing, where some overlap remains.
    """
    figure = axes.figure
    canvas = FigureCanvasAgg(figure)  # type: ignore[arg-type]
    renderer = canvas.get_renderer()
    pixels = figure.dpi / 72
    centres = axes.transData.transform(np.asarray(points, dtype=float))
    frame = axes.get_window_extent(renderer)
    room = np.array([[frame.x0 + 1, frame.y0 + 2 * pixels, frame.x1, frame.y1 + 3 * pixels]])
    blocks = [(x - 3.4 * pixels, y - 3.4 * pixels, x + 3.4 * pixels, y + 3.4 * pixels) for x, y in centres]
    for container in axes.containers:
        for bars in container[2]:  # type: ignore[index]
            for segment in bars.get_segments():
                (x0, y0), (x1, y1) = axes.transData.transform(segment)
                blocks.append((min(x0, x1) - 2 * pixels, min(y0, y1), max(x0, x1) + 2 * pixels, max(y0, y1)))
    lines = [box for line in axes.lines if line.get_gid() in ("reference", "front") for box in _segments(line, pixels)]
    artists = [axes.text(0, 0, text, fontsize=size, color=INK) for text in texts]
    shapes = [(b.width + 1.5 * pixels, b.height * 0.92) for b in (a.get_window_extent(renderer) for a in artists)]
    for artist in artists:
        artist.remove()

    # Of each text its places [96, 4], what each one meets that does not move [96], and its price but for other texts.
    distances, directions = zip(*itertools.product((4.5, 7.0, 11.0, 16.0, 23.0, 32.0), range(16)), strict=True)
    distance, angle = np.array(distances), np.array(directions) * math.pi / 8
    dx, dy = np.cos(angle), np.sin(angle)
    boxes, met, prices = [], [], []
    for (x, y), (w, h) in zip(centres, shapes, strict=True):
        # The box's nearest edge or corner, not its centre, keeps the distance.
        left = x + dx * distance * pixels + (dx - 1) * w / 2
        bottom = y + dy * distance * pixels + (dy - 1) * h / 2
        places = np.column_stack([left, bottom, left + w, bottom + h])
        boxes.append(places)
        # Both areas by the same formula: within the frame the difference is 0 to the last bit, and ties stay ties.
        outside = (places[:, 2:] - places[:, :2]).prod(axis=1) - _overlaps(places, room)[:, 0]
        met.append(outside + _overlaps(places, blocks).sum(axis=1))
        crossed = 6.0 * (_overlaps(places, lines) > 0).sum(axis=1)
        prices.append(50 * met[-1] + distance + 0.5 * (dy < 0) + 0.3 * (dx < 0) + crossed)

    placed: dict[int, int] = {}

    def others(i: int) -> Array:
        return _overlaps(boxes[i], [boxes[j][place] for j, place in placed.items() if j != i]).sum(axis=1)

    crowd = [sum(math.dist(a, b) < 45 * pixels for b in centres) for a in centres]
    order = sorted(range(len(texts)), key=lambda i: (-crowd[i], i))
    for _ in range(3):
        before = dict(placed)
        for i in order:
            placed[i] = int((prices[i] + 50 * others(i)).argmin())
        if before == placed:
            break
    if any(met[i][place] + others(i)[place] > 2.0 * pixels**2 for i, place in placed.items()):
        return False
    for i, place in placed.items():
        (x, y), (left, bottom, _, _) = centres[i], boxes[i][place]
        axes.annotate(
            texts[i],
            points[i],
            xytext=((left - x) / pixels + 0.75, (bottom - y) / pixels),
            va="bottom",
            textcoords="offset points",
            fontsize=size,
            color=INK,
            zorder=8,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.4, "shrinkA": 0, "shrinkB": 3}
            if distance[place] > 12
            else None,
        )
    return True


def _segments(line: Line2D, width: float) -> list[tuple[float, float, float, float]]:
    """Boxes around the straight pieces of a drawn line, in pixels (a step line's pieces are along the axes)."""
    path = line.get_transform().transform_path(line.get_path())
    corners = np.asarray(path.vertices, dtype=float)
    if line.get_drawstyle() == "steps-post":
        bends = [(b[0], a[1]) for a, b in pairwise(corners)]
        corners = np.array([p for pair in zip(corners, [*bends, corners[-1]], strict=True) for p in pair])
    pieces = pairwise(corners)
    return [
        (min(a[0], b[0]) - width, min(a[1], b[1]) - width, max(a[0], b[0]) + width, max(a[1], b[1]) + width)
        for a, b in pieces
    ]


def _overlaps(first: ArrayLike, second: ArrayLike) -> Array:
    """Areas that boxes [A, 4] and [B, 4], each (left, bottom, right, top), have in common [A, B]."""
    a, b = np.reshape(first, (-1, 1, 4)), np.reshape(second, (1, -1, 4))
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    return np.where((sides > 0).all(axis=-1), sides.prod(axis=-1), 0.0)


# -- panels ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Panel:
    """Rows that may be compared, and the title that tells this panel from its neighbours."""

    title: str
    rows: list[dict[Any, Any]]


def figure_groups(table: pd.DataFrame) -> Iterator[tuple[str, str, list[Panel]]]:
    """(file stem, title, panels): a figure a model with its tasks side by side; models side by side on one task."""
    tasks = task_titles(table)
    several = [c for c in ("model", "device_kind") if table[c].nunique() > 1]
    panels: dict[tuple[str, ...], list[Panel]] = {}
    for _, group in table.groupby(PANEL, sort=True):
        rows = rows_of(group)
        task, hosts = task_title(rows[0]), tuple(str(rows[0][c]) for c in several)
        if len(tasks) == 1:
            panels.setdefault((), []).append(Panel(", ".join(hosts) or f"{task}, {rows[0]['model']}", rows))
        else:
            panels.setdefault(hosts, []).append(Panel(task, rows))
    for hosts, members in panels.items():
        if len(tasks) == 1:
            yield "", tasks[0] if len(members) > 1 else "", members
        else:
            yield "-".join(map(slug, hosts)), ", ".join(hosts) or str(members[0].rows[0]["model"]), members


def _grid(count: int, legend_rows: int) -> tuple[Figure, list[Axes]]:
    columns = min(count, 3)
    rows = math.ceil(count / columns)
    width = COLUMN_INCHES if count == 1 else PAGE_INCHES
    height = (2.7 if count == 1 else 1.95 * rows + 0.25) + 0.14 * legend_rows
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False)
    axes = list(grid.flat)
    for unused in axes[count:]:
        unused.remove()
    return figure, axes[:count]


def _share_titles(axes: Sequence[Axes]) -> None:
    """Where all panels have the same axis title, only the outer ones keep it."""
    columns = min(len(axes), 3)
    if len({ax.get_ylabel() for ax in axes}) == 1:
        for i, ax in enumerate(axes):
            ax.set_ylabel(ax.get_ylabel() if i % columns == 0 else "")
    if len({ax.get_xlabel() for ax in axes}) == 1:
        for i, ax in enumerate(axes):
            ax.set_xlabel(ax.get_xlabel() if i + columns >= len(axes) else "")


def _legend(figure: Figure, handles: Sequence[Any], labels: Sequence[str]) -> None:
    columns = _legend_columns(labels, figure.get_figwidth())
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=columns,
        handletextpad=0.4,
        columnspacing=1.2,
        handler_map={tuple: HandlerTuple(ndivide=None)},
    )


def _legend_columns(labels: Sequence[str], inches: float) -> int:
    # 0.052 inch a character at 6.5 points, and 0.35 for the handle and the gap.
    widest = max(len(label) for label in labels) * 0.052 + 0.35
    return max(1, min(len(labels), int(inches / widest)))


def _legend_rows(labels: Sequence[str], count: int) -> int:
    if not labels:
        return 0
    return math.ceil(len(labels) / _legend_columns(labels, COLUMN_INCHES if count == 1 else PAGE_INCHES))


def _freeze(figure: Figure) -> None:
    """Run the layout once and keep it, so that what is placed by hand stays where it is."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a layout that collapsed is a bug, not a message
        figure.draw_without_rendering()
    figure.set_layout_engine("none")
    figure.set_layout_engine(None)  # "none" alone leaves a stand-in, for which each file would be drawn twice


def _quality_title(rows: Sequence[Row]) -> str:
    return f"test {metric_title(next((r['primary_metric'] for r in rows if r['primary_metric']), None))}"


# -- Pareto ------------------------------------------------------------------------------------------------------------


def pareto_plots(chosen: pd.DataFrame) -> Iterator[Plot]:
    """Quality against each cost, of `selected` rows: tasks side by side, and their mean where there are several."""
    styles = Styles(chosen)
    groups, average = list(figure_groups(chosen)), over_tasks(chosen)
    for cost in COSTS:
        for stem, title, panels in groups:
            plot = pareto_figure(panels, cost, styles, "-".join(filter(None, ["pareto", cost.stem, stem])), title)
            if plot is not None:
                yield plot
        for (model, device), group in average.groupby(["model", "device_kind"], sort=True):
            hosts = [str(v) for v, c in ((model, "model"), (device, "device_kind")) if chosen[c].nunique() > 1]
            panel = Panel(", ".join(hosts) or str(model), rows_of(group))
            name = "-".join(["pareto", cost.stem, "mean", *map(slug, hosts)])
            metric = f"test metric, mean of {group['tasks'].iloc[0]} tasks"
            plot = pareto_figure([panel], cost, styles, name, "", metric)
            if plot is not None:
                yield plot


def pareto_figure(
    panels: Sequence[Panel], cost: Cost, styles: Styles, name: str, title: str = "", metric: str | None = None
) -> Plot | None:
    """One panel at column width with a name beside each point, or several at page width with a shared legend.

    None where no panel has a point with both a quality and a cost.
    """
    drawable = [(panel, [r for r in panel.rows if _drawn(r, cost)]) for panel in panels]
    drawn = [(panel, rows) for panel, rows in drawable if rows]
    if not drawn:
        return None
    direct = len(drawn) == 1 and len(drawn[0][1]) <= MOST_LABELS
    plot = _pareto(drawn, cost, styles, name, title, metric, direct)
    if plot is None:  # the names did not fit beside their points
        plot = _pareto(drawn, cost, styles, name, title, metric, False)
    return plot


def _drawn(row: Row, cost: Cost) -> bool:
    return number(row["test_mean"]) is not None and number(row[cost.column]) is not None


def _pareto(
    drawn: Sequence[tuple[Panel, list[dict[Any, Any]]]],
    cost: Cost,
    styles: Styles,
    name: str,
    title: str,
    metric: str | None,
    direct: bool,
) -> Plot | None:
    variants: dict[str, dict[Any, Any]] = {}
    for _, rows in drawn:
        for row in sorted(
            rows, key=lambda r: (r["method"] == REFERENCE, r["method"], _or_zero(r["rank"]), r["variant"])
        ):
            variants.setdefault(row["variant"], row)
    if len(variants) > MOST_LEGEND:  # one entry a method: its variants share colour and marker
        by_method: dict[str, dict[Any, Any]] = {}
        for row in variants.values():
            by_method.setdefault(row["method"], row)
        entries = by_method
    else:
        entries = variants
    labels = [] if direct else list(entries)
    with matplotlib.rc_context(RC):
        figure, axes = _grid(len(drawn), _legend_rows(labels, len(drawn)))
        for ax, (panel, rows) in zip(axes, drawn, strict=True):
            _draw_pareto(ax, rows, cost, styles)
            ax.set_title(panel.title)
            ax.set_ylabel(metric or _quality_title(rows))
        _share_titles(axes)
        if title:
            figure.suptitle(title, fontsize=8.5)
        if labels:
            handles = [Line2D([], [], **styles.marker(entries[label])) for label in labels]
            _legend(figure, handles, labels)
        _freeze(figure)
        if direct:
            _, rows = drawn[0]
            scale = _scale(rows, cost)
            points = [(scale(row[cost.column]), row["test_mean"]) for row in rows]
            names = ["full" if row["method"] == REFERENCE and row["is_reference"] else row["variant"] for row in rows]
            if not place_labels(axes[0], points, names):
                return None
    return Plot(name, figure, _pareto_caption(drawn, cost))


def _or_zero(value: Any) -> float:
    return number(value) or 0.0


def _scale(rows: Sequence[Row], cost: Cost) -> Scale:
    return Scale([float(r[cost.column]) for r in rows], cost.unit, cost.always_log)


def _draw_pareto(axes: Axes, rows: Sequence[Row], cost: Cost, styles: Styles) -> None:
    scale = _scale(rows, cost)
    title = memory_title(rows[0]["memory_kind"]) if cost.unit == "bytes" else cost.title
    xs = [scale(float(r[cost.column])) for r in rows]
    ys = [float(r["test_mean"]) for r in rows]
    reference = [r for r in rows if r["is_reference"]]
    for row in reference[:1]:
        axes.axhline(row["test_mean"], color=GREY, linewidth=0.7, linestyle=(0, (4, 3)), zorder=1, gid="reference")
    scale.apply(axes, title)
    found = front([r["test_mean"] for r in rows], [r[cost.column] for r in rows], bool(rows[0]["greater_is_better"]))
    steps = [(xs[i], ys[i]) for i in found.members]
    if steps:
        edge = axes.get_xlim()[1]
        axes.step(
            [x for x, _ in steps] + [edge],
            [y for _, y in steps] + [steps[-1][1]],
            where="post",
            color=FAINT,
            linewidth=1.4,
            zorder=2,
            solid_capstyle="butt",
            gid="front",
        )
    for row, x, y in zip(rows, xs, ys, strict=True):
        style = styles.marker(row, 5.0 if len(rows) <= MOST_LABELS else 3.8)
        spread = number(row["test_std"])
        if spread is not None:
            axes.errorbar(
                x,
                y,
                yerr=spread,
                fmt="none",
                ecolor=style["color"],
                elinewidth=0.7,
                capsize=1.6,
                capthick=0.7,
                zorder=3,
            )
        axes.plot(x, y, zorder=5 if row["method"] != REFERENCE else 6, **style)
    axes.margins(y=0.12)


def _pareto_caption(drawn: Sequence[tuple[Panel, list[dict[Any, Any]]]], cost: Cost) -> str:
    left_out = sorted({r["variant"] for panel, _ in drawn for r in panel.rows if not _drawn(r, cost)})
    kinds = {memory_title(r["memory_kind"]) for _, rows in drawn for r in rows}
    what = " / ".join(sorted(kinds)) if cost.unit == "bytes" else cost.title
    text = (
        f"Quality against {what}. Bars: standard deviation over seeds. Grey steps: Pareto front of the means. "
        "Star and dashed line: full fine-tuning."
    )
    if left_out:
        text += f" Not drawn somewhere, for want of a completed run or of this cost: {', '.join(left_out)}."
    return text


# -- curves ------------------------------------------------------------------------------------------------------------


def rank_plots(chosen: pd.DataFrame) -> Iterator[Plot]:
    """Test metric against rank, of `selected` rows: a curve for each method that was run at two ranks or more."""
    styles = Styles(chosen)
    for stem, title, panels in figure_groups(chosen):
        name = "-".join(filter(None, ["rank", stem]))
        caption = (
            "Test metric against rank. Bars: standard deviation over seeds. Dashed line: full fine-tuning, with a band "
            "of one standard deviation."
        )
        plot = _curves(panels, styles, name, title, caption, "rank", "line", "rank", 2.0, "test")
        if plot is not None:
            yield plot


def learning_rate_plots(table: pd.DataFrame) -> Iterator[Plot]:
    """Validation metric against learning rate, of all `configurations`: what the choice of learning rate rests on."""
    styles = Styles(table)
    for stem, title, panels in figure_groups(table):
        name = "-".join(filter(None, ["learning-rate", stem]))
        caption = (
            "Validation metric against learning rate; the selected one is ringed. Bars: "
            "standard deviation over seeds. Crosses on the axis: runs that diverged or failed there."
        )
        plot = _curves(
            panels, styles, name, title, caption, "learning_rate", "variant", "learning rate", 10.0, "validation"
        )
        if plot is not None:
            yield plot


def _curves(
    panels: Sequence[Panel],
    styles: Styles,
    name: str,
    title: str,
    caption: str,
    column: str,
    by: str,
    xlabel: str,
    base: float,
    split: str,
) -> Plot | None:
    """A curve for each value of `by` that has scores at two or more values of `column`; None where there is none."""
    drawn: list[tuple[Panel, dict[str, list[dict[Any, Any]]]]] = []
    for panel in panels:
        lines: dict[str, list[dict[Any, Any]]] = {}
        for row in panel.rows:
            if number(row[column]) is not None:
                lines.setdefault(row[by], []).append(row)
        kept = {key: rows for key, rows in lines.items() if len({r[column] for r in rows if _scored(r, split)}) > 1}
        if kept:
            drawn.append((panel, kept))
    if not drawn:
        return None
    methods = {key: rows[0]["method"] for _, lines in drawn for key, rows in lines.items()}
    labels = sorted(methods, key=lambda key: (methods[key], key))
    per_method: dict[str, list[str]] = {}
    for key in labels:
        per_method.setdefault(methods[key], []).append(key)
    style = {key: styles.line(method, i) for method, keys in per_method.items() for i, key in enumerate(keys)}
    shown = labels[:MOST_LEGEND]
    with matplotlib.rc_context(RC):
        figure, axes = _grid(len(drawn), _legend_rows(shown, len(drawn)))
        for ax, (panel, lines) in zip(axes, drawn, strict=True):
            _draw_curves(ax, panel, lines, style, column, base, split)
            ax.set_title(panel.title)
            ax.set_xlabel(xlabel)
            ax.set_ylabel(f"{split} {metric_title(panel.rows[0]['primary_metric'])}")
        _share_titles(axes)
        if title:
            figure.suptitle(title, fontsize=8.5)
        _legend(figure, [Line2D([], [], **style[key]) for key in shown], shown)
        _freeze(figure)
    if len(labels) > len(shown):
        caption += f" {len(labels) - len(shown)} further curves are drawn without a legend entry."
    return Plot(name, figure, caption)


def _scored(row: Row, split: str) -> bool:
    return number(row[f"{split}_mean"]) is not None


def _draw_curves(
    axes: Axes,
    panel: Panel,
    lines: Mapping[str, list[dict[Any, Any]]],
    style: Mapping[str, Mapping[str, Any]],
    column: str,
    base: float,
    split: str,
) -> None:
    values = sorted({float(r[column]) for rows in lines.values() for r in rows})
    log = {value: math.log(value, base) for value in values if value > 0}
    if split == "test":
        for row in (r for r in panel.rows if r["is_reference"]):
            spread = number(row["test_std"])
            axes.axhline(row["test_mean"], color=GREY, linewidth=0.7, linestyle=(0, (4, 3)), zorder=1)
            if spread:
                axes.axhspan(row["test_mean"] - spread, row["test_mean"] + spread, color=GREY, alpha=0.12, linewidth=0)
    # Curves that share their values would hide each other's bars: each keeps a small offset of its own.
    gap = min((b - a for a, b in pairwise(log.values())), default=1.0)
    shift = {key: (i - (len(lines) - 1) / 2) * min(0.05, 0.3 / len(lines)) * gap for i, key in enumerate(sorted(lines))}
    for key, rows in lines.items():
        ordered = sorted((r for r in rows if _scored(r, split) and r[column] in log), key=lambda r: r[column])
        xs = [log[r[column]] + shift[key] for r in ordered]
        ys = [float(r[f"{split}_mean"]) for r in ordered]
        spreads = [number(r[f"{split}_std"]) or 0.0 for r in ordered]
        axes.plot(xs, ys, zorder=4, **style[key])
        with_bars = [i for i, s in enumerate(spreads) if s > 0]
        if with_bars:
            axes.errorbar(
                [xs[i] for i in with_bars],
                [ys[i] for i in with_bars],
                [spreads[i] for i in with_bars],
                fmt="none",
                ecolor=style[key]["color"],
                elinewidth=0.7,
                capsize=1.6,
                capthick=0.7,
                zorder=3,
            )
        if split == "validation":
            best = {r["configuration"] for r in rows_of(selected(pd.DataFrame(rows)))}
            chosen = [(x, y) for x, y, r in zip(xs, ys, ordered, strict=True) if r["configuration"] in best]
            axes.plot(
                [x for x, _ in chosen],
                [y for _, y in chosen],
                linestyle="none",
                marker="o",
                markersize=8.5,
                markerfacecolor="none",
                markeredgecolor=INK,
                markeredgewidth=0.7,
                zorder=6,
            )
            lost = [log[r[column]] + shift[key] for r in rows if r["completed"] < r["runs"] and r[column] in log]
            if lost:  # an empty unclipped line would have no finite extent, which the layout cannot take
                axes.plot(
                    lost,
                    [0.02] * len(lost),
                    transform=axes.get_xaxis_transform(),
                    linestyle="none",
                    marker="x",
                    markersize=4.5,
                    color=style[key]["color"],
                    clip_on=False,
                    zorder=7,
                )
    axes.margins(x=0.08, y=0.12)
    if len(log) > 6 and base == 10:  # methods with grids of their own: decades say enough
        ticks = log_ticks(min(log), max(log))
    else:
        ticks = [v for i, v in enumerate(log) if i % math.ceil(len(log) / 7) == 0]
    axes.xaxis.set_major_locator(FixedLocator([math.log(v, base) for v in ticks]))
    axes.xaxis.set_major_formatter(FixedFormatter([_scientific(v) if base == 10 else f"{v:g}" for v in ticks]))
    axes.xaxis.set_minor_locator(NullLocator())


def _scientific(value: float) -> str:
    """0.0003 → "3e-4": one form along the whole axis."""
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


# -- memory ------------------------------------------------------------------------------------------------------------


def memory_plots(chosen: pd.DataFrame) -> Iterator[Plot]:
    """Stacked bars of peak memory by component, of `selected` rows that have components: a bar a configuration.

    A figure for each model, kind of device and kind of measurement, with the shapes that were measured side by side.
    """
    rows = accounted(chosen)
    hosts = sorted({(r["model"], r["device_kind"], r["memory_kind"]) for r in rows})
    varying = [i for i in range(3) if len({host[i] for host in hosts}) > 1]
    for host in hosts:
        shapes: dict[str, list[dict[Any, Any]]] = {}
        for row in rows:
            if (row["model"], row["device_kind"], row["memory_kind"]) == host:
                shapes.setdefault(row["shape"], []).append(row)
        name = "-".join(["memory-components", *(slug(host[i]) for i in varying)])
        yield _memory_figure(name, f"{host[0]}, {host[1]}", str(host[2]), shapes)


def _memory_figure(name: str, title: str, kind: str, shapes: Mapping[str, list[dict[Any, Any]]]) -> Plot:
    shown = {shape: _most_bars(rows) for shape, rows in shapes.items()}
    left_out = sum(len(rows) for rows in shapes.values()) - sum(map(len, shown.values()))
    factor, suffix = _unit_of(max(r["memory_peak_bytes"] for rows in shown.values() for r in rows), "bytes")
    columns = min(len(shown), 3)
    lines = math.ceil(len(shown) / columns)
    with matplotlib.rc_context(RC):
        height = lines * (0.17 * max(map(len, shown.values())) + 0.75) + 0.45
        figure = Figure(figsize=(COLUMN_INCHES if columns == 1 else PAGE_INCHES, height), layout="constrained")
        FigureCanvasAgg(figure)
        grid = list(figure.subplots(lines, columns, squeeze=False).flat)
        for unused in grid[len(shown) :]:
            unused.remove()
        axes = grid[: len(shown)]
        for ax, (shape, rows) in zip(axes, shown.items(), strict=True):
            _draw_bars(ax, rows, factor)
            ax.set_title(f"{shape} tokens")
            named = _with_unit(memory_title(kind), suffix)
            ax.set_xlabel(named if columns == 1 else named.replace(" (", "\n("))  # a narrow panel has no room
        _share_titles(axes)
        figure.suptitle(title, fontsize=8.5)
        _legend(figure, [Rectangle((0, 0), 1, 1, facecolor=colour) for colour in PARTS.values()], list(PARTS))
        _freeze(figure)
    worst = max(abs(r["memory_residual_bytes"]) / r["memory_peak_bytes"] for rows in shapes.values() for r in rows)
    caption = (
        f"Memory by component at the {memory_title(kind)} of a training step. Black ticks: the peak as plain steps "
        f"have it, which the sum of components misses by {100 * worst:.1f} % at most."
    )
    if left_out:
        caption += f" {left_out} configurations of the largest peaks are left out."
    return Plot(name, figure, caption)


def _most_bars(rows: Sequence[dict[Any, Any]]) -> list[dict[Any, Any]]:
    """The rows that have room, smallest peaks first; full fine-tuning always has."""
    if len(rows) <= MOST_BARS:
        return list(rows)
    kept = [row for row in rows if row["method"] == REFERENCE]
    others = [row for row in rows if row["method"] != REFERENCE][: MOST_BARS - len(kept)]
    return sorted([*kept, *others], key=lambda row: row["memory_peak_bytes"])


def _draw_bars(axes: Axes, rows: Sequence[Row], factor: float) -> None:
    places = range(len(rows))
    left = np.zeros(len(rows))
    for part, colour in PARTS.items():
        widths = np.array([row[f"memory_{part}_bytes"] / factor for row in rows])
        axes.barh(places, widths, left=left, height=0.72, color=colour, linewidth=0, zorder=2)
        left += widths
    for place, row in zip(places, rows, strict=True):
        peak = row["memory_peak_bytes"] / factor
        axes.plot([peak, peak], [place - 0.36, place + 0.36], color=INK, linewidth=1.0, zorder=3)
    axes.set_yticks(places, [row["variant"] for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)  # the smallest on top
    axes.set_xlim(0, 1.04 * max(left.max(), *(row["memory_peak_bytes"] / factor for row in rows)))
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.tick_params(axis="y", length=0)


def all_plots(table: pd.DataFrame) -> Iterator[Plot]:
    """Every figure of a folder, from its `configurations`."""
    chosen = selected(table)
    makers: tuple[Callable[[], Iterator[Plot]], ...] = (
        lambda: pareto_plots(chosen),
        lambda: memory_plots(chosen),
        lambda: rank_plots(chosen),
        lambda: learning_rate_plots(table),
    )
    for maker in makers:
        yield from maker()
