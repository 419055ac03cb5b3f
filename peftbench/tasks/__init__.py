"""Tasks: where rows come from, how they are tokenized, and how predictions are measured."""

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

from peftbench.errors import UserError, nearest
from peftbench.tasks.base import Encoded, Splits, Task

__all__ = ["Encoded", "Splits", "Task", "build"]


def build(settings: Mapping[str, Any]) -> Task:
    """Return the task described by a yaml's content: ``_target_`` names the class, the other keys are its settings.

    Raises UserError for an unknown key or a value of the wrong type, naming the key.
    """
    target = str(settings.get("_target_", ""))
    module, _, name = target.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"task._target_={target!r}: no such class; expected for example peftbench.tasks.glue.Glue"
        ) from error
    fields = {field.name: field for field in dataclasses.fields(cls)}
    values = {key: value for key, value in settings.items() if key != "_target_"}
    for key, value in values.items():
        if key not in fields:
            raise UserError(f"task.{key}: no such setting; expected one of {', '.join(fields)}{nearest(key, fields)}")
        _check_type(key, value, fields[key].type)
        values[key] = float(value) if fields[key].type is float else value
    missing = [key for key, field in fields.items() if _required(field) and key not in values]
    if missing:
        raise UserError(f"task.{missing[0]}: missing; {target} needs it")
    return cls(**values)


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _check_type(key: str, value: Any, kind: Any) -> None:
    if value is None:
        accepted = "None" in str(kind)
    elif "tuple" in str(kind):
        accepted = isinstance(value, (list, tuple))
    elif "str" in str(kind):
        accepted = isinstance(value, str)
    elif kind is bool:
        accepted = isinstance(value, bool)
    elif kind is float:
        accepted = isinstance(value, (int, float)) and not isinstance(value, bool)
    else:
        accepted = isinstance(value, int) and not isinstance(value, bool)
    if not accepted:
        expected = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}.get(kind, str(kind))
        raise UserError(f"task.{key}={value!r}: expected {expected}")
