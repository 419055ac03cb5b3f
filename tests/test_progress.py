"""What a sweep shows while it works: on terminals of fixed size with a clock of its own, in logs, and when quiet."""

import io
import os
import re
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from peftbench import progress
from peftbench.cli.sweep import show_table
from peftbench.job import Pack
from peftbench.pace import Course, Durations, Rate, clock
from peftbench.progress import Lines, Live, Quiet, described, headline, sparkline
from tests.conftest import make_record, make_spec

ROOT = Path(__file__).resolve().parent.parent


class FakeClock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds

    def __add__(self, seconds: float) -> "FakeClock":
        self.seconds += seconds
        return self


def terminal(width: int = 80, **options) -> Console:
    options = {"force_terminal": True, "color_system": None, "_environ": {}} | options
    return Console(file=io.StringIO(), width=width, height=30, **options)


def runs(count: int, method: str = "lora", task: str = "toy", first: int = 0, model: str = "tiny"):
    return [
        make_spec(**{"method.name": method, "task.name": task, "model.name": model, "seed": first + i})
        for i in range(count)
    ]


def live(packs, width: int = 80):
    time = FakeClock()
    return Live(packs, terminal(width), time), time


def seen(shown: Live, width: int = 80, ascii_only: bool = False) -> list[str]:
    return [line.plain for line in shown.view(width, ascii_only)]


def train(shown: Live, time: FakeClock, specs, steps: int = 100, seconds: float = 12.5, upto: int | None = None):
    """Train `specs` side by side, one step every `seconds / steps`, told of after each."""
    shown.phase("load")
    shown.planned(specs, [steps] * len(specs))
    shown.members(specs)
    shown.phase("train")
    for step in range(1, (upto or steps) + 1):
        time += seconds / steps
        shown.steps(step, steps, [1 / step] * len(specs))


def test_trials_of_a_search_show_validation_and_other_runs_test():
    """Whoever watches a search is not to choose by what will be reported."""
    spec = make_spec()
    assert headline(make_record(spec)) == f"{spec.run_id}: accuracy 0.7500"
    asked = make_record(spec, search={"study": "search-lora-tiny-toy", "trial": 3})
    assert headline(asked) == f"{spec.run_id}: validation accuracy 0.7000"


# The display.


def test_a_sweep_is_shown_from_beginning_to_end():
    packs = [runs(4), [*runs(3, "ia3"), *runs(1, "lora", first=9)]]
    shown, time = live(packs)
    assert seen(shown) == ["packs 0/2  runs 0/8  ──────────  0 completed  elapsed 0:00  left –", ""]
    shown.phase("profile")
    assert seen(shown)[1] == "measuring cost"
    shown.pack(packs[0])
    shown.phase("load")
    time += 5
    assert seen(shown) == [
        "packs 0/2  runs 0/8  ──────────  0 completed  elapsed 0:05  left –",
        "4 × lora on toy with tiny  loading",
    ]
    train(shown, time, packs[0], upto=1)
    assert seen(shown)[1:] == [
        "4 × lora on toy with tiny  training",
        "steps 1/100  ──────────  left –  – steps/s  – runs × steps/s",
        "loss ▁ 1.0000",
    ]
    for step in range(2, 51):
        time += 0.125
        shown.steps(step, 100, [1 / step] * 4)
    shown.evaluated(50, "accuracy", [0.5, 0.75, None, 0.7], True)
    assert seen(shown) == [
        "packs 0/2  runs 0/8  ──────────  0 completed  elapsed 0:11  left 0:24",
        "4 × lora on toy with tiny  training",
        "steps 50/100  ━━━━━─────  left 0:06  8 steps/s  32 runs × steps/s",
        "loss █▃▂▁▁▁▁▁▁▁▁▁▁ 0.0211  accuracy 0.7500 best, 0.7000 median",
    ]
    shown.phase("evaluate")
    assert "evaluating" in seen(shown)[1]
    shown.phase("test")
    assert "testing" in seen(shown)[1]
    time += 5
    for spec, status in zip(packs[0], ("completed", "diverged", "completed", "out_of_memory"), strict=True):
        shown.record(make_record(spec, status))
    assert seen(shown)[0] == ("packs 1/2  runs 4/8  ━━━━━─────  2 completed  1 diverged  1 out of memory"), (
        "the rest of the line goes to the next"
    )
    assert seen(shown)[1] == "elapsed 0:16  left 0:16", "16 seconds for 4 runs, 4 more of their kind"
    shown.pack(packs[1])
    shown.phase("load")
    assert "3 × ia3, 1 × lora on toy with tiny  loading" in seen(shown)


def test_one_run_has_neither_a_best_nor_a_median():
    shown, time = live([runs(1)])
    shown.pack(runs(1))
    train(shown, time, runs(1), upto=10)
    for value, expected in ((0.5, "accuracy 0.5000"), (None, "accuracy –"), (float("nan"), "accuracy –")):
        shown.evaluated(10, "accuracy", [value], True)
        assert seen(shown)[-1].endswith(expected)


def test_the_best_of_a_loss_is_the_lowest():
    shown, time = live([runs(3)])
    shown.pack(runs(3))
    train(shown, time, runs(3), upto=10)
    shown.evaluated(10, "perplexity", [9.0, 4.0, 5.0], False)
    assert seen(shown)[-1].endswith("perplexity 4.0000 best, 5.0000 median")


@pytest.mark.parametrize("width", [10, 20, 40, 60, 80, 200])
def test_no_line_is_wider_than_the_terminal(width):
    packs = [runs(12, task="a-task-with-a-long-name", model="a-model-with-a-long-name")]
    shown, time = live(packs, width)
    for tell in (
        lambda: None,
        lambda: shown.pack(packs[0]),
        lambda: train(shown, time, packs[0], upto=60),
        lambda: shown.evaluated(60, "matthews_correlation", [0.25] * 12, True),
        lambda: [shown.record(make_record(s, "failed", error="x")) for s in packs[0][:6]],
    ):
        tell()
        assert max(cell_len(line) for line in seen(shown, width)) <= width
        with shown.console.capture() as captured:
            shown.console.print(shown)
        assert max(cell_len(line) for line in captured.get().splitlines()) <= width


def test_forty_columns_hold_everything():
    shown, time = live([runs(4)])
    shown.pack(runs(4))
    train(shown, time, runs(4), upto=50)
    shown.evaluated(50, "accuracy", [0.5, 0.75, 0.25, 0.7], True)
    assert seen(shown, 40) == [
        "packs 0/1  runs 0/4  ──────────",
        "0 completed  elapsed 0:06  left 0:06",
        "4 × lora on toy with tiny  training",
        "steps 50/100  ━━━━━─────  left 0:06",
        "8 steps/s  32 runs × steps/s",
        "loss █▃▂▁▁▁▁▁▁▁▁▁▁ 0.0211",
        "accuracy 0.7500 best, 0.6000 median",
    ]


def test_a_terminal_without_unicode_gets_other_marks():
    shown, time = live([runs(2)])
    shown.pack(runs(2))
    train(shown, time, runs(2), upto=50)
    text = "".join(seen(shown, ascii_only=True))
    assert not set(text) & set("━─▁▂▃▄▅▆▇█")
    assert "#####-----" in text


def test_many_methods_are_counted():
    specs = [s for m in ("lora", "ia3", "ssf", "bitfit", "lora") for s in runs(2, m)]
    assert described(specs) == "4 × lora, 2 × ia3, 2 × ssf, 2 × bitfit on toy with tiny"
    specs += runs(1, "dora")
    assert described(specs) == "11 runs: 4 × lora, 2 × ia3, 2 × ssf, 2 more methods on toy with tiny"
    assert described([*runs(1), *runs(1, task="other")]) == "2 × lora on toy, other with tiny"


# Losses.


def test_a_sparkline_goes_from_the_lowest_to_the_highest_value():
    assert sparkline([1, 2, 3, 4, 5, 6, 7, 8]) == "▁▂▃▄▅▆▇█"
    assert sparkline([3, 3, 3]) == "▁▁▁"
    assert sparkline([]) == ""
    assert sparkline([0, 1], ascii_only=True) == "_^"


def test_losses_are_means_over_the_pack_and_half_seconds():
    shown, time = live([runs(2)])
    shown.pack(runs(2))
    shown.steps(1, 1000, [4.0, 2.0])
    assert shown.losses == (3.0,)
    for step, value in ((2, 2.0), (3, 1.0)):
        time += 0.2
        shown.steps(step, 1000, [value, value])
    assert shown.losses == (3.0,)
    time += 0.2
    shown.steps(4, 1000, [float("nan"), 0.0])
    assert shown.losses == (3.0, 1.0), "a diverged run does not spoil the mean"


def test_a_look_that_is_told_again_is_one_look():
    shown, time = live([runs(2)])
    shown.pack(runs(2))
    for step in range(1, 10):
        time += 1.0
        shown.steps(step, 1000, [0.5, 0.5])
        shown.steps(step, 1000, None)
        shown.steps(step, 1000, [float("inf"), None])
    assert shown.losses == (0.5,)


def test_the_sparkline_keeps_the_last_values():
    shown, time = live([runs(1)])
    shown.pack(runs(1))
    for step in range(1, 101):
        time += 1.0
        shown.steps(step, 1000, [float(step)])
    assert shown.losses == tuple(float(i) for i in range(71, 101))


# Pace and time left.


def test_a_rate_counts_training_alone():
    rate = Rate()
    rate.at(0.0, 1)
    assert rate.value is None
    rate.at(1.0, 11)
    assert rate.value == 10
    rate.pause(1.0)
    rate.pause(2.0)
    rate.resume(31.0)
    rate.at(32.0, 21)
    assert rate.value == 10, "thirty seconds of evaluation are no slow steps"
    rate.restart()
    rate.at(33.0, 1)
    assert rate.value == 10, "the last rate stands until there is another"
    rate.at(34.0, 6)
    assert rate.value == 5


def test_a_rate_is_of_the_last_seconds():
    rate = Rate()
    for tick in range(100):
        rate.at(0.25 * tick, tick)
    for tick in range(100):
        rate.at(25 + 0.25 * tick, 100 + 10 * tick)
    assert rate.value == pytest.approx(40)
    often = Rate()
    for step in range(4000):
        often.at(0.005 * step, step)
    assert often.value == pytest.approx(200), "told of every step of 5 ms"


def test_time_left_is_unknown_until_measured_and_counts_what_is_between_steps():
    course = Course()
    course.at(100.0, 1, 101)  # after a compilation of any length
    course.at(101.0, 11, 101)
    assert course.left is None, "one second says nothing"
    course.at(105.0, 26, 101)  # among them an evaluation
    assert course.left == pytest.approx(75 * 5 / 25)


def test_packs_of_unknown_kinds_make_what_is_left_a_lower_bound():
    packs = [runs(2), runs(2, first=2), runs(4, model="large")]
    shown, time = live(packs)
    shown.pack(packs[0])
    train(shown, time, packs[0], upto=50)
    assert "left at least 0:19" in seen(shown)[0], "6 s of this pack and 13 s of the next; the large model is unknown"
    for spec in packs[0]:
        shown.record(make_record(spec))
    shown.pack(packs[1])
    assert "left at least 0:06" in seen(shown)[0], "2 runs took 6 s"
    for spec in packs[1]:
        shown.record(make_record(spec))
    shown.pack(packs[2])
    assert "left –" in seen(shown)[0]
    train(shown, time, packs[2], upto=50)
    assert "left 0:06" in seen(shown)[0]


def test_another_task_of_a_known_model_is_taken_to_be_alike():
    durations = Durations()
    durations.add(("tiny", "toy"), 10.0, 5)
    durations.add(("tiny", "rte"), 30.0, 5)
    assert durations.per_run(("tiny", "toy")) == 2
    assert durations.per_run(("tiny", "cola")) == 4
    assert durations.per_run(("large", "toy")) is None
    assert durations.per_run(("large", "rte"), (("large", "toy"), 7.0)) == 7
    assert durations.per_run(("tiny", "toy"), (("tiny", "toy"), 7.0)) == 2
    assert durations.of({("tiny", "toy"): 3, ("large", "toy"): 1}, None) == (6, False)


def test_a_pack_that_failed_at_once_says_nothing_about_the_others():
    packs = [runs(2), runs(2, first=2)]
    shown, time = live(packs)
    shown.pack(packs[0])
    time += 0.01
    for spec in packs[0]:
        shown.record(make_record(spec, "failed", error="Boom"))
    shown.pack(packs[1])
    assert "left –" in "  ".join(seen(shown))


def test_after_halving_the_other_half_is_still_to_come():
    specs = runs(4)
    shown, time = live([specs])
    shown.pack(specs)
    shown.planned(specs, [100] * 4)
    shown.members(specs)
    shown.note("out of memory with 4 runs side by side: now at most 2")
    train(shown, time, specs[:2], upto=50)
    lines = seen(shown)
    assert lines[1] == "2 × lora on toy with tiny  training  2 more wait"
    assert lines[2].startswith("steps 50/100  ━━━━━─────  left 0:19"), "6 s of these and 13 s of the other two"
    for spec in specs[:2]:
        shown.record(make_record(spec))
    train(shown, time, specs[2:], upto=50)
    assert seen(shown)[1] == "2 × lora on toy with tiny  training"
    assert "steps 50/100  ━━━━━─────  left 0:06" in seen(shown)[2]


def test_runs_of_unequal_length_are_counted_by_their_own_steps():
    long, short, late = specs = runs(3)
    shown, time = live([specs])
    shown.pack(specs)
    shown.planned(specs, [200, 100, 100])
    shown.members([long, short])
    shown.phase("train")
    for step in range(1, 101):
        time += 0.1
        shown.steps(step, 100, None)
    assert seen(shown)[1] == "2 × lora on toy with tiny  training  1 more wait"
    assert seen(shown)[2].startswith("runs × steps 200/400  ━━━━━─────  left 0:10  10 steps/s")
    shown.phase("test")
    shown.record(make_record(short))
    assert "1 more wait" in "".join(seen(shown)), "the run that left trained before"
    shown.phase("load")
    shown.members([long, late])
    shown.phase("train")
    for step in range(1, 51):
        time += 0.1
        shown.steps(step, 100, None)
    assert seen(shown)[2].startswith("runs × steps 300/400  ━━━━━━━───  left 0:05")
    shown.record(make_record(late, "diverged"))
    shown.members([long])
    shown.steps(1, 50, None)
    assert "runs × steps 301/350" in "  ".join(seen(shown)), "what a run that ended early does not make is not to come"
    shown.steps(50, 50, None)
    assert "runs × steps 350/350" in "  ".join(seen(shown))


def test_a_listener_that_is_not_told_of_plans_and_members_still_shows_steps():
    specs = runs(2)
    shown, time = live([specs])
    shown.pack(specs)
    shown.phase("train")
    for step in range(1, 51):
        time += 0.1
        shown.steps(step, 100, None)
    assert seen(shown)[2].startswith("steps 50/100  ━━━━━─────  left 0:05  10 steps/s  20 runs × steps/s")


def test_packs_that_another_process_trains_are_passed_over():
    packs = [runs(2), runs(2, first=2), runs(2, first=4)]
    shown, _ = live(packs)
    shown.pack(packs[1])
    assert sum(shown.waiting.values()) == 2
    console = terminal(force_terminal=False)
    lines = Lines(packs, console)
    lines.pack(packs[1][1:])  # of these, one is trained elsewhere
    assert console.file.getvalue() == "pack 2/3: 1 × lora on toy with tiny\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "–"), (0, "0:00"), (7.4, "0:07"), (59.6, "1:00"), (760, "12:40"), (10931, "3:02:11"), (186000, "2d 03:40")],
)
def test_times_are_short(seconds, text):
    assert clock(seconds) == text


# Cost.


def test_being_told_of_a_step_costs_nothing_to_speak_of():
    packs = [runs(16, first=16 * i) for i in range(50)]
    shown = Live(packs, terminal())
    shown.pack(packs[0])
    shown.planned(packs[0], [10**6] * 16)
    shown.members(packs[0])
    shown.phase("train")
    times = []
    for part in range(20):
        losses = [[0.5 + 1e-6 * (part * 100 + i)] * 16 for i in range(100)]
        begun = time.perf_counter()
        for i in range(100):
            shown.steps(part * 100 + i + 1, 10**6, losses[i])
        times.append((time.perf_counter() - begun) / 100)
    assert min(times) < 50e-6, "a hundredth of a step of 5 ms; 3 µs were measured"
    assert shown.console.file.getvalue() == "", "being told draws nothing"


def test_drawing_while_being_told_breaks_neither():
    packs = [runs(4, first=4 * i, task=f"task{i}") for i in range(150)]
    shown = Live(packs, terminal())
    errors, stop = [], threading.Event()

    def draw() -> None:
        while not stop.is_set():
            try:
                shown.view(80)
            except Exception as error:  # noqa: BLE001
                errors.append(error)

    thread = threading.Thread(target=draw)
    thread.start()
    for pack in packs:
        shown.pack(pack)
        shown.planned(pack, [3] * 4)
        shown.members(pack)
        shown.phase("train")
        for step in (1, 2, 3):
            shown.steps(step, 3, [0.5 / step] * 4)
        for spec in pack:
            shown.record(make_record(spec))
    stop.set()
    thread.join()
    assert errors == []
    assert seen(shown)[0].startswith("packs 150/150  runs 600/600  ━━━━━━━━━━  600 completed")


# What training tells.


def test_training_tells_what_is_shown(tmp_path):
    from peftbench import resolve
    from peftbench.overrides import parse
    from peftbench.run import run_pack
    from peftbench.store import Store

    arguments = ["model=tiny-bert", "task=tiny", "method=lora", "train.batch_size=32", "train.dropout=0"]
    grid = parse([*arguments, "train.steps=2,6", "seed=0,1", "profile=skip"]).grid
    specs = resolve.plan(resolve.demand(grid, None), "cpu").specs
    shown, _ = live([specs])
    told = []

    class Ears(Quiet):
        def __getattribute__(self, name):
            def tell(*given):
                told.append((name, *given))
                getattr(shown, name)(*given)
                told.append(seen(shown, 200))

            return tell

    shown.pack(specs)
    records = run_pack(specs, Store(tmp_path), Ears())
    assert [record.status for record in records] == ["completed"] * 4
    events = [e for e in told if isinstance(e, tuple)]
    names = [e[0] for e in events if e[0] not in ("phase", "steps")]
    assert names == ["planned", "members", "evaluated", *["record"] * 2, "members", "evaluated", *["record"] * 2]
    assert [e[1:] for e in events if e[0] == "planned"] == [(specs, [s.train["steps"] for s in specs])]
    assert [[s.train["steps"] for s in e[1]] for e in events if e[0] == "members"] == [[2, 6, 2, 6], [6, 6]]
    assert [e[1:3] for e in events if e[0] == "steps"][-1] == (4, 4)
    assert all(len(e[3]) in (2, 4) for e in events if e[0] == "steps"), "losses of all members, on a CPU at once"
    lines = [line for view in told if isinstance(view, list) for line in view]
    assert any("runs × steps 8/16" in line for line in lines)
    assert any("runs × steps 16/16" in line for line in lines)
    assert any(re.search(r"loss [▁-█]+ \d\.\d{4}  accuracy \d\.\d{4} best, \d\.\d{4} median", line) for line in lines)
    assert shown.packs_done == 1


# Without a terminal, and quiet.


def test_logs_get_plain_lines():
    console = terminal(force_terminal=False, width=30)
    first, second = packs = [runs(2), [*runs(1, "ia3"), *runs(1, first=7)]]
    with Lines(packs, console) as lines:
        lines.pack(first)
        lines.phase("load")
        lines.planned(first, [10, 10])
        lines.members(first)
        lines.steps(5, 10, [0.5, 0.7])
        lines.evaluated(10, "accuracy", [0.5, 0.6], True)
        lines.note("out of memory with 2 runs side by side: now at most 1")
        lines.record(make_record(first[0]))
        lines.record(make_record(first[1], "failed", error="Traceback\n\x1b[31mBoom:\x07 [bold]it\tbroke[/]"))
        lines.pack(second)
        lines.record(make_record(second[0], "diverged"))
    ids = [spec.run_id for pack in packs for spec in pack]
    assert console.file.getvalue().splitlines() == [
        "pack 1/2: 2 × lora on toy with tiny",
        "out of memory with 2 runs side by side: now at most 1",
        f"  [1/4] {ids[0]}: accuracy 0.7500",
        f"  [2/4] {ids[1]}: failed:  [31mBoom:  [bold]it broke[/]",
        "pack 2/2: 1 × ia3, 1 × lora on toy with tiny",
        f"  [3/4] {ids[2]}: diverged",
    ]


def tell(shown: Quiet) -> None:
    specs = runs(2)
    shown.pack(specs)
    shown.phase("load")
    shown.planned(specs, [4, 4])
    shown.members(specs)
    shown.phase("train")
    shown.steps(4, 4, [0.5, 0.7])
    shown.evaluated(4, "accuracy", [0.5, 0.7], True)
    shown.note("a line")
    for spec in specs:
        shown.record(make_record(spec))


def test_quiet_says_nothing(capsys):
    with progress.display([runs(2)], quiet=True) as shown:
        tell(shown)
        assert progress.current(runs(2)) is shown
    assert progress.current(runs(2)) is not shown
    assert capsys.readouterr() == ("", "")


def test_a_worker_process_writes_lines_unless_quiet(capsys):
    assert type(progress.current(runs(2))) is Lines
    assert type(progress.current(runs(2), quiet=True)) is Quiet
    tell(progress.current(runs(2)))
    assert capsys.readouterr().err.startswith("pack: 2 × lora on toy with tiny\n")
    pack = Pack(runs(2), "folder", quiet=True)
    assert Pack.decode(pack.encode()) == pack


@pytest.mark.parametrize("forced", [{}, {"FORCE_COLOR": "1"}, {"TTY_COMPATIBLE": "1"}])
def test_a_pipe_gets_lines_even_where_colours_are_forced(forced, monkeypatch, capsys):
    for name, value in forced.items():
        monkeypatch.setenv(name, value)
    with progress.display([runs(2)], quiet=False) as shown:
        assert type(shown) is Lines
        tell(shown)
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 4
    assert all(c.isprintable() or c == "\n" for c in err)


STORY = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from peftbench import progress
from tests.test_progress import runs, tell
with progress.display([runs(2)], quiet=False) as shown:
    print(type(shown).__name__, flush=True)
    tell(shown)
    shown.pack(runs(2, first=2))
    shown.planned(runs(2, first=2), [9, 9])
    shown.steps(3, 9, [0.5, 0.25])
    shown.screen.refresh() if hasattr(shown, "screen") else None
"""


def on_a_terminal(**environment: str) -> tuple[str, str]:
    """Tell a story with stderr on a terminal of 60 columns; returns stdout and what the terminal was sent."""
    ours, theirs = os.openpty()
    kept = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "LINES")}
    variables = {**kept, "TERM": "xterm-256color", "COLUMNS": "60", **environment}
    with subprocess.Popen(
        [sys.executable, "-c", STORY], stdout=subprocess.PIPE, stderr=theirs, env=variables, text=True
    ) as process:
        os.close(theirs)
        sent = b""
        while True:
            try:
                part = os.read(ours, 65536)
            except OSError:  # Linux's way to say that the other end is closed
                break
            if not part:
                break
            sent += part
        out = process.stdout.read() if process.stdout else ""
    os.close(ours)
    assert process.returncode == 0, sent.decode()
    return out, sent.decode()


COLOUR = re.compile(r"\x1b\[[0-9;]*(?:3[0-7]|38;|9[0-7])[0-9;]*m")


def test_a_terminal_gets_the_display_and_its_cursor_back():
    out, sent = on_a_terminal()
    assert out == "Live\n", "what is printed to a pipe stays there"
    assert "steps 3/9" in re.sub(r"\x1b\[[0-9;]*m", "", sent)
    assert "a line\r\n" in sent
    assert COLOUR.search(sent)
    assert sent.rindex("\x1b[?25h") > sent.rindex("\x1b[?25l")


def test_no_color_leaves_colours_out():
    out, sent = on_a_terminal(NO_COLOR="1")
    assert out == "Live\n"
    assert not COLOUR.search(sent)
    assert "completed" in sent


def test_a_terminal_that_cannot_be_redrawn_gets_lines():
    out, sent = on_a_terminal(TERM="dumb")
    assert out == "Lines\n"
    assert "\x1b" not in sent
    assert "pack: 2 × lora on toy with tiny" in sent


# The tables at the end.


@pytest.mark.parametrize("width", [30, 40, 60, 80, 100, 200])
def test_result_tables_leave_out_what_has_no_room(width):
    headers = ["method", "test accuracy", "adapter params", "step time p50", "peak memory"]
    rows = [
        ["lora rank=8 targets=[attention.query]", "0.691 ± 0.024", "2.0k", "8.8 ms", "120.0 MiB"],
        ["ia3", "0.600", "256", "11.25 ms", "64.0 MiB"],
    ]
    table = types.SimpleNamespace(title="toy: [accuracy]", headers=headers, rows=rows, text_columns=1, notes=["a note"])
    console = terminal(width, force_terminal=False)
    show_table(table, console)
    text = console.file.getvalue()
    lines = text.splitlines()
    assert max(cell_len(line) for line in lines) <= width
    assert "toy: [accuracy]" in text
    assert "a note" in text
    assert "…" not in text
    assert "0.691 ± 0.024" in text, "the metric stays whole on every terminal"
    cells = "\n".join(line for line in lines if "│" in line)
    kept = [header for header, value in zip(headers, rows[1], strict=True) if value in cells]
    assert kept == headers[: len(kept)]
    left_out = f"no room for {', '.join(headers[len(kept) :])}: see the report"
    assert (left_out in " ".join(text.split())) == (kept != headers)
    assert ("no room" in text) == (kept != headers)
    if width == 200:
        assert kept == headers
        assert rows[0][0] in text, "no text is taken for markup"
