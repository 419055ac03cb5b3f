"""The end of a search on an equal budget: each method's best settings again on new seeds, and what came of it.

Winners go into ``search/final.yaml``, an experiment like any other, which runs as a sweep into the same folder; what
was held equal, and how far, into ``search/budget.json``, which the report reads.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peftbench.analysis.search_report import BUDGET, Entry
from peftbench.analysis.search_report import Plan as Told
from peftbench.analysis.search_tables import settings_text
from peftbench.analysis.studies import of_optuna
from peftbench.budget import Budget
from peftbench.errors import UserError
from peftbench.record import RunSpec, plain
from peftbench.search import FOLDER
from peftbench.search.best import best_trials
from peftbench.search.prepare import Prepared
from peftbench.search.studies import Study
from peftbench.store import Store

FINAL = "final.yaml"


def fresh_seeds(used: int, count: int) -> list[int]:
    """Return the first `count` seeds from 0 but for the one `used`."""
    return [seed for seed in range(count + 1) if seed != used][:count]


def seeds_of(prepared: Prepared) -> tuple[list[int], list[int]]:
    """Return the seeds of trials, and those of final runs, which no trial had."""
    used = {int(point["seed"]) for point in prepared.points}
    assert len(used) == 1, used
    return sorted(used), fresh_seeds(next(iter(used)), prepared.config.final_seeds)


def write_finals(prepared: Prepared, studies: Sequence[Study], profile: str | None) -> Path | None:
    """Write the experiment of all winners; returns its file, or None if no trial of any method completed.

    Args:
        profile: the option of the group that the command line names, if it does.

    Raises:
        UserError: the file cannot be written.
    """
    import yaml

    _, seeds = seeds_of(prepared)
    grids = []
    for study, point in zip(studies, prepared.points, strict=True):
        for trial in best_trials(study):
            settings = {**point, **study.settings(trial), "seed": seeds, "profile": profile or "default"}
            grids.append(
                {k: [list(v)] if isinstance(v, list | tuple) and k != "seed" else v for k, v in settings.items()}
            )
    if not grids:
        return None
    path = prepared.folder / FOLDER / FINAL
    content = {"question": prepared.budget.statement() if prepared.budget else "", "grids": plain(grids)}
    _write(path, yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=100))
    return path


def sweep_arguments(prepared: Prepared, experiment: Path) -> list[str]:
    """Return the command line of the sweep that runs the finals into the search's own folder."""
    sweep = prepared.sweep

    def quoted(value: Any) -> str:
        return "'" + str(value).replace("\\", "\\\\").replace("'", "\\'") + "'"

    return [
        f"experiment={quoted(experiment)}",
        f"results={quoted(prepared.folder.parent)}",
        f"sweep.name={quoted(prepared.folder.name)}",
        f"pack={sweep.pack}",
        f"device={sweep.device}",
        f"retry_failed={str(sweep.retry_failed).lower()}",
        f"save_adapters={str(sweep.save_adapters).lower()}",
    ]


def write_plan(prepared: Prepared, studies: Sequence[Study], finals: Sequence[RunSpec]) -> Told:
    """Write and return what was held equal, and for each method which runs are its final ones.

    Args:
        finals: all final runs.

    Raises:
        UserError: the file cannot be written.
    """
    budget = prepared.budget
    assert budget is not None
    tuned, seeds = seeds_of(prepared)
    store = Store(prepared.folder)
    entries = [_entry(study, budget, finals, store) for study in studies]
    entries += [
        Entry(one.method, one.model, one.task, "left out", one.reason, None, None, budget.wanted, None, False, ())
        for one in prepared.left_out
    ]
    told = Told(
        budget=prepared.config.budget,
        statement=budget.statement(),
        unit=budget.unit,
        seeds=tuple(seeds),
        tuning_seeds=tuple(tuned),
        entries=tuple(entries),
        lines=tuple(prepared.lines),
    )
    content = {"protocol": prepared.config.protocol, **dataclasses.asdict(told)}
    _write(prepared.folder / FOLDER / BUDGET, json.dumps(plain(content), indent=1, ensure_ascii=False) + "\n")
    return told


def _entry(study: Study, budget: Budget, finals: Sequence[RunSpec], store: Store) -> Entry:
    about, found = study.about, best_trials(study)
    names = about.method, about.model, about.task
    if not found:
        return Entry(*names, "no trial completed", "no trial completed", None, None, budget.wanted, None, False, ())
    best, seen = found[0], of_optuna(study.optuna)
    mine = [s for s in finals if (s.method["name"], s.model["name"], s.task["name"]) == names]
    records = [store.record(spec.run_id) for spec in mine]
    seconds = [t.seconds for t in seen.trials if t.seconds is not None]
    done: Mapping[str, Any] | None = next((r for r in records if r is not None and r["status"] == "completed"), None)
    had = budget.had(mine[0], done, sum(seconds)) if mine else None
    edges = seen.edges()
    notes = [f"optimum at the {end} end of {name}" for name, end in sorted(edges.items())]
    if had is not None and not budget.matches(had):
        notes.append(f"{had:.6g} {budget.unit} are not the {budget.wanted:.6g} wanted")
    tried = len(seen.trials)
    if budget.config.budget != "wall_clock" and len(seen.complete) < tried:
        notes.append(f"{len(seen.complete)} of {tried} trials completed")
    return Entry(
        *names,
        status="compared",
        note="; ".join(notes) or None,
        settings=settings_text(study.settings(best), edges),
        validation=best.value,
        wanted=budget.wanted,
        had=had,
        matched=None if had is None else budget.matches(had),
        final=tuple(spec.run_id for spec in mine),
    )


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot write ({error.strerror or error})") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
