"""Cross-entropy of a linear output layer over a large vocabulary, without ever holding all logits.

    z_n = W h_n + b,    loss_n = log Σ_v exp z_nv - z_{n, y_n},    ∂loss_n/∂z_n = softmax(z_n) - onehot(y_n)

Rows go through in chunks. A chunk's logits become its gradient in place, in the forward pass, so that what stays for
the backward pass is as large as the hidden states and, where W trains, as W: neither grows with rows times vocabulary.
Computing the gradient beside the loss is the idea of Wijmans et al. 2024 (arXiv:2411.09009, section 4), which goes on
to keep even single logits in on-chip memory; here every product stays an ordinary matrix product.

With label smoothing ε the target is (1 - ε) onehot(y) + ε / V, and all that changes is linear in h:

    loss_n += ε d_n · h_n + ε (b_y - mean_v b_v),    ∂loss_n/∂h_n += ε d_n,    d_n = W_{y_n} - mean_v W_v

Logits and their gradient are kept in the dtype of the product (under autocast: autocast's); sums, exponentials and
losses are fp32. Shape letters: rows N, width D, vocabulary V, groups G.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from peftbench.kernels.backend import kernel_shapes, use_triton

IGNORED = -100
"""The label of a row without loss and gradient."""

CHUNK_BYTES = 2**28
"""Logits held at once, about: of this size products and the kernel are far longer than their launches."""

ROWS = 256
"""Chunks have a multiple of so many rows, and no fewer: below, matrix products leave a GPU idle."""

PITCH = 64
"""Rows of logits begin at multiples of so many elements, as fast matrix products ask; few vocabularies are such."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    groups: int | None = None,
    chunk: int | None = None,
    smoothing: Tensor | None = None,
) -> Tensor:
    """Return each row's loss [N], or with `groups` the sums [G] over G equal parts of the rows in order; in fp32.

    Gradients reach `hidden` and `weight`. They are computed in the forward pass, before anything is known of what the
    losses are multiplied with; so `weight` can only train where that is one number, `groups=1`. One backward pass is
    all that a forward pass allows.

    Args:
        hidden: [N, D].
        weight: [V, D].
        labels: [N], -100 where a row counts for nothing.
        bias: [V], frozen.
        groups: G; N is a multiple of it.
        chunk: rows at a time; by default about `CHUNK_BYTES` of logits.
        smoothing: each group's label smoothing [G]; None: none.

    Raises:
        ValueError: a weight that trains with `groups` other than 1, a bias that trains, rows that do not divide, or
            `smoothing` without groups.
    """
    if groups is not None and len(labels) % groups:
        raise ValueError(f"groups={groups}: expected a divisor of the {len(labels)} rows")
    if smoothing is not None and len(smoothing) != groups:
        raise ValueError(f"smoothing: expected one number for each of groups={groups}, not {len(smoothing)}")
    if not torch.is_grad_enabled():
        return _summed(_pass(hidden, weight, labels, bias, chunk, smoothing, False, False)[0], groups)
    if bias is not None and bias.requires_grad:
        raise ValueError("bias: expected one that does not train")
    if weight.requires_grad and groups != 1:
        raise ValueError(f"groups={groups}: expected 1 where the weight trains")
    result: Tensor = _LinearCrossEntropy.apply(hidden, weight, labels, bias, groups, chunk, smoothing)  # type: ignore[no-untyped-call]
    return result


def chunk_rows(rows: int, vocabulary: int, itemsize: int) -> int:
    """Return how many rows make chunks of about `CHUNK_BYTES` and of nearly the same size, a multiple of `ROWS`."""
    most = max(CHUNK_BYTES // (vocabulary * itemsize) // ROWS, 1) * ROWS
    chunks = max(-(-rows // most), 1)
    return max(-(-rows // (chunks * ROWS)), 1) * ROWS


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        bias: Tensor | None,
        groups: int | None,
        chunk: int | None,
        smoothing: Tensor | None,
    ) -> Tensor:
        wanted = ctx.needs_input_grad
        losses, *ctx.gradients = _pass(hidden, weight, labels, bias, chunk, smoothing, wanted[0], wanted[1])
        ctx.groups, ctx.dtypes = groups, (hidden.dtype, weight.dtype)
        return _summed(losses, groups)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("linear_cross_entropy: a second backward pass; its gradients are gone after the first")
        of_hidden, of_weight = ctx.gradients
        ctx.gradients = None
        if of_hidden is not None:
            rows = upstream if ctx.groups is None else upstream.repeat_interleave(len(of_hidden) // ctx.groups)
            # into the right dtype at once: the product of fp32 factors would be a larger tensor of its own
            out = torch.empty_like(of_hidden, dtype=ctx.dtypes[0])
            of_hidden = torch.mul(of_hidden, rows[:, None], out=out)
        if of_weight is not None:
            of_weight = of_weight.mul_(upstream[0]).to(ctx.dtypes[1])
        return of_hidden, of_weight, None, None, None, None, None


def _summed(losses: Tensor, groups: int | None) -> Tensor:
    return losses if groups is None else losses.view(groups, -1).sum(dim=1)


def _pass(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    chunk: int | None,
    smoothing: Tensor | None,
    hidden_trains: bool,
    weight_trains: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return losses [N] and, where wanted, the gradients of their sum: by `hidden` row by row, by `weight` in fp32."""
    kind = hidden.device.type
    known = torch.amp.is_autocast_available(kind)  # not to "meta"
    dtype = torch.get_autocast_dtype(kind) if known and torch.is_autocast_enabled(kind) else hidden.dtype
    (rows, width), vocabulary = hidden.shape, weight.shape[0]
    chunk = chunk or chunk_rows(rows, vocabulary, dtype.itemsize)
    labels = labels.contiguous()
    pitch = -(-vocabulary // PITCH) * PITCH
    losses = hidden.new_empty(rows, dtype=torch.float32)
    of_hidden = hidden.new_empty((rows, width), dtype=dtype) if hidden_trains else None
    of_weight = weight.new_zeros(weight.shape, dtype=torch.float32) if weight_trains else None
    buffer = hidden.new_empty((min(chunk, rows), pitch), dtype=dtype)
    buffer[:, vocabulary:] = 0  # some CPUs' product of halves multiplies what lies between rows with zero: no nan, then
    with torch.no_grad(), torch.autocast(kind, enabled=False) if known else nullcontext():
        matrix = weight.to(dtype)
        offset = None if bias is None else bias.to(dtype)
        smoothed = None if smoothing is None else _Smoothing(smoothing, weight, bias, labels)
        for start in range(0, rows, chunk):
            part = slice(start, min(start + chunk, rows))
            states = hidden[part].to(dtype)
            logits = buffer[: len(states), :vocabulary]
            if offset is None:
                torch.mm(states, matrix.t(), out=logits)
            else:
                torch.addmm(offset, states, matrix.t(), out=logits)
            softmax_loss_(logits, labels[part], losses[part], hidden_trains or weight_trains)
            if of_hidden is not None:
                torch.mm(logits, matrix, out=of_hidden[part])
            if of_weight is not None:
                _add_product_(of_weight, logits, states)
            if smoothed is not None:
                smoothed.add_(part, states, losses, of_hidden, of_weight)
    return losses, of_hidden, of_weight


def _add_product_(total: Tensor, gradient: Tensor, states: Tensor) -> None:
    """Add gradientᵀ states, [V, n] times [n, D], to the fp32 `total` [V, D]."""
    if states.dtype == total.dtype:
        # not `addmm_`, which counters of operations do not know
        torch.addmm(total, gradient.t(), states, out=total)
        return
    # a product of halves is rounded to halves before it is added; in blocks, so that it stays small
    block = max(CHUNK_BYTES // 4 // (states.shape[1] * states.element_size()), 1)
    for start in range(0, len(total), block):
        total[start : start + block] += gradient[:, start : start + block].t() @ states


class _Smoothing:
    """What label smoothing adds, chunk by chunk: to losses [N] and to the gradients by hidden states and weight."""

    def __init__(self, smoothing: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> None:
        self._weight, self._bias = weight, bias
        self._mean = weight.mean(dim=0, dtype=torch.float32)
        self._counts = labels != IGNORED
        self._chosen = labels.where(self._counts, 0)
        self._rates = smoothing.float().repeat_interleave(len(labels) // len(smoothing)).where(self._counts, 0)

    def add_(
        self, part: slice, states: Tensor, losses: Tensor, of_hidden: Tensor | None, of_weight: Tensor | None
    ) -> None:
        """Add to the rows in `part`, whose hidden states are `states` [n, D]."""
        chosen, rates = self._chosen[part], self._rates[part, None]
        states = states.float().where(self._counts[part, None], 0)  # what is ignored may hold anything
        rise = rates * (self._weight[chosen].float() - self._mean)
        losses[part] += (states * rise).sum(dim=1)
        if self._bias is not None:
            losses[part] += self._rates[part] * (self._bias[chosen].float() - self._bias.float().mean())
        if of_hidden is not None:
            of_hidden[part] += rise
        if of_weight is not None:
            states = rates * states
            of_weight.index_add_(0, chosen, states)
            of_weight -= states.sum(dim=0) / len(of_weight)


def softmax_loss_(logits: Tensor, labels: Tensor, losses: Tensor, gradient: bool) -> None:
    """Write the losses of `logits` [n, V] into `losses` [n] fp32 and, with `gradient`, theirs by the logits over these.

    The logits are used up in any case. Their rows lie a multiple of `PITCH` elements apart; so is what lies between.
    """
    if use_triton(logits):
        from peftbench.kernels import cross_entropy_triton

        cross_entropy_triton.softmax_loss_(logits, labels, losses, gradient, IGNORED)
    elif not kernel_shapes(logits):  # the kernel allocates nothing
        reference_softmax_loss_(logits, labels, losses, gradient)


def reference_softmax_loss_(logits: Tensor, labels: Tensor, losses: Tensor, gradient: bool) -> None:
    """`softmax_loss_` in plain PyTorch: its formula, and what runs where there is no Triton."""
    counts = labels != IGNORED
    chosen = labels.where(counts, 0)[:, None]
    # a copy only where the logits are not fp32
    scores = logits.float()
    scores.sub_(scores.amax(1, keepdim=True))
    own = scores.gather(1, chosen)
    total = scores.exp_().sum(1, keepdim=True)
    losses.copy_((total.log() - own)[:, 0].where(counts, 0))
    if gradient:
        scores.div_(total).scatter_add_(1, chosen, -torch.ones_like(total))
        logits.copy_(scores.masked_fill_(~counts[:, None], 0))
