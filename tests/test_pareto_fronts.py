"""Fronts in any number of dimensions: by hand, against every pair compared, and against the two-dimensional front."""

import numpy as np
import pytest

from peftbench.analysis import extras
from peftbench.analysis.fronts import hypervolume, hypervolume_losses, members, membership
from peftbench.analysis.pareto import front
from peftbench.errors import UserError


def beaten(points, maximise):
    """Return by comparing all pairs which points another one beats."""
    signed = np.asarray(points) * np.where(maximise, 1, -1)
    return [any((q >= p).all() and (q > p).any() for q in signed) for p in signed]


@pytest.mark.parametrize("maximise", [(True, False), (False, False, True), (True, False, False, True), (True,)])
def test_members_are_those_that_nobody_beats(maximise):
    generator = np.random.default_rng(len(maximise))
    for _ in range(40):
        points = generator.integers(0, 4, (12, len(maximise))).astype(float)  # coarse: ties and equal points
        assert members(points, maximise).tolist() == [not b for b in beaten(points, maximise)]


def test_members_by_hand():
    # Accuracy, parameters, seconds: the second is beaten by the first, the fourth equals the third.
    points = [[0.8, 100, 2.0], [0.8, 200, 2.0], [0.7, 50, 3.0], [0.7, 50, 3.0], [0.6, 90, 1.0]]
    assert members(points, (True, False, False)).tolist() == [True, False, True, True, True]


def test_two_dimensions_agree_with_the_front_of_figures():
    generator = np.random.default_rng(3)
    for greater in (True, False):
        quality, cost = generator.integers(0, 5, (2, 15)).astype(float)
        drawn = front(quality.tolist(), cost.tolist(), greater).members
        assert sorted(drawn) == np.flatnonzero(members(np.column_stack([quality, cost]), (greater, False))).tolist()


def test_membership_counts_draws():
    # Costs 1, 2, 3. The cheapest is always a member, the second where it beats it, the third where it beats both.
    quality = [[0.5, 0.6, 0.7], [0.5, 0.4, 0.6], [0.5, 0.6, 0.6], [0.5, 0.4, 0.3]]
    assert membership(quality, [[1.0], [2.0], [3.0]]).tolist() == [1.0, 0.5, 0.5]
    assert membership(-np.array(quality), [[1.0], [2.0], [3.0]], greater_is_better=False).tolist() == [1.0, 0.5, 0.5]


def test_membership_against_several_costs():
    # The second costs more memory and less time: never beaten.
    quality = [[0.9, 0.1], [0.8, 0.2]]
    assert membership(quality, [[1.0, 5.0], [2.0, 4.0]]).tolist() == [1.0, 1.0]
    assert membership(quality, [[1.0], [2.0]]).tolist() == [1.0, 0.0]


def test_hypervolume_by_hand():
    # Quality up, cost down, seen from (0, 4): (3, 1) beats the two others.
    assert hypervolume([[1.0, 3.0], [2.0, 2.0], [3.0, 1.0]], (0, 4), (True, False)) == pytest.approx(3 * 3)
    # A staircase with columns of 3, 2 and 1 unit squares, each point's last one its own.
    staircase = [[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]
    assert hypervolume(staircase, (0, 4), (True, False)) == pytest.approx(3 + 2 + 1)
    assert hypervolume_losses(staircase, (0, 4), (True, False)) == pytest.approx([1, 1, 1])
    assert hypervolume([[1.0, 1.0, 1.0]], (0, 4, 3), (True, False, False)) == pytest.approx(1 * 3 * 2)


def test_points_off_the_front_or_beyond_the_reference_add_nothing():
    points = [[2.0, 1.0], [1.0, 2.0], [0.5, 0.5], [9.0, 9.0]]
    alone = hypervolume([points[0], points[2]], (0, 4), (True, False))
    assert hypervolume(points, (0, 4), (True, False)) == pytest.approx(alone)
    losses = hypervolume_losses(points, (0, 4), (True, False))
    assert losses[[1, 3]].tolist() == [0.0, 0.0]
    # Without the first, the second would be on the front: (1 × 2) of it was hidden.
    assert losses[0] == pytest.approx(alone - (0.5 * 3.5 + 0.5 * 2))


def test_what_is_refused():
    with pytest.raises(ValueError, match="for 2 directions"):
        members([[1.0, 2.0, 3.0]], (True, False))
    with pytest.raises(ValueError, match="none missing"):
        hypervolume([[1.0, np.nan]], (0, 4), (True, False))


def test_without_moocore_the_extra_is_named(monkeypatch):
    def gone(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(extras.importlib, "import_module", gone)
    with pytest.raises(UserError, match=r"moocore.*peftbench\[stats\]"):
        members([[1.0, 2.0]], (True, False))
