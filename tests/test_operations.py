"""How many operations LoRA's passes make per decoder layer: a small model's time is their number."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

PEERS = Path(__file__).resolve().parent.parent / "experiments" / "peers"
MOST = 150


@pytest.fixture
def operations(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script."""
    if not PEERS.is_dir():
        pytest.skip("no experiments folder beside the tests")
    monkeypatch.syspath_prepend(str(PEERS))
    return importlib.import_module("operations")


def test_views_do_not_count(operations: Any) -> None:
    x, w = torch.ones(4, 6), torch.ones(6, 2)
    with operations.Counts() as counts:
        y = x.view(2, 2, 6).transpose(0, 1).detach()[0].expand(2, 6).to(torch.float32)
        y = y @ w
        y.add_(1)
        y.unsqueeze(0).reshape(-1)
    assert counts.names == {"aten.mm.default": 1, "aten.add_.Tensor": 1}


def test_what_does_not_alias_counts(operations: Any) -> None:
    x = torch.ones(4, 6)
    with operations.Counts() as counts:
        x.t().contiguous()
        x.to(torch.bfloat16)
        torch.stack([x, x])
    assert sorted(counts.names) == ["aten._to_copy.default", "aten.clone.default", "aten.stack.default"]


def test_lora_makes_few_operations(operations: Any) -> None:
    assert sum(operations.per_layer(operations.ours, torch.bfloat16).values()) <= MOST


def test_fewer_than_peft(operations: Any) -> None:
    pytest.importorskip("peft")
    ours, theirs = (operations.per_layer(adapt, torch.bfloat16) for adapt in (operations.ours, operations.hf_peft))
    assert sum(ours.values()) < sum(theirs.values())
