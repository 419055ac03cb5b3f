"""Verdicts on published figures: the rules on made-up numbers, protocol differences, records found, and the command."""

import json
import math
from typing import Any

import pytest

from peftbench import environment, published
from peftbench.__main__ import main
from peftbench.errors import UserError
from peftbench.published import Here, Metric, Paper, Protocol, Value
from peftbench.record import RunRecord
from peftbench.reproduce import pages
from peftbench.reproduce.protocol import differences, roles
from peftbench.reproduce.records import best_answer, configurations
from peftbench.reproduce.section import section
from peftbench.reproduce.verdicts import (
    DIFFERS,
    EXACT,
    MISMATCH,
    NOT_RUN,
    WITHIN,
    Difference,
    Measured,
    half_width,
    judge,
    published_half_width,
    reach,
)
from peftbench.store import Store
from tests.conftest import make_spec

PERCENT = Metric("accuracy %", "%", "accuracy", 100.0, "higher", 0.5, "drift")
SELECTED = "best on the reported split"
NONE = Protocol("", SELECTED, "mean", "none")


def row(value: str = "90.0", **changes: Any) -> Value:
    """Return a made-up row of LoRA on RoBERTa-base and RTE."""
    fields: dict[str, Any] = {
        "id": "made-up", "paper": Paper("made", "A. 2020", "T", "V", "2000.00000", ""), "table": "Table 1",
        "model": "roberta-base", "method": "LoRA", "settings": {"r": 8, "lr": 1e-3, "batch": 32, "epochs": 3},
        "task": "GLUE RTE (dev)", "metric": PERCENT, "value": value, "std": None, "seeds": 3, "trainable": "",
        "confidence": "high", "confirmed": "read", "notes": "", "protocol": NONE,
        "here": Here("roberta-base", "same", "lora", "rte", "validation", "test"),
    }  # fmt: skip
    return Value(**(fields | changes))


def ours(value: float, half: float | None = None) -> Measured:
    return Measured(value, half, (0, 1, 2), ("run-1",), "results/x", "lora")


def record(seed: int = 0, accuracy: float = 0.9, status: str = "completed", **changes: Any) -> RunRecord:
    """Return a record of LoRA on RoBERTa-base and RTE under the protocol of most papers."""
    spec = make_spec(
        seed=seed,
        protocol="paper",
        **{"model.name": "roberta-base", "model.weights": "pretrained", "task.name": "rte", **changes},
    )
    quality = {
        "primary_metric": "accuracy", "greater_is_better": True, "protocol": "paper", "data_subset": False,
        "validation": {"accuracy": accuracy}, "test": {"accuracy": accuracy},
        "evaluations": [{"step": 1, "metrics": {}}, {"step": 2, "metrics": {}}],
    }  # fmt: skip
    return RunRecord(spec.run_id, status, spec.to_dict(), quality=quality if status == "completed" else None)


def store(folder, records) -> str:
    """Write records; returns the folder."""
    made = Store(folder)
    made.prepare()
    for one in records:
        made.write(one)
    return str(folder)


# -- the rules ---------------------------------------------------------------------------------------------------------


def test_without_a_record_nothing_is_said():
    verdict = judge(row(), None, [], ["needs a GPU"])
    assert (verdict.verdict, verdict.reason) == (NOT_RUN, "needs a GPU")
    empty = Measured(90.0, None, (0,), (), "results/x", "lora")
    assert judge(row(), empty, [], ["needs a record"]).verdict == NOT_RUN


@pytest.mark.parametrize(("value", "verdict"), [(90.04, EXACT), (89.96, EXACT), (90.06, WITHIN)])
def test_equal_to_the_digits_printed_is_exact(value, verdict):
    assert judge(row("90.0"), ours(value, 0.01), [], []).verdict == verdict


def test_a_decisive_difference_in_protocol_goes_before_equal_numbers():
    decides = Difference("start", "the mnli adapter", "the pretrained model")
    noted = Difference("seeds", "5", "3", decides=False)
    assert judge(row(), ours(90.0), [decides], []).verdict == MISMATCH
    assert "mnli" in judge(row(), ours(90.0), [decides], []).reason
    assert judge(row(), ours(90.0), [noted], []).verdict == EXACT


@pytest.mark.parametrize(
    ("value", "half", "std", "verdict"),
    [
        (90.5, None, None, WITHIN),  # within the tolerance of half a point
        (90.6, None, None, DIFFERS),
        (91.0, 1.2, None, WITHIN),  # within our interval
        (91.5, 1.2, None, DIFFERS),
        (91.0, None, 0.5, WITHIN),  # within theirs: 4.303 · 0.5 / √3 = 1.24
        (91.5, None, 0.5, DIFFERS),
        (91.7, 1.2, 0.5, WITHIN),  # √(1.2² + 1.24²) = 1.73
        (91.8, 1.2, 0.5, DIFFERS),
    ],
)
def test_intervals_of_both_sides_count(value, half, std, verdict):
    assert judge(row("90.0", std=std), ours(value, half), [], []).verdict == verdict


def test_the_band_is_the_root_of_both_squares_and_the_rounding():
    verdict = judge(row("90.0", std=0.5), ours(91.7, 1.2), [], [])
    theirs = 4.302653 * 0.5 / math.sqrt(3)
    assert verdict.band == pytest.approx(math.hypot(1.2, theirs) + 0.05, rel=1e-6)
    assert verdict.difference == pytest.approx(1.7)


@pytest.mark.parametrize(
    ("better", "value", "word"),
    [("higher", 95.0, "better"), ("higher", 85.0, "worse"), ("lower", 95.0, "worse"), ("lower", 85.0, "better")],
)
def test_differs_says_which_way(better, value, word):
    metric = Metric("m", "u", "m", 1.0, better, 0.5, "x")
    assert judge(row(metric=metric), ours(value), [], []).reason.startswith(word)


def test_spreads_are_read_as_what_they_are():
    plain = published_half_width(row(std=0.6, seeds=4))
    assert plain == pytest.approx(3.182446 * 0.3, rel=1e-6)
    median = row(std=0.6, seeds=4, protocol=Protocol("", SELECTED, "median", "none"))
    assert published_half_width(median) == pytest.approx(plain * math.sqrt(math.pi / 2))
    error = row(std=0.3, seeds=4, protocol=Protocol("", "", "mean", "none", "standard error"))
    assert published_half_width(error) == pytest.approx(plain)
    quartiles = row(std=0.6 * 1.349, seeds=4, protocol=Protocol("", "", "mean", "none", "interquartile range"))
    assert published_half_width(quartiles) == pytest.approx(plain)
    assert published_half_width(row(std=0.6, seeds=None)) == pytest.approx(1.959964 * 0.6, rel=1e-5)
    assert published_half_width(row(std=None)) is None
    assert published_half_width(row(std=0.6, seeds=1)) is None


def test_our_interval_is_students():
    assert half_width([1.0, 2.0, 3.0]) == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert half_width([1.0, 2.0, 3.0], "median") == pytest.approx(4.302653 / math.sqrt(3) * 1.2533141, rel=1e-6)
    assert half_width([1.0]) is None
    assert reach(1.0, 4) == pytest.approx(2.776445, rel=1e-6)


# -- protocol ----------------------------------------------------------------------------------------------------------


def found(made: Value, one: RunRecord, seeds: int = 3) -> dict[str, bool]:
    return {d.what: d.decides for d in differences(made, one.to_dict(), seeds)}


def test_a_run_like_the_row_differs_in_nothing():
    assert found(row(), record()) == {}


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"train.learning_rate": 2e-3}, "learning_rate"),
        ({"train.batch_size": 16}, "batch_size"),
        ({"train.epochs": 4.0}, "epochs"),
        ({"method.rank": 4}, "rank"),
        ({"model.weights": "random"}, "model"),
    ],
)
def test_what_decides_is_found(changes, what):
    assert found(row(), record(**changes)) == {what: True}


def test_selection_split_start_and_data_decide():
    held = record().to_dict()
    held["quality"]["protocol"] = "held_out"
    assert [d.what for d in differences(row(), held, 3)] == ["selection of the step"]
    last = record().to_dict()
    last["quality"]["evaluations"] = [{"step": 2, "metrics": {}}]
    assert differences(row(), last, 3)[0].ours == "last"
    start = row(protocol=Protocol("", SELECTED, "mean", "mnli: mrpc rte"))
    assert found(start, record()) == {"start": True}
    from_mnli, from_elsewhere = (record(**{"train.start": "kept", "train.start_task": t}) for t in ("mnli", None))
    assert not found(start, from_mnli)
    assert found(start, from_elsewhere) == {"start": True}
    assert found(row(), from_mnli) == {"start": True}
    server = row(here=Here("roberta-base", "same", "lora", "rte", "test server", "test"))
    assert found(server, record()) == {"reported split": True}
    part = record().to_dict()
    part["quality"]["data_subset"] = True
    assert [d.what for d in differences(row(), part, 3)] == ["data"]


def test_facts_that_are_not_stated_are_noted_but_do_not_decide():
    silent = row(settings={}, seeds=None, protocol=Protocol())
    notes = found(silent, record())
    assert set(notes) == {
        "selection of the step", "start", "learning_rate", "batch_size", "length of training", "seeds"
    }  # fmt: skip
    assert not any(notes.values())
    words = row(settings={"r": 8, "lr": "swept 1e-4..1e-3", "batch": 32, "epochs": "up to 16"})
    assert found(words, record()) == {"learning_rate": False, "epochs": False}


def test_the_head_s_own_rate_is_compared_with_the_one_it_trains_at():
    two = row(settings=row().settings | {"lr_head": 4e-3})
    name = "learning rate of the head"
    assert found(two, record()) == {name: True}
    assert not found(two, record(**{"train.head_learning_rate": 4e-3}))
    assert found(two, record(**{"train.head_learning_rate": 3e-3})) == {name: True}
    rate = record().spec["train"]["learning_rate"]
    assert not found(row(settings=row().settings | {"lr_head": rate}), record())
    assert found(row(), record(**{"train.head_learning_rate": 4e-3})) == {name: False}
    assert not found(row(), record(**{"train.head_learning_rate": rate}))


def test_what_cannot_be_given_here_decides_and_what_is_not_compared_is_noted():
    extra = {"lr_head": 4e-3, "init_weights": "zero", "beam": 10, "variant": "d init 1.0", "rank_dropout": 0.1}
    assert found(row(settings=row().settings | extra), record()) == {
        "learning rate of the head": True, "initialisation": True, "beams of generated texts": True, "variant": True,
        "rank_dropout": False,
    }  # fmt: skip
    same = {"lr_head": 1e-3, "init_weights": True, "variant": "the default", "optimizer": "AdamW"}
    assert found(row(settings=row().settings | same), record()) == {}


def test_smoothing_and_generation_are_compared_and_go_without_where_nobody_says():
    stated = {"label_smoothing": 0.1, "beam": 10, "length_penalty": 0.8, "no_repeat_ngram": 4}
    ours = {"train.label_smoothing": 0.1, "task.beams": 10, "task.length_penalty": 0.8, "task.no_repeat_ngram": 4}
    names = ("label smoothing", "beams of generated texts", "length penalty", "n-grams that come once")
    made = row(settings=row().settings | stated)
    assert found(made, record(**ours)) == {}
    assert found(made, record()) == dict.fromkeys(names, True)
    for name, key in zip(names, ours, strict=True):
        assert found(made, record(**ours | {key: 1})) == {name: True}
    assert found(row(), record(**ours)) == dict.fromkeys(names, False)
    worded = row(settings=row().settings | stated | {"length_penalty": "0.9 (paper) / 0.8 (README)"})
    assert found(worded, record(**ours)) == {"length penalty": False}


def test_feed_forward_targets_are_compared_apart():
    given = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    made = row(settings=row().settings | given)
    mine = {"method.targets": ["attention.key", "attention.value"], "method.feedforward": ["mlp.down"]}
    assert found(made, record(**mine)) == {}
    assert found(made, record(**mine | {"method.feedforward": ["mlp.up"]})) == {"feedforward": True}


def test_targets_are_compared_as_roles():
    assert roles("Wq,Wv") == roles(["attention.query", "attention.value"]) == roles(["q_proj", "v_proj"])
    assert roles("q,v of c_attn") is None
    made = row(settings=row().settings | {"target": "query,key"})
    mine = {"method.targets": ["attention.query", "attention.value"]}
    assert found(made, record(**mine)) == {"targets": True}


# -- records -----------------------------------------------------------------------------------------------------------


def test_seeds_of_one_configuration_answer_a_row_together(tmp_path):
    folder = store(tmp_path / "r" / "a", [record(s, 0.89 + 0.01 * s) for s in range(3)])
    measured, notes = best_answer(row(), configurations([tmp_path / "r"]))
    assert notes == []
    assert measured.value == pytest.approx(90.0)
    assert measured.half_width == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert len(measured.records) == 3
    assert measured.folder == folder


def test_the_closest_protocol_answers_and_scores_play_no_part(tmp_path):
    near = [record(s, 0.5) for s in range(2)]
    far = [record(s, 0.99, **{"train.learning_rate": 5e-3}) for s in range(3)]
    store(tmp_path / "a", near + far)
    measured, notes = best_answer(row(), configurations([tmp_path / "a"]))
    assert measured.value == pytest.approx(50.0)
    assert [d.what for d in notes] == ["seeds"]


def test_among_equals_validation_chooses(tmp_path):
    silent = row(settings={"r": 8, "batch": 32, "epochs": 3})
    good, bad = record(0, 0.7, **{"train.learning_rate": 5e-3}), record(0, 0.9)
    good.quality["validation"]["accuracy"] = 0.99
    store(tmp_path / "a", [good, bad])
    measured, _ = best_answer(silent, configurations([tmp_path / "a"]))
    assert measured.value == pytest.approx(70.0)


def test_runs_that_did_not_complete_are_counted_but_give_nothing(tmp_path):
    store(tmp_path / "a", [record(0, 0.9), record(1, status="diverged")])
    measured, _ = best_answer(row(), configurations([tmp_path / "a"]))
    assert (measured.seeds, measured.incomplete) == ((0,), 1)
    store(tmp_path / "b", [record(1, status="failed")])
    assert best_answer(row(), configurations([tmp_path / "b"])) == (None, [])


def test_other_tasks_models_and_methods_do_not_answer(tmp_path):
    others = [record(0, **{"task.name": "mrpc"}), record(0, **{"model.name": "bert-base"})]
    others.append(record(0, **{"method.name": "dora"}))
    store(tmp_path / "a", others)
    assert best_answer(row(), configurations([tmp_path / "a"])) == (None, [])


def test_metrics_may_be_joined(tmp_path):
    one = record(0)
    one.quality["test"] = {"accuracy": 0.8, "f1": 0.9}
    one.quality["test_mismatched"] = {"accuracy": 0.6}
    store(tmp_path / "a", [one])
    (configuration,) = configurations([tmp_path / "a"])
    assert configuration.scores("test", "accuracy+f1") == {0: pytest.approx(0.85)}
    assert configuration.scores("test", "accuracy@test+test_mismatched") == {0: pytest.approx(0.7)}
    assert configuration.scores("test", "bleu|f1") == {0: 0.9}
    assert configuration.scores("test", "bleu") == {}


def test_folders_that_hold_other_things_are_left_out_with_a_word(tmp_path):
    import gzip

    store(tmp_path / "good", [record()])
    (tmp_path / "other").mkdir()
    with gzip.open(tmp_path / "other" / "records.jsonl.gz", "wt") as file:
        file.write('{"predicted": 1}\n')
    told: list[str] = []
    assert len(configurations([tmp_path], told.append)) == 1
    assert "other" in told[0]
    with pytest.raises(UserError, match="unreadable"):
        configurations([tmp_path / "other"])
    with pytest.raises(UserError, match="no such folder"):
        configurations([tmp_path / "none"])


# -- the registry's own rows, and the command --------------------------------------------------------------------------


def fitting(row_id: str, seeds: int = 5, shift: float = 0.0) -> list[RunRecord]:
    """Return records made up to fit a row of the registry in everything, `shift` points beside it."""
    made = published.values()[row_id]
    s = made.settings
    changes = {
        "model.name": made.here.model, "model.checkpoint": made.model, "task.name": made.here.task,
        "method.name": made.here.method, "method.rank": s["r"], "method.alpha": s["alpha"],
        "method.targets": ["attention.query", "attention.value"], "train.learning_rate": s["lr"],
        "train.batch_size": s["batch"], "train.epochs": s["epochs"], "train.max_length": s["seq"],
        "train.schedule": "linear", "train.warmup": 0.06,
    }  # fmt: skip
    return [record(seed, (made.number + shift) / 100, **changes) for seed in range(seeds)]


def test_a_dagger_row_of_lora_can_be_exact_and_can_differ(tmp_path):
    name = "lora-t2-roberta-large-loralr-rte"
    rows = [published.values()[name]]
    store(tmp_path / "same", fitting(name))
    (one,) = pages.judged(rows, configurations([tmp_path / "same"]))
    assert (one.verdict.verdict, list(one.differences)) == (EXACT, [])
    store(tmp_path / "worse", fitting(name, shift=-5.0))
    (one,) = pages.judged(rows, configurations([tmp_path / "worse"]))
    assert one.verdict.verdict == DIFFERS
    assert one.verdict.reason.startswith("worse by 5")


def test_a_row_that_starts_from_mnli_is_a_mismatch(tmp_path):
    name = "lora-t2-roberta-large-loral-rte"
    store(tmp_path / "a", fitting(name))
    (one,) = pages.judged([published.values()[name]], configurations([tmp_path / "a"]))
    assert one.verdict.verdict == MISMATCH
    assert one.verdict.reason.startswith("start: the mnli adapter there")


def test_no_verdict_without_a_record_anywhere():
    for one in pages.judged(published.chosen(["all"]), []):
        assert (one.verdict.verdict, one.records) == (NOT_RUN, ())
        assert one.verdict.reason


def test_json_is_a_list_of_rows(tmp_path, capsys):
    name = "lora-t2-roberta-large-loralr-rte"
    folder = store(tmp_path / "a", fitting(name, shift=0.3))
    assert main(["reproduce", "lora-t2-roberta-large-loralr-", "--results", folder, "--json"]) == 0
    plain = {r["id"]: r for r in json.loads(capsys.readouterr().out)}
    assert len(plain) == 9
    assert set(plain[name]) >= {"id", "published", "measured", "verdict", "record"}
    assert plain[name]["verdict"] == WITHIN
    assert len(plain[name]["record"]) == 5
    assert plain[name]["measured"]["low"] <= plain[name]["measured"]["value"] <= plain[name]["measured"]["high"]
    others = [r for k, r in plain.items() if k != name]
    assert all(r["verdict"] == NOT_RUN and r["record"] is None for r in others)


@pytest.mark.parametrize("form", [[], ["--markdown"], ["--latex"]])
def test_pages(form, tmp_path, capsys):
    folder = store(tmp_path / "a", fitting("lora-t2-roberta-large-loralr-rte"))
    assert main(["reproduce", "lora-t2-roberta-large-loralr-", "--results", folder, *form]) == 0
    out = capsys.readouterr().out
    assert "exact" in out
    assert "85.2" in out
    if form == ["--markdown"]:
        assert "arXiv:2106.09685" in out
    if form == ["--latex"]:
        assert "\\begin{tabular}" in out


def test_lists(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", "--list"]) == 0
    assert "arXiv:2310.11454" in capsys.readouterr().out
    assert main(["reproduce", "--list", "--json"]) == 0
    papers = {p["paper"]: p for p in json.loads(capsys.readouterr().out)}
    assert sum(p["rows"] for p in papers.values()) == len(published.values())
    assert sum(p["claims"] for p in papers.values()) == len(published.claims())
    assert papers["rslora"]["experiments"] == ["claims-rslora"]
    assert main(["reproduce", "vera", "--list", "--json"]) == 0
    rows = [r["id"] for r in json.loads(capsys.readouterr().out)]
    assert (len(rows), rows[-1]) == (71 + 1, "vera-par")
    assert main(["reproduce", "vera", "--list"]) == 0
    out = capsys.readouterr().out
    assert "71 rows" in out
    assert NOT_RUN not in out
    assert main(["reproduce", "counts", "GPT-3 175B", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {r["verdict"] for r in rows} == {"exact", "not run here"}
    assert main(["reproduce", "claims", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert all((r["verdict"] == NOT_RUN) == (r["record"] is None) for r in rows)
    assert {r["id"] for r in rows} == {*published.claims(), *published.reasons()}


def test_a_claim_is_a_row_too(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def ids(*names: str) -> list[str]:
        assert main(["reproduce", *names, "--json"]) == 0
        rows = json.loads(capsys.readouterr().out)
        assert all({"id", "published", "measured", "verdict", "record"} <= set(r) for r in rows)
        return [r["id"] for r in rows]

    assert ids("folk-merged") == ["folk-merged"]
    assert ids("folk-") == ids("folk")
    assert ids("regret-ratio") == ["regret-ratio"]
    assert ids("loraplus-gain") == ["loraplus-gain"]  # as it is called in both
    assert ids("rslora") == ["rslora-gamma", "rslora-rank"]
    assert "regret-ratio" not in ids("without-regret")  # its row is there
    every = ids("all")
    assert len(every) == len(set(every))
    assert set(every) >= {*published.values(), "folk-merged", "lora-gap"}
    assert main(["reproduce", "folk-merged", "--markdown"]) == 0
    assert capsys.readouterr().out.startswith("# Claims\n\n| claim |")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lorra"], "no such paper or row; did you mean 'lora'?"),
        (["counts", "gpt-9"], "no such count"),
        (["claims", "x"], "claims takes no further name"),
        (["dora", "--run"], "there is no experiment reproduce-dora; its claims have claims-methods"),
        (["tinker", "--run"], "there is no experiment reproduce-tinker to run (there are claims-lora, "),
        (["lwr-rl-bits", "--run"], "no training decides it"),
        (["claims-memory", "--run"], "no sweep; it is measured by"),
        (["folk", "--run"], "no sweep; it is measured by"),
        (["folk-merged", "--run"], "no sweep; it is measured by"),
        (["--run"], "--run: expected one paper"),
        (["lora", "--list", "--run"], "--list: expected without --run"),
        (["lora", "--rate", "1e15"], "--rate 1e+15: expected with --cost or --run"),
        (["lora", "--cost", "--rate", "-1"], "expected FLOP/s above 0"),
        (["lora", "--results", "nowhere"], "--results nowhere: no such folder"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_run_says_what_it_costs_and_trains(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "experiments" / "reproduce-minilm"
    folder.mkdir(parents=True)
    grid = "model: tiny-bert, method: lora, task: tiny, train.steps: 1, train.batch_size: 2, profile: skip"
    (folder / "experiment.yaml").write_text(f"grids:\n- {{{grid}}}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(environment, "pick_device", lambda device: "cpu")
    assert main(["reproduce", "minilm", "--run"]) == 0
    cost, note, *_ = capsys.readouterr().err.splitlines()
    assert cost.startswith("reproduce-minilm: 1 runs, 1 steps")
    assert note.startswith("no GPU here: it trains on the CPU")
    assert len(list((tmp_path / "results" / "reproduce-minilm" / "runs").glob("*.json"))) == 1


def test_all_tells_the_whole_cost_and_passes_over_what_cannot_start(tmp_path, monkeypatch, capsys):
    for name, model in (("a", "tiny-bert"), ("b", "roberta-large")):
        folder = tmp_path / "experiments" / f"reproduce-{name}"
        folder.mkdir(parents=True)
        grid = f"model: {model}, method: lora, task: tiny, train.steps: 1, train.batch_size: 2, profile: skip"
        (folder / "experiment.yaml").write_text(f"grids:\n- {{{grid}}}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(environment, "pick_device", lambda device: "cpu")
    monkeypatch.setattr("peftbench.cli.reproduce._ready", lambda: ["reproduce-a", "reproduce-b"])
    started = []

    def sweep(overrides):
        started.append(overrides)
        if overrides == ["experiment=reproduce-a"]:
            raise UserError("no weights")
        return 0

    monkeypatch.setattr("peftbench.cli.sweep.sweep", sweep)
    assert main(["reproduce", "all", "--run"]) == 2
    first, second, whole, _, left = capsys.readouterr().err.splitlines()
    assert first.startswith("reproduce-a: 1 runs")
    assert second.startswith("reproduce-b: 1 runs")
    assert whole.startswith("all: 2 runs, ")
    assert left == "left out: reproduce-a: no weights"
    assert started == [["experiment=reproduce-a"], ["experiment=reproduce-b"]]
    assert main(["reproduce", "all", "--cost", "--json"]) == 0
    assert [c["experiment"] for c in json.loads(capsys.readouterr().out)] == ["reproduce-a", "reproduce-b"]


def test_verdicts_load_without_torch():
    import subprocess
    import sys

    code = "import sys, peftbench.reproduce.pages; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_report_has_the_published_figures_that_its_runs_answer():
    """lora-t2-roberta-base-lora-rte is answered, by another protocol; no other model's and no other task's row is."""
    made = section([record(seed, 0.86).to_dict() for seed in range(3)], "results/x")
    (table,) = made.tables
    cells = {cells[0]: cells for cells in table.rows}
    assert "lora-t2-roberta-base-lora-rte" in cells
    assert cells["lora-t2-roberta-base-lora-rte"][4] == MISMATCH
    assert all("rte" in name and "roberta-base" in name for name in cells)
    assert any(line.startswith("**lora**: Hu et al. 2021") for line in made.text)
    assert section([record(0, status="diverged").to_dict()], "results/x") is None
    assert section([record(0, **{"model.name": "tiny-bert"}).to_dict()], "results/x") is None
