"""Seconds by phase: what counts for which phase, what is passed on, and that records keep it."""

from pathlib import Path
from typing import Any

import pytest

from peftbench.clock import Clock
from peftbench.progress import Quiet


class Time:
    """A clock that moves when told to; waiting for the device takes two seconds."""

    def __init__(self) -> None:
        self.now = 0.0

    def settle(self) -> None:
        self.now += 2.0


class Ears(Quiet):
    def __init__(self) -> None:
        self.heard: list[Any] = []

    def phase(self, name: str) -> None:
        self.heard.append(name)

    def note(self, line: str) -> None:
        self.heard.append(line)


def test_queued_work_counts_for_the_phase_that_queued_it(monkeypatch: pytest.MonkeyPatch) -> None:
    time, ears = Time(), Ears()
    monkeypatch.setattr("peftbench.clock.time.perf_counter", lambda: time.now)
    clock: Any = Clock(ears, time.settle)
    time.now += 100.0  # before the first phase: nobody's
    for name, seconds in (("load", 1.0), ("train", 10.0), ("evaluate", 3.0), ("train", 20.0)):
        clock.phase(name)
        time.now += seconds
    clock.note("a line")
    assert clock.seconds() == {"load": 3.0, "train": 34.0, "evaluate": 5.0}
    assert ears.heard == ["load", "train", "evaluate", "train", "a line"]


class Named:
    def __init__(self, run_id: str) -> None:
        self.run_id = run_id


def test_runs_side_by_side_share_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three runs on two places: 4 s of loading for all, 10 s for a and b, then 6 s for b and c, 3 s for c alone."""
    time = Time()
    monkeypatch.setattr("peftbench.clock.time.perf_counter", lambda: time.now)
    clock: Any = Clock(Ears())

    def spend(phase: str, seconds: float) -> None:
        clock.phase(phase)
        time.now += seconds

    spend("load", 3.0)
    spend("profile", 100.0)  # measured for others too
    spend("load", 1.0)
    for members, seconds in (("ab", 10.0), ("bc", 6.0), ("c", 3.0)):
        clock.members([Named(name) for name in members])
        spend("train", seconds)
        clock.seconds()
        if members == "ab":
            assert clock.share("a", 3) == pytest.approx(4 / 3 + 5, abs=1e-3)
    assert clock.share("b", 3) == pytest.approx(4 / 3 + 5 + 3, abs=1e-3)
    assert clock.share("c", 3) == pytest.approx(4 / 3 + 3 + 3, abs=1e-3)
    assert sum(clock.share(name, 3) for name in "abc") == pytest.approx(4 + 10 + 6 + 3, abs=1e-3)


def test_a_record_says_what_each_phase_of_its_pack_took(tmp_path: Path) -> None:
    from peftbench.run import run_pack
    from peftbench.store import Store
    from tests.test_run import tiny

    (record,) = run_pack(tiny(method="lora", train__steps=4, train__evaluate_every=2), Store(tmp_path), Quiet())
    assert record.status == "completed"
    assert record.pack is not None
    seconds = record.pack["seconds"]
    assert {"load", "train", "evaluate", "test"} <= set(seconds)
    assert all(value > 0 for value in seconds.values())
