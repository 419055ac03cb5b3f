"""What every task offers: splits, an encoding for the two formulations, references, metrics and per-item scores.

Two formulations: ``head`` (a new layer on the model's pooled state classifies, or regresses when ``num_labels`` is
1) and ``text`` (the model's own language head; trained on the answer's tokens only). `evaluation` says how:

| value | the engine hands `metrics` | `references` holds |
| --- | --- | --- |
| ``labels`` | the arg-max class (int), or the regression value (float) | class (int) or value (float) |
| ``choices`` | the index of the candidate whose tokens, end token included, are likeliest in sum | index (int) |
| ``generation`` | `parse` of each text generated as `decoding` says | strings, or lists of strings |
| ``loss`` | per row (summed negative log-likelihood in nats, number of answer tokens) | None for each row |

`metrics` gives None where a metric is undefined. Nothing here imports torch; `evaluate` is imported on first use.
"""

import hashlib
import math
import weakref
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from peftbench.errors import UserError
from peftbench.tasks.source import Row

FORMULATIONS = ("head", "text")
PROTOCOLS = ("held_out", "paper")
VALIDATION_SHARE = 0.1
VALIDATION_LIMIT = 1000
T = TypeVar("T")
# Counts the rules by which splits are made; part of every fingerprint, since a new rule means other rows.
SPLIT_RULE = 1
IGNORED = -100


@dataclass(frozen=True)
class Decoding:
    """How texts are generated.

    Attributes:
        beams: how many a beam search keeps; 1: the likeliest token each time.
        length_penalty: α of log p(text) / length^α, by which a beam search chooses among complete texts.
        no_repeat_ngram: no n-gram of so many tokens comes twice; 0: any may.
        no_repeat_within: what counts as having come: the "text" (a decoder's prompt too) or the "answer" alone.
    """

    beams: int = 1
    length_penalty: float = 1.0
    no_repeat_ngram: int = 0
    no_repeat_within: str = "text"


@dataclass
class Encoded:
    """Token ids of rows, unpadded. To be read only: the same object is handed out again for the same rows.

    `input_ids`, `token_type_ids` and causal `labels` have one list per row, of that row's length; seq2seq `labels` are
    the decoder's target ids. `targets` (head formulation) are classes or values; `labels` (text formulation) hold -100
    where a token is not trained on. `task_ids` number each row's task from 0 where rows come from several.
    """

    input_ids: list[list[int]]
    token_type_ids: list[list[int]] | None = None
    targets: list[int] | list[float] | None = None
    labels: list[list[int]] | None = None
    task_ids: list[int] | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def lengths(self) -> list[int]:
        """Input tokens of each row."""
        return [len(ids) for ids in self.input_ids]


class Splits(dict[str, list[Row]]):
    """Split name → rows; asking for a split that the task lacks raises UserError instead of KeyError."""

    def __init__(self, task: str, splits: Mapping[str, list[Row]], hint: str = ""):
        super().__init__(splits)
        self.task = task
        self.hint = hint

    def __missing__(self, split: str) -> list[Row]:
        hint = f"; {self.hint}" if self.hint else ""
        raise UserError(f"task {self.task} has no {split} split here, only {', '.join(self) or 'none'}{hint}")


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """Settings of a task; subclasses fill in where rows come from and what they mean.

    `max_length` is in tokens, special tokens included.
    """

    name: str
    formulation: str = "head"
    max_length: int = 128
    max_new_tokens: int = 32

    def __post_init__(self) -> None:
        if self.formulation not in self.formulations:
            raise UserError(
                f"task.formulation={self.formulation}: task {self.name} accepts {' or '.join(self.formulations)}"
            )
        for key in ("max_length", "max_new_tokens"):
            value = getattr(self, key)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"task.{key}={value}: expected a whole number of tokens, 1 or more")

    # What a task is.

    @property
    def formulations(self) -> tuple[str, ...]:
        """The formulations this task can take."""
        return FORMULATIONS

    @property
    @abstractmethod
    def primary_metric(self) -> str:
        """The metric by which checkpoints and settings are chosen."""

    @property
    @abstractmethod
    def num_labels(self) -> int:
        """1 for regression, the number of classes from 2 on, 0 for tasks without a head formulation."""

    @property
    def num_tasks(self) -> int:
        """How many tasks the rows come from; with more than one, `Encoded.task_ids` says which is whose."""
        return 1

    @property
    def task_classes(self) -> list[range] | None:
        """Each task's classes in the head where rows come from several tasks; a row's answer is one of its own."""
        return None

    @property
    def greater_is_better(self) -> bool:
        """Whether a larger primary metric is the better one."""
        return True

    @property
    def evaluation(self) -> str:
        """How predictions are made: ``labels``, ``choices``, ``generation`` or ``loss`` (see the module's table)."""
        return "labels" if self.formulation == "head" else "choices"

    @property
    def decoding(self) -> Decoding:
        """How texts are generated, where they are."""
        return Decoding()

    # Rows.

    @abstractmethod
    def load(self, protocol: str) -> dict[str, list[Row]]:
        """Return the splits, freshly read; `splits` caches them."""

    @abstractmethod
    def data_fingerprint(self) -> str:
        """Return what identifies the data files used."""

    def subset(self) -> bool | None:
        """Whether the data at hand is known to be a part of the official set; None when nothing says so."""
        return None

    @property
    def split_hint(self) -> str:
        """What a user can do about a split that the task lacks."""
        return ""

    @property
    def origin(self) -> str:
        """Where the rows come from, without machine-specific paths."""
        return "embedded"

    def splits(self, protocol: str = "held_out") -> Splits:
        """Return rows by split: train, validation, test and any further test split such as test_mismatched.

        ``held_out``: validation is carved out of train (10 %, at most 1,000 rows, by a hash of the text), and the
        reported split is never used to choose anything. ``paper``: the whole of train, and validation is the test split
        itself, as many papers do. Raises UserError for an unknown protocol or missing data.
        """
        if protocol not in PROTOCOLS:
            raise UserError(f"protocol={protocol}: expected {' or '.join(PROTOCOLS)}")
        key = ("splits", repr(self), protocol, self.data_fingerprint())
        rows = _remember(key, lambda: self.load(protocol), _SPLITS, 16)
        return Splits(self.name, {split: list(found) for split, found in rows.items()}, self.split_hint)

    def fingerprint(self) -> str:
        """Return a sha256 (hex) over the data used and the rule that splits it."""
        return hashlib.sha256(f"split rule {SPLIT_RULE}\n{self.data_fingerprint()}".encode()).hexdigest()

    def describe(self, protocol: str = "held_out") -> dict[str, Any]:
        """Return {"rows": {split: count} | None, "subset": bool | None, "source": str}; downloads nothing.

        Rows are None for data on the hub, which would have to be fetched to be counted.
        """
        if self.origin.startswith("hub:"):
            return {"rows": None, "subset": None, "source": self.origin}
        counts = {split: len(rows) for split, rows in self.splits(protocol).items()}
        return {"rows": counts, "subset": self.subset(), "source": self.origin}

    # Meaning.

    @abstractmethod
    def references(self, rows: Sequence[Row]) -> list[Any]:
        """Return what predictions are compared with, one per row."""

    @abstractmethod
    def metrics(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float | None]:
        """Return metric → value; None where a metric is undefined (a correlation with a constant)."""

    def item_scores(self, predictions: Sequence[Any], references: Sequence[Any]) -> list[float]:
        """Return one score per item, larger is better: 1.0 or 0.0 unless the task says otherwise."""
        return [float(prediction == reference) for prediction, reference in zip(predictions, references, strict=True)]

    # Head formulation.

    def texts(self, row: Row) -> tuple[str, ...]:
        """Return the one or two texts that a head classifies."""
        raise UserError(f"task {self.name} has no head formulation; use task.formulation=text")

    def target(self, row: Row) -> int | float:
        """Return the class or value a head is trained towards."""
        raise UserError(f"task {self.name} has no head formulation; use task.formulation=text")

    # Text formulation.

    def prompt_answer(self, row: Row) -> tuple[str, str]:
        """Return (prompt, answer); the answer brings its own leading space where the prompt does not end in one."""
        raise UserError(f"task {self.name} has no text formulation; use task.formulation=head")

    def choices(self, row: Row) -> list[str] | None:
        """Return the candidate answers, written as `prompt_answer` writes the answer, or None when answers are free."""
        return None

    def parse(self, text: str) -> Any:
        """Return the prediction held in a generated text."""
        return text.strip()

    # Encoding.

    def encode(self, rows: Sequence[Row], tokenizer: Any, max_length: int, kind: str) -> Encoded:
        """Return token ids and what is trained on, for a model of `kind` encoder, decoder or seq2seq.

        Head: the tokenizer's own special tokens; pairs are the tokenizer's pairs, except for decoders, whose tokenizers
        have no pair layout: there the two texts are joined by a newline. Text: `encode_pairs` on `prompt_answer`.
        """
        if self.formulation == "text":
            pairs = [self.prompt_answer(row) for row in rows]
            return encode_pairs(pairs, tokenizer, max_length, kind)
        return encode_texts(
            [self.texts(row) for row in rows], [self.target(row) for row in rows], tokenizer, max_length, kind
        )

    def encode_choices(
        self, rows: Sequence[Row], tokenizer: Any, max_length: int, kind: str
    ) -> tuple[Encoded, list[int]]:
        """Return every candidate answer of every row, encoded as an answer, and the row each belongs to.

        The candidates of a row are adjacent and in the order of `choices`.
        """
        pairs, owners = [], []
        for owner, row in enumerate(rows):
            prompt, _ = self.prompt_answer(row)
            for choice in self.choices(row) or ():
                pairs.append((prompt, choice))
                owners.append(owner)
        return encode_pairs(pairs, tokenizer, max_length, kind), owners

    def encode_prompts(self, rows: Sequence[Row], tokenizer: Any, max_length: int, kind: str) -> Encoded:
        """Return the prompts alone, token for token as `encode` places them before the answer, for generation."""
        return encode_prompts([self.prompt_answer(row)[0] for row in rows], tokenizer, max_length, kind)


WITHIN = ("text", "answer")


@dataclass(frozen=True, kw_only=True)
class Generating(Task):
    """A task evaluated by generated texts, and how these are generated (see `Decoding`)."""

    beams: int = 1
    length_penalty: float = 1.0
    no_repeat_ngram: int = 0
    no_repeat_within: str = "text"

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, least, what in (("beams", 1, "beams"), ("no_repeat_ngram", 0, "tokens")):
            value = getattr(self, key)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise UserError(f"task.{key}={value}: expected a whole number of {what}, {least} or more")
        if not math.isfinite(self.length_penalty):
            raise UserError(f"task.length_penalty={self.length_penalty}: expected a finite number")
        if self.no_repeat_within not in WITHIN:
            raise UserError(f"task.no_repeat_within={self.no_repeat_within}: expected {' or '.join(WITHIN)}")
        if self.length_penalty != 1 and self.beams == 1:
            raise UserError(f"task.length_penalty={self.length_penalty:g}: expected task.beams of 2 or more with it")
        if self.no_repeat_within != "text" and not self.no_repeat_ngram:
            raise UserError(
                f"task.no_repeat_within={self.no_repeat_within}: expected task.no_repeat_ngram of 1 or more with it"
            )
        if self.decoding != Decoding() and self.evaluation != "generation":
            key, value = ("beams", self.beams) if self.beams > 1 else ("no_repeat_ngram", self.no_repeat_ngram)
            raise UserError(
                f"task.{key}={value}: task {self.name} is evaluated by {self.evaluation} and generates nothing"
            )

    @property
    def decoding(self) -> Decoding:
        return Decoding(self.beams, self.length_penalty, self.no_repeat_ngram, self.no_repeat_within)


# Splitting.


def text_key(texts: Sequence[str]) -> str:
    """Return the sha256 of texts with case and runs of white space levelled: equal for duplicates of a text."""
    levelled = "\x1f".join(" ".join(str(text).split()).lower() for text in texts)
    return hashlib.sha256(levelled.encode()).hexdigest()


def carve(rows: Sequence[Row], texts: Callable[[Row], Sequence[str]], count: int) -> tuple[list[Row], list[Row]]:
    """Split rows into (rest, at most `count` carved rows), each in the order given.

    The texts with the lowest hashes are carved, all rows of a text together, so that the choice depends neither on the
    order of rows nor on labels, and no text is on both sides.
    """
    groups: dict[str, int] = {}
    keys = [text_key(texts(row)) for row in rows]
    for key in keys:
        groups[key] = groups.get(key, 0) + 1
    chosen: set[str] = set()
    for key in sorted(groups):
        if groups[key] <= count:
            chosen.add(key)
            count -= groups[key]
        if count == 0:
            break
    rest = [row for row, key in zip(rows, keys, strict=True) if key not in chosen]
    return rest, [row for row, key in zip(rows, keys, strict=True) if key in chosen]


def carve_validation(rows: Sequence[Row], texts: Callable[[Row], Sequence[str]]) -> tuple[list[Row], list[Row]]:
    """Split train rows into (train, validation): 10 % and at most 1,000 rows of validation (see `carve`)."""
    return carve(rows, texts, min(VALIDATION_LIMIT, max(1, round(VALIDATION_SHARE * len(rows)))))


# Tokenizing. Results are kept per process: a pack, its profile and its evaluations ask for the same rows again.

_SPLITS: OrderedDict[Any, Any] = OrderedDict()
_ENCODED: OrderedDict[Any, Any] = OrderedDict()
_TOKENIZERS: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


def _remember(key: Any, make: Callable[[], T], cache: OrderedDict[Any, Any], limit: int) -> T:
    if key in cache:
        cache.move_to_end(key)
    else:
        cache[key] = make()
        while len(cache) > limit:
            cache.popitem(last=False)
    return cache[key]


def _digest(texts: Sequence[Sequence[str]]) -> str:
    digest = hashlib.sha256()
    for parts in texts:
        for part in parts:
            data = part.encode()
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)
        digest.update(b"\xff" * 8)
    return digest.hexdigest()


def _tokenizer_key(tokenizer: Any) -> str:
    """Identify a tokenizer by vocabulary and by how it splits a probe, so that a second load of it hits the cache."""
    if tokenizer not in _TOKENIZERS:
        vocabulary = sorted(tokenizer.get_vocab().items())
        probe = tokenizer("Probe: 12,345 naïve 'quotes'\n\tA  b.", "Second?")["input_ids"]
        parts = (type(tokenizer).__name__, vocabulary, probe, tokenizer.special_tokens_map)
        _TOKENIZERS[tokenizer] = hashlib.sha256(repr(parts).encode()).hexdigest()
    return _TOKENIZERS[tokenizer]


def special_ends(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the special token ids that the tokenizer puts before and after a single text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    raise UserError(f"{type(tokenizer).__name__}: special tokens change how a text is split, which is not supported")


def end_token(tokenizer: Any) -> int:
    """Return the id that ends an answer; UserError when the tokenizer has no end token."""
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{type(tokenizer).__name__}: the text formulation needs a tokenizer with an end token (eos_token)"
        )
    return tokenizer.eos_token_id


def _bare(texts: list[str], tokenizer: Any) -> list[list[int]]:
    # A fast tokenizer is quickest on one large batch; an empty batch is an error to it.
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def encode_texts(
    texts: Sequence[tuple[str, ...]], targets: list[Any], tokenizer: Any, max_length: int, kind: str
) -> Encoded:
    """Encode one or two texts per row for a head, cut to `max_length` tokens (the longer text of a pair first)."""
    key = ("texts", _tokenizer_key(tokenizer), max_length, kind, _digest(texts), tuple(targets))
    return _remember(key, lambda: _encode_texts(texts, targets, tokenizer, max_length, kind), _ENCODED, 24)


def _encode_texts(
    texts: Sequence[tuple[str, ...]], targets: list[Any], tokenizer: Any, max_length: int, kind: str
) -> Encoded:
    if not texts:
        return Encoded([], targets=[])
    if kind == "decoder":
        return Encoded(_join_for_decoder(texts, tokenizer, max_length), targets=targets)
    columns = [list(column) for column in zip(*texts, strict=True)]
    out = tokenizer(*columns, truncation=True, max_length=max_length, return_attention_mask=False)
    return Encoded(out["input_ids"], token_type_ids=out.get("token_type_ids"), targets=targets)


def _join_for_decoder(texts: Sequence[tuple[str, ...]], tokenizer: Any, max_length: int) -> list[list[int]]:
    before, after = special_ends(tokenizer)
    room = max(1, max_length - len(before) - len(after))
    firsts = _bare([parts[0] for parts in texts], tokenizer)
    seconds = _bare(["\n" + parts[1] if len(parts) > 1 else "" for parts in texts], tokenizer)
    joined = []
    for first, second in zip(firsts, seconds, strict=True):
        excess = len(first) + len(second) - room
        if excess > 0:
            # Level the longer text down to the shorter first, then cut both alike.
            keep_second = min(len(second), max(room - len(first), room // 2))
            first, second = first[: room - keep_second], second[:keep_second]
        joined.append(before + first + second + after)
    return joined


def encode_prompts(prompts: list[str], tokenizer: Any, max_length: int, kind: str) -> Encoded:
    """Encode prompts for generation, cut from the left to `max_length` tokens."""
    before, after = _prompt_ends(tokenizer, kind)
    room = max(1, max_length - len(before) - len(after))
    return Encoded([before + ids[-room:] + after for ids in _bare(prompts, tokenizer)])


def _prompt_ends(tokenizer: Any, kind: str) -> tuple[list[int], list[int]]:
    before, after = special_ends(tokenizer)
    # A decoder goes on from the prompt: an end token put there by its tokenizer would stop it.
    return (before, after) if kind == "seq2seq" else (before, [])


def encode_pairs(pairs: Sequence[tuple[str, str]], tokenizer: Any, max_length: int, kind: str) -> Encoded:
    """Encode (prompt, answer) pairs; only the answer and its end token are trained on.

    Decoder: prompt and answer in one sequence of at most `max_length` tokens. The answer is kept whole and the prompt
    cut from the left; an answer that alone is too long loses its end, and with it the end token. Seq2seq: the prompt is
    the encoder's input, cut from the left, and the answer with its end token the decoder's target. Prompt and answer
    are tokenized apart, so that generation continues exactly the prompt that was trained. Raises UserError for
    encoders.
    """
    if kind not in ("decoder", "seq2seq"):
        raise UserError(
            f"the text formulation needs a model of kind decoder or seq2seq, not {kind}; use task.formulation=head"
        )
    key = ("pairs", _tokenizer_key(tokenizer), max_length, kind, _digest(pairs))
    return _remember(key, lambda: _encode_pairs(pairs, tokenizer, max_length, kind), _ENCODED, 24)


def _encode_pairs(pairs: Sequence[tuple[str, str]], tokenizer: Any, max_length: int, kind: str) -> Encoded:
    end = end_token(tokenizer)
    answers = [ids + [end] for ids in _bare([answer for _, answer in pairs], tokenizer)]
    if kind == "seq2seq":
        prompts = encode_prompts([prompt for prompt, _ in pairs], tokenizer, max_length, kind)
        return Encoded(prompts.input_ids, labels=[ids[:max_length] for ids in answers])
    before, _ = _prompt_ends(tokenizer, kind)
    input_ids, labels = [], []
    for prompt, answer in zip(_bare([prompt for prompt, _ in pairs], tokenizer), answers, strict=True):
        answer = answer[: max_length - len(before)]
        room = max_length - len(before) - len(answer)
        start = before + (prompt[-room:] if room else [])
        input_ids.append(start + answer)
        labels.append([IGNORED] * len(start) + answer)
    return Encoded(input_ids, labels=labels)
