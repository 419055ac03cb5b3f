"""The one schema: what a run was asked to do (`RunSpec`) and what came of it (`RunRecord`)."""

import datetime
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

SCHEMA_VERSION = 1
STATUSES = ("completed", "pruned", "diverged", "out_of_memory", "failed")
"""A run is pruned when a search ends it early: its quality is what was known until then, and nothing was tested."""


def plain(value: Any) -> Any:
    """Return `value` as plain JSON: tuples and sets as lists, array scalars as numbers, non-finite floats as None."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(plain(v) for v in value)
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if hasattr(value, "tolist"):  # numpy and torch scalars and arrays, without importing either
        return plain(value.tolist())
    raise TypeError(f"{type(value).__name__} has no place in a record: {value!r}")


def canonical(value: Any) -> str:
    """Return the one JSON text of `value`: sorted keys, no spaces, shortest float form."""
    return json.dumps(plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: Any, length: int = 12) -> str:
    """Return the first `length` hex digits of the sha256 of `canonical(value)`."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:length]


def file_name(name: str) -> str:
    """Return `name` as part of a file name: what is not a letter, digit, dot, plus or underscore becomes a dash."""
    return re.sub(r"[^A-Za-z0-9._+]+", "-", name).strip("-.") or "unnamed"


DEFAULT_OPTIMIZER = "adamw"
DEFAULT_EXECUTION = "eager"
TASK_DEFAULTS: dict[str, Any] = {
    "beams": 1,
    "length_penalty": 1.0,
    "no_repeat_ngram": 0,
    "no_repeat_within": "text",
    "layout": "lines",
}
"""Settings of tasks that go without saying in identities."""


def train_content(train: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a run's `train` section changes its result.

    Epochs say nothing when steps are given, and the size of evaluation batches changes no metric. The default optimizer
    and the default execution go without saying, and so do no smoothing of labels, no patience, no rate of the head's
    own, no dropout of the base's own and no other run's adapter to start from: sections written before there was a
    choice do not name them. Where such an adapter lies changes nothing; identities have its sha256.
    """
    unsaid: dict[str, Any] = {"optimizer": DEFAULT_OPTIMIZER, "execution": DEFAULT_EXECUTION, "label_smoothing": 0.0}
    unsaid |= dict.fromkeys(("patience", "head_learning_rate", "base_dropout", "start_task"))
    silent = ("eval_batch_size", "start")
    kept = {k: v for k, v in train.items() if k not in silent and (k not in unsaid or v != unsaid[k])}
    if kept.get("steps") is not None:
        kept.pop("epochs", None)
    return kept


def task_content(task: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a run's `task` section changes its result; what was so before there was a choice is left out."""
    return {k: v for k, v in task.items() if k not in TASK_DEFAULTS or v != TASK_DEFAULTS[k]}


@dataclass(frozen=True)
class RunSpec:
    """Everything that decides a run, resolved: no null learning rate or length, no interpolation.

    `identity` holds what the settings cannot show: ``weights`` (sha256), ``data`` (fingerprint), ``engine`` and
    ``method`` (integer versions), ``device_kind`` ("cpu" or the GPU's name), ``task`` (labels, formulation), ``start``
    (sha256 of the adapter that it starts from, if it does).
    """

    model: dict[str, Any]
    method: dict[str, Any]
    task: dict[str, Any]
    train: dict[str, Any]
    profile: dict[str, Any]
    seed: int
    protocol: str
    device: str
    identity: dict[str, Any]

    @property
    def content(self) -> dict[str, Any]:
        """What the run id hashes: all that changes the result and nothing else."""
        return {
            "model": self.model,
            "method": self.method,
            "task": task_content(self.task),
            "train": train_content(self.train),
            "seed": self.seed,
            "protocol": self.protocol,
            "identity": self.identity,
        }

    @property
    def run_id(self) -> str:
        """`<method>-<task>-<model>-s<seed>-<12 hex digits of the content's sha256>`."""
        cached = self.__dict__.get("_run_id")  # a grid asks for the id of every point many times over
        if cached is None:
            names = "-".join(file_name(str(part["name"])) for part in (self.method, self.task, self.model))
            cached = f"{names}-s{self.seed}-{digest(self.content)}"
            object.__setattr__(self, "_run_id", cached)
        return cached

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON."""
        return {f.name: plain(getattr(self, f.name)) for f in fields(self)}

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> "RunSpec":
        """Rebuild a spec from `to_dict`; a missing key raises KeyError."""
        return cls(**{f.name: mapping[f.name] for f in fields(cls)})


def profile_id(spec: RunSpec, cost_free: Iterable[str]) -> str:
    """Return the id shared by all runs that cost the same: 16 hex digits.

    `cost_free` names the method's settings that do not change its cost (a LoRA's alpha). Of the task only the number of
    labels and the formulation count, taken from ``identity["task"]``; without it the whole task counts.
    """
    free = set(cost_free)
    train_keys = ("batch_size", "max_length", "precision", "accumulation", "checkpointing", "dropout")
    named = {k: v for k, v in train_content(spec.train).items() if k in ("optimizer", "execution")}
    if spec.train.get("head_learning_rate") is not None:
        named["rates"] = "head"  # kept for every parameter, whatever they are
    if spec.train.get("label_smoothing"):
        named["labels"] = "smoothed"
    if spec.train.get("base_dropout") is not None:
        named["base_dropout"] = spec.train["base_dropout"]
    return digest(
        {
            "model": spec.model,
            "method": {k: v for k, v in spec.method.items() if k not in free},
            "task": spec.identity.get("task", spec.task),
            "train": {k: spec.train.get(k) for k in train_keys} | named,
            "device_kind": spec.identity.get("device_kind"),
            "engine": spec.identity.get("engine"),
            "method_version": spec.identity.get("method"),
        },
        16,
    )


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


@dataclass
class RunRecord:
    """What came of one run; written once, never edited. Missing is None, never a stand-in number.

    `search` names the study and the trial that asked for it.
    """

    run_id: str
    status: str
    spec: dict[str, Any]
    error: str | None = None
    quality: dict[str, Any] | None = None
    trace: dict[str, Any] | None = None
    cost: dict[str, Any] | None = None
    environment: dict[str, Any] = field(default_factory=dict)
    parity: dict[str, Any] | None = None
    pack: dict[str, Any] | None = None
    search: dict[str, Any] | None = None
    created: str = field(default_factory=_now)
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        assert self.status in STATUSES, self.status

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain JSON; non-finite numbers become null."""
        return plain(asdict(self))

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> "RunRecord":
        """Rebuild a record from `to_dict`; unknown keys are left out."""
        known = {f.name for f in fields(cls)}
        return cls(**{k: v for k, v in mapping.items() if k in known})
