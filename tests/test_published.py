"""The registry of published figures: complete, consistent, and free of what only one machine knows."""

import math
import re
import subprocess
import sys

import pytest

from peftbench import published, registry
from peftbench.errors import UserError

TABLES = sorted(path.stem for path in published.FOLDER.glob("*.csv"))
KEYS = {
    "claims": "claim",
    "reasons": "row",
    "sizes": "task",
    "surprises": "text",
    "papers": "paper",
    "values": "id",
    "counts": "id",
    "texts": "key",
    "metrics": "metric",
    "models": "model",
    "methods": "method",
    "tasks": "task",
    "architectures": "model",
    "protocols": "prefix",
}


@pytest.mark.parametrize("name", TABLES)
def test_keys_are_there_and_unique(name):
    keys = [row[KEYS[name]] for row in published.table(name)]
    assert all(keys)
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("name", TABLES)
def test_rows_are_whole_and_say_nothing_of_a_machine(name):
    for row in published.table(name):
        assert None not in row, f"{name}: a row with too many cells: {row}"
        for column, text in row.items():
            assert text is not None, f"{name}: {row[KEYS[name]]} lacks {column}"
            assert text == text.strip()
            assert not re.search(r"file://|/(?:home|root|mnt|tmp)/|\bTODO\b", text), (name, text)


def test_every_value_has_what_a_reader_needs():
    for v in published.values().values():
        assert re.fullmatch(r"[a-z0-9.+-]+", v.id), v.id
        assert v.paper.citation.count(".") >= 2
        assert v.table, v.id
        assert v.task, v.id
        assert v.value, v.id
        assert v.confidence in published.CONFIDENCES
        assert v.confirmed, v.id
        assert v.std is None or (math.isfinite(v.std) and v.std >= 0)
        assert v.seeds is None or v.seeds >= 1
        assert v.number is None or math.isfinite(v.number)
    assert len(published.values()) > 2000


def test_papers_can_be_found_and_are_used():
    used = {v.paper.key for v in published.values().values()} | {c.paper.key for c in published.claims().values()}
    for key, paper in published.papers().items():
        assert key in used, key
        assert paper.arxiv or paper.url or key == "folk", key
        assert not paper.arxiv or re.fullmatch(r"\d{4}\.\d{5}", paper.arxiv), key


def test_metrics_have_units_and_those_that_are_compared_a_stated_tolerance():
    used = {v.metric.name for v in published.values().values()}
    assert used == set(published.metrics())
    for name, metric in published.metrics().items():
        assert metric.unit, name
        assert metric.better in ("higher", "lower", "")
        assert bool(metric.ours) <= (metric.tolerance is not None and bool(metric.reason)), name
        assert metric.ours == "" or (metric.factor and metric.better), name


def test_names_here_are_names_of_the_vocabulary():
    for v in published.values().values():
        here = v.here
        for group, name in (("model", here.model), ("method", here.method), ("task", here.task)):
            assert not name or name in registry.options(group), (v.id, group, name)
        assert here.weights in ("", "same", "other")
        assert bool(here.weights) == bool(here.model)
        assert here.split in published.SPLITS


def test_protocols_belong_to_rows_and_use_known_words():
    ids = list(published.values())
    for p in published.protocols():
        assert any(i.startswith(p.prefix) for i in ids), p.prefix
        assert p.selection in published.SELECTIONS
        assert p.statistic in published.STATISTICS
        assert p.spread in published.SPREADS
        assert p.start in ("", "none") or p.starts_from(p.start.partition(": ")[2].split()[0]) == "mnli"


def test_the_longest_prefix_says_how_a_row_was_obtained():
    rows = published.values()
    assert rows["lora-t2-roberta-large-loral-rte"].protocol.starts_from("rte") == "mnli"
    assert rows["lora-t2-roberta-large-loral-rte"].protocol.starts_from("sst2") == "pretrained"
    assert rows["lora-t2-roberta-large-loralr-rte"].protocol.starts_from("rte") == "pretrained"
    assert rows["minilm-minilm-l6-h384-uncased-glue-rte"].protocol.starts_from("rte") == ""


def test_texts_are_all_in_use():
    named = {row[c] for row in published.table("values") for c in ("settings", "confirmed", "notes")}
    named |= {row[c] for row in published.table("counts") for c in ("confirmed", "notes")}
    assert named - {""} == set(published.texts())


def test_counts_name_a_known_architecture():
    for row in published.counts().values():
        assert row.model in published.architectures(), row.id
        assert row.trainable >= 0
        assert row.total is None or row.total >= row.trainable


def test_rows_are_chosen_by_paper_row_or_beginning():
    assert [v.id for v in published.chosen(["lora-t2-roberta-base-lora-rte"])] == ["lora-t2-roberta-base-lora-rte"]
    assert {v.paper.key for v in published.chosen(["vera"])} == {"vera"}
    assert len(published.chosen(["lora-t2-roberta-base-lora-"])) == 9
    assert len(published.chosen(["all"])) == len(published.values())
    with pytest.raises(UserError, match="adaolra.*did you mean 'adalora'"):
        published.chosen(["adaolra"])


def test_half_a_unit_of_the_last_digit():
    assert published.half_unit("91.5") == pytest.approx(0.05)
    assert published.half_unit("0.123") == pytest.approx(0.0005)
    assert published.half_unit("10") == 0


def test_the_registry_loads_without_torch():
    code = "import sys, peftbench.published as p; p.values(); p.counts(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_published_tables_are_part_of_the_package():
    import tomllib
    from pathlib import Path

    data = tomllib.loads((Path(__file__).resolve().parent.parent / "pyproject.toml").read_text())
    assert data["tool"]["setuptools"]["package-data"]["peftbench.published"] == ["*.csv"]
