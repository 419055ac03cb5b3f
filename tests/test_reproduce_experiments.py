"""The experiments that would reproduce published rows: they compose, say what the registry says, and train a step."""

import os
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from peftbench import published, registry, resolve
from peftbench.plan import points
from peftbench.progress import Quiet
from peftbench.record import canonical
from peftbench.reproduce import budget
from peftbench.reproduce.protocol import METHOD_KEYS, TRAIN_KEYS
from peftbench.reproduce.protocol import differences as protocol_differences
from peftbench.resolve import Resolver, demand
from peftbench.run import run_pack
from peftbench.store import Store
from tests.conftest import make_record

OURS = sorted(n for n in registry.experiments() if n.startswith(("reproduce-", "claims-")))
PAPERS = [n for n in OURS if n.startswith("reproduce-")]


def all_points(name: str) -> list[dict[str, Any]]:
    asked = demand({}, name)
    methods = {str(m) for g in asked.grids for m in g["method"]}
    return points(asked, {m: registry.declared(m) for m in methods})[0]


@pytest.mark.parametrize("name", OURS)
def test_the_cost_is_known_before_anything_starts(name):
    cost = budget.cost(name)
    assert cost.runs == len(all_points(name))
    assert cost.flops > 0
    assert not cost.unknown
    assert cost.hours == pytest.approx(cost.flops / budget.RATE / 3600)
    twice = budget.cost(name, 2 * budget.RATE)
    assert twice.hours == pytest.approx(cost.hours / 2)
    assert f"{cost.runs:,} runs" in cost.lines()[0]


def test_the_cost_of_one_run_by_hand(tmp_path, monkeypatch):
    folder = tmp_path / "experiments" / "reproduce-one"
    folder.mkdir(parents=True)
    text = (
        "grids:\n- {model: roberta-base, method: lora, task: rte, train.batch_size: 32, train.epochs: 2, "
        "train.max_length: 128}\n- {model: roberta-base, method: lora, task: movie-reviews, train.epochs: 2}\n"
    )
    (folder / "experiment.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    cost = budget.cost("reproduce-one")
    layers = 12 * (4 * 768 * 768 + 2 * 768 * 3072)
    adapter = 12 * 2 * 8 * 2 * 768
    tokens = 2 * 78 * 32 * 128  # 2,490 rows make 78 batches
    assert cost.tokens == tokens
    assert cost.steps == 156
    assert cost.flops == tokens * (4 * layers + 6 * adapter)
    assert cost.unknown == ("movie-reviews",)
    assert len(cost.lines()) == 2
    (folder / "experiment.yaml").write_text(text.replace("train.epochs: 2", "train.steps: 10"))
    cost = budget.cost("reproduce-one")
    assert (cost.runs, cost.steps, cost.unknown) == (2, 20, ())  # steps need no sizes


def family(model: str) -> str:
    """Return the tiny model of the same family."""
    wanted = registry.section("model", model)["family"]
    return next(
        n
        for n in registry.options("model")
        if n.startswith("tiny-") and registry.section("model", n)["family"] == wanted
    )


SMALL = {"rank": 4, "bottleneck": 4, "length": 3, "frequencies": 20, "hidden": 8, "group_size": 4, "block_size": 4}
SMALL |= {"init_rank": 4, "target_rank": 2, "factor": 2, "factors": 1}


def shrunk(point: dict[str, Any]) -> dict[str, list[Any]]:
    """Return a point on the tiny model of its family and the tiny task, with sizes that fit, for one step."""
    kept = {k: v for k, v in point.items() if not k.startswith(("model.", "task.", "profile"))}
    text = registry.section("model", str(point["model"]))["kind"] == "decoder"
    kept |= {"model": family(str(point["model"])), "task": "tiny", "profile": "skip", "train.steps": 1}
    kept |= {"task.formulation": "text"} if text else {}
    kept |= {"train.max_length": 64, "train.batch_size": 2, "train.precision": "fp32", "seed": 0}
    kept["train.execution"] = "eager"
    elsewhere = ("train.epochs", "train.evaluate_every", "train.accumulation", "train.start", "train.start_task")
    kept = {k: v for k, v in kept.items() if k not in elsewhere}
    for key, most in SMALL.items():
        if isinstance(kept.get(f"method.{key}"), int):
            kept[f"method.{key}"] = min(kept[f"method.{key}"], most)
    return {k: [v] for k, v in kept.items()}


@pytest.mark.parametrize("name", OURS)
def test_a_step_of_every_method_trains_on_a_tiny_model(name, tmp_path):
    """One point of each grid that differs in method, model or settings of the method."""
    seen: dict[str, tuple[dict[str, list[Any]], bool]] = {}
    for point in all_points(name):
        small = shrunk(point)
        kind = canonical({k: v for k, v in small.items() if k in ("model", "method") or k.startswith("method.targets")})
        seen.setdefault(kind, (small, "train.start" in point))
    assert seen
    for small, starts in seen.values():
        (spec,) = resolve.plan(resolve.demand(small, None), "cpu").specs
        if starts:
            run_pack([spec], Store(tmp_path), Quiet(), save_adapters=True)
            small |= {"train.start": [str(tmp_path)], "train.start_task": ["tiny"]}
            (spec,) = resolve.plan(resolve.demand(small, None), "cpu").specs
        (record,) = run_pack([spec], Store(tmp_path), Quiet())
        assert record.status == "completed", record.error
        assert record.spec["protocol"] == small["protocol"][0]


def rows_of(name: str) -> list[published.Value]:
    """Return the rows that an experiment aims at: those with numbers and settings that name a learning rate."""
    paper = name.removeprefix("reproduce-").partition("-")[0]
    rows = [v for v in published.chosen([paper]) if v.here.model and v.here.method and v.here.task and v.metric.ours]
    return [v for v in rows if budget.experiment_of(v) == name]


AIMED = {
    "reproduce-lora": (
        "lora-t2-roberta-base-lora-",
        "lora-t2-roberta-large-loral-",
        "lora-t2-roberta-large-loralr-",
    ),
    "reproduce-lora-from-mnli": ("lora-t2-roberta-base-lora-", "lora-t2-roberta-large-loral-"),
    "reproduce-lora-e2e": ("lora-t3-gpt2-medium-lora-0.35m-",),
    "reproduce-vera": ("vera-t2-",),
    "reproduce-adalora": ("adalora-t1-adalora-1.27m-",),
    "reproduce-bitfit": ("bitfit-t1-",),
    "reproduce-houlsby": ("houlsby-t1-adapter-",),
    "reproduce-metamathqa": ("mm-",),
}
DECIDED = {
    # what the experiments' READMEs say is not the same
    "reproduce-houlsby": {"reported split"},
}


def test_every_paper_with_an_experiment_says_so():
    assert set(AIMED) == set(PAPERS)
    assert budget.experiments_of("lora") == ["reproduce-lora", "reproduce-lora-e2e", "reproduce-lora-from-mnli"]
    rows = published.values()
    assert budget.experiment_of(rows["lora-t2-roberta-base-lora-cola"]) == "reproduce-lora"
    assert budget.experiment_of(rows["lora-t2-roberta-base-lora-rte"]) == "reproduce-lora-from-mnli"
    assert budget.experiment_of(rows["lora-t2-roberta-large-loralr-rte"]) == "reproduce-lora"
    assert budget.experiment_of(rows["lora-t3-gpt2-medium-lora-0.35m-bleu"]) == "reproduce-lora-e2e"
    assert budget.experiment_of(rows["dora-t5-llama-7b-lora"]) is None


@pytest.mark.parametrize(
    ("row", "experiment"),
    [
        ("adalora-t1-adalora-1.27m-rte", "reproduce-adalora"),
        ("adalora-t1-adalora-0.32m-rte", None),  # of rank 2
        ("adalora-t1-lora-1.33m-cola", None),  # another method
        ("lora-t2-roberta-base-fb-cola", None),
        ("lora-t2-roberta-large-loralr-rte", "reproduce-lora"),  # not from MNLI
        ("lora-t2-roberta-large-fl-rte", None),  # from MNLI, another method
    ],
)
def test_a_command_is_named_for_what_it_trains_alone(row, experiment):
    assert budget.experiment_of(published.values()[row]) == experiment


def test_adapters_are_kept_where_another_experiment_starts_from_them():
    assert [n for n in OURS if budget.starts_others(n)] == ["reproduce-lora"]


@pytest.mark.parametrize("name", PAPERS)
def test_an_experiment_s_runs_would_differ_from_its_rows_in_nothing_but_what_it_says(name):
    """A record made up for each point: for each row some point differs in what the README says, and in no more."""
    resolver, specs = Resolver("cpu"), []
    for point in all_points(name):
        if point["seed"] == 0:
            spec, _ = resolver.sketch(point)
            specs.append((spec, point))
    aimed = [v for v in rows_of(name) if v.id.startswith(AIMED[name])]
    aimed = [v for v in aimed if not isinstance(v.settings.get("init_weights"), str)]  # starts that are not here
    assert len(aimed) >= 2
    reached = 0
    for row in aimed:
        best: set[str] | None = None
        for spec, point in specs:
            names = (spec.model["name"], spec.method["name"], str(point["task"]))
            if names != (row.here.model, row.here.method, row.here.task):
                continue
            record = made_up(spec, point)
            found = {d.what for d in protocol_differences(row, record, 5) if d.decides}
            best = found if best is None or len(found) < len(best) else best
        if best is not None:
            reached += 1
            assert best <= DECIDED.get(name, set()), row.id
    assert reached >= len(aimed) * 3 // 4, "most of the rows are aimed at"


def made_up(spec: Any, point: dict[str, Any]) -> dict[str, Any]:
    """Return a record of a point as a run would leave it."""
    record = make_record(spec).to_dict()
    record["spec"]["train"]["learning_rate"] = point.get("train.learning_rate", spec.train["learning_rate"])
    record["spec"]["task"] |= {k.removeprefix("task."): v for k, v in point.items() if k.startswith("task.")}
    record["spec"]["identity"] = {"weights": "some digest"}
    last = point.get("train.evaluate_every") is not None
    steps = [1] if last else [1, 2]
    record["quality"] |= {"protocol": point["protocol"], "evaluations": [{"step": s, "metrics": {}} for s in steps]}
    return record


def test_settings_of_the_rows_are_those_of_the_vocabulary():
    for ours in METHOD_KEYS.values():
        assert any(ours in registry.declared(m) for m in registry.options("method")), ours
    train = registry.section("train", "default")
    assert set(TRAIN_KEYS.values()) <= set(train)


# -- MetaMathQA --------------------------------------------------------------------------------------------------------


@pytest.fixture
def metamathqa(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "instruct"
    for name in ("metamathqa", "gsm8k"):
        (folder / name).mkdir(parents=True)
    queries = [f"What is {i} plus {i}?" for i in range(40)]
    responses = [f"Adding gives {i} + {i}.\n#### {2 * i}\nThe answer is: {2 * i}" for i in range(40)]
    pd.DataFrame({"query": queries, "response": responses}).to_parquet(folder / "metamathqa" / "train.parquet")
    tests = {"question": ["What is 1 plus 1?"], "answer": ["It is <<1+1=2>>2.\n#### 2"]}
    pd.DataFrame(tests).to_parquet(folder / "gsm8k" / "test.parquet")
    monkeypatch.setenv("PEFTBENCH_DATA", os.fspath(tmp_path))
    return tmp_path


def test_metamathqa_trains_on_its_own_rows_and_tests_on_gsm8k(metamathqa):
    task = registry.build_task(registry.section("task", "metamathqa"))
    held, paper = task.splits("held_out"), task.splits("paper")
    assert len(held["train"]) + len(held["validation"]) == len(paper["train"]) == 40
    assert paper["validation"] == paper["test"] == held["test"]
    prompt, answer = task.prompt_answer(paper["train"][3])
    assert "What is 3 plus 3?" in prompt
    assert answer.endswith("The answer is: 6")
    assert task.references(held["test"]) == ["2"]
    assert task.parse("so 1 + 1 = 2. The answer is: 2") == "2"
    assert task.metrics([task.parse("The answer is: 2.0")], ["2"]) == {"exact_match": 1.0}
    assert task.primary_metric == "exact_match"


def test_metamathqa_s_fingerprint_covers_both_files(metamathqa):
    task = registry.build_task(registry.section("task", "metamathqa"))
    before = task.data_fingerprint()
    tests = {"question": ["What is 2 plus 2?"], "answer": ["#### 4"]}
    pd.DataFrame(tests).to_parquet(metamathqa / "instruct" / "gsm8k" / "test.parquet")
    assert task.data_fingerprint() != before
