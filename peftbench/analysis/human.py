"""Numbers for people: counts, bytes and seconds in units that suit them. Nothing heavy is imported here."""

import math
from typing import Any

MISSING = "–"


def number(value: Any) -> float | None:
    """A finite float, or None for anything else (null, NaN, text, bool)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def human_count(value: Any) -> str:
    """73728 → "73.7k"; below 1000 as it is."""
    v = number(value)
    if v is None:
        return MISSING
    for scale, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        # 999950 would round to "1000.0k".
        if abs(v) >= scale * 0.99995 and abs(v) >= 1000:
            return f"{v / scale:.1f}{suffix}"
    return f"{v:.0f}"


def human_bytes(value: Any) -> str:
    """2411725 → "2.3 MiB" (powers of 1024)."""
    v = number(value)
    if v is None:
        return MISSING
    for scale, suffix in ((1024**3, "GiB"), (1024**2, "MiB"), (1024, "KiB")):
        if v >= scale * 0.9995:
            return f"{v / scale:.1f} {suffix}"
    return f"{v:.0f} B"


def signed_bytes(value: Any) -> str:
    """As `human_bytes`, with a real minus sign where there is one."""
    v = number(value)
    return f"−{human_bytes(-v)}" if v is not None and v < 0 else human_bytes(value)


def human_seconds(value: Any) -> str:
    """0.0414 → "41 ms"; three significant digits below 10 of a unit."""
    v = number(value)
    if v is None:
        return MISSING
    for scale, suffix in ((1.0, "s"), (1e-3, "ms")):
        if v >= scale:
            return f"{v / scale:.2f} {suffix}" if v < 9.995 * scale else f"{v / scale:.0f} {suffix}"
    return f"{v / 1e-6:.0f} µs"
