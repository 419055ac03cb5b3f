"""Records → the command that runs them again: the names in a spec, and every setting that their yamls do not say."""

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from peftbench.analysis.frame import Record, dig

UNSAID = ("name", "_target_", "suggested", "requires", "about")
"""Keys of a section that are no settings."""
PLAIN = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-./+@%")

Defaults = Mapping[tuple[str, str], Mapping[str, Any]]
"""(group, option) → settings as the option's yaml has them."""


def command(record: Record, defaults: Defaults, seeds: Sequence[int] = ()) -> str:
    """Return the command line that makes a record's run, or with several `seeds` all of these, on the same device kind.

    Settings that follow from the named options are left out; where `defaults` lack an option all are spelt out.
    """
    spec = record["spec"]
    chosen = list(dict.fromkeys(seeds)) or [spec["seed"]]
    parts = ["python", "-m", "peftbench", "run" if len(chosen) == 1 else "sweep"]
    parts += [f"{group}={value(dig(spec, (group, 'name')))}" for group in ("model", "method", "task")]
    for group in ("model", "method", "task", "train"):
        parts += _settings(group, spec.get(group) or {}, defaults)
    if (spec.get("protocol") or "held_out") != "held_out":
        parts.append(f"protocol={value(spec['protocol'])}")
    if dig(spec, ("profile", "enabled")) is False:
        parts.append("profile=skip")
    parts.append("seed=" + ",".join(map(str, chosen)))
    return shlex.join(parts)


def over_tasks(lines: Mapping[str, str]) -> str:
    """Return one command for several tasks where they differ by name alone, else one a line; task name → command."""
    bare = {line.replace(f" task={value(task)} ", " task={} ") for task, line in lines.items()}
    if len(bare) != 1:
        return "\n".join(dict.fromkeys(lines.values()))
    joined = ",".join(value(task) for task in lines)
    (line,) = bare
    return line.replace("task={}", f"task={joined}").replace(" peftbench run ", " peftbench sweep ")


def _settings(group: str, section: Mapping[str, Any], defaults: Defaults) -> list[str]:
    known = defaults.get((group, str(section.get("name", "default"))))
    base, found = _flat(known or {}), _flat(section)
    # A section that holds what its yaml does not (architecture: null) cannot be told from one that is older.
    return [
        f"{group}.{key}={value(v)}"
        for key, v in found.items()
        if key.partition(".")[0] not in UNSAID and (key not in base or not _same(base[key], v))
    ]


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, entry in mapping.items():
        if isinstance(entry, Mapping) and entry:
            flat |= _flat(entry, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = entry
    return flat


def _same(first: Any, second: Any) -> bool:
    return json.dumps(first, sort_keys=True, default=str) == json.dumps(second, sort_keys=True, default=str) or (
        isinstance(first, int | float) and isinstance(second, int | float) and first == second
    )


def value(entry: Any) -> str:
    """Return a value in Hydra's grammar."""
    if entry is None:
        return "null"
    if isinstance(entry, bool):
        return "true" if entry else "false"
    if isinstance(entry, int | float):
        return repr(entry)
    if isinstance(entry, list | tuple):
        return f"[{','.join(map(value, entry))}]"
    if isinstance(entry, Mapping):
        return "{" + ",".join(f"{value(str(k))}:{value(v)}" for k, v in entry.items()) + "}"
    text = str(entry)
    return text if text and set(text) <= PLAIN and not _read_otherwise(text) else _quoted(text)


def _read_otherwise(text: str) -> bool:
    """Whether Hydra reads unquoted text as something else than text."""
    if text.lower() in ("null", "true", "false", "nan", "inf", "-inf", "+inf"):
        return True
    try:
        float(text)
    except ValueError:
        return False
    return True


def _quoted(text: str) -> str:
    # Hydra's quoted strings know no escapes but those of quotes and of backslashes before them.
    return "'" + text.replace("\\'", "\\\\'").replace("'", "\\'") + "'"
