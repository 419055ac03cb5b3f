"""AdaLoRA's schedule, its allocator against HF PEFT's, packs of unlike runs, and the orthogonality term."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import peftbench
from peftbench.engine.optimizer import PackedAdamW, Recipe
from peftbench.errors import UserError
from peftbench.methods.adalora import AdaLora
from tests.conformance.conftest import batch, fresh, hidden

STEPS = 24
QUICK = AdaLora(target_rank=2, init_warmup=0.125, final_warmup=0.25, update_every=3)  # 3 and 6 of 24 steps


def test_the_budget_waits_falls_cubically_and_stays():
    method = AdaLora(target_rank=4, init_rank=6, init_warmup=0.1, final_warmup=0.3, update_every=5)
    assert method.phases(100) == (10, 30)
    budgets = {step: method.budget(step, 100, matrices=10) for step in range(1, 101)}
    assert all(budgets[step] is None for step in range(1, 11))
    # 40 + 20 (1 - (t - 10) / 60)³, by hand: 40 + 20 · (5/6)³ = 51.57, 40 + 20 / 8 = 42.5, 40 + 20 / 216 = 40.09
    assert (budgets[20], budgets[40], budgets[60]) == (51, 42, 40)
    assert budgets[21] is None
    assert all(budgets[step] == 40 for step in range(70, 101))


def test_the_phases_of_short_runs_leave_room_to_allocate():
    for steps in range(1, 60):
        warmup, final = AdaLora().phases(steps)
        assert warmup + final < steps
        assert AdaLora().budget(steps, steps, 4) == 32


def test_the_initial_rank_follows_the_target():
    assert AdaLora(target_rank=8).first_rank == 12
    assert AdaLora(target_rank=8, init_rank=9).first_rank == 9
    with pytest.raises(UserError, match="init_rank=3: expected"):
        AdaLora(target_rank=4, init_rank=3)
    with pytest.raises(UserError, match="final_warmup=0.6: expected less than 0.5"):
        AdaLora(init_warmup=0.5, final_warmup=0.6)


def trained(methods: list[AdaLora], seeds: list[int], steps: int = STEPS):
    """Train towards random outputs and return the adapter."""
    model = fresh("tiny-bert")
    adapter = peftbench.attach(model, methods, seeds=seeds)
    recipes = [Recipe(1e-2)] * len(methods)
    optimizer = PackedAdamW(adapter.packed_parameters(), [], recipes, steps, keep_gradients=True)
    for step in range(1, steps + 1):
        parts = [batch(2, step + 100 * seed) for seed in seeds]
        out = model(**{k: torch.cat([p[k] for p in parts]) for k in parts[0]}).last_hidden_state
        wanted = torch.cat([torch.randn(2, *out.shape[1:], generator=torch.Generator().manual_seed(s)) for s in seeds])
        losses = (out - wanted).reshape(len(methods), -1).square().mean(dim=1) + adapter.penalty()
        losses.sum().backward()
        optimizer.step(losses.detach())
        adapter.after_step(optimizer.end())
    return adapter


@dataclasses.dataclass
class Pair:
    """The deltas alone, where a whole adapter is not at hand."""

    deltas: list


def kept(adapter, run: int = 0) -> list[int]:
    """Return how many singular values are not zero at each site."""
    return [int((delta.run_state(run)["E"] != 0).sum()) for _, delta in adapter.deltas]


def mirrored(adapter) -> torch.nn.Module:
    """Return a module with the adapter's tensors under the names and in the shapes that PEFT's allocator looks for."""
    mirror = torch.nn.Module()
    for i, (_, delta) in enumerate(adapter.deltas):
        site = torch.nn.Module()
        for name in ("A", "E", "B"):
            holder = torch.nn.Module()
            holder.default = torch.nn.Parameter(peft_shaped(getattr(delta, name)[0].detach()).clone())
            site.add_module(f"lora_{name}", holder)
        mirror.add_module(str(i), site)
    return mirror


def peft_shaped(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.T if tensor.dim() == 2 else tensor.unsqueeze(1)


def test_the_allocator_prunes_what_hf_peft_s_prunes(monkeypatch):
    """Both see the same parameters and gradients, step by step."""
    layer = pytest.importorskip("peft.tuners.adalora.layer")
    config = pytest.importorskip("peft").AdaLoraConfig(
        target_r=2, init_r=3, tinit=3, tfinal=6, deltaT=3, total_step=STEPS, beta1=0.85, beta2=0.85
    )
    theirs: dict = {}
    counts = []
    prune = AdaLora.after_step.__func__

    def both(cls, methods, deltas, shared, end):
        """Let PEFT act on what the optimizer left, then ours."""
        mirror = mirrored(Pair(deltas))
        allocator = theirs.setdefault("allocator", layer.RankAllocator(mirror, config, "default"))
        for i, (_, delta) in enumerate(deltas):
            for name in ("A", "E", "B"):
                gradient = end.gradient(getattr(delta, name))[0]
                mirror.get_submodule(f"{i}.lora_{name}").default.grad = peft_shaped(gradient).clone()
        last = STEPS - config.tfinal
        (now,) = end.step
        if now <= last:
            _, found = allocator.update_and_allocate(mirror, now, force_mask=now == last)
            theirs["pattern"] = found or theirs.get("pattern")
        else:
            allocator.mask_using_rank_pattern(mirror, theirs["pattern"])
        prune(cls, methods, deltas, shared, end)
        for i, (_, delta) in enumerate(deltas):
            assert torch.equal(delta.E[0], mirror.get_submodule(f"{i}.lora_E").default.flatten()), now
            if now <= last:
                for mine, smoothed in (
                    (shared.sensitivity, allocator.exp_avg_ipt),
                    (shared.uncertainty, allocator.exp_avg_unc),
                ):
                    torch.testing.assert_close(mine[0, "E"][i, 0], smoothed[f"{i}.lora_E.default"].flatten())
        if now > last or found is not None:
            counts.append(sum(kept(Pair(deltas))))

    monkeypatch.setattr(AdaLora, "after_step", classmethod(both))
    adapter = trained([QUICK], [0])
    # 8 + 4 (1 - (t - 3) / 15)³ of 12 triplets at steps 6, 9, 12, 15 and 18, then 8 at each of the last six
    assert counts == [10, 8, 8, 8, 8] + [8] * 6
    assert len(set(kept(adapter))) > 1, "ranks moved between matrices"


def test_nothing_is_pruned_where_both_ranks_are_equal():
    adapter = trained([dataclasses.replace(QUICK, init_rank=2)], [0])
    assert kept(adapter) == [2] * len(adapter.deltas)


def test_unlike_runs_of_a_pack_train_as_they_do_alone():
    methods = [
        QUICK,
        dataclasses.replace(QUICK, target_rank=3, init_warmup=0.3, update_every=2, beta1=0.5, alpha=4.0),
        dataclasses.replace(QUICK, target_rank=1, init_rank=4, final_warmup=0.5, beta2=0.5, orthogonal=0.5),
    ]
    together = trained(methods, [0, 1, 2])
    for run, method in enumerate(methods):
        alone = trained([method], [run])
        assert kept(alone) == kept(together, run)
        assert sum(kept(alone)) == method.target_rank * len(alone.deltas)
        for name, tensor in alone.state_dict().items():
            torch.testing.assert_close(together.state_dict(run)[name], tensor, rtol=1e-3, atol=1e-5)
    for _, delta in together.deltas:
        for name in ("A", "E", "B"):
            whole = getattr(delta, name).detach().clone()
            for run in range(3):
                part = whole[run]
                for axis, size in enumerate(delta.shapes[name][run]):
                    part = part.narrow(axis, 0, size)
                part.zero_()
            assert not whole.any(), "padding moved"


def test_a_second_training_starts_measuring_afresh():
    adapter = trained([QUICK], [0])
    allocator = adapter.shared
    allocator.begin([1], [STEPS])
    assert not allocator.pruned.any()
    assert not allocator.sensitivity


def test_a_run_that_diverged_is_left_where_it_stands():
    adapter = trained([QUICK, QUICK], [0, 1], steps=12)
    model = adapter.model
    optimizer = PackedAdamW(adapter.packed_parameters(), [], [Recipe(1e-2)] * 2, 4, keep_gradients=True)
    with torch.no_grad():
        for _, delta in adapter.deltas:
            delta.E.fill_(1.0)
    model(**batch(4)).last_hidden_state.square().mean().backward()
    optimizer.step(torch.tensor([float("nan"), 1.0]))
    for step in range(4):
        adapter.after_step(dataclasses.replace(optimizer.end(), step=[step + 1] * 2))
    assert kept(adapter, 0) == [3] * 4
    assert sum(kept(adapter, 1)) == 8


def test_the_orthogonality_term_is_the_mean_norm_and_zero_for_orthonormal_vectors():
    model = fresh("tiny-bert")
    methods = [dataclasses.replace(QUICK, orthogonal=0.5), dataclasses.replace(QUICK, target_rank=1, orthogonal=0.25)]
    adapter = peftbench.attach(model, methods)
    for run, method in enumerate(methods):
        norms = []
        for _, delta in adapter.deltas:
            state = delta.run_state(run)
            eye = torch.eye(method.first_rank)
            norms += [(state["A"].T @ state["A"] - eye).norm(), (state["B"] @ state["B"].T - eye).norm()]
        torch.testing.assert_close(adapter.penalty()[run], method.orthogonal * torch.stack(norms).mean())
    with torch.no_grad():
        for _, delta in adapter.deltas:
            for run in range(2):
                state = delta.run_state(run)
                state["A"].copy_(torch.linalg.qr(torch.randn(state["A"].shape)).Q)
                state["B"].copy_(torch.linalg.qr(torch.randn(state["B"].T.shape)).Q.T)
    assert (adapter.penalty() < 1e-5).all()


def test_the_pruned_model_is_its_saved_tensors(tmp_path):
    adapter = trained([QUICK], [0])
    want = hidden(adapter.model, batch(2, 5))
    adapter.save(tmp_path)
    adapter.detach()
    loaded = peftbench.load_adapter(adapter.model, tmp_path)
    assert torch.equal(hidden(adapter.model, batch(2, 5)), want)
    assert kept(loaded) == kept(adapter)


def test_peft_s_files_without_the_pruned_triplets_load():
    adapter = trained([QUICK], [0])
    method, sites = adapter.methods[0], [site for site, _ in adapter.deltas]
    whole = method.peft.tensors(method, sites, adapter.state_dict())
    short = {}
    for name, tensor in whole.items():
        values = whole[name.rpartition(".")[0] + ".lora_E"].flatten() != 0
        short[name] = tensor[:, values] if name.endswith("lora_B") else tensor[values]
    state = method.peft.state(method, sites, short)
    want = hidden(adapter.model, batch(2, 5))
    adapter.load_state_dict(state)
    torch.testing.assert_close(hidden(adapter.model, batch(2, 5)), want)


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_a_run_of_few_steps_trains(steps):
    model = fresh("tiny-bert")
    method = AdaLora(target_rank=2)
    adapter = peftbench.attach(model, method)
    recipe = Recipe(1e-2, schedule="constant")
    optimizer = PackedAdamW(adapter.packed_parameters(), [], [recipe], steps, keep_gradients=True)
    for step in range(steps):
        loss = hidden(model, batch(3, step)).square().mean()
        loss.backward()
        optimizer.step(loss.detach().reshape(1))
        adapter.after_step(optimizer.end())
    assert any(delta.E.any() for _, delta in adapter.deltas)
