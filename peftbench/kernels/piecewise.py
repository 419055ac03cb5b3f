"""A frozen map for all runs of a pack, with what some runs add to it done in their own rows: one operation each way.

    z_i = (x_i + p_i ⊙ x_i) Wᵀ + bias + s_i · ((x_i a_i) ⊙ d_i) b_i,      y_i = z_i + c_i ⊙ z_i + e_i

A run without one of these terms skips it. Low-rank products, gains (1 + c, 1 + p) and biases cover what LoRA and its
kin, IA3, SSF and BitFit do to a linear map, so that a pack of them needs nothing taken apart and put together again:
outputs and gradients are written once, and each piece's terms go where its rows lie. All rows are multiplied with W as
they come, and those with a gain before that product, forward or back, once more.

Shapes: runs R, rows N a run, x [R, N, D_in], W [D_out, D_in]; of the k runs of a piece a [k, D_in, r], b [k, r, D_out],
d [k, r], s [k, 1, 1], p [k, D_in], c and e [k, D_out].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from peftbench.kernels.column_dot import column_dot
from peftbench.kernels.low_rank import Frozen, weight_of


@dataclass(frozen=True)
class Terms:
    """What runs add to a linear map, in any dtype; None where they add no such thing.

    `b` comes with `a`, `inner` (d) and the constant `scale` with both; `stretch` (p) comes without them.
    """

    stretch: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    inner: Tensor | None = None
    scale: Tensor | None = None
    change: Tensor | None = None
    shift: Tensor | None = None

    @property
    def runs(self) -> int:
        """Return k."""
        return len(getattr(self, self.given()[0]))

    def given(self) -> tuple[str, ...]:
        """Return the names of the terms that there are."""
        return tuple(f.name for f in fields(self) if getattr(self, f.name) is not None)


Piece = tuple[int, Terms]
"""The first run of some, and their terms."""


def reference(x: Tensor, frozen: Frozen, pieces: Sequence[Piece]) -> Tensor:
    """Return the outputs [R, N, D_out] by the formula."""
    y = x @ weight_of(list(frozen.parts), frozen.kind, x.dtype).t()
    rows = list((y if frozen.bias is None else y + frozen.bias.to(x.dtype)).unbind())
    for first, terms in pieces:
        one = {name: getattr(terms, name).to(x.dtype) for name in terms.given()}
        for i in range(terms.runs):
            z = rows[first + i]
            if "stretch" in one:
                z = z + (one["stretch"][i] * x[first + i]) @ weight_of(list(frozen.parts), frozen.kind, x.dtype).t()
            if "a" in one:
                u = x[first + i] @ one["a"][i]
                u = u * one["inner"][i] if "inner" in one else u
                z = z + (u * one["scale"][i] if "scale" in one else u) @ one["b"][i]
            y_i = z + one["change"][i] * z if "change" in one else z
            rows[first + i] = y_i + one["shift"][i] if "shift" in one else y_i
    return torch.stack(rows)


def piecewise_linear(x: Tensor, frozen: Frozen, pieces: Sequence[Piece]) -> Tensor:
    """Return the outputs [R, N, D_out]; differentiable in x and all terms.

    Args:
        x: [R, N, D_in] in the dtype to compute with.
        pieces: of different runs.
    """
    plan = tuple((first, terms.runs, terms.given()) for first, terms in pieces)
    tensors = [getattr(terms, name) for _, terms in pieces for name in terms.given()]
    output: Tensor = _Piecewise.apply(x, frozen, plan, *tensors)
    return output


class _Piecewise(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, frozen: Frozen, plan: tuple[tuple[int, int, tuple[str, ...]], ...], *tensors: Tensor
    ) -> Tensor:
        runs, rows, width = x.shape
        weight = weight_of(list(frozen.parts), frozen.kind, x.dtype)
        flat = x.reshape(runs * rows, width)
        bias = frozen.bias
        y = flat @ weight.t() if bias is None else torch.addmm(bias.to(x.dtype), flat, weight.t())
        y = y.view(runs, rows, -1)
        trains = any(ctx.needs_input_grad)
        saved: list[Tensor] = []
        given = iter(zip(tensors, ctx.needs_input_grad[3:], strict=True))
        keep_x = False
        for first, count, names in plan:
            terms = {name: next(given) for name in names}
            one = {name: t.to(x.dtype) for name, (t, _) in terms.items()}
            part = slice(first, first + count)
            out = y[part]
            if "stretch" in one:
                keep_x = keep_x or terms["stretch"][1]
                longer = torch.addcmul(x[part], x[part], one["stretch"].unsqueeze(1)).view(count * rows, width)
                torch.mm(longer, weight.t(), out=out.view(count * rows, -1))
                if bias is not None:
                    out.add_(bias.to(x.dtype))
            if "scale" in one:
                one["b"] = (terms["b"][0] * terms["scale"][0]).to(x.dtype)
            if "a" in one:
                keep_x = keep_x or terms["a"][1]
                u = torch.bmm(x[part], one["a"])
                v = u * one["inner"].unsqueeze(1) if "inner" in one else u
                out.baddbmm_(v, one["b"])
                saved += [u]
            if "change" in one:
                z = out.clone() if trains else out
                out.addcmul_(z, one["change"].unsqueeze(1))
                saved += [z]
            if "shift" in one:
                out.add_(one["shift"].unsqueeze(1))
            saved += [one[name] for name in names if name != "shift"]
        if trains:
            ctx.save_for_backward(x if keep_x else None, *saved)
        ctx.frozen, ctx.plan = frozen, plan
        ctx.shape, ctx.dtypes = x.shape, [t.dtype for t in tensors]
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, *rest = ctx.saved_tensors
        runs, rows, width = ctx.shape
        gradient = gradient.contiguous()
        dx = weight = None
        if ctx.needs_input_grad[0]:
            weight = weight_of(list(ctx.frozen.parts), ctx.frozen.kind, gradient.dtype)
            dx = (gradient.view(runs * rows, -1) @ weight).view(runs, rows, width)
        saved, needs = iter(rest), iter(ctx.needs_input_grad[3:])
        found: list[Tensor | None] = []
        for first, count, names in ctx.plan:
            needed = {name: next(needs) for name in names}
            part = slice(first, first + count)
            u = next(saved) if "a" in names else None
            z = next(saved) if "change" in names else None
            one = {name: next(saved) for name in names if name != "shift"}
            here: dict[str, Tensor | None] = {}
            dy = dz = gradient[part]
            if needed.get("shift"):
                here["shift"] = dy.sum(dim=1, dtype=torch.promote_types(dy.dtype, torch.float32))
            if z is not None:
                if needed["change"]:
                    here["change"] = column_dot(dy, z)
                dz = torch.addcmul(dy, dy, one["change"].unsqueeze(1))
                if dx is not None and weight is not None:
                    torch.mm(dz.view(count * rows, -1), weight, out=dx[part].view(count * rows, width))
            if "stretch" in names:
                # ∂ of the longer input; that of x is this much longer too
                longer = dx[part] if dx is not None else _times(dz, ctx.frozen, width)
                if needed["stretch"]:
                    assert x is not None
                    here["stretch"] = column_dot(longer, x[part])
                if dx is not None:
                    longer.addcmul_(longer, one["stretch"].unsqueeze(1))
            if u is not None:
                here |= _low_rank_gradients(x, u, dz, one, needed, None if dx is None else dx[part], part)
            found += [here.get(name) for name in names]
        dtypes = iter(ctx.dtypes)
        return (dx, None, None, *(g if g is None else g.to(d) for g, d in zip(found, dtypes, strict=True)))


def _times(dz: Tensor, frozen: Frozen, width: int) -> Tensor:
    """Return dz W [k, N, D_in]."""
    weight = weight_of(list(frozen.parts), frozen.kind, dz.dtype)
    return (dz.reshape(-1, dz.shape[2]) @ weight).view(*dz.shape[:2], width)


def _low_rank_gradients(
    x: Tensor | None,
    u: Tensor,
    dz: Tensor,
    one: dict[str, Tensor],
    needed: dict[str, bool],
    dx: Tensor | None,
    part: slice,
) -> dict[str, Tensor | None]:
    """Return the gradients of a, b and inner of the runs in `part`, and add to that of their rows."""
    here: dict[str, Tensor | None] = {}
    inner = one["inner"].unsqueeze(1) if "inner" in one else None
    v = u if inner is None else u * inner
    du = torch.bmm(dz, one["b"].transpose(1, 2))
    if needed["b"]:
        db = torch.bmm(v.transpose(1, 2), dz)
        here["b"] = db * one["scale"] if "scale" in one else db
    if inner is not None:
        if needed["inner"]:
            here["inner"] = column_dot(du, u)
        du = du * inner
    if needed["a"]:
        assert x is not None
        here["a"] = torch.bmm(x[part].transpose(1, 2), du)
    if dx is not None:
        dx.baddbmm_(du, one["a"].transpose(1, 2))
    return here


def affine_rows(y: Tensor, pieces: Sequence[Piece]) -> Tensor:
    """Return y + c ⊙ y + e in the rows of the pieces' runs, and y itself in all others.

    Args:
        y: [R, N, D]; it is written to.
        pieces: of different runs, without low-rank products and `stretch`.
    """
    plan = tuple((first, terms.runs, terms.given()) for first, terms in pieces)
    tensors = [getattr(terms, name) for _, terms in pieces for name in terms.given()]
    output: Tensor = _AffineRows.apply(y, plan, *tensors)
    return output


class _AffineRows(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, y: Tensor, plan: tuple[tuple[int, int, tuple[str, ...]], ...], *tensors: Tensor
    ) -> Tensor:
        trains = any(ctx.needs_input_grad)
        saved: list[Tensor] = []
        given = iter(tensors)
        for first, count, names in plan:
            one = {name: next(given).to(y.dtype) for name in names}
            out = y[first : first + count]
            if "change" in one:
                z = out.clone() if trains else out
                out.addcmul_(z, one["change"].unsqueeze(1))
                saved += [z, one["change"]]
            if "shift" in one:
                out.add_(one["shift"].unsqueeze(1))
        if trains:
            ctx.save_for_backward(*saved)
        ctx.plan, ctx.dtypes = plan, [t.dtype for t in tensors]
        ctx.mark_dirty(y)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        saved, dtypes = iter(ctx.saved_tensors), iter(ctx.dtypes)
        changed = any("change" in names for _, _, names in ctx.plan)
        dy = gradient.clone() if changed and ctx.needs_input_grad[0] else gradient  # others may hold it too
        found: list[Tensor] = []
        for first, count, names in ctx.plan:
            own = gradient[first : first + count]
            if "change" in names:
                z, change = next(saved), next(saved)
                found.append(column_dot(own, z).to(next(dtypes)))
                if dy is not gradient:
                    dy[first : first + count].addcmul_(own, change.unsqueeze(1))
            if "shift" in names:
                wide = torch.promote_types(own.dtype, torch.float32)
                found.append(own.sum(dim=1, dtype=wide).to(next(dtypes)))
        return (dy, None, *found)
