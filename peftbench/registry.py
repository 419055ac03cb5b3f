"""What there is to choose from: the yaml files of `conf/` and `experiments/`, and the classes they name."""

import contextlib
import dataclasses
import functools
import importlib
import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from peftbench.config import ModelConfig, as_dict, build, settings
from peftbench.errors import UserError, nearest
from peftbench.plan import GROUPS

PACKAGE = Path(__file__).resolve().parent
NOT_SETTINGS = ("_target_", "name", "suggested", "requires", "about")
"""Keys of a method's yaml that are not settings of its class."""


def conf_folder() -> Path:
    """Return the folder of the vocabulary: beside the package in a checkout, inside it when installed."""
    beside = PACKAGE.parent / "conf"
    if (beside / "config.yaml").is_file():
        return beside
    inside = PACKAGE / "conf"
    if not (inside / "config.yaml").is_file():
        raise UserError(f"no conf/config.yaml beside {PACKAGE} or in it; install peftbench again")
    return inside


def experiment_folders() -> list[Path]:
    """Return the folders that may hold experiments: the working directory's, the checkout's, the package's own."""
    folders = [Path.cwd() / "experiments", PACKAGE.parent / "experiments", PACKAGE / "experiments"]
    return list(dict.fromkeys(f.resolve() for f in folders if f.is_dir()))


def experiments() -> dict[str, Path]:
    """Return name → yaml of every experiment; the first folder that has a name wins."""
    found: dict[str, Path] = {}
    for folder in experiment_folders():
        for path in sorted(folder.glob("*/experiment.yaml")):
            found.setdefault(path.parent.name, path)
    return found


@functools.cache
def options(group: str) -> tuple[str, ...]:
    """Return the option names of a group; those in a folder carry its name: ``movie-reviews/imdb``."""
    folder = conf_folder() / group
    return tuple(sorted(p.relative_to(folder).with_suffix("").as_posix() for p in folder.rglob("*.yaml")))


def check_option(group: str, name: str) -> None:
    """Raise UserError unless `name` is an option of `group`."""
    valid = options(group)
    if name not in valid:
        raise UserError(
            f"{group}={name}: no such {group}{nearest(name, valid)} (python -m peftbench {group}s lists them)"
        )


@contextlib.contextmanager
def composer() -> Iterator[None]:
    """Have Hydra ready to compose out of `conf_folder()`; nothing to do where it already is."""
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    if GlobalHydra.instance().is_initialized():
        yield
        return
    with initialize_config_dir(str(conf_folder()), job_name="peftbench", version_base="1.3"):
        yield


@functools.cache
def _section(group: str, name: str) -> dict[str, Any]:
    from omegaconf import OmegaConf

    path = conf_folder() / group / f"{name}.yaml"
    if _stands_alone(path):
        section = OmegaConf.to_container(OmegaConf.load(path))
    else:
        section = OmegaConf.to_container(_composed(group, name), resolve=True)
    if not isinstance(section, dict):
        raise UserError(f"conf/{group}/{name}.yaml: expected a mapping")
    return {str(k): v for k, v in section.items()}


def _stands_alone(path: Path) -> bool:
    """Whether a yaml refers to no other, so that composing, which takes twenty times as long, would change nothing."""
    text = path.read_text(encoding="utf-8")
    return not any(sign in text for sign in ("defaults:", "@package", "${"))


def _composed(group: str, name: str) -> Any:
    from hydra import compose

    quoted = name.replace("'", "")
    with composer():
        return compose("config", overrides=[f"{group}='{quoted}'"])[group]


def section(group: str, name: str) -> dict[str, Any]:
    """Return one option's yaml as composed by Hydra, as plain data, with its name.

    Options are composed one by one, not per combination, since no option reaches into another group.
    """
    check_option(group, name)
    found = dict(_section(group, name))
    if group in ("model", "method", "task"):
        found.setdefault("name", name)
    return found


def load_class(target: Any, where: str) -> type:
    """Import the class that a ``_target_`` names; raises UserError naming `where` if there is none."""
    module, _, name = str(target or "").rpartition(".")
    if not module:
        raise UserError(f"{where}: _target_={target}: expected the dotted path of a class")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ModuleNotFoundError, AttributeError) as error:
        raise UserError(f"{where}: _target_={target}: {error}") from error
    if not (inspect.isclass(found) and dataclasses.is_dataclass(found)):
        raise UserError(f"{where}: _target_={target}: expected a dataclass")
    return found


def method_class(name: str) -> Any:
    """Return the class of the method `name`."""
    return load_class(section("method", name).get("_target_"), f"conf/method/{name}.yaml")


def declared(name: str) -> frozenset[str]:
    """Return the settings that the method `name` declares."""
    return frozenset(f.name for f in settings(method_class(name)))


def build_method(mapping: Mapping[str, Any]) -> Any:
    """Build a method from ``{"name", "_target_", <settings>}``, as it stands in a yaml or a RunSpec."""
    cls = load_class(mapping.get("_target_"), f"conf/method/{mapping.get('name')}.yaml")
    return build(cls, {k: v for k, v in mapping.items() if k not in NOT_SETTINGS}, "method")


def build_task(mapping: Mapping[str, Any]) -> Any:
    """Build a task from ``{"name", "_target_", <settings>}``, as it stands in a yaml or a RunSpec."""
    cls = load_class(mapping.get("_target_"), f"conf/task/{mapping.get('name')}.yaml")
    known = {f.name for f in settings(cls)}
    return build(cls, {k: v for k, v in mapping.items() if k != "_target_" and (k != "name" or k in known)}, "task")


def _first_line(thing: Any) -> str:
    return (inspect.getdoc(thing) or "").strip().partition("\n")[0]


def describe_method(name: str) -> dict[str, Any]:
    """Return name, idea, card, settings with defaults, traits, suggested values and class of one method."""
    mapping = section("method", name)
    method = build_method(mapping)
    traits = dataclasses.asdict(method.traits) if dataclasses.is_dataclass(method.traits) else dict(method.traits)  # type: ignore[call-overload, arg-type]
    return {
        "name": name,
        "idea": _first_line(type(method)),
        **dataclasses.asdict(method.card),
        **(mapping.get("about") or {}),
        "settings": as_dict(method),
        "traits": {k: sorted(v) if isinstance(v, frozenset) else v for k, v in traits.items()},
        "suggested": mapping.get("suggested") or {},
        "requires": mapping.get("requires") or {},
        "class": str(mapping["_target_"]),
        "version": method.version,
    }


def describe_model(name: str) -> dict[str, Any]:
    """Return name, kind, family, checkpoint and where the weights would come from; asks no network."""
    mapping = section("model", name)
    if name == "hub":  # the open entry: any checkpoint by name
        return {"name": name, "kind": None, "family": None, "checkpoint": "<owner>/<name>", "source": "hub"}
    config = build(ModelConfig, mapping, "model")
    architecture = config.architecture or {}
    return {
        "name": name,
        "kind": config.kind,
        "family": config.family or architecture.get("model_type"),
        "checkpoint": config.checkpoint,
        "source": weights_source(config),
        "architecture": bool(config.architecture),
    }


def weights_source(config: ModelConfig) -> str:
    """Say where weights would come from ("package gt-…", "local /…", "hub", "random") without asking a network."""
    import importlib.util
    import os

    if config.weights == "random":
        return "random"
    root = os.environ.get("PEFTBENCH_MODELS")
    names = [config.local, (config.checkpoint or "").rsplit("/", 1)[-1]]
    for name in names:
        if root and name and (Path(root) / name).is_dir():
            return f"local {Path(root) / name}"
    if config.package:
        if importlib.util.find_spec(str(config.package["module"]).partition(".")[0]) is not None:
            return f"package {config.package['distribution']}"
        return f"package {config.package['distribution']} (not installed), else hub"
    return "hub" if config.checkpoint else "random"


def describe_task(name: str) -> dict[str, Any]:
    """Return name, metric, formulation, class, and what the task says of its rows where its data is at hand."""
    mapping = section("task", name)
    task = build_task(mapping)
    about: dict[str, Any] = {
        "name": name,
        "metric": task.primary_metric,
        "formulation": task.formulation,
        "labels": task.num_labels,
        "max_length": task.max_length,
        "class": str(mapping["_target_"]),
    }
    try:
        about.update(task.describe())
    except UserError as error:
        about["missing"] = str(error)
    about["name"] = name
    return about


__all__ = [
    "GROUPS",
    "build_method",
    "build_task",
    "composer",
    "conf_folder",
    "declared",
    "describe_method",
    "describe_model",
    "describe_task",
    "experiments",
    "options",
    "section",
]
