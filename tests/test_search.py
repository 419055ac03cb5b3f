"""A search as a user types it, in one process: trials, records, studies, pruning, the file of the best."""

import json
import math
import sqlite3
from pathlib import Path

import optuna
import pytest
import sqlalchemy
import yaml
from optuna.trial import TrialState

from peftbench import job
from peftbench.__main__ import main
from peftbench.analysis.report import write_report
from peftbench.analysis.tables import terminal_tables
from peftbench.cli import search as commands
from peftbench.errors import UserError
from peftbench.search import STUDY_ATTRIBUTES, TRIAL_ATTRIBUTES, samplers
from peftbench.search.settings import SearchConfig
from peftbench.search.space import Axis
from peftbench.search.storage import open_storage
from peftbench.search.studies import About, Study
from peftbench.search.work import spent, values_of
from peftbench.store import Store

TINY = [
    *("model=tiny-bert", "task=tiny", "train.batch_size=8", "train.evaluate_every=1", "device=cpu", "results=out"),
    *("search.space=small", "pack=4"),
]
FOLDER = Path("out/search")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch, request):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(job, "_STOPPED", [])
    if "with_report" not in request.fixturenames:  # reports take longer than the searches
        monkeypatch.setattr(commands, "_report", lambda prepared, studies: None)
    return tmp_path


@pytest.fixture(autouse=True, scope="module")
def no_waiting_for_the_disk():
    """Let SQLite leave to the system when a study reaches the disk: its own waits are most of the time of a trial."""

    def connected(connection, _):
        if isinstance(connection, sqlite3.Connection):
            connection.execute("PRAGMA synchronous=OFF")

    sqlalchemy.event.listen(sqlalchemy.engine.Engine, "connect", connected)
    yield
    sqlalchemy.event.remove(sqlalchemy.engine.Engine, "connect", connected)


@pytest.fixture
def with_report():
    """Searches of this test end with their report."""


def search(*arguments, code=0):
    given = [a for a in TINY if a.partition("=")[0] not in {b.partition("=")[0] for b in arguments}]
    steps = [] if any(a.startswith("train.steps=") for a in arguments) else ["train.steps=3"]
    assert main(["search", *given, *steps, *arguments, "--quiet"]) == code


def study(method="lora", name="search", storage=None):
    storage = storage or f"sqlite:///out/{name}/search/study.db"
    return optuna.load_study(study_name=f"{name}-{method}-tiny-bert-tiny", storage=storage)


def records(folder=FOLDER):
    return {r["run_id"]: r for r in Store(folder).records()}


def params(method="lora", name="search"):
    return [t.params for t in study(method, name).trials]


def test_each_method_has_a_study_whose_trials_are_runs(capsys, with_report):
    search("method=lora,ia3", "search.trials=5", "search.batch=3")
    found = records()
    assert len(found) == 10
    for method in ("lora", "ia3"):
        one = study(method)
        assert set(STUDY_ATTRIBUTES) <= one.user_attrs.keys()
        assert one.user_attrs["method"] == method
        assert one.user_attrs["direction"] == one.direction.name.lower() == "maximize"
        assert [t.state for t in one.trials] == [TrialState.COMPLETE] * 5
        for trial in one.trials:
            assert set(TRIAL_ATTRIBUTES) <= trial.user_attrs.keys()
            record = found[trial.user_attrs["run_id"]]
            assert record["search"] == {"study": one.study_name, "trial": trial.number}
            assert trial.value == record["quality"]["validation"]["accuracy"]
            assert trial.params["train.learning_rate"] == record["spec"]["train"]["learning_rate"]
            evaluations = record["quality"]["evaluations"]
            assert trial.intermediate_values == {e["step"]: e["metrics"]["accuracy"] for e in evaluations}
            assert trial.user_attrs["step"] == 3
            assert trial.user_attrs["seconds"] > 0
    assert [t.params["method.rank"] for t in study().trials] == [
        found[t.user_attrs["run_id"]]["spec"]["method"]["rank"] for t in study().trials
    ]
    said = capsys.readouterr().out
    assert "best-lora.yaml" in said
    assert "studies: sqlite:///" in said
    assert f"report: {FOLDER.resolve() / 'search' / 'report' / 'report.md'}" in said
    assert (FOLDER / "search" / "report" / "report.md").exists()


def test_trials_of_a_batch_share_a_pack():
    search("method=lora", "search.trials=4", "search.batch=4")
    assert {r["pack"]["size"] for r in records().values()} == {4}


@pytest.mark.parametrize(("sampler", "alone"), [("tpe", 10), ("gp", 10), ("nsga2", 16), ("random", 10)])
def test_the_same_seed_gives_the_same_trials_and_another_others(sampler, alone):
    """The last two trials come after the random ones with which each sampler begins."""
    more = ["method=lora", f"search.sampler={sampler}", "pack=16", "train.steps=1"]
    batches = [f"search.batch={alone}", f"search.trials={alone + 2}"]
    search(*more, *batches, "sweep.name=a")
    search(*more, *batches, "sweep.name=b")
    search(*more, "sweep.name=c", "search.seed=1", "search.trials=2")
    assert params(name="a") == params(name="b")
    assert not any(p in params(name="a") for p in params(name="c"))
    assert len({json.dumps(p) for p in params(name="a")}) > 9  # not one trial again and again


@pytest.mark.parametrize(("sampler", "count"), [("tpe", 40), ("gp", 18), ("nsga2", 64)])
def test_samplers_learn_where_random_ones_do_not(sampler, count):
    """On a bowl around a learning rate of 1e-3 and a rank of 8, late trials of each are better than random ones."""
    axes = (Axis("train.learning_rate", 1e-6, 1.0, log=True), Axis("method.rank", 1, 64, log=True))

    def late(name):
        one = optuna.create_study(sampler=samplers.sampler(name, 0, axes), direction="maximize")
        for _ in range(count):
            trial = one.ask({axis.key: axis.distribution() for axis in axes})
            rate, rank = (trial.params[axis.key] for axis in axes)
            one.tell(trial, -((math.log10(rate) + 3) ** 2) - (math.log2(rank) - 3) ** 2)
        values = [t.value for t in one.trials]
        return sum(values[-count // 3 :]) / len(values[-count // 3 :])

    assert late(sampler) > 0.6 * late("random")


def test_more_trials_add_to_what_is_there_and_go_on_as_if_never_interrupted():
    search("method=lora", "search.trials=4", "search.batch=2", "sweep.name=a", "train.steps=1")
    first = records(Path("out/a"))
    before = study(name="a").trials
    search("method=lora", "search.trials=8", "search.batch=2", "sweep.name=a", "train.steps=1")
    search("method=lora", "search.trials=8", "search.batch=2", "sweep.name=b", "train.steps=1")
    assert params(name="a") == params(name="b")
    assert [t.datetime_complete for t in study(name="a").trials[:4]] == [t.datetime_complete for t in before]
    assert {k: v for k, v in records(Path("out/a")).items() if k in first} == first
    search("method=lora", "search.trials=8", "search.batch=2", "sweep.name=a", "train.steps=1")
    assert len(study(name="a").trials) == 8


def test_a_configuration_asked_for_twice_is_one_record():
    more = ["method=lora", "search.sampler=random", "search.trials=6", "search.batch=6", "train.steps=1"]
    search(*more, "method.rank=2,4", "train.learning_rate=1e-3,1e-2", "search.seed=1")
    ids = [t.user_attrs["run_id"] for t in study().trials]
    assert len(ids) == 6
    assert len(set(ids)) == len(records()) < 6
    assert all(t.state == TrialState.COMPLETE for t in study().trials)
    by_id = {t.user_attrs["run_id"]: t.value for t in study().trials}
    assert all(t.value == by_id[t.user_attrs["run_id"]] for t in study().trials)


def test_a_grid_tries_every_point_once():
    search("method=lora", "search.sampler=grid", "search.trials=6", "search.batch=4", "method.rank=2,4,8",
           "train.learning_rate=1e-3,1e-2", "train.steps=1")  # fmt: skip
    found = sorted((p["method.rank"], p["train.learning_rate"]) for p in params())
    assert found == [(r, lr) for r in (2, 4, 8) for lr in (1e-3, 1e-2)]


def test_a_search_of_something_else_by_the_same_name_is_refused(capsys):
    search("method=lora", "search.trials=1")
    for argument, said in [
        ("train.steps=4", "fixed train.steps=3, not train.steps=4"),
        ("search.sampler=random", "sampler tpe, not random"),
        ("search.seed=3", "seed 0, not 3"),
        ("search.space=learning_rate", "axes method.rank="),
    ]:
        search("method=lora", "search.trials=2", argument, code=2)
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
        assert "another sweep.name" in error
    assert len(study().trials) == 1


# The file of the best.


def test_the_best_is_written_and_trains_the_same_run_again(capsys):
    search("method=lora,ia3", "search.trials=4", "method.targets=[all],[attention.query]")
    path = FOLDER / "search" / "best-lora.yaml"
    best = study().best_trial
    written = yaml.safe_load(path.read_text())
    assert written["grids"] == [
        {
            "method": "lora",
            "method.rank": best.params["method.rank"],
            "method.targets": [best.params["method.targets"].split("+")],
            "train.learning_rate": best.params["train.learning_rate"],
        }
    ]
    assert path.read_text().startswith("# python -m peftbench sweep experiment=out/search/search/best-lora.yaml\n")
    capsys.readouterr()
    assert main(["sweep", f"experiment={path}", "results=again", "device=cpu", "profile=skip", "--quiet"]) == 0
    again = records(Path("again/search-best-lora"))
    assert list(again) == [best.user_attrs["run_id"]]
    (record,) = again.values()
    assert record["quality"]["validation"]["accuracy"] == pytest.approx(best.value, abs=1e-5)
    assert record["search"] is None
    assert "test" in record["quality"]


def test_an_experiment_by_file_is_named_after_it_and_missing_ones_are_told(capsys, here):
    (here / "mine.yaml").write_text("common: {model: tiny-bert, task: tiny, train.steps: 1}\ngrids: [{method: lora}]\n")
    assert main(["sweep", "experiment=mine.yaml", "results=out", "device=cpu", "profile=skip", "--quiet"]) == 0
    assert len(records(Path("out/mine"))) == 1
    assert main(["sweep", "experiment=nowhere.yaml"]) == 2
    assert "experiment=nowhere.yaml: no such file" in capsys.readouterr().err


def test_several_objectives_keep_what_none_beats():
    objectives = "search.objectives=quality,adapter_parameters,memory,time"
    search("method=lora", objectives, "search.sampler=nsga2", "search.trials=4", "profile=quick", "train.steps=2")
    found, one = records(), study()
    assert [d.name for d in one.directions] == ["MAXIMIZE", "MINIMIZE", "MINIMIZE", "MINIMIZE"]
    for trial in one.trials:
        cost = found[trial.user_attrs["run_id"]]["cost"]
        accuracy = found[trial.user_attrs["run_id"]]["quality"]["validation"]["accuracy"]
        seconds = 2 * cost["step_seconds"]["p50"]
        assert trial.values == pytest.approx([accuracy, cost["adapter_parameters"], cost["memory"]["peak"], seconds])
    ranks = {p["method.rank"] for p in params()}
    assert len(list((FOLDER / "profiles").iterdir())) == len(ranks)  # learning rates cost the same
    grids = yaml.safe_load((FOLDER / "search" / "best-lora.yaml").read_text())["grids"]
    assert [g["method.rank"] for g in grids] == [t.params["method.rank"] for t in
                                                 sorted(one.best_trials, key=lambda t: t.number)]  # fmt: skip
    assert any(g["method.rank"] == min(ranks) for g in grids)


def test_quality_is_of_validation_and_never_of_test():
    record = {"quality": {"primary_metric": "accuracy", "validation": {"accuracy": 0.25}, "test": {"accuracy": 0.75}}}
    assert values_of(record, ["quality", "time"]) == [0.25, None]


def test_seconds_of_a_trial_are_its_share_of_the_packs():
    record = {"pack": {"size": 4, "seconds": {"train": 6.0, "evaluate": 2.0}}, "trace": {"loss": [1.0] * 7}}
    assert spent(record) == {"seconds": 2.0, "step": 7}
    assert spent({}) == {"seconds": None, "step": 0}


# What goes wrong.


def test_a_run_that_diverges_is_a_trial_that_was_worse_than_any():
    search("method=full", "search.trials=2", "search.space=learning_rate", "train.learning_rate=1e38,1e37",
           "train.steps=6", "train.warmup=0.0", "train.clip_norm=0.0", code=1)  # fmt: skip
    one = study("full")
    assert {t.user_attrs["status"] for t in one.trials} == {"diverged"}
    assert {t.state for t in one.trials} == {TrialState.PRUNED}
    assert not (FOLDER / "search" / "best-full.yaml").exists()


def test_a_configuration_that_cannot_be_is_a_failed_trial_with_its_reason(capsys, here):
    # each value is possible, two of them together are not
    (here / "s.yaml").write_text("per_method: {compacter: {method.bottleneck: [12, 24], method.n: [4, 8]}}")
    search("method=compacter", "search.space=s.yaml", "search.sampler=grid", "search.trials=4", "train.steps=1", code=1)
    refused = [t for t in study("compacter").trials if t.user_attrs["status"] == "refused"]
    assert [t.params for t in refused] == [{"method.bottleneck": 12, "method.n": 8}]
    assert "multiple of n=8" in refused[0].user_attrs["error"]
    assert refused[0].state == TrialState.FAIL
    assert len(records()) == 3
    assert "refused" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argument",
    ["search.sampler=tpo", "search.storage=nowhere://x", "search.storage=sqlite:////proc/none/x.db", "protocol=paper"],
)
def test_a_search_leaves_nothing_behind_when_it_is_refused(argument, capsys):
    given = [a for a in TINY if not a.startswith("search.space")]  # whose default has a line to say of so small a model
    assert main(["search", *given, "train.steps=3", "method=lora", argument]) == 2
    assert not Path("out").exists()
    assert capsys.readouterr().err.count("\n") == 1


def test_what_is_shown_of_trials_is_of_validation(capsys):
    assert main(["search", *TINY, "train.steps=3", "method=lora", "search.trials=3", "search.batch=2"]) == 0
    said = capsys.readouterr().err
    assert "2 trials follow, 0 of 3 are done" in said
    assert "1 trial follows, 2 of 3 are done" in said
    for record in records().values():
        assert f"{record['run_id']}: validation accuracy {record['quality']['validation']['accuracy']:.4f}" in said


# Pruning.


def frozen(number, values, state=TrialState.RUNNING):
    trial = optuna.trial.create_trial(state=TrialState.WAITING, intermediate_values=values)
    trial.number = number
    trial.state = state
    return trial


class Fake:
    study_name = "fake"
    direction = optuna.study.StudyDirection.MAXIMIZE

    def __init__(self, *curves):
        self.trials = [frozen(i, dict(zip((10, 20, 30, 40), curve, strict=False))) for i, curve in enumerate(curves)]

    def get_trials(self, deepcopy=False):
        return self.trials


def test_halving_keeps_the_better_half_of_those_that_reached_a_rung():
    halving = samplers.Halving(10, 2)
    four = Fake([0.1], [0.4], [0.3], [0.2])
    assert [halving.prune(four, t) for t in four.trials] == [True, False, False, True]
    two = Fake([0.1], [0.4, 0.5], [0.3, 0.6], [0.2])
    assert [halving.prune(two, t) for t in two.trials[1:3]] == [True, False]
    ahead = Fake([0.1, 0.2, 0.9], [0.4, 0.5, 0.1])  # between the rungs at 20 and 40
    assert [halving.prune(ahead, t) for t in ahead.trials] == [False, False]
    ties = Fake([0.5], [0.5], [0.5])
    assert [halving.prune(ties, t) for t in ties.trials] == [False] * 3
    assert not halving.prune(Fake([0.1]), frozen(0, {}))


def test_halving_prunes_high_values_where_less_is_better():
    three = Fake([0.1], [0.4], [0.3])
    three.direction = optuna.study.StudyDirection.MINIMIZE
    assert [samplers.Halving(10, 3).prune(three, t) for t in three.trials] == [False, True, True]


def test_brackets_begin_to_prune_later_and_hold_fewer_trials():
    band = samplers.Hyperband(10, 90, 3)
    band.study = "fake"
    assert [p.first for p in band.pruners] == [10, 30, 90]
    counts = [0, 0, 0]
    for number in range(300):
        counts[band.bracket(frozen(number, {}))] += 1
    assert counts[0] > counts[1] > counts[2] > 0
    alone = [t for t in (frozen(i, {10: 0.1}) for i in range(20)) if band.bracket(t) == 1]
    assert not any(band.prune(Fake([0.9], [0.9]), t) for t in alone)  # its bracket's first rung is at 30


def test_the_median_of_complete_trials_prunes_what_lies_below_it(tmp_path):
    about = About("s", "lora", "m", "t", "accuracy", True, (Axis("train.learning_rate", 1e-4, 1e-2),), {})
    config = SearchConfig(pruner="median")
    one = Study(about, config, open_storage("sqlite", tmp_path), True)
    for trial, value in zip(one.ask(4), (0.1, 0.3, 0.5, 0.7), strict=True):
        one.report(trial, 10, value)
        assert not one.prunes(trial)  # too few are complete
        one.tell(trial, TrialState.COMPLETE, [value], {})
    worse, better = one.ask(2)
    one.report(worse, 10, 0.39)
    one.report(better, 10, 0.41)
    assert one.prunes(worse)
    assert not one.prunes(better)


@pytest.mark.parametrize("pruner", ["successive_halving", "hyperband"])
def test_pruned_trials_leave_the_pack_with_a_record(pruner, capsys):
    search("method=lora", f"search.pruner={pruner}", "search.trials=12", "search.batch=6", "train.steps=8",
           "train.learning_rate=tag(log,interval(1e-6,3))", "search.seed=1")  # fmt: skip
    one, found = study(), records()
    pruned = [t for t in one.trials if t.state == TrialState.PRUNED]
    assert pruned
    assert any(t.state == TrialState.COMPLETE for t in one.trials)
    for trial in pruned:
        record = found[trial.user_attrs["run_id"]]
        assert record["status"] == trial.user_attrs["status"] == "pruned"
        made = len(record["trace"]["loss"])
        assert made == max(trial.intermediate_values) < 8
        assert record["quality"]["stopped"]["step"] == made
        assert record["quality"]["stopped"]["reason"].startswith(f"pruned by {pruner}: accuracy")
        assert "test" not in record["quality"]
        assert record["quality"]["items"] == {}
        assert record["quality"]["evaluations"][-1]["step"] == made
    for trial in one.trials:
        if trial.state == TrialState.COMPLETE:
            assert found[trial.user_attrs["run_id"]]["quality"]["test"]
    assert one.best_trial.state == TrialState.COMPLETE


def test_neighbours_of_pruned_runs_train_as_without_them():
    more = ["method=lora", "train.steps=8", "search.trials=6", "search.batch=6", "search.sampler=random",
            "train.dropout=0.0", "train.learning_rate=tag(log,interval(1e-6,3))", "search.seed=1"]  # fmt: skip
    search(*more, "sweep.name=a")
    search(*more, "sweep.name=b", "search.pruner=successive_halving")
    whole, cut = records(Path("out/a")), records(Path("out/b"))
    assert whole.keys() == cut.keys()
    assert {r["status"] for r in cut.values()} == {"completed", "pruned"}
    for run_id, record in cut.items():
        losses = whole[run_id]["trace"]["loss"]
        assert record["trace"]["loss"] == pytest.approx(losses[: len(record["trace"]["loss"])], rel=1e-5)
        if record["status"] == "completed":
            assert record["quality"]["selected_step"] == whole[run_id]["quality"]["selected_step"]


def test_reports_leave_pruned_runs_out_and_count_them_and_a_sweep_completes_them():
    search("method=lora", "search.pruner=successive_halving", "search.trials=6", "search.batch=6", "train.steps=8",
           "search.seed=1", "train.learning_rate=tag(log,interval(1e-6,3))")  # fmt: skip
    found = list(records().values())
    pruned = [r for r in found if r["status"] == "pruned"]
    assert pruned
    report = write_report(found, FOLDER)[0].read_text()
    assert f"{len(pruned)} more were pruned by a search" in report
    assert not any(r["run_id"] in report for r in pruned)
    assert terminal_tables(pruned) == []
    with pytest.raises(UserError, match="were pruned by a search"):
        write_report(pruned, FOLDER)
    spec = pruned[0]["spec"]
    keys = [f"method.rank={spec['method']['rank']}", f"train.learning_rate={spec['train']['learning_rate']!r}"]
    given = [a for a in TINY if not a.startswith("search.")]
    assert main(["sweep", *given, *keys, "method=lora", "train.steps=8", "sweep.name=search", "profile=skip",
                 "--quiet"]) == 0  # fmt: skip
    again = records()[pruned[0]["run_id"]]
    assert again["status"] == "completed"
    assert len(again["trace"]["loss"]) == 8


def test_a_place_that_pruning_frees_is_taken_by_a_trial_that_waits():
    search("method=lora", "search.pruner=successive_halving", "search.trials=8", "search.batch=8", "train.steps=60",
           "train.evaluate_every=10", "pack=2", "search.seed=1",
           "train.learning_rate=tag(log,interval(1e-6,3))")  # fmt: skip
    packs = [r["pack"] for r in records().values()]
    assert {p["size"] for p in packs} == {2}
    assert {p["runs"] for p in packs} == {8}


# Storages.


def test_a_journal_holds_what_a_database_does():
    search("method=lora", "search.storage=journal", "search.trials=3", "train.steps=1")
    storage = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(FOLDER / "search" / "journal.log"))
    )
    one = study(storage=storage)
    assert [t.state for t in one.trials] == [TrialState.COMPLETE] * 3
    assert one.user_attrs["metric"] == "accuracy"


def test_a_database_is_named_by_its_url_and_shows_no_password(capsys):
    search("method=lora", "search.storage=sqlite:///elsewhere.db", "search.trials=1", "train.steps=1")
    assert study(storage="sqlite:///elsewhere.db").trials[0].state == TrialState.COMPLETE
    assert not (FOLDER / "search" / "study.db").exists()
    search("method=lora", "search.storage=mysql://me:secret@localhost/x", "search.trials=1", code=2)
    said = capsys.readouterr().err
    assert "me:***@localhost" in said
    assert "secret" not in said
