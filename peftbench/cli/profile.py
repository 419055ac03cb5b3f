"""``profile``: the cost of one configuration, with a timeline and the memory's history for looking at."""

import json
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from peftbench.errors import UserError
from peftbench.store import Store
from peftbench.sweep import configure, say, sweep_folder

HELP = """\
Measure what one configuration costs, alone on a batch of fixed shape, and write traces of a few warm steps.

examples:
  python -m peftbench profile method=lora method.rank=8 train.batch_size=32
  python -m peftbench profile model=tiny-bert task=tiny method=full results=/tmp/results sweep.name=try --json

The keys are those of run (python -m peftbench run --help). A sweep of the same name takes the cost over.
Written to <results>/<sweep.name>/traces/<profile_id>/:
  trace.json.gz   timeline with forward, backward and optimizer: ui.perfetto.dev or chrome://tracing
  memory.pickle   the allocator's history, on a GPU: pytorch.org/memory_viz
  memory.json     memory by component and phase"""


def profile(arguments: Sequence[str], as_json: bool = False) -> int:
    """Measure one configuration, write its traces and print its cost; returns the exit code.

    Raises:
        UserError: more than one run is asked for, measuring is switched off, it does not fit into memory, or the folder
            cannot be written.
    """
    parsed, config = configure(arguments)
    if parsed.swept:
        raise UserError(f"{parsed.swept[0]}: profile takes one value for each key; use sweep for lists")
    if parsed.hydra:
        raise UserError(f"{parsed.hydra[0]}: profile uses no launcher; use sweep")
    from peftbench.resolve import demand, plan

    planned = plan(demand(parsed.grid, config.experiment), config.device)
    if len(planned.specs) != 1:
        raise UserError(f"profile takes exactly one run, this makes {len(planned.specs)}")
    (spec,) = planned.specs
    for line in planned.lines:
        say(line)
    if not spec.profile["enabled"]:
        raise UserError("profile.enabled=false: there is nothing to measure; expected true")
    store = Store(sweep_folder(config))
    store.prepare()
    cost, folder = _measured(spec, store)
    files = {path.name: str(path) for path in sorted(folder.iterdir())}
    if as_json:
        print(json.dumps({"run_id": spec.run_id, "cost": cost, "traces": files}, indent=1, ensure_ascii=False))
        return 0
    show(f"{spec.method['name']} on {spec.task['name']} with {spec.model['name']}", cost)
    for path in files.values():
        print(path)
    if "memory.pickle" not in files:
        print("no history of allocations: only the CUDA allocator keeps one")
    return 0


def _measured(spec: Any, store: Store) -> tuple[dict[str, Any], Any]:
    import torch

    from peftbench.cost import profile_once
    from peftbench.progress import Quiet

    try:
        return profile_once(spec, store, Quiet())
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of memory: {str(error).splitlines()[0]} Try a smaller train.batch_size or train.max_length"
        ) from None


def show(title: str, cost: dict[str, Any]) -> None:
    """Print a cost record as two tables: what it is, and memory by component and phase."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    for heading, rows in ((title, facts(cost)), (_memory_title(cost), memory(cost))):
        table = Table(title=heading, title_justify="left", title_style="bold", show_header=False, box=None)
        table.add_column(no_wrap=True)
        table.add_column()
        for row in rows:
            table.add_row(*row)
        console.print(table, markup=False, highlight=False)


def facts(cost: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what a cost record says but for memory, in words."""
    from peftbench.analysis.human import human_bytes, human_count, human_seconds

    step, shape, share = cost["step_seconds"], cost["shape"], cost.get("step_share")
    settled = "" if step["stable"] else "; not settled"
    launches = [(cost.get(f"{what}_per_step"), what) for what in ("operations", "kernels")]
    rows = [
        ("batch", f"{shape['batch_size']} × {shape['length']} tokens, {cost.get('execution', 'eager')}"),
        (
            "parameters",
            f"{human_count(cost['adapter_parameters'])} adapter, {human_count(cost['head_parameters'])} head, "
            f"{human_count(cost['total_parameters'])} in all",
        ),
        ("checkpoint", human_bytes(cost["checkpoint_bytes"])),
        (
            "step",
            f"{human_seconds(step['p50'])} (p10 {human_seconds(step['p10'])}, p90 {human_seconds(step['p90'])}, "
            f"{len(step['samples'])} timed after {step['warmup_steps']}{settled})",
        ),
        ("shares", _listed((_percent(v), k) for k, v in share.items()) if share else "–"),
        ("launches per step", _listed((human_count(v), what) for v, what in launches if v is not None) or "–"),
        (
            "tokens/s",
            f"{human_count(cost['tokens_per_second'])} real, "
            f"{human_count(cost['padded_tokens_per_second'])} with padding",
        ),
        (
            "arithmetic",
            f"{human_count(cost['flops_per_token'])} FLOP a token counted, "
            f"{human_count(cost['analytic_flops_per_token'])} analytic; {_percent(cost['model_flops_utilization'])} of "
            f"{cost['matmul_ceiling_flops_per_second'] / 1e12:.3g} TFLOP/s",
        ),
        (
            "traffic",
            f"{human_bytes(cost.get('memory_traffic_bytes'))} a step if nothing is fused; "
            f"{_percent(cost.get('memory_bandwidth_utilization'))} of "
            f"{human_bytes(cost.get('copy_bandwidth_bytes_per_second'))}/s",
        ),
        ("start", f"{human_seconds(cost['startup_seconds'])}, compilation {human_seconds(cost['compile_seconds'])}"),
    ]
    if cost["energy_joules_per_1k_tokens"] is not None:
        rows.append(("energy", f"{cost['energy_joules_per_1k_tokens']:.3g} J per 1000 tokens"))
    return rows


def memory(cost: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the memory of a cost record by component, phase and holder."""
    from peftbench.analysis.frame import COMPONENTS, PHASES
    from peftbench.analysis.human import human_bytes, signed_bytes

    found = cost["memory"]
    rows = [("peak", f"{human_bytes(found['peak'])}, in {found.get('peak_phase') or 'a step'}")]
    for part in (*COMPONENTS, "residual"):
        value = found.get(part)
        share = "" if value is None else f" ({_percent(value / found['peak'])})"
        rows.append((f"  {part}", signed_bytes(value) + share))
    phases = found.get("phases") or {}
    rows.append(("most in use", _listed((human_bytes(phases.get(p)), p) for p in PHASES)))
    held = (("reserved", "allocator"), ("device_used", "whole device"), ("process_peak", "process"))
    rows.append(("held", _listed((human_bytes(found[k]), what) for k, what in held if found.get(k) is not None)))
    return rows


def _memory_title(cost: dict[str, Any]) -> str:
    from peftbench.analysis.tables import memory_title

    return memory_title(cost["memory"]["kind"])


def _percent(value: Any) -> str:
    from peftbench.analysis.human import MISSING

    return MISSING if value is None else f"{100 * value:.1f} %".replace("-", "−")


def _listed(pairs: Any) -> str:
    return ", ".join(f"{value} {what}" for value, what in pairs)
