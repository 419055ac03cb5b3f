"""Equal budgets: what each holds equal, what it refuses or leaves out, and a search from its command to its report."""

import dataclasses
import json

import pytest

from peftbench.__main__ import main
from peftbench.analysis.search_report import Entry, Plan, compared, equal_budget_table, read_plan, write_search_report
from peftbench.analysis.studies import of_optuna
from peftbench.analysis.tuning import tuning
from peftbench.budget import WallClock, budget_of, parse_count
from peftbench.config import ModelConfig, build
from peftbench.errors import UserError
from peftbench.record import RunSpec
from peftbench.registry import build_method
from peftbench.search.finals import fresh_seeds
from peftbench.search.prepare import prepare
from peftbench.search.settings import SearchConfig, split
from peftbench.store import Store
from tests.test_analysis import make_record
from tests.test_search_plots import INSIDE, study

TINY = ["protocol=equal_budget", "model=tiny-bert", "task=tiny", "search.trials=4", "train.batch_size=8"]


def prepared(*arguments):
    return prepare([*TINY, *arguments])


# -- keys --------------------------------------------------------------------------------------------------------------


def test_the_protocol_is_the_search_s_and_runs_are_held_out():
    config, rest = split([*TINY, "method=lora"])
    assert config.protocol == "equal_budget"
    assert config.final_seeds == 5
    assert not any(argument.startswith("protocol") for argument in rest)
    assert {point["protocol"] for point in prepared("method=lora").points} == {"held_out"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["search.budget=parameters"], "expected search.target_parameters too"),
        (["search.budget=wall_clock"], "expected search.seconds too"),
        (["search.budget=memory"], "expected search.memory too"),
        (["search.budget=memory", "search.memory=much"], "search.memory=much: expected a number above 0 with a unit"),
        (["search.budget=parameters", "search.target_parameters=many"], "such as 300000, 300k or 1.5M"),
        (["search.seconds=5"], "only with search.budget=wall_clock"),
        (["search.budget=time"], "expected one of trials, parameters"),
        (["search.final_seeds=0"], "search.final_seeds=0: expected at least 1"),
        (["search.tolerance=1.5"], "search.tolerance=1.5"),
        (["search.objectives=quality,time"], "with protocol=equal_budget quality selects"),
        (["protocol=paper"], "protocol=paper: given beside protocol=equal_budget"),
        (["search.budget=flops"], "expected train.steps or search.target_flops"),
        (["search.budget=wall_clock", "search.seconds=5", "search.sampler=grid"], "search.sampler=grid"),
    ],
)
def test_keys_that_do_not_fit_are_one_line(arguments, said):
    with pytest.raises(UserError, match="search|protocol") as error:
        prepared("method=lora", *arguments)
    assert said in str(error.value)


def test_budgets_are_for_the_protocol():
    with pytest.raises(UserError, match="search.budget=flops: only with protocol=equal_budget"):
        split(["search.budget=flops"])


def test_counts_have_suffixes():
    assert [parse_count("k", v) for v in (300000, "300k", "1.5M", "2b")] == [300_000, 300_000, 1_500_000, 2 * 10**9]
    for bad in ("0", "-5", "3kk", "", None):
        with pytest.raises(UserError, match="expected a number of at least 1"):
            parse_count("k", bad)


def test_final_seeds_are_new():
    assert fresh_seeds(0, 3) == [1, 2, 3]
    assert fresh_seeds(1, 3) == [0, 2, 3]
    assert fresh_seeds(7, 3) == [0, 1, 2]


# -- what is held equal ------------------------------------------------------------------------------------------------


def parameters(found, settings, point):
    """Count from the method's closed form, apart from the solver."""
    spec, task = found.resolver.sketch({**point, **settings})
    model = found.resolver.shapes(build(ModelConfig, spec.model, "model"), task.formulation)
    return build_method(spec.method).parameter_count(model)


def test_equal_parameters_solve_the_size_of_every_trial():
    found = prepared("method=lora,ia3,vera,pfeiffer", "search.budget=parameters", "search.target_parameters=2k")
    assert [one.method for one in found.left_out] == ["ia3"]
    assert "has 256 adapter parameters at the nearest; wanted were 2000 within 10 %" in found.left_out[0].reason
    assert "ia3 is left out" in " ".join(found.lines)
    assert [about.method for about in found.abouts] == ["lora", "vera", "pfeiffer"]
    for about, point in zip(found.abouts, found.points, strict=True):
        assert not {"method.rank", "method.bottleneck"} & {axis.key for axis in about.axes}
        for pick in (0, -1):
            chosen = {axis.key: axis.value(axis.params()[pick]) for axis in about.axes}
            settings = about.held.complete(chosen)
            assert set(settings) > set(chosen)
            assert abs(parameters(found, settings, point) - 2000) <= 200, about.method


def test_choices_that_cannot_match_are_left_out():
    """On all maps of two layers of 32 even rank 1 has 2 · (4 · 64 + 2 · 96) = 896 parameters."""
    found = prepared("method=lora", "search.budget=parameters", "search.target_parameters=500")
    (about,) = found.abouts
    (targets,) = [axis for axis in about.axes if axis.key == "method.targets"]
    assert [label for label, _ in targets.choices] == ["query-value"]
    assert "method.targets: all left out" in " ".join(found.lines)
    with pytest.raises(UserError, match="has 896 adapter parameters at the nearest"):
        about.held.complete({"method.targets": ["all"]})


def test_a_size_outside_its_space_is_said():
    found = prepared("method=prompt", "search.budget=parameters", "search.target_parameters=64", "search.space=small")
    assert "prompt: length=2 for 64 adapter parameters, outside its space" in found.lines


def test_no_method_left_is_an_error():
    with pytest.raises(UserError, match="method=ia3: has 256 adapter parameters.*method=head: has 0"):
        prepared("method=ia3,head", "search.budget=parameters", "search.target_parameters=300k")


def test_a_fixed_size_is_not_solved_for():
    with pytest.raises(UserError, match="method=lora: has 1024 adapter parameters at the nearest"):
        prepared("method=lora", "method.rank=4", "search.budget=parameters", "search.target_parameters=3k",
                 "method.targets=[attention.query,attention.value]")  # fmt: skip


def test_equal_flops_decide_the_steps():
    found = prepared("method=lora,houlsby", "search.budget=flops", "train.steps=100")
    target = found.budget.wanted
    assert found.specs[0].train["steps"] == 100  # the first method's recipe is the measure
    for about, point in zip(found.abouts, found.points, strict=True):
        for pick in (0, -1):
            chosen = {axis.key: axis.value(axis.params()[pick]) for axis in about.axes}
            settings = about.held.complete(chosen)
            each = found.budget.predicted({**point, **settings})[1]
            assert settings["train.steps"] * each == pytest.approx(target, rel=0.5 / settings["train.steps"] + 1e-9)
    assert found.specs[1].train["steps"] < 100
    given = prepared("method=lora", "search.budget=flops", "search.target_flops=1e9")
    assert given.budget.wanted == 1e9


def test_equal_memory_narrows_spaces_and_leaves_methods_out():
    free = prepared("method=lora,full", "search.budget=memory", "search.memory=1GB")
    budget, point = free.budget, free.points[0]
    small = budget.predicted({**point, "method.rank": 2})[0]
    large = budget.predicted({**free.points[1]})[0]
    assert small < large
    limit = (small + large) // 2
    tight = prepared("method=lora,full", "search.budget=memory", f"search.memory={limit}B")
    assert [one.method for one in tight.left_out] == ["full"]
    (about,) = tight.abouts
    some = {axis.key: axis.value(axis.params()[0]) for axis in about.axes}
    assert about.held.complete(some) == some
    with pytest.raises(UserError, match=f"search.memory={limit}B"):
        about.held.complete({**some, "method.rank": 32, "method.targets": ["all"]})


def test_seconds_decide_how_many_trials_follow():
    config = SearchConfig(protocol="equal_budget", budget="wall_clock", seconds=60.0, workers=2)
    clock = WallClock(config, None)
    assert clock.room([], 0) == 2  # one a worker shows what a trial takes
    assert clock.room([], 2) == 0
    assert clock.room([10.0, 20.0], 0) == 2  # 30 s left at 15 s each
    assert clock.room([10.0, 20.0], 1) == 1
    assert clock.room([30.0, 22.0], 0) == 0  # 8 s left: another one would miss by more
    assert clock.room([30.0, 15.0], 0) == 1
    assert clock.room([100.0], 0) == 0


def test_trials_of_an_ordinary_search_count_for_an_equal_one():
    ordinary = prepare([*TINY[1:], "method=lora"])
    equal, more = prepared("method=lora"), prepared("method=lora", "search.trials=8")
    assert ordinary.abouts[0].fixed == equal.abouts[0].fixed == more.abouts[0].fixed
    held = prepared("method=lora", "search.budget=parameters", "search.target_parameters=1k")
    assert held.abouts[0].fixed["budget"] == "1000 adapter parameters within 0.1"


def test_matches_is_within_the_tolerance():
    config = SearchConfig(
        protocol="equal_budget", budget="parameters", target_parameters="1k", tolerance=0.05, trials=3
    )
    budget = budget_of(config, prepared("method=lora").resolver)
    assert [budget.matches(n) for n in (949, 950, 1050, 1051)] == [False, True, True, False]
    assert "3 trials of each method" in budget.statement()
    assert "within 5 %" in budget.statement()


# -- what is told ------------------------------------------------------------------------------------------------------


def told(entries, **changes):
    plan = Plan(
        "parameters", "4 trials of each method", "adapter parameters", (1, 2, 3), (0,), tuple(entries), ("a line",)
    )
    return dataclasses.replace(plan, **changes)


def entry(method, final=(), **changes):
    one = Entry(method, "minilm-l6", "rte", "compared", None, "rank=4", 0.9, 1000.0, 1020.0, True, tuple(final))
    return dataclasses.replace(one, **changes)


def finals(method, scores):
    return [
        make_record(method, {}, seed=s, test=t) | {"run_id": f"{method}-final-{s}"}
        for s, t in enumerate(scores, start=1)
    ]


@pytest.fixture
def folder(tmp_path):
    """Two methods compared, one left out; LoRA's last final run is not there yet."""
    records = [*finals("lora", (0.8, 0.81)), *finals("dora", (0.6, 0.61, 0.62))]
    records += [make_record("lora", {}, test=0.99) | {"run_id": "lora-1", "search": {"study": "lora-rte", "trial": 1}}]
    wanted = ["lora-final-1", "lora-final-2", "lora-final-3"]
    entries = [
        entry("dora", [f"dora-final-{s}" for s in (1, 2, 3)], had=1300.0, matched=False, note="1300 are not the 1000"),
        entry("ia3", status="left out", settings=None, validation=None, had=None, matched=False, note="has 13824"),
        entry("lora", wanted),
    ]
    (tmp_path / "search").mkdir()
    content = {"protocol": "equal_budget", **dataclasses.asdict(told(entries))}
    (tmp_path / "search" / "budget.json").write_text(json.dumps(content))
    return tmp_path, records


def test_the_comparison_rests_on_final_runs_alone(folder):
    path, records = folder
    studies = [of_optuna(study(trials=INSIDE))]
    report = write_search_report(path, records, studies)[0].read_text()
    assert "Equal budget: 4 trials of each method." in report
    assert "a line" in report
    assert "1 of 6 final runs are not there yet" in report
    rows = [line for line in report.splitlines() if line.startswith("| lora | rank=4 |")]
    assert len(rows) == 1
    assert "0.805 ± 0.007" in rows[0]  # the trial's 0.99 is not in it
    assert "1.0k (102 %), yes" in rows[0]
    assert "2 of 3" in rows[0]
    assert "dora: 1300 are not the 1000." in report
    assert "with seed 0; each winner ran again with seeds 1, 2, 3" in report


def test_rows_are_in_order_of_merit_and_those_left_out_come_last(folder):
    path, records = folder
    plan = read_plan(path)
    table = write_and_read(path, records)
    assert list(table["method"]) == ["lora", "dora", "ia3"]
    assert list(table["matched"]) == [True, False, False]
    assert list(table["status"]) == ["compared", "compared", "left out"]
    assert table["test_mean"][0] == pytest.approx(0.805)
    assert table["tuning_trials"][0] == 4
    assert plan.entries[0].final == ("dora-final-1", "dora-final-2", "dora-final-3")


def write_and_read(path, records):
    import pandas as pd

    write_search_report(path, records, [of_optuna(study(trials=INSIDE))])
    return pd.read_csv(path / "search/report/tables/equal-budget.csv")


def test_without_anything_trained_the_table_says_so():
    plan = told([entry("lora", ["lora-final-1"], had=None, matched=None)])
    table = equal_budget_table(plan, "minilm-l6", "rte", [], {}, tuning([], {}))
    assert table.rows[0][:5] == ["lora", "rank=4", "–", "–", "–"]
    assert table.rows[0][6:8] == ["0 of 1", "–"]


def test_the_folder_s_own_report_leaves_trials_out(folder):
    path, records = folder
    kept = compared(records, read_plan(path))
    assert sorted(r["run_id"] for r in kept) == sorted(r["run_id"] for r in records if r["run_id"] != "lora-1")
    only_trials = [r for r in records if r["run_id"] == "lora-1"]
    assert compared(only_trials, read_plan(path)) == only_trials


def test_a_broken_plan_is_one_line(tmp_path):
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "budget.json").write_text('{"budget": "trials"}')
    with pytest.raises(UserError, match=r"budget\.json: unreadable"):
        read_plan(tmp_path)


# -- the whole of it ---------------------------------------------------------------------------------------------------


def test_from_the_command_to_the_report(tmp_path, capsys):
    """Tuned on seed 0, compared on seeds 1 and 2; the same command again trains nothing and says the same."""
    command = [
        "search", *TINY, "method=lora,ia3", "search.final_seeds=2", "search.space=small", "train.steps=6",
        "profile=quick", f"results={tmp_path}", "sweep.name=equal", "pack=4", "--quiet",
    ]  # fmt: skip
    assert main(command) == 0
    out = capsys.readouterr().out
    folder = tmp_path / "equal"
    assert f"report: {folder}/search/report/report.md" in out
    store, plan = Store(folder), read_plan(folder)
    records = {r["run_id"]: r for r in store.records()}
    trials = [r for r in records.values() if r["search"]]
    assert {(e.method, e.status, len(e.final)) for e in plan.entries} == {
        ("lora", "compared", 2),
        ("ia3", "compared", 2),
    }
    assert {r["spec"]["seed"] for r in trials} == {0}
    assert plan.seeds == (1, 2)
    for one in plan.entries:
        mine = [records[run_id] for run_id in one.final]
        assert sorted(r["spec"]["seed"] for r in mine) == [1, 2]
        tried = [r for r in trials if r["spec"]["method"]["name"] == one.method]
        best = max(r["quality"]["validation"]["accuracy"] for r in tried)
        assert one.validation == pytest.approx(best)
        # all but the seed is what a best trial had
        again = {RunSpec.from_dict({**r["spec"], "seed": 0}).run_id for r in mine}
        winners = {r["run_id"] for r in tried if r["quality"]["validation"]["accuracy"] == best}
        assert len(again) == 1
        assert again <= winners
        # no pack holds several methods, so that seconds are each method's own
        assert {r["pack"]["size"] for r in tried} <= {1, 2, 3, 4}
    report = (folder / "search/report/report.md").read_text()
    assert "Equal budget, tiny on tiny-bert: test accuracy beside the cost of tuning" in report
    assert "24" in next(line for line in report.splitlines() if line.startswith("| ia3 |"))  # 4 trials of 6 steps
    before = {path: path.stat().st_mtime_ns for path in (folder / "runs").iterdir()}
    assert main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in (folder / "runs").iterdir()} == before
    assert (folder / "search/report/report.md").read_text() == report
    capsys.readouterr()
    assert main(["report", str(folder)]) == 0
    assert "runs of a search's trials are in its own report alone" in capsys.readouterr().out
    assert "[the search's own report](../search/report/report.md)" in (folder / "report/report.md").read_text()


def test_trials_within_a_budget_of_parameters_really_have_them(tmp_path, capsys):
    command = [
        "search", *TINY, "method=lora,pfeiffer", "search.trials=2", "search.final_seeds=1", "train.steps=2",
        "search.budget=parameters", "search.target_parameters=1k", f"results={tmp_path}", "sweep.name=p",
        "profile=skip", "pack=2", "--quiet",
    ]  # fmt: skip
    assert main(command) == 0
    records = Store(tmp_path / "p").records()
    assert len(records) == 6
    assert all(abs(r["cost"]["adapter_parameters"] - 1000) <= 100 for r in records)
    assert all(e.matched for e in read_plan(tmp_path / "p").entries)
    capsys.readouterr()
