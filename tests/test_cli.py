"""The commands as a user types them: exit codes, one-line errors, resume, launchers, interruption, the wheel."""

import contextlib
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from peftbench import job, registry, resolve
from peftbench.__main__ import COMMANDS, main
from peftbench.overrides import parse
from peftbench.record import RunSpec
from peftbench.store import Store
from tests.conftest import make_spec

ROOT = Path(__file__).resolve().parent.parent
TINY = ["model=tiny-bert", "task=tiny", "train.steps=3", "train.batch_size=8", "train.dropout=null", "profile=skip"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(job, "_STOPPED", [])
    return tmp_path


def records(folder: Path) -> list[dict]:
    return [json.loads(p.read_text()) for p in sorted((folder / "runs").glob("*.json"))]


def command(*arguments: str, cwd: Path, **environment: str) -> "subprocess.Popen[str]":
    """Start ``python -m peftbench`` as its own process, away from the checkout."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        [sys.executable, "-m", "peftbench", *arguments],
        cwd=cwd,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_an_example(name, capsys):
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert caught.value.code == 0
    assert f"python -m peftbench {name}" in capsys.readouterr().out.split("example", 1)[1]


@pytest.mark.parametrize("group", ["methods", "models", "tasks"])
def test_lists_are_machine_readable(group, capsys):
    assert main([group, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["name"] for row in rows} == set(registry.options(group.removesuffix("s")))
    keys = {
        "methods": {"idea", "settings", "traits"},
        "models": {"kind", "family", "checkpoint", "source"},
        "tasks": {"metric"},
    }
    assert all(keys[group] <= set(row) for row in rows)
    assert main([group]) == 0


def test_doctor_says_what_it_found(capsys):
    assert main(["doctor"]) in (0, 1)
    out = capsys.readouterr().out
    assert "torch" in out
    assert "PEFTBENCH_DATA" in out


BAD = [
    (["method=lora", "model.quantization=nf5"], "model.quantization=nf5: expected one of nf4, "),
    (["method=prompt", "model=tiny-bert", "train.max_length=128"], "with 20 virtual tokens tiny-bert has room for 110"),
    (["method=lorra"], "method=lorra: no such method; did you mean 'lora'?"),
    (["method=lora", "model=tiny-brt"], "did you mean 'tiny-bert'"),
    (["method=lora", "task=movie-review"], "did you mean 'movie-reviews'"),
    (["method=lora", "train=defalt"], "did you mean 'default'"),
    (["method=lora", "method.rnk=2"], "did you mean 'method.rank'"),
    (["method=full,head", "method.rank=2"], "method.rank: not a setting of full, head"),
    (["method=lora", "train.stpes=2"], "did you mean 'steps'"),
    (["method=lora", "task.max_lenth=2"], "did you mean 'max_length'"),
    (["method=lora", "model.poling=mean"], "did you mean 'pooling'"),
    (["method=lora", "sead=1"], "did you mean 'seed'"),
    (["method=lora", "reslts=x"], "did you mean 'results'"),
    (["experiment=defualt"], "did you mean 'default'"),
    (["method=lora", "train.batch_size=abc"], "train.batch_size=abc: expected a whole number"),
    (["method=lora", "method.rank=eight"], "method.rank=eight: expected a whole number"),
    (["method=lora", "method.rank=0"], "method.rank=0: expected"),
    (["method=lora", "method.rank=4,4000"], "method.rank=4000: expected at most"),
    (["method=lora", "method.targets=[attention.qery]"], "attention.qery"),
    (["method=lora", "train.dropout=1.5"], "train.dropout=1.5: expected"),
    (["method=lora", "seed=a"], "seed=a: expected a whole number"),
    (["method=lora", "seed=-1"], "seed=-1: expected"),
    (["method=lora", "train.precision=fp16"], "train.precision=fp16: expected one of fp32, bf16"),
    (["method=lora", "pack=0"], "pack=0: expected"),
    (["method=lora", "sweep.name=a,b"], "cannot be swept"),
    (["method=lora", "seed=range("], "seed=range("),
    (["method=lora", "seed="], "seed=: expected a value"),
    (["method=glob(x*)"], "matches none of"),
    (["method=lora", "hydra/launcher=jobilb"], "did you mean 'joblib'"),
    (["method=lora", "hydra.lancher=1"], "lancher"),
    (["method=lora", "model=no/where", "train.steps=1"], "no/where"),
    (["lora"], "lora: expected key=value"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_bad_input_is_one_line_and_exit_2_and_writes_nothing(arguments, message, here, capsys):
    model = [] if any(a.startswith(("model", "experiment")) for a in arguments) else ["model=tiny-bert"]
    task = [] if any(a.startswith(("task=", "experiment")) for a in arguments) else ["task=tiny"]
    assert main(["sweep", *model, *task, *arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert message in lines[0]
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["swep"], "did you mean 'sweep'"),
        (["report", "results/nothing"], "no such folder"),
        (["run", "seed=0,1"], "use sweep"),
        (["methods", "lora"], "not an argument of methods"),
        (["sweep", "--fast"], "--fast"),
    ],
)
def test_commands_refuse_what_they_do_not_take(arguments, message, here, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_no_gpu_where_one_is_required(here, capsys):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert main(["sweep", *TINY, "method=lora", "device=cuda"]) == 2
    assert "no GPU is in reach" in capsys.readouterr().err


def test_a_sweep_trains_reports_and_resumes(here, capsys):
    arguments = ["sweep", *TINY, "method=full,lora", "method.rank=2,4", "sweep.name=try"]
    assert main(arguments) == 0
    first = capsys.readouterr()
    assert "method.rank is not a setting of full: dropped there" in first.err
    assert "3 runs in 2 packs" in first.err
    found = records(here / "results" / "try")
    assert [r["status"] for r in found] == ["completed"] * 3
    assert sorted(r["spec"]["method"].get("rank", 0) for r in found) == [0, 2, 4]
    assert all(len(r["trace"]["loss"]) == 3 for r in found)
    assert "report:" in first.out
    assert "Pareto plot:" in first.out
    assert sorted(p.name for p in here.iterdir()) == ["results"], "Hydra leaves nothing behind"
    before = {p.name: p.stat().st_mtime_ns for p in (here / "results/try/runs").iterdir()}
    assert main(arguments) == 0
    assert "all 3 runs are in" in capsys.readouterr().err
    assert {p.name: p.stat().st_mtime_ns for p in (here / "results/try/runs").iterdir()} == before
    assert main(["report", "results/try", "--consolidate"]) == 0
    with gzip.open(here / "results/try/records.jsonl.gz") as lines:
        assert len(list(lines)) == 3


def test_run_makes_the_record_that_a_sweep_makes(here, capsys):
    assert main(["run", *TINY, "method=lora", "seed=1", "sweep.name=alone"]) == 0
    assert "record:" in capsys.readouterr().out
    assert main(["sweep", *TINY, "method=lora", "seed=1", "sweep.name=swept", "--quiet"]) == 0
    (alone,), (swept,) = (records(here / "results" / name) for name in ("alone", "swept"))
    assert alone["run_id"] == swept["run_id"]
    assert alone["trace"] == swept["trace"]


def test_a_failed_run_is_a_record_and_the_sweep_goes_on(here, capsys, monkeypatch):
    from peftbench import run

    real = run.run_pack

    def break_lora(specs, store, listener, **options):
        if specs[0].method["name"] == "lora":
            from tests.conftest import make_record

            made = [make_record(s, "failed", error="Boom: it broke") for s in specs]
            for record in made:
                store.write(record)
                listener.record(record)
            return made
        return real(specs, store, listener, **options)

    monkeypatch.setattr(run, "run_pack", break_lora)
    arguments = ["sweep", *TINY, "method=lora,head", "pack=1"]
    assert main(arguments) == 1
    err = capsys.readouterr().err
    assert "1 of 2 runs did not complete (1 failed)" in err
    assert "Boom: it broke" in err
    assert {r["status"] for r in records(here / "results/default")} == {"failed", "completed"}
    monkeypatch.undo()
    os.chdir(here)
    assert main(arguments) == 1, "a failed run stays failed until it is run again"
    assert main([*arguments, "retry_failed=true"]) == 0


def test_a_full_disk_stops_with_one_line(here, capsys, monkeypatch):
    import errno

    from peftbench import store

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store.os, "fsync", full)
    assert main(["sweep", *TINY, "method=lora,head", "--quiet"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "no space left" in line
    assert list((here / "results/default/runs").iterdir()) == []


def test_too_little_space_is_found_before_anything_starts(here, capsys, monkeypatch):
    usage = shutil.disk_usage(here)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert main(["sweep", *TINY, "method=lora"]) == 2
    assert "free some space" in capsys.readouterr().err
    assert list(here.iterdir()) == []


def test_an_unreadable_record_is_named(here, capsys):
    arguments = ["sweep", *TINY, "method=head", "--quiet"]
    assert main(arguments) == 0
    (path,) = (here / "results/default/runs").glob("*.json")
    path.write_text("{")
    assert main(arguments) == 2
    assert str(path) in capsys.readouterr().err
    assert path.read_text() == "{", "left for the user to look at"


def test_joblib_runs_packs_in_other_processes(here, capfd):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    done = command(
        "sweep",
        *TINY,
        "method=lora,head",
        "seed=0,1",
        "pack=1",
        "hydra/launcher=joblib",
        "hydra.launcher.n_jobs=2",
        cwd=here,
    )
    out, err = done.communicate(timeout=300)
    assert done.returncode == 0, err
    found = records(here / "results/default")
    assert [r["status"] for r in found] == ["completed"] * 4
    assert "report:" in out
    assert sorted(p.name for p in here.iterdir()) == ["results"]
    assert main(["sweep", *TINY, "method=lora,head", "seed=0,1"]) == 0, (
        "the same ids with another launcher and pack size"
    )
    assert "all 4 runs are in" in capfd.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_is_one_whatever_a_library_makes_of_it(tmp_path, capsys, number):
    from peftbench.cli import sweep as command

    def work():
        try:
            os.kill(os.getpid(), number)
            time.sleep(5)
        except KeyboardInterrupt:
            raise RuntimeError("broken in the midst of composing") from None

    before = signal.getsignal(number)
    assert command.interruptible(work, lambda: tmp_path) is None
    assert "interrupted: 0 finished runs are kept" in capsys.readouterr().err
    assert signal.getsignal(number) is before
    with pytest.raises(ZeroDivisionError):
        command.interruptible(lambda: 1 // 0, lambda: tmp_path)


def test_interrupted_sweeps_keep_what_is_done_and_go_on(here):
    arguments = ["sweep", *TINY, "method=lora", "seed=range(0,40)", "pack=1", "train.steps=10"]
    process = command(*arguments, cwd=here)
    folder = here / "results/default"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and len(list(folder.glob("runs/*.json"))) < 2:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    kept = len(records(folder))
    assert process.returncode == 130, err
    assert 2 <= kept < 40
    assert f"{kept} finished runs are kept" in err
    assert "Traceback" not in err
    assert not list((folder / "locks").glob("*.lock"))

    process = command(*arguments, cwd=here)
    while time.monotonic() < deadline and len(list(folder.glob("runs/*.json"))) < kept + 2:
        time.sleep(0.02)
    process.kill()
    process.communicate(timeout=60)
    after = records(folder)
    assert len(after) >= kept + 2
    assert all(r["status"] == "completed" for r in after)
    # What was in flight is taken over from the dead process.
    assert main([*arguments[:-2], "seed=range(0,6)", "pack=6", "train.steps=10", "--quiet"]) == 0
    assert not list((folder / "locks").glob("*.lock"))


def test_two_processes_share_one_sweep(here):
    arguments = ["sweep", *TINY, "method=lora,head", "seed=range(0,6)", "pack=1", "train.steps=10"]
    together = [command(*arguments, cwd=here) for _ in range(2)]
    outputs = [process.communicate(timeout=300) for process in together]
    assert [process.returncode for process in together] == [0, 0], outputs
    assert len(records(here / "results/default")) == 12
    finished = [line for _, err in outputs for line in err.splitlines() if line.startswith("  [")]
    assert len(finished) == 12, "no run was trained twice"


def test_a_thousand_points_are_planned_in_seconds(here, monkeypatch):
    arguments = ["sweep", "model=tiny-bert", "task=tiny", "method=lora,houlsby,ia3", "seed=range(0,40)"]
    arguments += ["method.rank=1,2,4,8", "method.bottleneck=8", "train.learning_rate=1e-4,3e-4,1e-3,3e-3,1e-2"]
    start = time.monotonic()
    planned = resolve.plan(resolve.demand(parse(arguments[1:]).grid, None), "cpu")
    packs = planned.packs(planned.specs, 8)
    assert len(planned.specs) == 40 * 5 * (4 + 1 + 1)
    assert sum(map(len, packs)) == len(planned.specs)
    assert time.monotonic() - start < 10


def test_packs_travel_as_text():
    pack = job.Pack([make_spec(seed=s) for s in range(3)], "/tmp/it's a folder", True)
    again = job.Pack.decode(pack.encode())
    assert again == pack
    assert isinstance(again.specs[0], RunSpec)


@pytest.mark.parametrize(
    "argument",
    ["train.dropout=null", "train.dropout=0", "method.targets=[a,b]", "task='a/b'", "method.targets='.*(query|value)'"],
)
def test_a_fixed_value_survives_on_its_way_through_hydra(argument):
    once = parse([argument])
    again = parse(once.lines)
    ((key, values),) = once.grid.items()
    assert again.grid[key][:1] == values
    assert {repr(v) for v in again.grid[key]} == {repr(v) for v in values}


def test_hydra_s_grammar_is_understood():
    parsed = parse(
        ["method=glob(l*)", "seed=range(0,3)", "train.learning_rate=choice(1e-3,1e-2)", "method.targets=[a,b]"]
    )
    assert parsed.grid["seed"] == [0, 1, 2]
    assert parsed.grid["train.learning_rate"] == [1e-3, 1e-2]
    assert parsed.grid["method.targets"] == [["a", "b"]]
    assert "lora" in parsed.grid["method"]
    quoted = parse(["task='movie-reviews/imdb'", "method.targets='.*query'", "train.dropout=null", "results='a b'"])
    assert quoted.grid == {"task": ["movie-reviews/imdb"], "method.targets": [".*query"], "train.dropout": [None]}
    assert quoted.top == {"results": "a b"}


def test_an_experiment_of_one_s_own_runs(here, capsys):
    folder = here / "experiments" / "mine"
    folder.mkdir(parents=True)
    (folder / "experiment.yaml").write_text(
        "common: {model: tiny-bert, task: tiny, train.steps: 2, train.batch_size: 8, profile: skip}\n"
        "grids:\n- method: head\n- method: lora\n  method.rank: [2, 4]\n"
        "per_method:\n  lora: {train.learning_rate: 0.5}\n"
    )
    assert main(["sweep", "experiment=mine", "seed=3", "--quiet"]) == 0
    found = records(here / "results" / "mine")
    assert len(found) == 3
    assert {r["spec"]["seed"] for r in found} == {3}
    assert {r["spec"]["train"]["learning_rate"] for r in found if r["spec"]["method"]["name"] == "lora"} == {0.5}
    (folder / "experiment.yaml").write_text("grid:\n- method: head\n")
    assert main(["sweep", "experiment=mine"]) == 2
    assert "did you mean 'grids'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder holding the package as installed from its wheel, without its dependencies."""
    work = tmp_path_factory.mktemp("wheel")
    source = work / "source"
    ignored = shutil.ignore_patterns(".*", "results", "build", "dist", "*.egg-info", "__pycache__", "tests", "paper")
    shutil.copytree(ROOT, source, ignore=ignored)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(source / "build")
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(work), str(source)],
        check=True,
        capture_output=True,
    )
    (wheel,) = work.glob("*.whl")
    target = work / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(target), str(wheel)], check=True, capture_output=True)
    shutil.rmtree(source)
    return target


def test_the_wheel_holds_the_vocabulary(installed):
    inside = {
        p.relative_to(installed / "peftbench/conf").as_posix() for p in (installed / "peftbench/conf").rglob("*.yaml")
    }
    assert inside == {p.relative_to(ROOT / "conf").as_posix() for p in (ROOT / "conf").rglob("*.yaml")}
    assert (installed / "peftbench/experiments/default/experiment.yaml").is_file()
    assert not (installed / "tests").exists()


@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_the_installed_package_sweeps(installed, tmp_path, launcher):
    listed = command("methods", "--json", cwd=tmp_path, PYTHONPATH=str(installed))
    out, err = listed.communicate(timeout=120)
    assert listed.returncode == 0, err
    assert {row["name"] for row in json.loads(out)} == set(registry.options("method"))
    swept = command(
        "sweep", *TINY, "method=head,lora", f"hydra/launcher={launcher}", cwd=tmp_path, PYTHONPATH=str(installed)
    )
    out, err = swept.communicate(timeout=300)
    assert swept.returncode == 0, err
    assert len(Store(tmp_path / "results/default").records()) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["results"]
