"""How a run differs from what a published row says of itself: every fact beside ours, and whether it decides.

What decides: other weights, data, reported split, rule of selection, start, method settings, learning rate, batch size,
length of training, label smoothing, or how texts are generated. What is only noted: number of seeds, precision, longest
sequence, warm-up, weight decay, and what the source does not state, or states in words ("up to 16").
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from peftbench.published import Value
from peftbench.reproduce.verdicts import Difference

METHOD_KEYS = {
    "r": "rank", "alpha": "alpha", "lora_alpha": "alpha", "lora_dropout": "dropout", "bottleneck": "bottleneck",
    "num_virtual_tokens": "length", "pre_seq_len": "length", "n_frequency": "frequencies", "scaling": "scale",
    "d_initial": "d_init", "init_r": "init_rank", "target_r": "target_rank", "orth_reg": "orthogonal",
    "orth_reg_weight": "orthogonal", "decompose_factor": "factor", "boft_block_size": "block_size",
    "boft_n_butterfly_factor": "factors", "group_size": "group_size", "prompt_tuning_init": "init",
    "encoder_hidden_size": "hidden", "variant": "angles",
}  # fmt: skip
"""What sources call a method's settings → ours."""
WORDS = {"RANDOM": "random", "SAMPLE_VOCAB": "vocabulary", "road_1": 1, "road_2": 2, "road_4": 4}
"""What sources write for values of settings → ours."""
ELSEWHERE = {
    "lr_head": ("learning rate of the head", "head_learning_rate"), "data": ("training data", None),
    "train_examples": ("training rows", None),
}  # fmt: skip
"""Settings of sources that need not have a like here: their name, and the setting of training that stands for them."""
SILENT = {
    "optimizer", "seed", "seeds", "autocast_adapter_dtype", "projection_prng_key", "save_projection", "token_dim",
    "num_layers", "num_attention_heads", "num_transformer_submodules", "feedforward_modules", "steps", "max_steps",
    "epochs", "target", "target_modules", "warmup_steps", "init_weights", "init_ia3_weights", "use_dora",
    "use_rslora",
}  # fmt: skip
"""Settings that are compared elsewhere, go with one that is, or change no result."""
DEFAULTED = {
    "label_smoothing": ("label smoothing", "train", "label_smoothing", 0.0),
    "beam": ("beams of generated texts", "task", "beams", 1),
    "length_penalty": ("length penalty", "task", "length_penalty", 1.0),
    "no_repeat_ngram": ("n-grams that come once", "task", "no_repeat_ngram", 0),
}  # fmt: skip
"""Settings of sources → their name, ours, by section, and what a record that does not have it was made with."""
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


def _start(source: str) -> str:
    """Return in words what training starts from: "pretrained", a task, or "" where it is not stated."""
    return source and ("the pretrained model" if source == "pretrained" else f"the {source} adapter")


def start_of(spec: Mapping[str, Any]) -> str:
    """Return in words what a run's training started from."""
    train = spec["train"]
    task = train.get("start_task")
    return "the pretrained model" if not train.get("start") else _start(task) if task else "an adapter of unknown task"


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
    start, mine = _start(protocol.starts_from(here.task)), start_of(spec)
    if start != mine:
        yield Difference("start", start, mine, decides=bool(start))
    if "|" in row.metric.ours:
        yield Difference("metric", "", "accuracy", decides=False)


def _method(row: Value, spec: Mapping[str, Any]) -> Iterator[Difference]:
    settings, method = row.settings, spec["method"]
    for theirs, ours in METHOD_KEYS.items():
        unused = theirs == "encoder_hidden_size" and settings.get("prefix_projection") is False
        if theirs in settings and ours in method and not unused:
            value = settings[theirs]
            value = WORDS.get(value, value) if isinstance(value, str) else value
            words = isinstance(value, str) and isinstance(method[ours], int | float)
            if not same(value, method[ours]):
                yield Difference(ours, str(value), str(method[ours]), decides=not words)
        elif theirs == "variant" and not str(settings.get(theirs, "default")).endswith("default"):
            yield Difference("variant", str(settings[theirs]), "none")
    if isinstance(settings.get("init_weights"), str):
        yield Difference("initialisation", settings["init_weights"], "the method's own")
    yield from _targets(settings, method)


def _targets(settings: Mapping[str, Any], method: Mapping[str, Any]) -> Iterator[Difference]:
    inner = settings.get("feedforward_modules", ())
    targets = settings.get("target", settings.get("target_modules"))
    if isinstance(targets, list):
        targets = [t for t in targets if t not in inner]
    for what, theirs in (("targets", targets), ("feedforward", inner or None)):
        if theirs is not None and what in method:
            pair = roles(theirs), roles(method[what])
            if None in pair or pair[0] != pair[1]:
                yield Difference(what, str(theirs), str(method[what]), decides=None not in pair)


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
    for theirs, (what, stands) in ELSEWHERE.items():
        value, mine = settings.get(theirs), None if stands is None else train.get(stands) or train.get("learning_rate")
        if value is not None and not same(value, mine):
            yield Difference(what, str(value), "none" if mine is None else str(mine))
    for theirs, (what, section, ours, default) in DEFAULTED.items():
        value, mine = settings.get(theirs), spec[section].get(ours, default)
        if not same(default if value is None else value, mine):
            words = not isinstance(value, int | float)
            yield Difference(
                what, "" if value is None else str(value), f"{mine:g}" if mine else "none", decides=not words
            )
    own = train.get("head_learning_rate")
    if own is not None and "lr_head" not in settings and not same(own, train.get("learning_rate")):
        yield Difference("learning rate of the head", "", str(own), decides=False)
    known = {*METHOD_KEYS, *TRAIN_KEYS, *NOTED_KEYS, *ELSEWHERE, *DEFAULTED, *SILENT, "lr_A"}
    for key in sorted(settings.keys() - known):
        yield Difference(key, str(settings[key]), "not compared", decides=False)
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
