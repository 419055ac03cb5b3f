"""AdamW over a pack: one flat tensor [R, N] holds all parameters; each run has its own rate, decay and clipping.

    m ← β₁ m + (1 − β₁) g,   v ← β₂ v + (1 − β₂) g²,   θ ← θ − η (m̂ / (√v̂ + ε) + λ θ)

Source: Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2. As is usual, vectors (biases, norms, scales) do not
decay. A run whose loss or gradient is no longer finite is frozen where it stands; its neighbours never notice.
The moments m and v are kept as `moments.Storage` says: in fp32 or in 8 bits, on the device or paged.

A step asks the host for nothing that changes from step to step: rates and bias corrections lie in a table on the
device, whose row a counter there picks. The same code runs eagerly and replayed from a CUDA graph (`engine.graphs`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftbench.engine.blockwise_adamw import BlockwiseAdamW
from peftbench.engine.moments import Storage
from peftbench.methods.base import StepEnd

ALIGNMENT = 64
"""Elements of which a multiple lies before every tensor in a common block: wide loads need it."""


@dataclass(frozen=True)
class Recipe:
    """One run's optimizer settings."""

    learning_rate: float
    weight_decay: float = 0.0
    clip_norm: float = 0.0
    schedule: str = "linear"
    warmup: float = 0.0
    factor: Callable[[int, int], float] | None = None
    """A method's own factor on the rate at (step from 0, steps)."""

    def rate(self, step: int, steps: int) -> float:
        """Return the learning rate at `step` (from 0) of `steps`."""
        own = 1.0 if self.factor is None else self.factor(step, steps)
        return self.learning_rate * rate_factor(step, steps, self.schedule, self.warmup) * own


def rate_factor(step: int, steps: int, schedule: str, warmup: float) -> float:
    """Return the factor on the learning rate at `step` (from 0) of `steps`, `warmup` being a fraction of them.

    Linear and cosine fall from 1 after the warm-up towards 0 at `steps`; constant stays at 1.
    """
    ramp = math.ceil(warmup * steps)
    if step < ramp:
        return (step + 1) / ramp
    progress = (step - ramp) / max(steps - ramp, 1)
    if schedule == "linear":
        return 1 - progress
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    assert schedule == "constant", schedule
    return 1.0


class PackedAdamW:
    """AdamW for parameters with a leading runs axis, plus (for a pack of one) parameters of the base itself.

    Packed parameters become views of one flat tensor, so a step is a handful of kernels however many parameters there
    are. The base's own parameters go through PyTorch's fused AdamW.
    """

    def __init__(
        self,
        packed: Sequence[nn.Parameter],
        plain: Sequence[nn.Parameter],
        recipes: Sequence[Recipe],
        steps: int,
        *,
        beta1: float = 0.9,
        beta2: float = 0.999,
        epsilon: float = 1e-8,
        ratios: Sequence[Sequence[float]] | None = None,
        keep_gradients: bool = False,
        base: torch.optim.Optimizer | None = None,
        storage: Storage | None = None,
    ) -> None:
        """Take the parameters over.

        Args:
            packed: parameters [R, ...]; they become views of `flat`.
            plain: parameters of the base itself, for a pack of one.
            recipes: one a run.
            steps: how many steps there will be.
            ratios: a factor on the learning rate for each packed parameter and run.
            keep_gradients: keep each step's clipped gradient for `end`.
            base: an optimizer for `plain` in place of AdamW.
            storage: how moments are kept; None: in fp32 on the device.

        Raises:
            UserError: memory cannot be paged where the parameters are.
        """
        if plain and len(recipes) > 1:
            raise ValueError("parameters without a runs axis need a pack of one")
        self.storage = storage or Storage()
        if base is not None and self.storage != Storage():
            raise ValueError(f"{self.storage}: an optimizer of the method's own keeps its moments its own way")
        self.packed, self.plain, self.runs = list(packed), list(plain), len(recipes)
        self.beta1, self.beta2, self.epsilon = beta1, beta2, epsilon
        device = (self.packed + self.plain)[0].device
        table = [[r.rate(step, steps) for r in recipes] for step in range(steps)]
        self.rates = table
        """Learning rate by step and run, on the host."""
        # Row t: every run's rate, then 1 − β₁ᵗ⁺¹ and 1 − β₂ᵗ⁺¹, computed in float64.
        rows = [[*rates, 1 - beta1**t, 1 - beta2**t] for t, rates in enumerate(table, start=1)]
        self._table = torch.tensor(rows, dtype=torch.float32, device=device)
        self._row = torch.zeros(1, dtype=torch.int64, device=device)
        self._clip = torch.tensor([r.clip_norm or math.inf for r in recipes], device=device)
        self.alive = torch.ones(self.runs, dtype=torch.bool, device=device)
        """Runs that have stayed finite so far [R]."""
        self.step_count = 0
        self._flatten(recipes, device, ratios)
        self._gradient = torch.zeros_like(self.flat) if keep_gradients else None
        """The last step's clipped gradient, at one address for good: a replayed step writes where the first one did."""
        self._fused = base
        if self.plain and base is None:
            recipe = recipes[0]
            groups = [
                {"params": [p for p in self.plain if p.dim() >= 2], "weight_decay": recipe.weight_decay},
                {"params": [p for p in self.plain if p.dim() < 2], "weight_decay": 0.0},
            ]
            self._fused = self._base_optimizer(
                [g for g in groups if g["params"]], recipe.learning_rate, (beta1, beta2), epsilon
            )

    def _base_optimizer(
        self, groups: list[dict[str, Any]], rate: float, betas: tuple[float, float], epsilon: float
    ) -> torch.optim.Optimizer:
        if self.storage.eight_bits:
            return BlockwiseAdamW(groups, self.storage, lr=rate, betas=betas, eps=epsilon)
        optimizer = torch.optim.AdamW(groups, lr=rate, betas=betas, eps=epsilon, fused=True)
        if self.storage.paged:
            # PyTorch makes a parameter's state only where there is none
            moments = zip(*(self._paged_like_plain() for _ in range(2)), strict=True)
            for p, (mean, square) in zip(self.plain, moments, strict=True):
                optimizer.state[p] = {"step": torch.zeros((), device=p.device), "exp_avg": mean, "exp_avg_sq": square}
        return optimizer

    def _paged_like_plain(self) -> list[Tensor]:
        """Return a paged tensor of zeros for each of the base's parameters, all in one block, each aligned."""
        (dtype,) = {p.dtype for p in self.plain}
        sizes = [-(-p.numel() // ALIGNMENT) * ALIGNMENT for p in self.plain]
        parts = self.storage.zeros((sum(sizes),), dtype, self.plain[0].device).split(sizes)
        return [part[: p.numel()].view(p.shape) for part, p in zip(parts, self.plain, strict=True)]

    @torch.no_grad()
    def _flatten(
        self, recipes: Sequence[Recipe], device: torch.device, ratios: Sequence[Sequence[float]] | None
    ) -> None:
        sizes = [p[0].numel() for p in self.packed]
        # 8-bit moments come in whole blocks: columns at the end belong to no parameter
        width = self.storage.width(sum(sizes))
        self.flat = torch.empty((self.runs, width), dtype=torch.float32, device=device)
        self.flat[:, sum(sizes) :] = 0
        self._padding = torch.zeros((self.runs, width - sum(sizes)), device=device)
        decays = torch.zeros_like(self.flat[:1])
        uneven = ratios is not None and any(r != 1 for row in ratios for r in row)
        self._ratios = torch.ones_like(self.flat) if uneven else None
        self._places: dict[int, tuple[int, int]] = {}
        start = 0
        for i, (p, size) in enumerate(zip(self.packed, sizes, strict=True)):
            part = self.flat[:, start : start + size]
            part.copy_(p.reshape(self.runs, size))
            p.data = part.view(p.shape)
            self._places[id(p)] = start, size
            if self._ratios is not None and ratios is not None:
                self._ratios[:, start : start + size] = torch.tensor(list(ratios[i]), device=device).unsqueeze(-1)
            decays[:, start : start + size] = float(p.dim() > 2)
            start += size
        self._moments = self.storage.moments(self.runs, width, device)
        rates = torch.tensor([r.weight_decay for r in recipes], device=device)
        self._decay = decays * rates.unsqueeze(-1) if any(r.weight_decay for r in recipes) else None

    def state_tensors(self) -> list[Tensor]:
        """Return the tensors kept between steps."""
        state = [self.flat, *self._moments.tensors(), self._table, self._row]
        state += [t for t in (self._ratios, self._decay, self._gradient) if t is not None]
        if self._fused is not None:
            state += [t for s in self._fused.state.values() for t in s.values() if isinstance(t, Tensor)]
        return state

    @torch.no_grad()
    def step(self, losses: Tensor) -> None:
        """Update every run whose `losses` [R] and gradients are finite, and clear the gradients."""
        assert self.step_count < len(self.rates), "more steps than the optimizer was made for"
        grad = self._flat_gradient()
        first, *others = (grad[:, columns].square().sum(dim=1) for columns in self._moments.chunks())
        squares = sum(others, start=first)
        plain_grads = [p.grad for p in self.plain if p.grad is not None]
        if plain_grads:
            squares = squares + torch.stack(torch._foreach_norm(plain_grads)).square().sum()
        norms = squares.sqrt()
        # x · 0 is 0 where x is finite, else NaN, which equals nothing
        self.alive &= norms * 0 == losses * 0
        shrink = (self._clip / (norms + 1e-6)).clamp(max=1.0)
        now = self._table.index_select(0, self._row)[0]
        self._update_packed(grad, shrink.unsqueeze(-1), now)
        if self._fused is not None:
            self._update_plain(plain_grads, shrink, now)
        for p in self.plain:
            p.grad = None
        self._row.add_(1)
        self.step_count += 1

    def _flat_gradient(self) -> Tensor:
        """Return all packed gradients as one tensor [R, N], and clear them."""
        if not self.packed:
            return self.flat
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.packed]
        grad = torch.cat([*(g.reshape(self.runs, -1) for g in parts), self._padding], dim=1)
        for p in self.packed:
            p.grad = None
        return grad

    @contextmanager
    def capturable(self) -> Iterator[None]:
        """Let PyTorch's own optimizer of the base be captured in a CUDA graph within the context."""
        groups = self._fused.param_groups if isinstance(self._fused, torch.optim.AdamW) else []
        for group in groups:
            group["capturable"] = True
        try:
            yield
        finally:
            for group in groups:
                group["capturable"] = False

    def end(self) -> StepEnd:
        """Return what a method sees of the step just made; needs `keep_gradients`."""
        assert self._gradient is not None, "gradients were not kept"
        return StepEnd(
            self.step_count,
            len(self.rates),
            lambda p: self._part(self._gradient, p),
            self._moments_of,
            self._set_moments,
            self.alive,
        )

    def _part(self, flat: Tensor | None, parameter: nn.Parameter) -> Tensor:
        assert flat is not None
        start, size = self._places[id(parameter)]
        return flat[:, start : start + size].reshape(parameter.shape)

    def _moments_of(self, parameter: nn.Parameter) -> tuple[Tensor, Tensor]:
        start, size = self._places[id(parameter)]
        columns = self._moments.around(start, start + size)
        first = start - columns.start
        mean, square = (m[:, first : first + size].reshape(parameter.shape) for m in self._moments.read(columns))
        return mean, square

    @torch.no_grad()
    def _set_moments(self, parameter: nn.Parameter, mean: Tensor, square: Tensor) -> None:
        start, size = self._places[id(parameter)]
        columns = self._moments.around(start, start + size)
        first = start - columns.start
        with self._moments.opened(columns) as moments:
            for kept, given in zip(moments, (mean, square), strict=True):
                kept[:, first : first + size] = given.reshape(self.runs, size)

    def _update_packed(self, grad: Tensor, shrink: Tensor, now: Tensor) -> None:
        if not self.packed:
            return
        rates, first, second = now[: self.runs].unsqueeze(-1), now[-2], now[-1]
        dead = self.alive.logical_not().unsqueeze(-1)
        grad.mul_(shrink).masked_fill_(dead, 0.0)
        if self._gradient is not None:
            self._gradient.copy_(grad)
        # In place, and by chunks: what a step needs beside the gradient is two copies of a chunk.
        for columns in self._moments.chunks():
            g, flat = grad[:, columns], self.flat[:, columns]
            with self._moments.opened(columns) as (mean, square):
                mean.lerp_(g, 1 - self.beta1)
                square.mul_(self.beta2).addcmul_(g, g, value=1 - self.beta2)
                root = (square / second).sqrt_().add_(self.epsilon)
                update = (mean / first).div_(root)
            if self._decay is not None:
                update.addcmul_(self._decay[:, columns], flat)
            if self._ratios is not None:
                update.mul_(self._ratios[:, columns])
            flat.sub_(update.mul_(rates).masked_fill_(dead, 0.0))

    def _update_plain(self, grads: list[Tensor], shrink: Tensor, now: Tensor) -> None:
        assert self._fused is not None
        torch._foreach_mul_(grads, shrink[0])
        for group in self._fused.param_groups:
            group["lr"] = now[0]
        if isinstance(self._fused, BlockwiseAdamW):
            self._fused.corrections = now[-2], now[-1]
        # The fused kernel skips its update where this flag is 1: a run no longer finite stays put without a host sync.
        self._fused.found_inf = 1.0 - self.alive[0].float()  # type: ignore[attr-defined]
        self._fused.step()
