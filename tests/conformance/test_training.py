"""Every method in the training step: accumulation, moving between devices, and acting after steps run by run."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import peftbench
from peftbench.engine.batches import PackedBatch, TokenTable
from peftbench.engine.heads import PackedHead
from peftbench.engine.loop import train_step
from peftbench.engine.objectives import HeadObjective
from peftbench.engine.optimizer import PackedAdamW, Recipe
from peftbench.methods.adapter import generator_for
from peftbench.models.load import set_dropout
from peftbench.tasks.base import Encoded
from tests.conformance.conftest import FAMILIES, METHODS, batch, disturb, fits, fresh, hidden, runs_share, small

everywhere = pytest.mark.parametrize("family", FAMILIES)
every_method = pytest.mark.parametrize("method", METHODS)
STEPS = 6


def training(model: torch.nn.Module, chosen: Any, seeds: list[int], lr: float = 1e-2) -> tuple[Any, Any, Any]:
    """Return adapter, objective and optimizer of runs with a head, dropout off."""
    set_dropout(model, 0.0)
    adapter = peftbench.attach(model, chosen, runs=len(seeds), seeds=seeds)
    head = PackedHead("linear", model.config.hidden_size, 2, [generator_for("head", s) for s in seeds], 0.0)
    head.to(model.device)
    objective = HeadObjective(model, adapter, head, "mean")
    optimizer = PackedAdamW(
        adapter.packed_parameters() + objective.parameters(),
        list(adapter.trained.values()),
        [Recipe(lr, schedule="constant", factor=chosen.rate_factor) for _ in seeds],
        STEPS,
        ratios=adapter.rate_ratios() + [[1.0] * len(seeds)] * len(objective.parameters()),
        keep_gradients=True,
        base=chosen.base_optimizer(list(adapter.trained.values())) if adapter.trained else None,
    )
    return adapter, objective, optimizer


def table(device: str = "cpu", items: int = 16) -> TokenTable:
    """Return a small table of labelled random sequences."""
    ids = torch.randint(10, 60, (items, 7), generator=torch.Generator().manual_seed(3)).tolist()
    return TokenTable(Encoded(ids, None, [i % 2 for i in range(items)], None), 0, torch.device(device))


@everywhere
@every_method
def test_gradient_accumulation_changes_no_gradient(method: str, family: str) -> None:
    import numpy as np

    found = []
    for accumulation in (1, 2):
        model, chosen = fresh(family), small(method)
        fits(chosen, model)
        adapter, objective, optimizer = training(model, chosen, [4])
        disturb(adapter)
        objective.train(True)
        train_step(objective, optimizer, table(), PackedBatch(np.arange(8)[None], 7, 0), accumulation=accumulation)
        found.append([optimizer.end().gradient(p).clone() for p in optimizer.packed])
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["tiny-bert", "tiny-llama"])
@every_method
def test_training_in_a_pack_equals_training_alone(method: str, family: str) -> None:
    import numpy as np

    model, chosen = fresh(family), small(method)
    fits(chosen, model)
    if not runs_share(chosen, family):
        return
    seeds = [3, 8]
    order = {seed: torch.randperm(16, generator=torch.Generator().manual_seed(seed)).numpy() for seed in seeds}

    def losses(together: list[int]) -> torch.Tensor:
        adapter, objective, optimizer = training(fresh(family), chosen, together)
        objective.train(True)
        trace = []
        for step in range(STEPS):
            items = np.stack([np.roll(order[s], step)[:4] for s in together])
            trace.append(train_step(objective, optimizer, table(), PackedBatch(items, 7, 0)))
        adapter.detach()
        return torch.stack(trace)

    packed = losses(seeds)
    alone = torch.cat([losses([s]) for s in seeds], dim=1)
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-6)
    assert not torch.equal(packed[0], packed[-1])


@pytest.mark.parametrize("family", ["tiny-bert"])
@every_method
def test_every_tensor_moves_with_to(method: str, family: str) -> None:
    model, chosen = fresh(family), small(method)
    fits(chosen, model)
    adapter = peftbench.attach(model, chosen)
    adapter.to("meta")
    for key, delta in adapter.parts:
        for name, tensor in tensors_of(delta):
            assert tensor.is_meta, f"{key}.{name} stays behind"


def tensors_of(module: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Return parameters and buffers, and tensors kept as plain attributes, where `.to()` cannot see them."""
    found = [*module.named_parameters(), *module.named_buffers()]
    for part in module.modules():
        found += [(k, v) for k, v in vars(part).items() if isinstance(v, torch.Tensor)]
        for value in vars(part).values():
            if isinstance(value, (list, tuple)):
                found += [("a list", v) for v in value if isinstance(v, torch.Tensor)]
    return found


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@everywhere
@every_method
def test_a_moved_adapter_computes_the_same_on_the_device(method: str, family: str) -> None:
    model, chosen = fresh(family), small(method)
    fits(chosen, model)
    adapter = peftbench.attach(model, chosen)
    disturb(adapter)
    want = hidden(model, batch(2))
    model.to("cuda")
    adapter.to("cuda")
    found = hidden(model, {k: v.cuda() for k, v in batch(2).items()})
    torch.testing.assert_close(found.cpu(), want, rtol=2e-3, atol=2e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@everywhere
@every_method
def test_a_step_never_waits_for_the_device(method: str, family: str) -> None:
    import numpy as np

    model, chosen = fresh(family).cuda(), small(method)
    fits(chosen, model)
    seeds = [3, 8] if runs_share(chosen, family) else [3]
    _, objective, optimizer = training(model, chosen, seeds)
    rows, items = table("cuda"), PackedBatch(np.stack([np.arange(4) + i for i in range(len(seeds))]), 7, 0)
    objective.train(True)
    for _ in range(2):
        train_step(objective, optimizer, rows, items)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(STEPS - 2):
            train_step(objective, optimizer, rows, items)
    finally:
        torch.cuda.set_sync_debug_mode("default")
