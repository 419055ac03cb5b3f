"""Plain PyTorch as the reference, for methods whose trained tensors are the base's own weights.

The reference trains the very parameters of a copy of the model with `torch.optim.AdamW` and nothing of this package.
"""

from __future__ import annotations

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
    ratio,
    relative,
)


def _rows(site: Site | None) -> slice | list[int]:
    columns = None if site is None else site.columns
    return slice(None) if columns is None else columns if isinstance(columns, slice) else list(columns)


def check(name: str, model_name: str) -> Parity:
    """Compare the method `name` with training the same weights of the model directly.

    Raises:
        UserError: method and model do not go together, or the method's tensors are not the base's own.
    """
    ours = Ours.of(name, model_name)
    reference = fresh(model_name)
    parameters = base_parameters(reference)
    places: dict[str, tuple[nn.Parameter, slice | list[int]]] = {}
    for site, delta in ours.adapter.deltas:
        for tensor in delta.run_state(0):
            own = f"{site.name}.{tensor}"
            if own not in parameters:
                raise UserError(f"verify: {name} trains {own!r}, which is not a weight of the base")
            places[f"{site.key}.{tensor}"] = parameters[own], _rows(site)
    places |= {n: (parameters[n], slice(None)) for n in ours.adapter.trained}
    if not places and ours.adapter.parameters():
        raise UserError(f"verify: {name} trains nothing of the base")
    with torch.no_grad():
        for key, value in ours.state().items():
            parameter, rows = places[key]
            parameter[rows] = value
    trained = list({id(p): p for p, _ in places.values()}.values())
    for p in trained:
        p.requires_grad_(True)
    data = batches(ours.model)

    def predict(batch: Batch) -> Tensor:
        return outputs(reference(**batch.inputs), batch)

    with torch.no_grad():
        deviation = largest(ours.outputs(data[0]), predict(data[0]))
    count = sum(p[rows].numel() for p, rows in places.values())
    found = Parity(name, f"torch {torch.__version__.partition('+')[0]}", model_name, outputs=deviation)
    if not trained:
        return found
    loss(predict(data[0]), data[0]).backward()  # type: ignore[no-untyped-call]
    theirs = {k: p.grad[rows].clone() for k, (p, rows) in places.items() if p.grad is not None}
    reference.zero_grad()
    own_gradients = ours.gradients(data[0])
    silent = [k for k in places if k not in theirs and bool(own_gradients[k].any())]
    if silent:
        raise UserError(f"{silent[0]!r} has a gradient only here")
    merged = None
    if ours.method.traits.mergeable:
        ours.adapter.merge()
        mine = dict(ours.model.named_parameters())
        merged = max(largest(mine[n], p) for n, p in reference.named_parameters() if n in mine)
        ours.adapter.unmerge()
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        objective = loss(predict(data[step % len(data)]), data[step % len(data)])
        objective.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(objective.item())
    return Parity(
        name,
        found.reference,
        model_name,
        outputs=deviation,
        gradients=relative(own_gradients, theirs),
        trace=ratio(ours.trace(data, STEPS), losses),
        merged=merged,
        trainable=(ours.adapter.parameter_count(), count),
    )
