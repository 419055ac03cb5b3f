"""Records → tidy frames: one row a run (`frame`), one row a configuration (`configurations`: every seed of one spec).

Labels say only what varies: of the settings in a resolved spec, those that tell two configurations of one method on one
model and task apart. Settings that follow from others (alpha = 2 * rank) are left out. The learning rate is kept apart
from the rest, as it is what a sweep tunes: `variant` is the label without it, `label` has it where it varies.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

import pandas as pd

from peftbench.analysis.human import number
from peftbench.analysis.statistics import gap, mean, std, summarize
from peftbench.errors import UserError
from peftbench.record import task_content, train_content

Record = Mapping[str, Any]
STATUSES = ("completed", "diverged", "out_of_memory", "failed")
PRUNED = "pruned"
REFERENCE = "full"

# A panel is what may be compared side by side: one model on one task, under one protocol, data and kind of device.
PANEL = ["model", "task", "protocol", "data_subset", "device_kind"]

COMPONENTS = ("weights", "adapter", "gradients", "optimizer", "activations", "workspace")
"""What memory is used for at its peak, in the order in which it is shown."""
PHASES = ("load", "attach", "forward", "backward", "step")

COST_PATHS: dict[str, tuple[str, ...]] = {
    "profile_id": ("profile_id",),
    "trainable_parameters": ("trainable_parameters",),
    "adapter_parameters": ("adapter_parameters",),
    "head_parameters": ("head_parameters",),
    "total_parameters": ("total_parameters",),
    "checkpoint_bytes": ("checkpoint_bytes",),
    "step_seconds_p10": ("step_seconds", "p10"),
    "step_seconds_p50": ("step_seconds", "p50"),
    "step_seconds_p90": ("step_seconds", "p90"),
    "tokens_per_second": ("tokens_per_second",),
    "padded_tokens_per_second": ("padded_tokens_per_second",),
    "flops_per_token": ("flops_per_token",),
    "analytic_flops_per_token": ("analytic_flops_per_token",),
    "model_flops_utilization": ("model_flops_utilization",),
    "memory_kind": ("memory", "kind"),
    "memory_peak_bytes": ("memory", "peak"),
    "memory_reserved_bytes": ("memory", "reserved"),
    "memory_device_used_bytes": ("memory", "device_used"),
    "memory_process_peak_bytes": ("memory", "process_peak"),
    **{f"memory_{part}_bytes": ("memory", part) for part in (*COMPONENTS, "residual")},
    "memory_peak_phase": ("memory", "peak_phase"),
    **{f"memory_{phase}_phase_bytes": ("memory", "phases", phase) for phase in PHASES},
    **{f"step_share_{part}": ("step_share", part) for part in ("forward", "backward", "optimizer")},
    "memory_traffic_bytes": ("memory_traffic_bytes",),
    "memory_bandwidth_utilization": ("memory_bandwidth_utilization",),
    "kernels_per_step": ("kernels_per_step",),
    "operations_per_step": ("operations_per_step",),
    "energy_joules_per_1k_tokens": ("energy_joules_per_1k_tokens",),
    "startup_seconds": ("startup_seconds",),
    "compile_seconds": ("compile_seconds",),
    "profile_batch_size": ("shape", "batch_size"),
    "profile_length": ("shape", "length"),
}
TEXT_COSTS = {"profile_id", "memory_kind", "memory_peak_phase"}

LOWER_IS_BETTER = {"loss", "perplexity"}
SHORT_NAMES = {"rank": "r", "learning_rate": "lr"}
LEARNING_RATE = "train.learning_rate"
# Names are shown as such; a panel holds one device kind; seed, profile and device leave the result alone.
UNLABELLED = {
    "model.name", "method.name", "method._target_", "task.name", "task._target_", "identity.device_kind", LEARNING_RATE
}  # fmt: skip
LABEL_ORDER = ("method", "train", "task", "model", "identity")


def rows_of(table: pd.DataFrame) -> list[dict[Any, Any]]:
    """Rows as dicts, with None for every missing value whatever the column's type made of it."""
    # Not to_dict: it takes the columns out one by one, for small groups of wide tables most of a report's time.
    keys = list(table.columns)
    return [
        {key: None if isinstance(v, float) and v != v else v for key, v in zip(keys, row, strict=True)}
        for row in table.to_numpy(dtype=object).tolist()
    ]


def dig(mapping: Any, path: Iterable[str]) -> Any:
    """The value at `path` in nested mappings, or None where a step is missing or null."""
    for key in path:
        if not isinstance(mapping, Mapping):
            return None
        mapping = mapping.get(key)
    return mapping


def flatten(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings → dotted keys; lists stay whole."""
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def content(spec: Mapping[str, Any]) -> dict[str, Any]:
    """What the run id hashes, less the seed: equal for all seeds of one configuration (see `RunSpec.content`)."""
    kept = {key: spec.get(key) for key in ("model", "method", "task", "protocol", "identity")}
    kept["task"] = task_content(kept["task"] or {})
    return {**kept, "train": train_content(spec.get("train") or {})}


def frame(records: Sequence[Record]) -> pd.DataFrame:
    """One row a run, in order of `run_id`; a run recorded twice counts once, its completed record first.

    Runs that a search pruned are left out: their last metrics are those of a run cut short. `pruned` counts them.

    Columns: run_id, status, error, `PANEL`, method, configuration, variant, label, line, learning_rate, rank, seed,
    primary_metric, greater_is_better, validation, test, selected_step, `<split>.<metric>`, and the keys of `COST_PATHS`
    (units in their names; parameters are counts).

    Raises:
        UserError: a record lacks its run_id, status or the names in its spec.
    """
    unique: dict[str, Record] = {}
    for record in sorted(records, key=lambda r: (str(r.get("run_id")), r.get("status") != "completed")):
        unique.setdefault(str(record.get("run_id")), record)
    rows, settings = [], []
    for record in unique.values():
        if record.get("status") == PRUNED:
            continue
        row, kept = _row(record), content(record["spec"])
        text = json.dumps(kept, sort_keys=True, default=str)
        rows.append(row | {"configuration": hashlib.sha256(text.encode()).hexdigest()[:12]})
        settings.append(_settings(kept))
    _infer_subset(rows)
    _add_labels(rows, settings)
    for row in rows:
        row.pop("data")
    return pd.DataFrame(rows)


def pruned(records: Sequence[Record]) -> int:
    """Return how many runs a search pruned and nobody completed since."""
    done = {str(record.get("run_id")) for record in records if record.get("status") != PRUNED}
    return len({str(record.get("run_id")) for record in records if record.get("status") == PRUNED} - done)


def _row(record: Record) -> dict[str, Any]:
    run_id, spec = record.get("run_id"), record.get("spec") or {}
    needed = {"run_id": run_id, "status": record.get("status")}
    needed["spec.seed"] = spec.get("seed")
    needed |= {f"spec.{part}.name": dig(spec, (part, "name")) for part in ("model", "method", "task")}
    missing = [key for key, value in needed.items() if value is None]
    if missing:
        raise UserError(f"record {run_id!r} lacks {', '.join(missing)}: not a run record of peftbench")
    if record["status"] not in STATUSES:
        raise UserError(f"record {run_id!r} has status {record['status']!r}; accepted: {', '.join(STATUSES)}")
    quality = record.get("quality") or {}
    primary = quality.get("primary_metric")
    rank = dig(spec, ("method", "rank"))
    row: dict[str, Any] = {
        "run_id": run_id,
        "status": record["status"],
        "error": record.get("error"),
        "model": spec["model"]["name"],
        "task": spec["task"]["name"],
        "protocol": quality.get("protocol") or spec.get("protocol") or "held_out",
        "data_subset": quality.get("data_subset"),
        "device_kind": dig(spec, ("identity", "device_kind")) or dig(record, ("cost", "device_kind")) or "unknown",
        "method": spec["method"]["name"],
        "learning_rate": number(dig(spec, ("train", "learning_rate"))),
        "rank": int(rank) if isinstance(rank, int) and not isinstance(rank, bool) else None,
        "seed": spec.get("seed"),
        "primary_metric": primary,
        "greater_is_better": quality.get("greater_is_better", primary not in LOWER_IS_BETTER),
        "selected_step": quality.get("selected_step"),
        "data": dig(spec, ("identity", "data")),
    }
    # A run that diverged may hold metrics of its last finite step: they stay in their own columns, and out of the
    # summaries, which take completed runs only.
    for split, metrics in quality.items():
        if split == "validation" or split == "test" or split.startswith("test_"):
            row |= {f"{split}.{name}": number(value) for name, value in (metrics or {}).items()}
    for split in ("validation", "test"):
        row[split] = row.get(f"{split}.{primary}") if record["status"] == "completed" else None
    for column, path in COST_PATHS.items():
        value = dig(record.get("cost"), path)
        row[column] = value if column in TEXT_COSTS else number(value)
    return row


def _settings(kept: Mapping[str, Any]) -> dict[str, Any]:
    flat = flatten({part: kept[part] or {} for part in LABEL_ORDER})
    return {key: value for key, value in flat.items() if not key.startswith("method.suggested")}


def _infer_subset(rows: list[dict[str, Any]]) -> None:
    """Runs without a quality take the flag of the runs that read the same data; where nobody says, it is no subset."""
    known = {(r["task"], r["data"]): r["data_subset"] for r in rows if r["data_subset"] is not None}
    for row in rows:
        row["data_subset"] = bool(known.get((row["task"], row["data"]), False))


def _add_labels(rows: list[dict[str, Any]], settings: list[dict[str, Any]]) -> None:
    by_method: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        by_method.setdefault(row["method"], []).append(i)
    for method, members in by_method.items():
        one_each = list({rows[i]["configuration"]: i for i in members}.values())
        panels = [tuple(rows[i][column] for column in PANEL) for i in one_each]
        keys = _distinguishing([settings[i] for i in one_each], panels)
        names = _short_names(keys)
        for i in members:
            parts = [(names[key], _text(settings[i].get(key))) for key in keys if key != LEARNING_RATE]
            rows[i]["variant"] = _join(method, parts)
            rows[i]["line"] = _join(method, [part for part in parts if part[0] != SHORT_NAMES["rank"]])
            rate = [(names[LEARNING_RATE], _text(settings[i].get(LEARNING_RATE)))] if LEARNING_RATE in keys else []
            rows[i]["label"] = _join(method, parts + rate)


def _distinguishing(settings: Sequence[Mapping[str, Any]], panels: Sequence[tuple[Any, ...]]) -> list[str]:
    """The fewest keys, taken in order of interest, that tell the configurations of each panel apart."""

    def interest(key: str) -> tuple[bool, int, bool, str]:
        group = key.split(".", 1)[0]
        return key == LEARNING_RATE, LABEL_ORDER.index(group), key != "method.rank", key

    candidates = {key for s in settings for key in s} - (UNLABELLED - {LEARNING_RATE})
    classes: list[Any] = list(panels)
    chosen = []
    for key in sorted(candidates, key=interest):
        values = [json.dumps(s.get(key, "absent"), sort_keys=True, default=str) for s in settings]
        if len(set(values)) == 1:
            continue
        numbered: dict[Any, int] = {}
        refined = [numbered.setdefault(pair, len(numbered)) for pair in zip(classes, values, strict=True)]
        if len(numbered) > len(set(classes)):
            chosen.append(key)
            classes = list(refined)
    return chosen


def _short_names(keys: Sequence[str]) -> dict[str, str]:
    last = {key: key.rsplit(".", 1)[-1] for key in keys}
    count = Counter(last.values())
    return {key: SHORT_NAMES.get(name, name) if count[name] == 1 else key for key, name in last.items()}


def short_float(value: float) -> str:
    """Up to six digits, without zeros in the exponent: 0.00005 → "5e-5"."""
    mantissa, _, exponent = f"{value:g}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return short_float(value)
    if isinstance(value, list | tuple):
        return "+".join(_text(v) for v in value) or "none"
    text = str(value)
    return text[:8] if len(text) == 64 else text  # a sha256


def _join(method: str, parts: Sequence[tuple[str, str]]) -> str:
    return " ".join([method, *(f"{name}={text}" for name, text in parts)])


def configurations(runs: pd.DataFrame) -> pd.DataFrame:
    """One row a configuration, grouped over seeds; completed runs make the numbers, all runs are counted.

    Columns beside those that name it: `runs` and one count per status, `seeds` (completed runs with a score),
    `test_mean`, `test_std` (ddof 1), `test_low`, `test_high` (95 % t interval), the same for `validation`,
    `test_by_seed` and `validation_by_seed` (dicts), the keys of `COST_PATHS` (median over runs that have them: seeds
    share one profile) and the gap to full fine-tuning as `gap_mean`, `gap_std`, `gap_low`, `gap_high`, `gap_seeds`,
    `gap_paired`. Missing is NaN or None.
    """
    rows = []
    named = [*PANEL, "method", "variant", "label", "line", "learning_rate", "rank"]
    groups: dict[str, list[dict[Any, Any]]] = {}
    for run in rows_of(runs):  # plain dicts: a pandas group a configuration takes seconds for a thousand runs
        groups.setdefault(run["configuration"], []).append(run)
    for configuration, group in groups.items():
        completed = [run for run in group if run["status"] == "completed"]
        row: dict[str, Any] = {"configuration": configuration}
        row |= {column: group[0][column] for column in named}
        row["primary_metric"] = completed[0]["primary_metric"] if completed else None
        row["greater_is_better"] = bool(completed[0]["greater_is_better"]) if completed else True
        row["runs"] = len(group)
        row |= {status: sum(run["status"] == status for run in group) for status in STATUSES}
        row["tried_seeds"] = frozenset(int(run["seed"]) for run in group)
        for split in ("test", "validation"):
            by_seed = {int(run["seed"]): float(run[split]) for run in completed if run[split] is not None}
            s = summarize(list(by_seed.values()))
            row |= {f"{split}_mean": s.mean, f"{split}_std": s.std, f"{split}_low": s.low, f"{split}_high": s.high}
            row[f"{split}_by_seed"] = by_seed
        row["seeds"] = len(row["test_by_seed"])
        for column in COST_PATHS:
            present = [run[column] for run in group if run[column] is not None]
            row[column] = None if not present else present[0] if column in TEXT_COSTS else median(present)
        rows.append(row)
    # A configuration of which no run completed still belongs under its task's metric.
    metrics = {(r["task"]): (r["primary_metric"], r["greater_is_better"]) for r in rows if r["primary_metric"]}
    for row in rows:
        if row["primary_metric"] is None and row["task"] in metrics:
            row["primary_metric"], row["greater_is_better"] = metrics[row["task"]]
    order = ["model", "task", "protocol", "data_subset", "device_kind", "method", "rank", "variant", "learning_rate"]
    table = pd.DataFrame(rows).sort_values(order, kind="stable", na_position="first", ignore_index=True)
    return _with_gaps(table)


def _with_gaps(table: pd.DataFrame) -> pd.DataFrame:
    chosen = selected(table)
    references: dict[tuple[Any, ...], dict[Any, Any]] = {}
    for row in rows_of(chosen[(chosen["method"] == REFERENCE) & (chosen["seeds"] > 0)]):
        key, sign = tuple(row[c] for c in PANEL), 1 if row["greater_is_better"] else -1
        known = references.get(key)
        # Of several ways to fine-tune fully, the one that validation prefers is the reference.
        if known is None or sign * _or_worst(row, sign) > sign * _or_worst(known, sign):
            references[key] = row
    gaps = []
    for row in rows_of(table):
        reference = references.get(tuple(row[c] for c in PANEL))
        is_reference = reference is not None and reference["configuration"] == row["configuration"]
        g = None if reference is None or is_reference else gap(row["test_by_seed"], reference["test_by_seed"])
        entry: dict[str, Any] = {"is_reference": is_reference}
        for field in ("mean", "std", "low", "high"):
            entry[f"gap_{field}"] = getattr(g, field) if g else None
        entry["gap_seeds"], entry["gap_paired"] = (g.n, g.paired) if g else (0, None)
        gaps.append(entry)
    return pd.concat([table, pd.DataFrame(gaps, index=table.index)], axis=1)


def _or_worst(row: Mapping[Any, Any], sign: int) -> float:
    value = number(row["validation_mean"])
    return -sign * math.inf if value is None else value


def selected(table: pd.DataFrame) -> pd.DataFrame:
    """One row a (panel, variant): the learning rate that did best on validation, never on test.

    Those tried with the most seeds come first, since a study that tunes on one seed reruns its choice with more; equals
    are compared over the seeds that all of them tried: the fewest runs lost to divergence, memory or failure, then the
    better mean of the primary metric on validation, then the smaller learning rate. `learning_rates` counts the values
    tried; `validation_prefers` is the one that the seeds shared by all values would choose, where it is another.
    """
    rows = []
    for _, group in table.groupby([*PANEL, "variant"], sort=False, dropna=False):
        candidates = rows_of(group)
        most = max((len(c["tried_seeds"]) for c in candidates if c["seeds"]), default=0)
        best = _best_on_validation(
            [c for c in candidates if c["seeds"] and len(c["tried_seeds"]) == most] or candidates
        )
        by_all = _best_on_validation(candidates)
        other = None if by_all["learning_rate"] == best["learning_rate"] else by_all["learning_rate"]
        rates = {c["learning_rate"] for c in candidates}
        rows.append({**best, "learning_rates": len(rates), "validation_prefers": other})
    return pd.DataFrame(rows, columns=[*table.columns, "learning_rates", "validation_prefers"])


def _best_on_validation(candidates: Sequence[dict[Any, Any]]) -> dict[Any, Any]:
    shared = frozenset.intersection(*(c["tried_seeds"] for c in candidates))

    def merit(c: Mapping[Any, Any]) -> tuple[float, float, float]:
        compared = shared or c["tried_seeds"]  # learning rates without a seed in common: each over its own
        values = [v for seed, v in c["validation_by_seed"].items() if seed in compared]
        centre, sign = mean(values), 1 if c["greater_is_better"] else -1
        lost = 1 - len(values) / len(compared)
        return lost, math.inf if centre is None else -sign * centre, c["learning_rate"] or 0.0

    return min(candidates, key=merit)


def over_tasks(chosen: pd.DataFrame) -> pd.DataFrame:
    """One row a (model, device_kind, variant) of `selected` rows that has a score on *every* task of the folder.

    `test_mean` is the mean over tasks of primary metrics; `test_std` the spread over seeds of that mean, over the seeds
    that all tasks share (None below two). Costs are means over tasks, None where any is missing. Where tasks differ in
    direction (a loss beside an accuracy) there is no mean and the frame is empty.
    """
    tasks = task_titles(chosen)
    if len(tasks) < 2 or chosen["greater_is_better"].nunique() > 1:
        return chosen.iloc[:0]
    rows = []
    for _, group in chosen.groupby(["model", "device_kind", "variant"], sort=False):
        scored = group[group["seeds"] > 0]
        if len(task_titles(scored)) < len(tasks):
            continue
        by_task = list(scored["test_by_seed"])
        shared = sorted(set.intersection(*(set(b) for b in by_task)))
        means = [math.fsum(b[seed] for b in by_task) / len(by_task) for seed in shared]
        row = rows_of(scored)[0]
        row |= {"test_mean": mean([float(v) for v in scored["test_mean"]]), "test_std": std(means)}
        row |= {"seeds": len(shared), "tasks": len(tasks), "is_reference": bool(scored["is_reference"].all())}
        for column in set(COST_PATHS) - TEXT_COSTS:
            row[column] = None if scored[column].isna().any() else float(scored[column].mean())
        rows.append(row)
    return pd.DataFrame(rows) if rows else chosen.iloc[:0]


def task_title(row: Mapping[Any, Any]) -> str:
    """Task name with what a reader must know about it: subset data, a protocol that selects on the reported split."""
    notes = ["subset"] if row["data_subset"] else []
    notes += [f"protocol {row['protocol']}"] if row["protocol"] != "held_out" else []
    return f"{row['task']} ({', '.join(notes)})" if notes else str(row["task"])


def task_titles(table: pd.DataFrame) -> list[str]:
    """Distinct `task_title`s, sorted."""
    return sorted({task_title(row) for row in rows_of(table[["task", "data_subset", "protocol"]].drop_duplicates())})
