"""A training step without data: fake tensors that have shapes alone, and the kernels that a GPU would choose for them.

Every tensor is a fake one on the CPU, whatever the machine has. Standing for a GPU's, they go through what runs there
and allocates otherwise than on a CPU:

- attention (`scaled_dot_product_attention`): flash attention for halves without a mask; all scores for grouped heads
  that it cannot take; memory-efficient attention for everything else;
- dropout: one operation that keeps a mask of bytes;
- autocast: CUDA's list of operations that compute in fp32, normalisations and softmax among them.

What kernels take for themselves while they run is added by `scratch_bytes`. The choices are those of PyTorch 2.11 to
2.13 (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp and attention.cu, aten/src/ATen/autocast_mode.h).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from peftbench.kernels import backend
from peftbench.profiling.phases import shadowed

KINDS = ("cuda", "cpu")
FLASH_HEAD = 256
"""Widest head of flash attention."""
HALVES = (torch.bfloat16, torch.float16)
ALIGNMENT = 16
"""Columns of which memory-efficient attention wants a multiple in its mask."""

aten = torch.ops.aten


@contextmanager
def shapes_alone(kind: str) -> Iterator[None]:
    """Make every new tensor one without data that stands for a tensor of a `kind` device ("cuda" or "cpu").

    An operation that PyTorch can only do with data raises, instead of being done on zeros of the same size. For the
    context, functions of PyTorch's own are replaced: nothing else may compute meanwhile.
    """
    assert kind in KINDS, kind
    with ExitStack() as stack:
        stack.enter_context(backend.traced_for(kind))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True, allow_fallback_kernels=False))
        for owner, name, other in (*WITHOUT_VALUES, *(CUDA if kind == "cuda" else ())):
            stack.enter_context(shadowed(owner, name, _with_original(other, getattr(owner, name))))
        yield


def _with_original(other: Callable[..., Any], original: Any) -> Callable[..., Any]:
    # a function, since a class makes methods of no other callables
    def replaced(*args: Any, **kwargs: Any) -> Any:
        return other(original, *args, **kwargs)

    return replaced


def fill(model: nn.Module, dtype: torch.dtype) -> None:
    """Give a model of the meta device fake tensors, its floating-point parameters in `dtype`; tied ones stay tied."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    kept = dtype if parameter.is_floating_point() else parameter.dtype
                    empty = torch.empty(parameter.shape, dtype=kept)
                    # the key's object is kept alive beside, or another could get its id
                    made[id(parameter)] = parameter, nn.Parameter(empty, parameter.requires_grad)
                module._parameters[name] = made[id(parameter)][1]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                if id(buffer) not in made:
                    made[id(buffer)] = buffer, torch.empty(buffer.shape, dtype=buffer.dtype)
                module._buffers[name] = made[id(buffer)][1]


def _attention(
    func: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (t.to(torch.get_autocast_dtype("cpu")) for t in (query, key, value))
    if attn_mask is None and query.dtype in HALVES and max(query.shape[-1], value.shape[-1]) <= FLASH_HEAD:
        width, pad = query.shape[-1], -query.shape[-1] % 8
        if pad:
            scale = width**-0.5 if scale is None else scale
            query, key, value = (nn.functional.pad(t, (0, pad)) for t in (query, key, value))
        out = aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
        return cast(Tensor, out[..., :width] if pad else out)
    if enable_gqa and query.shape[1] != key.shape[1]:
        out = aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=True
        )
        return cast(Tensor, out[0])
    mask = None if attn_mask is None else _additive(attn_mask, query, key)
    trains = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    out = aten._scaled_dot_product_efficient_attention(
        query, key, value, mask, trains, dropout_p, is_causal, scale=scale
    )
    return cast(Tensor, out[0])


def _additive(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Return a mask as memory-efficient attention takes it: added to the scores, aligned, expanded without a copy."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), -torch.inf)
    mask = mask.to(query.dtype)
    pad = -mask.shape[-1] % ALIGNMENT
    if pad:
        mask = nn.functional.pad(mask, (0, pad))[..., : key.shape[2]]
    return mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])


def _dropout(func: Any, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if not training or p == 0.0 or p == 1.0 or inplace:
        return cast(Tensor, func(input, p, training, inplace))
    return torch.native_dropout(input, p, True)[0]


def _in_fp32(func: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_autocast_enabled("cpu"):
        return func(*args, **kwargs)
    with torch.autocast("cpu", enabled=False):
        return func(*map(_wide, args), **{k: _wide(v) for k, v in kwargs.items()})


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in HALVES else value


def _same(func: Any, tensor: Any, *args: Any, **kwargs: Any) -> Any:
    return tensor


def _nothing(func: Any, *args: Any, **kwargs: Any) -> None:
    pass


F = nn.functional
IN_FP32 = ("layer_norm", "softmax", "log_softmax", "cross_entropy", "nll_loss", "mse_loss")

Replaced = tuple[Any, str, Callable[..., Any]]
"""Whose attribute, its name, and what stands in for it: a function that gets the original first."""

WITHOUT_VALUES: tuple[Replaced, ...] = (
    # there is one device, and fake parameters cannot be exchanged
    (nn.Module, "_apply", lambda func, *args, **kwargs: args[0]),
    # draws until it is content
    (nn.init, "trunc_normal_", _same),
    # changes its arguments in place and allocates nothing; PyTorch has no version without data
    (torch, "_fused_adamw_", _nothing),
)

CUDA: tuple[Replaced, ...] = (
    (F, "scaled_dot_product_attention", _attention),
    (F, "dropout", _dropout),
    *((F, name, _in_fp32) for name in IN_FP32),
)


def scratch_bytes(operation: Any, args: Sequence[Any]) -> int:
    """Return the bytes that CUDA's version of an operation allocates and frees while it runs.

    The backward pass of fused attention sums the queries' gradient in fp32 unless that is what it returns, and flash
    attention gives every query head a gradient of keys and values before it sums over heads that share them.
    """
    packet = getattr(operation, "overloadpacket", None)
    if packet is aten._scaled_dot_product_flash_attention_backward:
        query, key = args[1], args[2]
        rows, heads, tokens, width = query.shape
        rounded, wide = -(-tokens // 128) * 128, -(-width // 32) * 32
        shared = 0 if key.shape[1] == heads else 2 * rows * heads * key.shape[2] * width * query.element_size()
        return 4 * rows * heads * rounded * (wide + 1) + shared
    if packet is aten._scaled_dot_product_efficient_attention_backward:
        query = args[1]
        rows, heads, tokens, width = query.shape
        summed = 4 * rows * heads * (-(-tokens // 64) * 64) * width if query.dtype in HALVES else 0
        return int(summed + 4 * rows * heads * tokens)
    return 0
