"""What a search varies: spaces, their files, and what is said of a mistake in one."""

import textwrap

import pytest

from peftbench import registry
from peftbench.errors import UserError
from peftbench.search import space
from peftbench.search.prepare import prepare
from peftbench.search.settings import SearchConfig, split
from peftbench.search.space import Axis, as_choices, narrowed, ranged

SPACES = [p.stem for p in sorted((registry.conf_folder() / "search").glob("*.yaml"))]
TINY = ["model=tiny-bert", "task=tiny", "train.steps=2", "train.batch_size=8", "device=cpu"]


def write(folder, text):
    path = folder / "mine.yaml"
    path.write_text(textwrap.dedent(text))
    return str(path)


@pytest.mark.parametrize("name", SPACES)
def test_spaces_know_every_method_and_hold_what_it_suggests(name):
    found = space.axes(name, registry.options("method"))
    for method, axes in found.items():
        assert axes, method
        suggested = registry.section("method", method)["suggested"]["learning_rate"]
        (rate,) = [axis for axis in axes if axis.key == "train.learning_rate"]
        assert rate.low < suggested < rate.high
        assert rate.log
        for axis in axes:
            distribution = axis.distribution()
            for param in axis.params():
                assert distribution._contains(distribution.to_internal_repr(param)), (method, axis)
                axis.value(param)


@pytest.mark.parametrize("name", SPACES)
def test_spaces_open_with_the_command_that_uses_them(name):
    first = (registry.conf_folder() / "search" / f"{name}.yaml").read_text().splitlines()[0]
    assert first.startswith("# python -m peftbench search ")


def test_every_method_of_the_default_space_has_values_that_build(tmp_path):
    """Each value by itself, on the method alone: what needs a model is looked at when a search is prepared."""
    for method, axes in space.axes("default", registry.options("method")).items():
        section = registry.section("method", method)
        for axis in axes:
            if axis.key.startswith("method."):
                for param in axis.params():
                    registry.build_method({**section, axis.key.removeprefix("method."): axis.value(param)})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("per_method: {lora: {method.rnak: [1, 2]}}", "per_method.lora.method.rnak: not a setting of lora; did you"),
        ("common: {method.rnak: [1, 2]}", "common.method.rnak: not a setting of lora; did you mean 'rank'?"),
        ("per_method: {lora: {train.learning_rat: [1, 2]}}", "train.learning_rat: not a key of train; did you mean"),
        ("per_method: {loro: {method.rank: [1]}}", "per_method.loro: no such method; did you mean 'lora'?"),
        ("commom: {}", "commom: no such key; did you mean 'common'?"),
        ("common: {method.rank: {low: 8, high: 2}}", "common.method.rank: expected numbers low and high"),
        ("common: {method.rank: {low: 2, hihg: 8}}", "common.method.rank.hihg: no such key; did you mean 'high'?"),
        ("common: {method.alpha: {low: 0.0, high: 1.0, log: true}}", "expected low above 0 with log"),
        ("common: {method.rank: {low: 2, high: 8, step: 0.5}}", "step=0.5: expected a whole number"),
        ("common: {method.rank: []}", "common.method.rank: expected a list of choices, at least one"),
        ("common: {method.rank: 4}", "common.method.rank=4: expected a list of choices, or a mapping"),
        ("common: {method.rank: {around: suggested, factor: 3}}", "lora.yaml suggests no rank"),
        ("common: {model.pooling: [mean]}", "common.model.pooling: expected method.<setting> or train.<setting>"),
        ("common: [1]", "expected a mapping"),
        ("common: {", "not readable as yaml"),
    ],
)
def test_a_mistake_in_a_space_is_one_line_with_file_and_key(text, said, tmp_path):
    path = write(tmp_path, text)
    with pytest.raises(UserError) as caught:
        space.axes(path, ["lora"])
    assert path in str(caught.value)
    assert said in str(caught.value)


def test_per_method_goes_before_common_and_null_takes_out(tmp_path):
    path = write(
        tmp_path,
        """
        common: {method.rank: [1, 2], train.weight_decay: [0.0, 0.1]}
        per_method: {lora: {method.rank: [4, 8], train.weight_decay: null}}
        """,
    )
    found = space.axes(path, ["lora", "dora", "ia3"])
    assert {m: [(a.key, a.params()) for a in axes] for m, axes in found.items()} == {
        "lora": [("method.rank", [4, 8])],
        "dora": [("method.rank", [1, 2]), ("train.weight_decay", [0.0, 0.1])],
        "ia3": [("train.weight_decay", [0.0, 0.1])],
    }


def test_choices_are_named_and_give_their_values():
    targets = as_choices("method.targets", [["attention.query", "attention.value"], ["all"]])
    assert targets.params() == ["attention.query+attention.value", "all"]
    assert targets.value("all") == ["all"]
    flags = as_choices("method.share", [False, True, 0, 1])
    assert [flags.value(p) for p in flags.params()] == [False, True, 0, 1]
    assert type(flags.value(True)) is bool
    assert type(flags.value(1)) is int


def test_points_of_a_grid_lie_within_the_range_ends_included():
    assert ranged("k", 2, 32, True, None, "").params() == [2, 4, 8, 16, 32]
    assert ranged("k", 1, 4, False, None, "").params() == [1, 2, 3, 4]
    assert ranged("k", 0, 100, False, 10, "").params() == [0, 20, 50, 80, 100]
    rates = ranged("k", 1e-4, 1e-2, True, None, "").params()
    assert rates[0] == 1e-4
    assert rates[-1] == 1e-2
    assert rates == pytest.approx([1e-4, 10**-3.5, 1e-3, 10**-2.5, 1e-2])
    assert ranged("k", 0, 1.0, False, None, "").params() == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_a_model_narrows_an_axis_to_what_fits():
    def too_large(value):
        return "too large" if value > 20 else None

    whole, line = narrowed(Axis("k", 2, 64, log=True), too_large)
    assert (whole.low, whole.high) == (2, 17)  # halved twice: 33, 17
    assert line == "up to 17 instead of 64 (too large)"
    choices, line = narrowed(as_choices("k", [8, 16, 32]), too_large)
    assert choices.params() == [8, 16]
    assert line == "32 left out (too large)"
    assert narrowed(Axis("k", 2, 16), too_large) == (Axis("k", 2, 16), None)
    assert narrowed(Axis("k", 32, 64), too_large)[0] is None


# The command line.


def test_keys_of_search_are_taken_out_of_the_command_line():
    config, rest = split(["model=x", "search.trials=4", "search.objectives=quality,time", "search.storage=a://b=c"])
    assert rest == ["model=x"]
    assert (config.trials, config.objectives, config.storage) == (4, ("quality", "time"), "a://b=c")
    assert split(["search.objectives=quality"])[0].objectives == ("quality",)


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("search.trails=3", "search.trails: no such key; did you mean 'trials'?"),
        ("search.trials=0", "search.trials=0: expected at least 1"),
        ("search.trials=many", "search.trials=many: expected a whole number"),
        ("search.sampler=tpo", "search.sampler=tpo: expected one of tpe, gp, nsga2, random, grid"),
        ("search.pruner=halving", "search.pruner=halving: expected one of none, successive_halving"),
        ("search.objectives=quality,loss", "search.objectives=loss: expected one of"),
        ("search.storage=mysql", "search.storage=mysql: expected sqlite, journal or a database's URL"),
        ("search.trials=1,2", "search.trials takes one value"),
        ("search.trials=", "search.trials=: expected search.<key>=<value>"),
        ("search.batch=0", "search.batch=0: expected at least 1"),
    ],
)
def test_bad_settings_of_a_search_are_one_line(argument, said):
    with pytest.raises(UserError) as caught:
        split([argument])
    assert said in str(caught.value)


def test_several_objectives_prune_nothing():
    with pytest.raises(UserError, match="with several objectives nothing is pruned"):
        split(["search.objectives=quality,time", "search.pruner=median"])


def test_a_batch_leaves_trials_for_every_worker():
    assert SearchConfig(trials=32).batch_size == 8
    assert SearchConfig(trials=8, workers=4).batch_size == 2
    assert SearchConfig(trials=3, workers=4).batch_size == 1
    assert SearchConfig(trials=3, workers=4, batch=16).batch_size == 16


def axes_of(*arguments):
    prepared = prepare([*TINY, *arguments])
    return {about.method: {axis.key: axis for axis in about.axes} for about in prepared.abouts}, prepared


def test_what_is_given_by_hand_is_fixed_and_what_is_given_several_values_is_searched():
    found, prepared = axes_of("method=lora,ia3", "method.rank=4", "method.alpha=1.0,2.0", "search.space=default")
    assert "method.rank" not in found["lora"]
    assert found["lora"]["method.alpha"].params() == [1.0, 2.0]
    assert found["ia3"].keys() == {"train.learning_rate", "train.weight_decay"}
    assert prepared.points[0]["method.rank"] == 4
    assert "method.rank" not in prepared.points[1]


def test_an_interval_by_hand_is_a_range():
    found, _ = axes_of("method=lora", "train.learning_rate=tag(log,interval(1e-4,1e-2))", "search.space=small")
    assert found["lora"]["train.learning_rate"] == Axis("train.learning_rate", 1e-4, 1e-2, log=True)


def test_an_interval_of_a_whole_setting_is_of_whole_numbers():
    """Hydra reads both ends as floats."""
    found, _ = axes_of("method=lora", "method.rank=interval(2,8)", "method.alpha=interval(2,8)", "search.space=small")
    assert found["lora"]["method.rank"] == Axis("method.rank", 2, 8)
    assert isinstance(found["lora"]["method.rank"].low, int)
    assert isinstance(found["lora"]["method.alpha"].low, float)


def test_a_model_that_is_too_small_narrows_the_space_and_says_so():
    found, prepared = axes_of("method=lora", "search.space=default", "method.targets=[all]")
    width = 32
    assert found["lora"]["method.rank"].high <= width
    assert any("method.rank: up to" in line for line in prepared.lines)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["seed=0,1"], "seed=0,1: a search takes one value"),
        (["method=lora", "method.rnak=1,2"], "method.rnak: not a setting of lora; did you mean 'method.rank'?"),
        (["method=lora", "method.rank=interval(8,2)"], "method.rank=interval(8,2): expected numbers low and high"),
        (["experiment=default"], "search takes no experiment"),
        (["hydra/launcher=joblib"], "search uses no launcher; use search.workers"),
        (["method=lora", "search.space=nowhere"], "search.space=nowhere: no such space"),
        (["method=lora", "search.space=nowhere.yaml"], "search.space=nowhere.yaml: no such file"),
        (["method=lora", "search.space=learning_rate", "train.learning_rate=1e-3"], "nothing to search"),
        (["method=lora", "search.sampler=grid", "search.space=learning_rate"], "has 5 points; expected at most that"),
        (["method=lora", "train.epochs=0"], "train.epochs=0.0: expected above 0"),
        (["protocol=equal_bugdet"], "protocol=equal_bugdet: expected one of held_out, paper, equal_budget"),
        (["protocol=paper"], "protocol=paper: a search would choose by the split that is reported"),
    ],
)
def test_a_search_that_cannot_be_is_one_line(arguments, said):
    with pytest.raises(UserError) as caught:
        prepare([*TINY, *arguments])
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("method.rank=nan", "method.rank=nan: expected a whole number"),  # no axis of the space is to blame
        ("train.learning_rat=1e-3,1e-4", "train.learning_rat: none of its values fits lora"),
        ("method.rank=interval(64,99)", "method.rank: none of its values fits lora on tiny-bert: model=tiny-bert"),
    ],
)
def test_what_the_command_line_says_is_not_blamed_on_a_file(argument, said):
    with pytest.raises(UserError) as caught:
        prepare([*TINY, "method=lora", argument])
    assert str(caught.value).startswith(said)
