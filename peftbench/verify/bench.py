"""What every check shares: a small model, its inputs, a loss, and our side of the comparison."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peftbench import registry
from peftbench.config import ModelConfig, build
from peftbench.engine.optimizer import PackedAdamW, Recipe
from peftbench.errors import UserError
from peftbench.methods.adapter import Adapter, attach, named_method
from peftbench.methods.base import Method
from peftbench.models.load import load
from peftbench.models.quantized import QuantizedLinear
from peftbench.models.roles import linear_sites

MODELS = ("tiny-bert", "tiny-gpt2", "tiny-llama", "minilm-l6")
"""Families of the gate: an encoder, a decoder with Conv1D, one with grouped heads and gated MLP, a real checkpoint."""
LEARNING_RATE = 1e-3
TOKENS = 9
ROWS = 4
SEED = 7
"""Of the adapter."""
SMALL = 4
"""Whole-number settings are capped at this on tiny models."""
NOISE = 0.05
"""Standard deviation of what is added to every fresh parameter, so that no factor is zero."""
VECTOR_NOISE = 0.1
"""Standard deviation of what is added to a random model's biases and norms."""

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Batch:
    """Inputs of `ROWS` rows, the last one padded on the right, and what the outputs are compared with."""

    inputs: dict[str, Tensor]
    target_seed: int


@torch.no_grad()
def stirred(model: M) -> M:
    """Return the model with noise on its vectors: fresh biases are zero and fresh norms one, which hides mistakes.

    A model kept in 4 bits has the same vectors in the same order as a dense one, and so gets the same noise.
    """
    generator = torch.Generator().manual_seed(11)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(VECTOR_NOISE * torch.randn(parameter.shape, generator=generator))
    return model


def fresh(name: str, method: str | None = None) -> nn.Module:
    """Return the model, the same every time: with its language-model head for a decoder, without a head otherwise.

    Its linear maps are kept in 4 bits where `method` requires that. Random models are `stirred`.
    """
    needs = registry.section("method", method).get("requires") or {} if method is not None else {}
    changes = {k.removeprefix("model."): v for k, v in needs.items() if k.startswith("model.")}
    config = build(ModelConfig, registry.section("model", name) | changes, "model")
    model: nn.Module = load(config, "text" if config.kind == "decoder" else "head").model
    return (stirred(model) if name.startswith("tiny-") else model).eval()


def dense_twin(name: str, model: nn.Module) -> nn.Module:
    """Return the model as an ordinary one, with the dense weights that `model` computes with."""
    twin = fresh(name)
    modules = dict(twin.named_modules())
    with torch.no_grad():
        for place, module in model.named_modules():
            if isinstance(module, QuantizedLinear):
                weight = cast(Tensor, modules[place].weight)
                weight.copy_(module.dense().T if isinstance(modules[place], Conv1D) else module.dense())
    return twin


def weights(model: nn.Module, twin: nn.Module) -> dict[str, Tensor]:
    """Return the weights that `model` computes with, by the names and in the layout of its dense twin."""
    modules = dict(twin.named_modules())
    found: dict[str, Tensor] = {name: p.detach() for name, p in model.named_parameters()}
    for place, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            found[f"{place}.weight"] = module.dense().T if isinstance(modules[place], Conv1D) else module.dense()
            bias = module.dense_bias()
            if bias is not None:
                found[f"{place}.bias"] = bias
    return found


def batches(model: nn.Module, count: int = 4) -> list[Batch]:
    """Return random batches for `model`."""
    vocabulary = int(cast(Any, model).config.vocab_size)
    found = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(10, min(vocabulary, 1000), (ROWS, TOKENS), generator=generator)
        mask = torch.ones_like(ids)
        mask[-1, TOKENS - 3 :] = 0
        found.append(Batch({"input_ids": ids, "attention_mask": mask}, seed))
    return found


def outputs(result: Any, batch: Batch) -> Tensor:
    """Return logits or hidden states [n, D] of a model's result at real tokens, virtual tokens in front left out."""
    values = result.logits if getattr(result, "logits", None) is not None else result.last_hidden_state
    values = values[:, values.shape[1] - TOKENS :]
    return cast(Tensor, values[batch.inputs["attention_mask"].bool()])


def loss(values: Tensor, batch: Batch) -> Tensor:
    """Return the mean squared distance of outputs from a fixed random target."""
    generator = torch.Generator().manual_seed(1000 + batch.target_seed)
    return (values - torch.randn(values.shape, generator=generator)).square().mean()


def chosen(name: str, model: nn.Module, model_name: str) -> Method:
    """Return the method at a size that suits the model, on whole modules where roles share one.

    Raises:
        UserError: method and model do not go together.
    """
    method = named_method(name, {})
    changes: dict[str, Any] = {"dropout": 0.0} if "dropout" in method.settings() else {}
    if model_name.startswith("tiny-"):
        changes |= {k: min(v, SMALL) for k, v in method.settings().items() if type(v) is int}
    for field in dataclasses.fields(method):
        value = getattr(method, field.name)
        if "Targets" in str(field.type) and value:
            sites = linear_sites(model, value)
            if any(site.columns is not None for site in sites):
                changes[field.name] = tuple(sorted({site.name for site in sites}))
    method = named_method(name, changes)
    method.check(model)
    return method


def disturbed(adapter: Adapter) -> None:
    """Add noise to every parameter of an adapter of one run."""
    generator = torch.Generator().manual_seed(17)
    with torch.no_grad():
        for _, delta in adapter.parts:
            for view in delta.run_state(0).values():
                view.add_(NOISE * torch.randn(view.shape, generator=generator))


@dataclass
class Ours:
    """Our side: an adapter on its own copy of the model."""

    model: nn.Module
    adapter: Adapter
    method: Method

    @classmethod
    def of(cls, name: str, model_name: str, **changes: Any) -> Ours:
        """Attach the method, with these settings changed, with disturbed weights."""
        model = fresh(model_name, name)
        method = dataclasses.replace(chosen(name, model, model_name), **changes)
        adapter = attach(model, method, seeds=[SEED])
        disturbed(adapter)
        return cls(model, adapter, method)

    def state(self) -> dict[str, Tensor]:
        """Return the adapter's tensors, frozen random ones included."""
        return self.adapter.state_dict() | {k: v.clone() for k, v in self.adapter._drawn(0).items()}

    def outputs(self, batch: Batch, **inputs: Tensor) -> Tensor:
        """Return the outputs on a batch."""
        return outputs(self.model(**batch.inputs, **inputs), batch)

    def gradients(self, batch: Batch, **inputs: Tensor) -> dict[str, Tensor]:
        """Return the gradient of every trained tensor, by the names of `state`."""
        loss(self.outputs(batch, **inputs), batch).backward()  # type: ignore[no-untyped-call]
        found = {}
        for key, delta in self.adapter.parts:
            for name, parameter in delta.named_parameters():
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                shape = delta.shapes[name][0]
                found[f"{key}.{name}"] = gradient[0].reshape(shape).clone()
                parameter.grad = None
        for name, parameter in self.adapter.trained.items():
            found[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
            parameter.grad = None
        return found

    def trace(self, data: list[Batch], steps: int, **inputs: Tensor) -> list[float]:
        """Train `steps` steps and return the losses, what the method adds to them included."""
        packed, plain = self.adapter.packed_parameters(), list(self.adapter.trained.values())
        recipe = Recipe(LEARNING_RATE, schedule="constant", factor=self.method.rate_factor)
        optimizer = PackedAdamW(
            packed,
            plain,
            [recipe],
            steps,
            ratios=self.adapter.rate_ratios(),
            keep_gradients=self.adapter.watches_steps,
            base=self.method.base_optimizer(plain) if plain else None,
        )
        losses = []
        self.adapter.train()
        for step in range(steps):
            batch = data[step % len(data)]
            value = loss(self.outputs(batch, **inputs), batch)
            penalty = self.adapter.penalty()
            value = value if penalty is None else value + penalty[0]
            value.backward()  # type: ignore[no-untyped-call]
            optimizer.step(value.detach().reshape(1))
            if self.adapter.watches_steps:
                self.adapter.after_step(optimizer.end())
            losses.append(value.item())
        self.adapter.eval()
        return losses


def plain_trace(
    predict: Callable[[Batch], Tensor],
    learning: Sequence[Tensor],
    data: list[Batch],
    steps: int,
    update: Callable[[int], object],
) -> list[float]:
    """Return the losses of a reference that `predict`s and whose tensors `update` changes, given the step from 0."""
    losses = []
    for step in range(steps):
        batch = data[step % len(data)]
        for tensor in learning:
            tensor.grad = None
        value = loss(predict(batch), batch)
        value.backward()  # type: ignore[no-untyped-call]
        update(step)
        losses.append(value.item())
    return losses


def largest(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest absolute difference."""
    return float((ours.detach().double() - theirs.detach().double()).abs().max())


def relative(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """Return the largest relative difference in norm over tensors.

    Against the tensor's own norm, or a thousandth of the largest one's where its own is smaller: some gradients are
    zero by symmetry (a key's bias before a softmax) and hold nothing but rounding.
    """
    floor = 1e-3 * max((float(t.norm()) for t in theirs.values()), default=0.0)
    worst = 0.0
    for name, theirs_one in theirs.items():
        scale = max(float(theirs_one.norm()), floor, 1e-12)
        worst = max(worst, float((ours[name] - theirs_one).norm()) / scale)
    return worst


def ratio(ours: list[float], theirs: list[float]) -> float:
    """Return the largest relative difference of two loss traces."""
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


def same_names(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Raise UserError if the two sides do not train the same tensors."""
    odd = sorted(set(ours) ^ set(theirs))
    if odd:
        raise UserError(f"{odd[0]!r} trains {'only here' if odd[0] in ours else 'only in the reference'}")


Check = Callable[[str, str], Any]
