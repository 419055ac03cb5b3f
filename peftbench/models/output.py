"""A language model's output layer, set aside for one pass: the model then returns hidden states in place of logits."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn


def plain_output_layer(model: nn.Module) -> nn.Linear | None:
    """Return the layer that makes logits, if a frozen or trained matrix and a frozen bias are all there is to it.

    None where it is quantized or anything else than a linear layer, carries hooks (an adapter sits on it), has its
    `forward` shadowed, or trains its bias.
    """
    layer = cast(Any, model).get_output_embeddings()
    if type(layer) is not nn.Linear or "forward" in vars(layer):
        return None
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    if any(hooks) or (layer.bias is not None and layer.bias.requires_grad):
        return None
    return layer


def hidden_states(model: nn.Module, layer: nn.Linear, inputs: dict[str, Any]) -> Tensor | None:
    """Return what the output layer of `model(**inputs)` is given, [rows, T, D].

    None where logits are not simply what `layer` makes of it: capped, scaled, cut, or made of several calls. Seen from
    what the model returns, which has to be the very tensor that the layer was given, unchanged.
    """
    given: list[tuple[Tensor, int]] = []

    def forward(states: Tensor) -> Tensor:
        given.append((states, states._version))
        return states

    layer.forward = forward  # type: ignore[method-assign, assignment]
    try:
        returned = model(**inputs).logits
    finally:
        del layer.forward
    untouched = len(given) == 1 and given[0][0] is returned and given[0][1] == returned._version
    return cast(Tensor, returned) if untouched else None
