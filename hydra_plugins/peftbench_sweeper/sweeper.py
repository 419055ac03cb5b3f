"""The sweeper: a Hydra grid → runs not yet done → packs → one job each for whichever launcher is configured."""

from dataclasses import dataclass, replace
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.core.utils import JobStatus
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


@dataclass
class PeftbenchSweeperConf:
    """`quiet` shows no progress; `force` starts even what will not fit into memory."""

    _target_: str = "hydra_plugins.peftbench_sweeper.sweeper.PeftbenchSweeper"
    quiet: bool = False
    force: bool = False


ConfigStore.instance().store(
    group="hydra/sweeper", name="peftbench", node=PeftbenchSweeperConf, provider="peftbench_sweeper"
)


LOCAL_LAUNCHERS = ("BasicLauncher", "JoblibLauncher")
"""Launchers whose jobs share this machine: cost is measured here, before the first of them starts."""


class PeftbenchSweeper(Sweeper):
    """Expands the grid with methods' own settings, leaves out what the store holds, and packs the rest."""

    def __init__(self, quiet: bool = False, force: bool = False) -> None:
        super().__init__()
        self.quiet, self.force = quiet, force
        self.launcher: Launcher | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra before `sweep`."""
        self.config = config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Plan and launch; returns a `peftbench.sweep.Outcome`.

        Raises UserError, before anything is written, for whatever keeps a run from starting.
        """
        from peftbench import environment, progress, sweep

        launcher = self.launcher
        assert launcher is not None
        local = type(launcher).__name__ in LOCAL_LAUNCHERS
        here = type(launcher).__name__ == "BasicLauncher"
        if here and "device=cpu" not in arguments:
            environment.begin_gpu()
        # nobody knows the memory of machines that jobs are sent to
        memory = environment.memory if local else lambda device: None
        tell = (lambda line: None) if self.quiet else sweep.say
        prepared = sweep.prepare(arguments, force=self.force, memory=memory, tell=tell)
        for line in prepared.lines:
            if not self.quiet:
                sweep.say(line)
        if not prepared.jobs:
            return prepared.outcome([])
        jobs = [replace(pack, quiet=self.quiet) for pack in prepared.jobs]
        with progress.display([pack.specs for pack in jobs], self.quiet, here) as listener:
            if local:
                sweep.measure_costs(prepared, listener)
            returns = launcher.launch([[f"members='{pack.encode()}'"] for pack in jobs], initial_job_idx=0)
        # JobReturn.return_value would print its own report of a failed job, override and all.
        return prepared.outcome(
            [r._return_value for r in returns if r.status is JobStatus.COMPLETED],
            [r._return_value for r in returns if r.status is not JobStatus.COMPLETED],
        )
