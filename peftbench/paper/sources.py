"""What the paper is made from: `records.yaml` names each source, its records' place and the command that makes them."""

import gzip
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from peftbench.errors import UserError, nearest

Record = Mapping[str, Any]
FILE = "records.yaml"
KINDS = (
    *("runs", "search", "claims", "steps", "small", "loss", "dequantize", "operations", "memory"),
    *("packing-wall", "packing-curve", "packing-pairs"),
)


@dataclass(frozen=True)
class Source:
    """One set of records.

    Attributes:
        name: the first part of its values' keys.
        kind: what its records are of, one of `KINDS`.
        path: a folder (of runs; for `claims` of files of lines), or a file of lines, below the results' folder.
        command: what makes them.
        there: where they lie here; None where they do not.
    """

    name: str
    kind: str
    path: str
    command: str
    there: Path | None

    @property
    def shown(self) -> str:
        """Return where records belong in a checkout."""
        return f"results/{self.path}"

    def lines(self) -> list[dict[str, Any]]:
        """Return the records of a file of lines.

        Raises:
            UserError: a line is no json object.
        """
        assert self.there is not None
        paths = [self.there] if self.there.is_file() else sorted(self.there.glob("*.jsonl"))
        try:
            texts = [line for path in paths for line in path.read_text(encoding="utf-8").splitlines()]
            found = [json.loads(line) for line in texts if line.strip()]
        except (OSError, ValueError) as error:
            raise UserError(f"{self.there}: unreadable records ({error})") from error
        if not found or not all(isinstance(record, dict) for record in found):
            raise UserError(f"{self.there}: holds no records (expected json objects, one a line)")
        return found

    def fingerprint(self) -> str:
        """Return a digest of what the records say; the same for gzipped ones, whatever packed them."""
        if self.there is None:
            return ""
        digest = hashlib.sha256()
        for path in _files(self.there):
            data = path.read_bytes()
            digest.update(gzip.decompress(data) if path.suffix == ".gz" else data)
        return digest.hexdigest()


def _files(there: Path) -> list[Path]:
    if there.is_file():
        return [there]
    kept = [there / "records.jsonl.gz", there / "search" / "budget.json", *sorted((there / "runs").glob("*.json"))]
    kept += sorted(there.glob("*.jsonl"))
    return [path for path in kept if path.is_file()]


def read(paper: Path, results: Path) -> list[Source]:
    """Return the sources that `<paper>/records.yaml` names.

    Raises:
        UserError: the file or the results' folder is missing, or an entry is not what it should be.
    """
    if not results.is_dir():
        raise UserError(f"--results {results}: no such folder")
    path = paper / FILE
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected names of sources, each with kind, path and command")
    return [_source(path, str(name), entry, results) for name, entry in content.items()]


def _source(path: Path, name: str, entry: Any, results: Path) -> Source:
    wanted = {"kind", "path", "command"}
    if not isinstance(entry, dict) or set(entry) != wanted:
        raise UserError(f"{path}: {name}: expected {', '.join(sorted(wanted))}")
    if entry["kind"] not in KINDS:
        raise UserError(f"{path}: {name}: kind {entry['kind']}{nearest(str(entry['kind']), KINDS)}: {', '.join(KINDS)}")
    there = results / str(entry["path"])
    held = bool(_files(there)) if there.is_dir() else there.is_file()
    if held and entry["kind"] == "search":
        held = (there / "search" / "budget.json").is_file()
    return Source(
        name, entry["kind"], str(entry["path"]), " ".join(str(entry["command"]).split()), there if held else None
    )
