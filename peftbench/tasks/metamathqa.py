"""MetaMathQA (Yu et al. 2023, arXiv:2309.12284): 395,000 rewritten word problems to train on, tested on GSM8K.

As in the method comparison of HF PEFT, training rows are question and response, and the test is GSM8K's. Responses end
in ``The answer is: <number>``; an answer counts if the last number of what was generated is GSM8K's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peftbench.tasks.base import carve_validation
from peftbench.tasks.instruct import Gsm8k, last_number
from peftbench.tasks.source import Dataset, Row


@dataclass(frozen=True, kw_only=True)
class MetaMathQA(Gsm8k):
    """Trained on MetaMathQA, tested on GSM8K's 1,319 problems."""

    @property
    def dataset(self) -> Dataset:
        """Where the training rows come from."""
        return Dataset("instruct/metamathqa", repo="meta-math/MetaMathQA")

    @property
    def tested(self) -> Dataset:
        """Where the test rows come from."""
        return Gsm8k(name="gsm8k").dataset

    def load(self, protocol: str) -> dict[str, list[Row]]:
        rows = self.dataset.rows("train", ("query", "response"))
        train = [{"question": row["query"], "answer": row["response"]} for row in rows]
        test = self.tested.rows("test", ("question", "answer"))
        if protocol == "paper":
            return {"train": train, "validation": test, "test": test}
        train, validation = carve_validation(train, lambda row: (row["question"],))
        return {"train": train, "validation": validation, "test": test}

    def data_fingerprint(self) -> str:
        return f"{self.dataset.fingerprint(['train'])} and {self.tested.fingerprint(['test'])}"

    def subset(self) -> bool | None:
        parts = self.dataset.subset(["train"]), self.tested.subset(["test"])
        return True if True in parts else None if None in parts else False

    def parse(self, text: str) -> str:
        """Return the last number, or the one after ``####``."""
        return last_number(text)

    def references(self, rows: Sequence[Row]) -> list[Any]:
        return [last_number(row["answer"]) for row in rows]
