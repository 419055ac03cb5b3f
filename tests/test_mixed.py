"""Different methods in one pack: each run's losses are those it has alone, and nothing gets across."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import peftbench
from peftbench import registry
from peftbench.errors import UserError
from peftbench.methods.adapter import named_method
from peftbench.methods.pack import MixedAdapter, company, groups
from peftbench.progress import Quiet
from peftbench.record import RunSpec
from peftbench.run import run_pack
from peftbench.store import Store
from tests.conformance.conftest import disturb, fresh, small
from tests.test_run import run, same_traces, tiny


def together(kind: str) -> list[str]:
    """Return the names of all methods that keep such company and need nothing special of the base."""
    found = []
    for name in registry.options("method"):
        section = registry.section("method", name)
        method = named_method(name, {})
        if method.traits.packable and not section.get("requires"):
            found += [name] if company(method.traits.sites, method.settings().get("length")) == kind else []
    return found


ROWS = together("rows")
VIRTUAL = ["embedding 20", "attention 20"]


def sizes(method: str) -> dict[str, int]:
    """Return a method's settings at sizes that suit tiny models."""
    settings = small(method).settings()
    return {f"method__{k}": v for k, v in settings.items() if type(v) is int and k != "length"}


def one_each(methods: list[str], **given: object) -> list[RunSpec]:
    """Return a run of each method."""
    return [spec for i, name in enumerate(methods) for spec in tiny(method=name, seed=i, **sizes(name), **given)]


def two_each(methods: list[str], rate: float, **given: object) -> list[RunSpec]:
    """Return two runs of each method side by side, the second with a learning rate of `rate` and unclipped."""
    other = {"train__learning_rate": rate, "train__clip_norm": 0.0}
    found = []
    for i, name in enumerate(methods):
        found += tiny(method=name, seed=i, **sizes(name), **given)
        found += tiny(method=name, seed=100 + i, **sizes(name), **given, **other)
    return found


def test_there_are_enough_methods_to_mix():
    assert len(ROWS) >= 24
    assert {"lora", "dora", "vera", "adalora", "ia3", "bitfit", "houlsby", "layernorm", "head"} <= set(ROWS)
    assert len(together("embedding 20")) >= 3
    assert len(together("attention 20")) >= 2
    packable = {n for n in registry.options("method") if named_method(n, {}).traits.packable}
    rest = packable - {*ROWS, *(name for kind in VIRTUAL for name in together(kind))}
    assert rest == {"qlora"}, "LoRA on a quantized base, of which lora is the test"


@pytest.mark.parametrize("part", range(4))
def test_every_method_in_a_mixed_pack_gives_the_trace_it_gives_alone(part, tmp_path: Path):
    """50 steps in fp32, a quarter of the methods at a time, beside a run of their own method and unlike ones."""
    same_traces(two_each(ROWS[part::4], 3e-3, train__steps=50), tmp_path)


@pytest.mark.parametrize("kind", VIRTUAL)
def test_methods_with_virtual_tokens_share_a_pack_with_their_like(kind, tmp_path: Path):
    same_traces(two_each(together(kind), 3e-3, train__steps=50), tmp_path)


@pytest.mark.parametrize("model", ["tiny-llama", "tiny-t5", "tiny-gpt2"])
def test_text_models(model, tmp_path: Path):
    given = {"model": model, "task__formulation": "text", "train__steps": 8}
    same_traces(one_each(["lora", "ia3", "houlsby", "layernorm", "dora"], **given), tmp_path)


def test_generated_answers_are_those_alone(tmp_path: Path):
    """One cache of keys and values for every run, in one pass through the base."""
    given = {"model": "tiny-gpt2", "task__formulation": "text", "train__steps": 6, "train__learning_rate": 3e-2}
    pack = one_each(["lora", "houlsby", "ia3", "lora"], **given)
    packed = run(pack, tmp_path / "packed")
    answers = []
    for i, spec in enumerate(pack):
        (alone,) = run([spec], tmp_path / str(i))
        assert alone.quality is not None
        assert packed[i].quality is not None
        answers.append(alone.quality["items"]["test"]["predictions"])
        assert packed[i].quality["items"]["test"]["predictions"] == answers[-1]
    assert any(a != answers[0] for a in answers), "runs answer alike: nothing is told apart"


def test_several_runs_of_each_method_and_two_settings_of_one(tmp_path: Path):
    pack = [
        *tiny(method="lora", method__rank=[2, 8], seed=[0, 1], train__steps=12),
        *tiny(method="lora", method__targets=[["all"]], train__steps=12),
        *tiny(method="houlsby", method__bottleneck=[4, 8], train__steps=12, train__weight_decay=0.1),
        *tiny(method="lora_plus", seed=[3], train__steps=12, train__learning_rate=1e-3),
    ]
    same_traces(pack, tmp_path)


def test_a_run_that_diverges_changes_no_bit_of_its_neighbours(tmp_path: Path):
    methods = ["lora", "houlsby", "bitfit", "adalora"]
    calm = one_each(methods, train__steps=24, train__evaluate_every=4)
    rates = {"train__learning_rate": 1e30, "train__clip_norm": 0.0}
    wild = one_each(methods, train__steps=24, train__evaluate_every=4, **rates)[1]
    records = run([calm[0], wild, *calm[2:]], tmp_path / "wild")
    usual = run(calm, tmp_path / "calm")
    assert [r.status for r in records] == ["completed", "diverged", "completed", "completed"]
    for i in (0, 2, 3):
        assert records[i].trace is not None
        assert usual[i].trace is not None
        assert records[i].trace["loss"] == usual[i].trace["loss"]
        assert records[i].quality == usual[i].quality


@pytest.mark.parametrize("names", [*(ROWS[i::4] for i in range(4)), *map(together, VIRTUAL)], ids=" ".join)
def test_a_run_of_any_method_that_diverges_changes_no_bit_of_its_neighbours(names, tmp_path: Path):
    given = {"train__steps": 8, "train__evaluate_every": 4}
    wild, calm = (run(two_each(names, rate, **given), tmp_path / str(rate)) for rate in (1e38, 1e-3))
    for i, name in enumerate(names):
        assert wild[2 * i + 1].status == "diverged", name
        assert wild[2 * i].status == calm[2 * i].status == "completed", name
        assert wild[2 * i].trace == calm[2 * i].trace, name
        assert wild[2 * i].quality == calm[2 * i].quality, name


def mixture(family: str, names: list[str]) -> tuple[torch.nn.Module, MixedAdapter]:
    model = fresh(family)
    adapter = peftbench.attach(model, [named_method(n, {}) for n in names], seeds=range(len(names)))
    assert isinstance(adapter, MixedAdapter)
    return model, adapter


@pytest.mark.parametrize("family", ["tiny-bert", "tiny-llama", "tiny-gpt2"])
def test_outputs_saving_merging_and_taking_off(family, tmp_path: Path):
    names = ["lora", "lora", "ia3", "layernorm", "houlsby", "ssf"]
    flags = [p.requires_grad for p in fresh(family).parameters()]
    model, adapter = mixture(family, names)
    ids = torch.arange(24).reshape(2, 12) % 50
    with torch.no_grad():
        before = fresh(family)(ids).last_hidden_state
        disturb(adapter)
        packed = model(ids.repeat(len(names), 1)).last_hidden_state.unflatten(0, (len(names), 2))
        for i in range(len(names)):
            folder = adapter.save(tmp_path / str(i), i).parent
            other = fresh(family)
            peftbench.load_adapter(other, folder)
            torch.testing.assert_close(other(ids).last_hidden_state, packed[i], rtol=1e-4, atol=1e-5)
        adapter.merge(3)
        torch.testing.assert_close(model(ids).last_hidden_state, packed[3], rtol=1e-4, atol=1e-5)
        adapter.unmerge()
        with adapter.enabled(False):
            assert model(ids).last_hidden_state.equal(before)
        adapter.detach()
        assert model(ids).last_hidden_state.equal(before)
    assert [p.requires_grad for p in model.parameters()] == flags


def test_what_cannot_be_mixed_is_refused_and_leaves_the_model_alone():
    model = fresh("tiny-bert")
    flags = [p.requires_grad for p in model.parameters()]
    for names in (["lora", "prompt"], ["lora", "full"], ["prompt", "prefix"]):
        with pytest.raises(UserError, match="cannot share a pack"):
            peftbench.attach(model, [named_method(n, {}) for n in names])
    with pytest.raises(UserError, match="cannot share a pack"):
        peftbench.attach(model, [named_method("prompt", {"length": n}) for n in (4, 8)])
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not model._forward_pre_hooks


def test_a_method_that_fails_takes_no_other_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from peftbench.methods.ia3 import IA3

    def broken(*_: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(IA3, "delta", broken)
    pack = [*tiny(method="lora", seed=[0, 1], train__steps=4), *tiny(method=["ia3", "bitfit"], train__steps=4)]
    records = run_pack(pack, Store(tmp_path), Quiet())
    assert [r.status for r in records] == ["completed", "completed", "failed", "completed"]
    assert records[2].error is not None
    assert "broken" in records[2].error


def test_runs_that_can_share_an_adapter_do():
    methods = [named_method("lora", {"rank": 2}), named_method("lora", {"rank": 4}), named_method("ia3", {})]
    assert groups(methods) == [(0, 2), (2, 3)]
    assert groups([*methods, methods[0]]) == [(0, 2), (2, 3), (3, 4)]


@pytest.mark.parametrize("names", [["lora", "bitfit", "adalora"]])
def test_accumulation_and_clipping_are_each_runs_own(names, tmp_path: Path):
    same_traces(one_each(names, train__steps=8, train__accumulation=2, train__clip_norm=0.05), tmp_path)


def test_a_grid_over_methods_makes_mixed_packs():
    from peftbench import resolve

    plan = resolve.plan(
        resolve.demand({"model": ["tiny-bert"], "task": ["tiny"], "method": ["lora", "ia3", "prompt", "full"],
                        "seed": [0, 1]}, None), "cpu")  # fmt: skip
    names = [[spec.method["name"] for spec in pack] for pack in plan.packs(plan.specs, 4)]
    assert names == [["lora", "lora", "ia3", "ia3"], ["prompt", "prompt"], ["full"], ["full"]]
    assert {len(pack) for pack in plan.packs(plan.specs, 1)} == {1}
    apart = [[spec.method["name"] for spec in pack] for pack in plan.packs(plan.specs, 4, mix=lambda spec: False)]
    assert apart == [["lora", "lora"], ["ia3", "ia3"], ["prompt", "prompt"], ["full"], ["full"]]
