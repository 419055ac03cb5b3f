"""``estimate``: what a configuration will cost, and what fits into a GPU, from shapes alone."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from peftbench import registry
from peftbench.errors import UserError
from peftbench.plan import Demand, points
from peftbench.sweep import configure, say

HELP = """\
Predict parameters, checkpoint size, FLOPs and peak memory by component in seconds, without weights, texts or a GPU.

examples:
  python -m peftbench estimate model=llama-3.1-8b method=qlora method.rank=16 train.batch_size=4 train.max_length=1024
  python -m peftbench estimate model=llama-3.1-8b method=lora train.precision=bf16 train.checkpointing=true --vram 24GiB
  python -m peftbench estimate model=llama-3.1-8b train.precision=bf16 train.batch_size=1 --vram 24GiB --fit
  python -m peftbench estimate model=roberta-large method=lora,dora,full method.rank=4,8,16,64 --vram 8GiB --fit --json

The keys are those of run (python -m peftbench run --help). Without a task it is one of text, for an encoder one of two
classes.
device=cpu predicts live tensors on a CPU; pack=<n> predicts n runs side by side.

--vram <size>  whether it fits, and the largest batch that does (24GiB, 24GB or 24576MiB)
--fit          which methods fit: all of them, or those given, at their own settings or those given;
               most adapter parameters first, then least memory"""

UNTOLD = ("results", "sweep.name", "experiment", "retry_failed", "save_adapters")
"""Keys of a sweep that mean nothing here."""


@dataclass(frozen=True)
class Candidate:
    """One configuration and what became of its prediction."""

    point: dict[str, Any]
    prediction: Any = None
    refused: str | None = None

    @property
    def settings(self) -> str:
        """The method's settings that were given."""
        return " ".join(f"{k.removeprefix('method.')}={v}" for k, v in self.point.items() if k.startswith("method."))


def estimate(arguments: Sequence[str], vram: str | None = None, fit: bool = False, as_json: bool = False) -> int:
    """Print the prediction of one configuration or, with `fit`, those of all; returns the exit code.

    Raises:
        UserError: a key or value that does not fit, several configurations without `fit`, `fit` without `vram`.
    """
    from peftbench.capacity import parse_bytes

    parsed, config = configure(arguments)
    if parsed.hydra:
        raise UserError(f"{parsed.hydra[0]}: estimate uses no launcher")
    for key in UNTOLD:
        if key in parsed.top:
            raise UserError(f"{key}: estimate trains and writes nothing; expected a key of a run, device or pack")
    if fit and vram is None:
        raise UserError("--fit: expected --vram <size> too, such as --vram 24GiB")
    total = None if vram is None else parse_bytes("--vram", vram)
    kind = "cpu" if config.device == "cpu" else "cuda"
    runs = 1 if config.pack == "auto" else int(config.pack)
    defaults: dict[str, Sequence[Any]] = {"model": ["minilm-l6"], "method": ["lora"], "train": ["default"]}
    if fit:
        defaults["method"] = registry.options("method")
    given = {k: v for k, v in parsed.grid.items() if k not in ("seed", "protocol") and k.partition(".")[0] != "profile"}
    for group in ("method", "task", "train"):
        for option in given.get(group, ()):
            registry.check_option(group, str(option))
    names = [str(name) for name in given.get("method", defaults["method"])]
    found, lines = points(Demand([defaults], given=given), {name: registry.declared(name) for name in names})
    if not fit and len(found) > 1:
        raise UserError(f"estimate takes one configuration, this makes {len(found)}; --fit compares several")
    for line in lines:
        say(line)
    if fit:
        assert total is not None
        return _fit(found, kind, runs, total, as_json)
    return _one(found[0], kind, runs, total, as_json)


def _one(point: dict[str, Any], kind: str, runs: int, total: int | None, as_json: bool) -> int:
    from peftbench import capacity
    from peftbench.estimate import predict, setting_of, with_batch
    from peftbench.resolve import Resolver

    spec, task = Resolver("cpu").sketch(point)
    setting = setting_of(spec, task, runs)
    prediction = predict(setting, kind)
    result: dict[str, Any] = prediction.to_dict()
    if total is not None:
        limit = capacity.room(total, kind)
        rows = capacity.largest(
            lambda rows: predict(with_batch(setting, rows), kind, exact=False).peak,
            limit,
            step=setting.train.accumulation,
            guess=setting.train.batch_size,
        )
        result["vram"] = {"bytes": total, "room": limit, "fits": prediction.peak <= limit, "largest_batch": rows}
    if as_json:
        print(json.dumps({"model": spec.model["name"], "method": spec.method, **result}, indent=1, ensure_ascii=False))
        return 0
    packed = f", {runs} runs side by side" if runs > 1 else ""
    show(f"{spec.method['name']} on {spec.model['name']}{packed}", facts(result))
    return 0


def facts(result: dict[str, Any]) -> list[tuple[str, str]]:
    """Return a prediction in words."""
    from peftbench.analysis.human import human_bytes, human_count
    from peftbench.profiling.replay import COMPONENTS

    memory, assumed = result["memory"], result["assumed"]
    rows = [
        (
            "parameters",
            f"{human_count(result['adapter_parameters'])} adapter, {human_count(result['head_parameters'])} head, "
            f"{human_count(result['total_parameters'])} in all",
        ),
        ("checkpoint", human_bytes(result["checkpoint_bytes"])),
        (
            "FLOPs/token",
            f"{human_count(result['flops_per_token'])} counted, "
            f"{human_count(result['analytic_flops_per_token'])} analytic",
        ),
        ("peak memory", human_bytes(memory["peak"])),
        *((f"  {name}", human_bytes(memory[name])) for name in COMPONENTS),
    ]
    if memory["managed"]:
        rows.append(("  paged, beside", human_bytes(memory["managed"])))
    kind = "CUDA" if assumed["device_kind"] == "cuda" else "CPU (live tensors)"
    checkpointing = "checkpointing" if assumed["checkpointing"] else "no checkpointing"
    rows.append(
        (
            "assumed",
            f"{kind}, {assumed['batch_size']} × {assumed['length']} tokens, {assumed['precision']}, {checkpointing}, "
            f"{assumed['optimizer']}, {assumed['execution']}",
        )
    )
    if "vram" in result:
        given = result["vram"]
        verdict = "fits" if given["fits"] else "does not fit"
        largest = f"largest batch {given['largest_batch']}" if given["largest_batch"] else "no batch does"
        rows.append((human_bytes(given["bytes"]), f"{verdict} into {human_bytes(given['room'])} of it; {largest}"))
        if not given["fits"]:
            rows += [("to save", ", ".join(lighter))] if (lighter := lighter_settings(assumed)) else []
    return rows


def lighter_settings(assumed: Mapping[str, Any]) -> list[str]:
    """Return the settings that would need less memory than those assumed."""
    choices = {
        "train.precision=bf16": assumed["precision"] == "fp32",
        "train.checkpointing=true": not assumed["checkpointing"],
        "train.optimizer=adamw8bit": assumed["optimizer"] == "adamw",
        "a shorter train.max_length": True,
    }
    return [setting for setting, open_ in choices.items() if open_]


def show(title: str, rows: Sequence[tuple[str, str]]) -> None:
    """Print a heading and pairs."""
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None)
    table.add_column(no_wrap=True)
    table.add_column()
    for row in rows:
        table.add_row(*row)
    _console().print(table, markup=False, highlight=False)


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=140)


def _fit(found: Sequence[dict[str, Any]], kind: str, runs: int, total: int, as_json: bool) -> int:
    from peftbench import capacity
    from peftbench.analysis.human import human_bytes, human_count
    from peftbench.resolve import Resolver

    limit = capacity.room(total, kind)
    resolver = Resolver("cpu")
    candidates = [_candidate(resolver, point, kind, runs) for point in found]
    known = [c for c in candidates if c.prediction is not None]
    known.sort(key=lambda c: (c.prediction.peak > limit, -c.prediction.adapter_parameters, c.prediction.peak))
    refused = [c for c in candidates if c.prediction is None]
    if as_json:
        fitting = [
            {"point": c.point, "fits": c.prediction.peak <= limit, "refused": None, **c.prediction.to_dict()}
            for c in known
        ]
        others = [{"point": c.point, "fits": None, "refused": c.refused} for c in refused]
        vram = {"bytes": total, "room": limit}
        print(json.dumps({"vram": vram, "candidates": fitting + others}, indent=1, ensure_ascii=False))
        return 0
    table = Table(
        title=f"into {human_bytes(limit)} of {human_bytes(total)}", title_justify="left", title_style="bold", box=None
    )
    for header in ("method", "settings", "fits", "adapter parameters", "peak memory", "left"):
        table.add_column(header, justify="left" if header in ("method", "settings", "fits") else "right")
    for c in known:
        left = limit - c.prediction.peak
        table.add_row(
            str(c.point["method"]),
            c.settings or "–",
            "yes" if left >= 0 else "no",
            human_count(c.prediction.adapter_parameters),
            human_bytes(c.prediction.peak),
            human_bytes(left) if left >= 0 else f"{human_bytes(-left)} too much",
        )
    console = _console()
    console.print(table, markup=False, highlight=False)
    for c in refused:
        named = " ".join(filter(None, (str(c.point["method"]), c.settings)))
        console.print(f"{named}: {c.refused}", markup=False, highlight=False)
    return 0


def _candidate(resolver: Any, point: dict[str, Any], kind: str, runs: int) -> Candidate:
    from peftbench.estimate import predict, setting_of

    try:
        spec, task = resolver.sketch(point)
        return Candidate(point, predict(setting_of(spec, task, runs), kind, exact=False))
    except UserError as error:
        return Candidate(point, refused=" ".join(str(error).split()))
