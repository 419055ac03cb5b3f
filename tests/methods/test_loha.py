"""LoHa's rank, its padding, and what HF PEFT cannot hold of it."""

from __future__ import annotations

import pytest
import torch

import peftbench
from peftbench.errors import UserError
from peftbench.methods.loha import Loha
from peftbench.verify import formulas
from peftbench.verify.products import PRODUCTS
from tests.conformance.conftest import batch, disturb, fresh


def test_the_change_is_the_product_of_the_products_and_exceeds_their_rank():
    adapter = peftbench.attach(fresh("tiny-bert"), Loha(rank=3, alpha=6.0))
    disturb(adapter)
    _, delta = adapter.deltas[0]
    weight = torch.zeros(32, 32)
    change, _ = delta.merged(weight, None, 0)
    s = delta.run_state(0)
    want = torch.stack([2 * (s["B1"][i] @ s["A1"]) * (s["B2"][i] @ s["A2"]) for i in range(32)])
    torch.testing.assert_close(change, want)
    assert torch.linalg.matrix_rank(change) == 9


def test_padding_of_unlike_ranks_stays_zero():
    model = fresh("tiny-bert")
    adapter = peftbench.attach(model, [Loha(rank=2), Loha(rank=5)])
    disturb(adapter)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        (model(**batch(4, step)).last_hidden_state - 1).square().sum().backward()
        optimizer.step()
    for _, delta in adapter.deltas:
        assert not delta.B1[0, :, 2:].any()
        assert not delta.A1[0, 2:].any()
        assert not delta.B2[0, :, 2:].any()
        assert not delta.A2[0, 2:].any()
        assert delta.A2[0, :2].any()


def test_peft_s_folder_is_refused_where_peft_has_no_such_layer(tmp_path):
    adapter = peftbench.attach(fresh("tiny-gpt2"), Loha(rank=2, targets=("attn.c_attn",)))
    with pytest.raises(UserError, match=r"nn\.Linear alone: h\.0\.attn\.c_attn is a Conv1D"):
        adapter.save(tmp_path, format="peft")


@pytest.mark.parametrize("family", ["tiny-gpt2", "tiny-neox"])
def test_where_peft_has_no_such_layer_the_formula_judges(monkeypatch, family):
    monkeypatch.setitem(formulas.FORMULAS, "loha", PRODUCTS["loha"])
    found = formulas.check("loha", family)
    assert found.passed, found
