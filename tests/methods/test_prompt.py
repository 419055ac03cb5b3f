"""Prompt tuning: initial tokens by hand, text without a tokenizer at loading, positions, HF PEFT's files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import peftbench
from peftbench.errors import UserError
from peftbench.methods.prompt import PromptTuning
from peftbench.models.load import load
from tests.conformance.conftest import batch, config, disturb, fresh, hidden
from tests.methods.prompts import own_states, theirs


def tokenizer(family: str = "tiny-bert"):
    """Return the tiny model's own tokenizer."""
    return load(config(family), "head").tokenizer


def prompt_of(adapter: peftbench.Adapter) -> torch.Tensor:
    """Return the first run's virtual tokens."""
    (state,) = adapter.state_dict().values()
    return state


@pytest.mark.parametrize("length", [2, 3, 8])
def test_a_text_is_cut_or_repeated_and_has_no_special_tokens(length: int) -> None:
    model, words = fresh("tiny-bert"), tokenizer()
    ids = words("good or bad", add_special_tokens=False)["input_ids"]
    assert len(ids) >= 3
    method = PromptTuning(length=length, init="text", init_text="good or bad")
    adapter = peftbench.attach(model, method, tokenizer=words)
    table = model.get_input_embeddings().weight
    want = torch.stack([table[ids[i % len(ids[:length])]] for i in range(length)])
    assert torch.equal(prompt_of(adapter), want)
    assert not set(adapter.methods[0].init_tokens) & set(words.all_special_ids)


def test_runs_of_one_pack_may_start_from_different_texts() -> None:
    methods = [PromptTuning(length=2, init="text", init_text=text) for text in ("good good", "bad bad")]
    adapter = peftbench.attach(fresh("tiny-bert"), [*methods, PromptTuning(length=2)], tokenizer=tokenizer())
    states = [next(iter(adapter.state_dict(run).values())) for run in range(3)]
    assert not torch.equal(states[0], states[1])


def test_text_asks_for_a_tokenizer_once_and_never_again(tmp_path: Path) -> None:
    model = fresh("tiny-bert")
    with pytest.raises(UserError, match=r"method\.init_text=None"):
        PromptTuning(init="text")
    with pytest.raises(UserError, match="expected a tokenizer"):
        peftbench.attach(model, PromptTuning(init="text", init_text="good"))
    adapter = peftbench.attach(model, PromptTuning(length=4, init="text", init_text="good"), tokenizer=tokenizer())
    adapter.save(tmp_path)
    adapter.detach()
    assert json.loads((tmp_path / "adapter.json").read_text())["settings"]["init_tokens"]
    again = peftbench.load_adapter(model, tmp_path)
    assert torch.equal(prompt_of(again), prompt_of(adapter))


def test_token_ids_beyond_the_vocabulary_are_refused() -> None:
    with pytest.raises(UserError, match="ids below 512"):
        peftbench.attach(fresh("tiny-bert"), PromptTuning(init="text", init_tokens=(1, 512)))


def test_vocabulary_tokens_enter_as_the_model_sees_them() -> None:
    """Gemma scales its embeddings by sqrt(D); a virtual token starts where the word's own vector is."""
    model = fresh("tiny-gemma3")
    adapter = peftbench.attach(model, PromptTuning(length=1, init="text", init_tokens=(7,)))
    with torch.no_grad():
        seen = model.get_input_embeddings()(torch.tensor([7]))
    assert torch.equal(prompt_of(adapter), seen)
    assert not torch.equal(seen, model.get_input_embeddings().weight[[7]])


def test_virtual_tokens_with_a_words_embedding_are_that_word() -> None:
    model, inputs = fresh("tiny-gpt2"), batch(3)
    words = torch.full((3, 2), 7)
    longer = {
        "input_ids": torch.cat([words, inputs["input_ids"]], 1),
        "attention_mask": torch.cat([words.clamp(max=1), inputs["attention_mask"]], 1),
    }
    want = model(**longer).last_hidden_state[:, 2:][inputs["attention_mask"].bool()]
    peftbench.attach(model, PromptTuning(length=2, init="text", init_tokens=(7,)))
    torch.testing.assert_close(hidden(model, inputs), want)


def test_the_pooled_token_stays_the_tasks_own() -> None:
    model, inputs = fresh("tiny-bert"), batch(3)
    adapter = peftbench.attach(model, PromptTuning(length=3))
    out = model(**inputs)
    assert torch.equal(out.pooler_output, model.pooler(out.last_hidden_state[:, :1]))
    assert out.last_hidden_state.shape[1] == inputs["input_ids"].shape[1]
    adapter.detach()


@pytest.mark.parametrize("family", ["tiny-bert", "tiny-gpt2", "tiny-llama"])
def test_peft_reads_our_folder_and_we_read_it_back(family: str, tmp_path: Path) -> None:
    model, inputs = fresh(family), batch(4)
    adapter = peftbench.attach(model, PromptTuning(length=3))
    disturb(adapter)
    ours = hidden(model, inputs)
    adapter.save(tmp_path, format="peft")
    torch.testing.assert_close(own_states(theirs(family, tmp_path), inputs), ours, rtol=1e-5, atol=1e-5)
    again = peftbench.load_adapter(fresh(family), tmp_path)
    assert again.methods[0] == PromptTuning(length=3, init="random")
    assert torch.equal(prompt_of(again), prompt_of(adapter))


def test_a_language_model_is_exported_as_one(tmp_path: Path) -> None:
    model, inputs = fresh("tiny-gpt2", formulation="text"), batch(2)
    adapter = peftbench.attach(model, PromptTuning(length=3))
    adapter.save(tmp_path, format="peft")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
    other = theirs("tiny-gpt2", tmp_path, "text")
    torch.testing.assert_close(other(**inputs).logits[:, 3:], model(**inputs).logits, rtol=1e-5, atol=1e-5)
