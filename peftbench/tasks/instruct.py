"""Instruction data, trained on the answer only: Alpaca, GSM8K, E2E NLG, and arithmetic sets for evaluation.

| task | evaluated by | metrics (the first chooses) |
| --- | --- | --- |
| Alpaca (Taori et al. 2023) | loss on held-out answers, or generation | loss, perplexity; or rouge_l |
| GSM8K (Cobbe et al. 2021, arXiv:2110.14168) | generation | exact_match of the number after ``####`` |
| E2E NLG (Novikova et al. 2017, arXiv:1706.09254) | generation | bleu, rouge_l, against all references, cases alike |
| AddSub, MAWPS, MultiArith, SingleEq, SVAMP | generation | exact_match of the last number |

Numbers are compared by value (``18.00`` equals ``18``), where GSM8K's own script compares their digits. The arithmetic
sets have no training data of their own; with ``train_on: gsm8k`` they measure what was learnt on GSM8K's train split.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

from peftbench.errors import UserError, nearest
from peftbench.tasks.base import (
    Encoded,
    Generating,
    carve,
    carve_validation,
    encode_pairs,
    encode_prompts,
    end_token,
)
from peftbench.tasks.source import Dataset, Row

HELD_BACK = 1000
NUMBER = re.compile(r"-?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
ANNOTATION = re.compile(r"<<[^>]*>>")
ARITHMETIC = ("addsub", "mawps", "multiarith", "singleeq", "svamp")


def instruction_prompt(instruction: str, context: str = "") -> str:
    """Return Stanford Alpaca's prompt, which ends where the response begins."""
    if context:
        return (
            "Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request.\n\n"
            f"### Instruction:\n{instruction}\n\n### Input:\n{context}\n\n### Response:\n"
        )
    return (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{instruction}\n\n### Response:\n"
    )


def question_prompt(question: str) -> str:
    """Return the prompt of a word problem."""
    return f"Question: {question.strip()}\nAnswer:"


LAYOUTS = ("lines", "table")
ATTRIBUTE = re.compile(r"([\w ]+)\[([^\]]*)\](?:, |$)")
ATTRIBUTES = {"eatType": "Type", "priceRange": "price", "familyFriendly": "family friendly"}
"""E2E's names of attributes → those of the table's layout; the others are the same."""


def as_table(meaning: str) -> str:
    """Return one of E2E's meanings, ``name[Giraffe], eatType[pub]``, as ``name : Giraffe | Type : pub``."""
    return " | ".join(f"{ATTRIBUTES.get(name, name)} : {value}" for name, value in ATTRIBUTE.findall(meaning))


def canonical_number(text: str) -> str:
    """Return a number in one spelling (``1,800.0`` → ``1800``), or an empty string when the text is none."""
    try:
        value = Decimal(text.replace(",", "").replace("$", ""))
    except InvalidOperation:
        return ""
    return format(value.normalize(), "f") if value else "0"


def final_number(text: str) -> str:
    """Return the number after the last ``####`` in one spelling, or an empty string when there is none."""
    _, mark, rest = text.rpartition("####")
    found = NUMBER.match(rest.strip()) if mark else None
    return canonical_number(found.group()) if found else ""


def last_number(text: str) -> str:
    """Return the number after ``####`` or else the last number of a text, or an empty string."""
    found = NUMBER.findall(text)
    return final_number(text) or (canonical_number(found[-1]) if found else "")


def _compute(names: Sequence[str], predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float | None]:
    from peftbench.tasks.metrics import compute

    return compute(names, predictions, references)


def _rouge_scores(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    from peftbench.tasks.metrics import rouge_l

    return [rouge_l(p, r) for p, r in zip(predictions, references, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Alpaca(Generating):
    """52,002 instructions; 1,000 are held back as test and 1,000 as validation, by a hash of the text.

    `evaluate_by`: ``loss`` (mean negative log-likelihood per answer token, in nats) or ``generation`` (ROUGE-L).
    """

    formulation: str = "text"
    max_length: int = 512
    max_new_tokens: int = 128
    evaluate_by: str = "loss"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.evaluate_by not in ("loss", "generation"):
            raise UserError(f"task.evaluate_by={self.evaluate_by}: expected loss or generation")

    @property
    def formulations(self) -> tuple[str, ...]:
        return ("text",)

    @property
    def primary_metric(self) -> str:
        return "loss" if self.evaluate_by == "loss" else "rouge_l"

    @property
    def greater_is_better(self) -> bool:
        return self.evaluate_by != "loss"

    @property
    def evaluation(self) -> str:
        return self.evaluate_by

    @property
    def num_labels(self) -> int:
        return 0

    @property
    def dataset(self) -> Dataset:
        """Where the rows come from."""
        return Dataset("instruct/alpaca", repo="tatsu-lab/alpaca")

    @property
    def origin(self) -> str:
        return self.dataset.origin

    def load(self, protocol: str) -> dict[str, list[Row]]:
        def texts(row: Row) -> tuple[str, str]:
            return row["instruction"], row["input"]

        rest, test = carve(self.dataset.rows("train", ("instruction", "input", "output")), texts, HELD_BACK)
        if protocol == "paper":
            return {"train": rest, "validation": test, "test": test}
        train, validation = carve(rest, texts, HELD_BACK)
        return {"train": train, "validation": validation, "test": test}

    def data_fingerprint(self) -> str:
        return self.dataset.fingerprint(["train"])

    def subset(self) -> bool | None:
        return self.dataset.subset(["train"])

    def prompt_answer(self, row: Row) -> tuple[str, str]:
        return instruction_prompt(row["instruction"], row["input"]), row["output"]

    def references(self, rows: Sequence[Row]) -> list[Any]:
        return [None] * len(rows) if self.evaluate_by == "loss" else [[row["output"]] for row in rows]

    def metrics(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float | None]:
        if self.evaluate_by == "generation":
            return _compute(["rouge_l"], predictions, references)
        tokens = sum(count for _, count in predictions)
        loss = sum(total for total, _ in predictions) / tokens if tokens else math.nan
        if not math.isfinite(loss):
            return {"loss": None, "perplexity": None}
        # exp overflows a float beyond 709 nats per token, where perplexity says nothing any more.
        return {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else None}

    def item_scores(self, predictions: Sequence[Any], references: Sequence[Any]) -> list[float]:
        """Return per item the negative loss per answer token, or its ROUGE-L."""
        if self.evaluate_by == "generation":
            return _rouge_scores(predictions, references)
        return [-total / count if count else 0.0 for total, count in predictions]


@dataclass(frozen=True, kw_only=True)
class Gsm8k(Generating):
    """Grade-school word problems, 7,473 to train on and 1,319 to test.

    `annotations` keeps the calculator marks (``<<48/2=24>>``) in the training answers.
    """

    formulation: str = "text"
    max_length: int = 512
    max_new_tokens: int = 256
    annotations: bool = True

    @property
    def formulations(self) -> tuple[str, ...]:
        return ("text",)

    @property
    def primary_metric(self) -> str:
        return "exact_match"

    @property
    def evaluation(self) -> str:
        return "generation"

    @property
    def num_labels(self) -> int:
        return 0

    @property
    def dataset(self) -> Dataset:
        """Where the rows come from."""
        return Dataset("instruct/gsm8k", repo="openai/gsm8k", config="main")

    @property
    def origin(self) -> str:
        return self.dataset.origin

    def load(self, protocol: str) -> dict[str, list[Row]]:
        columns = ("question", "answer")
        train, test = self.dataset.rows("train", columns), self.dataset.rows("test", columns)
        if protocol == "paper":
            return {"train": train, "validation": test, "test": test}
        train, validation = carve_validation(train, lambda row: (row["question"],))
        return {"train": train, "validation": validation, "test": test}

    def data_fingerprint(self) -> str:
        return self.dataset.fingerprint(["train", "test"])

    def subset(self) -> bool | None:
        return self.dataset.subset(["train", "test"])

    def prompt_answer(self, row: Row) -> tuple[str, str]:
        answer = row["answer"] if self.annotations else ANNOTATION.sub("", row["answer"])
        return question_prompt(row["question"]), f" {answer}"

    def parse(self, text: str) -> str:
        """Return the number after ``####``, or an empty string, which matches nothing."""
        return final_number(text)

    def references(self, rows: Sequence[Row]) -> list[Any]:
        return [final_number(row["answer"]) for row in rows]

    def metrics(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float | None]:
        return _compute(["exact_match"], predictions, references)


@dataclass(frozen=True, kw_only=True)
class E2e(Generating):
    """Restaurant descriptions from attribute lists; the official train, validation and test splits in both protocols.

    A training row has one reference; validation and test rows are the distinct meanings with all of their references.

    `layout` of the prompt: ``lines`` (``Meaning: name[Giraffe], eatType[pub]``, then ``Text:``) or ``table`` (``name :
    Giraffe | Type : pub`` and the end token, as in Li & Liang 2021, arXiv:2101.00190, and LoRA).
    """

    formulation: str = "text"
    max_length: int = 192
    max_new_tokens: int = 96
    layout: str = "lines"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layout not in LAYOUTS:
            raise UserError(
                f"task.layout={self.layout}: expected {' or '.join(LAYOUTS)}{nearest(self.layout, LAYOUTS)}"
            )

    @property
    def formulations(self) -> tuple[str, ...]:
        return ("text",)

    @property
    def primary_metric(self) -> str:
        return "bleu"

    @property
    def evaluation(self) -> str:
        return "generation"

    @property
    def num_labels(self) -> int:
        return 0

    @property
    def dataset(self) -> Dataset:
        """Where the rows come from."""
        return Dataset("instruct/e2e", repo="tuetschek/e2e_nlg", renames=(("mr", "meaning_representation"),))

    @property
    def origin(self) -> str:
        return self.dataset.origin

    def load(self, protocol: str) -> dict[str, list[Row]]:
        columns = ("meaning_representation", "human_reference")
        splits: dict[str, list[Row]] = {}
        for split in ("train", "validation", "test"):
            grouped: dict[Any, Row] = {}
            for position, found in enumerate(self.dataset.rows(split, columns)):
                meaning = found["meaning_representation"]
                key = position if split == "train" else meaning
                row = grouped.setdefault(key, {"meaning_representation": meaning, "references": []})
                row["references"].append(found["human_reference"])
            splits[split] = list(grouped.values())
        return splits

    def data_fingerprint(self) -> str:
        return self.dataset.fingerprint(["train", "validation", "test"])

    def subset(self) -> bool | None:
        return self.dataset.subset(["train", "validation", "test"])

    def prompt_answer(self, row: Row) -> tuple[str, str]:
        """Return the prompt, in the table's layout without the end token, and the first reference."""
        meaning, answer = row["meaning_representation"], f" {row['references'][0].strip()}"
        return (as_table(meaning) if self.layout == "table" else f"Meaning: {meaning}\nText:"), answer

    def encode(self, rows: Sequence[Row], tokenizer: Any, max_length: int, kind: str) -> Encoded:
        ended = self._ended(rows, tokenizer, kind)
        answers = [self.prompt_answer(row)[1] for row in rows]
        return encode_pairs(list(zip(ended, answers, strict=True)), tokenizer, max_length, kind)

    def encode_prompts(self, rows: Sequence[Row], tokenizer: Any, max_length: int, kind: str) -> Encoded:
        return encode_prompts(self._ended(rows, tokenizer, kind), tokenizer, max_length, kind)

    def _ended(self, rows: Sequence[Row], tokenizer: Any, kind: str) -> list[str]:
        """Return prompts; after a table a decoder's end token says that the text begins (an encoder puts its own)."""
        prompts = [self.prompt_answer(row)[0] for row in rows]
        if self.layout == "lines" or kind == "seq2seq":
            return prompts
        end_token(tokenizer)
        return [prompt + tokenizer.eos_token for prompt in prompts]

    def parse(self, text: str) -> str:
        """Return the first line of the generated text: references have one."""
        return text.strip().partition("\n")[0]

    def references(self, rows: Sequence[Row]) -> list[Any]:
        return [list(row["references"]) for row in rows]

    def metrics(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float | None]:
        """Return BLEU and ROUGE-L in lower case: github.com/tuetschek/e2e-metrics, the official one, minds no case."""
        lower = [[text.lower() for text in each] for each in references]
        return _compute(["bleu", "rouge_l"], [text.lower() for text in predictions], lower)

    def item_scores(self, predictions: Sequence[Any], references: Sequence[Any]) -> list[float]:
        """Return the ROUGE-L of each item; BLEU is defined over the whole set only."""
        return _rouge_scores(predictions, references)


@dataclass(frozen=True, kw_only=True)
class Arithmetic(Generating):
    """Word problems that are only ever tested on, of the set `data`, or `name` when that is null.

    `train_on: gsm8k` trains and selects on GSM8K's train split.
    """

    formulation: str = "text"
    max_length: int = 512
    max_new_tokens: int = 256
    data: str | None = None
    train_on: str | None = None

    def __post_init__(self) -> None:
        if self.key not in ARITHMETIC:
            valid = ", ".join(ARITHMETIC)
            raise UserError(f"task.data={self.key}: expected one of {valid}{nearest(self.key, ARITHMETIC)}")
        if self.train_on not in (None, "gsm8k"):
            raise UserError(f"task.train_on={self.train_on}: expected gsm8k or null")
        super().__post_init__()

    @property
    def formulations(self) -> tuple[str, ...]:
        return ("text",)

    @property
    def primary_metric(self) -> str:
        return "exact_match"

    @property
    def evaluation(self) -> str:
        return "generation"

    @property
    def num_labels(self) -> int:
        return 0

    @property
    def split_hint(self) -> str:
        return "task.train_on=gsm8k trains on GSM8K"

    @property
    def key(self) -> str:
        """The set's own name."""
        return self.name if self.data is None else self.data

    @property
    def dataset(self) -> Dataset:
        """Where the test rows come from."""
        return Dataset(f"instruct/llm_adapters/{self.key}")

    @property
    def trained(self) -> Gsm8k | None:
        """The task that gives the training rows, or None."""
        return Gsm8k(name=self.train_on) if self.train_on else None

    @property
    def origin(self) -> str:
        return self.dataset.origin

    def load(self, protocol: str) -> dict[str, list[Row]]:
        found = self.dataset.rows("test", ("instruction", "answer"))
        test = [{"question": row["instruction"], "answer": row["answer"]} for row in found]
        if not self.trained:
            return {"test": test}
        train, validation = carve_validation(self.trained.splits("paper")["train"], lambda row: (row["question"],))
        return {"train": train, "validation": validation, "test": test}

    def data_fingerprint(self) -> str:
        trained = f" and {self.trained.data_fingerprint()}" if self.trained else ""
        return self.dataset.fingerprint(["test"]) + trained

    def subset(self) -> bool | None:
        return self.dataset.subset(["test"])

    def prompt_answer(self, row: Row) -> tuple[str, str]:
        """Return GSM8K's prompt and answer, so that what was learnt there applies here."""
        return question_prompt(row["question"]), f" {row['answer']}"

    def parse(self, text: str) -> str:
        """Return the last number of the text, or an empty string, which matches nothing."""
        return last_number(text)

    def references(self, rows: Sequence[Row]) -> list[Any]:
        return [last_number(row["answer"]) for row in rows]

    def metrics(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float | None]:
        same = [str(int(hit)) for hit in self.item_scores(predictions, references)]
        return _compute(["exact_match"], same, ["1"] * len(same))

    def item_scores(self, predictions: Sequence[Any], references: Sequence[Any]) -> list[float]:
        """Return 1.0 where the numbers differ by at most 0.001, since some references are long decimal fractions."""
        return [
            float(bool(p) and abs(Decimal(p) - Decimal(r)) <= Decimal("0.001"))
            for p, r in zip(predictions, references, strict=True)
        ]
