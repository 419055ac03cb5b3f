"""`report --compare A B`: the same configurations in two sweeps, in pairs of seeds where there are pairs."""

import copy
import csv
import json

import pytest

from peftbench.__main__ import main
from peftbench.analysis import changes
from peftbench.analysis.intervals import difference, p_values, paired_difference, sample
from peftbench.errors import UserError
from tests.test_statistics_report import run, sweep


def sides(before, after):
    return changes.side("before", before), changes.side("after", after)


def later(records, engine=2, **metrics):
    """The same runs made by another version of the code."""
    found = copy.deepcopy(records)
    for record in found:
        record["run_id"] += "-later"
        record["spec"]["identity"]["engine"] = engine
    return found


def worse(records, method, share):
    """Wrong answers for a share of the items that a method had right: other ones for each seed."""
    for record in records:
        if record["spec"]["method"]["name"] != method:
            continue
        items = record["quality"]["items"]["test"]
        place, seed = 0, record["spec"]["seed"]
        for i, score in enumerate(items["scores"]):
            place += score > 0
            if score and (place * 7 + seed) % 100 < 100 * share:
                items["scores"][i] = 0.0
        items["predictions"] = [int(s) for s in items["scores"]]
        value = sum(items["scores"]) / len(items["scores"])
        record["quality"]["test"] = {"accuracy": value}
    return records


def test_what_changed_is_found_and_what_did_not_is_identical():
    before = sweep(("rte",))
    first, second = sides(before, worse(later(before), "lora", 0.3))
    found = changes.changes(first, second)
    assert [(c.second["method"], c.identical) for c in found] == [
        ("full", True), ("head", True), ("ia3", True), ("lora", False),
    ]  # fmt: skip
    (lora,) = [v for v in changes.verdicts_of(found) if v is not None]
    assert lora.apart
    assert lora.family == 1
    assert lora.estimate.value == pytest.approx(-0.25, abs=0.03)
    one = changes.section(first, second)
    (table,) = one.tables
    (row,) = [r for r in table.rows if r[0] == "lora"]
    assert row[table.headers.index("changed")] == "worse"
    assert row[table.headers.index("seeds")] == "4 pairs"
    text = " ".join(one.text)
    assert "4 configurations ran in both" in text
    assert "3 came out the same" in text
    assert "Of 1 that were tested, 0 got better and 1 got worse" in text
    assert "engine (4)" in text


def test_equal_seeds_are_compared_in_pairs_and_others_by_means():
    before = [run("lora", seed, skill=0.7) for seed in range(4)]
    after = later([run("lora", seed, skill=0.8) for seed in range(4)])

    def of(records):
        ordered = sorted(records, key=lambda r: r["spec"]["seed"])
        scores = [r["quality"]["items"]["test"]["scores"] for r in ordered]
        return sample([r["spec"]["seed"] for r in ordered], [sum(s) / len(s) for s in scores], scores)

    (paired,) = changes.changes(*sides(before, after))
    expected = paired_difference(of(after), of(before))
    assert paired.pairs == 4
    assert paired.estimate.value == pytest.approx(expected.value)
    assert paired.estimate.error == pytest.approx(expected.error)
    others = later([run("lora", seed, skill=0.8) for seed in range(10, 14)])
    (apart,) = changes.changes(*sides(before, others))
    unpaired = difference(of(others), of(before))
    assert apart.pairs == 0
    assert apart.estimate.error == pytest.approx(unpaired.error)
    assert p_values([apart.estimate])[0] == pytest.approx(p_values([unpaired])[0])


def test_equal_settings_are_what_makes_two_configurations_one():
    before = [run("lora", seed, learning_rate=rate) for seed in range(2) for rate in (1e-3, 3e-3)]
    after = later([run("lora", seed, learning_rate=1e-3, task=task) for seed in range(2) for task in ("rte", "cola")])
    one = changes.section(*sides(before, after))
    assert len(one.tables[0].rows) == 1
    text = " ".join(one.text)
    assert "Only in before: 1 configurations (lora lr=0.003 on rte)" in text
    assert "Only in after: 1 configurations (lora on cola)" in text
    with pytest.raises(UserError, match="before and after share no configuration"):
        changes.section(*sides([run("ia3", 0)], after))


def test_a_lower_loss_is_better():
    def losses(shift):
        records = [run("lora", seed, keep=False) for seed in range(5)]
        for record in records:
            value = 0.5 + 0.001 * record["spec"]["seed"] * (1 + shift) + shift
            record["quality"] |= {"primary_metric": "loss", "greater_is_better": False}
            record["quality"] |= {"test": {"loss": value}, "validation": {"loss": value}}
        return records

    one = changes.section(*sides(losses(0.0), later(losses(-0.2))))
    (row,) = one.tables[0].rows
    assert row[one.tables[0].headers.index("changed")] == "better"


def test_a_single_seed_has_no_verdict():
    one = changes.section(*sides([run("lora", 0, skill=0.6)], later([run("lora", 0, skill=0.9)])))
    (table,) = one.tables
    assert table.rows[0][table.headers.index("changed")] == "–"
    assert "1 could not be tested: a single seed on one side." in one.text


def test_lost_runs_take_no_part():
    before = [run("lora", seed) for seed in range(3)] + [run("ia3", 0)]
    after = later([run("lora", seed) for seed in range(3)])
    after += later([run("ia3", 0, status="diverged", error="loss became non-finite")])
    found = changes.changes(*sides(before, after))
    assert [c.second["method"] for c in found] == ["lora"]
    text = " ".join(changes.section(*sides(before, after)).text)
    (lost,) = [r["run_id"] for r in after if r["status"] == "diverged"]
    assert f"**1 run did not complete in after that did in before** (diverged: {lost})." in text
    assert "did not complete in before" not in text
    with pytest.raises(UserError, match="after: no completed run"):
        sides(before, [run("ia3", 0, status="failed", error="x")])


def test_seeds_in_common_decide_what_is_identical():
    before = [run("lora", seed) for seed in range(3)]
    (two,) = changes.changes(*sides(before, later(before[1:])))
    assert (two.pairs, two.identical) == (2, True)
    (others,) = changes.changes(*sides(before, later([run("lora", seed) for seed in (2, 7, 8)])))
    assert (others.pairs, others.identical) == (0, False)


def test_what_changed_stands_first_and_a_terminal_is_spared_the_identical():
    before = sweep(("rte",))
    (table,) = changes.section(*sides(before, worse(later(before), "lora", 0.3))).tables
    assert [row[0] for row in table.rows] == ["lora", "full", "head", "ia3"]
    assert table.raw["method"].tolist() == ["lora", "full", "head", "ia3"]
    brief = changes.without_identical(table)
    assert [row[0] for row in brief.rows] == ["lora"]
    assert brief.notes[-1] == "3 identical ones are in the report."


def kept(folder, records):
    (folder / "runs").mkdir(parents=True)
    for record in records:
        (folder / "runs" / f"{record['run_id']}.json").write_text(json.dumps(record))
    return str(folder)


def test_the_command_writes_the_comparison_into_the_second_report(tmp_path, capsys):
    before = sweep(("rte",))
    old = kept(tmp_path / "old", before)
    new = kept(tmp_path / "new", worse(later(before), "lora", 0.3))
    assert main(["report", "--compare", old, new]) == 0
    said = capsys.readouterr().out
    assert "old → new" in said
    assert "Of 1 that were tested" in said
    report = tmp_path / "new/report"
    assert "## Changes since old" in (report / "report.md").read_text()
    assert ">Changes since old</h2>" in (report / "index.html").read_text()
    with open(report / "tables/changes-old.csv") as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert rows["lora"]["changed"] == "True"
    assert rows["lora"]["better"] == "False"
    assert float(rows["lora"]["high"]) < 0
    assert rows["full"]["identical"] == "True"
    assert not (tmp_path / "old/report").exists()


@pytest.mark.parametrize("arguments", [[], ["there", "--compare", "a", "b"]])
def test_one_folder_or_two_to_compare(arguments, capsys):
    assert main(["report", *arguments]) == 2
    assert "report takes a folder, or --compare and two folders" in capsys.readouterr().err


def test_a_folder_that_is_not_there_is_named(tmp_path, capsys):
    there = kept(tmp_path / "there", sweep(("rte",), seeds=2))
    assert main(["report", "--compare", str(tmp_path / "ther"), there]) == 2
    assert "ther: no such folder" in capsys.readouterr().err
    assert main(["report", "--compare", there, f"{there}/../there"]) == 2
    assert "one folder; expected two sweeps" in capsys.readouterr().err
