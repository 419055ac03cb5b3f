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
from peftbench.engine.stepping import stepper
from peftbench.errors import UserError
from peftbench.methods.adapter import generator_for
from peftbench.models.load import set_dropout
from peftbench.record import profile_id
from peftbench.tasks.base import Encoded
from tests.conformance.conftest import fresh, small
from tests.conftest import make_spec


def test_eager_execution_leaves_every_id_alone() -> None:
    named, unnamed = make_spec(**{"train.execution": "eager"}), make_spec()
    assert "execution" not in unnamed.train
    assert named.run_id == unnamed.run_id
    assert profile_id(named, ()) == profile_id(unnamed, ())
    seen = {unnamed.run_id, profile_id(unnamed, ())}
    for execution in ("compiled", "graphs"):
        other = make_spec(**{"train.execution": execution})
        seen |= {other.run_id, profile_id(other, ())}
    assert len(seen) == 6


def _resolve(device: str, monkeypatch: pytest.MonkeyPatch, **given: Any) -> None:
    monkeypatch.setattr(environment, "pick_device", lambda wanted: device)
    monkeypatch.setattr(environment, "device_kind", lambda name: "a GPU" if name == "cuda" else name)
    grid = {"model": "tiny-bert", "task": "tiny", "profile": "skip", "method": "lora", "train.execution": "graphs"}
    resolve.plan(resolve.demand({k: [v] for k, v in {**grid, **given}.items()}, None), device)


REFUSED = [
    ({"method": "adalora"}, "method adalora acts after steps"),
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
    ("train.execution=graph", "train.execution=graph: expected one of eager, compiled, graphs; did you mean 'graphs'?"),
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
    head = PackedHead("linear", model.config.hidden_size, 2, [generator_for("head", s) for s in seeds], dropout)
    objective = HeadObjective(model, adapter, head.to(device), "mean")
    optimizer = PackedAdamW(
        adapter.packed_parameters() + objective.parameters(),
        list(adapter.trained.values()),
        [Recipe(1e-2 / (1 + s), 0.01, 1.0, "linear", 0.1) for s in seeds],
        STEPS,
        ratios=adapter.rate_ratios() + [[1.0] * runs] * len(objective.parameters()),
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
        # full and last batches of two lengths, each captured when seen for the third time
        shapes = Counter((b.items.shape, b.length) for b in batches(training(small("lora"))[2], 2))
        assert len(shapes) >= 3
        assert recorder.recorded == sum(n > 2 for n in shapes.values()) >= 2
        assert graphs[2].replayed == sum(max(n - 2, 0) for n in shapes.values())
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


def test_a_method_that_acts_after_steps_never_reaches_a_graph() -> None:
    objective, optimizer, table = training(small("adalora"), runs=1)
    with pytest.raises(AssertionError, match="acts after steps"):
        GraphSteps(objective, optimizer, table, recorder=Again())


def test_capture_needs_and_leaves_the_bases_optimizer_as_it_was() -> None:
    _, optimizer, _ = training(small("full"), runs=1)
    assert isinstance(optimizer._fused, torch.optim.AdamW)
    with optimizer.capturable():
        assert all(g["capturable"] for g in optimizer._fused.param_groups)
    assert not any(g["capturable"] for g in optimizer._fused.param_groups)
