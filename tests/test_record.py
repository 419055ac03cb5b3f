"""Ids change with what changes the result, and with nothing else."""

import json
import math

import pytest

from peftbench.record import RunRecord, RunSpec, canonical, digest, plain, profile_id
from tests.conftest import make_record, make_spec


def test_run_id_reads_as_names_seed_and_hash():
    spec = make_spec(**{"model.name": "org/Model 1", "task.name": "movie-reviews/imdb", "seed": 3})
    assert spec.run_id == f"lora-movie-reviews-imdb-org-Model-1-s3-{digest(spec.content)}"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.weights", "pretrained"),
        ("method.rank", 4),
        ("task.max_length", 32),
        ("train.learning_rate", 2e-3),
        ("train.batch_size", 16),
        ("train.epochs", 2.0),
        ("train.steps", 10),
        ("train.label_smoothing", 0.1),
        ("train.base_dropout", 0.0),
        ("task.beams", 10),
        ("task.no_repeat_ngram", 4),
        ("task.layout", "table"),
        ("seed", 1),
        ("protocol", "paper"),
        ("identity.weights", "other"),
        ("identity.data", "other"),
        ("identity.engine", 2),
        ("identity.method", 2),
        ("identity.device_kind", "NVIDIA H100 80GB HBM3"),
    ],
)
def test_what_changes_the_result_changes_the_id(spec, key, value):
    assert make_spec(**{key: value}).run_id != spec.run_id


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("profile.steps", 5),
        ("profile.enabled", False),
        ("device", "cuda"),
        ("train.eval_batch_size", 1),
        ("train.label_smoothing", 0.0),
        ("train.base_dropout", None),
        ("task.beams", 1),
        ("task.length_penalty", 1.0),
        ("task.no_repeat_ngram", 0),
        ("task.no_repeat_within", "text"),
        ("task.layout", "lines"),
    ],
)
def test_what_changes_no_result_keeps_the_id(spec, key, value):
    assert make_spec(**{key: value}).run_id == spec.run_id


def test_epochs_say_nothing_when_steps_are_given():
    ids = {make_spec(**{"train.steps": 10, "train.epochs": e}).run_id for e in (1.0, 3.0)}
    assert len(ids) == 1


def test_a_spec_survives_json():
    spec = make_spec()
    again = RunSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert again == spec
    assert again.run_id == spec.run_id


def test_key_order_and_tuples_do_not_matter():
    assert canonical({"a": (1, 2), "b": 1.0}) == canonical({"b": 1.0, "a": [1, 2]})


def test_profiles_are_shared_by_runs_of_equal_cost(spec):
    free = {"alpha"}
    same = (
        {"seed": 5},
        {"method.alpha": 1.0},
        {"train.learning_rate": 1.0},
        {"task.name": "other"},
        {"train.steps": 7},
    )
    for change in same:
        assert profile_id(make_spec(**change), free) == profile_id(spec, free)
    dear = ({"train.label_smoothing": 0.1}, {"train.base_dropout": 0.0})
    assert len({profile_id(make_spec(**change), free) for change in ({}, *dear)}) == 3
    assert profile_id(make_spec(**{"train.label_smoothing": 0.2}), free) == profile_id(make_spec(**dear[0]), free)
    other = ({"method.rank": 4}, {"train.batch_size": 8}, {"train.precision": "bf16"}, {"identity.device_kind": "x"})
    for change in other:
        assert profile_id(make_spec(**change), free) != profile_id(spec, free)
    regression = make_spec(**{"identity.task": {"num_labels": 1, "formulation": "head"}})
    assert profile_id(regression, free) != profile_id(spec, free)


def test_non_finite_numbers_become_null(spec):
    record = make_record(spec, trace={"loss": [1.0, math.nan, math.inf]})
    assert record.to_dict()["trace"] == {"loss": [1.0, None, None]}
    assert RunRecord.from_dict(record.to_dict()).run_id == spec.run_id


def test_plain_takes_array_scalars_and_refuses_objects():
    numpy = pytest.importorskip("numpy")
    assert plain({"a": numpy.float32(0.5), "b": numpy.arange(2), "c": {3}}) == {"a": 0.5, "b": [0, 1], "c": [3]}
    with pytest.raises(TypeError, match="object"):
        plain(object())
