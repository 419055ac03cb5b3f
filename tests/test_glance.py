"""Losses are looked at without waiting for the device that makes them."""

import pytest
import torch

from peftbench.engine.glance import Glance


class Queue:
    """A device that copies when told to: until then the host's memory holds nothing of the losses."""

    def __init__(self) -> None:
        self.done = False
        self.recorded = 0

    def record(self) -> None:
        self.recorded += 1
        self.done = False

    def query(self) -> bool:
        return self.done


def test_on_a_cpu_losses_are_there_at_once():
    assert Glance()(torch.tensor([0.5, 0.25])) == [0.5, 0.25]


def test_losses_come_late_once_each_and_none_is_waited_for():
    queue = Queue()
    glance = Glance(torch.empty_like, lambda: queue)
    assert glance.later(torch.tensor([1.0, 2.0])) is None
    assert glance.later(torch.tensor([3.0, 4.0])) is None, "the copy is not done: nothing to show"
    assert queue.recorded == 1, "a copy under way is not overtaken"
    queue.done = True
    assert glance.later(torch.tensor([5.0, 6.0])) == [1.0, 2.0]
    assert queue.recorded == 2
    queue.done = True
    assert glance.later(torch.tensor([7.0, 8.0, 9.0])) == [5.0, 6.0]
    queue.done = True
    assert glance.later(torch.tensor([0.0])) == [7.0, 8.0, 9.0], "the number of runs may change in between"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_look_on_a_gpu_does_not_wait():
    glance = Glance()
    losses = torch.tensor([0.5, 0.25], device="cuda")
    glance(losses)  # pinned memory is made on the first look
    torch.cuda.synchronize()
    assert glance(losses) == [0.5, 0.25]
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # about a second of device time
    end = torch.cuda.Event()
    end.record()
    assert glance(losses + 1) == [0.5, 0.25]
    assert glance(losses + 2) is None
    assert not end.query(), "a look waited for the device"
    torch.cuda.synchronize()
    assert glance(losses) == [1.5, 1.25]
