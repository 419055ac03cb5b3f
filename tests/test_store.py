"""Records are written at once, never edited; claims keep two processes apart."""

import errno
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from peftbench import store as store_module
from peftbench.errors import UserError
from peftbench.store import Store
from tests.conftest import make_record, make_spec


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "sweep")


def test_a_record_comes_back_as_written(store, spec):
    assert not store.has(spec.run_id)
    assert store.write(make_record(spec))
    assert store.has(spec.run_id)
    (record,) = store.records()
    assert record["run_id"] == spec.run_id
    assert record["spec"] == spec.to_dict()
    assert [p.name for p in store.runs.iterdir()] == [f"{spec.run_id}.json"]


@pytest.mark.parametrize("status", ["completed", "diverged"])
def test_a_finished_record_is_never_written_over(store, spec, status):
    store.write(make_record(spec, status))
    before = (store.runs / f"{spec.run_id}.json").read_bytes()
    assert not store.write(make_record(spec, "failed", error="x"))
    assert (store.runs / f"{spec.run_id}.json").read_bytes() == before


@pytest.mark.parametrize("status", ["failed", "out_of_memory"])
def test_a_failed_record_counts_unless_it_is_to_be_tried_again(tmp_path, spec, status):
    Store(tmp_path).write(make_record(spec, status))
    assert Store(tmp_path).has(spec.run_id)
    again = Store(tmp_path, retry_failed=True)
    assert not again.has(spec.run_id)
    assert again.write(make_record(spec))
    assert again.has(spec.run_id)


def test_a_full_disk_is_one_line_and_leaves_nothing(store, spec, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store_module.os, "fsync", full)
    with pytest.raises(UserError, match="no space left on the disk"):
        store.write(make_record(spec))
    assert list(store.runs.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="results=<folder>"):
        Store(tmp_path / "file" / "sweep").prepare()


@pytest.mark.parametrize("content", ["{", "[]", '{"status": "completed"}', "\x00"])
def test_an_unreadable_record_is_named(store, spec, content):
    store.prepare()
    path = store.runs / f"{spec.run_id}.json"
    path.write_text(content)
    for read in (store.records, lambda: store.has(spec.run_id)):
        with pytest.raises(UserError) as caught:
            read()
        assert str(path) in str(caught.value)


def test_profiles_are_kept_once(store):
    assert store.profile("p") is None
    assert store.write_profile("p", {"a": 1})
    assert not store.write_profile("p", {"a": 2})
    assert store.profile("p") == {"a": 1}


def test_consolidated_records_stand_for_the_files(tmp_path):
    store = Store(tmp_path)
    specs = [make_spec(seed=s) for s in range(3)]
    for spec in specs:
        store.write(make_record(spec))
    first = store.consolidate().read_bytes()
    for path in store.runs.iterdir():
        path.unlink()
    fresh = Store(tmp_path)
    assert [r["run_id"] for r in fresh.records()] == sorted(s.run_id for s in specs)
    assert fresh.has(specs[0].run_id)
    assert not fresh.write(make_record(specs[0]))
    assert fresh.consolidate().read_bytes() == first
    (tmp_path / "records.jsonl.gz").write_bytes(first[:-20])
    with pytest.raises(UserError, match=r"records\.jsonl\.gz"):
        Store(tmp_path).records()


def test_slim_records_leave_out_items_and_losses_alone(tmp_path):
    store = Store(tmp_path)
    store.write(make_record(make_spec(seed=0)))
    (whole,) = store.records()
    store.consolidate(slim=True)
    for path in store.runs.iterdir():
        path.unlink()
    (slim,) = Store(tmp_path).records()
    assert slim["trace"] is None
    assert slim["quality"]["items"] == {}
    rest = [{k: v for k, v in r.items() if k not in ("trace", "quality")} for r in (slim, whole)]
    assert rest[0] == rest[1]
    assert {**slim["quality"], "items": 0} == {**whole["quality"], "items": 0}


def test_claims_are_exclusive_and_given_back(store):
    with store.claim(["a", "b"]) as mine:
        assert mine == ["a", "b"]
        with Store(store.folder).claim(["b", "c"]) as other:
            assert other == ["c"]
        assert store.claimed("a")["pid"] == os.getpid()
    assert store.claimed("a") is None
    with store.claim(["a"]) as mine:
        assert mine == ["a"]


def test_what_is_done_is_not_claimed(store, spec):
    store.write(make_record(spec))
    with store.claim([spec.run_id, "x"]) as mine:
        assert mine == ["x"]


def test_the_lock_of_a_dead_process_is_taken_over(store):
    code = f"""
        import os
        from peftbench.store import Store
        with Store({str(store.folder)!r}).claim(["a"]):
            os.kill(os.getpid(), 9)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False, cwd=Path(__file__).parent.parent)
    assert (store.folder / "locks" / "a.lock").exists()
    with store.claim(["a"]) as mine:
        assert mine == ["a"]


def test_the_lock_of_another_host_stays(store):
    (store.folder / "locks").mkdir(parents=True)
    (store.folder / "locks" / "a.lock").write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    with store.claim(["a"]) as mine:
        assert mine == []


def test_processes_on_one_folder_repeat_nothing(store):
    code = f"""
        import time
        from peftbench.store import Store
        for i in range(40):
            with Store({str(store.folder)!r}).claim([f"r{{i}}"]) as mine:
                for run_id in mine:
                    from tests.conftest import make_record, make_spec
                    with open({str(store.folder)!r} + "/log", "a") as log:
                        log.write(run_id + "\\n")
                    record = make_record(make_spec(seed=i)); record.run_id = run_id
                    Store({str(store.folder)!r}).write(record)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    together = [subprocess.Popen(command, cwd=Path(__file__).parent.parent) for _ in range(3)]
    assert [p.wait() for p in together] == [0, 0, 0]
    assert sorted((store.folder / "log").read_text().split()) == sorted(f"r{i}" for i in range(40))
    assert len(store.records()) == 40
