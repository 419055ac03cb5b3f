"""Studies → tables: how each search went, where its optimum lies in what was searched, which parameters mattered."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from peftbench.analysis.studies import (
    COMPLETE,
    FAILED,
    FEWEST,
    OPEN,
    PRUNED,
    Importance,
    Study,
    short_name,
    value_text,
)
from peftbench.analysis.tables import MISSING, Table, metric_digits, metric_title, plus_minus

EDGE_NOTE = (
    "An optimum at an edge (the outer 5 % of a range, the first or last value of a grid) may lie beyond it: widen the "
    "range before drawing conclusions. Ends that no setting can pass (0, and 1 for whole numbers) are not edges."
)
IMPORTANCE_NOTE = (
    "Over complete trials; shares sum to 1. fANOVA: of the variance over everything searched (a forest of trees, "
    "seeded). PED-ANOVA: of what tells the best tenth from the rest. Both are rough with few trials, and say nothing "
    "outside the ranges searched."
)


def names_of(studies: Sequence[Study]) -> list[str]:
    """Return what each study is called: its method, with model, task or its own name where these tell it apart."""
    several = [part for part in ("model", "task") if len({getattr(s, part) for s in studies}) > 1]
    names = [", ".join([s.method, *(str(getattr(s, part)) for part in several)]) for s in studies]
    return [f"{n} ({s.name})" if names.count(n) > 1 else n for n, s in zip(names, studies, strict=True)]


def settings_text(params: Mapping[str, Any], edges: Mapping[str, str] | None = None) -> str:
    """Return "learning_rate=1e-3 rank=8"; a value at an edge is followed by "(low end)" or "(high end)"."""
    edges = edges or {}
    parts = [
        f"{short_name(n)}={value_text(v)}" + (f" ({edges[n]} end)" if n in edges else "")
        for n, v in sorted(params.items())
    ]
    return " ".join(parts) or MISSING


def overview(studies: Sequence[Study]) -> Table:
    """One row a study: how many trials came to what, the best value on validation, and its settings."""
    names, rows, raw = names_of(studies), [], []
    for name, study in zip(names, studies, strict=True):
        best, edges = study.best, study.edges()
        counts = {state: len(study.of(state)) for state in (COMPLETE, PRUNED, FAILED, OPEN)}
        value = best.values[0] if best is not None and best.values is not None else None
        digits = metric_digits([value])
        rows.append(
            [
                name,
                settings_text(best.params, edges) if best is not None else MISSING,
                f"validation {metric_title(study.objectives[0])} {plus_minus(value, None, digits)}",
                *(str(counts[state]) for state in counts),
                ", ".join(f"{short_name(n)} ({end})" for n, end in sorted(edges.items()))
                or ("none" if best is not None and study.ranges_known else MISSING),
            ]
        )
        raw.append(
            {
                "study": study.name,
                "method": study.method,
                "model": study.model,
                "task": study.task,
                "metric": study.objectives[0],
                "greater_is_better": study.maximise[0],
                "best_validation": value,
                "best_trial": None if best is None else best.number,
                "best_run_id": None if best is None else best.run_id,
                "best_settings": None if best is None else settings_text(best.params),
                **{f"{state}_trials": count for state, count in counts.items()},
                "edges": " ".join(f"{n}={end}" for n, end in sorted(edges.items())),
                "sampler": study.about.get("sampler"),
                "pruner": study.about.get("pruner"),
                "seed": study.about.get("seed"),
            }
        )
    notes = [EDGE_NOTE] if any(s.edges() for s in studies) else []
    if any(len(s.objectives) > 1 for s in studies):
        notes.append("Best at the first objective; the fronts of all objectives are in search-trials.csv.")
    if not all(s.ranges_known for s in studies):
        notes.append("Read from records alone: ranges are not known, so no edges are looked for.")
    return Table(
        name="search-overview",
        title="Searches",
        headers=["method", "best settings", "best value", "complete", "pruned", "failed", "open", "at an edge"],
        rows=rows,
        raw=pd.DataFrame(raw),
        text_columns=3,
        notes=notes,
    )


def optima(studies: Sequence[Study]) -> Table | None:
    """One row a study and parameter: its range, the best trial's value, and whether that is at an edge."""
    rows, raw = [], []
    for name, study in zip(names_of(studies), studies, strict=True):
        best, edges = study.best, study.edges()
        if best is None:
            continue
        for parameter, value in sorted(best.params.items()):
            known = study.space.get(parameter)
            searched = known.to_text() if known is not None and study.ranges_known else MISSING
            rows.append([name, short_name(parameter), searched, value_text(value), edges.get(parameter, "no")])
            raw.append(
                {
                    "study": study.name,
                    "method": study.method,
                    "parameter": parameter,
                    "searched": searched,
                    "low": None if known is None else known.low,
                    "high": None if known is None else known.high,
                    "best": value_text(value),
                    "edge": edges.get(parameter),
                }
            )
    if not rows:
        return None
    return Table(
        name="search-optima",
        title="Where the best settings lie",
        headers=["method", "setting", "searched", "best", "at an edge"],
        rows=rows,
        raw=pd.DataFrame(raw),
        text_columns=3,
        notes=[EDGE_NOTE],
    )


def importances(studies: Sequence[Study], found: Sequence[Importance | None]) -> Table | None:
    """One row a study and parameter: both measures, most important first."""
    rows, raw = [], []
    for name, study, one in zip(names_of(studies), studies, found, strict=True):
        if one is None:
            continue
        order = sorted(one.ped_anova, key=lambda p, one=one: (-(one.fanova or one.ped_anova)[p], p))  # type: ignore[misc]
        for parameter in order:
            fanova = None if one.fanova is None else one.fanova[parameter]
            ped = one.ped_anova[parameter]
            rows.append(
                [name, short_name(parameter), MISSING if fanova is None else f"{fanova:.2f}", f"{ped:.2f}"]
                + [str(one.trials)]
            )
            raw.append(
                {
                    "study": study.name,
                    "method": study.method,
                    "parameter": parameter,
                    "fanova": None if fanova is None else float(f"{fanova:.6g}"),
                    "ped_anova": float(f"{ped:.6g}"),
                    "trials": one.trials,
                }
            )
    if not rows:
        return None
    lacking = [n for n, one in zip(names_of(studies), found, strict=True) if one is None]
    notes = [IMPORTANCE_NOTE]
    if any(one is not None and one.fanova is None for one in found):
        notes.append("No fANOVA: scikit-learn is not installed (pip install scikit-learn).")
    if lacking:
        notes.append(
            f"Not computed for {', '.join(lacking)}: fewer than {FEWEST} complete trials, one parameter alone, or "
            "equal values everywhere."
        )
    return Table(
        name="search-importance",
        title="Which settings mattered",
        headers=["method", "setting", "fANOVA", "PED-ANOVA", "trials"],
        rows=rows,
        raw=pd.DataFrame(raw),
        text_columns=2,
        notes=notes,
    )


def trials_frame(studies: Sequence[Study]) -> pd.DataFrame:
    """One row a trial: state, values of the objectives, whether it is on the front, parameters as columns."""
    rows = []
    for study in studies:
        front = {t.number for t in study.front} if len(study.objectives) > 1 else set()
        for trial in study.trials:
            values = trial.values or (None,) * len(study.objectives)
            row: dict[str, Any] = {
                "study": study.name,
                "method": study.method,
                "trial": trial.number,
                "state": trial.state,
                "run_id": trial.run_id,
                "seconds": trial.seconds,
                "last_validation": trial.last,
            }
            row |= dict(zip(study.objectives, values, strict=True))
            if len(study.objectives) > 1:
                row["on_front"] = trial.number in front
            row |= {name: _plain(value) for name, value in sorted(trial.params.items())}
            rows.append(row)
    return pd.DataFrame(rows)


def _plain(value: Any) -> Any:
    return value_text(value) if isinstance(value, list | tuple) else value
