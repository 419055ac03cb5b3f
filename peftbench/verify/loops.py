"""The paper's algorithm as a plain training loop, for methods that are a way of training more than a change of weights.

Outputs, gradients and merged weights are held against a dense formula or the base's own weights, as elsewhere; the
losses against a loop that does by hand what the method does between steps, with the optimizers of `torch`. Settings are
such that all of it happens within `STEPS` steps.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from peftbench.errors import UserError
from peftbench.methods.adapter import generator_for
from peftbench.models.roles import Site
from peftbench.verify import STEPS, Parity
from peftbench.verify.bench import LEARNING_RATE, SEED, Ours, batches, plain_trace, ratio
from peftbench.verify.formulas import Dense
from peftbench.verify.native import Bare, site_rows


def _with_product(
    method: Any, site: Site, weight: Tensor, bias: Tensor | None, own: dict[str, Tensor]
) -> tuple[Tensor, Tensor | None]:
    """Return W + (alpha / r) B A on the rows of the site."""
    change = torch.zeros_like(weight)
    change[site_rows(site)] = method.alpha / method.rank * (own["A"] @ own["B"]).T
    return weight + change, bias


def relora(name: str, model_name: str, **changes: Any) -> Parity:
    """Merge by hand, AdamW, moments pruned by hand, a jagged rate (Lialin et al. 2023, algorithm 1).

    Args:
        changes: settings in place of those that the gate chooses.
    """
    ours = Ours.of(name, model_name, **{"restarts": 3, "restart_warmup": 0.4, "pruned": 0.75} | changes)
    method: Any = ours.method
    dense = Dense(ours, model_name, _with_product)
    data = batches(ours.model)
    found = dense.compare(name, "loop", model_name, ours, data[0])
    generator = generator_for("adapter", SEED)

    def drawn(site: Site) -> Tensor:
        bound = site.in_features**-0.5
        return torch.rand((site.in_features, method.rank), generator=generator) * 2 * bound - bound

    for site in dense.sites:
        drawn(site)  # the first A, which is not begun with here
    optimizer = torch.optim.AdamW(dense.learning, lr=LEARNING_RATE, weight_decay=0.0)
    part, begun = STEPS // (method.restarts + 1), 0
    warmup = math.ceil(method.restart_warmup * part)

    @torch.no_grad()
    def restart() -> None:
        for weight, matrix in dense.adapted().items():
            dense.model.get_parameter(weight).copy_(matrix)
        for site in dense.sites:
            own = dense.own(site)
            own["A"].copy_(drawn(site))
            own["B"].zero_()
        for leaf in dense.learning:
            state = optimizer.state[leaf]
            sizes, order = state["exp_avg"].abs().flatten().sort()
            small = order[: round(method.pruned * len(sizes))]
            state["exp_avg"].view(-1)[small] = 0.0
            state["exp_avg_sq"].view(-1)[small] = 0.0

    def update(step: int) -> None:
        nonlocal begun
        climb = min(1.0, (step - begun) / warmup) if begun else 1.0
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * climb
        optimizer.step()
        if (step + 1) % part == 0 and step + 1 < STEPS:
            begun = step + 1
            restart()

    losses = plain_trace(dense.predict, dense.learning, data, STEPS, update)
    return dataclasses.replace(found, trace=ratio(ours.trace(data, STEPS), losses))


def galore(name: str, model_name: str, **changes: Any) -> Parity:
    """Project each matrix's gradient, Adam there, project back (Zhao et al. 2024, algorithm 2).

    An Adam of `torch` trains, in place of each matrix, a small one that is zero before every step and so holds that
    step after it. A new singular vector has the sign that is closer to the one it replaces.

    Args:
        changes: settings in place of those that the gate chooses.
    """
    ours = Ours.of(name, model_name, **{"update_every": 7} | changes)
    method: Any = ours.method
    bare = Bare(ours, name, model_name)
    data = batches(ours.model)
    found = bare.compare(name, "loop", model_name, ours, data[0])
    matrices = [p for p in bare.learning if p.dim() == 2 and min(p.shape) > method.rank]
    chosen = {id(p) for p in matrices}
    others = [p for p in bare.learning if id(p) not in chosen]
    small = [nn.Parameter(torch.zeros(max(p.shape), method.rank)) for p in matrices]
    bases: dict[int, Tensor] = {}
    optimizer = torch.optim.AdamW([*small, *others], lr=LEARNING_RATE, weight_decay=0.0)

    def tall(matrix: Tensor) -> Tensor:
        return matrix.T if matrix.shape[0] < matrix.shape[1] else matrix

    @torch.no_grad()
    def update(step: int) -> None:
        pairs = zip(matrices, small, strict=True)
        moved = [(p, part, tall(p.grad)) for p, part in pairs if p.grad is not None]
        for p, part, gradient in moved:
            if step % method.update_every == 0:
                bases[id(p)] = _first_singular_vectors(gradient, method.rank, bases.get(id(p)))
            part.grad = gradient @ bases[id(p)]
            part.zero_()
        optimizer.step()
        for p, part, _ in moved:
            tall(p).add_(part @ bases[id(p)].T, alpha=method.scale)

    losses = plain_trace(bare.predict, bare.learning, data, STEPS, update)
    return dataclasses.replace(found, trace=ratio(ours.trace(data, STEPS), losses))


def _first_singular_vectors(gradient: Tensor, rank: int, before: Tensor | None) -> Tensor:
    vectors = torch.linalg.svd(gradient.double(), full_matrices=False).Vh[:rank].T.float()
    if before is not None:
        vectors = vectors * torch.where((vectors * before).sum(0) < 0, -1.0, 1.0)
    return vectors


LOOPS: dict[str, Callable[[str, str], Parity]] = {"relora": relora, "galore": galore}


def check(name: str, model_name: str) -> Parity:
    """Compare the method `name` with its paper's training loop.

    Raises:
        UserError: there is no loop for it, or method and model do not go together.
    """
    if name not in LOOPS:
        raise UserError(f"verify: no loop for {name}")
    return LOOPS[name](name, model_name)
