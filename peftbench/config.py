"""Settings as frozen dataclasses; unknown keys, wrong types and values out of range are errors that name the key."""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from peftbench.errors import UserError, nearest

T = TypeVar("T")

KINDS = ("encoder", "decoder", "seq2seq")
POOLINGS = ("mean", "first", "last", "pooler")
HEADS = ("linear", "mlp")
WEIGHTS = ("pretrained", "random")
ATTENTIONS = ("sdpa", "eager")
QUANTIZATIONS = tuple(
    kind + single + backend for kind in ("nf4", "fp4") for single in ("", "-single") for backend in ("", "-bnb")
)
SCHEDULES = ("linear", "constant", "cosine")
PRECISIONS = ("fp32", "bf16")
OPTIMIZERS = ("adamw", "adamw8bit", "paged_adamw", "paged_adamw8bit")
EXECUTIONS = ("eager", "compiled", "graphs", "compiled_graphs")
PROTOCOLS = ("held_out", "paper")
DEVICES = ("auto", "cpu", "cuda")


def one_of(key: str, value: Any, valid: tuple[str, ...]) -> None:
    """Raise UserError unless `value` is among `valid`."""
    if value not in valid:
        raise UserError(f"{key}={value}: expected one of {', '.join(valid)}{nearest(value, valid)}")


def in_range(
    key: str,
    value: float | None,
    low: float,
    high: float = math.inf,
    *,
    open_low: bool = False,
    open_high: bool = False,
) -> None:
    """Raise UserError unless `value` is None or within [low, high]; `open_low` and `open_high` exclude the ends."""
    if value is None:
        return
    above = value > low if open_low else value >= low
    below = value < high if open_high else value <= high
    if not (above and below and math.isfinite(value)):
        lower = f"{'above' if open_low else 'at least'} {low:g}"
        upper = "" if math.isinf(high) else f" and {'below' if open_high else 'at most'} {high:g}"
        raise UserError(f"{key}={value}: expected {lower}{upper}")


@dataclass(frozen=True)
class ModelConfig:
    """A pretrained backbone: where its weights come from and how its output is pooled.

    `architecture` holds the keyword arguments of the `transformers` config, `model_type` included: enough to build the
    model without any file. `package` names an installed distribution that carries the weights: ``distribution``,
    ``module``, ``folder`` and ``sha256`` of its model.safetensors. `local` is a folder's name under PEFTBENCH_MODELS.
    `quantization` keeps the base's linear layers in 4 bits: `nf4` or `fp4`, with quantized scales unless `-single`
    follows, through bitsandbytes if `-bnb` does.
    """

    name: str
    checkpoint: str | None = None
    revision: str | None = None
    family: str | None = None
    kind: str | None = None
    pooling: str = "mean"
    head: str = "linear"
    weights: str = "pretrained"
    architecture: dict[str, Any] | None = None
    package: dict[str, Any] | None = None
    local: str | None = None
    gguf_file: str | None = None
    tokenizer: str | None = None
    attention: str = "sdpa"
    quantization: str | None = None

    def __post_init__(self) -> None:
        if self.kind is not None:
            one_of("model.kind", self.kind, KINDS)
        one_of("model.pooling", self.pooling, POOLINGS)
        one_of("model.head", self.head, HEADS)
        one_of("model.weights", self.weights, WEIGHTS)
        one_of("model.attention", self.attention, ATTENTIONS)
        if self.quantization is not None:
            one_of("model.quantization", self.quantization, QUANTIZATIONS)
        if self.weights == "random" and self.architecture is None and self.checkpoint is None:
            raise UserError(
                f"model.weights=random: {self.name!r} gives neither model.architecture nor model.checkpoint"
            )


@dataclass(frozen=True)
class TrainConfig:
    """One recipe; `steps` overrides `epochs`, None as learning rate or length takes the method's or the task's.

    `label_smoothing`: the share of each label that is spread over all classes (all tokens of the vocabulary), in
    training alone. `base_dropout`: every dropout of the base; None: `dropout`, which is that of the adapter too.
    `patience`: evaluations without a better primary metric after which a run stops; None: it never does.
    `head_learning_rate`: that of the task head; None: that of everything else.
    `start`: the folder of an adapter, or of a sweep with adapters on `start_task`, whose weights a run starts from.
    """

    steps: int | None = None
    epochs: float = 3.0
    batch_size: int = 32
    eval_batch_size: int = 128
    learning_rate: float | None = None
    schedule: str = "linear"
    warmup: float = 0.06
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    max_length: int | None = None
    optimizer: str = "adamw"
    precision: str = "fp32"
    execution: str = "eager"
    dropout: float | None = None
    base_dropout: float | None = None
    label_smoothing: float = 0.0
    accumulation: int = 1
    checkpointing: bool = False
    evaluate_every: int | None = None
    patience: int | None = None
    head_learning_rate: float | None = None
    start: str | None = None
    start_task: str | None = None

    def __post_init__(self) -> None:
        in_range("train.steps", self.steps, 1)
        in_range("train.epochs", self.epochs, 0, open_low=True)
        in_range("train.batch_size", self.batch_size, 1)
        in_range("train.eval_batch_size", self.eval_batch_size, 1)
        in_range("train.learning_rate", self.learning_rate, 0, open_low=True)
        one_of("train.schedule", self.schedule, SCHEDULES)
        in_range("train.warmup", self.warmup, 0, 1)
        in_range("train.weight_decay", self.weight_decay, 0)
        in_range("train.clip_norm", self.clip_norm, 0)
        in_range("train.beta1", self.beta1, 0, 1, open_high=True)
        in_range("train.beta2", self.beta2, 0, 1, open_high=True)
        in_range("train.epsilon", self.epsilon, 0, open_low=True)
        in_range("train.max_length", self.max_length, 4)
        one_of("train.optimizer", self.optimizer, OPTIMIZERS)
        one_of("train.precision", self.precision, PRECISIONS)
        one_of("train.execution", self.execution, EXECUTIONS)
        in_range("train.dropout", self.dropout, 0, 1, open_high=True)
        in_range("train.base_dropout", self.base_dropout, 0, 1, open_high=True)
        in_range("train.label_smoothing", self.label_smoothing, 0, 1, open_high=True)
        in_range("train.accumulation", self.accumulation, 1)
        in_range("train.evaluate_every", self.evaluate_every, 1)
        in_range("train.patience", self.patience, 1)
        in_range("train.head_learning_rate", self.head_learning_rate, 0, open_low=True)
        if self.start_task is not None and self.start is None:
            raise UserError(f"train.start_task={self.start_task}: expected train.start too, a sweep's folder")
        if self.batch_size % self.accumulation:
            raise UserError(
                f"train.accumulation={self.accumulation}: expected a divisor of train.batch_size={self.batch_size}"
            )


@dataclass(frozen=True)
class ProfileConfig:
    """How cost is measured.

    Attributes:
        min_warmup, steps, max_seconds: warm-up and timed steps, and a limit in seconds for both.
        looks: steps that the shares of a step and what instruments cost are medians of.
        energy_seconds: the window for energy; 0: not measured.
    """

    enabled: bool = True
    min_warmup: int = 3
    steps: int = 20
    max_seconds: float = 20.0
    looks: int = 3
    energy_seconds: float = 0.0

    def __post_init__(self) -> None:
        in_range("profile.min_warmup", self.min_warmup, 0)
        in_range("profile.steps", self.steps, 1)
        in_range("profile.max_seconds", self.max_seconds, 0, open_low=True)
        in_range("profile.looks", self.looks, 1)
        in_range("profile.energy_seconds", self.energy_seconds, 0)
        if 0 < self.energy_seconds < 10:  # GPUs count energy in coarse steps
            raise UserError(f"profile.energy_seconds={self.energy_seconds}: expected at least 10, or 0 for none")


@dataclass(frozen=True)
class SweepName:
    """`sweep.name`: the folder's name under `results`."""

    name: str = "default"

    def __post_init__(self) -> None:
        if not self.name or self.name in (".", "..") or "/" in self.name or "\\" in self.name:
            raise UserError(f"sweep.name={self.name!r}: expected a folder name without slashes")


@dataclass(frozen=True)
class SweepConfig:
    """The keys outside the groups: how a sweep runs, where it keeps its records, and each run's seed and protocol."""

    seed: int = 0
    protocol: str = "held_out"
    device: str = "auto"
    results: str = "results"
    sweep: SweepName = field(default_factory=SweepName)
    pack: str | int = "auto"
    experiment: str | None = None
    retry_failed: bool = False
    save_adapters: bool = False

    def __post_init__(self) -> None:
        in_range("seed", self.seed, 0, 2**31 - 1)
        one_of("protocol", self.protocol, PROTOCOLS)
        one_of("device", self.device, DEVICES)
        if isinstance(self.pack, str):
            if self.pack != "auto":
                raise UserError(f"pack={self.pack}: expected auto or a whole number of at least 1")
        else:
            in_range("pack", self.pack, 1)


def _shown(hint: Any) -> str:
    """Return a type as a user would say it."""
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_shown(h) for h in typing.get_args(hint))
    if origin is typing.Literal:
        return "one of " + ", ".join(str(a) for a in typing.get_args(hint))
    if origin in (list, tuple):
        inner = [h for h in typing.get_args(hint) if h is not ...]
        return "a list" + (f" of {_shown(inner[0])}" if inner else "")
    names = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "a text",
        type(None): "null",
        dict: "a mapping",
        list: "a list",
        tuple: "a list",
    }
    return names.get(origin or hint, getattr(hint, "__name__", str(hint)))


class _Mismatch(Exception):
    pass


def _convert(value: Any, hint: Any, key: str) -> Any:
    """Return `value` as `hint` or raise _Mismatch; converts int → float, list → tuple, mapping → dataclass, no more."""
    origin = typing.get_origin(hint)
    if hint is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        options = typing.get_args(hint)
        # An exact type goes before a conversion, so that `int | float` keeps whole numbers whole.
        for option in sorted(options, key=lambda o: type(value) is not o):
            try:
                return _convert(value, option, key)
            except _Mismatch:
                continue
        raise _Mismatch
    if origin is typing.Literal:
        if value in typing.get_args(hint):
            return value
        raise _Mismatch
    if hint is None or hint is type(None):
        if value is None:
            return None
        raise _Mismatch
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if isinstance(value, hint):
            return value
        if isinstance(value, Mapping):
            return build(hint, value, key)
        raise _Mismatch
    base = origin or hint
    if base in (list, tuple):
        if not isinstance(value, (list, tuple)):
            raise _Mismatch
        inner = [h for h in typing.get_args(hint) if h is not ...]
        return base(_convert(v, inner[0], key) for v in value) if inner else base(value)
    if base in (dict, Mapping) or base is typing.get_origin(Mapping[str, Any]):
        if not isinstance(value, Mapping):
            raise _Mismatch
        return dict(value)
    if base is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if base is int and isinstance(value, bool):
        raise _Mismatch
    if isinstance(base, type) and isinstance(value, base):
        return value
    raise _Mismatch


_HINTS: dict[type, dict[str, Any]] = {}


def _hints(cls: type) -> dict[str, Any]:
    if cls not in _HINTS:
        _HINTS[cls] = typing.get_type_hints(cls)
    return _HINTS[cls]


def settings(cls: type) -> list["dataclasses.Field[Any]"]:
    """Return the dataclass fields that a user may set."""
    return [f for f in dataclasses.fields(cls) if f.init]


def build(cls: type[T], mapping: Mapping[str, Any], where: str) -> T:
    """Build the dataclass `cls` from `mapping`; `where` ("train") prefixes the key in messages.

    Raises UserError for an unknown key (with the nearest valid one), a wrong type or a missing value. A ValueError of
    the class's own checks becomes a UserError too.
    """
    prefix = f"{where}." if where else ""
    known = {f.name: f for f in settings(cls)}
    values: dict[str, Any] = {}
    for key, value in mapping.items():
        if key not in known:
            valid = ", ".join(known) or "none"
            raise UserError(f"{prefix}{key}: no such key{nearest(str(key), known)} (valid: {valid})")
        hint = _hints(cls)[key]
        if isinstance(value, str) and value == "???":
            raise UserError(f"{prefix}{key}: a value is missing; expected {_shown(hint)}")
        try:
            values[key] = _convert(value, hint, f"{prefix}{key}")
        except _Mismatch:
            raise UserError(f"{prefix}{key}={value}: expected {_shown(hint)}") from None
    for key, f in known.items():
        if key not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise UserError(f"{prefix}{key}: a value is missing; expected {_shown(_hints(cls)[key])}")
    try:
        return cls(**values)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


def as_dict(config: Any) -> dict[str, Any]:
    """Return a settings dataclass as a dict of its settable fields, in the order of the class."""
    return {f.name: getattr(config, f.name) for f in settings(type(config))}
