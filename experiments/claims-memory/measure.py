"""What do claims on memory, speed and size come to on a GPU, with the real shapes and random weights?

    python experiments/claims-memory/measure.py --list
    python experiments/claims-memory/measure.py qlora-65b pairs merged --out results/claims-memory/measurements.jsonl
    python experiments/claims-memory/measure.py pairs merged --tiny --device cpu --out try.jsonl

A case is one configuration, or one comparison of forward passes; its line is written as soon as it is measured, one
that does not fit included. `card` makes the GPU as small as the card that a claim is about: all but so many bytes of
it are held back beside PyTorch's allocator, CUDA's own share counted in, so that what does not fit fails here as well.
`python -m peftbench reproduce claims` judges the lines.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import functools
import json
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BEGIN = time.perf_counter()

import torch  # noqa: E402

from peftbench import assembly, environment  # noqa: E402
from peftbench.assembly import Setting, backbone_of, free  # noqa: E402
from peftbench.config import ModelConfig, build  # noqa: E402
from peftbench.cost import trial_of  # noqa: E402
from peftbench.errors import UserError  # noqa: E402
from peftbench.methods.adapter import attach  # noqa: E402
from peftbench.models.load import build_meta  # noqa: E402
from peftbench.profiling.memory import memory_of  # noqa: E402
from peftbench.profiling.phases import phases  # noqa: E402
from peftbench.profiling.timing import clock, time_steps  # noqa: E402
from peftbench.record import plain  # noqa: E402
from peftbench.resolve import demand, plan  # noqa: E402
from peftbench.sweep import configure  # noqa: E402

SCHEMA = 1
GIB = 2**30
COMMON = ("task=tiny", "task.formulation=text", "task.size=40", "train.steps=1", "train.precision=bf16")
RANDOM = ("model.weights=random", "model.tokenizer=builtin")
FULL = ("out of memory", "ALLOC_FAILED")
TINY = {"llama": "tiny-llama", "gpt2": "tiny-gpt2"}


def llama(name: str, **shape: Any) -> tuple[str, ...]:
    """Return the settings of a Llama of another shape than the vocabulary has."""
    given = {"model_type": "llama", "num_hidden_layers": 80, "hidden_size": 8192, "num_attention_heads": 64, **shape}
    listed = ", ".join(f"{key}: {value}" for key, value in given.items())
    return ("model=llama-3.1-8b", f"model.name={name}", f"model.architecture={{{listed}}}")


ROPE = "{rope_type: default, rope_theta: 10000.0}"
LLAMA_65B = llama(
    "llama-65b", vocab_size=32000, intermediate_size=22016, num_key_value_heads=64, head_dim=128, rope_parameters=ROPE,
    max_position_embeddings=2048,
)  # fmt: skip
LLAMA_70B = llama(
    "llama-3.1-70b", vocab_size=128256, intermediate_size=28672, num_key_value_heads=8, head_dim=128,
    rope_parameters=ROPE, max_position_embeddings=8192,
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A configuration whose training steps are measured, or (`forward`) whose forward passes are compared.

    Args:
        card: bytes that the card of the claim has; None for the whole GPU.
        steps: timed ones.
    """

    name: str
    group: str
    settings: tuple[str, ...]
    card: int | None = None
    steps: int = 10
    forward: bool = False
    rounds: int = 12


def _cases() -> list[Case]:
    checkpointed = ("train.batch_size=1", "train.max_length=512", "train.checkpointing=true")
    frugal = ("method=qlora", "train.optimizer=paged_adamw", *checkpointed)
    found = [
        Case("qlora-65b", "qlora-65b", (*LLAMA_65B, *frugal, "method.rank=64"), 48 * GIB, steps=3),
        Case("qlora-65b-r16", "qlora-65b-r16", (*LLAMA_65B, *frugal, "method.rank=16"), 48 * GIB, steps=3),
        Case("qlora-70b-24gb", "qlora-70b-24gb", (*LLAMA_70B, *frugal, "method.rank=8"), 24 * GIB, steps=3),
        Case("qlora-70b", "qlora-70b", (*LLAMA_70B, *frugal, "method.rank=8"), None, steps=3),
    ]
    wide = ("method.rank=16", "method.targets=[all]")
    shapes = {
        "gpt2-medium": ("8x512", ("train.batch_size=8", "train.max_length=512"), ("method.rank=4", "method.alpha=32")),
        "llama-3.2-1b": ("4x512", ("train.batch_size=4", "train.max_length=512"), ("method.rank=8",)),
        "llama-3.2-3b": ("1x512-checkpointed", checkpointed, ("method.rank=8",)),
    }
    for model, (shape, recipe, rank) in shapes.items():
        base = (f"model={model}", *recipe)
        found += [
            Case(f"full/{model}/{shape}", "pairs", (*base, "method=full")),
            Case(f"lora/{model}/{shape}", "pairs", (*base, "method=lora", *rank)),
            Case(f"lora-all/{model}/{shape}", "pairs", (*base, "method=lora", *wide)),
        ]
    found.append(
        Case("qlora/llama-3.2-3b/1x512-checkpointed", "pairs", ("model=llama-3.2-3b", "method=qlora", *checkpointed))
    )
    for model, rows, length in (("gpt2-medium", 1, 128), ("llama-3.2-1b", 1, 128), ("llama-3.2-1b", 8, 512)):
        shape = (f"model={model}", f"train.batch_size={rows}", f"train.max_length={length}")
        adapter = ("method=lora", *wide)
        found.append(Case(f"merged/{model}/{rows}x{length}", "merged", (*shape, *adapter), forward=True))
    nf4 = ("model=llama-3.2-1b", "train.batch_size=1", "train.max_length=128", "method=qlora")
    found.append(Case("merged-nf4/llama-3.2-1b/1x128", "merged", nf4, forward=True))
    return found


CASES = {case.name: case for case in _cases()}


def tiny(case: Case) -> Case:
    """Return the case on the tiny model of its family, short, in fp32: to see that everything runs."""
    model = TINY["gpt2" if "gpt2" in case.name else "llama"]
    kept = [
        s for s in case.settings if not s.startswith(("model", "train.max_length", "train.optimizer", "method.rank"))
    ]
    kept += [f"model={model}", "train.max_length=24", "train.precision=fp32"]
    kept += [] if "method=full" in kept else ["method.rank=2"]
    return Case(case.name, case.group, tuple(kept), case.card and GIB // 64, 3, case.forward, 4)


class HeldBack:
    """Bytes of a GPU that nobody can use: taken from the driver, beside PyTorch's allocator."""

    def __init__(self, count: int) -> None:
        self.count, self._driver, self._pointer = count, ctypes.CDLL("libcuda.so.1"), ctypes.c_uint64()
        code = self._driver.cuMemAlloc_v2(ctypes.byref(self._pointer), ctypes.c_size_t(count))
        if code:
            raise RuntimeError(f"holding back {count} bytes: cuMemAlloc gave error {code}")

    def free(self) -> None:
        self._driver.cuMemFree_v2(self._pointer)


@contextmanager
def card_of(size: int | None, device: torch.device) -> Iterator[int]:
    """Leave a GPU no more than `size` bytes for the context, CUDA's own included; gives how many are held back."""
    if size is None or device.type != "cuda":
        yield 0
        return
    assembly._backbones.clear()  # the base of the last case is no part of this card's memory
    free(device)
    torch.zeros(1, device=device)
    torch.cuda.synchronize(device)
    left, total = torch.cuda.mem_get_info(device)
    used = total - left
    if size >= total:
        raise UserError(f"a card of {size / GIB:.0f} GiB: this GPU has {total / GIB:.1f} GiB")
    held = HeldBack(left - (size - used))
    try:
        yield held.count
    finally:
        held.free()


def header(device: torch.device) -> dict[str, Any]:
    """Return what every line says of its origin."""
    found = environment.describe(device.type)
    versions = {name: environment.version(name) for name in ("torch", "transformers", "triton")}
    return {
        "schema": SCHEMA,
        "comparison": "claims-memory",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "experiments/claims-memory/measure.py", *sys.argv[1:]]),
        "git_commit": found["git_commit"],
        "device": found["device_kind"] if device.type == "cuda" else found["cpu"] or "cpu",
        "device_type": device.type,
        "gpu": found["gpu"],
        "python": found["python"],
        "versions": {name: version for name, version in versions.items() if version},
    }


def weights_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Return the bytes of the model's weights as they are kept, from its shapes alone."""
    model = build_meta(config, "text")
    kept = sum(b.numel() * b.element_size() for b in model.buffers())
    return kept + sum(p.numel() for p in model.parameters()) * dtype.itemsize


def state_bytes(trial: Any, device: torch.device) -> dict[str, int]:
    """Return the bytes of weights, gradients and optimizer state when the optimizer begins its step."""
    found: dict[str, int] = {}

    def enter(phase: str) -> None:
        if phase == "step":
            kept = {name: list(tensors) for name, tensors in trial.persistent().items()}
            own = {"weights": kept["weights"], "gradients": list(trial.gradients()), "optimizer": kept["optimizer"]}
            for name, tensors in own.items():
                storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
                found[name] = sum(storages.values())

    with phases(trial.objective, trial.optimizer, enter):
        trial.by_operations()
    return found


def setting_of(case: Case, device: str) -> Setting:
    """Resolve a case's settings."""
    parsed, config = configure([*COMMON, *RANDOM, *case.settings, "profile=skip", f"device={device}"])
    (spec,) = plan(demand(parsed.grid, config.experiment), config.device).specs
    return Setting.of([spec])


def encoded_of(setting: Setting) -> Any:
    """Return the task's texts as tokens of the setting's model."""
    backbone, spec = backbone_of(setting), setting.specs[0]
    rows = setting.task.splits(spec.protocol)["train"]
    return setting.task.encode(rows, backbone.tokenizer, setting.max_length, backbone.kind)


def train(case: Case, setting: Setting, found: dict[str, Any]) -> None:
    """Measure training steps: time, then memory; `found` has what is known so far, whatever comes."""
    device = setting.device
    found["stage"] = "load"
    encoded = encoded_of(setting)
    found["stage"] = "attach"
    with trial_of(setting, encoded) as trial:
        found |= {
            "loaded_bytes": trial.loaded_bytes,
            "attached_bytes": trial.attached_bytes,
            "total_parameters": trial.total_parameters,
            "adapter_parameters": trial.adapter_parameters,
            "checkpoint_bytes": trial.checkpoint_bytes,
            "stage": "step",
        }
        # paging and a full card make the first steps slow
        timing = time_steps(trial.step, device, min_warmup=2, steps=case.steps, max_seconds=12.0)
        found["step_seconds"] = {
            "p10": timing.percentile(10), "p50": timing.percentile(50), "p90": timing.percentile(90),
            "samples": timing.samples, "warmup_steps": timing.warmup_steps,
        }  # fmt: skip
        found["state_bytes"] = state_bytes(trial, device)
        found["memory"] = memory_of(trial, trial.step, device, trial.by_operations)
    found |= {"stage": None, "outcome": "completed"}


@contextmanager
def attached(setting: Setting, backbone: Any) -> Iterator[Any]:
    """Attach the case's adapter, which is not trained but changes what the model says, as a library's user would."""
    adapter = attach(backbone.model, list(setting.methods), seeds=[0], tokenizer=backbone.tokenizer)
    try:
        for parameter in adapter.packed_parameters():
            parameter.normal_(0.0, 0.02)
        yield adapter
    finally:
        adapter.detach()


@contextmanager
def folded(model: Any, weights: dict[str, torch.Tensor]) -> Iterator[None]:
    """Give the bare model other weights for the context."""
    before = {name: parameter.data for name, parameter in model.named_parameters() if name in weights}
    for name, tensor in weights.items():
        model.get_parameter(name).data = tensor
    try:
        yield
    finally:
        for name, tensor in before.items():
            model.get_parameter(name).data = tensor


@torch.no_grad()
def forward(case: Case, setting: Setting, found: dict[str, Any]) -> None:
    """Time forward passes in turns: the bare base, with the adapter beside it, merged in place, and folded.

    Folded is what somebody loads who was given merged weights: the bare model with them. A quantized base has no place
    for merged weights, so that there is nothing to fold.
    """
    device, rows, backbone = setting.device, setting.train.batch_size, backbone_of(setting)
    model = backbone.model
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, len(backbone.tokenizer), (rows, setting.max_length), generator=generator).to(device)
    allocated = functools.partial(torch.cuda.memory_allocated, device) if device.type == "cuda" else int
    weights: dict[str, torch.Tensor] = {}
    sizes: dict[str, int] = {"base": allocated()}
    with attached(setting, backbone) as adapter:
        bare = {name: parameter.clone() for name, parameter in model.named_parameters()}
        before = allocated()
        adapter.merge()
        sizes["merged"] = sizes["base"] + allocated() - before
        for name, parameter in model.named_parameters():
            if name in bare and not torch.equal(bare[name], parameter):
                weights[name] = parameter.clone()
        del bare
        adapter.unmerge()

    def timed(calls: int) -> float:
        for _ in range(2):
            model(input_ids=ids)
        return clock(lambda: [model(input_ids=ids) for _ in range(calls)], device) / calls

    def turn(calls: int) -> dict[str, float]:
        seconds = {"base": timed(calls)}
        if weights:
            with folded(model, weights):
                seconds["folded"] = timed(calls)
        with attached(setting, backbone) as adapter:
            seconds["beside"] = timed(calls)
            adapter.merge()
            seconds["merged"] = timed(calls)
            adapter.unmerge()
        if weights:
            with folded(model, weights):
                seconds["folded"] = (seconds["folded"] + timed(calls)) / 2
        seconds["base"] = (seconds["base"] + timed(calls)) / 2  # first and last, against drift
        return seconds

    calls = max(3, min(50, int(0.05 / max(turn(3)["base"], 1e-6))))
    turns = [turn(calls) for _ in range(case.rounds)]
    samples = {name: [one[name] for one in turns] for name in turns[0]}
    found |= {"forward_seconds": samples, "calls": calls, "allocated_bytes": sizes, "outcome": "completed"}


def measured(case: Case, device: str) -> dict[str, Any]:
    """Measure a case, whatever comes of it."""
    begin = time.perf_counter()
    setting = setting_of(case, device)
    spec = setting.specs[0]
    found: dict[str, Any] = {
        **header(setting.device),
        "case": case.name,
        "kind": "forward" if case.forward else "step",
        "settings": list(case.settings),
        "model": spec.model["name"],
        "method": spec.method["name"],
        "rank": spec.method.get("rank"),
        "batch": setting.train.batch_size,
        "length": setting.max_length,
        "precision": setting.train.precision,
        "checkpointing": setting.train.checkpointing,
        "optimizer": setting.train.optimizer,
        "weights_bytes": weights_bytes(build(ModelConfig, spec.model, "model"), setting.base_dtype),
        "card_bytes": case.card,
        "outcome": "failed",
        "error": None,
    }
    try:
        with card_of(case.card, setting.device) as held_back:
            found["held_back_bytes"] = held_back
            (forward if case.forward else train)(case, setting, found)
    except RuntimeError as error:
        # libraries beside PyTorch say it in words of their own
        full = isinstance(error, torch.OutOfMemoryError) or any(w in str(error) for w in FULL)
        found |= {
            "outcome": "out_of_memory" if full else "failed",
            "error": f"{type(error).__name__}: {error}".split("\n")[0],
        }
        if setting.device.type == "cuda":
            found["allocated_at_failure"] = torch.cuda.max_memory_allocated(setting.device)
    free(setting.device)
    found["seconds"] = time.perf_counter() - begin
    return found


def line(found: dict[str, Any]) -> str:
    """Return what was measured in a line."""
    told = f"{found['case']:40} {found['outcome']}"
    if found.get("memory"):
        managed = found["memory"].get("managed") or 0
        told += f", peak {found['memory']['peak'] / GIB:.2f} GiB, paged {managed / GIB:.2f}"
        told += f", step {1e3 * found['step_seconds']['p50']:.1f} ms"
    if found.get("forward_seconds"):
        medians = {name: sorted(v)[len(v) // 2] for name, v in found["forward_seconds"].items()}
        told += ", " + ", ".join(f"{name} {1e3 * v:.3f} ms" for name, v in medians.items())
    if found["error"]:
        told += f" at {found.get('stage')}: {found['error'][:90]}"
    return f"{told} ({found['seconds']:.1f} s)"


def chosen(names: Sequence[str]) -> list[Case]:
    """Return the cases that names of cases or groups stand for; all for none. Raises UserError for others."""
    groups = {case.group for case in CASES.values()}
    for name in names:
        if name not in CASES and name not in groups:
            raise UserError(f"{name}: no such case; expected of {', '.join(sorted(groups))}, or one of --list")
    return [c for c in CASES.values() if not names or c.name in names or c.group in names]


def main() -> int:
    """Measure what is asked for; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help="cases or groups; all without")
    parser.add_argument("--out", type=Path, help="file that lines are added to")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds after which no case starts")
    parser.add_argument("--tiny", action="store_true", help="tiny models, to try it anywhere")
    parser.add_argument("--list", action="store_true", help="show the cases and their settings")
    given = parser.parse_args()
    try:
        cases = chosen(given.cases)
        if given.list:
            for case in cases:
                print(f"{case.name}\n    {shlex.join(case.settings)}")
            return 0
        device = environment.pick_device(given.device)
        for case in cases:
            if time.perf_counter() - BEGIN > given.limit:
                print(f"{case.name:40} no time left", flush=True)
                continue
            found = measured(tiny(case) if given.tiny else case, device)
            print(line(found), flush=True)
            if given.out is not None:
                given.out.parent.mkdir(parents=True, exist_ok=True)
                with given.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(plain(found), ensure_ascii=False) + "\n")
    except UserError as error:
        print(f"measure.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
