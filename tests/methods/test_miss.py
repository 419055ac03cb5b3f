"""MiSS: shards that do not divide the input, against HF PEFT; what is refused."""

import pytest
import torch

import peftbench
from peftbench.errors import UserError
from peftbench.methods.miss import MiSS
from tests.conformance.conftest import batch, disturb, fresh, hidden
from tests.methods.formulas import parity


@pytest.mark.parametrize("family", ["tiny-bert", "tiny-gpt2", "tiny-llama"])
def test_it_equals_its_formula_on_dense_weights(family, monkeypatch):
    assert parity(monkeypatch, "miss", family).passed


def test_a_worked_value():
    """Width 5 in shards of 2: x = (1, 2 | 3, 4 | 5) sums to (9, 6)."""
    delta = peftbench.attach(fresh("tiny-bert"), MiSS(2)).deltas[0][1]
    with torch.no_grad():
        delta.D.copy_(torch.stack([torch.ones(32), 10 * torch.ones(32)]).unsqueeze(0))
        y = delta.after(torch.tensor([[[1.0, 2, 3, 4, 5]]]), torch.zeros(1, 1, 32))
        weight, _ = delta.merged(torch.zeros(32, 5), None, 0)
    assert torch.equal(y, torch.full((1, 1, 32), 69.0))
    assert torch.equal(weight[7], torch.tensor([1.0, 10, 1, 10, 1]))


@pytest.mark.parametrize("rank", [5, 16, 32])
def test_peft_reads_and_merges_what_is_saved(rank, tmp_path):
    peft = pytest.importorskip("peft")
    model = fresh("tiny-llama")
    adapter = peftbench.attach(model, MiSS(rank, targets=("q_proj", "down_proj")))
    disturb(adapter)
    want = hidden(model, batch(3))
    adapter.save(tmp_path, format="peft")
    theirs = peft.PeftModel.from_pretrained(fresh("tiny-llama"), tmp_path)
    torch.testing.assert_close(hidden(theirs, batch(3)), want, rtol=1e-5, atol=1e-5)
    adapter.merge()
    merged = theirs.merge_and_unload()
    for name in ("layers.0.self_attn.q_proj.weight", "layers.1.mlp.down_proj.weight"):
        torch.testing.assert_close(model.get_parameter(name), merged.get_parameter(name), rtol=1e-5, atol=1e-6)


def test_peft_s_other_forms_and_sizes_that_do_not_fit_are_refused(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.MissConfig(r=4, target_modules=["query"], init_weights="bat")
    peft.get_peft_model(fresh("tiny-bert"), config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="init_weights='bat' is not read here"):
        peftbench.load_adapter(fresh("tiny-bert"), tmp_path)
    with pytest.raises(UserError, match="rank=33: expected at most 32"):
        peftbench.attach(fresh("tiny-bert"), MiSS(33))
