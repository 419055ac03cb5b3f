"""LayerNorm tuning: which parameters train, and its folders in HF PEFT's format."""

import copy

import pytest
import torch

import peftbench
from peftbench.errors import UserError
from peftbench.methods.layernorm import LayerNormTuning
from tests.conformance.conftest import batch, disturb, fresh, hidden


@pytest.mark.parametrize("family", ["tiny-bert", "tiny-gemma3", "tiny-qwen3", "tiny-t5"])
def test_training_equals_training_the_same_tensors_of_the_model(family):
    """Norms of queries and keys and Gemma's offset included."""
    model = fresh(family)
    plain = copy.deepcopy(model)
    adapter = peftbench.attach(model, LayerNormTuning())
    own = {site.name for site, _ in adapter.deltas}
    norms = {name.rpartition(".")[0] for name, p in plain.named_parameters() if p.dim() == 1 and "norm" in name.lower()}
    assert own == norms
    trained = [p for name, p in plain.named_parameters() if name.rpartition(".")[0] in own]
    assert adapter.parameter_count() == sum(p.numel() for p in trained)
    for p in trained:
        p.requires_grad_(True)
    # Not Adam: it makes whole steps of rounding errors where a gradient is zero, as that of a key's bias is.
    optimizers = [torch.optim.SGD(ps, lr=0.3) for ps in (adapter.parameters(), trained)]
    for step in range(4):
        for net, optimizer in zip((model, plain), optimizers, strict=True):
            optimizer.zero_grad()
            out = hidden(net, batch(4, step))
            (out - torch.randn(out.shape, generator=torch.Generator().manual_seed(step))).square().mean().backward()
            optimizer.step()
    assert (hidden(plain, batch(4)) - hidden(fresh(family), batch(4))).abs().max() > 0.01
    torch.testing.assert_close(hidden(model, batch(4)), hidden(plain, batch(4)), rtol=1e-4, atol=1e-5)


def test_either_parameter_may_train_alone_where_there_is_one():
    model = fresh("tiny-bert")
    adapter = peftbench.attach(model, LayerNormTuning(weight=False))
    assert {name.rpartition(".")[2] for name, _ in adapter.named_parameters()} == {"bias"}
    with pytest.raises(UserError, match="weight=False: PEFT trains every parameter"):
        adapter.save("unused", format="peft")
    with pytest.raises(UserError, match="RMS norms have no bias"):
        peftbench.attach(fresh("tiny-llama"), LayerNormTuning(weight=False))
    with pytest.raises(UserError, match="true where bias is false"):
        LayerNormTuning(weight=False, bias=False)


@pytest.mark.parametrize("family", ["tiny-bert", "tiny-llama"])
def test_peft_reads_what_is_saved_and_the_other_way_round(family, tmp_path):
    peft = pytest.importorskip("peft")
    model = fresh(family)
    adapter = peftbench.attach(model, "layernorm")
    disturb(adapter)
    want = hidden(model, batch(3))
    adapter.save(tmp_path / "ours", format="peft")
    adapter.detach()
    theirs = peft.PeftModel.from_pretrained(fresh(family), tmp_path / "ours")
    torch.testing.assert_close(hidden(theirs, batch(3)), want, rtol=1e-5, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    peftbench.load_adapter(model, tmp_path / "theirs")
    torch.testing.assert_close(hidden(model, batch(3)), want, rtol=1e-5, atol=1e-5)


def test_a_folder_with_fewer_normalisations_is_refused(tmp_path):
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(fresh("tiny-gpt2"), peft.LNTuningConfig(target_modules=["ln_f"]))
    theirs.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is missing"):
        peftbench.load_adapter(fresh("tiny-gpt2"), tmp_path)
