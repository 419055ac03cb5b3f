"""What a worker of a search does: asks for trials, trains them as packs and tells what came of them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import optuna
from optuna.trial import TrialState

from peftbench import environment, progress
from peftbench.analysis import tuning
from peftbench.errors import UserError
from peftbench.plan import Group
from peftbench.record import RunSpec
from peftbench.resolve import Plan
from peftbench.run import run_pack
from peftbench.search.prepare import Prepared
from peftbench.search.storage import OWN, check_reachable, locked, open_storage
from peftbench.search.studies import Heart, Study, counts
from peftbench.store import Store
from peftbench.sweep import pack_up
from peftbench.training import Evaluation, schedule

if TYPE_CHECKING:
    from peftbench.capacity import Fit

POLL_SECONDS = 0.5
"""Between two looks at what other workers have done."""
HALVING = ("successive_halving", "hyperband")


@dataclass
class Asked:
    """A trial in hand, and the run that it stands for; `error` says why it is none."""

    study: Study
    trial: optuna.Trial
    spec: RunSpec | None = None
    error: str | None = None

    @property
    def mark(self) -> dict[str, Any]:
        """What the run's record says of the trial."""
        return {"study": self.study.about.name, "trial": self.trial.number}


@dataclass
class Watch:
    """Reports evaluations to the trials that wait for them, and prunes runs that none of its trials wants."""

    asked: Mapping[str, Sequence[Asked]]
    note: Callable[[str], None] = lambda line: None
    _told: bool = field(default=False, init=False)

    def evaluated(self, found: Sequence[Evaluation]) -> list[str | None]:
        """Report all first, so that runs of a pack are held against each other."""
        try:
            for one in found:
                for a in self.asked.get(one.spec.run_id, ()):
                    a.study.report(a.trial, one.step, one.metrics.get(a.study.about.metric))
            return [None if one.last else self._reason(one) for one in found]
        except optuna.exceptions.StorageInternalError as error:
            if not self._told:  # training goes on: what was not reported now is when the trial is told
                self._told = True
                self.note(f"the study cannot be reached, nothing is pruned meanwhile ({str(error).splitlines()[0]})")
            return [None] * len(found)

    def _reason(self, one: Evaluation) -> str | None:
        asked = self.asked.get(one.spec.run_id, ())
        if not asked or not all(a.study.prunes(a.trial) for a in asked):
            return None
        first = asked[0]
        value = one.metrics.get(first.study.about.metric)
        shown = "undefined" if value is None else f"{value:.4g}"
        return f"pruned by {first.study.config.pruner}: {first.study.about.metric} {shown} after {one.step} steps"

    def about(self, spec: RunSpec) -> dict[str, Any] | None:
        """Return study and trial."""
        asked = self.asked.get(spec.run_id)
        return asked[0].mark if asked else None


def open_studies(prepared: Prepared) -> list[Study]:
    """Create or load the studies of a search, one process at a time.

    Raises:
        UserError: the storage cannot be opened, or holds a study of that name which seeks something else.
    """
    config = prepared.config
    abouts = prepared.abouts
    if config.pruner in HALVING:
        abouts = [
            dataclasses.replace(about, rungs=schedule(spec)) for about, spec in zip(abouts, prepared.specs, strict=True)
        ]
    if config.storage not in OWN:
        check_reachable(config.storage, prepared.folder)
    Store(prepared.folder).prepare()
    with locked(prepared.folder):
        storage = open_storage(config.storage, prepared.folder)
        return [Study(about, config, storage, config.storage in OWN) for about in abouts]


class Worker:
    """One process at work on a search; others may work on the same studies."""

    def __init__(
        self,
        prepared: Prepared,
        quiet: bool = False,
        alone: bool = True,
        tell: Callable[[str], None] = lambda line: None,
        studies: list[Study] | None = None,
    ) -> None:
        """Open the studies unless they are given; a worker that is not `alone` on its terminal writes lines."""
        self.prepared, self.quiet, self.alone, self.tell = prepared, quiet, alone, tell
        self.studies = open_studies(prepared) if studies is None else studies
        self.store = Store(prepared.folder, prepared.sweep.retry_failed)
        self.fit = self._fit()

    def _fit(self) -> Fit | None:
        device = self.prepared.resolver.device
        known = environment.memory(device)
        if known is None:
            return None
        from peftbench.capacity import Fit

        return Fit(device, *known, self.prepared.resolver.shapes)

    def work(self) -> None:
        """Train until every study has all its trials, those of other workers included.

        Raises:
            UserError: the disk is full, or the storage cannot be reached.
        """
        with Heart(self.studies, self.prepared.config.heartbeat):
            while True:
                asked = self._ask()
                if asked:
                    self.tell(self._standing(asked))
                    self._train(asked)
                elif all(study.done for study in self.studies):
                    return
                else:
                    time.sleep(POLL_SECONDS)

    def _ask(self) -> list[Asked]:
        """Ask each study for a batch."""
        found = []
        with locked(self.prepared.folder):
            for study, point in zip(self.studies, self.prepared.points, strict=True):
                gone = study.reap()
                if gone:
                    self.tell(f"{study.about.name}: {gone} trials of a process that ended are trained again")
                for trial in study.ask(self.prepared.config.batch_size):
                    found.append(self._run_of(Asked(study, trial), point))
        return found

    def _standing(self, asked: Sequence[Asked]) -> str:
        """Return how many trials follow, and how many are done."""
        done = sum(counts(t) and t.state.is_finished() for study in self.studies for t in study.trials())
        follow = "1 trial follows" if len(asked) == 1 else f"{len(asked)} trials follow"
        endless = any(study.about.held.room is not None for study in self.studies)
        total = "" if endless else f" of {self.prepared.config.trials * len(self.studies)}"
        return f"{follow}, {done}{total} are done"

    def _run_of(self, asked: Asked, point: Mapping[str, Any]) -> Asked:
        try:
            asked.spec = self.prepared.resolver.spec({**point, **asked.study.settings(asked.trial)})
            asked.trial.set_user_attr("run_id", asked.spec.run_id)
        except UserError as error:
            asked.error = str(error)
        return asked

    def _train(self, asked: Sequence[Asked]) -> None:
        waiting: dict[str, list[Asked]] = {}
        for one in asked:
            if one.spec is None:
                self._tell_refused(one)
            else:
                waiting.setdefault(one.spec.run_id, []).append(one)
        specs = {run_id: ones[0].spec for run_id, ones in waiting.items() if ones[0].spec is not None}
        self._tell(waiting)
        while waiting:
            wanted = [specs[run_id] for run_id in waiting]
            groups = self._groups(wanted)
            with progress.display(groups, self.quiet, self.alone) as listener:
                for group in groups:
                    self._train_group(group, waiting, listener)
                    self._tell(waiting)
            if waiting:
                time.sleep(POLL_SECONDS)  # another process trains these very runs

    def _groups(self, wanted: Sequence[RunSpec]) -> list[Group]:
        prepared = self.prepared
        tell = (lambda line: None) if self.quiet else self.tell
        free = [spec for spec in wanted if self.store.claimed(spec.run_id) is None]
        if not free:
            return []
        early = prepared.config.pruner != "none"
        together: dict[str, list[RunSpec]] = {}
        for spec in free:
            # runs of a pack are charged alike, so methods whose expense is compared share none
            together.setdefault("" if prepared.budget is None else spec.method["name"], []).append(spec)
        return [
            group
            for specs in together.values()
            for group in pack_up(
                Plan(specs, prepared.resolver, []), specs, prepared.sweep.pack, self.store, self.fit, tell, early=early
            )
        ]

    def _train_group(self, group: Group, waiting: Mapping[str, Sequence[Asked]], listener: Any) -> None:
        with self.store.claim([spec.run_id for spec in group]) as mine:
            specs = [spec for spec in group if spec.run_id in set(mine) and spec.run_id in waiting]
            if not specs:
                return
            listener.pack(specs)
            run_pack(
                specs,
                self.store,
                listener,
                places=group.places,
                save_adapters=self.prepared.sweep.save_adapters,
                watch=Watch(waiting, listener.note),
            )

    # What came of trials.

    def _tell(self, waiting: dict[str, list[Asked]]) -> None:
        """Tell the trials whose runs are done, and wait for them no longer."""
        for run_id, asked in list(waiting.items()):
            record = self.store.record(run_id)
            if record is None or not self._counts(record, asked[0]):
                continue
            for one in asked:
                self._tell_one(one, record)
            del waiting[run_id]

    def _counts(self, record: Mapping[str, Any], asked: Asked) -> bool:
        """Whether a record is what a trial asks for: of a pruned run, only what this very study pruned."""
        if record["status"] != "pruned":
            return record["status"] in ("completed", "diverged") or not self._again(record, asked)
        return (record.get("search") or {}).get("study") == asked.study.about.name

    def _again(self, record: Mapping[str, Any], asked: Asked) -> bool:
        """Whether a run that failed before is to be tried again."""
        return self.store.retry_failed and (record.get("search") or {}) != asked.mark

    def _tell_refused(self, asked: Asked) -> None:
        asked.study.tell(asked.trial, TrialState.FAIL, None, {"status": "refused", "error": asked.error})

    def _tell_one(self, asked: Asked, record: Mapping[str, Any]) -> None:
        study, trial, status = asked.study, asked.trial, str(record["status"])
        for evaluation in (record.get("quality") or {}).get("evaluations") or []:
            study.report(trial, evaluation["step"], evaluation["metrics"].get(study.about.metric))
        about: dict[str, Any] = {"run_id": record["run_id"], "status": status, **spent(record)}
        values = values_of(record, study.config.objectives)
        lost = [name for name, value in zip(study.config.objectives, values, strict=True) if value is None]
        if status == "completed" and not lost:
            study.tell(trial, TrialState.COMPLETE, [v for v in values if v is not None], about)
            return
        if lost and status == "completed":
            about["error"] = f"no {', '.join(lost)} in the record"
        elif record.get("error"):
            about["error"] = str(record["error"]).strip().splitlines()[-1]
        # To samplers a run that diverged is worse than any that was pruned later, without a number made up for it.
        worst = status == "pruned" or (status == "diverged" and len(study.config.objectives) == 1)
        study.tell(trial, TrialState.PRUNED if worst else TrialState.FAIL, None, about)


def spent(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the optimizer steps that a run made, and its share of the seconds that its pack took until it was done."""
    return {"seconds": tuning.seconds(record), "step": tuning.steps(record)}


def values_of(record: Mapping[str, Any], objectives: Sequence[str]) -> list[float | None]:
    """Return the objectives of a record; None for what it does not know. Quality is that of validation, never of test.

    Time is that of the run alone: its measured step, as often as it was made.
    """
    quality, cost = record.get("quality") or {}, record.get("cost") or {}
    step = (cost.get("step_seconds") or {}).get("p50")
    steps = len((record.get("trace") or {}).get("loss") or [])
    known = {
        "quality": (quality.get("validation") or {}).get(quality.get("primary_metric")),
        "adapter_parameters": cost.get("adapter_parameters"),
        "memory": (cost.get("memory") or {}).get("peak"),
        "time": None if step is None else step * steps,
    }
    return [None if (value := known[name]) is None else float(value) for name in objectives]
