"""``verify``: the parity gate on the command line."""

import json
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from peftbench import registry
from peftbench.errors import UserError
from peftbench.verify import RESULTS, TOLERANCES, Parity

HELP = """\
Compare methods with independent implementations: the same adapter weights on the same inputs (fp32, CPU), then outputs,
gradients, the losses of 20 AdamW steps, merged weights and parameter counts. Exit code 1 if anything disagrees.

examples:
  python -m peftbench verify
  python -m peftbench verify lora dora --against peft
  python -m peftbench verify houlsby --model tiny-bert --json
  python -m peftbench verify --write        keep the results that records and the documentation cite"""


def verify(
    methods: Sequence[str], against: str | None, models: Sequence[str] | None, as_json: bool, write: bool
) -> int:
    """Run the gate and print what it found; returns 1 if a check failed, else 0.

    Raises:
        UserError: unknown names, or nothing to check.
    """
    from peftbench.verify import bench, gate

    names = list(dict.fromkeys(methods)) or list(registry.options("method"))
    if write and (against is not None or models):
        raise UserError("--write keeps the whole gate's results: leave out --against and --model")
    console = Console(stderr=True)
    found: list[Parity] = []
    for parity in gate.checks(names, models or bench.MODELS, against):
        found.append(parity)
        if not as_json and console.is_terminal:
            console.print(f"{parity.method} on {parity.model}: {'ok' if parity.passed else 'differs'}", highlight=False)
    if not found:
        raise UserError(f"verify: {', '.join(names)} fits none of {', '.join(models or bench.MODELS)}")
    if write:
        gate.keep(found)
    if as_json:
        print(json.dumps([p.to_dict() for p in found], indent=1, ensure_ascii=False))
    else:
        _show(found)
        failed = sum(not p.passed for p in found)
        print(f"{len(found) - failed} of {len(found)} checks agree" + (f"; kept in {RESULTS}" if write else ""))
    return int(any(not p.passed for p in found))


def _show(found: Sequence[Parity]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    headers = [
        "method",
        "reference",
        "model",
        *(f"{k} ≤{v:.0e}" for k, v in TOLERANCES.items()),
        "trainable",
        "verdict",
    ]
    for index, header in enumerate(headers):
        table.add_column(header, no_wrap=index < len(headers) - 1)
    for p in found:
        counts = "–" if p.trainable is None else " = ".join(str(n) for n in dict.fromkeys(p.trainable))
        if p.trainable is not None and p.trainable[0] != p.trainable[1]:
            counts = " ≠ ".join(map(str, p.trainable))
        deviations = ["–" if getattr(p, k) is None else f"{getattr(p, k):.1e}" for k in TOLERANCES]
        verdict = p.error or ("equal" if p.passed else "DIFFERS")
        table.add_row(p.method, p.reference, p.model, *deviations, counts, verdict + (f" ({p.note})" if p.note else ""))
    console = Console()
    if not console.is_terminal:
        console = Console(width=220)
    console.print(table, highlight=False, markup=False)
