"""What fits into a given amount of memory: how large a batch, how many runs side by side; decided by prediction.

Room is what is given less a reserve: `RESERVE` for CUDA's context and the kernels it loads, and `FRAGMENTATION` of the
whole for what the allocator holds and cannot give again.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

from peftbench.errors import UserError

RESERVE = 768 * 2**20
"""Bytes of a GPU that CUDA's context and the kernels it loads take (about 500 MiB on an H100)."""
FRAGMENTATION = 0.03
"""Share of a GPU left to what the allocator cannot give again."""
MOST_ROWS = 2**16
"""Largest batch that is looked for."""
PATIENCE = 8
"""Trials after which lines are no longer followed."""

UNITS = {"B": 1, "kB": 1000, "MB": 1000**2, "GB": 1000**3, "TB": 1000**4} | {
    f"{letter}iB": 1024 ** (i + 1) for i, letter in enumerate("KMGT")
}


def parse_bytes(setting: str, text: str) -> int:
    """Return the bytes that "24GiB", "24 GB" or "24576MiB" stand for.

    Raises:
        UserError: `text`, given for `setting`, is not a number with a unit.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    units = {unit.lower(): size for unit, size in UNITS.items()}
    size = units.get(match[2].lower()) if match else None
    if match is None or size is None or float(match[1]) <= 0:
        raise UserError(f"{setting}={text}: expected a number above 0 with a unit, such as 24GiB, 24GB or 24576MiB")
    return round(float(match[1]) * size)


def room(total: int, kind: str) -> int:
    """Return how many of a device's `total` bytes a step can have."""
    return total if kind == "cpu" else max(0, math.floor(total * (1 - FRAGMENTATION)) - RESERVE)


def largest(peak: Callable[[int], int], limit: int, step: int = 1, guess: int = 1, most: int = MOST_ROWS) -> int:
    """Return the largest multiple of `step`, up to `most`, whose predicted `peak` is at most `limit`; 0 if none is.

    The peak is nearly a line: a trial is made where the line through the bounds, or through the first two trials, meets
    the limit; should that take long, in the middle.
    """
    known: dict[int, int] = {}

    def fits(units: int) -> bool:
        known[units] = peak(units * step)
        return known[units] <= limit

    top = most // step
    if top < 1 or not fits(1):
        return 0
    low, high = 1, top + 1
    trial = guess // step
    while high - low > 1:
        trial = min(max(trial, low + 1), high - 1)
        if fits(trial):
            low = trial
        else:
            high = trial
        first, last = (low, high) if high in known else (1, low)
        slope = (known[last] - known[first]) / (last - first)
        meets = first + math.floor((limit - known[first]) / slope) if slope > 0 else top
        trial = meets if len(known) < PATIENCE else (low + high) // 2
    return low * step
