"""One Optuna study: its trials are asked for, told, and taken from workers that are gone.

Trials count as soon as they are asked for, so that several workers never make more than there should be. A trial of a
worker that is gone is failed and counts no more; one with the same parameters waits in its place. A worker is gone if
its process is (on this machine), or if its sign of life stays the same for three heartbeats (on another).
"""

from __future__ import annotations

import math
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import optuna
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from peftbench.budget import Held
from peftbench.errors import UserError
from peftbench.record import canonical, plain
from peftbench.search import LOST, samplers
from peftbench.search.settings import SearchConfig
from peftbench.search.space import Axis
from peftbench.store import alive, this_process

WORKER, BEAT, RETRIES = (f"peftbench:{name}" for name in ("worker", "beat", "retries"))
"""System attributes of a running trial: whose it is, a number that changes while its worker lives, and how many workers
it has outlived."""
Direction = Literal["minimize", "maximize"]
MOST_RETRIES = 3
STALE_BEATS = 3
KEPT_ATTRIBUTES = ("grid_id", "search_space")
"""System attributes of samplers that go with a trial's parameters."""


@dataclass(frozen=True)
class About:
    """What a study is for; equal for all who work on it.

    Attributes:
        axes: what its trials vary.
        fixed: all other keys of a run.
        rungs: steps before the first and the last evaluation of a run, for pruning.
        held: what a budget makes of it.
    """

    name: str
    method: str
    model: str
    task: str
    metric: str
    maximise: bool
    axes: tuple[Axis, ...]
    fixed: Mapping[str, Any]
    rungs: tuple[int, int] = (1, 1)
    held: Held = field(default_factory=lambda: Held(()))


def counts(trial: FrozenTrial) -> bool:
    """Whether a trial is one of `search.trials`: not if it was lost, as another stands in for it."""
    return trial.state != TrialState.FAIL or trial.user_attrs.get("status") != LOST


class Study:
    """A study in a storage, as one worker sees it."""

    def __init__(self, about: About, config: SearchConfig, storage: BaseStorage, exclusive: bool) -> None:
        """Load or create the study.

        Args:
            exclusive: whether whoever asks for trials holds the folder's lock: no other machine does without.

        Raises:
            UserError: there is a study of that name which seeks something else.
        """
        self.about, self.config, self.storage, self.exclusive = about, config, storage, exclusive
        self.directions = [self._direction(name) for name in config.objectives]
        self.optuna = optuna.create_study(
            study_name=about.name,
            storage=storage,
            sampler=samplers.sampler(config.sampler, config.seed, about.axes),
            pruner=samplers.pruner(config.pruner, *about.rungs),
            directions=self.directions,
            load_if_exists=True,
        )
        self._describe()
        self.distributions = {axis.key: axis.distribution() for axis in about.axes}
        self.token = uuid.uuid4().hex
        self._id = storage.get_study_id_from_name(about.name)
        self._mine: set[int] = set()
        self._seen: dict[int, tuple[Any, float]] = {}

    def _direction(self, objective: str) -> Direction:
        return "maximize" if objective == "quality" and self.about.maximise else "minimize"

    def _describe(self) -> None:
        about, config = self.about, self.config
        wanted: dict[str, Any] = {
            "method": about.method,
            "model": about.model,
            "task": about.task,
            "metric": about.metric,
            "direction": self.directions[0],
            "objectives": list(config.objectives),
            "axes": {axis.key: axis.to_dict() for axis in about.axes},
            "seed": config.seed,
            "sampler": config.sampler,
            "pruner": config.pruner,
            "fixed": plain(dict(about.fixed)),
        }
        kept = self.optuna.user_attrs
        for key, value in wanted.items():
            if key in kept and canonical(kept[key]) != canonical(value):
                was, now = _difference(kept[key], value)
                raise UserError(
                    f"search: the study {about.name} was made with {key} {was}, not {now}; choose another sweep.name, "
                    "or give what it was made with"
                )
        for key, value in {**wanted, "space": config.space, "trials": config.trials}.items():
            if key not in kept or kept[key] != value:
                self.optuna.set_user_attr(key, value)

    # Trials.

    def trials(self) -> list[FrozenTrial]:
        """Return all trials there are."""
        return self.optuna.get_trials(deepcopy=False)

    def left(self) -> int:
        """Return how many trials nobody has asked for yet."""
        trials = self.trials()
        if self.about.held.room is not None:
            seconds = [float(t.user_attrs.get("seconds") or 0.0) for t in trials if t.state.is_finished() and counts(t)]
            return self.about.held.room(seconds, sum(t.state == TrialState.RUNNING for t in trials))
        return self.config.trials - sum(counts(t) and t.state != TrialState.WAITING for t in trials)

    @property
    def done(self) -> bool:
        """Whether all trials are finished."""
        return self.left() <= 0 and not any(t.state == TrialState.RUNNING for t in self.trials())

    def ask(self, most: int) -> list[optuna.Trial]:
        """Ask for trials, as many as are left and `most` at most; those of workers that are gone come first."""
        asked = []
        for _ in range(min(most, self.left())):
            trial = self.optuna.ask(self.distributions)
            owner = {**this_process(), "token": self.token}
            self.storage.set_trial_system_attr(trial._trial_id, WORKER, owner)
            if not self.exclusive and self._surplus(trial.number):
                self._fail(trial._trial_id, LOST)
                break
            self._mine.add(trial._trial_id)
            asked.append(trial)
        return asked

    def _surplus(self, number: int) -> bool:
        """Whether another machine asked for the last trial at the same time."""
        before = sum(counts(t) and t.state != TrialState.WAITING and t.number < number for t in self.trials())
        return before >= self.config.trials

    def settings(self, trial: optuna.Trial | FrozenTrial) -> dict[str, Any]:
        """Return the keys of a run that a trial sets, and what its budget adds.

        Raises:
            UserError: that is not within the budget.
        """
        return self.about.held.complete({axis.key: axis.value(trial.params[axis.key]) for axis in self.about.axes})

    def report(self, trial: optuna.Trial, step: int, value: float | None) -> None:
        """Note an intermediate value of a study that seeks quality alone."""
        if self.config.objectives != ("quality",) or value is None or not math.isfinite(value):
            return
        if step not in self.storage.get_trial(trial._trial_id).intermediate_values:
            trial.report(value, step)

    def prunes(self, trial: optuna.Trial) -> bool:
        """Whether the trial is to end."""
        return self.config.pruner != "none" and trial.should_prune()

    def tell(
        self, trial: optuna.Trial, state: TrialState, values: Sequence[float] | None, attributes: Mapping[str, Any]
    ) -> None:
        """Finish a trial; `attributes` say what came of it. One that was taken from this worker stays as it is."""
        try:
            for key, value in attributes.items():
                trial.set_user_attr(key, plain(value))
            self.optuna.tell(trial, values, state)
        except (optuna.exceptions.UpdateFinishedTrialError, ValueError):
            if not self.storage.get_trial(trial._trial_id).state.is_finished():
                raise
        self._mine.discard(trial._trial_id)

    # Workers.

    def beat(self) -> None:
        """Give a sign of life for all running trials of this worker."""
        for trial_id in list(self._mine):
            try:
                self.storage.set_trial_system_attr(trial_id, BEAT, time.time())
            except optuna.exceptions.UpdateFinishedTrialError:
                self._mine.discard(trial_id)

    def reap(self) -> int:
        """Take trials from workers that are gone; returns how many."""
        gone = [t for t in self.trials() if t.state == TrialState.RUNNING and self._gone(t)]
        for trial in gone:
            retries = int(trial.system_attrs.get(RETRIES, 0))
            again = retries < MOST_RETRIES
            if not self._fail(trial._trial_id, LOST if again else "failed") or not again:
                continue
            kept = {key: trial.system_attrs[key] for key in KEPT_ATTRIBUTES if key in trial.system_attrs}
            self.optuna.add_trial(
                optuna.trial.create_trial(
                    state=TrialState.WAITING,
                    params=trial.params,
                    distributions=trial.distributions,
                    system_attrs={**kept, RETRIES: retries + 1},
                )
            )
        return len(gone)

    def _gone(self, trial: FrozenTrial) -> bool:
        owner, now = trial.system_attrs.get(WORKER), time.monotonic()
        if owner is None and self.exclusive:
            return True  # ended while it asked: we hold the lock now
        me = this_process()
        if owner is not None and owner.get("host") == me["host"]:
            earlier = owner.get("pid") == me["pid"] and owner.get("token") != self.token
            return earlier or not alive(owner)
        sign = (canonical(owner), trial.system_attrs.get(BEAT))
        seen, since = self._seen.setdefault(trial.number, (sign, now))
        if seen != sign:
            self._seen[trial.number] = (sign, now)
            return False
        return now - since > STALE_BEATS * self.config.heartbeat

    def _fail(self, trial_id: int, status: str) -> bool:
        """Fail a running trial; returns whether nobody else had finished it."""
        try:
            self.storage.set_trial_user_attr(trial_id, "status", status)
            if status != LOST:
                reason = f"the process that trained it ended, {MOST_RETRIES + 1} times"
                self.storage.set_trial_user_attr(trial_id, "error", reason)
            return self.storage.set_trial_state_values(trial_id, TrialState.FAIL)
        except optuna.exceptions.UpdateFinishedTrialError:
            return False


def _difference(was: Any, now: Any) -> tuple[str, str]:
    """Return the first part in which two attributes differ, as text."""
    if isinstance(was, Mapping) and isinstance(now, Mapping):
        for key in (*was, *now):
            if canonical(was.get(key)) != canonical(now.get(key)):
                return f"{key}={_short(was.get(key))}", f"{key}={_short(now.get(key))}"
    return _short(was), _short(now)


def _short(value: Any) -> str:
    return value if isinstance(value, str) else canonical(value)


@dataclass
class Heart:
    """A thread that gives signs of life for a worker's trials."""

    studies: Sequence[Study]
    seconds: float
    _stop: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Heart:
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    def _beat(self) -> None:
        while not self._stop.wait(self.seconds):
            for study in self.studies:
                try:
                    study.beat()
                except optuna.exceptions.StorageInternalError:
                    continue  # a database that does not answer now may do so by the next beat
