"""Formulas of methods that scale, turn or shard a frozen weight, on dense matrices (see `formulas.py` for their form).

Each is written the slow way of its paper, unlike the method's own code: every rotation, permutation and reflection is
a whole matrix, and every inverse is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from peftbench.models.roles import Site

Own = dict[str, Tensor]
Adapted = tuple[Tensor, "Tensor | None"]


def layernorm(method: Any, site: Site, weight: Tensor, bias: Tensor | None, own: Own) -> Adapted:
    """Return the trained parameters in place of the frozen ones."""
    return own.get("weight", weight), own.get("bias", bias)


def ssf(method: Any, site: Site, weight: Tensor, bias: Tensor | None, own: Own) -> Adapted:
    """Return diag(γ) W and γ ⊙ b + β; a norm's weight is a diagonal, and Gemma's is one less than the scale."""
    new = (
        torch.diag(own["scale"]) @ weight if weight.dim() == 2 else own["scale"] * (weight + site.offset) - site.offset
    )
    return new, None if bias is None else own["scale"] * bias + own["shift"]


def _matrix(size: int, places: list[tuple[int, int]], entries: Tensor) -> Tensor:
    """Return the square matrix that has `entries` at `places` and is zero elsewhere."""
    rows, columns = (torch.tensor(side) for side in zip(*places, strict=True))
    return torch.zeros(size, size).index_put((rows, columns), entries)


def _cayley(skew: Tensor) -> Tensor:
    eye = torch.eye(len(skew))
    return (eye - skew) @ torch.linalg.inv(eye + skew)


def oft(method: Any, site: Site, weight: Tensor, bias: Tensor | None, own: Own) -> Adapted:
    """Return W Rᵀ for R = diag(R_1, …, R_K) that multiplies rows from the right."""
    size = method.block_size
    places = [(i, j) for i in range(size) for j in range(i + 1, size)]
    blocks = []
    for entries in own["skew"]:
        upper = _matrix(size, places, entries)
        skew = upper - upper.T
        if method.neumann_terms:
            powers = [torch.linalg.matrix_power(skew, k) for k in range(method.neumann_terms - 1)]
            blocks.append((torch.eye(size) + skew) @ torch.stack(powers).sum(0))
        else:
            blocks.append(_cayley(skew))
    blocks = blocks * (site.in_features // size) if method.share else blocks
    return weight @ torch.block_diag(*blocks).T, bias


def boft(method: Any, site: Site, weight: Tensor, bias: Tensor | None, own: Own) -> Adapted:
    """Return diag(s) W Rᵀ, where R is the product of the factors, the last one first, each with its permutation."""
    half, width = method.block_size // 2, site.in_features
    product = torch.eye(width)
    for factor in reversed(range(method.factors)):
        apart = 2**factor
        order: list[int] = []
        for first in range(0, width // half, 2 * apart):
            for k in range(first, first + apart):
                order += [*range(k * half, (k + 1) * half), *range((k + apart) * half, (k + apart + 1) * half)]
        permutation = torch.eye(width)[:, order]
        blocks = torch.block_diag(*(_cayley((a - a.T) / 2) for a in own["blocks"][factor]))
        product = product @ permutation @ blocks @ permutation.T
    return torch.diag(own["scale"]) @ weight @ product.T, bias


def hra(method: Any, site: Site, weight: Tensor, bias: Tensor | None, own: Own) -> Adapted:
    """Return W times one reflection after another."""
    for u in own["directions"].T:
        weight = weight @ (torch.eye(len(u)) - 2 * torch.outer(u, u) / (u @ u))
    return weight, bias


def hra_gs(method: Any, site: Site, weight: Tensor, bias: Tensor | None, own: Own) -> Adapted:
    """Return W times one reflection after another, each in what its direction adds to those before."""
    taken: list[Tensor] = []
    for u in own["directions"].T:
        for other in taken:
            u = u - (other @ u) * other
        taken.append(u / u.norm())
        weight = weight @ (torch.eye(len(u)) - 2 * torch.outer(taken[-1], taken[-1]))
    return weight, bias


def miss(method: Any, site: Site, weight: Tensor, bias: Tensor | None, own: Own) -> Adapted:
    """Return W with row i mod r of D added to its column i."""
    columns = [weight[:, i] + own["D"][i % method.rank] for i in range(site.in_features)]
    return torch.stack(columns, dim=1), bias


def road(method: Any, site: Site, weight: Tensor, bias: Tensor | None, own: Own) -> Adapted:
    """Return R W and R b, with the two-by-two matrix of every pair of outputs written into R entry by entry."""
    width, group, angles = site.out_features, method.group_size, method.angles
    half = group // 2
    cosines, sines = (own["alpha"] * own["theta"].cos(), own["alpha"] * own["theta"].sin())
    # For each entry of ((a, b), (c, d)): where in its group its angle and its scale are kept.
    a, b, c, d = {1: (0, 0, 0, 0), 2: (0, 0, half, half), 4: (0, group, group + half, half)}[angles]
    places: list[tuple[int, int]] = []
    entries: list[Tensor] = []
    for first in range(0, width, group):
        for i in range(first, first + half):
            at = first // 2 * angles + i - first
            places += [(i, i), (i, i + half), (i + half, i), (i + half, i + half)]
            entries += [cosines[at + a], -sines[at + b], sines[at + c], cosines[at + d]]
    turn = _matrix(width, places, torch.stack(entries))
    return turn @ weight, None if bias is None else turn @ bias


DENSE: dict[str, Callable[[Any, Site, Tensor, Tensor | None, Own], Adapted]] = {
    "layernorm": layernorm,
    "ssf": ssf,
    "oft": oft,
    "oftv2": oft,
    "boft": boft,
    "hra": hra,
    "hra_gs": hra_gs,
    "miss": miss,
    "road": road,
}
