"""Several tasks as one: rows, classes, encodings and metrics by hand; each row's task reaches head and adapter."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

import peftbench
from peftbench.__main__ import main
from peftbench.engine.batches import TokenTable
from peftbench.engine.heads import PackedHead
from peftbench.engine.objectives import HeadObjective
from peftbench.errors import UserError
from peftbench.models.load import load
from peftbench.tasks.base import Encoded
from peftbench.tasks.mixture import Mixture
from tests.conformance.conftest import batch, config, fresh


@pytest.fixture
def rte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder with a made-up RTE whose answer is a word of the first sentence."""
    for split, count in (("train", 60), ("validation", 10)):
        columns = {
            "sentence1": [f"{split} {n} {('yes', 'no')[n % 2]}" for n in range(count)],
            "sentence2": [f"claim {n}" for n in range(count)],
            "label": [n % 2 for n in range(count)],
        }
        file = tmp_path / "data" / "glue" / "rte" / f"{split}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.table(columns), file)
    monkeypatch.setenv("PEFTBENCH_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def mixture(**changes: object) -> Mixture:
    return Mixture(**{"name": "mixed", "tasks": ("tiny", "rte"), **changes})


@pytest.mark.usefixtures("rte")
def test_rows_are_all_tasks_rows_and_the_largest_are_capped() -> None:
    def counts(task: Mixture, split: str) -> list[int]:
        return np.bincount([row["task"] for row in task.splits()[split]], minlength=2).tolist()

    assert counts(mixture(), "train") == [240, 54]
    assert counts(mixture(), "validation") == [80, 6]
    assert counts(mixture(), "test") == [80, 10]
    assert counts(mixture(limit=40), "train") == [40, 40]
    assert counts(mixture(limit=100), "test") == [80, 10]
    assert mixture(limit=40).splits()["train"] == mixture(limit=40).splits()["train"]
    assert len({mixture(limit=n).fingerprint() for n in (40, 50)}) == 2


@pytest.mark.usefixtures("rte")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ("tiny",)}, "at least two different tasks"),
        ({"tasks": ("tiny", "tiny")}, "at least two different tasks"),
        ({"tasks": ("tiny", "rtee")}, "rtee: no such task; did you mean 'rte'"),
        ({"tasks": ("tiny", "stsb")}, "stsb has no classes to join"),
        ({"tasks": ("tiny", "glue-mixture")}, "is a mixture itself"),
        ({"limit": 0}, r"task\.limit=0"),
        ({"formulation": "words"}, r"task\.formulation=words"),
    ],
)
def test_what_cannot_be_mixed_is_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        mixture(**changes)


@pytest.mark.usefixtures("rte")
def test_each_row_is_encoded_as_its_own_task_would_and_classes_follow_one_another() -> None:
    task, tokenizer = mixture(), load(config("tiny-bert"), "head").tokenizer
    rows = [task.splits()["test"][i] for i in (85, 0, 1, 86)]
    assert [row["task"] for row in rows] == [1, 0, 0, 1]
    found = task.encode(rows, tokenizer, 32, "encoder")
    assert task.num_labels == 4
    assert found.task_ids == [1, 0, 0, 1]
    for place, row in enumerate(rows):
        own = list(task.members.values())[row["task"]].encode([row["row"]], tokenizer, 32, "encoder")
        assert found.input_ids[place] == own.input_ids[0]
        assert found.targets is not None
        assert found.targets[place] == own.targets[0] + 2 * row["task"]


@pytest.mark.usefixtures("rte")
def test_as_text_every_row_keeps_its_candidates() -> None:
    task, tokenizer = mixture(formulation="text"), load(config("tiny-gpt2"), "text").tokenizer
    rows = [task.splits()["test"][i] for i in (85, 0, 86)]
    encoded, owners = task.encode_choices(rows, tokenizer, 64, "decoder")
    assert owners == [0, 0, 1, 1, 2, 2]
    assert encoded.task_ids == [1, 1, 0, 0, 1, 1]
    alone, _ = task.members["tiny"].encode_choices([rows[1]["row"]], tokenizer, 64, "decoder")
    assert encoded.input_ids[2:4] == alone.input_ids
    assert encoded.labels is not None
    assert encoded.labels[2:4] == alone.labels
    assert task.metrics([1, 0], [(0, 1), (1, 1)]) == {"mean_primary": 0.5, "tiny_accuracy": 1.0, "rte_accuracy": 0.0}


@pytest.mark.usefixtures("rte")
def test_metrics_are_each_tasks_own_and_their_mean() -> None:
    task = mixture()
    rows = [task.splits()["test"][i] for i in (0, 1, 2, 3, 80, 81)]
    references = task.references(rows)
    right = [label + 2 * number for number, label in references]
    assert task.metrics(right, references) == {"mean_primary": 1.0, "tiny_accuracy": 1.0, "rte_accuracy": 1.0}
    wrong = [*right[:4], 5 - right[4], 5 - right[5]]
    assert task.metrics(wrong, references) == {"mean_primary": 0.5, "tiny_accuracy": 1.0, "rte_accuracy": 0.0}
    assert task.item_scores(wrong, references) == [1.0] * 4 + [0.0] * 2


def test_task_ids_travel_with_their_rows() -> None:
    table = TokenTable(Encoded([[5], [6], [7]], None, [0, 1, 2], None, [2, 0, 1]), 0, "cpu")
    found = table.gather(np.array([[2, 0], [1, 1]]), 4)
    assert found["task_ids"].tolist() == [1, 2, 0, 0]
    assert table.task_ids is not None
    assert any(column is table.task_ids for column in table.tensors())


def test_a_row_is_judged_among_its_own_tasks_classes() -> None:
    model = fresh("tiny-bert")
    adapter = peftbench.attach(model, "head", runs=2)
    head = PackedHead("linear", 32, 5, [torch.Generator().manual_seed(s) for s in range(2)], 0.0)
    joint = HeadObjective(model, adapter, head, "mean", [range(2), range(2, 5)])
    plain = HeadObjective(model, adapter, head, "mean")
    inputs = {**batch(4), "task_ids": torch.tensor([0, 1, 1, 0]), "targets": torch.tensor([1, 4, 2, 0])}
    open_outputs = plain.outputs(inputs)
    outputs = joint.outputs(inputs)
    assert torch.equal(outputs[0, 0, :2], open_outputs[0, 0, :2])
    assert (outputs[0, 0, 2:] == -torch.inf).all()
    assert (outputs[0, 1, :2] == -torch.inf).all()
    want = [
        torch.nn.functional.cross_entropy(open_outputs[0, 0, :2], torch.tensor(1))
        + torch.nn.functional.cross_entropy(open_outputs[0, 1, 2:], torch.tensor(2)),
        torch.nn.functional.cross_entropy(open_outputs[1, 0, 2:], torch.tensor(0))
        + torch.nn.functional.cross_entropy(open_outputs[1, 1, :2], torch.tensor(0)),
    ]
    loss = joint.loss_sum(inputs)
    torch.testing.assert_close(loss, torch.stack(want))
    loss.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


TRAIN = ["model=tiny-bert", "train.steps=8", "train.batch_size=8", "train.max_length=32", "profile=skip", "--quiet"]
MIX = ["task=glue-mixture", "task.tasks=[tiny,rte]"]


def only(folder: Path) -> dict:
    (path,) = (folder / "runs").glob("*.json")
    return json.loads(path.read_text())


def test_two_stages_from_the_command_line(rte: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage1 = ["run", "method=mpt", *MIX, *TRAIN, "method.length=3", "sweep.name=one", "save_adapters=true"]
    assert main(stage1) == 0
    record = only(rte / "results/one")
    assert record["status"] == "completed"
    assert set(record["quality"]["test"]) == {"mean_primary", "tiny_accuracy", "rte_accuracy"}
    folder = rte / "results/one/adapters" / record["run_id"]
    assert f"adapter: {folder}" in capsys.readouterr().out
    assert sorted(p.name for p in folder.iterdir()) == ["adapter.json", "adapter.safetensors", "head.safetensors"]
    assert [p.name for p in folder.parent.iterdir()] == [record["run_id"]], "nothing half-written is left"

    stage2 = ["sweep", "method=mpt", "task=rte", *TRAIN, "method.length=3", "sweep.name=two"]
    starts = "method.source_init=shared,average,exact"
    assert main([*stage2, starts, f"method.source={folder}"]) == 0
    ids = {path.stem for path in (rte / "results/two/runs").glob("*.json")}
    assert len(ids) == 3

    again = [*stage2, starts, f"method.source={folder}"]
    assert main(again) == 0
    assert {p.stem for p in (rte / "results/two/runs").glob("*.json")} == ids, "the same source, the same runs"
    settings = folder / "adapter.json"
    settings.write_text(settings.read_text() + "\n")
    assert main(again) == 0
    assert len(list((rte / "results/two/runs").glob("*.json"))) == 6, "another source, other runs"


@pytest.mark.usefixtures("rte")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["task=rte", "method.source=nowhere"], "method.source='nowhere': expected the folder of an adapter"),
        (["task=rte", "method.tasks=2"], "method.tasks=2: expected 1"),
        ([*MIX, "method.tasks=3"], "method.tasks=3: expected 2"),
    ],
)
def test_a_missing_source_or_wrong_count_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", "method=mpt", *TRAIN, *arguments]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
    assert not Path("results").exists()


@pytest.mark.usefixtures("rte")
def test_any_method_trains_on_a_mixture_and_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    text = ["model=tiny-gpt2", "task.formulation=text"]
    assert main(["sweep", "method=lora,mpt", *MIX, *TRAIN[1:], "train.max_length=64", *text]) == 0
    assert capsys.readouterr().err.strip() == ""
