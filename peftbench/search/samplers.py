"""Samplers and pruners by name, each trial with a seed of its own."""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from peftbench.search import LOST
from peftbench.search.space import Axis

STARTUP = 10
"""Random trials before a sampler that learns begins to."""


class Seeded(BaseSampler):
    """A sampler made anew for each trial, from the search's seed and the trial's place among those that were not lost.

    So a search that was interrupted goes on with the trials it would have had, and no two workers repeat each other.
    """

    def __init__(self, make: Callable[[int], BaseSampler], seed: int) -> None:
        self._make, self._seed = make, seed
        self._inner = make(0)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Called by Optuna when a trial is asked for."""
        place = _place(study, trial)
        state = np.random.SeedSequence([self._seed, place]).generate_state(1)
        # the values of a grid are in an order of the search's own
        number = self._seed if isinstance(self._inner, optuna.samplers.GridSampler) else int(state[0]) % 2**31
        self._inner = self._make(number)
        placed = copy.copy(trial)
        placed.number = place  # a grid goes by it
        self._inner.before_trial(study, placed)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return the parameters that are sampled together."""
        return self._inner.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Sample parameters together."""
        return self._inner.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Sample one parameter by itself."""
        return self._inner.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        """Called by Optuna when a trial is told; a grid would end the study here, which its own loop decides."""
        if not isinstance(self._inner, optuna.samplers.GridSampler):
            self._inner.after_trial(study, trial, state, values)


def _place(study: optuna.Study, trial: FrozenTrial) -> int:
    """Return how many trials went before that were not lost."""
    others = study.get_trials(deepcopy=False)
    return trial.number - sum(t.number < trial.number and t.user_attrs.get("status") == LOST for t in others)


def sampler(name: str, seed: int, axes: Sequence[Axis]) -> BaseSampler:
    """Return a sampler by name."""
    made: dict[str, Callable[[int], BaseSampler]] = {
        "tpe": lambda s: optuna.samplers.TPESampler(
            seed=s, n_startup_trials=STARTUP, multivariate=True, constant_liar=True
        ),
        "gp": lambda s: optuna.samplers.GPSampler(seed=s, n_startup_trials=STARTUP, deterministic_objective=False),
        "nsga2": lambda s: optuna.samplers.NSGAIISampler(seed=s, population_size=16),
        "random": lambda s: optuna.samplers.RandomSampler(seed=s),
        "grid": lambda s: optuna.samplers.GridSampler({axis.key: axis.params() for axis in axes}, seed=s),
    }
    return Seeded(made[name], seed)


def grid_size(axes: Sequence[Axis]) -> int:
    """Return how many points a grid has."""
    return int(np.prod([len(axis.params()) for axis in axes], dtype=object))


class Halving(optuna.pruners.BasePruner):
    """Successive halving (Jamieson and Talwalkar 2016, arXiv:1502.07943): at each rung the best 1/`factor` go on.

    Rungs are at `first` steps, `factor` times that, and so on. A trial is held against all that have reached the rung,
    those beside it in its pack included, which were evaluated with it. Trials that come later find more to be held
    against, as with workers that wait for nobody (Li et al. 2020, arXiv:1810.05934).
    """

    def __init__(self, first: int, factor: int = 2, company: Callable[[FrozenTrial], Any] = lambda trial: None) -> None:
        self.first, self.factor, self.company = first, factor, company

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Whether the trial's last value is not among the best of its rung; False between rungs."""
        steps = sorted(trial.intermediate_values)
        if not steps:
            return False
        before = steps[-2] if len(steps) > 1 else 0
        rung, level = None, self.first
        while level <= steps[-1]:
            rung = level if level > before else rung
            level *= self.factor
        if rung is None:
            return False
        sign = 1.0 if study.direction == optuna.study.StudyDirection.MAXIMIZE else -1.0
        mine = self.company(trial)
        others = [t for t in study.get_trials(deepcopy=False) if t.number != trial.number and self.company(t) == mine]
        reached = [sign * value for t in others if (value := _value_at(t, rung)) is not None]
        value = sign * trial.intermediate_values[steps[-1]]
        better = sum(other > value for other in reached)
        return better >= max(1, math.ceil((len(reached) + 1) / self.factor))


def _value_at(trial: FrozenTrial, rung: int) -> float | None:
    """Return a trial's value where it reached a rung, if it did."""
    step = min((s for s in trial.intermediate_values if s >= rung), default=None)
    return None if step is None else trial.intermediate_values[step]


class Hyperband(optuna.pruners.BasePruner):
    """Hyperband (Li et al. 2018, arXiv:1603.06560): successive halving in brackets that begin it later and later.

    A trial's bracket follows from the study's name and its number; early brackets, which prune most, have most trials.
    """

    def __init__(self, first: int, last: int, factor: int = 3) -> None:
        brackets = 1
        while first * factor**brackets <= last:
            brackets += 1
        self.pruners = [Halving(first * factor**b, factor, self.bracket) for b in range(brackets)]
        self.shares = [math.ceil(brackets * factor ** (brackets - 1 - b) / (brackets - b)) for b in range(brackets)]
        self.study = ""

    def bracket(self, trial: FrozenTrial) -> int:
        """Return a trial's bracket: 0 begins to prune first."""
        place = zlib.crc32(f"{self.study}_{trial.number}".encode()) % sum(self.shares)
        for bracket, share in enumerate(self.shares):
            place -= share
            if place < 0:
                return bracket
        raise AssertionError(trial.number)

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Whether its bracket's halving prunes the trial."""
        self.study = study.study_name
        return self.pruners[self.bracket(trial)].prune(study, trial)


def pruner(name: str, first: int, last: int) -> optuna.pruners.BasePruner:
    """Return a pruner by name, for runs that are first evaluated after `first` steps and last after `last`."""
    if name == "successive_halving":
        return Halving(first)
    if name == "hyperband":
        return Hyperband(first, last)
    if name == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=4)
    return optuna.pruners.NopPruner()
