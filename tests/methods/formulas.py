"""Runs the parity gate's formula check for a method, registered with the gate or not."""

from __future__ import annotations

import pytest

from peftbench.verify import Parity, formulas
from peftbench.verify.dense import DENSE


def parity(monkeypatch: pytest.MonkeyPatch, name: str, family: str) -> Parity:
    """Compare a method with its formula on dense weights: outputs, gradients, training, merged weights, counts."""
    monkeypatch.setitem(formulas.FORMULAS, name, DENSE[name])
    return formulas.check(name, family)
