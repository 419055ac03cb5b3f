"""Dropout (Srivastava et al. 2014) whose masks are a hash: of a run's seed, a site of the model, and a place in it.

A generator hands out numbers in the order in which they are asked for, and so a run's masks would depend on who trains
beside it. A hash knows no order: the mask of run i at a site is the same function of the run's seed wherever the run
is, packed or alone, on any device, in eager steps or replayed, and can be made again in the backward pass instead of
being kept. It also takes less time than a generator, by a half and more.

Numbers are of 32 bits, and a place is kept where its number, as a signed one, is no less than the threshold of p.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peftbench.kernels.backend import constant, kernel_shapes, use_triton

BLOCK = 2048
"""Elements a program of the kernel drops from."""
FIRST, SECOND = 0x7FEB352D, 0x846CA68B
WORD = 2**32 - 1
SITES = 2**31
"""Sites are numbers below this."""


def threshold(p: float) -> int:
    """Return the number below which a draw from all numbers of 32 bits, taken as signed, drops."""
    return min(round(p * 2**32), 2**32 - 1) - 2**31


def run_dropout(x: Tensor, seeds: Tensor, site: int, rates: Sequence[float]) -> Tensor:
    """Drop entries of x, the rows of R runs one after another, and scale up the rest: run i at rate p_i.

    Args:
        x: [R·B, ...] or [R, B, ...].
        seeds: int64 [R], on x's device.
        site: tells calls with the same seed apart, below `SITES`.
        rates: R rates, 0 ≤ p_i < 1.
    """
    out: Tensor = _RunDropout.apply(x, seeds, site, tuple(rates))
    return out


def kept(seeds: Tensor, site: int, count: int, rates: Sequence[float]) -> Tensor:
    """Return which of each run's `count` entries are kept, [R, count], in plain PyTorch."""
    start, key = placed(seeds, site)
    # one number for all runs is no tensor, which a trace of shapes would count where it is first made
    least = _numbers(tuple(rates), seeds.device)[0][:, None] if len(set(rates)) > 1 else threshold(rates[0])
    return hashed(start, key, count) >= least


def hashed(start: Tensor, key: Tensor, count: int) -> Tensor:
    """Return the numbers int32 [lines, count] of places that follow one another on each of several lines.

    They are numbered modulo 2³².

    Args:
        start, key: int32 [lines], of `placed`; a line that begins at another place than its run has that added to
            its start.
    """
    # arithmetic modulo 2³², in place: this is as long as the activations
    most = torch.int32 if count <= 2**31 else torch.int64
    x = torch.arange(count, dtype=most, device=start.device).to(torch.int32) + start[:, None]
    x.mul_(FIRST).add_(key[:, None])
    upper = x >> 15
    x.bitwise_xor_(upper.bitwise_and_(2**17 - 1))
    return x.mul_(SECOND - 2**32)


def placed(seeds: Tensor, site: int) -> tuple[Tensor, Tensor]:
    """Return where each seed's numbers begin, and their key, int32 [R]."""
    start = _scrambled(seeds & WORD, seeds >> 32 & WORD)
    start = _scrambled(start ^ start >> 16, site)
    key = _scrambled(start ^ start >> 16, 1)
    return signed(start), signed(key)


def _scrambled(x: Tensor, key: Tensor | int) -> Tensor:
    """Return the hash of numbers of 32 bits held in int64; products wrap."""
    x = x * FIRST + key & WORD
    x = x ^ x >> 15
    return x * SECOND & WORD


def signed(x: Tensor) -> Tensor:
    """Return numbers of 32 bits held in int64 as int32, modulo 2³²."""
    return (((x & WORD) ^ 2**31) - 2**31).to(torch.int32)


@constant
def _numbers(rates: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return rates' thresholds, int32 [R], and 1 / (1 − p), fp32 [R]."""
    thresholds = torch.tensor([threshold(p) for p in rates], dtype=torch.int32, device=device)
    return thresholds, torch.tensor([1 / (1 - p) for p in rates], dtype=torch.float32, device=device)


class _RunDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, seeds: Tensor, site: int, rates: tuple[float, ...]) -> Tensor:  # type: ignore[override]
        ctx.numbers = site, rates
        if use_triton(x) or kernel_shapes(x):
            ctx.save_for_backward(seeds)
            return _dropped(x, seeds, site, rates)
        mask = kept(seeds, site, x.numel() // len(rates), rates)
        ctx.save_for_backward(mask)
        return _times(x, mask, rates)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        (saved,) = ctx.saved_tensors
        site, rates = ctx.numbers
        if saved.dtype == torch.bool:
            return _times(gradient, saved, rates), None, None, None
        return _dropped(gradient, saved, site, rates), None, None, None


# Operations that a compiler takes whole. Their site stands first in a tensor on the CPU, made while the step runs.


@torch.library.custom_op("peftbench::drawn_dropout", mutates_args=())
def drawn_dropout(x: Tensor, seeds: Tensor, site: Tensor, rates: Sequence[float]) -> Tensor:
    """Return `run_dropout`'s result."""
    x, given = x.contiguous(), tuple(rates)
    if use_triton(x):
        return _dropped(x, seeds, int(site[0]), given)
    return _times(x, kept(seeds, int(site[0]), x.numel() // len(given), given), given)


@drawn_dropout.register_fake
def _(x, seeds, site, rates):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)


def _keep_drawn(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, seeds, site, ctx.rates = inputs
    ctx.save_for_backward(seeds, site)


def _drawn_gradient(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    # it is linear, and its own transpose
    return drawn_dropout(gradient, *ctx.saved_tensors, ctx.rates), None, None, None


drawn_dropout.register_autograd(_drawn_gradient, setup_context=_keep_drawn)


@torch.library.custom_op("peftbench::drawn_mask", mutates_args=())
def drawn_mask(seeds: Tensor, site: Tensor, count: int, rates: Sequence[float]) -> Tensor:
    """Return `kept`'s result."""
    return kept(seeds, int(site[0]), count, rates)


@drawn_mask.register_fake
def _(seeds, site, count, rates):  # type: ignore[no-untyped-def]
    return seeds.new_empty((len(rates), count), dtype=torch.bool)


def _times(x: Tensor, mask: Tensor, rates: tuple[float, ...]) -> Tensor:
    """Return x where `mask` [R, any] keeps it, scaled up."""
    out = x.reshape(mask.shape) * mask
    if len(set(rates)) == 1:
        out.mul_(1 / (1 - rates[0]))
    else:
        out.mul_(_numbers(rates, x.device)[1][:, None])
    return out.view(x.shape)


def _dropped(x: Tensor, seeds: Tensor, site: int, rates: tuple[float, ...]) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    if kernel_shapes(x):
        return out
    from peftbench.kernels.dropout_triton import dropout

    count, by_run = x.numel() // len(rates), len(set(rates)) > 1
    thresholds, scales = _numbers(rates, x.device) if by_run else (seeds, seeds)
    with torch.cuda.device_of(x):
        dropout[(-(-count // BLOCK), len(rates))](
            x, seeds, out, thresholds, scales, site, count, threshold(rates[0]), 1 / (1 - rates[0]),
            by_run=by_run, block=BLOCK, num_warps=4,
        )  # fmt: skip
    return out
