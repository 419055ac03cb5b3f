"""The parity gate: every method equals its reference, a planted bug is found, kept results are about this code."""

from __future__ import annotations

import dataclasses
import importlib
import json
from typing import Any

import pytest
import torch

from peftbench import registry, verify
from peftbench.__main__ import main
from peftbench.cli import lists
from peftbench.errors import UserError
from peftbench.verify import bench, gate
from peftbench.verify.native import check as native_check

METHODS = list(registry.options("method"))
MODELS = [m for m in bench.MODELS if m.startswith("tiny-")]
"""What the gate finds on the real checkpoint takes minutes: it is kept, and must be about the code as it is."""


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_equals_its_references(method: str, model: str) -> None:
    found = list(gate.checks([method], [model]))
    if not found:
        pytest.skip("declared: method and model do not go together, or no reference covers the model")
    for parity in found:
        assert parity.passed, parity


def test_every_method_is_held_against_something_on_a_model() -> None:
    for method in METHODS:
        assert gate.references(method)


def test_a_planted_bug_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("peftbench.methods.bitfit")
    right = module.BiasDelta.after
    monkeypatch.setattr(module.BiasDelta, "after", lambda self, x, y: right(self, x, y) + 1e-4 * self.bias.unsqueeze(1))
    assert not native_check("bitfit", "tiny-bert").passed


@pytest.mark.parametrize("field", ["outputs", "gradients", "trace", "merged"])
def test_each_tolerance_decides(field: str) -> None:
    fine = verify.Parity("m", "r", "x", 0.0, 0.0, 0.0, 0.0, (3, 3))
    assert fine.passed
    assert not dataclasses.replace(fine, **{field: 2 * verify.TOLERANCES[field]}).passed
    assert not dataclasses.replace(fine, **{field: float("nan")}).passed
    assert not dataclasses.replace(fine, trainable=(3, 4)).passed
    assert not dataclasses.replace(fine, outputs=None).passed


def test_relative_deviation_is_by_tensor() -> None:
    ours = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([0.011])}
    theirs = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([0.010])}
    assert bench.relative(ours, theirs) == pytest.approx(0.1, rel=1e-4)
    with pytest.raises(UserError, match="only here"):
        bench.same_names(ours, {"a": 1})


def test_the_command_prints_and_says_what_differs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "bitfit", "--model", "tiny-bert", "--json"]) == 0
    rows: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    assert rows[0]["passed"]
    assert rows[0]["trainable"][0] == rows[0]["trainable"][1] > 0
    assert main(["verify", "bitfit", "--model", "tiny-bert", "--against", "peft"]) == 2
    assert "it has no bitfit" in capsys.readouterr().err
    assert main(["verify", "bitfitt"]) == 2
    assert "did you mean 'bitfit'" in capsys.readouterr().err
    assert main(["verify", "bitfit", "--against", "pft"]) == 2
    assert "expected one of peft" in capsys.readouterr().err


def test_kept_results_cover_every_method_and_are_about_this_code() -> None:
    kept = verify.results()["methods"]
    assert sorted(kept) == sorted(METHODS), "run python -m peftbench verify --write"
    for method in METHODS:
        found = verify.stamp({"name": method})
        assert found is not None
        assert found["passed"], method
        assert found["current"], f"{method} has changed: run python -m peftbench verify --write"
        assert "minilm-l6" in {c["model"] for c in kept[method]["checks"]}, method
    assert verify.stamp({"name": "unknown"}) is None


def test_the_documentation_s_table_is_up_to_date() -> None:
    file = registry.PACKAGE.parent / "docs" / "methods.md"
    assert file.read_text() == lists.markdown(), "run python -m peftbench methods --markdown > docs/methods.md"


def test_results_that_cannot_be_written_are_one_line_and_nothing_is_lost(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "results.json"
    file.write_text('{"methods": {}}')
    monkeypatch.setattr(gate, "RESULTS", file)
    assert main(["verify", "head", "--write"]) == 0
    before = file.read_text()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gate.os, "replace", full)
    capsys.readouterr()
    assert main(["verify", "head", "--write"]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert file.read_text() == before
    assert list(tmp_path.iterdir()) == [file]
