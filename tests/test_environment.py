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
    assert (found["git_commit"] is None) == (found["git_dirty"] is None)


def test_devices_are_picked_or_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert environment.pick_device("auto") == environment.pick_device("cpu") == "cpu"
    with pytest.raises(UserError, match="no GPU is in reach"):
        environment.pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert environment.pick_device("auto") == "cuda"
