"""Every method that HF PEFT holds writes folders that PEFT reads, and reads them back."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import peftbench
from peftbench import registry
from peftbench.errors import UserError
from peftbench.verify import bench
from tests.conformance.conftest import METHODS

peft: Any = pytest.importorskip("peft")
HELD = [m for m in METHODS if registry.method_class(m).peft is not None]
PLAIN = next(m for m in HELD if registry.method_class(m).peft.peft_type == peft.PeftType.LORA.value)
MODELS = ["tiny-bert", "tiny-gpt2", "tiny-llama"]


def saved(method: str, model_name: str, folder: Any) -> tuple[bench.Ours, Any]:
    """Save a disturbed adapter as PEFT's, with the task type a model of its kind has."""
    try:
        ours = bench.Ours.of(method, model_name)
        ours.adapter.save(folder, format="peft")
    except UserError as error:
        pytest.skip(f"declared: {error}")
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    return ours, config


@pytest.mark.parametrize("model_name", MODELS)
@pytest.mark.parametrize("method", HELD)
def test_peft_reads_what_is_saved_for_it(method: str, model_name: str, tmp_path: Any) -> None:
    ours, config = saved(method, model_name, tmp_path)
    batch = bench.batches(ours.model)[0]
    extra = ours.method.peft.shared_inputs(ours.method, batch.inputs)
    want = ours.outputs(batch, **extra)
    base = bench.dense_twin(model_name, ours.model)
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path)).eval()
    more = {"task_ids": torch.zeros(bench.ROWS, dtype=torch.long)} if "MULTITASK" in config["peft_type"] else {}
    with torch.no_grad():
        assert bench.largest(want, bench.outputs(theirs(**batch.inputs, **more), batch)) < 1e-5


@pytest.mark.parametrize("model_name", MODELS)
@pytest.mark.parametrize("method", HELD)
def test_a_peft_folder_loads_here(method: str, model_name: str, tmp_path: Any) -> None:
    ours, _ = saved(method, model_name, tmp_path)
    batch = bench.batches(ours.model)[0]
    want = ours.outputs(batch)
    model = bench.fresh(model_name, method)
    bare = bench.outputs(model(**batch.inputs), batch)
    adapter = peftbench.load_adapter(model, tmp_path)
    found = bench.outputs(model(**batch.inputs), batch)
    assert bench.largest(found, want) < 1e-5 < bench.largest(found, bare)
    # What came from a folder can be kept in this package's own form.
    adapter.save(tmp_path / "own")
    adapter.detach()
    again = peftbench.load_adapter(model, tmp_path / "own")
    assert bench.largest(bench.outputs(model(**batch.inputs), batch), found) == 0
    again.detach()


def test_a_head_saved_beside_an_adapter_comes_along(tmp_path: Any) -> None:
    """PEFT keeps a classifier in the same file; it is loaded into the model's own, and goes when the adapter goes."""
    from transformers import AutoModelForSequenceClassification

    def classifier() -> Any:
        torch.manual_seed(1)
        return AutoModelForSequenceClassification.from_config(bench.fresh("tiny-bert").config).eval()

    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"], init_lora_weights=False)
    theirs = peft.get_peft_model(classifier(), config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    theirs.save_pretrained(tmp_path)
    model = classifier()
    batch = bench.batches(model)[0]
    with torch.no_grad():
        want, bare = theirs(**batch.inputs).logits, model(**batch.inputs).logits
        adapter = peftbench.load_adapter(model, tmp_path)
        assert bench.largest(model(**batch.inputs).logits, want) < 1e-5
        adapter.detach()
        assert torch.equal(model(**batch.inputs).logits, bare)


def test_what_a_peft_folder_asks_for_and_is_not_here_is_refused(tmp_path: Any) -> None:
    ours, config = saved(PLAIN, "tiny-bert", tmp_path)
    ours.adapter.detach()
    for change, message in (({"peft_type": "XYZ"}, "no counterpart"), ({"bias": "all"}, "bias='all' is not read here")):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=message):
            peftbench.load_adapter(ours.model, tmp_path)
