"""``sweep`` and ``run``: train what is asked for, then show it."""

import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from threading import Thread
from types import FrameType
from typing import Any, TypeVar

from rich.cells import cell_len
from rich.console import Console, JustifyMethod
from rich.table import Table as RichTable
from rich.text import Text

from peftbench import job, progress
from peftbench.cli import vocabulary
from peftbench.errors import UserError, nearest
from peftbench.store import Store
from peftbench.sweep import Outcome, configure, prepare, say, sweep_folder

T = TypeVar("T")
LAUNCHER_EXTRAS = {"joblib": "joblib", "submitit_slurm": "slurm", "submitit_local": "slurm", "ray": "ray"}

SWEEP_HELP = """\
Train every run of a grid that has no record yet, and end with a table and a report.

Without a method or an experiment it is experiment=default. Comma lists, range(), glob() and choice() sweep over values.
A swept setting that a method lacks is dropped for it; equal runs collapse.

examples:
  python -m peftbench sweep
  python -m peftbench sweep method=full,lora method.rank=2,4 seed=range(0,3) train.steps=80 sweep.name=ranks
  python -m peftbench sweep 'method=glob(*)' task=rte,mrpc model=roberta-base train.learning_rate=1e-4,1e-3
  python -m peftbench sweep experiment=default seed=0,1,2,3,4 results=results sweep.name=five-seeds
  python -m peftbench sweep method=lora seed=0,1,2,3 pack=2 hydra/launcher=joblib hydra.launcher.n_jobs=2

groups:    model=  method=  task=  train=  profile=     (python -m peftbench models|methods|tasks)
settings:  method.rank= method.alpha= ...  train.steps= train.epochs= train.batch_size= train.learning_rate=
           train.max_length= train.precision=fp32|bf16 train.dropout=<p>|null ...
           train.execution=eager|compiled|graphs|compiled_graphs  seed=  protocol=held_out|paper
the sweep: experiment=<name or file.yaml>  results=<folder>  sweep.name=<name>  pack=auto|<n>  device=auto|cpu|cuda
           retry_failed=true  save_adapters=true

A run whose predicted memory exceeds the device's is refused before anything starts, unless with --force.
Records go to <results>/<sweep.name>/runs/<run_id>.json. Interrupt at any time; the same command resumes.
exit code: 0 all runs completed, 1 some failed, 2 bad input, 130 interrupted"""

RUN_HELP = """\
Train exactly one run; the record is the same as a sweep's.

examples:
  python -m peftbench run
  python -m peftbench run method=lora method.rank=8 task=movie-reviews train.steps=80
  python -m peftbench run model=tiny-bert task=tiny method=full seed=3 results=/tmp/results sweep.name=try

The keys are those of sweep (python -m peftbench sweep --help), one value each."""


def _one_line(error: BaseException) -> str:
    parts = [str(error), *([str(error.__cause__)] if error.__cause__ else [])]
    return " ".join(" ".join(parts).split())


def _hydra_error(error: BaseException, arguments: Sequence[str]) -> UserError:
    """Return what Hydra says of a bad configuration in one line, with the extra that a missing launcher comes in."""
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key.lstrip("+") == "hydra/launcher":
            if value in LAUNCHER_EXTRAS:
                extra = LAUNCHER_EXTRAS[value]
                if "launcher" in str(error):
                    return UserError(f"{argument}: launcher not installed; pip install 'peftbench[{extra}]'")
            elif "launcher" in str(error):
                valid = ("basic", *LAUNCHER_EXTRAS)
                return UserError(f"{argument}: no such launcher{nearest(value, valid)} (known: {', '.join(valid)})")
    return UserError(_one_line(error))


def multirun(arguments: Sequence[str], quiet: bool, force: bool = False) -> Outcome:
    """Hand the command line to Hydra's multirun with our sweeper; raises UserError for a bad configuration."""
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from peftbench.registry import composer

    parsed, config = configure(arguments)
    folder = str(sweep_folder(config)).replace("\\", "\\\\").replace("'", "\\'")
    options = [f"hydra.sweeper.{name}={str(on).lower()}" for name, on in (("quiet", quiet), ("force", force))]
    hydra = [f"hydra.sweep.dir='{folder}'", *options, *parsed.hydra]
    try:
        with composer():
            app = GlobalHydra.instance().hydra
            assert app is not None
            return app.multirun("config", job.execute, [*hydra, *parsed.lines])
    except (HydraException, OmegaConfBaseException) as error:
        raise _hydra_error(error, parsed.hydra) from error


def interruptible(work: Callable[[], T], folder: Callable[[], Path]) -> T | None:
    """Do `work`; None after Ctrl-C or SIGTERM, with a line that says what is kept.

    An interrupt may come out of a library as an error of its own: whatever is raised after the signal is the interrupt.
    """
    came: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        came.append(number)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return work()
    except BaseException as error:
        if not came and not isinstance(error, KeyboardInterrupt):
            raise
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the line below is short
        kept = len(list((folder() / "runs").glob("*.json")))
        say(f"interrupted: {kept} finished runs are kept in {folder()}; the same command goes on from there")
        return None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def show(records: Sequence[dict[str, Any]]) -> None:
    """Print the result tables of `records`."""
    from peftbench.analysis.tables import terminal_tables

    console = Console()
    if not console.is_terminal:
        console = Console(width=200)  # a pipe has no width to wrap at
    for table in terminal_tables(list(records)):
        show_table(table, console)


def show_table(table: Any, console: Console) -> None:
    """Print a `peftbench.analysis.tables.Table` with as many of its columns as the console has room for."""
    widths = _widths(table, console.width)
    shown = RichTable(title=Text(table.title), title_justify="left", title_style="bold")
    for index, width in enumerate(widths):
        justify: JustifyMethod = "left" if index < table.text_columns else "right"
        shown.add_column(Text(table.headers[index]), justify=justify, width=width, overflow="fold")
    for row in table.rows:
        shown.add_row(*map(Text, row[: len(widths)]))
    console.print(shown)
    left_out = ", ".join(table.headers[len(widths) :])
    for note in [*([f"no room for {left_out}: see the report"] if left_out else []), *table.notes]:
        console.print(note, markup=False, highlight=False)


def _widths(table: Any, room: int) -> list[int]:
    """Return the widths of the first columns, as many as fit into `room` with three more for each and one for all.

    Numbers are never wrapped, headers and text between words, or anywhere in text that takes a third of the room.
    """
    least, most = [], []
    for index, header in enumerate(table.headers):
        cells = [str(row[index]) for row in table.rows]
        words = max(cell_len(word) for text in (header, *cells) for word in text.split() or [""])
        text = index < table.text_columns
        least.append(min(words, room // 3) if text else max(map(cell_len, [*header.split(), *cells])))
        most.append(max(map(cell_len, [header, *cells])))
    while len(least) > table.text_columns + 1 and sum(least) + 3 * len(least) + 1 > room:
        least.pop()
    spare = room - sum(least) - 3 * len(least) - 1
    widths = []
    for narrow, wide in zip(least, most, strict=False):
        more = max(0, min(wide - narrow, spare))
        widths.append(narrow + more)
        spare -= more
    return widths


def finish(outcome: Outcome, quiet: bool, report: bool) -> int:
    """Show the table, write the report, sum up what went wrong; returns the exit code."""
    statuses = outcome.statuses()
    wanted = [record for run_id in statuses if (record := outcome.store.record(run_id)) is not None]
    if wanted and not quiet:
        show(wanted)
    if report and any(record["status"] == "completed" for record in wanted):
        write_report(outcome.store)
    counts = Counter(statuses.values())
    bad = [run_id for run_id, status in statuses.items() if status not in ("completed", "absent")]
    if bad:
        what = ", ".join(f"{counts[s]} {s.replace('_', ' ')}" for s in sorted({statuses[b] for b in bad}))
        say(f"{len(bad)} of {len(statuses)} runs did not complete ({what}):")
        for run_id in bad:
            reason = str((outcome.store.record(run_id) or {}).get("error") or "").strip().splitlines()
            say(f"  {run_id}: {statuses[run_id].replace('_', ' ')}{': ' + reason[-1] if reason else ''}")
        if counts["failed"] or counts["out_of_memory"]:
            say("retry_failed=true runs the failed and out-of-memory ones again")
    for error in outcome.errors:
        say(f"a pack was lost: {error}")
    if outcome.stopped:
        raise UserError(outcome.stopped)
    elsewhere = [run_id for run_id, status in statuses.items() if status == "absent"]
    if elsewhere and not outcome.errors:
        owner = next((o for run_id in elsewhere if (o := outcome.store.claimed(run_id))), None)
        by = f"by process {owner['pid']} on {owner['host']}" if owner else "by another process"
        say(f"{len(elsewhere)} runs are being trained {by}")
    return 1 if bad or outcome.errors else 0


def write_report(store: Store, further: Sequence[Any] = ()) -> list[Path]:
    """Write the report of all records of a store, and that of its search where there is one, and print the paths.

    Args:
        further: sections of the report beside those of a search and of published figures (`analysis.html.Section`).
    """
    from peftbench.analysis import html, search_report
    from peftbench.analysis.report import write_report as write
    from peftbench.reproduce.section import section

    records, sections = search_report.for_report(store.folder, store.records())
    beside = filter(None, [section(records, store.folder.name)])
    paths = write(records, store.folder, vocabulary.defaults(records), [*sections, *further, *beside])
    for line in [*report_lines(paths), *filter(None, [html.missing()])]:
        print(line)
    return paths


REPORT_NEEDS = (
    "peftbench.analysis.report", "peftbench.analysis.search_report", "matplotlib.backends.backend_agg",
    "matplotlib.backends.backend_pdf", "matplotlib.backends.backend_svg", "fontTools.subset", "scipy.special", "plotly",
)  # fmt: skip


WARM_SECONDS = 4.0
"""How long a GPU's first steps may keep the host busy: kernels are looked up and compiled, steps made one by one."""


def load_report(specs: Sequence[Any]) -> None:
    """While a GPU trains, which leaves the host idle, import what the report will need; not where it would compete."""
    if not specs[0].device.startswith("cuda"):
        return

    def load() -> None:
        time.sleep(WARM_SECONDS)
        for module in REPORT_NEEDS:
            with suppress(ImportError):  # the report says what it lacks
                import_module(module)

    Thread(target=load, daemon=True).start()


def report_lines(paths: Sequence[Path]) -> list[str]:
    """Return the lines that name the report, its page and its Pareto plots."""
    lines = [f"report: {path}" for path in paths if path.suffix == ".md"]
    lines += [f"page: {path}" for path in paths if path.suffix == ".html"]
    plots = [path for path in paths if path.suffix == ".png"]
    pareto = [path for path in plots if "pareto" in path.name]
    return lines + [f"Pareto plot: {path}" for path in pareto]


def sweep(arguments: Sequence[str], quiet: bool = False, force: bool = False) -> int:
    """Run a sweep; returns the exit code."""
    _, config = configure(arguments)
    progress.meanwhile(load_report)
    outcome = interruptible(lambda: multirun(arguments, quiet, force), lambda: sweep_folder(config))
    return 130 if outcome is None else finish(outcome, quiet, report=True)


def run(arguments: Sequence[str], quiet: bool = False, force: bool = False) -> int:
    """Run exactly one run; returns the exit code. Raises UserError for a list of values."""
    parsed, config = configure(arguments)
    if parsed.swept:
        raise UserError(f"{parsed.swept[0]}: run takes one value for each key; use sweep for lists")
    if parsed.hydra:
        raise UserError(f"{parsed.hydra[0]}: run uses no launcher; use sweep")

    def work() -> Outcome:
        prepared = prepare(arguments, single=True, force=force)
        if not quiet:
            for line in prepared.lines:
                say(line)
        answers = []
        with progress.display([pack.specs for pack in prepared.jobs], quiet):
            for pack in prepared.jobs:
                answers.append({"runs": job.train(pack), "stopped": None})
        return prepared.outcome(answers)

    outcome = interruptible(work, lambda: sweep_folder(config))
    if outcome is None:
        return 130
    code = finish(outcome, quiet, report=False)
    for spec in outcome.specs:
        print(f"record: {outcome.store.runs / spec.run_id}.json")
        if config.save_adapters and outcome.store.adapter(spec.run_id).is_dir():
            print(f"adapter: {outcome.store.adapter(spec.run_id)}")
    return code
