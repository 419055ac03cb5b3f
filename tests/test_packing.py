"""How `pack=auto` chooses: curves by a made-up clock, one real measurement, and what is kept of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from peftbench import job, packing
from peftbench.capacity import Fit
from peftbench.errors import UserError
from peftbench.packing import DEFAULT, FEWEST, Budget, Packing, Step, Stopwatch, best, grow, line, typical_length
from peftbench.record import RunSpec
from peftbench.resolve import Resolver
from peftbench.store import Store
from peftbench.sweep import pack_up, prepare
from tests.conftest import make_spec

CURVES: dict[str, Callable[[int], float]] = {
    "falling": lambda runs: 10.0 + 0.1 * runs,
    "flat": lambda runs: 10.0 * runs,
    "rising": lambda runs: 10.0 * runs**1.2,
    "saturating": lambda runs: max(10.0, 2.5 * runs),
    "hardly": lambda runs: 10.0 * runs if runs == 1 else 9.9 * runs,
    "little": lambda runs: 10.0 * runs if runs == 1 else 9.7 * runs,
    "sagging": lambda runs: max(10.0, 2.5 * runs) + 0.1 * runs**1.5,
}


def step_of(shape: str, runs: int) -> Step:
    return Step(CURVES[shape](runs), runs * CURVES[shape](1))


def grown(
    shape: str, limit: int = 64, memory: int = 999, known: Mapping[int, Step] | None = None, factor: int = 2
) -> Any:
    """Return the curve of a shape, why it ends, and the sizes that were timed."""
    timed: list[int] = []

    def seconds(runs: int) -> Step:
        timed.append(runs)
        return step_of(shape, runs)

    curve, ended = grow(known or {}, limit, lambda most: min(most, memory), seconds, lambda curve, size: True, factor)
    assert curve == {runs: step_of(shape, runs) for runs in curve}
    return curve, ended, timed


# Decisions.


@pytest.mark.parametrize(
    ("shape", "sizes", "ended", "chosen"),
    [
        ("falling", [1, 2, 4, 8, 16, 32, 64], "runs", 64),
        ("flat", [1, 2], "flat", 1),
        ("rising", [1, 2], "flat", 1),
        ("saturating", [1, 2, 4, 8], "flat", 4),
        ("hardly", [1, 2], "flat", 1),
        ("little", [1, 2], "flat", 2),
    ],
)
def test_packs_grow_while_the_time_per_run_falls(shape: str, sizes: list[int], ended: str, chosen: int) -> None:
    curve, why, timed = grown(shape)
    assert timed == sizes
    assert why == ended
    assert best(curve, "cpu") == chosen


@pytest.mark.parametrize(
    ("shape", "sizes", "ended", "chosen"),
    [
        ("falling", [1, 4, 16, 64], "runs", 64),
        ("flat", [1, 4], "flat", 1),
        ("rising", [1, 4], "flat", 1),
        ("saturating", [1, 4, 16], "flat", 16),
        ("little", [1, 4], "flat", 4),
        ("sagging", [1, 4, 16], "flat", 4),
    ],
)
def test_packs_on_a_gpu_grow_in_longer_strides_and_the_largest_of_equals_is_taken(
    shape: str, sizes: list[int], ended: str, chosen: int
) -> None:
    curve, why, timed = grown(shape, factor=4)
    assert (timed, why, best(curve, "cuda")) == (sizes, ended, chosen)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("shape", CURVES)
@pytest.mark.parametrize("limit", [1, 2, 3, 5, 16, 64])
def test_a_chosen_pack_is_never_slower_than_a_run_alone(shape: str, limit: int, kind: str) -> None:
    curve, _, timed = grown(shape, limit, factor=packing.FACTOR[kind])
    chosen = best(curve, kind)
    assert chosen <= limit
    assert max(timed) <= limit
    assert curve[chosen].together <= curve[chosen].alone
    equal = 0 if kind == "cpu" else packing.EQUAL
    assert all(curve[chosen].share <= (1 + equal) * step.share for step in curve.values()) or chosen == 1


@pytest.mark.parametrize(("limit", "sizes"), [(1, [1]), (3, [1, 2, 3]), (12, [1, 2, 4, 8, 12]), (16, [1, 2, 4, 8, 16])])
def test_no_more_runs_are_timed_than_there_are(limit: int, sizes: list[int]) -> None:
    assert grown("falling", limit)[1:] == ("runs", sizes)


@pytest.mark.parametrize(("memory", "sizes"), [(1, [1]), (5, [1, 2, 4, 5]), (8, [1, 2, 4, 8])])
def test_predicted_memory_bounds_what_is_timed(memory: int, sizes: list[int]) -> None:
    assert grown("falling", memory=memory)[1:] == ("memory", sizes)


def test_running_out_of_memory_ends_the_curve() -> None:
    def seconds(runs: int) -> Step:
        if runs > 4:
            raise torch.OutOfMemoryError("too much")
        return Step(10.0, 10.0 * runs)

    curve, ended = grow({}, 64, lambda most: most, seconds, lambda curve, size: True)
    assert (sorted(curve), ended, best(curve, "cpu")) == ([1, 2, 4], "memory", 4)


def test_what_is_known_is_not_timed_again() -> None:
    known, _, _ = grown("falling", 4)
    curve, _, timed = grown("falling", 16, known=known)
    assert timed == [8, 16]
    assert sorted(curve) == [1, 2, 4, 8, 16]
    flat, _, _ = grown("saturating")
    assert grown("saturating", known=flat)[2] == []


class Clock:
    """Goes on by what is said."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def spent(kind: str, run_steps: int, step: float, overhead: float = 0.0) -> tuple[list[int], float]:
    """Return the sizes that a budget lets be timed without any doubt about their gain, and the seconds that takes."""
    clock = Clock()
    budget = Budget(kind, run_steps, clock)

    def seconds(runs: int) -> Step:
        clock.now += overhead + packing.STEPS[kind] * step
        return Step(step, step * runs)

    curve, _ = grow({}, packing.MOST[kind], lambda most: most, seconds, budget, packing.FACTOR[kind])
    return list(curve), clock.now


def test_short_training_is_not_measured() -> None:
    assert spent("cpu", FEWEST - 1, 0.1) == ([], 0)
    assert spent("cuda", FEWEST - 1, 0.01) == ([], 0)


@pytest.mark.parametrize("run_steps", [1000, 1500, 3000, 10**5])
@pytest.mark.parametrize("step", [0.02, 1.0])
def test_measuring_takes_less_than_a_twentieth_of_training_on_a_cpu(run_steps: int, step: float) -> None:
    clock = Clock()

    def seconds(runs: int) -> Step:
        together = step * runs * 0.94**runs
        clock.now += packing.STEPS["cpu"] * together
        return Step(together, step * runs)

    curve, _ = grow({}, 8, lambda most: most, seconds, Budget("cpu", run_steps, clock))
    assert {1, 2, 4} <= set(curve)
    assert clock.now < 0.05 * run_steps * min(curve[runs].together / runs for runs in curve)


def test_measuring_stops_after_ten_seconds_on_a_gpu() -> None:
    sizes, seconds = spent("cuda", 100_000, 0.02, overhead=0.5)
    assert sizes == [1, 4, 16, 64]
    assert seconds < 10
    sizes, seconds = spent("cuda", 100_000, 0.02, overhead=5.0)
    assert sizes == [1, 4, 16]
    # the first size, which makes what training needs too, is not counted, nor how long the last takes to set up
    assert seconds <= 5.3 + 10 + 5.3


def test_measuring_goes_on_only_while_there_is_time_to_win() -> None:
    """At 16 runs 10,000 steps take 12.5 seconds, of which measuring may take 2.5; 1,800 steps take 9 at 4 runs."""
    assert spent("cuda", 10_000, 0.02, overhead=0.5)[0] == [1, 4, 16]
    assert spent("cuda", 20_000, 0.02, overhead=0.5)[0] == [1, 4, 16, 64]
    assert spent("cuda", 1_800, 0.02, overhead=0.5)[0] == [1, 4]


def test_the_length_is_that_of_the_median_batch() -> None:
    # three buckets of 8 batches of 2: 16 short texts, 16 of middle length, 16 long
    lengths = [5] * 16 + [20] * 16 + [100] * 16
    assert typical_length(lengths, 2, 128) == 24
    assert typical_length(lengths, 2, 22) == 22
    assert typical_length([5] * 48, 2, 128) == 8


# Choices for a sweep's groups.


class Watch:
    """Stands in for what times steps; the first method's is as given, another's is `other` times as long."""

    def __init__(self, shape: str = "falling", other: float = 1.0) -> None:
        self.shape, self.other = shape, other
        self.timed: list[int] = []
        self.members: list[RunSpec] = []

    def __call__(self, members: Sequence[RunSpec]) -> Callable[[Sequence[RunSpec]], float]:
        self.members = list(members)
        watch = self

        class Started:
            length, execution = 24, "eager"

            def __call__(self, runs: Sequence[RunSpec]) -> float:
                watch.timed.append(len(runs))
                more = [watch.other if s.method["name"] != members[0].method["name"] else 1.0 for s in runs]
                return CURVES[watch.shape](len(runs)) / 1000 * sum(more) / len(more)

        return Started()


@pytest.fixture
def lines() -> list[str]:
    return []


def group(runs: int, changes: Mapping[str, Any] | None = None, steps: int = 2000) -> list[RunSpec]:
    recipe = {"steps": steps, "batch_size": 32, "learning_rate": 1e-3, "max_length": 24, "precision": "fp32"}
    return [make_spec(train=recipe, seed=seed, **(changes or {})) for seed in range(runs)]


def chooser(folder: Path, watch: Watch, lines: list[str], kind: str = "cuda", memory: int = 999) -> Packing:
    return Packing(
        Store(folder),
        kind,
        lambda members, most: min(most, memory),
        tell=lines.append,
        stopwatch=watch,
        clock=Clock(),
    )


def test_a_choice_is_told_in_a_line(tmp_path: Path, lines: list[str]) -> None:
    assert chooser(tmp_path, Watch("saturating"), lines, "cpu").size(group(40)) == 4
    assert lines == [
        "pack=auto: 4 runs side by side (1 run 10.0 ms, 4 runs 10.0 ms a step: 4.0 x), lora on toy with tiny"
    ]
    lines.clear()
    assert chooser(tmp_path / "flat", Watch("flat"), lines).size(group(40)) == 1
    assert lines == ["pack=auto: 1 run at a time (1 run 10.0 ms, 4 runs 40.0 ms a step: 1.0 x), lora on toy with tiny"]


IA3 = {"method": {"name": "ia3", "_target_": "peftbench.methods.ia3.IA3"}}


def test_a_line_names_many_methods_by_their_number() -> None:
    members = [*group(1), *group(1, IA3)]
    curve = {1: Step(0.0112, 0.0112), 2: Step(0.012, 0.0228)}
    told = "pack=auto: 2 runs side by side (1 run 11.4 ms, 2 runs 12.0 ms a step: 1.9 x), 2 methods on toy with tiny"
    assert line(members, curve, 2, "cuda") == told


def test_what_was_measured_is_kept_and_used_again(tmp_path: Path, lines: list[str]) -> None:
    watch = Watch("falling")
    assert chooser(tmp_path, watch, lines).size(group(40)) == 40
    [path] = (tmp_path / "packing").iterdir()
    kept = json.loads(path.read_text())
    assert kept["packing_id"] == path.stem
    assert kept["sizes"] == [1, 4, 16, 40]
    assert kept["step_seconds"] == pytest.approx([CURVES["falling"](n) / 1000 for n in kept["sizes"]])
    assert kept["alone_seconds"] == pytest.approx([n * CURVES["falling"](1) / 1000 for n in kept["sizes"]])
    assert (kept["chosen"], kept["ended"], kept["device_kind"]) == (40, "runs", "cpu")
    assert kept["versions"]["torch"]
    again = Watch("falling")
    for runs in (40, 33, 7, 2):  # a sweep that goes on has fewer runs left
        assert chooser(tmp_path, again, lines).size(group(runs)) == runs
    assert again.timed == []
    assert len(lines) == 5


def test_more_runs_continue_the_curve(tmp_path: Path, lines: list[str]) -> None:
    watch = Watch("falling")
    assert chooser(tmp_path, watch, lines).size(group(4)) == 4
    assert chooser(tmp_path, watch, lines).size(group(20)) == 20
    assert watch.timed == [1, 4, 1, 16, 20]  # what one run takes alone may have changed
    [path] = (tmp_path / "packing").iterdir()
    assert json.loads(path.read_text())["sizes"] == [1, 4, 16, 20]


def test_another_configuration_is_measured_by_itself(tmp_path: Path, lines: list[str]) -> None:
    watch = Watch()
    others: list[dict[str, Any]] = [{"method.rank": 4}, {"identity.data": "other"}, {"identity.device_kind": "other"}]
    for changes in ({}, *others):
        chooser(tmp_path, watch, lines).size(group(2, changes))
    assert watch.timed == [1, 2] * 4
    chooser(tmp_path, watch, lines).size(group(2, {"method.alpha": 32.0}))  # costs the same
    assert watch.timed == [1, 2] * 4


def test_a_group_of_several_methods_is_measured_in_its_order(tmp_path: Path, lines: list[str]) -> None:
    watch = Watch("falling")
    members = [spec for pair in zip(group(3), group(3, IA3), strict=True) for spec in pair]
    assert chooser(tmp_path, watch, lines).size(members) == 6
    assert watch.members == members
    assert watch.timed == [1, 1, 4, 6]  # the second is the other method alone


@pytest.mark.parametrize(("shape", "chosen"), [("falling", 8), ("flat", 1), ("sagging", 4)])
def test_a_pack_is_held_against_its_own_runs_alone(tmp_path: Path, lines: list[str], shape: str, chosen: int) -> None:
    """Later methods are three times as slow: a pack with them is no loss because the first run alone is faster."""
    watch = Watch(shape, other=3.0)
    members = [*group(1), *group(7, IA3)]
    assert chooser(tmp_path, watch, lines).size(members) == chosen


def test_one_run_and_short_groups_are_not_measured(tmp_path: Path, lines: list[str]) -> None:
    watch = Watch()
    assert chooser(tmp_path, watch, lines).size(group(1)) == 1
    assert chooser(tmp_path, watch, lines, "cpu").size(group(9, steps=50)) == DEFAULT["cpu"]
    assert chooser(tmp_path, watch, lines, "cuda").size(group(20, steps=40)) == DEFAULT["cuda"]
    assert chooser(tmp_path, watch, lines, "cuda", memory=3).size(group(9, steps=50)) == 3
    assert chooser(tmp_path, watch, lines, "cuda", memory=1).size(group(9)) == 1
    assert (watch.timed, lines, list(tmp_path.iterdir())) == ([], [], [])


def test_short_groups_take_what_is_known(tmp_path: Path, lines: list[str]) -> None:
    chooser(tmp_path, Watch("flat"), lines).size(group(9))
    watch = Watch("flat")
    assert chooser(tmp_path, watch, lines).size(group(9, steps=50)) == 1
    assert watch.timed == []


def test_memory_that_is_gone_since_bounds_what_is_known(tmp_path: Path, lines: list[str]) -> None:
    chooser(tmp_path, Watch(), lines).size(group(16))
    assert chooser(tmp_path, Watch(), lines, memory=5).size(group(16)) == 5
    assert lines[-1].startswith("pack=auto: 5 runs side by side (1 run 10.1 ms, 16 runs 11.6 ms a step")


def test_a_curve_cut_off_while_it_falls_gives_no_less_than_the_default(tmp_path: Path, lines: list[str]) -> None:
    class Slow(Clock):
        def __call__(self) -> float:
            self.now += 11.0  # each look at the clock
            return self.now

    watch = Watch("falling")
    chosen = chooser(tmp_path, watch, lines)
    chosen.clock = Slow()
    assert chosen.size(group(64)) == DEFAULT["cuda"]
    assert watch.timed == [1, 4]


def test_what_cannot_be_timed_is_said_and_takes_the_default(tmp_path: Path, lines: list[str]) -> None:
    class Broken(Watch):
        def __call__(self, members: Sequence[RunSpec]) -> Callable[[Sequence[RunSpec]], float]:
            raise UserError("model=tiny: no weights")

    assert chooser(tmp_path, Broken(), lines).size(group(40)) == DEFAULT["cuda"]
    assert lines == ["pack=auto: lora on toy with tiny could not be timed (UserError: model=tiny: no weights)"]


# Real steps.

TINY = ["model=tiny-bert", "task=tiny", "train.batch_size=4", "profile=skip", "device=cpu", "method=lora"]


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Note the sizes that are really timed."""
    timed: list[int] = []
    real = Stopwatch._seconds

    def seconds(self: Stopwatch, runs: Sequence[RunSpec]) -> float:
        timed.append(len(runs))
        return real(self, runs)

    monkeypatch.setattr(Stopwatch, "_seconds", seconds)
    return timed


def test_a_sweep_measures_once_and_packs_by_it(tmp_path: Path, looked: list[int], lines: list[str]) -> None:
    grid = [*TINY, "method.rank=2,4", "seed=range(0,8)", "train.steps=1000", f"results={tmp_path}"]
    prepared = prepare(grid, tell=lines.append)
    assert looked[:2] == [1, 2]
    assert max(looked) <= packing.MOST["cpu"]
    [path] = (tmp_path / "default" / "packing").iterdir()
    kept = json.loads(path.read_text())
    assert kept["sizes"] == looked
    assert all(0 < seconds < 10 for seconds in kept["step_seconds"])
    assert max(len(pack.specs) for pack in prepared.jobs) == kept["chosen"]
    [told] = lines
    assert told.startswith(f"pack=auto: {kept['chosen']} run")
    count = len(looked)
    again = prepare(grid, tell=lines.append)
    assert len(looked) == count
    assert [len(p.specs) for p in again.jobs] == [len(p.specs) for p in prepared.jobs]
    for size in (1, 2, 16):
        forced = prepare([*grid, f"pack={size}", "sweep.name=other"], tell=lines.append)
        assert {len(pack.specs) for pack in forced.jobs} == {size}
    assert len(looked) == count
    assert len(lines) == 2


def test_nothing_is_measured_where_memory_is_not_known(tmp_path: Path, looked: list[int]) -> None:
    grid = [*TINY, "seed=range(0,8)", "train.steps=1000", f"results={tmp_path}"]
    assert {len(pack.specs) for pack in prepare(grid, memory=lambda device: None).jobs} == {DEFAULT["cpu"]}
    assert looked == []


def test_measuring_changes_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, looked: list[int]) -> None:
    """The base is left as it was, and every run draws from its own seed."""
    monkeypatch.setattr(packing, "FEWEST", 0)
    monkeypatch.setitem(packing.SHARE, "cpu", 1000.0)

    def losses(name: str, size: str | int) -> list[Any]:
        given = ["seed=0,1", "train.steps=5", f"results={tmp_path}", f"sweep.name={name}", f"pack={size}"]
        prepared = prepare([*TINY, *given])
        for pack in prepared.jobs:
            job.train(pack)
        packs.append(len(prepared.jobs))
        return [record["trace"]["loss"] for record in Store(tmp_path / name).records()]

    packs: list[int] = []
    measured = losses("measured", "auto")
    assert looked == [1, 2]
    assert losses("forced", 2 // packs[0]) == measured
    assert looked == [1, 2]


# Memory.


def fit_of(monkeypatch: pytest.MonkeyPatch, peaks: Mapping[str, Callable[[int], int]], free: int) -> tuple[Any, Any]:
    """Return what decides by memory where runs of a method need `peaks` bytes, and what was predicted."""
    predicted: list[tuple[str, int]] = []

    def peak(self: Fit, setting: Any, runs: int) -> int:
        name = setting.specs[0].method["name"]
        predicted.append((name, runs))
        return peaks[name](runs)

    monkeypatch.setattr(Fit, "_peak", peak)
    monkeypatch.setattr(Fit, "_at_most", lambda self, setting, runs: 10**12)
    return Fit("cpu", free, free, Resolver("cpu").shapes), predicted


def real_group(method: str, runs: int) -> list[RunSpec]:
    point = {"model": "tiny-bert", "method": method, "task": "tiny", "train": "default", "profile": "skip"}
    resolver = Resolver("cpu")
    return [resolver.spec({**point, "seed": seed, "protocol": "held_out"}) for seed in range(runs)]


def test_so_many_times_one_run_s_memory_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    fit, predicted = fit_of(monkeypatch, {"lora": lambda runs: 500 + 100 * runs}, 12_000)
    assert fit.pack_size(real_group("lora", 1), 16) == 16  # 600 × 16 = 9600 of 10,000
    assert predicted == [("lora", 1)]
    assert fit.pack_size(real_group("lora", 1), 64) == 64
    assert ("lora", 64) in predicted
    assert fit.pack_size(real_group("lora", 1), 128) == 95


def test_the_hungriest_method_bounds_a_mixed_pack(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = {"lora": lambda runs: 500 + 10 * runs, "ia3": lambda runs: 500 + 100 * runs}
    fit, _ = fit_of(monkeypatch, peaks, 1200)
    assert fit.pack_size(real_group("lora", 2), 64) == 50
    assert fit.pack_size([*real_group("lora", 2), *real_group("ia3", 1)], 64) == 5
    assert fit.pack_size([*real_group("ia3", 1), *real_group("lora", 2)], 64) == 5
    assert [line.split(" would")[0] for line in fit.lines] == [
        "lora on tiny-bert: packs of 50, 51 runs",
        "ia3 on tiny-bert: packs of 5, 6 runs",
    ]


@pytest.mark.parametrize(
    ("device", "execution", "mixed"),
    [("cuda", "eager", True), ("cuda", "compiled", True), ("cuda", "graphs", False), ("cpu", "eager", False)],
)
def test_auto_mixes_methods_where_launches_are_what_costs(
    tmp_path: Path, device: str, execution: str, mixed: bool
) -> None:
    seen: list[bool] = []

    class Planned:
        resolver = SimpleNamespace(device=device)

        def packs(self, wanted: Any, size: Any, early: bool, mix: Any) -> list[Any]:
            seen.extend(mix(spec) for spec in wanted)
            return []

    wanted: Any = [make_spec(**{"train.execution": execution})]
    planned: Any = Planned()
    pack_up(planned, wanted, "auto", Store(tmp_path), None, lambda line: None)
    assert seen == [mixed]
