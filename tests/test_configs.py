"""Every yaml composes and instantiates; every experiment composes; each opens with the command that runs it."""

import re
import shlex

import pytest
from omegaconf import OmegaConf

from peftbench import overrides, registry
from peftbench.config import ModelConfig, ProfileConfig, SweepConfig, TrainConfig, build, settings
from peftbench.plan import GROUPS, flatten, points
from peftbench.resolve import demand

CONF = registry.conf_folder()
BUILDERS = {
    "model": lambda mapping: build(ModelConfig, mapping, "model"),
    "method": registry.build_method,
    "task": registry.build_task,
    "train": lambda mapping: build(TrainConfig, mapping, "train"),
    "profile": lambda mapping: build(ProfileConfig, mapping, "profile"),
}
OPTIONS = [(group, name) for group in GROUPS for name in registry.options(group)]


@pytest.mark.parametrize(("group", "name"), OPTIONS, ids=lambda value: str(value).replace("/", "-"))
def test_every_option_composes_and_instantiates(group, name):
    mapping = registry.section(group, name)
    if (group, name) == ("model", "hub"):  # open: its checkpoint comes from the command line
        mapping = {**mapping, "checkpoint": "owner/name", "name": "owner/name"}
    BUILDERS[group](mapping)


@pytest.mark.parametrize("name", registry.options("method"))
def test_a_method_s_yaml_gives_every_setting_and_a_learning_rate(name):
    mapping = registry.section("method", name)
    given = set(mapping) - set(registry.NOT_SETTINGS)
    assert given == registry.declared(name), "a yaml shows all of its method's settings"
    assert float(mapping["suggested"]["learning_rate"]) > 0


@pytest.mark.parametrize(("group", "cls"), [("train", TrainConfig), ("profile", ProfileConfig)])
def test_the_default_yamls_say_what_the_classes_say(group, cls):
    assert build(cls, registry.section(group, "default"), group) == cls()


def test_the_top_level_keys_say_what_the_class_says():
    top = OmegaConf.to_container(OmegaConf.load(CONF / "config.yaml"))
    assert isinstance(top, dict)
    own = {k: v for k, v in top.items() if k in {f.name for f in settings(SweepConfig)}}
    assert build(SweepConfig, own, "") == SweepConfig()


def test_the_default_choices_are_the_same_in_the_yaml_and_in_the_sweeper():
    listed = OmegaConf.to_container(OmegaConf.load(CONF / "config.yaml").defaults)
    assert isinstance(listed, list)
    chosen = {k: v for entry in listed if isinstance(entry, dict) for k, v in entry.items() if k in GROUPS}
    (grid,) = demand({}, None).grids
    assert {k: grid[k] for k in GROUPS} == {k: [v] for k, v in chosen.items()}


@pytest.mark.parametrize("name", sorted(registry.experiments()))
def test_every_experiment_composes(name):
    request = demand({}, name)
    methods = {str(m) for grid in request.grids for m in grid["method"]}
    found, _ = points(request, {m: registry.declared(m) for m in methods})
    assert found
    for grid in request.grids:
        for group in GROUPS:
            for option in grid[group]:
                if "/" not in str(option):
                    registry.check_option(group, str(option))
    for method in request.per_method:
        registry.check_option("method", method)
    for key in {k for point in found for k in point}:
        if key.startswith(("train.", "profile.")):
            group, _, setting = key.partition(".")
            assert setting in {f.name for f in settings(TrainConfig if group == "train" else ProfileConfig)}
    assert (registry.experiments()[name].parent / "README.md").is_file()


YAMLS = [CONF / "config.yaml"] + sorted(p for g in GROUPS for p in (CONF / g).rglob("*.yaml"))
YAMLS += list(registry.experiments().values())


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_a_yaml_opens_with_a_command_that_works(path):
    """Its first comment lines hold a command whose keys, options and values exist."""
    head = re.match(r"(#.*\n)+", path.read_text())
    commands = re.findall(r"python -m peftbench (?:sweep|run)\b[^#\n]*", head.group() if head else "")
    assert commands, f"{path} opens with no command"
    for command in commands:
        words = shlex.split(command.strip("` "))[4:]
        parsed = overrides.parse([w for w in words if re.match(r"\+?[a-z][\w./]*=", w)])
        for group in GROUPS:
            for option in parsed.grid.get(group, ()):
                if "/" not in str(option):
                    registry.check_option(group, str(option))
        methods = parsed.grid.get("method", ["lora"])
        known = {f"method.{s}" for m in methods for s in registry.declared(str(m))}
        assert {k for k in parsed.grid if k.startswith("method.")} <= known, command


def test_nested_values_flatten():
    assert flatten({"a": {"b": {"c": 1}}, "d.e": 2, "f": {}}) == {"a.b.c": 1, "d.e": 2, "f": {}}
