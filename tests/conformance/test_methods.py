"""Every method on every family of models does what the contract promises; no method is named here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import peftbench
from peftbench.errors import UserError
from tests.conformance.conftest import FAMILIES, METHODS, batch, config, disturb, fits, fresh, hidden, runs_share, small

everywhere = pytest.mark.parametrize("family", FAMILIES)
every_method = pytest.mark.parametrize("method", METHODS)


@everywhere
@every_method
def test_fresh_adapter_is_the_identity_where_declared(method: str, family: str) -> None:
    model, chosen = fresh(family), small(method)
    fits(chosen, model)
    inputs = batch(4)
    before = hidden(model, inputs)
    peftbench.attach(model, chosen)
    change = (hidden(model, inputs) - before).abs().max()
    if chosen.traits.identity_at_init:
        assert change < 1e-5
    else:
        assert 0 < change < 1e3


@everywhere
@every_method
def test_only_declared_parameters_train_and_detach_restores_the_model(method: str, family: str) -> None:
    model, chosen = fresh(family), small(method)
    fits(chosen, model)
    original = {k: v.clone() for k, v in model.state_dict().items()}
    inputs = batch(4)
    before = hidden(model, inputs)
    adapter = peftbench.attach(model, chosen)
    if adapter.parameters():
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
        for step in range(3):
            hidden(model, batch(4, step)).square().mean().backward()
            optimizer.step()
            if step < 2:
                optimizer.zero_grad()
        unused = [n for n, p in adapter.named_parameters() if p.grad is None and n not in adapter.trained]
        assert not unused
        assert not torch.equal(hidden(model, inputs), before)
    frozen = {k for k, p in model.named_parameters() if not p.requires_grad}
    assert all(torch.equal(model.state_dict()[k], original[k]) for k in frozen)
    assert all(model.get_parameter(k).grad is None for k in frozen)
    assert set(adapter.trained) == set(dict(model.named_parameters())) - frozen
    adapter.detach()
    assert all(torch.equal(v, original[k]) for k, v in model.state_dict().items())
    assert torch.equal(hidden(model, inputs), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@everywhere
@every_method
def test_parameter_count_equals_the_closed_form(method: str, family: str) -> None:
    from peftbench.models.load import build_meta

    model, chosen = fresh(family), small(method)
    fits(chosen, model)
    adapter = peftbench.attach(model, chosen, runs=3 if runs_share(chosen, family) else 1)
    summed = sum(t.numel() for name, t in adapter.state_dict(run=0).items() if name not in adapter.rewritten)
    closed = chosen.parameter_count(build_meta(config(family), "head"))
    assert adapter.parameter_count() == summed == closed


@everywhere
@every_method
def test_a_pack_of_three_equals_three_solos(method: str, family: str) -> None:
    model, chosen = fresh(family), small(method)
    fits(chosen, model)
    if not runs_share(chosen, family):
        with pytest.raises(UserError, match="share"):
            peftbench.attach(model, chosen, runs=3)
        return
    seeds = [3, 1, 4]
    parts = [batch(2, seed) for seed in seeds]
    together = {k: torch.cat([p[k] for p in parts]) for k in parts[0]}
    adapter = peftbench.attach(model, chosen, runs=3, seeds=seeds)
    disturb(adapter)
    states = [adapter.state_dict(run) for run in range(3)]
    packed = model(**together).last_hidden_state
    packed.square().sum().backward() if adapter.parameters() else None
    grads = [p.grad for p in adapter.parameters()]
    adapter.detach()
    for run, part in enumerate(parts):
        alone = peftbench.attach(model, chosen, seeds=seeds[run : run + 1])
        alone.load_state_dict(states[run])
        out = model(**part).last_hidden_state
        torch.testing.assert_close(out, packed[2 * run : 2 * run + 2], rtol=1e-4, atol=1e-5)
        out.square().sum().backward() if alone.parameters() else None
        for own, whole in zip(alone.parameters(), grads, strict=True):
            torch.testing.assert_close(own.grad[0], whole[run], rtol=1e-3, atol=1e-4)
        alone.detach()


@everywhere
@every_method
def test_merged_equals_unmerged_and_unmerge_is_exact(method: str, family: str) -> None:
    model, chosen = fresh(family), small(method)
    fits(chosen, model)
    adapter = peftbench.attach(model, chosen, runs=2 if runs_share(chosen, family) else 1)
    if not chosen.traits.mergeable:
        with pytest.raises(UserError, match="cannot be merged"):
            adapter.merge()
        return
    disturb(adapter)
    original = {k: v.clone() for k, v in model.state_dict().items()}
    part = batch(2)
    twice = {k: torch.cat([v] * adapter.runs) for k, v in part.items()}
    apart = model(**twice).last_hidden_state[-2:]
    adapter.merge(run=adapter.runs - 1)
    torch.testing.assert_close(model(**part).last_hidden_state, apart, rtol=1e-4, atol=1e-5)
    adapter.unmerge()
    assert all(torch.equal(v, original[k]) for k, v in model.state_dict().items())
    assert torch.equal(model(**twice).last_hidden_state[-2:], apart)


@everywhere
@every_method
def test_save_and_load_round_trip_within_the_promised_size(method: str, family: str, tmp_path: object) -> None:
    model, chosen = fresh(family), small(method)
    fits(chosen, model)
    adapter = peftbench.attach(model, chosen, runs=2 if runs_share(chosen, family) else 1)
    run = adapter.runs - 1
    disturb(adapter)
    state = adapter.state_dict(run)
    file = adapter.save(f"{tmp_path}/adapter", run=run)
    size = file.stat().st_size
    assert size == adapter.checkpoint_bytes(run)
    assert size <= sum(t.numel() * t.element_size() for t in state.values()) + 256 * len(state) + 4096
    adapter.detach()
    loaded = peftbench.load_adapter(model, f"{tmp_path}/adapter")
    assert loaded.methods[0] == chosen
    assert all(torch.equal(v, state[k]) for k, v in loaded.state_dict().items())


LOADING = """
import json, sys, peftbench
from tests.conformance.conftest import batch, fresh, hidden
found = {}
for folder in sys.argv[1:]:
    model = fresh("tiny-bert")
    peftbench.load_adapter(model, folder)
    found[folder] = hidden(model, batch(2)).flatten().tolist()
print(json.dumps(found))
"""


def test_saved_adapters_load_in_another_process(tmp_path: Path) -> None:
    """All methods in one process, which takes seconds to start."""
    want = {}
    for method in METHODS:
        model = fresh("tiny-bert")
        adapter = peftbench.attach(model, small(method))
        disturb(adapter)
        adapter.save(tmp_path / method)
        want[str(tmp_path / method)] = hidden(model, batch(2)).detach().flatten().tolist()
    done = subprocess.run([sys.executable, "-c", LOADING, *want], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    for folder, states in want.items():
        assert found[folder] == pytest.approx(states, rel=1e-5, abs=1e-5), folder


@everywhere
@every_method
def test_bf16_base_keeps_fp32_adapters_and_close_results(method: str, family: str) -> None:
    full, half, chosen = fresh(family), fresh(family, torch.bfloat16), small(method)
    fits(chosen, full)
    wide, narrow = peftbench.attach(full, chosen), peftbench.attach(half, chosen)
    disturb(wide)
    if narrow.trained:
        return
    narrow.load_state_dict(wide.state_dict())
    assert all(p.dtype == torch.float32 for p in narrow.parameters())
    out = half(**batch(4)).last_hidden_state
    assert out.dtype == torch.bfloat16
    want = full(**batch(4)).last_hidden_state
    mask = batch(4)["attention_mask"].bool()
    error = (out.float() - want)[mask].norm() / want[mask].norm()
    assert error < 0.05
    if narrow.parameters():
        out.float().square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in narrow.parameters())


@everywhere
@every_method
def test_disabled_adapter_gives_the_bare_model(method: str, family: str) -> None:
    model, chosen = fresh(family), small(method)
    fits(chosen, model)
    inputs = batch(4)
    before = hidden(model, inputs)
    adapter = peftbench.attach(model, chosen)
    disturb(adapter)
    if adapter.trained or adapter.rewritten:
        with pytest.raises(UserError, match="cannot be switched off"), adapter.enabled(False):
            pass
        return
    with adapter.enabled(False):
        assert torch.equal(hidden(model, inputs), before)
    if adapter.parameters():
        assert not torch.equal(hidden(model, inputs), before)


@everywhere
@every_method
def test_gradient_checkpointing_changes_no_gradient(method: str, family: str) -> None:
    model, chosen = fresh(family), small(method)
    fits(chosen, model)
    adapter = peftbench.attach(model, chosen)
    disturb(adapter)
    if not adapter.parameters():
        return
    from peftbench.models.load import set_dropout

    set_dropout(model, 0.0)
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        model(**batch(4)).last_hidden_state.square().mean().backward()
        grads.append([p.grad.clone() for p in adapter.parameters() if p.grad is not None])
        for p in adapter.parameters():
            p.grad = None
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, recomputed)


@pytest.mark.parametrize("family", ["tiny-gpt2", "tiny-llama"])
@every_method
def test_left_and_right_padding_give_the_same_states(method: str, family: str) -> None:
    model, chosen = fresh(family), small(method)
    fits(chosen, model)
    adapter = peftbench.attach(model, chosen)
    disturb(adapter)
    ids = torch.randint(10, 60, (1, 6), generator=torch.Generator().manual_seed(1))
    pads = torch.zeros((1, 3), dtype=torch.long)
    ones = torch.ones_like(ids)
    places = torch.arange(6).unsqueeze(0)
    right = model(input_ids=torch.cat([ids, pads], 1), attention_mask=torch.cat([ones, pads], 1)).last_hidden_state
    left = model(
        input_ids=torch.cat([pads, ids], 1),
        attention_mask=torch.cat([pads, ones], 1),
        position_ids=torch.cat([pads, places], 1),
    ).last_hidden_state
    torch.testing.assert_close(left[:, 3:], right[:, :6], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["tiny-gpt2", "tiny-llama", "tiny-t5"])
@every_method
def test_generation_with_a_cache_equals_generation_without(method: str, family: str) -> None:
    model, chosen = fresh(family, formulation="text"), small(method)
    fits(chosen, model)
    adapter = peftbench.attach(model, chosen, runs=2 if runs_share(chosen, family) else 1)
    disturb(adapter)
    inputs = {k: torch.cat([v.flip(1), v.flip(1)]) for k, v in batch(2).items()}  # padded on the left
    options = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 0}
    cached, recomputed = (model.generate(**inputs, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, recomputed)


@every_method
def test_the_same_seed_gives_the_same_adapter(method: str) -> None:
    model, chosen = fresh("tiny-bert"), small(method)
    states = []
    for _ in range(2):
        adapter = peftbench.attach(model, chosen, seeds=[1])
        states.append(adapter.state_dict())
        adapter.detach()
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
