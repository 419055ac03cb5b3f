"""What the commands put off or leave out when they start and end, and that nobody else is told of it."""

import importlib.metadata
import json
import os
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import pytest
import torch

from peftbench import environment, startup

ROOT = Path(__file__).resolve().parent.parent


def python(
    *arguments: str, path: Path | None = None, stdout: int | None = subprocess.PIPE, **variables: str
) -> "subprocess.CompletedProcess[str]":
    """Run Python with the package, and `path` before it, in reach."""
    left_out = ("LD_PRELOAD", "CUDA_INJECTION64_PATH", "NVTX_INJECTION64_PATH", "PYTHONINSPECT", "PYTHONUNBUFFERED")
    kept = {name: value for name, value in os.environ.items() if name not in left_out}
    paths = os.pathsep.join(str(one) for one in (path, ROOT) if one)
    return subprocess.run(
        [sys.executable, *arguments],
        env={**kept, "PYTHONPATH": paths, **variables},
        cwd=path,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )


# Which distribution a module comes from.


def distribution(folder: Path, name: str, **files: str) -> None:
    info = folder / f"{name.replace('-', '_')}-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    for file, text in files.items():
        (info / file.replace("_txt", ".txt")).write_text(text)


def test_distributions_are_found_by_name_as_by_looking_through_all(tmp_path, monkeypatch):
    distribution(tmp_path, "declares-two", top_level_txt="first\nsecond\n", RECORD="third/__init__.py,,\n")
    distribution(tmp_path, "share-a", RECORD='"shared/with, comma.py",,\nshared/a.py,sha256=x.py,1\nx/shared/b.py,,\n')
    distribution(tmp_path, "share-b", top_level_txt="", RECORD="sharedness.py,,\nshared/b.py,,")
    distribution(tmp_path, "share_c", top_level_txt="shared")
    distribution(tmp_path, "lists-nothing")
    for file in ("shared/with, comma.py", "shared/a.py", "x/shared/b.py", "sharedness.py", "shared/b.py"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    monkeypatch.syspath_prepend(tmp_path)
    everything = importlib.metadata.packages_distributions()
    asked = []
    found = startup.Distributions(lambda: asked.append(1) or importlib.metadata.packages_distributions())
    assert sorted(found["shared"]) == ["share-a", "share-b", "share_c"]
    assert {name: found[name] for name in everything} == dict(everything)
    assert found.get("third") is None
    assert found.get("no_such_module", []) == []
    assert "sharedness" in found
    assert "sharednes" not in found
    with pytest.raises(KeyError, match="lists"):
        found["lists"]
    assert not asked
    assert dict(found) == dict(everything)
    assert len(found) == len(everything)
    assert len(asked) == 1


# transformers as the commands import it.

SAY = """
import importlib.metadata, json, re, sys
from pathlib import Path
real = importlib.metadata.packages_distributions
if sys.argv[1] == "lightened":
    from peftbench import startup
    startup.lighten()
    startup.lighten()
import transformers.generation.candidate_generator as generator
from transformers.utils import import_utils, is_sklearn_available
names = sorted(set(re.findall(r'_is_package_available\\("(\\w+)"', Path(import_utils.__file__).read_text())))
names += ["PIL", "yaml", "flash_attn"]
print(json.dumps({
    "early": sorted({"sklearn", "scipy.stats"} & set(sys.modules)),
    "versions": {name: import_utils._is_package_available(name, return_version=True) for name in names},
    "restored": importlib.metadata.packages_distributions is real,
    "finders": [str(type(finder)) for finder in sys.meta_path if "peftbench" in str(type(finder))],
    "generator": [name for name in ("is_sklearn_available", "roc_curve") if hasattr(generator, name)],
    "asks": [generator.is_sklearn_available is is_sklearn_available, is_sklearn_available()],
}))
"""


def test_transformers_finds_the_same_versions():
    plain, light = (json.loads(python("-c", SAY, how).stdout) for how in ("plain", "lightened"))
    assert light["versions"] == plain["versions"]
    assert light["versions"]["torch"] == [True, importlib.metadata.version("torch")]
    assert sum(available for available, _ in light["versions"].values()) > 4
    assert light["early"] == []
    assert light["restored"]
    assert light["finders"] == []
    assert (light["generator"], light["asks"]) == (plain["generator"], plain["asks"])


OLD = {
    "__init__.py": "",
    "utils/__init__.py": "from .import_utils import is_sklearn_available",
    "utils/import_utils.py": """
        import importlib.metadata
        MAPPING = importlib.metadata.packages_distributions()
        def is_sklearn_available():
            return bool(MAPPING.get("sklearn"))
    """,
    "generation/__init__.py": "",
    "generation/candidate_generator.py": """
        from ..utils import is_sklearn_available
        if is_sklearn_available():
            from sklearn.metrics import roc_curve
        def threshold(matches, probabilities):
            return roc_curve(matches, probabilities) if is_sklearn_available() else None
    """,
}
"""What of transformers 5.17 is changed."""
USE = """
import importlib.metadata, sys
from peftbench import startup
real = importlib.metadata.packages_distributions
startup.lighten()
from transformers.generation import candidate_generator as generator
from transformers.utils import import_utils
assert importlib.metadata.packages_distributions is real
assert not any(isinstance(finder, startup._Finder) for finder in sys.meta_path)
print(type(import_utils.MAPPING).__name__, "sklearn" in sys.modules, generator.threshold([0, 1], [0.1, 0.9]))
print(generator.is_sklearn_available is import_utils.is_sklearn_available, "sklearn" in sys.modules)
"""


def old_transformers(folder: Path, sklearn: bool) -> None:
    for name, text in OLD.items():
        file = folder / "transformers" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(text))
    (folder / "sklearn").mkdir()
    (folder / "sklearn/__init__.py").touch()
    (folder / "sklearn/metrics.py").write_text("def roc_curve(matches, probabilities):\n    return 'a curve'\n")
    if not sklearn:  # whether or not the environment has it
        file = folder / "transformers/utils/import_utils.py"
        file.write_text(file.read_text() + "MAPPING = {}\n")
    distribution(folder, "scikit-learn", top_level_txt="sklearn")


def test_an_older_transformers_is_lightened(tmp_path):
    old_transformers(tmp_path, sklearn=True)
    done = python("-c", USE, path=tmp_path)
    assert done.stdout == "Distributions False a curve\nTrue True\n", done.stderr


def test_an_older_transformers_without_sklearn_stays_without(tmp_path):
    old_transformers(tmp_path, sklearn=False)
    done = python("-c", USE, path=tmp_path)
    assert done.stdout == "dict False None\nTrue False\n", done.stderr


def test_other_versions_and_none_are_left_alone(tmp_path):
    for name in ("__init__.py", "utils/__init__.py", "generation/__init__.py"):
        file = tmp_path / "transformers" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    (tmp_path / "transformers/utils/import_utils.py").write_text("found = 1")
    code = """
        from peftbench import startup
        startup.lighten()
        from transformers.utils import import_utils
        assert import_utils.found == 1
        try:
            import transformers.generation.candidate_generator
        except ModuleNotFoundError as error:
            print(error)
    """
    done = python("-c", textwrap.dedent(code), path=tmp_path)
    assert done.stdout == "No module named 'transformers.generation.candidate_generator'\n", done.stderr


def test_libraries_are_imported_as_they_are_by_who_imports_the_package():
    code = "import sys, peftbench.__main__; print([f for f in sys.meta_path if 'peftbench' in str(type(f))])"
    assert python("-c", code).stdout == "[]\n"


# The end of the program.

WITNESS = """
import atexit, logging, logging.handlers, os, tempfile, threading

class Late:
    def __del__(self, write=os.write):
        write(2, b"taken apart\\n")

def last_words():
    print("last words")

def work():
    threading.main_thread().join()
    os.write(2, b"work done\\n")

if os.environ.get("WITNESS"):
    late = Late()
    atexit.register(last_words)
    folder = tempfile.TemporaryDirectory(dir=os.environ["WITNESS"])
    kept = logging.handlers.MemoryHandler(100, 100, logging.FileHandler(os.environ["WITNESS"] + "/log"))
    logging.getLogger("witness").addHandler(kept)
    logging.getLogger("witness").error("a line")
    if "THREAD" in os.environ:
        threading.Thread(target=work).start()
"""


@pytest.fixture
def witness(tmp_path):
    """A folder for PYTHONPATH: Python run from there tells what its end does. A folder it writes to."""
    (tmp_path / "path").mkdir()
    (tmp_path / "path/sitecustomize.py").write_text(WITNESS)
    (tmp_path / "seen").mkdir()
    return tmp_path / "path", tmp_path / "seen"


SCRIPT = "import sys\nfrom peftbench.__main__ import program\nif __name__ == '__main__':\n    sys.exit(program())\n"
"""What an installation makes of `[project.scripts]`."""


@pytest.mark.parametrize("started", [["-m", "peftbench"], ["script.py"]], ids=["module", "script"])
def test_nothing_is_taken_apart_but_all_is_written(started, witness):
    path, seen = witness
    (path / "script.py").write_text(SCRIPT)
    done = python(*started, "methods", "--json", path=path, WITNESS=str(seen), THREAD="1")
    assert done.returncode == 0
    assert done.stderr == "work done\n"
    assert done.stdout.endswith("]\nlast words\n")
    assert json.loads(done.stdout.removesuffix("last words\n"))
    assert [file.name for file in seen.iterdir()] == ["log"], "the temporary folder is gone"
    assert (seen / "log").read_text() == "a line\n"


def test_exit_codes_are_those_of_the_command(witness):
    path, seen = witness
    done = python("-m", "peftbench", "metods", path=path, WITNESS=str(seen))
    assert (done.returncode, done.stdout) == (2, "last words\n")
    assert done.stderr.startswith("peftbench: metods: no such command")
    assert "taken apart" not in done.stderr


@pytest.mark.parametrize("within", [["cProfile", "-o", "profile"], ["trace", "--count", "-C", "counts", "--module"]])
def test_who_runs_the_program_goes_on_after_it(within, witness):
    path, seen = witness
    module = ["-m", "peftbench"] if within[0] == "cProfile" else ["peftbench"]
    done = python("-m", *within, *module, "metods", path=path, WITNESS=str(seen))
    assert "no such command" in done.stderr
    assert "taken apart" in done.stderr
    assert (path / "profile").exists() or list((path / "counts").iterdir())


@pytest.mark.parametrize("variable", ["CUDA_INJECTION64_PATH", "PYTHONINSPECT"])
def test_what_is_put_into_the_process_sees_its_end(variable, witness):
    path, seen = witness
    done = python("-m", "peftbench", "metods", path=path, WITNESS=str(seen), **{variable: "1"})
    assert "taken apart" in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_told(witness):
    path, _ = witness
    with open("/dev/full", "w") as full:
        done = python("-m", "peftbench", "methods", "--json", path=path, stdout=full.fileno())
    assert done.returncode == 1
    assert done.stderr == "peftbench: No space left on device: the output could not be written\n"


@pytest.mark.parametrize("listing", [["tasks"], ["methods", "--json"]], ids=["at the end", "on the way"])
def test_a_reader_that_has_gone_is_noticed_as_python_does(listing, witness):
    path, _ = witness
    ours, theirs = os.pipe()
    os.close(ours)
    plainly = f"import sys; from peftbench.__main__ import main; sys.exit(main({listing}))"
    done = python("-m", "peftbench", *listing, path=path, stdout=theirs)
    plain = python("-c", plainly, path=path, stdout=theirs)
    os.close(theirs)
    assert (done.returncode, done.stderr) == (plain.returncode, plain.stderr)


# The thread that gets the GPU ready.


def test_without_a_gpu_its_thread_does_nothing(monkeypatch):
    def fail(*arguments, **settings):
        raise AssertionError("no GPU is to be touched")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    monkeypatch.setattr(torch, "ones", fail)
    thread = environment.begin_gpu()
    thread.join(60)
    assert not thread.is_alive()


@pytest.mark.parametrize("broken", ["", "products", "triton", "key"])
def test_a_gpu_is_got_ready_and_no_random_number_is_drawn(broken, monkeypatch, recwarn):
    told, raised, ones = [], [], torch.ones

    def product(name, take):
        def tell(a, b):
            told.append((name, a.dtype))
            if broken == "products":
                raise RuntimeError("CUDA error: out of memory")
            return take(a, b)

        return tell

    cache = types.ModuleType("triton.runtime.cache")
    if broken != "key":
        cache.triton_key = lambda: told.append("key")  # type: ignore[attr-defined]
    parts = {"triton": types.ModuleType("triton"), "triton.runtime": types.ModuleType("triton.runtime")}
    for name, module in ({} if broken == "triton" else {**parts, "triton.runtime.cache": cache}).items():
        monkeypatch.setitem(sys.modules, name, module)
    if broken == "triton":
        monkeypatch.setitem(sys.modules, "triton", None)
        monkeypatch.setitem(sys.modules, "triton.runtime", None)
        monkeypatch.setitem(sys.modules, "triton.runtime.cache", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch, "ones", lambda *shape, device, dtype: ones(*shape, dtype=dtype))
    monkeypatch.setattr(torch, "mm", product("mm", torch.mm))
    monkeypatch.setattr(torch, "bmm", product("bmm", torch.bmm))
    monkeypatch.setattr("threading.excepthook", lambda arguments: raised.append(arguments.exc_value))
    state = torch.get_rng_state()
    environment.begin_gpu().join(60)
    assert torch.equal(torch.get_rng_state(), state)
    products = [(name, dtype) for dtype in (torch.bfloat16, torch.float32) for name in ("mm", "bmm")]
    assert told == {"products": products[:1], "": [*products, "key"]}.get(broken, products)
    assert not raised
