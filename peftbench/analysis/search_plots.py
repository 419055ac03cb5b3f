"""Figures of searches: how they went on, which settings mattered, quality against each setting, and fronts.

All methods that were searched on one model and task share a figure's panel, so that they can be compared at sight;
colours and markers are those of the other figures (see `plots`).
"""

import math
from collections.abc import Iterator, Mapping, Sequence

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator, NullLocator

from peftbench.analysis.frame import number
from peftbench.analysis.plots import (
    GREY,
    INK,
    MOST_LEGEND,
    RC,
    Plot,
    Scale,
    Styles,
    _freeze,
    _grid,
    _legend,
    _legend_rows,
    _scientific,
    _share_titles,
    log_ticks,
)
from peftbench.analysis.search_tables import names_of
from peftbench.analysis.studies import PRUNED, Importance, Study, short_name
from peftbench.analysis.tables import metric_title, slug

BINS = 6
"""Equal parts of a range, in each of which the best trial is joined by a line."""
MOST_PANELS = 18
OBJECTIVES = {
    "adapter_parameters": ("adapter parameters", "count"),
    "memory": ("peak memory", "bytes"),
    "time": ("training time", "seconds"),
}
"""How costs that are objectives are written, and their units."""

Group = tuple[str, list[Study]]


def groups(studies: Sequence[Study]) -> list[Group]:
    """Return studies by model, task and first objective, each with the title of its panel."""
    found: dict[tuple[str, str, str, bool], list[Study]] = {}
    for study in studies:
        key = study.model, study.task, study.objectives[0], study.maximise[0]
        found.setdefault(key, []).append(study)
    return [(", ".join(filter(None, key[1::-1])) or key[2], members) for key, members in sorted(found.items())]


def styles_of(studies: Sequence[Study]) -> Styles:
    """Return the styles of all methods that were searched."""
    methods = [s.method for s in studies]
    return Styles(pd.DataFrame({"method": methods, "variant": methods}))


def _colour(styles: Styles, method: str) -> tuple[str, str]:
    return styles.method.get(method, (INK, "*"))


def _quality(studies: Sequence[Study]) -> str:
    return f"validation {metric_title(studies[0].objectives[0])}"


def _labels(studies: Sequence[Study]) -> dict[str, Study]:
    """Return legend entries: one a method, in order."""
    found = {s.method: s for s in sorted(studies, key=lambda s: s.method)}
    return dict(list(found.items())[:MOST_LEGEND])


def _handles(labels: Mapping[str, Study], styles: Styles) -> list[Line2D]:
    return [
        Line2D([], [], color=c, marker=m, markersize=4) for c, m in (_colour(styles, s.method) for s in labels.values())
    ]


def _more(studies: Sequence[Study], labels: Mapping[str, Study]) -> str:
    hidden = len({s.method for s in studies}) - len(labels)
    return f" {hidden} further methods are drawn without a legend entry." if hidden else ""


# -- history -----------------------------------------------------------------------------------------------------------


def history_plot(studies: Sequence[Study]) -> Plot | None:
    """Value of each trial in order, and the best so far; None where no trial has a value."""
    drawn = [(t, [s for s in m if any(x.last is not None for x in s.trials)]) for t, m in groups(studies)]
    drawn = [(title, members) for title, members in drawn if members]
    if not drawn:
        return None
    styles, labels = styles_of(studies), _labels([s for _, m in drawn for s in m])
    with matplotlib.rc_context(RC):
        figure, axes = _grid(len(drawn), _legend_rows(list(labels), len(drawn)))
        for ax, (title, members) in zip(axes, drawn, strict=True):
            for study in members:
                _draw_history(ax, study, styles)
            ax.set_title(title)
            ax.set_xlabel("trial")
            ax.set_ylabel(_quality(members))
            ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        _share_titles(axes)
        _legend(figure, _handles(labels, styles), list(labels))
        _freeze(figure)
    caption = (
        "Every trial's value on validation in the order in which trials were asked for; lines: the best so far. "
        "Crosses: trials that were pruned, at the last value seen."
    )
    lost = sum(len([t for t in s.trials if t.last is None]) for s in studies)
    if lost:
        caption += f" {lost} trials without any value are not drawn."
    return Plot("search-history", figure, caption + _more(studies, labels))


def _draw_history(axes: Axes, study: Study, styles: Styles) -> None:
    colour, marker = _colour(styles, study.method)
    done = study.complete
    axes.plot(
        [t.number for t in done], [t.values[0] for t in done if t.values], marker=marker, markersize=3, alpha=0.5,
        linestyle="none", color=colour, markeredgewidth=0, zorder=3,
    )  # fmt: skip
    pruned = [(t.number, t.last) for t in study.of(PRUNED) if t.last is not None]
    _crosses(axes, [n for n, _ in pruned], [v for _, v in pruned], colour)
    best: list[float] = []
    for trial in done:
        assert trial.values is not None
        better = max if study.maximise[0] else min
        best.append(better(best[-1], trial.values[0]) if best else trial.values[0])
    if best:
        end = max(t.number for t in study.trials)
        axes.step([*(t.number for t in done), end], [*best, best[-1]], where="post", color=colour, zorder=4)


def _crosses(axes: Axes, xs: Sequence[float], ys: Sequence[float], colour: str) -> None:
    if xs:
        axes.plot(xs, ys, marker="x", markersize=3, linestyle="none", color=colour, alpha=0.6, zorder=2)


# -- importance --------------------------------------------------------------------------------------------------------


def importance_plot(studies: Sequence[Study], found: Sequence[Importance | None]) -> Plot | None:
    """Bars of each setting's share, a panel a study; None where nothing was computed."""
    drawn = [(n, i) for n, i in zip(names_of(studies), found, strict=True) if i is not None]
    if not drawn:
        return None
    shown = drawn[:MOST_PANELS]
    colours = {"fANOVA": "#0072B2", "PED-ANOVA": "#E69F00"}
    kinds = list(colours) if any(i.fanova is not None for _, i in shown) else ["PED-ANOVA"]
    with matplotlib.rc_context(RC):
        figure, axes = _grid(len(shown), 1)
        for ax, (title, one) in zip(axes, shown, strict=True):
            measures = {"fANOVA": one.fanova, "PED-ANOVA": one.ped_anova}
            order = sorted(one.ped_anova, key=lambda p, one=one: (-(one.fanova or one.ped_anova)[p], p))  # type: ignore[misc]
            height = 0.8 / len(kinds)
            for k, kind in enumerate(kinds):
                shares = measures[kind]
                if shares is None:
                    continue
                places = [i + (k - (len(kinds) - 1) / 2) * height for i in range(len(order))]
                ax.barh(places, [shares[p] for p in order], height=height, color=colours[kind], linewidth=0)
            ax.set_yticks(range(len(order)), [short_name(p) for p in order])
            ax.set_ylim(len(order) - 0.4, -0.6)
            ax.set_xlim(0, 1)
            ax.tick_params(axis="y", length=0)
            ax.set_title(f"{title} ({one.trials} trials)")
            ax.set_xlabel("importance")
        _share_titles(axes)
        _legend(figure, [Line2D([], [], color=colours[k], linewidth=5, solid_capstyle="butt") for k in kinds], kinds)
        _freeze(figure)
    caption = (
        "Importance of each setting for the value on validation, over complete trials. "
        + ("fANOVA: share of the variance over everything searched. " if "fANOVA" in kinds else "")
        + "PED-ANOVA: share in what tells the best tenth of trials from the rest. Rough with few trials."
    )
    if len(drawn) > len(shown):
        caption += f" {len(drawn) - len(shown)} further searches are in the table alone."
    return Plot("search-importance", figure, caption)


# -- sensitivity -------------------------------------------------------------------------------------------------------


def sensitivity_plots(studies: Sequence[Study]) -> Iterator[Plot]:
    """Value against each numeric setting that some study searched; all methods that have it in one figure."""
    found: dict[str, list[Study]] = {}
    for study in studies:
        for name in study.space:
            values = {number(t.params.get(name)) for t in study.complete} - {None}
            if len(values) > 1:
                found.setdefault(name, []).append(study)
    short = [short_name(name) for name in found]
    for name in sorted(found, key=lambda n: (short_name(n) != "learning_rate", n)):
        stem = short_name(name) if short.count(short_name(name)) == 1 else name
        yield _sensitivity(name, found[name], styles_of(studies), f"search-{slug(stem.replace('_', '-'))}")


def _sensitivity(name: str, studies: Sequence[Study], styles: Styles, stem: str) -> Plot:
    drawn, labels = groups(studies), _labels(studies)
    positive = [v for s in studies for t in s.complete if (v := number(t.params.get(name))) is not None]
    ranges = [s.space[name] for s in studies]
    wide = min(positive) > 0 and max(positive) / min(positive) > 8
    log = min(positive) > 0 and (any(r.log for r in ranges) or (wide and all(r.choices for r in ranges)))
    title = short_name(name).replace("_", " ")
    edges = [s for s in studies if name in s.edges()]
    with matplotlib.rc_context(RC):
        figure, axes = _grid(len(drawn), _legend_rows(list(labels), len(drawn)))
        for ax, (panel, members) in zip(axes, drawn, strict=True):
            for study in members:
                _draw_sensitivity(ax, study, name, log, styles)
            _value_axis(ax, members, name, log)
            ax.set_title(panel)
            ax.set_xlabel(title)
            ax.set_ylabel(_quality(members))
            ax.margins(y=0.1)
        _share_titles(axes)
        _legend(figure, _handles(labels, styles), list(labels))
        _freeze(figure)
    caption = (
        f"Value on validation against {title}, all else varying too: a point a trial, lines through the best of each "
        f"{'value' if _few(studies, name) else 'sixth of what a method tried'}. Rings: the best trial of each method."
    )
    if edges:
        named = ", ".join(f"{n} ({s.edges()[name]} end)" for n, s in zip(names_of(edges), edges, strict=True))
        caption += f" Triangles: that is at an edge of what was searched, and a better value may lie beyond: {named}."
    pruned = sum(1 for s in studies for t in s.of(PRUNED) if t.last is not None and name in t.params)
    if pruned:
        caption += " Crosses: pruned trials, at the last value seen."
    return Plot(stem, figure, caption + _more(studies, labels))


def _few(studies: Sequence[Study], name: str) -> bool:
    return all(len({t.params[name] for t in s.complete if name in t.params}) <= BINS for s in studies)


def _draw_sensitivity(axes: Axes, study: Study, name: str, log: bool, styles: Styles) -> None:
    colour, marker = _colour(styles, study.method)
    place = math.log10 if log else float
    done = [t for t in study.complete if number(t.params.get(name)) is not None]
    xs = [place(t.params[name]) for t in done]
    ys = [t.values[0] for t in done if t.values]
    axes.plot(
        xs, ys, marker=marker, markersize=3, alpha=0.45, linestyle="none", color=colour, markeredgewidth=0, zorder=3
    )
    pruned = [t for t in study.of(PRUNED) if t.last is not None and number(t.params.get(name)) is not None]
    _crosses(axes, [place(t.params[name]) for t in pruned], [t.last for t in pruned if t.last is not None], colour)
    line = upper(xs, ys, study.maximise[0])
    if len(line) > 1:
        axes.plot([x for x, _ in line], [y for _, y in line], color=colour, zorder=4)
    best = study.best
    if best is None or best.values is None or number(best.params.get(name)) is None:
        return
    end = study.edges().get(name)
    axes.plot(
        place(best.params[name]), best.values[0], linestyle="none", zorder=6,
        marker={None: "o", "low": "<", "high": ">"}[end], markersize=8.5 if end is None else 10,
        markerfacecolor="none", markeredgecolor=INK if end is None else colour,
        markeredgewidth=0.7 if end is None else 1.3,
    )  # fmt: skip


def upper(xs: Sequence[float], ys: Sequence[float], maximise: bool) -> list[tuple[float, float]]:
    """Return the best point of each of `BINS` equal parts of the range of `xs`, or of each x if there are no more."""
    values = sorted(set(xs))
    if len(values) > BINS:
        width = (values[-1] - values[0]) / BINS
        bins = [min(int((x - values[0]) / width), BINS - 1) for x in xs]
    else:
        bins = [values.index(x) for x in xs]
    best: dict[int, tuple[float, float]] = {}
    for b, x, y in zip(bins, xs, ys, strict=True):
        if b not in best or (y > best[b][1] if maximise else y < best[b][1]):
            best[b] = x, y
    return [best[b] for b in sorted(best)]


def _value_axis(axes: Axes, studies: Sequence[Study], name: str, log: bool) -> None:
    if not log:
        axes.xaxis.set_major_locator(MaxNLocator(6))
        return
    values = [float(t.params[name]) for s in studies for t in s.complete if number(t.params.get(name)) is not None]
    distinct = sorted(set(values))
    whole = all(v == int(v) for v in distinct)
    if len(distinct) <= 7:
        ticks = distinct
    elif whole:
        first, last = math.floor(math.log2(distinct[0])), math.ceil(math.log2(distinct[-1]))
        ticks = [2.0**e for e in range(first, last + 1, max(1, math.ceil((last - first) / 6)))]
    else:
        ticks = log_ticks(distinct[0], distinct[-1])
    axes.xaxis.set_major_locator(FixedLocator([math.log10(t) for t in ticks]))
    plain = whole or 0.01 <= min(ticks) <= max(ticks) < 1000  # one form along the whole axis
    axes.xaxis.set_major_formatter(FixedFormatter([f"{t:g}" if plain else _scientific(t) for t in ticks]))
    axes.xaxis.set_minor_locator(NullLocator())


# -- several objectives ------------------------------------------------------------------------------------------------


def pareto_plots(studies: Sequence[Study]) -> Iterator[Plot]:
    """First objective against each other one, all methods in one panel, with the front of all their trials."""
    several = [s for s in studies if len(s.objectives) > 1]
    for name in dict.fromkeys(n for s in several for n in s.objectives[1:]):
        members = [s for s in several if name in s.objectives[1:] and s.complete]
        if members:
            yield _pareto(name, members, styles_of(studies))


def _pareto(name: str, studies: Sequence[Study], styles: Styles) -> Plot:
    drawn, labels = groups(studies), _labels(studies)
    title, unit = OBJECTIVES.get(name, (metric_title(name), "count"))
    with matplotlib.rc_context(RC):
        figure, axes = _grid(len(drawn), _legend_rows(list(labels), len(drawn)))
        for ax, (panel, members) in zip(axes, drawn, strict=True):
            _draw_pareto(ax, name, members, styles, title, unit)
            ax.set_title(panel)
            ax.set_ylabel(_quality(members))
            ax.margins(y=0.1)
        _share_titles(axes)
        _legend(figure, _handles(labels, styles), list(labels))
        _freeze(figure)
    others = sorted({n for s in studies for n in s.objectives[1:]} - {name})
    every = [name, *others]
    caption = (
        f"Value on validation against {title}: a point a complete trial; grey: the front of all methods together. "
        f"Filled: trials on their own method's front of quality and {' and '.join(t.replace('_', ' ') for t in every)}."
    )
    return Plot(f"search-pareto-{slug(name.replace('_', '-'))}", figure, caption + _more(studies, labels))


def _draw_pareto(axes: Axes, name: str, studies: Sequence[Study], styles: Styles, title: str, unit: str) -> None:
    points: list[tuple[float, float]] = []
    places = {s.name: s.objectives.index(name) for s in studies}
    costs = [t.values[places[s.name]] for s in studies for t in s.complete if t.values]
    scale = Scale(costs, unit)
    for study in studies:
        colour, marker = _colour(styles, study.method)
        k, front = places[study.name], {t.number for t in study.front}
        for trial in study.complete:
            assert trial.values is not None
            on = trial.number in front
            axes.plot(
                scale(trial.values[k]), trial.values[0], marker=marker, markersize=4, linestyle="none", color=colour,
                fillstyle="full" if on else "none", markeredgewidth=0.7, alpha=1.0 if on else 0.6,
                zorder=4 if on else 3,
            )  # fmt: skip
            points.append((trial.values[k], trial.values[0]))
    scale.apply(axes, title)
    up, more = studies[0].maximise[0], studies[0].maximise[places[studies[0].name]]
    steps = staircase(points, up, more)
    axes.step(
        [scale(x) for x, _ in steps], [y for _, y in steps], where="pre" if more else "post", color=GREY, alpha=0.6,
        linewidth=1.2, zorder=2,
    )  # fmt: skip


def staircase(points: Sequence[tuple[float, float]], maximise: bool, more_is_better: bool) -> list[tuple[float, float]]:
    """Return the points (cost, quality) that no other beats, in order of cost."""
    sign, cost = (1 if maximise else -1), (-1 if more_is_better else 1)
    kept: list[tuple[float, float]] = []
    for x, y in sorted(set(points), key=lambda p: (cost * p[0], -sign * p[1])):
        if not kept or sign * y > sign * kept[-1][1]:
            kept.append((x, y))
    return sorted(kept)


def all_plots(studies: Sequence[Study], found: Sequence[Importance | None]) -> Iterator[Plot]:
    """Every figure of a folder's searches."""
    for plot in (history_plot(studies), importance_plot(studies, found)):
        if plot is not None:
            yield plot
    yield from sensitivity_plots(studies)
    yield from pareto_plots(studies)
