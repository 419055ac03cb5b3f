"""The parity gate: every method against an independent implementation, with the same weights on the same inputs.

A *check* gives both implementations the same adapter tensors on a copy of the same base (fp32, CPU) and compares
outputs, gradients of every adapter parameter, the losses of `STEPS` AdamW steps, merged weights and parameter counts.
Nothing here is needed to train; the references are imported only when a check asks for them.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftbench import registry

STEPS = 20
TOLERANCES = {"outputs": 1e-5, "gradients": 1e-4, "trace": 1e-4, "merged": 1e-5}
"""Largest absolute difference of outputs and merged weights; relative ones of gradients (per tensor) and losses."""
RESULTS = Path(__file__).with_name("results.json")


@dataclass(frozen=True)
class Parity:
    """What one check found: the largest deviations, None where there is nothing to compare.

    `trainable` holds our count and the reference's; `note` names differences by decision that the check allows for.
    """

    method: str
    reference: str
    model: str
    outputs: float | None = None
    gradients: float | None = None
    trace: float | None = None
    merged: float | None = None
    trainable: tuple[int, int] | None = None
    note: str = ""
    error: str | None = None

    @property
    def deviations(self) -> dict[str, float]:
        """What was compared."""
        return {k: v for k in TOLERANCES if (v := getattr(self, k)) is not None}

    @property
    def passed(self) -> bool:
        """Whether everything compared agrees; outputs have to be among it."""
        close = all(math.isfinite(v) and v <= TOLERANCES[k] for k, v in self.deviations.items())
        counts = self.trainable is None or self.trainable[0] == self.trainable[1]
        return self.error is None and self.outputs is not None and close and counts

    def to_dict(self) -> dict[str, Any]:
        """Return the fields and the verdict as plain data."""
        return {**dataclasses.asdict(self), "passed": self.passed}


def source_sha256(name: str) -> str:
    """Return a fingerprint of the code that computes the method `name`: its file, and what that imports of methods
    and kernels."""
    own = registry.method_class(name).__module__.rpartition(".")[2]
    pending = ["methods.base", "methods.sites", f"methods.{own}"]
    files: dict[str, bytes] = {}
    while pending:
        module = pending.pop()
        path = registry.PACKAGE.joinpath(*module.split(".")).with_suffix(".py")
        if module in files or not path.is_file():
            continue
        files[module] = path.read_bytes()
        found = re.findall(rb"from peftbench\.((?:methods|kernels)\.\w+) import", files[module])
        pending += [m.decode() for m in found]
    digest = hashlib.sha256()
    for module in sorted(files):
        digest.update(module.encode() + b"\0" + files[module])
    return digest.hexdigest()[:12]


@functools.cache
def results() -> dict[str, Any]:
    """Return the kept results of the gate: versions of the references, and by method its checks and fingerprint."""
    if not RESULTS.is_file():
        return {"versions": {}, "methods": {}}
    return json.loads(RESULTS.read_text())


def stamp(method: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what a record says of its method's parity: references, verdict, and whether it is about this very code.

    `method` is the method's section of a spec. None for a method that the gate never saw.
    """
    name = str(method.get("name"))
    found = results()["methods"].get(name)
    if found is None:
        return None
    checks = found["checks"]
    return {
        "references": sorted({c["reference"] for c in checks}),
        "models": sorted({c["model"] for c in checks}),
        "passed": all(c["passed"] for c in checks),
        "current": found["source_sha256"] == source_sha256(name),
    }
