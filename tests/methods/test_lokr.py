"""LoKr's split of a side, its structures, and the Kronecker product it never builds."""

from __future__ import annotations

import itertools

import pytest
import torch

import peftbench
from peftbench.errors import UserError
from peftbench.methods.lokr import Lokr, split
from peftbench.verify import formulas
from peftbench.verify.products import PRODUCTS
from tests.conformance.conftest import disturb, fresh


@pytest.mark.parametrize(
    ("size", "factor", "want"),
    [
        (256, -1, (16, 16)),
        (768, -1, (24, 32)),
        (128, -1, (8, 16)),
        (127, -1, (1, 127)),
        (128, 4, (4, 32)),
        (128, 64, (64, 2)),
        (128, 10, (8, 16)),
        (100, 7, (5, 20)),
    ],
)
def test_a_side_is_split_as_said(size, factor, want):
    assert split(size, factor) == want


def test_splits_are_those_of_hf_peft():
    factorization = pytest.importorskip("peft.tuners.lokr.layer").factorization
    for size, factor in itertools.product((1, 2, 6, 7, 30, 64, 96, 127, 384, 768, 1000, 3072), (-1, 1, 2, 3, 5, 8, 40)):
        assert split(size, factor) == factorization(size, factor), (size, factor)


@pytest.mark.parametrize("family", ["tiny-bert", "tiny-gpt2"])
@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"rank": 2}, {"W1", "B2", "A2"}),
        ({"rank": 8}, {"W1", "W2"}),
        ({"rank": 1, "decompose_both": True}, {"B1", "A1", "B2", "A2"}),
        ({"rank": 2, "factor": 2, "decompose_both": True}, {"W1", "B2", "A2"}),
        ({"rank": 4, "factor": 16, "decompose_both": True}, {"B1", "A1", "W2"}),
    ],
)
def test_every_structure_computes_the_kronecker_product(family, settings, names):
    adapter = peftbench.attach(fresh(family), Lokr(alpha=3.0, targets=("mlp.up", "mlp.down"), **settings), runs=2)
    disturb(adapter)
    for site, delta in adapter.deltas:
        assert set(delta.shapes) == names
        x, y = torch.randn(2, 7, site.in_features), torch.randn(2, 7, site.out_features)
        out = delta.after(x, y)
        for run in range(2):
            s = delta.run_state(run)
            left = s["W1"] if "W1" in s else s["B1"] @ s["A1"]
            right = s["W2"] if "W2" in s else s["B2"] @ s["A2"]
            change = torch.kron(left, right) * (3.0 / settings["rank"])
            assert change.shape == (site.out_features, site.in_features)
            torch.testing.assert_close(out[run], y[run] + x[run] @ change.T, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(delta.merged(torch.zeros_like(change), None, run)[0], change)


def test_a_factor_below_one_is_refused():
    with pytest.raises(UserError, match="factor=0: expected -1 or a whole number"):
        Lokr(factor=0)


@pytest.mark.parametrize("family", ["tiny-gpt2", "tiny-neox"])
def test_where_peft_has_no_such_layer_the_formula_judges(monkeypatch, family):
    monkeypatch.setitem(formulas.FORMULAS, "lokr", PRODUCTS["lokr"])
    found = formulas.check("lokr", family)
    assert found.passed, found
