"""What resolving a point settles and refuses beyond the settings themselves."""

import pytest

from peftbench.errors import UserError
from peftbench.resolve import demand, plan


def test_texts_are_no_longer_than_the_models_positions() -> None:
    grid = {"model": ["tiny-bert"], "method": ["lora"], "task": ["tiny"], "task.max_length": [200], "seed": [0]}
    (spec,) = plan(demand(grid, None), "cpu").specs
    assert spec.task["max_length"] == 200
    assert spec.train["max_length"] == 130
    (spec,) = plan(demand({**grid, "train.max_length": [64]}, None), "cpu").specs
    assert spec.train["max_length"] == 64
    with pytest.raises(UserError, match=r"train.max_length=131: tiny-bert has 130 positions; expected at most that"):
        plan(demand({**grid, "train.max_length": [131]}, None), "cpu")
