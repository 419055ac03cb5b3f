"""The comparison with HF PEFT's steps: its arithmetic on hand-made records, and a small race on the CPU."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

PEERS = Path(__file__).resolve().parent.parent / "experiments" / "peers"


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a script of the folder by name."""
    if not PEERS.is_dir():
        pytest.skip("no experiments folder beside the tests")
    monkeypatch.syspath_prepend(str(PEERS))
    return importlib.import_module


def record(name: str, seconds: float, peak: int | None, **changes: Any) -> dict[str, Any]:
    """Return a record of `steps.py` with what the tables read."""
    return {
        "comparison": "steps",
        "contestant": name,
        "status": "completed",
        "error": None,
        "date": "2026-01-01T00:00:00+00:00",
        "command": "python steps.py",
        "git_commit": "0123456789abcdef",
        "device": "card",
        "versions": {"torch": "2.11", "peft": "0.21"},
        "model": "llama-3.2-1b",
        "weights": "random weights",
        "batch": 8,
        "length": 1024,
        "precision": "bf16",
        "rank": 16,
        "matrix_parameters": 10**9,
        "flops_rule": 4,
        "trained_parameters": 1000,
        "ceilings": {"matmul_flops_per_second": 4e14, "copy_bytes_per_second": 2e12},
        "step_seconds": {"p50": seconds},
        "peak_bytes": peak,
        **changes,
    }


def test_summary_and_table(peers: Any) -> None:
    common = peers("common")
    found = common.summary([[1.0, 2.0, 3.0], [4.0, 5.0, 6.1234567]])
    assert found["p50"] == 3.5
    assert found["round_medians"] == [2.0, 5.0]
    assert found["samples"][1][2] == 6.1235
    assert common.table(("a", "b"), [("x", "10.0")]) == "| a |    b |\n| - | ---: |\n| x | 10.0 |"


def test_alternation_is_fair(peers: Any) -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    samples = peers("common").alternate(calls, torch.device("cpu"), rounds=2, calls=2, warmup=1)
    assert order == list("aaabbb" * 2)
    assert {name: [len(r) for r in rounds] for name, rounds in samples.items()} == {"a": [2, 2], "b": [2, 2]}


def test_ratios_rates_and_verdicts(peers: Any) -> None:
    bars = peers("bars")
    call = [
        record("hf-lora", 0.2, 40 * 2**30),
        record("hf-full", 0.16, 30 * 2**30, flops_rule=6),
        record("ours-lora", 0.1, 20 * 2**30),
        record("ours-qlora", 0.111, 8 * 2**30),
        record("ours-dora", 0.2, None, status="failed", error="RuntimeError: no", step_seconds=None),
    ]
    # 4N FLOPs a token: 4e9 × 8192 / 0.1 s
    assert bars.flops_per_second(call[2]) == pytest.approx(3.2768e14)
    assert bars.flops_per_second(call[1]) == pytest.approx(6e9 * 8192 / 0.16)
    text = bars.results(call)
    row = next(line for line in text.splitlines() if line.startswith("| ours-lora "))
    assert [cell.strip() for cell in row.split("|")[1:-1]] == [
        "ours-lora", "100.0", "0.50", "0.62", "327.7", "0.82", "20.0", "0.50", "1,000"
    ]  # fmt: skip
    assert "- ours-dora: failed (RuntimeError: no)" in text
    found = {(what, name, other): (ratio, passed) for what, name, other, _, ratio, passed in bars.verdicts(call)}
    assert found["time", "ours-lora", "hf-lora"] == (0.5, True)
    assert found["memory", "ours-lora", "hf-lora"] == (0.5, False)
    assert found["time", "ours-qlora", "ours-lora"][1] is True
    assert found["time", "ours-dora", "ours-lora"] == (None, None)
    short = [{**r, "length": 128} for r in call]
    found = {(what, name, other): passed for what, name, other, _, _, passed in bars.verdicts(short)}
    assert found["time", "ours-qlora", "ours-lora"] is None
    other = [{**r, "date": "2026-01-02T00:00:00+00:00"} for r in call]
    assert [len(c) for c in bars.calls(call + other)] == [5, 5]


def test_parked_tensors_come_back_as_they_were(peers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = peers("steps")
    monkeypatch.setattr(steps, "SMALLEST_PARKED", 1)
    layer = nn.Linear(8, 8)
    view, shared = layer.weight.detach()[2:4], torch.ones(4)
    before, state = view.clone(), {k: v.clone() for k, v in layer.state_dict().items()}
    parked = steps.Parked([*layer.parameters(), view, shared], keep=[shared])
    assert layer.weight.untyped_storage().nbytes() == 0
    assert shared.sum() == 4
    parked.back()
    assert torch.equal(view, before)
    assert all(torch.equal(layer.state_dict()[k], v) for k, v in state.items())
    assert view.untyped_storage()._cdata == layer.weight.untyped_storage()._cdata


def test_race_on_cpu(
    peers: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    steps = peers("steps")
    monkeypatch.setattr(steps, "SMALLEST_PARKED", 1)
    out = tmp_path / "records.jsonl"
    shape = ["--model", "tiny-llama", "--precision", "fp32", "--batch", "2", "--length", "16", "--rank", "4"]
    few = ["--device", "cpu", "--rounds", "2", "--steps", "1", "--warmup", "1", "--exclusive"]
    chosen = ["hf-lora", "ours-lora", "hf-full", "frozen", "ours-lora-graphs"]
    steps.main([*shape, *few, "--contestants", ",".join(chosen), "--out", str(out), "--bars"])
    shown = capsys.readouterr().out
    found = {r["contestant"]: r for r in map(json.loads, out.read_text().splitlines())}
    assert list(found) == chosen
    refused = found.pop("ours-lora-graphs")
    assert refused["status"] == "failed"
    assert "CUDA" in refused["error"]
    for r in found.values():
        assert r["status"] == "completed", r["error"]
        assert r["weights"] == "random weights"
        assert [len(samples) for samples in r["step_seconds"]["samples"]] == [1, 1]
        assert r["peak_bytes"] is None
        # a wheel's metadata need not carry the local tag
        assert r["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
        # one base, one batch, adapters that change nothing at first
        assert r["losses"][0] == pytest.approx(found["frozen"]["losses"][0], rel=1e-5)
    assert found["hf-lora"]["trained_parameters"] == found["ours-lora"]["trained_parameters"]
    # two warm steps in, both have learnt the same: the same gradients, rate and optimizer
    assert found["ours-lora"]["losses"][-1] < found["ours-lora"]["losses"][0]
    assert found["hf-full"]["losses"][-1] < found["hf-full"]["losses"][0]
    assert found["frozen"]["losses"][-1] == found["frozen"]["losses"][0]
    assert "time: ours-lora / hf-lora" in shown
    steps.main(["--table", str(out)])
    assert capsys.readouterr().out.count("| ours-lora ") == 1


def test_unknown_contestant(peers: Any) -> None:
    steps = peers("steps")
    from peftbench.errors import UserError

    with pytest.raises(UserError, match="--contestants nobody"):
        steps.names("lora,nobody")
    assert steps.names("hf-lora,lora")[:2] == ["hf-lora", "hf-lora-bf16"]
