"""What a configuration will cost before anything is loaded: parameters, FLOPs and peak memory from shapes alone.

One real training step runs on fake tensors (`profiling.shapes`), so that whatever trains is also what is predicted.
Deep models are traced with a few layers and continued (`profiling.timeline`). What a trace cannot see is added:

- cuBLAS keeps `CUBLAS_WORKSPACE` for each thread that multiplies matrices: the step's own and autograd's.
- CUDA's allocator gives whole multiples of 512 bytes.

Not seen: the rest of a cached block that the allocator does not split off (under 1 MiB for each large block), and what
CUDA's context and fragmentation take beside, for which `capacity` leaves room. Execution is eager.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)

from peftbench import registry
from peftbench.assembly import Assembly, Setting, assembled
from peftbench.config import ModelConfig, TrainConfig, as_dict, build
from peftbench.cost import trial_on
from peftbench.engine import paging
from peftbench.engine.batches import TokenTable
from peftbench.errors import UserError
from peftbench.methods.base import Method
from peftbench.models import tokenizer
from peftbench.models.load import Backbone, build_meta, kind_of, shape_config
from peftbench.models.roles import first_input
from peftbench.profiling.cost import Trial
from peftbench.profiling.flops import analytic_flops_per_token
from peftbench.profiling.memory import ROUNDING, address_of
from peftbench.profiling.phases import phases, shadowed
from peftbench.profiling.shapes import fill, shapes_alone
from peftbench.profiling.timeline import InLayer, Levels, Tape, Timeline, deepened, peak
from peftbench.record import RunSpec, canonical

CUBLAS_WORKSPACE = 32 * 2**20
"""Bytes that PyTorch gives cuBLAS for each thread on GPUs of capability 9 and above (4096 KiB, 8 times)."""
CUBLAS_THREADS = 2
SHORTEST = 3
"""Fewest layers that a trace has: a first, a middle and a last one."""


@dataclass(frozen=True)
class Prediction:
    """A configuration's cost, under the names that records give it.

    `memory` is bytes by component at the predicted peak, for a device of `kind` "cuda" or "cpu"; `managed` bytes of
    paged optimizer state come on top, on GPU or host.
    """

    kind: str
    adapter_parameters: int
    head_parameters: int
    total_parameters: int
    checkpoint_bytes: int
    flops_per_token: float
    analytic_flops_per_token: float
    memory: dict[str, int]
    managed: int
    assumed: dict[str, Any]

    @property
    def trainable_parameters(self) -> int:
        return self.adapter_parameters + self.head_parameters

    @property
    def peak(self) -> int:
        """Bytes in use at most."""
        return sum(self.memory.values())

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as records of measured costs name them, and what was assumed."""
        return {
            "trainable_parameters": self.trainable_parameters,
            "adapter_parameters": self.adapter_parameters,
            "head_parameters": self.head_parameters,
            "total_parameters": self.total_parameters,
            "checkpoint_bytes": self.checkpoint_bytes,
            "flops_per_token": self.flops_per_token,
            "analytic_flops_per_token": self.analytic_flops_per_token,
            "memory": {"peak": self.peak, **self.memory, "managed": self.managed},
            "assumed": self.assumed,
        }


@dataclass(frozen=True)
class _Step:
    """What tracing one step gives; `numbers` grow by the layer."""

    trial: Trial
    timeline: Timeline
    managed: int

    @property
    def numbers(self) -> list[int]:
        t = self.trial
        counts = [t.adapter_parameters, t.total_parameters, t.checkpoint_bytes, t.trained_matrices, t.frozen_matrices]
        return [*counts, self.managed, self.timeline.flops]


def setting_of(spec: RunSpec, task: Any, runs: int = 1) -> Setting:
    """Return what `predict` takes for `runs` runs of `spec` side by side; of `task` only shapes are asked."""
    method = cast(Method, registry.build_method(spec.method))
    train = build(TrainConfig, spec.train, "train")
    return with_runs(Setting([spec], task, train, [method], torch.device("cpu")), runs)


def with_runs(setting: Setting, runs: int) -> Setting:
    """Return the setting for `runs` runs like its first, each with a seed of its own."""
    specs = [dataclasses.replace(setting.specs[0], seed=run) for run in range(runs)]
    return dataclasses.replace(setting, specs=specs, methods=[setting.methods[0]] * runs)


def with_batch(setting: Setting, rows: int) -> Setting:
    """Return the setting with another `train.batch_size`."""
    return dataclasses.replace(setting, train=dataclasses.replace(setting.train, batch_size=rows))


def predict(setting: Setting, kind: str = "cuda", *, whole: bool = False, exact: bool = True) -> Prediction:
    """Return the cost of the runs of `setting` side by side (usually one) on a device of `kind`.

    Counts are those of the first run. With `whole` no layer is left out of the trace. Unless it is to be `exact`, the
    checkpoint's size may be some hundred bytes off: its header holds the layers' numbers as text.

    Raises:
        UserError: the method does not fit the model, or computes what cannot be without data.
    """
    try:
        return _predicted(setting, kind, whole, exact)
    except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException) as error:
        name = type(setting.methods[0]).__name__
        raise UserError(f"{name}: cannot be predicted from shapes alone ({type(error).__name__}: {error})") from error


def _predicted(setting: Setting, kind: str, whole: bool, exact: bool) -> Prediction:
    config = build(ModelConfig, setting.specs[0].model, "model")
    if config.quantization is not None:
        # bitsandbytes takes what our own kernels take, and need not be installed
        config = dataclasses.replace(config, quantization=config.quantization.removesuffix("-bnb"))
    described = shape_config(config)
    eager = dataclasses.replace(setting.train, execution="eager")
    on_host = dataclasses.replace(setting, train=eager, device=torch.device("cpu"))
    model_kind = kind_of(config, described)
    trace = functools.partial(_traced, on_host, kind, config, model_kind)
    depths = None if whole else shallow(described)
    found = None
    if depths is not None:
        parameters = setting.methods[0].parameter_count(_meta(canonical(as_dict(config)), setting.task.formulation))
        found = _continued(trace, depths, described.num_hidden_layers, parameters)
    if found is None:
        step = trace(None)
        found = step.timeline.levels, step.trial, step.numbers
    levels, trial, (adapter, total, checkpoint, trained, frozen, managed, flops) = found
    if exact and depths is not None:
        with _assembled(on_host, kind, config, model_kind, None) as (assembly, _):
            checkpoint = assembly.adapter.checkpoint_bytes()
    memory = peak(levels)
    if kind == "cuda":
        memory["workspace"] += CUBLAS_WORKSPACE * CUBLAS_THREADS
    return Prediction(
        kind=kind,
        adapter_parameters=adapter,
        head_parameters=trial.head_parameters,
        total_parameters=total,
        checkpoint_bytes=checkpoint,
        flops_per_token=flops / (trial.rows * trial.length * len(setting.specs)),
        analytic_flops_per_token=analytic_flops_per_token(
            frozen, trained, backward_through_base=trial.backward_through_base
        ),
        memory=memory,
        managed=managed,
        assumed={
            "precision": setting.train.precision,
            "checkpointing": setting.train.checkpointing,
            "optimizer": setting.train.optimizer,
            "execution": eager.execution,
            "device_kind": kind,
            "batch_size": trial.rows,
            "length": trial.length,
        },
    )


@functools.lru_cache(maxsize=2)
def _meta(config: str, formulation: str) -> nn.Module:
    return build_meta(build(ModelConfig, json.loads(config), "model"), formulation)


def shallow(described: Any) -> tuple[int, int] | None:
    """Return two depths from which that of a `transformers` config follows; None where the whole model is as short.

    Kinds of layers may alternate (Gemma 3 has five of sliding and one of full attention): depths then differ by whole
    periods.
    """
    depth = described.num_hidden_layers
    if getattr(described, "is_encoder_decoder", False) and described.num_decoder_layers != depth:
        return None
    kinds = getattr(described, "layer_types", None) or [None] * depth
    period = next(p for p in range(1, depth + 1) if kinds[p:] == kinds[: depth - p])
    short = depth % period
    while short < max(SHORTEST, period):
        short += period
    return (short, short + period) if depth > 2 * short + period else None


def _continued(
    trace: Callable[[int | None], _Step], depths: tuple[int, int], depth: int, parameters: int
) -> tuple[Levels, Trial, list[int]] | None:
    """Trace two shallow models and continue them to `depth`.

    None where that gives another number of adapter parameters than the whole model has (settings that name single
    layers), or where the settings fit no shallow one.
    """
    try:
        short, long = (trace(d) for d in depths)
    except UserError:
        return None
    steps = (depth - depths[0]) // (depths[1] - depths[0])
    numbers = [a + (b - a) * steps for a, b in zip(short.numbers, long.numbers, strict=True)]
    if numbers[0] != parameters:
        return None
    return deepened(short.timeline, long.timeline, depths, depth), short.trial, numbers


@contextmanager
def _assembled(
    setting: Setting, kind: str, config: ModelConfig, model_kind: str, depth: int | None
) -> Iterator[tuple[Assembly, list[Tensor]]]:
    """Assemble `setting` on the shapes of the first `depth` layers (None: all); gives paged tensors to be, too."""
    model = build_meta(config, setting.task.formulation, depth)
    with shapes_alone(kind), _unpaged() as managed:
        fill(model, setting.base_dtype)
        text = tokenizer.build(model_kind)
        backbone = Backbone(model, text, model_kind, dataclasses.replace(config, kind=model_kind), "")
        with assembled(setting, backbone) as assembly:
            yield assembly, managed


def _traced(setting: Setting, kind: str, config: ModelConfig, model_kind: str, depth: int | None) -> _Step:
    """Trace one training step of `setting` on the first `depth` layers (None: all)."""
    with _assembled(setting, kind, config, model_kind, depth) as (assembly, managed):
        model = assembly.backbone.model
        trial = trial_on(assembly, cast(TokenTable, Rows(setting, model, model_kind)))
        if assembly.adapter.trained or assembly.adapter.watches_steps:
            # moments of the base's own parameters, and what a method does after a step, come with the first one
            trial.step()
        return _Step(trial, _recorded(trial, model, kind, managed), sum(t.nbytes for t in managed))


class Rows:
    """Stands in for a table of tokens: gives batches of full length.

    An encoder-decoder's answers are taken to be as long as its inputs.
    """

    def __init__(self, setting: Setting, model: Any, model_kind: str) -> None:
        self.columns = ["input_ids", "attention_mask"]
        if model_kind == "encoder" and (getattr(model.config, "type_vocab_size", None) or 0) > 1:
            self.columns.append("token_type_ids")
        if setting.task.formulation == "text":
            self.columns.append("labels")
        self.singles = {} if setting.task.num_tasks == 1 else {"task_ids": torch.long}
        if setting.task.formulation == "head":
            self.singles["targets"] = torch.float32 if setting.task.num_labels == 1 else torch.long

    def gather(self, items: np.ndarray, length: int) -> dict[str, Tensor]:
        """Return the batch of `items` (any shape)."""
        batch = {name: torch.empty((items.size, length), dtype=torch.long) for name in self.columns}
        return batch | {name: torch.empty(items.size, dtype=dtype) for name, dtype in self.singles.items()}

    def tensors(self) -> list[Tensor]:
        """Return nothing: what a table holds depends on the data."""
        return []


@contextmanager
def _unpaged() -> Iterator[list[Tensor]]:
    """Have paged memory be tensors like others, and give the list of them."""
    made: list[Tensor] = []

    def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        made.append(torch.zeros(tuple(shape), dtype=dtype))
        return made[-1]

    with shadowed(paging, "zeros", zeros):
        yield made


def _recorded(trial: Trial, model: nn.Module, kind: str, managed: Sequence[Tensor]) -> Timeline:
    """Record one step; stretches are the phases, and in forward and backward pass each layer's part."""
    known: dict[int, str] = {}
    for component, tensors in trial.persistent().items():
        for tensor in tensors:
            known.setdefault(address_of(tensor), component)
    existing = [t for tensors in trial.persistent().values() for t in tensors]
    tape = Tape(existing, rounding=ROUNDING if kind == "cuda" else 1, gpu=kind == "cuda")
    for tensor in managed:
        tape.before[address_of(tensor)] = 0
    phase = [""]

    def enter(name: str) -> None:
        phase[0] = name
        tape.mark(name, trial.gradients() if name == "step" else ())
        tape.label(name)

    def in_layer(stack: int, layer: int, event: str) -> None:
        tape.label(InLayer(phase[0], stack, layer, event))

    # the hooks go with the layers: this model is used once
    depth = cast(Any, model).config.num_hidden_layers
    for stack, modules in enumerate(_stacks(model, depth)):
        for i, module in enumerate(modules):
            _listen(module, functools.partial(in_layer, stack, i))
    with tape, phases(trial.objective, trial.optimizer, enter):
        trial.step()
    return tape.timeline(known, trial.flat_gradient())


def _stacks(model: nn.Module, depth: int) -> list[nn.ModuleList]:
    """Return the lists of `depth` layers in `model`, the outermost ones alone."""
    found: list[nn.ModuleList] = []
    for module in model.modules():
        inside = any(module is not outer and module in set(outer.modules()) for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) == depth and not inside:
            found.append(module)
    return found


def _listen(layer: nn.Module, tell: Callable[[str], None]) -> None:
    """Call `tell` when the layer's forward pass begins and ends, and its backward pass likewise."""

    def watch(value: Any, event: str) -> None:
        hidden = value[0] if isinstance(value, tuple) else value
        if isinstance(hidden, Tensor) and hidden.requires_grad:
            hidden.register_hook(lambda _: tell(event))

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tell("forward")
        watch(first_input(args, kwargs), "backward done")

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        tell("forward done")
        watch(output, "backward")

    layer.register_forward_pre_hook(before, with_kwargs=True)
    layer.register_forward_hook(after)
