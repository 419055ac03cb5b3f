"""Mistakes a user can mend: one clear line, exit code 2, no stack trace."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """What was wrong, where, and what would be accepted, in one line."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the valid name closest to `name`, or an empty string."""
    close = difflib.get_close_matches(str(name), [str(v) for v in valid], n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
