"""What the bottleneck adapters share: a small two-layer network beside or behind a frozen sublayer.

    h' = h + s · (act(u W_down + b_down) W_up + b_up)

h is the sublayer's output before the residual sum, u what the method reads: h itself (Houlsby), the layer's result
after the sum (Pfeiffer) or the residual stream x (parallel). Some layers normalise after the sum, norm(x + h), as
BERT's do; in others the sublayer normalises its own input, as in GPT-2.

Shapes: runs R, rows N, width D, bottleneck r; x, h, u [R, N, D], W_down [R, D, r], W_up [R, r, D].
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peftbench.errors import UserError
from peftbench.methods.base import HiddenDelta, require
from peftbench.models.roles import Site, find_sites

# Each maps 0 to 0, so that padded bottleneck units of a pack stay silent.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": nn.functional.gelu,
    "relu": nn.functional.relu,
    "silu": nn.functional.silu,
    "tanh": torch.tanh,
}


def bottleneck(
    u: Tensor,
    down: Tensor,
    down_bias: Tensor,
    up: Tensor,
    up_bias: Tensor,
    activation: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return act(u down + down_bias) up + up_bias [R, N, D], computed in the dtype of `u`."""
    dtype = u.dtype
    inner = torch.baddbmm(down_bias.to(dtype).unsqueeze(1), u, down.to(dtype))
    return torch.baddbmm(up_bias.to(dtype).unsqueeze(1), activation(inner), up.to(dtype))


class BottleneckDelta(HiddenDelta):
    """h + s · bottleneck(u); a method says what u is."""

    down: nn.Parameter
    down_bias: nn.Parameter
    up: nn.Parameter
    up_bias: nn.Parameter
    scale: Tensor

    def __init__(
        self, downs: Sequence[Tensor], ups: Sequence[Tensor], activation: str, scales: Sequence[float] | None = None
    ) -> None:
        """Take one down [D, r] and one up [r, D] a run; biases start at zero. Without `scales` s is 1."""
        super().__init__(len(downs))
        self.activation = ACTIVATIONS[activation]
        self.stack("down", downs)
        self.stack("down_bias", [torch.zeros(down.shape[1]) for down in downs])
        self.stack("up", ups)
        self.stack("up_bias", [torch.zeros(up.shape[1]) for up in ups])
        self.scaled = scales is not None
        if scales is not None:
            self.constant("scale", scales)

    @abstractmethod
    def read(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        """Return u [R, N, D] from what the site gives as input and output."""

    def forward(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        u = self.read(inputs, outputs)
        change = bottleneck(u, self.down, self.down_bias, self.up, self.up_bias, self.activation)
        if self.scaled:
            change = change * self.scale.to(change.dtype)
        return outputs + change


def require_bottleneck(size: int, activation: str) -> None:
    """Raise `UserError` unless size and activation are settings of a bottleneck."""
    require(size >= 1, "bottleneck", size, "a whole number of at least 1")
    require(activation in ACTIVATIONS, "activation", activation, f"one of {', '.join(ACTIVATIONS)}")


def count_bottleneck(size: int, site: Site) -> int:
    """Return the parameters of one run's bottleneck: two matrices and two biases."""
    return 2 * size * site.width + size + site.width


def sublayer_sites(model: nn.Module, roles: Sequence[str]) -> list[Site]:
    """Return the hidden sites of these sublayers ("attention", "mlp"); their input is what the sublayer computes on."""
    return [site for site in find_sites(model, "hidden") if site.role in roles]


def post_norm(model: nn.Module) -> bool:
    """Tell whether layers normalise after the residual sum: such a stack needs, and has, no norm at its end."""
    return not any(site.role == "norm.final" for site in find_sites(model, "norm"))


@dataclass(frozen=True, eq=False)
class StreamSite(Site):
    """A hidden site whose input is the residual stream x; the layer goes on with `norm(x + h)`, a norm or nothing."""

    norm: nn.Module = dataclasses.field(default_factory=nn.Identity)


def stream_sites(model: nn.Module, roles: Sequence[str]) -> list[Site]:
    """Return the hidden sites of these sublayers with the residual stream x as their input.

    Where the sublayer's norm comes first, x is what enters that norm; otherwise it is what enters the sublayer.

    Raises:
        UserError: the model's role table does not say which norm goes with a sublayer.
    """
    norms = {(s.layer, s.role.removeprefix("norm.")): s.module for s in find_sites(model, "norm")}
    post = post_norm(model)
    sites: list[Site] = []
    for site in sublayer_sites(model, roles):
        norm = norms.get((site.layer, site.role))
        if norm is None:
            raise UserError(f"{site.name}: the role table of {type(model).__name__} has no norm.{site.role} beside it")
        fields = {f.name: getattr(site, f.name) for f in dataclasses.fields(site)}
        sites.append(StreamSite(**fields, norm=norm) if post else StreamSite(**{**fields, "source": norm}))
    return sites
