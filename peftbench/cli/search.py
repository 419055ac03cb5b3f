"""``search``: hyperparameters by Optuna, trials side by side."""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from peftbench.cli.sweep import interruptible, show_table
from peftbench.sweep import say

if TYPE_CHECKING:
    from peftbench.search.prepare import Prepared
    from peftbench.search.studies import Study

HELP = """\
Search hyperparameters: one Optuna study a method, whose trials train side by side as a sweep's runs do.

examples:
  python -m peftbench search model=minilm-l6 task=rte method=lora,dora,ia3 search.trials=32
  python -m peftbench search task=rte method=lora search.space=learning_rate search.sampler=gp search.seed=1
  python -m peftbench search task=rte method=lora 'train.learning_rate=tag(log,interval(1e-4,1e-2))' method.rank=4,8,16
  python -m peftbench search task=rte method=lora search.pruner=successive_halving train.evaluate_every=40
  python -m peftbench search task=rte method=lora,vera search.objectives=quality,adapter_parameters search.sampler=nsga2
  python -m peftbench search protocol=equal_budget task=rte method=lora,dora,ia3 search.final_seeds=5
  python -m peftbench search task=rte method=lora search.workers=4 search.storage=postgresql://user@host/optuna

search.trials=32           of each method
search.space=default       a file in conf/search (default, small, learning_rate), or the path of one
search.sampler=tpe         gp, nsga2, random, grid
search.pruner=none         successive_halving, hyperband, median: ends runs early by their validation metric
search.objectives=quality  several of quality (on validation), adapter_parameters, memory, time
search.batch=auto          trials asked for at once and trained side by side: 8, or fewer with many workers
search.seed=0              of the sampler
search.storage=sqlite      journal, or a database's URL; the first two are files of the results folder
search.workers=1           processes on this machine; the same command started several times works too
search.heartbeat=60        seconds between signs of life of workers

protocol=equal_budget      tunes all methods at the same expense, runs each one's best settings again on new seeds, and
                           compares these runs on test (docs/fair-comparison.md):
  search.final_seeds=5     of each method, none of which a trial had
  search.budget=trials     or parameters search.target_parameters=300k, wall_clock search.seconds=600,
                           memory search.memory=8GiB, flops search.target_flops=1e15 (or train.steps)
  search.tolerance=0.1     share by which what is held equal may be missed

The other keys are those of sweep (python -m peftbench sweep --help). A key given one value is fixed, one of method.* or
train.* given several is searched over these. Records go to <results>/<sweep.name>/runs, the best configurations to
<results>/<sweep.name>/search/best-<method>.yaml, which sweep experiment=<file> runs again. Interrupt at any time; the
same command goes on, and with a larger search.trials adds to what is there.
exit code: 0 all trials are done, 1 some failed or none completed, 2 bad input, 130 interrupted"""


def search(arguments: Sequence[str], quiet: bool = False) -> int:
    """Search; returns the exit code.

    Raises:
        UserError: something keeps a trial from running.
    """
    from peftbench.search.prepare import prepare

    prepared = prepare(arguments)
    code = interruptible(lambda: _work(prepared, arguments, quiet), lambda: prepared.folder)
    return 130 if code is None else code


def _work(prepared: "Prepared", arguments: Sequence[str], quiet: bool) -> int:
    from peftbench.search.work import Worker, open_studies

    studies = open_studies(prepared)
    if not quiet:
        for line in prepared.lines:
            say(line)
    if prepared.config.workers > 1:
        _processes(prepared.config.workers, arguments, quiet)
    else:
        Worker(prepared, quiet, tell=(lambda line: None) if quiet else say, studies=studies).work()
    code = finish(prepared, studies, quiet)
    if prepared.budget is not None and not any(map(_missing, studies)):
        code = max(code, _finals(prepared, studies, arguments, quiet))
    _report(prepared, studies)
    return code


def _finals(prepared: "Prepared", studies: Sequence["Study"], arguments: Sequence[str], quiet: bool) -> int:
    """Run each method's best settings on new seeds and show them; returns the exit code."""
    from peftbench.cli.sweep import finish as finish_sweep
    from peftbench.cli.sweep import multirun
    from peftbench.search.finals import seeds_of, sweep_arguments, write_finals, write_plan

    given = [a.partition("=")[2] for a in arguments if a.lstrip("+").startswith("profile=")]
    file = write_finals(prepared, studies, given[-1] if given else None)
    if file is None:
        write_plan(prepared, studies, [])
        return 1
    if not quiet:
        say(f"the best settings of each method with seeds {', '.join(map(str, seeds_of(prepared)[1]))}:")
    outcome = multirun(sweep_arguments(prepared, file), quiet)
    write_plan(prepared, studies, outcome.specs)
    return finish_sweep(outcome, quiet, report=False)


def _report(prepared: "Prepared", studies: Sequence["Study"]) -> None:
    """Write the search's own report and print its path."""
    from peftbench.analysis.search_report import write_search_report
    from peftbench.analysis.studies import of_optuna
    from peftbench.search.storage import OWN, locked
    from peftbench.store import Store

    # A file of the folder may hold studies of earlier commands too.
    found = None if prepared.config.storage in OWN else [of_optuna(study.optuna) for study in studies]
    with locked(prepared.folder):  # workers that end together write the same report
        written = write_search_report(prepared.folder, Store(prepared.folder).records(), found)
    if written:
        print(f"report: {written[0]}")


def _processes(count: int, arguments: Sequence[str], quiet: bool) -> None:
    """Have processes of this machine work on the search until all are done."""
    variables = dict(os.environ)
    threads = max(1, len(os.sched_getaffinity(0)) // count)
    variables.setdefault("OMP_NUM_THREADS", str(threads))
    command = [sys.executable, "-m", "peftbench.search", *arguments, *(["--quiet"] if quiet else [])]
    workers = [subprocess.Popen(command, env=variables) for _ in range(count)]
    try:
        for number, worker in enumerate(workers):
            code = worker.wait()
            if code < 0:
                say(f"worker {number + 1} was ended by signal {-code}")
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.terminate()
        for worker in workers:
            worker.wait()


def finish(prepared: "Prepared", studies: Sequence["Study"], quiet: bool) -> int:
    """Write the best configurations, show them, and say what is missing; returns the exit code."""
    from peftbench.search.best import write_best
    from peftbench.search.storage import described

    files = [write_best(prepared, study, point) for study, point in zip(studies, prepared.points, strict=True)]
    if not quiet:
        _show(studies)
    for study, file in zip(studies, files, strict=True):
        print(f"best of {study.about.name}: {file or 'no trial completed'}")
    print(f"studies: {described(prepared.config.storage, prepared.folder)}")
    missing = {study.about.name: left for study in studies if (left := _missing(study))}
    for name, left in missing.items():
        say(f"{name}: {left} trials are missing; the same command goes on")
    bad = _complain(studies)
    return 1 if bad or missing or None in files else 0


def _missing(study: "Study") -> int:
    if study.about.held.room is not None:
        return study.left()
    from optuna.trial import TrialState

    from peftbench.search.studies import counts

    ended = sum(counts(t) and t.state.is_finished() for t in study.trials() if t.state != TrialState.WAITING)
    return max(0, study.config.trials - ended)


def _statuses(study: "Study") -> Counter[str]:
    from peftbench.search import LOST

    found = [str(t.user_attrs.get("status")) for t in study.trials() if t.state.is_finished()]
    return Counter(status for status in found if status != LOST)


def _complain(studies: Sequence["Study"]) -> int:
    """Say which trials failed and why; returns how many."""
    bad = 0
    for study in studies:
        for trial in study.trials():
            status = str(trial.user_attrs.get("status"))
            if trial.state.is_finished() and status in ("failed", "out_of_memory", "refused"):
                bad += 1
                reason = f": {error}" if (error := trial.user_attrs.get("error")) else ""
                say(f"{study.about.name} trial {trial.number}: {status.replace('_', ' ')}{reason}")
    return bad


def _show(studies: Sequence["Study"]) -> None:
    import pandas as pd

    from peftbench.analysis.studies import short_name, value_text
    from peftbench.analysis.tables import Table
    from peftbench.search.best import best_trials, objective_name

    first = studies[0]
    headers = [*(objective_name(first, i) for i in range(len(first.config.objectives))), "trial", "trials", "settings"]
    rows = []
    for study in studies:
        counted = ", ".join(f"{n} {status.replace('_', ' ')}" for status, n in _statuses(study).most_common())
        for trial in best_trials(study):
            settings = " ".join(f"{short_name(key)}={value_text(v)}" for key, v in trial.params.items())
            values = [f"{value:.4g}" for value in trial.values]
            names = [study.about.method, study.about.task, study.about.model]
            rows.append([*names, *values, str(trial.number), counted, settings])
    if not rows:
        return
    headers = ["method", "task", "model", *headers]
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    show_table(Table("search", "Best trials", headers, rows, pd.DataFrame(rows), text_columns=3), console)
