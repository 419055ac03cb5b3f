"""RandLoRA's sum, its two ways of being computed, its bases, and HF PEFT's folders."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

import peftbench
from peftbench.errors import UserError
from peftbench.methods import randlora
from peftbench.methods.randlora import RandLora
from peftbench.verify import bench
from tests.conformance.conftest import disturb, fresh

EVERYWHERE = RandLora(rank=5, targets=("attention.query", "mlp.up", "mlp.down"))


def attached(method: RandLora = EVERYWHERE, family: str = "tiny-bert", **options: object):
    adapter = peftbench.attach(fresh(family), method, **options)
    disturb(adapter)
    return adapter


def the_sum(site, delta, run: int = 0) -> torch.Tensor:
    """Σᵢ Bᵢ Λᵢ A Γᵢ term by term, B's columns relabelled as the module says."""
    short, long = sorted((site.in_features, site.out_features))
    state = delta.run_state(run)
    rank, terms = state["lambda_"].shape
    a = delta.shared.A[run, :, :short]
    columns = delta.shared.B[run, :long, :terms].reshape(long, -1)
    total = torch.zeros(long, short)
    for i in range(terms):
        b = columns[:, [rho * terms + i for rho in range(rank)]]
        total += b @ torch.diag(state["lambda_"][:, i]) @ a @ torch.diag(state["gamma"][i])
    return delta.scale[run] * (total if site.out_features >= site.in_features else total.T)


def test_every_site_computes_the_sum_both_ways():
    adapter = attached(runs=2)
    assert adapter.shared.A.shape == (2, 5, 64)
    assert adapter.shared.B.shape == (2, 64, 13, 5)
    shapes = set()
    for site, delta in adapter.deltas:
        shapes.add((site.in_features, site.out_features))
        short, long = delta.short, delta.long
        limit = 3 * short * long // (3 * short - long)
        wanted = [the_sum(site, delta, run) for run in range(2)]
        for rows in (2, limit, limit + 1):
            x, y = torch.randn(2, rows, site.in_features), torch.randn(2, rows, site.out_features)
            out = delta.after(x, y)
            for run in range(2):
                torch.testing.assert_close(out[run], y[run] + x[run] @ wanted[run].T, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(delta.merged(torch.zeros_like(wanted[1]), None, 1)[0], wanted[1])
    assert shapes == {(32, 32), (32, 64), (64, 32)}


@pytest.mark.parametrize("index", [0, 1, 2])
def test_both_ways_give_the_same_gradients(index):
    site, delta = attached().deltas[index]
    x = torch.randn(1, 500, site.in_features)
    found = []
    for parts in (1, 20):  # 500 rows as one matrix; 25 at a time as two products
        inputs = x.clone().requires_grad_(True)
        for part in inputs.chunk(parts, dim=1):
            y = torch.zeros(1, part.shape[1], site.out_features)
            delta.after(part, y).square().sum().backward()
        found.append([inputs.grad, delta.lambda_.grad.clone(), delta.gamma.grad.clone()])
        delta.lambda_.grad = delta.gamma.grad = None
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-2)


def test_rows_decide_the_way(monkeypatch):
    calls = []
    real = randlora.add_product
    monkeypatch.setattr(randlora, "add_product", lambda *args: calls.append(1) or real(*args))
    _, delta = attached().deltas[0]  # 32 by 32: as one matrix above 48 rows
    for rows, want in ((48, 0), (49, 1)):
        delta.after(torch.randn(1, rows, 32), torch.zeros(1, rows, 32))
        assert len(calls) == want


def test_the_change_has_full_rank():
    _, delta = attached().deltas[0]
    change, _ = delta.merged(torch.zeros(32, 32), None, 0)
    assert torch.linalg.matrix_rank(change) == 32


@pytest.mark.parametrize(("bases", "share"), [("uniform", 1.0), ("sparse", 1 / 3), ("very_sparse", 32**-0.5)])
def test_bases_have_unit_deviation_and_their_share_of_entries(bases, share):
    shared = peftbench.attach(fresh("tiny-bert"), RandLora(rank=8, bases=bases)).shared
    for basis in (shared.A, shared.B):
        assert float(basis.std()) == pytest.approx(1, rel=1e-3)
        assert float((basis != 0).float().mean()) == pytest.approx(share, rel=0.3)
    assert len(shared.B.unique()) == 3 or bases == "uniform"
    assert int((shared.B > 0).sum()) == pytest.approx(int((shared.B < 0).sum()), rel=0.3)


@pytest.mark.parametrize("family", ["tiny-bert", "tiny-gpt2"])
def test_peft_reads_sites_of_unlike_shapes(family, tmp_path):
    peft = pytest.importorskip("peft")
    targets = ("mlp.up", "mlp.down")
    model = bench.fresh(family)
    adapter = peftbench.attach(model, RandLora(rank=5, scale=0.3, targets=targets))
    bench.disturbed(adapter)
    batch = bench.batches(model)[0]
    want = bench.outputs(model(**batch.inputs), batch)
    adapter.save(tmp_path, format="peft")
    theirs = peft.PeftModel.from_pretrained(bench.fresh(family), str(tmp_path)).eval()
    assert bench.largest(want, bench.outputs(theirs(**batch.inputs), batch)) < 1e-5


@pytest.mark.parametrize("options", [{}, {"sparse": True}, {"very_sparse": True}])
def test_a_folder_that_peft_wrote_loads(options, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.RandLoraConfig(r=6, randlora_alpha=12, target_modules=["query", "intermediate.dense"], **options)
    theirs = peft.get_peft_model(bench.fresh("tiny-bert"), config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "randlora_lambda" in name:
                parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(len(name)))
    theirs.save_pretrained(tmp_path)
    model = bench.fresh("tiny-bert")
    batch = bench.batches(model)[0]
    want = bench.outputs(theirs(**batch.inputs), batch)
    adapter = peftbench.load_adapter(model, tmp_path)
    assert bench.largest(bench.outputs(model(**batch.inputs), batch), want) < 1e-5
    assert adapter.methods[0].scale == 2.0
    assert adapter.methods[0].bases == (next(iter(options)) if options else "uniform")
    adapter.detach()

    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    repeated = next(k for k in tensors if k.endswith("query.randlora_B"))
    save_file({**tensors, repeated: tensors[repeated] + 1}, file)
    with pytest.raises(UserError, match="expected the same basis"):
        peftbench.load_adapter(model, tmp_path)
    save_file({k: v for k, v in tensors.items() if "randlora_A" not in k}, file)
    with pytest.raises(UserError, match="lacks 'base_model.randlora_A'"):
        peftbench.load_adapter(model, tmp_path)
