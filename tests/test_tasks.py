"""Tasks: splits, loss masks, label words, parsing, bad data; real data where PEFTBENCH_DATA or the package has it."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from peftbench.errors import UserError
from peftbench.models import tokenizer as builtin
from peftbench.tasks import build, source
from peftbench.tasks.base import carve, carve_validation, encode_pairs, encode_prompts, encode_texts, text_key
from peftbench.tasks.choice import Choice, candidates
from peftbench.tasks.glue import TASKS, Glue
from peftbench.tasks.instruct import (
    Alpaca,
    Arithmetic,
    E2e,
    Gsm8k,
    as_table,
    canonical_number,
    final_number,
    last_number,
)
from peftbench.tasks.movie_reviews import MovieReviews, package_file, without_duplicates
from peftbench.tasks.tiny import Tiny

CONF = Path(__file__).parent.parent / "conf" / "task"
YAMLS = sorted(CONF.rglob("*.yaml"))
DATA = os.environ.get("PEFTBENCH_DATA", "")
needs_data = pytest.mark.skipif(not DATA, reason="PEFTBENCH_DATA is unset")
needs_package = pytest.mark.skipif(package_file() is None, reason="the package movie-reviews is not installed")

WORDS = "<pad> <s> </s> [CLS] [SEP] ? a b c d e f g h yes no good bad : \\n".replace("\\n", "Ċ").split()
ID = {word: number for number, word in enumerate(WORDS)}


def words_tokenizer(single="$A", pair="$A $B", names=("input_ids", "attention_mask")):
    """A tokenizer of whole words, so that every id in a test can be read."""
    tokenizer = Tokenizer(models.WordLevel(ID, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [(word, ID[word]) for word in ("<s>", "</s>", "[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="?", eos_token="</s>", model_input_names=list(names)
    )


DECODER = words_tokenizer()
DECODER_WITH_START = words_tokenizer("<s> $A", "<s> $A <s> $B")
SEQ2SEQ = words_tokenizer("$A </s>", "$A </s> $B </s>")
ENCODER = words_tokenizer(
    "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", ("input_ids", "token_type_ids", "attention_mask")
)


def ids(text):
    return [ID[word] for word in text.split()]


def write(folder, columns):
    folder.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), folder)


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("PEFTBENCH_DATA", str(tmp_path))
    return tmp_path


def write_rte(data, train=60, validation=10):
    for split, count in (("train", train), ("validation", validation)):
        numbers = range(count)
        columns = {
            "sentence1": [f"{split} premise {n}" for n in numbers],
            "sentence2": [f"hypothesis {n}" for n in numbers],
            "label": [n % 2 for n in numbers],
        }
        write(data / "glue" / "rte" / f"{split}.parquet", columns)


# The yamls.


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: str(path.relative_to(CONF)))
def test_every_yaml_builds_and_opens_with_a_command(path):
    settings = yaml.safe_load(path.read_text())
    task = build(settings)
    name = str(path.relative_to(CONF).with_suffix("")).replace("/", "-")
    assert task.name == name
    assert "python -m peftbench run task=" in path.read_text().splitlines()[0]
    assert task.formulation in task.formulations
    assert hash(task) == hash(build(settings))


@pytest.mark.parametrize("option", ["movie-reviews", "movie-reviews/imdb", "rte"])
def test_hydra_composes_the_option(option):
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(CONF.parent), version_base=None):
        assert compose(overrides=[f"+task={option}"]).task.name == option.replace("/", "-")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_lenght": 5}, "task.max_lenght: no such setting.*did you mean 'max_length'"),
        ({"max_length": "long"}, "task.max_length='long': expected a whole number"),
        ({"max_length": 0}, "task.max_length=0"),
        ({"formulation": "heads"}, "task.formulation=heads: task rte accepts head or text"),
        ({"name": "rtee"}, "did you mean 'rte'"),
        ({"data": "cloa"}, "task.data=cloa: expected one of .*did you mean 'cola'"),
        ({"label_words": ["yes", "yes"]}, "expected 2 different words"),
        ({"prompt": "{premise}"}, "sentence1"),
        ({"_target_": "peftbench.tasks.glue.Gleu"}, "no such class"),
    ],
)
def test_bad_settings_name_the_key(change, message):
    settings = {"_target_": "peftbench.tasks.glue.Glue", "name": "rte"} | change
    with pytest.raises(UserError, match=message):
        build(settings)


def test_a_variant_can_have_a_name_of_its_own():
    assert Glue(name="rte-as-text", data="rte", formulation="text").facts is TASKS["rte"]
    assert Choice(name="my-boolq", data="boolq").key == "boolq"
    assert Arithmetic(name="my-svamp", data="svamp").key == "svamp"


def test_text_only_tasks_refuse_a_head():
    with pytest.raises(UserError, match=r"task\.formulation=head: task gsm8k accepts text"):
        Gsm8k(name="gsm8k", formulation="head")


def test_planning_needs_no_torch():
    code = (
        "import sys; from peftbench.tasks.tiny import Tiny; import peftbench.tasks.glue, peftbench.tasks.instruct;"
        "import peftbench.tasks.choice, peftbench.tasks.movie_reviews;"
        "Tiny(name='t').splits(); Tiny(name='t').fingerprint();"
        "assert 'torch' not in sys.modules and 'evaluate' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Splits.


def test_the_carved_part_does_not_depend_on_the_order_of_rows():
    rows = [{"text": f"text {n}", "label": n % 2} for n in range(500)]
    mixed = random.Random(0).sample(rows, len(rows))
    train, validation = carve_validation(rows, lambda row: (row["text"],))
    _, again = carve_validation(mixed, lambda row: (row["text"],))
    assert {row["text"] for row in validation} == {row["text"] for row in again}
    assert (len(train), len(validation)) == (450, 50)
    assert train == [row for row in rows if row in train]


def test_duplicates_of_a_text_never_straddle():
    rows = [{"text": f"Text  {n % 40}" if n % 3 else f"text {n % 40} "} for n in range(200)]
    train, validation = carve_validation(rows, lambda row: (row["text"],))
    keys = [{text_key([row["text"]]) for row in part} for part in (train, validation)]
    assert len(train) + len(validation) == 200
    assert len(validation) == 20
    assert not keys[0] & keys[1]


def test_validation_is_at_most_a_thousand_rows_and_may_be_smaller_for_large_groups():
    rows = [{"text": str(n)} for n in range(20_000)]
    assert len(carve_validation(rows, lambda row: (row["text"],))[1]) == 1000
    assert carve([{"text": "same"}] * 9, lambda row: (row["text"],), 3)[1] == []


def test_pairs_are_told_apart_from_their_concatenation():
    assert text_key(["a b", "c"]) != text_key(["a", "b c"])


@pytest.mark.parametrize("protocol", ["held_out", "paper"])
def test_what_each_protocol_selects_on(data, protocol):
    write_rte(data)
    splits = Glue(name="rte").splits(protocol)
    assert [row["sentence1"] for row in splits["test"]] == [f"validation premise {n}" for n in range(10)]
    if protocol == "paper":
        assert (len(splits["train"]), splits["validation"]) == (60, splits["test"])
    else:
        assert (len(splits["train"]), len(splits["validation"])) == (54, 6)
        assert all(row["sentence1"].startswith("train") for row in splits["validation"])


def test_an_unknown_protocol_is_refused():
    with pytest.raises(UserError, match="held_out or paper"):
        Tiny(name="tiny").splits("papre")


def test_callers_cannot_spoil_cached_splits():
    first = Tiny(name="tiny").splits()
    first["train"].clear()
    assert Tiny(name="tiny").splits()["train"]


def test_mnli_has_its_mismatched_split_only_where_the_data_holds_it(data):
    columns = {"premise": ["p"] * 20, "hypothesis": [f"h{n}" for n in range(20)], "label": [n % 3 for n in range(20)]}
    for split in ("train", "validation_matched"):
        write(data / "glue" / "mnli" / f"{split}.parquet", columns)
    assert list(Glue(name="mnli").splits()) == ["train", "validation", "test"]
    before = Glue(name="mnli").fingerprint()
    write(data / "glue" / "mnli" / "validation_mismatched.parquet", columns)
    assert list(Glue(name="mnli").splits()) == ["train", "validation", "test", "test_mismatched"]
    assert Glue(name="mnli").fingerprint() != before


def test_the_fingerprint_follows_the_data(data):
    write_rte(data)
    before = Glue(name="rte").fingerprint()
    assert Glue(name="rte", max_length=77).fingerprint() == before
    write_rte(data, train=61)
    assert Glue(name="rte").fingerprint() != before
    assert len(Glue(name="rte").splits("paper")["train"]) == 61


def test_the_manifest_marks_subsets(data):
    write_rte(data)
    assert Glue(name="rte").describe()["subset"] is None
    entries = [{"file": f"glue/rte/{split}.parquet", "status": "complete"} for split in ("train", "validation")]
    (data / "manifest.json").write_text(json.dumps(entries))
    assert Glue(name="rte").describe() == {
        "rows": {"train": 54, "validation": 6, "test": 10},
        "subset": False,
        "source": "local:glue/rte",
    }
    entries[0]["status"] = "subset"
    (data / "manifest.json").write_text(json.dumps(entries))
    os.utime(data / "manifest.json", (1, 1))
    assert Glue(name="rte").subset() is True


# Bad data.


def test_a_missing_folder_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PEFTBENCH_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=f"PEFTBENCH_DATA={tmp_path}/nowhere: no such folder"):
        Glue(name="rte").splits()


def test_a_missing_split_is_named_with_those_there(data):
    write_rte(data)
    (data / "glue" / "rte" / "validation.parquet").unlink()
    with pytest.raises(UserError, match=r"rte/validation.parquet: no such file; the splits in that folder are: train"):
        Glue(name="rte").splits()


def test_a_missing_column_is_named_with_those_found(data):
    write_rte(data)
    write(data / "glue" / "rte" / "train.parquet", {"sentence1": ["a"], "sentence_2": ["b"], "label": [0]})
    with pytest.raises(UserError, match=r"train.parquet: no column 'sentence2'.*found sentence1, sentence_2, label"):
        Glue(name="rte").splits()


def test_a_file_that_is_no_parquet_is_named(data):
    write_rte(data)
    (data / "glue" / "rte" / "train.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(UserError, match=r"train\.parquet: not a readable parquet file"):
        Glue(name="rte").splits()


@pytest.mark.parametrize("label", [-1, 2])
def test_a_label_out_of_range_is_named(data, label):
    write_rte(data)
    columns = {"sentence1": ["a"], "sentence2": ["b"], "label": [label]}
    write(data / "glue" / "rte" / "validation.parquet", columns)
    with pytest.raises(UserError, match=f"column 'label' holds {label}; expected 0 to 1"):
        Glue(name="rte").splits()


def test_a_set_without_hub_source_says_where_its_files_belong(data):
    with pytest.raises(UserError, match=r"expected \$PEFTBENCH_DATA/instruct/llm_adapters/piqa/<split>.parquet"):
        Choice(name="piqa").splits()


def test_no_network_and_no_data_is_one_line(monkeypatch, tmp_path):
    monkeypatch.delenv("PEFTBENCH_DATA", raising=False)
    monkeypatch.setattr(source, "_hub_revision", lambda *key: None)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    source._hub_builder.cache_clear()
    with pytest.raises(UserError, match="nyu-mll/glue: cannot be had from the hub") as caught:
        Glue(name="wnli").splits()
    assert "\n" not in str(caught.value)
    assert "PEFTBENCH_DATA" in str(caught.value)


def test_rows_come_from_the_hub_when_no_folder_has_them(data, monkeypatch, tmp_path):
    import datasets

    write_rte(data)
    files = {split: str(data / "glue" / "rte" / f"{split}.parquet") for split in ("train", "validation")}
    asked = []

    def builder(repo, config, revision):
        asked.append((repo, config, revision))
        made = local("parquet", data_files=files, cache_dir=str(tmp_path / "cache"))
        made.hash = revision
        return made

    local = datasets.load_dataset_builder
    expected = Glue(name="rte").splits()
    monkeypatch.delenv("PEFTBENCH_DATA")
    monkeypatch.setattr(source, "_hub_revision", lambda *key: "0123abcd")
    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    source._hub_builder.cache_clear()
    source._hub_rows.cache_clear()
    task = Glue(name="rte")
    assert task.data_fingerprint() == "nyu-mll/glue/rte@0123abcd"
    assert task.splits() == expected
    assert asked == [("nyu-mll/glue", "rte", "0123abcd")]
    assert task.describe() == {"rows": None, "subset": None, "source": "hub:nyu-mll/glue"}
    with pytest.raises(UserError, match="hub nyu-mll/glue: no split 'dev'; its splits are: train, validation"):
        task.dataset.rows("dev", ("label",))


# Text encoding: the loss mask, token by token.


def test_a_decoder_is_trained_on_the_answer_and_its_end_only():
    encoded = encode_pairs([("a b :", " good"), ("c :", " bad b")], DECODER, 16, "decoder")
    assert encoded.input_ids == [ids("a b : good </s>"), ids("c : bad b </s>")]
    assert encoded.labels == [[-100, -100, -100, ID["good"], ID["</s>"]], [-100, -100, *ids("bad b </s>")]]
    assert encoded.targets is None
    assert encoded.lengths == [5, 5]


def test_a_start_token_is_kept_and_not_trained_on():
    encoded = encode_pairs([("a b c d e f :", " good")], DECODER_WITH_START, 6, "decoder")
    assert encoded.input_ids == [ids("<s> e f : good </s>")]
    assert encoded.labels == [[-100] * 4 + ids("good </s>")]


def test_a_long_prompt_is_cut_from_the_left_and_the_answer_kept_whole():
    encoded = encode_pairs([("a b c d e f", " g h")], DECODER, 5, "decoder")
    assert encoded.input_ids == [ids("e f g h </s>")]
    assert encoded.labels == [[-100, -100, *ids("g h </s>")]]


def test_an_answer_that_fills_the_length_leaves_no_prompt_and_a_longer_one_loses_its_end():
    assert encode_pairs([("a b", " c d e")], DECODER, 4, "decoder").input_ids == [ids("c d e </s>")]
    encoded = encode_pairs([("a b", " c d e f g")], DECODER_WITH_START, 4, "decoder")
    assert encoded.input_ids == [ids("<s> c d e")]
    assert encoded.labels == [[-100, *ids("c d e")]]


def test_a_seq2seq_model_reads_the_prompt_and_is_trained_on_the_answer():
    encoded = encode_pairs([("a b c d e f", " good bad")], SEQ2SEQ, 5, "seq2seq")
    assert encoded.input_ids == [ids("c d e f </s>")]
    assert encoded.labels == [ids("good bad </s>")]


@pytest.mark.parametrize(
    ("tokenizer", "kind"), [(DECODER, "decoder"), (DECODER_WITH_START, "decoder"), (SEQ2SEQ, "seq2seq")]
)
def test_generation_starts_from_the_prompt_that_was_trained(tokenizer, kind):
    prompt = encode_prompts(["a b :"], tokenizer, 16, kind).input_ids[0]
    trained = encode_pairs([("a b :", " good")], tokenizer, 16, kind)
    expected = trained.input_ids[0]
    assert prompt == (expected if kind == "seq2seq" else expected[: len(prompt)])
    if kind == "decoder":
        assert trained.labels[0][: len(prompt)] == [-100] * len(prompt)
        assert trained.labels[0][len(prompt)] != -100


def test_a_decoder_prompt_never_ends_in_the_end_token_its_tokenizer_adds():
    assert encode_prompts(["a :"], words_tokenizer("$A </s>"), 16, "decoder").input_ids == [ids("a :")]


def test_encoders_and_tokenizers_without_end_are_refused():
    with pytest.raises(UserError, match="needs a model of kind decoder or seq2seq, not encoder"):
        encode_pairs([("a", " b")], ENCODER, 8, "encoder")
    endless = words_tokenizer()
    endless.eos_token = None
    with pytest.raises(UserError, match="end token"):
        encode_pairs([("a", " b")], endless, 8, "decoder")


def test_candidates_are_encoded_as_answers_with_their_owners():
    task = Tiny(name="tiny", formulation="text")
    rows = [{"text": "a b", "label": 1, "value": 5.0}, {"text": "c", "label": 0, "value": 0.0}]
    encoded, owners = task.encode_choices(rows, DECODER, 16, "decoder")
    assert owners == [0, 0, 1, 1]
    assert encoded.input_ids == [
        ids(text) for text in ("a b : bad </s>", "a b : good </s>", "c : bad </s>", "c : good </s>")
    ]
    assert task.encode(rows, DECODER, 16, "decoder").input_ids == [encoded.input_ids[1], encoded.input_ids[2]]
    assert task.references(rows) == [1, 0]


# Head encoding.


def test_pairs_for_an_encoder_have_types_and_lose_the_longer_text_first():
    encoded = encode_texts([("a b c d", "e"), ("f", "g h")], [1, 0], ENCODER, 6, "encoder")
    assert encoded.input_ids == [ids("[CLS] a b [SEP] e [SEP]"), ids("[CLS] f [SEP] g h [SEP]")]
    assert encoded.token_type_ids == [[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1]]
    assert encoded.targets == [1, 0]
    assert encoded.labels is None


def test_a_tokenizer_without_types_gives_none():
    assert encode_texts([("a",)], [0], DECODER, 6, "encoder").token_type_ids is None


def test_a_decoder_gets_both_texts_with_its_own_special_tokens():
    encoded = encode_texts([("a b", "c"), ("d", "e f")], [0.5, 1.0], DECODER_WITH_START, 9, "decoder")
    assert encoded.input_ids == [ids("<s> a b c"), ids("<s> d e f")]
    assert encode_texts([("a b c d e", "f")], [0], DECODER_WITH_START, 5, "decoder").input_ids == [ids("<s> a b c f")]
    assert encode_texts([("a", "b c d e")], [0], DECODER_WITH_START, 4, "decoder").input_ids == [ids("<s> a b c")]
    assert encode_texts([("a b c", "d e f")], [0], DECODER, 4, "decoder").input_ids == [ids("a b d e")]
    assert encode_texts([("a b c",)], [0], DECODER_WITH_START, 3, "decoder").input_ids == [ids("<s> a b")]


def test_encodings_are_kept_for_equal_rows_and_tokenizers_and_for_no_others():
    rows = [("a b", "c")]
    first = encode_texts(rows, [0], ENCODER, 8, "encoder")
    again = words_tokenizer("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", ENCODER.model_input_names)
    assert encode_texts(list(rows), [0], again, 8, "encoder") is first
    assert encode_texts(rows, [1], ENCODER, 8, "encoder").targets == [1]
    assert encode_texts(rows, [0], ENCODER, 4, "encoder").lengths == [4]
    assert encode_texts(rows, [0], DECODER, 8, "encoder").input_ids == [ids("a b c")]
    assert encode_texts([], [], ENCODER, 8, "encoder").input_ids == []


# Single tasks.


def test_tiny_is_balanced_the_same_everywhere_and_has_three_variants():
    splits = Tiny(name="tiny").splits()
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 240, "validation": 80, "test": 80}
    rows = [row for part in splits.values() for row in part]
    assert sum(row["label"] for row in rows) == 200
    assert len({row["text"] for row in rows}) == 400
    assert all((row["value"] > 2.5) == bool(row["label"]) for row in rows)
    assert Tiny(name="tiny").fingerprint().startswith("3bb2c5fa")
    regression = Tiny(name="tiny", predict="value")
    assert (regression.num_labels, regression.primary_metric) == (1, "spearmanr")
    assert regression.metrics([1.0, 1.0], [1.0, 2.0]) == {"pearson": None, "spearmanr": None}
    assert regression.item_scores([1.0, 4.0], [1.0, 2.0]) == [0.0, -2.0]
    with pytest.raises(UserError, match=r"task\.predict=value"):
        Tiny(name="tiny", predict="value", formulation="text")


def test_a_bag_of_words_learns_tiny():
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    splits = Tiny(name="tiny").splits()
    counts = CountVectorizer().fit([row["text"] for row in splits["train"]])
    features = {split: counts.transform([row["text"] for row in rows]) for split, rows in splits.items()}
    labels = {split: [row["label"] for row in rows] for split, rows in splits.items()}
    classifier = LogisticRegression(max_iter=500).fit(features["train"], labels["train"])
    assert classifier.score(features["test"], labels["test"]) > 0.95


@pytest.mark.parametrize("name", TASKS)
def test_glue_label_words_follow_the_class(name):
    task = Glue(name=name, formulation="text")
    row = dict.fromkeys(task.facts.columns, "text") | {"label": 1}
    prompt, answer = task.prompt_answer(row)
    assert prompt.endswith("Answer:")
    assert "text" in prompt
    assert "{" not in prompt
    assert answer == task.choices(row)[1]
    assert task.evaluation == "choices"
    assert len(task.choices(row)) == (task.num_labels if task.num_labels > 1 else 6)


def test_glue_text_takes_other_words_and_prompts_and_survives_braces():
    task = Glue(name="rte", formulation="text", prompt="{sentence1}|{sentence2} =>", label_words=["ja", "nein"])
    row = {"sentence1": "{x}", "sentence2": "}", "label": 1}
    assert task.prompt_answer(row) == ("{x}|} =>", " nein")


def test_stsb_rounds_its_answer_and_is_measured_against_the_score():
    task = Glue(name="stsb", formulation="text")
    rows = [{"sentence1": "a", "sentence2": "b", "label": label} for label in (0.4, 2.5, 4.6)]
    assert [task.prompt_answer(row)[1] for row in rows] == [" 0", " 3", " 5"]
    assert task.references(rows) == [0.4, 2.5, 4.6]
    assert task.metrics([0, 3, 5], task.references(rows))["spearmanr"] == pytest.approx(1)


def test_glue_official_metrics():
    expected = {
        "cola": "matthews_correlation",
        "stsb": "pearson spearmanr",
        "mrpc": "accuracy f1",
        "qqp": "accuracy f1",
    }
    for name in TASKS:
        task = Glue(name=name)
        values = task.metrics([1, 0, 1, 1], [1, 0, 0, 1])
        assert task.primary_metric in values
        assert set(expected.get(name, "accuracy").split()) <= set(values)


def test_reviews_drop_repeats_and_texts_with_both_labels():
    rows = [{"text": text, "label": label} for text, label in [("a", 1), ("A ", 1), ("b", 0), ("b", 1), ("c", 0)]]
    assert without_duplicates(rows) == [rows[0], rows[4]]


@needs_package
@pytest.mark.parametrize(("source_name", "train"), [("rotten_tomatoes", 6530), ("imdb", 22904)])
def test_movie_reviews_out_of_the_package(source_name, train):
    task = MovieReviews(name="movie-reviews", source=source_name)
    splits = task.splits()
    assert {split: len(rows) for split, rows in splits.items()} == {"train": train, "validation": 1000, "test": 1000}
    keys = [{text_key([row["text"]]) for row in rows} for rows in splits.values()]
    assert len(set.union(*keys)) == train + 2000
    assert {row["label"] for row in splits["test"]} == {0, 1}
    assert "movie_reviews" not in sys.modules
    paper = task.splits("paper")
    assert len(paper["train"]) == train + 1000
    assert paper["validation"] == paper["test"] == splits["test"]


@needs_package
def test_a_changed_package_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr("peftbench.tasks.movie_reviews.package_file", lambda: tmp_path / "reviews.csv")
    (tmp_path / "reviews.csv").write_text("text,label,source\n")
    with pytest.raises(UserError, match=r"reviews.csv: sha256 is .* expected d4acac55"):
        MovieReviews(name="movie-reviews").splits()


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 2 + 2 = 4\n#### 4", "4"),
        ("#### $1,800.50 dollars", "1800.5"),
        ("#### -3", "-3"),
        ("#### 18.00", "18"),
        ("#### 0.0", "0"),
        ("the answer is 4", ""),
        ("#### none 4", ""),
        ("", ""),
    ],
)
def test_gsm8k_reads_the_number_after_the_mark(text, number):
    assert final_number(text) == number
    assert Gsm8k(name="gsm8k").parse(text) == number


def test_numbers_in_one_spelling():
    assert [canonical_number(text) for text in ("70,000", "1e3", ".5", "x", "100")] == [
        "70000",
        "1000",
        "0.5",
        "",
        "100",
    ]
    assert last_number("5 apples cost 2.50 each. So 12.5.") == "12.5"
    assert last_number("7 and #### 8 or 9") == "8"


def test_gsm8k_annotations_can_be_left_out():
    row = {"question": " q ", "answer": "4/2 = <<4/2=2>>2\n#### 2"}
    assert Gsm8k(name="gsm8k").prompt_answer(row) == ("Question: q\nAnswer:", " 4/2 = <<4/2=2>>2\n#### 2")
    assert Gsm8k(name="gsm8k", annotations=False).prompt_answer(row)[1] == " 4/2 = 2\n#### 2"
    assert Gsm8k(name="gsm8k").metrics(["2", ""], ["2", "3"]) == {"exact_match": 0.5}


def test_alpaca_prompts_and_loss():
    task = Alpaca(name="alpaca")
    prompt, answer = task.prompt_answer({"instruction": "Add.", "input": "1 2", "output": "3"})
    assert prompt.endswith("### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n")
    assert answer == "3"
    assert "### Input" not in task.prompt_answer({"instruction": "Hi", "input": "", "output": "3"})[0]
    # 4 nats over 2 tokens and 1 over 8: the mean is over tokens, not over rows
    assert task.metrics([(4.0, 2), (1.0, 8)], [None, None]) == pytest.approx({"loss": 0.5, "perplexity": 1.6487212707})
    assert task.item_scores([(4.0, 2), (1.0, 8)], [None, None]) == [-2.0, -0.125]
    assert task.metrics([(float("nan"), 2)], [None]) == {"loss": None, "perplexity": None}
    assert (task.primary_metric, task.greater_is_better, task.evaluation) == ("loss", False, "loss")
    generated = Alpaca(name="alpaca", evaluate_by="generation")
    assert (generated.primary_metric, generated.greater_is_better) == ("rouge_l", True)
    assert generated.metrics(["a b"], generated.references([{"output": "a b"}])) == {"rouge_l": 1.0}


def test_e2e_groups_references_by_meaning_except_in_train(data):
    columns = {"meaning_representation": ["x", "y", "x"], "human_reference": ["X one", "Y", "X two"]}
    for split in ("train", "validation", "test"):
        write(data / "instruct" / "e2e" / f"{split}.parquet", columns)
    task = E2e(name="e2e")
    splits = task.splits()
    assert len(splits["train"]) == 3
    assert task.references(splits["test"]) == [["X one", "X two"], ["Y"]]
    assert task.parse(" X one \nMeaning: ...") == "X one "
    assert task.prompt_answer(splits["test"][0]) == ("Meaning: x\nText:", " X one")
    assert task.metrics(["X two", "Z"], [["X one", "X two"], ["Y"]])["rouge_l"] == pytest.approx(0.5)


def test_e2e_s_scores_mind_no_case():
    task = E2e(name="e2e")
    references = [["The Mill is near the riverside.", "a pub"], ["Cheap food at the Mill, yes."]]
    spoken = ["THE mill is near The Riverside.", "cheap food at the mill, yes."]
    assert task.metrics(spoken, references)["bleu"] == pytest.approx(100)


@pytest.mark.parametrize("kind", ["decoder", "seq2seq"])
def test_e2e_s_table_is_laid_out_as_lora_s_authors_do(kind):
    """Their example: `name : Blue Spice | Type : pub | food : Chinese | area : city centre | family friendly : no`."""
    meaning = "name[Blue Spice], eatType[pub], food[Chinese], area[city centre], familyFriendly[no]"
    table = "name : Blue Spice | Type : pub | food : Chinese | area : city centre | family friendly : no"
    assert as_table(meaning) == table
    assert as_table("priceRange[£20-25], customer rating[3 out of 5], near[Café Sicilia]") == (
        "price : £20-25 | customer rating : 3 out of 5 | near : Café Sicilia"
    )
    task, words = E2e(name="e2e", layout="table"), builtin.build(kind)
    rows = [{"meaning_representation": meaning, "references": ["A pub."]}]
    whole, prompt = task.encode(rows, words, 192, kind), task.encode_prompts(rows, words, 192, kind)
    end = [words.eos_token_id]
    assert prompt.input_ids == [words(table, add_special_tokens=False)["input_ids"] + end]
    answer = words(" A pub.", add_special_tokens=False)["input_ids"] + end
    if kind == "seq2seq":
        assert (whole.input_ids, whole.labels) == (prompt.input_ids, [answer])
    else:
        assert whole.input_ids == [prompt.input_ids[0] + answer]
        assert whole.labels == [[-100] * len(prompt.input_ids[0]) + answer]


def test_candidates_are_read_from_the_instruction():
    assert candidates("Which?\n\nAnswer format: answer1/answer2/answer3") == ["answer1", "answer2", "answer3"]
    assert candidates("(A) said so. Answer Choices: (A) 1 (B) 2 (C) x (B)") == ["A", "B", "C"]
    with pytest.raises(UserError, match="no candidates"):
        candidates("Which?")


def write_choice(data, name, split, count, word="question"):
    instructions = [f"{word} {split} {n}?\n\nAnswer format: true/false" for n in range(count)]
    columns = {"instruction": instructions, "answer": ["true" if n % 2 else "false" for n in range(count)]}
    write(data / "instruct" / "llm_adapters" / name / f"{split}.parquet", columns)


def test_choice_sets_without_train_split_say_so_and_can_train_on_others(data):
    write_choice(data, "piqa", "test", 6)
    write_choice(data, "boolq", "train", 40)
    write_choice(data, "boolq", "test", 6)
    splits = Choice(name="piqa").splits()
    assert list(splits) == ["test"]
    with pytest.raises(UserError, match=r"task piqa has no train split here, only test; task.train_sets="):
        splits["train"]
    elsewhere = Choice(name="piqa", train_sets=["boolq"])
    assert {split: len(rows) for split, rows in elsewhere.splits().items()} == {"train": 36, "validation": 4, "test": 6}
    assert elsewhere.fingerprint() != Choice(name="piqa").fingerprint()
    row = elsewhere.splits()["test"][1]
    assert elsewhere.choices(row) == ["the correct answer is true", "the correct answer is false"]
    assert elsewhere.references([row]) == [0]


def test_choice_drops_training_rows_that_are_tested(data):
    write_choice(data, "boolq", "test", 10)
    found = pyarrow.parquet.read_table(data / "instruct" / "llm_adapters" / "boolq" / "test.parquet").to_pydict()
    found["instruction"] = [text.replace("question", "Question,") for text in found["instruction"][:1]] + [
        f"new {n}?\n\nAnswer format: true/false" for n in range(9)
    ]
    write(data / "instruct" / "llm_adapters" / "boolq" / "train.parquet", found)
    assert len(Choice(name="boolq").splits("paper")["train"]) == 9


def test_an_answer_that_is_no_candidate_is_named(data):
    columns = {"instruction": ["q?\n\nAnswer format: true/false"], "answer": ["maybe"]}
    write(data / "instruct" / "llm_adapters" / "piqa" / "test.parquet", columns)
    with pytest.raises(UserError, match="answer 'maybe'; expected one of true/false"):
        Choice(name="piqa").splits()


def test_arithmetic_compares_numbers_with_a_tolerance_and_can_train_on_gsm8k(data):
    folder = data / "instruct" / "llm_adapters" / "svamp" / "test.parquet"
    write(folder, {"instruction": ["How many?", "How much?"], "answer": ["8.0", "1.8333333333333335"]})
    task = Arithmetic(name="svamp")
    references = task.references(task.splits()["test"])
    assert task.metrics([task.parse("so it is 8"), task.parse("1.8333")], references) == {"exact_match": 1.0}
    assert task.item_scores(["", "1.84"], references) == [0.0, 0.0]
    with pytest.raises(UserError, match=r"task svamp has no train split here.*train_on=gsm8k"):
        task.splits()["train"]
    gsm8k = {"question": [f"q {n}" for n in range(30)], "answer": [f"#### {n}" for n in range(30)]}
    for split in ("train", "test"):
        write(data / "instruct" / "gsm8k" / f"{split}.parquet", gsm8k)
    splits = Arithmetic(name="svamp", train_on="gsm8k").splits()
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 27, "validation": 3, "test": 2}


# Real data.

OFFICIAL = {
    "cola": (8551, 1043),
    "sst2": (67349, 872),
    "mrpc": (3668, 408),
    "stsb": (5749, 1500),
    "rte": (2490, 277),
    "wnli": (635, 71),
    "qnli": (None, 5463),
    "mnli": (None, 9815),
    "qqp": (None, None),
}


@needs_data
@pytest.mark.parametrize("name", OFFICIAL)
def test_glue_data_is_whole_and_measured(name):
    task = Glue(name=name)
    splits = task.splits()
    train, test = OFFICIAL[name]
    assert task.subset() is (train is None)
    if train:
        assert len(splits["train"]) + len(splits["validation"]) == train
        assert len(splits["validation"]) == min(1000, round(train / 10))
    if test:
        assert len(splits["test"]) == test
    references = task.references(splits["test"])
    assert all(value == pytest.approx(1) for value in task.metrics(references, references).values())
    assert task.item_scores(references, references) == [task.item_scores([0], [0])[0]] * len(references)


@needs_data
@pytest.mark.parametrize(
    "path",
    [path for path in YAMLS if "instruct" in path.read_text() or "choice" in path.read_text()],
    ids=lambda path: path.stem,
)
def test_instruct_data_has_references_that_match_themselves(path):
    task = build(yaml.safe_load(path.read_text()))
    rows = task.splits()["test"][:50]
    references = task.references(rows)
    assert task.subset() is False
    for row, reference in zip(rows, references, strict=True):
        prompt, answer = task.prompt_answer(row)
        assert prompt
        if task.evaluation == "choices":
            assert task.choices(row)[reference] == answer
        elif task.primary_metric == "exact_match":
            assert task.parse(answer) == reference != ""


@needs_data
def test_e2e_data_shares_no_meaning_between_splits():
    splits = E2e(name="e2e").splits()
    meanings = [{row["meaning_representation"] for row in rows} for rows in splits.values()]
    assert [len(rows) for rows in splits.values()] == [42061, 547, 630]
    assert not (meanings[0] & meanings[1])
    assert not (meanings[0] & meanings[2])
    assert not (meanings[1] & meanings[2])
