"""How long does a sweep take that trains its runs one after another with Hugging Face's `Trainer` and `peft`?

    python experiments/peers/trainer.py --out results/peers/trainer.jsonl
    python experiments/peers/trainer.py --model <folder or hub name> --rates 3e-4,1e-3 --seeds 0,1 --precision autocast
    python experiments/peers/trainer.py --task alpaca --model smollm2-135m --batch 4 --steps 100 --seeds 0
    python experiments/peers/trainer.py --table results/peers/trainer.jsonl

The same task, rows, tokens, recipe and adapter as a sweep's, set up as a user who cares for speed would: bf16, texts
grouped by length and padded to the batch's longest, a fused optimizer, large evaluation batches, nothing logged, saved
or reported on the way. Each run starts from fresh weights; imports, data and tokens are paid once. See README.md.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import itertools
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from common import say
from torch import nn
from torch.utils.data import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from peftbench import registry
from peftbench.config import ModelConfig, build
from peftbench.errors import UserError
from peftbench.models import tokenizer as builtin
from peftbench.models.load import kind_of, set_dropout
from peftbench.models.source import locate, tokenizer_folder
from peftbench.tasks.base import Encoded

PAD_TO = 8
TARGETS = {"encoder": ["query", "value"], "decoder": ["q_proj", "v_proj"]}
PRECISIONS = ("bf16", "bf16-adapters", "autocast", "fp32")
"""bf16: the base in bf16, adapters in fp32, as `get_peft_model` makes them; bf16-adapters: these in bf16 too; autocast:
`bf16=True` over fp32 weights."""


class Rows(Dataset[dict[str, Any]]):
    """Token ids and labels of a split."""

    def __init__(self, encoded: Encoded) -> None:
        self.rows: list[dict[str, Any]] = [{"input_ids": ids} for ids in encoded.input_ids]
        for key, column in (
            ("token_type_ids", encoded.token_type_ids),
            ("labels", encoded.labels if encoded.labels is not None else encoded.targets),
        ):
            if column is not None:
                for row, value in zip(self.rows, column, strict=True):
                    row[key] = value

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


class Timed(Trainer):
    """Keeps the seconds that evaluations take."""

    evaluate_seconds = 0.0

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        common.synchronize(self.args.device)
        start = time.perf_counter()
        found = super().evaluate(*args, **kwargs)
        common.synchronize(self.args.device)
        self.evaluate_seconds += time.perf_counter() - start
        return found


@dataclass
class Bench:
    """What all runs of a call share.

    Attributes:
        place: folder or hub name of the weights; None: random ones of the shape in `config`.
        where: keywords of `from_pretrained`.
        splits: the encoded rows by split.
        scratch: a folder that `Trainer` asks for; it stays empty.
        dense: a model read from a GGUF file, for the next run.
    """

    options: argparse.Namespace
    device: torch.device
    config: Any
    place: str | None
    where: dict[str, Any]
    kind: str
    tokenizer: Any
    task: Any
    scratch: str
    splits: dict[str, Rows] = field(default_factory=dict)
    dense: Any = None

    @property
    def classifies(self) -> bool:
        """Whether a new head classifies; else the language model's own head answers."""
        return bool(self.task.formulation == "head")

    def model(self, seed: int) -> nn.Module:
        """Return the base with fresh adapters, on the device."""
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(seed)
        options = self.options
        dtype = torch.bfloat16 if options.precision.startswith("bf16") else torch.float32
        auto: Any = AutoModelForSequenceClassification if self.classifies else AutoModelForCausalLM
        extra: dict[str, Any] = {"num_labels": self.task.num_labels} if self.classifies else {}
        if self.place is None:
            config = AutoConfig.for_model(**{**self.config.architecture, **extra})
            model = auto.from_config(config, dtype=dtype, attn_implementation="sdpa")
        else:
            given = {"dtype": dtype, "attn_implementation": "sdpa", **self.where, **extra}
            if self.dense is not None:
                model = copy.deepcopy(self.dense)
            else:
                model = auto.from_pretrained(self.place, **given)
            if "gguf_file" in self.where and self.dense is None:
                model.is_quantized = False  # its few bits were made dense, which takes half a minute: once is enough
                self.dense = copy.deepcopy(model)
        model.config.use_cache = False
        model.config.pad_token_id = self.tokenizer.pad_token_id
        set_dropout(model, options.dropout)
        lora = LoraConfig(
            task_type="SEQ_CLS" if self.classifies else "CAUSAL_LM",
            r=options.rank,
            lora_alpha=options.alpha,
            lora_dropout=0.0,
            target_modules=TARGETS[self.kind],
        )
        wide = options.precision != "bf16-adapters"
        return get_peft_model(model, lora, autocast_adapter_dtype=wide).to(self.device)

    def arguments(self, rate: float, seed: int) -> TrainingArguments:
        """Return the recipe, by the names that the installed `transformers` gives its parts."""
        options = self.options
        known = inspect.signature(TrainingArguments).parameters
        per_epoch = math.ceil(len(self.splits["train"]) / options.batch)
        steps = options.steps or round(options.epochs * per_epoch)
        wanted: dict[str, Any] = {
            "output_dir": self.scratch,
            "per_device_train_batch_size": options.batch,
            "per_device_eval_batch_size": options.eval_batch,
            "num_train_epochs": options.epochs,
            "max_steps": options.steps or -1,
            "learning_rate": rate,
            "lr_scheduler_type": "linear",
            "warmup_steps": round(options.warmup * steps),
            "weight_decay": 0.0,
            "max_grad_norm": 1.0,
            "optim": "adamw_torch_fused" if self.device.type == "cuda" else "adamw_torch",
            "bf16": options.precision == "autocast",
            "eval_strategy": "no" if options.steps else "epoch",
            "save_strategy": "no",
            "logging_strategy": "no",
            "logging_nan_inf_filter": False,  # it waits for every step
            "report_to": "none",
            "disable_tqdm": True,
            "dataloader_num_workers": options.workers,
            "dataloader_persistent_workers": options.workers > 0,
            "dataloader_pin_memory": self.device.type == "cuda",
            "prediction_loss_only": not self.classifies,
            "remove_unused_columns": False,  # there are none
            "label_names": ["labels"],
            "use_cpu": self.device.type == "cpu",
            "seed": seed,
        }
        if "train_sampling_strategy" in known:
            wanted["train_sampling_strategy"] = "group_by_length"
        else:
            wanted["group_by_length"] = True
        unknown = sorted(set(wanted) - set(known))
        if unknown:
            raise UserError(f"transformers: TrainingArguments takes no {', '.join(unknown)}; expected 5.17 or later")
        return TrainingArguments(**wanted)

    def trainer(self, model: nn.Module, rate: float, seed: int) -> Timed:
        """Return a trainer ready to go."""
        collator: Any = (
            DataCollatorWithPadding(self.tokenizer, pad_to_multiple_of=PAD_TO)
            if self.classifies
            else DataCollatorForSeq2Seq(self.tokenizer, pad_to_multiple_of=PAD_TO)
        )
        scores = {"compute_metrics": self._metrics, "preprocess_logits_for_metrics": self._answers}
        trainer = Timed(
            model=model,
            args=self.arguments(rate, seed),
            data_collator=collator,
            train_dataset=self.splits["train"],
            eval_dataset=self.splits["validation"],
            processing_class=self.tokenizer,
            **(scores if self.classifies else {}),  # type: ignore[arg-type]
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def _answers(self, logits: Any, labels: Any) -> Any:
        return logits[..., 0] if self.task.num_labels == 1 else logits.argmax(dim=-1)

    def _metrics(self, predictions: Any) -> dict[str, float]:
        found = self.task.metrics(np.asarray(predictions.predictions).tolist(), predictions.label_ids.tolist())
        return {name: math.nan if value is None else value for name, value in found.items()}


def _bench(options: argparse.Namespace, device: torch.device, scratch: str) -> Bench:
    """Find the model's files, and read and tokenize the rows as a sweep does."""
    config = _model_config(options)
    source = locate(config)
    where = {} if source.path else {"revision": source.revision}
    where |= {"gguf_file": source.gguf_file} if source.gguf_file else {}
    place = None if source.kind == "random" else str(source.path or config.checkpoint)
    hf_config: Any = (
        AutoConfig.for_model(**(config.architecture or {}))
        if place is None
        else AutoConfig.from_pretrained(place, **where)
    )
    kind = kind_of(config, hf_config)
    if kind not in TARGETS:
        raise UserError(f"--model {options.model}: expected an encoder or a decoder, this is a {kind}")
    folder = place or (None if config.tokenizer == "builtin" else tokenizer_folder(config))
    if folder is None:
        tokenizer: Any = builtin.build(kind, (getattr(hf_config, "type_vocab_size", None) or 0) > 1)
    else:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), **where)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    task = registry.build_task(registry.section("task", options.task))
    bench = Bench(options, device, config, place, where, kind, tokenizer, task, scratch)
    for name, rows in task.splits("held_out").items():
        rows = rows[: options.limit] if options.limit else rows
        bench.splits[name] = Rows(task.encode(rows, tokenizer, options.length, kind))
    return bench


def _model_config(options: argparse.Namespace) -> ModelConfig:
    """Return what `--model` names: an option of conf/model/, a folder, or a checkpoint on the hub."""
    name = options.model
    known = name in registry.options("model")
    section = registry.section("model", name) if known else {"name": Path(name).name, "checkpoint": name}
    if options.tokenizer:
        section = {**section, "tokenizer": options.tokenizer}
    if not known and Path(name).is_dir():
        os.environ["PEFTBENCH_MODELS"] = str(Path(name).resolve().parent)
        section |= {"checkpoint": None, "local": Path(name).resolve().name}
    return build(ModelConfig, {**section, "weights": options.weights}, "model")


def train_one(bench: Bench, rate: float, seed: int) -> dict[str, Any]:
    """Train one run from fresh weights and test it; returns what it took and what came of it."""
    begin = time.perf_counter()
    model = bench.model(seed)
    common.synchronize(bench.device)
    loaded = time.perf_counter()
    trainer = bench.trainer(model, rate, seed)
    ready = time.perf_counter()
    trainer.train()
    if trainer.args.eval_strategy == "no":
        trainer.evaluate()
    common.synchronize(bench.device)
    trained = time.perf_counter()
    evaluating = trainer.evaluate_seconds
    test = trainer.evaluate(bench.splits["test"], metric_key_prefix="test")
    end = time.perf_counter()
    steps = trainer.state.global_step
    seconds = {
        "load": loaded - begin,
        "set_up": ready - loaded,
        "train": trained - ready - evaluating,
        "evaluate": evaluating,
        "test": end - trained,
    }
    metric = bench.task.primary_metric
    last = [entry for entry in trainer.state.log_history if f"eval_{metric}" in entry]
    return {
        "wall_seconds": common.rounded(end - begin),
        "seconds": {name: common.rounded(value) for name, value in seconds.items()},
        "steps": steps,
        "step_seconds_mean": common.rounded(seconds["train"] / steps),
        "metric": metric,
        "validation": _plain(last[-1][f"eval_{metric}"]) if last else None,
        "test": _plain(test.get(f"test_{metric}")),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def _plain(value: Any) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def compare(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Train the runs one after another and return a record of each."""
    device = common.pick_device(options.device)
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        start = time.perf_counter()
        bench = _bench(options, device, scratch)
        data_seconds = time.perf_counter() - start
        say(f"{options.task}: {', '.join(f'{len(rows)} {name}' for name, rows in bench.splits.items())}")
        origin = _origin(bench, _process_seconds() - data_seconds, data_seconds)
        for rate, seed in itertools.product(_floats(options.rates), [int(s) for s in options.seeds.split(",")]):
            found = train_one(bench, rate, seed)
            records.append({**origin, "learning_rate": rate, "seed": seed, "run": len(records), **found})
            say(
                f"run {len(records)}: {found['wall_seconds']:.1f} s, {found['metric']} {common.shown(found['test'], 4)}"
            )
    return records


def _origin(bench: Bench, start_seconds: float, data_seconds: float) -> dict[str, Any]:
    """Return what all records of a call say: where they were made, and the setting."""
    options = bench.options
    return {
        **common.header("trainer", bench.device),
        "task": options.task,
        "model": bench.config.name,
        "weights": f"{'random' if bench.place is None else 'pretrained'} weights",
        "method": "lora",
        "precision": options.precision,
        "batch": options.batch,
        "eval_batch": options.eval_batch,
        "length": options.length,
        "rank": options.rank,
        "alpha": options.alpha,
        "epochs": None if options.steps else options.epochs,
        "dropout": options.dropout,
        "start_seconds": common.rounded(start_seconds),
        "data_seconds": common.rounded(data_seconds),
    }


def _process_seconds() -> float:
    """Return how long this process lives, imports of before included."""
    try:
        ticks = float(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        up = float(Path("/proc/uptime").read_text().split()[0])
        return up - ticks / os.sysconf("SC_CLK_TCK")
    except OSError:
        return time.monotonic() - common.START


def _floats(text: str) -> list[float]:
    return [float(value) for value in text.split(",")]


def report(records: Iterable[Mapping[str, Any]]) -> str:
    """Return a line for each run."""
    rows = [
        (
            f"{r['task']}, {r['precision']}, lr {r['learning_rate']:g}, seed {r['seed']}",
            common.shown(r["wall_seconds"], 1),
            *(common.shown(r["seconds"][name], 1) for name in ("load", "train", "evaluate", "test")),
            str(r["steps"]),
            common.shown(1000 * r["step_seconds_mean"], 1),
            common.shown(r["test"], 4),
        )
        for r in records
        if r.get("comparison") == "trainer"
    ]
    headers = ("run", "seconds", "load", "train", "evaluate", "test", "steps", "ms a step", "test metric")
    return common.table(headers, rows)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="file that records are added to, one a line")
    parser.add_argument("--table", nargs="+", metavar="FILE", help="show the records of these files; train nothing")
    parser.add_argument("--task", default="rte", help="an option of conf/task/")
    parser.add_argument("--model", default="minilm-l6", help="an option of conf/model/, a folder or a hub name")
    parser.add_argument("--weights", choices=("pretrained", "random"), default="pretrained")
    parser.add_argument("--tokenizer", help="builtin, a folder or a hub name; the model's own by default")
    parser.add_argument("--rates", default="1e-3", help="comma list of learning rates")
    parser.add_argument("--seeds", default="0,1", help="comma list; one run for each rate and seed")
    parser.add_argument("--epochs", type=float, default=10.0)
    parser.add_argument("--steps", type=int, help="instead of epochs; validation is then measured at the end alone")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--eval-batch", type=int, default=256)
    parser.add_argument("--length", type=int, default=128, help="longest text in tokens")
    parser.add_argument("--limit", type=int, help="the first rows of each split alone")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--alpha", type=float, default=16.0)
    parser.add_argument("--warmup", type=float, default=0.06, help="share of the steps")
    parser.add_argument("--dropout", type=float, help="the base's and the head's; the model's own by default")
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16")
    parser.add_argument("--workers", type=int, default=0, help="processes that collate; rows are tokenized already")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Train (or read), print the table, write the records and return them."""
    options = parse(arguments)
    records = common.read(options.table) if options.table else compare(options)
    if not options.table:
        common.append(options.out, records)
    print(report(records))
    return records


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"trainer.py: {error}")
