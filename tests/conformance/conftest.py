"""What every method is tested on: a tiny random model of each family, and small random batches."""

from __future__ import annotations

import functools

import pytest
import torch

from peftbench import registry
from peftbench.config import ModelConfig, build
from peftbench.errors import UserError
from peftbench.methods.adapter import named_method
from peftbench.methods.base import Method
from peftbench.models import roles
from peftbench.models.load import load
from peftbench.verify.bench import stirred

FAMILIES = [name for name in registry.options("model") if name.startswith("tiny-")]
METHODS = list(registry.options("method"))
TOKENS = 9


@functools.cache
def config(family: str) -> ModelConfig:
    """Return the tiny model's configuration."""
    return build(ModelConfig, registry.section("model", family), "model")


def fresh(family: str, dtype: torch.dtype = torch.float32, formulation: str = "head") -> torch.nn.Module:
    """Return a newly built model, the same every time, whose biases and norms hide nothing."""
    return stirred(load(config(family), formulation, dtype).model)


def small(method: str, **changes: object) -> Method:
    """Return a method with sizes that suit tiny models: every whole-number setting at most 4, no dropout."""
    given = named_method(method, {}).settings()
    settings = {k: min(v, 4) for k, v in given.items() if type(v) is int}
    settings |= {"dropout": 0.0} if "dropout" in given else {}
    return named_method(method, {**settings, **changes})


def fits(method: Method, model: torch.nn.Module) -> None:
    """Skip the test where method and model do not go together, as the method itself declares by refusing."""
    try:
        method.check(model)
    except UserError as error:
        pytest.skip(f"declared: {error}")


def runs_share(method: Method, family: str) -> bool:
    """Tell whether several runs of `method` can share a pass through models of `family`."""
    return method.traits.packable and roles.packable(config(family).family)


def batch(rows: int, seed: int = 0, tokens: int = TOKENS) -> dict[str, torch.Tensor]:
    """Return random ids with the last row padded on the right."""
    ids = torch.randint(10, 60, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[-1, tokens - 3 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def hidden(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return hidden states at real tokens [n, D] in fp32."""
    out = model(**inputs).last_hidden_state
    return out[inputs["attention_mask"].bool()].float()


def disturb(adapter: object, seed: int = 5) -> None:
    """Move every trained parameter a little, run by run, padding left alone."""
    for _, delta in adapter.parts:  # type: ignore[attr-defined]
        for run in range(delta.runs):
            for name, view in delta.run_state(run).items():
                g = torch.Generator().manual_seed(seed + 31 * run + len(name))
                with torch.no_grad():
                    view.add_(0.2 * torch.randn(view.shape, generator=g))
