"""The only reader and writer of results: one file per run, written at once, never edited.

Layout of `<results>/<sweep.name>/`: ``runs/<run_id>.json``, ``profiles/<profile_id>.json``, ``packing/<id>.json`` (how
long steps of packs take), ``records.jsonl.gz`` (all records in one file, for keeping), ``adapters/<run_id>/`` (if asked
for), ``traces/<profile_id>/`` (by ``profile``), ``locks/`` (who is training what; gone when nobody is), ``report/``.
"""

import contextlib
import errno
import fcntl
import gzip
import json
import os
import shutil
import socket
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from peftbench.errors import UserError
from peftbench.record import RunRecord, plain

KEPT = ("completed", "diverged")


def _full(path: Path, error: OSError) -> UserError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"{path}: no space left on the disk; nothing half-written was kept. Free some space and run again"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
        return UserError(f"{path}: cannot write ({error.strerror}); choose another folder with results=<folder>")
    return UserError(f"{path}: cannot write ({error.strerror or error})")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: unreadable record ({error}); move the file away and run the sweep again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: unreadable record (not a json object); move the file away and run the sweep again")
    return value


def _checked_record(value: Any, path: Path) -> dict[str, Any]:
    if not isinstance(value, dict) or not isinstance(value.get("run_id"), str) or "status" not in value:
        raise UserError(
            f"{path}: unreadable record (run_id or status is missing); move the file away and run the sweep again"
        )
    return value


def _stat(pid: int) -> tuple[str, str] | None:
    """Return state and start time (in clock ticks) of a process as text, or None where the system does not tell."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return fields[0], fields[19]
    except (OSError, IndexError):
        return None


def this_process() -> dict[str, Any]:
    """Return what `alive` knows this process by."""
    stat = _stat(os.getpid())
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": None if stat is None else stat[1]}


def alive(owner: Mapping[str, Any]) -> bool:
    """Whether the owner of a lock still runs; a process on another host counts as alive, as nobody here can tell."""
    if owner.get("host") != socket.gethostname():
        return True
    pid = int(owner.get("pid", -1))
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    stat = _stat(pid)
    if stat is not None and stat[0] in "ZX":
        return False  # ended, and its parent has not looked yet
    # A pid is used again after a while: the same number with another start time is another process.
    return owner.get("started") is None or (stat is not None and owner["started"] == stat[1])


def _slim(record: dict[str, Any]) -> dict[str, Any]:
    quality = record.get("quality")
    return record | {"trace": None, "quality": None if quality is None else {**quality, "items": {}}}


def _write_folder(path: Path, write: Callable[[Path], None]) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        shutil.rmtree(path, ignore_errors=True)  # left by a run that never came to its record, or an earlier trace
        os.rename(temporary, path)
    except OSError as error:
        raise _full(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class Store:
    """The records of one sweep in `folder`; `retry_failed` lets failed and out-of-memory runs count as absent."""

    def __init__(self, folder: str | os.PathLike[str], retry_failed: bool = False) -> None:
        self.folder = Path(folder)
        self.retry_failed = retry_failed
        self._kept: dict[str, dict[str, Any]] | None = None

    @property
    def runs(self) -> Path:
        """The folder of run records."""
        return self.folder / "runs"

    def prepare(self) -> None:
        """Create the folders and make sure that they can be written to; raises UserError otherwise."""
        probe = self.runs / f".probe-{uuid.uuid4().hex}"
        try:
            self.runs.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"x" * 4096)
            probe.unlink()
        except OSError as error:
            with contextlib.suppress(OSError):
                probe.unlink(missing_ok=True)
            raise _full(self.folder, error) from error

    def _consolidated(self) -> dict[str, dict[str, Any]]:
        """Records out of records.jsonl.gz by run id, read once."""
        if self._kept is None:
            kept: dict[str, dict[str, Any]] = {}
            path = self.folder / "records.jsonl.gz"
            if path.exists():
                try:
                    with gzip.open(path, "rt", encoding="utf-8") as lines:
                        for line in lines:
                            record = _checked_record(json.loads(line), path)
                            kept[record["run_id"]] = record
                except UserError:
                    raise
                except (OSError, EOFError, ValueError) as error:
                    raise UserError(
                        f"{path}: unreadable records ({error}); move the file away and run again"
                    ) from error
            self._kept = kept
        return self._kept

    def record(self, run_id: str) -> dict[str, Any] | None:
        """Return the record of a run, or None; raises UserError if its file cannot be read."""
        path = self.runs / f"{run_id}.json"
        if path.exists():
            return _checked_record(_read_json(path), path)
        return self._consolidated().get(run_id)

    def has(self, run_id: str) -> bool:
        """Whether the run needs no training; one that a search pruned does."""
        record = self.record(run_id)
        if record is None or record["status"] == "pruned":
            return False
        return record["status"] in KEPT or not self.retry_failed

    def records(self) -> list[dict[str, Any]]:
        """Return all records sorted by run id; a file in runs/ goes before the consolidated one."""
        found = dict(self._consolidated())
        if self.runs.is_dir():
            for path in sorted(self.runs.glob("*.json")):
                record = _checked_record(_read_json(path), path)
                found[record["run_id"]] = record
        return [found[run_id] for run_id in sorted(found)]

    def _write(self, path: Path, value: Any, replace: bool) -> bool:
        """Write json to `path` in one go; returns False if it was there and `replace` is off."""
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "w", encoding="utf-8") as file:
                json.dump(plain(value), file, ensure_ascii=False, allow_nan=False)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            if replace:
                os.replace(temporary, path)
                return True
            try:
                os.link(temporary, path)  # unlike rename, refuses to write over a file that is there
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
                    raise
                if path.exists():
                    return False
                os.rename(temporary, path)  # a file system without hard links
            return True
        except OSError as error:
            raise _full(path, error) from error
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def write(self, record: RunRecord) -> bool:
        """Write a record; a completed or diverged one that is there stays as it is. Returns whether it was written.

        Raises UserError if the disk is full or the folder cannot be written.
        """
        present = self.record(record.run_id)
        if present is not None and present["status"] in KEPT:
            return False
        return self._write(self.runs / f"{record.run_id}.json", record.to_dict(), replace=present is not None)

    def adapter(self, run_id: str) -> Path:
        """Return the folder that the run's trained adapter is in, if it was kept."""
        return self.folder / "adapters" / run_id

    def write_adapter(self, run_id: str, write: Callable[[Path], None]) -> None:
        """Let `write` fill a folder, and put it in its place whole.

        Raises UserError if the disk is full or the folder cannot be written.
        """
        _write_folder(self.adapter(run_id), write)

    def write_traces(self, profile_id: str, write: Callable[[Path], None]) -> Path:
        """Let `write` fill a folder of traces, and put it in place of the one there is; returns the folder.

        Raises UserError if the disk is full or the folder cannot be written.
        """
        path = self.folder / "traces" / profile_id
        _write_folder(path, write)
        return path

    def profile(self, profile_id: str) -> dict[str, Any] | None:
        """Return the kept profile, or None."""
        path = self.folder / "profiles" / f"{profile_id}.json"
        return _read_json(path) if path.exists() else None

    def write_profile(self, profile_id: str, profile: dict[str, Any]) -> bool:
        """Keep a profile; the first one stays."""
        return self._write(self.folder / "profiles" / f"{profile_id}.json", profile, replace=False)

    def packing(self, packing_id: str) -> dict[str, Any] | None:
        """Return what was measured of packs of one kind, or None."""
        path = self.folder / "packing" / f"{packing_id}.json"
        return _read_json(path) if path.exists() else None

    def write_packing(self, packing_id: str, packing: dict[str, Any]) -> None:
        """Keep what was measured of packs of one kind, in place of a shorter curve."""
        self._write(self.folder / "packing" / f"{packing_id}.json", packing, replace=True)

    @contextlib.contextmanager
    def claim(self, run_ids: Iterable[str]) -> Iterator[list[str]]:
        """Give those of `run_ids` that nobody has done or is doing; they are this process's until the context ends.

        A lock left by a process of this host that is gone is taken over. Raises UserError if the folder cannot be
        written.
        """
        folder = self.folder / "locks"
        mine: list[str] = []
        me = this_process()
        try:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                with open(folder / ".mutex", "w") as mutex:
                    fcntl.flock(mutex, fcntl.LOCK_EX)  # so that two processes never take over the same stale lock
                    for run_id in run_ids:
                        if self._take(folder / f"{run_id}.lock", me):
                            mine.append(run_id)
            except OSError as error:
                raise _full(folder, error) from error
            done = {run_id for run_id in mine if self.has(run_id)}  # finished by another since the plan was made
            yield [run_id for run_id in mine if run_id not in done]
        finally:
            for run_id in mine:
                with contextlib.suppress(OSError):
                    (folder / f"{run_id}.lock").unlink(missing_ok=True)

    @staticmethod
    def _take(path: Path, me: dict[str, Any]) -> bool:
        """Create the lock file of one run; called under the mutex."""
        for _ in range(2):
            try:
                descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            except FileExistsError:
                try:
                    owner = json.loads(path.read_text())
                except FileNotFoundError:
                    continue
                except ValueError:
                    owner = {"host": me["host"], "pid": -1}  # killed while it wrote its lock
                if alive(owner):
                    return False
                path.unlink(missing_ok=True)
                continue
            with os.fdopen(descriptor, "w") as file:
                json.dump(me, file)
            return True
        return False

    def claimed(self, run_id: str) -> dict[str, Any] | None:
        """Return who holds the run (host, pid), or None."""
        try:
            owner = json.loads((self.folder / "locks" / f"{run_id}.lock").read_text())
        except (OSError, ValueError):
            return None
        return owner if alive(owner) else None

    def consolidate(self, slim: bool = False) -> Path:
        """Write all records into records.jsonl.gz, sorted by run id; equal records give equal bytes.

        `slim` leaves out what takes the room, each item's scores and predictions and each step's loss: tables and
        figures of metrics stay, paired tests on items do not.
        """
        records = [_slim(r) for r in self.records()] if slim else self.records()
        path = self.folder / "records.jsonl.gz"
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as raw, gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as packed:
                for record in records:
                    packed.write((json.dumps(record, ensure_ascii=False, sort_keys=True) + "\n").encode())
            os.replace(temporary, path)
        except OSError as error:
            raise _full(path, error) from error
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        self._kept = None
        return path
