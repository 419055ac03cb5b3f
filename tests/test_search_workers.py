"""Several processes on one study: nothing is lost and nothing done twice, whatever keeps the study and whoever dies."""

import importlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from pathlib import Path

import optuna
import pytest
import torch
from optuna.trial import TrialState

from peftbench.__main__ import main
from peftbench.search.settings import SearchConfig
from peftbench.search.space import Axis
from peftbench.search.storage import _with_driver, described, open_storage
from peftbench.search.studies import BEAT, MOST_RETRIES, RETRIES, WORKER, About, Study
from peftbench.store import Store, this_process

ROOT = Path(__file__).resolve().parent.parent
AXES = (Axis("train.learning_rate", 1e-4, 1e-2, log=True), Axis("method.rank", 2, 32, log=True))
TINY = [
    *("model=tiny-bert", "task=tiny", "train.steps=40", "train.batch_size=8", "method=lora,ia3", "device=cpu"),
    *("search.space=small", "search.batch=2", "search.heartbeat=2", "results=out", "--quiet"),
]


def opened(folder, storage="sqlite", trials=4, exclusive=True, **settings):
    """Return a study as a process of its own would see it."""
    about = About("s", "lora", "m", "t", "accuracy", True, AXES, {"seed": 0})
    config = SearchConfig(trials=trials, storage=storage, **settings)
    return Study(about, config, open_storage(storage, folder), exclusive)


def gone(study, trial, **changes):
    """Let a trial's worker be another process."""
    owner = {**this_process(), "pid": 2**22 + 5, "token": "other", **changes}
    study.storage.set_trial_system_attr(trial._trial_id, WORKER, owner)


@pytest.fixture(params=["sqlite", "journal"])
def storage(request):
    return request.param


def test_no_more_trials_are_asked_for_than_there_should_be(tmp_path, storage):
    first, second = opened(tmp_path, storage), opened(tmp_path, storage)
    asked = [*first.ask(3), *second.ask(3)]
    assert [t.number for t in asked] == [0, 1, 2, 3]
    assert first.left() == second.left() == 0
    assert not first.done
    for study, trial in zip([first, first, first, second], asked, strict=True):
        study.tell(trial, TrialState.COMPLETE, [0.5], {"status": "completed"})
    assert first.done
    assert second.done


def test_a_trial_of_a_process_that_ended_is_trained_again_with_its_parameters(tmp_path, storage):
    dead, living = opened(tmp_path, storage), opened(tmp_path, storage)
    lost, told = dead.ask(2)
    dead.tell(told, TrialState.COMPLETE, [0.5], {"status": "completed"})
    gone(dead, lost)
    assert living.reap() == 1
    assert living.reap() == 0
    asked = living.ask(10)
    assert len(asked) == 3  # the lost one's stand-in, and two more
    assert asked[0].params == lost.params
    states = Counter((t.state.name, t.user_attrs.get("status")) for t in living.trials())
    assert states == {("FAIL", "lost"): 1, ("COMPLETE", "completed"): 1, ("RUNNING", None): 3}
    # what the lost one's process would still have to say, had it only been taken for dead
    dead.tell(lost, TrialState.COMPLETE, [0.9], {"status": "completed"})
    assert living.trials()[lost.number].state == TrialState.FAIL
    for trial in asked:
        living.tell(trial, TrialState.COMPLETE, [0.5], {"status": "completed"})
    assert living.done


@pytest.mark.parametrize("sampler", ["tpe", "grid", "random"])
def test_a_search_whose_process_ended_goes_on_with_the_trials_it_would_have_had(tmp_path, sampler):
    asked = []
    for name, ends in (("whole", False), ("ended", True)):
        study = opened(tmp_path / name, trials=7, sampler=sampler)
        batch = study.ask(3)
        if ends:
            study.tell(batch[1], TrialState.COMPLETE, [0.1], {"status": "completed"})
            for trial in (batch[0], batch[2]):
                gone(study, trial)
            study.reap()
            batch = [*study.ask(2), batch[1]]
        for trial in batch:
            study.tell(trial, TrialState.COMPLETE, [0.1], {"status": "completed"})
        asked.append([t.params for t in study.ask(4)])
    assert asked[0] == asked[1]
    assert len(asked[0]) == 4


def test_a_trial_that_ends_every_process_fails_for_good(tmp_path):
    study = opened(tmp_path, trials=1)
    for retry in range(MOST_RETRIES + 1):
        assert not study.done
        (trial,) = study.ask(1)
        assert study.trials()[trial.number].system_attrs.get(RETRIES, 0) == retry
        gone(study, trial)
        study.reap()
    last = study.trials()[-1]
    assert (last.state, last.user_attrs["status"]) == (TrialState.FAIL, "failed")
    assert "ended, 4 times" in last.user_attrs["error"]
    assert study.done


def test_living_workers_keep_their_trials_and_this_process_those_of_its_present_search(tmp_path):
    study = opened(tmp_path, trials=3)
    mine, neighbours, before = study.ask(3)
    gone(study, neighbours, pid=os.getppid(), started=None)
    gone(study, before, pid=os.getpid())  # of an earlier search of this very process
    assert study.reap() == 1
    states = [t.state for t in study.trials()]
    assert [states[t.number] for t in (mine, neighbours, before)] == [TrialState.RUNNING] * 2 + [TrialState.FAIL]


def test_a_trial_whose_process_ended_while_it_asked_is_taken_under_the_lock(tmp_path):
    study = opened(tmp_path, trials=1)
    study.optuna.ask()
    assert study.reap() == 1


def test_a_worker_elsewhere_is_gone_when_it_gives_no_sign_for_three_heartbeats(tmp_path, monkeypatch):
    study = opened(tmp_path, exclusive=False, heartbeat=10.0)
    silent, lively = study.ask(2)
    for trial in (silent, lively):
        gone(study, trial, host="elsewhere")
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    found = []
    for beat in range(5):
        study.storage.set_trial_system_attr(lively._trial_id, BEAT, beat)
        found.append(study.reap())
        now[0] += 10.1
    assert found == [0, 0, 0, 1, 0]
    assert study.trials()[lively.number].state == TrialState.RUNNING


def test_two_machines_that_ask_at_once_take_no_more_than_there_should_be(tmp_path, monkeypatch):
    first, second = opened(tmp_path, trials=1, exclusive=False), opened(tmp_path, trials=1, exclusive=False)
    monkeypatch.setattr(second, "left", lambda: 1)  # what it saw before the other asked
    assert len(first.ask(1)) == 1
    assert second.ask(1) == []
    assert first.left() == 0


def test_a_process_that_nobody_waited_for_is_gone(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    time.sleep(0.1)
    deadline = time.monotonic() + 20
    owner = {**this_process(), "pid": child.pid, "started": None}
    from peftbench.store import alive

    while alive(owner) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(owner)  # a zombie: it takes a pid, and works no more
    child.wait()


def test_where_studies_are_is_said_without_a_password(tmp_path):
    assert described("postgresql://me:secret@host/db", tmp_path) == "postgresql://me:***@host/db"
    assert described("sqlite", tmp_path) == f"sqlite:///{tmp_path}/search/study.db"
    assert _with_driver("postgresql+pg8000://host/db") == "postgresql+pg8000://host/db"


# Processes.


class Worker:
    """A process that runs `main` of `module` with a search's arguments in `cwd`, all modules loaded beforehand."""

    CONTEXT = multiprocessing.get_context("forkserver")
    LOADED = ("peftbench.__main__", "peftbench.search.__main__", "peftbench.analysis.search_report", "peftbench.run")

    def __init__(self, cwd, module, *arguments):
        self.CONTEXT.set_forkserver_preload(list(self.LOADED))
        self.log = cwd / f"{uuid.uuid4().hex}.log"
        self.process = self.CONTEXT.Process(target=_work, args=(str(cwd), str(self.log), module, arguments))
        self.process.start()

    def wait(self):
        """Return the exit code, and what the process said."""
        self.process.join(240)
        return self.process.exitcode, self.log.read_text() if self.log.exists() else ""


def _work(cwd, log, module, arguments):
    os.chdir(cwd)
    said = os.open(log, os.O_CREAT | os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(said, stream)
    torch.set_num_threads(1)
    command = ["search"] if module == "peftbench.__main__" else []
    sys.exit(importlib.import_module(module).main([*command, *TINY, *arguments]))


def four_workers_one_of_which_is_killed(cwd, storage, module="peftbench.search.__main__", trials=10):
    """Start four workers, kill one while it trains, and hold the study to having each trial once."""
    given = [f"search.storage={storage}", f"search.trials={trials}"]
    workers = [Worker(cwd, module, *given) for _ in range(4)]
    try:
        store, deadline = Store(cwd / "out" / "search"), time.monotonic() + 240
        victim = None
        while victim is None:
            assert time.monotonic() < deadline, "no worker began to train"
            locks = [p.stem for p in (store.folder / "locks").glob("*.lock")]
            owners = {o["pid"] for lock in locks if (o := store.claimed(lock))}
            victim = next((w for w in workers if w.process.pid in owners), None)
            time.sleep(0.01)
        victim.process.kill()
        ended = [worker.wait() for worker in workers]
    finally:
        for worker in workers:
            worker.process.kill()
    assert sorted(code for code, _ in ended) == [-signal.SIGKILL, 0, 0, 0], ended
    kept = {p.stem for p in (store.folder / "runs").glob("*.json")}
    lost = 0
    told = set()
    for method in ("lora", "ia3"):
        study = optuna.load_study(study_name=f"search-{method}-tiny-bert-tiny",
                                  storage=open_storage(storage, store.folder))  # fmt: skip
        states = Counter((t.state.name, t.user_attrs["status"]) for t in study.trials)
        lost += states.pop(("FAIL", "lost"), 0)
        assert states == {("COMPLETE", "completed"): trials}
        ids = [t.user_attrs["run_id"] for t in study.trials if t.state == TrialState.COMPLETE]
        assert len(set(ids)) == trials
        told |= set(ids)
    assert lost >= 1
    assert told == kept
    assert not list((store.folder / "locks").glob("*.lock"))


@pytest.mark.parametrize(
    ("storage", "module"), [("sqlite", "peftbench.__main__"), ("journal", "peftbench.search.__main__")]
)
def test_four_workers_lose_nothing_when_one_is_killed(tmp_path, storage, module):
    """The same command four times, which ends with a report; and the processes that `search.workers` starts."""
    four_workers_one_of_which_is_killed(tmp_path, storage, module)


def test_workers_of_one_command_share_its_trials(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert main(["search", *TINY, "search.workers=2", "search.trials=4", "train.steps=2"]) == 0
    study = optuna.load_study(study_name="search-lora-tiny-bert-tiny",
                              storage=f"sqlite:///{tmp_path}/out/search/search/study.db")  # fmt: skip
    assert Counter(t.state.name for t in study.trials) == {"COMPLETE": 4}
    assert capfd.readouterr().out.count("best of ") == 2


def test_workers_that_share_a_database_alone_share_its_trials(tmp_path):
    """Each has a results folder of its own, as on machines of their own, and both find the database new."""
    url = f"sqlite:///{tmp_path}/shared.db"
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
    given = [f"search.storage={url}", "search.trials=5", "method=lora", "train.steps=10"]
    for worker in [Worker(folder, "peftbench.search.__main__", *given) for folder in folders]:
        code, said = worker.wait()
        assert code == 0, said
    study = optuna.load_study(study_name="search-lora-tiny-bert-tiny", storage=url)
    done = [t for t in study.trials if t.user_attrs["status"] != "lost"]  # both may have asked for the last one
    assert [t.state.name for t in done] == ["COMPLETE"] * 5
    kept = {p.stem for folder in folders for p in (folder / "out" / "search" / "runs").glob("*.json")}
    assert {t.user_attrs["run_id"] for t in done} == kept


# PostgreSQL.


def _server():
    """Return the folder of PostgreSQL's programs, or None."""
    found = shutil.which("initdb")
    places = [Path(found).resolve().parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return next((p for p in reversed(places) if (p / "initdb").exists()), None)


def _driver():
    return any(__import__("importlib.util").util.find_spec(name) for name in ("psycopg", "psycopg2"))


@pytest.fixture
def postgres():
    """The URL of a server that is this test's own."""
    programs = _server()
    if programs is None:
        pytest.skip("no PostgreSQL server on this machine (initdb was not found)")
    if not _driver():
        pytest.skip("no driver for PostgreSQL is installed (pip install 'peftbench[postgres]')")
    user = {}
    if os.getuid() == 0:  # the server refuses to run as root
        import pwd

        names = [p.pw_name for p in pwd.getpwall() if p.pw_name in ("postgres", "nobody")]
        if not names:
            pytest.skip("PostgreSQL does not run as root, and there is no user postgres or nobody")
        user = {"user": sorted(names, reverse=True)[0]}
    folder = Path(tempfile.mkdtemp(prefix="pg", dir="/tmp"))
    if user:
        shutil.chown(folder, user["user"])
    data = folder / "data"
    quiet = {"stdout": subprocess.DEVNULL, "cwd": "/tmp", **user}
    subprocess.run([programs / "initdb", "-D", data, "-U", "me", "-A", "trust", "--no-sync"], check=True, **quiet)
    options = f"-k {folder} -c listen_addresses='' -c fsync=off"
    control = [programs / "pg_ctl", "-D", data, "-l", folder / "log", "-w", "-o", options]
    subprocess.run([*control, "start"], check=True, **quiet)
    try:
        yield f"postgresql://me@/postgres?host={folder}"
    finally:
        subprocess.run([*control, "-m", "immediate", "stop"], check=False, **quiet)
        shutil.rmtree(folder, ignore_errors=True)


def test_four_workers_on_postgresql_lose_nothing_when_one_is_killed(tmp_path, postgres):
    four_workers_one_of_which_is_killed(tmp_path, postgres)
