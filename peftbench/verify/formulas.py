"""The paper's formula as the reference, for methods that no library holds as they stand here.

Each entry writes the adapted linear map as a dense weight and bias built from the method's tensors, one run, no
batching; autograd through `torch.func.functional_call` on a copy of the model gives outputs, gradients and training.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from peftbench.errors import UserError
from peftbench.models.roles import Site
from peftbench.verify import STEPS, Parity
from peftbench.verify.bench import LEARNING_RATE, Batch, Ours, batches, fresh, largest, loss, outputs, ratio, relative
from peftbench.verify.dense import DENSE
from peftbench.verify.products import PRODUCTS

Formula = Callable[[Any, Site, Tensor, "Tensor | None", dict[str, Tensor]], "tuple[Tensor, Tensor | None]"]
"""(method, site, W [out, in], b [out], the site's tensors) → the adapted (W', b')."""

FORMULAS: dict[str, Formula] = DENSE | PRODUCTS


def check(name: str, model_name: str) -> Parity:
    """Compare the method `name` with its formula on dense weights.

    Raises:
        UserError: there is no formula for it, or method and model do not go together.
    """
    if name not in FORMULAS:
        raise UserError(f"verify: no formula for {name}")
    formula = FORMULAS[name]
    ours = Ours.of(name, model_name)
    reference = fresh(model_name)
    state = {k: v.clone() for k, v in ours.state().items()}
    trained = {k for key, delta in ours.adapter.parts for k in (f"{key}.{n}" for n in delta.run_state(0))}
    leaves = {k: v.requires_grad_(k in trained) for k, v in state.items()}
    modules = dict(reference.named_modules())
    sites = ours.method.sites(reference)

    def adapted() -> dict[str, Tensor]:
        changed: dict[str, Tensor] = {}
        for site in sites:
            module = modules[site.name]
            weight = changed.get(f"{site.name}.weight", module.weight)
            bias = changed.get(f"{site.name}.bias", getattr(module, "bias", None))
            own = {k.removeprefix(f"{site.key}."): v for k, v in leaves.items() if k.startswith(f"{site.key}.")}
            matrix = weight.T if site.transposed else weight
            matrix, bias = formula(ours.method, site, matrix, bias, own)
            changed[f"{site.name}.weight"] = matrix.T if site.transposed else matrix
            if bias is not None:
                changed[f"{site.name}.bias"] = bias
        return changed

    def predict(batch: Batch) -> Tensor:
        return outputs(functional_call(reference, adapted(), (), dict(batch.inputs)), batch)

    data = batches(ours.model)
    with torch.no_grad():
        deviation = largest(ours.outputs(data[0]), predict(data[0]))
    loss(predict(data[0]), data[0]).backward()  # type: ignore[no-untyped-call]
    learning = [leaves[k] for k in sorted(trained)]
    theirs = {k: torch.zeros_like(leaves[k]) if leaves[k].grad is None else leaves[k].grad for k in trained}
    gradients = relative(ours.gradients(data[0]), {k: g.clone() for k, g in theirs.items() if g is not None})
    merged = None
    if ours.method.traits.mergeable:
        ours.adapter.merge()
        with torch.no_grad():
            mine: dict[str, nn.Parameter] = dict(ours.model.named_parameters())
            merged = max(largest(mine[k], v) for k, v in adapted().items())
        ours.adapter.unmerge()
    losses = []
    optimizer = torch.optim.AdamW(learning, lr=LEARNING_RATE, weight_decay=0.0)
    for step in range(STEPS):
        optimizer.zero_grad()
        value = loss(predict(data[step % len(data)]), data[step % len(data)])
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(value.item())
    return Parity(
        method=name,
        reference="formula",
        model=model_name,
        outputs=deviation,
        gradients=gradients,
        trace=ratio(ours.trace(data, STEPS), losses),
        merged=merged,
        trainable=(ours.adapter.parameter_count(), sum(leaf.numel() for leaf in learning)),
    )
