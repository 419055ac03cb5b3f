"""`python -m peftbench profile`: its tables, its files, its refusals."""

from __future__ import annotations

import errno
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from peftbench.__main__ import main
from peftbench.cli.profile import facts, memory
from peftbench.profiling.replay import COMPONENTS

ONE = ["profile", "model=tiny-bert", "task=tiny", "method=lora", "train.batch_size=4", "train.max_length=16"]


def keys(folder: Path) -> list[str]:
    return [*ONE, "profile=quick", f"results={folder}", "sweep.name=one"]


def test_it_prints_the_cost_and_writes_traces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(keys(tmp_path)) == 0
    shown = capsys.readouterr()
    for word in ("4 × 16 tokens, eager", "p90", "% forward", "% optimizer", "real", "FLOP", "residual"):
        assert word in shown.out
    assert "peak memory (tracked tensors)" in shown.out
    assert "VRAM" not in shown.out
    assert "only the CUDA allocator keeps one" in shown.out
    assert shown.err == ""
    (folder,) = (tmp_path / "one" / "traces").iterdir()
    assert sorted(p.name for p in folder.iterdir()) == ["memory.json", "trace.json.gz"]
    assert str(folder / "trace.json.gz") in shown.out.splitlines()
    names = {e["name"] for e in json.loads(gzip.decompress((folder / "trace.json.gz").read_bytes()))["traceEvents"]}
    assert {"forward", "backward", "optimizer", "aten::addmm"} <= names
    table = json.loads((folder / "memory.json").read_text())
    assert table["kind"] == "tracked_tensors"
    assert sum(table[part] for part in COMPONENTS) + table["residual"] == table["peak"]


def test_json_has_the_record_and_the_cost_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    costs = []
    for _ in range(2):
        assert main([*keys(tmp_path), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert all(Path(path).is_file() for path in found["traces"].values())
        costs.append(found["cost"])
    assert costs[0] == costs[1]
    assert found["run_id"].startswith("lora-tiny-tiny-bert-s0-")
    (kept,) = (tmp_path / "one" / "profiles").iterdir()
    assert kept.stem == costs[0]["profile_id"]


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        (["method=lora,full"], "one value for each key"),
        (["profile=skip"], "nothing to measure"),
        (["method.rnak=3"], "rnak"),
        (["hydra/launcher=joblib"], "no launcher"),
        (["--quiet"], "--quiet"),
    ],
)
def test_mistakes_are_one_line(
    extra: list[str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*keys(tmp_path), *extra]) == 2
    shown = capsys.readouterr()
    assert reason in shown.err
    assert len(shown.err.strip().splitlines()) == 1
    assert shown.out == ""
    assert not (tmp_path / "one").exists()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "no space left"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), "smaller train.batch_size"),
    ],
)
def test_what_the_machine_refuses_is_one_line_and_leaves_no_folder(
    error: Exception, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr("peftbench.cost.write_timeline", fail)
    assert main(keys(tmp_path)) == 2
    shown = capsys.readouterr().err.strip()
    assert reason in shown
    assert "\n" not in shown
    assert not list((tmp_path / "one" / "traces").iterdir())


def test_costs_kept_before_components_were_measured_are_shown() -> None:
    old = {
        "adapter_parameters": 10,
        "head_parameters": 2,
        "total_parameters": 100,
        "checkpoint_bytes": 50,
        "step_seconds": {"p10": 0.1, "p50": 0.2, "p90": 0.3, "samples": [0.2], "warmup_steps": 3, "stable": False},
        "tokens_per_second": 1.0,
        "padded_tokens_per_second": 2.0,
        "flops_per_token": 3.0,
        "analytic_flops_per_token": 4.0,
        "model_flops_utilization": 0.5,
        "matmul_ceiling_flops_per_second": 6.0,
        "memory": {"kind": "cuda", "peak": 1024, "reserved": 2048, "process_peak": None},
        "energy_joules_per_1k_tokens": 7.0,
        "startup_seconds": 1.0,
        "compile_seconds": None,
        "shape": {"batch_size": 1, "length": 2},
    }
    assert ("shares", "–") in facts(old)
    assert ("energy", "7 J per 1000 tokens") in facts(old)
    rows = dict(memory(old))
    assert rows["peak"] == "1.0 KiB, in a step"
    assert rows["  activations"] == "–"
    assert rows["held"] == "2.0 KiB allocator"
