"""Formulas of methods that add products of several factors to a weight (see `formulas.py` for their form).

Each builds the change entry by entry or with the textbook operator, unlike the method's own code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftbench.models.roles import Site

Own = dict[str, Tensor]
Adapted = tuple[Tensor, "Tensor | None"]


def loha(method: Any, site: Site, weight: Tensor, bias: Tensor | None, own: Own) -> Adapted:
    """Return W with the sum over pairs of ranks (k, l) of the outer product of b₁ₖ ∘ b₂ₗ and a₁ₖ ∘ a₂ₗ added."""
    change = torch.zeros_like(weight)
    for b1, a1 in zip(own["B1"].T, own["A1"], strict=True):
        for b2, a2 in zip(own["B2"].T, own["A2"], strict=True):
            change = change + torch.outer(b1 * b2, a1 * a2)
    return weight + method.alpha / method.rank * change, bias


def lokr(method: Any, site: Site, weight: Tensor, bias: Tensor | None, own: Own) -> Adapted:
    """Return W with the Kronecker product added."""
    left = own["W1"] if "W1" in own else own["B1"] @ own["A1"]
    right = own["W2"] if "W2" in own else own["B2"] @ own["A2"]
    return weight + method.alpha / method.rank * torch.kron(left, right), bias


PRODUCTS = {"loha": loha, "lokr": lokr}
