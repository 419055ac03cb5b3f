"""From a pack of specs to records: the only place that joins model, method, task, engine and profiler."""

from __future__ import annotations

import functools
import gc
import json
import math
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from peftbench import environment, registry, verify
from peftbench.config import ModelConfig, ProfileConfig, TrainConfig, build
from peftbench.engine import evaluation, objectives
from peftbench.engine.batches import PackedBatch, TokenTable, make_buckets, packed_batches, steps_per_epoch
from peftbench.engine.heads import PackedHead
from peftbench.engine.loop import train, train_step
from peftbench.engine.moments import Storage
from peftbench.engine.optimizer import PackedAdamW, Recipe
from peftbench.errors import UserError
from peftbench.methods.adapter import Adapter, attach, generator_for
from peftbench.methods.base import Method, RunDropout
from peftbench.models import attention, roles
from peftbench.models.load import Backbone, load, set_dropout
from peftbench.models.quantized import dense_parameter_count
from peftbench.profiling.cost import Trial, measure
from peftbench.record import RunRecord, RunSpec, profile_id
from peftbench.store import Store
from peftbench.tasks.base import Encoded, Task

HEAD_FILE = "head.safetensors"
"""The task head beside a kept adapter."""
EVALUATION_ROWS = 4096
"""Most rows of a pack that go through the model at once in an evaluation."""


class Listener(Protocol):
    """What hears how a pack gets on."""

    def phase(self, name: str) -> None: ...

    def steps(self, done: int, total: int, losses: Sequence[float] | None) -> None: ...

    def record(self, record: RunRecord) -> None: ...


@dataclass(frozen=True)
class Setting:
    """What the runs of a pack share."""

    specs: Sequence[RunSpec]
    task: Task
    train: TrainConfig
    methods: Sequence[Method]
    device: torch.device

    @classmethod
    def of(cls, specs: Sequence[RunSpec]) -> Setting:
        """Build task, recipe and methods from resolved specs."""
        first = specs[0]
        methods = [cast(Method, registry.build_method(s.method)) for s in specs]
        return cls(
            specs,
            cast(Task, registry.build_task(first.task)),
            build(TrainConfig, first.train, "train"),
            methods,
            torch.device(first.device),
        )

    def alone(self, run: int) -> Setting:
        """Return the same for one run by itself."""
        return Setting([self.specs[run]], self.task, self.train, [self.methods[run]], self.device)

    @property
    def trains_base(self) -> bool:
        """Whether the base's own weights train: they are then kept in fp32 and computed with under autocast."""
        return "weight" in self.methods[0].traits.sites

    @property
    def base_dtype(self) -> torch.dtype:
        """Precision in which the base's weights are kept."""
        return torch.bfloat16 if self.train.precision == "bf16" and not self.trains_base else torch.float32

    def autocast(self) -> AbstractContextManager[object]:
        """Return the precision context of forward passes."""
        if self.train.precision == "bf16" and self.trains_base:
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    @property
    def max_length(self) -> int:
        """Longest sequence in tokens."""
        assert self.train.max_length is not None, "specs are resolved"
        return self.train.max_length

    @property
    def profile_id(self) -> str:
        """Id of the cost of the first run's configuration."""
        return profile_id(self.specs[0], self.methods[0].traits.cost_free)

    @property
    def recipes(self) -> list[Recipe]:
        """Return each run's optimizer settings."""
        configs = [build(TrainConfig, s.train, "train") for s in self.specs]
        return [
            Recipe(cast(float, c.learning_rate), c.weight_decay, c.clip_norm, c.schedule, c.warmup, m.rate_factor)
            for c, m in zip(configs, self.methods, strict=True)
        ]


_backbones: dict[str, Backbone] = {}


def _backbone(setting: Setting) -> Backbone:
    """Return the frozen base, loading it unless it is the one used last; one base at a time stays in memory."""
    first = setting.specs[0]
    key = json.dumps(
        [first.model, setting.task.formulation, str(setting.base_dtype), str(setting.device)], sort_keys=True
    )
    if key not in _backbones:
        _backbones.clear()
        _free(setting.device)
        config = build(ModelConfig, first.model, "model")
        _backbones[key] = load(config, setting.task.formulation, setting.base_dtype, setting.device)
    return _backbones[key]


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def _configured(model: nn.Module, setting: Setting) -> Iterator[None]:
    """Set dropout, attention and checkpointing on the base for the context."""
    with ExitStack() as undo:
        undo.callback(set_dropout(model, setting.train.dropout))
        if roles.supports_attention_interface(model):
            configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
            for config in configs.values():
                before = attention.use(config)
                undo.callback(setattr, config, "_attn_implementation", before)
        if setting.train.checkpointing:
            cast(Any, model).gradient_checkpointing_enable({"use_reentrant": False})
            undo.callback(cast(Any, model).gradient_checkpointing_disable)
        undo.enter_context(attention.right_padded())
        yield


@dataclass
class Assembly:
    """A pack ready to train: adapter and objective on the base."""

    setting: Setting
    backbone: Backbone
    adapter: Adapter
    objective: objectives.Objective
    head: PackedHead | None

    def optimizer(self, steps: int) -> PackedAdamW:
        """Return the optimizer over adapter and head."""
        packed = self.adapter.packed_parameters() + self.objective.parameters()
        plain = list(self.adapter.trained.values())
        if not packed and not plain:
            raise UserError("nothing trains: this method has no parameters and the task no head")
        c = self.setting.train
        even = [[1.0] * self.adapter.runs] * len(self.objective.parameters())
        return PackedAdamW(
            packed,
            plain,
            self.setting.recipes,
            steps,
            beta1=c.beta1,
            beta2=c.beta2,
            epsilon=c.epsilon,
            ratios=self.adapter.rate_ratios() + even,
            keep_gradients=self.adapter.watches_steps,
            base=self.setting.methods[0].base_optimizer(
                plain, (c.beta1, c.beta2), c.epsilon, self.setting.recipes[0].weight_decay
            )
            if plain
            else None,
            storage=Storage.parse(c.optimizer),
        )


@contextmanager
def _assembled(setting: Setting) -> Iterator[Assembly]:
    """Attach methods and head to the base; everything comes off when the context ends."""
    backbone = _backbone(setting)
    model = backbone.model
    seeds = [s.seed for s in setting.specs]
    with _configured(model, setting):
        adapter = attach(model, list(setting.methods), seeds=seeds, tokenizer=backbone.tokenizer)
        try:
            if setting.train.dropout is not None:
                for _, delta in adapter.parts:
                    for module in delta.modules():
                        if isinstance(module, RunDropout):
                            module.set(setting.train.dropout)
            head = None
            objective: objectives.Objective
            if setting.task.formulation == "head":
                head = _head(setting, backbone, seeds)
                objective = objectives.HeadObjective(
                    model, adapter, head, backbone.config.pooling, setting.task.task_classes
                )
            else:
                objective = objectives.TextObjective(model, adapter, len(seeds), seq2seq=backbone.kind == "seq2seq")
            yield Assembly(setting, backbone, adapter, objective, head)
        finally:
            adapter.detach()
            model.eval()


def _head(setting: Setting, backbone: Backbone, seeds: Sequence[int]) -> PackedHead:
    config: Any = backbone.model.config
    own = getattr(config, "classifier_dropout", None)
    own = getattr(config, "hidden_dropout_prob", None) if own is None else own
    dropout = setting.train.dropout if setting.train.dropout is not None else float(own or 0.0)
    generators = [generator_for("head", seed) for seed in seeds]
    head = PackedHead(backbone.config.head, config.hidden_size, setting.task.num_labels, generators, dropout)
    return head.to(setting.device)


# Cost.


@contextmanager
def _trial(alone: Setting, encoded: Encoded) -> Iterator[Trial]:
    """One run alone on a batch in which every sequence has full length but the last, which is one token shorter."""
    rows, length = alone.train.batch_size, alone.max_length
    with _assembled(alone) as assembly:
        tokenizer: Any = assembly.backbone.tokenizer
        table = TokenTable(_fixed_batch(encoded, rows, length, len(tokenizer)), 0, alone.device)
        optimizer = assembly.optimizer(100_000)
        batch = PackedBatch(np.arange(rows)[None], length, 0)
        model, adapter, head = assembly.backbone.model, assembly.adapter, assembly.head
        assembly.objective.train(True)

        def step() -> Tensor:
            return train_step(
                assembly.objective,
                optimizer,
                table,
                batch,
                accumulation=alone.train.accumulation,
                autocast=alone.autocast,
            )

        def existing() -> Iterable[Tensor]:
            yield from model.parameters()
            yield from model.buffers()
            yield from adapter.parameters()
            yield from assembly.objective.parameters()
            yield from optimizer.state_tensors()
            yield from table.tensors()

        own_head = 0 if head is None else head.parameter_count()
        own = adapter.parameter_count()
        trained = {id(p) for p in adapter.trained.values()}
        matrices = _matrices(model)
        yield Trial(
            step=step,
            existing=existing,
            rows=rows,
            length=length,
            adapter_parameters=own,
            head_parameters=own_head,
            total_parameters=dense_parameter_count(model) + own_head + (0 if trained else own),
            trained_matrices=sum(p.numel() for p in matrices if id(p) in trained)
            + sum(p[0].numel() for p in adapter.packed_parameters() if p.dim() > 2),
            frozen_matrices=sum(p.numel() for p in matrices if id(p) not in trained) + _quantized_weights(model),
            backward_through_base=bool(adapter.parameters()),
            checkpoint_bytes=adapter.checkpoint_bytes(),
            compute_dtype=torch.bfloat16 if alone.train.precision == "bf16" else torch.float32,
        )


def _fixed_batch(encoded: Encoded, rows: int, length: int, vocabulary: int) -> Encoded:
    """Return `rows` random sequences of `length` tokens, with targets or labels shaped like the task's own."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, vocabulary, (rows, length)).tolist()
    ids[-1] = ids[-1][:-1]
    types = None if encoded.token_type_ids is None else [[0] * len(row) for row in ids]
    targets: Any = None if encoded.targets is None else [encoded.targets[i % len(encoded)] for i in range(rows)]
    labels = None
    if encoded.labels is not None:
        if len(encoded.labels[0]) == len(encoded.input_ids[0]):
            labels = [[-100] * (len(row) // 2) + row[len(row) // 2 :] for row in ids]
        else:
            widest = max(len(row) for row in encoded.labels)
            labels = [(row * widest)[:widest] for row in ids]
    tasks = None if encoded.task_ids is None else [encoded.task_ids[i % len(encoded)] for i in range(rows)]
    return Encoded(ids, types, targets, labels, tasks)


def _matrices(model: nn.Module) -> list[nn.Parameter]:
    """Return the matrices every token is multiplied with: no look-up tables, but for one tied to the output."""
    output = cast(Any, model).get_output_embeddings()
    tied = {id(p) for p in output.parameters()} if output is not None else set()
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()} - tied
    return [p for p in model.parameters() if p.dim() == 2 and id(p) not in tables]


def _quantized_weights(model: nn.Module) -> int:
    """Return how many weights of `model` are kept in 4 bits."""
    return dense_parameter_count(model) - sum(p.numel() for p in model.parameters())


def _cost(alone: Setting, store: Store, encoded: Encoded, listener: Listener) -> dict[str, Any]:
    """Return one run's cost: its configuration's kept profile, or one measured now, plus what is this task's own."""
    spec = alone.specs[0]
    profile = build(ProfileConfig, spec.profile, "profile")
    key = alone.profile_id
    cost = store.profile(key)
    if cost is None:
        if not profile.enabled:
            return _counts(alone)
        listener.phase("profile")
        _free(alone.device)
        cost = measure(
            lambda: _trial(alone, encoded),
            alone.device,
            min_warmup=profile.min_warmup,
            steps=profile.steps,
            max_seconds=profile.max_seconds,
            energy_seconds=profile.energy_seconds,
        )
        cost = {"profile_id": key, "device_kind": spec.identity["device_kind"], **cost}
        store.write_profile(key, cost)
        _free(alone.device)
    # Real tokens: the share of the fixed shape that the task's own texts fill.
    share = float(np.mean([min(n, alone.max_length) for n in encoded.lengths])) / alone.max_length
    return {**cost, "tokens_per_second": cost["padded_tokens_per_second"] * share}


def _counts(alone: Setting) -> dict[str, Any]:
    """Return what can be said of cost without measuring."""
    with _assembled(alone) as assembly:
        own_head = 0 if assembly.head is None else assembly.head.parameter_count()
        own = assembly.adapter.parameter_count()
        base = dense_parameter_count(assembly.backbone.model)
        return {
            "trainable_parameters": own + own_head,
            "adapter_parameters": own,
            "head_parameters": own_head,
            "total_parameters": base + own_head + (0 if assembly.adapter.trained else own),
            "checkpoint_bytes": assembly.adapter.checkpoint_bytes(),
        }


# Quality.


@dataclass
class Split:
    """An evaluation split: its evaluator and the references its predictions are compared with."""

    evaluator: evaluation.Evaluator
    references: list[Any]


def _split(assembly: Assembly, rows: list[dict[str, Any]]) -> Split:
    """Prepare one split for evaluation as the task asks."""
    setting, backbone, task = assembly.setting, assembly.backbone, assembly.setting.task
    tokenizer: Any = backbone.tokenizer
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    encode = (rows, tokenizer, setting.max_length, backbone.kind)
    runs, wanted = len(setting.specs), setting.train.eval_batch_size
    items = max(1, min(wanted, EVALUATION_ROWS // runs) if setting.device.type == "cuda" else wanted // runs)
    common = {"items": items, "max_length": setting.max_length, "autocast": setting.autocast}
    if isinstance(assembly.objective, objectives.HeadObjective):
        table = TokenTable(task.encode(*encode), pad, setting.device)
        return Split(evaluation.HeadEvaluator(assembly.objective, table=table, **common), task.references(rows))
    objective = cast(objectives.TextObjective, assembly.objective)
    evaluator: evaluation.Evaluator
    if task.evaluation == "choices":
        encoded, owners = task.encode_choices(*encode)
        table = TokenTable(encoded, pad, setting.device)
        evaluator = evaluation.ChoiceEvaluator(owners, objective, table=table, **common)
    elif task.evaluation == "generation":
        table = TokenTable(task.encode_prompts(*encode), pad, setting.device, left=backbone.kind == "decoder")
        evaluator = evaluation.GenerationEvaluator(
            objective,
            lambda ids: task.parse(tokenizer.decode(ids, skip_special_tokens=True)),
            task.max_new_tokens,
            tokenizer.eos_token_id,
            pad,
            table=table,
            **common,
        )
    else:
        assert task.evaluation == "loss", task.evaluation
        evaluator = evaluation.LossEvaluator(
            objective, table=TokenTable(task.encode(*encode), pad, setting.device), **common
        )
    return Split(evaluator, task.references(rows))


class Selection:
    """Keeps each run's parameters from the evaluation with its best primary metric."""

    def __init__(self, task: Task, optimizer: PackedAdamW, runs: int, base: Sequence[Tensor] = ()) -> None:
        self.task = task
        self.base = base
        self.optimizer = optimizer
        self.best = [-math.inf] * runs
        self.step = [0] * runs
        self.metrics: list[dict[str, float | None]] = [{} for _ in range(runs)]
        self.history: list[list[dict[str, Any]]] = [[] for _ in range(runs)]
        self._packed = optimizer.flat.clone()
        self._plain: list[Tensor] = []

    @torch.no_grad()
    def consider(self, step: int, metrics: Sequence[dict[str, float | None]]) -> None:
        """Note the metrics of all runs after `step`; an undefined primary metric counts as worst."""
        for run, values in enumerate(metrics):
            self.history[run].append({"step": step, "metrics": values})
            value = values.get(self.task.primary_metric)
            score = -math.inf if value is None or not math.isfinite(value) else float(value)
            score = score if self.task.greater_is_better or score == -math.inf else -score
            if score > self.best[run] or self.step[run] == 0:
                self.best[run], self.step[run], self.metrics[run] = score, step, values
                self._packed[run] = self.optimizer.flat[run]
                self._plain = [p.detach().to("cpu", copy=True) for p in self.base]

    @torch.no_grad()
    def restore(self) -> None:
        """Put every run back to its best parameters."""
        self.optimizer.flat.copy_(self._packed)
        for p, kept in zip(self.base, self._plain, strict=True):
            p.copy_(kept)


def _evaluation_steps(steps: int, per_epoch: int, every: int | None) -> frozenset[int]:
    """Return the steps after which validation is measured: every `every`, or once an epoch, and at the end."""
    return frozenset([*range(every or per_epoch, steps, every or per_epoch), steps])


@dataclass(frozen=True)
class Outcome:
    """What training a pack gave, one entry a run."""

    statuses: list[str]
    errors: list[str | None]
    qualities: list[dict[str, Any] | None]
    traces: list[dict[str, Any]]


def _train(
    setting: Setting,
    splits: dict[str, list[dict[str, Any]]],
    encoded: Encoded,
    listener: Listener,
    keep: Store | None = None,
) -> Outcome:
    config = setting.train
    seeds = [s.seed for s in setting.specs]
    with _assembled(setting) as assembly:
        tokenizer: Any = assembly.backbone.tokenizer
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
        buckets = make_buckets(encoded.lengths, config.batch_size, setting.max_length)
        per_epoch = steps_per_epoch(buckets, config.batch_size)
        steps = config.steps or max(1, round(config.epochs * per_epoch))
        table = TokenTable(encoded, pad, setting.device)
        optimizer = assembly.optimizer(steps)
        # Dropout's stream: that of the run itself when it is alone.
        torch.manual_seed(int(np.random.default_rng(seeds).integers(2**31)))
        validation = _split(assembly, splits["validation"])
        changed = [*assembly.adapter.trained.values(), *assembly.adapter.rewritten.values()]
        selection = Selection(setting.task, optimizer, len(seeds), changed)
        last_shown = [0.0]
        known: list[float] = []

        def evaluate(step: int) -> bool:
            listener.phase("evaluate")
            predictions = validation.evaluator.predict()
            selection.consider(step, [setting.task.metrics(p, validation.references) for p in predictions])
            listener.phase("train")
            return bool(optimizer.alive.any())

        def on_step(step: int, losses: Tensor) -> None:
            now = time.monotonic()
            if now - last_shown[0] > 0.5 or step == steps:
                last_shown[0] = now
                # On a GPU a look at the loss would wait for the step; an evaluation waits anyway.
                if setting.device.type == "cpu" or step in evaluate_at:
                    known[:] = losses.tolist()
                listener.steps(step, steps, known)

        evaluate_at = _evaluation_steps(steps, per_epoch, config.evaluate_every)
        listener.phase("train")
        trace = train(
            assembly.objective,
            optimizer,
            table,
            list(packed_batches(buckets, config.batch_size, seeds, steps)),
            evaluate_at=evaluate_at,
            evaluate=evaluate,
            accumulation=config.accumulation,
            autocast=setting.autocast,
            on_step=on_step,
        ).values()
        alive = optimizer.alive.cpu().tolist()
        selection.restore()
        listener.phase("test")
        tested = {name: _tested(assembly, rows) for name, rows in splits.items() if name.startswith("test")}
        qualities = [_quality(setting, selection, tested, run) if ok else None for run, ok in enumerate(alive)]
        traces = [_trace(trace[:, run], [r[run] for r in optimizer.rates]) for run in range(len(seeds))]
        broken = [int(np.argmax(~np.isfinite(trace[:, run]))) + 1 for run in range(len(seeds))]
        errors = [
            None
            if ok
            else f"loss or gradient was no longer finite (loss from step {broken[run]})"
            if not np.isfinite(trace[:, run]).all()
            else "gradient was no longer finite"
            for run, ok in enumerate(alive)
        ]
        for run, ok in enumerate(alive):
            if keep is not None and ok:
                keep.write_adapter(setting.specs[run].run_id, functools.partial(_save, assembly, run))
        return Outcome(["completed" if ok else "diverged" for ok in alive], errors, qualities, traces)


def _save(assembly: Assembly, run: int, folder: Path) -> None:
    """Write one run's adapter, and its task head beside it."""
    assembly.adapter.save(folder, run)
    if assembly.head is not None:
        tensors = {name: t.cpu().contiguous() for name, t in assembly.head.state_dict_of(run).items()}
        save_file(tensors, folder / HEAD_FILE)


def _tested(assembly: Assembly, rows: list[dict[str, Any]]) -> tuple[list[list[Any]], list[Any]]:
    split = _split(assembly, rows)
    return split.evaluator.predict(), split.references


def _quality(
    setting: Setting, selection: Selection, tested: dict[str, tuple[list[list[Any]], list[Any]]], run: int
) -> dict[str, Any]:
    task = setting.task
    quality: dict[str, Any] = {
        "primary_metric": task.primary_metric,
        "greater_is_better": task.greater_is_better,
        "protocol": setting.specs[run].protocol,
        "data_subset": task.subset(),
        "selected_step": selection.step[run],
        "validation": selection.metrics[run],
        "evaluations": selection.history[run],
        "items": {},
    }
    for name, (predictions, references) in tested.items():
        quality[name] = task.metrics(predictions[run], references)
        scores = task.item_scores(predictions[run], references)
        quality["items"][name] = {"scores": scores, "predictions": predictions[run]}
    return quality


def _trace(losses: np.ndarray, rates: Sequence[float]) -> dict[str, Any]:
    """Return loss and learning rate per step; nine digits give a float32 back exactly."""
    return {
        "loss": [float(f"{v:.9g}") if np.isfinite(v) else None for v in losses],
        "learning_rate": [float(f"{v:.6g}") for v in rates[: len(losses)]],
    }


# Packs.


def measure_costs(specs: Sequence[RunSpec], store: Store, listener: Listener) -> None:
    """Measure the cost of every configuration among `specs` that the store has no profile of, one after the other.

    For the process that starts a sweep, before anything else uses the machine. A configuration that cannot be set up is
    left to its run, whose record will say why.
    """
    for spec in specs:
        try:
            alone = Setting.of([spec])
            if not build(ProfileConfig, spec.profile, "profile").enabled or store.profile(alone.profile_id) is not None:
                continue
            backbone = _backbone(alone)
            rows = alone.task.splits(spec.protocol)["train"]
            encoded = alone.task.encode(rows, backbone.tokenizer, alone.max_length, backbone.kind)
            _cost(alone, store, encoded, listener)
        except Exception as error:  # the run meets the same error and records it
            if isinstance(error.__cause__, OSError):
                raise
            _free(torch.device(spec.device))


def run_pack(
    specs: Sequence[RunSpec], store: Store, listener: Listener, *, save_adapters: bool = False
) -> list[RunRecord]:
    """Train the runs of one pack side by side, write a record for each, and return them.

    With `save_adapters` the store keeps the parameters that each completed run was tested with.

    A pack that fails or runs out of memory gives records that say so; mistakes a user can mend are records too, since
    the rest of the sweep goes on. Only a full disk or an interrupt leaves without records.
    """
    costs: list[dict[str, Any] | None] = [None] * len(specs)
    try:
        listener.phase("load")
        setting = Setting.of(specs)
        splits = setting.task.splits(specs[0].protocol)
        backbone = _backbone(setting)
        encoded = setting.task.encode(splits["train"], backbone.tokenizer, setting.max_length, backbone.kind)
        for run in range(len(specs)):
            costs[run] = _cost(setting.alone(run), store, encoded, listener)
        outcome = _train(setting, splits, encoded, listener, store if save_adapters else None)
    except torch.OutOfMemoryError as error:
        outcome = _failure("out_of_memory", specs, str(error).splitlines()[0])
    except UserError as error:
        if isinstance(error.__cause__, OSError):
            raise
        outcome = _failure("failed", specs, str(error))
    except Exception as error:  # noqa: BLE001  a failed run is a record with its reason, and its neighbours go on
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__}: {error} ({where.name}, {where.filename.rpartition('/')[2]}:{where.lineno})"
        outcome = _failure("failed", specs, text)
    about = environment.describe(specs[0].device)
    records = []
    for run, spec in enumerate(specs):
        record = RunRecord(
            run_id=spec.run_id,
            status=outcome.statuses[run],
            error=outcome.errors[run],
            spec=spec.to_dict(),
            quality=outcome.qualities[run],
            trace=outcome.traces[run] or None,
            cost=costs[run],
            environment=about,
            parity=verify.stamp(spec.method),
            pack={"size": len(specs), "index": run},
        )
        store.write(record)
        listener.record(record)
        records.append(record)
    return records


def _failure(status: str, specs: Sequence[RunSpec], error: str) -> Outcome:
    runs = len(specs)
    return Outcome([status] * runs, [error] * runs, [None] * runs, [{}] * runs)
