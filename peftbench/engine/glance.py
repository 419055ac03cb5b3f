"""A look at losses on a device that nobody waits for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class Event(Protocol):
    """What tells whether the device has come to a point of its queue; `torch.cuda.Event` is one."""

    def record(self) -> None: ...

    def query(self) -> bool: ...


class Glance:
    """Called with the newest losses [R], returns the newest that are on the host already, once each, else None.

    On a CPU those are the ones given. On a GPU the losses are queued to be copied once the step that makes them is
    done, and handed out by a later call: a look costs some microseconds, never a wait.

    Args:
        host: returns memory for a copy of losses; pinned, or the copy would wait.
        event: makes events.
    """

    def __init__(
        self,
        host: Callable[[Tensor], Tensor] = lambda losses: torch.empty_like(losses, device="cpu", pin_memory=True),
        event: Callable[[], Event] = torch.cuda.Event,
    ) -> None:
        self._make_host, self._make_event = host, event
        self._host: Tensor | None = None
        self._copied: Event | None = None

    def __call__(self, losses: Tensor) -> list[float] | None:
        if losses.device.type == "cpu":
            return losses.tolist()
        return self.later(losses)

    def later(self, losses: Tensor) -> list[float] | None:
        """Return what an earlier call queued, if its copy is done, and then queue `losses`."""
        seen: list[float] | None = None
        if self._copied is not None:
            if not self._copied.query():
                return None
            assert self._host is not None
            seen, self._copied = self._host.tolist(), None
        if self._host is None or self._host.shape != losses.shape:
            self._host = self._make_host(losses)
        self._host.copy_(losses.detach(), non_blocking=True)
        self._copied = self._make_event()
        self._copied.record()
        return seen
