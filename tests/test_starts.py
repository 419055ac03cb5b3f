"""Runs that start from an adapter trained on another task."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from peftbench import resolve
from peftbench.assembly import Setting, assembled
from peftbench.errors import UserError
from peftbench.progress import Quiet
from peftbench.record import RunSpec, train_content
from peftbench.reproduce.protocol import start_of
from peftbench.run import run_pack
from peftbench.store import Store
from tests.test_run import run, tiny


def lora(**given: Any) -> list[RunSpec]:
    return tiny(**{"method": "lora", "train__steps": 2, "method__rank": 2, "train__learning_rate": 0.01, **given})


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep with two kept adapters of one task, of different quality on validation."""
    folder = tmp_path_factory.mktemp("results") / "source"
    run_pack(lora(seed=[0, 1]), Store(folder), Quiet(), save_adapters=True)
    for score, path in zip((0.25, 0.75), sorted((folder / "runs").iterdir()), strict=True):
        record = json.loads(path.read_text())
        record["quality"]["validation"][record["quality"]["primary_metric"]] = score
        path.write_text(json.dumps(record))
    return folder


def best(source: Path) -> Path:
    return source / "adapters" / sorted(p.stem for p in (source / "runs").iterdir())[1]


def test_a_run_starts_from_the_best_adapter_and_a_fresh_head(source: Path) -> None:
    (spec,) = lora(seed=7, train__start=str(source), train__start_task="tiny")
    (fresh,) = lora(seed=7)
    assert spec.train["start"] == str(best(source))
    with assembled(Setting.of([fresh])) as bare:
        head = {name: p.detach().clone() for name, p in bare.head.named_parameters()}
    with assembled(Setting.of([spec])) as assembly:
        state = assembly.adapter.state_dict(0)
        for name, tensor in load_file(best(source) / "adapter.safetensors").items():
            assert torch.equal(state[name], tensor), name
            assert tensor.count_nonzero()
        assert all(torch.equal(p, head[name]) for name, p in assembly.head.named_parameters())


def test_in_a_pack_each_run_starts_where_it_says(source: Path, tmp_path: Path) -> None:
    """Unequal lengths too: a start is no obstacle to leaving and joining."""
    other = str(next(p for p in (source / "adapters").iterdir() if p != best(source)))
    asked = [
        *lora(seed=3, train__start=str(best(source)), train__steps=4),
        *lora(seed=4, train__start=other, train__steps=6),
        *lora(seed=5, train__steps=4),
    ]
    packed = run(asked, tmp_path / "packed")
    for i, spec in enumerate(asked):
        (alone,) = run([spec], tmp_path / str(i))
        assert packed[i].trace["loss"] == pytest.approx(alone.trace["loss"], rel=1e-5)
    assert len({record.trace["loss"][0] for record in packed}) == 3
    (unlike,) = run(lora(seed=3, train__steps=4), tmp_path / "unlike")
    assert unlike.trace["loss"][1:] != pytest.approx(packed[0].trace["loss"][1:], rel=1e-5)


def test_runs_with_other_starts_share_a_pack(source: Path) -> None:
    folders = [str(p) for p in (source / "adapters").iterdir()]
    grid = {
        "model": ["tiny-bert"],
        "task": ["tiny"],
        "method": ["lora"],
        "method.rank": [2],
        "train.start": [None, *folders],
    }
    plan = resolve.plan(resolve.demand(grid, None), "cpu")
    assert [len(pack) for pack in plan.packs(plan.specs, 8)] == [3]


def test_a_run_is_known_by_the_weights_it_starts_from_not_by_where_they_lie(source: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(source, moved)
    ids = [lora(seed=7, train__start=str(f), train__start_task="tiny")[0].run_id for f in (source, moved, best(source))]
    assert len(set(ids)) == 1
    (plain,) = lora(seed=7)
    other = next(p for p in (source / "adapters").iterdir() if p != best(source))
    assert len({plain.run_id, ids[0], lora(seed=7, train__start=str(other))[0].run_id}) == 3
    assert "start" not in plain.identity
    assert not {"start", "start_task"} & set(train_content(plain.train))


def test_what_a_run_started_from_is_said(source: Path, tmp_path: Path) -> None:
    assert start_of(lora()[0].to_dict()) == "the pretrained model"
    assert start_of(lora(train__start=str(source), train__start_task="tiny")[0].to_dict()) == "the tiny adapter"
    alone = tmp_path / "alone"
    shutil.copytree(best(source), alone)
    assert start_of(lora(train__start=str(alone))[0].to_dict()) == "an adapter of unknown task"
    assert start_of({"train": {}}) == "the pretrained model"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"train__start_task": None}, "expected that of one (adapter.json), or that of a sweep and train.start_task"),
        ({"train__start_task": "mnli"}, "no kept adapter of lora on mnli with model tiny-bert"),
        ({"method__rank": 4}, "no kept adapter of lora on tiny"),
        ({"model": "tiny-roberta"}, "no kept adapter of lora on tiny with model tiny-roberta"),
    ],
)
def test_a_sweep_without_a_fitting_adapter_is_refused(source: Path, given: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as caught:
        lora(**{"train__start": str(source), "train__start_task": "tiny", **given})
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"method__alpha": 3.0}, "method.alpha=3.0: expected 16.0, that of the adapter"),
        ({"train__start_task": "mnli"}, "was trained on tiny"),
        ({"model": "tiny-roberta"}, "expected an adapter of model tiny-roberta"),
        ({"method": "bitfit"}, "expected an adapter of peftbench.methods.bitfit.BitFit, not of"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(source: Path, given: dict[str, Any], says: str) -> None:
    rank = {} if "method" in given else {"method__rank": 2}
    asked = {"method": "lora", "train__steps": 2, "train__start": str(best(source)), **rank, **given}
    with pytest.raises(UserError) as caught:
        tiny(**asked)
    assert says in str(caught.value)


def test_a_task_without_a_folder_is_refused() -> None:
    with pytest.raises(UserError, match=r"train\.start_task=mnli: expected train\.start too"):
        lora(train__start_task="mnli")


def test_vectors_of_other_random_matrices_are_refused(tmp_path: Path) -> None:
    """VeRA's vectors belong to frozen matrices that a seed gives."""
    vera: dict[str, Any] = {"method": "vera", "method__rank": 4, "train__steps": 2}
    (first,) = run_pack(tiny(**vera, seed=0), Store(tmp_path), Quiet(), save_adapters=True)
    folder = str(Store(tmp_path).adapter(first.run_id))
    same, other = (tiny(**vera, seed=s, train__start=folder)[0] for s in (0, 1))
    (record,) = run_pack([same], Store(tmp_path), Quiet())
    assert record.status == "completed", record.error
    (record,) = run_pack([other], Store(tmp_path), Quiet())
    assert record.status == "failed"
    assert "seed 0" in record.error
