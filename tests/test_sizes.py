"""Sizes solved from closed forms: hand-made counts, and every method that has a size."""

import pytest

from peftbench import registry
from peftbench.config import ModelConfig, build
from peftbench.errors import UserError
from peftbench.resolve import Resolver
from peftbench.sizes import SIZES, Solver, closest

SIZED = [
    name
    for name in registry.options("method")
    if any(isinstance(registry.describe_method(name)["settings"].get(size), int) for size in SIZES)
]


def point(method, **settings):
    task = "glue-mixture" if registry.declared(method) >= {"source_task"} else "tiny"
    return {"model": "tiny-bert", "method": method, "task": task, "train": "default"} | {
        f"method.{k}": v for k, v in settings.items()
    }


@pytest.fixture(scope="module")
def resolver():
    return Resolver("cpu")


def test_the_closest_of_a_line_is_found():
    assert closest(lambda v: 100 * v, 949) == (9, 900)
    assert closest(lambda v: 100 * v, 950) == (9, 900)  # of equals the smaller
    assert closest(lambda v: 100 * v, 951) == (10, 1000)
    assert closest(lambda v: 100 * v, 1) == (1, 100)
    assert closest(lambda v: 100 * v, 10**9, most=300) == (300, 30_000)


def test_falling_counts_are_solved_too():
    assert closest(lambda v: 10_000 // v, 300) == (33, 303)


def test_values_that_are_not_accepted_are_left_out():
    assert closest(lambda v: 7 * v if 96 % v == 0 else None, 7 * 30) == (32, 224)
    assert closest(lambda v: 7 * v if v <= 77 else None, 7 * 75) == (75, 525)
    assert closest(lambda v: 7 * v if v <= 77 else None, 7 * 500) == (77, 539)
    assert closest(lambda v: None, 100) is None


def test_a_count_that_stays_the_same_is_not_looked_at_value_by_value():
    asked = []

    def flat(v):
        asked.append(v)
        return min(10 * v, 500)

    assert closest(flat, 500) == (50, 500)
    assert len(asked) < 100


def test_of_values_far_apart_the_smallest_that_matches_is_taken():
    def valley(v):
        return 1000 - 90 * v if v <= 10 else 100 + 3 * (v - 10)

    assert closest(valley, 282) == (71, 283)
    assert closest(valley, 282, tolerance=0.05) == (8, 280)


@pytest.mark.parametrize("method", SIZED)
def test_no_other_value_comes_closer(resolver, method):
    """Against every value up to 100, for targets between, on and beyond what the setting can bring."""
    mapping = registry.section("method", method)
    spec, task = resolver.sketch(point(method, **fitting(resolver, method)))
    model = resolver.shapes(build(ModelConfig, spec.model, "model"), task.formulation)

    def count(changes):
        try:
            built = registry.build_method({**spec.method, **changes}).with_tasks(task.num_tasks)
            built.check(model)
            return built.parameter_count(model)
        except UserError:
            return None

    assert mapping["_target_"] == spec.method["_target_"]
    sizes = [s for s in SIZES if isinstance(spec.method.get(s), int)]
    counts = {s: {v: c for v in range(1, 101) if (c := count({s: v})) is not None} for s in sizes}
    changing = [s for s in sizes if len(set(counts[s].values())) > 1]
    if not changing:
        solved = Solver(resolver, 1000, 0.05).solve(point(method, **fitting(resolver, method)))
        assert (solved.setting, solved.parameters) == (None, count({}))
        return
    everything = sorted({c for s in changing for c in counts[s].values()})
    middle = everything[len(everything) // 2]
    for target in {max(1, everything[0] - 1), everything[1], middle, middle + 1, everything[-1]}:
        solver = Solver(resolver, target, 0.0)
        solved = solver.solve(point(method, **fitting(resolver, method)))
        nearest = min(abs(c - target) for c in everything)
        assert abs(solved.parameters - target) <= nearest, (target, solved)
        if solved.setting is not None:
            assert count({solved.setting: solved.value}) == solved.parameters


def fitting(resolver, method):
    """Return settings with which the method fits the tiny model: none, unless its own are too large for it."""
    try:
        resolver.sketch(point(method))
        return {}
    except UserError:
        for size in SIZES:
            for value in (8, 4, 2):
                try:
                    resolver.sketch(point(method, **{size: value}))
                    return {size: value}
                except UserError:
                    continue
        raise


def test_a_size_of_its_own_that_does_not_fit_is_no_hindrance(resolver):
    """OFT's blocks of 48 do not divide a width of 32."""
    solved = Solver(resolver, 500, 0.5).solve(point("oft", block_size=48))
    assert solved.setting == "block_size"
    assert 32 % solved.value == 0


def test_a_method_without_a_size_is_told_by_its_count(resolver):
    solver = Solver(resolver, 10_000, 0.1)
    solved = solver.solve(point("ia3"))
    assert solved.chosen == {}
    assert not solver.matches(solved)
    assert solved.off(10_000) == pytest.approx(1 - solved.parameters / 10_000)


def test_the_other_settings_decide_the_size(resolver):
    """LoRA on all maps of the body needs a smaller rank than on two, by the closed form r · (D_in + D_out)."""
    solver = Solver(resolver, 8192, 0.0)
    two = solver.solve(point("lora"))
    every = solver.solve(point("lora", targets=["all"]))
    assert two.value == 8192 // (2 * 2 * 64)  # two layers, two maps of 32 by 32
    per_rank = 2 * (4 * 64 + 2 * 96)
    assert every.parameters == every.value * per_rank
    assert every.value in (8192 // per_rank, 8192 // per_rank + 1)
