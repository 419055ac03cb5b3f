"""VeRA's shared projections: one pair for all sites, from the seed alone, sliced where a site is narrower."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import peftbench
from peftbench.errors import UserError
from peftbench.methods.vera import Vera
from tests.conformance.conftest import batch, disturb, fresh, hidden

EVERYWHERE = Vera(rank=5, targets=("attention.query", "mlp.up", "mlp.down"))


def test_every_site_computes_the_paper_s_equation_with_its_slice():
    adapter = peftbench.attach(fresh("tiny-bert"), EVERYWHERE)
    disturb(adapter)
    assert adapter.shared.A.shape == (1, 5, 64)
    assert adapter.shared.B.shape == (1, 64, 5)
    shapes = set()
    for site, delta in adapter.deltas:
        x = torch.randn(1, 7, site.in_features)
        a, b = adapter.shared.A[0, :, : site.in_features], adapter.shared.B[0, : site.out_features]
        state = delta.run_state(0)
        want = torch.stack([torch.diag(state["b"]) @ b @ torch.diag(state["d"]) @ a @ row for row in x[0]])
        torch.testing.assert_close(delta.after(x, torch.zeros(1, 7, site.out_features))[0], want, rtol=1e-4, atol=1e-5)
        shapes.add((site.in_features, site.out_features))
    assert shapes == {(32, 32), (32, 64), (64, 32)}


def test_projections_follow_from_the_seed_and_keep_their_size():
    wide = Vera(rank=64)
    one, two = (peftbench.attach(fresh("tiny-bert"), [wide, wide], seeds=[3, s]) for s in (4, 5))
    assert torch.equal(one.shared.A[0], two.shared.A[0])
    assert not torch.equal(one.shared.A[1], two.shared.A[1])
    assert one.shared.A.var() == pytest.approx(2 / 32, rel=0.1)
    assert one.shared.B.var() == pytest.approx(2 / 64, rel=0.1)


def test_only_the_scales_train_and_are_saved(tmp_path):
    adapter = peftbench.attach(fresh("tiny-bert"), EVERYWHERE, seeds=[9])
    disturb(adapter)
    want = hidden(adapter.model, batch(2))
    file = adapter.save(tmp_path)
    assert {name.rpartition(".")[2] for name in load_file(file)} == {"b", "d"}
    adapter.detach()
    peftbench.load_adapter(adapter.model, tmp_path)
    assert torch.equal(hidden(adapter.model, batch(2)), want)


def test_a_peft_folder_without_its_projections_is_refused(tmp_path):
    adapter = peftbench.attach(fresh("tiny-bert"), Vera(rank=3))
    file = adapter.save(tmp_path, format="peft")
    tensors = load_file(file)
    assert {"base_model.vera_A", "base_model.vera_B"} < set(tensors)
    adapter.detach()
    save_file({k: v for k, v in tensors.items() if "lambda" in k}, file)
    with pytest.raises(UserError, match=r"base_model\.vera_A"):
        peftbench.load_adapter(adapter.model, tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "save_projection": False}))
    with pytest.raises(UserError, match="save_projection"):
        peftbench.load_adapter(adapter.model, tmp_path)


def test_settings_that_would_never_train_are_refused():
    with pytest.raises(UserError, match="d_init=0"):
        Vera(d_init=0.0)
