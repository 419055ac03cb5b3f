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
    tied: dict[int, nn.Parameter] = {}
    drawn: set[nn.Module] = set()
    for name, layer in _layers(model):
        drawn.update(layer.modules())
        _draw(model, list(layer.modules()), device, tied)
        quantize(model, scheme, under=f"{name}.")
    drawn.update(m for m in model.modules() if isinstance(m, QuantizedLinear))
    _draw(model, [m for m in model.modules() if m not in drawn], device, tied)
    quantize(model, scheme)


def _layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    return [(f"{name}.{child}", layer) for name in outer for child, layer in lists[name].named_children()]


@torch.no_grad()
def _draw(
    model: PreTrainedModel, modules: list[nn.Module], device: torch.device, tied: dict[int, nn.Parameter]
) -> None:
    """Materialise and initialise modules on the meta device, parents first in the list; tied parameters stay tied."""
    for module in modules:
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = nn.Parameter(torch.empty_like(parameter, device=device), requires_grad=False)
                module._parameters[name] = tied.setdefault(id(parameter), empty)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device=device)
    # children first, as transformers does
    for module in reversed(modules):
        model._init_weights(module)  # type: ignore[operator]
