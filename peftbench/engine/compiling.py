"""`train.execution=compiled`: the model's repeated layers through `torch.compile`, each as a region of its own.

All layers of a stack run the same code on other tensors, so one compilation serves them all, however deep the model is;
what a method put into a layer (hooks, replaced forwards) is compiled with it. Dropout stays an operation of its own,
which asks each run's stream (`kernels.noise`) when the layer runs: masks are those of eager steps. Embeddings, head and
loss stay eager, and so does evaluation, whose lengths and caches would each want a compilation of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

RECOMPILATIONS = 64
"""Most versions of a layer: first or later one, a fixed or any length, full batches or what an epoch leaves."""

SETTINGS = (
    # adapters' dropouts are numbered: a number that differs between layers is no reason to compile each
    "allow_unspec_int_on_nn_module",
    # how many draws a step has made (`kernels.noise`) does not go back where a checkpointed layer is made again
    "skip_fwd_side_effects_in_bwd_under_checkpoint",
)
"""Dynamo's settings that are on."""


def repeated_layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers of the model's stacks: entries of module lists that hold at least two of one class."""
    found: list[nn.Module] = []
    inside: set[int] = set()
    for module in model.modules():
        if not isinstance(module, nn.ModuleList) or id(module) in inside:
            continue
        layers = list(module)
        if len(layers) >= 2 and len({type(layer) for layer in layers}) == 1 and _calls_itself(layers[0]):
            found += layers
            inside |= {id(part) for layer in layers for part in layer.modules()}
    return found


def _calls_itself(module: nn.Module) -> bool:
    """Whether the module is called as a whole (a list of lists is not)."""
    return type(module).forward is not nn.Module.forward


@contextmanager
def compiled_layers(model: nn.Module, backend: str = "inductor") -> Iterator[None]:
    """Compile the model's repeated layers within the context.

    Enter it when everything that changes the layers is in place.
    """
    limits = ("recompile_limit", "accumulated_recompile_limit")
    settings: dict[str, Any] = {name: max(RECOMPILATIONS, getattr(_settings(), name, 0)) for name in limits}
    settings |= dict.fromkeys(SETTINGS, True)
    # not every name exists in every version that works
    settings = {name: value for name, value in settings.items() if hasattr(_settings(), name)}
    layers = [layer for layer in repeated_layers(model) if "forward" not in layer.__dict__]
    with _settings().patch(settings):
        for layer in layers:
            layer.forward = _while_training(layer.forward, backend)  # type: ignore[method-assign]
        try:
            yield
        finally:
            for layer in layers:
                layer.__dict__.pop("forward", None)


def _while_training(eager: Callable[..., Any], backend: str) -> Callable[..., Any]:
    compiled = torch.compile(eager, backend=backend)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return (compiled if torch.is_grad_enabled() else eager)(*args, **kwargs)

    return forward


def _settings() -> Any:
    import torch._dynamo

    return cast(Any, torch._dynamo.config)
