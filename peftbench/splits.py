"""The evaluation splits of a task, ready for the runs of an assembly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from peftbench.assembly import Assembly
from peftbench.engine import evaluation, objectives
from peftbench.engine.batches import TokenTable

EVALUATION_ROWS = 4096
"""Most rows of a pack that go through the model at once in an evaluation."""


def pad_id(tokenizer: Any) -> int:
    """Return the id that fills batches up."""
    pad = tokenizer.pad_token_id
    return int(pad if pad is not None else tokenizer.eos_token_id or 0)


@dataclass
class Split:
    """An evaluation split: its evaluator and the references its predictions are compared with."""

    evaluator: evaluation.Evaluator
    references: list[Any]


def split(assembly: Assembly, rows: list[dict[str, Any]]) -> Split:
    """Prepare one split for evaluation as the task asks."""
    setting, backbone, task = assembly.setting, assembly.backbone, assembly.setting.task
    tokenizer: Any = backbone.tokenizer
    pad = pad_id(tokenizer)
    encode = (rows, tokenizer, setting.max_length, backbone.kind)
    runs, wanted = len(setting.specs), setting.train.eval_batch_size
    beams = task.decoding.beams
    items = min(wanted, EVALUATION_ROWS // runs) if setting.device.type == "cuda" else wanted // runs
    items = max(1, items // beams)
    common = {"items": items, "max_length": setting.max_length, "autocast": setting.autocast}
    if isinstance(assembly.objective, objectives.HeadObjective):
        table = TokenTable(task.encode(*encode), pad, setting.device)
        return Split(evaluation.HeadEvaluator(assembly.objective, table=table, **common), task.references(rows))
    objective = cast(objectives.TextObjective, assembly.objective)
    evaluator: evaluation.Evaluator
    if task.evaluation == "choices":
        encoded, owners = task.encode_choices(*encode)
        table = TokenTable(encoded, pad, setting.device)
        evaluator = evaluation.ChoiceEvaluator(owners, objective, table=table, **common)
    elif task.evaluation == "generation":
        table = TokenTable(task.encode_prompts(*encode), pad, setting.device, left=backbone.kind == "decoder")
        evaluator = evaluation.GenerationEvaluator(
            objective,
            lambda ids: task.parse(tokenizer.decode(ids, skip_special_tokens=True)),
            task.decoding,
            task.max_new_tokens,
            tokenizer.eos_token_id,
            pad,
            table=table,
            **common,
        )
    else:
        assert task.evaluation == "loss", task.evaluation
        evaluator = evaluation.LossEvaluator(
            objective, table=TokenTable(task.encode(*encode), pad, setting.device), **common
        )
    return Split(evaluator, task.references(rows))
