"""What a search cost: trials, steps, tokens, seconds and energy of each method, from the records of its trials."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from peftbench.analysis.frame import Record, dig, number
from peftbench.analysis.studies import COMPLETE, FAILED, PRUNED, Study

UNCHARGED = ("profile",)
"""Phases that are no part of tuning: cost is measured for the report, once a configuration."""


@dataclass(frozen=True)
class Charge:
    """What training some runs took; None where a part of it is not known.

    Attributes:
        steps: optimizer steps.
        tokens: real tokens trained on, without padding: steps by batch by the mean length of the task's texts.
        seconds: of the device, each run's share of its pack.
        joules: at the energy measured for a token of each configuration.
        flops: at the FLOPs counted for a token of each configuration, padding included.
    """

    steps: float = 0.0
    tokens: float | None = 0.0
    seconds: float | None = 0.0
    joules: float | None = 0.0
    flops: float | None = 0.0

    def __add__(self, other: "Charge") -> "Charge":
        def total(a: float | None, b: float | None) -> float | None:
            return None if a is None or b is None else a + b

        return Charge(**{f.name: total(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)})  # type: ignore[arg-type]


def seconds(record: Record) -> float | None:
    """Return a run's share of its pack's time; None where the record does not tell.

    Where others came and went the record has it, as runs that trained side by side shared each stretch; else it is the
    whole time over the pack's size. Measuring cost is not in it.
    """
    share = number(dig(record, ("pack", "share_seconds")))
    phases = dig(record, ("pack", "seconds"))
    if share is not None or not isinstance(phases, Mapping):
        return share
    whole = sum(float(v) for name, v in phases.items() if name not in UNCHARGED)
    return whole / (number(dig(record, ("pack", "size"))) or 1.0)


def steps(record: Record) -> int:
    """Return how many optimizer steps a run made."""
    return len(dig(record, ("trace", "loss")) or [])


def filling(records: Iterable[Record]) -> dict[Any, float]:
    """Return the share of a full-length batch that is real tokens, by what it depends on: texts, tokenizer and length.

    Known from any run whose cost was measured, whatever its method.
    """
    found = {}
    for record in records:
        padded, real = (number(dig(record, ("cost", f"{p}tokens_per_second"))) for p in ("padded_", ""))
        if padded and real is not None:
            found[_texts(record)] = real / padded
    return found


def _texts(record: Record) -> tuple[Any, ...]:
    paths = (("model", "name"), ("task", "name"), ("identity", "data"), ("train", "max_length"))
    return tuple(str(dig(record, ("spec", *path))) for path in paths)


def charge(record: Record, shares: Mapping[Any, float]) -> Charge:
    """Return what one run took; `shares` are those of `filling`."""
    made = steps(record)
    rows, length = (number(dig(record, ("spec", "train", key))) for key in ("batch_size", "max_length"))
    share = shares.get(_texts(record))
    tokens = None if rows is None or length is None or share is None else made * rows * length * share
    joules = number(dig(record, ("cost", "energy_joules_per_1k_tokens")))
    return Charge(
        steps=made,
        tokens=tokens,
        seconds=seconds(record),
        joules=None if joules is None or tokens is None else joules * tokens / 1000,
        flops=training_flops(record),
    )


def training_flops(record: Record) -> float | None:
    """Return steps by batch by length by the FLOPs counted for a token; None without a measured cost."""
    rows, length = (number(dig(record, ("spec", "train", key))) for key in ("batch_size", "max_length"))
    per_token = number(dig(record, ("cost", "flops_per_token")))
    return None if rows is None or length is None or per_token is None else steps(record) * rows * length * per_token


@dataclass(frozen=True)
class Tuning:
    """What one method's searches cost: its trials by state, how many runs they made, and what these took.

    Trials that asked for the same configuration share a run, which is charged once. `lost` runs have no record.
    """

    method: str
    trials: int
    complete: int
    pruned: int
    failed: int
    runs: int
    lost: int
    charge: Charge


def tuning(studies: Sequence[Study], records: Mapping[str, Record]) -> list[Tuning]:
    """Return what each method's studies cost, in order of first appearance; `records` by run id."""
    shares = filling(records.values())
    by_method: dict[str, list[Study]] = {}
    for study in studies:
        by_method.setdefault(study.method, []).append(study)
    found = []
    for method, members in by_method.items():
        asked = dict.fromkeys(t.run_id for s in members for t in s.trials if t.run_id is not None)
        known = [records[run_id] for run_id in asked if run_id in records]
        total = Charge()
        for record in known:
            total = total + charge(record, shares)
        counts: dict[str, Any] = {state: sum(len(s.of(state)) for s in members) for state in (COMPLETE, PRUNED, FAILED)}
        found.append(
            Tuning(
                method=method,
                trials=sum(counts.values()),
                runs=len(known),
                lost=len(asked) - len(known),
                charge=total,
                **counts,
            )
        )
    return found
