"""Published parameter counts, rebuilt from shapes: equal, explained to the parameter, or said to differ."""

import dataclasses
import time

import pytest

from peftbench import published
from peftbench.methods.adapter import attach
from peftbench.methods.base import Method
from peftbench.reproduce import counts, shapes
from peftbench.reproduce.counts import Rebuilt, cuts_to, rebuild, rounds_to


@pytest.fixture(scope="module")
def rebuilt() -> dict[str, Rebuilt]:
    start = time.monotonic()
    found = {r.count.id: r for r in counts.rebuild_all()}
    assert time.monotonic() - start < 60
    return found


IMPOSSIBLE = "distilgpt2-lora-r16-taskclm-c-attn"


def test_every_row_is_equal_or_explained_but_for_one_that_cannot_be(rebuilt):
    assert [name for name, r in rebuilt.items() if r.status in ("differs", "inconsistent")] == [IMPOSSIBLE]
    tally = counts.tally(list(rebuilt.values()))
    assert tally["equal"] + tally["explained"] > 650
    assert sum(tally.values()) == len(published.counts())


def test_an_explanation_adds_up_to_the_parameter(rebuilt):
    for r in rebuilt.values():
        if r.status in ("equal", "explained"):
            assert r.ours + sum(n for _, n in r.terms) == r.found == r.count.trainable, r.count.id
            assert r.count.total in (None, r.total), r.count.id
            assert set(r.rules) <= set(counts.RULES), r.count.id
            assert (r.status == "equal") == (not r.rules), r.count.id


def test_a_total_that_no_model_of_the_width_has_is_inconsistent_and_another_one_differs(rebuilt):
    found = rebuilt[IMPOSSIBLE]
    assert (found.status, found.to_dict()["verdict"]) == ("inconsistent", "differs")
    assert found.total == 81_912_576 + 294_912
    assert found.count.total == 107_520 * 768 + 256
    assert "107,520 × 768 + 256" in found.why
    whole = rebuild(dataclasses.replace(found.count, total=107_520 * 768))
    assert (whole.status, whole.why.endswith("which no rule explains")) == ("differs", True)


def test_adapters_put_on_before_are_counted_by_their_own_closed_forms(rebuilt):
    """24 maps of 768 x 768: LoHa of rank 16 has four factors, LoKr two square ones of 24 and 32."""
    found = rebuilt["vit-base-patch16-224-in21k-adalora-init-r12-taskimg-query-value"]
    assert dict(found.total_terms)["earlier adapters"] == 24 * (4 * 16 * 768 + 24 * 24 + 32 * 32)


def test_what_cannot_be_rebuilt_says_why(rebuilt):
    for r in rebuilt.values():
        assert bool(r.why) >= (r.status in ("not here", "differs", "inconsistent")), r.count.id
        assert r.to_dict()["record"] is None or r.ours is not None


@pytest.mark.parametrize(
    ("model", "parameters"),
    [("llama-7b", 6_738_415_616), ("llama-65b", 65_285_660_672), ("GPT-3 175B", 174_604_259_328)],
)
def test_models_are_whole(model, parameters):
    assert shapes.total(shapes.model_of(model)) == parameters


def test_a_wrong_closed_form_is_found(monkeypatch):
    row = published.counts()["llama-7b-lora-r64-all-linear-but-the-head"]
    assert rebuild(row).status == "equal"
    right = Method.parameter_count
    monkeypatch.setattr(Method, "parameter_count", lambda self, model: right(self, model) + 1)
    assert rebuild(row).status == "differs"


def _of_each_kind() -> list[published.Count]:
    """Return one row for each method and kind of model; a small one."""
    found: dict[tuple[str, str], published.Count] = {}
    for row in sorted(published.counts().values(), key=lambda r: r.trainable):
        kind = published.architectures()[row.model]["config_class"]
        found.setdefault((row.method, kind), row)
    return list(found.values())


def test_closed_forms_count_the_tensors_of_shallow_models():
    """The same settings on the first two layers: what is counted is what `attach` makes."""
    seen = set()
    for row in _of_each_kind():
        try:
            work = counts._work(row)
        except counts.NotHere:
            continue
        if work.name in ("full", "head") or max(work.model.config.hidden_size, work.settings.get("rank", 1)) > 4096:
            continue  # adds no tensors, or too large ones for a test
        labels = int(row.settings.get("num_labels", 2))
        shallow = shapes.model_of.__wrapped__(row.model, counts._task(row), labels, 2)
        adapter = attach(shallow, work.method)
        made = sum(p.numel() for p in adapter.packed_parameters())
        assert made == work.method.parameter_count(shallow) > 0, row.id
        seen.add((work.name, work.model.config.model_type))
    assert len({name for name, _ in seen}) >= 18
    assert len({kind for _, kind in seen}) >= 10


@pytest.mark.parametrize(
    ("value", "printed", "rounds", "cuts"),
    [
        (294_912, "0.3M", True, False),
        (36_864, "36.8K", False, True),
        (36_864, "36.9K", True, False),
        (0.00825, "0.83%", True, False),
        (486_866_944, "0.49B", True, False),
        (540_672, "540K", False, True),
        (393_216, "0.35M", False, False),
    ],
)
def test_printed_numbers_are_read_to_their_digits(value, printed, rounds, cuts):
    assert rounds_to(value, printed) is rounds
    assert cuts_to(value, printed) is cuts


def test_names_choose_rows():
    found = counts.rebuild_all(["GPT-3 175B"])
    assert {r.count.model for r in found} == {"GPT-3 175B"}
    with pytest.raises(ValueError, match="no such count"):
        counts.rebuild_all(["gpt-5"])
