"""What a run ran on: code, versions, machine. Collected once per process; nothing here changes a run's id."""

import contextlib
import functools
import importlib.metadata
import os
import platform
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from peftbench.errors import UserError

PACKAGES = (
    "peftbench",
    "torch",
    "transformers",
    "datasets",
    "evaluate",
    "numpy",
    "hydra-core",
    "bitsandbytes",
    "triton",
)


def _git(*arguments: str) -> str | None:
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu_model() -> str | None:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "Model")):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or None


def version(package: str) -> str | None:
    """Return a package's installed version, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def device_kind(device: str) -> str:
    """Return "cpu", or the GPU's name for "cuda"."""
    if device == "cpu":
        return "cpu"
    import torch

    return torch.cuda.get_device_name()


def pick_device(device: str) -> str:
    """Resolve "auto" to "cuda" where there is a GPU, else "cpu"; raises UserError for "cuda" without one."""
    import torch

    present = torch.cuda.is_available()
    if device == "cuda" and not present:
        built = "was built without CUDA" if torch.version.cuda is None else f"CUDA {torch.version.cuda} finds none"
        raise UserError(f"device=cuda: no GPU is in reach (torch {torch.__version__} {built}); use device=cpu or auto")
    return ("cuda" if present else "cpu") if device == "auto" else device


def begin_gpu() -> threading.Thread:
    """Let a thread of its own make this process's first contact with a GPU, if there is one, while others import.

    Contact takes a fraction of a second in the driver, as does loading cuBLAS at the first matrix products, and reading
    Triton's own files through for the key that its kernels are kept under. Whoever needs one of them before it is done
    waits, and hears of what is wrong with it. Returns the thread.
    """

    def first_contact() -> None:
        with contextlib.suppress(Exception):
            import torch

            if not torch.cuda.is_available():
                return
            torch.cuda.synchronize()
            for dtype in (torch.bfloat16, torch.float32):
                ones = torch.ones(2, 16, 16, device="cuda", dtype=dtype)  # random numbers would be missing to the runs
                torch.mm(ones[0], ones[1])
                torch.bmm(ones, ones)
            torch.cuda.synchronize()
            # Last: importing Triton imports nothing of torch, so whoever waits for the one holds nothing of the other
            from triton.runtime.cache import triton_key

            triton_key()

    thread = threading.Thread(target=first_contact, name="first contact with the GPU", daemon=True)
    thread.start()
    return thread


def memory(device: str) -> tuple[int, int] | None:
    """Return the bytes of a device that are free, and all it has; of a CPU what is available, twice. None: unknown."""
    if device == "cuda":
        import torch

        return torch.cuda.mem_get_info()
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    available = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
    return None if available is None else (available, available)


COMMIT = "PEFTBENCH_COMMIT"
"""Environment variable that names the commit where the tree is a copy without git's folder."""
COMMAND = "PEFTBENCH_COMMAND"
"""Environment variable that carries the command line to the processes of a launcher."""


@functools.cache
def describe(device: str = "cpu") -> dict[str, Any]:
    """Return git commit and state, versions, machine and, for "cuda", the GPU with its memory and driver."""
    commit = _git("rev-parse", "HEAD")
    found: dict[str, Any] = {
        "command": os.environ.get(COMMAND),
        "git_commit": commit or os.environ.get(COMMIT),
        "git_dirty": bool(_git("status", "--porcelain", "--untracked-files=no")) if commit else None,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "versions": {name: version(name) for name in PACKAGES if version(name)},
        "device_kind": device_kind(device),
        "threads": None,
        "gpu": None,
    }
    if "torch" in sys.modules or device == "cuda":
        import torch

        found["threads"] = torch.get_num_threads()
        if device == "cuda":
            properties = torch.cuda.get_device_properties(0)
            found["gpu"] = {
                "name": properties.name,
                "memory_bytes": properties.total_memory,
                "capability": f"{properties.major}.{properties.minor}",
                "cuda": torch.version.cuda,
                "driver": driver_version(),
                "count": torch.cuda.device_count(),
            }
    return found


@functools.cache
def driver_version() -> str | None:
    """Return the NVIDIA driver's version, or None where nvidia-smi does not answer."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().partition("\n")[0] or None
