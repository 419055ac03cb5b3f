"""Injection refuses what it cannot do, and leaves the model alone then."""

import pytest
import torch

import peftbench
from peftbench.errors import UserError
from peftbench.methods.ia3 import IA3
from tests.conformance.conftest import batch, fresh, hidden


def test_an_input_that_other_roles_share_is_not_changed(monkeypatch):
    monkeypatch.setattr(IA3, "check_site", lambda self, site: None)  # it refuses by itself, before anything is built
    model = fresh("tiny-gpt2")
    before = hidden(model, batch(3))
    with pytest.raises(UserError, match=r"h\.0\.attn\.c_attn: its input serves other roles too: name the module in"):
        peftbench.attach(model, IA3(targets=(), feedforward=("attention.query",)))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(hidden(model, batch(3)), before)
    peftbench.attach(model, IA3(targets=(), feedforward=("attn.c_attn",)))


@pytest.mark.parametrize("method", ["oft", "boft", "hra"])
def test_methods_that_change_the_input_take_the_whole_matrix(method):
    adapter = peftbench.attach(fresh("tiny-gpt2"), method, targets=("attention.query",))
    assert all(site.columns is None for site, _ in adapter.deltas)
