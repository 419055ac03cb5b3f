"""Texts written token by token: the likeliest token each time, or a beam search; n-grams may be kept from coming back.

A beam search keeps the K likeliest beginnings of every text. Each is continued by every token, and of the 2K likeliest
continuations those that end are put aside if they are among the first K, and the K best of the others go on. Of what
was put aside the one with the highest log p(text) / length^α is the answer (Wu et al. 2016, arXiv:1609.08144, section
7, with the length itself in place of their (5 + length) / 6); the end token counts. A text's search is over once it has
K complete answers and its best beginning, scored as if it ended here, is no better than the worst of them. All this is
how `generate` of `transformers` searches with `early_stopping=False`, and gives the same tokens.

Rows come run by run, and the beams of a row lie side by side, so that one pass through the shared base serves all beams
of all texts of all runs; there is one key-value cache, with a row a beam, put in the order of the beams after each
token. Shape letters: texts I (all runs' rows), beams K, rows N = I·K, vocabulary V, prompt P, answer L.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from peftbench.engine.objectives import TextObjective
from peftbench.errors import UserError
from peftbench.tasks.base import Decoding


@torch.no_grad()
def generate(
    objective: TextObjective, batch: dict[str, Tensor], decoding: Decoding, max_new_tokens: int, end_id: int
) -> Tensor:
    """Return the answer to each row of `batch` (prompts, padded on the left for decoders), [I, L]; `end_id` fills up.

    Raises:
        UserError: the model keeps no cache that beams could share.
    """
    prompts = batch["input_ids"]
    answers = prompts.new_full((len(prompts), decoding.beams, max_new_tokens), end_id)
    config: Any = objective.model.config
    rule = Repeats(decoding, batch, config.decoder_start_token_id if objective.seq2seq else None)
    if decoding.beams == 1:
        return _greedy(Continuation(objective, batch), answers[:, 0], rule, end_id)
    return _search(Continuation(objective, batch), answers, rule, decoding.length_penalty, end_id)


class Continuation:
    """The model on texts that grow by a token at a time."""

    def __init__(self, objective: TextObjective, batch: dict[str, Tensor]) -> None:
        self._objective, self._batch = objective, batch
        self._model: Any = objective.model
        self._mask = batch["attention_mask"]
        self._takes = inspect.signature(self._model.forward).parameters
        self._cache: Any = None
        self._encoded: Any = None

    def begin(self) -> Tensor:
        """Return the logits of each text's first token, [I, V] in fp32."""
        self._objective.condition(self._batch)
        ids = self._batch["input_ids"]
        if not self._objective.seq2seq:
            return self._logits(ids, (self._mask.cumsum(dim=1) - 1).clamp(min=0))
        self._encoded = self._model.get_encoder()(input_ids=ids, attention_mask=self._mask, return_dict=True)
        return self._logits(ids.new_full((len(ids), 1), self._model.config.decoder_start_token_id), None)

    def widen(self, beams: int) -> None:
        """Go on with `beams` rows for each text."""
        rows = torch.arange(len(self._mask), device=self._mask.device).repeat_interleave(beams)
        self.reorder(rows)
        self._mask = self._mask[rows]
        if self._encoded is not None:
            self._encoded = type(self._encoded)(last_hidden_state=self._encoded.last_hidden_state[rows])

    def reorder(self, rows: Tensor) -> None:
        """Have row i go on from what row `rows[i]` was."""
        if not hasattr(self._cache, "reorder_cache"):
            raise UserError(
                f"{type(self._model).__name__} keeps no cache that beams could share; expected task.beams=1"
            )
        self._cache.reorder_cache(rows)

    def next(self, tokens: Tensor) -> Tensor:
        """Add a token to each row, [N], and return the logits of the one after it, [N, V] in fp32."""
        if self._objective.seq2seq:
            return self._logits(tokens[:, None], None)
        self._mask = torch.cat([self._mask, self._mask.new_ones((len(tokens), 1))], dim=1)
        return self._logits(tokens[:, None], self._mask.sum(dim=1, keepdim=True) - 1)

    def _logits(self, ids: Tensor, positions: Tensor | None) -> Tensor:
        inputs: dict[str, Any] = {"past_key_values": self._cache, "use_cache": True, "attention_mask": self._mask}
        if self._encoded is not None:
            inputs |= {"encoder_outputs": self._encoded, "decoder_input_ids": ids}
        else:
            inputs["input_ids"] = ids
        if positions is not None and "position_ids" in self._takes:
            inputs["position_ids"] = positions
        if "logits_to_keep" in self._takes:
            inputs["logits_to_keep"] = 1
        out = self._model(**inputs, return_dict=True)
        self._cache = getattr(out, "past_key_values", None)
        logits: Tensor = out.logits[:, -1].float()
        return logits


class Repeats:
    """Bans tokens that would complete an n-gram which a text already has.

    Args:
        start: the token that an encoder-decoder's answers start from, in place of their prompts.
    """

    def __init__(self, decoding: Decoding, batch: dict[str, Tensor], start: int | None) -> None:
        self._size = decoding.no_repeat_ngram
        self._prompts, real = batch["input_ids"], batch["attention_mask"]
        if start is not None:
            self._prompts, real = torch.full_like(self._prompts[:, :1], start), torch.ones_like(real[:, :1])
        if decoding.no_repeat_within == "answer":
            self._prompts, real = self._prompts[:, :0], real[:, :0]
        self._real = real.bool()

    def ban(self, scores: Tensor, answers: Tensor) -> Tensor:
        """Return scores [N, V] with minus infinity for what `answers` [N, so far] must not go on with."""
        n = self._size
        if n == 0:
            return scores
        beams = len(answers) // len(self._prompts)
        texts = torch.cat([self._prompts.repeat_interleave(beams, dim=0), answers], dim=1)
        if texts.shape[1] < n:
            return scores
        windows = texts.unfold(1, n, 1)
        known = (windows[..., :-1] == texts[:, None, texts.shape[1] - n + 1 :]).all(dim=-1)
        real = torch.cat(
            [self._real.repeat_interleave(beams, dim=0), torch.ones_like(answers, dtype=torch.bool)], dim=1
        )
        known &= real[:, : windows.shape[1]]  # padding says nothing; it is on the left
        # tokens may come twice: what is added is zero or minus infinity
        return scores.scatter_add(
            1, windows[..., -1], torch.zeros_like(known, dtype=scores.dtype).masked_fill(known, -torch.inf)
        )


def _greedy(text: Continuation, answers: Tensor, rule: Repeats, end_id: int) -> Tensor:
    length = answers.shape[1]
    open_ = torch.ones(len(answers), dtype=torch.bool, device=answers.device)
    scores = text.begin()
    for step in range(length):
        tokens = rule.ban(scores, answers[:, :step]).argmax(dim=1).where(open_, end_id)
        answers[:, step] = tokens
        open_ &= tokens != end_id
        if step + 1 == length or not open_.any():
            break
        scores = text.next(tokens)
    return answers


def _search(text: Continuation, answers: Tensor, rule: Repeats, penalty: float, end_id: int) -> Tensor:
    """Return the best of each text's `answers` [I, K, L], filled with the end token, [I, L]."""
    texts, beams, length = answers.shape
    first = torch.arange(texts, device=answers.device)[:, None] * beams
    live = torch.full((texts, beams), -torch.inf, device=answers.device)
    live[:, 0] = 0  # at first all beams of a text are the same one
    scores, complete = torch.full_like(live, -torch.inf), torch.zeros_like(live, dtype=torch.bool)
    done, open_ = answers.clone(), torch.ones_like(complete[:, :1])
    among_first = torch.arange(2 * beams, device=answers.device) < beams
    logits = text.begin().repeat_interleave(beams, dim=0)
    text.widen(beams)
    for step in range(length):
        nexts = rule.ban(logits.log_softmax(dim=1), answers[..., :step].flatten(0, 1))
        sums, places = (live.reshape(-1, 1) + nexts).view(texts, -1).topk(2 * beams)
        parents, tokens = places // nexts.shape[1], places % nexts.shape[1]
        longer = _taken(answers, parents)
        longer[..., step] = tokens
        ends = tokens == end_id if step + 1 < length else torch.ones_like(tokens, dtype=torch.bool)
        # what ends
        fresh = ends & among_first & open_
        own = (sums / (step + 1) ** penalty).masked_fill(~fresh, -torch.inf)
        scores, best = torch.cat([scores, own], dim=1).topk(beams)
        done, complete = (
            _taken(torch.cat([done, longer], dim=1), best),
            torch.cat([complete, fresh], dim=1).gather(1, best),
        )
        # what goes on
        live, kept = sums.masked_fill(ends, -torch.inf).topk(beams)
        hopeful = live[:, :1] / (step + 1) ** penalty > scores[:, -1:]
        open_ = open_ & (hopeful | ~complete.all(dim=1, keepdim=True))
        if step + 1 == length or not open_.any():
            break
        answers = _taken(longer, kept)
        text.reorder((first + parents.gather(1, kept)).flatten())
        logits = text.next(answers[..., step].flatten())
    return done[:, 0]


def _taken(sequences: Tensor, places: Tensor) -> Tensor:
    """Return the sequences [I, m, L] at `places` [I, k] of each text."""
    return sequences.gather(1, places[..., None].expand(-1, -1, sequences.shape[2]))
