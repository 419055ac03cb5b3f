"""AdamW over a pack: one flat tensor [R, N] holds all parameters; each run has its own rate, decay and clipping.

    m ← β₁ m + (1 − β₁) g,   v ← β₂ v + (1 − β₂) g²,   θ ← θ − η (m̂ / (√v̂ + ε) + λ θ)

Source: Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2. As is usual, vectors (biases, norms, scales) do not
decay. A run whose loss or gradient is no longer finite is frozen where it stands; its neighbours never notice.
The moments m and v are kept as `moments.Storage` says: in fp32 or in 8 bits, on the device or paged.

A step asks the host for nothing that changes from step to step: rates and bias corrections lie in a table on the
device, whose row a counter there picks. The same code runs eagerly and replayed from a CUDA graph (`engine.graphs`).
Every run has steps of its own, so that runs of unlike length, some of them begun earlier, train side by side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftbench.engine.blockwise_adamw import BlockwiseAdamW
from peftbench.engine.moments import Storage
from peftbench.kernels import adamw
from peftbench.kernels.backend import kernel_shapes, use_triton
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
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8

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


def same_place(view: Tensor, whole: Tensor, other: Tensor) -> Tensor:
    """Return the part of `other`, which is laid out as `whole`, that lies where `view` lies in `whole`."""
    assert view.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr(), "no view of it"
    assert (other.shape, other.stride()) == (whole.shape, whole.stride()), "laid out otherwise"
    start = view.storage_offset() - whole.storage_offset() + other.storage_offset()
    return other.as_strided(view.shape, view.stride(), start)


@dataclass(frozen=True)
class RunMoments:
    """One run's moments on the host: as they are kept, and by the name of the parameter in fp32.

    `layout` is the width of a row and each parameter's shape, strides and place there: where it is the same again,
    moments come back as they were to the last bit, 8-bit ones too.
    """

    layout: tuple[object, ...]
    rows: list[Tensor]
    named: dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Place:
    """Where a parameter lies in the flat tensor."""

    rows: slice
    columns: slice


@dataclass(frozen=True)
class Blocks:
    """Packed parameters as they lie: those of some runs, in one row of them after the other, then those of all runs."""

    partial: list[tuple[int, list[nn.Parameter]]]
    """How many runs, and their parameters from left to right."""
    whole: list[nn.Parameter]


def _blocks(packed: Sequence[nn.Parameter], spans: Sequence[tuple[int, int]], runs: int) -> Blocks:
    partial: dict[tuple[int, int], list[nn.Parameter]] = {}
    whole: list[nn.Parameter] = []
    for p, span in zip(packed, spans, strict=True):
        if span == (0, runs):
            whole.append(p)
        else:
            assert not whole, "parameters of all runs come last"
            partial.setdefault(span, []).append(p)
    if not partial:
        return Blocks([], whole)
    # runs without any parameter of their own have a block too, so that blocks stack to all runs
    found: list[tuple[int, list[nn.Parameter]]] = []
    at = 0
    for (first, last), block in sorted(partial.items()):
        assert first >= at, "a run belongs to one block"
        found += [(first - at, [])] * (first > at) + [(last - first, block)]
        at = last
    return Blocks(found + [(runs - at, [])] * (at < runs), whole)


def _gradients(block: Sequence[nn.Parameter], runs: int) -> list[Tensor]:
    """Return the gradients of a block's parameters, each [runs, columns]."""
    return [p.new_zeros((runs, p[0].numel())) if p.grad is None else p.grad.reshape(runs, -1) for p in block]


def _shared(values: Sequence[float], device: torch.device) -> float | Tensor:
    """Return the number that all runs have, or one a run [R, 1]."""
    return values[0] if len(set(values)) == 1 else torch.tensor(values, dtype=torch.float32, device=device)[:, None]


def _line(rates: Sequence[float], first: Sequence[float], second: Sequence[float]) -> list[float]:
    """Return what a step needs to know: rates, corrections, and the two as an update takes them."""
    scaled = [rate / correction for rate, correction in zip(rates, first, strict=True)]
    return [*rates, *first, *second, *scaled, *(correction**-0.5 for correction in second)]


class PackedAdamW:
    """AdamW for parameters with a leading runs axis, plus (for a pack of one) parameters of the base itself.

    Packed parameters become views of one flat tensor, so a step is a handful of kernels however many parameters there
    are, and on a GPU with Triton two (`kernels.adamw`). The base's own parameters go through PyTorch's fused AdamW.
    """

    def __init__(
        self,
        packed: Sequence[nn.Parameter],
        plain: Sequence[nn.Parameter],
        recipes: Sequence[Recipe],
        steps: int | Sequence[int],
        *,
        done: Sequence[int] | None = None,
        length: int | None = None,
        ratios: Sequence[Sequence[float]] | None = None,
        keep_gradients: bool = False,
        base: torch.optim.Optimizer | None = None,
        storage: Storage | None = None,
        rows: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        """Take the parameters over.

        Args:
            packed: parameters [R, ...], or [k, ...] where `rows` says so; they become views of `flat`.
            plain: parameters of the base itself, for a pack of one.
            recipes: one a run.
            steps: how many steps each run has in all.
            done: how many of them it has made before; None: none.
            length: how many steps there will be at most; None: until the first run ends.
            ratios: a factor on the learning rate for each packed parameter and run.
            keep_gradients: keep each step's clipped gradient for `end`.
            base: an optimizer for `plain` in place of AdamW.
            storage: how moments are kept; None: in fp32 on the device.
            rows: the runs that each packed parameter belongs to, (first, after the last); those of all runs come last.

        Raises:
            UserError: memory cannot be paged where the parameters are.
        """
        if plain and len(recipes) > 1:
            raise ValueError("parameters without a runs axis need a pack of one")
        self.storage = storage or Storage()
        if base is not None and self.storage != Storage():
            raise ValueError(f"{self.storage}: an optimizer of the method's own keeps its moments its own way")
        self.packed, self.plain, self.runs = list(packed), list(plain), len(recipes)
        device = (self.packed + self.plain)[0].device
        self.steps = tuple([steps] * self.runs if isinstance(steps, int) else steps)
        """Steps in all, by run."""
        self.done = tuple([0] * self.runs if done is None else done)
        """Steps made before, by run."""
        left = min(n - d for n, d in zip(self.steps, self.done, strict=True))
        length = left if length is None else length
        assert 0 < length <= left, (length, self.steps, self.done)
        own = list(zip(recipes, self.done, self.steps, strict=True))
        self.rates = [[r.rate(before + step, total) for r, before, total in own] for step in range(length)]
        """Learning rate by step and run, on the host."""
        # Row t: every run's rate η, 1 − β₁ᵗ⁺¹ and 1 − β₂ᵗ⁺¹ by its own t, then η / (1 − β₁ᵗ⁺¹) and 1 / √(1 − β₂ᵗ⁺¹):
        # on the device, each quotient would be a kernel of its own. Computed in float64.
        numbers = [[before + step for before in self.done] for step in range(1, length + 1)]
        betas = [[r.beta1 for r in recipes], [r.beta2 for r in recipes]]
        corrections = [[[1 - b**t for b, t in zip(own, row, strict=True)] for own in betas] for row in numbers]
        lines = [_line(rates, first, second) for rates, (first, second) in zip(self.rates, corrections, strict=True)]
        self._table = torch.tensor(lines, dtype=torch.float32, device=device)
        self._row = torch.zeros(1, dtype=torch.int64, device=device)
        self._beta2 = _shared(betas[1], device)
        # 1 − β from float64: of a β in fp32 it would lose five digits
        self._new1, self._new2 = (_shared([1 - b for b in values], device) for values in betas)
        self._epsilon = _shared([r.epsilon for r in recipes], device)
        self._clip = torch.tensor([r.clip_norm or math.inf for r in recipes], device=device)
        self.alive = torch.ones(self.runs, dtype=torch.bool, device=device)
        """Runs that have stayed finite so far [R]."""
        self.step_count = 0
        self._flatten(recipes, device, ratios, rows)
        self._gradient = torch.zeros_like(self.flat) if keep_gradients else None
        """The last step's clipped gradient, at one address for good: a replayed step writes where the first one did."""
        fixed = [(1 - r.beta1, r.beta2, 1 - r.beta2, r.epsilon) for r in recipes]
        self._fixed = adamw.Fixed(
            torch.tensor(fixed, dtype=torch.float32, device=device).T.contiguous(),
            self._clip, self._table, self._row, self._decay, self._ratios, self._gradient,
        )  # fmt: skip
        self._fused = base
        if self.plain and base is None:
            recipe = recipes[0]
            groups = [
                {"params": [p for p in self.plain if p.dim() >= 2], "weight_decay": recipe.weight_decay},
                {"params": [p for p in self.plain if p.dim() < 2], "weight_decay": 0.0},
            ]
            self._fused = self._base_optimizer(
                [g for g in groups if g["params"]], recipe.learning_rate, (recipe.beta1, recipe.beta2), recipe.epsilon
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
        self,
        recipes: Sequence[Recipe],
        device: torch.device,
        ratios: Sequence[Sequence[float]] | None,
        rows: Sequence[tuple[int, int]] | None,
    ) -> None:
        spans = [(0, self.runs)] * len(self.packed) if rows is None else list(rows)
        ends = [0] * self.runs
        self._places: dict[int, Place] = {}
        for p, (first, last) in zip(self.packed, spans, strict=True):
            start = max(ends[first:last])
            ends[first:last] = [start + p[0].numel()] * (last - first)
            self._places[id(p)] = Place(slice(first, last), slice(start, start + p[0].numel()))
        # 8-bit moments come in whole blocks: columns at the end belong to no parameter
        used = max(ends, default=0)
        width = self.storage.width(used)
        self._blocks = _blocks(self.packed, spans, self.runs)
        self.flat = torch.zeros((self.runs, width), dtype=torch.float32, device=device)
        self._padding = torch.zeros((self.runs, width - used), device=device)
        even = all(span == (0, self.runs) for span in spans)
        decays = torch.zeros_like(self.flat[:1] if even else self.flat)
        uneven = ratios is not None and any(r != 1 for row in ratios for r in row)
        self._ratios = torch.ones_like(self.flat) if uneven else None
        for i, p in enumerate(self.packed):
            place = self._places[id(p)]
            part = self.flat[place.rows, place.columns]
            part.copy_(p.reshape(part.shape))
            p.data = part.view(p.shape)
            if self._ratios is not None and ratios is not None:
                own = torch.tensor(list(ratios[i]), device=device).unsqueeze(-1)
                self._ratios[place.rows, place.columns] = own
            decays[slice(None) if even else place.rows, place.columns] = float(p.dim() > 2)
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
        self._apply(losses)
        self._row.add_(1)
        self.step_count += 1

    @torch.no_grad()
    def rehearse(self, losses: Tensor) -> None:
        """Ask for the kernels that a step launches, where nothing is launched, and clear the gradients."""
        if self._in_kernels:
            self._apply(losses)
        for p in (*self.packed, *self.plain):
            p.grad = None

    @property
    def _in_kernels(self) -> bool:
        """Whether the whole update is Triton's."""
        return bool(self.packed) and not self.plain and use_triton(self.flat)

    def _apply(self, losses: Tensor) -> None:
        """Update every run whose losses and gradients are finite, and clear the gradients."""
        grad = self._flat_gradient()
        norms, *others = (torch.linalg.vector_norm(grad[:, columns], dim=1) for columns in self._moments.chunks())
        plain_grads = [p.grad for p in self.plain if p.grad is not None]
        if plain_grads:
            others.append(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(plain_grads)), keepdim=True))
        if others:
            norms = torch.linalg.vector_norm(torch.stack([norms, *others]), dim=0)
        if self._in_kernels:
            adamw.step(grad, norms, losses.float(), self.alive, self.flat, self._moments.tensors(), self._fixed)
        elif self.plain or not kernel_shapes(self.flat):  # the kernels allocate next to nothing
            self._update(grad, norms, losses, plain_grads)
        for p in self.plain:
            p.grad = None

    def _update(self, grad: Tensor, norms: Tensor, losses: Tensor, plain_grads: list[Tensor]) -> None:
        """Freeze runs that are no longer finite and update the others, in plain PyTorch."""
        # x · 0 is 0 where x is finite, else NaN, which equals nothing
        self.alive &= norms * 0 == losses * 0
        shrink = (self._clip / (norms + 1e-6)).clamp(max=1.0)
        now = self._table.index_select(0, self._row)[0]
        self._update_packed(grad, shrink.unsqueeze(-1), now)
        if self._fused is not None:
            self._update_plain(plain_grads, shrink, now)

    def _flat_gradient(self) -> Tensor:
        """Return all packed gradients as one tensor [R, N], and clear them."""
        if not self.packed:
            return self.flat
        parts = _gradients(self._blocks.whole, self.runs)
        if self._blocks.partial:
            blocks = [
                torch.cat([self._padding[:count, :0], *_gradients(block, count)], dim=1)
                for count, block in self._blocks.partial
            ]
            widest = max(block.shape[1] for block in blocks)
            parts.insert(0, torch.cat([nn.functional.pad(b, (0, widest - b.shape[1])) for b in blocks]))
        grad = torch.cat([*parts, self._padding], dim=1)
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
            [before + self.step_count for before in self.done],
            self.steps,
            lambda p: self._part(self._gradient, p),
            self._moments_of,
            self._set_moments,
            self.alive,
        )

    def _part(self, flat: Tensor | None, parameter: nn.Parameter) -> Tensor:
        assert flat is not None
        place = self._places[id(parameter)]
        return flat[place.rows, place.columns].reshape(parameter.shape)

    def _moments_of(self, parameter: nn.Parameter) -> tuple[Tensor, Tensor]:
        place = self._places[id(parameter)]
        columns, own = self._around(place)
        mean, square = (m[place.rows, own].reshape(parameter.shape) for m in self._moments.read(columns))
        return mean, square

    @torch.no_grad()
    def _set_moments(self, parameter: nn.Parameter, mean: Tensor, square: Tensor) -> None:
        place = self._places[id(parameter)]
        columns, own = self._around(place)
        with self._moments.opened(columns) as moments:
            for kept, given in zip(moments, (mean, square), strict=True):
                kept[place.rows, own] = given.reshape(len(kept[place.rows]), -1)

    def _around(self, place: Place) -> tuple[slice, slice]:
        """Return the moments' columns that can be read and hold the place's, and where in them these are."""
        columns = self._moments.around(place.columns.start, place.columns.stop)
        return columns, slice(place.columns.start - columns.start, place.columns.stop - columns.start)

    def _layout(self, run: int, views: Mapping[str, Tensor]) -> tuple[object, ...]:
        begin = self.flat[run].storage_offset()
        places = ((name, tuple(v.shape), v.stride(), v.storage_offset() - begin) for name, v in views.items())
        return self.flat.shape[1], *places

    @torch.no_grad()
    def moments_of_run(self, run: int, views: Mapping[str, Tensor]) -> RunMoments:
        """Return the moments of one run, whose parameters are `views` of `flat`."""
        whole = self._moments.read(slice(0, self.flat.shape[1]))
        mean, square = (
            {name: same_place(v, self.flat, m).to("cpu", copy=True) for name, v in views.items()} for m in whole
        )
        rows = [row.to("cpu", copy=True) for row in self._moments.rows(run)]
        return RunMoments(self._layout(run, views), rows, {name: (mean[name], square[name]) for name in views})

    @torch.no_grad()
    def resume(self, runs: Mapping[int, tuple[Mapping[str, Tensor], RunMoments]]) -> None:
        """Put runs' moments in, given their parameters as views of `flat`; before the first step."""
        same = {run for run, (views, state) in runs.items() if state.layout == self._layout(run, views)}
        if len(same) < len(runs):
            with self._moments.opened(slice(0, self.flat.shape[1])) as moments:
                for run in runs.keys() - same:
                    views, state = runs[run]
                    for name, view in views.items():
                        for whole, kept in zip(moments, state.named[name], strict=True):
                            same_place(view, self.flat, whole).copy_(kept)
        for run in same:
            for row, kept in zip(self._moments.rows(run), runs[run][1].rows, strict=True):
                row.copy_(kept)

    def _update_packed(self, grad: Tensor, shrink: Tensor, now: Tensor) -> None:
        if not self.packed:
            return
        dead = self.alive.logical_not().unsqueeze(-1)
        rates, _, _, scaled, roots = now.view(5, self.runs, 1).unbind()
        scaled = scaled.masked_fill(dead, 0.0)
        grad.mul_(shrink).masked_fill_(dead, 0.0)
        if self._gradient is not None:
            self._gradient.copy_(grad)
        # In place, and by chunks: what a step needs beside the gradient is two or three copies of a chunk.
        for columns in self._moments.chunks():
            g, flat = grad[:, columns], self.flat[:, columns]
            with self._moments.opened(columns) as (mean, square):
                mean.lerp_(g, self._new1)
                square.mul_(self._beta2)
                if isinstance(self._new2, float):
                    square.addcmul_(g, g, value=self._new2)
                else:
                    square.addcmul_(g, g * self._new2)
                root = torch.sqrt(square).mul_(roots).add_(self._epsilon)
                update = mean * scaled
            if self._ratios is not None:
                update.mul_(self._ratios[:, columns])
            if self._decay is not None:
                decay = self._decay[:, columns] * rates.masked_fill(dead, 0.0)
                if self._ratios is not None:
                    decay.mul_(self._ratios[:, columns])
                flat.addcmul_(decay, flat, value=-1)
            flat.addcdiv_(update, root, value=-1)

    def _update_plain(self, grads: list[Tensor], shrink: Tensor, now: Tensor) -> None:
        assert self._fused is not None
        torch._foreach_mul_(grads, shrink[0])
        for group in self._fused.param_groups:
            group["lr"] = now[0]
        if isinstance(self._fused, BlockwiseAdamW):
            self._fused.corrections = now[1], now[2]
        # The fused kernel skips its update where this flag is 1: a run no longer finite stays put without a host sync.
        self._fused.found_inf = 1.0 - self.alive[0].float()  # type: ignore[attr-defined]
        self._fused.step()
