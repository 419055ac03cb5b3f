"""How many operations does LoRA's forward and backward pass make per decoder layer, here and in HF PEFT?

    python experiments/peers/operations.py --out results/peers/operations.jsonl

A step on a small model is bound by how fast operations can be launched, so their number is its time. Counted is what
PyTorch dispatches on the CPU, forward and backward, for a Llama layer with LoRA on its seven linear maps. An operation
whose output is a view of an input starts no kernel and does not count. What a model of three layers makes more than one
of a single layer is twice a layer's share: embeddings, head and loss drop out.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import common
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

import peftbench

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ROWS, LENGTH, RANK = 2, 16, 4

ALLOCATIONS = {f"aten.{name}.default" for name in ("empty", "empty_like", "new_empty", "empty_strided")}
"""They reserve memory and run nothing."""

Ready = tuple[Callable[[Tensor], Tensor], list[nn.Parameter]]
Adapt = Callable[[Any], AbstractContextManager[Ready]]


class Counts(TorchDispatchMode):
    """Counts by name the operations that compute a new tensor or write into one."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.allocations = 0
        """How many reserved memory and ran nothing, counted apart."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if str(func) in ALLOCATIONS:
            self.allocations += 1
        elif not is_view(func, (args, kwargs), out):
            self.names[str(func)] += 1
        return out


def is_view(func: Any, inputs: Any, out: Any) -> bool:
    """Whether every tensor that `func` returned lies on the memory of one that it was given, which it left as it was.

    `func.is_view` knows of most; `_unsafe_view` and `detach` have no such mark, `reshape` and `to` depend on the case.
    """
    if func.is_view:
        return True
    if func._schema.is_mutable:
        return False
    given = {t.untyped_storage()._cdata for t in tree_leaves(inputs) if isinstance(t, Tensor)}
    made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
    return bool(made) and all(t.untyped_storage()._cdata in given for t in made)


def model_of(layers: int, dtype: torch.dtype) -> nn.Module:
    """Return a Llama of small width with grouped keys and values."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    model: Any = LlamaForCausalLM(config)
    return model.to(dtype)


@contextmanager
def ours(model: Any) -> Iterator[Ready]:
    """Yield ids → loss of a model with this project's LoRA on every linear map, and the parameters that train."""
    adapter = peftbench.attach(model, "lora", rank=RANK, alpha=8.0, targets=("all",))
    yield (lambda ids: model(input_ids=ids, labels=ids).loss), adapter.parameters()
    adapter.detach()


@contextmanager
def hf_peft(model: Any, wide: bool = True) -> Iterator[Ready]:
    """Yield the same with HF PEFT's; `wide` adapters are fp32 whatever the base is, its default."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=8, lora_dropout=0.0, target_modules=list(TARGETS))
    wrapped: Any = get_peft_model(model, config, autocast_adapter_dtype=wide)
    yield (lambda ids: wrapped(input_ids=ids, labels=ids).loss), list(wrapped.parameters())


@contextmanager
def plain(model: Any) -> Iterator[Ready]:
    """Yield the same for a frozen model without adapters whose embeddings take a gradient."""
    model.requires_grad_(False)
    embed = model.get_input_embeddings()
    yield (lambda ids: model(inputs_embeds=embed(ids).requires_grad_(), labels=ids).loss), []


CONTESTANTS: dict[str, Adapt] = {
    "ours": ours,
    "hf-peft": hf_peft,
    "hf-peft-bf16": lambda model: hf_peft(model, wide=False),
    "plain": plain,
}


def counted(adapt: Adapt, layers: int, dtype: torch.dtype) -> Counts:
    """Return the operations of one forward and backward pass."""
    torch.manual_seed(0)
    ids = torch.randint(0, 64, (ROWS, LENGTH))
    with adapt(model_of(layers, dtype).train()) as (loss, parameters):
        loss(ids).backward()  # what is made once is there afterwards
        for parameter in parameters:
            parameter.grad = None
        with Counts() as counts:
            loss(ids).backward()
    return counts


def per_layer(adapt: Adapt, dtype: torch.dtype) -> Counter[str]:
    """Return a decoder layer's operations by name, forward plus backward."""
    one, three = counted(adapt, 1, dtype).names, counted(adapt, 3, dtype).names
    more = {name: three[name] - one[name] for name in three}
    assert all(n % 2 == 0 for n in more.values()), more
    return Counter({name: n // 2 for name, n in more.items() if n})


def allocations_per_layer(adapt: Adapt, dtype: torch.dtype) -> int:
    """Return how often a decoder layer reserves memory by an operation of its own."""
    one, three = counted(adapt, 1, dtype).allocations, counted(adapt, 3, dtype).allocations
    assert (three - one) % 2 == 0, (one, three)
    return (three - one) // 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--out", type=Path, help="records are added to this file, one a line")
    parser.add_argument("--names", action="store_true", help="print every operation's number")
    given = parser.parse_args()
    dtype = torch.bfloat16 if given.dtype == "bf16" else torch.float32
    origin = common.header("operations", torch.device("cpu"))
    found = {name: per_layer(adapt, dtype) for name, adapt in CONTESTANTS.items()}
    records = [
        {
            **origin,
            "contestant": name,
            "precision": given.dtype,
            "operations": sum(names.values()),
            "allocations": allocations_per_layer(CONTESTANTS[name], dtype),
            "names": names,
        }
        for name, names in found.items()
    ]
    common.append(given.out, records)
    headers = ("contestant", "operations per layer", "allocations beside")
    print(common.table(headers, [[r["contestant"], str(r["operations"]), str(r["allocations"])] for r in records]))
    if given.names:
        every = sorted({name for names in found.values() for name in names})
        rows = [[name, *(str(names[name]) for names in found.values())] for name in every]
        print("\n" + common.table(("operation", *found), rows))


if __name__ == "__main__":
    main()
