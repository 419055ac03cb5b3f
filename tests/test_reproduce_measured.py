"""The rules that judge claims on memory, speed and size: each can hold, be contradicted and stay undecided."""

import json
from typing import Any

import pytest

from peftbench import published
from peftbench.cli.reproduce import reproduce
from peftbench.errors import UserError
from peftbench.reproduce import measured
from peftbench.reproduce.verdicts import CONTRADICTED, HOLDS, NOT_RUN, UNDECIDED

GIB = 2**30


def step(case: str, peak: float = 10.0, seconds: float = 0.1, **changes: Any) -> dict[str, Any]:
    """Return a completed measurement of training steps; `peak` in GiB."""
    state = {"weights": 4_000_000, "gradients": 4_000_000, "optimizer": 8_000_000}
    return {
        "comparison": "claims-memory", "case": case, "kind": "step", "outcome": "completed", "device_type": "cuda",
        "device": "a GPU", "model": case.split("/")[-2] if "/" in case else case, "method": case.split("/")[0],
        "record": f"results#{case}", "batch": 1, "length": 512, "rank": 8, "card_bytes": None, "held_back_bytes": 0,
        "weights_bytes": 30 * GIB, "memory": {"peak": peak * GIB, "managed": 6 * GIB}, "state_bytes": state,
        "step_seconds": {"p50": seconds}, "total_parameters": 1_000_000, "checkpoint_bytes": 50_000_000, **changes,
    }  # fmt: skip


def forward(case: str, ratio: float, noise: float = 0.001) -> dict[str, Any]:
    base = [1.0, 1.0, 1.0, 1.0]
    wobble = [-noise, noise, -noise, noise]
    arms = {"base": base, "folded": [ratio * (1 + w) for w in wobble], "beside": [1.3] * 4}
    return {**step(case), "kind": "forward", "forward_seconds": arms}


def test_a_model_fits_where_its_steps_ran_on_a_card_that_small():
    card = {"card_bytes": 48 * GIB, "held_back_bytes": 30 * GIB}
    ran = step("qlora-65b", 41.0, **card)
    out = {**ran, "outcome": "out_of_memory", "stage": "load", "memory": None}
    rule = {"cases": ["qlora-65b"], "card": 48.0}
    found = measured.fits([ran], **rule)
    assert found.verdict == HOLDS
    assert "peak 41.0 GiB" in found.reason
    assert "6.0 GiB paged" in found.reason
    assert measured.fits([out], **rule).verdict == CONTRADICTED
    assert "weights alone 30.0 GiB" in measured.fits([out], **rule).reason
    assert measured.fits([{**ran, "outcome": "failed", "error": "x"}], **rule).verdict == UNDECIDED
    both = {"cases": ["qlora-65b", "small"], "card": 48.0}
    assert measured.fits([out, {**ran, "case": "small"}], **both).verdict == HOLDS
    assert measured.fits([out, {**out, "case": "small"}], **both).verdict == CONTRADICTED
    assert measured.fits([out], **both).verdict == UNDECIDED  # the other was not tried
    for other in (step("qlora-65b", 20.0), {**ran, "held_back_bytes": 0}, {**ran, "card_bytes": 80 * GIB}):
        lacking = measured.fits([other], **rule)  # a peak on a larger card shows nothing
        assert (lacking.verdict, lacking.records) == (UNDECIDED, ())


@pytest.mark.parametrize(
    ("peaks", "saved", "ratio"),
    [
        ((40.0, 30.0), HOLDS, CONTRADICTED),  # 4 and 3 times
        ((110.0, 120.0), HOLDS, HOLDS),
        ((110.0, 20.0), HOLDS, UNDECIDED),
        ((20.0, 15.0), CONTRADICTED, CONTRADICTED),
    ],
)
def test_memory_of_full_against_lora(peaks, saved, ratio):
    found = [step(f"full/{m}/x", p) for m, p in zip("ab", peaks, strict=True)] + [step(f"lora/{m}/x") for m in "ab"]
    rule = {"method": "lora", "reference": "full"}
    assert measured.memory_saved(found, **rule, least=3.0).verdict == saved
    assert measured.memory_ratio(found, **rule, least=10.0).verdict == ratio
    beside = measured.memory_ratio([*found, step("qlora/a/x", 1.0)], **rule, least=10.0, beside=["qlora"])
    assert beside.verdict == ratio
    assert "/ qlora: a/x" in beside.reason
    assert measured.memory_ratio(found[:2], **rule, least=10.0).records == ()
    assert measured.memory_saved([*found[:2], step("lora/c/x")], **rule, least=3.0).records == ()


def test_steps_are_compared_on_the_same_batch():
    rule = {"method": "lora", "reference": "full", "least": 100.0}
    slow = step("full/a/x", seconds=0.15)
    assert measured.faster([slow, step("lora/a/x")], **rule).verdict == CONTRADICTED
    fast = step("lora/a/x", seconds=0.001)
    assert measured.faster([slow, fast], **rule).verdict == HOLDS
    mixed = [slow, fast, step("full/b/x"), step("lora/b/x")]
    assert measured.faster(mixed, **rule).verdict == UNDECIDED
    assert measured.faster([slow, step("lora/a/y")], **rule).records == ()
    failed = step("lora/a/x", outcome="out_of_memory")
    assert measured.faster([slow, failed], **rule).records == ()


def test_bytes_of_state_for_each_parameter():
    rule = {"method": "full", "claimed": 16.0, "tolerance": 0.5}
    right = step("full/a/x")
    more = step("full/b/x", state_bytes={"weights": 6_000_000, "gradients": 4_000_000, "optimizer": 8_000_000})
    assert measured.bytes_per_parameter([right], **rule).verdict == HOLDS
    assert measured.bytes_per_parameter([more], **rule).verdict == CONTRADICTED
    assert measured.bytes_per_parameter([right, more], **rule).verdict == UNDECIDED
    assert measured.bytes_per_parameter([step("lora/a/x")], **rule).records == ()


def test_one_large_adapter_contradicts_that_adapters_are_small():
    rule = {"methods": ["lora", "qlora-65b"], "limit": 100.0}
    small, large = step("lora/a/x"), step("qlora-65b", checkpoint_bytes=3_200_000_000)
    assert measured.adapter_below([small, step("full/a/x", checkpoint_bytes=10**10)], **rule).verdict == HOLDS
    found = measured.adapter_below([small, large], **rule)
    assert found.verdict == CONTRADICTED
    assert "3200 MB (qlora-65b, rank 8)" in found.reason
    assert measured.adapter_below([], **rule).records == ()


@pytest.mark.parametrize(
    ("ratio", "noise", "verdict"),
    [(1.0, 0.001, HOLDS), (0.999, 0.001, HOLDS), (1.05, 0.001, CONTRADICTED), (1.0, 0.2, UNDECIDED)],
)
def test_the_overhead_of_folded_weights(ratio, noise, verdict):
    found = measured.no_overhead([forward("merged/a/x", ratio, noise), forward("merged/b/x", 1.0)], margin=0.02)
    assert found.verdict == verdict
    assert "unmerged merged/a/x: 30 %" in found.reason
    assert measured.no_overhead([step("lora/a/x")], margin=0.02).records == ()


def test_measurements_are_read_from_results_and_the_last_of_a_case_counts(tmp_path, capsys):
    folder = tmp_path / "claims-memory"
    folder.mkdir()
    lines = [step("full/zz/x", 20.0), step("lora/zz/x"), step("full/zz/x", 40.0)]
    for line in lines:
        del line["record"]
    (folder / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert {m["case"]: m["memory"]["peak"] / GIB for m in measured.load([tmp_path])} == {
        "full/zz/x": 40,
        "lora/zz/x": 10,
    }
    assert len(measured.load([folder])) == 2
    assert reproduce(["claims"], results=[str(tmp_path)], form="json") == 0
    rows = {r["id"]: r for r in json.loads(capsys.readouterr().out)}
    saved = rows["lora-memory"]
    assert (saved["verdict"], saved["transfer"]) == (HOLDS, "zz")
    assert [r.partition("#")[2] for r in saved["record"]] == ["full/zz/x", "lora/zz/x"]
    assert "(a GPU)" in saved["reason"]
    assert rows["folk-hundredfold"]["transfer"] is None
    assert (rows["folk-70b-24gb"]["verdict"], rows["folk-70b-24gb"]["record"]) == (NOT_RUN, None)
    (folder / "m.jsonl").write_text('{"comparison": "other"}\n')
    with pytest.raises(UserError, match=r"m.jsonl:1: no measurement"):
        measured.load([tmp_path])


def test_what_was_measured_without_a_gpu_is_not_judged():
    claim = published.claims()["lora-memory"]
    found = [step("full/a/x", 40.0, device_type="cpu"), step("lora/a/x", device_type="cpu")]
    verdict, records = measured.judge(claim, found)
    assert (verdict.verdict, records) == (NOT_RUN, ())
    assert "measure.py" in verdict.reason
    assert measured.judge(claim, [step("full/a/x", 40.0), step("lora/a/x")])[0].verdict == HOLDS


def test_a_measured_claim_is_no_sweep_to_run():
    with pytest.raises(UserError, match="folk-merged: no sweep"):
        reproduce(["folk-merged"], run=True)
