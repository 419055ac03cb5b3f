"""Whole steps as CUDA graphs: what is refused, what an id says, and (on a GPU) that replays equal eager steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from peftbench import environment, resolve
from peftbench.__main__ import main
from peftbench.errors import UserError
from peftbench.record import profile_id
from tests.conftest import make_spec


def test_eager_execution_leaves_every_id_alone() -> None:
    named, unnamed = make_spec(**{"train.execution": "eager"}), make_spec()
    assert "execution" not in unnamed.train
    assert named.run_id == unnamed.run_id
    assert profile_id(named, ()) == profile_id(unnamed, ())
    seen = {unnamed.run_id, profile_id(unnamed, ())}
    for execution in ("compiled", "graphs"):
        other = make_spec(**{"train.execution": execution})
        seen |= {other.run_id, profile_id(other, ())}
    assert len(seen) == 6


def _resolve(device: str, monkeypatch: pytest.MonkeyPatch, **given: Any) -> None:
    monkeypatch.setattr(environment, "pick_device", lambda wanted: device)
    monkeypatch.setattr(environment, "device_kind", lambda name: "a GPU" if name == "cuda" else name)
    grid = {"model": "tiny-bert", "task": "tiny", "profile": "skip", "method": "lora", "train.execution": "graphs"}
    resolve.plan(resolve.demand({k: [v] for k, v in {**grid, **given}.items()}, None), device)


REFUSED = [
    ({"method": "adalora"}, "method adalora acts after steps"),
    ({"method": "galore"}, "method galore has an optimizer of its own"),
    ({"train.optimizer": "paged_adamw"}, "train.optimizer=paged_adamw moves pages"),
    ({"train.checkpointing": True}, "train.checkpointing=true asks"),
]


@pytest.mark.parametrize(("given", "message"), REFUSED, ids=lambda v: v if isinstance(v, str) else "")
def test_what_cannot_be_captured_is_refused(
    given: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peftbench.engine import paging

    monkeypatch.setattr(paging, "check", lambda *_: None)  # paged memory itself is for another test
    with pytest.raises(UserError) as error:
        _resolve("cuda", monkeypatch, **given)
    assert str(error.value).startswith(f"train.execution=graphs: {message}")
    assert str(error.value).endswith("; expected eager")


@pytest.mark.parametrize("method", ["lora", "full", "prompt"])
def test_everything_else_can_be_asked_for(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _resolve("cuda", monkeypatch, method=method, **{"train.accumulation": 2, "train.optimizer": "adamw8bit"})


BAD = [
    ("train.execution=graphs", "train.execution=graphs: a CUDA graph needs device=cuda, this is cpu; expected eager"),
    ("train.execution=graph", "train.execution=graph: expected one of eager, compiled, graphs; did you mean 'graphs'?"),
]


@pytest.mark.parametrize(("argument", "message"), BAD)
def test_refusals_are_one_line_and_nothing_starts(
    argument: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", "model=tiny-bert", "task=tiny", "device=cpu", "method=lora", argument]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
    assert list(tmp_path.iterdir()) == []
