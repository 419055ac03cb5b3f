"""The paper: values against what records say, prose without digits, missing records, the same bytes twice."""

import gzip
import json
import re
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest

from peftbench import registry
from peftbench.__main__ import main
from peftbench.errors import UserError
from peftbench.paper import build, kept, latex, packing, values
from peftbench.paper.sources import read

ROOT = Path(__file__).resolve().parent.parent
PAPER, RESULTS = ROOT / "paper", ROOT / "results"
pytestmark = pytest.mark.skipif(not PAPER.is_dir(), reason="no paper beside the tests")

NAMES = ("IA3", "SST-2", "P-tuning v2", "bfloat16", "NF4")
"""What has a digit in its name."""
ARGUMENTS = re.compile(
    r"\\(?:val|rerun|again|ifrecords|ref|label|cite[a-z]*|input|recordtable|longrecordtable|recordfigure|IfFileExists)"
    r"(?:\[[^]]*\])?\{[^{}]*\}"
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[build.Paper, Path]:
    """The paper of the checkout's records."""
    out = tmp_path_factory.mktemp("paper")
    return build.build(PAPER, RESULTS, out), out


def found(built: tuple[build.Paper, Path], key: str) -> str:
    text = built[0].values.found[key]
    assert text is not None, key
    return text


def runs(folder: str) -> list[dict[str, Any]]:
    with gzip.open(RESULTS / folder / "records.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def lines(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (RESULTS / path).read_text().splitlines()]


def small_results(folder: Path) -> Path:
    """Return a results' folder with records of two scripts."""
    (folder / "peers").mkdir(parents=True)
    for name in ("small.jsonl", "llama-8b.jsonl"):
        shutil.copy(RESULTS / "peers" / name, folder / "peers" / name)
    return folder


# -- prose -------------------------------------------------------------------------------------------------------------


def digits(text: str) -> list[str]:
    """Return the words of prose with a digit in them, keys of macros and names aside."""
    text = build.COMMENT.sub("", text)
    text = text.partition(r"\begin{document}")[2] or text
    text = re.sub(r"\[[^]]*(?:width|tbp)[^]]*\]", "", ARGUMENTS.sub("", text))
    for name in NAMES:
        text = text.replace(name, "")
    return re.findall(r"\S*\d\S*", text)


def test_prose_holds_no_digits() -> None:
    for path in (PAPER / "main.tex", *sorted((PAPER / "sections").glob("*.tex"))):
        assert digits(path.read_text(encoding="utf-8")) == [], path
    assert digits(r"LoRA reaches 0.87 on \val{glue/sst2/lora}") == ["0.87"]


def test_prose_names_nothing_that_is_not_there(built: tuple[build.Paper, Path]) -> None:
    paper, out = built
    typo = {PAPER / "x.tex": r"\val{glue-minilm/sst2/lora/gapp}"}
    with pytest.raises(
        UserError, match=r"x.tex: \\val\{glue-minilm/sst2/lora/gapp\}.*did you mean 'glue-minilm/sst2/l"
    ):
        build.check(paper, typo)
    with pytest.raises(UserError, match=r"recordfigure\{glue-minilm-gap\}.*did you mean 'glue-minilm-gaps'"):
        build.check(paper, {PAPER / "x.tex": r"\recordfigure[0.5\textwidth]{glue-minilm-gap}"})
    with pytest.raises(UserError, match="ifrecords"):
        build.check(paper, {PAPER / "x.tex": r"\ifrecords{glue}{text}"})
    defined = (out / "generated/values.tex").read_text()
    for text in build.prose(PAPER).values():
        for what, name in build.NAMED.findall(text):
            if what == "val" and name.partition("/")[0] not in {s.name for s in paper.missing}:
                assert f"\\paperval{{{name}}}" in defined


def test_every_reference_is_in_the_bibliography() -> None:
    bibliography = (PAPER / "references.bib").read_text(encoding="utf-8")
    entries = dict(re.findall(r"@\w+\{(\w+),(.*)", bibliography))
    cited = {name for text in build.prose(PAPER).values() for name in re.findall(r"\\cite[a-z]*\{(\w+)\}", text)}
    assert cited <= set(entries)
    for name in registry.options("method"):
        declared = re.findall(r"arXiv:(\d+\.\d+)", str(registry.describe_method(name)["paper"]))
        if declared:
            assert any(f"arXiv:{one}" in entries[kept.CITED[name]] for one in declared), name


def test_commands_of_the_sources_run_what_is_there(built: tuple[build.Paper, Path]) -> None:
    for source in read(PAPER, RESULTS):
        commands = [line.split() for line in source.command.split(" && ")]
        for words in commands:
            named = [w.removeprefix("experiment=") for w in words if w.startswith("experiment=")]
            assert set(named) <= set(registry.experiments()), source.name
            if words[1].endswith(".py"):
                text = (ROOT / words[1]).read_text(encoding="utf-8")
                assert all(f'"{w}"' in text for w in words if w.startswith("--")), source.name
                assert any(w.startswith(f"results/{source.path}") for w in words), source.name
            else:
                assert words[:3] == ["python", "-m", "peftbench"], source.name
        if source.kind == "steps" and source.there is not None:
            (words,) = commands
            raced = set(words[words.index("--contestants") + 1].split(","))
            assert raced == {r["contestant"] for r in source.lines()}, source.name


# -- values ------------------------------------------------------------------------------------------------------------


def test_values_are_those_of_the_records(built: tuple[build.Paper, Path]) -> None:
    by_method: dict[str, list[float]] = {}
    for record in runs("glue-minilm"):
        spec = record["spec"]
        if spec["task"]["name"] == "sst2" and record["status"] == "completed":
            chosen = by_method.setdefault(f"{spec['method']['name']} {spec['train']['learning_rate']}", [])
            chosen.append(record["quality"]["test"]["accuracy"])
    five = {name.split()[0]: scores for name, scores in by_method.items() if len(scores) == 5}
    for name in ("full", "lora", "head"):
        assert found(built, f"glue-minilm/sst2/{name}/value") == f"{statistics.mean(five[name]):.3f}"
        assert found(built, f"glue-minilm/sst2/{name}/std") == f"{statistics.stdev(five[name]):.3f}"
    gap = statistics.mean(five["lora"]) - statistics.mean(five["full"])
    assert found(built, "glue-minilm/sst2/lora/gap") == f"$-${abs(gap):.3f}"
    assert found(built, "glue-minilm/runs") == str(len(runs("glue-minilm")))
    rates = runs("method-zoo-rates")
    assert found(built, "method-zoo-rates/diverged") == str(sum(r["status"] == "diverged" for r in rates))


def test_ratios_are_those_of_one_call(built: tuple[build.Paper, Path]) -> None:
    records = lines("peers/llama-1b.jsonl")
    (first,) = [r for r in records if r["contestant"] == "hf-lora"]
    call = {r["contestant"]: r["step_seconds"]["p50"] for r in records if r["date"] == first["date"]}
    ours = call["ours-lora-compiled-graphs"] / call["hf-lora"]
    assert found(built, "peers-llama/ours-lora-compiled-graphs/hf-lora/time") == f"{ours:.2f}"
    dora = [r for r in records if r["contestant"] == "ours-dora-compiled-graphs"][-1]
    (lora,) = [r for r in records if r["date"] == dora["date"] and r["contestant"] == "ours-lora-compiled-graphs"]
    ratio = dora["step_seconds"]["p50"] / lora["step_seconds"]["p50"]
    assert found(built, "peers-llama/ours-dora-compiled-graphs/ours-lora-compiled-graphs/time") == f"{ratio:.2f}"
    low, high = map(float, found(built, "peers-llama/ours-lora-compiled-graphs/hf-lora/time-interval")[1:-1].split(","))
    assert low <= ours + 0.005
    assert ours - 0.005 <= high
    worst = max(abs(r["predicted"]["peak"] / r["measured"]["peak"] - 1) for r in lines("estimate/compare.jsonl"))
    assert found(built, "estimate/worst") == f"{100 * worst:.1f}"


def test_sources_are_whole(built: tuple[build.Paper, Path]) -> None:
    paper, out = built
    named = {(what, name) for text in build.prose(PAPER).values() for what, name in build.NAMED.findall(text)}
    absent = {one.name for one in paper.missing}
    for what, name in named:
        if what == "recordfigure" and name.partition("-")[0] not in {"packing"} and name not in absent:
            assert (out / "generated/figures" / f"{name}.pdf").read_bytes().startswith(b"%PDF"), name
    for path in (out / "generated").rglob("*.tex"):
        path.read_text(encoding="utf-8").encode("latin-1")
    listing = (out / "generated/values.tsv").read_text().splitlines()
    assert len(listing) == len(paper.values.found) + 1


def test_a_changed_record_changes_its_value_alone(tmp_path: Path) -> None:
    results = small_results(tmp_path / "results")
    one, before = build.collect(PAPER, results), build.digest(PAPER, read(PAPER, results))
    path = results / "peers/small.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        if record["contestant"] == "ours-lora-graphs":
            record["step_seconds"]["p50"] *= 2
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    two = build.collect(PAPER, results)
    changed = {k for k in one.values.found if one.values.found[k] != two.values.found[k]}
    prefix = "peers-small/ours-lora-graphs"
    assert changed == {f"{prefix}/ms", f"{prefix}/faster", f"{prefix}/time"}
    assert build.digest(PAPER, two.sources) != before


def test_the_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    results = small_results(tmp_path / "results")
    for name in ("one", "two"):
        build.build(PAPER, results, tmp_path / name)
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(tmp_path / "two") for p in (tmp_path / "two").rglob("*") if p.is_file())
    assert Path("generated/figures/peers-llama.pdf") not in files
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file


# -- the command -------------------------------------------------------------------------------------------------------


def test_missing_records_are_said_one_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "results").mkdir()
    arguments = [
        "paper",
        str(PAPER),
        "--results",
        str(tmp_path / "results"),
        "--out",
        str(tmp_path / "out"),
        "--no-pdf",
    ]
    assert main(arguments) == 0
    said = capsys.readouterr().out.splitlines()
    missing = [line for line in said if line.startswith("not measured: results/")]
    assert len(missing) == len(read(PAPER, tmp_path / "results"))
    assert any("results/packing/wall.jsonl (python experiments/packing/wall.py" in line for line in missing)
    defined = (tmp_path / "out/generated/values.tex").read_text()
    assert r"\paperval{packing-wall/rte/packed/rate}{\notmeasured{}}" in defined
    assert r"\paperrecords" not in defined


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--results", "nowhere"], "peftbench: --results nowhere: no such folder"),
        (["elsewhere"], "peftbench: elsewhere: no paper here"),
        (["--out", "."], "peftbench: --out .: holds the paper's own files"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["paper", *arguments]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(line)


def test_a_broken_record_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = small_results(tmp_path / "results")
    (results / "peers/small.jsonl").write_text("{")
    assert main(["paper", str(PAPER), "--results", str(results), "--out", str(tmp_path / "out"), "--no-pdf"]) == 2
    assert "small.jsonl: unreadable records" in capsys.readouterr().err


def test_sources_of_unknown_kinds_are_refused(tmp_path: Path) -> None:
    for text, said in (
        ("x: {kind: runz, path: x, command: y}", "kind runz; did you mean 'runs'"),
        ("x: {kind: runs, path: x}", "expected command, kind, path"),
        ("- x", "expected names of sources"),
        ("x: [", "cannot be read"),
    ):
        (tmp_path / "records.yaml").write_text(text)
        with pytest.raises(UserError, match=said):
            read(tmp_path, tmp_path)


def test_without_latex_one_line_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    line = latex.missing()
    assert line is not None
    assert line.startswith("no PDF: LaTeX is not installed here")
    assert "\n" not in line


@pytest.mark.skipif(latex.missing() is not None, reason="no LaTeX")
def test_latex_makes_a_pdf_and_says_what_is_wrong(tmp_path: Path) -> None:
    head = "\\documentclass{article}\\begin{document}\n"
    (tmp_path / "main.tex").write_text(head + "\\ref{nothing}\n\\end{document}\n")
    pdf, said = latex.compile_pdf(tmp_path, "main.tex", 0)
    assert pdf.read_bytes().startswith(b"%PDF")
    assert any("nothing" in line for line in said)
    (tmp_path / "main.tex").write_text(head + "\\nosuchmacro\n\\end{document}\n")
    with pytest.raises(UserError, match="Undefined control sequence"):
        latex.compile_pdf(tmp_path, "main.tex", 0)


def test_the_kept_pdf_is_of_these_records_and_this_prose(built: tuple[build.Paper, Path]) -> None:
    pdf = PAPER / "peftbench.pdf"
    assert pdf.stat().st_size < 1_000_000
    (edition,) = re.findall(rb"/Edition \((\w+)\)", pdf.read_bytes())
    assert edition.decode() == built[0].digest[: build.EDITION], "make paper, where LaTeX is installed"


# -- parts -------------------------------------------------------------------------------------------------------------


def test_text_becomes_latex() -> None:
    assert values.tex("a_b & 5 % − 0.1 × 2 --out") == r"a\_b \& 5\,\% $-$ 0.1 $\times$ 2 -{}-out"
    with pytest.raises(ValueError, match="no LaTeX for"):
        values.tex("字")
    some = values.Values()
    some.number("a/b", -0.0261, 3, signed=True)
    some.power("a/c", 7.4e-6)
    some.number("a/d", float("nan"), 3)
    some.count("a/e", 22565376)
    assert some.found == {"a/b": "$-$0.026", "a/c": r"$7\times 10^{-6}$", "a/d": None, "a/e": "22,565,376"}
    assert r"\paperval{a/d}{\notmeasured{}}" in some.tex()
    with pytest.raises(ValueError, match="given twice"):
        some.put("a/b", "x")


def timed(arm: str, wall: float, packs: list[dict[str, float]], sizes: list[int], **changes: Any) -> dict[str, Any]:
    """Return a record of `wall.py` of a case of 16 runs."""
    return {
        "comparison": "packing-wall", "date": "2026-01-01", "command": "python wall.py", "device": "card",
        "versions": {"torch": "2.11"}, "case": "rte", "arm": arm, "runs": 16, "status": "completed",
        "wall_seconds": wall, "runs_timed": sum(sizes), "pack_sizes": sizes, "pack_seconds": packs, "steps": 10,
        "execution": ["graphs"], **changes,
    }  # fmt: skip


PEER = timed(
    "hf", 110.0, [{"load": 15.0, "train": 20.0, "test": 10.0}, {"load": 5.0, "train": 40.0, "test": 10.0}], [1, 1]
)
PACKED = timed("16", 50.0, [{"load": 6.0, "train": 16.0, "evaluate": 2.0, "test": 2.0}], [16])
CURVE = [(256, 4.0), (512, 1.0), (1024, 4.0), (4096, 0.25)]


def test_packs_are_reckoned_as_their_scripts_do(monkeypatch: pytest.MonkeyPatch) -> None:
    scripts = ROOT / "experiments" / "packing"
    if not scripts.is_dir():
        pytest.skip("no experiments beside the tests")
    monkeypatch.setattr(sys, "path", [str(scripts), str(scripts.parent / "peers"), *sys.path])
    import curve
    import wall

    for record in (PEER, PACKED, timed("1", 60.0, PEER["pack_seconds"][:1], [1])):
        assert packing.spent(record) == wall.spent(record)
        assert packing.step_seconds(record) == wall.step_seconds(record)
    assert packing.falls_to_one(CURVE) == curve.falls_to_one(CURVE)
    assert packing.NO_GAIN == curve.NO_GAIN


def test_packing_says_what_its_records_say(tmp_path: Path) -> None:
    (tmp_path / "packing").mkdir()
    # two whole calls, of which the newer counts, and a still newer one that has no Trainer to be compared with
    later = [{**PEER, "date": "2026-01-02"}, {**PACKED, "date": "2026-01-02", "wall_seconds": 40.0}]
    lonely = {**PACKED, "date": "2026-01-03", "wall_seconds": 30.0}
    calls = (PEER, PACKED, *later, lonely)
    (tmp_path / "packing/wall.jsonl").write_text("".join(json.dumps(r) + "\n" for r in calls))
    points = [{"execution": "graphs", "tokens": t, "runs": 16, "gain": g} for t, g in CURVE]
    shared = {
        "comparison": "packing-curve",
        "device": "card",
        "model": "minilm-l6",
        "precision": "bf16",
        "versions": {},
    }
    (tmp_path / "packing/curve.jsonl").write_text("".join(json.dumps({**shared, **p}) + "\n" for p in points))
    paper = build.collect(PAPER, tmp_path)
    said = paper.values.found
    assert said["packing-wall/rte/packed/rate"] == f"{3600 * 16 / 40:.0f}"
    assert said["packing-wall/rte/packed/over-hf"] == f"{packing.whole_seconds(PEER) / 40:.1f}"
    both = [f"{packing.whole_seconds(PEER) / wall:.1f}" for wall in (50, 40)]  # no call's ratio is left out
    assert said["packing-wall/rte/every-over-hf"] == " and ".join(both)
    assert said["packing-wall/rte/1/rate"] is None
    assert said["packing-wall/smollm2/packed/over-hf"] is None
    assert said["packing-curve/most"] == "4.0"
    assert "about 2" in str(said["packing-curve/16/ends"])
    assert said["packing-pairs/test/p"] is None
    assert {"packing-wall", "packing-curve"} <= set(paper.sheets)
    for name in ("packing-wall", "packing-curve"):
        assert paper.figures[name]() is not None
