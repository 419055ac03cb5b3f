"""Equal budgets: every method of a search is tuned at the same expense, and its best settings run again on new seeds.

`protocol=equal_budget` holds equal what `search.budget` names:

- ``trials``: as many trials of each method, each trained by the same recipe.
- ``parameters``: the same trials, of configurations whose adapter parameters are within `search.tolerance` of
  `search.target_parameters`; the method's size (rank, bottleneck, length …) follows from its other settings.
- ``wall_clock``: as many trials of each method as come closest to `search.seconds` of the device.
- ``memory``: the same trials, of configurations whose predicted peak is at most `search.memory`.
- ``flops``: the same trials, with steps such that each takes the same FLOPs.

Methods for which that cannot be had are left out with a line and a row that say what they would have had.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from peftbench.config import in_range, one_of
from peftbench.errors import UserError
from peftbench.plan import Point
from peftbench.record import RunSpec, canonical
from peftbench.resolve import Resolver
from peftbench.sizes import SIZES, Solved, Solver

if TYPE_CHECKING:
    from peftbench.search.settings import SearchConfig
    from peftbench.search.space import Axis

PROTOCOL = "equal_budget"
BUDGETS = ("trials", "parameters", "wall_clock", "memory", "flops")
NEEDED = {"parameters": "target_parameters", "wall_clock": "seconds", "memory": "memory"}
"""Keys that a budget cannot do without."""
OWN = {"target_parameters": "parameters", "seconds": "wall_clock", "memory": "memory", "target_flops": "flops"}
"""Keys that mean something to one budget alone."""
ENDLESS = 1_000_000
"""Trials where another limit ends a search."""
MOST_COMBINATIONS = 256


class Unmatched(Exception):
    """A method cannot be held to the budget; says why."""


def parse_count(key: str, value: Any) -> int:
    """Return the number that 300000, "300k" or "1.5M" stands for; raises UserError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKmMbB]?)\s*", str(value))
    found = 0 if match is None else round(float(match[1]) * {"": 1, "k": 1e3, "m": 1e6, "b": 1e9}[match[2].lower()])
    if found < 1:
        raise UserError(f"{key}={value}: expected a number of at least 1, such as 300000, 300k or 1.5M")
    return found


def check(config: SearchConfig) -> None:
    """Raise UserError unless the keys of a search's budget fit together."""
    one_of("search.budget", config.budget, BUDGETS)
    in_range("search.final_seeds", config.final_seeds, 1)
    in_range("search.tolerance", config.tolerance, 0, 1, open_high=True)
    in_range("search.seconds", config.seconds, 0, open_low=True)
    in_range("search.target_flops", config.target_flops, 0, open_low=True)
    if config.protocol != PROTOCOL:
        given = next((k for k in OWN if getattr(config, k) is not None), None)
        if config.budget != "trials" or given is not None:
            named = f"search.budget={config.budget}" if given is None else f"search.{given}={getattr(config, given)}"
            raise UserError(f"{named}: only with protocol={PROTOCOL}")
        return
    for key, budget in OWN.items():
        if getattr(config, key) is not None and config.budget != budget:
            raise UserError(f"search.{key}={getattr(config, key)}: only with search.budget={budget}")
    needed = NEEDED.get(config.budget)
    if needed is not None and getattr(config, needed) is None:
        raise UserError(f"search.budget={config.budget}: expected search.{needed} too")
    if config.target_parameters is not None:
        parse_count("search.target_parameters", config.target_parameters)
    if config.memory is not None:
        _bytes(config)
    if config.objectives != ("quality",):
        shown = ",".join(config.objectives)
        raise UserError(f"search.objectives={shown}: with protocol={PROTOCOL} quality selects; expected quality")
    if config.budget == "wall_clock" and config.sampler == "grid":
        raise UserError(
            "search.sampler=grid: a grid has a number of trials; with search.budget=wall_clock expected tpe"
        )


def _bytes(config: SearchConfig) -> int:
    from peftbench.capacity import parse_bytes

    return parse_bytes("search.memory", str(config.memory))


@dataclass(frozen=True)
class Held:
    """One study under a budget.

    Attributes:
        axes: what is left to vary.
        complete: a trial's settings → those of its run; raises UserError for what is not within the budget.
        room: (seconds of finished trials, running ones) → how many more there may be; None: `search.trials` decides.
        some: parameters of a trial that is within the budget, as far as that depends on them.
        lines: worth showing.
    """

    axes: tuple[Axis, ...]
    complete: Callable[[Mapping[str, Any]], dict[str, Any]] = dict
    room: Callable[[Sequence[float], int], int] | None = None
    some: Mapping[str, Any] = field(default_factory=dict)
    lines: tuple[str, ...] = ()


@dataclass(frozen=True)
class LeftOut:
    """A method that cannot be held to the budget on a model and task, and why."""

    method: str
    model: str
    task: str
    reason: str


class Budget:
    """What is held equal; this one holds nothing but the number of trials."""

    unit: str | None = None
    """What is counted, where there is something besides trials."""

    def __init__(self, config: SearchConfig, resolver: Resolver) -> None:
        self.config, self.resolver = config, resolver

    @property
    def wanted(self) -> float | None:
        """How much of `unit` a method is to have."""
        return None

    def identity(self) -> str | None:
        """Return what all trials of a study must have in common; None where any trial will do."""
        return None

    def statement(self) -> str:
        """Return what is held equal, as part of a sentence."""
        return f"{self.config.trials} trials of each method, each trained by the same recipe"

    def hold(self, point: Point, axes: Sequence[Axis]) -> Held:
        """Return the study of `point` as it is within the budget.

        Raises:
            Unmatched: the method cannot be held to it.
        """
        return Held(tuple(axes))

    def had(self, spec: RunSpec, record: Mapping[str, Any] | None, seconds: float | None) -> float | None:
        """Return how much of `unit` the winner `spec` had.

        Args:
            record: of a final run.
            seconds: that its method was tuned for.
        """
        return None

    def matches(self, had: float) -> bool:
        """Whether that is as much as was wanted."""
        return self.wanted is None or abs(had - self.wanted) <= self.config.tolerance * self.wanted


class Parameters(Budget):
    """Adapter parameters within a tolerance of a target."""

    unit = "adapter parameters"

    def __init__(self, config: SearchConfig, resolver: Resolver) -> None:
        super().__init__(config, resolver)
        self.target = parse_count("search.target_parameters", config.target_parameters)
        self.solver = Solver(resolver, self.target, config.tolerance)

    @property
    def wanted(self) -> float:
        return float(self.target)

    def identity(self) -> str:
        return f"{self.target} adapter parameters within {self.config.tolerance:g}"

    def statement(self) -> str:
        within = f"{100 * self.config.tolerance:g} %"
        return (
            f"{self.config.trials} trials of each method, all with {self.target} adapter parameters within {within}, "
            "by the size that each method's closed form gives"
        )

    def hold(self, point: Point, axes: Sequence[Axis]) -> Held:
        nearest: Solved | None = None
        for setting in (*SIZES, None):
            own = () if setting is None else (setting,)
            if setting is not None and not self._sized(point, setting):
                continue
            left = [axis for axis in axes if setting is None or axis.key != f"method.{setting}"]
            found: list[tuple[dict[str, Any], Solved]] = []
            for params in _combinations(left):
                try:
                    solved = self.solver.solve({**point, **_values(left, params)}, own)
                except UserError:
                    continue
                if nearest is None or solved.off(self.target) < nearest.off(self.target):
                    nearest = solved
                if self.solver.matches(solved):
                    found.append((params, solved))
            if found:
                return self._held(point, setting, axes, left, found)
        raise Unmatched(self._too_far(nearest))

    def _sized(self, point: Point, setting: str) -> bool:
        from peftbench import registry

        return setting in registry.declared(str(point["method"])) and f"method.{setting}" not in point

    def _too_far(self, nearest: Solved | None) -> str:
        wanted = f"wanted were {self.target} within {100 * self.config.tolerance:g} %"
        if nearest is None:
            return f"fits the model at no size; {wanted}"
        at = f" at {nearest.setting}={nearest.value}" if nearest.setting is not None else ""
        return f"has {nearest.parameters} adapter parameters at the nearest{at}; {wanted}"

    def _held(
        self,
        point: Point,
        setting: str | None,
        axes: Sequence[Axis],
        left: Sequence[Axis],
        found: Sequence[tuple[dict[str, Any], Solved]],
    ) -> Held:
        """Return the study whose `setting` is solved for; choices that match nowhere are left out."""
        method, lines, kept = str(point["method"]), [], []
        for axis in left:
            if not axis.choices or axis.key not in found[0][0]:
                kept.append(axis)
                continue
            matching = [params[axis.key] for params, _ in found]
            choices = tuple((label, value) for label, value in axis.choices if label in matching)
            if len(choices) < len(axis.choices):
                lost = ", ".join(str(label) for label, _ in axis.choices if label not in matching)
                lines.append(f"{method}: {axis.key}: {lost} left out, no size there has {self.target} parameters")
            kept.append(dataclasses.replace(axis, choices=choices))
        if setting is not None:
            values = sorted({s.value for _, s in found if s.value is not None})
            shown = f"{values[0]}" if len(values) == 1 else f"{values[0]} to {values[-1]}"
            searched = next((axis for axis in axes if axis.key == f"method.{setting}"), None)
            outside = "" if searched is None or all(_inside(searched, v) for v in values) else ", outside its space"
            lines.append(f"{method}: {setting}={shown} for {self.target} adapter parameters{outside}")

        def complete(settings: Mapping[str, Any]) -> dict[str, Any]:
            solved = self.solver.solve({**point, **settings}, () if setting is None else (setting,))
            if not self.solver.matches(solved):
                raise UserError(f"method={method}: {self._too_far(solved)}")
            return {**settings, **solved.chosen}

        return Held(tuple(kept), complete, some=found[0][0], lines=tuple(lines))

    def had(self, spec: RunSpec, record: Mapping[str, Any] | None, seconds: float | None) -> float | None:
        return _number(record, "adapter_parameters")


class WallClock(Budget):
    """Seconds of the device, each run's share of its pack's."""

    unit = "seconds"

    def __init__(self, config: SearchConfig, resolver: Resolver) -> None:
        super().__init__(dataclasses.replace(config, trials=ENDLESS), resolver)

    @property
    def wanted(self) -> float:
        assert self.config.seconds is not None
        return self.config.seconds

    def statement(self) -> str:
        return f"as many trials of each method as come closest to {self.wanted:g} s of the device"

    def hold(self, point: Point, axes: Sequence[Axis]) -> Held:
        return Held(tuple(axes), room=self.room)

    def room(self, seconds: Sequence[float], running: int) -> int:
        """Return how many more trials bring a method closest to its seconds, if they take what earlier ones took."""
        if not seconds:
            return max(0, self.config.workers - running)  # one shows what a trial takes
        each = sum(seconds) / len(seconds)
        left = self.wanted - sum(seconds) - running * each
        return max(0, round(left / each)) if each > 0 else 1

    def had(self, spec: RunSpec, record: Mapping[str, Any] | None, seconds: float | None) -> float | None:
        return seconds


class Predicted(Budget):
    """A budget that rests on predictions, each configuration's made once."""

    def __init__(self, config: SearchConfig, resolver: Resolver) -> None:
        super().__init__(config, resolver)
        self._known: dict[str, tuple[int, float]] = {}

    def predicted(self, point: Point) -> tuple[int, float]:
        """Return peak bytes, and FLOPs of a step; raises UserError where the point cannot run or be predicted."""
        from peftbench.estimate import predict, setting_of

        spec, task = self.resolver.sketch(point)
        rates = (
            "learning_rate",
            "weight_decay",
            "warmup",
            "schedule",
            "steps",
            "epochs",
            "clip_norm",
            "beta1",
            "beta2",
        )
        train = {k: v for k, v in spec.train.items() if k not in rates}
        key = canonical([spec.model, spec.method, spec.task, train])
        if key not in self._known:
            found = predict(setting_of(spec, task), self.resolver.device, exact=False)
            self._known[key] = found.peak, found.flops_per_token * spec.train["batch_size"] * spec.train["max_length"]
        return self._known[key]


class Memory(Predicted):
    """A predicted peak of memory at most."""

    unit = "bytes"

    @property
    def wanted(self) -> float:
        return float(_bytes(self.config))

    def identity(self) -> str:
        return f"{_bytes(self.config)} bytes at most"

    def statement(self) -> str:
        return (
            f"{self.config.trials} trials of each method, none of them predicted to need more than "
            f"{self.config.memory} on {self.resolver.device_kind}"
        )

    def hold(self, point: Point, axes: Sequence[Axis]) -> Held:
        from peftbench.search.space import narrowed

        method = str(point["method"])

        def refused(settings: Mapping[str, Any]) -> str | None:
            try:
                peak = self.predicted({**point, **settings})[0]
            except UserError as error:
                return str(error)
            return None if peak <= self.wanted else f"a step is predicted to need {peak} bytes"

        kept, lines = [], []
        middle: dict[str, Any] = {}
        for axis in axes:
            least = {a.key: _least(a) for a in axes if a.key != axis.key and a.key not in middle}
            part, line = narrowed(axis, lambda value, k=axis.key, o=least: refused({**o, k: value}))  # type: ignore[misc]
            if part is None:
                raise Unmatched(f"{line}; wanted were {int(self.wanted)} at most")
            if line is not None:
                lines.append(f"{method}: {axis.key}: {line}")
            kept.append(part)

        def complete(settings: Mapping[str, Any]) -> dict[str, Any]:
            reason = refused(settings)
            if reason is not None:
                raise UserError(f"method={method}: {reason}; search.memory={self.config.memory}")
            return dict(settings)

        some = {axis.key: axis.params()[0] for axis in kept}
        return Held(tuple(kept), complete, some=some, lines=tuple(lines))

    def had(self, spec: RunSpec, record: Mapping[str, Any] | None, seconds: float | None) -> float | None:
        measured = ((record or {}).get("cost") or {}).get("memory") or {}
        return None if measured.get("peak") is None else float(measured["peak"])

    def matches(self, had: float) -> bool:
        return had <= self.wanted


class Flops(Predicted):
    """FLOPs of a trial, by the number of its steps."""

    unit = "FLOPs"
    _target: float | None = None

    @property
    def wanted(self) -> float | None:
        return self._target

    def identity(self) -> str:
        return f"{self._target:.9g} FLOPs"

    def statement(self) -> str:
        return (
            f"{self.config.trials} trials of each method, with as many steps as make {self._target or 0:.3g} FLOPs on "
            "batches of full length"
        )

    def hold(self, point: Point, axes: Sequence[Axis]) -> Held:
        if any(axis.key in ("train.steps", "train.epochs") for axis in axes):
            raise UserError(
                "search.budget=flops: decides train.steps; take train.steps and train.epochs out of the space"
            )
        if self._target is None:
            # of the first method in the middle of its space: the same in every process
            middle = {**point, **{axis.key: _middle(axis) for axis in axes}}
            self._target = self.config.target_flops or self._of_recipe(middle)

        def complete(settings: Mapping[str, Any]) -> dict[str, Any]:
            step = self.predicted({**point, **settings})[1]
            assert self._target is not None
            return {**settings, "train.steps": max(1, round(self._target / step))}

        return Held(tuple(axes), complete)

    def _of_recipe(self, point: Point) -> float:
        steps = self.resolver.sketch(point)[0].train["steps"]
        if steps is None:
            raise UserError("search.budget=flops: expected train.steps or search.target_flops")
        return float(steps * self.predicted(point)[1])

    def had(self, spec: RunSpec, record: Mapping[str, Any] | None, seconds: float | None) -> float | None:
        per_token = _number(record, "flops_per_token")
        train = spec.train
        return None if per_token is None else per_token * train["steps"] * train["batch_size"] * train["max_length"]


KINDS: dict[str, type[Budget]] = {
    "trials": Budget,
    "parameters": Parameters,
    "wall_clock": WallClock,
    "memory": Memory,
    "flops": Flops,
}


def budget_of(config: SearchConfig, resolver: Resolver) -> Budget:
    """Return the budget that `search.budget` names."""
    return KINDS[config.budget](config, resolver)


def _number(record: Mapping[str, Any] | None, key: str) -> float | None:
    value = ((record or {}).get("cost") or {}).get(key)
    return None if value is None else float(value)


def _values(axes: Sequence[Axis], params: Mapping[str, Any]) -> dict[str, Any]:
    return {axis.key: axis.value(params[axis.key]) for axis in axes if axis.key in params}


def _combinations(axes: Sequence[Axis]) -> list[dict[str, Any]]:
    """Return what a method's count may depend on: all choices of its settings, and a few values of each size."""
    counted = [
        axis
        for axis in axes
        if axis.key.startswith("method.") and (axis.choices or axis.key.removeprefix("method.") in SIZES)
    ]
    found = itertools.product(*(axis.params() for axis in counted))
    keys = [axis.key for axis in counted]
    return [dict(zip(keys, values, strict=True)) for values in itertools.islice(found, MOST_COMBINATIONS)]


def _inside(axis: Axis, value: int) -> bool:
    return value in [v for _, v in axis.choices] if axis.choices else axis.low <= value <= axis.high


def _middle(axis: Axis) -> Any:
    params = axis.params()
    return axis.value(params[(len(params) - 1) // 2])


def _least(axis: Axis) -> Any:
    return axis.value(axis.params()[0])
