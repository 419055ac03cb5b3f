"""Frozen linear layers kept in 4 bits: the base model of QLoRA.

    y = W' x + b,  W' = dequantize(codes, absmax)      made anew in the compute dtype whenever it is used, never kept

Source: Dettmers et al. 2023, arXiv:2305.14314, section 3, eq. 5 and 6: blocks of 64 weights share a scale, and blocks
of 256 scales, less their mean, are kept in 8 bits (double quantization; the paper says 8-bit floats, its authors' code
has the dynamic map). Blocks run along the rows of W [out, in].

Merging replaces W' by a dense W' + ΔW until it is undone: exact up to the compute dtype, at the price of the dense
matrix. Quantizing W' + ΔW again, as HF PEFT does, would change what the adapter learnt.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peftbench.errors import UserError
from peftbench.kernels import blockwise, low_rank, nf4

FOUR_BITS = "4bit"
"""First word of a 4-bit weight's kind."""


@dataclass(frozen=True)
class Scheme:
    """How a weight is kept: "nf4" or "fp4", scales quantized too or not, and whose functions do it."""

    kind: str = "nf4"
    double: bool = True
    backend: str = "own"

    @classmethod
    def parse(cls, text: str) -> Scheme:
        """Return the scheme that one of `peftbench.config.QUANTIZATIONS` names: kind[-single][-bnb]."""
        kind, *rest = text.split("-")
        return cls(kind, "single" not in rest, "bitsandbytes" if "bnb" in rest else "own")


Packed = dict[str, Tensor]
"""codes [ceil(n / 2)] in bytes; absmax [blocks] in fp32, or in bytes with scale [ceil(blocks / 256)] and offset []."""


class Backend(Protocol):
    """Both directions of a scheme."""

    def pack(self, weight: Tensor, scheme: Scheme) -> Packed:
        """Quantize a dense weight on its own device."""

    def unpack(
        self, packed: Packed, scheme: Scheme, shape: torch.Size, dtype: torch.dtype, after: Tensor | None = None
    ) -> Tensor:
        """Return the dense weight of `shape` in `dtype`; `after`: see `QuantizedLinear.dense`."""


class Own:
    """The kernels of `peftbench.kernels`."""

    def pack(self, weight: Tensor, scheme: Scheme) -> Packed:
        codes, absmax = blockwise.quantize_4bit(weight, scheme.kind)
        if not scheme.double:
            return {"codes": codes, "absmax": absmax}
        offset = absmax.mean()
        small, scale = blockwise.quantize_8bit(absmax - offset, blockwise.dynamic_map(device=absmax.device))
        return {"codes": codes, "absmax": small, "scale": scale, "offset": offset}

    def unpack(
        self, packed: Packed, scheme: Scheme, shape: torch.Size, dtype: torch.dtype, after: Tensor | None = None
    ) -> Tensor:
        scale, offset = packed.get("scale"), packed.get("offset")
        return nf4.dequantize(packed["codes"], packed["absmax"], scale, offset, scheme.kind, shape, dtype, after)


class BitsAndBytes:
    """The same through bitsandbytes; needs it installed."""

    def __init__(self) -> None:
        # It warns on a CPU of an optional kernel for inference that nothing here calls.
        logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
        try:
            from bitsandbytes import functional
        except ImportError as error:
            raise UserError(
                "model.quantization=...-bnb: bitsandbytes is not installed; expected it installed (pip install "
                "bitsandbytes), or a value without -bnb"
            ) from error
        self.functional: Any = functional

    def pack(self, weight: Tensor, scheme: Scheme) -> Packed:
        codes, state = self.functional.quantize_4bit(
            weight.contiguous(),
            blocksize=blockwise.BLOCK,
            compress_statistics=scheme.double,
            quant_type=scheme.kind,
        )
        packed = {"codes": codes.view(-1), "absmax": state.absmax}
        return packed | {"scale": state.state2.absmax, "offset": state.offset} if scheme.double else packed

    def unpack(
        self, packed: Packed, scheme: Scheme, shape: torch.Size, dtype: torch.dtype, after: Tensor | None = None
    ) -> Tensor:
        device, state = packed["codes"].device, self.functional.QuantState
        nested = None
        if scheme.double:
            code = blockwise.dynamic_map(device=device)
            nested = state(absmax=packed["scale"], blocksize=blockwise.DYNAMIC_BLOCK, code=code, dtype=torch.float32)
        whole = state(
            absmax=packed["absmax"],
            shape=shape,
            dtype=dtype,
            blocksize=blockwise.BLOCK,
            code=blockwise.codebook(scheme.kind, device),
            quant_type=scheme.kind,
            offset=packed.get("offset"),
            state2=nested,
        )
        return self.functional.dequantize_4bit(packed["codes"].view(-1, 1), whole)  # type: ignore[no-any-return]


OWN = Own()


def backend(name: str) -> Backend:
    """Return the back end "own" or "bitsandbytes"; UserError where it is not installed."""
    assert name in ("own", "bitsandbytes"), name
    return OWN if name == "own" else _bitsandbytes()


@functools.cache
def _bitsandbytes() -> Backend:
    return BitsAndBytes()


def _names(scheme: Scheme) -> tuple[str, ...]:
    return ("codes", "absmax", "scale", "offset") if scheme.double else ("codes", "absmax")


def _empty(count: int, scheme: Scheme) -> Packed:
    """Return what `pack` makes of `count` elements, without storage."""
    blocks = -(-count // blockwise.BLOCK)
    packed = {
        "codes": torch.empty((count + 1) // 2, dtype=torch.uint8, device="meta"),
        "absmax": torch.empty(blocks, dtype=torch.uint8 if scheme.double else torch.float32, device="meta"),
    }
    if scheme.double:
        packed["scale"] = torch.empty(-(-blocks // blockwise.DYNAMIC_BLOCK), device="meta")
        packed["offset"] = torch.empty((), device="meta")
    return packed


class QuantizedLinear(nn.Module):
    """Stands in for a frozen `nn.Linear` or Conv1D: x [..., in] → [..., out].

    Attributes:
        in_features, out_features: as in `nn.Linear`; the weight is [out, in] whatever it was made from.
        weight: always None: there is no dense weight to read or write; see `dense`, `override` and `restore`.
        bias: frozen parameter [out], or None.
        scheme: how the weight is kept.
    """

    weight = None
    merged_weight: Tensor | None
    merged_bias: Tensor | None

    def __init__(
        self, in_features: int, out_features: int, bias: Tensor | None, scheme: Scheme, packed: Packed
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.scheme = in_features, out_features, scheme
        for name, tensor in packed.items():
            self.register_buffer(name, tensor)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.register_buffer("merged_weight", None, persistent=False)
        self.register_buffer("merged_bias", None, persistent=False)

    @classmethod
    def of(cls, module: nn.Module, scheme: Scheme, device: torch.device | None = None) -> QuantizedLinear:
        """Quantize a linear layer on `device` (None: its own); one on the meta device gives the shapes alone."""
        weight = dense_of(module)
        bias: Any = module.bias
        if weight.is_meta:
            packed = _empty(weight.numel(), scheme)
        else:
            packed = backend(scheme.backend).pack(weight.to(device or weight.device), scheme)
        return cls(weight.shape[1], weight.shape[0], bias, scheme, packed)

    @property
    def packed(self) -> Packed:
        """The tensors that stand for the weight."""
        return {name: self._buffers[name] for name in _names(self.scheme)}  # type: ignore[misc]

    def storage_bytes(self) -> int:
        """Return the bytes kept for weight and bias."""
        kept = [*self.packed.values(), *self.parameters()]
        return sum(t.numel() * t.element_size() for t in kept)

    @torch.no_grad()
    def dense(self, dtype: torch.dtype = torch.float32, after: Tensor | None = None) -> Tensor:
        """Return the weight [out, in] that the layer computes with, dequantized in fp32 and rounded to `dtype`.

        A backward pass names its incoming gradient as `after`: else a compiler sees that forward made the same weight,
        and keeps it, every layer's, until then.
        """
        if self.merged_weight is not None:
            return self.merged_weight.to(dtype)
        shape, packed = torch.Size((self.out_features, self.in_features)), self.packed
        if packed["codes"].is_meta:
            return torch.empty(shape, dtype=dtype, device="meta")
        return backend(self.scheme.backend).unpack(packed, self.scheme, shape, dtype, after)

    def frozen_parts(self) -> tuple[tuple[Tensor, ...], str]:
        """Return the tensors that stand for the weight, and their kind for `kernels.low_rank`."""
        how = f"{self.scheme.kind} {int(self.scheme.double)} {self.scheme.backend}"
        return tuple(self.packed.values()), f"{FOUR_BITS} {how} {self.out_features} {self.in_features}"

    def dense_bias(self) -> Tensor | None:
        """Return the bias that the layer computes with."""
        return self.bias if self.merged_bias is None else self.merged_bias

    def override(self, weight: Tensor, bias: Tensor | None) -> None:
        """Compute with a dense weight [out, in] and a bias of one's own (None: the layer's) until `restore`."""
        self.merged_weight = weight.detach()
        self.merged_bias = None if bias is None else bias.detach()

    def restore(self) -> None:
        """Compute with the quantized weight again, which was not touched."""
        self.merged_weight = self.merged_bias = None

    def forward(self, x: Tensor) -> Tensor:
        if autocasts(x):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = self.dense_bias()
        bias = None if bias is None else bias.to(x.dtype)
        if self.merged_weight is not None:
            return nn.functional.linear(x, self.merged_weight.to(x.dtype), bias)
        return _Product.apply(x, bias, self)  # type: ignore[no-any-return]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        # `.to(dtype)` is for what is computed with: scales stay as they are
        kept = {name: t for name, t in self.packed.items() if t.is_floating_point()}
        super()._apply(fn, recurse)
        for name, tensor in kept.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(moved.device)
        return self

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.scheme}"


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on where `x` is; other devices than these two are never trained on, and may not be asked."""
    return x.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(x.device.type)


def _unpack(parts: list[Tensor], kind: str, dtype: torch.dtype) -> Tensor:
    """Make a dense weight of `QuantizedLinear.frozen_parts`."""
    _, name, double, back_end, rows, columns = kind.split()
    scheme = Scheme(name, double == "1", back_end)
    packed = dict(zip(_names(scheme), parts, strict=True))
    return backend(back_end).unpack(packed, scheme, torch.Size((int(rows), int(columns))), dtype)


low_rank.UNPACK[FOUR_BITS] = _unpack


class _Product(torch.autograd.Function):
    """x W'ᵀ + b with the gradient of x (and of b); the dense weight is made again for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, module: QuantizedLinear) -> Tensor:
        ctx.module = module
        return nn.functional.linear(x, module.dense(x.dtype), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[override]
        wants_x, wants_bias, _ = ctx.needs_input_grad
        x = gradient @ ctx.module.dense(gradient.dtype, after=gradient) if wants_x else None
        bias = gradient.reshape(-1, gradient.shape[-1]).sum(0) if wants_bias else None
        return x, bias, None


def is_plain_linear(module: nn.Module) -> bool:
    """Whether `QuantizedLinear` can stand in for `module`: a subclass may compute something else."""
    return type(module) in (nn.Linear, Conv1D)


def dense_of(module: nn.Module) -> Tensor:
    """Return the weight [out, in] of `nn.Linear` or Conv1D, detached."""
    weight: Any = module.weight
    return weight.detach().T.contiguous() if isinstance(module, Conv1D) else weight.detach()


def body_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Return by name the linear layers that are quantized: all but the language-model head."""
    head = cast(Any, model).get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return {name: m for name, m in model.named_modules() if is_plain_linear(m) and m is not head}


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the submodule `name` of `model`, in the same mode."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module.train(model.training))


def quantize(model: nn.Module, scheme: Scheme, under: str = "", device: torch.device | None = None) -> None:
    """Replace the body's linear layers whose names start with `under`, one by one, each on `device` (None: its own)."""
    for name in [n for n in body_linears(model) if n.startswith(under)]:
        put(model, name, QuantizedLinear.of(model.get_submodule(name), scheme, device))


def dense_parameter_count(model: nn.Module) -> int:
    """Return how many parameters `model` has, each quantized weight counted as one."""
    quantized = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    return sum(p.numel() for p in model.parameters()) + sum(m.in_features * m.out_features for m in quantized)


def stored_bytes(model: nn.Module) -> int:
    """Return the bytes of all tensors of `model`, tied ones once."""
    tensors = {t.data_ptr() if not t.is_meta else id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(math.prod(t.shape) * t.element_size() for t in tensors.values())
