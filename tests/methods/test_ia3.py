"""IA3's sites, and its folders in HF PEFT's format."""

import pytest
import torch

import peftbench
from peftbench.errors import UserError
from peftbench.methods.ia3 import IA3
from tests.conformance.conftest import batch, disturb, fresh, hidden


def test_a_map_that_both_settings_name_is_scaled_at_its_input():
    model = fresh("tiny-gpt2")
    method = IA3(targets=("c_proj",), feedforward=("mlp.c_proj",))
    adapter = peftbench.attach(model, method)
    shapes = {name: len(t) for name, t in adapter.state_dict().items() if name.startswith("h.0.")}
    assert shapes == {"h.0.attn.c_proj.scale": 32, "h.0.mlp.c_proj.scale": 128}


def test_an_input_that_several_roles_share_is_not_scaled_for_one_of_them():
    with pytest.raises(UserError, match="serves other roles' inputs too"):
        peftbench.attach(fresh("tiny-gpt2"), IA3(feedforward=("attention.query",)))


@pytest.mark.parametrize(
    ("family", "outputs", "inputs"),
    [
        ("tiny-bert", ("key", "value"), ("output.dense",)),
        ("tiny-gpt2", ("attn.c_attn",), ("mlp.c_proj",)),
        ("tiny-llama", ("k_proj", "v_proj"), ("down_proj",)),
    ],
)
def test_peft_reads_what_is_saved_and_the_other_way_round(family, outputs, inputs, tmp_path):
    """BERT's `output.dense` is the end of a name in both sublayers: both are scaled at their inputs, here and there."""
    peft = pytest.importorskip("peft")
    model = fresh(family)
    adapter = peftbench.attach(model, IA3(outputs, inputs))
    disturb(adapter)
    want = hidden(model, batch(3))
    adapter.save(tmp_path / "ours", format="peft")
    adapter.detach()
    theirs = peft.PeftModel.from_pretrained(fresh(family), tmp_path / "ours")
    torch.testing.assert_close(hidden(theirs, batch(3)), want, rtol=1e-5, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    peftbench.load_adapter(model, tmp_path / "theirs")
    torch.testing.assert_close(hidden(model, batch(3)), want, rtol=1e-5, atol=1e-5)


def test_a_folder_with_peft_s_default_names_loads(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.IA3Config(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"])
    theirs = peft.get_peft_model(fresh("tiny-gpt2"), config)
    for name, p in theirs.named_parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))) * p.requires_grad
    theirs.save_pretrained(tmp_path)
    model = fresh("tiny-gpt2")
    peftbench.load_adapter(model, tmp_path)
    torch.testing.assert_close(hidden(model, batch(3)), hidden(theirs, batch(3)), rtol=1e-5, atol=1e-5)
