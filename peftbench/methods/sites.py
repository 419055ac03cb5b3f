"""Injection: put a delta into a frozen model at a site, and take it out again without a trace.

A packed model sees rows run by run, [R·B, T, D]; deltas see [R, N, D]. Every hook is a torch hook or an instance
attribute that shadows a method, so removing it gives the model back unchanged. Attention sites go through the attention
interface of `transformers`; a site whose hook was not called during a forward pass raises instead of passing silently.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftbench.errors import UserError
from peftbench.kernels.low_rank import DENSE, TRANSPOSED, Frozen, low_rank_linear
from peftbench.kernels.piecewise import affine_rows, piecewise_linear
from peftbench.methods.base import (
    AttentionDelta,
    Delta,
    EmbeddingDelta,
    HiddenDelta,
    LinearDelta,
    LowRankDelta,
    NormDelta,
)
from peftbench.methods.mixed import MixedLinear, MixedNorm, overrides
from peftbench.models import attention
from peftbench.models.quantized import QuantizedLinear, autocasts, is_plain_linear
from peftbench.models.roles import EmbeddingSite, Site, first_input


@dataclass
class Injection:
    """The hooks of one adapter: whether they act, which have been called, how to remove them."""

    runs: int
    active: bool = True
    undo: list[Callable[[], None]] = field(default_factory=list)

    def add_all(self, deltas: Sequence[tuple[Site, Delta]], shared_inputs: Mapping[str, str]) -> None:
        """Put every delta in at its site.

        Args:
            shared_inputs: names of linear modules that are called with one and the same input → a name for them all.
        """
        groups: dict[str, _Together] = {}
        for site, delta in deltas:
            if isinstance(delta, LowRankDelta) and _within_reach(site):
                name = shared_inputs.get(site.name, site.name)
                groups.setdefault(name, _Together(self)).add(site, delta)
            elif isinstance(delta, MixedLinear) and _within_reach(site):
                _in_pieces(self, site, delta)
            else:
                self.add(site, delta)

    def add(self, site: Site, delta: Delta) -> None:
        """Put `delta` in at `site`."""
        if isinstance(delta, LinearDelta):
            _linear(self, site, delta)
        elif isinstance(delta, HiddenDelta):
            _hidden(self, site, delta)
        elif isinstance(delta, NormDelta):
            _norm(self, site, delta)
        elif isinstance(delta, EmbeddingDelta):
            assert isinstance(site, EmbeddingSite)
            _embedding(self, site, delta)
        elif isinstance(delta, AttentionDelta):
            _attention(self, site, delta)
        else:
            raise AssertionError(f"no site takes a {type(delta).__name__}")

    def remove(self) -> None:
        """Take every hook out, last in first out."""
        while self.undo:
            self.undo.pop()()

    @contextmanager
    def switched(self, active: bool) -> Iterator[None]:
        """Let the hooks act, or not, within the context."""
        before, self.active = self.active, active
        try:
            yield
        finally:
            self.active = before

    def split(self, x: Tensor) -> Tensor:
        """View rows [R·B, ..., D] as [R, N, D]."""
        if x.shape[0] % self.runs:
            raise UserError(f"a batch of {x.shape[0]} rows does not divide into the adapter's {self.runs} runs")
        return x.reshape(self.runs, -1, x.shape[-1])


def _linear(injection: Injection, site: Site, delta: LinearDelta) -> None:
    columns = site.columns if site.columns is None or isinstance(site.columns, slice) else list(site.columns)
    if columns is not None and overrides(delta, "before"):
        raise UserError(f"{site.name}: its input serves other roles too: name the module in targets")

    def pre(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not injection.active:
            return None
        x = args[0]
        return (delta.before(injection.split(x)).reshape(x.shape), *args[1:])

    def post(module: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor | None:
        if not injection.active:
            return None
        x = injection.split(args[0])
        if (
            columns is None
            and site.kind == "norm"
            and isinstance(delta, MixedLinear)
            and not torch.compiler.is_compiling()
        ):
            pieces, rest = delta.named(y.dtype)
            if rest is None:
                return affine_rows(injection.split(y), pieces).reshape(y.shape)
        if columns is None:
            return delta.after(x, injection.split(y)).reshape(y.shape)
        part = y[..., columns]
        whole = y.clone()
        whole[..., columns] = delta.after(x, injection.split(part)).reshape(part.shape)
        return whole

    if overrides(delta, "before"):
        injection.undo.append(site.module.register_forward_pre_hook(pre).remove)
    if overrides(delta, "after"):
        injection.undo.append(site.module.register_forward_hook(post).remove)


def _within_reach(site: Site) -> bool:
    """Whether the site's map can be computed here: all of a plain frozen module whose forward nobody has changed."""
    module: Any = site.module
    kept = isinstance(module, QuantizedLinear) and module.merged_weight is None
    plain = is_plain_linear(module) and not module.weight.requires_grad
    return site.columns is None and (kept or plain) and "forward" not in module.__dict__


class _Together:
    """Frozen maps with low-rank deltas that share their input: the first one called computes all of them.

    The others find their output waiting, if they are called with the very same tensor; else all is computed again.
    """

    def __init__(self, injection: Injection) -> None:
        self.injection = injection
        self.sites: list[Site] = []
        self.deltas: list[LowRankDelta] = []
        self.input: Tensor | None = None
        self.waiting: dict[int, Tensor] = {}

    def add(self, site: Site, delta: LowRankDelta) -> None:
        """Take one map over: its module's forward is this group's from now on."""
        index = len(self.sites)
        self.sites.append(site)
        self.deltas.append(delta)
        module = site.module
        original = module.forward

        def forward(x: Tensor) -> Tensor:
            if not self.injection.active:
                return cast(Tensor, original(x))
            if self.possible(x):
                return self.output(index, x)
            y = cast(Tensor, original(x))
            return delta.after(self.injection.split(x), self.injection.split(y)).reshape(y.shape)

        module.forward = forward  # type: ignore[method-assign]
        self.injection.undo.append(lambda: module.__dict__.pop("forward", None))

    def possible(self, x: Tensor) -> bool:
        """Whether the maps can be computed together with their deltas now."""
        if autocasts(x):
            return False
        return not any(delta.dropout.acts for delta in self.deltas)

    def output(self, index: int, x: Tensor) -> Tensor:
        """Return the output of map `index` for the input `x`."""
        waiting = self.waiting.pop(index, None) if self.input is x else None
        if waiting is not None:
            if not self.waiting:
                self.input = None
            return waiting
        outputs = self.compute(x)
        if len(outputs) > 1:
            self.input, self.waiting = x, {i: y for i, y in enumerate(outputs) if i != index}
        return outputs[index]

    def compute(self, x: Tensor) -> list[Tensor]:
        """Return the outputs of all maps for the input `x`."""
        factors = [delta.factors(x.dtype) for delta in self.deltas]
        outputs = low_rank_linear(
            self.injection.split(x),
            [_frozen(site.module, f.keep_output) for site, f in zip(self.sites, factors, strict=True)],
            [f.a for f in factors],
            [f.b for f in factors],
            factors[0].scale,
            [f.inner for f in factors if f.inner is not None],
            [f.gain for f in factors if f.gain is not None],
            factors[0].alpha,
        )
        return [y.reshape(*x.shape[:-1], y.shape[-1]) for y in outputs]


def _in_pieces(injection: Injection, site: Site, delta: MixedLinear) -> None:
    """Compute a frozen map together with what several methods add to it, as far as they can name that."""
    module = site.module
    original = module.forward

    def forward(x: Tensor) -> Tensor:
        if not injection.active:
            return cast(Tensor, original(x))
        flat = injection.split(x)
        if autocasts(x) or torch.compiler.is_compiling():
            flat = delta.before(flat)
            y = delta.after(flat, injection.split(cast(Tensor, original(flat.reshape(x.shape)))))
        else:
            pieces, rest = delta.named(x.dtype)
            flat = flat if rest is None else rest.before(flat)
            y = piecewise_linear(flat, _frozen(module), pieces)
            y = y if rest is None else rest.after(flat, y)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    module.forward = forward  # type: ignore[method-assign]
    injection.undo.append(lambda: module.__dict__.pop("forward", None))


def _frozen(module: Any, keep: bool = True) -> Frozen:
    if isinstance(module, QuantizedLinear):
        parts, kind = module.frozen_parts()
        return Frozen(parts, kind, module.bias, keep)
    return Frozen((module.weight,), DENSE if isinstance(module, nn.Linear) else TRANSPOSED, module.bias, keep)


def _hidden(injection: Injection, site: Site, delta: HiddenDelta) -> None:
    seen: dict[str, Tensor] = {}

    def remember(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen["inputs"] = first_input(args, kwargs)

    def post(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not injection.active:
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        changed = delta(injection.split(seen.pop("inputs")), injection.split(hidden)).reshape(hidden.shape)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    assert site.source is not None
    injection.undo.append(site.source.register_forward_pre_hook(remember, with_kwargs=True).remove)
    injection.undo.append(site.module.register_forward_hook(post).remove)


def _norm(injection: Injection, site: Site, delta: NormDelta) -> None:
    module = site.module
    original = module.forward
    pieces = delta.pieces if isinstance(delta, MixedNorm) else [(injection.runs, delta)]

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not injection.active:
            return cast(Tensor, original(x, *args, **kwargs))
        if len(pieces) == 1:
            return _affine(site, delta, injection.split(x)).reshape(x.shape)
        rows = x.shape[0] // injection.split(x).shape[0]
        parts = zip(pieces, x.split([count * rows for count, _ in pieces]), strict=True)
        return torch.cat(
            [
                original(part, *args, **kwargs)
                if own is None
                else _affine(site, cast(NormDelta, own), part.reshape(count, -1, part.shape[-1])).reshape(part.shape)
                for (count, own), part in parts
            ]
        )

    module.forward = forward  # type: ignore[method-assign]
    injection.undo.append(lambda: module.__dict__.pop("forward", None))


def _affine(site: Site, delta: NormDelta, flat: Tensor) -> Tensor:
    """Normalise [R, N, D] and apply the runs' own affine parameters, or the frozen ones where they have none."""
    module = site.module
    weight: Tensor | None = getattr(delta, "weight", None)
    bias: Tensor | None = getattr(delta, "bias", None)
    weight = cast(Tensor, module.weight).unsqueeze(0) if weight is None else weight
    if bias is None and getattr(module, "bias", None) is not None:
        bias = cast(Tensor, module.bias).unsqueeze(0)
    y = normalize(module, flat.float()) * (weight.float() + site.offset).unsqueeze(1)
    if bias is not None:
        y = y + bias.float().unsqueeze(1)
    return y.to(flat.dtype)


def normalize(module: nn.Module, x: Tensor) -> Tensor:
    """Normalise x [..., D] as `module` does (LayerNorm or RMS norm), without its affine part."""
    if isinstance(module, nn.LayerNorm):
        return nn.functional.layer_norm(x, module.normalized_shape, None, None, module.eps)
    epsilon = next((getattr(module, n) for n in ("variance_epsilon", "eps", "epsilon") if hasattr(module, n)), None)
    if epsilon is None:
        raise UserError(
            f"normalisation {type(module).__name__} is not known: neither LayerNorm nor an RMS norm with eps"
        )
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon)


def _embedding(injection: Injection, site: EmbeddingSite, delta: EmbeddingDelta) -> None:
    """Prepend P virtual tokens where ids become embeddings; cut them off where the sequence leaves.

    With a key-value cache that already holds the virtual tokens (generation after its first step) only mask and
    positions grow.
    """
    takes_positions = "position_ids" in inspect.signature(type(site.input_module).forward).parameters

    def enter(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if not injection.active:
            return args, kwargs
        kwargs = dict(kwargs)
        if args:
            kwargs["input_ids"] = args[0]
        if len(args) > 1:
            kwargs["attention_mask"] = args[1]
        prompt = delta.prompt()
        length = prompt.shape[-2]
        embeddings = kwargs.get("inputs_embeds")
        if embeddings is None:
            embeddings = site.module(kwargs.pop("input_ids"))
        kwargs.pop("input_ids", None)
        rows, tokens, _ = embeddings.shape
        past = kwargs.get("past_key_values")
        cached = past.get_seq_length() if past is not None and hasattr(past, "get_seq_length") else 0
        mask = kwargs.get("attention_mask")
        if mask is None:
            mask = embeddings.new_ones((rows, max(cached - length, 0) + tokens), dtype=torch.long)
        kwargs["attention_mask"] = torch.cat([mask.new_ones((rows, length)), mask], dim=1)
        positions = kwargs.get("position_ids")
        if cached == 0:
            room = site.max_positions
            if room is not None and length + tokens > room:
                raise UserError(f"a prompt of {length} and {tokens} tokens exceed the model's {room} positions")
            front = prompt.to(embeddings.dtype)
            front = front.flatten(0, 1) if front.dim() == 4 else front.repeat_interleave(rows // injection.runs, dim=0)
            embeddings = torch.cat([front, embeddings], dim=1)
            if kwargs.get("token_type_ids") is not None:
                types = kwargs["token_type_ids"]
                kwargs["token_type_ids"] = torch.cat([types.new_zeros((rows, length)), types], dim=1)
            if positions is not None and takes_positions:
                own = torch.arange(length, device=positions.device).expand(positions.shape[0], -1)
                kwargs["position_ids"] = torch.cat([own, positions + length], dim=1)
        elif positions is not None:
            kwargs["position_ids"] = positions + length
        kwargs.pop("cache_position", None)
        kwargs["inputs_embeds"] = embeddings
        latest["cut"] = length if cached == 0 else 0
        return (), kwargs

    latest: dict[str, int] = {"cut": 0}

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        cut = latest["cut"]
        if not injection.active or not cut:
            return None
        if isinstance(output, Tensor):
            return output[:, cut:]
        if isinstance(output, tuple):
            return (output[0][:, cut:], *output[1:])
        output.last_hidden_state = output.last_hidden_state[:, cut:]
        if getattr(output, "hidden_states", None) is not None:
            output.hidden_states = tuple(h[:, cut:] for h in output.hidden_states)
        return output

    def widen(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        mask = kwargs.get("encoder_attention_mask")
        if injection.active and mask is not None:
            length = delta.prompt().shape[-2]
            kwargs = {**kwargs, "encoder_attention_mask": torch.cat([mask.new_ones((len(mask), length)), mask], dim=1)}
        return args, kwargs

    injection.undo.append(site.input_module.register_forward_pre_hook(enter, with_kwargs=True).remove)
    if site.decoder_module is not None:
        # An encoder's virtual tokens stay in the sequence that the decoder attends to.
        injection.undo.append(site.decoder_module.register_forward_pre_hook(widen, with_kwargs=True).remove)
    else:
        injection.undo.append(site.output_module.register_forward_hook(leave).remove)


def _attention(injection: Injection, site: Site, delta: AttentionDelta) -> None:
    waiting = [False]

    def prefixed(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, int]:
        waiting[0] = False
        if not injection.active:
            return key, value, 0
        rows = key.shape[0]
        front_key, front_value = delta.prefix()
        length = front_key.shape[1]

        def widen(front: Tensor, own: Tensor) -> Tensor:
            front = front.to(own.dtype).transpose(1, 2).repeat_interleave(rows // injection.runs, dim=0)
            return torch.cat([front, own], dim=2)

        return widen(front_key, key), widen(front_value, value), length

    def begin(*_: Any) -> None:
        waiting[0] = True

    def end(*_: Any) -> None:
        if waiting[0] and injection.active:
            raise UserError(f"{site.name} never called its prefix: this attention does not use the interface")

    site.module.__dict__[attention.PREFIX] = prefixed
    injection.undo.append(lambda: site.module.__dict__.pop(attention.PREFIX, None))
    injection.undo.append(site.module.register_forward_pre_hook(begin).remove)
    injection.undo.append(site.module.register_forward_hook(end).remove)
    config: Any = site.module.config
    before = attention.use(config)
    injection.undo.append(lambda: setattr(config, "_attn_implementation", before))
