"""The evidence for packed sweeps: the arithmetic of its scripts on hand-made records, and one small race each."""

import importlib
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

EXPERIMENTS = Path(__file__).resolve().parent.parent / "experiments"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a script of the folder by name."""
    if not (EXPERIMENTS / "packing").is_dir():
        pytest.skip("no experiments folder beside the tests")
    monkeypatch.setattr(sys, "path", [str(EXPERIMENTS / "packing"), str(EXPERIMENTS / "peers"), *sys.path])
    return importlib.import_module


def timed(arm: str, wall: float, packs: list[dict[str, float]], sizes: list[int], **changes: Any) -> dict[str, Any]:
    """Return a record of `wall.py` of a case of 16 runs."""
    return {
        "comparison": "packing-wall",
        "date": "2026-01-01T00:00:00+00:00",
        "command": "python wall.py",
        "device": "card",
        "versions": {"torch": "2.11"},
        "case": "rte",
        "arm": arm,
        "runs": 16,
        "status": "completed",
        "wall_seconds": wall,
        "runs_timed": sum(sizes),
        "pack_sizes": sizes,
        "pack_seconds": packs,
        "steps": 10,
        "execution": ["graphs"],
        **changes,
    }


PEER = timed(
    "hf",
    110.0,
    [{"load": 15.0, "train": 20.0, "evaluate": 10.0}, {"load": 5.0, "train": 40.0, "evaluate": 10.0}],
    [1, 1],
)
PACKED = timed("16", 50.0, [{"load": 6.0, "train": 16.0, "evaluate": 2.0, "test": 2.0}], [16])


def test_runs_left_out_count_as_those_after_the_first(scripts: Any) -> None:
    wall = scripts("wall")
    assert wall.whole_seconds(PACKED) == 50.0
    single = timed("hf", 60.0, PEER["pack_seconds"][:1], [1])
    assert wall.whole_seconds(single) == 60.0 + 15 * 30.0  # texts are not read and tokenized again
    # 110 measured, 14 runs left out at 5 + 40 + 10 seconds
    assert wall.whole_seconds(PEER) == 110.0 + 14 * 55.0
    assert wall.spent(PEER) == {
        "training": 60.0 + 14 * 40.0,
        "evaluation": 20.0 + 14 * 10.0,
        "loading": 20.0 + 14 * 5.0,
        "start, report": 10.0,
    }
    assert wall.spent(PACKED)["start, report"] == 24.0
    assert wall.step_seconds(PEER) == 4.0
    assert wall.step_seconds(PACKED) == 0.1


def test_a_pack_ends_with_its_last_run(scripts: Any) -> None:
    sweeps = scripts("sweeps")

    def written(index: int, size: int, train: float) -> dict[str, Any]:
        return {"pack": {"size": size, "index": index, "seconds": {"train": train}}}

    # one run leaves a pack of three early; packs of one follow
    records = [written(1, 3, 4.0), written(0, 3, 9.0), written(2, 3, 9.0), written(0, 1, 5.0), written(0, 1, 6.0)]
    found = sweeps.Swept(sweeps.Command("", 30.0, None, "", 0.0), records)
    assert [len(pack) for pack in found.packs] == [3, 1, 1]
    assert [seconds["train"] for seconds in found.pack_seconds] == [9.0, 5.0, 6.0]


def test_the_table_compares_whole_commands(scripts: Any) -> None:
    wall = scripts("wall")
    failed = timed("1", 3.0, [], [], status="failed", steps=None)
    lines = wall.report([PEER, PACKED, failed]).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert cells[0][:5] == ["rte: HF Trainer (None)", "2 of 16", "110.0", f"{3600 * 16 / 880:.0f}", "1.00"]
    assert cells[1][:5] == ["rte: pack=16 (graphs)", "16 of 16", "50.0", "1152", "17.60"]
    assert cells[1][-4:] == ["32 %", "8 %", "12 %", "48 %"]
    assert cells[2][1] == "failed"
    # an arm of another case is no yardstick
    assert wall._rate([{**PEER, "case": "mixed"}], "rte", "hf") is None


def test_an_arm_says_which_command_it_is(scripts: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wall, sweeps = scripts("wall"), scripts("sweeps")
    given: list[Any] = []

    def swept(experiment: str, pack: str, folder: Path, overrides: Any, limit: Any, name: str | None = None) -> Any:
        given.append((pack, overrides, name))
        return sweeps.Swept(sweeps.Command("", 1.0, "stopped", "", 0.0), [])

    monkeypatch.setattr(wall.sweeps, "swept", swept)
    options = wall.parse(["--set", "train.steps=6"])
    for arm in ("16", "16-eager", "auto", "eager"):
        wall.measure(wall.CASES["rte"], arm, options, tmp_path)
    few = [*wall.CASES["rte"].few, "train.steps=6"]
    assert given == [
        ("16", ["train.steps=6"], "16"),
        ("16", ["train.steps=6", "train.execution=eager"], "16-eager"),
        ("auto", ["train.steps=6"], "auto"),
        ("1", [*few, "train.execution=eager"], "eager"),
    ]
    assert wall._named({**PACKED, "arm": "16-eager", "execution": ["eager"]}) == "pack=16 (eager)"
    for arms in ("16,nonsense", "0", "-eager", "16,"):
        with pytest.raises(SystemExit):
            wall.parse(["--arms", arms])
    wall.parse(["--arms", "hf,hf-autocast,16,1,auto,auto-eager,eager,16-eager"])


def test_where_the_gain_falls_to_one(scripts: Any) -> None:
    curve = scripts("curve")
    assert curve.falls_to_one([(256, 8.0), (1024, 2.0)]) is None
    assert curve.falls_to_one([(256, 1.01), (1024, 1.0)]) == 256.0
    # halfway between the logarithms of 4 and 1/4 lies 1
    assert curve.falls_to_one([(256, 4.0), (1024, 0.25)], least=1.0) == pytest.approx(512.0)
    # a dip that it comes back from is not the end
    assert curve.falls_to_one([(256, 4.0), (512, 1.0), (1024, 4.0), (4096, 0.25)], least=1.0) == pytest.approx(2048.0)


def test_sign_flips_are_exact(scripts: Any) -> None:
    pairs = scripts("pairs")
    rng = np.random.default_rng(0)
    for n in (3, 8):
        differences = rng.normal(0.3, 1.0, n)
        sums = [abs(np.dot(signs, differences)) for signs in itertools.product((-1.0, 1.0), repeat=n)]
        expected = np.mean([s >= abs(differences.sum()) - 1e-9 for s in sums])
        assert pairs.sign_flips(differences) == pytest.approx(expected)
    assert pairs.sign_flips(np.zeros(5)) == 1.0
    assert pairs.sign_flips(np.ones(20)) == pytest.approx(2 / 2**20)
    assert pairs.sign_flips(np.ones(30)) < 1e-4


def run(run_id: str, metric: float, losses: list[float], **changes: Any) -> dict[str, Any]:
    """Return a record of a run."""
    method, _, seed = run_id.partition("-")
    return {
        "run_id": run_id,
        "status": "completed",
        "spec": {"method": {"name": method}, "seed": int(seed)},
        "pack": {"size": 2},
        "quality": {"primary_metric": "accuracy", "test": {"accuracy": metric}, "selected_step": 1},
        "trace": {"loss": losses},
        **changes,
    }


def test_pairs_are_runs_of_one_id_that_completed_on_both_sides(scripts: Any) -> None:
    pairs = scripts("pairs")
    packed = [run("lora-0", 0.5, [9.0] * 18 + [1.0, 2.0]), run("lora-1", 0.7, [1.0]), run("ia3-0", 0.1, [1.0])]
    alone = [run("lora-1", 0.6, [1.5]), run("lora-0", 0.5, [9.0] * 18 + [1.0, 1.0])]
    alone.append(run("ia3-0", 0.1, [1.0], status="diverged"))
    found = pairs.compared(packed, alone, {})
    assert [pair["run_id"] for pair in found["pairs"]] == ["lora-0", "lora-1"]
    assert found["without_a_partner"] == 1
    accuracy, loss = found["tests"]["test accuracy"], found["tests"]["loss"]
    assert accuracy["mean_difference"] == pytest.approx(0.05)
    assert (accuracy["equal_pairs"], accuracy["p_sign_flips"]) == (1, 1.0)
    assert accuracy["spread_over_seeds"] == pytest.approx(np.std([0.5, 0.6], ddof=1))
    assert loss["largest_difference"] == pytest.approx(0.5)  # the mean of the last tenth, 1.5 and 1.0
    json.dumps(found, allow_nan=False)


def test_packs_take_turns_at_every_number_of_tokens(scripts: Any, tmp_path: Path) -> None:
    curve = scripts("curve")
    out = tmp_path / "curve.jsonl"
    settings = ["--model", "tiny-bert", "--precision", "fp32", "--tokens", "16,32", "--packs", "1,2", "--length", "16"]
    records = curve.main(
        [*settings, "--most-tokens", "32", "--device", "cpu", "--rounds", "1", "--calls", "1", "--out", str(out)]
        + ["--figure", str(tmp_path / "figure")]
    )
    assert [(r["tokens"], r["runs"], r["batch"]) for r in records] == [(16, 1, 1), (16, 2, 1), (32, 1, 2)]
    assert records[0]["gain"] == 1.0
    assert records[1]["gain"] > 0
    assert (tmp_path / "figure.svg").stat().st_size > 0
    assert curve.main(["--table", str(out)]) == records


def test_the_trainer_takes_the_recipe(scripts: Any, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    pytest.importorskip("accelerate")
    trainer = scripts("trainer")
    task = ["--task", "movie-reviews", "--model", "tiny-bert", "--weights", "random", "--limit", "40"]
    (record,) = trainer.main(
        [*task, "--seeds", "3", "--epochs", "2", "--batch", "16", "--length", "32", "--precision", "fp32"]
        + ["--device", "cpu", "--out", str(tmp_path / "trainer.jsonl")]
    )
    assert (record["steps"], record["seed"], record["metric"]) == (6, 3, "accuracy")
    assert 0 <= record["test"] <= 1
    assert record["validation"] is not None
    assert sum(record["seconds"].values()) == pytest.approx(record["wall_seconds"], rel=0.01)
    assert record["seconds"]["evaluate"] > 0
    # rank 8 on query and value, 2 layers, width 32; a pooled head of two classes
    assert record["trained_parameters"] == 2 * 2 * 8 * (32 + 32) + 32 * 2 + 2


def test_a_whole_command_is_read_back_pack_by_pack(scripts: Any, tmp_path: Path) -> None:
    wall, sweeps = scripts("wall"), scripts("sweeps")
    small = ["model=tiny-bert", "task=tiny", "train.execution=eager", "train.precision=fp32", "train.steps=2"]
    grid = ["seed=0,1,2", "train.learning_rate=1e-3", "device=cpu"]
    swept = sweeps.swept("packing-rte", "2", tmp_path, [*small, *grid], limit=300)
    found = wall.of_sweep(swept)
    assert (found["status"], found["error"]) == ("completed", None)
    assert sorted(found["pack_sizes"]) == [1, 2]
    assert found["runs_timed"] == 3
    assert found["steps"] == 2
    busy = sum(sum(seconds.values()) for seconds in found["pack_seconds"])
    assert 0 < busy < found["wall_seconds"]
    assert busy + found["start_seconds"] + found["after_seconds"] == pytest.approx(found["wall_seconds"], abs=0.01)
    assert "results=results " in found["subcommand"]
    with pytest.raises(SystemExit):  # a second time would find the runs done, and time nothing
        sweeps.swept("packing-rte", "2", tmp_path)


def test_a_command_that_fails_is_a_result(scripts: Any, tmp_path: Path) -> None:
    wall, sweeps = scripts("wall"), scripts("sweeps")
    found = wall.of_sweep(sweeps.swept("packing-rte", "2", tmp_path, ["method=no-such"], limit=300))
    assert (found["status"], found["error"], found["runs_timed"]) == ("failed", "exit code 2", 0)
    assert "no-such" in found["output"]


def test_a_step_s_kernels_are_put_together_by_what_they_do(scripts: Any, tmp_path: Path) -> None:
    step = scripts("step")
    kinds = {
        "nvjet_sm90_tst_128x256_64x4_1x2_h_bz_coopA_bias_TNN": "products",
        "short_attention_backward": "attention",
        "fmha_cutlassB_bf16_aligned_64x64_k32_dropout_sm80": "attention",
        "void at::native::fused_dropout_kernel_vec<c10::BFloat16, float>": "dropout",
        "void at::native::vectorized_layer_norm_kernel<c10::BFloat16, float, false>": "normalization",
        "void at::native::vectorized_elementwise_kernel<8, at::native::GeluCUDAKernelImpl>": "elementwise",
        "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda>": "copies",
        "void at::native::CatArrayBatchedCopy_vectorized<>": "copies",
        "something else": "other",
    }
    assert {name: step.kind_of(name) for name in kinds} == kinds
    assert step.busy([(5.0, 6.0), (0.0, 2.0), (1.0, 3.0), (1.5, 1.6)]) == 4.0
    sizes = ["--length", "8", "--batch", "2", "--calls", "2", "--device", "cpu"]
    arguments = ["--model", "tiny-bert", "--precision", "fp32", *sizes, "--cases"]
    (record,) = step.main([*arguments, "1 lora", "--out", str(tmp_path / "step.jsonl")])
    assert record["flops"] > 0 < record["saved_bytes"]
    assert record["busy_seconds"] > 0
    assert record["kernel_seconds"]["products"] > 0
    assert record["products_at_least"] == pytest.approx(record["flops"] / record["matmul_flops_per_second"], rel=1e-4)
    assert [json.loads(line) for line in (tmp_path / "step.jsonl").read_text().splitlines()] == [record]
