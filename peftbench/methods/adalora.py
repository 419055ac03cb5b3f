"""AdaLoRA: low-rank updates in the form of a singular value decomposition, whose ranks move to where they matter.

    W' = W + (alpha / r₀) · P Λ Q,    P: D_out×r₀ and Q: r₀×D_in random, Λ: r₀ singular values, zero

Source: Zhang et al. 2023, arXiv:2303.10512, eq. 3. Every matrix starts with r₀ (`init_rank`) triplets of a singular
value and its two vectors; a global budget falls to `target_rank` a matrix on average, and after each allocation the
singular values of the least important triplets are zero (eq. 5 and 6; their vectors stay, so they may come back). The
importance of a triplet is s(λ) plus the mean of s over each of its vectors (eq. 7), where s is the product of
sensitivity |w ∇w|, smoothed over steps by β₁, and its smoothed uncertainty, by β₂ (eq. 8 to 11). P and Q are kept
near orthogonal by a term of the loss (eq. 4). The budget is all triplets for the warm-up, falls cubically and stays at
its target for the final phase (eq. 12), during which the pruned triplets stay pruned. Runs of a pack allocate
independently, with budgets of their own. Here Q is stored as A [D_in, r], Λ as E [r] and P as B [r, D_out].

Warm-up and final phase are fractions of a run's steps, unlike in the paper, so that one setting means the same for runs
of any length; they are rounded down. Steps count from 1.

Deviation: as in the authors' code (and HF PEFT's) and not as in the paper, the orthogonality term is the plain
Frobenius norm, averaged over matrices (the paper sums squares); sensitivity pairs a step's gradient with the weight
after that step; the cubic runs from t_i to T - t_f (as printed, eq. 12 would exceed the initial budget at first); the
update is scaled by alpha / (r₀ + 1e-5). Where both ranks are equal nothing is pruned (HF PEFT fails).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
    normal,
    require,
    unpadded,
)
from peftbench.methods.peft_format import SiteFormat, fan_in_fan_out, refuse, target_modules, targets, transposed
from peftbench.models.roles import Site, linear_sites

INIT_STD = 0.02
GROWTH = 1.5
"""Initial rank over target rank where only the latter is given (section 4)."""
PLANNED_STEPS = 10_000
"""PEFT's files count the phases in steps; without a run's length the fractions are written for this one."""


class AdaLoraDelta(LowRankDelta):
    """scale · x A diag(E) B beside the frozen product."""

    A: nn.Parameter
    E: nn.Parameter
    B: nn.Parameter
    scale: Tensor
    ones: Tensor
    weight: Tensor

    def __init__(
        self, site: Site, methods: Sequence[AdaLora], generators: Sequence[torch.Generator], matrices: int
    ) -> None:
        """`matrices` is how many matrices share the orthogonality term."""
        super().__init__(len(methods))
        pairs = list(zip(methods, generators, strict=True))
        self.stack("A", [normal((site.in_features, m.first_rank), INIT_STD, g) for m, g in pairs])
        self.stack("E", [torch.zeros(m.first_rank) for m in methods])
        self.stack("B", [normal((m.first_rank, site.out_features), INIT_STD, g) for m, g in pairs])
        self.constant("scale", [m.alpha / (m.first_rank + 1e-5) for m in methods])
        self.constant("weight", [m.orthogonal / matrices for m in methods], dimensions=1)
        own = [torch.arange(self.E.shape[1]) < m.first_rank for m in methods]
        self.register_buffer("ones", torch.diag_embed(torch.stack(own).float()), persistent=False)
        self.dropout = RunDropout([m.dropout for m in methods])

    def factors(self, dtype: torch.dtype) -> Factors:
        return Factors(self.A * (self.E.unsqueeze(1) * self.scale), self.B)

    def merged(self, weight: Tensor, bias: Tensor | None, run: int) -> tuple[Tensor, Tensor | None]:
        state = self.run_state(run)
        change = ((state["A"] * state["E"]) @ state["B"]).T * self.scale[run]
        return (weight.float() + change).to(weight.dtype), bias


class Allocator(Delta):
    """Scores every triplet of all sites, run by run, and zeroes the singular values of those outside the budget.

    Sites of one shape are handled as one tensor [K, R, ...]; M triplets in all, padding included. Budgets are host
    numbers known from the start, so that no step waits for the device.
    """

    def __init__(self, deltas: Sequence[AdaLoraDelta], methods: Sequence[AdaLora]) -> None:
        super().__init__(len(methods))
        shapes: dict[torch.Size, list[AdaLoraDelta]] = {}
        for delta in deltas:
            shapes.setdefault(torch.Size([delta.A.shape[1], delta.B.shape[2]]), []).append(delta)
        self.groups = list(shapes.values())
        """Site deltas by shape; they belong to the adapter."""
        self.methods = list(methods)
        self.matrices = len(deltas)
        self.sensitivity: dict[tuple[int, str], Tensor] = {}
        self.uncertainty: dict[tuple[int, str], Tensor] = {}
        self._first: Sequence[int] | None = None
        self._resumed: dict[int, dict[str, Tensor]] = {}

    def begin(self, step: Sequence[int], steps: Sequence[int]) -> None:
        """Plan from `step` of each run, of `steps`, until the first of them ends; forget what was measured before."""
        self._first = step
        fixed = [n - m.phases(n)[1] for m, n in zip(self.methods, steps, strict=True)]
        numbers = [[s + k for s in step] for k in range(1 + min(n - s for s, n in zip(step, steps, strict=True)))]
        # a run of so few steps that its final phase comes before any measurement prunes nothing
        plan = [
            [
                m.budget(s, n, self.matrices) if last > 1 else None
                for m, s, n, last in zip(self.methods, row, steps, fixed, strict=True)
            ]
            for row in numbers
        ]
        full = [m.first_rank * self.matrices for m in self.methods]
        scoring = [[s < last for s, last in zip(row, fixed, strict=True)] for row in numbers]
        device = self.groups[0][0].E.device
        self.measures = [any(row) for row in scoring]
        self.prunes = [any(b is not None for b in row) for row in plan]
        self.cut = torch.tensor([[0 if b is None else f - b for b, f in zip(row, full, strict=True)] for row in plan])
        self.cut = self.cut.to(device)
        """Triplets to prune by step and run [steps, R]."""
        self.acting = torch.tensor([[b is not None for b in row] for row in plan], device=device)
        """Whether singular values are zeroed after a step [steps, R]."""
        early = [[s <= last for s, last in zip(row, fixed, strict=True)] for row in numbers]
        self.allocating = self.acting & torch.tensor(early, device=device)
        """Whether the pruned triplets are chosen anew [steps, R]; afterwards the last choice holds."""
        self.rate1, self.rate2 = (
            torch.tensor([[(1 - beta) * on for beta, on in zip(betas, row, strict=True)] for row in scoring]).to(device)
            for betas in ([m.beta1 for m in self.methods], [m.beta2 for m in self.methods])
        )
        self.real = self._joined([torch.stack([d.ones.diagonal(dim1=1, dim2=2) for d in g]) for g in self.groups]) > 0
        """Which of the M triplets are no padding [R, M]."""
        self.pruned = torch.zeros_like(self.real)
        self.sensitivity.clear()
        self.uncertainty.clear()
        for run, kept in self._resumed.items():
            for name, view in self._kept(run).items():
                view.copy_(kept[name])
        self._resumed.clear()

    def _kept(self, run: int) -> dict[str, Tensor]:
        """Return views of what was measured of one run and chosen for it, without padding."""
        found = {}
        pruned = self._by_site(self.pruned)
        for i, group in enumerate(self.groups):
            for k, delta in enumerate(group):
                found[f"{i}.{k}.pruned"] = unpadded(pruned[i][k], run, delta.shapes["E"][run])
                for name in ("A", "E", "B"):
                    zeros = torch.zeros((len(group), *getattr(delta, name).shape), device=delta.E.device)
                    for what, measured in (("sensitivity", self.sensitivity), ("uncertainty", self.uncertainty)):
                        whole = measured.setdefault((i, name), zeros.clone())
                        found[f"{i}.{k}.{name}.{what}"] = unpadded(whole[k], run, delta.shapes[name][run])
        return found

    def between_steps(self, run: int) -> dict[str, Tensor]:
        return self._kept(run) if self.sensitivity else {}

    def resume(self, run: int, kept: dict[str, Tensor]) -> None:
        if kept:
            self._resumed[run] = kept

    def penalty(self) -> Tensor:
        """Return each run's orthogonality term [R]; a padded rank counts as orthogonal. One product a shape of site."""
        terms = []
        for group in self.groups:
            ones = torch.stack([d.ones for d in group])
            a, b = torch.stack([d.A for d in group]), torch.stack([d.B for d in group])
            for gram in (a.transpose(2, 3) @ a, b @ b.transpose(2, 3)):
                terms.append(torch.linalg.matrix_norm(gram - ones).sum(dim=0))
        return self.groups[0][0].weight * torch.stack(terms).sum(dim=0)

    @staticmethod
    def _joined(parts: Sequence[Tensor]) -> Tensor:
        """Join [K, R, r] of all groups to [R, M]."""
        return torch.cat([part.transpose(0, 1).flatten(1) for part in parts], dim=1)

    def _by_site(self, joined: Tensor) -> list[list[Tensor]]:
        """Return views [R, r] of a tensor as from `_joined`, by group and site."""
        parts = iter(joined.split([d.E.shape[1] for g in self.groups for d in g], dim=1))
        return [[next(parts) for _ in group] for group in self.groups]

    def step(self, end: StepEnd) -> None:
        """Measure, and prune where the plan says so."""
        if self._first is None or 1 in end.step:
            self.begin(end.step, end.steps)
        assert self._first is not None
        row = end.step[0] - self._first[0]
        if self.measures[row]:
            self._measure(end, row)
        if self.prunes[row]:
            self._prune(end, row)

    def _measure(self, end: StepEnd, row: int) -> None:
        for i, group in enumerate(self.groups):
            for name in ("A", "E", "B"):
                parameters = [getattr(delta, name) for delta in group]
                gradients = torch.stack([end.gradient(p) for p in parameters])
                now = gradients.mul_(torch.stack(parameters)).abs_()
                mean = self.sensitivity.setdefault((i, name), torch.zeros_like(now))
                spread = self.uncertainty.setdefault((i, name), torch.zeros_like(now))
                rates = [-1] + [1] * (now.dim() - 2)
                mean.lerp_(now, self.rate1[row].reshape(rates))
                spread.lerp_(now.sub_(mean).abs_(), self.rate2[row].reshape(rates))

    def scores(self) -> Tensor:
        """Return the importance of every triplet [R, M]."""
        parts = []
        for i in range(len(self.groups)):
            a, e, b = (self.sensitivity[i, n] * self.uncertainty[i, n] for n in ("A", "E", "B"))
            parts.append(e + a.mean(dim=2) + b.mean(dim=3))
        return self._joined(parts)

    def _prune(self, end: StepEnd, row: int) -> None:
        cut = self.cut[row].unsqueeze(1)
        scores = self.scores().masked_fill(~self.real, torch.inf)
        threshold = scores.sort(dim=1).values.gather(1, (cut - 1).clamp(min=0))
        chosen = (scores <= threshold) & (cut > 0)
        self.pruned = torch.where(self.allocating[row].unsqueeze(1), chosen, self.pruned)
        zeroed = self.pruned & (self.acting[row] & end.alive).unsqueeze(1)
        for group, parts in zip(self.groups, self._by_site(zeroed), strict=True):
            for delta, part in zip(group, parts, strict=True):
                delta.E.masked_fill_(part, 0.0)


def _column(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, 1)


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1)


class AdaLoraFormat(SiteFormat):
    """PEFT's AdaLoRA. Without a run's length the phases are written for `PLANNED_STEPS` steps.

    PEFT's files may leave pruned triplets out; they come back as zeros.
    """

    peft_type = "ADALORA"
    names = {
        "A": ("lora_A", transposed, transposed),
        "E": ("lora_E", _column, _flat),
        "B": ("lora_B", transposed, transposed),
    }

    def config(self, method: AdaLora, model: nn.Module, sites: Sequence[Site]) -> dict[str, Any]:
        return {
            "init_r": method.first_rank,
            "target_r": method.target_rank,
            "deltaT": method.update_every,
            "beta1": method.beta1,
            "beta2": method.beta2,
            "orth_reg_weight": method.orthogonal,
            "lora_alpha": method.alpha,
            "lora_dropout": method.dropout,
            "target_modules": target_modules(model, sites),
            "fan_in_fan_out": fan_in_fan_out(sites),
            "bias": "none",
            **self.training(method, PLANNED_STEPS),
        }

    def training(self, method: AdaLora, steps: int) -> dict[str, Any]:
        warmup, final = method.phases(steps)
        return {"tinit": warmup, "tfinal": final, "total_step": steps}

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        refuse(config, bias="none")
        first, target, total = config["init_r"], config["target_r"], config["total_step"]
        return {
            "target_rank": target,
            "init_rank": None if first == _grown(target) else first,
            "alpha": float(config["lora_alpha"]) if config["lora_alpha"] > 0 else float(first),
            "dropout": float(config.get("lora_dropout", 0.0)),
            "init_warmup": config["tinit"] / total,
            "final_warmup": config["tfinal"] / total,
            "update_every": config["deltaT"],
            "beta1": config["beta1"],
            "beta2": config["beta2"],
            "orthogonal": config["orth_reg_weight"],
            "targets": targets(config),
        }

    def state(self, method: AdaLora, sites: Sequence[Site], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = super().state(method, sites, tensors)
        axes = {"A": 1, "E": 0, "B": 0}
        return {k: _padded(t, axes[k.rpartition(".")[2]], method.first_rank) for k, t in found.items()}


def _padded(tensor: Tensor, axis: int, size: int) -> Tensor:
    """Fill an axis up with zeros to `size`."""
    missing = list(tensor.shape)
    missing[axis] = max(size - missing[axis], 0)
    return torch.cat([tensor, tensor.new_zeros(missing)], dim=axis)


def _grown(target_rank: int) -> int:
    return round(GROWTH * target_rank)


@dataclass(frozen=True)
class AdaLora(Method):
    """Low-rank updates whose singular values compete for a falling budget."""

    target_rank: int = 8
    """Average rank of a matrix in the end."""
    init_rank: int | None = None
    """Rank of every matrix at first; None: 1.5 times the target, as in the paper."""
    alpha: float = 16.0
    dropout: float = 0.0
    targets: Targets = ("attention.query", "attention.value")
    init_warmup: float = 0.1
    """Fraction of the steps before the budget falls."""
    final_warmup: float = 0.5
    """Fraction of the steps, the last ones, with the pruned triplets fixed."""
    update_every: int = 10
    """Steps between two allocations."""
    beta1: float = 0.85
    beta2: float = 0.85
    orthogonal: float = 0.1
    """Weight of the orthogonality term."""

    traits = Traits(
        sites=("linear",),
        mergeable=True,
        identity_at_init=True,
        free_in_pack=frozenset(
            {
                "target_rank",
                "init_rank",
                "alpha",
                "dropout",
                "init_warmup",
                "final_warmup",
                "update_every",
                "beta1",
                "beta2",
                "orthogonal",
            }
        ),
        cost_free=frozenset({"alpha", "beta1", "beta2", "orthogonal"}),
    )
    card = Card(
        equation="y = W x + b + (alpha / r₀) · P Λ Q x,  least important singular values zeroed",
        paper="Zhang et al. 2023, arXiv:2303.10512",
        parameters="r₀ (D_in + D_out + 1) a map, r₀ the initial rank",
    )
    peft = AdaLoraFormat()

    def __post_init__(self) -> None:
        require(self.target_rank >= 1, "target_rank", self.target_rank, "a whole number of at least 1")
        accepted = f"a whole number of at least target_rank ({self.target_rank}), or null for {GROWTH} times it"
        require(self.first_rank >= self.target_rank, "init_rank", self.init_rank, accepted)
        require(self.alpha > 0, "alpha", self.alpha, "a number above 0")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "a number in [0, 1)")
        for key in ("init_warmup", "final_warmup"):
            require(0 <= getattr(self, key) < 1, key, getattr(self, key), "a number in [0, 1)")
        accepted = f"less than {1 - self.init_warmup:g}, what init_warmup leaves of the steps"
        require(self.init_warmup + self.final_warmup < 1, "final_warmup", self.final_warmup, accepted)
        require(self.update_every >= 1, "update_every", self.update_every, "a whole number of at least 1")
        for key in ("beta1", "beta2"):
            require(0 < getattr(self, key) < 1, key, getattr(self, key), "a number in (0, 1)")
        require(self.orthogonal >= 0, "orthogonal", self.orthogonal, "a number of at least 0")

    @property
    def first_rank(self) -> int:
        """Rank of every matrix at first."""
        return _grown(self.target_rank) if self.init_rank is None else self.init_rank

    def phases(self, steps: int) -> tuple[int, int]:
        """Return how many steps of a run of `steps` are warm-up and final phase."""
        # A fraction such as 0.29 of 100 is 28.999… in binary; the rounding gives it back its step.
        return int(round(self.init_warmup * steps, 6)), int(round(self.final_warmup * steps, 6))

    def budget(self, step: int, steps: int, matrices: int) -> int | None:
        """Return how many triplets of all `matrices` stay after `step` (from 1) of `steps`; None: no pruning then."""
        warmup, final = self.phases(steps)
        last = self.target_rank * matrices
        if step >= steps - final:
            return last
        if step <= warmup or step % self.update_every:
            return None
        left = 1 - (step - warmup) / (steps - final - warmup)
        return int((self.first_rank * matrices - last) * left**3 + last)

    def sites(self, model: nn.Module) -> list[Site]:
        return linear_sites(model, self.targets)

    def check_site(self, site: Site) -> None:
        limit = min(site.in_features, site.out_features)
        accepted = f"an initial rank of at most {limit}, the smaller side of {site.name}"
        key = "target_rank" if self.init_rank is None else "init_rank"
        require(self.first_rank <= limit, key, getattr(self, key), accepted)

    @classmethod
    def build(
        cls, sites: Sequence[Site], methods: Sequence[AdaLora], generators: Sequence[torch.Generator]
    ) -> tuple[list[Delta], Delta | None]:
        deltas = [AdaLoraDelta(site, methods, generators, 2 * len(sites)) for site in sites]
        return list(deltas), Allocator(deltas, methods)

    @classmethod
    def after_step(
        cls, methods: Sequence[AdaLora], deltas: Sequence[tuple[Site, Delta]], shared: Delta | None, end: StepEnd
    ) -> None:
        assert isinstance(shared, Allocator)
        shared.step(end)

    def count(self, site: Site) -> int:
        return self.first_rank * (site.in_features + site.out_features + 1)
