"""The page of everything found: made from verdicts alone, and honest where there are none."""

import re
from pathlib import Path

import pytest

from peftbench import published
from peftbench.cli.reproduce import reproduce
from peftbench.errors import UserError
from peftbench.reproduce import claims, counts, findings, measured, pages
from peftbench.reproduce.records import configurations
from peftbench.reproduce.verdicts import NOT_RUN, VERDICTS
from tests.test_reproduce_measured import step

ROOT = Path(__file__).parents[1]
PAIR = [step("full/a/x", 40.0, 0.15), step("lora/a/x", 10.0, 0.1)]


@pytest.fixture(scope="module")
def counted():
    return counts.rebuild_all(["gpt-3-175b-vera-r16", "gpt2-medium-lora-r4-q-v"])


def test_without_records_nothing_is_found(counted):
    text = findings.page([], [], counted)
    assert "No claim has been tried yet." in text
    assert text.count("has not been run:") == len({c.experiment for c in published.claims().values()})
    assert all(f"`{claim}`" in text for claim in published.claims())
    assert "**GPT-3 175B, VeRA: 2.8M trained parameters.** *explained*: 2,362,368 by the closed form" in text
    assert "None can be named" in findings.page([], [], [])


def test_measurements_become_verdicts_and_the_most_surprising_are_explained(counted):
    text = findings.page([], PAIR, counted)
    table, _, rest = text.partition("## The most surprising rows")
    assert "| LoRA trains 100 to 1000 times faster than full fine-tuning. (`folk-hundredfold`) | Hearsay | " in table
    assert "claim contradicted | step of full / lora: a/x: 1.5; claimed 100 (a GPU) |" in table
    told = rest.partition("## Published figures")[0]
    assert told.count("\n**") == findings.SHOWN
    assert told.index("LoRA trains 100 to 1000 times faster") < told.index("GPT-3 175B")  # claims first
    assert "`folk-hundredfold`" not in rest
    assert "Tried on other models than the authors'" in rest
    assert "`lora-memory`" in rest


def test_an_explanation_of_another_verdict_is_left_out(counted):
    faster = [step("full/a/x", 40.0, 100.0), step("lora/a/x", 10.0, 0.1)]
    text = findings.page([], faster, counted)
    assert "(`folk-hundredfold`) | Hearsay | claim holds" in text
    told = text.partition("## The most surprising rows")[2].partition("## Published figures")[0]
    assert "LoRA trains 100 to 1000 times faster" not in told


def test_explanations_name_rows_that_exist_and_verdicts_that_can_be():
    for line in published.table("surprises"):
        claim = published.claims().get(line["row"])
        assert claim is not None or line["row"] in published.counts(), line["row"]
        assert line["verdict"] in (VERDICTS if claim is not None else ("explained", "differs")), line["row"]


def test_every_claim_has_a_rule():
    for claim in published.claims().values():
        assert (claim.rule in claims.RULES) != (claim.rule in measured.RULES), claim.id


def test_the_page_in_the_docs_has_the_verdicts_of_the_records_in_results():
    results = ROOT / "results"
    folders = sorted(f for f in results.glob("claims-*") if f.name != measured.FOLDER)
    now = pages.judged_claims(configurations(folders), measured.load([results]))
    kept = (ROOT / "docs" / "found.md").read_text()
    shown = dict(re.findall(r"\(`([a-z0-9-]+)`\) \| [^|]+ \| ([^|]+) \|", kept))
    assert shown == {c.id: str(v) for c, v, _ in now if v.verdict != NOT_RUN}, f"run {findings.COMMAND}"
    for claim, verdict, _ in now:
        assert (f"(`{claim.id}`, {claim.paper.authors})" in kept) == (verdict.verdict == NOT_RUN)


def test_the_page_has_one_form():
    with pytest.raises(UserError, match="--json: found is a page"):
        reproduce(["found"], form="json")
