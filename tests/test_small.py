"""The comparison of small steps: its arithmetic on hand-made records, and a race of two tiny steps on the CPU."""

from typing import Any

import pytest

from tests.test_peers import peers  # noqa: F401  a fixture


def record(name: str, seconds: float, runs: int = 1, precision: str = "fp32") -> dict[str, Any]:
    return {
        "contestant": name,
        "status": "completed",
        "step_seconds": {"p50": seconds},
        "runs": runs,
        "precision": precision,
        "execution": "eager",
        "trained_parameters": 10,
    }


def test_a_runs_part_of_a_pack_is_set_against_the_faster_rival_of_its_precision(peers: Any) -> None:  # noqa: F811
    small = peers("small")
    records = [
        record("hf-lora", 0.020),
        record("hf-lora-autocast", 0.030, precision="bf16"),
        record("hf-lora-bf16", 0.016, precision="bf16"),
        record("ours-lora-graphs", 0.010),
        record("ours-lora-bf16-x8-graphs", 0.032, runs=8, precision="bf16"),
        {"contestant": "ours-lora", "status": "failed", "error": "no"},
    ]
    table = small.report(records).splitlines()
    cells = {line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]] for line in table[2:]}
    assert cells["ours-lora-graphs"] == ["eager", "10.00", "10.00", "2.00", "10"]
    assert cells["ours-lora-bf16-x8-graphs"] == ["eager", "32.00", "4.00", "4.00", "10"]
    assert cells["ours-lora"][0] == "failed"
    assert small.verdicts(records) == ["holds: ours-lora-graphs is 2.00 times as fast as hf-lora (bar: 1.8)"]
    records[3] = record("ours-lora-graphs", 0.012)
    assert small.verdicts(records) == ["FAILS: ours-lora-graphs is 1.67 times as fast as hf-lora (bar: 1.8)"]


def test_a_race_on_the_cpu_trains_the_same_parameters_and_records_what_cannot_run(peers: Any, tmp_path: Any) -> None:  # noqa: F811
    pytest.importorskip("peft")
    small, out = peers("small"), tmp_path / "small.jsonl"
    names = "hf-lora,ours-lora,ours-lora-x8,ours-lora-graphs"
    size = ["--model", "tiny-bert", "--batch", "2", "--length", "8", "--rounds", "2", "--calls", "2", "--warmup", "0"]
    small.main([*size, "--contestants", names, "--device", "cpu", "--out", str(out)])
    found = {r["contestant"]: r for r in peers("common").read([out])}
    assert list(found) == names.split(",")
    theirs, mine, pack, graphs = found.values()
    assert theirs["trained_parameters"] == mine["trained_parameters"] == pack["trained_parameters"]
    assert [len(s) for s in mine["step_seconds"]["samples"]] == [2, 2]
    assert pack["runs"] == 8
    assert pack["loss"] == pytest.approx(mine["loss"], rel=1e-4)
    assert graphs["status"] == "failed"
    assert "device=cuda" in graphs["error"]
    assert mine["weights"] == "random weights"
