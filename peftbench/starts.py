"""Where an adapter starts: at its method's own initial weights, or at those that another run trained.

Papers start small tasks from an adapter trained on a large one (LoRA, Hu et al. 2021, arXiv:2106.09685, appendix D:
RTE, MRPC and STS-B from MNLI). The adapter is taken over, the task head is fresh.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftbench.errors import UserError
from peftbench.record import canonical, plain
from peftbench.store import Store

if TYPE_CHECKING:
    from peftbench.methods.adapter import Adapter

SETTINGS_FILE, WEIGHTS_FILE = "adapter.json", "adapter.safetensors"


@dataclasses.dataclass(frozen=True)
class Start:
    """A kept adapter: its folder, the task that it was trained on (None: nothing says), the sha256 of its files."""

    folder: str
    task: str | None
    sha256: str


def find(asked: str, task: str | None, model: Mapping[str, Any], method: Any, settings: Mapping[str, Any]) -> Start:
    """Return the adapter that `train.start` and `train.start_task` name.

    Args:
        asked: the folder of a kept adapter, or of a sweep: of its runs on `task` with the same model and method, the
            one best on validation.
        model, method, settings: what the adapter is to start: the model's settings, the method and its settings in a
            run's spec.

    Raises:
        UserError: there is no such adapter, or one of another task, model, method or settings.
    """
    folder = Path(asked).expanduser()
    if not (folder / SETTINGS_FILE).is_file():
        folder = _best(asked, Store(folder), task, model, settings)
    record = Store(folder.parent.parent).record(folder.name) if folder.parent.name == "adapters" else None
    named = None if record is None else str(record["spec"]["task"]["name"])
    if task is not None and named not in (None, task):
        raise UserError(f"train.start_task={task}: the adapter in {folder} was trained on {named}")
    if record is not None and canonical(record["spec"]["model"]) != canonical(model):
        raise UserError(f"train.start={asked}: expected an adapter of model {model['name']} with the same settings")
    digest = hashlib.sha256()
    try:
        saved = json.loads((folder / SETTINGS_FILE).read_text())
        for name in (SETTINGS_FILE, WEIGHTS_FILE):
            digest.update((folder / name).read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"train.start={asked}: no readable adapter ({error})") from error
    kind = f"{type(method).__module__}.{type(method).__qualname__}"
    if saved.get("method") != kind:
        raise UserError(f"train.start={asked}: expected an adapter of {kind}, not of {saved.get('method')}")
    mine, theirs = plain(method.settings()), saved.get("settings") or {}
    odd = next((key for key in mine if canonical(mine[key]) != canonical(theirs.get(key))), None)
    if odd is not None:
        raise UserError(f"method.{odd}={mine[odd]}: expected {theirs.get(odd)}, that of the adapter in {folder}")
    return Start(str(folder), named or task, digest.hexdigest())


def _best(asked: str, store: Store, task: str | None, model: Mapping[str, Any], settings: Mapping[str, Any]) -> Path:
    """Return the folder of the adapter in a sweep that is best on validation."""
    if task is None:
        raise UserError(
            f"train.start={asked}: no adapter in that folder; expected that of one ({SETTINGS_FILE}), or that of a "
            "sweep and train.start_task, a task in it"
        )
    wanted = canonical([model, settings])
    found = []
    for record in store.records():
        spec, quality = record["spec"], record.get("quality") or {}
        score = (quality.get("validation") or {}).get(quality.get("primary_metric"))
        fits = spec["task"]["name"] == task and canonical([spec["model"], spec["method"]]) == wanted
        if fits and score is not None and (store.adapter(record["run_id"]) / SETTINGS_FILE).is_file():
            found.append((score if quality.get("greater_is_better", True) else -score, record["run_id"]))
    if not found:
        raise UserError(
            f"train.start={asked}: no kept adapter of {settings['name']} on {task} with model {model['name']} and "
            "the same settings; train it there first, with save_adapters=true"
        )
    best = max(score for score, _ in found)
    return store.adapter(min(run_id for score, run_id in found if score == best))


def fill(adapter: Adapter, starts: Sequence[str | None], seeds: Sequence[int]) -> None:
    """Put the weights in the folders `starts`, one a run, into `adapter`; None leaves a run as it is.

    Raises:
        UserError: tensors that do not fit, or that go with random ones that the run's seed does not give.
    """
    from safetensors.torch import load_file

    for run, (folder, seed) in enumerate(zip(starts, seeds, strict=True)):
        if folder is None:
            continue
        drawn = json.loads((Path(folder) / SETTINGS_FILE).read_text()).get("seed")
        if drawn not in (None, seed):
            raise UserError(
                f"train.start={folder}: trained on the frozen random tensors of seed {drawn}; expected seed={drawn}"
            )
        adapter.load_state_dict(load_file(Path(folder) / WEIGHTS_FILE), run)
