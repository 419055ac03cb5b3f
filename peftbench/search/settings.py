"""`search.*` on the command line: what is sought, how, and where it is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peftbench import budget
from peftbench.config import build, in_range, one_of
from peftbench.errors import UserError

SAMPLERS = ("tpe", "gp", "nsga2", "random", "grid")
PRUNERS = ("none", "successive_halving", "hyperband", "median")
OBJECTIVES = ("quality", "adapter_parameters", "memory", "time")
"""What a trial is judged by: less is better, but for quality where the task says otherwise."""
MEASURED = ("memory", "time")
"""Objectives that rest on a measurement of cost."""
BATCH = 8
"""Trials asked for at once where nobody says how many."""


@dataclass(frozen=True)
class SearchConfig:
    """How a search goes.

    Attributes:
        trials: of each study, those that were pruned, diverged or failed included.
        space: the name of a file in ``conf/search`` or the path of one.
        batch: trials that are asked for at once and train side by side.
        seed: of the sampler; the runs' own is the key ``seed``.
        storage: ``sqlite`` or ``journal`` in the results folder, or a database's URL.
        workers: processes on this machine.
        heartbeat: seconds between two signs of life; a worker on another machine is given up after three without one.
        protocol: ``search``, or ``equal_budget``, for which the others are; see `peftbench.budget`.
        budget: what is held equal.
        final_seeds: of each method's best configuration, on seeds that no trial had.
        tolerance: share by which what is held equal may be missed.
        target_parameters, seconds, memory, target_flops: how much of it.
    """

    trials: int = 32
    space: str = "default"
    sampler: str = "tpe"
    pruner: str = "none"
    objectives: tuple[str, ...] = ("quality",)
    batch: str | int = "auto"
    seed: int = 0
    storage: str = "sqlite"
    workers: int = 1
    heartbeat: float = 60.0
    protocol: str = "search"
    budget: str = "trials"
    final_seeds: int = 5
    tolerance: float = 0.1
    target_parameters: str | int | None = None
    seconds: float | None = None
    memory: str | int | float | None = None
    target_flops: float | None = None

    def __post_init__(self) -> None:
        in_range("search.trials", self.trials, 1)
        one_of("search.sampler", self.sampler, SAMPLERS)
        one_of("search.pruner", self.pruner, PRUNERS)
        for name in self.objectives:
            one_of("search.objectives", name, OBJECTIVES)
        if not self.objectives or len(set(self.objectives)) < len(self.objectives):
            raise UserError(f"search.objectives={','.join(self.objectives)}: expected different names, at least one")
        if len(self.objectives) > 1 and self.pruner != "none":
            raise UserError(f"search.pruner={self.pruner}: with several objectives nothing is pruned; expected none")
        if self.pruner != "none" and self.objectives != ("quality",):
            raise UserError(f"search.pruner={self.pruner}: prunes by quality; expected search.objectives=quality")
        if isinstance(self.batch, str) and self.batch != "auto":
            raise UserError(f"search.batch={self.batch}: expected auto or a whole number of at least 1")
        if not isinstance(self.batch, str):
            in_range("search.batch", self.batch, 1)
        in_range("search.seed", self.seed, 0, 2**31 - 1)
        if self.storage not in ("sqlite", "journal") and "://" not in self.storage:
            raise UserError(f"search.storage={self.storage}: expected sqlite, journal or a database's URL")
        in_range("search.workers", self.workers, 1)
        in_range("search.heartbeat", self.heartbeat, 0, open_low=True)
        one_of("search.protocol", self.protocol, ("search", budget.PROTOCOL))
        budget.check(self)

    @property
    def batch_size(self) -> int:
        """Trials of a study that one worker asks for at once."""
        if not isinstance(self.batch, str):
            return self.batch
        return max(1, min(BATCH, -(-self.trials // self.workers)))


def split(arguments: Sequence[str]) -> tuple[SearchConfig, list[str]]:
    """Return what the command line says of the search, and the arguments that are a sweep's.

    Raises:
        UserError: an unknown key, or a value that does not fit.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import Override
    from hydra.errors import HydraException

    found: dict[str, Any] = {}
    rest: list[str] = []
    for argument in arguments:
        key, equals, text = argument.lstrip("+").partition("=")
        group, _, name = key.partition(".")
        if argument == f"protocol={budget.PROTOCOL}":
            found["protocol"] = budget.PROTOCOL  # runs themselves are held out: validation selects, test is reported
            continue
        if group != "search":
            rest.append(argument)
            continue
        if not name or not equals or not text:
            raise UserError(f"{argument}: expected search.<key>=<value>")
        if name == "storage":  # a URL is no value of Hydra's grammar
            found[name] = text
            continue
        try:
            (override,) = OverridesParser.create().parse_overrides([argument])
        except HydraException as error:
            reason = " ".join(str(error).split("\nSee ")[0].split())
            raise UserError(f"{argument}: not a value that Hydra can read ({reason})") from error
        value: Any = override.value()
        if override.is_sweep_override():
            value = [Override._convert_value(v) for v in override.sweep_iterator()]
        if name == "objectives":
            value = tuple(value) if isinstance(value, list) else (value,)
            if not all(isinstance(one, str) for one in value):
                raise UserError(f"{argument}: expected names, of {', '.join(OBJECTIVES)}")
        elif isinstance(value, list):
            raise UserError(f"{argument}: search.{name} takes one value")
        found[name] = value
    return build(SearchConfig, found, "search"), rest
