"""Imports only point down, analysis and planning stay clear of torch, and shared code names no method."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "peftbench"

# What each part may import of the package; a folder's name stands for all in it.
BASE = {"errors", "config", "record"}
ALLOWED = {
    "errors": set(),
    "record": set(),
    "config": {"errors"},
    "plan": {"errors", "record"},
    "store": {"errors", "record"},
    "environment": {"errors"},
    "startup": set(),
    "pace": set(),
    "progress": {"record", "pace"},
    "kernels": {"errors"},
    "models": BASE | {"kernels"},
    "tasks": BASE | {"registry"},
    "methods": BASE | {"kernels", "models", "registry"},
    "engine": BASE | {"kernels", "methods.base", "methods.sites", "methods.adapter", "models", "tasks.base"},
    "profiling": BASE
    | {"kernels", "engine", "methods.base", "methods.sites", "methods.adapter", "models", "tasks.base"},
    "analysis": {"errors", "record"},
    "paper": {"errors", "analysis", "store", "registry", "verify", "published", "reproduce"},
    "registry": BASE | {"plan"},  # imports the classes that a yaml names, but none by itself
}
LIGHT = (
    *("errors", "record", "config", "plan", "store", "environment", "pace"),
    *("progress", "overrides", "registry", "job"),
)


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> list[str]:
    """Return the dotted names below `peftbench` that a file imports, wherever in the file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return [name.removeprefix("peftbench.") for name in found if name.startswith("peftbench.")]


SOURCES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path):
    part = part_of(path)
    if part not in ALLOWED:
        return  # run, resolve, sweep, cli and __main__ join the parts
    for name in imports(path):
        fits = any(name == allowed or name.startswith(f"{allowed}.") for allowed in ALLOWED[part] | {part})
        assert fits, f"{path.relative_to(ROOT)} imports peftbench.{name}, which {part} may not know"


def light_modules():
    analysis = [p for p in SOURCES if part_of(p) == "analysis"]
    tasks = [PACKAGE / "tasks/source.py", PACKAGE / "tasks/base.py", PACKAGE / "models/source.py"]
    chosen = [PACKAGE / f"{name}.py" for name in LIGHT] + analysis + tasks
    return [".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for p in chosen if p.exists()]


def test_planning_store_and_analysis_load_without_torch():
    load = f"for m in {light_modules()!r}: importlib.import_module(m)"
    code = f"import importlib, sys\n{load}\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def method_names() -> set[str]:
    return {p.stem for p in (ROOT / "conf" / "method").rglob("*.yaml")} | {
        p.stem for p in (PACKAGE / "methods").glob("*.py") if p.stem not in ("__init__", "base", "sites", "adapter")
    }


def shared_sources():
    folders = [PACKAGE / "engine", PACKAGE / "profiling", ROOT / "tests" / "conformance"]
    return [p for folder in folders if folder.is_dir() for p in sorted(folder.rglob("*.py"))] + [
        PACKAGE / f"{name}.py" for name in ("assembly", "cost", "run")
    ]


@pytest.mark.parametrize("path", shared_sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_shared_code_names_no_method(path):
    """Neither as a string, nor by importing a method's module; "head" and "full" are words of their own."""
    names = method_names() - {"head", "full", "prompt", "prefix"}
    tree = ast.parse(path.read_text())
    for name in imports(path):
        assert not any(name.startswith(f"methods.{m}") for m in method_names()), f"{path} imports {name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert node.value.lower() not in names, f"{path}:{node.lineno} names the method {node.value!r}"


REFERENCES = ("peft", "adapters", "loralib", "galore_torch")


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_references_are_imported_by_checks_alone(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and node.level == 0 else []
        for name in names:
            assert name.partition(".")[0] not in REFERENCES or part_of(path) == "verify", f"{path} imports {name}"
