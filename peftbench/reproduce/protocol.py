"""How a run differs from what a published row says of itself: every fact beside ours, and whether it decides.

What decides: other weights, data, reported split, rule of selection, start, method settings, learning rate, batch size
or length of training. What is only noted: number of seeds, precision, longest sequence, warm-up, weight decay, and what
the source does not state, or states in words ("up to 16").
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from peftbench.published import Value
from peftbench.reproduce.verdicts import Difference

METHOD_KEYS = {
    "r": "rank", "alpha": "alpha", "lora_alpha": "alpha", "lora_dropout": "dropout", "bottleneck": "bottleneck",
    "num_virtual_tokens": "length", "pre_seq_len": "length", "n_frequency": "frequencies", "d_initial": "d_init",
    "init_r": "init_rank", "target_r": "target_rank", "orth_reg": "orthogonal",
}  # fmt: skip
"""What sources call a method's settings → ours."""
TRAIN_KEYS = {"lr": "learning_rate", "lr_vera": "learning_rate", "batch": "batch_size", "schedule": "schedule"}
"""Settings of training that decide → ours."""
NOTED_KEYS = {
    "seq": "max_length", "seq_len": "max_length", "max_seq_length": "max_length", "cutoff_len": "max_length",
    "warmup_ratio": "warmup", "weight_decay": "weight_decay", "dtype": "precision",
}  # fmt: skip
"""Settings of training that are noted → ours."""
ROLES = {
    "q": "query", "query": "query", "wq": "query", "q_proj": "query", "query_proj": "query",
    "k": "key", "key": "key", "wk": "key", "k_proj": "key", "key_proj": "key",
    "v": "value", "value": "value", "wv": "value", "v_proj": "value", "value_proj": "value",
    "o": "output", "wo": "output", "o_proj": "output", "output": "output",
    "up": "up", "up_proj": "up", "down": "down", "down_proj": "down", "gate": "gate", "gate_proj": "gate",
}  # fmt: skip
"""Names of maps, sources' and ours → the role's last word."""
PRECISIONS = {"bfloat16": "bf16", "bf16": "bf16", "float32": "fp32", "fp32": "fp32"}


def roles(targets: Any) -> frozenset[str] | None:
    """Return targets as a set of roles; None where they are given in words that are not known here."""
    parts = re.split(r"[,+]", targets) if isinstance(targets, str) else [str(t) for t in targets]
    words = [part.strip().rpartition(".")[2].lower() for part in parts]
    return frozenset(ROLES[word] for word in words) if words and all(word in ROLES for word in words) else None


def same(published: Any, ours: Any) -> bool:
    """Tell whether two settings are equal, numbers to a relative 1e-6."""
    if isinstance(published, int | float) and isinstance(ours, int | float):
        return math.isclose(published, ours, rel_tol=1e-6)
    return bool(published == ours)


def selection_of(record: Mapping[str, Any]) -> str:
    """Return the rule that chose the reported step of a run, in the registry's words."""
    quality = record.get("quality") or {}
    if len(quality.get("evaluations") or ()) == 1:
        return "last"
    paper = (quality.get("protocol") or record["spec"].get("protocol")) == "paper"
    return "best on the reported split" if paper else "held out"


def epochs_of(spec: Mapping[str, Any]) -> tuple[str, float]:
    """Return what a run's length is stated in, epochs or steps, and how many."""
    train = spec["train"]
    return ("steps", train["steps"]) if train.get("steps") else ("epochs", train["epochs"])


def differences(row: Value, record: Mapping[str, Any], seeds: int) -> list[Difference]:
    """Return how the run of `record` differs from `row`; `seeds` is how many runs there are of its kind."""
    return [*_identity(row, record), *_method(row, record["spec"]), *_training(row, record["spec"], seeds)]


def _identity(row: Value, record: Mapping[str, Any]) -> Iterator[Difference]:
    spec, here, protocol = record["spec"], row.here, row.protocol
    model = spec["model"]
    if here.weights == "other":
        yield Difference("model", row.model, f"{model.get('checkpoint')} ({here.note})")
    elif model.get("weights") == "random" or str(spec["identity"].get("weights", "")).startswith("random:"):
        yield Difference("model", row.model, "random weights")
    if here.split not in ("", "validation", "test"):
        yield Difference("reported split", here.split, "all of the official validation split")
    if (record.get("quality") or {}).get("data_subset"):
        yield Difference("data", "all", "a part")
    ours = selection_of(record)
    if protocol.selection != ours:
        yield Difference("selection of the step", protocol.selection, ours, decides=bool(protocol.selection))
    start = protocol.starts_from(here.task)
    if start != "pretrained":
        given = f"the {start} adapter" if start else ""
        yield Difference("start", given, "the pretrained model", decides=bool(start))
    if "|" in row.metric.ours:
        yield Difference("metric", "", "accuracy", decides=False)


def _method(row: Value, spec: Mapping[str, Any]) -> Iterator[Difference]:
    settings, method = row.settings, spec["method"]
    for theirs, ours in METHOD_KEYS.items():
        if theirs in settings and ours in method and not same(settings[theirs], method[ours]):
            yield Difference(ours, str(settings[theirs]), str(method[ours]))
    targets = settings.get("target", settings.get("target_modules"))
    if targets is not None and "targets" in method:
        pair = roles(targets), roles(method["targets"])
        if None in pair or pair[0] != pair[1]:
            yield Difference("targets", str(targets), str(method["targets"]), decides=None not in pair)


def _training(row: Value, spec: Mapping[str, Any], seeds: int) -> Iterator[Difference]:
    settings, train = row.settings, spec["train"]
    for keys, decides in ((TRAIN_KEYS, True), (NOTED_KEYS, False)):
        for theirs, ours in keys.items():
            value = settings.get(theirs)
            if isinstance(value, str):
                value = PRECISIONS.get(value, value)
            words = isinstance(value, list) or (isinstance(value, str) and isinstance(train.get(ours), int | float))
            if value is not None and not same(value, train.get(ours)):
                yield Difference(ours, str(value), str(train.get(ours)), decides and not words)
    for ours, names in (("learning_rate", ("lr", "lr_vera", "lr_A")), ("batch_size", ("batch",))):
        if not any(name in settings for name in names):
            yield Difference(ours, "", str(train.get(ours)), decides=False)
    unit, length = epochs_of(spec)
    stated = {"epochs": settings.get("epochs"), "steps": settings.get("steps", settings.get("max_steps"))}
    if stated[unit] is not None:
        if not same(stated[unit], length):
            yield Difference(unit, str(stated[unit]), f"{length:g}", decides=isinstance(stated[unit], int | float))
    else:
        other = next((f"{v} {k}" for k, v in stated.items() if v is not None), "")
        yield Difference("length of training", other, f"{length:g} {unit}", decides=bool(other))
    if row.seeds != seeds:
        yield Difference("seeds", "" if row.seeds is None else str(row.seeds), str(seeds), decides=False)
