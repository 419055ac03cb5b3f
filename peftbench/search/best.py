"""The best configuration of a study, as a file that ``sweep experiment=<file>`` runs again."""

from __future__ import annotations

import contextlib
import os
import textwrap
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from peftbench.errors import UserError
from peftbench.search import FOLDER
from peftbench.search.prepare import Prepared, best_file
from peftbench.search.studies import Study


def best_trials(study: Study) -> list[FrozenTrial]:
    """Return the best trial; with several objectives all that no other is better than in each. None: none completed."""
    complete = [t for t in study.trials() if t.state == TrialState.COMPLETE]
    if not complete:
        return []
    if len(study.config.objectives) > 1:
        return sorted(study.optuna.best_trials, key=lambda t: t.number)
    sign = -1.0 if study.directions[0] == "maximize" else 1.0
    return [min(complete, key=lambda t: (sign * (t.value or 0.0), t.number))]


def write_best(prepared: Prepared, study: Study, point: Mapping[str, Any]) -> Path | None:
    """Write the best configuration, in place of an earlier one; returns the file, or None if no trial completed.

    Raises:
        UserError: the file cannot be written.
    """
    import yaml

    best = best_trials(study)
    if not best:
        return None
    path = prepared.folder / FOLDER / best_file(study.about, prepared.abouts)
    settings = [study.settings(t) for t in best]
    common = {k: v for k, v in point.items() if k != "method" and (k, v) != ("profile", "skip")}
    content = {
        "question": _question(study, best),
        "sweep": f"{prepared.sweep.sweep.name}-{path.stem}",
        "common": {key: _single(value) for key, value in common.items()},
        "grids": [{"method": study.about.method} | {k: _single(v) for k, v in one.items()} for one in settings],
    }
    text = f"# python -m peftbench sweep experiment={_shown(path)}\n"
    text += yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=100)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot write ({error.strerror or error})") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return path


def _single(value: Any) -> Any:
    """Return a value as a grid's only choice: a list would be one of choices."""
    return [list(value)] if isinstance(value, (list, tuple)) else value


def _shown(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _question(study: Study, best: Sequence[FrozenTrial]) -> str:
    config, about = study.config, study.about
    if len(best) == 1 and len(config.objectives) == 1:
        what = f"the best, trial {best[0].number} ({objective_name(study, 0)} {best[0].values[0]:.6g})"
    else:
        shown = ", ".join(str(t.number) for t in best)
        what = f"those that none beats in {' and '.join(config.objectives)}, trials {shown}"
    trials = min(config.trials, len(study.trials()))
    text = f"Of {trials} trials of {about.method} by {config.sampler} with seed {config.seed}: {what}."
    return textwrap.shorten(text, 400)


def objective_name(study: Study, index: int) -> str:
    """Return what an objective is called; quality is always that of validation."""
    name = study.config.objectives[index]
    return f"validation {study.about.metric}" if name == "quality" else name.replace("_", " ")
