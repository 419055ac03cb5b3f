"""Reported parameter counts, rebuilt from shapes alone: this collection's closed forms on meta models.

A row is *equal* when the closed form gives the reported number, *explained* when named rules (`RULES`) give the rest to
the parameter, *inconsistent* when no model of its width can have that number, and *differs* when no rule gives it
although one could. What cannot be rebuilt says why. A number that a paper prints rounded is equal when the closed form
rounds to the same digits.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from peftbench import published, registry
from peftbench.errors import UserError
from peftbench.models.roles import Site, linear_sites
from peftbench.published import Count
from peftbench.reproduce import shapes
from peftbench.reproduce.verdicts import DIFFERS, EXACT, NOT_RUN

RULES = {
    "head": "the task's head trains and is counted",
    "head twice": "the head is counted twice, as its frozen original and as the copy that trains",
    "frozen head": "all parameters include the head's frozen original beside the copy that trains",
    "two prompts": "an encoder-decoder gets a prompt for each half",
    "decoder alone": "prefixes go into the decoder alone",
    "other biases": "biases outside the layers' linear maps and norms (poolers, heads) train as well",
    "all biases": "every bias of the model trains",
    "two ranks": "all parameters include a counter of ranks at each map",
    "earlier adapters": "all parameters include adapters that the same source put on the model before",
    "frozen factor": "the frozen factor is counted among all parameters",
    "shared matrices": "the frozen random matrices that all maps share are counted",
    "half of four bits": "two 4-bit weights are stored, and counted, as one element",
    "magnitudes": "all parameters are those of the same adapter with magnitudes",
    "without magnitudes": "the magnitudes are not counted",
    "other task": "the line is that of sequence classification, with its head",
    "binary millions": "M stands for 2^20",
    "cut off": "digits are cut off instead of rounded",
    "fewer norms": "HF PEFT's default for this architecture leaves some norms out",
    "frozen norms": "all parameters include the norms' frozen originals beside the copies that train",
    "pooler": "the pooler outside the model's body is adapted too",
    "share of the base": "a share of the base's parameters, the adapter's left out",
    "share of all": "a share of all parameters, the adapter's included",
    "thousandth": "the printed number is a thousandth of the base's parameters, not the closed form",
    "other rank": "the printed number is the closed form at another rank",
    "twice the half": "the printed number is twice the one printed for half the size",
}
"""What sources count differently, by name."""


VERDICT = {"equal": EXACT, "explained": EXACT, "differs": DIFFERS, "inconsistent": DIFFERS, "not here": NOT_RUN}
"""What a count can be → its verdict."""


class NotHere(Exception):
    """Why a row cannot be rebuilt."""


@dataclass(frozen=True)
class Rebuilt:
    """One reported count beside the closed form.

    Attributes:
        status: a key of `VERDICT`.
        ours: what the closed form gives for the adapter.
        terms: (rule, parameters it adds) in the order of application.
        found: `ours` with all terms added: what is compared with the reported number.
        total: all parameters as counted here; None where the source gives none.
        why: why it is not here, or how it differs.
    """

    count: Count
    status: str
    ours: int | None = None
    terms: tuple[tuple[str, int], ...] = ()
    found: int | None = None
    total: int | None = None
    total_terms: tuple[tuple[str, int], ...] = ()
    why: str = ""

    @property
    def rules(self) -> tuple[str, ...]:
        """Return the rules that were applied."""
        return tuple(dict.fromkeys(rule for rule, _ in (*self.terms, *self.total_terms)))

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "id": self.count.id,
            "published": {"trainable": self.count.trainable, "total": self.count.total, "printed": self.count.printed},
            "measured": {
                "adapter": self.ours,
                "trainable": self.found,
                "total": self.total,
                "rules": dict((*self.terms, *self.total_terms)),
            },
            "verdict": VERDICT[self.status],
            "status": self.status,
            "record": None if self.ours is None else f"closed form on {self.count.model}",
            "why": self.why,
        }


@dataclass
class _Work:
    """What rebuilding one row needs."""

    row: Count
    model: Any
    name: str
    settings: dict[str, Any]
    terms: list[tuple[str, int]] = field(default_factory=list)

    @functools.cached_property
    def method(self) -> Any:
        mapping = registry.section("method", self.name)
        return registry.build_method({**mapping, **self.settings})

    @functools.cached_property
    def adapter(self) -> int:
        return int(self.method.parameter_count(self.model))


# -- names -------------------------------------------------------------------------------------------------------------

ROLES = {
    "q": "attention.query", "k": "attention.key", "v": "attention.value", "o": "attention.output",
    "up": "mlp.up", "down": "mlp.down", "mlp": "mlp", "attention": "attention", "unembedding": "lm_head",
}  # fmt: skip
"""Short names of papers → roles."""
SPOKEN = {"all six linear matrices": "all", "all linear but the head": "all", "all 7 linear": "all"}

PEFT_IA3 = {
    "bert": (("key", "value"), ("output.dense",)), "roberta": (("key", "value"), ("output.dense",)),
    "deberta-v2": (("key_proj", "value_proj"), ("output.dense",)), "gpt2": (("c_attn",), ("mlp.c_proj",)),
    "opt": (("q_proj", "k_proj"), ("fc2",)), "llama": (("k_proj", "v_proj"), ("down_proj",)),
    "qwen2": (("q_proj", "v_proj"), ("down_proj",)), "qwen3": (("k_proj", "v_proj"), ("down_proj",)),
    "t5": (("k", "v"), ("wo",)), "mistral": (("k_proj", "v_proj"), ("down_proj",)),
}  # fmt: skip
"""HF PEFT's default targets and feed-forward targets of IA3 by model type."""
PEFT_NORMS = {"qwen2": ("norm.mlp",), "qwen3": ("norm.mlp",), "bloom": ("norm.attention", "norm.mlp", "norm.final")}
"""Norms that HF PEFT's LN tuning takes by default, where it is not all of them."""
RENAMED = {"query": "q_proj", "value": "v_proj"}
"""Modules of vision transformers, as transformers 4 and 5 call them."""


def _targets(row: Count, model: Any) -> Any:
    """Return what a row names as targets, as our `targets` takes it; where it names none, LoRA's default."""
    given = row.settings.get("target_modules", row.settings.get("target"))
    if given is None:
        return ("attention.query", "attention.value")
    if isinstance(given, list):
        return tuple(given)
    if model.config.model_type == "vit":
        present = {name.rpartition(".")[2] for name, _ in model.named_modules()}
        return tuple(n if n in present else RENAMED[n] for n in given.split(","))
    text = re.sub(r" r=\d+$", "", str(given).replace(" (default)", ""))
    if text in SPOKEN:
        return (SPOKEN[text],)
    if text == "all-linear":
        return text
    if text == "all+unembedding":
        return ("all", "lm_head")
    parts = [part.strip() for part in re.split(r"[,+]", text)]
    if "task" not in row.settings and all(part in ROLES for part in parts):
        return tuple(ROLES[part] for part in parts)
    return tuple(parts)


def _rank(row: Count) -> int:
    spoken = re.search(r" r=(\d+)$", str(row.settings.get("target", "")))
    return int(spoken.group(1)) if spoken else int(row.settings["r"])


def _adapters(row: Count) -> tuple[str, dict[str, Any]]:
    """Return method and settings of a configuration of the `adapters` library."""
    text = row.settings["adapters_config"]
    width = shapes.config_of(row.model).hidden_size
    factor = re.search(r"rf=(\d+)", text)
    size = width // int(factor.group(1)) if factor else 0
    known: dict[str, tuple[str, dict[str, Any]]] = {
        "Houlsby": ("houlsby", {"bottleneck": size, "norms": False}),
        "Pfeiffer": ("pfeiffer", {"bottleneck": size}),
        "Parallel": ("parallel", {"bottleneck": size}),
        "IA3": ("ia3", {}),
        "Prefix tuning (": ("prefix", {"length": 30, "hidden": 512}),
        "Prefix tuning flat": ("prefix", {"length": 30, "reparameterization": "none"}),
        "Prompt tuning": ("prompt", {"length": 10}),
        "LoRA": ("lora", {"rank": 8}),
    }
    return next(found for start, found in known.items() if text.startswith(start))


def _translate(row: Count, model: Any) -> tuple[str, dict[str, Any]]:
    """Return the method here and its settings; raises `NotHere`."""
    s, name = row.settings, row.method
    if "adapters_config" in s:
        return _adapters(row)
    length = {"length": s.get("num_virtual_tokens")}
    if name in ("LoRA", "rsLoRA", "LoRA (bias=all)", "HiRA (same shapes as LoRA)"):
        return "lora", {"rank": _rank(row), "targets": _targets(row, model)}
    if name.startswith("DoRA"):
        return "dora", {"rank": s["r"], "targets": _targets(row, model)}
    if name == "LoRA-FA":
        return "lora_fa", {"rank": s["r"], "targets": _targets(row, model)}
    if name == "VeRA":
        return "vera", {"rank": s["r"], "targets": _targets(row, model)}
    if name == "AdaLoRA":
        ranks = {"target_rank": s["target_r"], "init_rank": s["init_r"]}
        return "adalora", {**ranks, "targets": _targets(row, model)}
    if name == "FourierFT":
        return "fourierft", {"frequencies": s["n_frequency"], "targets": _targets(row, model)}
    if name == "MiSS":
        if s.get("init_weights") == "mini":
            raise NotHere("MiSS has no init_weights=mini here, which shares its blocks")
        return "miss", {"rank": s["r"], "targets": _targets(row, model)}
    if name == "RandLoRA":
        return "randlora", {"rank": s["r"], "targets": _targets(row, model)}
    if name == "RoAd":
        return "road", {"angles": int(s["variant"][-1]), "group_size": s["group_size"], "targets": _targets(row, model)}
    if name == "BOFT":
        size, factors = s["boft_block_size"], s["boft_n_butterfly_factor"]
        return "boft", {"block_size": size, "factors": factors, "targets": _targets(row, model)}
    if name == "OFT":
        return "oft", {"block_size": model.config.hidden_size // s["r"], "targets": _targets(row, model)}
    if name == "LoKr":
        made = {"rank": s["r"], "factor": s["decompose_factor"], "decompose_both": s["decompose_both"]}
        return "lokr", {**made, "targets": _targets(row, model)}
    if name == "IA3":
        return "ia3", _ia3(row, model)
    if name in ("LN tuning", "LayerNorm tuning (closed form)"):
        return "layernorm", {}
    if name == "BitFit":
        return "bitfit", {"biases": "all"}
    if name == "Full fine-tuning":
        return "full", {}
    if name == "Prompt tuning":
        return "prompt", length
    if name == "Prefix tuning":
        mapped = s.get("prefix_projection") and {"hidden": s["encoder_hidden_size"]}
        return "prefix", {**length, **(mapped or {"reparameterization": "none"})}
    if name in ("P-tuning", "P-tuning (MLP)"):
        return "ptuning", {**length, "encoder": "mlp", "hidden": s["encoder_hidden_size"]}
    if name == "Multitask prompt tuning":
        return "mpt", {**length, "rank": s.get("num_ranks", s.get("rank")), "tasks": s.get("num_tasks", 1)}
    if name == "Adapter (Houlsby)":
        return "houlsby", {"bottleneck": s["bottleneck"], "norms": False}
    if name in ("Adapter (Pfeiffer)", "Adapter (AdapterDrop)"):
        return "pfeiffer", {"bottleneck": s["bottleneck"]}
    raise NotHere(f"the collection has no {name}")


def _ia3(row: Count, model: Any) -> dict[str, Any]:
    s = row.settings
    if "target_modules" in s:
        inner = tuple(s["feedforward_modules"])
        return {"targets": tuple(t for t in s["target_modules"] if t not in inner), "feedforward": inner}
    if str(s.get("target", "")).startswith("k,v,ff"):
        roles = ("attention.key", "attention.value", "cross_attention.key", "cross_attention.value")
        return {"targets": roles, "feedforward": ("mlp.down",)}
    kind = model.config.model_type
    if kind not in PEFT_IA3:
        raise NotHere(f"HF PEFT has no default targets for {kind}")
    targets, inner = PEFT_IA3[kind]
    return {"targets": targets, "feedforward": inner}


# -- counting ----------------------------------------------------------------------------------------------------------


def _task(row: Count) -> str:
    if "adapters_config" in row.settings or row.printed or row.method.endswith("(closed form)"):
        language = "unembedding" in str(row.settings.get("target", ""))
        return "lm" if language else "body"
    return str(row.settings.get("task", ""))


def _work(row: Count) -> _Work:
    """Translate a row; raises `NotHere`."""
    if row.method == "Prefix tuning (PreLayer)" or row.method == "Prompt embeddings (PreEmbed)":
        raise NotHere(f"the collection has no {row.method}: it places its tokens otherwise")
    labels, depth = int(row.settings.get("num_labels", 2)), row.settings.get("layers")
    try:
        model = shapes.model_of(row.model, _task(row), labels, depth)
        name, settings = _translate(row, model)
        work = _Work(row, model, name, settings)
        work.adapter  # noqa: B018  computed here so that a refusal is met here
    except UserError as error:
        if row.method == "BitFit" and "no bias terms" in str(error):
            return _Work(row, model, "head", {})
        raise NotHere(str(error).partition(" (mapped: ")[0]) from error  # how to map one helps elsewhere
    return work


def _trained(work: _Work) -> Iterator[tuple[str, int]]:
    """Yield what the source counts beside our adapter, with the rule's name."""
    row, model = work.row, work.model
    has_head = row.settings.get("task") in shapes.HEADS or row.settings.get("task") == "img"
    seq2seq = bool(getattr(model.config, "is_encoder_decoder", False))
    if seq2seq and work.name in ("prompt", "ptuning", "mpt") and _two_prompts(row):
        width = model.config.hidden_size
        more = row.settings["num_virtual_tokens"] * width
        if work.name == "mpt":
            more += work.method.count_tasks * work.method.rank * row.settings["num_virtual_tokens"]
        yield "two prompts", more
    if seq2seq and work.name == "prefix":
        sites = _sites(work)
        yield "decoder alone", -sum(work.method.count(s) for s in sites if ".encoder" in f".{s.name}")
    if work.name == "bitfit":
        yield "other biases", shapes.biases(model.base_model) - work.adapter
    if row.method == "LoRA (bias=all)":
        yield "all biases", shapes.biases(model) - sum(map(shapes.biases, shapes.head_parts(model)))
    if row.method == "LN tuning":
        sites, kept = _sites(work), PEFT_NORMS.get(model.config.model_type)
        yield "fewer norms", -sum(work.method.count(s) for s in sites if kept is not None and s.role not in kept)
    if row.settings.get("target") == "all-linear":
        parts = [name for name, _ in model.named_children() if name == "pooler"]
        yield "pooler", sum(map(work.method.count, linear_sites(model, ("pooler.dense",)))) if parts else 0
    if has_head and work.name == "full":
        yield "head", shapes.total(model) - work.adapter
    elif has_head:
        yield "head", shapes.outside(model) if work.name == "bitfit" else shapes.head(model)


def _two_prompts(row: Count) -> bool:
    """Tell whether the source is HF PEFT (or says what its printed number needs), which gives each half a prompt."""
    return row.model == "bigscience/T0_3B" or not row.printed


def rebuild(row: Count) -> Rebuilt:
    """Rebuild one reported count."""
    try:
        work = _work(row)
    except NotHere as reason:
        return Rebuilt(row, "not here", why=str(reason))
    terms = [(rule, n) for rule, n in _trained(work) if n]
    found = work.adapter + sum(n for _, n in terms)
    if row.printed:
        return _printed(work, terms, found)
    if found != row.trainable:
        more = next(((r, n) for r, n in _other_trained(work) if found + n == row.trainable), None)
        if more is None:
            return Rebuilt(row, "differs", work.adapter, tuple(terms), found, why=f"{found - row.trainable:+,}")
        terms.append(more)
        found = row.trainable
    if row.total is None:
        return Rebuilt(row, "explained" if terms else "equal", work.adapter, tuple(terms), found)
    for total_terms in _totals(work, terms):
        total = shapes.total(work.model) + sum(n for _, n in total_terms)
        if total == row.total:
            named = tuple((r, n) for r, n in total_terms if r)
            status = "explained" if terms or named else "equal"
            return Rebuilt(row, status, work.adapter, tuple(terms), found, total, named)
    total = shapes.total(work.model) + sum(n for _, n in next(_totals(work, terms)))
    status, why = "differs", f"trained parameters equal; all parameters {total - row.total:+,}, which no rule explains"
    if width := _left_over(work, row.total):
        whole, rest = divmod(row.total, width)
        status = "inconsistent"
        why = (
            f"{row.total:,} in all cannot be: whatever the vocabulary and the depth, every tensor and the adapter hold "
            f"a multiple of the width {width}, and that is {whole:,} × {width} + {rest}; with these settings {total:,}"
        )
    return Rebuilt(row, status, work.adapter, tuple(terms), found, total, why=why)


def _left_over(work: _Work, total: int) -> int:
    """Return the model's width if all its tensors and the adapter are multiples of it and `total` is not; else 0."""
    width = int(getattr(work.model.config, "hidden_size", 0))
    counted = (work.adapter, *(p.numel() for p in work.model.parameters()))
    return width if width and total % width and not any(n % width for n in counted) else 0


def _other_trained(work: _Work) -> Iterator[tuple[str, int]]:
    yield "head twice", shapes.head(work.model)


def _totals(work: _Work, terms: list[tuple[str, int]]) -> Iterator[list[tuple[str, int]]]:
    """Yield ways to count all parameters beside the model's own: lists of (rule, parameters), "" for the adapter."""
    row, model = work.row, work.model
    own = work.adapter + sum(
        n for rule, n in terms if rule in ("two prompts", "decoder alone", "pooler", "fewer norms")
    )
    if work.name == "layernorm":
        yield [("frozen norms", own)]
    if work.name in ("full", "bitfit", "layernorm", "head"):
        own = 0
    copies = shapes.head(model) if own and any(rule == "head" for rule, _ in terms) else 0
    plain = [("", own)]
    first = [*plain, *([("frozen head", copies)] if copies else [])]
    if work.name == "adalora":
        first.append(("two ranks", len(_sites(work))))
    if work.name == "lora_fa":
        first.append(("frozen factor", sum(work.method.rank * s.in_features for s in _sites(work))))
    yield first
    if "before" in row.settings:
        earlier = {"targets": _targets(row, model)}
        made = [registry.section("method", n) | earlier | {"rank": r} for n, r in row.settings["before"].items()]
        left = sum(registry.build_method(mapping).parameter_count(model) for mapping in made)
        yield [*first, ("earlier adapters", left)]
    yield plain
    if "4-bit" in row.method:
        quantized = sum(s.in_features * s.out_features for s in _sites(work))
        yield [*first, ("half of four bits", -quantized // 2)]
    if work.name == "lora":
        yield [*first, ("magnitudes", sum(s.out_features for s in _sites(work)))]
    if row.settings.get("task") == "tokcls":
        other = shapes.model_of(row.model, "seqcls", int(row.settings.get("num_labels", 2)))
        yield [*plain, ("other task", shapes.total(other) - shapes.total(model))]


# -- printed numbers ---------------------------------------------------------------------------------------------------

UNITS = {"K": 1e3, "M": 1e6, "B": 1e9}


def _scaled(value: float, printed: str) -> tuple[float, float, float]:
    """Return value and printed number in the printed unit, and the unit of its last digit."""
    unit = printed[-1] if printed[-1] in "KMB%" else ""
    digits = printed.removesuffix(unit)
    factor = 100 if unit == "%" else 1 / UNITS.get(unit, 1)
    return value * factor, float(digits), 10.0 ** -len(digits.partition(".")[2])


def rounds_to(value: float, printed: str) -> bool:
    """Tell whether `value` prints as `printed` ("0.83%", "36.8K", "0.49B") to its digits; halves may go either way."""
    scaled, number, last = _scaled(value, printed)
    return abs(scaled - number) <= last / 2 * (1 + 1e-9)


def cuts_to(value: float, printed: str) -> bool:
    """Tell whether `value` prints as `printed` if further digits are dropped."""
    scaled, number, last = _scaled(value, printed)
    return -1e-9 * last <= scaled - number < last


def _printed(work: _Work, terms: list[tuple[str, int]], found: int) -> Rebuilt:
    """Compare a closed form with a number printed in a paper."""
    row, printed = work.row, work.row.printed
    made = tuple(terms)
    if found != row.trainable:
        why = f"the closed form here gives {found:,}, the table {row.trainable:,}"
        return Rebuilt(row, "differs", work.adapter, made, found, why=why)
    if not printed.endswith("%") and rounds_to(found, printed):
        return Rebuilt(row, "explained" if made else "equal", work.adapter, made, found)
    for rule, fits in _readings(work, found):
        if fits:
            return Rebuilt(row, "explained", work.adapter, (*made, (rule, 0)), found, why=RULES[rule])
    return Rebuilt(row, "differs", work.adapter, made, found, why=f"printed {printed}; the closed form gives {found:,}")


def _readings(work: _Work, found: int) -> Iterator[tuple[str, bool]]:
    """Yield other readings of a printed number, and whether they fit; the likelier first."""
    printed = work.row.printed
    if printed.endswith("%"):
        base = shapes.total(shapes.model_of(work.row.model))
        yield "share of the base", rounds_to(found / base, printed)
        yield "share of all", rounds_to(found / (base + found), printed)
        if work.name == "dora":
            magnitudes = sum(s.out_features for s in _sites(work))
            yield "without magnitudes", rounds_to((found - magnitudes) / base, printed)
        return
    yield "cut off", cuts_to(found, printed)
    if printed.endswith("M"):
        yield "binary millions", rounds_to(found / 2**20 * 1e6, printed)
    for key in ("rank", "bottleneck"):
        size = work.settings.get(key)
        if size and size % 2 == 0:
            less = _Work(work.row, work.model, work.name, {**work.settings, key: size // 2}).adapter
            scaled, number, last = _scaled(less, printed)
            halves = (round(scaled / last) * last, math.floor(scaled / last) * last)
            yield "twice the half", any(abs(2 * half - number) < last * 1e-6 for half in halves)
            if key == "rank":
                yield "other rank", cuts_to(less, printed)
    if work.name == "vera":
        sides = [max(sizes) for sizes in zip(*((s.in_features, s.out_features) for s in _sites(work)), strict=True)]
        yield "shared matrices", rounds_to(found + work.settings["rank"] * sum(sides), printed)
    if work.name == "lora":
        yield "thousandth", rounds_to(shapes.total(shapes.model_of(work.row.model)) / 1000, printed)


def _sites(work: _Work) -> list[Site]:
    return list(work.method.sites(work.model))


def rebuild_all(names: list[str] | None = None) -> list[Rebuilt]:
    """Rebuild the rows that `names` ask for (ids, models or methods; none: all).

    Raises:
        UserError: a name fits nothing.
    """
    rows = published.counts()
    if names:
        for name in names:
            if not any(name in (row.id, row.model, row.method) for row in rows.values()):
                raise UserError(f"{name}: no such count; expected an id, a model or a method of the table")
        rows = {k: row for k, row in rows.items() if {row.id, row.model, row.method} & set(names)}
    return [rebuild(row) for row in rows.values()]


def tally(found: Sequence[Rebuilt]) -> Mapping[str, int]:
    """Return status → rows."""
    return {s: sum(r.status == s for r in found) for s in VERDICT}
