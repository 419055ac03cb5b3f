"""Multitask prompt tuning: each row's prompt by hand, what stage 2 takes from a source, HF PEFT's files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch

import peftbench
from peftbench.errors import UserError
from peftbench.methods.mpt import MultitaskPromptTuning
from peftbench.verify import bench
from tests.conformance.conftest import batch, disturb, fresh, hidden
from tests.methods.prompts import theirs

THREE = MultitaskPromptTuning(length=4, rank=2, tasks=3)


def tensors(adapter: peftbench.Adapter, run: int = 0) -> dict[str, torch.Tensor]:
    """Return one run's tensors by their short names."""
    return {name.rpartition(".")[2]: t for name, t in adapter.state_dict(run).items()}


def test_every_row_gets_the_shared_prompt_times_its_own_tasks_matrix() -> None:
    adapter = peftbench.attach(fresh("tiny-bert"), THREE, runs=2, seeds=[5, 6])
    disturb(adapter)
    ids = torch.tensor([[2, 0, 0], [1, 2, 2]])
    adapter.condition(ids.flatten())
    ((_, delta),) = adapter.deltas
    prompt = delta.prompt()
    assert prompt.shape == (2, 3, 4, 32)
    for run in range(2):
        own = tensors(adapter, run)
        for row in range(3):
            task = ids[run, row]
            want = own["shared"] * (own["columns"][task] @ own["rows"][task])
            torch.testing.assert_close(prompt[run, row], want)


def test_a_row_does_not_notice_its_neighbours_tasks() -> None:
    model, inputs = fresh("tiny-bert"), batch(3)
    adapter = peftbench.attach(model, THREE)
    disturb(adapter)
    adapter.condition(torch.tensor([0, 1, 2]))
    mixed = model(**inputs).last_hidden_state
    for task in range(3):
        adapter.condition(torch.full((3,), task))
        torch.testing.assert_close(model(**inputs).last_hidden_state[task], mixed[task])


def test_only_the_tasks_of_a_batch_have_gradients() -> None:
    model = fresh("tiny-gpt2")
    adapter = peftbench.attach(model, THREE)
    adapter.condition(torch.tensor([0, 2, 0]))
    hidden(model, batch(3)).square().mean().backward()
    ((_, delta),) = adapter.deltas
    assert delta.columns.grad[0, 0].any()
    assert not delta.columns.grad[0, 1].any()
    assert delta.rows.grad[0, 2].any()


def test_several_tasks_without_the_rows_tasks_are_an_error() -> None:
    model = fresh("tiny-bert")
    adapter = peftbench.attach(model, THREE)
    with pytest.raises(UserError, match="adapter.condition"):
        model(**batch(2))
    adapter.detach()


def test_the_number_of_tasks_comes_from_the_data() -> None:
    assert MultitaskPromptTuning().with_tasks(5).count_tasks == 5
    assert MultitaskPromptTuning(tasks=5).with_tasks(5).tasks == 5
    with pytest.raises(UserError, match=r"method\.tasks=3: expected 1"):
        THREE.with_tasks(1)


@pytest.fixture
def source(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A saved stage 1 of three tasks, and its tensors."""
    adapter = peftbench.attach(fresh("tiny-bert"), THREE, seeds=[9])
    disturb(adapter)
    adapter.save(tmp_path / "source")
    return tmp_path / "source", tensors(adapter)


def stage2(folder: Path, **changes: object) -> MultitaskPromptTuning:
    return MultitaskPromptTuning(**{"length": 4, "rank": 2, "source": str(folder), **changes})


def test_stage_2_starts_from_the_source(source: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, saved = source
    methods = [
        stage2(folder, source_init="shared"),
        stage2(folder, source_init="average"),
        stage2(folder, source_init="exact", source_task=2),
        stage2(folder, source=None),
    ]
    adapter = peftbench.attach(fresh("tiny-bert"), methods, seeds=[0] * 4)
    shared, average, exact, plain = (tensors(adapter, run) for run in range(4))
    assert all(torch.equal(own["shared"], saved["shared"]) for own in (shared, average, exact))
    assert not torch.equal(plain["shared"], saved["shared"])
    for name in ("columns", "rows"):
        assert torch.equal(shared[name], plain[name]), "new matrices follow from the seed"
        torch.testing.assert_close(average[name][0], saved[name].mean(dim=0))
        assert torch.equal(exact[name][0], saved[name][2])


def test_a_saved_stage_2_no_longer_needs_its_source(
    source: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    model = fresh("tiny-bert")
    adapter = peftbench.attach(model, stage2(source[0]))
    want = hidden(model, batch(2))
    adapter.save(tmp_path / "target")
    adapter.detach()
    shutil.rmtree(source[0])
    peftbench.load_adapter(model, tmp_path / "target")
    assert torch.equal(hidden(model, batch(2)), want)


def test_the_fingerprint_is_that_of_the_sources_files(source: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, _ = source
    before = stage2(folder).fingerprint()
    assert before == stage2(folder, source_init="exact").fingerprint()
    assert MultitaskPromptTuning().fingerprint() is None
    file = folder / "adapter.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    assert stage2(folder).fingerprint() != before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": 5}, r"method\.length=5: expected 4, the source's"),
        ({"rank": 1}, r"method\.rank=1: expected 2, the source's"),
        ({"source_init": "exact", "source_task": 3}, r"method\.source_task=3: expected below 3"),
        ({"tasks": 2}, "null for a mixture of 2 tasks"),
        ({"source_init": "mean"}, r"method\.source_init='mean'"),
    ],
)
def test_settings_that_do_not_fit_the_source_are_named(
    source: tuple[Path, dict[str, torch.Tensor]], changes: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        stage2(source[0], **changes).check(fresh("tiny-bert"))


def test_a_source_that_is_no_such_adapter_is_refused(
    source: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    peftbench.attach(fresh("tiny-bert"), "lora", rank=2).save(tmp_path / "lora")
    with pytest.raises(UserError, match=r"not of peftbench\.methods\.lora\.Lora"):
        stage2(tmp_path / "lora").check(fresh("tiny-bert"))
    with pytest.raises(UserError, match="a prompt 384 wide, as the model, not 32"):
        stage2(source[0]).check(_wide())
    file = source[0] / "adapter.safetensors"
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(UserError, match=r"method\.source=.*expected the folder"):
        stage2(source[0]).fingerprint()


def _wide() -> torch.nn.Module:
    from peftbench.models.load import build_meta
    from tests.conformance.conftest import config

    return build_meta(config("minilm-l6"), "head")


def test_runs_of_different_rank_share_a_pack() -> None:
    model = fresh("tiny-gpt2")
    methods = [MultitaskPromptTuning(length=2, rank=r, init_std=0.5) for r in (1, 3)]
    adapter = peftbench.attach(model, methods)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2, weight_decay=0.0)
    for step in range(3):
        optimizer.zero_grad()
        model(**batch(4, step)).last_hidden_state.square().mean().backward()
        optimizer.step()
    ((_, delta),) = adapter.deltas
    assert tensors(adapter)["rows"].shape == (1, 1, 32)
    assert not delta.rows[0, 0, 1:].any()
    assert not delta.columns[0, 0, :, 1:].any()


@pytest.mark.parametrize("task", [0, 2])
def test_peft_computes_the_same_for_every_task(task: int, tmp_path: Path) -> None:
    model = bench.fresh("tiny-gpt2")
    adapter = peftbench.attach(model, THREE)
    disturb(adapter)
    adapter.save(tmp_path, format="peft")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["num_tasks"] == 3
    (data,) = bench.batches(model, 1)
    ids = torch.tensor([task, 1, task, 1])
    adapter.condition(ids)
    reference = theirs("tiny-gpt2", tmp_path, "text")
    want = bench.outputs(reference(**data.inputs, task_ids=ids), data)
    assert bench.largest(bench.outputs(model(**data.inputs), data), want) < 1e-5
    again = peftbench.load_adapter(bench.fresh("tiny-gpt2"), tmp_path)
    assert all(torch.equal(t, tensors(adapter)[name]) for name, t in tensors(again).items())


def test_peft_computes_the_same_on_an_encoder_told_the_tasks() -> None:
    """PEFT's forward for models without a head leaves the tasks out; its prompts are the same once it has them."""
    model = bench.fresh("tiny-bert")
    adapter = peftbench.attach(model, THREE)
    disturb(adapter)
    (data,), ids = bench.batches(model, 1), torch.tensor([2, 1, 0, 1])
    adapter.condition(ids)
    config = peft.MultitaskPromptTuningConfig(
        task_type="FEATURE_EXTRACTION", num_virtual_tokens=4, num_ranks=2, num_tasks=3
    )
    reference = peft.get_peft_model(bench.fresh("tiny-bert"), config).eval()
    own = MultitaskPromptTuning.peft.parameters(THREE, THREE.sites(model), adapter.state_dict())
    for name, tensor in own.items():
        place = name.replace("prompt_encoder.", "prompt_encoder.default.")
        reference.get_parameter(place).data.copy_(tensor)
    prompts = reference.get_prompt
    reference.get_prompt = lambda batch_size: prompts(batch_size, ids)
    assert (
        bench.largest(bench.outputs(model(**data.inputs), data), bench.outputs(reference(**data.inputs), data)) < 1e-5
    )


def test_an_encoder_without_a_head_is_not_exported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="never see the rows' tasks"):
        peftbench.attach(fresh("tiny-bert"), THREE).save(tmp_path, format="peft")
