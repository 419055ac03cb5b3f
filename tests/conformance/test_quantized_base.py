"""Every method on a base kept in 4 bits, where it declares that it works there."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import peftbench
from peftbench.errors import UserError
from peftbench.models.load import load
from peftbench.models.quantized import QuantizedLinear
from peftbench.verify.bench import stirred
from tests.conformance.conftest import FAMILIES, METHODS, batch, config, disturb, fits, hidden, runs_share, small

everywhere = pytest.mark.parametrize("family", FAMILIES)
every_method = pytest.mark.parametrize("method", METHODS)


def quantized(family: str, kind: str = "nf4") -> torch.nn.Module:
    """Return `fresh`'s model in 4 bits."""
    return stirred(load(dataclasses.replace(config(family), quantization=kind), "head").model)


def placed(method: str, model: torch.nn.Module) -> Any:
    """Return the method, or skip where it declares that it does not go with the model; it must then refuse."""
    chosen = small(method)
    if not chosen.traits.quantized_base:
        with pytest.raises(UserError, match="quantized"):
            peftbench.attach(model, chosen)
        pytest.skip("declared: needs a dense base")
    fits(chosen, model)
    return chosen


@everywhere
@every_method
def test_training_leaves_the_codes_alone_and_detach_gives_the_model_back(method: str, family: str) -> None:
    model = quantized(family)
    chosen = placed(method, model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    bare = hidden(model, batch(4))
    adapter = peftbench.attach(model, chosen)
    change = (hidden(model, batch(4)) - bare).abs().max()
    assert change < 1e-4 if chosen.traits.identity_at_init else change > 0
    if adapter.parameters():
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
        for step in range(3):
            optimizer.zero_grad()
            hidden(model, batch(4, step)).square().mean().backward()
            optimizer.step()
        assert not torch.equal(hidden(model, batch(4)), bare)
    adapter.detach()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(hidden(model, batch(4)), bare)


@everywhere
@every_method
def test_a_pack_equals_solos_and_merging_is_exact(method: str, family: str) -> None:
    model = quantized(family)
    chosen = placed(method, model)
    runs = 2 if runs_share(chosen, family) else 1
    adapter = peftbench.attach(model, chosen, runs=runs)
    disturb(adapter)
    part = batch(2)
    both = model(**{k: torch.cat([v] * runs) for k, v in part.items()}).last_hidden_state[-2:]
    state = adapter.state_dict(runs - 1)
    if chosen.traits.mergeable:
        adapter.merge(runs - 1)
        assert (
            not adapter.parameters()
            or any(isinstance(m, QuantizedLinear) and m.merged_weight is not None for m in model.modules())
            or "linear" not in chosen.traits.sites
        )
        torch.testing.assert_close(model(**part).last_hidden_state, both, rtol=1e-4, atol=2e-5)
        adapter.unmerge()
        again = model(**{k: torch.cat([v] * runs) for k, v in part.items()}).last_hidden_state[-2:]
        assert torch.equal(again, both)
    adapter.detach()
    alone = peftbench.attach(model, chosen, seeds=[runs - 1])
    alone.load_state_dict(state)
    torch.testing.assert_close(model(**part).last_hidden_state, both, rtol=1e-4, atol=1e-5)
