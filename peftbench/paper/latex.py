"""The built folder → a PDF, where LaTeX is installed."""

import os
import re
import shutil
import subprocess
from pathlib import Path

from peftbench.errors import UserError

JOB = "peftbench"
PACKAGES = "texlive-latex-base texlive-latex-recommended texlive-latex-extra texlive-fonts-recommended lmodern latexmk"
"""What Debian calls them."""
LIMIT = 300
TROUBLE = re.compile(r"^(?:!|.*(?:Overfull|undefined|multiply defined|No file)).*$", re.MULTILINE)


def missing() -> str | None:
    """Return a line that says what is not installed; None where a PDF can be made."""
    if shutil.which("pdflatex") is None or (shutil.which("latexmk") is None and shutil.which("bibtex") is None):
        return f"no PDF: LaTeX is not installed here (Debian: apt-get install --no-install-recommends {PACKAGES})"
    return None


def compile_pdf(folder: Path, main: str, epoch: int) -> tuple[Path, list[str]]:
    """Return the PDF of `<folder>/<main>` and the log's complaints; `epoch` is the date it carries, so bytes repeat.

    Raises:
        UserError: LaTeX failed; names the log and its first error.
    """
    environment = {**os.environ, "SOURCE_DATE_EPOCH": str(epoch), "FORCE_SOURCE_DATE": "1"}
    once = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", f"-jobname={JOB}", main]
    if shutil.which("latexmk") is not None:
        options = ["-pdf", "-bibtex", "-interaction=nonstopmode", "-halt-on-error", "-gg", f"-jobname={JOB}"]
        commands = [["latexmk", *options, main]]
    else:
        commands = [once, ["bibtex", JOB], once, once]
    log, pdf = folder / f"{JOB}.log", folder / f"{JOB}.pdf"
    pdf.unlink(missing_ok=True)
    for command in commands:
        try:
            done = subprocess.run(
                command,
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=LIMIT,
                check=False,
            )
        except subprocess.TimeoutExpired as expired:
            raise UserError(f"{command[0]} was not done after {LIMIT} s; see {log}") from expired
        if done.returncode:
            raise UserError(f"{command[0]} failed: {_first_error(log)}; see {log}")
    return pdf, complaints(log)


def complaints(log: Path) -> list[str]:
    """Return a log's lines on what a reader would see: lines too wide, references to nothing."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    return [line.strip() for line in TROUBLE.findall(text) if "rerunfilecheck" not in line]


def _first_error(log: Path) -> str:
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    found = re.search(r"^! .*(?:\n.*){0,3}", text, re.MULTILINE)
    return " ".join(found.group().split()) if found else "no error in the log"
