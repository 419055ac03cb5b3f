"""Where a training step's phases begin, heard from outside: the training loop knows nothing of it.

Objective and optimizer get instance attributes that shadow `loss_sum` and `step` for as long as somebody listens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

ABSENT = object()


@contextmanager
def phases(
    objective: Any, optimizer: Any, enter: Callable[[str], None], lost: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Call `enter` with forward, backward or step when that phase begins, as often as it does (accumulation).

    The backward pass begins when the gradient of the losses is there, on a GPU in a thread of autograd's own; `lost` is
    called a little before, in the step's own thread, once the losses are computed.
    """
    loss_sum, step = objective.loss_sum, optimizer.step

    def watched_loss_sum(batch: dict[str, Tensor]) -> Tensor:
        enter("forward")
        losses: Tensor = loss_sum(batch)
        losses.register_hook(lambda _: enter("backward"))
        lost()
        return losses

    def watched_step(losses: Tensor) -> None:
        enter("step")
        step(losses)

    with shadowed(objective, "loss_sum", watched_loss_sum), shadowed(optimizer, "step", watched_step):
        yield


@contextmanager
def shadowed(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an instance attribute for the context; afterwards the instance's own attributes are what they were."""
    before = vars(owner).get(name, ABSENT)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is ABSENT:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
