"""P-tuning: the encoders against PyTorch's own layers and HF PEFT's, dropout, what a PEFT folder holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import peftbench
from peftbench.errors import UserError
from peftbench.methods.prompt import PromptTuning
from peftbench.methods.ptuning import PTuning
from peftbench.verify import bench
from peftbench.verify.peft import Theirs
from tests.conformance.conftest import batch, disturb, fresh, hidden
from tests.methods.prompts import own_states, theirs

METHODS = [
    PTuning(length=4, hidden=6, encoder="lstm", layers=3),
    PTuning(length=4, hidden=6, encoder="lstm", layers=1),
    PTuning(length=1, hidden=1, encoder="lstm", layers=2),
    PTuning(length=4, hidden=6, encoder="mlp"),
]


def by_pytorch(method: PTuning, state: dict[str, torch.Tensor], width: int) -> torch.Tensor:
    """Return the virtual tokens that torch.nn.LSTM and torch.nn.Linear give for an adapter's tensors."""
    x = state["embedding"]
    if method.encoder == "lstm":
        recurrent = torch.nn.LSTM(width, method.hidden, method.layers, bidirectional=True, batch_first=True)
        for layer in range(method.layers):
            for direction, suffix in enumerate(("", "_reverse")):
                for kind, name in (("ih", "input"), ("hh", "recurrent")):
                    weight = getattr(recurrent, f"weight_{kind}_l{layer}{suffix}")
                    bias = getattr(recurrent, f"bias_{kind}_l{layer}{suffix}")
                    weight.data = state[f"{name}_{layer}"][direction].T.contiguous()
                    bias.data = state[f"{name}_bias_{layer}"][direction]
        x = recurrent(x.unsqueeze(0))[0][0]
    count = 2 if method.encoder == "lstm" else 3
    for number in range(count):
        x = torch.nn.functional.linear(x, state[f"weight_{number}"].T, state[f"bias_{number}"])
        x = torch.relu(x) if number < count - 1 else x
    return x


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_the_encoder_is_pytorchs(method: PTuning) -> None:
    adapter = peftbench.attach(fresh("tiny-bert"), method, runs=2, seeds=[4, 5])
    ((_, delta),) = adapter.deltas
    for run in range(2):
        torch.testing.assert_close(delta.prompt()[run], by_pytorch(method, delta.run_state(run), 32))


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_peft_computes_the_same_outputs_and_gradients(method: PTuning) -> None:
    model = bench.fresh("tiny-bert")
    ours = bench.Ours(model, peftbench.attach(model, method), method)
    bench.disturbed(ours.adapter)
    reference, (data,) = Theirs(ours, "tiny-bert"), bench.batches(model, 1)
    assert bench.largest(ours.outputs(data), reference.outputs(data)) < 1e-5
    own = method.peft.parameters(method, method.sites(model), ours.gradients(data))
    other = reference.gradients(data)
    assert set(own) == set(other)
    assert bench.relative(own, other) < 1e-4
    assert ours.adapter.parameter_count() == sum(p.numel() for p in reference.named().values())


def test_starting_values_spread_as_pytorchs_do() -> None:
    torch.manual_seed(0)
    layer = torch.nn.LSTM(32, 64, 2, bidirectional=True)
    adapter = peftbench.attach(fresh("tiny-bert"), PTuning(length=100, hidden=64))
    state = {name.rpartition(".")[2]: t for name, t in adapter.state_dict().items()}
    assert state["embedding"].std() == pytest.approx(1.0, rel=0.05)
    pairs = [("input_0", "weight_ih_l0"), ("recurrent_1", "weight_hh_l1"), ("input_bias_0", "bias_ih_l0")]
    for ours, torchs in pairs:
        assert state[ours].std() == pytest.approx(float(getattr(layer, torchs).std()), rel=0.1)
    assert state["weight_1"].std() == pytest.approx(float(torch.nn.Linear(128, 32).weight.std()), rel=0.1)


def test_dropout_acts_between_lstm_layers_in_training_run_by_run() -> None:
    methods = [PTuning(length=8, hidden=8, dropout=rate) for rate in (0.0, 0.5)]
    adapter = peftbench.attach(fresh("tiny-bert"), methods)
    ((_, delta),) = adapter.deltas
    calm = delta.prompt()
    assert torch.equal(delta.prompt(), calm)
    adapter.train()
    assert torch.equal(delta.prompt()[0], calm[0])
    assert not torch.equal(delta.prompt()[1], calm[1])


@pytest.mark.parametrize("method", [METHODS[0], METHODS[3]], ids=str)
@pytest.mark.parametrize("family", ["tiny-bert", "tiny-gpt2"])
def test_a_folder_of_pefts_holds_the_prompt_and_is_read_as_prompt_tuning(
    family: str, method: PTuning, tmp_path: Path
) -> None:
    model, inputs = fresh(family), batch(4)
    adapter = peftbench.attach(model, method)
    disturb(adapter)
    want = hidden(model, inputs)
    path = adapter.save(tmp_path, format="peft")
    assert path.stat().st_size < 4 * 32 * 4 + 4096
    torch.testing.assert_close(own_states(theirs(family, tmp_path), inputs), want, rtol=1e-5, atol=1e-5)
    again = peftbench.load_adapter(fresh(family), tmp_path)
    assert again.methods[0] == PromptTuning(length=4, init="random")
    torch.testing.assert_close(hidden(again.model, inputs), want, rtol=1e-5, atol=1e-5)


def test_settings_out_of_range_are_named() -> None:
    for setting, value in (("encoder", "gru"), ("hidden", 0), ("layers", 0), ("dropout", 1.0), ("length", 0)):
        with pytest.raises(UserError, match=rf"method\.{setting}="):
            PTuning(**{setting: value})
