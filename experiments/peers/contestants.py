"""Who competes: a whole training step each of HF PEFT, of plain fine-tuning and of this project, on one frozen base.

Every contestant has modules of its own whose frozen parameters are the *same tensors*, so that a dozen of them fit on
one card. Only what trains the base, or keeps it in 4 bits, has a copy. A step is forward pass, loss, backward pass,
optimizer and clearing the gradients; nobody clips (ours measures the norm all the same, to find runs gone astray).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from peftbench import registry
from peftbench.assembly import Setting, assembled
from peftbench.config import ModelConfig, build
from peftbench.engine.batches import PackedBatch, TokenTable
from peftbench.engine.stepping import stepper
from peftbench.models.load import Backbone, load
from peftbench.models.quantized import Scheme, quantize
from peftbench.resolve import Demand, plan
from peftbench.tasks.base import Encoded

RATE = 1e-4
STEPS = 100_000
"""Length of the run that the steps are taken to belong to: AdaLoRA and schedules ask."""
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Every linear layer of a Llama's body."""


@dataclass
class Contestant:
    """One way to make a training step, ready to go.

    Attributes:
        step: makes a whole step without waiting for the device; returns the loss, one element.
        tensors: yields what it keeps between steps, the frozen base included.
        trained: how many parameters train.
        uses_base: whether it computes with the shared tensors of the frozen base.
        trains_base: whether the base's own weights train (6N FLOPs a token, not 4N).
        movable: whether its tensors may change their addresses between steps; a captured graph's may not.
        ran: whether steps have been run the way the contestant's name says.
        note: what a reader should know about its settings.
    """

    step: Callable[[], Tensor]
    tensors: Callable[[], Iterable[Tensor]]
    trained: int
    uses_base: bool = True
    trains_base: bool = False
    movable: bool = True
    ran: Callable[[], bool] = lambda: True
    note: str = ""


@dataclass
class Arena:
    """What all contestants have in common: the frozen base, the batch, rank and alpha."""

    reference: Backbone
    model: str
    weights: str
    ids: Tensor
    precision: str
    rank: int
    alpha: float
    device: torch.device

    @classmethod
    def of(
        cls,
        model: str,
        weights: str,
        batch: int,
        length: int,
        device: torch.device,
        precision: str = "bf16",
        rank: int = 16,
        alpha: float = 32.0,
    ) -> Arena:
        """Load or draw the base and draw a batch of random ids, without padding, from a fixed seed."""
        config = build(ModelConfig, {**registry.section("model", model), "weights": weights}, "model")
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        reference = load(config, "text", dtype, device)
        ids = np.random.default_rng(0).integers(0, reference.model.config.vocab_size, (batch, length))
        return cls(reference, model, weights, torch.from_numpy(ids).to(device), precision, rank, alpha, device)

    @property
    def dtype(self) -> torch.dtype:
        """Precision that the base is kept in."""
        return self.reference.model.dtype

    @property
    def matrix_parameters(self) -> int:
        """How many parameters a token is multiplied with: N of 4N and 6N."""
        return sum(m.weight.numel() for m in self.reference.model.modules() if isinstance(m, nn.Linear))

    def base_tensors(self) -> list[Tensor]:
        """Return the shared tensors."""
        return [*self.reference.model.parameters(), *self.reference.model.buffers()]

    def twin(self, own: torch.dtype | None = None) -> Any:
        """Return new modules over the base's own tensors, or over copies, with the parameters in the dtype `own`."""
        source: Any = self.reference.model
        config = copy.deepcopy(source.config)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=self.dtype, attn_implementation="sdpa")
        made: dict[int, nn.Parameter] = {}
        for (_, theirs), (_, ours) in zip(source.named_modules(), model.named_modules(), strict=True):
            for name, parameter in theirs._parameters.items():
                if parameter is not None and id(parameter) not in made:
                    data = parameter.detach()
                    data = data if own is None else data.to(own, copy=True)
                    made[id(parameter)] = nn.Parameter(data, requires_grad=False)
                ours._parameters[name] = None if parameter is None else made[id(parameter)]
            for name, buffer in theirs._buffers.items():
                ours._buffers[name] = buffer if own is None or buffer is None else buffer.clone()
        return model


Builder = Callable[[Arena], AbstractContextManager[Contestant]]


def _adamw(model: nn.Module) -> torch.optim.AdamW:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0, fused=True)


def _hf_step(
    arena: Arena, model: Any, called: Any, after: Callable[[], None] = lambda: None
) -> tuple[Callable[[], Tensor], Callable[[], Iterator[Tensor]]]:
    """Return the step of a Hugging Face model as its users write it, and what it keeps; `called` is what is called."""
    optimizer = _adamw(model)
    model.train()

    def step() -> Tensor:
        loss: Tensor = called(input_ids=arena.ids, labels=arena.ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        after()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def tensors() -> Iterator[Tensor]:
        yield from model.parameters()
        yield from model.buffers()
        for state in optimizer.state.values():
            yield from (t for t in state.values() if isinstance(t, Tensor))

    return step, tensors


def _trained(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def hf_peft(kind: str, *, wide: bool = True, compiled: bool = False) -> Builder:
    """HF PEFT's `kind`; `wide` adapters are fp32, as `get_peft_model` makes them unless told otherwise."""

    @contextmanager
    def make(arena: Arena) -> Iterator[Contestant]:
        from peft import get_peft_model

        torch.manual_seed(0)
        model: Any = get_peft_model(arena.twin(), _peft_config(kind, arena), autocast_adapter_dtype=wide)
        steps = iter(range(1, STEPS))
        after = (lambda: model.base_model.update_and_allocate(next(steps))) if kind == "adalora" else (lambda: None)
        step, tensors = _hf_step(arena, model, torch.compile(model) if compiled else model, after)
        dtypes = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.requires_grad}
        yield Contestant(step, tensors, _trained(model), note=f"adapters in {' and '.join(sorted(dtypes))}")

    return make


def _peft_config(kind: str, arena: Arena) -> Any:
    import peft

    common: dict[str, Any] = {"target_modules": list(TARGETS), "task_type": "CAUSAL_LM"}
    if kind == "vera":
        return peft.VeraConfig(r=arena.rank, **common)
    if kind == "adalora":
        phases = {"tinit": STEPS // 10, "tfinal": STEPS // 2, "deltaT": 10, "total_step": STEPS}
        ranks = {"init_r": _first_rank(arena.rank), "target_r": arena.rank}
        return peft.AdaLoraConfig(
            lora_alpha=arena.alpha, lora_dropout=0.0, orth_reg_weight=0.1, **ranks, **phases, **common
        )
    return peft.LoraConfig(r=arena.rank, lora_alpha=arena.alpha, lora_dropout=0.0, use_dora=kind == "dora", **common)


def _first_rank(target: int) -> int:
    """AdaLoRA starts with 1.5 times the target (section 4 of its paper)."""
    return round(1.5 * target)


def hf_full(*, compiled: bool = False) -> Builder:
    """Every parameter trains, in the base's own precision, moments included."""

    @contextmanager
    def make(arena: Arena) -> Iterator[Contestant]:
        model = arena.twin(arena.dtype)
        model.requires_grad_(True)
        step, tensors = _hf_step(arena, model, torch.compile(model) if compiled else model)
        kept = str(arena.dtype).removeprefix("torch.")
        note = f"weights and moments in {kept}"
        yield Contestant(step, tensors, _trained(model), uses_base=False, trains_base=True, note=note)

    return make


@contextmanager
def frozen(arena: Arena) -> Iterator[Contestant]:
    """The frozen model's own forward and backward pass: the gradient reaches the embeddings, nothing trains."""
    model = arena.twin()
    model.train()

    def step() -> Tensor:
        inputs = model.get_input_embeddings()(arena.ids).detach().requires_grad_()
        loss: Tensor = model(inputs_embeds=inputs, labels=arena.ids, use_cache=False).loss
        loss.backward()
        return loss.detach()

    yield Contestant(step, lambda: [*model.parameters(), *model.buffers()], 0, note="no adapter, no optimizer")


def ours(method: str, execution: str = "eager", **settings: Any) -> Builder:
    """This project's `method` (an option of `conf/method/`) through the path that its runs take.

    Settings whose value is a function are given the arena.
    """

    @contextmanager
    def make(arena: Arena) -> Iterator[Contestant]:
        setting = Setting.of([_spec(arena, method, execution, settings)])
        quantization = setting.specs[0].model.get("quantization")
        model = arena.twin(torch.float32 if setting.trains_base else None)
        if quantization is not None:
            quantize(model, Scheme.parse(quantization))
        config = dataclasses.replace(arena.reference.config, quantization=quantization)
        ids = arena.ids.tolist()
        with assembled(setting, dataclasses.replace(arena.reference, model=model, config=config)) as assembly:
            optimizer = assembly.optimizer(STEPS)
            table = TokenTable(Encoded(ids, None, None, ids, None), 0, arena.device)
            batch = PackedBatch(np.arange(len(ids))[None], len(ids[0]), 0)
            assembly.objective.train(True)

            make_step = stepper(execution, assembly.objective, optimizer, table, autocast=setting.autocast)

            def tensors() -> Iterator[Tensor]:
                yield from model.parameters()
                yield from model.buffers()
                for _, delta in assembly.adapter.parts:
                    yield from delta.parameters()
                    yield from delta.buffers()
                yield from optimizer.state_tensors()
                yield from table.tensors()

            yield Contestant(
                lambda: make_step(batch),
                tensors,
                assembly.adapter.parameter_count(),
                uses_base=not setting.trains_base,
                trains_base=setting.trains_base,
                movable=not execution.endswith("graphs"),
                ran=lambda: execution == make_step.execution,
                note=_note(setting, quantization),
            )

    return make


def _note(setting: Setting, quantization: str | None) -> str:
    if setting.trains_base:
        mixed = setting.train.precision == "bf16"
        return "weights and moments in float32" + (", computing in bfloat16" if mixed else "")
    return "adapters in float32" + ("" if quantization is None else f", base in {quantization}")


def _spec(arena: Arena, method: str, execution: str, settings: dict[str, Any]) -> Any:
    """Return the resolved run whose step is timed."""
    given = {key: value(arena) if callable(value) else value for key, value in settings.items()}
    values = {
        "model": arena.model,
        "model.weights": arena.weights,
        "method": method,
        **{f"method.{key}": value for key, value in given.items()},
        "task": "tiny",
        "task.formulation": "text",
        "train.steps": STEPS,
        "train.batch_size": arena.ids.shape[0],
        "train.max_length": arena.ids.shape[1],
        "train.precision": arena.precision,
        "train.execution": execution,
        "train.dropout": 0.0,
        "train.learning_rate": RATE,
        "train.schedule": "constant",
        "train.warmup": 0.0,
        "train.clip_norm": 0.0,
        "seed": 0,
        "protocol": "held_out",
    }
    whole = {"train": ["default"], "profile": ["default"]} | {key: [value] for key, value in values.items()}
    return plan(Demand([whole]), arena.device.type).specs[0]


_LOW_RANK: dict[str, Any] = {
    "rank": lambda arena: arena.rank,
    "alpha": lambda arena: arena.alpha,
    "dropout": 0.0,
    "targets": ("all",),
}
_ADALORA: dict[str, Any] = {
    "target_rank": lambda arena: arena.rank,
    "init_rank": lambda arena: _first_rank(arena.rank),
    "alpha": lambda arena: arena.alpha,
    "targets": ("all",),
}
_METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", _LOW_RANK),
    "dora": ("dora", _LOW_RANK),
    "adalora": ("adalora", _ADALORA),
    "vera": ("vera", {"rank": lambda arena: arena.rank, "targets": ("all",)}),
    "vera-r256": ("vera", {"rank": 256, "targets": ("all",)}),
    "lora_plus": ("lora_plus", _LOW_RANK),
    "qlora": ("qlora", _LOW_RANK),
    "full": ("full", {}),
}
_HF: dict[str, Builder] = {
    "hf-lora": hf_peft("lora"),
    "hf-lora-bf16": hf_peft("lora", wide=False),
    "hf-lora-compiled": hf_peft("lora", wide=False, compiled=True),
    "hf-full": hf_full(),
    "hf-full-compiled": hf_full(compiled=True),
    "frozen": frozen,
    "hf-dora": hf_peft("dora"),
    "hf-adalora": hf_peft("adalora"),
    "hf-vera": hf_peft("vera"),
}
EXECUTIONS = {"": "eager", "-compiled": "compiled", "-graphs": "graphs", "-compiled-graphs": "compiled_graphs"}
BUILDERS: dict[str, Builder] = _HF | {
    f"ours-{name}{suffix}": ours(method, execution, **settings)
    for suffix, execution in EXECUTIONS.items()
    for name, (method, settings) in _METHODS.items()
}
"""Name → what builds it."""

_PAIR = ("ours-lora", "ours-lora-compiled")
GROUPS: dict[str, tuple[str, ...]] = {
    "lora": ("hf-lora", "hf-lora-bf16", "hf-lora-compiled", "hf-full", "hf-full-compiled", "frozen", *_PAIR),
    "eager": ("hf-lora", *(n for n in BUILDERS if not n.endswith(("-compiled", "-graphs")) and n != "hf-lora")),
    "methods": (
        "hf-lora",
        *_PAIR,
        *(n for n in ("hf-dora", "hf-adalora", "hf-vera")),
        *(f"ours-{m}{s}" for m in _METHODS if m not in ("lora", "full") for s in ("", "-compiled")),
    ),
    "all": tuple(n for n in BUILDERS if not n.endswith("-graphs")),
}
"""Lists of contestants that go by one name; each holds `hf-lora`, so that ratios can be taken within a call."""
