"""A small tokenizer that needs no files: bytes, and common words merged from them, the same on every machine."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

VOCABULARY_SIZE = 512
SPECIAL = ("<pad>", "<unk>", "<s>", "</s>", "<mask>")
"""Ids 0 to 4: padding, unknown, start (an encoder's first token), end (its separator), mask."""

_WORDS = (
    "yes no true false good bad great positive negative neutral entailment the of and to in is that it was for with as "
    "on be at by this have from or one had not but what all were when we there can an your which their said if do will "
    "each about how up out them then she many some so these would other into has more her two like him see time could "
    "make than first been its who now people movie film question answer contradiction"
)


def build(kind: str, token_types: bool = False) -> PreTrainedTokenizerFast:
    """The tokenizer for a model of `kind` (encoder, decoder or seq2seq), `VOCABULARY_SIZE` tokens.

    Encoders get <s> a </s> and <s> a </s> b </s>, seq2seq models a </s>, decoders just a. `token_types` are 0 for the
    first text of a pair and 1 for the second.
    """
    tokenizer = Tokenizer(_bytes_and_words())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [(token, SPECIAL.index(token)) for token in ("<s>", "</s>")]
    if kind == "encoder":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=special
        )
    elif kind == "seq2seq":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A </s>", pair="$A </s> $B </s>", special_tokens=special
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        cls_token="<s>",
        sep_token="</s>",
        mask_token="<mask>",
        model_input_names=["input_ids", "attention_mask"] + (["token_type_ids"] if token_types else []),
        padding_side="right",
        truncation_side="right",
    )


def _bytes_and_words() -> models.BPE:
    vocabulary = {token: i for i, token in enumerate(SPECIAL)}
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[symbol] = len(vocabulary)
    merges: list[tuple[str, str]] = []
    # "Ġ" is the byte-level form of a leading space
    for word in (prefix + word for word in _WORDS.split() for prefix in ("Ġ", "")):
        for end in range(1, len(word)):
            left, right = word[:end], word[end]
            if left + right not in vocabulary and len(vocabulary) < VOCABULARY_SIZE:
                vocabulary[left + right] = len(vocabulary)
                merges.append((left, right))
    assert len(vocabulary) == VOCABULARY_SIZE
    return models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>")
