"""HF PEFT's adapter folders: `adapter_config.json` and `adapter_model.safetensors`, written and read.

A method that PEFT holds says with a `PeftFormat` how its settings and tensors are called there. Only names, order of
axes and shapes may differ: gradients then translate as the tensors do, which the parity gate relies on. Written from
the documented format; PEFT itself is not needed.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from peftbench.errors import UserError
from peftbench.models.roles import Site

if TYPE_CHECKING:
    from peftbench.methods.base import Method

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""In front of every module's name in PEFT's tensor names."""

Turn = Callable[[Tensor], Tensor]


def same(tensor: Tensor) -> Tensor:
    """Return the tensor as it is."""
    return tensor


def transposed(tensor: Tensor) -> Tensor:
    """Return a matrix with its axes swapped."""
    return tensor.T


class PeftFormat(ABC):
    """How one method reads in PEFT's files."""

    peft_type: ClassVar[str]
    note: ClassVar[str] = ""
    """Differences by decision, for the documentation's table."""

    def matches(self, config: Mapping[str, Any]) -> bool:
        """Tell whether a PEFT configuration is this method's."""
        return config.get("peft_type") == self.peft_type

    @abstractmethod
    def config(self, method: Any, model: nn.Module, sites: Sequence[Site]) -> dict[str, Any]:
        """Return the keys of `adapter_config.json` for this method's settings.

        Raises:
            UserError: PEFT has no such setting.
        """

    @abstractmethod
    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return this method's settings for a PEFT configuration; what is left out takes the class's defaults.

        Raises:
            UserError: the configuration asks for something this method does not do.
        """

    @abstractmethod
    def tensors(self, method: Any, sites: Sequence[Site], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of `adapter_model.safetensors` for an adapter's own (see `Adapter.state_dict`).

        `state` may lack some of them (gradients are translated like tensors, and frozen ones have none).
        """

    @abstractmethod
    def state(self, method: Any, sites: Sequence[Site], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return an adapter's own tensors for PEFT's."""

    def parameters(self, method: Any, sites: Sequence[Site], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors by the names of PEFT's live parameters, without the adapter's name "default"."""
        return self.tensors(method, sites, state)

    def training(self, method: Any, steps: int) -> dict[str, Any]:
        """Return the keys of PEFT's configuration that only training needs, for a run of `steps` steps."""
        return {}

    def shared_inputs(self, method: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return inputs to add on our side so that both compute the same, where they differ by decision."""
        return {}


class SiteFormat(PeftFormat):
    """A method whose tensors sit at modules: `names` maps ours to PEFT's, with the way there and back."""

    names: ClassVar[Mapping[str, tuple[str, Turn, Turn]]]

    def tensors(self, method: Any, sites: Sequence[Site], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        whole_modules(sites)
        return {
            f"{PREFIX}{site.name}.{theirs}": there(state[f"{site.key}.{ours}"])
            for site in sites
            for ours, (theirs, there, _) in self.names.items()
            if f"{site.key}.{ours}" in state
        }

    def state(self, method: Any, sites: Sequence[Site], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            f"{site.key}.{ours}": back(tensors[f"{PREFIX}{site.name}.{theirs}"])
            for site in sites
            for ours, (theirs, _, back) in self.names.items()
            if f"{PREFIX}{site.name}.{theirs}" in tensors
        }


def whole_modules(sites: Sequence[Site]) -> None:
    """Raise UserError if a site is only a part of its module, which PEFT cannot express."""
    part = next((s for s in sites if s.columns is not None), None)
    if part is not None:
        raise UserError(
            f"{part.name} holds {part.role} beside other roles, and PEFT adapts whole modules: "
            "name the module in targets instead of the role"
        )


def target_modules(model: nn.Module, sites: Sequence[Site]) -> list[str]:
    """Return PEFT's `target_modules` for linear sites: last names where those say it all, else full names."""
    whole_modules(sites)
    wanted = {site.name for site in sites}
    last = sorted({name.rpartition(".")[2] for name in wanted})
    kinds = tuple({type(site.module) for site in sites})
    matched = {
        name for name, module in model.named_modules() if name.rpartition(".")[2] in last and isinstance(module, kinds)
    }
    return last if matched == wanted else sorted(wanted)


def fan_in_fan_out(sites: Sequence[Site]) -> bool:
    """Tell whether the modules keep their weight as [in, out], as GPT-2's do."""
    return any(site.transposed for site in sites)


def targets(config: Mapping[str, Any], key: str = "target_modules") -> Any:
    """Return this package's `targets` for PEFT's: a tuple of module names, one pattern, or "all-linear".

    Raises:
        UserError: the configuration narrows them by layer, or leaves them to PEFT's defaults.
    """
    value = config.get(key)
    if config.get("layers_to_transform") is not None or config.get("exclude_modules"):
        raise UserError(f"{CONFIG_FILE}: layers_to_transform and exclude_modules are not read here: name the modules")
    if isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)):
        return tuple(str(v) for v in value)
    raise UserError(f"{CONFIG_FILE}: {key}={value!r}: expected a list of module names or one pattern")


def refuse(config: Mapping[str, Any], **defaults: Any) -> None:
    """Raise UserError if a key of a PEFT configuration has another value than the one that changes nothing."""
    for key, value in defaults.items():
        found = config.get(key, value)
        if found != value and not (not found and not value):
            raise UserError(f"{CONFIG_FILE}: {key}={found!r} is not read here: expected {value!r}")


def task_type(model: nn.Module) -> str:
    """Return PEFT's name for what the model is: how its wrapper feeds and reads it."""
    if getattr(model, "lm_head", None) is None:
        return "FEATURE_EXTRACTION"
    seq2seq = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return "SEQ_2_SEQ_LM" if seq2seq else "CAUSAL_LM"


def export(method: Method, model: nn.Module, state: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return PEFT's configuration and tensors for an adapter of `method` on `model`.

    Raises:
        UserError: PEFT does not hold this method, or not with these settings.
    """
    form = method.peft
    if form is None:
        raise UserError(f"{type(method).__name__} has no counterpart in HF PEFT: save it with format='peftbench'")
    sites = method.sites(model)
    place = getattr(getattr(model, "config", None), "_name_or_path", None)
    config = {
        "peft_type": form.peft_type,
        "task_type": task_type(model),
        "base_model_name_or_path": place or None,
        "inference_mode": True,
        **form.config(method, model, sites),
    }
    return config, form.tensors(method, sites, state)


def read(folder: Path, model: nn.Module) -> tuple[Method, dict[str, Tensor], dict[str, Tensor]]:
    """Return method, tensors, and (by name) parameters of `model` that were trained beside it, of a PEFT folder.

    The last are those of `modules_to_save`, usually a task head.

    Raises:
        UserError: the files are unreadable, no method here is theirs, or the tensors do not fit.
    """
    from peftbench import registry
    from peftbench.config import build

    try:
        config = json.loads((folder / CONFIG_FILE).read_text())
        tensors = load_file(folder / WEIGHTS_FILE)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"{folder}: no readable PEFT adapter ({CONFIG_FILE} and {WEIGHTS_FILE} expected): {error}"
        ) from error
    classes = dict.fromkeys(registry.method_class(name) for name in registry.options("method"))
    cls = next((c for c in classes if c.peft is not None and c.peft.matches(config)), None)
    if cls is None:
        raise UserError(f"{folder}: PEFT's {config.get('peft_type')!r} with these settings has no counterpart here")
    method = build(cls, cls.peft.settings(config), "method")
    sites = method.sites(model)
    beside = {}
    for name, parameter in model.named_parameters():
        if PREFIX + name in tensors and any(m in name.split(".") for m in config.get("modules_to_save") or ()):
            beside[name] = tensors.pop(PREFIX + name)
            if beside[name].shape != parameter.shape:
                found, own = tuple(beside[name].shape), tuple(parameter.shape)
                raise UserError(f"{folder}: {name} has shape {found}, the model's {own}")
    state = cls.peft.state(method, sites, tensors)
    back = cls.peft.tensors(method, sites, state)
    odd = sorted(set(back) ^ set(tensors))
    if odd:
        where = "missing" if odd[0] in back else "neither this method's nor a module of the model in modules_to_save"
        raise UserError(f"{folder}: tensor {odd[0]!r} is {where}")
    return method, state, beside
