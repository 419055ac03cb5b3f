"""Prefix tuning: the network by hand, what is exported, positions, packs of different hidden sizes, HF PEFT's files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import peftbench
from peftbench import registry
from peftbench.errors import UserError
from peftbench.methods.prefix import PrefixTuning
from tests.conformance.conftest import TOKENS, batch, disturb, fresh, hidden
from tests.methods.prompts import own_states, theirs

FAMILIES = ["tiny-bert", "tiny-gpt2", "tiny-llama"]


def test_a_layers_prefix_is_its_part_of_the_network() -> None:
    adapter = peftbench.attach(fresh("tiny-bert"), PrefixTuning(length=3, hidden=5), seeds=[2])
    state = adapter.state_dict()
    first = torch.nn.Linear(32, 5)
    first.weight.data, first.bias.data = state["shared.weight"].T, state["shared.bias"]
    for site, delta in adapter.deltas:
        last = torch.nn.Linear(5, 64)
        last.weight.data, last.bias.data = state[f"{site.key}.weight"].T, state[f"{site.key}.bias"]
        want = last(torch.tanh(first(state["shared.embedding"]))).reshape(3, 2, 4, 8)
        key, value = delta.prefix()
        torch.testing.assert_close(key[0], want[:, 0])
        torch.testing.assert_close(value[0], want[:, 1])


def test_the_network_starts_as_pytorchs_layers_do() -> None:
    """Bounds of nn.Linear, a standard normal embedding: spread of many draws within a few per cent."""
    adapter = peftbench.attach(fresh("tiny-bert"), PrefixTuning(length=200, hidden=256))
    state = adapter.state_dict()
    assert state["shared.embedding"].std() == pytest.approx(1.0, rel=0.05)
    for name, rows in (("shared.weight", 32), ("encoder.layer.0.attention.self.weight", 256)):
        assert state[name].abs().max() <= rows**-0.5
        assert state[name].std() == pytest.approx((3 * rows) ** -0.5, rel=0.05)


def test_a_prefix_without_the_network_starts_small() -> None:
    adapter = peftbench.attach(fresh("tiny-bert"), PrefixTuning(length=500, reparameterization="none", init_std=0.05))
    assert all(t.std() == pytest.approx(0.05, rel=0.05) for t in adapter.state_dict().values())


def test_p_tuning_v2_is_the_prefix_that_trains_itself() -> None:
    found = registry.build_method(registry.section("method", "ptuning_v2"))
    assert found == PrefixTuning(reparameterization="none")
    assert registry.describe_method("ptuning_v2")["paper"] == "Liu et al. 2022, arXiv:2110.07602"


def test_runs_of_different_hidden_sizes_share_a_pack_and_padding_stays_zero() -> None:
    model = fresh("tiny-gpt2")
    methods = [PrefixTuning(length=2, hidden=h) for h in (3, 7)]
    adapter = peftbench.attach(model, methods, seeds=[0, 1])
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2, weight_decay=0.0)
    for step in range(3):
        optimizer.zero_grad()
        model(**batch(4, step)).last_hidden_state.square().mean().backward()
        optimizer.step()
    states = [adapter.state_dict(run) for run in range(2)]
    assert states[0]["shared.bias"].shape == (3,)
    assert not any(t[0].flatten()[3:].any() for t in (adapter.shared.bias,))
    together = model(**batch(4)).last_hidden_state
    adapter.detach()
    for run in range(2):
        alone = peftbench.attach(model, methods[run])
        alone.load_state_dict(states[run])
        part = {k: v[2 * run : 2 * run + 2] for k, v in batch(4).items()}
        torch.testing.assert_close(model(**part).last_hidden_state, together[2 * run : 2 * run + 2])
        alone.detach()


@pytest.mark.parametrize("kind", ["mlp", "none"])
@pytest.mark.parametrize("family", FAMILIES)
def test_positions_shifted_by_hand_give_pefts_outputs(family: str, kind: str, tmp_path: Path) -> None:
    """Our own tokens keep their positions; PEFT's, behind a cache of P places, do not."""
    model, inputs = fresh(family), batch(4)
    adapter = peftbench.attach(model, PrefixTuning(length=3, reparameterization=kind, hidden=6))
    disturb(adapter)
    adapter.save(tmp_path, format="peft")
    shifted = torch.arange(3, 3 + TOKENS).expand(4, -1)
    want = own_states(theirs(family, tmp_path), inputs)
    torch.testing.assert_close(own_states(model, inputs, position_ids=shifted), want, rtol=1e-5, atol=1e-5)
    assert (hidden(model, inputs) - want).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_of_pefts_is_the_prefix_the_network_came_to(family: str, tmp_path: Path) -> None:
    model, inputs = fresh(family), batch(4)
    adapter = peftbench.attach(model, PrefixTuning(length=3, hidden=6))
    disturb(adapter)
    want = hidden(model, inputs)
    adapter.save(tmp_path, format="peft")
    adapter.detach()
    again = peftbench.load_adapter(model, tmp_path)
    assert again.methods[0].reparameterization == "none"
    torch.testing.assert_close(hidden(model, inputs), want, rtol=1e-5, atol=1e-5)


def test_an_encoder_decoder_is_not_exported(tmp_path: Path) -> None:
    adapter = peftbench.attach(fresh("tiny-t5", formulation="text"), PrefixTuning(length=3, hidden=6))
    with pytest.raises(UserError, match="only one stack"):
        adapter.save(tmp_path, format="peft")


def test_settings_out_of_range_are_named() -> None:
    with pytest.raises(UserError, match=r"method\.reparameterization='lstm'"):
        PrefixTuning(reparameterization="lstm")
    with pytest.raises(UserError, match=r"method\.hidden=0"):
        PrefixTuning(hidden=0)
