"""An adapter of several methods at once: each method has some of the runs that share one pass through the base."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftbench.errors import UserError
from peftbench.methods.adapter import Adapter, check_rows
from peftbench.methods.base import Delta, Method, StepEnd
from peftbench.methods.mixed import mixed, pieces_of, role_of
from peftbench.methods.sites import Injection
from peftbench.models.roles import Site, shared_inputs

ROW_SITES = frozenset({"linear", "hidden", "norm"})
"""Kinds of site that leave a sequence as long as it is: methods with no others can share a pack whatever they are."""


def company(kinds: Sequence[str], length: int | None) -> str | None:
    """Return a name for what methods must have in common to share a pack with another; None: they cannot.

    Args:
        kinds: the kinds of site a method fills.
        length: how many virtual tokens it adds, for methods that do.
    """
    if set(kinds) <= ROW_SITES:
        return "rows"
    if set(kinds) in ({"embedding"}, {"attention"}) and length is not None:
        return f"{kinds[0]} {length}"
    return None


def alike(one: Method, other: Method) -> bool:
    """Whether two runs can share one adapter: the same method, and settings that may differ within a pack."""
    if type(one) is not type(other):
        return False
    mine, theirs = one.settings(), other.settings()
    return not {key for key, value in mine.items() if theirs.get(key) != value} - one.traits.free_in_pack


def groups(methods: Sequence[Method]) -> list[tuple[int, int]]:
    """Return (first, after the last) of the longest rows of runs that can share one adapter, in order."""
    found: list[tuple[int, int]] = []
    for run, method in enumerate(methods):
        if found and alike(methods[found[-1][0]], method):
            found[-1] = found[-1][0], run + 1
        else:
            found.append((run, run + 1))
    return found


class MixedAdapter(Adapter):
    """Several methods on one model, for the runs of one pack.

    Attributes:
        members: one adapter a method, with its own runs; their deltas act through this adapter's hooks.
        spans: which runs of the pack each has, (first, after the last).
    """

    def __init__(self, model: nn.Module, methods: Sequence[Method], seeds: Sequence[int]) -> None:
        self.model = model
        self.methods = list(methods)
        self.runs = len(methods)
        self.spans = groups(methods)
        kinds = {company(m.traits.sites, m.settings().get("length")) for m in methods}
        if len(kinds) > 1 or None in kinds or not all(m.traits.packable for m in methods):
            names = ", ".join(dict.fromkeys(type(m).__name__ for m in methods))
            raise UserError(f"{names} cannot share a pack: expected methods that train nothing of the base, all without"
                            " virtual tokens or all with as many, and at the same place")  # fmt: skip
        check_rows(model, self.runs)
        self.seeds = list(seeds)
        self.members: list[Adapter] = []
        self._injection = Injection(self.runs)
        self._merged: int | None = None
        try:
            for start, stop in self.spans:
                self.members.append(Adapter(model, methods[start:stop], seeds[start:stop], act=False))
                for dropout in self.members[-1].dropouts():
                    dropout.first = start
            self._injection.add_all(self._mixed(), shared_inputs(model))
        except BaseException:
            self.detach()
            raise
        self.deltas = [pair for member in self.members for pair in member.deltas]
        self.shared = None
        self.trained: dict[str, nn.Parameter] = {}
        self.rewritten: dict[str, nn.Parameter] = {}
        self.train(model.training)

    def _mixed(self) -> list[tuple[Site, Delta]]:
        """Return one delta for each site that a member fills, in an order that is every member's own."""
        order: list[Any] = []
        at: dict[Any, list[tuple[int, int, Delta]]] = {}
        sites: dict[Any, Site] = {}
        for (start, stop), member in zip(self.spans, self.members, strict=True):
            place = 0
            for site, delta in member.deltas:
                key = (role_of(delta), site.name, str(site.columns), id(site.source))
                if key not in at:
                    order.insert(place, key)
                    at[key], sites[key] = [], site
                place = order.index(key, 0) + 1
                at[key].append((start, stop, delta))
        found = []
        for key in order:
            pieces = pieces_of(at[key], self.runs)
            ((_, only),) = pieces if len(pieces) == 1 else ((0, None),)
            found.append((sites[key], mixed(pieces) if only is None else only))
        return found

    @property
    def parts(self) -> list[tuple[str, Delta]]:
        return [(f"{i}:{key}", delta) for i, member in enumerate(self.members) for key, delta in member.parts]

    def rows(self) -> list[tuple[int, int]]:
        return [
            span
            for span, member in zip(self.spans, self.members, strict=True)
            for _, delta in member.parts
            for _ in delta.parameters()
        ]

    def member(self, run: int) -> tuple[Adapter, int]:
        """Return the adapter that holds `run`, and which of its own runs that is."""
        for (start, stop), member in zip(self.spans, self.members, strict=True):
            if start <= run < stop:
                return member, run - start
        raise IndexError(run)

    def parameter_count(self, run: int = 0) -> int:
        member, own = self.member(run)
        return member.parameter_count(own)

    def penalty(self) -> Tensor | None:
        terms = [member.penalty() for member in self.members]
        given = [term for term in terms if term is not None]
        if not given:
            return None
        spans = zip(self.spans, terms, strict=True)
        return torch.cat([given[0].new_zeros(b - a) if term is None else term for (a, b), term in spans])

    @property
    def watches_steps(self) -> bool:
        return any(member.watches_steps for member in self.members)

    def after_step(self, end: StepEnd) -> None:
        for (start, stop), member in zip(self.spans, self.members, strict=True):
            if member.watches_steps:
                member.after_step(end.of(start, stop))

    def condition(self, tasks: Tensor | None) -> None:
        rows = None if tasks is None else tasks.reshape(self.runs, -1)
        for (start, stop), member in zip(self.spans, self.members, strict=True):
            member.condition(None if rows is None else rows[start:stop].reshape(-1))

    def _views(self, run: int) -> dict[str, Tensor]:
        member, own = self.member(run)
        return member._views(own)

    def views(self, run: int) -> dict[str, Tensor]:
        member, own = self.member(run)
        return member.views(own)

    def between_steps(self, run: int) -> dict[str, dict[str, Tensor]]:
        member, own = self.member(run)
        return member.between_steps(own)

    def resume(self, run: int, kept: dict[str, dict[str, Tensor]]) -> None:
        member, own = self.member(run)
        member.resume(own, kept)

    def load_state_dict(self, state: dict[str, Tensor], run: int = 0) -> None:
        member, own = self.member(run)
        member.load_state_dict(state, own)

    def save(self, folder: str | Path, run: int = 0, format: str = "peftbench") -> Path:
        member, own = self.member(run)
        return member.save(folder, own, format)

    def merge(self, run: int = 0) -> None:
        if self._merged is not None:
            raise UserError("a run is merged already: unmerge() first")
        member, own = self.member(run)
        member.merge(own)
        self._merged = run
        self._injection.active = False

    def unmerge(self) -> None:
        for member in self.members:
            member.unmerge()
        self._merged = None
        self._injection.active = True

    @torch.no_grad()
    def detach(self) -> nn.Module:
        self._injection.remove()
        for member in reversed(self.members):  # the first one knows the flags as they were
            member.detach()
        return self.model
