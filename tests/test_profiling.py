"""The profiler's instruments against figures worked out by hand."""

from __future__ import annotations

import functools
import gzip
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from peftbench import engine
from peftbench.assembly import Setting, backbone_of
from peftbench.cost import cost_of, trial_of
from peftbench.profiling.cost import Trial
from peftbench.profiling.energy import energy_of
from peftbench.profiling.flops import analytic_flops_per_token, counted_flops
from peftbench.profiling.replay import COMPONENTS
from peftbench.profiling.timing import Timing, best_of_windows, copy_bandwidth, matmul_ceiling, step_shares, time_steps
from peftbench.profiling.trace import count_kernels, kernels_per_step, write_timeline
from peftbench.profiling.traffic import traffic_of
from peftbench.progress import Quiet
from peftbench.record import RunSpec
from peftbench.resolve import demand, plan
from peftbench.store import Store

CPU = torch.device("cpu")


def test_a_linear_map_costs_two_flops_a_weight_forward_and_four_backward() -> None:
    x, w = torch.randn(5, 7, requires_grad=True), torch.randn(7, 3, requires_grad=True)
    assert counted_flops(lambda: x @ w) == 2 * 5 * 7 * 3
    assert counted_flops(lambda: (x @ w).sum().backward()) == 6 * 5 * 7 * 3


def test_products_added_in_place_count() -> None:
    y, x, w = torch.randn(5, 3), torch.randn(5, 7), torch.randn(7, 3)
    assert counted_flops(lambda: y.addmm_(x, w)) == 2 * 5 * 7 * 3
    assert counted_flops(lambda: y[None].baddbmm_(x[None], w[None])) == 2 * 5 * 7 * 3


@pytest.mark.parametrize("key_heads", [8, 2], ids=["equal heads", "grouped heads"])
def test_attention_costs_its_two_products(key_heads: int) -> None:
    q = torch.randn(2, 8, 16, 32, requires_grad=True)
    k, v = (torch.randn(2, key_heads, 16, 32, requires_grad=True) for _ in range(2))

    def step() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=key_heads != 8)

    forward = 2 * 2 * 8 * 16 * 16 * 32 * 2
    assert counted_flops(step) == forward
    # the backward of a fused kernel computes the scores again: five products to the forward's two
    assert counted_flops(lambda: step().sum().backward()) in (forward * 3, forward * 7 // 2)


def test_analytic_flops_by_hand() -> None:
    assert analytic_flops_per_token(10, 3, backward_through_base=True) == 58
    assert analytic_flops_per_token(10, 3, backward_through_base=False) == 38


def test_timing_takes_the_steps_asked_for_within_the_time_given() -> None:
    timing = time_steps(lambda: time.sleep(0.002), CPU, min_warmup=3, steps=7, max_seconds=5)
    assert len(timing.samples) == 7
    assert timing.warmup_steps >= 3
    assert 0.002 <= timing.percentile(10) <= timing.percentile(50) <= timing.percentile(90)
    assert len(time_steps(lambda: time.sleep(0.02), CPU, min_warmup=1, steps=1000, max_seconds=0.2).samples) < 20


class Clock:
    """Time that passes in sleep alone."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Sleeper:
    """Objective and optimizer whose phases last 20, 10 and 5 ms in each of `chunks`, the last one once."""

    def __init__(self, chunks: int = 1, clock: Any = time) -> None:
        self.w, self.chunks, self.clock = torch.zeros(1, requires_grad=True), chunks, clock

    def loss_sum(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        self.clock.sleep(0.02)
        losses = self.w * 1
        losses.register_hook(lambda _: self.clock.sleep(0.01))
        return losses * 1

    def step(self, losses: torch.Tensor) -> None:
        self.clock.sleep(0.005)

    def train_step(self) -> None:
        for _ in range(self.chunks):
            losses = self.loss_sum({})
            losses.sum().backward()
        self.step(losses.detach())


@pytest.mark.parametrize("chunks", [1, 2])
def test_shares_of_a_step_add_up(chunks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr("peftbench.profiling.timing.time", clock)
    sleeper = Sleeper(chunks, clock)
    shares = step_shares(sleeper.train_step, CPU, sleeper, sleeper, repeats=3)
    assert shares is not None
    total = 0.03 * chunks + 0.005
    expected = {"forward": 0.02 * chunks / total, "backward": 0.01 * chunks / total, "optimizer": 0.005 / total}
    assert shares == pytest.approx(expected)
    assert set(vars(sleeper)) == {"w", "chunks", "clock"}


def test_a_step_that_hides_its_phases_has_no_shares() -> None:
    assert step_shares(lambda: None, CPU, Sleeper(), Sleeper(), 1) is None


def test_traffic_by_hand() -> None:
    a, b = torch.ones(4, 8), torch.ones(8, 2)
    product = traffic_of(lambda: a @ b)
    assert (product.operations, product.bytes) == (1, 4 * (32 + 16 + 8))
    views = traffic_of(lambda: a.view(8, 4).transpose(0, 1).detach()[:2].expand(2, 2, 8))
    assert (views.operations, views.bytes) == (0, 0)
    assert traffic_of(lambda: a.add_(a[:1].expand(4, 8))).bytes == 4 * (32 + 8 + 32)
    assert traffic_of(lambda: a.zero_()).bytes == 4 * 32
    assert traffic_of(lambda: a.copy_(torch.empty(4, 8))).bytes == 4 * 64


def test_a_look_up_reads_the_rows_it_returns() -> None:
    table, rows = torch.ones(1000, 8), torch.tensor([3, 5])
    assert traffic_of(lambda: torch.nn.functional.embedding(rows, table)).bytes == 2 * 4 * 16 + 2 * 8


def test_fused_updates_write_what_they_change() -> None:
    w = torch.zeros(1000, requires_grad=True)
    w.grad = torch.ones(1000)
    optimizer = torch.optim.AdamW([w], fused=True)
    optimizer.step()
    # reads parameter, gradient and two moments; writes all of them and the step, as its schema has it
    assert 8 * 4000 <= traffic_of(optimizer.step).bytes < 9 * 4000


def test_a_timeline_has_a_range_for_each_phase_of_each_step(tmp_path: Path) -> None:
    sleeper = Sleeper()
    path = tmp_path / "trace.json.gz"
    write_timeline(path, sleeper.train_step, CPU, sleeper, sleeper, steps=2)
    trace = json.loads(gzip.decompress(path.read_bytes()))
    ranges = [e for e in trace["traceEvents"] if e.get("cat") == "user_annotation" and "dur" in e]
    spent = {
        name: [e["dur"] / 1e6 for e in ranges if e["name"] == name] for name in ("forward", "backward", "optimizer")
    }
    assert [len(durations) for durations in spent.values()] == [2, 2, 2]
    assert min(spent["forward"]) >= 0.02
    assert min(spent["backward"]) >= 0.01
    assert min(spent["optimizer"]) >= 0.005
    assert list(tmp_path.iterdir()) == [path]
    assert set(vars(sleeper)) == {"w", "chunks", "clock"}


def test_a_timeline_that_cannot_be_written_whole_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sleeper = Sleeper()
    cut = lambda self, path: Path(path).write_text('{"traceEvents": [')  # noqa: E731
    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", cut)
    with pytest.raises(OSError, match="space"):
        write_timeline(tmp_path / "trace.json.gz", sleeper.train_step, CPU, sleeper, sleeper, steps=1)
    assert not list(tmp_path.iterdir())


def test_kernels_are_counted_on_a_gpu_alone() -> None:
    events = [{"cat": "kernel"}, {"cat": "gpu_memcpy"}, {"cat": "cpu_op"}, {"ph": "M"}, {"cat": "kernel"}]
    assert count_kernels({"traceEvents": events}) == 2
    assert kernels_per_step(lambda: None, CPU) is None


def test_a_traced_step_makes_no_objects_of_its_events(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """PyTorch takes about 0.1 ms for each of them: seconds for a step of a thousand kernels and their launches."""

    def refuse(*arguments: Any) -> None:
        raise AssertionError("events were turned into objects")

    monkeypatch.setattr(torch.autograd.profiler.profile, "_parse_kineto_results", refuse)
    sleeper = Sleeper()
    write_timeline(tmp_path / "trace.json.gz", sleeper.train_step, CPU, sleeper, sleeper, steps=1)
    assert not [w for w in recwarn if "Profiler" in str(w.message)]


def test_windows_of_ceilings_are_long_enough_and_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[float] = []

    def work(seconds: float) -> None:
        calls.append(seconds)
        passing.sleep(seconds)

    passing = Clock()
    monkeypatch.setattr("peftbench.profiling.timing.time", passing)
    for seconds, times in ((0.001, 10), (0.004, 5), (0.5, 1)):
        calls.clear()
        assert best_of_windows(functools.partial(work, seconds), CPU) == pytest.approx(seconds)
        assert len(calls) == 3 + 5 * times


def test_looks_are_as_many_as_asked_for_unless_steps_are_slow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[int] = []

    def shares(*arguments: Any) -> None:
        seen.append(arguments[-1])

    monkeypatch.setattr("peftbench.profiling.cost.step_shares", shares)
    for looks, seconds in ((2, 0.1), (1, 0.1), (2, 1.0)):
        timing = Timing([seconds], 1, stable=True)
        monkeypatch.setattr("peftbench.profiling.cost.time_steps", lambda *_, found=timing, **__: found)
        measured(spec_of(profile__looks=looks), tmp_path / f"{looks} {seconds}")
    assert seen == [2, 1, 1]


def test_there_is_no_energy_without_a_gpu() -> None:
    assert energy_of(lambda: None, CPU, 10) is None


def test_ceilings_are_measured_once() -> None:
    assert matmul_ceiling(CPU, torch.float32) == matmul_ceiling(CPU, torch.float32) > 1e8
    assert copy_bandwidth(CPU) == copy_bandwidth(CPU) > 1e8


def spec_of(**keys: Any) -> RunSpec:
    base = {"model": "tiny-bert", "task": "tiny", "train": "smoke", "method": "lora", "profile": "quick"}
    given = {k.replace("__", "."): [v] for k, v in (base | keys).items()}
    (spec,) = plan(demand(given, None), "cpu").specs
    return spec


def measured(spec: RunSpec, folder: Path) -> dict[str, Any]:
    alone = Setting.of([spec])
    backbone = backbone_of(alone)
    encoded = alone.task.encode(
        alone.task.splits(spec.protocol)["train"], backbone.tokenizer, alone.max_length, backbone.kind
    )
    return cost_of(alone, Store(folder), encoded, Quiet())


@pytest.mark.parametrize("method", ["lora", "full", "houlsby", "bitfit"])
def test_a_trials_memory_is_accounted_for(method: str, tmp_path: Path) -> None:
    cost = measured(spec_of(method=method, train__accumulation=2), tmp_path)
    memory = cost["memory"]
    assert sum(memory[name] for name in COMPONENTS) + memory["residual"] == memory["peak"]
    assert abs(memory["residual"]) < 0.01 * memory["peak"]
    assert memory["weights"] == memory["phases"]["load"]
    own = 0 if method == "full" else cost["adapter_parameters"]
    assert memory["adapter"] >= 4 * (own + cost["head_parameters"])
    assert memory["optimizer"] >= 8 * cost["trainable_parameters"]
    assert memory["activations"] > 0
    assert memory["phases"]["load"] < memory["phases"]["attach"] < memory["phases"]["forward"] <= memory["peak"]
    assert cost["operations_per_step"] > 50
    assert cost["kernels_per_step"] is None
    assert cost["memory_bandwidth_utilization"] == pytest.approx(
        cost["memory_traffic_bytes"] / cost["step_seconds"]["p50"] / cost["copy_bandwidth_bytes_per_second"]
    )
    assert set(cost["observer"]) == {"phases", "memory", "flops", "traffic", "kernels", "afterwards"}
    assert all(cost["observer"][name] > 0 for name in ("phases", "memory", "flops", "traffic", "afterwards"))
    spent = cost["instrument_seconds"]
    assert set(spent) == {"timing", "plain", "energy", "ceilings", *cost["observer"]}
    assert sum(cost["step_seconds"]["samples"]) < spent["timing"]
    assert spent["energy"] < 0.1


def test_measuring_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither on objective and optimizer, nor a hook on the model or a parameter."""

    def state(trial: Trial) -> list[Any]:
        model = trial.objective.model
        own = [set(vars(x)) for x in (trial.objective, trial.optimizer)]
        hooks = [
            (name, len(vars(m)[kind]))
            for name, m in model.named_modules()
            for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        ]
        trained = [p for part in trial.persistent().values() for p in part if p.requires_grad]
        return [own, hooks, [len(p._backward_hooks or ()) + len(p._post_accumulate_grad_hooks or ()) for p in trained]]

    seen: list[tuple[list[Any], list[Any]]] = []

    @contextmanager
    def watching(*arguments: Any) -> Iterator[Trial]:
        with trial_of(*arguments) as trial:
            trial.step()  # PyTorch's own lazy attributes
            before = state(trial)
            yield trial
            seen.append((before, state(trial)))

    monkeypatch.setattr("peftbench.cost.trial_of", watching)
    measured(spec_of(), tmp_path)
    ((before, after),) = seen
    assert before == after


def test_the_training_loop_knows_no_profiler() -> None:
    for path in sorted(Path(engine.__file__).parent.glob("*.py")):
        assert "profil" not in path.read_text(), path
