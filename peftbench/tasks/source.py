"""Where rows come from: a local folder of parquet files, or the Hugging Face hub.

A data set is looked for in this order, and the first place that has its folder serves all of its splits, so that one
task never mixes two origins:

1. ``$PEFTBENCH_DATA/<folder>/<split>.parquet`` (for example ``glue/rte/train.parquet``);
2. the hub, through ``datasets`` (needs the network, or a filled cache).

Nothing here imports torch.
"""

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from peftbench.errors import UserError, nearest

DATA_VARIABLE = "PEFTBENCH_DATA"
HUB_TIMEOUT = 10.0
"""Seconds the hub gets to answer before it counts as out of reach."""
Row = dict[str, Any]


def data_root() -> Path | None:
    """Return the folder named by ``PEFTBENCH_DATA``, or None when the variable is unset.

    Raises UserError when it names something that is not a folder.
    """
    value = os.environ.get(DATA_VARIABLE, "")
    if not value:
        return None
    root = Path(value).expanduser()
    if not root.is_dir():
        raise UserError(f"{DATA_VARIABLE}={value}: no such folder; expected one holding glue/<task>/<split>.parquet")
    return root


def file_sha256(path: Path) -> str:
    """Return the sha256 (hex) of a file, cached by path, modification time and size."""
    stat = path.stat()
    return _file_sha256(str(path), stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=512)
def _file_sha256(path: str, modified_ns: int, size: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_columns(found: Sequence[str], wanted: Sequence[str], where: str) -> None:
    """Raise UserError naming the first column of `wanted` that `where` lacks."""
    for column in wanted:
        if column not in found:
            raise UserError(
                f"{where}: no column {column!r}; expected {', '.join(wanted)}, found {', '.join(found)}"
                f"{nearest(column, found)}"
            )


def read_parquet(path: Path, columns: Sequence[str]) -> list[Row]:
    """Return the rows of a parquet file as dicts of `columns`; UserError for a missing or unreadable file or column."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a parquet file with the columns {', '.join(columns)}")
    stat = path.stat()
    return list(_read_parquet(str(path), stat.st_mtime_ns, stat.st_size, tuple(columns)))


@lru_cache(maxsize=64)
def _read_parquet(path: str, modified_ns: int, size: int, columns: tuple[str, ...]) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:  # read_table would import pandas
            require_columns(file.schema_arrow.names, columns, path)
            return file.read(columns=list(columns)).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable parquet file ({str(error).splitlines()[0]})") from error


@lru_cache(maxsize=8)
def _manifest(path: str, modified_ns: int) -> dict[str, str]:
    try:
        entries = json.loads(Path(path).read_text())
        return {entry["file"]: entry["status"] for entry in entries}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: expected a json list of objects with the keys file and status ({error!r})") from error


@dataclass(frozen=True)
class Dataset:
    """One data set: its folder below ``PEFTBENCH_DATA`` and, where it has one, its place on the hub.

    `renames` maps hub column names to the names used here; `hub_splits` maps split names used here to the hub's.
    """

    folder: str
    repo: str | None = None
    config: str | None = None
    revision: str | None = None
    renames: tuple[tuple[str, str], ...] = ()
    hub_splits: tuple[tuple[str, str], ...] = ()

    def local_folder(self) -> Path | None:
        """Return the local folder that serves this data set, or None when the hub has to."""
        root = data_root()
        folder = root / self.folder if root else None
        return folder if folder is not None and folder.is_dir() else None

    @property
    def origin(self) -> str:
        """``local:<folder>`` or ``hub:<repository>``."""
        return f"local:{self.folder}" if self.local_folder() else f"hub:{self._repo()}"

    def has(self, split: str) -> bool:
        """Tell whether the split exists at the place that serves this data set."""
        folder = self.local_folder()
        if folder:
            return (folder / f"{split}.parquet").is_file()
        return dict(self.hub_splits).get(split, split) in _hub_builder(*self._hub_key()).info.splits

    def rows(self, split: str, columns: Sequence[str]) -> list[Row]:
        """Return the rows of `split` as dicts of `columns`.

        Raises UserError naming the file or repository and the missing split or column.
        """
        folder = self.local_folder()
        if folder:
            path = folder / f"{split}.parquet"
            if not path.is_file():
                present = ", ".join(sorted(file.stem for file in folder.glob("*.parquet"))) or "none"
                raise UserError(f"{path}: no such file; the splits in that folder are: {present}")
            return read_parquet(path, columns)
        return list(_hub_rows(*self._hub_key(), dict(self.hub_splits).get(split, split), self.renames, tuple(columns)))

    def fingerprint(self, splits: Sequence[str]) -> str:
        """Return what identifies the data of `splits`: file hashes, or the hub repository at its commit."""
        folder = self.local_folder()
        if folder:
            found = [(split, folder / f"{split}.parquet") for split in splits]
            return " ".join(f"{split}={file_sha256(path)}" for split, path in found if path.is_file())
        return f"{self._repo()}/{self.config or 'default'}@{_hub_builder(*self._hub_key()).hash}"

    def subset(self, splits: Sequence[str]) -> bool | None:
        """Tell whether the local ``manifest.json`` marks one of `splits` as a subset; None when nothing says so."""
        root = data_root()
        manifest = root / "manifest.json" if root else None
        if self.local_folder() is None or manifest is None or not manifest.is_file():
            return None
        status = _manifest(str(manifest), manifest.stat().st_mtime_ns)
        known = [status[name] for name in (f"{self.folder}/{split}.parquet" for split in splits) if name in status]
        return any(value != "complete" for value in known) if known else None

    def _repo(self) -> str:
        if self.repo is None:
            root = os.environ.get(DATA_VARIABLE) or "unset"
            raise UserError(
                f"{self.folder}: no local data ({DATA_VARIABLE} is {root}); expected "
                f"${DATA_VARIABLE}/{self.folder}/<split>.parquet (this set has no hub source here)"
            )
        return self.repo

    def _hub_key(self) -> tuple[str, str | None, str | None, str]:
        return self._repo(), self.config, self.revision, self.folder


def _hub_error(repo: str, folder: str, reason: str) -> UserError:
    root = os.environ.get(DATA_VARIABLE) or "unset"
    return UserError(
        f"{repo}: cannot be had from the hub ({reason}), and {DATA_VARIABLE} ({root}) has no folder {folder}; "
        f"provide ${DATA_VARIABLE}/{folder}/<split>.parquet, or a network that reaches the hub"
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _transport_errors() -> tuple[type[Exception], ...]:
    # Which client the hub's library speaks through, and has imported, depends on its version.
    clients = (sys.modules.get(name) for name in ("httpx2", "httpx"))
    return tuple(client.HTTPError for client in clients if client is not None)


@lru_cache(maxsize=32)
def _hub_revision(repo: str, revision: str | None, folder: str) -> str | None:
    """Return the commit that the hub has now, or None when it is out of reach; UserError when it refuses."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    if constants.is_offline_mode():
        return None
    unreachable: tuple[type[Exception], ...] = (OSError, OfflineModeIsEnabled, *_transport_errors())
    try:
        return HfApi().dataset_info(repo, revision=revision, timeout=HUB_TIMEOUT).sha
    except (HfHubHTTPError, HFValidationError) as error:
        raise _hub_error(repo, folder, _first_line(error)) from error
    except unreachable:
        return None


@contextlib.contextmanager
def _cache_only() -> Iterator[None]:
    """Keep `datasets` from the network, which it would otherwise ask for half a minute before it looks at its cache."""
    import datasets.config
    import huggingface_hub.constants

    places: list[Any] = [datasets.config, huggingface_hub.constants]
    before = [place.HF_HUB_OFFLINE for place in places]
    try:
        for place in places:
            place.HF_HUB_OFFLINE = True
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value


@lru_cache(maxsize=32)
def _hub_builder(repo: str, config: str | None, revision: str | None, folder: str) -> Any:
    """Return the data set's builder at a fixed commit, its files fetched; its `hash` is that commit."""
    import datasets

    commit = _hub_revision(repo, revision, folder)
    try:
        with _cache_only() if commit is None else contextlib.nullcontext():
            builder = datasets.load_dataset_builder(repo, config, revision=commit or revision)
            builder.download_and_prepare()
            return builder
    # No network and no cache are OSErrors, an unknown configuration is a ValueError.
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        unreachable = "out of reach, and not in the cache" if commit is None else _first_line(error)
        raise _hub_error(repo, folder, unreachable) from error


@lru_cache(maxsize=32)
def _hub_rows(
    repo: str,
    config: str | None,
    revision: str | None,
    folder: str,
    split: str,
    renames: tuple[tuple[str, str], ...],
    columns: tuple[str, ...],
) -> list[Row]:
    builder = _hub_builder(repo, config, revision, folder)
    if split not in builder.info.splits:
        raise UserError(f"hub {repo}: no split {split!r}; its splits are: {', '.join(builder.info.splits)}")
    table = builder.as_dataset(split=split)
    for theirs, ours in renames:
        if theirs in table.column_names and ours not in table.column_names:
            table = table.rename_column(theirs, ours)
    require_columns(table.column_names, columns, f"hub {repo} ({split})")
    return table.select_columns(list(columns)).to_list()
