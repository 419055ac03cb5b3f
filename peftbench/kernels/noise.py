"""Each run's own stream of dropout, the same beside whomever it trains.

While a step is made, `torch.nn.functional.dropout` asks a hash (`kernels.dropout`) instead of PyTorch's generator: of
the run's seed and step, and of how many times dropout was asked for before within the step. All runs of a pack take
the same way through the base, so that number is theirs alone too; adapters, whose ways differ, count for themselves.

Attention draws from the same streams: on a CPU with all scores held, on a GPU in the kernels for short sequences
(`kernels.attention`) and in those for all others (`kernels.long_attention`). In compiled code dropout and attention are
operations that are taken whole; each is given its number by one that asks for it when the code runs, so that one
compilation serves all layers, and masks are those of eager steps.

Left to PyTorch's generator are dropout in place, of all or of none, and tensors whose first axis the runs do not share
evenly. No mapped model has these.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._guards import TracingContext
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from peftbench.kernels.attention import fits, short_attention
from peftbench.kernels.backend import kernel_shapes, use_triton
from peftbench.kernels.dropout import SITES, drawn_dropout, drawn_mask, kept, run_dropout
from peftbench.kernels.long_attention import AUTOCASTS, drawn_attention, long_attention

STRIDE = 0x9E3779B97F4A7C15 - 2**64
"""What a step adds to a seed: odd, so that 2⁶⁴ steps pass before one comes again."""
BASE = 0
"""Who asks for dropout: the base and the head, or (from 1 on) a part of an adapter."""

F = nn.functional
_plain_dropout = F.dropout
_plain_attention = F.scaled_dot_product_attention
_active: Noise | None = None
"""Whose streams are drawn from: of one pack at a time, and by autograd's threads too."""


class Noise:
    """The streams of a pack's runs.

    Attributes:
        seeds: what the hash is asked for at this step, int64 [R].
    """

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self._first = [int(np.random.default_rng([seed, STREAM]).integers(2**63)) for seed in seeds]
        self.seeds = torch.tensor(self._first, dtype=torch.int64, device=device)
        self._asked: Counter[tuple[int, int]] = Counter()
        self._part = 0
        self._last = torch.zeros(2, dtype=torch.int64)
        self._drawn: dict[int, int] = {}

    @property
    def runs(self) -> int:
        """Return R."""
        return len(self._first)

    def divides(self, rows: Tensor) -> bool:
        """Return whether a tensor's first axis can be that of the runs' rows."""
        return rows.dim() > 0 and rows.shape[0] % self.runs == 0

    def begin(self, done: Sequence[int]) -> None:
        """Go to where each run is that has made `done` steps."""
        at = [(first + steps * STRIDE + 2**63) % 2**64 - 2**63 for first, steps in zip(self._first, done, strict=True)]
        self.seeds.copy_(torch.tensor(at, dtype=torch.int64))

    def advance(self) -> None:
        """Go on to the next step; on the device, so that a replayed step goes on too."""
        self.seeds.add_(STRIDE)

    @contextmanager
    def drawing(self, part: int = 0) -> Iterator[None]:
        """Let dropout draw from these streams: for one forward and backward pass, the `part`-th of a step."""
        global _active
        assert _active is None, "a step within a step"
        before = F.dropout, F.scaled_dot_product_attention
        _active, self._part = self, part
        self._asked.clear()
        self._last = torch.zeros(2, dtype=torch.int64)
        self._drawn.clear()
        # where shapes alone are traced another dropout stands there; ours is what runs
        F.dropout, F.scaled_dot_product_attention = _dropout, _attention_over(before[1])
        try:
            yield
        finally:
            F.dropout, F.scaled_dot_product_attention = before
            _active = None

    def site(self, who: int = BASE, first: int = 0) -> int:
        """Return a number for this call of dropout, another for each that the same runs, from `first` on, make."""
        self._asked[who, first] += 1
        mixed = (self._part * 0x9E3779B1 + who * 0x85EBCA6B + self._asked[who, first] * 0xC2B2AE35) % 2**32
        return (mixed ^ mixed >> 15) % SITES

    def site_when_run(self, who: int = BASE, first: int = 0) -> Tensor:
        """Return `site` for code that is compiled: a tensor on the CPU, found out whenever the code runs.

        Each waits for the one before, so that a compiler keeps them in order.
        """
        self._last = site_op(self._last, who, first)
        return self._last

    def drawn(self, number: int, who: int, first: int) -> int:
        """Return `site` for the step's call of that number, once more the same where a compiler makes it again."""
        if number not in self._drawn:
            self._drawn[number] = self.site(who, first)
        return self._drawn[number]

    @contextmanager
    def _again(self, asked: Counter[tuple[int, int]]) -> Iterator[None]:
        """Go through a part of the forward pass once more, in whose beginning so much had been asked for."""
        before, self._asked = self._asked, asked.copy()
        try:
            yield
        finally:
            self._asked = before


@torch.library.custom_op("peftbench::site", mutates_args=())
def site_op(before: Tensor, who: int, first: int) -> Tensor:
    """Return `Noise.site` of the step that is being made and which call of the step it is, int64 [2].

    Args:
        before: what the call before returned; zeros for the first.
    """
    noise = active()
    assert noise is not None, "traced within a step, but run outside"
    number = int(before[1]) + 1
    return torch.tensor([noise.drawn(number, who, first), number], dtype=torch.int64)


@site_op.register_fake
def _(before, who, first):  # type: ignore[no-untyped-def]
    return before.new_empty(2)


STREAM = 0x64726F70
"""Keeps these streams apart from what else a run's seed draws."""


def active() -> Noise | None:
    """Return the streams of the step that is being made, if there are any."""
    return _active


def checkpoint_contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Return the contexts of a checkpointed part's forward pass, and of its repetition: that draws the same."""
    if TracingContext.try_get() is not None:
        # a compiler asks, which makes again what it will; draws are remembered then (`Noise.drawn`)
        forward, again = create_selective_checkpoint_contexts([])
        return forward, again
    if _active is None:
        return nullcontext(), nullcontext()
    return nullcontext(), _active._again(_active._asked.copy())


def adapter_dropout(x: Tensor, rates: Sequence[float], who: int, first: int) -> Tensor | None:
    """Drop from x [R', ...] of the runs from `first` on, each at its rate; None: no step is being made.

    Args:
        who: the part of the adapter that asks, from 1 on.
    """
    noise = active()
    if noise is None:
        return None
    seeds = noise.seeds[first : first + len(rates)]
    if torch.compiler.is_compiling():
        return drawn_dropout(x, seeds, noise.site_when_run(who, first), rates)
    return run_dropout(x, seeds, noise.site(who, first), rates)


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    noise = active() if training and 0 < p < 1 and not inplace else None
    if noise is None or not noise.divides(input):
        return _plain_dropout(input, p, training, inplace)
    if torch.compiler.is_compiling():
        return drawn_dropout(input, noise.seeds, noise.site_when_run(), [p] * noise.runs)
    return run_dropout(input, noise.seeds, noise.site(), [p] * noise.runs)


def _drawing_over(plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return attention that draws from the streams, and leaves to `plain` what drops nothing."""

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        drops = 0 < dropout_p < 1 and query.dim() == 4
        noise = active() if drops else None
        if noise is None or not noise.divides(query):
            how: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
            return plain(query, key, value, attn_mask, dropout_p, is_causal, **how)
        scale = query.shape[3] ** -0.5 if scale is None else scale
        return _attention(noise, query, key, value, attn_mask, dropout_p, is_causal, scale)

    return attention


_drawing_attention = _drawing_over(_plain_attention)
"""One function for all steps: layers are compiled for the one that they were traced with."""


def _attention_over(plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return _drawing_attention if plain is _plain_attention else _drawing_over(plain)


def _attention(
    noise: Noise, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, p: float, causal: bool, scale: float
) -> Tensor:
    device = query.device.type
    if device in AUTOCASTS and torch.is_autocast_enabled(device):
        # as PyTorch's own does
        dtype = torch.get_autocast_dtype(device)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    trains = mask is not None and mask.requires_grad and torch.is_grad_enabled()
    if torch.compiler.is_compiling():
        site = noise.site_when_run()
        if not trains:
            return drawn_attention(query, key, value, mask, noise.seeds, site, scale, p, causal)[0].transpose(1, 2)
        count = query.shape[:3].numel() * key.shape[2] // noise.runs
        mask_kept = drawn_mask(noise.seeds, site, count, [p] * noise.runs)
    else:
        if not causal and fits(query, key, value, mask, p):
            return short_attention(query, key, value, mask, scale, p, noise.seeds, noise.site())
        held = device == "cpu" and not (use_triton(query) or kernel_shapes(query))
        if not trains and not held:
            return long_attention(query, key, value, mask, noise.seeds, noise.site(), scale, p, causal)
        count = query.shape[:3].numel() * key.shape[2] // noise.runs
        mask_kept = kept(noise.seeds, noise.site(), count, [p] * noise.runs)
    shares = _shares(query, key, mask, causal, scale)
    return torch.matmul(shares * mask_kept.view(shares.shape), _repeated(value, query)).mul_(1 / (1 - p))


def _shares(query: Tensor, key: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """Return attention's softmax [rows, H, T, T'], as PyTorch makes it where all scores are held."""
    scores = torch.matmul(query * scale, _repeated(key, query).transpose(2, 3))
    if causal:
        mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(mask.logical_not(), -torch.inf) if mask.dtype == torch.bool else scores + mask
    # zeros where a query sees nothing
    return torch.ops.aten._safe_softmax(scores.float(), -1).to(query.dtype)


def _repeated(key: Tensor, query: Tensor) -> Tensor:
    """Return keys or values with as many heads as there are of queries."""
    times = query.shape[1] // key.shape[1]
    return key if times == 1 else key.repeat_interleave(times, dim=1)
