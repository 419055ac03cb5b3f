"""Tiers: letters say exactly which methods were told apart, whatever the pattern."""

import itertools

import numpy as np
import pytest
import scikit_posthocs

from peftbench.analysis.paired import nemenyi
from peftbench.analysis.tiers import letter, letters, matrix, tiers
from tests.test_statistics_paired import DEMSAR


def apart(count, *pairs):
    return matrix(count, pairs, [True] * len(pairs))


def test_nobody_apart_everybody_apart():
    assert letters(apart(3)) == ["a", "a", "a"]
    assert letters(apart(3, (0, 1), (0, 2), (1, 2))) == ["a", "b", "c"]
    assert letters(np.zeros((1, 1))) == ["a"]
    assert letters(np.zeros((0, 0))) == []


def test_not_told_apart_is_not_transitive():
    # 0 and 2 differ, 1 differs from neither: it is in both tiers.
    assert letters(apart(3, (0, 2))) == ["a", "ab", "b"]


def test_by_hand():
    # Overlapping neighbours: 0-1, 1-2-3 and 3-4 cannot be told apart.
    found = apart(5, (0, 2), (0, 3), (0, 4), (1, 4), (2, 4))
    assert tiers(found) == [(0, 1), (1, 2, 3), (3, 4)]
    assert letters(found) == ["a", "ab", "b", "bc", "c"]


def test_a_noisy_method_is_in_every_tier():
    # 2 varies so much that it differs from nobody.
    assert letters(apart(4, (0, 1), (0, 3), (1, 3))) == ["a", "b", "abc", "c"]


def test_demsars_figure():
    # Demšar 2006, figure 1a, α = 0.10: C4.5 is worse than C4.5+m and than C4.5+m+cf; C4.5+cf belongs to neither group
    # alone. In order of mean rank: m+cf, m, cf, plain.
    p = nemenyi(DEMSAR)[np.ix_((3, 1, 2, 0), (3, 1, 2, 0))]
    assert letters(p < 0.10) == ["a", "a", "ab", "b"]
    assert letters(p < 0.05) == ["a"] * 4


@pytest.mark.parametrize("count", [4, 7, 12])
def test_sharing_a_letter_is_not_being_told_apart(count):
    generator = np.random.default_rng(count)
    for share in (0.1, 0.4, 0.8):
        for _ in range(30):
            upper = np.triu(generator.random((count, count)) < share, 1)
            differ = upper | upper.T
            groups = [set(g) for g in tiers(differ)]
            assert set().union(*groups) == set(range(count))
            for i, j in itertools.combinations(range(count), 2):
                assert any({i, j} <= g for g in groups) != differ[i, j]
            # None could be left out, none lies within another.
            assert not any(a < b for a in groups for b in groups)
            for g in groups:
                others = [o for o in groups if o is not g]
                assert not all(any({i, j} <= o for o in others) for i in g for j in g)


def test_dozens_of_methods_with_overlapping_intervals():
    generator = np.random.default_rng(1)
    centres = np.sort(generator.normal(0, 1, 40))[::-1]
    widths = generator.uniform(0.1, 0.4, 40)
    differ = np.abs(centres[:, None] - centres) > widths[:, None] + widths
    found = letters(differ)
    assert found[0].startswith("a")
    assert all(bool(set(found[i]) & set(found[j])) != differ[i, j] for i in range(40) for j in range(i))


def test_the_same_display_as_scikit_posthocs():
    generator = np.random.default_rng(5)
    for _ in range(20):
        centres, widths = np.sort(generator.normal(0, 1, 12))[::-1], generator.lognormal(-1.5, 0.8, 12)
        differ = np.abs(centres[:, None] - centres) > widths[:, None] + widths
        known = scikit_posthocs.compact_letter_display(np.where(differ, 0.0, 1.0))
        columns = [{i for i, text in enumerate(known) if text[k] != " "} for k in range(len(known.iloc[0]))]
        assert sorted(tiers(differ)) == sorted(tuple(sorted(column)) for column in columns)


def test_letters_run_on():
    assert [letter(k) for k in (0, 25, 26)] == ["a", "z", "(27)"]
