"""Kernels compiled ahead: what a rehearsal asks for, and that it leaves no trace."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from peftbench import resolve, training
from peftbench.engine import ahead
from peftbench.engine.ahead import compiling_on, of_each_class, passes
from peftbench.engine.batches import PackedBatch
from peftbench.kernels.backend import interpreted
from peftbench.record import RunSpec
from tests.test_run import run, tiny

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Pool:
    """Takes work and leaves it undone."""

    def __init__(self) -> None:
        self.taken: list[Any] = []

    def submit(self, work: Any, *arguments: Any) -> Future[None]:
        self.taken.append(arguments)
        done: Future[None] = Future()
        done.set_result(None)
        return done


@pytest.mark.skipif(interpreted(), reason="the interpreter compiles nothing")
def test_a_kernel_is_asked_for_once_for_all_that_it_serves() -> None:
    triton = pytest.importorskip("triton")
    from peftbench.kernels.dropout_triton import dropout
    from peftbench.kernels.residual_norm_triton import residual_norm_forward

    x, seeds = torch.ones(64), torch.ones(1, dtype=torch.int64)
    ran = triton.runtime.jit.JITFunction.run

    def drop(x: torch.Tensor, site: int = 3, count: int = 64, block: int = 64) -> None:
        dropout[(1, 1)](x, seeds, x, seeds, seeds, site, count, 5, 1.5, by_run=False, block=block, num_warps=4)

    pool: Any = Pool()
    with compiling_on(pool, torch.device("cpu")):
        drop(x)
        drop(x, site=2**31 - 1)  # a number that no kernel is made for
        drop(x, count=128)
        assert len(pool.taken) == 1
        drop(x, count=100)  # not divisible by 16
        drop(x, count=1)  # a constant to Triton
        drop(x, block=128)
        drop(x.half())
        drop(torch.ones(65)[1:])  # begins at an odd address
        assert len(pool.taken) == 6
        residual_norm_forward[(1,)](x, x, x, x, seeds, x, x, 1, 1, 3, 5, 1.5, 1e-5, dropped=True, width=64)
    assert len(pool.taken) == 7
    assert triton.runtime.jit.JITFunction.run is ran
    with pytest.raises(ValueError, match="64"), compiling_on(pool, torch.device("cpu")):
        raise ValueError("64")
    assert triton.runtime.jit.JITFunction.run is ran


def test_the_largest_batch_of_each_power_of_two_is_rehearsed() -> None:
    sizes = [(4, 8), (4, 24), (2, 32), (4, 32), (4, 40), (3, 64), (4, 128)]
    batches = [PackedBatch(np.zeros((2, rows), dtype=np.int64), length, 0) for rows, length in sizes]
    assert [(b.items.shape[1], b.length) for b in of_each_class(batches)] == [(4, 8), (4, 32), (3, 64), (4, 128)]


PACKS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "seed": [0, 1], "method__dropout": 0.1},
    "adalora": {"method": "adalora", "seed": [0, 1]},
    "houlsby": {"method": "houlsby", "seed": [0, 1]},
    "prefix": {"method": "prefix", "seed": [0, 1]},
    "full": {"method": "full"},
    "relora": {"method": "relora"},
    "text": {"method": "lora", "seed": [0, 1], "model": "tiny-gpt2", "task__formulation": "text"},
}


@pytest.mark.parametrize("name", PACKS)
def test_a_rehearsal_changes_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU a rehearsal is real passes, of which nothing may remain either."""
    pack: list[RunSpec] = tiny(**{"train__steps": 4, "train__batch_size": 4, **PACKS[name]})
    plain = run(pack, tmp_path / "plain")
    rehearsed = []

    def always(*parts: Any, **how: Any) -> None:
        before = torch.get_rng_state()
        passes(*parts, **how)
        rehearsed.append(all(p.grad is None for p in parts[0].model.parameters()))
        assert torch.equal(before, torch.get_rng_state())

    monkeypatch.setattr(training, "rehearse", always)
    after = run(pack, tmp_path / "rehearsed")
    assert rehearsed == [True]
    for one, other in zip(plain, after, strict=True):
        assert one.trace is not None
        assert other.trace is not None
        assert one.trace["loss"] == other.trace["loss"]
        assert one.quality == other.quality


@on_gpu
def test_steps_compile_nothing_after_a_rehearsal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    compiled: list[str] = []
    held = [False]

    def noted(*given: Any, key: str, repr: str, **more: Any) -> bool:
        compiled.append(("ahead " if held[0] else "late ") + repr)
        return False

    real = ahead.rehearse

    def rehearse(*parts: Any, **how: Any) -> None:
        held[0] = True
        monkeypatch.setattr(ahead, "_rehearsed", False)
        real(*parts, **how)
        held[0] = False

    monkeypatch.setattr(training, "rehearse", rehearse)
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", noted)
    for kernel in _kernels():
        kernel.device_caches.clear()
    grid: dict[str, Any] = {"model": "tiny-bert", "task": "tiny", "profile": "skip", "method": "lora"}
    grid |= {
        "train.steps": 12,
        "model.architecture.num_attention_heads": 2,
        "train.precision": "bf16",
        "train.dropout": 0.1,
    }
    asked = {key: [value] for key, value in grid.items()} | {"seed": [0, 1]}
    run(resolve.plan(resolve.demand(asked, None), "cuda").specs, tmp_path)
    assert any("attention" in name for name in compiled)
    assert [name for name in compiled if name.startswith("late")] == []


def _kernels() -> list[Any]:
    from peftbench.kernels import (
        adamw_triton,
        attention_triton,
        dropout_triton,
        long_attention_triton,
        residual_norm_triton,
    )

    modules = (adamw_triton, attention_triton, dropout_triton, long_attention_triton, residual_norm_triton)
    return [one for module in modules for one in vars(module).values() if hasattr(one, "device_caches")]
