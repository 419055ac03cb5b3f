"""BitFit: train the bias terms of the base and nothing else.

    y = W x + b,    b trained, W frozen

Source: Ben Zaken, Ravfogel and Goldberg 2022, arXiv:2106.10199, section 3. `biases="all"` trains every bias of linear
maps and normalisations with a role; `biases="query_mlp"` only those of the query projection and of the first
feed-forward matrix (the paper's b_q and b_m2). Models without biases (Llama's family) are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from peftbench.errors import UserError
from peftbench.kernels.piecewise import Terms
from peftbench.methods.base import Card, Delta, LinearDelta, Method, NormDelta, Traits, materialize, require
from peftbench.models.roles import Site, find_sites


class BiasDelta(LinearDelta):
    """A bias of its own for each run, in place of the frozen one."""

    bias: nn.Parameter
    frozen: Tensor

    def __init__(self, site: Site, runs: int) -> None:
        super().__init__(runs)
        bias = materialize(cast(Tensor, site.module.bias))
        bias = bias if site.columns is None else bias[_index(site)]
        self.stack("bias", [bias] * runs)
        self.register_buffer("frozen", bias.clone(), persistent=False)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return y + (self.bias - self.frozen).to(y.dtype).unsqueeze(1)

    def linear_terms(self, dtype: torch.dtype) -> Terms:
        return Terms(shift=self.bias - self.frozen)

    def merged(self, weight: Tensor, bias: Tensor | None, run: int) -> tuple[Tensor, Tensor | None]:
        return weight, self.bias[run].to(weight.dtype)


def _index(site: Site) -> slice | list[int]:
    assert site.columns is not None
    return site.columns if isinstance(site.columns, slice) else list(site.columns)


@dataclass(frozen=True)
class BitFit(Method):
    """Only the base's bias terms train."""

    biases: str = "all"

    traits = Traits(sites=("linear", "norm"), mergeable=True, identity_at_init=True)
    card = Card(
        equation="y = W x + b, b trained",
        paper="Ben Zaken et al. 2022, arXiv:2106.10199",
        parameters="D_out a map with bias, D a norm with bias",
    )

    def __post_init__(self) -> None:
        require(self.biases in ("all", "query_mlp"), "biases", self.biases, "'all' or 'query_mlp'")

    def sites(self, model: nn.Module) -> list[Site]:
        found = find_sites(model, "linear")
        if self.biases == "query_mlp":
            found = [s for s in found if s.role in ("attention.query", "mlp.up")]
        else:
            found += find_sites(model, "norm")
        found = [s for s in found if getattr(s.module, "bias", None) is not None]
        if not found:
            raise UserError(f"method.biases={self.biases!r}: {type(model).__name__} has no bias terms to train")
        return found

    @classmethod
    def delta(cls, site: Site, methods: Sequence[BitFit], generators: Sequence[torch.Generator]) -> Delta:
        if site.kind == "norm":
            return NormDelta(site, len(methods), weight=False, bias=True)
        return BiasDelta(site, len(methods))

    def count(self, site: Site) -> int:
        return site.width if site.kind == "norm" else site.out_features
