"""The page of a folder: one file that asks for nothing, whose controls, charts and views work in a real browser."""

import base64
import contextlib
import gzip
import importlib.util
import itertools
import json
import re
import shlex
import shutil
import time

import pytest

from peftbench import overrides
from peftbench.analysis import commands, html, page_data, plots
from peftbench.analysis.frame import COMPONENTS, configurations, frame, selected
from peftbench.analysis.report import write_report
from peftbench.cli import vocabulary
from peftbench.resolve import demand, plan
from tests.test_analysis import digests, make_record
from tests.test_statistics_report import run

MIB = 2**20


def lora(seed, task, rank, rate, **kwargs):
    record = run("lora", seed, task, settings={"rank": rank}, learning_rate=rate, **kwargs)
    record["trace"] = {"loss": [1 / (i + 1) for i in range(500)], "learning_rate": [rate] * 500}
    return record


def with_parts(record, peak=180 * MIB):
    cost = record["cost"]
    if cost:
        cost["memory"] |= {"peak": peak, "peak_phase": "backward", "residual": 0}
        cost["memory"] |= {part: peak // len(COMPONENTS) for part in COMPONENTS}
        cost["energy_joules_per_1k_tokens"] = 0.9
    return record


def lost(status, seed, error):
    record = lora(seed, "rte", 8, 0.1, status=status, error=error)
    record["run_id"] = f"lora-rte-{status}-{seed}"
    return record


def sweep():
    """Two tasks, three methods, ranks and learning rates, and a run lost in each of the four ways."""
    found = [run(method, seed, task) for task in ("rte", "cola") for method in ("full", "ia3") for seed in range(3)]
    for task in ("rte", "cola"):
        found += [lora(seed, task, rank, 1e-3) for rank in (4, 8) for seed in range(3)]
        found += [lora(0, task, 8, 3e-3, skill=0.7)]
    found += [
        lost("diverged", 0, "gradient was no longer finite"),
        lost("failed", 1, "Traceback\nValueError: <script>alert('no')</script> & so on"),
        lost("out_of_memory", 2, "CUDA out of memory"),
        lost("pruned", 3, None),
    ]
    return [with_parts(record) for record in found]


def paged(records, folder, **more):
    """Write a report but for the figures, which take most of the time and are no part of the page."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "all_plots", lambda table: iter(()))
        write_report(records, folder, **more)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return paged(sweep(), tmp_path_factory.mktemp("html") / "results/a-sweep")


@pytest.fixture(scope="module")
def text(folder):
    return (folder / "report/index.html").read_text(encoding="utf-8")


def blob(text, name):
    packed = re.search(rf'id="data-{name}">([^<]*)<', text).group(1)
    return json.loads(gzip.decompress(base64.b64decode(packed)))


def rows(columns):
    return [dict(zip(columns["keys"], row, strict=True)) for row in columns["rows"]]


# -- the file ----------------------------------------------------------------------------------------------------------


def test_the_page_is_one_file_that_names_no_other_address(text):
    assert not re.search(r"<(script|img|iframe|source)[^>]*\ssrc=\"(?!data:)", text)
    assert re.findall(r"<link[^>]*>", text) == ['<link rel="icon" href="data:,">']
    assert "default-src 'none'" in text
    assert not re.search(r"@import|url\(", text)
    assert "http://" not in text
    assert "https://" not in text


def test_the_same_records_give_the_same_page(folder, tmp_path):
    paged(list(reversed(sweep())), tmp_path / "results/a-sweep")
    assert digests(tmp_path / "results/a-sweep")["report/index.html"] == digests(folder)["report/index.html"]


def test_lost_and_pruned_runs_stand_first_with_reasons_that_are_only_text(text):
    first = text.index('id="unfinished"')
    assert first < text.index('id="leaderboard"')
    section = text[first : text.index("</section>", first)]
    for said in ("gradient was no longer finite", "CUDA out of memory", "pruned by a search", "4 runs are"):
        assert said in section
    assert "<script>alert" not in text
    assert "ValueError: &lt;script&gt;alert" in section
    assert [row["status"] for row in rows(blob(text, "runs")["runs"])].count("pruned") == 1


def test_points_carry_intervals_costs_and_commands(text):
    points = rows(blob(text, "core")["points"])
    (full,) = [p for p in points if p["method"] == "full" and p["task"] == "rte"]
    assert full["low"] < full["test"] < full["high"]
    assert full["energy_joules"] == pytest.approx(0.9)
    assert full["memory_bytes"] == 180 * MIB
    assert full["command"].startswith("python -m peftbench sweep model=minilm-l6 method=full task=rte ")
    assert full["command"].endswith("seed=0,1,2")
    tried = [p for p in points if p["method"] == "lora" and p["rank"] == 8 and p["task"] == "cola"]
    assert [(p["lr"], p["chosen"]) for p in tried] == [(0.001, True), (0.003, False)]
    means = [p for p in points if p["task"] == ""]
    assert {p["variant"] for p in means} == {"full", "ia3", "lora r=4", "lora r=8"}
    assert all("task=cola,rte" in p["command"] for p in means)


def test_traces_are_means_over_equal_parts():
    record = lora(0, "rte", 8, 1e-3)
    record["trace"]["loss"][:4] = [3.0, 1.0, None, None]
    found = page_data.trace(record)
    every = found["every"]
    assert every == 4
    assert len(found["loss"]) == 125 <= page_data.MOST_POINTS
    assert found["loss"][0] == 2.0  # of the two that were finite
    assert found["loss"][1] == pytest.approx(sum(1 / (i + 1) for i in range(4, 8)) / 4, rel=1e-3)
    assert found["rates"][0] == [1, 0.001]
    assert found["rates"][-1][0] == 500
    record["trace"]["loss"][:4] = [None] * 4
    assert page_data.trace(record)["loss"][0] is None
    assert page_data.trace({"trace": None, "quality": None})["loss"] == []


def test_sections_stand_in_the_report_and_in_the_page(tmp_path):
    picture = tmp_path / "a.png"
    picture.write_bytes(b"\x89PNG")
    one = html.Section("A search", ["*How* it went."], [], [(picture, "Values by trial.")])
    paged(sweep(), tmp_path / "r", sections=[one])
    page = (tmp_path / "r/report/index.html").read_text()
    assert '<h2 id="h-extra-1">A search</h2>' in page
    coded = base64.b64encode(picture.read_bytes()).decode()
    assert f'src="data:image/png;base64,{coded}" alt="Values by trial."' in page
    assert "## A search\n\n*How* it went.\n\n![a](../../a.png)" in (tmp_path / "r/report/report.md").read_text()


def test_without_plotly_all_else_is_written_and_one_line_says_so(tmp_path, monkeypatch):
    few = [run(method, seed) for method in ("full", "ia3") for seed in range(2)]
    paged(few, tmp_path / "r")
    assert (tmp_path / "r/report/index.html").exists()
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "plotly" else there(name))
    paths = write_report(few, tmp_path / "r")
    assert html.missing() == "index.html not written: plotly is not installed; pip install 'peftbench[report]'"
    assert not (tmp_path / "r/report/index.html").exists()  # none of an earlier state either
    assert html.missing() in (tmp_path / "r/report/report.md").read_text()
    assert {p.suffix for p in paths} == {".md", ".csv", ".tex", ".png", ".pdf", ".svg"}


# -- commands ----------------------------------------------------------------------------------------------------------


def spec_of(arguments):
    (spec,) = plan(demand(overrides.parse(arguments).grid, None), "cpu").specs
    return spec


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["method=lora", "method.rank=4", "method.targets=[attention.query]", "train.learning_rate=3e-5"],
        ["method=ia3", "method.feedforward=[]", "train.epochs=2", "seed=7"],
        ["train=smoke", "train.precision=bf16", "train.dropout=0.1"],
        ["method=prompt", "task.max_length=20", "model.pooling=mean"],
        ["protocol=paper", "profile=skip", "train.steps=3", "train.clip_norm=0"],
        ["method=full", "model.architecture.hidden_size=48"],
    ],
)
def test_a_command_makes_the_very_run(arguments):
    spec = spec_of(["model=tiny-bert", "task=tiny", *arguments])
    record = {"run_id": spec.run_id, "status": "completed", "spec": spec.to_dict()}
    for defaults in (vocabulary.defaults([record]), {}):
        line = commands.command(record, defaults)
        again = spec_of(shlex.split(line)[4:])
        assert again.run_id == spec.run_id, line
    assert len(commands.command(record, vocabulary.defaults([record]))) < 260


def test_values_read_as_hydra_reads_them():
    for entry in (
        "a b",
        "it's",
        "null",
        "1e3",
        "x,y",
        "a=b",
        "",
        "back\\slash",
        "é",
        "[a]",
        ["p q", None, True],
        1e-5,
        3,
        None,
        False,
    ):
        parsed = overrides.parse([f"method.x={commands.value(entry)}"]).grid["method.x"]
        assert parsed == [entry], entry


def test_one_command_serves_tasks_that_differ_by_name_alone():
    lines = {t: f"python -m peftbench run model=m method=lora task={t} seed=0" for t in ("rte", "cola")}
    assert commands.over_tasks(lines) == "python -m peftbench sweep model=m method=lora task=rte,cola seed=0"
    lines["cola"] += " train.learning_rate=0.1"
    assert commands.over_tasks(lines) == "\n".join(lines.values())


# -- in a browser ------------------------------------------------------------------------------------------------------


def found_browser():
    for name in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"):
        if (path := shutil.which(name)) and (driver := shutil.which("chromedriver")):
            return path, driver
    pytest.skip("no Chromium with its driver on this machine (Debian: apt-get install chromium chromium-driver)")


@contextlib.contextmanager
def opened(folder, width=1280, height=900, dark=False):
    """A headless Chromium with the page ready."""
    path, executable = found_browser()
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (extra: test)")
    options = webdriver.ChromeOptions()
    options.binary_location = path
    offline = "--host-resolver-rules=MAP * ~NOTFOUND"
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", offline):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable))
    try:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        driver.get((folder / "report/index.html").resolve().as_uri())
        until(driver, "return document.body.dataset.ready")
        yield driver
    finally:
        driver.quit()


@pytest.fixture(scope="module")
def browser(folder):
    with opened(folder) as driver:
        yield driver


def until(driver, script, seconds=20):
    """Wait until a script returns something true, and return that."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := driver.execute_script(script):
            return found
        time.sleep(0.05)
    pytest.fail(f"not within {seconds} s: {script}")


def drawn(driver, name):
    """Scroll a chart into view and wait until it was drawn; returns how often it was."""
    driver.execute_script(
        f"document.getElementById('{name}-chart').scrollIntoView({{block: 'center', behavior: 'instant'}})"
    )
    return int(until(driver, f"return document.getElementById('{name}-chart').dataset.drawn"))


def change(driver, name, script):
    """Run a script that changes a control, and wait until the chart was drawn again."""
    before = drawn(driver, name)
    driver.execute_script(script)
    until(driver, f"return document.getElementById('{name}-chart').dataset.drawn > {before}")


def choose(form, control, value):
    return (
        f"const c = document.getElementById('{form}').elements['{control}']; c.value = {json.dumps(value)};"
        "c.dispatchEvent(new Event('change', {bubbles: true}))"
    )


NAMES = "return document.getElementById('pareto-chart').data.map(t => t.name)"
CHARTS = ("pareto", "heat", "rates", "ranks", "memory")


def test_the_page_loads_and_draws_without_errors_or_requests(browser):
    for name in CHARTS:
        drawn(browser, name)
    assert browser.execute_script("return document.querySelectorAll('.chart .wait').length") == 0
    assert browser.execute_script("return document.getElementById('trouble').hidden")
    assert browser.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert asked
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []


def test_filters_choose_what_is_drawn(browser):
    drawn(browser, "pareto")
    assert set(browser.execute_script(NAMES)) == {"front", "full", "ia3", "lora"}
    change(browser, "pareto", "document.querySelector('[data-tick=none]').click()")
    assert "No configuration is left" in browser.execute_script(
        "return document.getElementById('pareto-chart').innerText"
    )
    change(browser, "pareto", "document.querySelector('input[value=lora]').click()")
    assert browser.execute_script(NAMES) == ["front", "lora"]
    count = "return document.getElementById('pareto-chart').data.at(-1).x.length"
    assert browser.execute_script(count) == 2  # two ranks
    change(browser, "pareto", choose("pareto-controls", "rank", "8"))
    assert browser.execute_script(count) == 1
    change(browser, "pareto", choose("pareto-controls", "task", "cola"))
    change(browser, "pareto", "document.querySelector('input[name=all]').click()")
    assert browser.execute_script(count) == 2  # two learning rates
    change(browser, "pareto", choose("pareto-controls", "x", "memory_bytes"))
    layout = "return document.getElementById('pareto-chart').layout.xaxis.title.text"
    assert browser.execute_script(layout) == "peak memory (tracked tensors) (MiB)"
    rows_shown = "return document.querySelectorAll('#pareto-data tbody tr').length"
    assert browser.execute_script(rows_shown) == 2
    change(browser, "pareto", "document.querySelector('input[name=all]').click()")
    change(browser, "pareto", choose("pareto-controls", "rank", ""))
    change(browser, "pareto", choose("pareto-controls", "x", "adapter_parameters"))
    change(browser, "pareto", "document.querySelector('[data-tick=all]').click()")
    change(browser, "pareto", "document.querySelector('input[name=names]').click()")
    modes = "return document.getElementById('pareto-chart').data.slice(1).map(t => t.mode)"
    assert set(browser.execute_script(modes)) == {"markers+text"}
    change(browser, "pareto", choose("pareto-controls", "task", ""))
    change(browser, "pareto", "document.querySelector('input[name=names]').click()")
    assert browser.get_log("browser") == []


def test_a_pointed_at_configuration_shows_its_command_and_stays_when_selected(browser):
    from selenium.webdriver import ActionChains

    drawn(browser, "pareto")
    time.sleep(0.3)  # the page has stopped scrolling
    star = browser.find_elements("css selector", "#pareto-chart .scatterlayer .trace .points path")[0]
    ActionChains(browser).move_to_element(star).perform()
    said = until(browser, "return document.querySelector('#pareto-chart .hoverlayer')?.textContent")
    assert "python -m peftbench sweep" in said
    assert "seed=0,1,2" in said.replace("\xa0", " ")
    ActionChains(browser).click().perform()
    card = until(browser, "const c = document.getElementById('chosen'); return !c.hidden && c.innerText")
    assert "python -m peftbench sweep model=minilm-l6 method=" in card
    ActionChains(browser).move_by_offset(5, -200).perform()


def test_the_keyboard_reaches_and_works_the_controls(browser):
    from selenium.webdriver import ActionChains, Keys

    browser.execute_script("window.scrollTo(0, 0); document.activeElement.blur()")
    reached, press = [], ActionChains(browser)
    browser.execute_script("document.querySelector('.skip').focus()")
    for _ in range(160):
        reached.append(
            browser.execute_script(
                "const e = document.activeElement; return e.name || e.id || e.className || e.innerText"
            )
        )
        if reached[-1] == "y":
            break
        press.send_keys(Keys.TAB).perform()
    assert reached[0] == "skip"
    assert reached[-1] == "y"
    assert {"board-task", "x"} <= set(reached)
    before = drawn(browser, "pareto")
    browser.execute_script("document.getElementById('pareto-controls').elements.y.focus()")
    press.send_keys(Keys.ARROW_DOWN).perform()
    until(browser, f"return document.getElementById('pareto-chart').dataset.drawn > {before}")
    assert browser.execute_script("return document.getElementById('pareto-controls').elements.y.value") == "validation"
    outline = browser.execute_script("return getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    press.send_keys(Keys.ARROW_UP).perform()


def test_a_table_is_sorted_by_its_headers(browser):
    table = "[...document.querySelectorAll('.board:not([hidden]) table')].at(-1)"
    browser.execute_script(choose_board("rte"))
    browser.execute_script(
        f"[...{table}.querySelectorAll('th button')].find(b => b.innerText == 'adapter params').click()"
    )
    cells = f"return [...{table}.tBodies[0].rows].map(r => r.cells[0].innerText)"
    assert browser.execute_script(cells)[0] == "full"
    browser.execute_script(
        f"[...{table}.querySelectorAll('th button')].find(b => b.innerText == 'adapter params').click()"
    )
    assert browser.execute_script(cells)[-1] == "full"
    assert (
        browser.execute_script(f"return {table}.querySelector('[aria-sort]').getAttribute('aria-sort')") == "ascending"
    )
    browser.execute_script(choose_board("overview"))


def choose_board(name):
    return (
        f"const c = document.getElementById('board-task'); c.value = '{name}';"
        "c.dispatchEvent(new Event('change', {bubbles: true}))"
    )


def test_every_run_has_a_view(browser):
    browser.execute_script("document.getElementById('runs-list').scrollIntoView()")
    until(browser, "return document.querySelectorAll('#runs-list tbody tr').length")
    browser.execute_script(
        "const w = document.getElementById('runs-controls').elements.words; w.value = 'failed';"
        "w.dispatchEvent(new Event('input', {bubbles: true}))"
    )
    until(browser, "return document.getElementById('runs-count').innerText == '1 of 30 runs'")
    browser.execute_script("document.querySelector('#runs-list a').click()")
    said = until(
        browser,
        "return document.getElementById('trace-chart')?.dataset.drawn && document.getElementById('run-view').innerText",
    )
    assert "ValueError: <script>alert('no')</script> & so on" in said  # the whole reason, as text
    assert "Each point of the loss is the mean of 4 steps" in said
    for name in ("method.rank", "train.learning_rate", "git_commit", "identity.weights"):
        assert name in said
    assert "python -m peftbench run model=minilm-l6 method=lora task=rte" in said
    assert browser.execute_script("return document.activeElement.id") == "h-run"
    browser.execute_script("document.activeElement.blur(); document.querySelector('.skip').click()")
    assert browser.execute_script("return document.activeElement.id") == "h-run"
    assert browser.execute_script("return document.querySelector('main').checkVisibility()")
    assert not browser.execute_script("return document.getElementById('overview').checkVisibility()")
    browser.execute_script("location.hash = '#runs'")
    until(browser, "return document.getElementById('overview').checkVisibility()")
    browser.execute_script("location.hash = '#run=nonsense'")
    until(browser, "return document.getElementById('h-run').innerText == 'No such run'")
    browser.execute_script("location.hash = '#main'")
    assert browser.get_log("browser") == []


def test_shades_reach_from_the_worst_to_the_best_of_a_task(browser):
    drawn(browser, "heat")
    shades = browser.execute_script("return document.getElementById('heat-chart').data[0]")
    assert (shades["zmin"], shades["zmax"]) == (0, 1)
    assert shades["y"][-1] == "full"  # on top
    assert [max(column) for column in zip(*shades["z"], strict=True)] == [1, 1]
    assert [min(column) for column in zip(*shades["z"], strict=True)] == [0, 0]


def test_tasks_that_cost_differently_have_bars_of_their_own(browser):
    drawn(browser, "memory")
    bars = "return document.getElementById('memory-chart').data[0].y"
    names = browser.execute_script(bars)
    assert len(names) == len(set(names)) == 8  # the made-up records have a profile a task
    assert "ia3 (cola)" in names


def test_structure_is_that_of_an_accessible_page(browser):
    until(browser, "return document.getElementById('overview').checkVisibility()")
    for name in CHARTS:
        drawn(browser, name)
    count = "return document.querySelectorAll(arguments[0]).length"
    for landmark in ("header", "nav[aria-label]", "main", "footer", "h1", "html[lang=en]"):
        assert browser.execute_script(count, landmark) == 1, landmark
    assert browser.execute_script(count, "table:not(:has(> caption))") == 0
    assert browser.execute_script(count, "thead th:not([scope=col]), tbody th:not([scope=row])") == 0
    assert browser.execute_script(count, "img:not([alt]), [role=img]:not([aria-label])") == 0
    unnamed = "return [...document.querySelectorAll('select, input')].filter(e => !e.labels.length).length"
    assert browser.execute_script(unnamed) == 0
    ids = browser.execute_script(
        "return [...document.querySelectorAll('[id]')].map(e => e.id).filter(i => !/^(g|clip|legend|top)/.test(i))"
    )
    assert len(ids) == len(set(ids))
    levels = browser.execute_script(
        "return [...document.querySelectorAll('h1, h2, h3, h4')].map(e => Number(e.tagName[1]))"
    )
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    for name in CHARTS:  # what a chart shows, a table shows
        assert browser.execute_script(count, f"#{name}-data table") == 1, name


def contrast(first, second):
    """WCAG's contrast ratio of two css colours ``rgb(r, g, b)``."""

    def light(colour):
        channels = [int(c) / 255 for c in re.findall(r"\d+", colour)[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((light(first), light(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_narrow_screen_scrolls_in_no_other_direction_than_down(folder, dark):
    with opened(folder, 360, 740, dark) as driver:
        widths = "return [document.documentElement.scrollWidth, document.body.scrollWidth]"
        for name in CHARTS:
            drawn(driver, name)
            assert max(driver.execute_script(widths)) <= 360, name
        driver.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert max(driver.execute_script(widths)) <= 360
        driver.execute_script("document.querySelector('#unfinished a').click()")
        until(driver, "return document.getElementById('trace-chart')?.dataset.drawn")
        assert max(driver.execute_script(widths)) <= 360
        style = "const s = getComputedStyle(document.querySelector(arguments[0])); return [s.color, s.backgroundColor]"
        _, page = driver.execute_script(style, "body")
        for part in ("body", "#run-view a", ".status-bad", "dt", ".caption"):
            assert contrast(driver.execute_script(style, part)[0], page) >= 4.5, part
        assert (sum(map(int, re.findall(r"\d+", page)[:3])) < 200) == dark
        assert driver.get_log("browser") == []


def test_panels_of_equal_beginnings_keep_to_themselves():
    """mnli is no beginning of mnli-mm: each leaderboard holds its own task's tables."""
    records = [run(m, s, t) for t in ("mnli", "mnli-mm") for m in ("full", "ia3") for s in range(3)]
    chosen = selected(configurations(frame(records)))
    table = html.Table("x", "x", [], [], chosen)
    found = html._groups(dict.fromkeys(("evidence-mnli", "evidence-mnli-mm", "leaderboard-mnli"), table), chosen)
    assert [(g.name, len(g.tables)) for g in found] == [("mnli", 2), ("mnli-mm", 1)]


def test_records_without_costs_or_traces_make_a_page(tmp_path):
    bare = []
    for seed in range(2):
        record = make_record(seed=seed)
        record |= {"cost": None, "trace": None, "environment": {}}
        bare.append(record)
    paged(bare, tmp_path)
    page = (tmp_path / "report/index.html").read_text()
    assert blob(page, "core")["memory"] == {"keys": [], "rows": []}
    with opened(tmp_path) as driver:
        for name in CHARTS:
            drawn(driver, name)
        assert "memory by component" in driver.execute_script(
            "return document.getElementById('memory-chart').innerText"
        )
        assert driver.get_log("browser") == []
