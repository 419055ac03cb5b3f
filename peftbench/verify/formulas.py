"""The paper's formula as the reference, for methods that no library holds as they stand here.

Each entry writes the adapted linear map as a dense weight and bias built from the method's tensors, one run, no
batching; autograd through `torch.func.functional_call` on a copy of the model gives outputs, gradients and training.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from peftbench.errors import UserError
from peftbench.models.roles import Site
from peftbench.verify import STEPS, Parity
from peftbench.verify.bench import (
    LEARNING_RATE,
    Batch,
    Ours,
    batches,
    fresh,
    largest,
    loss,
    outputs,
    plain_trace,
    ratio,
    relative,
)
from peftbench.verify.dense import DENSE
from peftbench.verify.products import PRODUCTS

Formula = Callable[[Any, Site, Tensor, "Tensor | None", dict[str, Tensor]], "tuple[Tensor, Tensor | None]"]
"""(method, site, W [out, in], b [out], the site's tensors) → the adapted (W', b')."""

Prompt = Callable[[dict[str, Tensor]], Tensor]
"""The embedding site's tensors → virtual tokens [P, D]."""


def multitask_prompt(own: dict[str, Tensor]) -> Tensor:
    """Return the shared prompt times the low-rank matrix of the only task."""
    return own["shared"] * (own["columns"][0] @ own["rows"][0])


FORMULAS: dict[str, Formula] = DENSE | PRODUCTS
PROMPTS: dict[str, Prompt] = {"mpt": multitask_prompt}


class Dense:
    """A method's formula on a copy of the model: its tensors are leaves, its weights are computed from them.

    Attributes:
        modules: the copy's, by name; their weights are what the formula starts from.
        sites: the method's.
        leaves: the method's tensors by the names of `Ours.state`, those in `trained` with gradients.
    """

    def __init__(self, ours: Ours, model_name: str, formula: Formula | None, prompt: Prompt | None = None) -> None:
        self.model, self.method, self.formula, self.prompt = fresh(model_name), ours.method, formula, prompt
        self.modules: dict[str, Any] = dict(self.model.named_modules())
        self.sites = ours.method.sites(self.model)
        self.trained = sorted(f"{key}.{n}" for key, delta in ours.adapter.parts for n in delta.run_state(0))
        self.leaves = {k: v.clone().requires_grad_(k in self.trained) for k, v in ours.state().items()}

    @property
    def learning(self) -> list[Tensor]:
        """The leaves that train."""
        return [self.leaves[k] for k in self.trained]

    def own(self, site: Site) -> dict[str, Tensor]:
        """Return the leaves of a site by their own names."""
        prefix = f"{site.key}."
        return {k.removeprefix(prefix): v for k, v in self.leaves.items() if k.startswith(prefix)}

    def adapted(self) -> dict[str, Tensor]:
        """Return the weights and biases that the method changes, changed, by name and in the model's layout."""
        changed: dict[str, Tensor] = {}
        for site in self.sites if self.formula is not None else ():
            assert self.formula is not None
            module = self.modules[site.name]
            weight = changed.get(f"{site.name}.weight", module.weight)
            bias = changed.get(f"{site.name}.bias", getattr(module, "bias", None))
            matrix = weight.T if site.transposed else weight
            matrix, bias = self.formula(self.method, site, matrix, bias, self.own(site))
            changed[f"{site.name}.weight"] = matrix.T if site.transposed else matrix
            if bias is not None:
                changed[f"{site.name}.bias"] = bias
        return changed

    def predict(self, batch: Batch) -> Tensor:
        """Return the outputs on a batch."""
        if self.prompt is None:
            return outputs(functional_call(self.model, self.adapted(), (), dict(batch.inputs)), batch)
        ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
        model: Any = self.model
        front = self.prompt(self.own(self.sites[0])).expand(len(ids), -1, -1)
        states = torch.cat([front, model.get_input_embeddings()(ids)], dim=1)
        seen = torch.cat([mask.new_ones(front.shape[:2]), mask], dim=1)
        return outputs(model(inputs_embeds=states, attention_mask=seen), batch)

    def merged(self, ours: Ours) -> float:
        """Return the largest difference from the weights that `ours` merges."""
        ours.adapter.merge()
        mine: dict[str, nn.Parameter] = dict(ours.model.named_parameters())
        with torch.no_grad():
            worst = max(largest(mine[k], v) for k, v in self.adapted().items())
        ours.adapter.unmerge()
        return worst

    def compare(self, name: str, reference: str, model_name: str, ours: Ours, batch: Batch) -> Parity:
        """Return all but the trace."""
        with torch.no_grad():
            deviation = largest(ours.outputs(batch), self.predict(batch))
        loss(self.predict(batch), batch).backward()  # type: ignore[no-untyped-call]
        leaves = {k: self.leaves[k] for k in self.trained}
        theirs = {k: torch.zeros_like(t) if t.grad is None else t.grad for k, t in leaves.items()}
        return Parity(
            method=name,
            reference=reference,
            model=model_name,
            outputs=deviation,
            gradients=relative(ours.gradients(batch), theirs),
            merged=self.merged(ours) if ours.method.traits.mergeable else None,
            trainable=(ours.adapter.parameter_count(), sum(t.numel() for t in self.learning)),
        )


def check(name: str, model_name: str) -> Parity:
    """Compare the method `name` with its formula on dense weights.

    Raises:
        UserError: there is no formula for it, or method and model do not go together.
    """
    if name not in FORMULAS | PROMPTS:
        raise UserError(f"verify: no formula for {name}")
    ours = Ours.of(name, model_name)
    dense = Dense(ours, model_name, FORMULAS.get(name), PROMPTS.get(name))
    data = batches(ours.model)
    found = dense.compare(name, "formula", model_name, ours, data[0])
    optimizer = torch.optim.AdamW(dense.learning, lr=LEARNING_RATE, weight_decay=0.0)
    losses = plain_trace(dense.predict, dense.learning, data, STEPS, lambda step: optimizer.step())
    return dataclasses.replace(found, trace=ratio(ours.trace(data, STEPS), losses))
