"""The commands: ``python -m peftbench sweep|run|search|report|profile|estimate|verify|reproduce|methods|models|…``."""

import argparse
import atexit
import contextlib
import errno
import gc
import os
import shlex
import sys
import threading
from collections.abc import Sequence
from typing import NoReturn

import peftbench
from peftbench import startup
from peftbench.cli import doctor, estimate, lists, paper, profile, report, reproduce, search, sweep, verify
from peftbench.environment import COMMAND
from peftbench.errors import UserError, nearest

COMMANDS = {
    "sweep": ("train a grid of runs", sweep.SWEEP_HELP),
    "run": ("train one run", sweep.RUN_HELP),
    "search": ("search hyperparameters", search.HELP),
    "report": ("tables and plots of a sweep", report.HELP),
    "profile": ("measure one configuration, with traces", profile.HELP),
    "estimate": ("predict cost and what fits into a GPU", estimate.HELP),
    "verify": ("compare methods with reference implementations", verify.HELP),
    "reproduce": ("published figures beside ours", reproduce.HELP),
    "paper": ("the paper from records", paper.HELP),
    "methods": ("list the methods", lists.METHODS_HELP),
    "models": ("list the models", lists.MODELS_HELP),
    "tasks": ("list the tasks", lists.TASKS_HELP),
    "doctor": ("say what this machine offers", doctor.HELP),
}


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Print the line and exit 2."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def parser() -> Parser:
    """Return the command line's parser."""
    top = Parser("python -m peftbench", description=peftbench.__doc__, formatter_class=argparse.RawTextHelpFormatter)
    top.add_argument("--version", action="version", version=f"peftbench {peftbench.__version__}")
    commands = top.add_subparsers(dest="command", metavar="command")
    for name, (short, text) in COMMANDS.items():
        one = commands.add_parser(name, help=short, description=text, formatter_class=argparse.RawTextHelpFormatter)
        if name in ("sweep", "run"):
            one.add_argument("overrides", nargs="*", metavar="key=value", help="Hydra overrides, see above")
            one.add_argument("--quiet", action="store_true", help="print only what went wrong and the report's path")
            one.add_argument("--force", action="store_true", help="start even what will not fit into memory")
        if name == "search":
            one.add_argument("overrides", nargs="*", metavar="key=value", help="search.* and the keys of sweep")
            one.add_argument("--quiet", action="store_true", help="print only what went wrong and the files written")
        if name in ("profile", "estimate"):
            one.add_argument("overrides", nargs="*", metavar="key=value", help="the keys of run")
        if name in ("methods", "models", "tasks", "profile", "estimate"):
            one.add_argument("--json", action="store_true", help="machine-readable")
        if name == "estimate":
            one.add_argument("--vram", metavar="size", help="memory of the GPU: 24GiB, 24GB, 24576MiB")
            one.add_argument("--fit", action="store_true", help="which methods fit into --vram")
        if name == "methods":
            one.add_argument("--markdown", action="store_true", help="the documentation's tables")
        if name == "verify":
            one.add_argument("methods", nargs="*", metavar="method", help="default: all")
            one.add_argument("--against", metavar="reference", help="peft, adapters, formula or torch; default: all")
            one.add_argument(
                "--model", action="append", metavar="name", help="may be repeated; default: the gate's four"
            )
            one.add_argument("--json", action="store_true", help="machine-readable")
            one.add_argument("--write", action="store_true", help="keep the results in the package")
        if name == "reproduce":
            one.add_argument("names", nargs="*", metavar="name", help="a paper, a row, counts, claims or all")
            one.add_argument("--results", action="append", metavar="folder", help="may be repeated; default: results")
            one.add_argument("--list", action="store_true", help="what there is")
            one.add_argument("--run", action="store_true", help="train the paper's experiment, its cost printed first")
            one.add_argument("--cost", action="store_true", help="print that cost alone")
            one.add_argument("--rate", type=float, metavar="FLOP/s", help="what a GPU is taken to sustain")
            forms = one.add_mutually_exclusive_group()
            for form in ("json", "markdown", "latex"):
                forms.add_argument(f"--{form}", action="store_const", const=form, dest="form", default="table")
        if name == "paper":
            one.add_argument("folder", nargs="?", help="of its prose (default: paper)")
            one.add_argument("--results", metavar="folder", help="of all records (default: results)")
            one.add_argument("--out", metavar="folder", help="default: <folder>/build")
            one.add_argument("--no-pdf", action="store_true", help="sources alone")
        if name == "report":
            one.add_argument("folder", nargs="?", help="<results>/<sweep.name>")
            one.add_argument("--compare", nargs=2, metavar=("A", "B"), help="report B, with what changed since A")
            one.add_argument("--consolidate", action="store_true", help="also write all records to records.jsonl.gz")
            one.add_argument("--slim", action="store_true", help="consolidate without items' scores and steps' losses")
    return top


def dispatch(arguments: Sequence[str]) -> int:
    """Carry out one command; returns its exit code."""
    if arguments and not arguments[0].startswith("-") and arguments[0] not in COMMANDS:
        raise UserError(f"{arguments[0]}: no such command{nearest(arguments[0], COMMANDS)} ({', '.join(COMMANDS)})")
    top = parser()
    given, rest = top.parse_known_args(arguments)
    if given.command is None:
        top.print_help()
        return 2
    if rest and (
        given.command not in ("sweep", "run", "search", "profile", "estimate") or any(r.startswith("-") for r in rest)
    ):
        raise UserError(
            f"{rest[0]}: not an argument of {given.command} (see python -m peftbench {given.command} --help)"
        )
    if given.command in ("sweep", "run"):
        os.environ[COMMAND] = shlex.join(["python", "-m", "peftbench", *arguments])
        work = sweep.sweep if given.command == "sweep" else sweep.run
        return work([*given.overrides, *rest], given.quiet, given.force)
    if given.command == "search":
        os.environ[COMMAND] = shlex.join(["python", "-m", "peftbench", *arguments])
        return search.search([*given.overrides, *rest], given.quiet)
    if given.command == "report":
        return report.report(given.folder, given.consolidate, given.slim, given.compare)
    if given.command == "profile":
        return profile.profile([*given.overrides, *rest], given.json)
    if given.command == "estimate":
        return estimate.estimate([*given.overrides, *rest], given.vram, given.fit, given.json)
    if given.command == "verify":
        return verify.verify(given.methods, given.against, given.model, given.json, given.write)
    if given.command == "reproduce":
        return reproduce.reproduce(
            given.names,
            results=given.results,
            listed=given.list,
            run=given.run,
            cost=given.cost,
            rate=given.rate,
            form=given.form,
        )
    if given.command == "paper":
        return paper.paper(given.folder, given.results, given.out, not given.no_pdf)
    if given.command == "doctor":
        return doctor.doctor()
    if given.command == "methods":
        return lists.methods(given.json, given.markdown)
    return getattr(lists, given.command)(given.json)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; a user's mistake is one line on stderr and exit code 2."""
    try:
        return dispatch(sys.argv[1:] if arguments is None else arguments)
    except UserError as error:
        print(f"peftbench: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of a list, such as head, has seen enough
        sys.stderr.close()
        return 0
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        print(f"peftbench: {error.strerror}: the output could not be written", file=sys.stderr)
        # what waits to be written there goes nowhere, instead of failing once more at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except KeyboardInterrupt:
        return 130


def watched() -> bool:
    """Return whether somebody goes on when `program`, this function's caller's caller, is done, or writes then.

    That is whoever runs it within a program of its own (cProfile, coverage, pdb, trace), python -i, and libraries put
    into the process from outside, as profilers of GPUs are.
    """
    frame, callers = sys._getframe(3).f_back, []
    while frame is not None:
        callers.append(frame.f_globals.get("__name__"))
        frame = frame.f_back
    injected = any(os.environ.get(name) for name in ("LD_PRELOAD", "CUDA_INJECTION64_PATH", "NVTX_INJECTION64_PATH"))
    return callers not in ([], ["runpy", "runpy"]) or bool(sys.flags.inspect) or injected


def leave(code: int) -> NoReturn:
    """End the process with this exit code, without taking apart what goes with it anyway.

    A million objects, recorded steps and the GPU's context take seconds one by one. What has an effect outside is done
    first, as Python does it: threads are waited for, functions registered with atexit are called (among them those that
    close logs and remove temporary folders), output is written.
    """
    # What fails here fails once more at the end of sys.exit, where Python says so and picks the exit code
    with contextlib.suppress(BaseException):
        if not watched():
            threading._shutdown()  # type: ignore[attr-defined]
            atexit._run_exitfuncs()
            for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
                if stream is not None and not stream.closed:
                    stream.flush()
            if "ctypes" in sys.modules:
                sys.modules["ctypes"].CDLL(None).fflush(None)  # what libraries in C print
            os._exit(code)
    sys.exit(code)


def program() -> NoReturn:
    """Run the command line as a program of its own: `python -m peftbench`, or `peftbench`."""
    # Imports make a hundred thousand objects that stay: looking through them again and again takes a second
    gc.set_threshold(10_000, 20, 50)
    startup.lighten()
    leave(main())


if __name__ == "__main__":
    program()
