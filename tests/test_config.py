"""Strict building: unknown keys, wrong types, missing values and values out of range name the key."""

from dataclasses import dataclass, field
from typing import Literal

import pytest

from peftbench.config import ModelConfig, ProfileConfig, SweepConfig, TrainConfig, as_dict, build
from peftbench.errors import UserError, nearest


@dataclass(frozen=True)
class Sample:
    size: int
    rate: float = 0.5
    names: tuple[str, ...] | str = ("a",)
    mode: Literal["x", "y"] = "x"
    flag: bool = False
    inner: ProfileConfig = field(default_factory=ProfileConfig)

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ValueError("size below 0")


def test_values_are_converted_only_where_nothing_is_lost():
    sample = build(Sample, {"size": 2, "rate": 1, "names": ["q", "v"], "inner": {"steps": 3}}, "sample")
    assert sample == Sample(2, 1.0, ("q", "v"), inner=ProfileConfig(steps=3))
    assert isinstance(sample.rate, float)
    assert as_dict(sample)["size"] == 2
    assert build(Sample, {"size": 1, "names": "all"}, "sample").names == "all"


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"size": 1, "rat": 1}, "sample.rat: no such key; did you mean 'rate'"),
        ({}, "sample.size: a value is missing; expected a whole number"),
        ({"size": "???"}, "sample.size: a value is missing"),
        ({"size": "eight"}, "sample.size=eight: expected a whole number"),
        ({"size": 1.5}, "sample.size=1.5: expected a whole number"),
        ({"size": True}, "sample.size=True: expected a whole number"),
        ({"size": 1, "rate": "fast"}, "sample.rate=fast: expected a number"),
        ({"size": 1, "names": 3}, "sample.names=3: expected a list of a text or a text"),
        ({"size": 1, "mode": "z"}, "sample.mode=z: expected one of x, y"),
        ({"size": 1, "flag": 1}, "sample.flag=1: expected true or false"),
        ({"size": 1, "inner": {"step": 3}}, "sample.inner.step: no such key; did you mean 'steps'"),
        ({"size": -1}, "sample: size below 0"),
    ],
)
def test_mistakes_name_the_key(mapping, message):
    with pytest.raises(UserError) as caught:
        build(Sample, mapping, "sample")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("steps", 0),
        ("epochs", 0),
        ("batch_size", 0),
        ("learning_rate", 0),
        ("learning_rate", -1e-3),
        ("schedule", "cosin"),
        ("warmup", 1.5),
        ("clip_norm", -1),
        ("beta1", 1.0),
        ("max_length", 1),
        ("precision", "fp16"),
        ("dropout", 1.0),
        ("accumulation", 3),
        ("evaluate_every", 0),
    ],
)
def test_recipes_out_of_range_are_refused(key, value):
    with pytest.raises(UserError, match=f"train.{key}"):
        build(TrainConfig, {key: value}, "train")


def test_not_a_number_is_out_of_range():
    with pytest.raises(UserError, match="train.learning_rate=nan"):
        build(TrainConfig, {"learning_rate": float("nan")}, "train")


def test_models_are_checked():
    with pytest.raises(UserError, match="model.pooling=max"):
        build(ModelConfig, {"name": "m", "pooling": "max"}, "model")
    with pytest.raises(UserError, match="model.weights=random"):
        build(ModelConfig, {"name": "m", "weights": "random"}, "model")
    with pytest.raises(UserError, match="model.name: a value is missing"):
        build(ModelConfig, {}, "model")


@pytest.mark.parametrize(
    "mapping",
    [{"pack": 0}, {"pack": "many"}, {"device": "tpu"}, {"sweep": {"name": "a/b"}}, {"seed": -1}, {"results": 3}],
)
def test_sweep_keys_are_checked(mapping):
    with pytest.raises(UserError, match=next(iter(mapping))):
        build(SweepConfig, mapping, "")


def test_energy_is_measured_over_ten_seconds_or_not_at_all():
    with pytest.raises(UserError, match=r"profile.energy_seconds=5.0: expected at least 10, or 0"):
        build(ProfileConfig, {"energy_seconds": 5}, "profile")
    assert [build(ProfileConfig, {"energy_seconds": x}, "profile").energy_seconds for x in (0, 10)] == [0, 10]


def test_nearest_names_only_what_is_near():
    assert nearest("lorra", ["lora", "full"]) == "; did you mean 'lora'?"
    assert nearest("zzz", ["lora"]) == ""
