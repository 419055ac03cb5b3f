"""Hydra's command-line grammar → the keys and values of a grid."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from peftbench.config import SweepConfig, SweepName, settings
from peftbench.errors import UserError, nearest
from peftbench.plan import GROUPS, RUN_KEYS

TOP_KEYS = tuple(f.name for f in settings(SweepConfig) if f.name not in (*RUN_KEYS, "sweep")) + tuple(
    f"sweep.{f.name}" for f in settings(SweepName)
)
"""Keys about the sweep as a whole: one value each, not to be swept."""


@dataclass
class Overrides:
    """`grid` key → values in the order given, `top` key → value, `hydra` overrides as they stand, `lines` for Hydra."""

    grid: dict[str, list[Any]] = field(default_factory=dict)
    top: dict[str, Any] = field(default_factory=dict)
    hydra: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    swept: list[str] = field(default_factory=list)

    @property
    def settings(self) -> dict[str, Any]:
        """`top` as SweepConfig takes it; the folder is named after the experiment unless a name is given."""
        found = {k: v for k, v in self.top.items() if not k.startswith("sweep.")}
        name = self.top.get("sweep.name", self.top.get("experiment"))
        if name is not None and "sweep.name" not in self.top and is_file(str(name)):
            name = None  # the file's own
        return found if name is None else {**found, "sweep": {"name": str(name)}}


def is_file(experiment: str) -> bool:
    """Whether `experiment=` names a yaml file rather than a folder of experiments/."""
    return experiment.endswith((".yaml", ".yml"))


def _parser() -> Any:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create()


def parse(arguments: Sequence[str]) -> Overrides:
    """Parse command-line overrides; raises UserError for what Hydra's grammar or the vocabulary does not have."""
    from hydra.core.override_parser.types import Glob, Override, ValueType
    from hydra.errors import HydraException

    from peftbench import registry

    found = Overrides()
    for argument in arguments:
        if "=" not in argument and not argument.startswith("~"):
            raise UserError(f"{argument}: expected key=value")
        if argument.endswith("=") and argument.count("=") == 1:
            raise UserError(f"{argument}: expected a value after the equals sign (null for none)")
        try:
            (override,) = _parser().parse_overrides([argument])
        except HydraException as error:
            reason = " ".join(str(error).split("\nSee ")[0].split())
            raise UserError(f"{argument}: not a value that Hydra can read ({reason})") from error
        if override.is_hydra_override():
            found.hydra.append(argument)
            continue
        key = override.key_or_group
        if override.is_delete():
            raise UserError(f"{argument}: keys cannot be deleted; set {key}=null instead")
        if override.package is not None:
            raise UserError(f"{argument}: packages (@) have no meaning here")
        if override.value_type is ValueType.INTERVAL_SWEEP:
            raise UserError(f"{argument}: an interval has no list of values; use range() or a comma list")
        if override.is_sweep_override():
            if override.value_type is ValueType.GLOB_CHOICE_SWEEP:
                if key not in GROUPS:
                    raise UserError(f"{argument}: glob() chooses among {', '.join(GROUPS)}")
                assert isinstance(override._value, Glob)
                values: list[Any] = override._value.filter(list(registry.options(key)))
                if not values:
                    raise UserError(f"{argument}: matches none of {', '.join(registry.options(key))}")
            else:
                values = [Override._convert_value(value) for value in override.sweep_iterator()]
        else:
            values = [override.value()]
        if key in TOP_KEYS:
            if override.is_sweep_override():
                raise UserError(f"{argument}: {key} takes one value, it cannot be swept")
            found.top[key] = values[0]
            found.lines.append(argument.lstrip("+"))
            continue
        group, dot, _ = key.partition(".")
        if group not in GROUPS + RUN_KEYS or (dot and group in RUN_KEYS):
            valid = GROUPS + RUN_KEYS + TOP_KEYS
            raise UserError(f"{key}: no such key{nearest(key, valid)} (valid: {', '.join(valid)})")
        if override.is_sweep_override():
            found.swept.append(argument)
        found.grid[key] = values
        # A fixed value becomes a choice of one: Hydra would set it on the default method, which may not have the key.
        prefix, _, text = argument.partition("=")
        bare = prefix.lstrip("+")
        if override.is_sweep_override():
            found.lines.append(f"{bare}={text}")
        else:  # choice() refuses null, a comma list does not; equal points collapse
            found.lines.append(f"{bare}=null,null" if values == [None] else f"{bare}=choice({text})")
    return found
