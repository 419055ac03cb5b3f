"""Floating-point operations of a training step: counted by PyTorch, and by the usual closed form."""

from __future__ import annotations

from collections.abc import Callable

from torch.utils.flop_counter import FlopCounterMode


def counted_flops(step: Callable[[], object]) -> int:
    """Return the FLOPs of one step's matrix products and attention, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        step()
    return int(counter.get_total_flops())


def analytic_flops_per_token(frozen: int, trained: int, *, backward_through_base: bool) -> int:
    """Return 4N per frozen and 6N per trained matrix parameter (2N forward, 2N for inputs' gradients, 2N for weights').

    Attention's own products are left out, as is usual (Kaplan et al. 2020, arXiv:2001.08361, section 2.1). Without a
    backward pass through the base (head only) a frozen parameter costs its forward 2N alone.

    Args:
        frozen: parameters of frozen matrices that every token passes, embeddings left out.
        trained: the same for trained ones.
    """
    return (4 if backward_through_base else 2) * frozen + 6 * trained
