"""One pack as a Hydra job: how its runs travel, and what a launcher calls, in this process or another."""

import base64
import dataclasses
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peftbench import progress
from peftbench.errors import UserError
from peftbench.record import RunSpec, canonical
from peftbench.store import Store


@dataclasses.dataclass(frozen=True)
class Pack:
    """The runs of one pack and the store they go to; `places` of them train side by side (None: all)."""

    specs: list[RunSpec]
    folder: str
    retry_failed: bool = False
    save_adapters: bool = False
    quiet: bool = False
    places: int | None = None

    def encode(self) -> str:
        """Return the pack as text that fits in a Hydra override."""
        content = {
            "specs": [spec.to_dict() for spec in self.specs],
            "folder": self.folder,
            "retry_failed": self.retry_failed,
            "save_adapters": self.save_adapters,
            "quiet": self.quiet,
            "places": self.places,
        }
        return base64.urlsafe_b64encode(zlib.compress(canonical(content).encode(), 9)).decode()

    @classmethod
    def decode(cls, text: str) -> "Pack":
        """Rebuild a pack from `encode`."""
        content = json.loads(zlib.decompress(base64.urlsafe_b64decode(text)))
        specs = [RunSpec.from_dict(s) for s in content.pop("specs")]
        return cls(specs, **content)


_STOPPED: list[str] = []
"""Why this process takes no more packs: a full disk does not get better with the next one."""


def execute(config: Any) -> dict[str, Any]:
    """Train the pack in `config.members`; the task function of every Hydra job.

    Returns run id → status under "runs", or one line under "stopped" when nothing more can be done here.
    """
    if _STOPPED:
        return {"runs": {}, "stopped": _STOPPED[0]}
    pack = Pack.decode(str(config.members))
    try:
        return {"runs": train(pack), "stopped": None}
    except UserError as error:
        _STOPPED.append(str(error))
        return {"runs": {}, "stopped": str(error)}


def train(pack: Pack) -> dict[str, str]:
    """Train those runs of a pack that nobody has done or is doing; returns run id → status."""
    store = Store(Path(pack.folder), pack.retry_failed)
    with store.claim([spec.run_id for spec in pack.specs]) as mine:
        specs: Sequence[RunSpec] = [spec for spec in pack.specs if spec.run_id in set(mine)]
        if not specs:
            return {}
        from peftbench.run import run_pack

        listener = progress.current(specs, pack.quiet)
        listener.pack(specs)
        records = run_pack(list(specs), store, listener, places=pack.places, save_adapters=pack.save_adapters)
        return {record.run_id: record.status for record in records}
