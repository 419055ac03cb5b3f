"""Deltas of several methods at one site of a pack: each changes its own runs, and what belongs to nobody stays.

A pack's rows come run by run, so a method's runs are a slice of the runs axis. The frozen module computes all rows at
once; its input or output is then split along that axis, each part goes through the delta of its own method, and the
parts are put together again: [R, N, D] → parts [k, N, D] with Σ k = R. Nothing mixes runs, so every run computes what
it would alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from peftbench.errors import UserError
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


class _MixedLinear(_Mixed, LinearDelta):
    def __init__(self, pieces: Sequence[Piece]) -> None:
        super().__init__(sum(count for count, _ in pieces))
        self._take(pieces)


def _before(self: _MixedLinear, x: Tensor) -> Tensor:
    return self._each(lambda delta, own, _: delta.before(own), x, x)  # type: ignore[operator]


def _after(self: _MixedLinear, x: Tensor, y: Tensor) -> Tensor:
    return self._each(lambda delta, own, out: delta.after(own, out), x, y)  # type: ignore[operator]


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
        fills = {
            name: hook
            for name, hook in (("before", _before), ("after", _after))
            if any(getattr(type(d), name) is not getattr(LinearDelta, name) for d in deltas)
        }
        return type("MixedLinear", (_MixedLinear,), fills)(pieces)  # type: ignore[no-any-return]
    if isinstance(first, HiddenDelta):
        return _MixedHidden(pieces)
    if isinstance(first, NormDelta):
        return MixedNorm(pieces)
    if len(deltas) < len(pieces):
        raise UserError("runs with virtual tokens and runs without cannot share a pack")
    return _MixedEmbedding(pieces) if isinstance(first, EmbeddingDelta) else _MixedAttention(pieces)
