"""Shared by the tests of prompt methods: HF PEFT reading a folder of ours, and its states at the task's own tokens."""

from __future__ import annotations

import warnings
from pathlib import Path

import peft
import torch

from tests.conformance.conftest import TOKENS, fresh


def theirs(family: str, folder: Path, formulation: str = "head") -> torch.nn.Module:
    """Return a fresh model with the adapter in `folder`, as PEFT reads it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(fresh(family, formulation=formulation), str(folder)).eval()


def own_states(model: torch.nn.Module, inputs: dict[str, torch.Tensor], **more: torch.Tensor) -> torch.Tensor:
    """Return hidden states at real tokens [n, D], virtual tokens in front left out."""
    states = model(**inputs, **more).last_hidden_state
    return states[:, states.shape[1] - TOKENS :][inputs["attention_mask"].bool()]
