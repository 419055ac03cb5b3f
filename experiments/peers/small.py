"""How long is a step of a small encoder, where launches count and not arithmetic?

    python experiments/peers/small.py --out results/peers/small.jsonl --bars
    python experiments/peers/small.py --contestants hf-lora,ours-lora-graphs --rounds 5 --calls 20
    python experiments/peers/small.py --table results/peers/small.jsonl --bars

MiniLM-L6 with LoRA of rank 8 on query and value and a head of two classes, 32 texts of 128 tokens: HF PEFT as its users
get it, and ours, eager and replayed as CUDA graphs, alone and in packs of 8 and 16 runs. One process, turns A B C … A B
C …, the same base weights and texts. Packs have other texts for every run. See README.md.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import common
import numpy as np
import torch
from common import say
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from peftbench import registry
from peftbench.assembly import Setting, assembled
from peftbench.config import ModelConfig, build
from peftbench.engine.batches import PackedBatch, TokenTable
from peftbench.engine.stepping import stepper
from peftbench.errors import UserError
from peftbench.models.load import Backbone, load
from peftbench.resolve import Demand, plan
from peftbench.tasks.base import Encoded

RATE, RANK, ALPHA, STEPS = 1e-3, 8, 16.0, 100_000
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BARS = (("ours-lora-graphs", "hf-lora", 1.8), ("ours-lora-bf16-graphs", "hf-lora-bf16", 1.8))
"""(contestant, whom with, how many times faster it has to be)."""


@dataclass
class Contestant:
    """One way to make a training step.

    Attributes:
        step: makes a whole step without waiting for the device; returns the loss of the first run, one element.
        trained: how many parameters one run trains.
        runs: how many runs train side by side.
        precision: fp32 or bf16, of the base's products.
        execution: what really ran, once steps were made.
        note: what a reader should know about its settings.
    """

    step: Callable[[], Tensor]
    trained: int
    runs: int
    precision: str
    execution: Callable[[], str]
    note: str


@dataclass
class Arena:
    """What all have in common: the base's weights, in fp32, and the texts' size."""

    base: Backbone
    model: str
    weights: str
    batch: int
    length: int
    dropout: float
    device: torch.device

    def ids(self, runs: int) -> np.ndarray:
        """Return random token ids [runs · batch, length], the first run's the same whatever `runs`."""
        words = self.base.model.config.vocab_size
        return np.random.default_rng(0).integers(0, words, (runs * self.batch, self.length))

    def targets(self, runs: int) -> list[int]:
        """Return a class for each text."""
        return [i % 2 for i in range(runs * self.batch)]


def hf(kind: str) -> Callable[[Arena], Any]:
    """HF PEFT's LoRA: "fp32"; "autocast" to bf16 over fp32 weights; "bf16" weights and adapters."""

    @contextmanager
    def make(arena: Arena) -> Iterator[Contestant]:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        source: Any = arena.base.model
        config = copy.deepcopy(source.config)
        config.num_labels = 2
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = arena.dropout
        plain = AutoModelForSequenceClassification.from_config(config, attn_implementation="sdpa")
        found = getattr(plain, plain.base_model_prefix).load_state_dict(source.state_dict(), strict=False)
        assert all("pooler" in name for name in found.missing_keys), found.missing_keys
        plain = plain.to(arena.device, torch.bfloat16 if kind == "bf16" else torch.float32)
        lora = LoraConfig(
            task_type="SEQ_CLS", r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=["query", "value"]
        )
        model: Any = get_peft_model(plain, lora, autocast_adapter_dtype=kind != "bf16")
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0, fused=True)
        ids = torch.from_numpy(arena.ids(1)).to(arena.device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        labels = torch.tensor(arena.targets(1), device=arena.device)
        model.train()

        def step() -> Tensor:
            cast = torch.autocast(arena.device.type, torch.bfloat16) if kind == "autocast" else nullcontext()
            with cast:
                loss: Tensor = model(**inputs, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.detach()

        precision = "fp32" if kind == "fp32" else "bf16"
        note = {"fp32": "", "autocast": "fp32 weights under autocast", "bf16": "weights and adapters in bf16"}[kind]
        yield Contestant(step, sum(p.numel() for p in trained), 1, precision, lambda: "eager", note)

    return make


def ours(precision: str, execution: str, runs: int = 1) -> Callable[[Arena], Any]:
    """This project's LoRA, set up and stepped as `run` and `sweep` do, `runs` of them side by side."""

    @contextmanager
    def make(arena: Arena) -> Iterator[Contestant]:
        setting = Setting.of(_specs(arena, precision, execution, runs))
        model = copy.deepcopy(arena.base.model).to(setting.base_dtype)
        with assembled(setting, dataclasses.replace(arena.base, model=model)) as assembly:
            encoded = Encoded(arena.ids(runs).tolist(), None, arena.targets(runs), None)
            table = TokenTable(encoded, 0, arena.device)
            batch = PackedBatch(np.arange(len(encoded)).reshape(runs, -1), arena.length, 0)
            assembly.objective.train(True)
            make_step = stepper(
                execution, assembly.objective, assembly.optimizer(STEPS), table, autocast=setting.autocast
            )
            assert assembly.head is not None
            trained = assembly.adapter.parameter_count() + assembly.head.parameter_count()
            note = "base in bf16, adapters in fp32" if precision == "bf16" else ""
            yield Contestant(lambda: make_step(batch)[0], trained, runs, precision, lambda: make_step.execution, note)

    return make


def _specs(arena: Arena, precision: str, execution: str, runs: int) -> list[Any]:
    """Return the resolved runs whose step is timed."""
    values: dict[str, Any] = {
        "model": arena.model,
        "model.weights": arena.weights,
        "method": "lora",
        "method.rank": RANK,
        "method.alpha": ALPHA,
        "method.dropout": 0.0,
        "task": "tiny",
        "train.steps": STEPS,
        "train.batch_size": arena.batch,
        "train.max_length": arena.length,
        "train.precision": precision,
        "train.execution": execution,
        "train.dropout": arena.dropout,
        "train.learning_rate": RATE,
        "train.schedule": "constant",
        "train.warmup": 0.0,
        "train.clip_norm": 0.0,
        "protocol": "held_out",
    }
    whole = {"train": ["default"], "profile": ["default"], **{key: [value] for key, value in values.items()}}
    return plan(Demand([{**whole, "seed": list(range(runs))}]), arena.device.type).specs


BUILDERS: dict[str, Callable[[Arena], Any]] = {
    "hf-lora": hf("fp32"),
    "hf-lora-autocast": hf("autocast"),
    "hf-lora-bf16": hf("bf16"),
    **{
        f"ours-lora{'' if precision == 'fp32' else '-bf16'}{'' if runs == 1 else f'-x{runs}'}"
        f"{'-graphs' if execution == 'graphs' else ''}": ours(precision, execution, runs)
        for runs in (1, 8, 16)
        for precision in DTYPES
        for execution in ("eager", "graphs")
    },
}


@contextmanager
def built(names: Iterable[str], arena: Arena, warmup: int) -> Iterator[tuple[dict[str, Contestant], dict[str, str]]]:
    """Set contestants up and make their first steps; gives those that work, and why the others do not."""
    ready: dict[str, Contestant] = {}
    failed: dict[str, str] = {}
    with ExitStack() as stack:
        for name in names:
            with ExitStack() as own:
                try:
                    contestant = own.enter_context(BUILDERS[name](arena))
                    for _ in range(warmup):
                        contestant.step()
                    common.synchronize(arena.device)
                    if name.endswith("-graphs") and contestant.execution() != "graphs":
                        raise RuntimeError("no step was replayed")
                except Exception as error:  # noqa: BLE001  it is a result
                    failed[name] = " ".join(f"{type(error).__name__}: {error}".split())[:400]
                    say(f"{name}: failed: {failed[name]}")
                    continue
                ready[name] = contestant
                stack.enter_context(own.pop_all())
                say(f"{name}: ready")
        yield ready, failed


def compare(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Let all contestants take turns and return a record of each."""
    device = common.pick_device(options.device)
    arena = Arena(*_base(options, device), options.batch, options.length, options.dropout, device)
    names = options.contestants.split(",") if options.contestants else list(BUILDERS)
    for name in names:
        if name not in BUILDERS:
            raise UserError(f"--contestants {name}: expected some of {', '.join(BUILDERS)}")
    with built(names, arena, options.warmup + 3) as (ready, failed):
        steps = {name: contestant.step for name, contestant in ready.items()}
        samples = common.alternate(steps, device, rounds=options.rounds, calls=options.calls, warmup=options.warmup)
        losses = {name: float(step()) for name, step in steps.items()}
        origin = {
            **common.header("small", device),
            "model": options.model,
            "weights": f"{arena.weights} weights",
            "batch": options.batch,
            "length": options.length,
            "rank": RANK,
            "dropout": options.dropout,
        }
        records = []
        for name in names:
            record: dict[str, Any] = {**origin, "contestant": name, "status": "failed", "error": failed.get(name)}
            if name in ready:
                contestant = ready[name]
                record |= {
                    "status": "completed",
                    "step_seconds": common.summary(samples[name]),
                    "loss": losses[name],
                    "trained_parameters": contestant.trained,
                    "runs": contestant.runs,
                    "precision": contestant.precision,
                    "execution": contestant.execution(),
                    "note": contestant.note,
                }
            records.append(record)
    return records


def _base(options: argparse.Namespace, device: torch.device) -> tuple[Backbone, str, str]:
    """Return the base with its real weights if they are at hand, else with random ones of the same shape."""
    for weights in ("pretrained", "random") if options.weights == "auto" else (options.weights,):
        config = build(ModelConfig, {**registry.section("model", options.model), "weights": weights}, "model")
        try:
            return load(config, "head", torch.float32, device), options.model, weights
        except UserError as error:
            if options.weights != "auto" or weights == "random":
                raise
            say(f"random weights: {error}")
    raise AssertionError("unreachable")


def _seconds(records: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Return contestant → median seconds of a step, for those that completed."""
    return {r["contestant"]: r["step_seconds"]["p50"] for r in records if r["status"] == "completed"}


def report(records: list[dict[str, Any]]) -> str:
    """Return the table: a step's time, a run's part of it, and how many times faster that is than HF PEFT."""
    seconds = _seconds(records)
    rows = []
    for r in records:
        name = r["contestant"]
        if name not in seconds:
            rows.append((name, "failed", "–", "–", "–", "–"))
            continue
        per_run = seconds[name] / r["runs"]
        rivals = [seconds[hf] for hf in seconds if hf.startswith("hf-") and _precision(records, hf) == r["precision"]]
        faster = min(rivals) / per_run if rivals else None
        shown = (common.shown(1e3 * seconds[name]), common.shown(1e3 * per_run), common.shown(faster))
        rows.append((name, r["execution"], *shown, str(r["trained_parameters"])))
    headers = ("contestant", "execution", "ms p50", "ms per run", "× faster than HF PEFT", "trained per run")
    return common.table(headers, rows)


def _precision(records: Iterable[Mapping[str, Any]], name: str) -> str:
    return next(str(r["precision"]) for r in records if r["contestant"] == name)


def verdicts(records: list[dict[str, Any]]) -> list[str]:
    """Return a line for each bar that was measured."""
    seconds = _seconds(records)
    lines = []
    for name, rival, least in BARS:
        if name in seconds and rival in seconds:
            ratio = seconds[rival] / seconds[name]
            word = "holds" if ratio >= least else "FAILS"
            lines.append(f"{word}: {name} is {ratio:.2f} times as fast as {rival} (bar: {least})")
    return lines


def calls_of(records: Iterable[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Return this script's records grouped by the call that made them: ratios hold within one only."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in records:
        if record.get("comparison") == "small":
            found.setdefault((record["date"], record["command"]), []).append(record)
    return list(found.values())


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="file that records are added to, one a line")
    parser.add_argument("--table", nargs="+", metavar="FILE", help="show the records of these files; measure nothing")
    parser.add_argument("--contestants", help=f"comma list of {', '.join(BUILDERS)}; all by default")
    parser.add_argument("--model", default="minilm-l6", help="a BERT among conf/model/")
    parser.add_argument("--weights", choices=("auto", "pretrained", "random"), default="auto")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--dropout", type=float, default=0.0, help="the base's and the head's, for everyone")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contestant")
    parser.add_argument("--calls", type=int, default=10, help="timed steps a turn")
    parser.add_argument("--warmup", type=int, default=3, help="steps before the timed ones of a turn")
    parser.add_argument("--bars", action="store_true", help="also say which bars hold")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Measure (or read), print the table, write the records and return them."""
    options = parse(arguments)
    if options.table:
        records = common.read(options.table)
    else:
        records = compare(options)
        common.append(options.out, records)
    for call in calls_of(records):
        print(
            f"{call[0]['device']}, {call[0]['model']} ({call[0]['weights']}), {call[0]['batch']} x {call[0]['length']}"
        )
        print(report(call))
        if options.bars:
            print("\n".join(verdicts(call)))
    return records


if __name__ == "__main__":
    main()
