"""A sweep from its command line to its packs, and from its jobs' answers to one outcome."""

import dataclasses
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftbench import environment, overrides
from peftbench.config import SweepConfig, SweepName, build
from peftbench.errors import UserError
from peftbench.job import Pack
from peftbench.plan import Group
from peftbench.record import RunSpec
from peftbench.resolve import Plan, demand, experiment, plan
from peftbench.store import Store

if TYPE_CHECKING:
    from peftbench.capacity import Fit

BYTES_PER_RUN = 256 * 1024
"""What a record takes on the disk, generously."""


def say(line: str) -> None:
    """Print one line about the sweep itself; results go to stdout, this does not."""
    print(line, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Outcome:
    """What is known after a sweep; read from the store, since launchers may run packs anywhere."""

    store: Store
    specs: list[RunSpec]
    present: int
    stopped: str | None = None
    errors: list[str] = field(default_factory=list)

    def statuses(self) -> dict[str, str]:
        """Run id → status of all runs asked for; "absent" for those without a record."""
        found = {spec.run_id: self.store.record(spec.run_id) for spec in self.specs}
        return {run_id: "absent" if record is None else str(record["status"]) for run_id, record in found.items()}


@dataclass(frozen=True)
class Prepared:
    """A sweep ready to go: all runs, the packs still to train, and lines worth showing first."""

    store: Store
    plan: Plan
    jobs: list[Pack]
    lines: list[str]

    def outcome(self, answers: Sequence[Any], failures: Sequence[Any] = ()) -> Outcome:
        """Gather the jobs' answers."""
        stopped = next((a["stopped"] for a in answers if a and a.get("stopped")), None)
        left = sum(len(pack.specs) for pack in self.jobs)
        errors = [f"{type(f).__name__}: {f}".splitlines()[0] for f in failures]
        return Outcome(self.store, self.plan.specs, len(self.plan.specs) - left, stopped, errors)


def configure(arguments: Sequence[str]) -> tuple[overrides.Overrides, SweepConfig]:
    """Parse and check a command line; no method and no experiment named means the default experiment."""
    parsed = overrides.parse(arguments)
    config = build(SweepConfig, parsed.settings, "")
    if config.experiment is not None and "sweep.name" not in parsed.top:
        config = dataclasses.replace(config, sweep=SweepName(experiment(config.experiment)[2]))
    return parsed, config


def sweep_folder(config: SweepConfig) -> Path:
    """Return the absolute folder that a sweep's records go to."""
    return Path(config.results).expanduser().absolute() / config.sweep.name


Memory = Callable[[str], tuple[int, int] | None]
"""Bytes of a device that are free, and all it has; None where nobody knows."""


def prepare(
    arguments: Sequence[str],
    single: bool = False,
    force: bool = False,
    memory: Memory = environment.memory,
    tell: Callable[[str], None] = lambda line: None,
) -> Prepared:
    """Plan a sweep: resolve and check every run, find out which are done, make the folder, pack the rest.

    With `pack=auto` this may measure for some seconds how many runs go best side by side.

    Args:
        single: take exactly one run, and no experiment by default.
        force: start even what will not fit into memory.
        memory: of the device that will train; where it is not known, nothing is measured.
        tell: hears a line about each choice that rests on a measurement.

    Raises:
        UserError: something keeps a run from starting; nothing has been written yet.
    """
    parsed, config = configure(arguments)
    name = config.experiment
    if name is None and not single and "method" not in parsed.grid:
        name = "default"
    planned = plan(demand(parsed.grid, name), config.device)
    if single and len(planned.specs) != 1:
        raise UserError(f"run takes exactly one run, this makes {len(planned.specs)}; use sweep")
    store = Store(sweep_folder(config), config.retry_failed)
    wanted = [spec for spec in planned.specs if not store.has(spec.run_id)]
    fit = _fit(planned, wanted, force, memory)
    if wanted:
        _check_space(store.folder, len(wanted))
        store.prepare()
    groups = pack_up(planned, wanted, config.pack, store, fit, tell)
    jobs = [
        Pack(list(pack), str(store.folder), config.retry_failed, config.save_adapters, places=pack.places)
        for pack in groups
    ]
    lines = [*planned.lines, *(fit.lines if fit is not None else [])]
    if config.save_adapters:
        lines += _without_adapter(store, planned.specs)
    done = len(planned.specs) - len(wanted)
    if not wanted:
        lines.append(f"all {done} runs are in {store.folder}: nothing to train")
    else:
        already = f", {done} more are there already" if done else ""
        lines.append(f"{len(wanted)} runs in {len(jobs)} packs on {planned.resolver.device_kind}{already}")
    return Prepared(store, planned, jobs, lines)


def _fit(planned: Plan, wanted: Sequence[RunSpec], force: bool, memory: Memory) -> "Fit | None":
    """Return what decides by predicted memory, if that is known; raises UserError if a run alone does not fit."""
    device = planned.resolver.device
    known = memory(device) if wanted else None
    if known is None:
        return None
    from peftbench.capacity import Fit

    fit = Fit(device, *known, planned.resolver.shapes)
    if not force:
        fit.check(wanted)
    return fit


def pack_up(
    planned: Plan,
    wanted: Sequence[RunSpec],
    size: str | int,
    store: Store,
    fit: "Fit | None",
    tell: Callable[[str], None],
    early: bool = False,
) -> list[Group]:
    """Return packs of at most `size`; for "auto" of what is fastest and fits into memory.

    "auto" keeps methods apart on a CPU and where steps are replayed as graphs: what a mixed pack saves there, taking
    its rows apart and putting them together costs. It saves launches, and eager steps on a GPU are made of these.

    `early`: any run may end before its time.
    """
    if isinstance(size, int) or not wanted:
        return planned.packs(wanted, size if isinstance(size, int) else 1, early)
    from peftbench.packing import Packing

    fitting = (lambda members, most: most) if fit is None else fit.pack_size
    packing = Packing(store, planned.resolver.device, fitting, measure=fit is not None, tell=tell)
    launches = planned.resolver.device != "cpu"
    return planned.packs(
        wanted, packing.size, early, mix=lambda spec: launches and not spec.train["execution"].endswith("graphs")
    )


def _without_adapter(store: Store, specs: Sequence[RunSpec]) -> list[str]:
    """Return a line if runs were completed without keeping their adapters: they are not trained again for that."""
    found = [spec.run_id for spec in specs if not store.adapter(spec.run_id).is_dir()]
    done = [r for r in map(store.record, found) if r is not None and r["status"] == "completed"]
    if not done:
        return []
    return [f"{len(done)} completed runs kept no adapter; another sweep.name trains them again and keeps theirs"]


def measure_costs(prepared: Prepared, listener: Any) -> None:
    """Measure the cost of every configuration still to train while nothing else runs on this machine."""
    from peftbench import cost

    specs = [spec for pack in prepared.jobs for spec in pack.specs]
    if any(spec.profile["enabled"] for spec in specs):
        listener.note("cost is measured first, one configuration at a time")
    cost.measure_costs(specs, prepared.store, listener)


def _check_space(folder: Path, runs: int) -> None:
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    free, needed = shutil.disk_usage(existing).free, runs * BYTES_PER_RUN
    if free < needed:
        raise UserError(
            f"results={folder}: {free / 2**20:.2f} MiB free, {runs} runs need about {needed / 2**20:.2f} MiB;"
            " free some space or choose another folder with results=<folder>"
        )
