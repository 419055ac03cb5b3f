"""What the yamls of `conf/` say of the models, methods, tasks and recipes that records name."""

from collections.abc import Mapping, Sequence
from typing import Any

from peftbench import registry
from peftbench.config import ModelConfig, as_dict, build
from peftbench.errors import UserError

GROUPS = ("model", "method", "task")


def defaults(records: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    """Return (group, option) → settings of every option that records name and that there is; else it is left out."""
    found = {("train", "default"): registry.section("train", "default")}
    named = {(group, str(record["spec"][group]["name"])) for record in records for group in GROUPS}
    for group, option in sorted(named):
        try:
            found[group, option] = _model(option) if group == "model" else registry.section(group, option)
        except UserError:  # records of methods and models that have gone since spell everything out
            continue
    return found


def _model(option: str) -> dict[str, Any]:
    """Return a model's settings with what its yaml leaves open; a name that is no yaml's is a checkpoint's."""
    if option in registry.options("model"):
        section = registry.section("model", option)
    else:
        section = {**registry.section("model", "hub"), "checkpoint": option, "name": option}
    return as_dict(build(ModelConfig, section, "model"))
