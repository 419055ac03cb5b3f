"""What a report says of the data: intervals, tiers, gaps, "no difference" with what could have been found, fronts."""

import csv
import io
import time

import numpy as np
import pytest

from peftbench.analysis import evidence, extras, plots, tables
from peftbench.analysis.comparisons import costs_of, panels, suites
from peftbench.analysis.frame import configurations, frame, selected
from peftbench.analysis.intervals import half_widths
from peftbench.analysis.report import write_report
from tests.test_analysis import digests, make_record

# Skill: the share of items that a method gets right, on average over seeds.
SKILLS = {"full": 0.86, "lora": 0.84, "ia3": 0.76, "head": 0.60}
COSTS = {"full": 22_565_000, "lora": 73_728, "ia3": 13_824, "head": 0}


def run(method, seed, task="rte", skill=None, items=300, keep=True, **kwargs):
    """One record whose items are answered right as far as skill and seed allow, with its accuracy on them."""
    generator = np.random.default_rng((seed, sum(map(ord, method + task))))
    hard = np.random.default_rng(sum(map(ord, task))).permutation(items) / items
    luck = 0.01 * generator.normal()
    right = (hard + 0.1 * generator.normal(size=items) < (skill or SKILLS[method]) + luck).astype(float)
    record = make_record(
        method, seed=seed, task=task, test=float(right.mean()), adapter=COSTS.get(method, 1000), **kwargs
    )
    if record["quality"] is not None:
        record["quality"]["items"] = {"test": {"scores": right.tolist(), "predictions": right.astype(int).tolist()}}
        if not keep:
            del record["quality"]["items"]
    return record


def sweep(tasks=("rte", "cola", "sst2"), seeds=4, **kwargs):
    return [run(method, seed, task, **kwargs) for task in tasks for method in SKILLS for seed in range(seeds)]


def compared(records):
    runs = frame(records)
    return panels(records, runs, selected(configurations(runs)))


def cell(table, method, header):
    (row,) = [row for row in table.rows if row[0] == method]
    return row[table.headers.index(header)]


def numbers(table):
    return {row["variant"]: row for row in csv.DictReader(io.StringIO(tables.to_csv(table)))}


def test_a_panel_holds_the_runs_and_their_items():
    (panel,) = compared(sweep(("rte",)))
    assert [row["variant"] for row in panel.rows] == ["full", "lora", "ia3", "head"]
    assert (panel.items, panel.reason, panel.seed_counts, panel.reference) == (300, "", {4}, 0)
    for one in panel.samples:
        assert one.items.mean(axis=1) == pytest.approx(one.runs)
        assert one.seeds == (0, 1, 2, 3)


def test_a_panels_table_says_what_is_known_of_each_method():
    records = sweep(("rte",))
    found = compared(records)
    (table,) = evidence.evidence(found, suites(found))
    assert table.name == "evidence-rte"
    assert table.headers == [
        "method", "test accuracy", "95 % interval", "tier", "gap to full", "95 % interval of the gap",
        "differs from full", "front: parameters",
    ]  # fmt: skip
    assert cell(table, "full", "gap to full") == "reference"
    assert cell(table, "full", "tier") == "a"
    assert cell(table, "head", "differs from full") == "yes"
    assert cell(table, "head", "front: parameters") == "1.00"  # nothing is cheaper
    assert not set(cell(table, "head", "tier")) & set(cell(table, "full", "tier"))
    raw = numbers(table)
    assert float(raw["lora"]["gap"]) == pytest.approx(float(raw["lora"]["mean"]) - float(raw["full"]["mean"]), abs=1e-5)
    # The gap is far surer than the two means, which share their items.
    widths = {name: float(raw["lora"][f"{name}high"]) - float(raw["lora"][f"{name}low"]) for name in ("", "gap_")}
    assert widths["gap_"] < 0.7 * widths[""]
    assert float(raw["ia3"]["mcnemar_seeds"]) == 4
    assert {raw["lora"]["seeds"], raw["lora"]["items"]} == {"4", "300"}


def test_the_hypervolume_is_that_up_to_the_stated_reference_point():
    records = [make_record(m, seed=s, test=t, adapter=a) for m, t, a in
               (("full", 0.9, 9999), ("lora", 0.8, 99), ("head", 0.5, 9)) for s in (0, 1)]  # fmt: skip
    found = compared(records)
    (table,) = evidence.evidence(found, [])
    # log10(1 + parameters) is 4, 2 and 1; from (0.5, 4) only LoRA spans an area: (0.8 − 0.5) · (4 − 2).
    note = next(note for note in table.notes if note.startswith("Hypervolume"))
    assert note.startswith(
        "Hypervolume of quality against log10(1 + adapter parameters): 0.6, reference point (the worst of each): "
        "quality 0.5, 10.0k parameters. Lost with one method alone: lora 100.0 %."
    )


def test_no_difference_comes_with_what_could_have_been_found():
    records = [run(m, s, skill=k) for m, k in (("full", 0.8), ("lora", 0.8), ("ia3", 0.5)) for s in range(3)]
    (panel,) = compared(records)
    (table,) = evidence.evidence([panel], [])
    verdict = panel.gaps[[row["variant"] for row in panel.rows].index("lora")]
    assert not verdict.apart
    assert cell(table, "lora", "differs from full") == f"no (MDE {verdict.among:.3f})"
    text = "\n".join(table.notes)
    assert f"No difference from full fine-tuning was found for 1 of 2: lora (MDE {verdict.among:.3f})" in text
    assert f"planned alone: MDE {verdict.alone:.3f}" in text
    assert "2 of 3 pairs were told apart" in text
    (pair,) = [v for v in panel.pairs if not v.apart]
    named = " and ".join(panel.rows[i]["variant"] for i in (pair.first, pair.second))
    assert f"No difference was found between {named} (MDE {pair.among:.3f}); for a pair planned alone" in text
    assert verdict.alone < verdict.among
    pairs = evidence.pair_frames([panel], [])["pairs-rte"]
    assert len(pairs) == 3
    assert pairs["detectable"].notna().all()
    assert pairs["told_apart"].sum() == 2


def test_what_any_number_of_seeds_would_find_is_not_said_where_items_show_no_error():
    """Runs that fail on items of their own leave nothing for the items' source, which is not to say that it is 0."""
    records = []
    for method in ("full", "lora"):
        for seed in range(3):
            right = np.array([int(i % 3 != seed or i > 50 - 5 * seed) for i in range(60)])
            records.append(make_record(method, seed=seed, test=float(right.mean())))
            records[-1]["quality"]["items"] = {"test": {"scores": right.tolist(), "predictions": right.tolist()}}
    (panel,) = compared(records)
    assert panel.pairs[0].estimate.items.variance == 0
    (table,) = evidence.evidence([panel], [])
    text = "\n".join(table.notes)
    assert "with 10 seeds" in text
    assert "any number of seeds" not in text


def test_verdicts_letters_and_intervals_agree():
    for panel in compared(sweep(seeds=3)):
        for v in panel.pairs:
            together = set(panel.letters[v.first]) & set(panel.letters[v.second])
            assert bool(together) != v.apart
            # Alone: below α where the interval leaves out 0.
            assert (v.p < 0.05) == (abs(v.estimate.value) > half_widths([v.estimate])[0])
            assert v.p <= v.hochberg * (1 + 1e-9) <= v.holm * (1 + 1e-8) <= min(1, v.p * v.family) * (1 + 1e-7)


def test_over_tasks():
    found = compared(sweep())
    (suite,) = suites(found)
    assert [row["variant"] for row in suite.rows] == ["full", "lora", "ia3", "head"]
    for index, estimate in enumerate(suite.estimates):
        assert estimate.value == pytest.approx(np.mean([p.estimates[index].value for p in found]))
        assert estimate.error < max(p.estimates[index].error for p in found)
    table, profile, *rest = evidence.evidence(found, [suite])
    assert [t.name for t in rest] == ["evidence-cola", "evidence-rte", "evidence-sst2"]
    assert table.headers[1] == "mean of 3 tasks"
    assert table.headers[-4:] == ["IQM", "P(beats full)", "mean rank", "front: parameters"]
    assert cell(table, "full", "mean rank") == "1.0"
    assert cell(table, "head", "P(beats full)").startswith("0.00 [")
    assert float(numbers(table)["lora"]["iqm_low"]) < float(numbers(table)["lora"]["iqm"])
    assert any("Friedman: χ²(3) = 9.0" in note for note in table.notes)  # three tasks agree on four methods
    assert [row[0] for row in profile.rows] == ["full", "lora", "ia3", "head"]
    assert profile.rows[0][-1] == "1.00"


def test_a_loss_is_better_when_smaller():
    records = []
    for method, level in (("full", 1.0), ("lora", 1.05), ("head", 2.0)):
        for seed in range(3):
            generator = np.random.default_rng((seed, int(level * 100)))
            counts = np.full(200, 10)
            sums = counts * (level + 0.002 * seed + 0.05 * generator.normal(size=200))
            loss = float(sums.sum() / counts.sum())
            record = make_record(method, seed=seed, metric="loss", test=loss, adapter=COSTS[method])
            predictions = [[float(s), int(c)] for s, c in zip(sums, counts, strict=True)]
            record["quality"]["items"] = {"test": {"scores": (-sums / counts).tolist(), "predictions": predictions}}
            records.append(record)
    (panel,) = compared(records)
    assert (panel.items, panel.greater_is_better) == (200, False)
    assert [row["variant"] for row in panel.rows] == ["full", "lora", "head"]
    (table,) = evidence.evidence([panel], [])
    assert cell(table, "full", "tier") == "a"
    assert cell(table, "head", "gap to full").startswith("+1.0")
    assert cell(table, "head", "front: parameters") == "1.00"
    assert cell(table, "full", "front: parameters") == "1.00"


def test_without_items_intervals_are_over_seeds_and_say_so():
    for records, why in (
        (sweep(("rte",), keep=False), "16 of 16 runs were kept without their items"),
        ([*sweep(("rte",))[:-1], run("head", 3, keep=False)], "1 of 16 runs were kept without their items"),
        ([make_record(m, seed=s, test=0.5 + 0.01 * s) for m in ("full", "lora") for s in range(3)],
         "accuracy does not follow from the items that were kept"),
    ):  # fmt: skip
        (panel,) = compared(records)
        assert (panel.items, panel.reason) == (None, why)
        assert all(e.items is None and e.sources for e in panel.estimates)
        (table,) = evidence.evidence([panel], [])
        assert f"seeds alone, the test set taken as it is: {why}." in table.notes[0]


def test_items_of_different_data_are_not_compared():
    records = [run(m, s) for m in ("full", "lora") for s in range(3)]
    for record in records[:3]:
        record["spec"]["identity"]["data"] = "another"
    (panel,) = compared(records)
    assert panel.reason == "the runs were tested on different versions of the data"


def test_a_single_seed_has_no_interval_and_no_tier():
    records = [*sweep(("rte",), seeds=3), run("bitfit", 0, skill=0.7)]
    (panel,) = compared(records)
    (table,) = evidence.evidence([panel], [])
    for header in ("95 % interval", "tier", "differs from full"):
        assert cell(table, "bitfit", header) == tables.MISSING
    assert panel.gaps[1].family == 3  # it is not counted among the comparisons
    assert any("single seed" in note for note in table.notes)
    alone = compared([run(m, 0) for m in SKILLS])
    (table,) = evidence.evidence(alone, [])
    assert {row[table.headers.index("tier")] for row in table.rows} == {tables.MISSING}
    assert not any("pairs were told apart" in note for note in table.notes)


def test_lost_runs_are_named():
    records = [*sweep(("rte",), seeds=3), run("ia3", 3, status="diverged")]
    (table,) = evidence.evidence(compared(records), [])
    assert any("flatters methods that lose some: ia3 (3 of 4)" in note for note in table.notes)


def test_seeds_that_go_together_are_noticed():
    shared = [0.0, 0.03, -0.04, 0.02]
    records = [
        make_record(m, seed=s, test=base + shared[s] + 0.001 * s * k)
        for k, (m, base) in enumerate((("full", 0.8), ("lora", 0.78), ("ia3", 0.7)))
        for s in range(4)
    ]
    (panel,) = compared(records)
    assert panel.seed_correlation > 0.95
    (table,) = evidence.evidence([panel], [])
    assert any("intervals are wider than they should be" in note for note in table.notes)
    raw = numbers(table)["lora"]
    assert float(raw["gap_seed_paired_high"]) - float(raw["gap_seed_paired_low"]) < 0.2 * (
        float(raw["gap_high"]) - float(raw["gap_low"])
    )


def test_costs_that_cannot_decide_have_no_front():
    (panel,) = compared(sweep(("rte",)))
    assert costs_of(panel.rows) == ["adapter_parameters"]  # times and memory are all the same in these records
    mixed = [*sweep(("rte",), peak=2**20)[:8], *sweep(("rte",), peak=2**21)[8:]]
    (panel,) = compared(mixed)
    assert costs_of(panel.rows) == ["adapter_parameters", "memory_peak_bytes"]
    (table,) = evidence.evidence([panel], [])
    assert table.headers[-3:] == ["front: parameters", "front: peak memory", "front: all costs"]
    panel.rows[0]["memory_kind"] = "another"
    assert costs_of(panel.rows) == ["adapter_parameters"]


def test_models_and_devices_are_apart():
    records = [*sweep(("rte",)), *sweep(("rte",), model="roberta-base")]
    found = compared(records)
    assert len(found) == 2
    assert suites(found) == []
    names = [table.name for table in evidence.evidence(found, [])]
    assert names == ["evidence-rte-minilm-l6", "evidence-rte-roberta-base"]


def test_a_report_has_the_section_in_every_form(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "all_plots", lambda table: iter(()))  # figures know nothing of it, and take most time
    folder = tmp_path / "sweep"
    records = sweep()
    paths = write_report(records, folder)
    names = {p.name for p in paths}
    assert {"evidence-overview.csv", "evidence-rte.tex", "profile-overview.csv", "pairs-rte.csv",
            "pairs-overview.csv"} <= names  # fmt: skip
    text = paths[0].read_text()
    assert "## What the data can tell apart" in text
    assert "| lora |" in text.split("## What the data")[1]
    assert "(tables/pairs-rte.csv)" in text
    latex = (folder / "report" / "tables" / "evidence-rte.tex").read_text()
    assert "95 \\% interval" in latex
    first = digests(folder)
    write_report(list(reversed(records)), folder)
    assert digests(folder) == first


def test_a_report_without_the_extra_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: None)
    paths = write_report(sweep(("rte",)), tmp_path)
    text = paths[0].read_text()
    assert "Not computed: moocore, scikit-posthocs, statsmodels not installed. pip install 'peftbench[stats]'" in text
    assert not any(p.name.startswith(("evidence", "pairs", "profile")) for p in paths)


def test_one_method_has_nothing_to_be_told_from(tmp_path):
    paths = write_report([run("lora", s) for s in range(2)], tmp_path)
    assert "One method alone: nothing to tell apart." in paths[0].read_text()


def test_forty_methods_are_compared_in_seconds():
    methods = {f"m{i:02}": 0.5 + 0.01 * i for i in range(40)}
    records = [run(m, s, task, skill=k, items=800) for m, k in methods.items() for s in range(3) for task in ("a", "b")]
    found = compared(records)
    start = time.perf_counter()
    made = evidence.evidence(found, suites(found))
    assert len(evidence.pair_frames(found, suites(found))["pairs-overview"]) == 780
    assert len(made) == 4
    assert time.perf_counter() - start < 15
