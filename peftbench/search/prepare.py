"""From a command line to the studies of a search: what is fixed, what varies, and whether all of it can run."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peftbench import overrides, registry
from peftbench.budget import PROTOCOL, Budget, Held, LeftOut, Unmatched, budget_of
from peftbench.config import PROTOCOLS, SweepConfig, build, one_of
from peftbench.errors import UserError
from peftbench.plan import GROUPS, Demand, Point, points
from peftbench.record import RunSpec, file_name
from peftbench.resolve import Resolver, demand
from peftbench.search import space
from peftbench.search.settings import MEASURED, SearchConfig, split
from peftbench.search.space import Axis, as_choices, narrowed, ranged
from peftbench.search.studies import About
from peftbench.sweep import sweep_folder

STUDIES = ("model", "method", "task")
"""Keys of which each value has studies of its own."""
DEFAULT_NAME = "search"


@dataclass(frozen=True)
class Prepared:
    """A search ready to go.

    Attributes:
        points: of each study, the keys that all its trials have.
        specs: of each study, a run in the middle of its space.
        lines: worth showing first.
        budget: what is held equal, if anything is, and which methods cannot be held to it.
    """

    config: SearchConfig
    sweep: SweepConfig
    folder: Path
    resolver: Resolver
    abouts: list[About]
    points: list[Point]
    specs: list[RunSpec]
    lines: list[str]
    budget: Budget | None = None
    left_out: list[LeftOut] = field(default_factory=list)


def prepare(arguments: Sequence[str]) -> Prepared:
    """Check a command line; nothing is written and nothing trains.

    Raises:
        UserError: something keeps a trial from running.
    """
    config, rest = split(arguments)
    rest, spans = _intervals(rest)
    parsed = overrides.parse(rest)
    sweep = build(SweepConfig, parsed.settings, "")
    if parsed.hydra:
        raise UserError(f"{parsed.hydra[0]}: search uses no launcher; use search.workers=<n>")
    if sweep.experiment is not None:
        raise UserError(f"experiment={sweep.experiment}: search takes no experiment; give model, task and method")
    if "sweep.name" not in parsed.top:
        sweep = dataclasses.replace(sweep, sweep=dataclasses.replace(sweep.sweep, name=DEFAULT_NAME))
    fixed, given = _apart(parsed.grid)
    if "profile" not in fixed:
        fixed["profile"] = ["default" if set(config.objectives) & set(MEASURED) else "skip"]
    for group in GROUPS:
        for option in fixed.get(group, ()):
            if group != "model" or ("/" not in str(option) and not Path(str(option)).exists()):
                registry.check_option(group, str(option))
    _check_protocol(str(fixed.get("protocol", ["held_out"])[0]), config)
    methods = [str(m) for m in fixed.get("method", ["lora"])]
    declared = {method: registry.declared(method) for method in methods}
    _check_given([*given, *spans], declared)
    found, lines = points(demand({**fixed, "method": methods}, None), declared)
    varied = space.axes(config.space, methods)
    resolver = Resolver(sweep.device)
    budget = None
    if config.protocol == PROTOCOL:
        budget = budget_of(config, resolver)
        config = budget.config
    prepared = Prepared(config, sweep, sweep_folder(sweep), resolver, [], [], [], lines, budget)
    for point in found:
        method = str(point["method"])
        own = list(spans.values())
        own += [as_choices(key, values) for key, values in given.items()]
        own = [a for a in own if not a.key.startswith("method.") or a.key.removeprefix("method.") in declared[method]]
        named = {axis.key for axis in own}
        axes = [*(a for a in varied[method] if a.key not in named and a.key not in point), *own]
        _add(prepared, point, axes, named)
    if not prepared.abouts:
        raise UserError("; ".join(f"method={one.method}: {one.reason}" for one in prepared.left_out))
    return prepared


def _check_protocol(given: str, config: SearchConfig) -> None:
    """Raise UserError for a protocol of runs by which no search may choose."""
    one_of("protocol", given, (*PROTOCOLS, PROTOCOL))
    if given != "held_out" and config.protocol == PROTOCOL:
        raise UserError(f"protocol={given}: given beside protocol={PROTOCOL}, which is held out")
    if given != "held_out":
        raise UserError(f"protocol={given}: a search would choose by the split that is reported; expected held_out")


def _intervals(arguments: Sequence[str]) -> tuple[list[str], dict[str, Axis]]:
    """Take `key=interval(low,high)`, which may carry the tag log, out of the arguments."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import ValueType
    from hydra.errors import HydraException

    rest: list[str] = []
    spans: dict[str, Axis] = {}
    for argument in arguments:
        override: Any = None
        if "interval(" in argument:
            with contextlib.suppress(HydraException):  # what cannot be read is told by who parses the rest
                (override,) = OverridesParser.create().parse_overrides([argument])
        if override is None or override.value_type is not ValueType.INTERVAL_SWEEP:
            rest.append(argument)
            continue
        key, found = override.key_or_group, override.value()
        if key.partition(".")[0] not in ("train", "method") or "." not in key:
            raise UserError(f"{argument}: a range is for method.<setting> and train.<setting>")
        spans[key] = ranged(key, found.start, found.end, "log" in found.tags, None, argument)
    return rest, spans


def _apart(grid: dict[str, list[Any]]) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
    """Return keys of one value, models, methods and tasks, and settings given several values, which are searched."""
    fixed: dict[str, list[Any]] = {}
    given: dict[str, list[Any]] = {}
    for key, values in grid.items():
        if len(values) == 1 or key in STUDIES:
            fixed[key] = values
        elif key.partition(".")[0] in ("method", "train") and "." in key:
            given[key] = values
        else:
            shown = ",".join(map(str, values))
            raise UserError(f"{key}={shown}: a search takes one value; it varies method.* and train.*")
    return fixed, given


def _check_given(keys: Sequence[str], declared: dict[str, frozenset[str]]) -> None:
    """Raise UserError for a searched key that no method takes, as for one of a grid."""
    fixed = {key: [None] for key in keys}
    points(Demand([{"method": list(declared)}], given=fixed), declared)


def _add(prepared: Prepared, point: Point, axes: Sequence[Axis], given: Collection[str]) -> None:
    """Add the study of one point, its axes cut to what model and task allow.

    Args:
        given: keys of axes that the command line names.
    """
    config, resolver, method = prepared.config, prepared.resolver, str(point["method"])
    axes = sorted(axes, key=lambda axis: axis.key)
    middle = dict(point)
    if not any(axis.key == "train.learning_rate" for axis in axes) or "train.learning_rate" in point:
        resolver.spec(middle)  # raises where there is nothing to be mended by searching
    kept: list[Axis] = []
    for axis in axes:

        def refused(value: Any, key: str = axis.key) -> str | None:
            return _refusal(resolver, {**middle, key: value})

        whole, line = narrowed(_in_whole_numbers(axis, refused), refused)
        if whole is None:
            if axis.key not in str(line):
                raise UserError(str(line))  # it is not the axis that does not fit
            where = "" if axis.key in given else f"{space.path_of(config.space)}: "
            raise UserError(f"{where}{axis.key}: none of its values fits {method} on {point['model']}: {line}")
        if line is not None:
            prepared.lines.append(f"{method}: {axis.key}: {line}")
        kept.append(whole)
    if not kept:
        raise UserError(f"method={method}: nothing to search; every key of search.space={config.space} is given")
    held = Held(tuple(kept))
    if prepared.budget is not None:
        try:
            held = prepared.budget.hold(point, kept)
        except Unmatched as error:
            model, task = (str(point[key]) for key in ("model", "task"))
            prepared.left_out.append(LeftOut(method, model, task, str(error)))
            prepared.lines.append(f"{method} is left out: it {error}")
            return
        kept = list(held.axes)
        prepared.lines.extend(held.lines)
    some = {axis.key: axis.value(held.some[axis.key]) if axis.key in held.some else _some(axis) for axis in kept}
    spec = resolver.spec({**middle, **held.complete(some)})
    task = registry.build_task(spec.task)
    _check_grid(prepared, method, kept)
    names = [method, spec.model["name"], spec.task["name"]]
    held_to = None if prepared.budget is None else prepared.budget.identity()
    about = About(
        name="-".join(file_name(str(part)) for part in (prepared.sweep.sweep.name, *names)),
        method=method,
        model=str(spec.model["name"]),
        task=str(spec.task["name"]),
        metric=task.primary_metric,
        maximise=task.greater_is_better,
        axes=tuple(kept),
        fixed={**point, "identity": spec.identity, **({} if held_to is None else {"budget": held_to})},
        held=held,
    )
    if any(other.name == about.name for other in prepared.abouts):
        raise UserError(f"model={point['model']}: another model of this search is named {about.model} too")
    prepared.abouts.append(about)
    prepared.points.append(point)
    prepared.specs.append(spec)


def _in_whole_numbers(axis: Axis, refused: Callable[[Any], str | None]) -> Axis:
    """Return an axis of whole numbers where its setting takes no others: Hydra reads interval(2,8) as 2.0 to 8.0."""
    low, high = axis.low, axis.high
    if axis.choices or axis.whole or not (float(low).is_integer() and float(high).is_integer()):
        return axis
    if "whole number" not in (refused(low) or ""):
        return axis
    return dataclasses.replace(axis, low=int(low), high=int(high))


def _refusal(resolver: Resolver, point: Point) -> str | None:
    try:
        resolver.spec(point)
    except UserError as error:
        return str(error)
    return None


def _some(axis: Axis) -> Any:
    """Return a value from the lower middle of an axis."""
    params = axis.params()
    return axis.value(params[(len(params) - 1) // 2])


def _check_grid(prepared: Prepared, method: str, axes: Sequence[Axis]) -> None:
    from peftbench.search.samplers import grid_size

    if prepared.config.sampler != "grid":
        return
    size, trials = grid_size(axes), prepared.config.trials
    if size < trials:
        raise UserError(f"search.trials={trials}: the grid of {method} has {size} points; expected at most that")
    if size > trials:
        prepared.lines.append(f"{method}: {trials} of the grid's {size} points, chosen at random")


def best_file(about: About, abouts: Sequence[About]) -> str:
    """Return the name of the file that a study's best configuration goes to."""
    same = [other for other in abouts if other.method == about.method]
    parts = [about.method] if len(same) == 1 else [about.method, about.model, about.task]
    return f"best-{'-'.join(file_name(part) for part in parts)}.yaml"
