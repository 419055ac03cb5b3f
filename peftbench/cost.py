"""A configuration's cost: one run alone on a batch of fixed shape, measured once and kept by its own id."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn

from peftbench.assembly import Assembly, Setting, assembled, backbone_of, free
from peftbench.config import ProfileConfig, build
from peftbench.engine.batches import PackedBatch, TokenTable
from peftbench.engine.loop import train_step
from peftbench.engine.stepping import stepper
from peftbench.models.quantized import dense_parameter_count
from peftbench.profiling.cost import Trial, measure
from peftbench.profiling.memory import held
from peftbench.profiling.trace import write_allocations, write_timeline
from peftbench.record import RunSpec, plain
from peftbench.store import Store
from peftbench.tasks.base import Encoded


class Phases(Protocol):
    """What hears that measuring begins."""

    def phase(self, name: str) -> None: ...


@contextmanager
def trial_of(alone: Setting, encoded: Encoded) -> Iterator[Trial]:
    """One run alone on a batch in which every sequence has full length but the last, which is one token shorter."""
    base = backbone_of(alone).model
    loaded = held([*base.parameters(), *base.buffers()], alone.device)
    with assembled(alone) as assembly:
        tokenizer: Any = assembly.backbone.tokenizer
        fixed = fixed_batch(encoded, alone.train.batch_size, alone.max_length, len(tokenizer))
        yield trial_on(assembly, TokenTable(fixed, 0, alone.device), loaded)


def trial_on(assembly: Assembly, table: TokenTable, loaded_bytes: int = 0) -> Trial:
    """Return what steps on all rows of `table` at once: as many as the assembly's runs have in a batch."""
    setting, adapter, head, objective = assembly.setting, assembly.adapter, assembly.head, assembly.objective
    rows, length, model = setting.train.batch_size, setting.max_length, assembly.backbone.model
    # enough for all instruments, and for energy at half a millisecond a step; a table of rates comes with each
    optimizer = assembly.optimizer(10_000 + int(2000 * setting.specs[0].profile.get("energy_seconds", 0.0)))
    batch = PackedBatch(np.arange(adapter.runs * rows).reshape(adapter.runs, rows), length, 0)
    objective.train(True)

    recipe: dict[str, Any] = {"accumulation": setting.train.accumulation, "autocast": setting.autocast}
    make_step = stepper(setting.train.execution, objective, optimizer, table, **recipe)

    def persistent() -> dict[str, list[Tensor]]:
        deltas = [delta for _, delta in adapter.parts]
        return {
            "adapter": [t for d in deltas for t in (*d.parameters(), *d.buffers())] + objective.parameters(),
            "optimizer": optimizer.state_tensors(),
            "weights": [*model.parameters(), *model.buffers()],
            "workspace": table.tensors(),
        }

    def gradients() -> list[Tensor]:
        return [p.grad for p in (*optimizer.packed, *optimizer.plain) if p.grad is not None]

    attached = held([t for tensors in persistent().values() for t in tensors], setting.device)
    own_head = 0 if head is None else head.parameter_count()
    own = adapter.parameter_count()
    trained = {id(p) for p in adapter.trained.values()}
    matrices = _matrices(model)
    return Trial(
        step=lambda: make_step(batch),
        by_operations=lambda: train_step(objective, optimizer, table, batch, **recipe),
        stepper=make_step,
        objective=objective,
        optimizer=optimizer,
        persistent=persistent,
        gradients=gradients,
        flat_gradient=lambda: optimizer.flat.nbytes,
        loaded_bytes=loaded_bytes,
        attached_bytes=attached,
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
        compute_dtype=torch.bfloat16 if setting.train.precision == "bf16" else torch.float32,
    )


def fixed_batch(encoded: Encoded, rows: int, length: int, vocabulary: int) -> Encoded:
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


def cost_of(alone: Setting, store: Store, encoded: Encoded, listener: Phases) -> dict[str, Any]:
    """Return one run's cost: its configuration's kept profile, or one measured now, plus what is this task's own."""
    spec = alone.specs[0]
    profile = build(ProfileConfig, spec.profile, "profile")
    key = alone.profile_id
    cost = store.profile(key)
    if cost is None:
        if not profile.enabled:
            return _counts(alone)
        listener.phase("profile")
        free(alone.device)
        cost = measure(
            lambda: trial_of(alone, encoded),
            alone.device,
            min_warmup=profile.min_warmup,
            steps=profile.steps,
            max_seconds=profile.max_seconds,
            energy_seconds=profile.energy_seconds,
            looks=profile.looks,
        )
        cost = {"profile_id": key, "device_kind": spec.identity["device_kind"], **cost}
        store.write_profile(key, cost)
        free(alone.device)
    # Real tokens: the share of the fixed shape that the task's own texts fill.
    share = float(np.mean([min(n, alone.max_length) for n in encoded.lengths])) / alone.max_length
    return {**cost, "tokens_per_second": cost["padded_tokens_per_second"] * share}


def profile_once(spec: RunSpec, store: Store, listener: Phases) -> tuple[dict[str, Any], Path]:
    """Return one configuration's cost, measured unless it is known, and the folder of traces of a few warm steps.

    Raises:
        UserError: the disk is full or the store cannot be written.
    """
    alone = Setting.of([spec])
    backbone = backbone_of(alone)
    encoded = alone.task.encode(
        alone.task.splits(spec.protocol)["train"], backbone.tokenizer, alone.max_length, backbone.kind
    )
    cost = cost_of(alone, store, encoded, listener)

    def write(folder: Path) -> None:
        with trial_of(alone, encoded) as trial:
            for _ in range(3):
                trial.by_operations()
            write_timeline(
                folder / "trace.json.gz", trial.by_operations, alone.device, trial.objective, trial.optimizer
            )
            if alone.device.type == "cuda":
                write_allocations(folder / "memory.pickle", trial.by_operations, alone.device)
        (folder / "memory.json").write_text(json.dumps(plain(cost["memory"]), indent=1) + "\n")

    return cost, store.write_traces(alone.profile_id, write)


def _counts(alone: Setting) -> dict[str, Any]:
    """Return what can be said of cost without measuring."""
    with assembled(alone) as assembly:
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


def measure_costs(specs: Sequence[RunSpec], store: Store, listener: Phases) -> None:
    """Measure the cost of every configuration among `specs` that the store has no profile of, one after the other.

    For the process that starts a sweep, before anything else uses the machine. A configuration that cannot be set up is
    left to its run, whose record will say why.
    """
    for spec in specs:
        try:
            alone = Setting.of([spec])
            if not build(ProfileConfig, spec.profile, "profile").enabled or store.profile(alone.profile_id) is not None:
                continue
            backbone = backbone_of(alone)
            rows = alone.task.splits(spec.protocol)["train"]
            encoded = alone.task.encode(rows, backbone.tokenizer, alone.max_length, backbone.kind)
            cost_of(alone, store, encoded, listener)
        except Exception as error:  # the run meets the same error and records it
            if isinstance(error.__cause__, OSError):
                raise
            free(torch.device(spec.device))
