"""Deltas of several methods at one site of a pack: each changes its own runs, and what belongs to nobody stays.

A pack's rows come run by run, so a method's runs are a slice of the runs axis. The frozen module computes all rows at
once. What its deltas can name as terms of a linear map is added in the rows of their runs (`kernels.piecewise`), terms
of one kind that lie side by side at once. For all others the input or output is split along the axis of runs, each part
goes through the delta of its own method, and the parts are put together again: [R, N, D] → parts [k, N, D] with
Σ k = R. Nothing mixes runs, so every run computes what it would alone.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import fields

import torch
from torch import Tensor

from peftbench.errors import UserError
from peftbench.kernels import piecewise
from peftbench.kernels.piecewise import Terms
from peftbench.methods.base import AttentionDelta, Delta, EmbeddingDelta, HiddenDelta, LinearDelta, NormDelta

Piece = tuple[int, Delta | None]
"""How many runs in a row, and what changes them (None: nothing)."""


def pieces_of(spans: Sequence[tuple[int, int, Delta]], runs: int) -> list[Piece]:
    """Return the pieces that cover `runs` runs, given (first run, run after the last, delta) in order."""
    pieces: list[Piece] = []
    at = 0
    for start, stop, delta in spans:
        if start > at:
            pieces.append((start - at, None))
        pieces.append((stop - start, delta))
        at = stop
    if at < runs:
        pieces.append((runs - at, None))
    return pieces


class _Mixed:
    """What mixed deltas share: their pieces, which own the parameters."""

    pieces: list[Piece]

    def _take(self, pieces: Sequence[Piece]) -> None:
        # not as submodules: the parameters are those of the methods' own deltas
        object.__setattr__(self, "pieces", list(pieces))

    def _sizes(self) -> list[int]:
        return [count for count, _ in self.pieces]

    def _each(self, change: Callable[[Delta, Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
        """Return `y` [R, ...] with the parts that belong to a delta changed, each seeing its own part of `x` too."""
        parts = zip(self.pieces, x.split(self._sizes()), y.split(self._sizes()), strict=True)
        return torch.cat([b if delta is None else change(delta, a, b) for (_, delta), a, b in parts])


class MixedLinear(_Mixed, LinearDelta):
    """Changes of a linear map by several methods."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        super().__init__(sum(count for count, _ in pieces))
        self._take(pieces)

    def named(self, dtype: torch.dtype) -> tuple[list[piecewise.Piece], MixedLinear | None]:
        """Return what the methods can name as terms now, and a delta that does the rest, if any is left."""
        terms = [delta.linear_terms(dtype) if isinstance(delta, LinearDelta) else None for _, delta in self.pieces]
        left: list[Piece] = [
            (count, delta if found is None else None) for (count, delta), found in zip(self.pieces, terms, strict=True)
        ]
        rest = None if all(delta is None for _, delta in left) else _linear(left)
        return joined(list(zip(self._sizes(), terms, strict=True))), rest


def overrides(delta: LinearDelta, name: str) -> bool:
    """Return whether a delta has a `before` or `after` of its own."""
    return getattr(type(delta), name) is not getattr(LinearDelta, name)


def joined(found: Sequence[tuple[int, Terms | None]]) -> list[piecewise.Piece]:
    """Return the pieces of runs in a row that have terms; neighbours with terms of one kind are one piece.

    Args:
        found: how many runs, and their terms.
    """
    rows: list[tuple[int, Hashable, list[Terms]]] = []
    first = 0
    for count, terms in found:
        if terms is not None:
            kind = _kind(terms)
            if kind and rows and rows[-1][1] == kind and rows[-1][0] + sum(t.runs for t in rows[-1][2]) == first:
                rows[-1][2].append(terms)
            else:
                rows.append((first, kind, [terms]))
        first += count
    return [(start, _together(terms)) for start, _, terms in rows]


def _kind(terms: Terms) -> Hashable:
    """Return what terms can be joined with: plain low-rank products of a rank, or gains and biases; None: nothing."""
    given = {*terms.given()}
    if terms.a is not None:
        return terms.a.shape[2] if given <= {"a", "b", "scale"} else None
    return "affine" if given <= {"change", "shift"} else None


def _together(terms: Sequence[Terms]) -> Terms:
    """Return the terms of all runs, with those that change nothing where one lacks what others have."""
    if len(terms) == 1:
        return terms[0]
    names = [name for name in [f.name for f in fields(Terms)] if any(getattr(t, name) is not None for t in terms)]
    return Terms(**{name: _filled(terms, name) for name in names})


def _filled(terms: Sequence[Terms], name: str) -> Tensor:
    given: Tensor = next(t for t in (getattr(one, name) for one in terms) if t is not None)
    nothing = given.new_ones if name == "scale" else given.new_zeros
    tensors = [getattr(one, name) for one in terms]
    filled = [nothing(one.runs, *given.shape[1:]) if t is None else t for one, t in zip(terms, tensors, strict=True)]
    return torch.cat(filled)


def _before(self: MixedLinear, x: Tensor) -> Tensor:
    parts = zip(self.pieces, x.split(self._sizes()), strict=True)
    return torch.cat([delta.before(own) if isinstance(delta, LinearDelta) else own for (_, delta), own in parts])


def _after(self: MixedLinear, x: Tensor, y: Tensor) -> Tensor:
    return self._each(lambda delta, own, out: delta.after(own, out), x, y)  # type: ignore[operator]


def _linear(pieces: Sequence[Piece]) -> MixedLinear:
    """Return the delta of a linear map, with the hooks that any of its pieces has."""
    deltas = [delta for _, delta in pieces if isinstance(delta, LinearDelta)]
    hooks = (("before", _before), ("after", _after))
    fills = {name: hook for name, hook in hooks if any(overrides(delta, name) for delta in deltas)}
    made: MixedLinear = type("MixedLinear", (MixedLinear,), fills)(pieces)
    return made


class _MixedHidden(_Mixed, HiddenDelta):
    def __init__(self, pieces: Sequence[Piece]) -> None:
        super().__init__(sum(count for count, _ in pieces))
        self._take(pieces)

    def forward(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        return self._each(lambda delta, own, out: delta(own, out), inputs, outputs)


class MixedNorm(_Mixed, NormDelta):
    """Norms of several methods; rows of a piece without a delta go through the module's own forward."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        Delta.__init__(self, sum(count for count, _ in pieces))
        self._take(pieces)


class _MixedEmbedding(_Mixed, EmbeddingDelta):
    def __init__(self, pieces: Sequence[Piece]) -> None:
        super().__init__(sum(count for count, _ in pieces))
        self._take(pieces)

    def prompt(self) -> Tensor:
        prompts: list[Tensor] = [delta.prompt() for _, delta in self.pieces if isinstance(delta, EmbeddingDelta)]
        _same_length([p.shape[-2] for p in prompts])
        rows = {p.shape[1] for p in prompts if p.dim() == 4}
        if rows:
            (count,) = rows
            prompts = [p if p.dim() == 4 else p.unsqueeze(1).expand(-1, count, -1, -1) for p in prompts]
        return torch.cat(prompts)


class _MixedAttention(_Mixed, AttentionDelta):
    def __init__(self, pieces: Sequence[Piece]) -> None:
        super().__init__(sum(count for count, _ in pieces))
        self._take(pieces)

    def prefix(self) -> tuple[Tensor, Tensor]:
        found = [delta.prefix() for _, delta in self.pieces if isinstance(delta, AttentionDelta)]
        _same_length([keys.shape[1] for keys, _ in found])
        keys, values = zip(*found, strict=True)
        return torch.cat(keys), torch.cat(values)


def _same_length(lengths: Sequence[int]) -> None:
    if len(set(lengths)) > 1:
        raise UserError(f"virtual tokens of {sorted(set(lengths))}: expected one length in a pack")


def role_of(delta: Delta) -> type[Delta]:
    """Return what kind of delta it is, by what it does there: a scale after a norm acts as on a linear map."""
    kinds = (LinearDelta, HiddenDelta, NormDelta, EmbeddingDelta, AttentionDelta)
    return next(kind for kind in kinds if isinstance(delta, kind))


def mixed(pieces: Sequence[Piece]) -> Delta:
    """Return one delta for all runs of a pack, made of those of its pieces, which are all of one kind.

    Raises:
        UserError: some of a pack's runs lengthen the sequence at this site and others do not.
    """
    deltas = [delta for _, delta in pieces if delta is not None]
    first = deltas[0]
    if isinstance(first, LinearDelta):
        return _linear(pieces)
    if isinstance(first, HiddenDelta):
        return _MixedHidden(pieces)
    if isinstance(first, NormDelta):
        return MixedNorm(pieces)
    if len(deltas) < len(pieces):
        raise UserError("runs with virtual tokens and runs without cannot share a pack")
    return _MixedEmbedding(pieces) if isinstance(first, EmbeddingDelta) else _MixedAttention(pieces)
