"""Whole packs through the Triton kernels, in the interpreter: a run's losses are those it has alone, with dropout."""

from pathlib import Path

import pytest

from peftbench.kernels import adamw, attention, dropout, residual_norm
from peftbench.kernels.backend import interpreted
from tests.conftest import pass_in_interpreter, triton_interprets_loops
from tests.test_run import same_traces, tiny

MODEL = {"model__architecture__num_attention_heads": 2}
"""Heads of 16, the least that the kernel for attention takes."""
ASKED = {
    "attention": (attention, "short_attention"),
    "dropout": (dropout, "_dropped"),
    "residual sum": (residual_norm, "residual_norm"),
    "optimizer": (adamw, "step"),
}


@pytest.mark.skipif(not interpreted(), reason="run by the test below, in the interpreter")
@pytest.mark.parametrize("method", ["lora", "mixed"])
def test_traces_packed_and_alone(method, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls = dict.fromkeys(ASKED, 0)

    def counting(what, real):
        def counted(*given, **more):
            calls[what] += 1
            return real(*given, **more)

        return counted

    from peftbench.models import attention as models_attention

    monkeypatch.setattr(models_attention, "short_attention", counting("attention", models_attention.short_attention))
    for what, (module, name) in ASKED.items():
        if what != "attention":
            monkeypatch.setattr(module, name, counting(what, getattr(module, name)))
    given = {"train__steps": 3, "train__batch_size": 4, "train__dropout": 0.2, **MODEL}
    if method == "lora":
        pack = tiny(method="lora", seed=[0, 1], method__rank=2, **given)
    else:
        pack = [
            spec for i, name in enumerate(("lora", "ia3", "houlsby")) for spec in tiny(method=name, seed=i, **given)
        ]
    same_traces(pack, tmp_path)
    assert all(calls.values()), calls


@pytest.mark.skipif(interpreted(), reason="runs the test above in the interpreter")
@pytest.mark.skipif(not triton_interprets_loops(), reason="needs Triton 3.7, or Triton and NumPy before 2.4")
def test_packs_in_tritons_interpreter():
    pass_in_interpreter(__file__)
