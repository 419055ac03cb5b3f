"""Figures and tables of searches: studies made by hand, whose optima, edges and fronts can be told at sight."""

import json
import math

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial

from peftbench.analysis import search_plots, search_tables
from peftbench.analysis.plots import save
from peftbench.analysis.search_report import read_studies, write_search_report
from peftbench.analysis.studies import Range, Study, Trial, importance, of_optuna, of_records
from peftbench.analysis.tables import to_markdown
from peftbench.analysis.tuning import charge, filling, seconds, tuning
from tests.test_analysis import make_record

optuna.logging.set_verbosity(optuna.logging.WARNING)
RATE, RANK, TARGETS = "train.learning_rate", "method.rank", "method.targets"
SPACE = {
    RATE: FloatDistribution(1e-4, 1e-2, log=True),
    RANK: IntDistribution(1, 64, log=True),
    TARGETS: CategoricalDistribution(["query-value", "all"]),
}


def study(method="lora", trials=(), objectives=("quality",), storage=None, directions=None, **attributes):
    """An Optuna study with finished trials: (params, value or values, state, intermediate values)."""
    made = optuna.create_study(
        study_name=f"{method}-rte",
        storage=storage,
        directions=directions or ["maximize"] + ["minimize"] * (len(objectives) - 1),
    )
    told = {"method": method, "model": "minilm-l6", "task": "rte", "metric": "accuracy", "direction": "maximize",
            "objectives": list(objectives), "sampler": "tpe", "pruner": "none", "seed": 0}  # fmt: skip
    for key, value in (told | attributes).items():
        made.set_user_attr(key, value)
    for i, (params, values, state, seen) in enumerate(trials):
        many = None if values is None else [values] if isinstance(values, float) else list(values)
        made.add_trial(
            create_trial(
                state=state,
                params=params,
                distributions={name: SPACE[name] for name in params},
                values=many,
                intermediate_values=seen,
                user_attrs={"run_id": f"{method}-{i}", "seconds": 2.0, "step": 40},
            )
        )
    return made


def done(rate, rank, value, targets="all"):
    return {RATE: rate, RANK: rank, TARGETS: targets}, value, TrialState.COMPLETE, {}


def pruned(rate, rank, seen):
    return {RATE: rate, RANK: rank, TARGETS: "all"}, None, TrialState.PRUNED, seen


INSIDE = [done(2e-4, 4, 0.6), done(1e-3, 16, 0.8), done(5e-3, 32, 0.7), pruned(2e-4, 2, {10: 0.5, 20: 0.55})]
AT_THE_END = [done(2e-4, 4, 0.6), done(1e-3, 16, 0.7), done(0.0099, 64, 0.8)]


# -- edges -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("searched", "value", "end"),
    [
        (Range(1e-4, 1e-2, log=True), 1e-3, None),
        (Range(1e-4, 1e-2, log=True), 1.2e-4, "low"),  # log10(1.2) / 2 = 0.04
        (Range(1e-4, 1e-2, log=True), 1.3e-4, None),  # 0.057
        (Range(1e-4, 1e-2, log=True), 8e-3, "high"),  # 1 - 0.048
        (Range(0.0, 0.2), 0.0, None),  # no dropout below none
        (Range(0.0, 0.2), 0.195, "high"),
        (Range(0.1, 0.2), 0.1, "low"),
        (Range(2, 64, log=True, whole=True), 2, "low"),
        (Range(2, 64, log=True, whole=True), 3, None),
        (Range(1, 64, log=True, whole=True), 1, None),  # no rank below one
        (Range(2, 64, whole=True), 64, "high"),
        (Range(choices=(16, 32, 64, 128)), 128, "high"),
        (Range(choices=(128, 64, 32, 16)), 16, "low"),
        (Range(choices=(16, 32, 64, 128)), 64, None),
        (Range(choices=(0.0, 0.01, 0.1)), 0.0, None),
        (Range(choices=(16, 32)), 32, None),  # a choice of two is no range
        (Range(choices=("gelu", "relu", "tanh")), "tanh", None),
        (Range(choices=(True, False)), False, None),
        (Range(8, 8, whole=True), 8, None),
    ],
)
def test_edges_of_ranges_and_grids(searched, value, end):
    assert searched.edge(value) == end


def test_an_optimum_at_an_edge_is_flagged_in_table_and_figure():
    inside, outside = of_optuna(study(trials=INSIDE)), of_optuna(study("dora", trials=AT_THE_END))
    assert inside.edges() == {}
    assert outside.edges() == {RATE: "high", RANK: "high"}
    overview = search_tables.overview([inside, outside])
    assert [row[-1] for row in overview.rows] == ["none", "rank (high), learning_rate (high)"]
    assert "learning_rate=0.0099 (high end)" in overview.rows[1][1]
    assert search_tables.EDGE_NOTE in overview.notes
    optima = search_tables.optima([inside, outside])
    flagged = {(row[0], row[1]): row[-1] for row in optima.rows}
    assert flagged["lora", "learning_rate"] == "no"
    assert flagged["dora", "learning_rate"] == "high"
    rate = next(p for p in search_plots.sensitivity_plots([inside, outside]) if p.name == "search-learning-rate")
    assert "a better value may lie beyond: dora (high end)" in rate.caption
    markers = {line.get_marker() for line in rate.figure.axes[0].lines}
    assert ">" in markers
    alone = next(p for p in search_plots.sensitivity_plots([inside]) if p.name == "search-learning-rate")
    assert "beyond" not in alone.caption
    assert not {"<", ">"} & {line.get_marker() for line in alone.figure.axes[0].lines}


def test_without_known_ranges_no_edge_is_claimed():
    records = [
        make_record("lora", {"rank": r}, test=t, learning_rate=lr) | {"search": {"study": "lora-rte", "trial": i}}
        for i, (r, lr, t) in enumerate([(2, 1e-4, 0.6), (4, 1e-3, 0.7), (8, 1e-2, 0.8)])
    ]
    (found,) = of_records(records)
    assert (found.method, found.task, found.objectives, found.maximise) == ("lora", "rte", ("accuracy",), (True,))
    assert found.best.params == {RANK: 8, RATE: 1e-2}
    assert found.edges() == {}
    assert "ranges are not known" in " ".join(search_tables.overview([found]).notes)


# -- studies -----------------------------------------------------------------------------------------------------------


def test_a_study_is_read_whole():
    found = of_optuna(study(trials=INSIDE))
    assert (found.name, found.method, found.model, found.task) == ("lora-rte", "lora", "minilm-l6", "rte")
    assert found.objectives == ("accuracy",)
    assert found.maximise == (True,)
    assert found.space[RATE] == Range(1e-4, 1e-2, log=True)
    assert found.space[RANK] == Range(1, 64, log=True, whole=True)
    assert found.space[TARGETS] == Range(choices=("query-value", "all"))
    assert [t.state for t in found.trials] == ["complete"] * 3 + ["pruned"]
    assert found.trials[3].last == 0.55
    assert found.best.number == 1
    assert found.best.run_id == "lora-1"


def test_of_equals_the_first_is_best_and_less_may_be_better():
    two = of_optuna(study(trials=[done(1e-3, 4, 0.7), done(2e-3, 8, 0.7)]))
    assert two.best.number == 0
    loss = of_optuna(study(trials=[done(1e-3, 4, 0.7), done(2e-3, 8, 0.3)], directions=["minimize"]))
    assert loss.best.number == 1


def test_the_front_of_several_objectives():
    """Of four trials one is beaten in both, one equals another in quality at a higher cost."""
    values = [(0.7, 10.0), (0.8, 20.0), (0.6, 15.0), (0.8, 30.0)]
    found = of_optuna(study(objectives=("quality", "adapter_parameters"), trials=[done(1e-3, 4, v) for v in values]))
    assert [t.number for t in found.front] == [0, 1]
    assert found.best.number == 1
    frame = search_tables.trials_frame([found])
    assert frame["on_front"].tolist() == [True, True, False, False]
    assert frame["accuracy"].tolist() == [0.7, 0.8, 0.6, 0.8]
    assert frame["adapter_parameters"].tolist() == [10.0, 20.0, 15.0, 30.0]


def test_the_staircase_of_a_front():
    points = [(10.0, 0.7), (20.0, 0.8), (15.0, 0.6), (30.0, 0.8)]
    assert search_plots.staircase(points, True, False) == [(10.0, 0.7), (20.0, 0.8)]
    assert search_plots.staircase([(x, -y) for x, y in points], False, False) == [(10.0, -0.7), (20.0, -0.8)]


def test_lines_go_through_the_best_of_each_part():
    xs, ys = [0.0, 0.1, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [1.0, 3.0, 2.0, 5.0, 4.0, 1.0, 1.0, 7.0]
    # parts of width 1 from 0: the last one has both 5 and 6
    assert search_plots.upper(xs, ys, True) == [(0.1, 3.0), (1.0, 2.0), (2.0, 5.0), (3.0, 4.0), (4.0, 1.0), (6.0, 7.0)]
    assert search_plots.upper([1.0, 1.0, 2.0], [3.0, 2.0, 5.0], False) == [(1.0, 2.0), (2.0, 5.0)]


# -- importance --------------------------------------------------------------------------------------------------------


def grid(effect):
    rates, ranks = [1e-4 * 10 ** (i / 4) for i in range(8)], [2, 4, 8, 16]
    return [done(rate, rank, float(effect(math.log10(rate), math.log2(rank)))) for rate in rates for rank in ranks]


def test_what_matters_is_found():
    by_rate = importance(of_optuna(study(trials=grid(lambda rate, rank: -((rate + 3) ** 2) + 0.001 * rank))))
    by_rank = importance(of_optuna(study(trials=grid(lambda rate, rank: 0.001 * rate - (rank - 3) ** 2))))
    assert by_rate.trials == 32
    assert set(by_rate.fanova) == {RATE, RANK}  # targets never varied
    assert sum(by_rate.fanova.values()) == pytest.approx(1)
    assert by_rate.fanova[RATE] > 0.8
    assert by_rank.fanova[RANK] > 0.8
    assert by_rate.ped_anova[RATE] > by_rate.ped_anova[RANK]


def test_importance_is_not_computed_from_too_little():
    few = grid(lambda rate, rank: rate)[:7]
    assert importance(of_optuna(study(trials=few))) is None
    assert importance(of_optuna(study(trials=[done(1e-3, 4, 0.5)] * 10))) is None
    assert importance(of_optuna(study(trials=grid(lambda rate, rank: 1.0)))) is None


def test_importance_without_scikit_learn(monkeypatch):
    import optuna.importance

    def missing(**options):
        raise ImportError("scikit-learn")

    monkeypatch.setattr(optuna.importance, "FanovaImportanceEvaluator", missing)
    found = importance(of_optuna(study(trials=grid(lambda rate, rank: rate))))
    assert found.fanova is None
    table = search_tables.importances([of_optuna(study())], [found])
    assert any("scikit-learn is not installed" in note for note in table.notes)
    assert {row[2] for row in table.rows} == {"–"}


# -- cost --------------------------------------------------------------------------------------------------------------


def run(run_id, losses=4, **pack):
    record = make_record("lora", {"rank": 4}) | {"run_id": run_id}
    return record | {"trace": {"loss": [0.5] * losses}, "pack": pack or None}


def test_seconds_are_shares_of_a_pack():
    phases = {"load": 1.0, "profile": 100.0, "train": 6.0, "test": 1.0}
    assert seconds(run("a", size=4, index=0, seconds=phases)) == pytest.approx(2.0)
    # others came or went: the record has the share
    assert seconds(run("a", size=4, seconds=phases, share_seconds=3.5)) == pytest.approx(3.5)
    assert seconds(run("a")) is None


def test_charges_follow_from_the_record():
    """4 steps of 32 rows of 64 tokens, of which 1500 of 2048 are real."""
    record = run("a", size=2, seconds={"train": 3.0})
    record["spec"]["train"]["max_length"] = 64
    shares = filling([record])
    found = charge(record, shares)
    assert found.steps == 4
    assert found.tokens == pytest.approx(4 * 32 * 64 * 1500 / 2048)
    assert found.seconds == pytest.approx(1.5)
    assert found.joules is None
    assert found.flops == pytest.approx(4 * 32 * 64 * 9.1e7)
    record["cost"]["energy_joules_per_1k_tokens"] = 2.0
    assert charge(record, shares).joules == pytest.approx(2.0 * found.tokens / 1000)


def test_how_full_batches_are_is_known_from_another_run_on_the_same_texts():
    measured, plain, other = (run(name, size=1, seconds={"train": 3.0}) for name in "abc")
    other["spec"]["task"]["name"] = "mrpc"
    for record in (measured, plain, other):
        record["spec"]["train"]["max_length"] = 64
    plain["cost"] = other["cost"] = {"adapter_parameters": 5}
    shares = filling([measured, plain, other])
    assert charge(plain, shares).tokens == charge(measured, shares).tokens
    assert charge(plain, shares).flops is None
    assert charge(other, shares).tokens is None


def test_tuning_charges_every_run_once_and_says_what_is_lost():
    twice = [*INSIDE, done(1e-3, 16, 0.8)]
    found = of_optuna(study(trials=twice))
    same = Study(**{**vars(found), "trials": (*found.trials[:4], Trial(4, "complete", {}, (0.8,), run_id="lora-1"))})
    records = {f"lora-{i}": run(f"lora-{i}", size=2, seconds={"train": 4.0}) for i in (0, 1, 3)}
    (cost,) = tuning([same], records)
    assert (cost.trials, cost.complete, cost.pruned, cost.failed) == (5, 4, 1, 0)
    assert (cost.runs, cost.lost) == (3, 1)
    assert cost.charge.seconds == pytest.approx(6.0)
    assert cost.charge.steps == 12


def test_what_one_run_lacks_is_not_known_of_all():
    records = {"lora-0": run("lora-0", size=2, seconds={"train": 4.0}), "lora-1": run("lora-1")}
    (cost,) = tuning([of_optuna(study(trials=INSIDE[:2]))], records)
    assert cost.charge.seconds is None
    assert cost.charge.steps == 8


# -- figures and reports -----------------------------------------------------------------------------------------------


def everything():
    single = [of_optuna(study(m, trials=t)) for m, t in (("lora", INSIDE), ("dora", AT_THE_END))]
    values = [(0.7, 1e4, 0.1), (0.8, 2e5, 0.2), (0.6, 1.5e5, 0.3)]
    trials = [done(10**-e, 4, v) for e, v in zip((4, 3, 2), values, strict=True)]
    several = of_optuna(study("ia3", objectives=("quality", "adapter_parameters", "time"), trials=trials))
    return [*single, several]


def test_every_figure_is_drawn_the_same_each_time(tmp_path):
    made = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        studies = [*everything(), of_optuna(study("vera", trials=grid(lambda rate, rank: rate * rank)))]
        found = [importance(s) for s in studies]
        made.append([p for plot in search_plots.all_plots(studies, found) for p in save(plot, folder)])
    names = {p.stem for p in made[0]}
    assert names == {
        "search-history", "search-importance", "search-learning-rate", "search-rank",
        "search-pareto-adapter-parameters", "search-pareto-time",
    }  # fmt: skip
    for first, second in zip(*made, strict=True):
        assert first.read_bytes() == second.read_bytes(), first.name


def test_pruned_trials_are_crosses_at_the_last_value_seen():
    plot = search_plots.history_plot([of_optuna(study(trials=INSIDE))])
    (crosses,) = [line for line in plot.figure.axes[0].lines if line.get_marker() == "x"]
    assert (list(crosses.get_xdata()), list(crosses.get_ydata())) == ([3], [0.55])
    best = next(line for line in plot.figure.axes[0].lines if line.get_drawstyle() == "steps-post")
    assert list(best.get_ydata()) == [0.6, 0.8, 0.8, 0.8]


def test_nothing_to_draw_is_no_figure():
    empty = of_optuna(study())
    assert search_plots.history_plot([empty]) is None
    assert search_plots.importance_plot([empty], [None]) is None
    assert not list(search_plots.sensitivity_plots([empty]))
    assert search_tables.optima([empty]) is None
    assert search_tables.importances([empty], [None]) is None
    assert search_tables.overview([empty]).rows[0][1] == "–"


@pytest.mark.parametrize("kind", ["sqlite", "journal"])
def test_a_report_from_the_storage_in_the_folder(tmp_path, kind):
    (tmp_path / "search").mkdir()
    if kind == "sqlite":
        storage = f"sqlite:///{tmp_path}/search/study.db"
    else:
        from optuna.storages.journal import JournalFileBackend

        storage = optuna.storages.JournalStorage(JournalFileBackend(f"{tmp_path}/search/journal.log"))
    study("lora", INSIDE, storage=storage)
    study("dora", AT_THE_END, storage=storage)
    records = [run(f"{m}-{i}", size=2, seconds={"train": 4.0}) for m in ("lora", "dora") for i in range(3)]
    assert [s.method for s in read_studies(tmp_path, records)] == ["dora", "lora"]
    report, *others = write_search_report(tmp_path, records)
    text = report.read_text()
    assert report == tmp_path / "search" / "report" / "report.md"
    assert "learning_rate=0.0099 (high end)" in text
    assert "What tuning cost" in text
    assert (tmp_path / "search/report/figures/search-history.pdf") in others
    before = {path: path.read_bytes() for path in [report, *others]}
    again = write_search_report(tmp_path, records)
    assert {path: path.read_bytes() for path in again} == before


def test_a_folder_without_studies_has_no_report(tmp_path):
    assert write_search_report(tmp_path, [make_record()]) == []
    assert not (tmp_path / "search").exists()


def test_tables_have_plain_numbers():
    table = search_tables.overview([of_optuna(study(trials=INSIDE))])
    row = json.loads(table.raw.to_json(orient="records"))[0]
    assert row["best_validation"] == 0.8
    assert (row["complete_trials"], row["pruned_trials"]) == (3, 1)
    assert "| lora |" in to_markdown(table)
