"""Whole steps as CUDA graphs: what is refused, what an id says, and (on a GPU) that replays equal eager steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import peftbench
from peftbench import environment, resolve
from peftbench.__main__ import main
from peftbench.engine.batches import PackedBatch, TokenTable, make_buckets, packed_batches
from peftbench.engine.graphs import GraphSteps
from peftbench.engine.heads import PackedHead
from peftbench.engine.objectives import HeadObjective
from peftbench.engine.optimizer import PackedAdamW, Recipe
from peftbench.engine.stepping import EagerSteps, stepper
from peftbench.errors import UserError
from peftbench.kernels.noise import Noise
from peftbench.methods.adapter import generator_for
from peftbench.models.load import set_dropout
from peftbench.progress import Quiet
from peftbench.record import profile_id
from peftbench.run import run_pack
from peftbench.store import Store
from peftbench.tasks.base import Encoded
from tests.conformance.conftest import fits, fresh, runs_share, small
from tests.conftest import make_spec


def test_eager_execution_leaves_every_id_alone() -> None:
    named, unnamed = make_spec(**{"train.execution": "eager"}), make_spec()
    assert "execution" not in unnamed.train
    assert named.run_id == unnamed.run_id
    assert profile_id(named, ()) == profile_id(unnamed, ())
    seen = {unnamed.run_id, profile_id(unnamed, ())}
    for execution in ("compiled", "graphs", "compiled_graphs"):
        other = make_spec(**{"train.execution": execution})
        seen |= {other.run_id, profile_id(other, ())}
    assert len(seen) == 8


def _resolve(device: str, monkeypatch: pytest.MonkeyPatch, **given: Any) -> None:
    monkeypatch.setattr(environment, "pick_device", lambda wanted: device)
    monkeypatch.setattr(environment, "device_kind", lambda name: "a GPU" if name == "cuda" else name)
    grid = {"model": "tiny-bert", "task": "tiny", "profile": "skip", "method": "lora", "train.execution": "graphs"}
    resolve.plan(resolve.demand({k: [v] for k, v in {**grid, **given}.items()}, None), device)


REFUSED = [
    ({"method": "galore"}, "method galore has an optimizer of its own"),
    ({"train.optimizer": "paged_adamw"}, "train.optimizer=paged_adamw moves pages"),
    ({"train.checkpointing": True}, "train.checkpointing=true asks"),
]


@pytest.mark.parametrize(("given", "message"), REFUSED, ids=lambda v: v if isinstance(v, str) else "")
def test_what_cannot_be_captured_is_refused(
    given: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peftbench.engine import paging

    monkeypatch.setattr(paging, "check", lambda *_: None)  # paged memory itself is for another test
    with pytest.raises(UserError) as error:
        _resolve("cuda", monkeypatch, **given)
    assert str(error.value).startswith(f"train.execution=graphs: {message}")
    assert str(error.value).endswith("; expected eager")


@pytest.mark.parametrize("method", ["lora", "full", "prompt"])
def test_everything_else_can_be_asked_for(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _resolve("cuda", monkeypatch, method=method, **{"train.accumulation": 2, "train.optimizer": "adamw8bit"})


BAD = [
    ("train.execution=graphs", "train.execution=graphs: a CUDA graph needs device=cuda, this is cpu; expected eager"),
    (
        "train.execution=graph",
        "train.execution=graph: expected one of eager, compiled, graphs, compiled_graphs; did you mean 'graphs'?",
    ),
]


@pytest.mark.parametrize(("argument", "message"), BAD)
def test_refusals_are_one_line_and_nothing_starts(
    argument: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", "model=tiny-bert", "task=tiny", "device=cpu", "method=lora", argument]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
    assert list(tmp_path.iterdir()) == []


# Steps as they are made without a GPU: a recorder that does recorded work again as if it were a graph.


class Again:
    """Records work as what it is; `fails` makes it give up in the midst of a capture, like a GPU."""

    def __init__(self, fails: bool = False) -> None:
        self.fails = fails
        self.recorded = 0
        self.running_now = False

    @contextmanager
    def running(self) -> Iterator[None]:
        self.running_now = True
        yield
        self.running_now = False

    def record(self, work: Callable[[], object]) -> Callable[[], object]:
        assert self.running_now
        self.recorded += 1
        if self.fails:
            optimizer = OPTIMIZERS[-1]
            optimizer.step_count += 1
            for p in optimizer.packed:
                p.grad = torch.full_like(p, 7.0)
            raise RuntimeError("operation not permitted when stream is capturing\nmore lines")
        return work


OPTIMIZERS: list[PackedAdamW] = []


def training(
    method: Any, family: str = "tiny-bert", runs: int = 2, device: str = "cpu", dropout: float = 0.0
) -> tuple[HeadObjective, PackedAdamW, TokenTable]:
    """Return objective, optimizer and table of texts of several lengths."""
    model = fresh(family).to(device)
    set_dropout(model, dropout)
    seeds = list(range(runs))
    adapter = peftbench.attach(model, method, runs=runs, seeds=seeds)
    width: Any = model.config.hidden_size  # type: ignore[union-attr]
    head = PackedHead("linear", width, 2, [generator_for("head", s) for s in seeds], dropout)
    objective = HeadObjective(model, adapter, head.to(device), "mean")
    objective.noise = Noise(seeds, torch.device(device))
    optimizer = PackedAdamW(
        adapter.packed_parameters() + objective.parameters(),
        list(adapter.trained.values()),
        [Recipe(1e-2 / (1 + s), 0.01, 1.0, "linear", 0.1) for s in seeds],
        STEPS,
        ratios=adapter.rate_ratios() + [[1.0] * runs] * len(objective.parameters()),
        keep_gradients=adapter.watches_steps,
    )
    g = torch.Generator().manual_seed(3)
    ids = [torch.randint(10, 60, (3 + i % 12,), generator=g).tolist() for i in range(ITEMS)]
    OPTIMIZERS.append(optimizer)
    objective.train(True)
    return objective, optimizer, TokenTable(Encoded(ids, None, [i % 2 for i in range(ITEMS)], None), 0, device)


STEPS, ITEMS = 20, 50


def batches(table: TokenTable, runs: int) -> list[PackedBatch]:
    """Return batches of two lengths, the last of each epoch smaller than the others."""
    return list(packed_batches(make_buckets(table.lengths, 3, 64), 3, list(range(runs)), STEPS))


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("fails", [False, True])
def test_steps_recorded_or_not_equal_plain_ones(
    accumulation: int, fails: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def trace(make: Any) -> tuple[torch.Tensor, torch.Tensor, Any]:
        objective, optimizer, table = training(small("lora"))
        steps = make(objective, optimizer, table)
        losses = [steps(batch) for batch in batches(table, 2)]
        assert optimizer.step_count == int(optimizer._row) == STEPS
        return torch.stack(losses), optimizer.flat.clone(), steps

    recorder = Again(fails)
    eager = trace(lambda *parts: stepper("eager", *parts, accumulation=accumulation))
    graphs = trace(lambda *parts: GraphSteps(*parts, accumulation=accumulation, recorder=recorder))
    assert torch.equal(eager[0], graphs[0])
    assert torch.equal(eager[1], graphs[1])
    assert eager[2].execution == "eager"
    assert len(set(eager[0][:, 0].tolist())) == STEPS  # no buffer is handed out twice
    lines = [r.message for r in caplog.records]
    if fails:
        assert (graphs[2].execution, graphs[2].replayed, recorder.recorded) == ("eager", 0, 1)
        assert lines == [
            "train.execution=graphs: a step could not be captured, going on eagerly: "
            "RuntimeError: operation not permitted when stream is capturing"
        ]
    else:
        # full and last batches of two lengths: the first seen for the third time is captured, then each seen again
        seen: Counter[object] = Counter()
        replayed: Counter[object] = Counter()
        for b in batches(training(small("lora"))[2], 2):
            shape = (b.items.shape, b.length)
            replayed[shape] += seen[shape] >= (1 if replayed.total() else 2)
            seen[shape] += 1
        assert len(seen) >= 3
        assert recorder.recorded == sum(n > 0 for n in replayed.values()) >= 2
        assert graphs[2].replayed == replayed.total()
        assert (graphs[2].execution, lines) == ("graphs", [])


def test_labels_of_an_encoder_decoder_come_in_few_lengths() -> None:
    labels = [[1] * (1 + i % 19) for i in range(40)]
    table = TokenTable(Encoded([[5, 6, 7]] * 40, None, None, labels), 0, "cpu")
    seen = []

    class Stub:
        runs = 1
        adapter = type("Adapter", (), {"watches_steps": False})()

    class Counts:
        step_count = 0

    steps: Any = GraphSteps(Stub(), Counts(), table, eager_steps=99, recorder=Again())  # type: ignore[arg-type]
    steps._step = lambda shape: seen.append(table.rows(shape.index, shape.length, shape.label_length)["labels"].shape)
    for start in range(36):
        steps(PackedBatch(np.arange(start, start + 4)[None], 8, 0))
    assert {s[1] for s in seen} == {8, 16, 19}


def test_a_method_acts_after_replays_as_after_steps() -> None:
    """AdaLoRA's allocation, by a plan on the host, sees each replay's gradient."""
    traces = []
    for recorder in (None, Again()):
        objective, optimizer, table = training(small("adalora"), runs=1)
        work: Any = (
            EagerSteps(objective, optimizer, table)
            if recorder is None
            else GraphSteps(objective, optimizer, table, eager_steps=1, recorder=recorder)
        )
        batches = [PackedBatch(np.arange(4 * (k % 2), 4 * (k % 2) + 4)[None], 8, 0) for k in range(8)]
        traces.append(torch.stack([work(batch) for batch in batches]))
    torch.testing.assert_close(traces[1], traces[0], rtol=1e-6, atol=0)
    assert work.replayed > 3


def test_capture_needs_and_leaves_the_bases_optimizer_as_it_was() -> None:
    _, optimizer, _ = training(small("full"), runs=1)
    assert isinstance(optimizer._fused, torch.optim.AdamW)
    with optimizer.capturable():
        assert all(g["capturable"] for g in optimizer._fused.param_groups)
    assert not any(g["capturable"] for g in optimizer._fused.param_groups)


# On a GPU.

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def trained(
    execution: str, method: Any, runs: int, family: str = "tiny-bert", dropout: float = 0.0, accumulation: int = 1
) -> tuple[torch.Tensor, PackedAdamW, Any]:
    """Return losses [steps, R] of a training on the GPU, its optimizer, and what made the steps."""
    objective, optimizer, table = training(method, family, runs, "cuda", dropout)
    torch.manual_seed(5)
    steps = stepper(execution, objective, optimizer, table, accumulation=accumulation)
    losses = [steps(batch) for batch in batches(table, runs)]
    return torch.stack(losses).cpu(), optimizer, steps


@on_gpu
@pytest.mark.parametrize("family", ["tiny-bert", "tiny-llama"])
@pytest.mark.parametrize(
    "method", ["lora", "bitfit", "houlsby", "prompt", "prefix", "dora", "ia3", "vera", "full", "head"]
)
def test_replayed_steps_equal_eager_ones(method: str, family: str) -> None:
    chosen = small(method)
    fits(chosen, fresh(family))
    runs = 4 if runs_share(chosen, family) else 1
    eager, kept, _ = trained("eager", chosen, runs, family)
    graphs, optimizer, steps = trained("graphs", chosen, runs, family)
    assert (steps.execution, steps.failure) == ("graphs", None)
    shapes = Counter((b.items.shape, b.length) for b in batches(training(chosen, family, runs)[2], runs))
    # two eager steps of the shape that is captured first, one of every other that comes again
    assert steps.replayed in (wanted := [sum(n - 1 for n in shapes.values()) - k for k in (1, 2)]), (wanted, shapes)
    assert steps.replayed > STEPS // 2
    torch.testing.assert_close(graphs, eager, rtol=1e-6, atol=0.0)
    assert optimizer.step_count == int(optimizer._row) == STEPS
    torch.testing.assert_close(optimizer.flat, kept.flat, rtol=1e-5, atol=1e-6)


@on_gpu
def test_accumulated_steps_are_replayed_whole() -> None:
    eager, _, _ = trained("eager", small("lora"), 4, accumulation=2)
    graphs, _, steps = trained("graphs", small("lora"), 4, accumulation=2)
    assert steps.replayed > 0
    torch.testing.assert_close(graphs, eager, rtol=1e-6, atol=0.0)


@on_gpu
def test_dropout_goes_on_from_replay_to_replay() -> None:
    eager, _, _ = trained("eager", small("lora", dropout=0.3), 2, dropout=0.3)
    graphs, _, steps = trained("graphs", small("lora", dropout=0.3), 2, dropout=0.3)
    assert steps.replayed > 0
    torch.testing.assert_close(graphs, eager, rtol=1e-6, atol=0.0)

    objective, optimizer, table = training(small("lora"), "tiny-bert", 2, "cuda", 0.5)
    optimizer._table[:, :2] = 0.0  # no rates: dropout alone tells one step from the next
    same, batch = GraphSteps(objective, optimizer, table), batches(table, 2)[0]
    losses = torch.stack([same(batch) for _ in range(STEPS)])
    assert same.replayed == STEPS - 2
    assert len(set(losses[:, 0].tolist())) == len(set(losses[:, 1].tolist())) == STEPS


@on_gpu
def test_a_run_that_diverges_leaves_its_neighbours_alone_in_a_graph() -> None:
    def flat(rate: float) -> tuple[torch.Tensor, list[bool]]:
        objective, optimizer, table = training(small("houlsby"), "tiny-bert", 3, "cuda")
        optimizer._table[:, 1] = rate
        optimizer._clip[1] = float("inf")
        steps = GraphSteps(objective, optimizer, table)
        for batch in batches(table, 3):
            steps(batch)
        assert steps.replayed > STEPS // 2
        return optimizer.flat.clone(), optimizer.alive.tolist()

    (wild, alive), (tame, whole) = flat(1e37), flat(1e-3)
    assert alive == [True, False, True]
    assert whole == [True, True, True]
    assert torch.equal(wild[[0, 2]], tame[[0, 2]])


@on_gpu
def test_a_capture_that_fails_says_so_and_training_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    eager, _, _ = trained("eager", small("lora"), 2, dropout=0.2)
    objective, optimizer, table = training(small("lora"), "tiny-bert", 2, "cuda", 0.2)
    plain = objective.loss_sum

    def asking(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        losses = plain(batch)
        losses.sum().item()
        return losses

    objective.loss_sum = asking  # type: ignore[method-assign]
    torch.manual_seed(5)
    steps = GraphSteps(objective, optimizer, table)
    losses = torch.stack([steps(batch) for batch in batches(table, 2)])
    assert (steps.execution, steps.replayed) == ("eager", 0)
    (line,) = [r.message for r in caplog.records]
    assert line.startswith("train.execution=graphs: a step could not be captured, going on eagerly: ")
    torch.testing.assert_close(losses.cpu(), eager, rtol=1e-6, atol=0.0)
    # and a later training in the same process captures again
    _, _, others = trained("graphs", small("lora"), 2, dropout=0.2)
    assert others.execution == "graphs"


RUNS = [
    {"method": "lora", "seed": [0, 1, 2, 3]},
    {"method": "full"},
    {"method": "lora", "train.optimizer": "adamw8bit", "seed": [0, 1]},
    {"method": "full", "train.optimizer": "adamw8bit"},
    {"method": "lora", "model": "tiny-t5", "task.formulation": "text", "seed": [0, 1]},
    {"method": "prefix", "model": "tiny-gpt2", "task.formulation": "text", "seed": [0, 1]},
    {"method": "lora", "train.precision": "bf16", "seed": [0, 1]},
    {"method": "full", "train.precision": "bf16"},
]


@on_gpu
@pytest.mark.parametrize("given", RUNS, ids=lambda g: "-".join(str(v) for k, v in g.items() if k != "seed"))
def test_runs_with_graphs_record_what_eager_runs_do(given: dict[str, Any], tmp_path: Path) -> None:
    base = {"model": "tiny-bert", "task": "tiny", "profile": "skip", "train.steps": 40, "train.batch_size": 8, **given}

    def records(execution: str) -> list[Any]:
        grid = {k: v if isinstance(v, list) else [v] for k, v in {**base, "train.execution": execution}.items()}
        pack = resolve.plan(resolve.demand(grid, None), "cuda").specs
        return run_pack(pack, Store(tmp_path / execution), Quiet())

    eager, graphs = records("eager"), records("graphs")
    loose = 1e-2 if given.get("train.precision") == "bf16" else 1e-4 if "model" in given else 1e-5
    for a, b in zip(eager, graphs, strict=True):
        assert a.error is None
        assert b.error is None
        assert b.trace["execution"] == "graphs"
        assert b.trace["replayed_steps"] > 10
        assert "execution" not in a.trace
        np.testing.assert_allclose(b.trace["loss"], a.trace["loss"], rtol=loose)


@on_gpu
def test_cost_is_that_of_replayed_steps(tmp_path: Path) -> None:
    def cost(execution: str) -> dict[str, Any]:
        grid = {"model": "tiny-bert", "task": "tiny", "method": "lora", "profile": "quick", "train.steps": 2}
        grid["train.execution"] = execution
        pack = resolve.plan(resolve.demand({k: [v] for k, v in grid.items()}, None), "cuda").specs
        (record,) = run_pack(pack, Store(tmp_path / execution), Quiet())
        assert record.cost is not None, record.error
        return record.cost

    eager, graphs = cost("eager"), cost("graphs")
    assert (eager["execution"], graphs["execution"]) == ("eager", "graphs")
    assert graphs["step_seconds"]["p50"] < eager["step_seconds"]["p50"] / 1.5
    assert graphs["flops_per_token"] == eager["flops_per_token"]
    assert graphs["memory"]["peak"] == pytest.approx(eager["memory"]["peak"], rel=0.1)
    assert graphs["compile_seconds"] > 0
    assert eager["compile_seconds"] is None
