"""Models of reported architectures on the meta device, whole and without weights, and what their parts count."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from peftbench import published
from peftbench.errors import UserError

HEADS = {"SEQ_CLS": "SequenceClassification", "seqcls": "SequenceClassification", "tokcls": "TokenClassification"}
"""A row's `task` → the head its count includes."""
HEAD_ENDINGS = ("classifier", "score")
"""How the names of modules end that HF PEFT trains beside an adapter of a classification task."""


@functools.cache
def config_of(model: str, depth: int | None = None) -> Any:
    """Return the `transformers` config of a reported architecture, or of its first `depth` layers."""
    import transformers

    facts = dict(published.architectures()[model])
    wanted = facts.pop("config_class")
    found = getattr(transformers, wanted, None)
    if found is None:
        raise UserError(f"{model}: this transformers has no {wanted}")
    config = found(**facts)
    if depth is not None:
        config.num_hidden_layers = depth
        if getattr(config, "is_encoder_decoder", False):
            config.num_decoder_layers = depth
    return config


@functools.cache
def model_of(model: str, task: str = "", labels: int = 2, depth: int | None = None) -> Any:
    """Return a reported model: with a classification head for `HEADS`, bare for "body", else as it was pretrained."""
    import transformers

    config = config_of(model, depth)
    sequence = getattr(config, "is_encoder_decoder", False)
    kind = HEADS.get(task)
    if kind is None and task != "body":
        kind = {"img": "ImageClassification", "asr": "SpeechSeq2Seq"}.get(task)
        kind = kind or ("Seq2SeqLM" if sequence else "CausalLM")
    auto = getattr(transformers, "AutoModel" + ("" if kind is None else f"For{kind}"))
    config.num_labels = labels
    with torch.device("meta"):
        found = auto.from_config(config)
    found.reported = model
    return found.eval()


def count(module: nn.Module) -> int:
    """Return the parameters of a module, shared ones once."""
    return sum(p.numel() for p in module.parameters())


def outside(model: Any) -> int:
    """Return the parameters outside the model's body: a head, and a pooler that comes with it."""
    return count(model) - count(model.base_model)


def total(model: Any) -> int:
    """Return all parameters; where the facts keep the output layer apart and the library ties it, that one too.

    transformers 5 ties the output layer of every T5, transformers 4 did as the config says.
    """
    found = count(model)
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if output is None or output.weight is not model.get_input_embeddings().weight:
        return found
    if not published.architectures()[model.reported].get("tie_word_embeddings", True):
        found += output.weight.numel()
    return found


def head_parts(model: Any) -> list[nn.Module]:
    """Return the modules that HF PEFT trains as a task's head."""
    return [part for name, part in model.named_children() if name.endswith(HEAD_ENDINGS)]


def head(model: Any) -> int:
    """Return the parameters of the task's head."""
    return sum(map(count, head_parts(model)))


def biases(module: nn.Module) -> int:
    """Return the parameters whose name ends in "bias"."""
    return sum(p.numel() for name, p in module.named_parameters() if name.rpartition(".")[2] == "bias")
