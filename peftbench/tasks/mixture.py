"""Several tasks as one: every row knows its task, and a head's classes are those of all tasks side by side.

Rows are mixed in proportion to their numbers, a task counting at most `limit` training rows (examples-proportional
mixing, Raffel et al. 2020, arXiv:1910.10683, section 3.5.2, as multitask prompt tuning uses it; their limit is 2^19).
Those rows are the ones with the lowest hashes of their texts, the same in every epoch. Validation and test are all
rows of each task's own splits.

With a head, class c of a task is class c plus the classes of the tasks before it, and a row's softmax runs over its own
task's classes alone. As text, every task keeps its own prompt and label words.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peftbench.errors import UserError, nearest
from peftbench.tasks.base import FORMULATIONS, Encoded, Task, carve
from peftbench.tasks.source import Row

PRIMARY = "mean_primary"
"""The mean over tasks of each one's primary metric, as GLUE's score is."""
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class Mixture(Task):
    """The tasks named in `tasks` as one, at most `limit` training rows of each."""

    tasks: tuple[str, ...]
    limit: int = 20000

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", tuple(self.tasks))
        if len(self.tasks) < 2 or len(set(self.tasks)) < len(self.tasks):
            raise UserError(f"task.tasks={list(self.tasks)}: expected at least two different tasks")
        if self.limit < 1:
            raise UserError(f"task.limit={self.limit}: expected a whole number of rows, 1 or more")
        for name, member in self.members.items():
            if isinstance(member, Mixture):
                raise UserError(f"task.tasks: {name} is a mixture itself; name its tasks instead")
            wanted = {"head": "labels", "text": "choices"}.get(self.formulation)
            if member.evaluation != wanted or (wanted == "labels" and member.num_labels < 2):
                raise UserError(
                    f"task.tasks: {name} has no classes to join with task.formulation={self.formulation};"
                    " expected tasks that choose among answers"
                )
        super().__post_init__()

    @functools.cached_property
    def members(self) -> dict[str, Task]:
        """The tasks by name, all in this one's formulation."""
        # The registry reads the yaml files of the tasks, and imports this package.
        from peftbench import registry

        found = {}
        for name in self.tasks:
            if name not in registry.options("task"):
                known = registry.options("task")
                raise UserError(f"task.tasks: {name}: no such task{nearest(str(name), known)}")
            settings = {**registry.section("task", name), "formulation": self.formulation}
            found[name] = registry.build_task(settings)
        return found

    @property
    def task_classes(self) -> list[range]:
        ends = list(itertools.accumulate((m.num_labels for m in self.members.values()), initial=0))
        return [range(*pair) for pair in itertools.pairwise(ends)]

    @property
    def formulations(self) -> tuple[str, ...]:
        return tuple(f for f in FORMULATIONS if all(f in member.formulations for member in self.members.values()))

    @property
    def primary_metric(self) -> str:
        return PRIMARY

    @property
    def num_labels(self) -> int:
        return sum(member.num_labels for member in self.members.values())

    @property
    def num_tasks(self) -> int:
        return len(self.tasks)

    # Rows: {"task": number of the task, "row": its own row}.

    def load(self, protocol: str) -> dict[str, list[Row]]:
        joined: dict[str, list[Row]] = {split: [] for split in SPLITS}
        for number, member in enumerate(self.members.values()):
            found = member.splits(protocol)
            if len(found["train"]) > self.limit:
                found["train"] = carve(found["train"], member.texts, self.limit)[1]
            for split, rows in joined.items():
                rows += [{"task": number, "row": row} for row in found[split]]
        return joined

    def data_fingerprint(self) -> str:
        parts = [f"{name} {member.data_fingerprint()}" for name, member in self.members.items()]
        return hashlib.sha256("\n".join([f"limit {self.limit}", *parts]).encode()).hexdigest()

    def subset(self) -> bool | None:
        known = [member.subset() for member in self.members.values()]
        return True if True in known else None if None in known else False

    @property
    def split_hint(self) -> str:
        return "a mixture joins train, validation and test"

    @property
    def origin(self) -> str:
        origins = dict.fromkeys(member.origin for member in self.members.values())
        # What has to be fetched from the hub for one task has to be fetched for the mixture.
        return ", ".join(sorted(origins, key=lambda origin: not origin.startswith("hub:")))

    def references(self, rows: Sequence[Row]) -> list[Any]:
        """Return (number of the task, that task's own reference) for each row."""
        members = list(self.members.values())
        return [(row["task"], members[row["task"]].references([row["row"]])[0]) for row in rows]

    # Measuring.

    def _own(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[int, tuple[list[Any], list[Any]]]:
        """Return, by number of the task, its own predictions and references."""
        found: dict[int, tuple[list[Any], list[Any]]] = {}
        head = self.formulation == "head"
        starts = [classes.start if head else 0 for classes in self.task_classes]
        for prediction, (number, reference) in zip(predictions, references, strict=True):
            own = found.setdefault(number, ([], []))
            own[0].append(prediction - starts[number])
            own[1].append(reference)
        return found

    def metrics(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float | None]:
        """Return the mean of the tasks' primary metrics and every task's own, as ``<task>_<metric>``."""
        values: dict[str, float | None] = {}
        primaries = []
        for number, own in sorted(self._own(predictions, references).items()):
            name = self.tasks[number]
            found = self.members[name].metrics(*own)
            primaries.append(found[self.members[name].primary_metric])
            values |= {f"{name}_{metric}": value for metric, value in found.items()}
        known = [value for value in primaries if value is not None]
        mean = sum(known) / len(known) if known and len(known) == len(primaries) else None
        return {PRIMARY: mean, **values}

    def item_scores(self, predictions: Sequence[Any], references: Sequence[Any]) -> list[float]:
        """Return each row's score as its own task gives it."""
        own = self._own(predictions, references)
        names = self.tasks
        scores = {number: iter(self.members[names[number]].item_scores(*parts)) for number, parts in own.items()}
        return [next(scores[number]) for number, _ in references]

    # Encoding: each task's rows by itself, then put back in order.

    def encode(self, rows: Sequence[Row], tokenizer: Any, max_length: int, kind: str) -> Encoded:
        parts, classes = {}, self.task_classes
        for number, member in enumerate(self.members.values()):
            own = [row["row"] for row in rows if row["task"] == number]
            encoded = member.encode(own, tokenizer, max_length, kind)
            if self.formulation == "head":
                targets: Any = [target + classes[number].start for target in encoded.targets or ()]
                encoded = dataclasses.replace(encoded, targets=targets)
            parts[number] = encoded
        return joined(parts, [row["task"] for row in rows])

    def encode_choices(
        self, rows: Sequence[Row], tokenizer: Any, max_length: int, kind: str
    ) -> tuple[Encoded, list[int]]:
        parts, owners = {}, [0] * len(rows)
        for number, member in enumerate(self.members.values()):
            places = [place for place, row in enumerate(rows) if row["task"] == number]
            parts[number], own = member.encode_choices([rows[p]["row"] for p in places], tokenizer, max_length, kind)
            for owner in own:
                owners[places[owner]] += 1
        tasks = [row["task"] for row, count in zip(rows, owners, strict=True) for _ in range(count)]
        return joined(parts, tasks), [place for place, count in enumerate(owners) for _ in range(count)]


def joined(parts: Mapping[int, Encoded], tasks: Sequence[int]) -> Encoded:
    """Return the rows of several tasks in the order that `tasks` gives, each task's own in their order."""
    rows = {number: iter(range(len(part))) for number, part in parts.items()}
    places = [(number, next(rows[number])) for number in tasks]

    def column(name: str) -> Any:
        columns = {number: getattr(part, name) for number, part in parts.items() if len(part)}
        if any(values is None for values in columns.values()) or not columns:
            return None
        return [columns[number][row] for number, row in places]

    return Encoded(
        column("input_ids") or [], column("token_type_ids"), column("targets"), column("labels"), task_ids=list(tasks)
    )
