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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from peftbench.errors import UserError
from peftbench.kernels.noise import adapter_dropout
from peftbench.kernels.piecewise import Terms
from peftbench.methods.peft_format import PeftFormat
from peftbench.models.roles import Site


@dataclass(frozen=True)
class Card:
    """What the documentation says of a method in a line each; a yaml's `about:` overrides it for a variant."""

    equation: str
    """The change in one line, in the letters of the method's file."""
    paper: str
    """Authors, year, arXiv id (or venue)."""
    parameters: str
    """Closed form of the trained parameters, with D_in, D_out, D, r, P (virtual tokens) and L (layers)."""


@dataclass(frozen=True)
class StepEnd:
    """What a method sees once the optimizer has made a step, for all runs of a pack.

    Attributes:
        step: steps each run has done, from 1; R numbers.
        steps: steps each run has in all; R numbers.
        gradient: the clipped gradient [R, ...] of one of the adapter's parameters in this step.
        moments: a parameter's first and second moment in the optimizer, both [R, ...].
        set_moments: puts a parameter's moments back.
        alive: runs that have stayed finite so far, [R].
    """

    step: Sequence[int]
    steps: Sequence[int]
    gradient: Callable[[nn.Parameter], Tensor]
    moments: Callable[[nn.Parameter], tuple[Tensor, Tensor]]
    set_moments: Callable[[nn.Parameter, Tensor, Tensor], None]
    alive: Tensor

    def of(self, first: int, last: int) -> StepEnd:
        """Return the same for the runs from `first` to the one before `last`."""
        own = slice(first, last)
        return dataclasses.replace(self, step=self.step[own], steps=self.steps[own], alive=self.alive[own])


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
    quantized_base: bool = True
    """Works on a base whose linear maps are stored in 4 bits."""


def unpadded(stacked: Tensor, run: int, shape: Sequence[int]) -> Tensor:
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
        self.constants: dict[str, tuple[float, ...]] = {}
        """Numbers a run, on the host."""
        self.drawn: list[str] = []
        """Names of frozen random tensors [R, ...], given again by the seed and therefore not saved."""
        self.rate_ratios: dict[str, list[float]] = {}
        """Learning rate of a parameter over the run's own, one number a run; 1 where a name is missing."""
        self.tasks: Tensor | None = None
        """Task of each row [R, B] where a batch mixes several tasks."""

    def stack(self, name: str, tensors: Sequence[Tensor]) -> None:
        """Register the parameter `name` [R, ...] from one tensor a run (same number of dimensions)."""
        self.register_parameter(name, nn.Parameter(self._stacked(name, tensors)))

    def draw(self, name: str, tensors: Sequence[Tensor]) -> None:
        """Register the frozen random tensor `name` [R, ...]; `tensors` must follow from the generators alone."""
        self.drawn.append(name)
        self.register_buffer(name, self._stacked(name, tensors), persistent=False)

    def _stacked(self, name: str, tensors: Sequence[Tensor]) -> Tensor:
        shape: list[int] = [max(sizes) for sizes in zip(*(t.shape for t in tensors), strict=True)]
        stacked = torch.zeros([self.runs, *shape], dtype=torch.float32)
        for run, tensor in enumerate(tensors):
            unpadded(stacked, run, tensor.shape).copy_(tensor)
        self.shapes[name] = [t.shape for t in tensors]
        return stacked

    def constant(self, name: str, values: Sequence[float], dimensions: int = 3) -> None:
        """Register one number a run as a buffer [R, 1, 1] that broadcasts over packed activations."""
        self.constants[name] = tuple(values)
        tensor = torch.tensor(list(values), dtype=torch.float32).reshape([self.runs] + [1] * (dimensions - 1))
        self.register_buffer(name, tensor, persistent=False)

    def shared_value(self, name: str) -> float | None:
        """Return the number that all runs have as the constant `name`; None where they differ."""
        values = set(self.constants[name])
        return values.pop() if len(values) == 1 else None

    def refer(self, name: str, module: nn.Module) -> None:
        """Keep `module` as the attribute `name` without owning it (its parameters are counted and saved elsewhere)."""
        object.__setattr__(self, name, module)

    def penalty(self) -> Tensor | None:
        """Return what this delta adds to each run's loss [R], or None."""
        return None

    def between_steps(self, run: int) -> dict[str, Tensor]:
        """Return what one run keeps from step to step beside its parameters, without padding; nothing by default.

        A run may go on among other neighbours: what this gives is handed to `resume` there.
        """
        return {}

    def resume(self, run: int, kept: dict[str, Tensor]) -> None:
        """Take over what `between_steps` gave of a run; before the first step."""
        assert not kept, f"{type(self).__name__} keeps nothing between steps"

    def run_state(self, run: int) -> dict[str, Tensor]:
        """Return views of this run's parameters, without padding."""
        names = (name for name in self.shapes if name not in self.drawn)
        return {name: unpadded(getattr(self, name), run, self.shapes[name][run]) for name in names}

    def run_drawn(self, run: int) -> dict[str, Tensor]:
        """Return views of this run's frozen random tensors, without padding."""
        return {name: unpadded(getattr(self, name), run, self.shapes[name][run]) for name in self.drawn}

    @torch.no_grad()
    def load_run_state(self, state: dict[str, Tensor], run: int) -> None:
        """Copy one run's parameters in, and its frozen random tensors where `state` has them.

        Raises:
            UserError: a tensor is missing or has another shape.
        """
        known = self.run_state(run) | {k: v for k, v in self.run_drawn(run).items() if k in state}
        for name, view in known.items():
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

    def linear_terms(self, dtype: torch.dtype) -> Terms | None:
        """Return what `before` and `after` do as terms, for a pass that computes in `dtype`; None: they are no such."""
        return None

    def merged(self, weight: Tensor, bias: Tensor | None, run: int) -> tuple[Tensor, Tensor | None]:
        """Return weight [D_out, D_in] and bias [D_out] of the linear map that equals frozen map plus delta of `run`."""
        raise NotImplementedError(f"{type(self).__name__} cannot be merged")


@dataclass(frozen=True)
class Factors:
    """A low-rank change of a linear map: y = gain ⊙ (W x + scale · (x a ⊙ inner) b) + bias.

    Attributes:
        a, b: [R, D_in, r] and [R, r, D_out], in any dtype.
        scale: [R, 1, 1], constant, or None for 1.
        alpha: the value of `scale` on the host, where all runs have the same.
        inner: [R, r], or None for 1; with a frozen `a` its gradient needs no input kept.
        gain: [R, D_out], or None for 1.
        keep_output: where `gain` trains, save the map's output for the backward pass, or make it again there.
    """

    a: Tensor
    b: Tensor
    scale: Tensor | None = None
    inner: Tensor | None = None
    gain: Tensor | None = None
    keep_output: bool = True
    alpha: float | None = None


class LowRankDelta(LinearDelta, ABC):
    """A low-rank product beside the frozen one.

    Where the frozen map is within reach the two are computed together (`kernels.low_rank`); where it is not (a role
    that shares its matrix with others, dropout at work, autocast) `after` adds the product to what is there.
    """

    dropout: RunDropout

    @abstractmethod
    def factors(self, dtype: torch.dtype) -> Factors:
        """Return the change for a pass that computes in `dtype`; differentiable in the parameters."""

    def linear_terms(self, dtype: torch.dtype) -> Terms | None:
        if self.dropout.acts:
            return None
        f = self.factors(dtype)
        assert f.gain is None, "a gain needs terms of its own"
        return Terms(a=f.a, b=f.b, inner=f.inner, scale=f.scale)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        f = self.factors(x.dtype)
        assert f.gain is None, "a gain needs an `after` of its own"
        b = f.b if f.scale is None else f.b * f.scale
        u = self.dropout(x) @ f.a.to(x.dtype)
        u = u if f.inner is None else u * f.inner.to(x.dtype).unsqueeze(1)
        return torch.baddbmm(y, u, b.to(x.dtype))


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
        """Return the virtual tokens' embeddings: [R, P, D], or [R, B, P, D] where rows differ (see `Delta.tasks`)."""


class AttentionDelta(Delta, ABC):
    """Prepends extra keys and values to an attention's own."""

    @abstractmethod
    def prefix(self) -> tuple[Tensor, Tensor]:
        """Return keys and values, both [R, P, H_kv, D_head]."""


@dataclass(frozen=True)
class Method(ABC):
    """Settings of one method. Subclasses declare `traits` and fill the abstract methods."""

    traits: ClassVar[Traits]
    card: ClassVar[Card]
    version: ClassVar[int] = 1
    """Raised whenever a change to the method's code changes results."""
    peft: ClassVar[PeftFormat | None] = None
    """How adapters of this method read in HF PEFT's file format, where PEFT holds the method."""

    def __post_init__(self) -> None:  # noqa: B027  a method without such settings has nothing to add
        """Validate settings that need no model; subclasses raise `UserError`."""

    @abstractmethod
    def sites(self, model: nn.Module) -> list[Site]:
        """Return the sites of `model` this method fills, in a fixed order.

        Raises:
            UserError: the model lacks a site the settings ask for.
        """

    @classmethod
    def build(
        cls, sites: Sequence[Site], methods: Sequence[Self], generators: Sequence[torch.Generator]
    ) -> tuple[list[Delta], Delta | None]:
        """Build the deltas of all sites, in order, and what they share: a delta without a site, or None.

        A method whose sites have nothing in common leaves this alone and fills `delta`. What is shared is kept by the
        sites' deltas through `Delta.refer`; its tensors are saved under "shared".
        """
        return [cls.delta(site, methods, generators) for site in sites], None

    @classmethod
    def delta(cls, site: Site, methods: Sequence[Self], generators: Sequence[torch.Generator]) -> Delta:
        """Build the delta of one site for all runs: one settings object and one random generator (CPU) a run."""
        raise AssertionError(f"{cls.__name__} adds nothing at a single site")

    @abstractmethod
    def count(self, site: Site) -> int:
        """Return, in closed form, how many parameters one run trains at `site`."""

    def shared_count(self, sites: Sequence[Site]) -> int:
        """Return, in closed form, how many parameters one run trains outside its sites (see `build`)."""
        return 0

    def trained_weights(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Return the base's own parameters that train (weight sites), by name; none by default."""
        return {}

    def rewritten_weights(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Return the base's parameters that `after_step` rewrites, by name: saved and restored, but never counted."""
        return {}

    @classmethod  # noqa: B027  most methods leave the optimizer's step alone
    def after_step(
        cls, methods: Sequence[Self], deltas: Sequence[tuple[Site, Delta]], shared: Delta | None, end: StepEnd
    ) -> None:
        """Act once the optimizer has made a step, without gradients; must not wait for the device every step."""

    def rate_factor(self, step: int, steps: int) -> float:
        """Return the factor on the schedule's learning rate at `step` (from 0) of `steps`."""
        return 1.0

    def base_optimizer(
        self,
        parameters: Sequence[nn.Parameter],
        betas: tuple[float, float] = (0.9, 0.999),
        epsilon: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> torch.optim.Optimizer | None:
        """Return an optimizer of this method's own for the base's trained parameters; None: AdamW.

        Before every step its groups' learning rates are set (tensors of one element), gradients are clipped, and its
        attribute `found_inf` is 1 where the run is no longer finite: the step must then change no parameter.
        """
        return None

    def with_tokenizer(self, tokenizer: Any) -> Self:
        """Return the settings with whatever depends on a tokenizer resolved."""
        return self

    def with_tasks(self, count: int) -> Self:
        """Return the settings for a data set that mixes `count` tasks (1: an ordinary one).

        Raises:
            UserError: the settings ask for another number.
        """
        return self

    def fingerprint(self) -> str | None:
        """Return a sha256 (hex) of the files that the settings name and the result depends on; None: of no file.

        Raises:
            UserError: a file is missing.
        """
        return None

    def check_site(self, site: Site) -> None:  # noqa: B027  most settings fit every site
        """Raise `UserError` if the settings do not fit `site`."""

    def check(self, model: nn.Module) -> None:
        """Raise `UserError` if the settings do not fit `model` (a meta-device model will do)."""
        for site in self.sites(model):
            self.check_site(site)

    def parameter_count(self, model: nn.Module) -> int:
        """Return, in closed form, how many parameters one run trains outside the task head."""
        sites = self.sites(model)
        own = sum(p.numel() for p in self.trained_weights(model).values())
        return sum(self.count(site) for site in sites) + self.shared_count(sites) + own

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
    """Dropout with one rate a run: x [R, ...] → x with entries of run i zeroed at rate p[i] and the rest scaled up.

    Attributes:
        number: which of its adapter's dropouts this is, from 1 on.
        first: which of the pack's runs its own begin with.
    """

    keep: Tensor

    def __init__(self, rates: Sequence[float]) -> None:
        super().__init__()
        self.rates = list(rates)
        self.number, self.first = 1, 0
        self.register_buffer("keep", 1 - torch.tensor(self.rates, dtype=torch.float32), persistent=False)

    def set(self, rate: float) -> None:
        """Give every run the same rate."""
        self.rates = [rate] * len(self.rates)
        self.keep.fill_(1 - rate)

    @property
    def acts(self) -> bool:
        """Whether anything is dropped now."""
        return self.training and any(self.rates)

    def forward(self, x: Tensor) -> Tensor:
        if not self.acts:
            return x
        dropped = adapter_dropout(x, self.rates, self.number, self.first)
        if dropped is not None:
            return dropped
        if len(set(self.rates)) == 1:
            return nn.functional.dropout(x, self.rates[0])
        keep = self.keep.reshape([-1] + [1] * (x.dim() - 1)).to(x.dtype)
        return x * (torch.rand_like(x) < keep) / keep
