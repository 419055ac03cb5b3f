"""Which implementation of an operation runs: its Triton kernel where there is one to run, else plain PyTorch.

Triton runs on CUDA tensors, and on CPU tensors under its interpreter (`TRITON_INTERPRET=1`, for tests). A CUDA machine
without Triton computes the same in plain PyTorch and says so once.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import ParamSpec, TypeVar, cast

from torch import Tensor
from torch._subclasses import FakeTensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

logger = logging.getLogger("peftbench")

P = ParamSpec("P")
T = TypeVar("T")

_traced_for: ContextVar[str] = ContextVar("traced_for", default="cuda")


@functools.cache
def _installed() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


@functools.cache
def _say_missing() -> None:
    logger.warning("Triton is not installed: kernels run in plain PyTorch, slower (pip install 'peftbench[gpu]')")


def interpreted() -> bool:
    """Return whether Triton kernels run in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def use_triton(tensor: Tensor) -> bool:
    """Return whether a Triton kernel can run on `tensor`; a CUDA tensor without Triton is worth one warning."""
    if shapes_only(tensor):
        return False
    if tensor.device.type != "cuda":
        return interpreted() and _installed() and tensor.device.type == "cpu"
    if not _installed():
        _say_missing()
        return False
    return True


def shapes_only(tensor: Tensor) -> bool:
    """Return whether `tensor` has a shape but no data: on the meta device, or fake."""
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def kernel_shapes(tensor: Tensor) -> bool:
    """Return whether `tensor` has no data and stands for one that a Triton kernel would take.

    Its caller then allocates what the kernel's caller allocates, and no more.
    """
    return shapes_only(tensor) and _traced_for.get() == "cuda"


@contextmanager
def traced_for(kind: str) -> Iterator[None]:
    """Let tensors without data stand for those of a "cuda" device with Triton (the default) or of the "cpu"."""
    token = _traced_for.set(kind)
    try:
        yield
    finally:
        _traced_for.reset(token)


def constant(make: Callable[P, T]) -> Callable[P, T]:
    """Keep what a function of plain values returns; its tensors are real ones even where only shapes are traced.

    A table first asked for within such a trace would otherwise have no data, then and in every later call.
    """

    @functools.cache
    @functools.wraps(make)
    def made(*args: P.args, **kwargs: P.kwargs) -> T:
        with unset_fake_temporarily():
            return make(*args, **kwargs)

    return cast("Callable[P, T]", made)
