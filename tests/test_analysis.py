"""Analysis: hand-made numbers whose answers can be checked on paper, and records of realistic shape."""

import math
import random
import zlib

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
            "identity": {"weights": "a" * 64, "data": f"{task}-{data}", "engine": 1, "method": 1, "device_kind": device},
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
        "environment": {"git": {"commit": "0123abc", "dirty": False}, "versions": {"torch": "2.13.0", "python": "3.11.9"},
                        "command": "python -m peftbench sweep method=full,lora"},
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
