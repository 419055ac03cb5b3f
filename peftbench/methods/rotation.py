"""What the orthogonal methods share: turning the input of a frozen map, block by block, by a learned rotation.

    y = W (R x) + b,    R orthogonal, so that W R keeps the lengths and angles between the rows of W

Rows are turned before they reach W, which never changes: x ← x R in row form, and a merged weight is W Rᵀ. A rotation
near the identity is kept as its change C = R - I, so that a base in half precision rounds the small change and not R.

Roles that share a matrix share its input. A method that turns inputs therefore adapts the whole module that holds a
role: on GPT-2, `attention.query` means all of `c_attn`, as it does for HF PEFT.

Shapes: runs R, rows N, width D, blocks K of width b.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftbench.errors import UserError
from peftbench.methods.base import Targets
from peftbench.methods.peft_format import SiteFormat, refuse, target_modules, targets
from peftbench.models.roles import Site, linear_sites


def whole_maps(model: nn.Module, wanted: Targets) -> list[Site]:
    """Return the linear sites that `wanted` names, with the whole module in place of a part of it, each once."""
    sites = linear_sites(model, wanted)
    if all(site.columns is None for site in sites):
        return sites
    names = list(dict.fromkeys(site.name for site in sites))
    return [site for site in linear_sites(model, names) if site.name in names]


def cayley_change(skew: Tensor) -> Tensor:
    """Return R - I for the rotation R = (I - Q)(I + Q)⁻¹ of skew-symmetric Q [..., b, b]."""
    eye = torch.eye(skew.shape[-1], device=skew.device, dtype=skew.dtype)
    # The checked form of solve waits for the device; I + Q of a skew Q always has an inverse.
    return torch.linalg.solve_ex(eye + skew, -2 * skew, left=False).result


def turned(x: Tensor, change: Tensor) -> Tensor:
    """Return x + x diag(C_1, …, C_K) for x [R, N, D] and change [R, K, b, b], or [R, 1, b, b] for all blocks."""
    change = change.to(x.dtype)
    size = change.shape[-1]
    if change.shape[1] == 1:
        rows = x.reshape(x.shape[0], -1, size)
        return torch.baddbmm(rows, rows, change[:, 0]).reshape(x.shape)
    blocks = x.unflatten(-1, (-1, size))
    return x + torch.einsum("rnki,rkij->rnkj", blocks, change).reshape(x.shape)


class RotationFormat(SiteFormat):
    """A rotation in PEFT's files; PEFT turns the inputs of `nn.Linear` alone."""

    def config(self, method: Any, model: nn.Module, sites: Sequence[Site]) -> dict[str, Any]:
        other = next((site for site in sites if site.transposed), None)
        if other is not None:
            raise UserError(
                f"{other.name} is a Conv1D, which PEFT's {self.peft_type} does not adapt: expected nn.Linear"
            )
        return {"target_modules": target_modules(model, sites), "bias": "none"}

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        refuse(config, bias="none")
        return {"targets": targets(config)}
