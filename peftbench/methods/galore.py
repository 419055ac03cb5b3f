"""GaLore: full fine-tuning whose optimizer sees each matrix's gradient in a subspace of r dimensions.

    R = G Q,    N = Adam(R),    W ← W − η · scale · N Qᵀ,    Q: the r first right singular vectors of G

Source: Zhao et al. 2024, arXiv:2403.03507, algorithm 2. The shorter side of G is projected (a square one's right side,
as in the authors' code), Q is taken anew every `update_every` steps, and Adam's moments, which make up most of the
memory of full fine-tuning, have r entries where they had the length of that side. Matrices no larger than r and vectors
have plain AdamW. Singular vectors are eigenvectors of Gᵀ G in fp64: no G-sized factors and a small decomposition.

The optimizer is the method: `Method.base_optimizer` gives it, and with any other this is full fine-tuning.

Deviation: an SVD leaves the sign of a singular vector open, and Adam's first moment is carried over from one subspace
to the next in the order of the vectors. Each new vector has the sign that is closer to the one it replaces, where the
authors' code has whatever the library returned. The authors' scripts leave embeddings and the output layer to AdamW;
here every matrix is projected.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftbench.methods.base import Card, Method, Traits, base_parameters, require
from peftbench.models.roles import Site

CHUNK_ROWS = 4096
"""Rows of a gradient that are held in fp64 at a time."""


def leading_directions(gradient: Tensor, rank: int, before: Tensor | None = None) -> Tensor:
    """Return the first `rank` right singular vectors of a gradient [long, short] as columns [short, rank], fp32.

    Args:
        before: earlier vectors of the same shape, whose signs are kept as far as that makes sense.
    """
    gram = torch.zeros((gradient.shape[1],) * 2, dtype=torch.float64, device=gradient.device)
    for rows in gradient.split(CHUNK_ROWS):
        rows = rows.double()
        gram.addmm_(rows.T, rows)
    vectors = torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(1).float()
    if before is not None:
        vectors = vectors * torch.where((vectors * before).sum(dim=0) < 0, -1.0, 1.0)
    return vectors.contiguous()


class ProjectedAdamW(torch.optim.Optimizer):
    """AdamW whose moments of matrices live in a subspace.

    Attributes:
        found_inf: tensor of one element, 1 where this step must change no parameter; None: always 0. Gradients may then
            hold anything. A step waits for the device only when it takes new subspaces.
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        *,
        rank: int,
        update_every: int,
        scale: float,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        epsilon: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        projected = [p for p in parameters if p.dim() == 2 and min(p.shape) > rank]
        others = [p for p in parameters if p.dim() != 2 or min(p.shape) <= rank]
        groups: list[dict[str, Any]] = [
            {"params": projected, "rank": rank, "weight_decay": weight_decay},
            {"params": [p for p in others if p.dim() >= 2], "rank": None, "weight_decay": weight_decay},
            {"params": [p for p in others if p.dim() < 2], "rank": None, "weight_decay": 0.0},
        ]
        self.update_every, self.scale = update_every, scale
        super().__init__([g for g in groups if g["params"]], {"lr": lr, "betas": betas, "epsilon": epsilon})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the parameters that have a gradient."""
        assert closure is None, "gradients come from outside"
        for group in self.param_groups:
            rate = group["lr"] if self.found_inf is None else group["lr"] * (1 - self.found_inf)
            for p in group["params"]:
                if p.grad is None:
                    continue
                gradient = p.grad if self.found_inf is None else torch.where(self.found_inf > 0, 0.0, p.grad)
                update = self._direction(gradient.float(), self.state[p], group)
                if group["weight_decay"]:
                    update = update.add(p, alpha=group["weight_decay"])
                p.sub_((update * rate).to(p.dtype))

    def _direction(self, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """Return Adam's normalised step for a gradient, in its shape."""
        rank = group["rank"]
        if rank is None:
            return self._adam(gradient, state, group)
        wide = gradient.shape[0] < gradient.shape[1]
        gradient = gradient.T if wide else gradient
        if state.get("step", 0) % self.update_every == 0:
            state["basis"] = leading_directions(gradient, rank, state.get("basis"))
        basis = state["basis"]
        direction = self.scale * self._adam(gradient @ basis, state, group) @ basis.T
        return direction.T if wide else direction

    @staticmethod
    def _adam(gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        beta1, beta2 = group["betas"]
        if "step" not in state:
            state |= {"step": 0, "mean": torch.zeros_like(gradient), "square": torch.zeros_like(gradient)}
        state["step"] += 1
        mean = state["mean"].lerp_(gradient, 1 - beta1)
        square = state["square"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = (square / (1 - beta2 ** state["step"])).sqrt_().add_(group["epsilon"])
        return (mean / (1 - beta1 ** state["step"])).div_(root)


@dataclass(frozen=True)
class Galore(Method):
    """Every parameter of the base trains, matrices with low-rank optimizer state."""

    rank: int = 8
    update_every: int = 200
    scale: float = 4.0

    traits = Traits(
        sites=("weight",),
        mergeable=False,
        identity_at_init=True,
        packable=False,
        cost_free=frozenset({"scale"}),
        quantized_base=False,
    )
    card = Card(
        equation="W ← W − η · scale · Adam(G Q) Qᵀ, Q the first r right singular vectors of G",
        paper="Zhao et al. 2024, arXiv:2403.03507",
        parameters="all of the base's",
    )

    def __post_init__(self) -> None:
        require(self.rank >= 1, "rank", self.rank, "a whole number of at least 1")
        require(self.update_every >= 1, "update_every", self.update_every, "a whole number of at least 1")
        require(self.scale > 0, "scale", self.scale, "a number above 0")

    def sites(self, model: nn.Module) -> list[Site]:
        return []

    def trained_weights(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return base_parameters(model)

    def base_optimizer(
        self,
        parameters: Sequence[nn.Parameter],
        betas: tuple[float, float] = (0.9, 0.999),
        epsilon: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> ProjectedAdamW:
        return ProjectedAdamW(
            parameters,
            rank=self.rank,
            update_every=self.update_every,
            scale=self.scale,
            betas=betas,
            epsilon=epsilon,
            weight_decay=weight_decay,
        )

    def count(self, site: Site) -> int:
        return 0
