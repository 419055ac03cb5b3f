"""Values by key, as LaTeX prints them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from peftbench.analysis.tables import plus_minus, slug, tex_escape

GREEK = {"λ": r"\lambda", "Λ": r"\Lambda", "Γ": r"\Gamma", "χ": r"\chi", "η": r"\eta", "θ": r"\theta", "α": r"\alpha",
         "σ": r"\sigma", "Δ": r"\Delta", "Σ": r"\Sigma", "Π": r"\Pi", "γ": r"\gamma", "β": r"\beta"}  # fmt: skip
SIGNS = {"·": r"\cdot", "√": r"\surd", "≤": r"\leq", "≥": r"\geq", "⊙": r"\odot", "⊗": r"\otimes", "∘": r"\circ",
         "⌈": r"\lceil", "⌉": r"\rceil", "²": "^2", "³": "^3", "⁴": "^4", "₀": "_0", "₁": "_1", "₂": "_2",
         "→": r"\to", "←": r"\leftarrow", "≈": r"\approx"}  # fmt: skip
MATHEMATICS = {sign: f"${tex}$" for sign, tex in (GREEK | SIGNS).items()}
TYPOGRAPHY = {"—": "---", "’": "'", "“": "``", "”": "''", "\u00a0": "~"}

RAGGED = r">{\raggedright\arraybackslash}"
"""Before a column of a table that holds sentences."""


def tex(text: str) -> str:
    """Return plain text as LaTeX prints it.

    Raises:
        ValueError: a letter that nobody said how to print.
    """
    out = tex_escape(text)
    for sign, written in (MATHEMATICS | TYPOGRAPHY).items():
        out = out.replace(sign, written)
    out = out.replace(r" \%", r"\,\%")
    out = out.replace("--", "-{}-") if "--" in text else out  # two hyphens of a command are no dash
    strange = sorted({c for c in out if ord(c) > 255})
    if strange:
        raise ValueError(f"no LaTeX for {', '.join(strange)} in {text!r}")
    return out


def typed(command: str) -> str:
    """Return a command in typewriter type that may break after a space, a slash, a comma and an equals sign."""
    out = tex(command)
    for sign in ("/", ",", "="):
        out = out.replace(sign, rf"{sign}\allowbreak{{}}")
    return rf"\texttt{{{out}}}"


def decimals(value: float | None, digits: int, signed: bool = False) -> str | None:
    """Return a number with so many decimals and a real minus sign; None for None, NaN and infinities."""
    if value is None or not math.isfinite(value):
        return None
    return plus_minus(value, None, digits, signed)


def between(ends: Sequence[float] | None, digits: int) -> str | None:
    """Return "[low, high]"; None where there is none."""
    if ends is None or not all(math.isfinite(e) for e in ends):
        return None
    return f"[{plus_minus(ends[0], None, digits)}, {plus_minus(ends[1], None, digits)}]"


def listed(names: Sequence[str], nothing: str = "none") -> str:
    """Return "a, b and c"."""
    if not names:
        return nothing
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


@dataclass
class Values:
    """Key → LaTeX; None for what was looked for and no record holds. A key is `<source>/<what>/…`."""

    found: dict[str, str | None] = field(default_factory=dict)

    def put(self, key: str, text: str | None) -> None:
        """Keep plain text, or None for what is missing; a key is given once.

        Raises:
            ValueError: the key has a value already, or cannot be a key.
        """
        self.raw(key, None if text is None else tex(text))

    def raw(self, key: str, written: str | None) -> None:
        """Keep LaTeX as it is."""
        if key in self.found:
            raise ValueError(f"{key}: given twice")
        if set(key) & set("\\{}#%&$~^ ") or not key.isascii():
            raise ValueError(f"{key}: cannot be a key")
        self.found[key] = written

    def count(self, key: str, value: float | None) -> None:
        """Keep a whole number, with commas from ten thousand on."""
        text = None if value is None else (f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.0f}")
        self.put(key, text)

    def number(self, key: str, value: float | None, digits: int, signed: bool = False) -> None:
        """Keep a number with so many decimals."""
        self.put(key, decimals(value, digits, signed))

    def power(self, key: str, value: float | None) -> None:
        """Keep a number of any size to one significant digit: 7e-06 → 7 × 10⁻⁶."""
        if value is None:
            self.raw(key, None)
            return
        digit, exponent = f"{value:.0e}".split("e")
        self.raw(key, f"${digit}\\times 10^{{{int(exponent)}}}$")

    def interval(self, key: str, ends: Sequence[float] | None, digits: int) -> None:
        """Keep two ends."""
        self.put(key, between(ends, digits))

    def tex(self) -> str:
        """Return definitions for `\\val`, in order of keys."""
        lines = [f"\\paperval{{{key}}}{{{_or_missing(text)}}}" for key, text in sorted(self.found.items())]
        return "\n".join([*lines, ""])


def _or_missing(text: str | None) -> str:
    return r"\notmeasured{}" if text is None else text


def key(text: Any) -> str:
    """Return a part of a key: lower case, hyphens for what is no letter and digit."""
    return slug(str(text)).replace("_", "-")


@dataclass(frozen=True)
class Sheet:
    """A table for LaTeX.

    Args:
        spec: of the `tabular`, such as "lrr".
        rows: cells as LaTeX prints them; None is a rule between groups.
    """

    spec: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str] | None]

    def tex(self, long: bool = False) -> str:
        """Return a `tabular` with booktabs rules, or a `longtable` under `\\longcaption`, to break over pages."""
        head = " & ".join(self.headers) + r" \\"
        body = [r"\midrule" if row is None else " & ".join(row) + r" \\" for row in self.rows]
        if long:
            lines = [
                rf"\begin{{longtable}}{{@{{}}{self.spec}@{{}}}}",
                r"\caption{\longcaption}\\",
                r"\toprule",
                head,
                r"\midrule",
            ]
            lines += [r"\endfirsthead", r"\toprule", head, r"\midrule", r"\endhead", r"\bottomrule", r"\endlastfoot"]
            lines += [*body, r"\end{longtable}"]
        else:
            lines = [rf"\begin{{tabular}}{{{self.spec}}}", r"\toprule", head, r"\midrule", *body, r"\bottomrule"]
            lines.append(r"\end{tabular}")
        return "\n".join([*lines, ""])


def cells(row: Sequence[str | None]) -> list[str]:
    """Return plain text cells as LaTeX, an en dash for None."""
    return ["--" if one is None else tex(one) for one in row]
