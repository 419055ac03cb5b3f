"""What a search varies: `conf/search/<name>.yaml`, or a file of the same form, as axes of a method's space.

common:                        # of all methods; method.* where a method declares it
  train.learning_rate: {around: suggested, factor: 10}
per_method:                    # goes before common; null takes an axis out
  lora:
    method.rank: {low: 2, high: 64, log: true}     # whole numbers; step: <n> is possible
    method.dropout: {low: 0.0, high: 0.2}
    method.targets: {choices: {all: [all], value: [attention.value]}}
    method.rank_stabilized: [false, true]
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from peftbench import registry
from peftbench.config import TrainConfig, settings
from peftbench.errors import UserError, nearest
from peftbench.record import canonical

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

KEYS = ("common", "per_method")
AXIS_KEYS = ("low", "high", "log", "step", "choices", "around", "factor")
GRID_POINTS = 5
"""Values of a range on a grid."""


@dataclass(frozen=True)
class Axis:
    """One key and the values it may take: a range of numbers from `low` to `high`, or `choices` by label."""

    key: str
    low: float | int = 0
    high: float | int = 0
    log: bool = False
    step: int | None = None
    choices: tuple[tuple[Any, Any], ...] = ()

    @property
    def whole(self) -> bool:
        """Whether it is a range of whole numbers."""
        return not self.choices and isinstance(self.low, int)

    def distribution(self) -> BaseDistribution:
        """Return the axis as Optuna has it."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.choices:
            return CategoricalDistribution([label for label, _ in self.choices])
        if isinstance(self.low, int) and isinstance(self.high, int):
            return IntDistribution(self.low, self.high, log=self.log, step=self.step or 1)
        return FloatDistribution(self.low, self.high, log=self.log)

    def value(self, param: Any) -> Any:
        """Return the setting that a parameter of a trial stands for."""
        for label, value in self.choices:
            if label == param and type(label) is type(param):
                return value
        assert not self.choices, (self.key, param)
        return int(param) if self.whole else float(param)

    def params(self) -> list[Any]:
        """Return the parameters of a grid: all choices, or up to `GRID_POINTS` of a range, ends included."""
        if self.choices:
            return [label for label, _ in self.choices]
        if self.whole and (self.high - self.low) // (self.step or 1) < GRID_POINTS and not self.log:
            return list(range(int(self.low), int(self.high) + 1, self.step or 1))
        shares = [i / (GRID_POINTS - 1) for i in range(GRID_POINTS)]
        if self.log:
            values = [self.low * (self.high / self.low) ** share for share in shares]
        else:
            values = [self.low + (self.high - self.low) * share for share in shares]
        if not self.whole:
            return [float(self.low), *map(float, values[1:-1]), float(self.high)]
        step = self.step or 1
        return sorted({int(self.low) + round((v - self.low) / step) * step for v in values})

    def to_dict(self) -> dict[str, Any]:
        """Return the axis as a space's yaml has it."""
        if self.choices:
            return {"choices": {str(label): value for label, value in self.choices}}
        step = {} if self.step is None else {"step": self.step}
        return {"low": self.low, "high": self.high, "log": self.log, **step}


def as_choices(key: str, values: Sequence[Any] | Mapping[str, Any]) -> Axis:
    """Return an axis of choices; those that Optuna cannot name are called by their text."""
    if isinstance(values, Mapping):
        return Axis(key, choices=tuple((str(label), value) for label, value in values.items()))
    simple = (bool, int, float, str)
    named = [(v if v is None or isinstance(v, simple) else _label(v), v) for v in values]
    return Axis(key, choices=tuple({(type(label), label): (label, v) for label, v in named}.values()))


def _label(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, (list, tuple)) else canonical(value)


def path_of(name: str) -> Path:
    """Return the file of a space; raises UserError if there is none."""
    folder = registry.conf_folder() / "search"
    valid = [p.stem for p in sorted(folder.glob("*.yaml"))]
    if name in valid:
        return folder / f"{name}.yaml"
    path = Path(name).expanduser()
    if path.suffix in (".yaml", ".yml") or "/" in name:
        if path.is_file():
            return path
        raise UserError(f"search.space={name}: no such file")
    raise UserError(f"search.space={name}: no such space{nearest(name, valid)} (known: {', '.join(valid)}, or a file)")


def read(name: str) -> tuple[Path, dict[str, Any]]:
    """Read a space's file; raises UserError for one that cannot be read, or keys it cannot have."""
    from omegaconf import OmegaConf

    path = path_of(name)
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not readable as yaml ({type(error).__name__}: {reason})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a mapping with {' and '.join(KEYS)}")
    for key in map(str, content):
        if key not in KEYS:
            raise UserError(f"{path}: {key}: no such key{nearest(key, KEYS)} (valid: {', '.join(KEYS)})")
    per_method = content.get("per_method") or {}
    for section in (content.get("common") or {}, per_method, *(per_method.values() if _maps(per_method) else ())):
        if section is not None and not _maps(section):
            raise UserError(f"{path}: {section}: expected a mapping")
    known = registry.options("method")
    for method in per_method:
        if method not in known:
            raise UserError(f"{path}: per_method.{method}: no such method{nearest(str(method), known)}")
    return path, {str(key): value for key, value in content.items()}


def _maps(value: Any) -> bool:
    return isinstance(value, Mapping)


def axes(name: str, methods: Sequence[str]) -> dict[str, list[Axis]]:
    """Return each method's axes of the space `name`.

    Raises:
        UserError: naming file and key: a setting that a method does not declare, or a range that is none.
    """
    path, content = read(name)
    common, per_method = content.get("common") or {}, content.get("per_method") or {}
    declared = {method: registry.declared(method) for method in methods}
    recipe = {f.name for f in settings(TrainConfig)}
    for key in common:
        group, dot, setting = str(key).partition(".")
        if group == "method" and dot and not any(setting in known for known in declared.values()):
            everything = sorted(set().union(*declared.values()))
            raise UserError(
                f"{path}: common.{key}: not a setting of {', '.join(methods)}{nearest(setting, everything)}"
            )
    found: dict[str, list[Axis]] = {}
    for method in methods:
        own = per_method.get(method) or {}
        for key in (*common, *own):
            where = f"{path}: {f'per_method.{method}' if key in own else 'common'}.{key}"
            group, dot, setting = str(key).partition(".")
            if group not in ("method", "train") or not dot:
                raise UserError(f"{where}: expected method.<setting> or train.<setting>")
            valid = sorted(declared[method] if group == "method" else recipe)
            if setting not in valid and not (group == "method" and key in common and key not in own):
                what = f"setting of {method}" if group == "method" else "key of train"
                hint = nearest(setting, valid) or f" (valid: {', '.join(valid) or 'none'})"
                raise UserError(f"{where}: not a {what}{hint}")
        merged = {k: v for k, v in {**common, **own}.items() if v is not None}
        found[method] = [
            _axis(str(key), value, method, f"{path}: {f'per_method.{method}' if key in own else 'common'}.{key}")
            for key, value in merged.items()
            if not str(key).startswith("method.") or str(key).removeprefix("method.") in declared[method]
        ]
    return found


def _axis(key: str, value: Any, method: str, where: str) -> Axis:
    """Return one axis; `where` names file and key in errors."""
    if isinstance(value, list):
        return _chosen(key, value, where)
    if not _maps(value):
        raise UserError(f"{where}={value}: expected a list of choices, or a mapping with low and high")
    for name in value:
        if name not in AXIS_KEYS:
            hint = nearest(str(name), AXIS_KEYS)
            raise UserError(f"{where}.{name}: no such key{hint} (valid: {', '.join(AXIS_KEYS)})")
    if "choices" in value:
        return _chosen(key, value["choices"], where)
    if "around" in value:
        return _around(key, value, method, where)
    return ranged(key, value.get("low"), value.get("high"), bool(value.get("log", False)), value.get("step"), where)


def _chosen(key: str, values: Any, where: str) -> Axis:
    if not isinstance(values, (list, Mapping)) or not values:
        raise UserError(f"{where}: expected a list of choices, at least one")
    return as_choices(key, values)


def _around(key: str, value: Mapping[str, Any], method: str, where: str) -> Axis:
    middle, factor = value["around"], value.get("factor")
    if middle == "suggested":
        setting = key.partition(".")[2]
        middle = (registry.section("method", method).get("suggested") or {}).get(setting)
        if middle is None:
            raise UserError(f"{where}: conf/method/{method}.yaml suggests no {setting}; expected low and high")
    if not _number(middle) or not _number(factor) or middle <= 0 or factor <= 1:
        raise UserError(f"{where}: expected around: suggested or a number above 0, and a factor above 1")
    return Axis(key, float(middle) / float(factor), float(middle) * float(factor), log=True)


def ranged(key: str, low: Any, high: Any, log: bool, step: Any, where: str) -> Axis:
    """Return an axis from `low` to `high`; raises UserError for what is no range."""
    if not _number(low) or not _number(high) or low >= high:
        raise UserError(f"{where}: expected numbers low and high, low below high; these are {low} and {high}")
    whole = isinstance(low, int) and isinstance(high, int)
    if log and low <= 0:
        raise UserError(f"{where}: expected low above 0 with log; it is {low}")
    if step is not None and (not whole or log or not isinstance(step, int) or step < 1):
        raise UserError(f"{where}.step={step}: expected a whole number of at least 1, in a range of whole numbers")
    return Axis(key, low, high, log, step) if whole else Axis(key, float(low), float(high), log)


def _number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def narrowed(axis: Axis, refused: Callable[[Any], str | None]) -> tuple[Axis | None, str | None]:
    """Return the part of an axis that a model and a task allow, and a line about what was left out.

    Choices are left out one by one; a range of whole numbers loses its upper part, by halves. None: nothing is left.

    Args:
        refused: says why a value cannot be, or None.
    """
    if axis.choices:
        reasons = {label: refused(value) for label, value in axis.choices}
        kept = tuple((label, value) for label, value in axis.choices if reasons[label] is None)
        lost = [str(label) for label, reason in reasons.items() if reason is not None]
        if not lost:
            return axis, None
        why = next(r for r in reasons.values() if r is not None)
        return (dataclasses.replace(axis, choices=kept) if kept else None), f"{', '.join(lost)} left out ({why})"
    reason = refused(axis.low)
    if reason is not None:
        return None, reason
    first, high = refused(axis.high), axis.high
    if first is None:
        return axis, None
    if not isinstance(axis.low, int):
        return None, first
    low, step = int(axis.low), axis.step or 1
    while high > low and refused(high) is not None:
        high = low + int(high - low) // 2 // step * step
    if high == low:
        return Axis(axis.key, choices=((low, low),)), f"only {low} ({first})"
    return dataclasses.replace(axis, high=high), f"up to {high} instead of {axis.high} ({first})"
