"""Searches → plain studies: what was tried, in which ranges, what came of it; read from Optuna or from records.

A `Study` is one method's search on one model and task. Nothing here trains or asks for trials; Optuna is imported
where it is needed.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from peftbench.analysis.frame import Record, dig, number

EDGE = 0.05
"""Share of a range, from each of its ends, that counts as its edge; of a logarithmic one in logarithms."""
COMPLETE, PRUNED, FAILED, OPEN = "complete", "pruned", "failed", "open"
"""A trial that diverged or could not run is failed, one that nobody has finished is open."""
FEWEST = 8
"""Complete trials below which no importance is computed."""


@dataclass(frozen=True)
class Range:
    """What one parameter was searched over: from `low` to `high`, or `choices` in their order."""

    low: float | None = None
    high: float | None = None
    log: bool = False
    whole: bool = False
    choices: tuple[Any, ...] | None = None

    @property
    def numbers(self) -> list[float] | None:
        """Return the choices in order of size; None where they are no numbers, or where there are no choices."""
        if self.choices is None:
            return None
        found = [number(choice) for choice in self.choices]
        return None if None in found else sorted({f for f in found if f is not None})

    def edge(self, value: Any) -> str | None:
        """Return "low" or "high" if `value` lies at that end, else None.

        On a grid of three numbers or more an end is the first or the last; of a range `EDGE` of it. No end is what the
        setting cannot exceed anyway: 0, and 1 for whole numbers.
        """
        v = number(value)
        grid = self.numbers
        if v is None or (self.choices is not None and (grid is None or len(grid) < 3)):
            return None
        low, high = (grid[0], grid[-1]) if grid else (self.low, self.high)
        if low is None or high is None or not low < high:
            return None
        whole = self.whole or (grid is not None and all(g == int(g) for g in grid))
        natural = low == 0 or (whole and low == 1)
        if grid or whole:
            return "high" if v >= high else "low" if v <= low and not natural else None
        place = math.log(v / low) / math.log(high / low) if self.log else (v - low) / (high - low)
        return "high" if place >= 1 - EDGE else "low" if place <= EDGE and not natural else None

    def to_text(self) -> str:
        """Return "1e-5 to 1e-2 (log)", or the choices."""
        if self.choices is not None:
            return ", ".join(value_text(c) for c in self.choices)
        return f"{value_text(self.low)} to {value_text(self.high)}{' (log)' if self.log else ''}"


@dataclass(frozen=True)
class Trial:
    """One configuration tried: `values` are those of the objectives, None unless it was completed.

    `intermediate` are values on validation by step of training; of a pruned trial there is nothing else.
    """

    number: int
    state: str
    params: Mapping[str, Any]
    values: tuple[float, ...] | None = None
    intermediate: Mapping[int, float] = field(default_factory=dict)
    run_id: str | None = None
    seconds: float | None = None
    step: int | None = None

    @property
    def last(self) -> float | None:
        """Return the value of the first objective, or the last one seen of a trial that was pruned."""
        if self.values is not None:
            return self.values[0]
        return self.intermediate[max(self.intermediate)] if self.intermediate else None


@dataclass(frozen=True)
class Study:
    """One search: `maximise` has a truth value for each of `objectives`, the first of which is quality."""

    name: str
    method: str
    model: str
    task: str
    objectives: tuple[str, ...]
    maximise: tuple[bool, ...]
    space: Mapping[str, Range]
    trials: tuple[Trial, ...]
    about: Mapping[str, Any] = field(default_factory=dict)

    def of(self, state: str) -> list[Trial]:
        """Return the trials in one state, by number."""
        return [t for t in self.trials if t.state == state]

    @property
    def complete(self) -> list[Trial]:
        """Return the trials that have values."""
        return [t for t in self.trials if t.state == COMPLETE and t.values is not None]

    def merit(self, trial: Trial) -> float:
        """Return the first objective, larger is better; minus infinity without one."""
        if trial.values is None:
            return -math.inf
        return trial.values[0] if self.maximise[0] else -trial.values[0]

    @property
    def ranges_known(self) -> bool:
        """Whether `space` is what was searched, not only what was tried."""
        return self.about.get("ranges") != "tried"

    @property
    def best(self) -> Trial | None:
        """Return the complete trial best at the first objective, of equals the first one; None where there is none."""
        found = self.complete
        return min(found, key=lambda t: (-self.merit(t), t.number)) if found else None

    @property
    def front(self) -> list[Trial]:
        """Return the complete trials that no other beats in one objective and equals in all others, by number."""
        points = [self._signed(t) for t in self.complete]
        return [t for t, p in zip(self.complete, points, strict=True) if not any(_dominates(q, p) for q in points)]

    def _signed(self, trial: Trial) -> tuple[float, ...]:
        assert trial.values is not None
        return tuple(v if up else -v for v, up in zip(trial.values, self.maximise, strict=True))

    def edges(self) -> dict[str, str]:
        """Return parameter → "low" or "high" where the best trial lies at an edge of what was searched.

        Nothing where the ranges are not known.
        """
        best = self.best
        if best is None or not self.ranges_known:
            return {}
        ends = {name: self.space[name].edge(v) for name, v in best.params.items() if name in self.space}
        return {name: end for name, end in ends.items() if end is not None}


def _dominates(first: Sequence[float], second: Sequence[float]) -> bool:
    return all(a >= b for a, b in zip(first, second, strict=True)) and tuple(first) != tuple(second)


def value_text(value: Any) -> str:
    """Return a parameter's value as people write it."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, float):
        mantissa, _, exponent = f"{value:.3g}".partition("e")
        return f"{mantissa}e{int(exponent)}" if exponent else mantissa
    if isinstance(value, list | tuple):
        return "+".join(map(value_text, value))
    return str(value)


def short_name(parameter: str) -> str:
    """Return the last part of a dotted key, as labels have it."""
    return parameter.rpartition(".")[2]


# -- from Optuna -------------------------------------------------------------------------------------------------------


def of_optuna(study: Any) -> Study:
    """Return an `optuna.Study` as plain data; attributes that it lacks are told by its name."""
    about = dict(study.user_attrs)
    trials = study.get_trials(deepcopy=False)
    space: dict[str, Range] = {}
    for trial in trials:
        for name, distribution in trial.distributions.items():
            space.setdefault(name, _range(distribution))
    directions = [d.name == "MAXIMIZE" for d in study.directions]
    names = about.get("objectives") or [about.get("metric") or "value"]
    names = [about.get("metric") or n if n == "quality" else n for n in names]
    return Study(
        name=study.study_name,
        method=str(about.get("method", study.study_name)),
        model=str(about.get("model", "")),
        task=str(about.get("task", "")),
        objectives=tuple(map(str, names)) if len(names) == len(directions) else _numbered(len(directions)),
        maximise=tuple(directions),
        space=space,
        trials=tuple(_trial(t) for t in trials if t.user_attrs.get("status") != LOST),
        about=about,
    )


def _numbered(count: int) -> tuple[str, ...]:
    return tuple(f"objective {i + 1}" for i in range(count))


def _range(distribution: Any) -> Range:
    if hasattr(distribution, "choices"):
        return Range(choices=tuple(distribution.choices))
    whole = type(distribution).__name__.startswith("Int")
    return Range(float(distribution.low), float(distribution.high), bool(distribution.log), whole)


LOST = "lost"
"""The status of a trial that another one stands in for, as its worker was gone."""
STATES = {"COMPLETE": COMPLETE, "PRUNED": PRUNED, "FAIL": FAILED, "RUNNING": OPEN, "WAITING": OPEN}


def _trial(trial: Any) -> Trial:
    state = STATES[trial.state.name]
    if state == PRUNED and trial.user_attrs.get("status", "pruned") != "pruned":
        state = FAILED  # to samplers a run that diverged is as bad as one that was pruned
    # a trial's value may be infinite or missing: only finite ones say anything
    values = trial.values if state == COMPLETE and trial.values and all(map(math.isfinite, trial.values)) else None
    attributes = trial.user_attrs
    step = number(attributes.get("step"))
    return Trial(
        number=trial.number,
        state=state,
        params=dict(trial.params),
        values=None if values is None else tuple(map(float, values)),
        intermediate={int(s): float(v) for s, v in trial.intermediate_values.items() if math.isfinite(v)},
        run_id=attributes.get("run_id"),
        seconds=number(attributes.get("seconds")),
        step=None if step is None else int(step),
    )


# -- importance --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Importance:
    """How much each parameter explains of the first objective, by two measures; both sum to 1.

    `fanova`: shares of the variance over the whole range (Hutter et al. 2014), None without scikit-learn. `ped_anova`:
    shares in what tells the best tenth of trials from the others (Watanabe et al. 2023, arXiv:2304.10255).
    """

    trials: int
    ped_anova: Mapping[str, float]
    fanova: Mapping[str, float] | None


def importance(study: Study) -> Importance | None:
    """Return the importance of parameters that all complete trials have.

    None with fewer than `FEWEST` complete trials, fewer than two parameters that varied, or equal values everywhere.
    """
    found = study.complete
    varied = _varied(study)
    if len(found) < FEWEST or len(varied) < 2 or len({t.values and t.values[0] for t in found}) < 2:
        return None
    import optuna
    from optuna.importance import FanovaImportanceEvaluator, PedAnovaImportanceEvaluator, get_param_importances

    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        copy = _rebuilt(study, varied)
        ped = get_param_importances(copy, evaluator=PedAnovaImportanceEvaluator())
        try:
            fanova = get_param_importances(copy, evaluator=FanovaImportanceEvaluator(seed=0))
        except ImportError:
            fanova = None
    finally:
        optuna.logging.set_verbosity(level)
    return Importance(len(found), _floats(ped), None if fanova is None else _floats(fanova))


def _floats(shares: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(share) for name, share in sorted(shares.items())}


def _varied(study: Study) -> list[str]:
    found = study.complete
    common = set.intersection(*(set(t.params) for t in found)) if found else set()
    return sorted(n for n in common & set(study.space) if len({repr(t.params[n]) for t in found}) > 1)


def _rebuilt(study: Study, parameters: Iterable[str]) -> Any:
    """Return an Optuna study in memory with the complete trials, of the first objective and some parameters."""
    import optuna

    def distribution(name: str) -> Any:
        r = study.space[name]
        if r.choices is not None:
            return optuna.distributions.CategoricalDistribution(r.choices)
        assert r.low is not None
        assert r.high is not None
        if r.whole:
            return optuna.distributions.IntDistribution(int(r.low), int(r.high), log=r.log)
        return optuna.distributions.FloatDistribution(r.low, r.high, log=r.log)

    names = list(parameters)
    copy = optuna.create_study(
        direction="maximize" if study.maximise[0] else "minimize", sampler=optuna.samplers.RandomSampler(seed=0)
    )
    for trial in study.complete:
        assert trial.values is not None
        copy.add_trial(
            optuna.trial.create_trial(
                params={n: trial.params[n] for n in names},
                distributions={n: distribution(n) for n in names},
                value=trial.values[0],
            )
        )
    return copy


# -- from records ------------------------------------------------------------------------------------------------------


def of_records(records: Sequence[Record]) -> list[Study]:
    """Return the studies that records name in their `search`, for folders whose storage is elsewhere or gone.

    Ranges are what was tried; of pruned and failed trials only those with a record are known.
    """
    grouped: dict[str, dict[int, Record]] = {}
    for record in records:
        search = record.get("search")
        if isinstance(search, Mapping) and search.get("trial") is not None:
            grouped.setdefault(str(search.get("study")), {})[int(search["trial"])] = record
    return [_of_group(name, by_number) for name, by_number in sorted(grouped.items())]


RECORD_STATES = {"completed": COMPLETE, "pruned": PRUNED}


def _of_group(name: str, by_number: Mapping[int, Record]) -> Study:
    members = [by_number[n] for n in sorted(by_number)]
    first = next((r for r in members if r.get("quality")), members[0])
    quality = first.get("quality") or {}
    metric, greater = quality.get("primary_metric") or "value", bool(quality.get("greater_is_better", True))
    trials = []
    for n in sorted(by_number):
        record = by_number[n]
        params = dict(dig(record, ("search", "params")) or _settings(record))
        value = number(dig(record, ("quality", "validation", metric)))
        state = RECORD_STATES.get(str(record.get("status")), FAILED)
        seen = {
            int(e["step"]): v
            for e in dig(record, ("quality", "evaluations")) or []
            if (v := number(dig(e, ("metrics", metric)))) is not None
        }
        values = None if value is None or state != COMPLETE else (value,)
        trials.append(Trial(n, state, params, values, seen, str(record.get("run_id"))))
    varied: dict[str, list[Any]] = {}
    for trial in trials:
        for key, value in trial.params.items():
            varied.setdefault(key, []).append(value)
    kept = {key for key, values in varied.items() if len({repr(v) for v in values}) > 1}
    trials = [
        Trial(t.number, t.state, {k: v for k, v in t.params.items() if k in kept}, t.values, t.intermediate, t.run_id)
        for t in trials
    ]
    return Study(
        name=name,
        method=str(dig(first, ("spec", "method", "name"))),
        model=str(dig(first, ("spec", "model", "name"))),
        task=str(dig(first, ("spec", "task", "name"))),
        objectives=(str(metric),),
        maximise=(greater,),
        space={key: _tried(varied[key]) for key in sorted(kept)},
        trials=tuple(trials),
        about={"ranges": "tried"},
    )


def _settings(record: Record) -> dict[str, Any]:
    found = {}
    for part in ("method", "train"):
        for key, value in (dig(record, ("spec", part)) or {}).items():
            if not key.startswith("_") and key != "name" and not isinstance(value, Mapping):
                found[f"{part}.{key}"] = tuple(value) if isinstance(value, list) else value
    return found


def _tried(values: Sequence[Any]) -> Range:
    numbers = [number(v) for v in values]
    known = [v for v in numbers if v is not None]
    if len(known) < len(values):
        return Range(choices=tuple(dict.fromkeys(values)))
    whole = all(isinstance(v, int) for v in values)
    return Range(min(known), max(known), log=min(known) > 0 and max(known) / min(known) > 8, whole=whole)
