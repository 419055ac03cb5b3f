"""The gate: which reference judges which method, and the kept results of all checks."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from peftbench import registry
from peftbench.errors import UserError, nearest
from peftbench.verify import RESULTS, Parity, bench, source_sha256

REFERENCES = {
    "peft": "HF PEFT, given the same tensors through the method's PeftFormat",
    "adapters": "numbers written by the adapters library, kept beside the check",
    "formula": "the paper's formula on dense weights, one run, autograd",
    "loop": "the paper's algorithm as a plain training loop",
    "torch": "the base's own weights trained by torch.optim.AdamW",
}
"""In order of preference; each is a module of this package with `check(method, model) -> Parity`."""
MODULES = {"peft": "peft", "adapters": "fixtures", "formula": "formulas", "loop": "loops", "torch": "native"}


def check_function(reference: str) -> Callable[[str, str], Parity]:
    """Return the check against a reference.

    Raises:
        UserError: there is no such reference.
    """
    if reference not in REFERENCES:
        raise UserError(
            f"--against {reference}: expected one of {', '.join(REFERENCES)}{nearest(reference, REFERENCES)}"
        )
    return importlib.import_module(f"peftbench.verify.{MODULES[reference]}").check  # type: ignore[no-any-return]


def references(name: str, model: str | None = None) -> list[str]:
    """Return the references that hold the method `name` (on `model`, if one is given), best first."""
    from peftbench.verify import fixtures, formulas, loops, peft

    found = []
    if registry.method_class(name).peft is not None and (model is None or peft.covers(name, model)):
        found.append("peft")
    if any(method == name and model in (None, on) for method, on in fixtures.cases()):
        found.append("adapters")
    if name in formulas.FORMULAS or name in formulas.PROMPTS:
        found.append("formula")
    if name in loops.LOOPS:
        found.append("loop")
    elsewhere = registry.method_class(name).peft is not None or any(method == name for method, _ in fixtures.cases())
    return found if found or elsewhere else ["torch"]


def checks(names: Sequence[str], models: Sequence[str], against: str | None = None) -> Iterator[Parity]:
    """Check every method on every model, each against its references or the one named.

    A pair that the method itself refuses, and a model whose weights are not at hand, are left out; what a reference
    cannot do is a result that says so and does not pass.

    Raises:
        UserError: unknown method, model or reference; the one named does not hold the method.
    """
    for name in names:
        registry.check_option("method", name)
    for model in models:
        registry.check_option("model", model)
    for name in names:
        known = references(name)
        if against is not None:
            check_function(against)
            if against not in known:
                raise UserError(f"--against {against}: it has no {name}; {', '.join(known)} has")
        for model in models:
            try:
                bench.chosen(name, bench.fresh(model, name), model)
            except UserError:
                continue
            for reference in references(name, model):
                if against in (None, reference):
                    yield _checked(reference, name, model)


def _checked(reference: str, name: str, model: str) -> Parity:
    try:
        return check_function(reference)(name, model)
    except UserError as error:
        return Parity(name, reference, model, error=str(error))


def keep(found: Sequence[Parity]) -> None:
    """Put the checks into the kept results, in place of earlier ones of the same methods.

    Raises:
        UserError: the file cannot be written; it is then as it was.
    """
    kept: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"methods": {}}
    for name in dict.fromkeys(p.method for p in found):
        kept["methods"][name] = {
            "source_sha256": source_sha256(name),
            "checks": [_compact(p) for p in found if p.method == name],
        }
    kept["methods"] = {n: kept["methods"][n] for n in sorted(kept["methods"]) if n in registry.options("method")}
    temporary = RESULTS.with_name(f".{RESULTS.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
        os.replace(temporary, RESULTS)
    except OSError as error:
        raise UserError(
            f"--write: {RESULTS} cannot be written ({error.strerror}); expected room and permission"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _compact(parity: Parity) -> dict[str, Any]:
    """Return a check as plain data with three digits to a deviation, so that machines do not differ in noise."""
    return {k: float(f"{v:.2e}") if isinstance(v, float) else v for k, v in parity.to_dict().items() if k != "method"}
