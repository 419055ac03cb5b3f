"""ReLoRA: LoRA that is folded into its weight and begun anew several times, so that the sum of updates has a high rank.

    y = W x + b + (alpha / r) · B A x;    at a restart:  W ← W + (alpha / r) · B A,  A drawn anew,  B ← 0

Source: Lialin et al. 2023, arXiv:2307.05695, algorithm 1 and section 3. `restarts` divide training into equal parts. At
each, A's and B's moments are set to zero but for the entries whose first moment is largest (`pruned` is the share that
goes; 1 resets the optimizer), and the learning rate falls to zero and climbs back to its schedule over `restart_warmup`
of a part: with a cosine schedule, the paper's jagged cosine. Factors are stored transposed, as in LoRA.

The rewritten weights belong to the run, which therefore has the base to itself and keeps it in fp32: an update smaller
than half a step of bf16 would vanish in the merge. They are saved with the adapter, beside the latest factors.

Deviation: the paper pre-trains, begins with full-rank training and restarts every few thousand steps; fine-tuning has a
trained W to begin with and fewer steps, so restarts are counted, and their warm-up is a share of the part. The authors'
code prunes either moment by its own size; a first moment that is left without its second then makes a step of any size.
"""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftbench.methods.base import (
    Card,
    Delta,
    Factors,
    LowRankDelta,
    Method,
    RunDropout,
    StepEnd,
    Targets,
    Traits,
    require,
    uniform,
)
from peftbench.models.roles import Site, linear_sites


class ReloraDelta(LowRankDelta):
    """scale · x A B beside the product with a weight that restarts rewrite; one run."""

    A: nn.Parameter
    B: nn.Parameter

    def __init__(self, site: Site, method: Relora, generator: torch.Generator) -> None:
        super().__init__(runs=1)
        self.generator = generator
        self.bound = site.in_features**-0.5
        self.scale = method.alpha / method.rank
        self.stack("A", [uniform((site.in_features, method.rank), self.bound, generator)])
        self.stack("B", [torch.zeros(method.rank, site.out_features)])
        self.dropout = RunDropout([method.dropout])

    def factors(self, dtype: torch.dtype) -> Factors:
        return Factors(self.A, self.B * self.scale)

    def merged(self, weight: Tensor, bias: Tensor | None, run: int) -> tuple[Tensor, Tensor | None]:
        change = (self.A[run] @ self.B[run]).T * self.scale
        return (weight.float() + change).to(weight.dtype), bias

    @torch.no_grad()
    def restart(self, site: Site) -> None:
        """Fold the factors into the site's weight and begin with new ones."""
        weight: Any = site.module.weight
        weight = weight.T if site.transposed else weight
        rows: Any = slice(None) if site.columns is None else site.columns
        rows = list(rows) if isinstance(rows, tuple) else rows
        weight[rows] = self.merged(weight[rows], None, 0)[0]
        self.A.copy_(uniform(self.A.shape, self.bound, self.generator))
        self.B.zero_()


@functools.cache
def restart_steps(restarts: int, steps: int) -> tuple[int, ...]:
    """Return after which of `steps` steps (counted from 1) the factors are folded in."""
    parts = restarts + 1
    return tuple(sorted({round(k * steps / parts) for k in range(1, parts)} - {0, steps}))


def pruned_moments(mean: Tensor, square: Tensor, pruned: float) -> tuple[Tensor, Tensor]:
    """Return both moments with the share `pruned` of their entries zero: those with the smallest first moment."""
    sizes = mean.abs().flatten()
    kept = sizes.topk(round((1 - pruned) * len(sizes))).indices
    mask = torch.zeros_like(sizes).scatter(0, kept, 1.0).view_as(mean)
    return mean * mask, square * mask


@dataclass(frozen=True)
class Relora(Method):
    """Low-rank updates, one after the other, each folded into the weight before the next."""

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: Targets = ("attention.query", "attention.value")
    restarts: int = 3
    restart_warmup: float = 0.1
    pruned: float = 0.99

    traits = Traits(
        sites=("linear", "weight"),
        mergeable=True,
        identity_at_init=True,
        packable=False,
        cost_free=frozenset({"alpha", "restarts", "restart_warmup", "pruned"}),
        quantized_base=False,
    )
    card = Card(
        equation="W ← W + (alpha / r) · B A at each restart, then LoRA anew",
        paper="Lialin et al. 2023, arXiv:2307.05695",
        parameters="r (D_in + D_out) a map",
    )

    def __post_init__(self) -> None:
        require(self.rank >= 1, "rank", self.rank, "a whole number of at least 1")
        require(self.alpha > 0, "alpha", self.alpha, "a number above 0")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "a number in [0, 1)")
        require(self.restarts >= 0, "restarts", self.restarts, "a whole number of at least 0")
        require(0 <= self.restart_warmup <= 1, "restart_warmup", self.restart_warmup, "a number in [0, 1]")
        require(0 <= self.pruned <= 1, "pruned", self.pruned, "a number in [0, 1]")

    def sites(self, model: nn.Module) -> list[Site]:
        return linear_sites(model, self.targets)

    def check_site(self, site: Site) -> None:
        limit = min(site.in_features, site.out_features)
        require(self.rank <= limit, "rank", self.rank, f"at most {limit}, the smaller side of {site.name}")

    def rewritten_weights(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return {f"{site.name}.weight": cast(nn.Parameter, site.module.weight) for site in self.sites(model)}

    def rate_factor(self, step: int, steps: int) -> float:
        begun = bisect.bisect_right(restart_steps(self.restarts, steps), step)
        warmup = math.ceil(self.restart_warmup * steps / (self.restarts + 1))
        if not begun or not warmup:
            return 1.0
        return min(1.0, (step - restart_steps(self.restarts, steps)[begun - 1]) / warmup)

    @classmethod
    def delta(cls, site: Site, methods: Sequence[Relora], generators: Sequence[torch.Generator]) -> ReloraDelta:
        return ReloraDelta(site, methods[0], generators[0])

    @classmethod
    def after_step(
        cls, methods: Sequence[Relora], deltas: Sequence[tuple[Site, Delta]], shared: Delta | None, end: StepEnd
    ) -> None:
        (method,), (step,), (steps,) = methods, end.step, end.steps
        if step not in restart_steps(method.restarts, steps):
            return
        for site, delta in deltas:
            assert isinstance(delta, ReloraDelta)
            delta.restart(site)
            for parameter in (delta.A, delta.B):
                end.set_moments(parameter, *pruned_moments(*end.moments(parameter), method.pruned))

    def count(self, site: Site) -> int:
        return self.rank * (site.in_features + site.out_features)
