"""HF PEFT as the reference: weights go over through the method's own `PeftFormat`, everything else is PEFT's.

PEFT is imported when a check runs; nothing of it takes part in training here.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.metadata
import logging
import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftbench.errors import UserError
from peftbench.methods.peft_format import PREFIX, PeftFormat, task_type
from peftbench.verify import STEPS, Parity
from peftbench.verify.bench import (
    LEARNING_RATE,
    Batch,
    Ours,
    batches,
    chosen,
    dense_twin,
    fresh,
    largest,
    loss,
    outputs,
    ratio,
    relative,
    same_names,
    weights,
)

SETTINGS: dict[str, dict[str, Any]] = {"boft": {"factors": 1}}
"""Settings under which PEFT holds a method that it does not hold by default: on a CPU its BOFT has one factor alone."""


def version() -> str:
    """Return the reference's name and version.

    Raises:
        UserError: it is not installed.
    """
    try:
        return f"peft {importlib.metadata.version('peft')}"
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError("verify: HF PEFT is not installed (pip install 'peftbench[test]')") from error


class Theirs:
    """PEFT's side on its own copy of the model."""

    def __init__(self, ours: Ours, model_name: str) -> None:
        # PEFT imports bitsandbytes, which warns on a CPU of an optional kernel that nothing here calls.
        logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
        import peft

        form = ours.method.peft
        assert form is not None
        self.form: PeftFormat = form
        self.sites = ours.method.sites(ours.model)
        self.method = ours.method
        base = dense_twin(model_name, ours.model)
        config = form.config(ours.method, base, ours.method.sites(base)) | form.training(ours.method, STEPS)
        config["task_type"] = task_type(base)
        kinds: Any = peft.PEFT_TYPE_TO_CONFIG_MAPPING  # type: ignore[attr-defined]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = kinds[form.peft_type](**{k: v for k, v in config.items() if k != "peft_type"})
            self.model: Any = peft.get_peft_model(base, made)
        self.model.eval()
        self.fill(form.parameters(ours.method, self.sites, ours.state()))
        # What is random and frozen here is frozen there, though PEFT may train it.
        drawn = form.parameters(ours.method, self.sites, ours.adapter._drawn(0))
        for name, parameter in self.named().items():
            if name in drawn:
                parameter.requires_grad_(False)

    def named(self) -> dict[str, nn.Parameter]:
        """Return PEFT's trained parameters by the names that the format uses."""
        found = {n.replace(".default", ""): p for n, p in self.model.named_parameters() if p.requires_grad}
        return {n: p for n, p in found.items() if not n.endswith("ranknum")}

    @torch.no_grad()
    def fill(self, tensors: dict[str, Tensor]) -> None:
        """Copy the tensors in; every one has its place and every trained parameter its tensor."""
        # Buffers that modules share go by every name they have.
        buffers = self.model.named_buffers(remove_duplicate=False)
        own = {n.replace(".default", ""): t for n, t in [*self.model.named_parameters(), *buffers]}
        for name, tensor in tensors.items():
            if name not in own:
                raise UserError(f"PEFT has no tensor {name!r}")
            if own[name].shape != tensor.shape:
                raise UserError(f"{name}: shape {tuple(tensor.shape)} here, {tuple(own[name].shape)} in PEFT")
            own[name].copy_(tensor)
        missing = sorted(set(self.named()) - set(tensors))
        if missing:
            raise UserError(f"PEFT trains {missing[0]!r}, which has no counterpart here")

    def outputs(self, batch: Batch, model: Any = None) -> Tensor:
        """Return the outputs on a batch."""
        return outputs((model or self.model)(**self.inputs(batch)), batch)

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """Return what PEFT's forward is given."""
        extra = {}
        if self.form.peft_type == "MULTITASK_PROMPT_TUNING":
            extra["task_ids"] = torch.zeros(len(batch.inputs["input_ids"]), dtype=torch.long)
        return {**batch.inputs, **extra}

    def gradients(self, batch: Batch) -> dict[str, Tensor]:
        """Return the gradient of every trained parameter."""
        loss(self.outputs(batch), batch).backward()  # type: ignore[no-untyped-call]
        found = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in self.named().items()}
        self.model.zero_grad()
        return found

    def optimizer(self) -> torch.optim.Optimizer:
        """Return AdamW as a user of PEFT would have it for this method."""
        ratio_b = float(getattr(self.method, "b_rate_ratio", 1.0))
        if ratio_b != 1.0:
            from peft.optimizers import create_loraplus_optimizer

            made: Any = create_loraplus_optimizer(
                self.model,
                torch.optim.AdamW,
                lr=LEARNING_RATE,
                loraplus_lr_ratio=ratio_b,
                loraplus_weight_decay=0.0,
                weight_decay=0.0,
            )
            return cast(torch.optim.Optimizer, made)
        return torch.optim.AdamW(self.named().values(), lr=LEARNING_RATE, weight_decay=0.0)

    def trace(self, data: list[Batch], steps: int) -> list[float]:
        """Train and return the losses, with whatever PEFT itself adds to a model's loss."""
        optimizer = self.optimizer()
        tuner = self.model.base_model
        inner: Any = self.model.get_base_model()
        forward: Callable[..., Any] = inner.forward
        current: list[Batch] = []

        def with_loss(*args: Any, **kwargs: Any) -> Any:
            result = forward(*args, **kwargs)
            result.loss = loss(outputs(result, current[-1]), current[-1])
            return result

        inner.forward = with_loss
        losses = []
        for step in range(steps):
            current.append(data[step % len(data)])
            optimizer.zero_grad()
            value = self.model(**self.inputs(current[-1])).loss
            value.backward()
            optimizer.step()
            if hasattr(tuner, "update_and_allocate"):
                tuner.update_and_allocate(step + 1)
            losses.append(value.item())
        del inner.forward
        return losses

    def merged(self) -> dict[str, Tensor]:
        """Return the weights of the model with the adapter folded in, by the names of the bare model."""
        self.model.merge_adapter()
        found = {}
        for name, p in self.model.named_parameters():
            plain = name.removeprefix(PREFIX).replace(".base_layer", "").replace(".default", "")
            found[plain] = p
        return found


def covers(name: str, model_name: str) -> bool:
    """Tell whether PEFT has the method with these settings on this model."""
    model = fresh(model_name, name)
    method = dataclasses.replace(chosen(name, model, model_name), **SETTINGS.get(name, {}))
    if method.peft is None:
        return False
    try:
        twin = dense_twin(model_name, model)
        method.peft.config(method, twin, method.sites(twin))
    except UserError:
        return False
    return True


def check(name: str, model_name: str) -> Parity:
    """Compare the method `name` with PEFT's on one model.

    Raises:
        UserError: PEFT is missing or has no such method, method and model do not go together, or the tensors differ.
    """
    reference = version()
    ours = Ours.of(name, model_name, **SETTINGS.get(name, {}))
    form = ours.method.peft
    if form is None:
        raise UserError(f"verify: HF PEFT has no {name}")
    theirs = Theirs(ours, model_name)
    data = batches(ours.model)
    extra = form.shared_inputs(ours.method, data[0].inputs)
    with torch.no_grad():
        deviation = largest(ours.outputs(data[0], **extra), theirs.outputs(data[0]))
    counts = ours.adapter.parameter_count(), sum(p.numel() for p in theirs.named().values())
    own, other = ours.gradients(data[0], **extra), theirs.gradients(data[0])
    own = form.parameters(ours.method, theirs.sites, own)
    same_names(own, other)
    merged = None
    if ours.method.traits.mergeable:
        # On copies: PEFT's way back from a merge is not exact, and training follows.
        aside = copy.deepcopy(theirs.model)
        ours.adapter.merge()
        folded = theirs.merged()
        mine = weights(ours.model, fresh(model_name))
        touched = sorted({f"{site.name}.{part}" for site in theirs.sites for part in ("weight", "bias")} & set(mine))
        merged = max(largest(mine[n], folded[n]) for n in touched)
        ours.adapter.unmerge()
        theirs.model = aside
    return Parity(
        method=name,
        reference=reference,
        model=model_name,
        outputs=deviation,
        gradients=relative(own, other),
        trace=ratio(ours.trace(data, STEPS, **extra), theirs.trace(data, STEPS)),
        merged=merged,
        trainable=counts,
        note=form.note,
    )
