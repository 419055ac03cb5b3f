"""Bring a model into memory with its linear layers quantized one after another, never the whole of it dense.

A checkpoint goes through the extension point that transformers has for quantization on the fly: it reads, renames and
converts tensors as for any model and hands over each weight; a placeholder without storage takes its place until the
end. Random weights are drawn layer by layer from the architecture on the meta device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from peftbench.models.quantized import Packed, QuantizedLinear, Scheme, backend, body_linears, put, quantize

NAME = "peftbench"


@register_quantization_config(NAME)
class OnTheFly(QuantizationConfigMixin):  # type: ignore[misc]
    """What `from_pretrained` is told: quantize with `scheme`, on `device`."""

    def __init__(self, scheme: Scheme, device: torch.device) -> None:
        super().__init__(quant_method=NAME)  # type: ignore[arg-type]
        self.scheme, self.device = scheme, device


@register_quantizer(NAME)
class _Quantizer(HfQuantizer):  # type: ignore[misc]
    quantization_config: Any

    def __init__(self, quantization_config: OnTheFly, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.names: set[str] = set()
        self.packed: dict[str, Packed] = {}

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        name, _, kind = param_name.rpartition(".")
        return kind == "weight" and name in self.names

    def get_quantize_ops(self) -> ConversionOps:
        return _Pack(self)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        self.names = set(body_linears(model))

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        for name, packed in self.packed.items():
            old: Any = model.get_submodule(name)
            rows, columns = reversed(old.weight.shape) if isinstance(old, Conv1D) else old.weight.shape
            put(model, name, QuantizedLinear(columns, rows, old.bias, self.quantization_config.scheme, packed))
        self.packed.clear()
        self.remove_quantization_config(model)

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True


class _Pack(ConversionOps):  # type: ignore[misc]
    def __init__(self, quantizer: _Quantizer) -> None:
        self.quantizer = quantizer

    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], model: Any = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        config = self.quantizer.quantization_config
        placeholders = {}
        for key, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            name = key.removesuffix(".weight")
            own = weight.T if isinstance(model.get_submodule(name), Conv1D) else weight
            packer = backend(config.scheme.backend)
            self.quantizer.packed[name] = packer.pack(own.to(config.device).contiguous(), config.scheme)
            placeholders[key] = torch.zeros((), dtype=weight.dtype).expand(weight.shape)
        return placeholders


def draw(model: PreTrainedModel, scheme: Scheme, device: torch.device) -> None:
    """Give a model on the meta device random weights as its class draws them, quantized layer by layer, on `device`.

    The entries of its outermost lists of layers come one by one, each drawn and quantized before the next; then what
    is left. Numbers are drawn from the global generators.
    """
    # what is quantized must not be held here
    places = [id(p) for m in model.modules() for p in m._parameters.values() if p is not None]
    tied: dict[int, nn.Parameter | None] = {place: None for place in places if places.count(place) > 1}
    layers = _layers(model)
    for name in layers:
        _draw(model, list(model.get_submodule(name).modules()), device, tied)
        quantize(model, scheme, under=f"{name}.")
    rest = [m for n, m in model.named_modules() if not any(f"{n}.".startswith(f"{layer}.") for layer in layers)]
    _draw(model, rest, device, tied)
    del rest
    quantize(model, scheme)


def _layers(model: nn.Module) -> list[str]:
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    return [f"{name}.{child}" for name in outer for child, _ in lists[name].named_children()]


@torch.no_grad()
def _draw(
    model: PreTrainedModel, modules: list[nn.Module], device: torch.device, tied: dict[int, nn.Parameter | None]
) -> None:
    """Materialise and initialise modules on the meta device, parents first in the list; tied parameters stay tied."""
    for module in modules:
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            place = id(parameter)
            new = tied.get(place)
            if new is None:
                new = nn.Parameter(torch.empty_like(parameter, device=device), requires_grad=False)
                if place in tied:
                    tied[place] = new
            module._parameters[name] = new
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device=device)
    # children first, as transformers does
    for module in reversed(modules):
        model._init_weights(module)  # type: ignore[operator]
