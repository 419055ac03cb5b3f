"""A run's way from one assembly to the next: all that it has learnt, taken off its neighbours and put among others.

Neighbours decide how a run's tensors are padded and where they lie, so that they travel by name, without padding, and
through the host's memory, which needs no room on the device while two packs meet.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from peftbench.assembly import Assembly
from peftbench.engine.optimizer import PackedAdamW, RunMoments, same_place

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Carried:
    """One run on the host.

    Attributes:
        parameters: what it trains, head included.
        best: the same from its best evaluation.
        moments: of the optimizer.
        kept: what its method keeps between steps.
    """

    parameters: Tensors
    best: Tensors
    moments: RunMoments
    kept: dict[str, Tensors]


def _host(tensors: Mapping[str, Tensor]) -> Tensors:
    return {name: t.detach().to("cpu", copy=True) for name, t in tensors.items()}


def best_of(assembly: Assembly, optimizer: PackedAdamW, best: Tensor, run: int) -> Tensors:
    """Return a run's parameters from `best`, which is laid out as `optimizer.flat`."""
    return _host({name: same_place(v, optimizer.flat, best) for name, v in assembly.views(run).items()})


def carried(assembly: Assembly, optimizer: PackedAdamW, best: Tensor, run: int) -> Carried:
    """Take one run out; the assembly stays as it is."""
    views = assembly.views(run)
    kept = {name: _host(state) for name, state in assembly.adapter.between_steps(run).items()}
    return Carried(_host(views), best_of(assembly, optimizer, best, run), optimizer.moments_of_run(run, views), kept)


@torch.no_grad()
def resume(assembly: Assembly, optimizer: PackedAdamW, best: Tensor, runs: Mapping[int, Carried]) -> None:
    """Put runs in at the places of the new assembly's; before the first step."""
    moments = {}
    for run, state in runs.items():
        views = assembly.views(run)
        load(assembly, run, state.parameters)
        for name, view in views.items():
            same_place(view, optimizer.flat, best).copy_(state.best[name])
        assembly.adapter.resume(run, state.kept)
        moments[run] = views, state.moments
    optimizer.resume(moments)


@torch.no_grad()
def load(assembly: Assembly, run: int, tensors: Tensors) -> None:
    """Copy a run's parameters in."""
    views = assembly.views(run)
    assert views.keys() == tensors.keys(), views.keys() ^ tensors.keys()
    for name, view in views.items():
        view.copy_(tensors[name])
