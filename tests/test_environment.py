"""What a run ran on, and what a sweep shows."""

import io
import json

import pytest
import torch
from rich.console import Console

from peftbench import environment, progress
from peftbench.errors import UserError
from tests.conftest import make_record, make_spec


def test_the_environment_is_plain_and_complete():
    found = environment.describe("cpu")
    assert json.loads(json.dumps(found)) == found
    assert found["versions"]["torch"]
    assert found["cores"] >= 1
    assert found["device_kind"] == "cpu"
    assert (found["git_commit"] is None) == (found["git_dirty"] is None)


def test_devices_are_picked_or_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert environment.pick_device("auto") == environment.pick_device("cpu") == "cpu"
    with pytest.raises(UserError, match="no GPU is in reach"):
        environment.pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert environment.pick_device("auto") == "cuda"


def shown(listener_class, terminal):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120)
    spec, other = make_spec(), make_spec(seed=1)
    with listener_class(1, 2, console) as listener:
        listener.pack([spec, other])
        listener.phase("training")
        listener.steps(5, 10, [0.5, 0.7])
        listener.record(make_record(spec))
        listener.record(make_record(other, "failed", error="Traceback\nBoom: it broke"))
        listener.note("a line")
    return console.file.getvalue()


@pytest.mark.parametrize(("listener_class", "terminal"), [(progress.Lines, False), (progress.Live, True)])
def test_progress_tells_results_and_failures(listener_class, terminal):
    text = shown(listener_class, terminal)
    assert "accuracy 0.7500" in text
    assert "failed: Boom: it broke" in text
    assert "a line" in text


def test_quiet_says_nothing(capsys):
    with progress.display(1, 1, quiet=True) as listener:
        listener.pack([make_spec()])
        listener.record(make_record(make_spec()))
        assert progress.current(1) is listener
    assert capsys.readouterr() == ("", "")
    assert progress.current(1) is not listener
