"""Runs the parity gate's formula check for a method, registered with the gate or not, on models that hide nothing."""

from __future__ import annotations

from typing import TypeVar

import pytest
import torch

from peftbench.verify import Parity, bench, formulas
from peftbench.verify.dense import DENSE

M = TypeVar("M", bound=torch.nn.Module)


@torch.no_grad()
def stirred(model: M) -> M:
    """Return the model with noise on its biases and norms, which start at zero and one and would hide mistakes."""
    generator = torch.Generator().manual_seed(11)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def parity(monkeypatch: pytest.MonkeyPatch, name: str, family: str) -> Parity:
    """Compare a method with its formula on dense weights: outputs, gradients, training, merged weights, counts."""
    fresh = bench.fresh
    for module in (bench, formulas):
        monkeypatch.setattr(module, "fresh", lambda *args, **kwargs: stirred(fresh(*args, **kwargs)))
    monkeypatch.setitem(formulas.FORMULAS, name, DENSE[name])
    return formulas.check(name, family)
