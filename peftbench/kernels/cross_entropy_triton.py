"""The Triton kernel of `cross_entropy.softmax_loss_`: one program a row, which reads it once for the loss.

Maximum and sum go along together (Milakov and Gimelshein 2018, arXiv:1805.02867, algorithm 3); a second pass turns
logits into their gradient in place. It walks back from the end of the row, which was read last and is in the cache.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 8192
"""Logits that a program holds at once."""

WARPS = 16


@triton.jit
def _softmax_loss(  # type: ignore[no-untyped-def]
    logits, labels, losses, pitch, vocabulary, gradient: tl.constexpr, ignored: tl.constexpr, block: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    scores = logits + row * pitch
    lanes = tl.arange(0, block)
    # loads and stores run to the pitch, whose alignment is known, and not to the vocabulary's odd end
    if label == ignored:
        tl.store(losses + row, 0.0)
        if gradient:
            for start in range(0, pitch, block):
                place = start + lanes
                tl.store(scores + place, tl.zeros([block], tl.float32), mask=place < pitch)
    else:
        # A label outside of the vocabulary makes the loss nan, and reads nothing that is not there. Read here, because
        # the reductions below make all threads wait before any of them writes.
        known = (label >= 0) & (label < vocabulary)
        own = tl.load(scores + label, mask=known, other=float("nan")).to(tl.float32)
        # finite, so that a block of minus infinities leaves no nan
        top = tl.full([], -3.0e38, tl.float32)
        sums = tl.zeros([block], tl.float32)
        for start in range(0, pitch, block):
            place = start + lanes
            x = tl.load(scores + place, mask=place < pitch, other=0.0).to(tl.float32)
            x = tl.where(place < vocabulary, x, float("-inf"))
            higher = tl.maximum(top, tl.max(x, 0))
            sums = sums * tl.exp(top - higher) + tl.exp(x - higher)
            top = higher
        total = tl.sum(sums, 0)
        tl.store(losses + row, tl.log(total) - (own - top))
        if gradient:
            scale = 1.0 / total
            blocks = tl.cdiv(pitch, block)
            for i in range(0, blocks):
                place = (blocks - 1 - i) * block + lanes
                x = tl.load(scores + place, mask=place < pitch, other=0.0).to(tl.float32)
                x = tl.where(place < vocabulary, x, float("-inf"))
                x = tl.exp(x - top) * scale - tl.where(place == label, 1.0, 0.0)
                tl.store(scores + place, x, mask=place < pitch)


def softmax_loss_(logits: Tensor, labels: Tensor, losses: Tensor, gradient: bool, ignored: int) -> None:
    """See `peftbench.kernels.cross_entropy.softmax_loss_`; `ignored` is the label of rows that count for nothing."""
    rows, vocabulary = logits.shape
    pitch = logits.stride(0)
    block = min(BLOCK, triton.next_power_of_2(pitch))
    with torch.cuda.device(logits.device) if logits.is_cuda else nullcontext():
        _softmax_loss[(rows,)](
            logits,
            labels,
            losses,
            pitch,
            vocabulary,
            gradient=gradient,
            ignored=ignored,
            block=block,
            num_warps=min(WARPS, max(block // 512, 1)),
        )
