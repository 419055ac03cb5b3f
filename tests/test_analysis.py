"""Analysis: hand-made numbers whose answers can be checked on paper, and records of realistic shape."""

import csv
import fcntl
import hashlib
import math
import os
import random
import re
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import matplotlib
import pandas as pd
import pytest
from matplotlib.figure import Figure

from peftbench.analysis import plots, tables
from peftbench.analysis.frame import COMPONENTS, configurations, content, frame, over_tasks, rows_of, selected
from peftbench.analysis.pareto import front
from peftbench.analysis.report import write_report
from peftbench.analysis.statistics import gap, mean, std, summarize, t_interval
from peftbench.errors import UserError
from peftbench.record import RunSpec

SIZES = {"minilm-l6": 22_700_000, "roberta-base": 124_600_000}
# name, settings, adapter parameters on MiniLM, gain over head only, step seconds, tracked MiB, learning rate
ZOO = [
    ("full", {}, 22_565_000, 0.11, 0.142, 372.0, 5e-5),
    ("head", {}, 0, 0.0, 0.031, 98.0, 1e-2),
    ("bitfit", {}, 20_352, 0.045, 0.083, 171.0, 1e-3),
    ("ia3", {}, 13_824, 0.03, 0.088, 176.0, 1e-2),
    ("lora", {"rank": 2, "alpha": 4.0}, 18_432, 0.07, 0.090, 182.0, 1e-3),
    ("lora", {"rank": 4, "alpha": 8.0}, 36_864, 0.08, 0.091, 182.5, 1e-3),
    ("lora", {"rank": 8, "alpha": 16.0}, 73_728, 0.09, 0.092, 183.0, 1e-3),
    ("houlsby", {"bottleneck": 16}, 155_904, 0.095, 0.097, 196.0, 1e-3),
    ("prompt", {"tokens": 10}, 3_840, 0.012, 0.102, 210.0, 3e-2),
    ("prefix", {"tokens": 10}, 46_080, 0.05, 0.095, 188.0, 1e-2),
]


def make_record(
    method="lora",
    settings=None,
    task="rte",
    model="minilm-l6",
    seed=0,
    test=0.8,
    validation=None,
    learning_rate=1e-3,
    status="completed",
    adapter=73_728,
    seconds=0.09,
    peak=180 * 2**20,
    metric="accuracy",
    protocol="held_out",
    device="cpu",
    subset=False,
    data="d0",
    train=None,
    error=None,
):
    """One record as a run writes it, with the given score on test and (unless given) the same on validation."""
    settings = settings or {}
    name = f"{method}-{task}-{model}-s{seed}-" + "".join(map(str, settings.values()))
    validation = test if validation is None else validation
    quality = {
        "primary_metric": metric,
        "validation": {metric: validation},
        "test": {metric: test},
        "selected_step": 40,
        "protocol": protocol,
        "data_subset": subset,
        "evaluations": [{"step": 40, "metrics": {metric: validation}}],
        "items": {"test": {"scores": [1, 0], "predictions": [1, 1]}},
    }
    return {
        "schema_version": 1,
        "run_id": f"{name}-{learning_rate:g}-{protocol}-{data}-{device}-{train}".replace(" ", ""),
        "status": status,
        "error": error,
        "spec": {
            "model": {"name": model, "checkpoint": f"hub/{model}", "pooling": "mean", "dropout": None},
            "method": {"name": method, "_target_": f"peftbench.methods.{method}.{method.title()}", **settings},
            "task": {"name": task, "_target_": "peftbench.tasks.glue.Glue", "max_length": 128},
            "train": {"learning_rate": learning_rate, "epochs": 5.0, "batch_size": 32, **(train or {})},
            "profile": {"enabled": True},
            "seed": seed,
            "protocol": protocol,
            "device": "cuda" if device != "cpu" else "cpu",
            "identity": {"weights": "a" * 64, "data": f"{task}-{data}", "engine": 1, "method": 1,
                         "device_kind": device},
        },
        "quality": quality if status == "completed" else None,
        "trace": {"loss": [0.7, 0.5], "learning_rate": [1e-3, 0.0]},
        "cost": None
        if status in ("failed", "out_of_memory")
        else {
            "profile_id": f"p-{method}-{task}",
            "device_kind": device,
            "trainable_parameters": adapter + 770,
            "adapter_parameters": adapter,
            "head_parameters": 770,
            "total_parameters": SIZES[model] + adapter + 770,
            "checkpoint_bytes": 4 * (adapter + 770) + 1000,
            "step_seconds": {"p10": seconds * 0.9, "p50": seconds, "p90": seconds * 1.2, "samples": [seconds] * 3,
                             "warmup_steps": 3},
            "tokens_per_second": 1500 / seconds,
            "padded_tokens_per_second": 2048 / seconds,
            "flops_per_token": 9.1e7,
            "analytic_flops_per_token": 9.0e7,
            "model_flops_utilization": None,
            "memory": {"kind": "cuda" if device != "cpu" else "tracked_tensors", "peak": peak, "reserved": None,
                       "process_peak": None},
            "energy_joules_per_1k_tokens": None,
            "startup_seconds": 2.0,
            "compile_seconds": None,
            "shape": {"batch_size": 32, "length": 64},
        },
        "environment": {"git_commit": "0123abc", "git_dirty": False, "python": "3.11.9",
                        "versions": {"torch": "2.13.0"}, "device_kind": device},
        "pack": {"size": 4, "index": 0},
        "created": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip


def make_sweep(tasks=("rte",), models=("minilm-l6",), seeds=5, tuned=False, zoo=ZOO, device="cpu"):
    """A sweep of realistic shape: seeded noise, `tuned` adds four learning rates on seed 0, a few runs are lost."""
    records = []
    for model in models:
        scale = SIZES.get(model, 10**8) / SIZES["minilm-l6"]
        for task in tasks:
            chance = 0.5 + (zlib.crc32(task.encode()) % 25) / 100
            for method, settings, adapter, gain, seconds, mib, rate in zoo:
                rates = [rate] * 1 if not tuned else [rate * f for f in (0.1, 0.3, 1.0, 3.0)]
                for chosen in rates:
                    penalty = 0.02 * abs(math.log10(chosen / rate)) ** 2
                    for seed in range(seeds if chosen == rate else 1):
                        key = zlib.crc32(repr((model, task, method, settings, seed, chosen)).encode())
                        noise = random.Random(key).gauss(0, 0.006)
                        common = {"method": method, "settings": settings, "task": task, "model": model, "seed": seed}
                        common |= {"learning_rate": chosen, "adapter": int(adapter * scale), "device": device}
                        common |= {"seconds": seconds * scale, "peak": mib * scale * 2**20}
                        score = min(0.99, chance + gain - penalty + noise)
                        if tuned and method == "full" and chosen > rate:
                            records.append(make_record(**common, status="diverged"))
                        else:
                            records.append(make_record(**common, test=score, validation=score + noise / 2))
    return records


def table_of(*records):
    return configurations(frame(records))


def by_label(table):
    return {row["label"]: row for row in rows_of(table)}


# Statistics.


def test_mean_and_spread_by_hand():
    assert mean([1.0, 2.0, 6.0]) == 3.0
    assert std([1.0, 2.0, 6.0]) == pytest.approx(math.sqrt((4 + 1 + 9) / 2))
    assert mean([]) is None
    assert std([0.5]) is None


def test_t_interval_by_hand():
    # n = 4: mean 2.5, s = 1.29099, t(3) = 3.18245, half width = 3.18245 * 1.29099 / 2.
    low, high = t_interval([1.0, 2.0, 3.0, 4.0])
    assert (low, high) == pytest.approx((2.5 - 2.05426, 2.5 + 2.05426), abs=1e-4)
    s = summarize([0.7])
    assert (s.n, s.mean, s.std, s.low, s.high) == (1, 0.7, None, None, None)


def test_gap_pairs_the_seeds_that_match():
    g = gap({0: 0.80, 1: 0.84, 7: 0.10}, {0: 0.82, 1: 0.82, 2: 0.99})
    # Differences: -0.02 and +0.02.
    assert (g.n, g.paired) == (2, True)
    assert g.mean == pytest.approx(0.0)
    assert g.std == pytest.approx(math.sqrt(2) * 0.02)


def test_gap_without_common_seeds_is_welch():
    g = gap({0: 1.0, 1: 3.0}, {2: 5.0, 3: 7.0})
    assert (g.mean, g.paired, g.n) == (-4.0, False, 2)
    assert g.std == pytest.approx(2.0)  # sqrt(2 + 2)
    # Equal variances and sizes: 2 degrees of freedom, t = 4.30265, standard error sqrt(2/2 + 2/2).
    assert g.high == pytest.approx(-4 + 4.30265 * math.sqrt(2), abs=1e-4)
    assert gap({}, {0: 1.0}) is None
    assert gap({0: 1.0}, {1: 3.0}).std is None


# Pareto.


def test_front_by_hand():
    quality = [0.5, 0.7, 0.6, 0.9, 0.9]
    cost = [1.0, 2.0, 3.0, 4.0, 5.0]
    assert front(quality, cost).members == [0, 1, 3]


def test_front_keeps_equals_and_counts_what_it_drops():
    found = front([0.7, 0.7, 0.7, None, 0.9, math.nan], [2.0, 2.0, 3.0, 1.0, None, 1.0])
    assert found.members == [0, 1]
    assert found.dropped == 3


def test_front_of_a_loss():
    assert front([2.0, 1.0, 3.0], [1.0, 2.0, 0.5], greater_is_better=False).members == [2, 0, 1]


# Frames.


def test_content_is_what_the_run_id_hashes():
    spec = make_record(train={"steps": 9, "eval_batch_size": 64})["spec"]
    whole = RunSpec.from_dict(spec).content
    assert content(spec) == {key: value for key, value in whole.items() if key != "seed"}


def test_seeds_of_one_spec_are_one_configuration():
    table = table_of(*(make_record(seed=i, test=v) for i, v in enumerate((0.7, 0.8, 0.9))))
    (row,) = rows_of(table)
    assert (row["runs"], row["seeds"]) == (3, 3)
    assert row["test_mean"] == pytest.approx(0.8)
    assert row["test_std"] == pytest.approx(0.1)
    assert row["step_seconds_p50"] == 0.09


def test_one_seed_has_no_spread():
    (row,) = rows_of(table_of(make_record()))
    assert row["test_std"] is None
    assert row["test_low"] is None


def test_labels_say_what_varies_and_no_more():
    # Alpha follows rank, so it is left out; the learning rate differs at one rank only.
    records = [
        make_record(settings={"rank": r, "alpha": 2.0 * r, "bias": False}, learning_rate=rate)
        for r, rate in ((4, 1e-3), (8, 1e-3), (8, 5e-5))
    ]
    labels = {(r["label"], r["variant"], r["line"]) for r in rows_of(table_of(*records, make_record("bitfit")))}
    assert labels == {
        ("lora r=4 lr=0.001", "lora r=4", "lora"),
        ("lora r=8 lr=0.001", "lora r=8", "lora"),
        ("lora r=8 lr=5e-5", "lora r=8", "lora"),
        ("bitfit", "bitfit", "bitfit"),
    }


def test_labels_leave_out_what_follows_from_the_task():
    records = [make_record(task="rte"), make_record(task="sst2", train={"epochs": 1.0})]
    assert {r["label"] for r in rows_of(table_of(*records))} == {"lora"}


def test_labels_tell_apart_every_configuration():
    records = [
        make_record(settings={"rank": r, "targets": t}, train={"epochs": e})
        for r in (2, 4) for t in (["attention.query"], ["mlp.up", "mlp.down"]) for e in (1.0, 3.0)
    ]  # fmt: skip
    labels = [r["label"] for r in rows_of(table_of(*records))]
    assert len(set(labels)) == 8
    assert "lora r=2 targets=mlp.up+mlp.down epochs=3" in labels


def test_lost_runs_are_counted_and_give_no_numbers():
    lost = [
        make_record(seed=i, status=s, test=0.0) for i, s in enumerate(("diverged", "failed", "out_of_memory"), start=2)
    ]
    (row,) = rows_of(table_of(make_record(seed=0, test=0.8), make_record(seed=1, test=0.6), *lost))
    assert row["test_mean"] == pytest.approx(0.7)
    assert (row["seeds"], row["runs"]) == (2, 5)
    assert tables.run_counts(row) == "2 of 5 (1 diverged, 1 out of memory, 1 failed)"


def test_an_undefined_score_is_missing_not_zero():
    (row,) = rows_of(table_of(make_record(seed=0, test=0.8), make_record(seed=1, test=None)))
    assert row["test_mean"] == 0.8
    assert tables.run_counts(row) == "1 of 2 (1 without a score)"


def test_gap_to_full_stays_within_model_task_and_protocol():
    table = by_label(
        table_of(
            *(make_record("full", seed=s, test=0.9 + 0.01 * s) for s in (0, 1)),
            *(make_record("lora", seed=s, test=0.8 + 0.03 * s) for s in (0, 1)),
            make_record("bitfit", task="sst2"),
        )
    )
    assert table["full"]["is_reference"]
    assert table["full"]["gap_mean"] is None
    assert table["lora"]["gap_mean"] == pytest.approx(-0.09)  # -0.10 and -0.08
    assert table["lora"]["gap_std"] == pytest.approx(math.sqrt(2) * 0.01)
    assert table["bitfit"]["gap_mean"] is None


def test_a_lost_run_is_filed_with_the_data_that_it_read():
    records = [make_record(subset=True, data="part"), make_record(data="part", seed=1, status="failed"),
               make_record(subset=None, data="whole")]  # fmt: skip
    assert {(r["data_subset"], r["runs"]) for r in rows_of(table_of(*records))} == {(True, 2), (False, 1)}


def test_learning_rate_is_selected_on_validation_not_test():
    records = [
        make_record(learning_rate=1e-3, validation=0.70, test=0.99),
        make_record(learning_rate=1e-2, validation=0.75, test=0.50),
        make_record(learning_rate=1e-1, status="diverged"),
    ]
    (row,) = rows_of(selected(table_of(*records)))
    assert (row["learning_rate"], row["learning_rates"]) == (1e-2, 3)
    assert row["validation_prefers"] is None


def test_learning_rate_rerun_with_more_seeds_is_kept_and_dissent_is_told():
    records = [make_record(learning_rate=1e-3, seed=s, validation=0.70) for s in range(3)]
    records.append(make_record(learning_rate=1e-2, seed=0, validation=0.75))
    chosen = selected(table_of(*records))
    (row,) = rows_of(chosen)
    assert (row["learning_rate"], row["seeds"], row["validation_prefers"]) == (1e-3, 3, 1e-2)
    (table,) = tables.leaderboards(chosen)
    assert any("prefers another one for lora (0.01)" in note for note in table.notes)


def test_selection_of_a_loss_takes_the_smaller():
    records = [make_record(metric="loss", learning_rate=lr, test=v) for lr, v in ((1e-3, 2.0), (1e-2, 1.0))]
    (row,) = rows_of(selected(table_of(*records)))
    assert row["learning_rate"] == 1e-2


def test_mean_over_tasks_wants_every_task():
    records = [make_record("lora", task=t, seed=s, test=v) for t, s, v in
               (("rte", 0, 0.6), ("rte", 1, 0.8), ("cola", 0, 0.4), ("cola", 1, 0.4))]  # fmt: skip
    chosen = selected(table_of(*records, make_record("ia3", task="rte")))
    (row,) = rows_of(over_tasks(chosen))
    assert row["variant"] == "lora"
    assert row["test_mean"] == pytest.approx(0.55)
    assert row["test_std"] == pytest.approx(math.sqrt(2) * 0.05)  # seed means 0.5 and 0.6
    whole = tables.overview(chosen)
    assert whole.headers[-1] == "mean of 2 tasks"
    assert [r[-1] for r in whole.rows] == ["0.550 ± 0.071", tables.MISSING]


def test_records_that_are_none_are_named():
    with pytest.raises(UserError, match=r"record 'x' lacks .*spec.model.name"):
        frame([{"run_id": "x", "status": "completed", "spec": {}}])
    with pytest.raises(UserError, match="status 'done'"):
        frame([make_record(status="done")])


# Tables.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (tables.human_count(73_728), "73.7k"),
        (tables.human_count(770), "770"),
        (tables.human_count(999_960), "1.0M"),
        (tables.human_count(None), "–"),
        (tables.human_bytes(2_411_725), "2.3 MiB"),
        (tables.human_bytes(80), "80 B"),
        (tables.human_seconds(0.0414), "41 ms"),
        (tables.human_seconds(0.00414), "4.14 ms"),
        (tables.human_seconds(1.5), "1.50 s"),
        (tables.plus_minus(0.8123, 0.0061), "0.812 ± 0.006"),
        (tables.plus_minus(-0.02, None, signed=True), "−0.020"),
        (tables.plus_minus(-0.0001, None, signed=True), "0.000"),
        (tables.plus_minus(None, None), "–"),
        (tables.tex_escape("50% of a_b ± 1 & −2"), r"50\% of a\_b $\pm$ 1 \& $-$2"),
        (tables.memory_title("cuda"), "peak VRAM"),
    ],
)  # fmt: skip
def test_cells(text, expected):
    assert text == expected


def test_leaderboard_in_every_form():
    table = tables.terminal_tables(make_sweep(seeds=2))[0]
    assert table.headers == [
        "method", "test accuracy", "seeds", "gap to full", "adapter params", "head params", "checkpoint",
        "step time p50", "tokens/s", "peak memory (tracked tensors)",
    ]  # fmt: skip
    assert table.rows[0][0] == "full"
    assert table.rows[0][3] == "reference"
    assert all(len(row) == len(table.headers) for row in table.rows)
    markdown = tables.to_markdown(table).splitlines()
    assert len(markdown) == 12
    assert markdown[1].startswith("| --- | ---: |")
    latex = tables.to_latex(table)
    assert latex.count(r" \\") == 11
    assert r"\begin{tabular}{lrrrrrrrrr}" in latex
    raw = list(csv.DictReader(tables.to_csv(table).splitlines()))
    assert raw[0]["adapter_parameters"] == "22565000.0"
    assert raw[-1]["variant"] == "head"


def test_columns_with_sentences_wrap_in_latex():
    table = tables.Table("t", "T", ["row", "why", "n"], [["a-row-of-its-own", "word " * 20, "1"]], pd.DataFrame(), 2)
    latex = tables.to_latex(table)
    widths = [float(w) for w in re.findall(r"p\{([\d.]+)\\linewidth\}", latex)]
    assert len(widths) == 2
    assert widths[0] < widths[1] < sum(widths) <= 0.8
    assert "% needs booktabs and array" in latex
    assert re.search(r"\\begin\{tabular\}\{.*r\}", latex)


def test_what_a_reader_must_know_is_in_the_title_and_the_notes():
    (table,) = tables.terminal_tables([make_record(protocol="paper", subset=True)])
    assert table.title == "rte (subset, protocol paper): test accuracy"
    assert table.notes[:2] == [tables.PAPER, tables.SUBSET]


def test_kinds_of_memory_do_not_share_a_column():
    records = [make_record(), make_record(device="NVIDIA H100 80GB HBM3")]
    (table,) = tables.terminal_tables(records)
    assert table.headers[-2:] == ["peak VRAM", "peak memory (tracked tensors)"]
    assert "device" in table.headers
    assert sorted(row[-1] for row in table.rows) == ["180.0 MiB", "–"]


# Plots.


def test_scale_gives_zero_a_place_left_of_the_rest():
    scale = plots.Scale([0.0, 1e3, 1e6], "count", always_log=True)
    assert scale(0.0) < scale(1e3) - 0.4
    assert scale(1e6) == pytest.approx(6.0)
    axes = Figure().subplots()
    scale.apply(axes, "parameters")
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1k", "10k", "100k", "1M"]


def test_scale_is_linear_within_a_factor_of_eight():
    scale = plots.Scale([0.030, 0.142], "seconds")
    axes = Figure().subplots()
    scale.apply(axes, "step")
    assert scale(0.1) == pytest.approx(100.0)
    assert axes.get_xlabel() == "step (ms)"


def test_labels_find_room_or_say_that_there_is_none():
    axes = Figure(figsize=(3, 3)).subplots()
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    assert plots.place_labels(axes, [(0.5, 0.5), (0.52, 0.5), (0.5, 0.52)], ["one", "two", "three"])
    boxes = [t.get_window_extent(axes.figure.canvas.get_renderer()) for t in axes.texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert not plots.place_labels(axes, [(0.5, 0.5)] * 40, ["a rather long name"] * 40)


@pytest.mark.parametrize(
    "records",
    [
        [make_record()],
        [make_record("head", adapter=0)],
        [make_record("head", adapter=0), make_record("full"), make_record("ia3", status="out_of_memory")],
        [make_record(metric="loss", test=2.0), make_record("full", metric="loss", test=1.5)],
    ],
    ids=["one", "only-zero-parameters", "one-lost", "loss"],
)  # fmt: skip
def test_small_folders_are_drawn(records):
    drawn = list(plots.all_plots(table_of(*records)))
    assert [p.name for p in drawn] == ["pareto-parameters", "pareto-step-time", "pareto-memory"]


def test_plots_leave_global_settings_alone(tmp_path):
    before = dict(matplotlib.rcParams)
    for plot in plots.all_plots(table_of(*make_sweep(seeds=1))):
        plots.save(plot, tmp_path)
    assert dict(matplotlib.rcParams) == before


# Memory by component.


def with_components(record, shape=(32, 64), residual=0, **components):
    """The record with a peak that consists of `components` (MiB) and a residual (bytes)."""
    parts = {part: components.get(part, 0) * 2**20 for part in COMPONENTS}
    peak = sum(parts.values()) + residual
    memory = record["cost"]["memory"] | parts | {"residual": residual, "peak": peak, "peak_phase": "backward"}
    profile = f"{record['cost']['profile_id']}-{record['spec']['method']}-{shape}"
    shape = {"batch_size": shape[0], "length": shape[1]}
    return record | {"cost": record["cost"] | {"memory": memory, "shape": shape, "profile_id": profile}}


def some_components():
    return [
        with_components(make_record("lora"), weights=80, adapter=1, optimizer=2, activations=100, workspace=7),
        with_components(make_record("full"), weights=80, gradients=80, optimizer=160, activations=90, residual=-600),
        make_record("ia3"),  # made before components were measured
    ]


def test_memory_table_has_what_was_accounted_for():
    (table,) = tables.memory(selected(table_of(*some_components())))
    assert table.headers == [
        "method", "rows × tokens", "peak memory (tracked tensors)", *COMPONENTS, "residual", "peak in",
    ]  # fmt: skip
    assert table.rows[0] == [
        "lora", "32 × 64", "190.0 MiB", "80.0 MiB", "1.0 MiB", "0 B", "2.0 MiB", "100.0 MiB", "7.0 MiB", "0 B",
        "backward",
    ]  # fmt: skip
    assert [row[0] for row in table.rows] == ["lora", "full"]
    assert table.rows[1][-2] == "−600 B"
    assert table.raw["memory_residual_bytes"].tolist() == [0, -600]


def test_tasks_of_one_shape_share_a_row_of_memory():
    records = [with_components(make_record(task=task), weights=80) for task in ("rte", "cola")]
    for record in records:
        record["cost"]["profile_id"] = "same"
    records.append(with_components(make_record(task="sst2"), (32, 128), weights=90))
    (table,) = tables.memory(selected(table_of(*records)))
    assert [row[:3] for row in table.rows] == [["lora", "cola, rte", "32 × 64"], ["lora", "sst2", "32 × 128"]]


def test_kinds_of_memory_do_not_share_a_table_or_figure():
    records = [
        with_components(make_record(), weights=80),
        with_components(make_record(device="NVIDIA H100 80GB HBM3"), weights=80),
    ]
    chosen = selected(table_of(*records))
    assert [t.name for t in tables.memory(chosen)] == ["memory-cuda", "memory-tracked_tensors"]
    drawn = list(plots.memory_plots(chosen))
    labels = {p.name: p.figure.axes[0].get_xlabel() for p in drawn}
    assert labels == {
        "memory-components-nvidia-h100-80gb-hbm3-cuda": "peak VRAM (MiB)",
        "memory-components-cpu-tracked_tensors": "peak memory (tracked tensors, MiB)",
    }


def test_bars_of_memory_stack_up_to_the_sum():
    (plot,) = plots.memory_plots(selected(table_of(*some_components())))
    (axes,) = plot.figure.axes
    ends = {}
    for bar in axes.patches:
        place = round(bar.get_y() + bar.get_height() / 2)
        ends[place] = max(ends.get(place, 0), bar.get_x() + bar.get_width())
    assert [label.get_text() for label in axes.get_yticklabels()] == ["lora", "full"]
    assert ends == pytest.approx({0: 190, 1: 410})
    assert "VRAM" not in plot.caption
    assert "0.0 %" in plot.caption


def test_records_without_components_have_no_table_or_figure_of_them():
    chosen = selected(table_of(make_record(), make_record("full")))
    assert tables.memory(chosen) == []
    assert list(plots.memory_plots(chosen)) == []


def test_many_configurations_leave_full_fine_tuning_in_the_picture():
    zoo = [with_components(make_record(f"m{i:02}"), weights=80, activations=i) for i in range(60)]
    (plot,) = plots.memory_plots(selected(table_of(*zoo, with_components(make_record("full"), weights=500))))
    shown = [label.get_text() for label in plot.figure.axes[0].get_yticklabels()]
    assert (len(shown), shown[0], shown[-1]) == (plots.MOST_BARS, "m00", "full")
    assert f"{61 - plots.MOST_BARS} configurations" in plot.caption


def test_a_report_shows_memory_by_component_where_it_is_known(tmp_path):
    paths = write_report(some_components(), tmp_path / "new")
    assert {"memory.csv", "memory.tex", "memory-components.png"} <= {p.name for p in paths}
    text = paths[0].read_text()
    assert "## Memory by component" in text
    assert "figures/memory-components.png" in text
    old = write_report([make_record(), make_record("full")], tmp_path / "old")
    assert "Memory by component" not in old[0].read_text()


# Report.


def digests(folder):
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*.*")}


def test_report_is_complete_and_the_same_twice(tmp_path):
    records = make_sweep(tasks=("rte", "cola"), tuned=True, seeds=2, zoo=ZOO[:7])
    records.append(make_record(method="ia3", seed=5, status="failed", error="RuntimeError: a | b"))
    folder = tmp_path / "sweep"
    paths = write_report(records, folder)
    first = digests(folder)
    assert {str(p.relative_to(folder)) for p in paths} == set(first)
    names = {p.name for p in paths}
    assert {"report.md", "runs.csv", "configurations.csv", "overview.tex", "leaderboard-rte.csv", "tried-rte.tex",
            "pareto-parameters.png", "pareto-memory.pdf", "pareto-step-time.svg", "pareto-parameters-mean.png",
            "rank.png", "learning-rate.svg", "unfinished.csv"} <= names  # fmt: skip
    text = paths[0].read_text()
    assert "RuntimeError: a \\| b" in text
    assert "3 of 71 runs did not complete" in text
    assert "tracked tensors" in text
    assert "VRAM" not in text.replace("It is not VRAM", "")
    for link in ("figures/rank.png", "tables/overview.csv"):
        assert f"({link})" in text
        assert (folder / "report" / link).exists()
    (folder / "report" / "figures" / "stale.png").write_text("")
    write_report(list(reversed(records)), folder)
    assert digests(folder) == first


def test_report_of_nothing_says_so_in_one_line(tmp_path):
    with pytest.raises(UserError, match="no records"):
        write_report([], tmp_path)
    lost = [make_record(status="failed", error="Traceback\nValueError: no"), make_record(seed=1, status="diverged")]
    with pytest.raises(
        UserError, match=r"none of 2 runs completed \(1 diverged, 1 failed\); first: .*ValueError: no"
    ) as e:
        write_report(lost, tmp_path)
    assert "\n" not in str(e.value)
    assert not list(tmp_path.iterdir())


def test_a_thousand_runs_are_read_quickly():
    zoo = [(f"m{i}", {"rank": 2 ** (i % 4)}, 1000 * i, 0.002 * i, 0.05, 100.0, 1e-3) for i in range(28)]
    records = make_sweep(tasks=("rte", "cola", "sst2", "mrpc", "stsb", "qnli", "mnli"), zoo=zoo)
    start = time.perf_counter()
    table = table_of(*records)
    assert len(table) == 196
    assert time.perf_counter() - start < 15


def test_a_report_waits_for_another_being_written(tmp_path):
    made = [make_record("lora", test=0.7), make_record("full", test=0.8)]
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with ThreadPoolExecutor(1) as pool:
        try:
            waiting = pool.submit(write_report, made, tmp_path)
            with pytest.raises(TimeoutError):
                waiting.result(timeout=1)
            assert not (tmp_path / "report").exists()
        finally:
            os.close(handle)
        assert all(path.exists() for path in waiting.result(timeout=120))
