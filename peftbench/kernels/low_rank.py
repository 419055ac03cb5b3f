"""Frozen maps that share an input, each with a low-rank product beside it: one operation forward, one backward.

    y_i = g_i ⊙ (x W_iᵀ + s · (x a_i ⊙ d_i) b_i) + bias_i        i: the maps; d_i and g_i are 1 unless given

    u = x (s · [a_1 … a_n]),   y_i = u_i b_i,   y_i += x W_iᵀ
    ∂u_i = ∂y_i b_iᵀ,   ∂b_i = u_iᵀ ∂y_i,   ∂x = ∂u [a_1 … a_n]ᵀ,   ∂x += Σ ∂y_i W_i,   ∂a = s · xᵀ ∂u

The small product is made first and the frozen one added to it in place: a matrix product reads what it adds to while it
computes, an addition afterwards would be a pass of its own over [N, D_out]; the sum is also rounded once, not twice.
The input is saved once for all maps (not at all where no a_i trains), the outputs only where a gain needs them, and
the frozen weights never: a weight kept in 4 bits is made again for the backward pass.

A gain (DoRA's magnitude over norm) is folded into rows of the weight and columns of b, for one run: they are smaller
than the output. For several runs it scales the output, and so it does when compiled, where a compiler puts that into
what reads the output anyway. Its gradient is Σ_n ∂y ⊙ (y − bias) / g. Where nobody else keeps y, `keep=False` makes it
again.

Shapes: runs R, rows N a run, x [R, N, D_in], a_i [R, D_in, r], b_i [R, r, D_out], W_i [D_out, D_in],
d_i [R, r], g_i [R, D_out].
Under `torch.compile` each direction is one opaque operation: nothing inside could be fused with its surroundings, and a
partitioner that sees the parts would keep more of them than it should.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftbench.kernels.column_dot import column_dot, product_and_dot
from peftbench.kernels.weight_rows import scaled_rows

DENSE, TRANSPOSED = "dense", "transposed"

Unpack = Callable[[list[Tensor], str, torch.dtype], Tensor]
UNPACK: dict[str, Unpack] = {}
"""How a weight kept otherwise becomes dense [D_out, D_in], by the first word of its kind."""


@dataclass(frozen=True)
class Frozen:
    """A frozen map: the tensors of its weight, what they are (`DENSE`, `TRANSPOSED`, or of `UNPACK`), its bias."""

    parts: tuple[Tensor, ...]
    kind: str
    bias: Tensor | None
    keep: bool = True
    """Save the output where the backward pass needs it, or make it again."""


def weight_of(parts: list[Tensor], kind: str, dtype: torch.dtype) -> Tensor:
    """Return a frozen weight [D_out, D_in]."""
    if kind == DENSE:
        return parts[0].to(dtype)
    if kind == TRANSPOSED:
        return parts[0].t().to(dtype)
    return UNPACK[kind.partition(" ")[0]](parts, kind, dtype)


def reference(
    x: Tensor,
    frozen: Sequence[Frozen],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scale: Tensor | None = None,
    inner: Sequence[Tensor] = (),
    gains: Sequence[Tensor] = (),
) -> list[Tensor]:
    """Return the outputs [R, N, D_out] by the formula, one pass for each term."""
    outputs = []
    for i, f in enumerate(frozen):
        u = x @ a[i].to(x.dtype)
        low = (u * inner[i].to(x.dtype).unsqueeze(1) if inner else u) @ b[i].to(x.dtype)
        y = x @ weight_of(list(f.parts), f.kind, x.dtype).t() + (low if scale is None else scale.to(x.dtype) * low)
        y = y * gains[i].to(x.dtype).unsqueeze(1) if gains else y
        outputs.append(y if f.bias is None else y + f.bias.to(x.dtype))
    return outputs


def low_rank_linear(
    x: Tensor,
    frozen: Sequence[Frozen],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scale: Tensor | None = None,
    inner: Sequence[Tensor] = (),
    gains: Sequence[Tensor] = (),
    alpha: float | None = None,
) -> tuple[Tensor, ...]:
    """Return the outputs [R, N, D_out] of maps that share `x`; differentiable in x, a, b, inner and gains.

    Args:
        x: [R, N, D_in] in the dtype to compute with.
        a, b: factors in any dtype, [R, D_in, r] and [R, r, D_out].
        scale: [R, 1, 1], constant.
        inner: none, or [R, r] for every map.
        gains: none, or [R, D_out] for every map.
        alpha: the value of `scale` on the host, where all runs have the same: the products then scale by themselves.
    """
    assert all(len(given) in (0, len(frozen)) for given in (inner, gains)), "for every map or for none"
    factors = (*a, *b, *inner, *gains)
    # len: Dynamo of torch 2.11 breaks the graph at bool of a list
    out: tuple[Tensor, ...] = _LowRankLinear.apply(x, tuple(frozen), scale, alpha, len(inner) > 0, *factors)
    return out


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        frozen: tuple[Frozen, ...],
        scale: Tensor | None,
        alpha: float | None,
        has_inner: bool,
        *factors: Tensor,
    ) -> tuple[Tensor, ...]:
        n = len(frozen)
        gains = list(factors[(3 if has_inner else 2) * n :])
        cast = _cast(factors[: 2 * n], x.dtype)
        a = torch.cat(cast[:n], dim=2) if n > 1 else cast[0]
        if scale is not None and alpha is None:
            a = (a * scale).to(x.dtype)
        b = cast[n:]
        inner = torch.cat(factors[2 * n : 3 * n], dim=1) if has_inner else None
        parts, kinds, keeps = _flat(frozen)
        biases = [f.bias for f in frozen]
        late = 1.0 if scale is None or alpha is None else alpha
        folded = len(gains) > 0 and x.shape[0] == 1 and not torch.compiler.is_compiling()
        outside = len(gains) > 0 and not folded
        into = (x, a, b, parts)
        how: Any = ([None] * n if outside else biases, inner, gains if folded else [], late)
        if torch.compiler.is_compiling():
            u, *outputs = _forward_op(*into, ";".join(kinds), *how)
        else:
            u, *outputs = _forward(*into, kinds, *how)
        kept = [y for y, keep in zip(outputs, keeps, strict=True) if keep] if gains else []
        if outside:
            outputs = [_gained(y, g, bias) for y, g, bias in zip(outputs, gains, biases, strict=True)]
        again = len(gains) > 0 and not all(keeps)
        trains = any(ctx.needs_input_grad[5 : 5 + n])
        ctx.save_for_backward(x if trains or again else None, scale, a, u, inner, *b, *gains, *kept)
        ctx.frozen, ctx.alpha, ctx.late = frozen, alpha, late
        ctx.ranks = [t.shape[2] for t in cast[:n]]
        ctx.dtypes = [t.dtype for t in factors]
        ctx.has_gains, ctx.folded = len(gains) > 0, folded
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        frozen, n = ctx.frozen, len(ctx.frozen)
        x, scale, a, u, inner, *rest = ctx.saved_tensors
        b, rest = rest[:n], rest[n:]
        gains, kept = (rest[:n], rest[n:]) if ctx.has_gains else ([], [])
        parts, kinds, keeps = _flat(frozen)
        given = [
            u.new_zeros((*u.shape[:2], t.shape[2])) if g is None else g.contiguous()
            for g, t in zip(gradients, b, strict=True)
        ]
        needs_x = ctx.needs_input_grad[0]
        needs_a = any(ctx.needs_input_grad[5 : 5 + n])
        if gains and not ctx.folded:
            given = [_columns(g, gain) for g, gain in zip(given, gains, strict=True)]
        biases = [f.bias if ctx.folded else None for f in frozen]
        saved = (x, a, u, b, parts)
        how: Any = (biases, inner, gains, kept, keeps, given, needs_x, needs_a, ctx.late, ctx.folded)
        if torch.compiler.is_compiling():
            dx, da, dinner, *others = _backward_op(*saved, ";".join(kinds), *how)
        else:
            dx, da, dinner, others = _backward(*saved, kinds, *how)
        db, dg = others[:n], others[n:]
        das: list[Tensor | None] = [None] * n
        if needs_a:
            split = da.split(ctx.ranks, dim=2) if n > 1 else [da]
            das = [_scaled_as(t, scale, dtype) for t, dtype in zip(split, ctx.dtypes[:n], strict=True)]
        after = None if ctx.alpha is None else scale
        dbs = [_scaled_as(t, after, dtype) for t, dtype in zip(db, ctx.dtypes[n : 2 * n], strict=True)]
        dinners = dinner.split(ctx.ranks, dim=1) if inner is not None else []
        return (dx if needs_x else None, None, None, None, None, *das, *dbs, *dinners, *dg)


def _cast(tensors: tuple[Tensor, ...], dtype: torch.dtype) -> list[Tensor]:
    """Return the tensors in `dtype`, all in one operation where it helps."""
    if all(t.dtype == dtype for t in tensors):
        return list(tensors)
    if torch.compiler.is_compiling():
        return [t.to(dtype) for t in tensors]
    made = [torch.empty_like(t, dtype=dtype) for t in tensors]
    torch._foreach_copy_(made, tensors)
    return made


def _scaled_as(tensor: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return `tensor` times `scale` [R, 1, 1] in `dtype`; for a scale of that dtype it is one operation."""
    return (tensor if scale is None else tensor * scale).to(dtype)


def _flat(frozen: Sequence[Frozen]) -> tuple[list[Tensor], list[str], list[bool]]:
    """Return all weights' tensors in a row, each map's kind with how many of them are its own, and what it keeps."""
    return (
        [t for f in frozen for t in f.parts],
        [f"{f.kind} {len(f.parts)}" for f in frozen],
        [f.keep for f in frozen],
    )


def _weights(parts: list[Tensor], kinds: list[str]) -> list[tuple[list[Tensor], str]]:
    """Undo `_flat`."""
    found, start = [], 0
    for kind in kinds:
        name, _, count = kind.rpartition(" ")
        found.append((parts[start : start + int(count)], name))
        start += int(count)
    return found


def _columns(b: Tensor, gain: Tensor | None) -> Tensor:
    """Return b diag(g), b [R, any, D_out], each element rounded once."""
    return b if gain is None else (b * gain.unsqueeze(1)).to(b.dtype)


def _gained(z: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
    y = z * gain.unsqueeze(1)
    y = y if bias is None else y + bias
    # Dynamo of torch 2.11 loses the gradient of an output that a `to` without effect returns
    return y if y.dtype == z.dtype else y.to(z.dtype)


def _product(x: Tensor, u: Tensor, b: Tensor, weight: Tensor, bias: Tensor | None, alpha: float) -> Tensor:
    """Return one map's output [R, N, D_out]."""
    runs, rows, width = x.shape
    if runs == 1:
        if bias is None:
            return torch.mm(u[0], b[0]).addmm_(x[0], weight.t(), beta=alpha).unsqueeze(0)
        return torch.addmm(bias.to(x.dtype), u[0], b[0], alpha=alpha).addmm_(x[0], weight.t()).unsqueeze(0)
    flat = x.reshape(runs * rows, width)
    if bias is None:
        y = torch.bmm(u, b)
        y.view(runs * rows, -1).addmm_(flat, weight.t(), beta=alpha)
    else:
        y = torch.baddbmm(bias.to(x.dtype).expand(runs, 1, -1), u, b, alpha=alpha)
        y.view(runs * rows, -1).addmm_(flat, weight.t())
    return y


def _folded(parts: list[Tensor], kind: str, dtype: torch.dtype, gain: Tensor | None) -> Tensor:
    """Return diag(g) W for one run."""
    weight = weight_of(parts, kind, dtype)
    return weight if gain is None else scaled_rows(weight, gain[0])


def _split(u: Tensor, inner: Tensor | None, b: list[Tensor]) -> list[Tensor]:
    """Return each map's part of u ⊙ inner."""
    v = _columns(u, inner)
    return list(v.split([t.shape[1] for t in b], dim=2)) if len(b) > 1 else [v]


def _small(x: Tensor, a: Tensor) -> Tensor:
    return torch.mm(x[0], a[0]).unsqueeze(0) if x.shape[0] == 1 else torch.bmm(x, a)


def _forward(
    x: Tensor,
    a: Tensor,
    b: list[Tensor],
    parts: list[Tensor],
    kinds: list[str],
    biases: list[Tensor | None],
    inner: Tensor | None,
    gains: list[Tensor],
    alpha: float,
) -> list[Tensor]:
    """Return u [R, N, all ranks], without the inner factor, and the outputs."""
    u = _small(x, a)
    parts_of_u = _split(u, inner, b)
    outputs = []
    for i, (tensors, kind) in enumerate(_weights(parts, kinds)):
        gain = gains[i] if gains else None
        weight = _folded(tensors, kind, x.dtype, gain)
        outputs.append(_product(x, parts_of_u[i], _columns(b[i], gain), weight, biases[i], alpha))
    return [u, *outputs]


def _backward(
    x: Tensor | None,
    a: Tensor,
    u: Tensor,
    b: list[Tensor],
    parts: list[Tensor],
    kinds: list[str],
    biases: list[Tensor | None],
    inner: Tensor | None,
    gains: list[Tensor],
    kept: list[Tensor],
    keeps: list[bool],
    gradients: list[Tensor],
    needs_x: bool,
    needs_a: bool,
    alpha: float,
    folded: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, list[Tensor]]:
    """Return ∂x, ∂(joined a), ∂(joined inner), each None unless needed; all ∂b, and ∂g if there are gains.

    The gradients of a and b lack the factor `alpha`. Where gains are not `folded` into weights, `gradients` hold them
    already and `kept` lacks them: either way Σ_n gradient ⊙ kept is g ∂g.
    """
    runs, rows = u.shape[:2]
    one = runs == 1
    v = _split(u, inner, b)
    du = torch.empty_like(u) if len(b) > 1 else None
    places = du.split([t.shape[1] for t in b], dim=2) if du is not None else []
    weights = _weights(parts, kinds)
    db: list[Tensor] = []
    dg: list[Tensor] = []
    outputs = iter(kept)
    for i, dz in enumerate(gradients):
        gain = gains[i] if gains else None
        fold = gain if folded else None
        factor = _columns(b[i], fold)
        if gain is None:
            change = torch.mm(v[i][0].t(), dz[0]).unsqueeze(0) if one else torch.bmm(v[i].transpose(1, 2), dz)
        else:
            if keeps[i]:
                change, total = product_and_dot(v[i], dz, next(outputs), biases[i], gain)
            else:
                assert x is not None
                weight = _folded(*weights[i], u.dtype, fold)
                y = (x.reshape(runs * rows, -1) @ weight.t()).view(dz.shape)
                change, total = product_and_dot(v[i], dz, y, None, gain, factor, alpha)
                del y, weight
            dg.append(total)
        db.append(_columns(change, fold))
        if one:
            if du is None:
                du = torch.mm(dz[0], factor[0].t()).unsqueeze(0)
            else:
                torch.mm(dz[0], factor[0].t(), out=places[i][0])
        elif du is None:
            du = torch.bmm(dz, factor.transpose(1, 2))
        else:
            places[i].copy_(torch.bmm(dz, factor.transpose(1, 2)))
    assert du is not None
    dinner = None
    if inner is not None:
        dinner = column_dot(du, u) * alpha
        du = _columns(du, inner)
    dx = None
    if needs_x:
        dx = _small(du, a.transpose(1, 2))
        flat = dx.view(runs * rows, -1)
        for i, dz in enumerate(gradients):
            weight = _folded(*weights[i], u.dtype, gains[i] if gains and folded else None)
            flat.addmm_(dz.view(runs * rows, -1), weight, beta=alpha if i == 0 else 1.0)
    da = None
    if needs_a:
        assert x is not None
        da = torch.mm(x[0].t(), du[0]).unsqueeze(0) if one else torch.bmm(x.transpose(1, 2), du)
    return dx, da, dinner, [*db, *dg]


# The same two directions as operations that a compiler does not look into.


@torch.library.custom_op("peftbench::low_rank_forward", mutates_args=())
def _forward_op(
    x: Tensor,
    a: Tensor,
    b: list[Tensor],
    parts: list[Tensor],
    kinds: str,
    biases: list[Tensor | None],
    inner: Tensor | None,
    gains: list[Tensor],
    alpha: float,
) -> list[Tensor]:
    return _forward(x, a, b, parts, kinds.split(";"), biases, inner, gains, alpha)


@_forward_op.register_fake
def _(x, a, b, parts, kinds, biases, inner, gains, alpha):  # type: ignore[no-untyped-def]
    shape = x.shape[:2]
    return [x.new_empty((*shape, a.shape[2])), *(x.new_empty((*shape, t.shape[2])) for t in b)]


@torch.library.custom_op("peftbench::low_rank_backward", mutates_args=())
def _backward_op(
    x: Tensor | None,
    a: Tensor,
    u: Tensor,
    b: list[Tensor],
    parts: list[Tensor],
    kinds: str,
    biases: list[Tensor | None],
    inner: Tensor | None,
    gains: list[Tensor],
    kept: list[Tensor],
    keeps: list[bool],
    gradients: list[Tensor],
    needs_x: bool,
    needs_a: bool,
    alpha: float,
    folded: bool,
) -> list[Tensor]:
    saved = (x, a, u, b, parts, kinds.split(";"), biases, inner, gains, kept, keeps)
    dx, da, dinner, others = _backward(*saved, gradients, needs_x, needs_a, alpha, folded)
    # An operation returns no None
    return [*(u.new_empty(0) if t is None else t for t in (dx, da, dinner)), *others]


@_backward_op.register_fake
def _(x, a, u, b, parts, kinds, biases, inner, gains, kept, keeps, gradients, needs_x, needs_a, alpha, folded):  # type: ignore[no-untyped-def]
    runs, rows = u.shape[:2]
    dx = u.new_empty((runs, rows, a.shape[1]) if needs_x else 0)
    da = u.new_empty(a.shape if needs_a else 0)
    dinner = u.new_empty(0) if inner is None else inner.new_empty(inner.shape)
    # contiguous whatever the factors are: those that sites share are views of one matrix
    return [dx, da, dinner, *(t.new_empty(t.shape) for t in b), *(g.new_empty(g.shape) for g in gains)]
