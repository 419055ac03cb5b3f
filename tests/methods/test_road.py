"""RoAd against its formula and, in all three variants, HF PEFT."""

import math

import pytest
import torch

import peftbench
from peftbench.errors import UserError
from peftbench.methods.road import RoAd
from tests.conformance.conftest import batch, disturb, fresh, hidden
from tests.methods.formulas import parity


@pytest.mark.parametrize("family", ["tiny-bert", "tiny-gpt2", "tiny-llama"])
def test_it_equals_its_formula_on_dense_weights(family, monkeypatch):
    assert parity(monkeypatch, "road", family).passed


def test_a_worked_value():
    """A quarter turn of the pairs (1, 3) and (2, 4), stretched by two."""
    delta = peftbench.attach(fresh("tiny-bert"), RoAd(group_size=4, targets=("attention.query",))).deltas[0][1]
    y = torch.zeros(1, 1, 32)
    y[..., :4] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    with torch.no_grad():
        delta.theta.fill_(math.pi / 2)
        delta.alpha.fill_(2.0)
        torch.testing.assert_close(delta.after(y, y)[0, 0, :4], torch.tensor([-6.0, -8.0, 2.0, 4.0]))


@pytest.mark.parametrize("angles", [1, 2, 4])
def test_every_variant_is_peft_s_both_ways(angles, tmp_path):
    peft = pytest.importorskip("peft")
    model = fresh("tiny-bert")
    adapter = peftbench.attach(model, RoAd(angles, group_size=8, targets=("query", "intermediate.dense")))
    disturb(adapter)
    want = hidden(model, batch(3))
    adapter.save(tmp_path / "ours", format="peft")
    theirs = peft.PeftModel.from_pretrained(fresh("tiny-bert"), tmp_path / "ours")
    torch.testing.assert_close(hidden(theirs, batch(3)), want, rtol=1e-5, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    adapter.merge()
    merged = theirs.merge_and_unload()
    for name in ("query.weight", "query.bias"):
        full = f"encoder.layer.1.attention.self.{name}"
        torch.testing.assert_close(model.get_parameter(full), merged.get_parameter(full), rtol=1e-5, atol=1e-6)
    adapter.detach()
    loaded = peftbench.load_adapter(model, tmp_path / "theirs")
    assert loaded.methods[0].angles == angles
    torch.testing.assert_close(hidden(model, batch(3)), want, rtol=1e-5, atol=1e-5)


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="angles=3: expected 1, 2 or 4"):
        RoAd(3)
    with pytest.raises(UserError, match="group_size=7: expected an even number"):
        RoAd(group_size=7)
    with pytest.raises(UserError, match="group_size=64: expected a divisor of 32"):
        peftbench.attach(fresh("tiny-bert"), RoAd())
