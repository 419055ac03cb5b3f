"""What a run ran on."""

import json

import pytest
import torch

from peftbench import environment
from peftbench.errors import UserError


def test_the_environment_is_plain_and_complete():
    found = environment.describe("cpu")
    assert json.loads(json.dumps(found)) == found
    assert found["versions"]["torch"]
    assert found["cores"] >= 1
    assert found["device_kind"] == "cpu"
    assert found["git_dirty"] is None or found["git_commit"]


def test_a_copy_without_git_can_be_told_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_git", lambda *arguments: None)
    monkeypatch.delenv(environment.COMMIT, raising=False)
    assert environment.describe.__wrapped__("cpu")["git_commit"] is None
    monkeypatch.setenv(environment.COMMIT, "1a2b3c4")
    found = environment.describe.__wrapped__("cpu")
    assert (found["git_commit"], found["git_dirty"]) == ("1a2b3c4", None)


def test_devices_are_picked_or_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert environment.pick_device("auto") == environment.pick_device("cpu") == "cpu"
    with pytest.raises(UserError, match="no GPU is in reach"):
        environment.pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert environment.pick_device("auto") == "cuda"
