"""Shared fixtures: few threads, no network, and a hand-made spec and record."""

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

from peftbench.record import RunRecord, RunSpec


def _before(package: str, *release: int) -> bool:
    return tuple(int(part) for part in version(package).split(".")[:2]) < release


def triton_interprets_loops() -> bool:
    """Return whether Triton is there and its interpreter runs loops; kernels on a GPU are not concerned.

    Before 3.7 it takes `int` of arrays that hold a loop's bound, which NumPy 2.4 refuses.
    """
    try:
        return not _before("triton", 3, 7) or _before("numpy", 2, 4)
    except PackageNotFoundError:
        return False


def pass_in_interpreter(file: str) -> None:
    """Run a file's tests on the CPU with Triton's kernels in its interpreter, in a process of their own."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]


def make_spec(**changes: Any) -> RunSpec:
    """Return a spec without any file behind it; `changes` replace fields, dotted keys ("train.steps") parts of them."""
    fields: dict[str, Any] = {
        "model": {"name": "tiny", "weights": "random"},
        "method": {"name": "lora", "_target_": "peftbench.methods.lora.Lora", "rank": 8, "alpha": 16.0},
        "task": {"name": "toy", "_target_": "peftbench.tasks.tiny.Tiny", "max_length": 24},
        "train": {"steps": None, "epochs": 3.0, "batch_size": 32, "eval_batch_size": 128, "learning_rate": 1e-3},
        "profile": {"enabled": True, "steps": 20},
        "seed": 0,
        "protocol": "held_out",
        "device": "cpu",
        "identity": {
            "weights": "w",
            "data": "d",
            "engine": 1,
            "method": 1,
            "device_kind": "cpu",
            "task": {"num_labels": 2, "formulation": "head"},
        },
    }
    for key, value in changes.items():
        group, _, inner = key.partition(".")
        if inner:
            fields[group] = {**fields[group], inner: value}
        else:
            fields[group] = value
    return RunSpec(**fields)


def make_record(spec: RunSpec, status: str = "completed", **changes: Any) -> RunRecord:
    """Return a record of `spec`."""
    quality = {"primary_metric": "accuracy", "validation": {"accuracy": 0.7}, "test": {"accuracy": 0.75}}
    return RunRecord(spec.run_id, status, spec.to_dict(), quality=quality if status == "completed" else None, **changes)


@pytest.fixture
def spec() -> RunSpec:
    """A hand-made spec."""
    return make_spec()
