"""The contract of a method: where it goes, what it adds there, what it can and cannot do.

A method is a frozen dataclass of settings. It names its sites (`Method.sites`) and builds one `Delta` per site
(`Method.delta`) holding the trainable parameters of *all* runs of a pack. Everything else (freezing, hooks, saving,
merging, counting, profiling, packing, testing) is shared and lives elsewhere.

Shape letters used throughout: runs R, batch B, tokens T, rows N = B·T, width D, rank r. A packed activation is [R, N,
D].
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from peftbench.errors import UserError
from peftbench.models.roles import Site


@dataclass(frozen=True)
class Traits:
    """What a method declares about itself; shared code and tests read this instead of asking for names."""

    sites: tuple[str, ...]
    """Kinds of site it fills: linear, hidden, norm, embedding, attention, weight."""
    mergeable: bool
    """The trained adapter can be folded into the base's own weights."""
    identity_at_init: bool
    """A fresh adapter leaves the model's output unchanged."""
    packable: bool = True
    """Several runs can share one pass through the frozen base."""
    free_in_pack: frozenset[str] = frozenset()
    """Settings that may differ between the runs of one pack."""
    cost_free: frozenset[str] = frozenset()
    """Settings that change neither the time nor the memory of a step."""


def _unpadded(stacked: Tensor, run: int, shape: Sequence[int]) -> Tensor:
    """View one run's own part of a padded stack [R, ...]."""
    part = stacked[run]
    for dimension, size in enumerate(shape):
        part = part.narrow(dimension, 0, size)
    return part


class Delta(nn.Module):
    """What a method adds at one site for all runs of a pack; parameters carry a leading runs axis.

    Runs of different shape (ranks, bottlenecks) are zero-padded to the largest. Padding must stay zero by itself: the
    gradient of a padded entry has to vanish while all padded entries are zero, which holds for products of two padded
    factors.
    """

    def __init__(self, runs: int) -> None:
        super().__init__()
        self.runs = runs
        self.shapes: dict[str, list[torch.Size]] = {}

    def stack(self, name: str, tensors: Sequence[Tensor]) -> None:
        """Register the parameter `name` [R, ...] from one tensor a run (same number of dimensions)."""
        shape: list[int] = [max(sizes) for sizes in zip(*(t.shape for t in tensors), strict=True)]
        stacked = torch.zeros([self.runs, *shape], dtype=torch.float32)
        for run, tensor in enumerate(tensors):
            _unpadded(stacked, run, tensor.shape).copy_(tensor)
        self.shapes[name] = [t.shape for t in tensors]
        self.register_parameter(name, nn.Parameter(stacked))

    def constant(self, name: str, values: Sequence[float], dimensions: int = 3) -> None:
        """Register one number a run as a buffer [R, 1, 1] that broadcasts over packed activations."""
        tensor = torch.tensor(list(values), dtype=torch.float32).reshape([self.runs] + [1] * (dimensions - 1))
        self.register_buffer(name, tensor, persistent=False)

    def run_state(self, run: int) -> dict[str, Tensor]:
        """Return views of this run's parameters, without padding."""
        return {name: _unpadded(getattr(self, name), run, shapes[run]) for name, shapes in self.shapes.items()}

    @torch.no_grad()
    def load_run_state(self, state: dict[str, Tensor], run: int) -> None:
        """Copy one run's parameters in.

        Raises:
            UserError: a tensor is missing or has another shape.
        """
        for name, view in self.run_state(run).items():
            if name not in state or state[name].shape != view.shape:
                found = tuple(state[name].shape) if name in state else "nothing"
                raise UserError(f"adapter tensor {name!r}: expected shape {tuple(view.shape)}, found {found}")
            view.copy_(state[name])


class LinearDelta(Delta):
    """Changes the input or the output of a frozen linear map (the role's own slice of it)."""

    def before(self, x: Tensor) -> Tensor:
        """Map the input [R, N, D_in] to a new input."""
        return x

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """Map input [R, N, D_in] and frozen output [R, N, D_out] to the new output."""
        return y

    def merged(self, weight: Tensor, bias: Tensor | None, run: int) -> tuple[Tensor, Tensor | None]:
        """Return weight [D_out, D_in] and bias [D_out] of the linear map that equals frozen map plus delta of `run`."""
        raise NotImplementedError(f"{type(self).__name__} cannot be merged")


class HiddenDelta(Delta, ABC):
    """Changes a sublayer's output before the residual sum."""

    @abstractmethod
    def forward(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        """Map sublayer input and output, both [R, N, D], to the new output."""


class NormDelta(Delta):
    """Gives a normalisation its own affine parameters per run: `weight` and `bias`, whichever are trained."""

    def __init__(self, site: Site, runs: int, *, weight: bool, bias: bool) -> None:
        super().__init__(runs)
        for name, wanted in (("weight", weight), ("bias", bias)):
            frozen = getattr(site.module, name, None)
            if wanted and frozen is not None:
                self.stack(name, [materialize(frozen)] * runs)

    @staticmethod
    def count(site: Site, *, weight: bool, bias: bool) -> int:
        """Return how many parameters one run trains at `site`."""
        wanted = (("weight", weight), ("bias", bias))
        return sum(site.width for name, on in wanted if on and getattr(site.module, name, None) is not None)


class EmbeddingDelta(Delta, ABC):
    """Prepends virtual tokens to the input embeddings."""

    @abstractmethod
    def prompt(self) -> Tensor:
        """Return the virtual tokens' embeddings [R, P, D]."""


class AttentionDelta(Delta, ABC):
    """Prepends extra keys and values to an attention's own."""

    @abstractmethod
    def prefix(self) -> tuple[Tensor, Tensor]:
        """Return keys and values, both [R, P, H_kv, D_head]."""


@dataclass(frozen=True)
class Method(ABC):
    """Settings of one method. Subclasses declare `traits` and fill the abstract methods."""

    traits: ClassVar[Traits]
    version: ClassVar[int] = 1
    """Raised whenever a change to the method's code changes results."""

    def __post_init__(self) -> None:  # noqa: B027  a method without such settings has nothing to add
        """Validate settings that need no model; subclasses raise `UserError`."""

    @abstractmethod
    def sites(self, model: nn.Module) -> list[Site]:
        """Return the sites of `model` this method fills, in a fixed order.

        Raises:
            UserError: the model lacks a site the settings ask for.
        """

    @classmethod
    @abstractmethod
    def delta(cls, site: Site, methods: Sequence[Self], generators: Sequence[torch.Generator]) -> Delta:
        """Build the delta of one site for all runs: one settings object and one random generator (CPU) a run."""

    @abstractmethod
    def count(self, site: Site) -> int:
        """Return, in closed form, how many parameters one run trains at `site`."""

    def trained_weights(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Return the base's own parameters that train (weight sites), by name; none by default."""
        return {}

    def check_site(self, site: Site) -> None:  # noqa: B027  most settings fit every site
        """Raise `UserError` if the settings do not fit `site`."""

    def check(self, model: nn.Module) -> None:
        """Raise `UserError` if the settings do not fit `model` (a meta-device model will do)."""
        for site in self.sites(model):
            self.check_site(site)

    def parameter_count(self, model: nn.Module) -> int:
        """Return, in closed form, how many parameters one run trains outside the task head."""
        return sum(self.count(site) for site in self.sites(model)) + sum(
            p.numel() for p in self.trained_weights(model).values()
        )

    def settings(self) -> dict[str, Any]:
        """Return the settings as plain data."""
        return dataclasses.asdict(self)


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the base's parameters by name: all but a task head's (a language-model head belongs to the base)."""
    prefix = getattr(model, "base_model_prefix", "")
    base = getattr(model, prefix, None) if prefix else None
    if not isinstance(base, nn.Module):
        return dict(model.named_parameters())
    output = cast(Any, model).get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    own = {id(p) for part in (base, output) if part is not None for p in part.parameters()}
    return {name: p for name, p in model.named_parameters() if id(p) in own}


Targets = tuple[str, ...] | str
"""Role names, module-name suffixes (a tuple of either), or one regular expression over module names."""


def require(condition: bool, key: str, value: object, accepted: str) -> None:
    """Raise `UserError` naming setting, value and what would be accepted, unless `condition` holds."""
    if not condition:
        raise UserError(f"method.{key}={value!r}: expected {accepted}")


def materialize(parameter: Tensor) -> Tensor:
    """Return a detached fp32 CPU copy of a parameter (zeros for one on the meta device)."""
    if parameter.is_meta:
        return torch.zeros(parameter.shape, dtype=torch.float32)
    return parameter.detach().to("cpu", torch.float32, copy=True)


def uniform(shape: Sequence[int], bound: float, generator: torch.Generator) -> Tensor:
    """Draw a tensor uniformly from [-bound, bound]."""
    return torch.empty(*shape).uniform_(-bound, bound, generator=generator)


def normal(shape: Sequence[int], std: float, generator: torch.Generator) -> Tensor:
    """Draw a tensor from a normal distribution with mean 0."""
    return torch.empty(*shape).normal_(0.0, std, generator=generator)


class RunDropout(nn.Module):
    """Dropout with one rate a run: x [R, ...] → x with entries of run i zeroed at rate p[i] and the rest scaled up."""

    keep: Tensor

    def __init__(self, rates: Sequence[float]) -> None:
        super().__init__()
        self.rates = list(rates)
        self.register_buffer("keep", 1 - torch.tensor(self.rates, dtype=torch.float32), persistent=False)

    def set(self, rate: float) -> None:
        """Give every run the same rate."""
        self.rates = [rate] * len(self.rates)
        self.keep.fill_(1 - rate)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not any(self.rates):
            return x
        if len(set(self.rates)) == 1:
            return nn.functional.dropout(x, self.rates[0])
        keep = self.keep.reshape([-1] + [1] * (x.dim() - 1)).to(x.dtype)
        return x * (torch.rand_like(x) < keep) / keep
