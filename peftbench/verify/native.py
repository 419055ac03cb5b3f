"""Plain PyTorch as the reference, for methods whose trained tensors are the base's own weights.

The reference trains the very parameters of a copy of the model with `torch.optim.AdamW` and nothing of this package.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from peftbench.errors import UserError
from peftbench.methods.base import base_parameters
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


def site_rows(site: Site | None) -> slice | list[int]:
    """Return which rows of a weight [out, in] are a site's; all without a site."""
    columns = None if site is None else site.columns
    return slice(None) if columns is None else columns if isinstance(columns, slice) else list(columns)


class Bare:
    """A copy of the model whose own weights train.

    Attributes:
        places: parameter and rows by the names of `Ours.state`.
        learning: the parameters, each once.
    """

    def __init__(self, ours: Ours, name: str, model_name: str) -> None:
        self.model = fresh(model_name)
        parameters = base_parameters(self.model)
        self.places: dict[str, tuple[nn.Parameter, slice | list[int]]] = {}
        for site, delta in ours.adapter.deltas:
            for tensor in delta.run_state(0):
                own = f"{site.name}.{tensor}"
                if own not in parameters:
                    raise UserError(f"verify: {name} trains {own!r}, which is not a weight of the base")
                self.places[f"{site.key}.{tensor}"] = parameters[own], site_rows(site)
        self.places |= {n: (parameters[n], slice(None)) for n in ours.adapter.trained}
        if not self.places and ours.adapter.parameters():
            raise UserError(f"verify: {name} trains nothing of the base")
        with torch.no_grad():
            for key, value in ours.state().items():
                parameter, rows = self.places[key]
                parameter[rows] = value
        self.learning = list({id(p): p for p, _ in self.places.values()}.values())
        for p in self.learning:
            p.requires_grad_(True)

    def predict(self, batch: Batch) -> Tensor:
        """Return the outputs on a batch."""
        return outputs(self.model(**batch.inputs), batch)

    def compare(self, name: str, reference: str, model_name: str, ours: Ours, batch: Batch) -> Parity:
        """Return all but the trace; of a method that trains nothing, the outputs alone."""
        with torch.no_grad():
            deviation = largest(ours.outputs(batch), self.predict(batch))
        found = Parity(name, reference, model_name, outputs=deviation)
        if not self.learning:
            return found
        loss(self.predict(batch), batch).backward()  # type: ignore[no-untyped-call]
        theirs = {k: p.grad[rows].clone() for k, (p, rows) in self.places.items() if p.grad is not None}
        own_gradients = ours.gradients(batch)
        silent = [k for k in self.places if k not in theirs and bool(own_gradients[k].any())]
        if silent:
            raise UserError(f"{silent[0]!r} has a gradient only here")
        merged = None
        if ours.method.traits.mergeable:
            ours.adapter.merge()
            mine = dict(ours.model.named_parameters())
            merged = max(largest(mine[n], p) for n, p in self.model.named_parameters() if n in mine)
            ours.adapter.unmerge()
        count = sum(p[rows].numel() for p, rows in self.places.values())
        return dataclasses.replace(
            found,
            gradients=relative(own_gradients, theirs),
            merged=merged,
            trainable=(ours.adapter.parameter_count(), count),
        )


def check(name: str, model_name: str) -> Parity:
    """Compare the method `name` with training the same weights of the model directly.

    Raises:
        UserError: method and model do not go together, or the method's tensors are not the base's own.
    """
    ours = Ours.of(name, model_name)
    bare = Bare(ours, name, model_name)
    data = batches(ours.model)
    found = bare.compare(name, f"torch {torch.__version__.partition('+')[0]}", model_name, ours, data[0])
    if not bare.learning:
        return found
    optimizer = torch.optim.AdamW(bare.learning, lr=LEARNING_RATE, weight_decay=0.0)
    losses = plain_trace(bare.predict, bare.learning, data, STEPS, lambda step: optimizer.step())
    return dataclasses.replace(found, trace=ratio(ours.trace(data, STEPS), losses))
