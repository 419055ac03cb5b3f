"""From a pack of specs to records: trains what `assembly` puts together and writes what came of it."""

from __future__ import annotations

import contextlib
import functools
import math
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from peftbench import environment, verify
from peftbench.assembly import Assembly, Setting, assembled, backbone_of, free
from peftbench.clock import Clock
from peftbench.cost import cost_of
from peftbench.engine import evaluation, objectives
from peftbench.engine.batches import TokenTable, make_buckets, packed_batches, steps_per_epoch
from peftbench.engine.loop import train
from peftbench.engine.optimizer import PackedAdamW
from peftbench.engine.stepping import stepper
from peftbench.errors import UserError
from peftbench.record import DEFAULT_EXECUTION, RunRecord, RunSpec
from peftbench.store import Store
from peftbench.tasks.base import Encoded, Task

HEAD_FILE = "head.safetensors"
"""The task head beside a kept adapter."""
EVALUATION_ROWS = 4096
"""Most rows of a pack that go through the model at once in an evaluation."""


class Listener(Protocol):
    """What hears how a pack gets on."""

    def phase(self, name: str) -> None: ...

    def members(self, specs: Sequence[RunSpec]) -> None: ...

    def steps(self, done: int, total: int, losses: Sequence[float] | None) -> None: ...

    def evaluated(self, step: int, metric: str, values: Sequence[float | None], greater_is_better: bool) -> None: ...

    def record(self, record: RunRecord) -> None: ...

    def note(self, line: str) -> None: ...


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
    with assembled(setting) as assembly:
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

        def evaluate(step: int) -> bool:
            listener.phase("evaluate")
            predictions = validation.evaluator.predict()
            metrics = [setting.task.metrics(p, validation.references) for p in predictions]
            selection.consider(step, metrics)
            primary = setting.task.primary_metric
            listener.evaluated(step, primary, [m.get(primary) for m in metrics], setting.task.greater_is_better)
            listener.phase("train")
            return bool(optimizer.alive.any())

        def on_step(step: int, losses: Tensor) -> None:
            now = time.monotonic()
            if now - last_shown[0] > 0.5 or step in evaluate_at:
                last_shown[0] = now
                # On a GPU a look at the loss would wait for the step; an evaluation waits anyway.
                looked = setting.device.type == "cpu" or step in evaluate_at
                listener.steps(step, steps, losses.tolist() if looked else None)

        evaluate_at = _evaluation_steps(steps, per_epoch, config.evaluate_every)
        listener.members(setting.specs)
        listener.phase("train")
        make_step = stepper(
            config.execution,
            assembly.objective,
            optimizer,
            table,
            accumulation=config.accumulation,
            autocast=setting.autocast,
        )
        trace = train(
            assembly.objective,
            make_step,
            list(packed_batches(buckets, config.batch_size, seeds, steps)),
            evaluate_at=evaluate_at,
            evaluate=evaluate,
            on_step=on_step,
        ).values()
        ran = {"execution": make_step.execution, "replayed_steps": make_step.replayed}
        del make_step  # with it go its graphs, and the memory they hold
        alive = optimizer.alive.cpu().tolist()
        selection.restore()
        listener.phase("test")
        tested = {name: _tested(assembly, rows) for name, rows in splits.items() if name.startswith("test")}
        qualities = [_quality(setting, selection, tested, run) if ok else None for run, ok in enumerate(alive)]
        traces = [_trace(trace[:, run], [r[run] for r in optimizer.rates]) for run in range(len(seeds))]
        if config.execution != DEFAULT_EXECUTION:
            traces = [t | ran for t in traces]
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


def run_pack(
    specs: Sequence[RunSpec], store: Store, listener: Listener, *, save_adapters: bool = False
) -> list[RunRecord]:
    """Train the runs of one pack side by side, write a record for each, and return them.

    With `save_adapters` the store keeps the parameters that each completed run was tested with.

    A pack that runs out of memory is tried again as two halves, and they in turn; each record says at which sizes
    memory ran out. A pack that fails gives records that say so; mistakes a user can mend are records too, since the
    rest of the sweep goes on. Only a full disk or an interrupt leaves without records.
    """
    records: list[RunRecord] = []
    waiting: list[tuple[Sequence[RunSpec], tuple[int, ...]]] = [(specs, ())]
    while waiting:
        pack, too_many = waiting.pop(0)
        clock = Clock(listener, functools.partial(_settle, torch.device(specs[0].device)))
        costs, outcome = _attempt(pack, store, cast(Listener, clock), save_adapters)
        seconds = clock.seconds()
        if len(pack) > 1 and all(status == "out_of_memory" for status in outcome.statuses):
            free(torch.device(specs[0].device))
            half = (len(pack) + 1) // 2
            listener.note(f"out of memory with {len(pack)} runs side by side: now at most {half}")
            waiting[:0] = [(part, (*too_many, len(pack))) for part in (pack[:half], pack[half:])]
            continue
        records += _recorded(pack, costs, outcome, too_many, seconds, store, listener)
    return records


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        with contextlib.suppress(RuntimeError):  # what broke the device is the runs' own error, told there
            torch.cuda.synchronize(device)


def _attempt(
    specs: Sequence[RunSpec], store: Store, listener: Listener, save_adapters: bool
) -> tuple[list[dict[str, Any] | None], Outcome]:
    """Return each run's cost, where that was measured, and what training the pack gave."""
    costs: list[dict[str, Any] | None] = [None] * len(specs)
    try:
        listener.phase("load")
        setting = Setting.of(specs)
        splits = setting.task.splits(specs[0].protocol)
        backbone = backbone_of(setting)
        encoded = setting.task.encode(splits["train"], backbone.tokenizer, setting.max_length, backbone.kind)
        for run in range(len(specs)):
            costs[run] = cost_of(setting.alone(run), store, encoded, listener)
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
    return costs, outcome


def _recorded(
    specs: Sequence[RunSpec],
    costs: Sequence[dict[str, Any] | None],
    outcome: Outcome,
    too_many: tuple[int, ...],
    seconds: dict[str, float],
    store: Store,
    listener: Listener,
) -> list[RunRecord]:
    """Write and return the records of a pack.

    `too_many` are the sizes of packs of these runs that did not fit, `seconds` what each phase of the pack took.
    """
    about = environment.describe(specs[0].device)
    records = []
    for run, spec in enumerate(specs):
        pack: dict[str, Any] = {"size": len(specs), "index": run, "seconds": seconds}
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
            pack=pack | ({"out_of_memory_at": list(too_many)} if too_many else {}),
        )
        store.write(record)
        listener.record(record)
        records.append(record)
    return records


def _failure(status: str, specs: Sequence[RunSpec], error: str) -> Outcome:
    runs = len(specs)
    return Outcome([status] * runs, [error] * runs, [None] * runs, [{}] * runs)
