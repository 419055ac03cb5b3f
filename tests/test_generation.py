"""Generated texts against `generate` of transformers, token for token; packed against alone; settings and refusals."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList, NoRepeatNGramLogitsProcessor

import peftbench
from peftbench import resolve
from peftbench.engine import generation
from peftbench.engine.generation import Continuation, Repeats, generate
from peftbench.engine.objectives import TextObjective
from peftbench.errors import UserError
from peftbench.methods.adapter import named_method
from peftbench.progress import Quiet
from peftbench.run import run_pack
from peftbench.store import Store
from peftbench.tasks import build
from peftbench.tasks.base import Decoding
from tests.conformance.conftest import disturb, fresh

LENGTH = 10
PROMPT = 9
GREEDY = Decoding()


def prompts(rows: int, seed: int = 0) -> dict[str, Tensor]:
    """Return random prompts of a few tokens, some padded on the left."""
    ids = torch.randint(10, 60, (rows, PROMPT), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    mask[-1, :2] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def objective_of(family: str, method: str = "lora", runs: int = 1) -> TextObjective:
    model = fresh(family, formulation="text")
    settings = {"rank": 2} if method == "lora" else {"length": 3}
    adapter = peftbench.attach(model, named_method(method, settings), runs=runs, seeds=list(range(runs)))
    disturb(adapter)
    objective = TextObjective(model, adapter, runs, seq2seq=model.config.is_encoder_decoder)
    objective.train(False)
    return objective


def transformers_own(
    objective: TextObjective, batch: dict[str, Tensor], decoding: Decoding, end: int
) -> list[list[int]]:
    """Return the answers that transformers generates, each to its end token."""
    model: Any = objective.model
    start = 1 if objective.seq2seq else PROMPT
    settings: dict[str, Any] = {"num_beams": decoding.beams, "max_new_tokens": LENGTH, "do_sample": False}
    if decoding.beams > 1:
        settings["length_penalty"] = decoding.length_penalty
    if decoding.no_repeat_within == "answer":
        inner = NoRepeatNGramLogitsProcessor(decoding.no_repeat_ngram)
        settings["logits_processor"] = LogitsProcessorList([lambda ids, scores: inner(ids[:, start:], scores)])
    else:
        settings["no_repeat_ngram_size"] = decoding.no_repeat_ngram
    found = model.generate(**batch, **settings, use_cache=True, eos_token_id=end, pad_token_id=0)
    return cut(found[:, start:], end)


def cut(tokens: Tensor, end: int) -> list[list[int]]:
    return [row[: row.index(end)] if end in row else row for row in tokens.tolist()]


def ours(objective: TextObjective, batch: dict[str, Tensor], decoding: Decoding, end: int) -> list[list[int]]:
    return cut(generate(objective, batch, decoding, LENGTH, end), end)


def common_token(objective: TextObjective, batch: dict[str, Tensor]) -> int:
    """Return a token that beams often come to, so that as an end token it ends some texts early and some never."""
    answers = generate(objective, batch, Decoding(4, 1.0, 1), LENGTH, 511)
    late = Counter(token for row in answers[:, 2:].tolist() for token in row)
    return late.most_common(1)[0][0]


SETTINGS = [
    Decoding(2),
    Decoding(4, 0.9, 4),
    Decoding(4, 2.0, 2),
    Decoding(10, 0.8, 3),
    Decoding(5, -0.5),
    Decoding(1, 1.0, 2),
    Decoding(4, 0.9, 2, "answer"),
    Decoding(1, 1.0, 1, "answer"),
]


@pytest.mark.parametrize("family", ["tiny-gpt2", "tiny-llama", "tiny-t5"])
def test_tokens_are_those_of_transformers(family):
    objective, batch = objective_of(family), prompts(6)
    end = common_token(objective, batch)
    lengths: set[int] = set()
    for decoding in SETTINGS:
        want = transformers_own(objective, batch, decoding, end)
        assert ours(objective, batch, decoding, end) == want, decoding
        lengths |= {len(answer) for answer in want}
    assert len(lengths) > 1, "texts that end and texts that are cut"


@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.parametrize("family", ["tiny-gpt2", "tiny-t5"])
def test_virtual_tokens_stay_where_they_are_in_every_beam(family, method):
    objective, batch = objective_of(family, method), prompts(4)
    for decoding in (Decoding(3, 0.9), Decoding(1, 1.0, 2)):
        assert ours(objective, batch, decoding, 3) == transformers_own(objective, batch, decoding, 3)


@pytest.mark.parametrize("family", ["tiny-gpt2", "tiny-t5"])
def test_a_beam_alone_without_bans_is_the_likeliest_token(family):
    objective, batch = objective_of(family), prompts(4)
    assert ours(objective, batch, GREEDY, 3) == transformers_own(objective, batch, GREEDY, 3)


def test_a_beam_search_finds_likelier_texts_than_the_likeliest_tokens():
    objective, batch = objective_of("tiny-gpt2"), prompts(8)
    model: Any = objective.model

    def likelihoods(answers: Tensor) -> Tensor:
        ids = torch.cat([batch["input_ids"], answers], dim=1)
        mask = torch.cat([batch["attention_mask"], torch.ones_like(answers)], dim=1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, PROMPT - 1 : -1]
        return logits.log_softmax(-1).gather(2, answers[..., None]).sum((1, 2))

    with torch.no_grad():
        greedy, wide = (likelihoods(generate(objective, batch, Decoding(k), LENGTH, 511)) for k in (1, 8))
    assert (wide >= greedy - 1e-4).all()
    assert (wide > greedy + 0.1).any()


@pytest.mark.parametrize("method", ["lora", "prompt", "prefix"])
@pytest.mark.parametrize("family", ["tiny-gpt2", "tiny-t5"])
def test_a_pack_writes_what_its_runs_write_alone(family, method):
    packed = objective_of(family, method, runs=3)
    batches = [prompts(3, seed) for seed in range(3)]
    together = {k: torch.cat([b[k] for b in batches]) for k in batches[0]}
    decoding = Decoding(4, 0.9, 3)
    found = ours(packed, together, decoding, 3)
    assert len({str(row) for row in found}) > 3
    for run, batch in enumerate(batches):
        alone = objective_of(family, method)
        alone.adapter.load_state_dict(packed.adapter.state_dict(run))
        assert found[3 * run : 3 * run + 3] == ours(alone, batch, decoding, 3)


def test_a_run_that_is_no_longer_finite_changes_no_other_s_texts():
    objective = objective_of("tiny-gpt2", runs=2)
    batch = {k: torch.cat([v, v]) for k, v in prompts(3).items()}
    before = ours(objective, batch, Decoding(4, 0.9, 3), 3)
    for parameter in objective.adapter.parameters():
        parameter.data[0] = torch.nan
    assert ours(objective, batch, Decoding(4, 0.9, 3), 3)[3:] == before[3:]


class Bigrams:
    """Stands in for the model: what comes next follows from the text's number, the last token and the step alone."""

    def __init__(self, numbers: list[int]) -> None:
        tables = [2 * torch.randn(LENGTH, 8, 8, generator=torch.Generator().manual_seed(n)) for n in numbers]
        self.tables, self.step = torch.stack(tables), 0

    def begin(self) -> Tensor:
        return self.tables[:, 0, 0]

    def widen(self, beams: int) -> None:
        self.tables = self.tables.repeat_interleave(beams, dim=0)

    def reorder(self, rows: Tensor) -> None:
        self.tables = self.tables[rows]

    def next(self, tokens: Tensor) -> Tensor:
        self.step += 1
        return self.tables[torch.arange(len(tokens)), self.step, tokens]


@pytest.mark.parametrize("penalty", [1.0, 2.0, 0.0])
def test_a_text_s_answer_does_not_depend_on_the_texts_beside_it(penalty):
    def answers(numbers: list[int]) -> list[list[int]]:
        text: Any = Bigrams(numbers)
        empty = torch.full((len(numbers), 3, LENGTH), 1)
        none = Repeats(GREEDY, prompts(len(numbers)), None)
        return cut(generation._search(text, empty, none, penalty, 1), 1)

    together = answers(list(range(40)))
    assert len({len(answer) for answer in together}) > 3
    assert together == [answers([number])[0] for number in range(40)]


def test_bans_by_hand():
    batch = {
        "input_ids": torch.tensor([[0, 0, 5, 6], [5, 6, 7, 5]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1], [1] * 4]),
    }

    def banned(decoding: Decoding, answers: list[list[int]]) -> list[list[int]]:
        scores = Repeats(decoding, batch, None).ban(torch.zeros(2, 9), torch.tensor(answers, dtype=torch.long))
        return [[int(v) for v in row.isinf().nonzero()[:, 0]] for row in scores]

    whole, answer = (Decoding(1, 1.0, 2, within) for within in ("text", "answer"))
    assert banned(whole, [[], []]) == [[], [6]]
    assert banned(whole, [[5], [6]]) == [[6], [7]]
    assert banned(answer, [[5], [6]]) == [[], []]
    assert banned(answer, [[5, 8, 5], [6, 6, 6]]) == [[8], [6]]
    # padding is not said: else 0 would ban 0 and 5
    assert banned(whole, [[0], [0]]) == [[], []]
    assert banned(Decoding(1, 1.0, 1), [[], []]) == [[5, 6], [5, 6, 7]]


def test_a_model_without_a_cache_that_beams_could_share_is_refused():
    class Forgetful(torch.nn.Module):
        config = SimpleNamespace(is_encoder_decoder=False)

        def forward(self, input_ids: Tensor, **_: Any) -> Any:
            return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 12))

    objective: Any = SimpleNamespace(model=Forgetful(), seq2seq=False, condition=lambda batch: None)
    assert Continuation(objective, prompts(2)).begin().shape == (2, 12)
    with pytest.raises(UserError, match=r"Forgetful keeps no cache that beams could share; expected task\.beams=1"):
        generate(objective, prompts(2), Decoding(2), 3, 1)


# Settings, and runs that take them.


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"beams": 0}, "task.beams=0: expected a whole number of beams, 1 or more"),
        ({"beams": 2.5}, "task.beams=2.5: expected a whole number"),
        ({"no_repeat_ngram": -1}, "task.no_repeat_ngram=-1: expected a whole number of tokens, 0 or more"),
        ({"beams": 2, "length_penalty": float("nan")}, "task.length_penalty=nan: expected a finite number"),
        ({"beams": 2, "length_penalty": "long"}, "task.length_penalty='long': expected a number"),
        ({"length_penalty": 0.9}, "task.length_penalty=0.9: expected task.beams of 2 or more with it"),
        ({"no_repeat_within": "prompt"}, "task.no_repeat_within=prompt: expected text or answer"),
        (
            {"no_repeat_within": "answer"},
            "task.no_repeat_within=answer: expected task.no_repeat_ngram of 1 or more with it",
        ),
        ({"layout": "tabel"}, "task.layout=tabel: expected lines or table; did you mean 'table'?"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(settings, line):
    with pytest.raises(UserError) as error:
        build({"_target_": "peftbench.tasks.instruct.E2e", "name": "e2e", **settings})
    assert str(error.value) == line


def test_what_generates_nothing_takes_no_beams():
    alpaca = {"_target_": "peftbench.tasks.instruct.Alpaca", "name": "alpaca"}
    with pytest.raises(UserError, match=r"^task\.beams=4: task alpaca is evaluated by loss and generates nothing$"):
        build({**alpaca, "beams": 4})
    assert build({**alpaca, "beams": 4, "evaluate_by": "generation"}).decoding == Decoding(4)
    with pytest.raises(UserError, match=r"^task\.beams: no such setting"):
        build({"_target_": "peftbench.tasks.tiny.Tiny", "name": "tiny", "beams": 4})


def test_a_length_penalty_is_the_same_number_however_it_is_written():
    whole = build({"_target_": "peftbench.tasks.instruct.E2e", "name": "e2e", "beams": 2, "length_penalty": 2})
    assert isinstance(whole.length_penalty, float)  # type: ignore[attr-defined]


@pytest.fixture
def e2e(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "instruct" / "e2e"
    folder.mkdir(parents=True)
    for split, count in (("train", 16), ("validation", 4), ("test", 6)):
        meanings = [f"name[{split} {i}], eatType[pub]" for i in range(count)]
        texts = [f"{split} {i} is a pub." for i in range(count)]
        pd.DataFrame({"meaning_representation": meanings, "human_reference": texts}).to_parquet(
            folder / f"{split}.parquet"
        )
    monkeypatch.setenv("PEFTBENCH_DATA", str(tmp_path))
    return tmp_path


def test_runs_of_a_pack_search_by_beams_as_they_do_alone_and_their_records_say_so(e2e):
    """LoRA's experiment on E2E as it stands, but for a tiny model and a few steps."""
    small: dict[str, list[Any]] = {
        "model": ["tiny-gpt2"], "train.steps": [3], "train.batch_size": [4], "train.max_length": [128],
        "train.learning_rate": [0.02], "train.dropout": [0.0], "train.precision": ["fp32"], "seed": [0, 1],
        "task.max_new_tokens": [12], "profile": ["skip"],
    }  # fmt: skip

    def texts(given: dict[str, list[Any]], folder: str, together: bool) -> list[list[str]]:
        specs = resolve.plan(resolve.demand(small | given, "reproduce-lora-e2e"), "cpu").specs
        records = [
            r
            for pack in ([specs] if together else [[s] for s in specs])
            for r in run_pack(pack, Store(e2e / folder), Quiet())
        ]
        for record in records:
            assert record.quality is not None, record.error
            said = {"layout": "table", "no_repeat_ngram": 4, "no_repeat_within": "answer"}
            said |= {"beams": 10, "length_penalty": 0.9} | {k.removeprefix("task."): v[0] for k, v in given.items()}
            assert said.items() <= record.spec["task"].items()
            assert record.spec["train"]["label_smoothing"] == 0.1
        return [record.quality["items"]["test"]["predictions"] for record in records if record.quality]

    packed = texts({}, "packed", True)
    assert packed == texts({}, "alone", False)
    assert packed[0] != packed[1]
    assert packed != texts({"task.beams": [1], "task.length_penalty": [1.0]}, "greedy", True)
