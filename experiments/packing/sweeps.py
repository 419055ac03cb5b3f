"""Whole commands as a user types them: run, timed from outside, and read back from the records they leave."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
PEERS = ROOT / "experiments" / "peers"
if str(PEERS) not in sys.path:
    sys.path.append(str(PEERS))

import common  # noqa: E402  it lies beside the other comparisons


@dataclass
class Command:
    """A command that has ended.

    Attributes:
        shown: the command as one would type it.
        wall_seconds: from its start to its end.
        error: what went wrong, or None.
        output: the last lines it printed.
        ended: when it ended, in seconds since the epoch.
    """

    shown: str
    wall_seconds: float
    error: str | None
    output: str
    ended: float


@dataclass
class Swept:
    """A sweep's command and the records it left, packs in the order in which they ended."""

    command: Command
    records: list[dict[str, Any]] = field(default_factory=list)
    last_written: float | None = None

    @property
    def packs(self) -> list[list[dict[str, Any]]]:
        """Return the records pack by pack: each run of a pack has a place of its own, and all end before the next."""
        found: list[list[dict[str, Any]]] = []
        for record in self.records:
            pack = record["pack"]
            last = [other["pack"] for other in found[-1]] if found else []
            if not last or last[0]["size"] != pack["size"] or pack["index"] in {other["index"] for other in last}:
                found.append([])
            found[-1].append(record)
        return found

    @property
    def pack_seconds(self) -> list[dict[str, float]]:
        """Return the seconds of each pack by phase: those of its last record, since a pack's clock goes on."""
        return [members[-1]["pack"]["seconds"] for members in self.packs]


def timed(arguments: Sequence[str], folder: Path, limit: float | None) -> Command:
    """Run `python <arguments>` from the project's root and wait for its end, at most `limit` seconds.

    `folder`, where its results go, is shown as "results": it may be a temporary one.
    """
    shown = shlex.join(["python", *arguments]).replace(str(folder), "results")
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    common.say(shown)
    start = time.perf_counter()
    error, output = None, ""
    try:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=limit,
            check=False,
        )
        output = done.stdout
        error = f"exit code {done.returncode}" if done.returncode else None
    except subprocess.TimeoutExpired as expired:
        error = f"not done after {limit:g} s"
        output = expired.stdout.decode(errors="replace") if isinstance(expired.stdout, bytes) else expired.stdout or ""
    wall = time.perf_counter() - start
    last = "\n".join(output.strip().splitlines()[-12:])
    if error:
        common.say(f"{error}\n{last}")
    return Command(shown, wall, error, last, time.time())


def swept(
    experiment: str,
    pack: str,
    folder: Path,
    overrides: Sequence[str] = (),
    limit: float | None = None,
    name: str | None = None,
) -> Swept:
    """Run `sweep experiment=<experiment> pack=<pack>` into `folder`, which must not hold its records yet.

    Args:
        name: what the sweep is called after the experiment, by default its packs' size.
    """
    name = f"{experiment}-pack-{name or pack}"
    runs = folder / name / "runs"
    if any(runs.glob("*.json")):
        raise SystemExit(f"{runs} holds records already: give another folder, since what is there would not be timed")
    command = timed(
        [
            *("-m", "peftbench", "sweep", f"experiment={experiment}", f"pack={pack}"),
            *(f"results={folder}", f"sweep.name={name}", *overrides),
        ],
        folder,
        limit,
    )
    return read(command, runs)


def read(command: Command, runs: Path) -> Swept:
    """Return a command with the records in the folder `runs`, in the order in which they were written."""
    paths = sorted(runs.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    records = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    return Swept(command, records, paths[-1].stat().st_mtime if paths else None)
