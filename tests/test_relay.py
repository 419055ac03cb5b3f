"""Runs of unequal length in one pack: each gives what it gives alone, whoever leaves and joins on its way."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

import peftbench
from peftbench import assembly as assemblies
from peftbench import registry, resolve, training
from peftbench.config import TrainConfig, build
from peftbench.engine import compiling
from peftbench.engine.batches import make_buckets, packed_batches
from peftbench.engine.graphs import GraphSteps
from peftbench.engine.moments import Storage
from peftbench.engine.optimizer import PackedAdamW, Recipe
from peftbench.errors import UserError
from peftbench.job import Pack
from peftbench.plan import QUEUE, Sharing, packs
from peftbench.progress import Quiet
from peftbench.record import RunRecord, RunSpec
from peftbench.relay import Relay
from peftbench.run import run_pack
from peftbench.store import Store
from tests.conftest import make_spec
from tests.test_graphs import Again
from tests.test_run import tiny


def stretches(totals: list[int], per_epoch: int, places: int) -> list[tuple[list[int], int]]:
    """Return members and length of all stretches of runs that go to their ends."""
    relay = Relay(totals, per_epoch, places)
    found = []
    while members := relay.begin():
        found.append((members, relay.length()))
        relay.advance(relay.length())
        relay.leave([run for run in members if relay.done[run] == totals[run]])
    assert relay.done == totals
    return found


def test_runs_of_equal_length_train_in_one_stretch() -> None:
    assert stretches([25] * 4, 10, 4) == [([0, 1, 2, 3], 25)]
    assert stretches([25] * 4, 10, 3) == [([0, 1, 2], 25), ([3], 25)]


def test_the_longest_begin_and_shorter_ones_take_their_places() -> None:
    assert stretches([10, 30, 10, 30, 20], 10, 2) == [([1, 3], 30), ([0, 4], 10), ([2, 4], 10)]


def test_runs_join_at_the_beginning_of_an_epoch_only() -> None:
    # run 1 ends within its second epoch: run 2 waits for its end
    assert stretches([40, 13, 12], 10, 2) == [([0, 1], 13), ([0], 7), ([0, 2], 12), ([0], 8)]


def test_when_all_have_left_the_next_begin_at_once() -> None:
    assert stretches([13, 13, 5], 10, 2) == [([0, 1], 13), ([2], 5)]


def test_no_place_stays_empty_for_longer_than_an_epoch_while_a_run_waits() -> None:
    for totals in itertools.permutations([7, 12, 20, 33, 33]):
        found = stretches(list(totals), 10, 3)
        seen: set[int] = set()
        for members, length in found:
            seen |= set(members)
            assert len(members) == 3 or length <= 10 or len(seen) == 5
        assert sum(len(members) * length for members, length in found) == sum(totals)


def run(pack: list[RunSpec], folder: Path, places: int | None = None) -> list[RunRecord]:
    """Train one pack into a folder of its own."""
    records = run_pack(pack, Store(folder), Quiet(), places=places)
    assert [r.run_id for r in records] == [s.run_id for s in pack]
    assert all(r.status in ("completed", "diverged") for r in records), [r.error for r in records]
    return records


def same_as_alone(pack: list[RunSpec], folder: Path, places: int | None = None) -> list[RunRecord]:
    """Assert that every run of a pack gives what it gives alone; returns the pack's records."""
    packed = run(pack, folder / "packed", places)
    for i, spec in enumerate(pack):
        (alone,) = run([spec], folder / f"alone-{i}")
        assert packed[i].trace is not None
        assert alone.trace is not None
        assert len(packed[i].trace["loss"]) == len(alone.trace["loss"])
        np.testing.assert_allclose(packed[i].trace["loss"], alone.trace["loss"], rtol=1e-5)
        assert packed[i].trace["learning_rate"] == alone.trace["learning_rate"]
        assert packed[i].quality is not None
        assert alone.quality is not None
        assert packed[i].quality["selected_step"] == alone.quality["selected_step"]
        assert packed[i].quality.get("stopped") == alone.quality.get("stopped")
        ours, theirs = packed[i].quality["evaluations"], alone.quality["evaluations"]
        assert [e["step"] for e in ours] == [e["step"] for e in theirs]
        for mine, own in zip(ours, theirs, strict=True):
            assert mine["metrics"] == pytest.approx(own["metrics"], abs=1e-5)
        assert packed[i].quality["test"] == pytest.approx(alone.quality["test"], abs=1e-5)
        assert packed[i].quality["items"]["test"]["predictions"] == alone.quality["items"]["test"]["predictions"]
    return packed


def side_by_side(records: list[RunRecord]) -> list[list[tuple[int, int]]]:
    """Return the own step and the number of runs at the beginning of each run's stretches."""
    return [[(s["step"], s["runs"]) for s in (r.pack or {}).get("stretches", [])] for r in records]


def each(settings: list[dict[str, Any]], **given: Any) -> list[RunSpec]:
    """Return one run for each of the settings, each with a seed of its own."""
    return [spec for seed, own in enumerate(settings) for spec in tiny(seed=seed, **given, **own)]


PACKS = {  # an epoch of the tiny task has 30 steps
    "lora": [
        {"train__steps": 65, "method__rank": 2, "train__learning_rate": 3e-3},
        {"train__steps": 12, "method__rank": 8, "train__learning_rate": 1e-2},
        {"train__steps": 36, "method__rank": 4, "method__alpha": 4.0},
        {"train__epochs": 1, "method__rank": 8},
    ],
    "ia3": [{"train__steps": 36}, {"train__steps": 7}, {"train__epochs": 2}],
    "houlsby": [
        {"train__steps": 36, "method__bottleneck": 4},
        {"train__steps": 65, "method__bottleneck": 8},
        {"train__steps": 10, "method__bottleneck": 16},
    ],
    "adalora": [
        # goes on after 36 steps in its final phase, with the pruned triplets fixed
        {"train__steps": 65, "method__target_rank": 2, "method__update_every": 3, "train__learning_rate": 2e-2},
        {"train__steps": 11, "method__target_rank": 4, "method__update_every": 2},
        {"train__steps": 36, "method__target_rank": 3, "method__update_every": 4, "method__beta1": 0.5},
        {"train__steps": 1, "method__target_rank": 2},
    ],
}


@pytest.mark.parametrize("method", PACKS)
def test_runs_of_unequal_length_give_what_they_give_alone(method: str, tmp_path: Path) -> None:
    records = same_as_alone(each(PACKS[method], method=method, train__weight_decay=0.01), tmp_path, places=2)
    assert max(len(s) for s in side_by_side(records)) >= 2


PACKABLE = [
    name
    for name in registry.options("method")
    if registry.load_class(registry.section("method", name)["_target_"], "method").traits.packable
]


@pytest.mark.parametrize("method", PACKABLE)
def test_every_method_that_packs_goes_on_among_others(method: str, tmp_path: Path) -> None:
    """Whatever a method keeps from step to step has to travel with a run."""
    size = {"method__group_size": 8} if method == "road" else {}
    pack = each([{"train__steps": n} for n in (8, 3)], method=method, train__learning_rate=1e-3, **size)
    same_as_alone(pack, tmp_path)


def test_all_at_once_and_evaluations_within_epochs(tmp_path: Path) -> None:
    records = same_as_alone(each(PACKS["lora"], method="lora", train__evaluate_every=10), tmp_path)
    assert side_by_side(records) == [
        [(0, 4), (12, 3), (30, 2), (36, 1)],
        [],
        [(0, 4), (12, 3), (30, 2)],
        [(0, 4), (12, 3)],
    ]


def test_runs_that_wait_join_where_an_epoch_begins(tmp_path: Path) -> None:
    records = same_as_alone(each(PACKS["lora"], method="lora"), tmp_path, places=2)
    assert side_by_side(records) == [
        [(0, 2), (36, 1), (60, 2)],  # with the third, alone until its epoch ends, with the second
        [(0, 1)],  # in the place of the fourth, when the first is done
        [(0, 2)],
        [(0, 2), (5, 1)],
    ]
    assert [(r.pack["size"], r.pack["index"], r.pack["runs"]) for r in records if r.pack] == [
        (2, i, 4) for i in range(4)
    ]


def test_methods_of_a_mixed_pack_leave_and_join(tmp_path: Path) -> None:
    pack = [
        *tiny(method="lora", seed=0, train__steps=40, method__rank=4),
        *tiny(method="lora", seed=1, train__steps=10, method__rank=8),
        *tiny(method="ia3", seed=2, train__steps=35),
        *tiny(method="adalora", seed=3, train__steps=33, method__update_every=3),
        *tiny(method="adalora", seed=4, train__steps=8, method__target_rank=4),
    ]
    same_as_alone(pack, tmp_path, places=3)


@pytest.mark.parametrize("change", [{"train__accumulation": 4}, {"train__precision": "bf16"}], ids=str)
def test_accumulated_and_bf16_steps_go_on_as_they_were(change: dict[str, Any], tmp_path: Path) -> None:
    pack = each([{"train__steps": 40}, {"train__steps": 8}], method="lora", **change)
    packed = run(pack, tmp_path / "packed")
    for i, spec in enumerate(pack):
        (alone,) = run([spec], tmp_path / str(i))
        rtol = 1e-2 if "train__precision" in change else 1e-5
        np.testing.assert_allclose(packed[i].trace["loss"], alone.trace["loss"], rtol=rtol)  # type: ignore[index]


def test_a_pack_of_equal_runs_is_put_together_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, real = [], training.assembled

    def counted(setting: Any) -> Any:
        made.append(len(setting.specs))
        return real(setting)

    monkeypatch.setattr(training, "assembled", counted)
    records = run(each([{}, {}, {}], method="lora", train__steps=40), tmp_path / "even")
    assert made == [3]
    assert [sorted(r.pack or {}) for r in records] == [["index", "seconds", "size"]] * 3
    made.clear()
    run(each([{"train__steps": 40}, {"train__steps": 5}], method="lora"), tmp_path / "uneven")
    assert made == [2, 1, 1]  # both; the short one to be tested; the long one


class Heard(Quiet):
    """Keeps the order in which records come."""

    def __init__(self) -> None:
        self.seeds: list[int] = []

    def record(self, record: RunRecord) -> None:
        self.seeds.append(record.spec["seed"])


def test_a_record_is_written_when_its_run_is_done(tmp_path: Path) -> None:
    heard = Heard()
    pack = each([{"train__steps": n} for n in (35, 5, 20)], method="lora")
    records = run_pack(pack, Store(tmp_path), heard)
    assert heard.seeds == [1, 2, 0]
    assert [r.spec["seed"] for r in records] == [0, 1, 2]


def test_kept_adapters_are_those_of_runs_alone(tmp_path: Path) -> None:
    pack = each(PACKS["houlsby"], method="houlsby")
    run_pack(pack, Store(tmp_path / "packed"), Quiet(), places=2, save_adapters=True)
    for spec in pack:
        run_pack([spec], Store(tmp_path / "alone"), Quiet(), save_adapters=True)
        for name in ("adapter.safetensors", "head.safetensors"):
            ours, theirs = (
                peftbench.methods.adapter.load_file(Store(tmp_path / place).adapter(spec.run_id) / name)
                for place in ("packed", "alone")
            )
            assert ours.keys() == theirs.keys()
            for key, tensor in theirs.items():
                torch.testing.assert_close(ours[key], tensor, rtol=1e-4, atol=1e-6)


# Patience.


def test_no_patience_leaves_every_id_alone() -> None:
    without, named = make_spec(), make_spec(**{"train.patience": None})
    assert without.run_id == named.run_id
    assert make_spec(**{"train.patience": 2}).run_id != without.run_id
    with pytest.raises(UserError, match="train.patience=0: expected at least 1"):
        build(TrainConfig, {"patience": 0}, "train")


def test_a_run_out_of_patience_stops_and_says_so(tmp_path: Path) -> None:
    common = {"method": "lora", "train__steps": 60, "train__evaluate_every": 5}
    still = {"train__learning_rate": 1e-12, "train__patience": 3}
    pack = each([{}, still, {"train__patience": 4, "train__learning_rate": 3e-3}], **common)
    records = same_as_alone(pack, tmp_path)
    stopped = records[1]
    assert stopped.quality is not None
    assert stopped.trace is not None
    assert stopped.quality["stopped"] == {"step": 20, "of": 60, "reason": "no better accuracy in 3 evaluations"}
    assert stopped.quality["selected_step"] == 5
    assert len(stopped.trace["loss"]) == 20
    assert "stopped" not in (records[0].quality or {})
    assert len(records[0].trace["loss"]) == 60  # type: ignore[index]


def test_patience_that_runs_out_with_the_last_evaluation_is_no_early_stop(tmp_path: Path) -> None:
    (record,) = run(
        tiny(
            method="lora",
            train__steps=20,
            train__evaluate_every=5,
            train__learning_rate=1e-12,
            train__patience=3,
        ),
        tmp_path,
    )
    assert "stopped" not in (record.quality or {})


# Divergence.


def test_a_run_that_diverges_leaves_and_its_neighbours_are_as_alone(tmp_path: Path) -> None:
    wild = {"train__learning_rate": 1e37, "train__clip_norm": 0.0}
    settings = [{"train__steps": 65}, {"train__steps": 65, **wild}, {"train__steps": 40}, {"train__steps": 32}]
    pack = each(settings, method="houlsby", method__bottleneck=8)
    packed = run(pack, tmp_path / "packed", places=3)
    assert [r.status for r in packed] == ["completed", "diverged", "completed", "completed"]
    assert packed[1].quality is None
    assert "finite" in str(packed[1].error)
    assert len(packed[1].trace["loss"]) == 30  # type: ignore[index]  # it left after the first evaluation
    assert side_by_side(packed) == [[(0, 3), (30, 3), (40, 2), (62, 1)], [(0, 3)], [(0, 3), (30, 3)], [(0, 3), (10, 2)]]
    tame = run(each([*settings[:1], {"train__steps": 65}, *settings[2:3]], method="houlsby", method__bottleneck=8),
               tmp_path / "tame")  # fmt: skip
    for i in (0, 2, 3):
        (alone,) = run([pack[i]], tmp_path / str(i))
        assert packed[i].trace is not None
        assert alone.trace is not None
        np.testing.assert_allclose(packed[i].trace["loss"], alone.trace["loss"], rtol=1e-5)
        if i < 3:
            beside = tame[i].trace
            assert beside is not None
            assert packed[i].trace["loss"][:30] == beside["loss"][:30]


def test_where_all_diverge_nothing_is_tested(tmp_path: Path) -> None:
    wild = {"train__learning_rate": 1e37, "train__clip_norm": 0.0, "method__bottleneck": 8}
    records = run(each([{**wild, "train__steps": n} for n in (40, 5)], method="houlsby"), tmp_path)
    assert [r.status for r in records] == ["diverged"] * 2
    assert all(r.quality is None for r in records)


# Ways of running steps.


def test_graphs_are_captured_anew_for_other_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack = each([{"train__steps": 65}, {"train__steps": 36}, {"train__steps": 12}], method="lora")
    eager = run(pack, tmp_path / "eager", places=2)
    made: list[GraphSteps] = []

    def graphs(execution: str, *parts: Any, **recipe: Any) -> GraphSteps:
        made.append(GraphSteps(*parts, **recipe, recorder=Again()))
        return made[-1]

    monkeypatch.setattr(training, "stepper", graphs)
    replayed = run(pack, tmp_path / "graphs", places=2)
    assert len(made) == len({id(steps._optimizer) for steps in made}) == 4
    assert sum(steps.replayed for steps in made) > 40
    for ours, theirs in zip(replayed, eager, strict=True):
        assert ours.trace == theirs.trace
        assert ours.quality == theirs.quality


def test_trace_sums_up_what_was_replayed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack = each([{"train__steps": 65}, {"train__steps": 36}], method="lora")
    pack = [dataclasses.replace(s, train={**s.train, "execution": "graphs"}) for s in pack]
    steps = functools.partial(GraphSteps, recorder=Again())
    monkeypatch.setattr(training, "stepper", lambda execution, *parts, **recipe: steps(*parts, **recipe))
    long, short = run(pack, tmp_path)
    assert (long.trace["execution"], short.trace["execution"]) == ("graphs", "graphs")  # type: ignore[index]
    assert 0 < short.trace["replayed_steps"] < long.trace["replayed_steps"] < 65  # type: ignore[index]


def test_layers_are_not_compiled_anew_for_members_of_the_same_shape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    counters.clear()
    compiled, real = [], training._stretch

    def counted(pack: Any, assembly: Any, members: Any) -> Any:
        found = real(pack, assembly, members)
        compiled.append((len(members), counters["frames"]["ok"]))
        return found

    monkeypatch.setattr(training, "_stretch", counted)
    layers = functools.partial(compiling.compiled_layers, backend="aot_eager")
    monkeypatch.setattr(assemblies, "compiled_layers", layers)
    lengths = [{"train__steps": n} for n in (30, 60, 30)]
    run(each(lengths, method="lora", train__execution="compiled"), tmp_path, places=2)
    (first, once), (second, then) = compiled
    assert (first, second) == (2, 2)
    assert once == then > 0


# Memory that runs out.


def test_runs_that_are_done_stay_done_when_memory_runs_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peftbench import run as module

    real, tried, lines = module.train_runs, [], []

    def tight(setting: Any, splits: Any, encoded: Any, listener: Any, keep: Any, places: int, *more: Any) -> Any:
        tried.append((len(setting.specs), places))
        for outcomes in real(setting, splits, encoded, listener, keep, places, *more):
            yield outcomes
            if places > 1:
                raise torch.OutOfMemoryError("CUDA out of memory.")

    class Ears(Quiet):
        def note(self, line: str) -> None:
            lines.append(line)

    monkeypatch.setattr(module, "train_runs", tight)
    pack = each([{"train__steps": n} for n in (20, 5, 20, 7, 6, 20, 8)], method="lora")
    records = run_pack(pack, Store(tmp_path), Ears(), places=3)
    assert [r.status for r in records] == ["completed"] * 7
    # three are done at once; of the others one with two places, and what is left then one after the other
    assert tried == [(7, 3), (4, 2), (3, 1)]
    sizes = [(r.pack or {}).get("out_of_memory_at") for r in records]
    assert sizes == [None, [3, 2], None, [3], [3, 2], None, [3, 2]]
    assert lines == [
        "out of memory with 3 runs side by side: now at most 2",
        "out of memory with 2 runs side by side: now at most 1",
    ]


# Plans.


def share(spec: RunSpec) -> Sharing:
    return Sharing(True, frozenset({"rank"}))


def lengths(*values: Any, key: str = "train.steps") -> list[RunSpec]:
    return [make_spec(**{key: v, "seed": i}) for i, v in enumerate(values)]


def test_runs_of_unequal_length_share_a_pack_with_a_queue() -> None:
    shapes = [(len(p), p.places) for p in packs(lengths(*[1, 2] * 5), share, 4)]
    assert shapes == [(10, 4)]
    assert [(len(p), p.places) for p in packs(lengths(1, 2, 3), share, 8)] == [(3, 3)]
    epochs = packs(lengths(1.0, 3.0, key="train.epochs"), share, 2)
    assert [(len(p), p.places) for p in epochs] == [(2, 2)]
    many = packs(lengths(*[1, 2] * 2 * QUEUE), share, 2)
    assert [(len(p), p.places) for p in many] == [(2 * QUEUE, 2)] * 2
    assert [(len(p), p.places) for p in packs(lengths(1, 2, 3), share, 1)] == [(1, 1)] * 3


def test_runs_of_equal_length_make_even_packs_as_ever() -> None:
    assert [(len(p), p.places) for p in packs(lengths(*[5] * 10), share, 8)] == [(5, 5)] * 2
    # epochs say nothing where steps are given
    even = [make_spec(**{"train.steps": 5, "train.epochs": e, "seed": e}) for e in range(1, 11)]
    assert [len(p) for p in packs(even, share, 8)] == [5, 5]


def test_runs_that_may_stop_early_wait_in_a_queue() -> None:
    specs = [make_spec(**{"train.patience": 2, "seed": s}) for s in range(10)]
    assert [(len(p), p.places) for p in packs(specs, share, 4)] == [(10, 4)]


def test_places_travel_with_a_pack() -> None:
    pack = Pack(lengths(1, 2, 3), "/tmp/somewhere", places=2)
    assert Pack.decode(pack.encode()) == pack
    assert dataclasses.replace(pack, places=None) != pack


# Batches and moments.


def test_a_run_sees_the_same_batches_whenever_it_begins() -> None:
    buckets = make_buckets([3 + (7 * i) % 40 for i in range(203)], 8, 64)
    alone = list(packed_batches(buckets, 8, [5], 70))
    per_epoch = sum(b.epoch == 0 for b in alone)
    assert 20 < per_epoch < 35
    assert [b.length for b in alone[:per_epoch]] == [b.length for b in alone[per_epoch : 2 * per_epoch]]
    late = list(packed_batches(buckets, 8, [2, 5], 60, [3 * per_epoch, 0]))
    rest = list(packed_batches(buckets, 8, [5, 2], 50, [20, per_epoch + 20]))
    for ours, theirs in zip(alone[:60], late, strict=True):
        assert np.array_equal(ours.items[0], theirs.items[1])
        assert ours.length == theirs.length
    for ours, theirs in zip(alone[20:], rest, strict=True):
        assert np.array_equal(ours.items[0], theirs.items[0])
    with pytest.raises(AssertionError, match="parts of an epoch"):
        next(packed_batches(buckets, 8, [2, 5], 5, [1, 0]))


RECIPES = [Recipe(1e-2, 0.1, 0.5, "linear", 0.2), Recipe(3e-2, 0.0, 0.0, "cosine"), Recipe(1e-1, 0.2, 1.0, "constant")]


def _optimizer(values: list[torch.Tensor], recipes: list[Recipe], storage: Storage, **counts: Any) -> PackedAdamW:
    packed = [torch.nn.Parameter(v.clone()) for v in values]
    return PackedAdamW(packed, [], recipes, storage=storage, **counts)


@pytest.mark.parametrize("storage", [Storage(), Storage(eight_bits=True)], ids=["fp32", "8bit"])
def test_moments_and_counts_go_on_bit_for_bit_among_others(storage: Storage) -> None:
    """Three runs of 9, 7 and 20 steps, the last begun 4 steps early and left by the second on the way."""
    g = torch.Generator().manual_seed(0)
    start = [torch.randn(3, *shape, generator=g) for shape in [(4, 60), (50,)]]
    gradients = [[torch.randn(3, *shape, generator=g) for shape in [(4, 60), (50,)]] for _ in range(20)]
    totals = [9, 7, 20]

    def steps(optimizer: PackedAdamW, runs: list[int], count: int) -> None:
        for k in range(count):
            for i, p in enumerate(optimizer.packed):
                p.grad = torch.stack([gradients[optimizer.done[j] + k][i][run] for j, run in enumerate(runs)])
            optimizer.step(torch.zeros(len(runs)))

    def views(optimizer: PackedAdamW, run: int) -> dict[str, torch.Tensor]:
        return {str(i): p[run] for i, p in enumerate(optimizer.packed)}

    def moved(optimizer: PackedAdamW, runs: list[int], stay: list[int], length: int) -> PackedAdamW:
        chosen = [torch.stack([p[runs.index(r)].detach() for r in stay]) for p in optimizer.packed]
        done = [optimizer.done[runs.index(r)] + optimizer.step_count for r in stay]
        recipes = [RECIPES[r] for r in stay]
        new = _optimizer(chosen, recipes, storage, steps=[totals[r] for r in stay], done=done, length=length)
        states = [optimizer.moments_of_run(runs.index(r), views(optimizer, runs.index(r))) for r in stay]
        new.resume({i: (views(new, i), state) for i, state in enumerate(states)})
        return new

    alone, own = [], 4 * 60 + 50  # what follows in a row of 8-bit moments belongs to no parameter
    for run in range(3):
        optimizer = _optimizer([v[run : run + 1] for v in start], [RECIPES[run]], storage, steps=totals[run])
        steps(optimizer, [run], totals[run])
        alone.append(optimizer.flat[0, :own])
    first = _optimizer([v[2:] for v in start], RECIPES[2:], storage, steps=totals[2], length=4)
    steps(first, [2], 4)
    both = moved(first, [2], [2], 1)
    mixed = _optimizer([torch.cat([v[:2], p.detach()]) for v, p in zip(start, first.packed, strict=True)],
                       RECIPES, storage, steps=totals, done=[0, 0, 4], length=7)  # fmt: skip
    mixed.resume({2: (views(mixed, 2), both.moments_of_run(0, views(both, 0)))})
    steps(mixed, [0, 1, 2], 7)
    assert torch.equal(mixed.flat[1, :own], alone[1])
    last = moved(mixed, [0, 1, 2], [0, 2], 2)
    assert last.done == (7, 11)
    steps(last, [0, 2], 2)
    assert torch.equal(last.flat[0, :own], alone[0])
    final = moved(last, [0, 2], [2], 7)
    steps(final, [2], 7)
    assert torch.equal(final.flat[0, :own], alone[2])


# On a GPU.


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"train.execution": "graphs"},
        {"train.execution": "compiled_graphs"},
        {"train.optimizer": "paged_adamw8bit"},
        {"train.execution": "graphs", "train.accumulation": 2},
    ],
    ids=lambda how: "-".join(map(str, how.values())) or "eager",
)
def test_runs_leave_and_join_on_a_gpu(how: dict[str, Any], tmp_path: Path) -> None:
    common = {"model": "tiny-bert", "task": "tiny", "profile": "skip", "method": "lora"}
    common["train.dropout"] = 0.1
    common |= {"train.batch_size": 8, **how}
    pack = []
    for seed, steps in enumerate((95, 66, 36, 20)):
        grid = {**common, "seed": seed, "train.steps": steps}
        pack += resolve.plan(resolve.demand({k: [v] for k, v in grid.items()}, None), "cuda").specs
    packed = run(pack, tmp_path / "packed", places=2)
    assert max(len(s) for s in side_by_side(packed)) >= 2
    for i, spec in enumerate(pack):
        (alone,) = run([spec], tmp_path / str(i))
        assert packed[i].trace is not None
        assert alone.trace is not None
        if "graphs" in str(how):
            assert packed[i].trace["execution"] == alone.trace["execution"] == how["train.execution"]
        np.testing.assert_allclose(packed[i].trace["loss"], alone.trace["loss"], rtol=1e-3)
        assert packed[i].trace["learning_rate"] == alone.trace["learning_rate"]
