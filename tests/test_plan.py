"""Grids → points → packs."""

import dataclasses
import time

import pytest

from peftbench.errors import UserError
from peftbench.plan import Demand, Sharing, as_grid, packs, points
from tests.conftest import make_spec

DECLARED = {"full": frozenset(), "lora": frozenset({"rank", "alpha"}), "houlsby": frozenset({"bottleneck"})}
BASE = {
    "model": ["m"],
    "task": ["t"],
    "train": ["default"],
    "profile": ["default"],
    "protocol": ["held_out"],
    "seed": [0],
}


def expand(*grids, given=None, per_method=None):
    return points(Demand([{**BASE, **g} for g in grids], per_method or {}, given or {}), DECLARED)


def test_a_key_that_a_method_lacks_is_dropped_and_equal_points_collapse():
    found, lines = expand({"method": ["full", "lora"]}, given={"method.rank": [2, 4]})
    assert [(p["method"], p.get("method.rank")) for p in found] == [("full", None), ("lora", 2), ("lora", 4)]
    assert lines == ["method.rank is not a setting of full: dropped there"]


def test_a_key_that_no_method_declares_is_an_error_with_the_nearest_name():
    with pytest.raises(UserError, match="method.rnk: not a setting of full, lora; did you mean 'method.rank'"):
        expand({"method": ["full", "lora"]}, given={"method.rnk": [2]})
    with pytest.raises(UserError, match="method.rank: not a setting of full"):
        expand({"method": ["full"]}, given={"method.rank": [2]})


def test_the_union_of_grids_runs_and_values_given_by_hand_replace_all():
    grids = ({"method": ["full"], "seed": [0, 1]}, {"method": ["lora"], "method.rank": [4], "seed": [0, 1]})
    assert len(expand(*grids)[0]) == 4
    found, _ = expand(*grids, given={"seed": [7], "method.rank": [2, 8]})
    assert [(p["method"], p["seed"], p.get("method.rank")) for p in found] == [
        ("full", 7, None),
        ("lora", 7, 2),
        ("lora", 7, 8),
    ]


def test_replacing_an_experiment_s_methods_forgets_their_settings():
    found, _ = expand({"method": ["full"]}, {"method": ["lora"], "method.rank": [4]}, given={"method": ["houlsby"]})
    assert len(found) == 1
    assert "method.rank" not in found[0]


def test_values_per_method_go_before_the_grid_s_and_after_those_by_hand():
    grid, per_method = (
        {"method": ["full", "lora"], "train.learning_rate": [1.0]},
        {"lora": {"train.learning_rate": [2.0]}},
    )
    rates = {p["method"]: p["train.learning_rate"] for p in expand(grid, per_method=per_method)[0]}
    assert rates == {"full": 1.0, "lora": 2.0}
    found, _ = expand(grid, per_method=per_method, given={"train.learning_rate": [3.0]})
    assert {p["train.learning_rate"] for p in found} == {3.0}


@pytest.mark.parametrize(("key", "near"), [("sead", "seed"), ("trian.steps", "train"), ("methd", "method")])
def test_unknown_keys_are_errors(key, near):
    with pytest.raises(UserError, match=f"{key}: no such key; did you mean '{near}'"):
        expand({"method": ["full"]}, given={key: [1]})


def test_an_empty_list_is_an_error():
    with pytest.raises(UserError, match="seed: the list of values is empty"):
        expand({"method": ["full"]}, given={"seed": []})


def test_yaml_mappings_become_grids():
    grid = as_grid({"method": "lora", "train": {"steps": [1, 2]}, "method.targets": [["a", "b"]]})
    assert grid == {"method": ["lora"], "train.steps": [1, 2], "method.targets": [["a", "b"]]}


def share(spec):
    return Sharing(spec.method["name"] != "full", frozenset({"rank", "alpha"}))


def mix(spec):
    return dataclasses.replace(share(spec), company="prompts" if spec.method["name"] == "prompt" else "rows")


def names(found):
    return ["".join(spec.method["name"][0] for spec in pack) for pack in found]


def of(**counts):
    return [
        make_spec(**{"method.name": name, "seed": s, "identity.method": len(name)})
        for name, n in counts.items()
        for s in range(n)
    ]


def test_methods_that_keep_company_share_packs_when_their_own_are_full():
    specs = of(lora=5, ia3=2, prompt=2, full=2, houlsby=1)
    assert names(packs(specs, mix, 4)) == ["llll", "liih", "pp", "f", "f"]
    assert names(packs(specs, mix, 8)) == ["llllliih", "pp", "f", "f"]
    assert names(packs(of(lora=3, ia3=3), mix, 6)) == ["llliii"]
    assert names(packs(of(lora=3, ia3=3), mix, 1)) == ["l", "l", "l", "i", "i", "i"]
    other = make_spec(**{"method.name": "ia3", "identity.data": "x"})
    assert names(packs([*of(lora=1), other], mix, 4)) == ["l", "i"]


def test_the_size_of_a_mixed_pack_is_asked_for_all_that_keep_company():
    asked = []

    def size(members):
        asked.append(len(members))
        return 4

    packs(of(lora=5, ia3=2, prompt=1), mix, size)
    assert asked == [7, 1]


def test_packs_hold_what_can_share_a_base():
    specs = [make_spec(**{"seed": s, "method.rank": r}) for s in range(2) for r in (2, 4)]
    specs += [make_spec(**{"train.learning_rate": 1e-4}), make_spec(**{"train.batch_size": 8})]
    specs += [make_spec(**{"method.name": "full", "seed": s}) for s in range(2)]
    found = packs(specs, share, 8)
    assert [len(p) for p in found] == [5, 1, 1, 1]
    assert sorted(s.run_id for p in found for s in p) == sorted(s.run_id for s in specs)


@pytest.mark.parametrize(
    "change",
    [
        {"model.weights": "x"},
        {"task.max_length": 9},
        {"protocol": "paper"},
        {"identity.data": "x"},
        {"train.batch_size": 2},
    ],
)
def test_packs_part_at_what_cannot_differ(change):
    assert len(packs([make_spec(), make_spec(**{**change, "seed": 1})], share, 8)) == 2


def test_packs_are_of_even_size():
    assert [len(p) for p in packs([make_spec(seed=s) for s in range(10)], share, 8)] == [5, 5]
    assert [len(p) for p in packs([make_spec(seed=s) for s in range(3)], share, 1)] == [1, 1, 1]


def test_a_large_grid_expands_quickly():
    start = time.perf_counter()
    found, _ = expand({"method": ["lora"]}, given={"seed": list(range(100)), "method.rank": list(range(1, 101))})
    assert len(found) == 10_000
    assert time.perf_counter() - start < 10
