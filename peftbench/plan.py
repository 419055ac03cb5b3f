"""From a grid to points, and from resolved runs to packs; pure, no torch.

A *grid* maps keys to lists of values: the groups (``model``, ``method``, ``task``, ``train``, ``profile``) to names of
options, dotted keys (``method.rank``), ``seed`` and ``protocol`` to plain values. A *point* is a choice for each key.
What a method does not declare is left out before the product is taken: no point holds a key that means nothing to it.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from peftbench.errors import UserError, nearest
from peftbench.record import RunSpec, canonical

GROUPS = ("model", "method", "task", "train", "profile")
RUN_KEYS = ("seed", "protocol")
LENGTHS = ("steps", "epochs", "patience")
"""What decides when a run ends."""
ADAMW = ("learning_rate", "weight_decay", "clip_norm", "warmup", "schedule", "beta1", "beta2", "epsilon")
PER_RUN_TRAIN = (*ADAMW, *LENGTHS, "label_smoothing", "head_learning_rate", "start", "start_task")
"""What may differ between the runs of a pack besides the seed and the method's own free settings."""
QUEUE = 4
"""Runs of unequal length that are given to one pack, for each of its places."""

Grid = Mapping[str, Sequence[Any]]
Point = dict[str, Any]


@dataclass(frozen=True)
class Demand:
    """What is asked for: grids whose union runs, values per method, and keys given by hand, which go before both."""

    grids: Sequence[Grid]
    per_method: Mapping[str, Grid] = field(default_factory=dict)
    given: Grid = field(default_factory=dict)


def flatten(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def as_grid(mapping: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return a yaml mapping as a grid: a list is a list of choices, anything else the only choice."""
    return {key: value if isinstance(value, list) else [value] for key, value in flatten(mapping).items()}


def _check_keys(demand: Demand, methods: Sequence[str], declared: Mapping[str, frozenset[str]]) -> list[str]:
    """Return a line per method setting that some methods lack; raise UserError for keys that nothing takes."""
    lines: list[str] = []
    known = {f"method.{setting}" for method in methods for setting in declared[method]}
    asked = dict.fromkeys(itertools.chain(demand.given, *demand.grids, *demand.per_method.values()))
    for key in asked:
        group, dot, _ = key.partition(".")
        if not dot and key not in GROUPS + RUN_KEYS:
            raise UserError(f"{key}: no such key{nearest(key, GROUPS + RUN_KEYS)}")
        if group not in GROUPS + RUN_KEYS or (dot and group in RUN_KEYS):
            raise UserError(f"{key}: no such key{nearest(group, GROUPS)}")
        if group != "method" or not dot:
            continue
        if key not in known:
            if key not in demand.given and "method" in demand.given:
                continue  # an experiment's setting of a method that was replaced by hand
            everything = sorted(known)
            valid = f" (valid: {', '.join(everything)})" if everything else ", which have no settings"
            raise UserError(f"{key}: not a setting of {', '.join(methods)}{nearest(key, everything)}{valid}")
        without = [m for m in methods if key.removeprefix("method.") not in declared[m]]
        if without and key in demand.given:
            lines.append(f"{key} is not a setting of {', '.join(without)}: dropped there")
    return lines


def points(demand: Demand, declared: Mapping[str, frozenset[str]]) -> tuple[list[Point], list[str]]:
    """Return the different points of all grids in order, and lines about what was dropped.

    `declared` maps each method of the grids to its settings. Raises UserError for a key that nothing takes.
    """
    grids = [{**grid, **demand.given} for grid in demand.grids]
    methods = list(dict.fromkeys(str(m) for grid in grids for m in grid["method"]))
    lines = _check_keys(demand, methods, declared)
    found: dict[str, Point] = {}
    for grid in grids:
        for method in dict.fromkeys(str(m) for m in grid["method"]):
            merged = {**grid, **demand.per_method.get(method, {}), **demand.given, "method": [method]}
            axes = {
                key: values
                for key, values in merged.items()
                if not key.startswith("method.") or key.removeprefix("method.") in declared[method]
            }
            for key, values in axes.items():
                if not values:
                    raise UserError(f"{key}: the list of values is empty")
            for choice in itertools.product(*axes.values()):
                point = dict(zip(axes, choice, strict=True))
                found.setdefault(canonical(point), point)
    return list(found.values()), lines


METHODS_OWN = ("method", "method_files")
"""What a run's identity says of its method."""
PER_RUN_IDENTITY = (*METHODS_OWN, "start")
"""What of identities may differ between the runs of a pack."""


def _common(spec: RunSpec) -> list[Any]:
    """Return what all runs of a pack have in common, whatever their methods."""
    return [
        spec.model,
        spec.task,
        {k: v for k, v in spec.train.items() if k not in PER_RUN_TRAIN},
        spec.profile,
        spec.protocol,
        spec.device,
        {k: v for k, v in spec.identity.items() if k not in PER_RUN_IDENTITY},
    ]


def pack_key(spec: RunSpec, free: Iterable[str]) -> str:
    """Return what runs of one kind in a pack have in common, as text; `free` are method settings that may differ."""
    free = set(free)
    own = {k: v for k, v in spec.identity.items() if k in METHODS_OWN}
    return canonical([_common(spec), {k: v for k, v in spec.method.items() if k not in free}, own])


@dataclass(frozen=True)
class Sharing:
    """How a run can share a pass through the base.

    Attributes:
        packable: with others at all.
        free: settings of its method that may differ between runs of that method.
        company: what methods that can share a pack have in common; None: the run's own method only.
    """

    packable: bool
    free: frozenset[str] = frozenset()
    company: str | None = None


class Group(list[RunSpec]):
    """The runs of one pack: `places` of them train side by side, the others wait until one is done."""

    def __init__(self, specs: Iterable[RunSpec], places: int) -> None:
        super().__init__(specs)
        self.places = min(places, len(self))


def packs(
    specs: Sequence[RunSpec],
    sharing: Callable[[RunSpec], Sharing],
    size: int | Callable[[Sequence[RunSpec]], int],
    early: bool = False,
) -> list[Group]:
    """Group runs that can share a base into packs, in order of first appearance, runs of one kind side by side.

    Runs of one kind (the same method, and settings that may differ in its packs) fill packs of their own, which are the
    fastest. What is left over of several kinds that keep company is packed together.

    Runs of equal length make packs of even sizes, which end together. Where lengths differ, or nobody knows them
    (`train.patience`), a pack takes up to `QUEUE` runs for each of its places, so that no place stays empty when a
    short run is done; what is more makes further packs, which a launcher can train at the same time.

    Args:
        size: how many train side by side at most, or what tells that of runs that can share a base.
        early: any run may end before its time.
    """
    companies: dict[str, dict[str, list[RunSpec]]] = {}
    for spec in specs:
        share = sharing(spec)
        kind = pack_key(spec, share.free) if share.packable else spec.run_id
        alone = not share.packable or share.company is None
        wide = kind if alone else canonical([_common(spec), share.company])
        companies.setdefault(wide, {}).setdefault(kind, []).append(spec)
    found: list[Group] = []
    for kinds in companies.values():
        members = [spec for kind in kinds.values() for spec in kind]
        most = size(members) if callable(size) else size
        left: list[RunSpec] = []
        for alike in kinds.values():
            whole = len(alike) // most * most
            if len(kinds) == 1 or (whole and not _end_together(alike, early)):
                found += _evenly(alike, most, early)
                continue
            found += [Group(alike[i : i + most], most) for i in range(0, whole, most)]
            left += alike[whole:]
        found += _evenly(left, most, early)
    return found


def _end_together(specs: Sequence[RunSpec], early: bool) -> bool:
    """Whether runs on the same data are known to make the same number of steps."""
    trains = [spec.train for spec in specs]
    lengths = {canonical([t.get("steps"), t.get("epochs") if t.get("steps") is None else None]) for t in trains}
    return not early and len(lengths) <= 1 and all(t.get("patience") is None for t in trains)


def _evenly(members: Sequence[RunSpec], most: int, early: bool) -> list[Group]:
    each = most if most == 1 or _end_together(members, early) else most * QUEUE
    count = math.ceil(len(members) / each)
    bounds = [len(members) * i // count for i in range(count + 1)] if count else [0]
    return [Group(members[low:high], most) for low, high in itertools.pairwise(bounds)]
