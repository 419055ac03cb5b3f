"""BOFT: products of butterfly factors are rotations, mix all features, and are the authors'."""

import json

import pytest
import torch
from safetensors.torch import save_file

import peftbench
from peftbench.errors import UserError
from peftbench.methods.boft import BOFT, butterfly
from peftbench.methods.rotation import cayley_change
from tests.conformance.conftest import batch, disturb, fresh, hidden
from tests.methods.formulas import parity


def rotation(delta):
    """Return R [D, D] of the first run: what the rows of the identity become."""
    return delta.before(torch.eye(32).expand(delta.runs, -1, -1))[0].detach()


@pytest.mark.parametrize("family", ["tiny-bert", "tiny-gpt2", "tiny-llama"])
def test_it_equals_its_formula_on_dense_weights(family, monkeypatch):
    assert parity(monkeypatch, "boft", family).passed


@pytest.mark.parametrize(("size", "factors"), [(8, 1), (8, 2), (4, 3), (2, 5)])
def test_rotations_are_orthogonal_and_keep_norms(size, factors):
    adapter = peftbench.attach(fresh("tiny-bert"), BOFT(size, factors), runs=2)
    disturb(adapter)
    for _, delta in adapter.deltas:
        turn = rotation(delta)
        assert (turn @ turn.T - torch.eye(32)).abs().max() < 1e-5
        x = torch.randn(2, 50, 32, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(delta.before(x).norm(dim=-1), x.norm(dim=-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("size", "factors"), [(4, 1), (4, 2), (4, 3), (4, 4), (2, 5)])
def test_a_feature_reaches_size_times_two_to_the_factors_others(size, factors):
    adapter = peftbench.attach(fresh("tiny-bert"), BOFT(size, factors))
    disturb(adapter)
    reached = (rotation(adapter.deltas[0][1]).abs() > 1e-7).sum(1)
    assert reached.tolist() == [size * 2 ** (factors - 1)] * 32


def test_factors_are_joined_as_peft_s_permutations_do():
    """PEFT builds more than one factor only with its CUDA extension; its permutations need none."""
    layer = pytest.importorskip("peft.tuners.boft.layer").BOFTLayer
    width, size, factors = 64, 4, 4
    skew = torch.randn(factors, width // size, size, size, generator=torch.Generator().manual_seed(0))
    change = cayley_change(0.5 * (skew - skew.mT))
    product = torch.eye(width)
    for i in range(factors):
        order = layer.block_butterfly_perm(None, width, width // size // 2**i, size // 2, factors - 1)
        permutation = layer.perm2mat(None, order)
        product = permutation @ torch.block_diag(*(change[i] + torch.eye(size))) @ permutation.T @ product
    x = torch.randn(1, 5, width, generator=torch.Generator().manual_seed(1))
    turned = x
    for i in reversed(range(factors)):
        turned = butterfly(turned, change[i].unsqueeze(0), i)
    torch.testing.assert_close(turned, x @ product, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["tiny-bert", "tiny-llama"])
def test_one_factor_is_peft_s_both_ways(family, tmp_path):
    peft = pytest.importorskip("peft")
    model = fresh(family)
    adapter = peftbench.attach(model, BOFT(8, 1))
    disturb(adapter)
    want = hidden(model, batch(3))
    adapter.save(tmp_path / "ours", format="peft")
    adapter.detach()
    theirs = peft.PeftModel.from_pretrained(fresh(family), tmp_path / "ours")
    torch.testing.assert_close(hidden(theirs, batch(3)), want, rtol=1e-5, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    peftbench.load_adapter(model, tmp_path / "theirs")
    torch.testing.assert_close(hidden(model, batch(3)), want, rtol=1e-5, atol=1e-5)


def test_several_factors_are_read_from_peft_s_folders_but_not_written(tmp_path):
    """A folder of PEFT's with its CUDA extension differs in the factor axis alone."""
    from peftbench.methods.peft_format import PREFIX

    model = fresh("tiny-bert")
    adapter = peftbench.attach(model, BOFT(8, 2, targets=("query",)))
    with pytest.raises(UserError, match="factors=2: PEFT needs its CUDA extension for several: expected 1"):
        adapter.save(tmp_path / "refused", format="peft")
    disturb(adapter)
    want = hidden(model, batch(3))
    form, method = BOFT.peft, adapter.methods[0]
    tensors = form.tensors(method, method.sites(model), adapter.state_dict())
    name = f"{PREFIX}encoder.layer.0.attention.self.query"
    assert (tensors[f"{name}.boft_R"].shape, tensors[f"{name}.boft_s"].shape) == ((2, 4, 8, 8), (32, 1))
    config = {"peft_type": "BOFT", "boft_block_size": 8, "boft_n_butterfly_factor": 2, "target_modules": ["query"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "adapter_model.safetensors")
    adapter.detach()
    peftbench.load_adapter(model, tmp_path)
    torch.testing.assert_close(hidden(model, batch(3)), want)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="factors=0"):
        BOFT(factors=0)
    with pytest.raises(UserError, match="block_size=3: expected an even number"):
        BOFT(3, 2)
    with pytest.raises(UserError, match=r"block_size=8: expected block_size .* here 64, a divisor of 32"):
        peftbench.attach(fresh("tiny-bert"), BOFT(8, 4))
