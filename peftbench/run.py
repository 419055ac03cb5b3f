"""From a pack of specs to records: has its runs trained and writes what came of them."""

from __future__ import annotations

import contextlib
import functools
import traceback
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, cast

import torch

from peftbench import environment, training, verify
from peftbench.assembly import Setting, backbone_of, free
from peftbench.clock import Clock
from peftbench.cost import cost_of
from peftbench.errors import UserError
from peftbench.record import RunRecord, RunSpec
from peftbench.store import Store
from peftbench.training import Outcome, Watch, train_runs

Costs = list[dict[str, Any] | None]


class Listener(training.Listener, Protocol):
    """What hears how a pack gets on."""

    def record(self, record: RunRecord) -> None: ...

    def note(self, line: str) -> None: ...


def run_pack(
    specs: Sequence[RunSpec],
    store: Store,
    listener: Listener,
    *,
    places: int | None = None,
    save_adapters: bool = False,
    watch: Watch | None = None,
) -> list[RunRecord]:
    """Train the runs of one pack, write a record for each as soon as it is done, and return them.

    At most `places` runs train side by side (None: all), the others take the place of those that are done. With
    `save_adapters` the store keeps the parameters that each completed run was tested with. A `watch` hears of every
    evaluation and may prune runs.

    If memory runs out, the runs that are not done begin again with half as many places: as two packs, or as one if
    some had waited. Each record says at which sizes memory ran out. If a pack of several methods fails, each method
    begins again by itself: one of them may be to blame. A pack that fails gives records that say so; mistakes a user
    can mend are records too, since the rest of the sweep goes on. Only a full disk or an interrupt leaves without
    records.
    """
    records: dict[str, RunRecord] = {}
    attempts: list[tuple[Sequence[RunSpec], int, tuple[int, ...]]] = [(specs, places or len(specs), ())]
    while attempts:
        pack, size, too_many = attempts.pop(0)
        size = min(size, len(pack))
        costs: Costs = [None] * len(pack)
        clock = Clock(listener, functools.partial(_settle, torch.device(specs[0].device)))
        for outcomes in _attempt(pack, size, costs, store, cast(Listener, clock), save_adapters, watch):
            seconds = clock.seconds()
            if size > 1 and outcomes[0].status == "out_of_memory":
                free(torch.device(specs[0].device))
                half = (size + 1) // 2
                listener.note(f"out of memory with {size} runs side by side: now at most {half}")
                left = [pack[outcome.run] for outcome in outcomes]
                parts = [left] if len(left) > size else [part for part in (left[:half], left[half:]) if part]
                attempts[:0] = [(part, half, (*too_many, size)) for part in parts]
                continue
            apart = _by_method([pack[outcome.run] for outcome in outcomes])
            if outcomes[0].status == "failed" and len(apart) > 1:
                listener.note(f"runs of {len(apart)} methods failed together, now each method by itself")
                attempts[:0] = [(part, size, too_many) for part in apart]
                continue
            for outcome in outcomes:
                share = clock.share(pack[outcome.run].run_id, len(pack))
                about = _about(outcome, pack, size, too_many, seconds, share)
                search = None if watch is None else watch.about(pack[outcome.run])
                records[pack[outcome.run].run_id] = _record(outcome, pack, costs, about, search, store, listener)
    return [records[spec.run_id] for spec in specs]


def _by_method(specs: Sequence[RunSpec]) -> list[list[RunSpec]]:
    found: dict[str, list[RunSpec]] = {}
    for spec in specs:
        found.setdefault(spec.method["name"], []).append(spec)
    return list(found.values())


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        with contextlib.suppress(RuntimeError):  # what broke the device is the runs' own error, told there
            torch.cuda.synchronize(device)


def _attempt(
    specs: Sequence[RunSpec],
    places: int,
    costs: Costs,
    store: Store,
    listener: Listener,
    save_adapters: bool,
    watch: Watch | None,
) -> Iterator[list[Outcome]]:
    """Train runs, at most `places` side by side, and yield what came of those that are done, or failed together.

    Each run's cost, where that was measured, is put into `costs`.
    """
    left = dict.fromkeys(range(len(specs)))
    try:
        listener.phase("load")
        setting = Setting.of(specs)
        splits = setting.task.splits(specs[0].protocol)
        backbone = backbone_of(setting)
        encoded = setting.task.encode(splits["train"], backbone.tokenizer, setting.max_length, backbone.kind)
        for run in left:
            costs[run] = cost_of(setting.alone(run), store, encoded, listener)
        keep = store if save_adapters else None
        for outcomes in train_runs(setting, splits, encoded, listener, keep, places, watch):
            for outcome in outcomes:
                del left[outcome.run]
            yield outcomes
        assert not left, left
        return
    except torch.OutOfMemoryError as error:
        status, text = "out_of_memory", str(error).splitlines()[0]
    except UserError as error:
        if isinstance(error.__cause__, OSError):
            raise
        status, text = "failed", str(error)
    except Exception as error:  # noqa: BLE001  a failed run is a record with its reason, and its neighbours go on
        where = traceback.extract_tb(error.__traceback__)[-1]
        status = "failed"
        text = f"{type(error).__name__}: {error} ({where.name}, {where.filename.rpartition('/')[2]}:{where.lineno})"
    yield [Outcome(run, status, text) for run in left]


def _about(
    outcome: Outcome,
    pack: Sequence[RunSpec],
    size: int,
    too_many: tuple[int, ...],
    seconds: dict[str, float],
    share: float,
) -> dict[str, Any]:
    """Return what a record says of the pack.

    `too_many` are the numbers of runs side by side that did not fit, `seconds` what each phase took until this run was
    done, `share` its own part of that.
    """
    about: dict[str, Any] = {"size": size, "index": outcome.run, "seconds": seconds}
    if len(pack) > size:
        about["runs"] = len(pack)
    if len(pack) > size or len(outcome.stretches) > 1:
        about |= {"stretches": outcome.stretches, "share_seconds": share}
    return about | ({"out_of_memory_at": list(too_many)} if too_many else {})


def _record(
    outcome: Outcome,
    pack: Sequence[RunSpec],
    costs: Costs,
    about: dict[str, Any],
    search: dict[str, Any] | None,
    store: Store,
    listener: Listener,
) -> RunRecord:
    """Write and return a run's record."""
    spec = pack[outcome.run]
    record = RunRecord(
        run_id=spec.run_id,
        status=outcome.status,
        error=outcome.error,
        spec=spec.to_dict(),
        quality=outcome.quality,
        trace=outcome.trace,
        cost=costs[outcome.run],
        environment=environment.describe(spec.device),
        parity=verify.stamp(spec.method),
        pack=about,
        search=search,
    )
    store.write(record)
    listener.record(record)
    return record
