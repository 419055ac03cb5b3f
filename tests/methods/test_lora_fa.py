"""LoRA-FA against HF PEFT's LoRA with A frozen; what its backward pass keeps; the corrected gradient."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import peftbench
from peftbench.methods.lora import Lora, LoraDelta
from peftbench.methods.lora_fa import LoraFa, LoraFaDelta
from peftbench.models.roles import Site
from tests.conformance.conftest import batch, disturb, fresh, hidden


def site_of(module: nn.Linear) -> Site:
    return Site("linear", "attention.query", 0, "map", module, module.in_features, module.out_features)


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(count)]


@pytest.mark.parametrize(("family", "names"), [("tiny-bert", ("query", "value")), ("tiny-gpt2", ("c_attn",))])
def test_training_is_peft_s_lora_with_its_first_factor_frozen(family, names, tmp_path):
    peft = pytest.importorskip("peft")
    model, reference = fresh(family), fresh(family)
    adapter = peftbench.attach(model, LoraFa(rank=4, targets=names))
    adapter.save(tmp_path, format="peft")
    theirs = peft.PeftModel.from_pretrained(reference, str(tmp_path), is_trainable=True).eval()
    for name, p in theirs.named_parameters():
        if "lora_A" in name:
            p.requires_grad_(False)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == adapter.parameter_count()

    def trace(model: nn.Module, parameters: list[nn.Parameter]) -> list[float]:
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        losses = []
        for step in range(20):
            optimizer.zero_grad()
            states = hidden(model, batch(3, step % 2))
            loss = (
                (states - torch.randn(states.shape, generator=torch.Generator().manual_seed(step % 2))).square().mean()
            )
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    ours = trace(model, adapter.parameters())
    assert ours == pytest.approx(trace(theirs, trained), rel=1e-4)
    assert ours[-1] < 0.95 * ours[1]


@pytest.mark.parametrize(("method", "kept"), [(Lora(rank=2), True), (LoraFa(rank=2), False)])
def test_the_backward_pass_keeps_the_input_for_lora_alone(method, kept):
    module = nn.Linear(6, 5)
    kind = LoraDelta if kept else LoraFaDelta
    delta = kind(site_of(module), [method], generators(1))
    x, y = torch.randn(1, 7, 6, requires_grad=True), torch.randn(1, 7, 5)
    saved: list[torch.Size] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        delta.after(x, y).sum().backward()
    assert (x.shape in saved or x.mT.shape in saved) == kept
    assert x.grad is not None


def test_the_corrected_gradient_brings_the_product_closest_to_the_full_gradient():
    torch.manual_seed(0)
    module = nn.Linear(6, 5)
    methods = [LoraFa(rank=2, corrected=True), LoraFa(rank=4, alpha=3.0, corrected=True), LoraFa(rank=3)]
    delta = LoraFaDelta(site_of(module), methods, generators(3))
    with torch.no_grad():
        for run in range(3):
            delta.run_state(run)["B"].normal_()
    plain = LoraFaDelta(site_of(module), [LoraFa(m.rank, m.alpha) for m in methods], generators(3))
    plain.load_state_dict(delta.state_dict(), strict=False)
    x, target = torch.randn(3, 7, 6), torch.randn(3, 7, 5)
    y = module(x).detach()
    torch.testing.assert_close(delta.after(x, y), plain.after(x, y), rtol=0, atol=0)
    for one in (delta, plain):
        (one.after(x, y) - target).square().sum().backward()
    full = x.mT @ (2 * (plain.after(x, y) - target)).detach()  # the gradient of Wᵀ [in, out]
    for run in (0, 1):
        a, s = delta.run_drawn(run)["A"], methods[run].scale
        best = torch.linalg.lstsq(s * a.double(), full[run].double()).solution.float()
        rank = methods[run].rank
        torch.testing.assert_close(delta.B.grad[run, :rank], best, rtol=1e-4, atol=1e-4)
        assert not delta.B.grad[run, rank:].any()
    torch.testing.assert_close(delta.B.grad[2], plain.B.grad[2])


def test_loaded_tensors_bring_their_own_correction(tmp_path):
    model = fresh("tiny-bert")
    adapter = peftbench.attach(model, LoraFa(rank=2, corrected=True), seeds=[1])
    other = {**adapter.state_dict(), **{k: 2 * v for k, v in adapter._drawn(0).items()}}
    before = [delta.correction.clone() for _, delta in adapter.deltas]
    adapter.load_state_dict(other)
    for old, (_, delta) in zip(before, adapter.deltas, strict=True):
        torch.testing.assert_close(delta.correction, old / 4)


def test_only_the_trained_factor_is_saved_and_both_for_peft(tmp_path):
    model = fresh("tiny-bert")
    adapter = peftbench.attach(model, LoraFa(rank=2), seeds=[3])
    disturb(adapter)
    want = hidden(model, batch(2))
    own = load_file(adapter.save(tmp_path / "own"))
    assert {n.rpartition(".")[2] for n in own} == {"B"}
    theirs = load_file(adapter.save(tmp_path / "peft", format="peft"))
    assert {".".join(n.split(".")[-2:]) for n in theirs} == {"lora_A.weight", "lora_B.weight"}
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    adapter.detach()
    loaded = peftbench.load_adapter(model, tmp_path / "peft")
    assert isinstance(loaded.methods[0], Lora)
    torch.testing.assert_close(hidden(model, batch(2)), want, rtol=0, atol=1e-6)
