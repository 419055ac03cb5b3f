"""What lets the commands start sooner: work of others' modules at import that no command asks for, put off until asked.

`lighten` is for programs: it changes how two modules of transformers are imported, whenever they are. Who imports the
package as a library imports transformers as it is. Each change is made only where the module does that work when it is
imported, as transformers 5.17 does and 5.23 no longer:

- `utils.import_utils` lists which distribution every installed module comes from, by looking through all files of all
  distributions. It gets a mapping that finds what is asked for, a name at a time.
- `generation.candidate_generator` imports scikit-learn for one function of assisted decoding. It gets a function that
  imports scikit-learn when called.
"""

import importlib
import importlib.metadata
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any


class Distributions(Mapping[str, list[str]]):
    """Top-level modules → names of the distributions they come from, as `importlib.metadata.packages_distributions`.

    A module's entry is found when first asked for, in lists of files read as text; all of them, when somebody goes
    through the mapping, by the standard library.
    """

    def __init__(self, everything: Callable[[], Mapping[str, list[str]]]) -> None:
        self._everything = everything
        self._all: Mapping[str, list[str]] | None = None
        self._found: dict[str, list[str]] = {}
        self._listed: list[tuple[importlib.metadata.Distribution, list[str], str]] | None = None

    def __getitem__(self, module: str) -> list[str]:
        if module not in self._found:
            self._found[module] = self._owners(module)
        if not self._found[module]:
            raise KeyError(module)
        return self._found[module]

    def __iter__(self) -> Iterator[str]:
        return iter(self._whole())

    def __len__(self) -> int:
        return len(self._whole())

    def _whole(self) -> Mapping[str, list[str]]:
        if self._all is None:
            self._all = self._everything()
        return self._all

    def _owners(self, module: str) -> list[str]:
        if self._listed is None:
            self._listed = [_listed(one) for one in importlib.metadata.distributions()]
        return [
            one.metadata["Name"]
            for one, declared, files in self._listed
            for _ in range(declared.count(module) if declared else _holds(files, module))
        ]


def _listed(one: importlib.metadata.Distribution) -> tuple[importlib.metadata.Distribution, list[str], str]:
    """Return a distribution with the modules it declares and, where it declares none, its list of files."""
    declared = (one.read_text("top_level.txt") or "").split()
    files = "" if declared else one.read_text("RECORD") or "\n".join(map(str, one.files or ()))
    return one, declared, f"\n{files}\n"


def _holds(files: str, module: str) -> bool:
    """Return whether a list of files, a path at the start of every line, has a top-level module of this name."""
    start = f"\n{module}"
    at = files.find(start)
    while at >= 0:
        end = files.find("\n", at + 1)
        path = files[at + 1 : end].partition(",")[0]
        rest = path[len(module) :]
        # From Python 3.12 on the standard library counts extension modules, and folders whatever they hold
        newer = sys.version_info >= (3, 12)
        if rest.startswith("/") and (newer or path.endswith(".py")):
            return True
        if rest == ".py" or (newer and inspect.getmodulename(path) == module):
            return True
        at = files.find(start, end)
    return False


@contextmanager
def _asked_by_name(module: ModuleType) -> Iterator[None]:
    """While `module` is executed, let the standard library answer with `Distributions`."""
    everything = importlib.metadata.packages_distributions
    importlib.metadata.packages_distributions = lambda: Distributions(everything)
    try:
        yield
    finally:
        importlib.metadata.packages_distributions = everything


@contextmanager
def _without_sklearn(module: Any) -> Iterator[None]:
    """While `module` is executed, say that there is no scikit-learn; then give it what it would have imported."""
    utils: Any = importlib.import_module("transformers.utils")  # as the module itself does first
    available = utils.is_sklearn_available
    utils.is_sklearn_available = lambda: False
    try:
        yield
    finally:
        utils.is_sklearn_available = available
    module.is_sklearn_available = available
    if available():
        module.roc_curve = _roc_curve


def _roc_curve(*arguments: Any, **settings: Any) -> Any:
    from sklearn.metrics import roc_curve

    return roc_curve(*arguments, **settings)


CHANGES: dict[str, tuple[set[str], Callable[[ModuleType], AbstractContextManager[None]]]] = {
    "transformers.utils.import_utils": ({"packages_distributions"}, _asked_by_name),
    "transformers.generation.candidate_generator": ({"is_sklearn_available", "roc_curve"}, _without_sklearn),
}
"""Module → names that its own code, that of its functions aside, has where it does the work; what is done about it."""


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        names, change = CHANGES[self.name]
        code: Any = self.get_code(self.name)
        with change(module) if names <= set(code.co_names) else nullcontext():
            exec(code, module.__dict__)


class _Finder(MetaPathFinder):
    """Finds the modules of `CHANGES` and gives them a loader; nothing is left of it when it has found all."""

    def __init__(self) -> None:
        self.left = set(CHANGES)

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the module's specification, or None for all other modules."""
        spec = PathFinder.find_spec(name, path, target) if name in self.left else None
        if spec is None or type(spec.loader) is not SourceFileLoader:
            return None
        spec.loader = _Loader(name, spec.loader.path)
        self.left.discard(name)
        if not self.left and self in sys.meta_path:
            sys.meta_path.remove(self)
        return spec


def lighten() -> None:
    """Make the changes to whichever modules of `CHANGES` are imported from now on."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
