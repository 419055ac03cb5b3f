"""What a pack of runs is made of: its settings, the frozen base, adapters and objective on it, the optimizer."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftbench import registry, starts
from peftbench.config import ModelConfig, TrainConfig, build
from peftbench.engine import objectives
from peftbench.engine.compiling import compiled_layers
from peftbench.engine.heads import PackedHead
from peftbench.engine.moments import Storage
from peftbench.engine.optimizer import PackedAdamW, Recipe
from peftbench.errors import UserError
from peftbench.kernels.noise import Noise, checkpoint_contexts
from peftbench.methods.adapter import Adapter, attach, generator_for
from peftbench.methods.base import Method
from peftbench.models import attention, residuals, roles
from peftbench.models.load import Backbone, load, set_dropout
from peftbench.record import RunSpec, profile_id
from peftbench.tasks.base import Task


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

    def chosen(self, runs: Sequence[int]) -> Setting:
        """Return the same for some of the runs."""
        specs, methods = [self.specs[run] for run in runs], [self.methods[run] for run in runs]
        return Setting(specs, self.task, self.train, methods, self.device)

    def alone(self, run: int) -> Setting:
        """Return the same for one run by itself."""
        return self.chosen([run])

    @property
    def configs(self) -> list[TrainConfig]:
        """Return each run's training settings."""
        return [build(TrainConfig, s.train, "train") for s in self.specs]

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
        return [
            Recipe(
                cast(float, c.learning_rate),
                c.weight_decay,
                c.clip_norm,
                c.schedule,
                c.warmup,
                m.rate_factor,
                c.beta1,
                c.beta2,
                c.epsilon,
            )
            for c, m in zip(self.configs, self.methods, strict=True)
        ]


_backbones: dict[str, Backbone] = {}


def backbone_of(setting: Setting) -> Backbone:
    """Return the frozen base, loading it unless it is the one used last; one base at a time stays in memory."""
    first = setting.specs[0]
    key = json.dumps(
        [first.model, setting.task.formulation, str(setting.base_dtype), str(setting.device)], sort_keys=True
    )
    if key not in _backbones:
        _backbones.clear()
        free(setting.device)
        config = build(ModelConfig, first.model, "model")
        _backbones[key] = load(config, setting.task.formulation, setting.base_dtype, setting.device)
    return _backbones[key]


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def _configured(model: nn.Module, setting: Setting) -> Iterator[None]:
    """Set dropout, attention and checkpointing on the base for the context."""
    with ExitStack() as undo:
        own = setting.train.base_dropout
        undo.callback(set_dropout(model, setting.train.dropout if own is None else own))
        if roles.supports_attention_interface(model):
            configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
            for config in configs.values():
                before = attention.use(config)
                undo.callback(setattr, config, "_attn_implementation", before)
        compiled = setting.train.execution.startswith("compiled")
        if not compiled:
            undo.callback(residuals.fuse(model))
        if setting.train.checkpointing:
            how: dict[str, Any] = {"use_reentrant": False, "context_fn": checkpoint_contexts}
            cast(Any, model).gradient_checkpointing_enable(how)
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

    def views(self, run: int) -> dict[str, Tensor]:
        """Return views of what one run of a pack trains, by name, without padding."""
        head = {} if self.head is None else {f"head/{name}": p[run] for name, p in self.head.named_parameters()}
        return self.adapter.views(run) | head

    def optimizer(
        self, steps: int | Sequence[int], done: Sequence[int] | None = None, length: int | None = None
    ) -> PackedAdamW:
        """Return the optimizer over adapter and head; see `PackedAdamW` for `steps`, `done` and `length`."""
        packed = self.adapter.packed_parameters() + self.objective.parameters()
        plain = list(self.adapter.trained.values())
        if not packed and not plain:
            raise UserError("nothing trains: this method has no parameters and the task no head")
        c = self.setting.train
        head = [[_head_ratio(config) for config in self.setting.configs]] * len(self.objective.parameters())
        return PackedAdamW(
            packed,
            plain,
            self.setting.recipes,
            steps,
            done=done,
            length=length,
            ratios=self.adapter.rate_ratios() + head,
            rows=self.adapter.rows() + [(0, self.adapter.runs)] * len(head),
            keep_gradients=self.adapter.watches_steps,
            base=self.setting.methods[0].base_optimizer(
                plain, (c.beta1, c.beta2), c.epsilon, self.setting.recipes[0].weight_decay
            )
            if plain
            else None,
            storage=Storage.parse(c.optimizer),
        )


def _head_ratio(config: TrainConfig) -> float:
    """Return the head's learning rate over that of everything else."""
    return 1.0 if config.head_learning_rate is None else config.head_learning_rate / cast(float, config.learning_rate)


@contextmanager
def assembled(setting: Setting, backbone: Backbone | None = None) -> Iterator[Assembly]:
    """Attach methods and head to the base (None: the settings' own); everything comes off when the context ends."""
    backbone = backbone or backbone_of(setting)
    model = backbone.model
    seeds = [s.seed for s in setting.specs]
    with _configured(model, setting):
        adapter = attach(model, list(setting.methods), seeds=seeds, tokenizer=backbone.tokenizer)
        try:
            starts.fill(adapter, [c.start for c in setting.configs], seeds)
            if setting.train.dropout is not None:
                for dropout in adapter.dropouts():
                    dropout.set(setting.train.dropout)
            head = None
            smoothing = [c.label_smoothing for c in setting.configs]
            objective: objectives.Objective
            if setting.task.formulation == "head":
                head = _head(setting, backbone, seeds)
                objective = objectives.HeadObjective(
                    model, adapter, head, backbone.config.pooling, setting.task.task_classes, smoothing=smoothing
                )
            else:
                seq2seq = backbone.kind == "seq2seq"
                objective = objectives.TextObjective(model, adapter, len(seeds), seq2seq=seq2seq, smoothing=smoothing)
            objective.noise = Noise(seeds, setting.device)
            objective.train(False)
            with compiled_layers(model) if setting.train.execution.startswith("compiled") else nullcontext():
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
