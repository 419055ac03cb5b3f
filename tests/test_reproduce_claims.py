"""The rules that judge claims, on made-up records: each can hold, be contradicted and stay undecided."""

from pathlib import Path
from typing import Any

import pytest

from peftbench import published
from peftbench.record import RunRecord
from peftbench.reproduce import claims, measured
from peftbench.reproduce.arms import Arm
from peftbench.reproduce.records import configurations
from peftbench.reproduce.verdicts import CONTRADICTED, HOLDS, NOT_RUN, UNDECIDED
from peftbench.resolve import demand
from peftbench.store import Store
from tests.conftest import make_spec

ROOT = Path(__file__).parents[1]
NOISE = (-0.1, 0.0, 0.1)


def arm(method: str, rate: float, score: float, noise: tuple[float, ...] = NOISE, **settings: Any) -> Arm:
    values = tuple(score + n for n in noise)
    return Arm({"name": method, **settings}, rate, values, values, (f"{method}-{rate}-{sorted(settings.items())}",))


def ranks(scores: dict[int, float], noise: tuple[float, ...] = NOISE) -> list[Arm]:
    return [arm("lora", 1e-3, score, noise, rank=rank) for rank, score in scores.items()]


@pytest.mark.parametrize(
    ("scores", "noise", "verdict"),
    [
        ({1: 89.8, 8: 90.0, 64: 89.9}, NOISE, HOLDS),
        ({1: 85.0, 8: 90.0, 64: 89.9}, NOISE, CONTRADICTED),
        ({1: 89.8, 8: 90.0, 64: 89.9}, (-3.0, 0.0, 3.0), UNDECIDED),
        ({1: 89.8, 8: 90.0}, NOISE, UNDECIDED),  # a rank is missing
        ({1: 89.8, 8: 90.0, 64: 89.9}, (0.0,), UNDECIDED),  # a single seed
    ],
)
def test_rank_insensitive(scores, noise, verdict):
    found = claims.rank_insensitive(ranks(scores, noise), method="lora", ranks=[1, 8, 64], margin=1.0)
    assert found.verdict == verdict


def test_each_rank_is_taken_at_its_own_learning_rate():
    found = [*ranks({1: 80.0, 8: 90.0}), arm("lora", 1e-2, 90.1, rank=1)]
    assert claims.rank_insensitive(found, method="lora", ranks=[1, 8], margin=1.0).verdict == HOLDS


@pytest.mark.parametrize(
    ("lora", "full", "verdict"), [(90.0, 90.3, HOLDS), (95.0, 90.0, HOLDS), (85.0, 90.0, CONTRADICTED)]
)
def test_not_worse(lora, full, verdict):
    found = [arm("lora", 1e-3, lora, rank=8), arm("full", 1e-4, full)]
    rule = {"method": "lora", "rank": 8, "reference": "full", "margin": 1.0}
    assert claims.not_worse(found, **rule).verdict == verdict
    noisy = [arm("lora", 1e-3, 89.5, (-2.0, 0.0, 2.0), rank=8), arm("full", 1e-4, 90.0)]
    assert claims.not_worse(noisy, **rule).verdict == UNDECIDED
    assert claims.not_worse(found[:1], **rule).reason == "lacks full"


@pytest.mark.parametrize(
    ("dora", "low", "high", "verdict"),
    [
        (91.0, 0.0, None, HOLDS),
        (89.0, 0.0, None, CONTRADICTED),
        (90.0, 0.0, None, UNDECIDED),
        (89.5, -1.0, None, HOLDS),
        (90.2, -1.0, 1.0, HOLDS),
        (92.0, -1.0, 1.0, CONTRADICTED),
        (88.0, -1.0, 1.0, CONTRADICTED),
        (91.0, -1.0, 1.0, UNDECIDED),
    ],
)
def test_difference_within(dora, low, high, verdict):
    sides = {"first": {"name": "dora", "rank": 4}, "second": {"name": "lora", "targets": ["all"]}}
    found = [arm("dora", 1e-3, dora, rank=4), arm("dora", 1e-3, 50.0, rank=8)]
    found += [arm("lora", 1e-3, 90.0, targets=["all"]), arm("lora", 1e-3, 50.0, targets=["mlp.up"])]
    said = claims.difference_within(found, **sides, low=low, high=high)
    assert said.verdict == verdict
    assert said.reason.startswith("dora of rank 4 − lora on all: [")
    assert claims.difference_within(found[1:], **sides, low=low).reason == "lacks dora of rank 4"
    assert claims.difference_within(found[:2], **sides, low=low).reason == "lacks lora on all"


def test_an_edge_of_either_side_keeps_back_what_it_could_overturn():
    sides = {"first": {"name": "dora"}, "second": {"name": "lora"}}
    high, low = curve("dora", HIGH, 1e-3), [arm("lora", a.rate, a.test[1] - 5) for a in curve("lora", HIGH, 1e-3)]
    assert claims.difference_within([*high, *low], **sides, low=0.0).verdict == HOLDS
    assert claims.difference_within([*high, *low[:3]], **sides, low=0.0).verdict == UNDECIDED
    assert claims.difference_within([*high[:3], *low], **sides, low=0.0).verdict == HOLDS  # it could only do better
    turned = {"first": sides["second"], "second": sides["first"]}
    assert claims.difference_within([*high, *low], **turned, low=0.0).verdict == CONTRADICTED
    assert claims.difference_within([*high, *low[:3]], **turned, low=0.0).verdict == UNDECIDED
    same = [arm("lora", a.rate, a.test[1]) for a in high]
    assert claims.difference_within([*high, *same], **sides, low=-1.0, high=1.0).verdict == HOLDS
    assert claims.difference_within([*high[:3], *same], **sides, low=-1.0, high=1.0).verdict == UNDECIDED


@pytest.mark.parametrize(
    ("base", "larger", "noise", "verdict"),
    [
        (88.0, 90.0, NOISE, HOLDS),
        (90.0, 90.2, NOISE, CONTRADICTED),  # a gain, but surely less than a point
        (90.0, 88.0, NOISE, CONTRADICTED),
        (89.0, 90.0, (-2.0, 0.0, 2.0), UNDECIDED),
    ],
)
def test_gain(base, larger, noise, verdict):
    found = [arm("lora_plus", 1e-3, score, noise, b_rate_ratio=r) for r, score in ((1.0, base), (16.0, larger))]
    rule = {"method": "lora_plus", "key": "b_rate_ratio", "baseline": 1.0, "least": 1.0}
    assert claims.gain(found, **rule).verdict == verdict
    assert claims.gain(found[1:], **rule).verdict == UNDECIDED


def test_better_at_largest_compares_at_the_rate_of_the_smallest_rank():
    found = [arm("lora", r, 80.0 + s, rank=4) for r, s in ((1e-3, 5.0), (1e-2, 0.0))]
    found += [arm("rslora", r, 85.0, rank=4) for r in (1e-3, 1e-2)]
    found += [arm("lora", 1e-3, 85.0, rank=256), arm("lora", 1e-2, 99.0, rank=256)]
    better, worse = arm("rslora", 1e-3, 87.0, rank=256), arm("rslora", 1e-3, 80.0, rank=256)
    rule = {"method": "rslora", "reference": "lora"}
    assert claims.better_at_largest([*found, better], **rule).verdict == HOLDS
    assert claims.better_at_largest([*found, worse], **rule).verdict == CONTRADICTED
    noisy = arm("rslora", 1e-3, 86.0, (-4.0, 0.0, 4.0), rank=256)
    assert claims.better_at_largest([*found, noisy], **rule).verdict == UNDECIDED
    assert claims.better_at_largest(found[:2], **rule).verdict == UNDECIDED


def curve(method: str, rates: list[float], top: float, noise: tuple[float, ...] = NOISE, **settings: Any) -> list[Arm]:
    """Return a curve over learning rates that falls by 3 points a step away from `top`."""
    at = rates.index(top)
    return [arm(method, r, 90 - 3 * abs(i - at), noise, **settings) for i, r in enumerate(rates)]


LOW, HIGH = [1e-5, 3e-5, 1e-4, 3e-4, 1e-3], [1e-4, 3e-4, 1e-3, 3e-3, 1e-2]
RATIO = {"method": "lora", "reference": "full", "low": 5.0, "high": 20.0}


def test_rate_ratio():
    full = curve("full", LOW, 1e-4)
    assert claims.rate_ratio([*full, *curve("lora", HIGH, 1e-3, rank=8)], **RATIO).verdict == HOLDS
    assert claims.rate_ratio([*full, *curve("lora", HIGH, 3e-4, rank=8)], **RATIO).verdict == CONTRADICTED
    both = [*full, *curve("lora", HIGH, 1e-3, rank=8), *curve("lora", HIGH, 3e-4, rank=64)]
    assert claims.rate_ratio(both, **RATIO).verdict == CONTRADICTED


def test_rates_that_cannot_be_told_apart_or_lie_at_an_edge_decide_nothing():
    wide = (-9.0, 0.0, 9.0)
    blurred = [*curve("full", LOW, 1e-4, wide), *curve("lora", HIGH, 3e-4, wide, rank=8)]
    assert claims.rate_ratio(blurred, **RATIO).verdict == UNDECIDED
    edge = [*curve("full", LOW, 1e-3), *curve("lora", HIGH, 1e-2, rank=8)]
    found = claims.rate_ratio(edge, **RATIO)
    assert (found.verdict, "edge" in found.reason) == (UNDECIDED, True)
    assert claims.rate_ratio(curve("full", LOW, 1e-4), **RATIO).reason == "lacks lora"


def test_rates_agree():
    fine = [1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3]
    rule = {"method": "lora", "ranks": [4, 64], "factor": 2.0}

    def both(first: float, second: float, noise: tuple[float, ...] = NOISE) -> list[Arm]:
        return [*curve("lora", fine, first, noise, rank=4), *curve("lora", fine, second, noise, rank=64)]

    assert claims.rates_agree(both(4e-4, 4e-4), **rule).verdict == HOLDS
    assert claims.rates_agree(both(2e-4, 4e-4), **rule).verdict == HOLDS
    assert claims.rates_agree(both(2e-4, 8e-4), **rule).verdict == CONTRADICTED
    assert claims.rates_agree(both(2e-4, 8e-4, (-9.0, 0.0, 9.0)), **rule).verdict == UNDECIDED
    assert claims.rates_agree(both(1e-4, 1e-4), **rule).verdict == UNDECIDED  # the edge of the grid
    assert claims.rates_agree(both(4e-4, 4e-4)[:5], **rule).verdict == UNDECIDED


def test_an_edge_keeps_back_the_verdict_that_it_could_overturn():
    full, lora = curve("full", LOW, 1e-4), curve("lora", HIGH, 1e-3, rank=8)
    rule = {"method": "lora", "rank": 8, "reference": "full", "margin": 1.0}
    low = [arm("lora", a.rate, a.test[1] - 5, rank=8) for a in lora]
    assert claims.not_worse([*full, *low], **rule).verdict == CONTRADICTED
    assert claims.not_worse([*full, *low[:3]], **rule).verdict == UNDECIDED  # LoRA is best at its largest rate
    assert claims.not_worse([*full, *lora], **rule).verdict == HOLDS
    assert claims.not_worse([*full[:3], *lora], **rule).verdict == UNDECIDED  # so is full
    assert claims.not_worse([*full[:3], *low], **rule).verdict == CONTRADICTED  # more rates would only widen it
    worse = curve("lora", HIGH, 1e-3, rank=1)
    falls = [arm("lora", a.rate, a.test[1] - 5, rank=1) for a in worse]
    ranks_rule = {"method": "lora", "ranks": [1, 8], "margin": 1.0}
    assert claims.rank_insensitive([*lora, *falls], **ranks_rule).verdict == CONTRADICTED
    assert claims.rank_insensitive([*lora, *falls[2:]], **ranks_rule).verdict == UNDECIDED
    assert claims.rank_insensitive([*lora, *worse], **ranks_rule).verdict == HOLDS
    blurred = curve("lora", HIGH, 1e-3, (-9.0, 0.0, 9.0), rank=8)
    assert claims.rate_ratio([*curve("full", LOW, 1e-4), *blurred], **RATIO).verdict == UNDECIDED
    flat = [arm("full", r, 90.0) for r in LOW]  # its best cannot be told from the rates at its edges
    assert claims.rate_ratio([*flat, *curve("lora", HIGH, 3e-4, rank=8)], **RATIO).verdict == UNDECIDED


def test_intervals_widen_with_what_is_compared():
    first, second = (90.0, 90.5, 91.0), (89.0, 89.5, 90.0)
    one, many = claims.interval(first, second), claims.interval(first, second, 20)
    assert one is not None
    assert many is not None
    assert many[0] < one[0] < one[1] < many[1]
    found = [arm("lora", 1e-3, 90.0, rank=8), arm("full", 1e-4, 91.3)]
    rule = {"method": "lora", "rank": 8, "reference": "full", "margin": 1.0}
    assert claims.not_worse(found, **rule).verdict == CONTRADICTED
    assert claims.not_worse(found, **rule, tasks=1000).verdict == UNDECIDED


# -- from records ------------------------------------------------------------------------------------------------------


def record(method: str, seed: int, rate: float, loss: float, model: str, task: str, **settings: Any) -> RunRecord:
    changes = {f"method.{k}": v for k, v in settings.items()}
    spec = make_spec(
        seed=seed,
        **{"model.name": model, "task.name": task, "method.name": method, "train.learning_rate": rate, **changes},
    )
    side = {"loss": loss + 0.001 * seed}
    quality = {"primary_metric": "loss", "greater_is_better": False, "validation": side, "test": dict(side)}
    return RunRecord(spec.run_id, "completed", spec.to_dict(), quality=quality)


def write(folder, records) -> None:
    made = Store(folder)
    made.prepare()
    for one in records:
        made.write(one)


def losses(tops: dict[str, float], model: str) -> list[RunRecord]:
    found = []
    for seed in (0, 1, 2):
        for i, rate in enumerate(LOW):
            found.append(record("full", seed, rate, 2 + 0.1 * abs(i - LOW.index(tops["full"])), model, "alpaca"))
        for rank in (4, 16, 64, 256):
            for i, rate in enumerate(HIGH):
                loss = 2 + 0.1 * abs(i - HIGH.index(tops["lora"]))
                found.append(record("lora", seed, rate, loss, model, "alpaca", rank=rank))
    return found


@pytest.mark.parametrize(("top", "verdict"), [(1e-3, HOLDS), (3e-4, CONTRADICTED)])
def test_a_claim_is_judged_by_its_experiment_s_records_and_marked_as_transfer(tmp_path, top, verdict):
    claim = published.claims()["regret-ratio"]
    write(tmp_path / "claims-without-regret", losses({"full": 1e-4, "lora": top}, "smollm2-135m"))
    write(tmp_path / "other", losses({"full": 1e-4, "lora": 1e-4}, "smollm2-135m"))
    found, records = claims.judge(claim, configurations([tmp_path]))
    assert found.verdict == verdict
    assert str(found) == f"{verdict} (transfer to smollm2-135m)"
    assert records


def test_losses_count_downwards_and_their_margin_is_a_hundredth(tmp_path):
    write(tmp_path / "claims-x", losses({"full": 1e-4, "lora": 1e-3}, "m"))
    found = claims.arms(configurations([tmp_path / "claims-x"]), "alpaca")
    top = claims.best(claims.of(found, "full"))
    assert top.rate == 1e-4
    assert top.test[0] == pytest.approx(-2.0)
    assert top.point == 0.01


def test_one_task_against_it_contradicts_a_claim(tmp_path, monkeypatch):
    claim = published.claims()["regret-ranks"]
    records = losses({"full": 1e-4, "lora": 1e-3}, "m")
    for one in losses({"full": 1e-4, "lora": 1e-3}, "m"):
        one.spec["task"] = {**one.spec["task"], "name": "cola"}
        if one.spec["method"].get("rank") == 4:
            shift = 0.1 * abs(HIGH.index(one.spec["train"]["learning_rate"]) - 1)
            loss = 2 + shift + 0.001 * one.spec["seed"]
            one.quality["validation"] = one.quality["test"] = {"loss": loss}
        one.run_id = f"cola-{one.run_id}"
        records.append(one)
    write(tmp_path / claim.experiment, records)
    asked = []
    rule = claims.RULES[claim.rule]
    monkeypatch.setitem(claims.RULES, claim.rule, lambda *a, **k: asked.append(k["tasks"]) or rule(*a, **k))
    found, _ = claims.judge(claim, configurations([tmp_path]))
    assert found.verdict == CONTRADICTED
    assert "alpaca:" in found.reason
    assert asked == [2, 2]  # intervals allow for both tasks


def trained() -> list[published.Claim]:
    """Return the claims that runs decide."""
    return [c for c in published.claims().values() if c.rule not in measured.RULES]


def test_claims_are_not_run_without_records_and_their_experiments_can_give_what_rules_ask_for():
    for claim in trained():
        verdict, records = claims.judge(claim, [])
        assert (verdict.verdict, records) == (NOT_RUN, ())
        assert claim.experiment in verdict.reason
        assert claim.rule in claims.RULES
        assert set(claim.rows) <= set(published.values())
        grids = demand({}, claim.experiment).grids
        methods = {m for g in grids for m in g["method"]}
        assert {claim.settings[k]["name"] for k in ("first", "second") if k in claim.settings} <= methods
        assert {claim.settings[k] for k in ("method", "reference") if k in claim.settings} <= methods
        assert {*claim.settings.get("methods", ()), *(s["name"] for s in claim.settings.get("others", ()))} <= methods
        given = {m for g in grids for m in g["model"]}
        assert {*claim.settings.get("expected", ()), *claim.settings.get("rates", ())} <= given, claim.id
        for model, rate in claim.settings.get("rates", {}).items():
            own = [g for g in grids if g["model"] == [model] and g["method"] == [claim.settings["method"]]]
            assert any(rate in g["train.learning_rate"] for g in own), claim.id
        steps = {*claim.settings.get("steps", ()), *((claim.settings["step"],) if "step" in claim.settings else ())}
        assert all(s % e == 0 for s in steps for g in grids for e in g.get("train.evaluate_every", (s + 1,)))
        wanted = set(claim.settings.get("ranks", ())) | {claim.settings[k] for k in ("rank",) if k in claim.settings}
        given = {r for g in grids for r in g.get("method.rank", ())}
        assert wanted <= given, claim.id
        assert all(len(g["seed"]) >= 5 and len(g["train.learning_rate"]) >= 3 for g in grids)


def test_the_criteria_are_written_beside_the_experiments():
    for claim in published.claims().values():
        text = (ROOT / "experiments" / claim.experiment / "README.md").read_text()
        assert f"`{claim.id}`" in text
        assert "contradicted" in text
        ran = (ROOT / "results" / claim.experiment).is_dir()
        assert ("Not run yet" in text) != ran, claim.experiment
        assert ("## What was found" in text) == ran, claim.experiment
