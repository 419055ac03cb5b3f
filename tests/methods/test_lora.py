"""LoRA against loralib, LoRA+ against HF PEFT's rates, and which of PEFT's LoRA folders are LoRA."""

import json

import pytest
import torch
from torch import nn

import peftbench
from peftbench.engine.optimizer import PackedAdamW, Recipe
from peftbench.errors import UserError
from peftbench.methods.adapter import named_method
from peftbench.methods.dora import Dora
from peftbench.methods.lora import Lora, LoraDelta
from peftbench.methods.pissa import Pissa
from peftbench.models.roles import Site
from tests.conformance.conftest import batch, disturb, fresh, hidden


def test_a_linear_map_trains_as_loralib_s():
    loralib = pytest.importorskip("loralib")
    torch.manual_seed(0)
    theirs = loralib.Linear(10, 6, r=4, lora_alpha=8, merge_weights=False)
    loralib.mark_only_lora_as_trainable(theirs)
    module = nn.Linear(10, 6).requires_grad_(False)
    module.load_state_dict({"weight": theirs.weight, "bias": theirs.bias})
    site = Site("linear", "attention.query", 0, "map", module, 10, 6)
    delta = LoraDelta(site, [Lora(rank=4, alpha=8.0)], [torch.Generator()])
    with torch.no_grad():
        delta.A.copy_(theirs.lora_A.T)
        delta.B.copy_(theirs.lora_B.T)
    x, target = torch.randn(5, 10), torch.randn(5, 6)
    ours_optimizer = torch.optim.AdamW(delta.parameters(), lr=1e-2)
    optimizer = torch.optim.AdamW([theirs.lora_A, theirs.lora_B], lr=1e-2)
    for _ in range(20):
        outputs = delta.after(x[None], module(x)[None])[0]
        reference = theirs(x)
        torch.testing.assert_close(outputs, reference, rtol=1e-5, atol=1e-5)
        for value, one in ((outputs, ours_optimizer), (reference, optimizer)):
            one.zero_grad()
            (value - target).square().mean().backward()
        torch.testing.assert_close(delta.A.grad[0].T, theirs.lora_A.grad, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(delta.B.grad[0].T, theirs.lora_B.grad, rtol=1e-4, atol=1e-6)
        ours_optimizer.step()
        optimizer.step()
    merged, _ = delta.merged(module.weight, module.bias, 0)
    torch.testing.assert_close(merged, theirs.weight + theirs.scaling * theirs.lora_B @ theirs.lora_A)


def test_the_rates_of_lora_plus_are_peft_s():
    peft = pytest.importorskip("peft")
    from peft.optimizers import create_loraplus_optimizer

    ratio, rate = 8.0, 2e-4
    config = peft.LoraConfig(r=4, target_modules=["query", "value"])
    theirs = peft.get_peft_model(fresh("tiny-bert"), config)
    made = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=rate, loraplus_lr_ratio=ratio)
    rates = {id(p): group["lr"] for group in made.param_groups for p in group["params"]}
    wanted = {"A": set(), "B": set()}
    for name, p in theirs.named_parameters():
        if p.requires_grad:
            wanted["A" if "lora_A" in name else "B"].add(rates[id(p)])
    adapter = peftbench.attach(fresh("tiny-bert"), Lora(rank=4, b_rate_ratio=ratio))
    names = [n.rpartition(".")[2] for n, _ in adapter.named_parameters()]
    found = {"A": set(), "B": set()}
    for name, (ratio_of_run,) in zip(names, adapter.rate_ratios(), strict=True):
        found[name].add(rate * ratio_of_run)
    assert found == wanted == {"A": {rate}, "B": {rate * ratio}}


def test_the_ratio_reaches_the_step():
    """AdamW's first step has the size of its rate."""
    model = fresh("tiny-bert")
    adapter = peftbench.attach(model, [Lora(rank=2, b_rate_ratio=16.0), Lora(rank=2)], seeds=[1, 1])
    disturb(adapter)
    before = {n: p.clone() for n, p in adapter.named_parameters()}
    packed = adapter.packed_parameters()
    optimizer = PackedAdamW(packed, [], [Recipe(1e-3, schedule="constant")] * 2, 1, ratios=adapter.rate_ratios())
    hidden(model, batch(4)).pow(3).sum().backward()
    optimizer.step(torch.zeros(2))
    for name, p in adapter.named_parameters():
        sizes = (p - before[name]).abs().flatten(1).median(dim=1).values
        assert sizes.tolist() == pytest.approx([1.6e-2 if name.endswith("B") else 1e-3, 1e-3], rel=0.01)


def test_rslora_scales_by_the_root_of_the_rank():
    assert named_method("rslora", {"rank": 16, "alpha": 8.0}).scale == 2.0
    assert named_method("lora", {"rank": 16, "alpha": 8.0}).scale == 0.5


FOLDERS = [
    ({}, Lora),
    ({"init_lora_weights": "gaussian"}, Lora),
    ({"use_dora": True}, Dora),
    ({"init_lora_weights": "pissa"}, Pissa),
]
REFUSED = [
    ({"init_lora_weights": "olora"}, "no counterpart"),
    ({"init_lora_weights": "pissa_niter_4"}, "no counterpart"),
    ({"use_dora": True, "init_lora_weights": "pissa"}, "no counterpart"),
    ({"rank_pattern": {"query": 2}}, "rank_pattern"),
    ({"bias": "all"}, "bias='all'"),
    ({"lora_bias": True}, "lora_bias"),
    ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
    ({"use_dora": True, "use_rslora": True}, "use_rslora"),
]


def saved(folder, changes):
    """Save an adapter that the changed configuration would read, and put the changes in."""
    kind = next((cls for keys, cls in FOLDERS if keys and keys.items() <= changes.items()), Lora)
    adapter = peftbench.attach(fresh("tiny-bert"), kind(rank=2))
    adapter.save(folder, format="peft")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(("changes", "kind"), FOLDERS)
def test_a_folder_is_read_as_the_method_that_wrote_it(changes, kind, tmp_path):
    saved(tmp_path, changes)
    assert type(peftbench.load_adapter(fresh("tiny-bert"), tmp_path).methods[0]) is kind


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_a_folder_that_means_something_else_is_refused(changes, message, tmp_path):
    saved(tmp_path, changes)
    with pytest.raises(UserError, match=message):
        peftbench.load_adapter(fresh("tiny-bert"), tmp_path)
