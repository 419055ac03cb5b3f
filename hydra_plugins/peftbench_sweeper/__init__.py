"""Hydra plugin: `hydra/sweeper=peftbench`."""

from hydra_plugins.peftbench_sweeper.sweeper import PeftbenchSweeper

__all__ = ["PeftbenchSweeper"]
