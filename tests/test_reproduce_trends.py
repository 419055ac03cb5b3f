"""Rules on several models, batch sizes, steps and trained factors: each can hold, be contradicted, stay undecided."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from peftbench import published, registry
from peftbench.record import RunRecord
from peftbench.reproduce import arms, claims, ratios, trends
from peftbench.reproduce.arms import Arm
from peftbench.reproduce.records import configurations
from peftbench.reproduce.verdicts import CONTRADICTED, HOLDS, NOT_RUN, UNDECIDED
from peftbench.store import Store
from tests.conftest import make_spec

NOISE = (-0.1, 0.0, 0.1)
WIDE = (-9.0, 0.0, 9.0)
FULL = [1e-5 * 2**k for k in range(7)]
LORA = [10 * rate for rate in FULL]


def arm(method: str, rate: float, score: float, noise: tuple[float, ...] = NOISE, **settings: Any) -> Arm:
    values = tuple(score + n for n in noise)
    return Arm({"name": method, **settings}, rate, values, values, (f"{method}-{rate}-{sorted(settings.items())}",))


def curve(
    method: str, rates: list[float], top: int, noise: tuple[float, ...] = NOISE, peak: float = 90.0, **settings: Any
) -> list[Arm]:
    """Return a curve over learning rates that falls by 3 points a step away from the rate at `top`."""
    return [arm(method, r, peak - 3 * abs(i - top), noise, **settings) for i, r in enumerate(rates)]


# -- several models ----------------------------------------------------------------------------------------------------

SIDES = {"method": "lora", "reference": "full"}


def models(**tops: tuple[int, int]) -> list[Arm]:
    """Return curves of LoRA and full fine-tuning on some models, with the tops given for each."""
    found = []
    for model, (lora, full) in tops.items():
        both = [*curve("lora", LORA, lora, rank=16), *curve("full", FULL, full)]
        found += [replace(a, model=model, records=(f"{model}-{a.records[0]}",)) for a in both]
    return found


@pytest.mark.parametrize(
    ("tops", "verdict"),
    [
        ({"a": (3, 3), "b": (3, 3)}, HOLDS),
        ({"a": (2, 3), "b": (4, 3)}, HOLDS),  # 5 and 20
        ({"a": (1, 4), "b": (1, 4)}, CONTRADICTED),  # 1.25
        ({"a": (5, 2), "b": (5, 2)}, CONTRADICTED),  # 80
        ({"a": (3, 3), "b": (6, 3)}, UNDECIDED),  # at the edge
        ({"a": (3, 3)}, UNDECIDED),
    ],
)
def test_ratio_mean(tops, verdict):
    assert ratios.ratio_mean(models(**tops), **SIDES, low=4.9, high=19.6).verdict == verdict


def test_rates_that_cannot_be_told_from_the_best_may_make_the_ratio():
    blurred = [*curve("lora", LORA, 1, WIDE, rank=16), *curve("full", FULL, 4, WIDE)]
    found = [replace(a, model=m) for m in "ab" for a in blurred]
    assert ratios.ratio_mean(found, **SIDES, low=4.9, high=19.6).verdict == UNDECIDED
    assert ratios.ratio_steady(found, **SIDES, factor=2.0).verdict == UNDECIDED


@pytest.mark.parametrize(
    ("tops", "verdict"),
    [
        ({"a": (3, 3), "b": (3, 3)}, HOLDS),
        ({"a": (3, 3), "b": (4, 3)}, HOLDS),
        ({"a": (3, 3), "b": (5, 3)}, CONTRADICTED),
        ({"a": (3, 3), "b": (6, 3)}, UNDECIDED),
        ({"a": (1, 3), "b": (5, 3), "c": (6, 3)}, CONTRADICTED),  # c is at the edge, a and b are not
    ],
)
def test_ratio_steady(tops, verdict):
    found = ratios.ratio_steady(models(**tops), **SIDES, factor=2.0)
    assert found.verdict == verdict
    assert ("edge" in found.reason) == (verdict == UNDECIDED)


@pytest.mark.parametrize(
    ("tops", "verdict"),
    [
        ({"a": (3, 3), "b": (3, 3)}, HOLDS),  # 10 where the rule gives 40 on b
        ({"a": (3, 3), "b": (5, 3)}, CONTRADICTED),  # 10 and 40, as it says
        ({"a": (3, 3), "b": (6, 3)}, UNDECIDED),
        ({"a": (3, 3)}, UNDECIDED),
    ],
)
def test_ratio_unlike(tops, verdict):
    said = ratios.ratio_unlike(models(**tops), **SIDES, expected={"a": 10.0, "b": 40.0}, factor=2.0)
    assert said.verdict == verdict


def test_a_recommended_rate_may_cost_a_share_of_the_score():
    found = models(a=(3, 3), b=(2, 3))

    def said(share: float, **rates: float) -> str:
        return ratios.rate_serves(found, method="lora", rates=rates, share=share).verdict

    assert said(0.01, a=LORA[3], b=LORA[2]) == HOLDS
    assert said(0.05, a=LORA[3], b=LORA[3]) == HOLDS  # 3 of 90 points
    assert said(0.01, a=LORA[3], b=LORA[3]) == CONTRADICTED
    assert said(0.0333, a=LORA[2]) == UNDECIDED
    assert ratios.rate_serves(found, method="lora", rates={"a": 1.0}, share=0.1).reason.startswith("lacks lora at 1")
    edge = models(a=(6, 3))
    assert ratios.rate_serves(edge, method="lora", rates={"a": LORA[6]}, share=0.01).verdict == UNDECIDED
    assert ratios.rate_serves(edge, method="lora", rates={"a": LORA[5]}, share=0.1).verdict == UNDECIDED
    assert ratios.rate_serves(edge, method="lora", rates={"a": LORA[0]}, share=0.01).verdict == CONTRADICTED


# -- steps -------------------------------------------------------------------------------------------------------------

STEPS = [100, 200, 400]


def course(rank: int, scores: list[float], rate: float = 1e-3, noise: tuple[float, ...] = NOISE) -> Arm:
    """Return an arm with the scores along `STEPS`."""
    made = arm("lora", rate, scores[-1], noise, rank=rank)
    return replace(made, curves=tuple(dict(zip(STEPS, (s + n for s in scores), strict=True)) for n in noise))


@pytest.mark.parametrize(
    ("first", "noise", "verdict"),
    [(50.0, NOISE, HOLDS), (48.0, NOISE, CONTRADICTED), (52.0, NOISE, CONTRADICTED), (50.0, WIDE, UNDECIDED)],
)
def test_curves_meet(first, noise, verdict):
    rule = {"method": "lora", "ranks": [1, 64], "step": 100, "margin": 1.0}
    found = [course(1, [first, 0, 0], noise=noise), course(64, [50.0, 60, 70], noise=noise)]
    assert trends.curves_meet(found, **rule).verdict == verdict
    other = course(64, [50.0, 60, 90], 2e-3)  # the rate that suits rank 64 best
    assert trends.curves_meet([*found, other], **rule).reason == "lacks learning rate 0.002 at rank 1"
    assert trends.curves_meet(found, **{**rule, "step": 25}).reason == "lacks an evaluation at step 25"
    assert trends.curves_meet(found[:1], **rule).reason == "lacks rank 64"


@pytest.mark.parametrize(
    ("low", "middle", "verdict"),
    [
        ([50, 50, 60], [50, 60, 60], HOLDS),
        ([50, 50, 60], [50, 60, 70], HOLDS),  # the middle one never leaves
        ([50, 60, 70], [50, 50, 60], CONTRADICTED),
        ([50, 60, 70], [50, 60, 70], UNDECIDED),
        ([50, 50, 60], [50, 50, 60], UNDECIDED),
        ([40, 60, 70], [50, 60, 70], UNDECIDED),  # behind at first, and caught up
    ],
)
def test_leave_in_order(low, middle, verdict):
    rule = {"method": "lora", "ranks": [1, 8, 64], "steps": STEPS, "margin": 1.0}
    found = [course(1, low), course(8, middle), course(64, [50, 60, 70])]
    assert trends.leave_in_order(found, **rule).verdict == verdict
    assert trends.leave_in_order([replace(a, curves=a.curves[:1]) for a in found], **rule).verdict == UNDECIDED


def paths(ratio: float, scores: list[float], noise: tuple[float, ...] = (0.0, 0.0, 0.0), rate: float = 1e-3) -> Arm:
    made = course(8, scores, rate, noise)
    return replace(made, settings={"name": "lora_plus", "b_rate_ratio": ratio}, records=(f"{ratio}-{rate}",))


def test_sooner():
    rule = {"method": "lora_plus", "key": "b_rate_ratio", "baseline": 1.0, "least": 2.0}
    slow = paths(1.0, [50, 60, 70])
    assert trends.sooner([slow, paths(16.0, [70, 71, 72])], **rule).verdict == HOLDS
    assert trends.sooner([slow, paths(16.0, [50, 60, 72])], **rule).verdict == CONTRADICTED
    assert trends.sooner([slow, paths(16.0, [50, 60, 65])], **rule).verdict == CONTRADICTED  # none ever does
    third = replace(paths(16.0, [50, 60, 72]), curves=({100: 50.0, 300: 72.0},) * 3)
    assert trends.sooner([slow, third], **rule).verdict == CONTRADICTED  # sooner, but surely not by half
    blurred = paths(16.0, [60, 60, 72], (0.0, 10.0, 20.0))
    assert trends.sooner([slow, blurred], **rule).verdict == UNDECIDED
    slowest = [paths(1.0, [40, 50, 60 - n], rate=1e-3 * 2**n) for n in (1, 2)]
    assert trends.sooner([slow, *slowest, paths(16.0, [70, 71, 72])], **rule).verdict == UNDECIDED  # an edge
    assert trends.sooner([slow], **rule).reason == "lacks b_rate_ratio other than 1"
    plain = [replace(a, curves=()) for a in (slow, blurred)]
    assert trends.sooner(plain, **rule).reason == "lacks evaluations along training"


def test_a_run_that_never_reaches_a_score_counts_as_one_that_would_at_the_next_evaluation():
    assert trends._reached({100: 1.0, 200: 2.0}, 2.0) == 200
    assert trends._reached({100: 1.0, 200: 2.0}, 2.1) == 300


# -- batch sizes -------------------------------------------------------------------------------------------------------


def batches(scores: dict[tuple[str, int], float], noise: tuple[float, ...] = NOISE) -> list[Arm]:
    found = []
    for (method, batch), score in scores.items():
        for a in curve(method, LORA, 3, noise, score):
            found.append(replace(a, batch=batch, records=(f"{batch}-{a.records[0]}",)))
    return found


@pytest.mark.parametrize(
    ("small", "large", "noise", "verdict"),
    [
        (89.9, 85.0, NOISE, HOLDS),
        (85.0, 89.9, NOISE, CONTRADICTED),
        (88.0, 88.0, NOISE, UNDECIDED),
        (89.9, 85.0, WIDE, UNDECIDED),
    ],
)
def test_gap_grows(small, large, noise, verdict):
    scores = {("lora", 32): small, ("lora", 512): large, ("full", 32): 90.0, ("full", 512): 90.0, ("lora", 128): 10.0}
    found = batches(scores, noise)
    assert trends.gap_grows(found, **SIDES).verdict == verdict
    assert (
        trends.gap_grows([a for a in found if a.batch == 32], **SIDES).reason
        == "lacks two batch sizes of lora and full"
    )


def test_an_edge_at_one_of_four_corners_can_overturn_a_growing_gap():
    found = batches({("lora", 32): 89.9, ("lora", 512): 85.0, ("full", 32): 90.0, ("full", 512): 90.0})

    def cut(method: str, batch: int) -> list[Arm]:
        return [a for a in found if (a.settings["name"], a.batch) != (method, batch) or a.rate <= LORA[3]]

    assert trends.gap_grows(cut("lora", 512), **SIDES).verdict == UNDECIDED  # LoRA might do better there
    assert trends.gap_grows(cut("full", 32), **SIDES).verdict == UNDECIDED
    assert trends.gap_grows(cut("lora", 32), **SIDES).verdict == HOLDS  # the gap would grow even more
    assert trends.gap_grows(cut("full", 512), **SIDES).verdict == HOLDS


@pytest.mark.parametrize(
    ("lora", "full", "verdict"), [(85.0, 85.0, HOLDS), (95.0, 85.0, CONTRADICTED), (90.0, 85.0, UNDECIDED)]
)
def test_smaller_batch(lora, full, verdict):
    found = batches({("lora", 32): 90.0, ("lora", 512): lora, ("full", 32): 90.0, ("full", 512): full})
    assert trends.smaller_batch(found, methods=["lora", "full"]).verdict == verdict
    edge = [a for a in found if a.batch == 32 or a.rate <= LORA[3]]
    assert (trends.smaller_batch(edge, methods=["lora", "full"]).verdict == HOLDS) is False


# -- settings and factors ----------------------------------------------------------------------------------------------


def test_not_beaten():
    rule = {
        "first": {"name": "lora", "alpha": 32.0},
        "others": [{"name": "lora", "alpha": 8.0}, {"name": "pissa"}],
        "margin": 1.0,
    }
    usual = curve("lora", LORA, 3, alpha=32.0)
    worse = curve("lora", LORA, 3, peak=89.0, alpha=8.0)

    def said(peak: float, noise: tuple[float, ...] = NOISE, rates: list[float] = LORA) -> Any:
        return trends.not_beaten([*usual, *worse, *curve("pissa", rates, 3, noise, peak)], **rule)

    assert said(90.2).verdict == HOLDS
    assert said(92.0).verdict == CONTRADICTED
    assert said(92.0).reason.startswith("pissa − lora with alpha=32: [")
    assert said(90.2, WIDE).verdict == UNDECIDED
    assert said(90.2, rates=LORA[:4]).verdict == UNDECIDED  # more rates might beat it
    assert said(92.0, rates=LORA[:4]).verdict == CONTRADICTED
    short = [*usual[:4], *worse, *curve("pissa", LORA, 3, peak=92.0)]
    assert trends.not_beaten(short, **rule).verdict == UNDECIDED
    assert trends.not_beaten(usual, **rule).reason == "lacks lora with alpha=8; pissa"


def test_second_factor_larger(tmp_path):
    def kept(rank: int, sizes: tuple[float, ...]) -> Arm:
        made = replace(arm("lora", 1e-3, 90.0, rank=rank), adapters=tuple(tmp_path / f"{rank}-{s}" for s in sizes))
        for folder, size in zip(made.adapters, sizes, strict=True):
            folder.mkdir(exist_ok=True)
            tensors = {"m.A": torch.eye(4, 2, dtype=torch.bfloat16), "m.B": size * torch.eye(2, 4)}
            save_file(tensors, folder / "adapter.safetensors")
        return made

    def said(*sides: Arm) -> Any:
        return trends.second_factor_larger(sides, method="lora", ranks=[4, 8])

    larger = kept(4, (2.0, 2.1, 2.2))
    assert said(larger, kept(8, (3.0, 3.1, 3.2))).verdict == HOLDS
    assert said(larger, kept(8, (0.3, 0.31, 0.32))).verdict == CONTRADICTED
    assert said(larger, kept(8, (0.5, 1.0, 2.0))).verdict == UNDECIDED
    assert said(larger).reason == "lacks rank 8"
    nothing = replace(larger, settings={"name": "lora", "rank": 8}, adapters=(tmp_path / "none",))
    assert (said(larger, nothing).records, "save_adapters=true" in said(larger, nothing).reason) == ((), True)
    assert trends._log_norms(tmp_path / "4-2.0" / "adapter.safetensors") == pytest.approx(math.log(2))


# -- from records ------------------------------------------------------------------------------------------------------


def written(folder, model: str, batch: int, seeds: tuple[int, ...] = (1, 0)) -> None:
    store = Store(folder)
    store.prepare()
    for seed in seeds:
        spec = make_spec(seed=seed, **{"model.name": model, "task.name": "alpaca", "train.batch_size": batch})
        side = {"loss": 2.0 + seed}
        history = [{"step": s, "metrics": {"loss": 5.0 + seed - s / 100}} for s in (100, 200)]
        quality = {"primary_metric": "loss", "greater_is_better": False, "validation": side, "test": dict(side)}
        store.write(RunRecord(spec.run_id, "completed", spec.to_dict(), quality=quality | {"evaluations": history}))


def test_an_arm_knows_its_model_batch_curves_and_where_adapters_would_be(tmp_path):
    written(tmp_path / "claims-x", "m", 64)
    (made,) = configurations([tmp_path])
    (found,) = arms.arms([replace(made, records=made.records[::-1])], "alpaca")
    assert (found.model, found.batch) == ("m", 64)
    assert found.test == (-2.0, -3.0)  # by seed, whatever the order of records
    assert found.curves == ({100: -4.0, 200: -3.0}, {100: -5.0, 200: -4.0})
    assert [f.parent for f in found.adapters] == [tmp_path / "claims-x" / "adapters"] * 2
    assert ["-s0-" in f.name for f in found.adapters] == [True, False]


def test_a_transfer_names_the_models_that_the_verdict_rests_on(tmp_path, monkeypatch):
    claim = published.claims()["regret-rate-qwen"]
    for model in ("qwen3-0.6b", "llama-3.2-1b"):
        written(tmp_path / claim.experiment, model, 32)

    def rule(found: list[Arm], **settings: Any) -> arms.Found:
        return arms.Found(HOLDS, "", tuple(i for a in found if a.model in settings["rates"] for i in a.records))

    monkeypatch.setitem(claims.RULES, claim.rule, rule)
    verdict, records = claims.judge(claim, configurations([tmp_path]))
    assert (verdict.transfer, len(records)) == ("qwen3-0.6b", 2)


# -- what the registry asks of them ------------------------------------------------------------------------------------


def test_every_claim_of_the_registry_has_a_grid_and_a_criterion_or_a_reason():
    with_grid = {row for claim in published.claims().values() for row in claim.rows}
    reasons = published.reasons()
    stated = [v for v in published.values().values() if v.table in ("claim", "abstract", "theory") or v.number is None]
    assert len(stated) > 20
    for row in stated:
        counted = row.metric.unit == "count"
        assert (row.id in with_grid) + (row.id in reasons) + counted == 1, row.id
    assert set(reasons) <= set(published.values())
    assert all(reasons.values())


def test_rates_of_the_rule_for_learning_rates_and_ratios_by_width_are_what_the_registry_says():
    names = ("llama-3.2-1b", "llama-3.2-3b", "qwen3-0.6b")
    widths = {name: registry.section("model", name)["architecture"]["hidden_size"] for name in names}
    for claim_id, row_id in (("regret-rate-llama", "lwr-lr-exp-llama"), ("regret-rate-qwen", "lwr-lr-exp-qwen")):
        row, settings = published.values()[row_id], published.claims()[claim_id].settings
        for model, rate in settings["rates"].items():
            exact = row.settings["base_lr"] * row.settings["multiplier"] * (2000 / widths[model]) ** row.number
            assert rate == pytest.approx(exact, rel=0.02), model
    expected = published.claims()["regret-ratio-not-hidden"].settings["expected"]
    assert all(expected[model] == width / 64 for model, width in widths.items())


def test_claims_without_records_are_not_run():
    for rule in ("regret-ratio-fit", "regret-rank-falloff", "regret-batch-gap", "loraplus-speed"):
        assert claims.judge(published.claims()[rule], [])[0].verdict == NOT_RUN
