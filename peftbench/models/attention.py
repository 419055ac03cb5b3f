"""The attention every mapped model uses here: PyTorch's SDPA, masks built without asking the device, room for prefixes.

`transformers` decides with a host synchronisation per forward pass whether a mask may be dropped; the masks below
depend on shapes alone. An adapter that brings extra keys and values hangs a function on the attention module
(`PREFIX`), and the registered attention puts them in front of the module's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    AttentionMaskInterface,
    bidirectional_mask_function,
    causal_mask_function,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from peftbench.errors import UserError
from peftbench.kernels.attention import fits, short_attention
from peftbench.kernels.noise import active

ATTENTION = "peftbench_sdpa"
"""Name of attention and mask functions in `transformers`' registries."""
PREFIX = "_peftbench_prefix"
"""Attribute of an attention module: (key, value) → (longer key, longer value, how many positions came in front)."""

SHORT = 128
"""Keys up to which masked attention on a GPU is left to a kernel that needs no plan.

cuDNN's, which PyTorch takes first on newer GPUs, plans every new shape for about a second.
"""
UNPLANNED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH]

_right_padded: ContextVar[bool] = ContextVar("right_padded", default=False)


@contextmanager
def right_padded() -> Iterator[None]:
    """Promise padding on the right: a causal model then needs no mask but causality, and SDPA its fastest kernel."""
    token = _right_padded.set(True)
    try:
        yield
    finally:
        _right_padded.reset(token)


def prefixable_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """SDPA on query [rows, H, T, D_head], key and value [rows, H_kv, T', D_head]; every query sees the whole prefix."""
    prefixed = module.__dict__.get(PREFIX)
    if prefixed is None:
        return _attend(module, query, key, value, attention_mask, **kwargs)
    queries, own = query.shape[2], key.shape[2]
    key, value, length = prefixed(key, value)
    if length:
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        if attention_mask is None and causal and queries > 1:
            ones = torch.ones((1, 1, queries, own), dtype=torch.bool, device=query.device)
            attention_mask = ones.tril(own - queries)
        if attention_mask is not None:
            visible: Any = True if attention_mask.dtype == torch.bool else 0.0
            front = attention_mask.new_full((*attention_mask.shape[:-1], length), visible)
            attention_mask = torch.cat([front, attention_mask], dim=-1)
        bias = kwargs.get("position_bias")
        if bias is not None:
            kwargs["position_bias"] = torch.cat([bias.new_zeros((*bias.shape[:-1], length)), bias], dim=-1)
    return _attend(module, query, key, value, attention_mask, **kwargs)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """SDPA, or our own kernel where every query sees the same few keys."""
    if _plain(module, attention_mask, kwargs):
        dropout = kwargs.get("dropout", 0.0)
        # without gradients it gains too little for a kernel to be compiled
        if torch.is_grad_enabled() and fits(query, key, value, attention_mask, dropout):
            scale = kwargs.get("scaling")
            scale = query.shape[3] ** -0.5 if scale is None else scale
            seeds, site = _stream(query) if dropout else (None, 0)
            out = short_attention(query, key, value, attention_mask, scale, dropout, seeds, site)
            return out.transpose(1, 2), None
    inner = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with _kernels(query, key, attention_mask):
        return cast("tuple[Tensor, Tensor | None]", inner(module, query, key, value, attention_mask, **kwargs))


def _stream(query: Tensor) -> tuple[Tensor | None, int]:
    """Return the runs' seeds and the site, for this call's dropout."""
    noise = active()
    if noise is None or not noise.divides(query):
        return None, 0
    return noise.seeds, noise.site()


def _plain(module: nn.Module, mask: Tensor | None, kwargs: dict[str, Any]) -> bool:
    """Return whether this is neither causal nor asks for anything beyond scores, a bias by key and dropout."""
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if (mask is None and causal) or torch.compiler.is_compiling():
        return False
    return all(kwargs.get(name) is None for name in ("position_bias", "cache", "softcap", "s_aux"))


def _kernels(query: Tensor, key: Tensor, mask: Tensor | None) -> AbstractContextManager[None]:
    """Return the context in which SDPA chooses its kernel."""
    if mask is None or not query.is_cuda or key.shape[2] > SHORT or torch.compiler.is_compiling():
        return nullcontext()
    return sdpa_kernel(UNPLANNED, set_priority=True)


def shape_only_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """Build SDPA's mask from the padding mask without reading its values on the host.

    Bidirectional: additive [rows, 1, 1, T'] (None without padding mask). Causal under `right_padded`: None, left to
    SDPA. Everything else: the boolean mask [rows, 1, T, T'] of `transformers`, never skipped.
    """
    kind = kwargs.get("mask_function")
    padding = kwargs.get("attention_mask")
    whole = kwargs.get("kv_length") == kwargs.get("q_length") and kwargs.get("local_size") is None
    if kind is bidirectional_mask_function and (padding is None or padding.shape[-1] == kwargs["kv_length"]):
        if padding is None:
            return None
        dtype = kwargs.get("dtype", torch.float32)
        bias = torch.zeros(padding.shape, dtype=dtype, device=padding.device)
        return bias.masked_fill_(padding.logical_not(), torch.finfo(dtype).min)[:, None, None, :]
    if kind is causal_mask_function and whole and (padding is None or _right_padded.get()):
        return None
    skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return cast("Tensor | None", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](*args, **{**kwargs, **skips}))


def use(config: Any) -> str:
    """Make the model of `config` attend through `prefixable_attention`; returns the implementation used before.

    Raises:
        UserError: the model's attention is neither SDPA nor eager, so its results would change.
    """
    before: str = config._attn_implementation
    if before not in ("sdpa", "eager", ATTENTION):
        raise UserError(f"adapters on attention need attention 'sdpa' or 'eager', not {before!r}")
    config._attn_implementation = ATTENTION
    return before


AttentionInterface.register(ATTENTION, prefixable_attention)
AttentionMaskInterface.register(ATTENTION, shape_only_mask)
