"""Memory by component: hand-made histories played again, the tracker, and CUDA's own form of a history."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pytest
import torch

from peftbench.profiling.memory import TensorTracker, blocks_of, events_of, held, memory_of, recorded_cuda
from peftbench.profiling.phases import phases
from peftbench.profiling.replay import COMPONENTS, Alloc, Event, Free, Mark, replay

CPU = torch.device("cpu")
KNOWN = {1: "weights", 2: "adapter", 3: "optimizer"}
BEFORE = {1: 1000, 2: 100, 3: 200, 4: 10}
"""Address 4 is nobody's: a library's own."""


def test_each_block_alive_at_the_peak_is_counted_once_for_what_it_is() -> None:
    events: list[Event] = [
        Mark("forward"),
        Alloc(10, 400),  # saved for the backward pass
        Alloc(11, 50),  # temporary
        Free(11),
        Alloc(11, 300),  # saved, at an address used before
        Mark("backward"),
        Alloc(12, 70),  # a gradient
        Alloc(13, 500),  # temporary: here is the peak
        Free(13),
        Free(10),
        Free(11),
        Mark("step", gradients=[12]),
        Alloc(14, 90),
        Free(12),
        Free(14),
    ]
    peak = replay(BEFORE, KNOWN, events)
    assert peak.components == {
        "weights": 1000,
        "adapter": 100,
        "optimizer": 200,
        "gradients": 70,
        "activations": 700,
        "workspace": 510,
    }
    assert (peak.bytes, peak.phase) == (sum(peak.components.values()), "backward")
    assert peak.phases == {"forward": 1310 + 700, "backward": 1310 + 700 + 70 + 500, "step": 1310 + 70 + 90}


def test_what_dies_within_the_forward_pass_is_workspace_even_at_a_peak_there() -> None:
    events: list[Event] = [Mark("forward"), Alloc(10, 5), Alloc(11, 7), Free(11), Mark("backward"), Mark("step")]
    peak = replay({}, {}, events)
    assert (peak.phase, peak.components["activations"], peak.components["workspace"]) == ("forward", 5, 7)


def test_every_forward_pass_of_an_accumulated_step_leaves_activations() -> None:
    events: list[Event] = [
        *(Mark("forward"), Alloc(10, 5), Mark("backward"), Alloc(20, 3), Free(10)),
        *(Mark("forward"), Alloc(10, 50), Mark("backward"), Alloc(21, 4), Free(10), Free(21)),
        Mark("step", gradients=[20]),
    ]
    components = replay({}, {}, events).components
    assert (components["activations"], components["gradients"], components["workspace"]) == (50, 3, 4)


def test_recomputed_activations_are_workspace() -> None:
    events: list[Event] = [Mark("forward"), Mark("backward"), Alloc(10, 9), Free(10), Mark("step")]
    assert replay({}, {}, events).components["workspace"] == 9


def test_the_optimizers_one_copy_of_all_gradients_is_gradients() -> None:
    events: list[Event] = [Mark("forward"), Mark("backward"), Mark("step"), Alloc(10, 1024), Alloc(11, 1024)]
    components = replay({}, {}, events, flat_gradient=1000).components
    assert (components["gradients"], components["workspace"]) == (1024, 1024)


def test_gradients_kept_from_step_to_step_are_gradients() -> None:
    events: list[Event] = [Mark("forward"), Mark("backward"), Mark("step", gradients=[3, 4])]
    components = replay(BEFORE, KNOWN, events).components
    assert (components["gradients"], components["optimizer"], components["workspace"]) == (210, 0, 0)


def test_a_block_whose_address_is_given_again_is_gone() -> None:
    events: list[Event] = [Mark("forward"), Alloc(10, 5), Alloc(10, 50), Mark("backward"), Mark("step")]
    peak = replay({}, {}, events)
    assert peak.bytes == sum(peak.components.values()) == 50


def test_a_mark_corrects_what_was_asked_for_to_what_was_given() -> None:
    events: list[Event] = [Mark("forward"), Alloc(10, 512), Mark("backward", {10: 1536}), Mark("step")]
    peak = replay({}, {}, events)
    assert peak.components["activations"] == peak.phases["forward"] == peak.bytes == 1536


def test_the_history_of_cudas_allocator_becomes_events() -> None:
    trace = [
        {"action": "segment_alloc", "addr": 64, "size": 2**21},
        {"action": "alloc", "addr": 64, "size": 5},
        {"action": "free_requested", "addr": 64, "size": 5},
        {"action": "free_completed", "addr": 64, "size": 5},
        {"action": "snapshot", "addr": 0, "size": 0},
        {"action": "alloc", "addr": 128, "size": 513},
    ]
    marks = [(0, Mark("forward")), (5, Mark("backward")), (6, Mark("step"))]
    assert events_of(trace, marks) == [
        Mark("forward"),
        Alloc(64, 512),
        Free(64),
        Mark("backward"),
        Alloc(128, 1024),
        Mark("step"),
    ]


def test_a_snapshot_gives_the_sizes_of_this_devices_blocks_in_use() -> None:
    def block(address: int, size: int, state: str) -> dict[str, Any]:
        return {"address": address, "size": size, "requested_size": size - 1, "state": state}

    used = [block(0, 512, "active_allocated"), block(512, 512, "inactive"), block(1024, 512, "active_pending_free")]
    snapshot = {"segments": [{"device": 1, "blocks": used}, {"device": 0, "blocks": [block(9, 9, "active_allocated")]}]}
    assert blocks_of(snapshot, 1) == {0: 512}


def test_tracked_memory_counts_live_storages_once() -> None:
    weight = torch.zeros(1000)
    with TensorTracker([weight, weight.view(10, 100)]) as tracker:
        a = weight + 1
        b = a.view(10, 100)
        del a
        c = b * 2
        del b, c
        weight + 1
    assert tracker.peak == 3 * 4000
    assert tracker.live == 4000
    assert replay(tracker.before, {}, [Mark("forward"), *tracker.events]).bytes == tracker.peak


def test_a_tracker_forgets_its_tensors_when_it_is_done() -> None:
    weight = torch.zeros(1000)
    with TensorTracker([weight]) as tracker:
        pass
    del weight
    assert tracker.live == 4000
    assert not tracker.events


class Line:
    """x · eʷ with momentum by hand: objective and optimizer in one, with sizes that can be worked out."""

    def __init__(self, size: int) -> None:
        self.x = torch.randn(size)
        self.w = torch.ones(size, requires_grad=True)
        self.moment = torch.zeros(size)
        self.objective = self.optimizer = self

    def loss_sum(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return (self.w.exp() * self.x).sum().reshape(1)

    def step(self, losses: torch.Tensor) -> None:
        assert self.w.grad is not None
        with torch.no_grad():
            self.moment.lerp_(self.w.grad, 0.1)
            self.w -= self.moment
        self.w.grad = None

    def persistent(self) -> Mapping[str, Iterable[torch.Tensor]]:
        return {"adapter": [self.w], "optimizer": [self.moment], "weights": [self.x]}

    def gradients(self) -> Iterable[torch.Tensor]:
        return [] if self.w.grad is None else [self.w.grad]

    def flat_gradient(self) -> int:
        return 0

    def train_step(self) -> None:
        losses = self.objective.loss_sum({})
        losses.sum().backward()
        self.optimizer.step(losses.detach())


def test_tracked_tensors_have_components_too() -> None:
    size = 100_000
    line = Line(size)
    memory = memory_of(line, line.train_step, CPU, line.train_step)
    assert memory["kind"] == "tracked_tensors"
    assert memory["reserved"] is memory["device_used"] is None
    assert memory["weights"] == memory["adapter"] == memory["optimizer"] == 4 * size
    # the exponential is kept; going back, the gradient of the exponential is there while that of w is made of it
    assert memory["peak_phase"] == "backward"
    for part in ("activations", "gradients", "workspace"):
        assert 4 * size <= memory[part] < 4 * size + 100
    parts = sum(memory[name] for name in COMPONENTS)
    assert parts + memory["residual"] == memory["peak"]
    assert abs(memory["residual"]) < 100
    assert memory["phases"]["step"] < memory["phases"]["forward"] <= memory["phases"]["backward"] <= memory["peak"]


class Allocator(TensorTracker):
    """Tracked tensors that tell of themselves as CUDA's allocator does."""

    def __init__(self, existing: Iterable[torch.Tensor]) -> None:
        self.trace: list[dict[str, Any]] = []
        self.places: dict[int, int] = {}
        self.recording: list[str | None] = []
        super().__init__(existing)

    def _track(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        new = storage._cdata not in self._sizes
        super()._track(tensor)
        if new and storage.nbytes():
            self.places[storage._cdata] = storage.data_ptr()
            self.trace.append({"action": "alloc", "addr": storage.data_ptr(), "size": storage.nbytes()})

    def _release(self, key: int) -> None:
        if key in self.places:
            self.trace.append({"action": "free_requested", "addr": self.places.pop(key)})
        super()._release(key)

    def snapshot(self, device: Any) -> dict[str, Any]:
        sizes = {self.places[key]: -(-size // 512) * 512 for key, size in self._sizes.items() if key in self.places}
        blocks = [{"address": a, "size": size, "state": "active_allocated"} for a, size in sizes.items()]
        found = {"segments": [{"device": 0, "blocks": blocks}], "device_traces": [list(self.trace)]}
        self.trace.append({"action": "snapshot", "addr": 0, "size": 0})
        return found

    def record(self, enabled: str | None, **options: Any) -> None:
        self.recording.append(enabled)


@pytest.fixture
def allocator(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Allocator, Line]]:
    line = Line(100_001)
    allocator = Allocator([line.w, line.x, line.moment])
    monkeypatch.setattr(torch.cuda.memory, "get_allocator_backend", lambda: "native")
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", allocator.record)
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", allocator.snapshot)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    with allocator:
        line.train_step()
        yield allocator, line


def test_the_allocators_history_gives_what_tracked_tensors_give(allocator: tuple[Allocator, Line]) -> None:
    fake, line = allocator
    peak = recorded_cuda(line, line.train_step, torch.device("cuda", 0))
    assert peak is not None
    rounded = -(-400_004 // 512) * 512
    for part in ("weights", "adapter", "optimizer", "gradients", "activations", "workspace"):
        assert rounded <= peak.components[part] < rounded + 8 * 512
    assert peak.phase == "backward"
    assert sum(peak.components.values()) == peak.bytes
    assert fake.recording == ["all", None]


def test_recording_ends_with_a_step_that_fails(allocator: tuple[Allocator, Line]) -> None:
    fake, line = allocator
    with pytest.raises(ZeroDivisionError):
        recorded_cuda(line, lambda: 1 / 0, torch.device("cuda", 0))
    assert fake.recording == ["all", None]


def test_gradients_are_known_in_the_optimizers_step() -> None:
    line = Line(50_000)
    seen: list[int] = []
    with TensorTracker([line.w, line.x, line.moment]) as tracker:
        with phases(line, line, lambda p: tracker.mark(p, line.gradients() if p == "step" else ())):
            tracker.mark("forward")
            line.train_step()
        seen += [len(e.gradients) for e in tracker.events if isinstance(e, Mark)]
    assert seen == [0, 0, 0, 1]
    late = [e for e in tracker.events if not isinstance(e, Mark)]
    assert sum(isinstance(e, Alloc) and e.size == 200_000 for e in late) >= 2


def test_a_step_that_hides_its_phases_has_a_peak_without_components() -> None:
    line = Line(1000)
    replayed = memory_of(line, lambda: line.x + 1, CPU, lambda: line.x + 1)
    assert replayed["peak"] == 4 * 4000
    assert all(replayed[name] is None for name in (*COMPONENTS, "residual", "peak_phase"))
    assert replayed["phases"] == {"forward": None, "backward": None, "step": None}


def test_listening_to_phases_leaves_nothing_behind() -> None:
    line = Line(10)
    before = dict(vars(line))
    heard: list[str] = []
    with phases(line, line, heard.append):
        line.train_step()
    assert heard == ["forward", "backward", "step"]
    assert vars(line) == before
    line.train_step()
    assert len(heard) == 3
    with pytest.raises(ZeroDivisionError), phases(line, line, heard.append):
        1 / 0  # noqa: B018
    assert vars(line) == before


def test_a_shadow_of_ones_own_is_put_back() -> None:
    line = Line(10)
    own = line.loss_sum
    line.loss_sum = own  # type: ignore[method-assign]
    with phases(line, line, lambda name: None):
        assert line.loss_sum is not own
    assert line.loss_sum is own


def test_memory_held_counts_a_storage_once() -> None:
    t = torch.zeros(10)
    assert held([t, t[:5], torch.zeros(3)], CPU) == 52


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_components_sum_to_the_allocators_peak_on_a_gpu() -> None:
    torch.set_default_device("cuda")
    try:
        line = Line(3_000_001)
        for _ in range(2):
            line.train_step()
        memory = memory_of(line, line.train_step, torch.device("cuda"), line.train_step)
    finally:
        torch.set_default_device(None)
    assert memory["kind"] == "cuda"
    assert memory["peak_phase"] == "backward"
    assert abs(memory["residual"]) <= 0.03 * memory["peak"]
    assert 12e6 <= memory["activations"] <= 12e6 + 3 * 2**20
    assert memory["adapter"] >= 12e6
    assert memory["optimizer"] >= 12e6
    assert memory["weights"] >= 12e6
