"""Tests of significance: exact on small samples, and against the normal interval."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from elmd.evaluation.significance import (
    bootstrap_interval,
    holm,
    over_seeds,
    paired_bootstrap,
    paired_permutation,
)
from elmd.metrics import text


def test_permutation_is_exact_on_small_samples() -> None:
    a, b = np.array([3.0, 5.0, 4.0, 6.0]), np.array([1.0, 2.0, 3.5, 6.5])
    difference = a - b
    sums = [abs(np.dot(signs, difference)) for signs in itertools.product((1, -1), repeat=4)]
    expected = sum(value >= abs(difference.sum()) - 1e-9 for value in sums) / 16
    test = paired_permutation(a, b)
    assert test.p == expected == 6 / 16  # 2 + 3 ± 0.5 ± 0.5 reaches 5 in three ways, and so does its mirror image
    assert test.difference == pytest.approx(1.25)
    assert paired_permutation(np.ones(3) * 5, np.ones(3)).p == 2 / 8  # all signs equal, either way


def test_permutation_of_equal_and_of_different_systems() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(size=300)
    assert paired_permutation(a, a, permutations=500).p == 1
    better = paired_permutation(a + 0.5 + 0.1 * rng.normal(size=300), a, permutations=999)
    assert better.p == 1 / 1000
    assert better.p == paired_permutation(a, a - 0.5, permutations=999).p
    # under the null, p is uniform: about a tenth of tests fall below 0.1
    ps = [paired_permutation(*rng.normal(size=(2, 40)), seed=i, permutations=200).p for i in range(200)]
    assert 0.04 < np.mean(np.array(ps) < 0.1) < 0.17


def test_paired_bootstrap_of_bleu(pairs: tuple[list[str], list[str]]) -> None:
    hypotheses, references = pairs
    a = text.strict(hypotheses, references)["bleu4_zh"]
    same = paired_bootstrap(a.statistics, a.statistics, a.reduce)
    assert (same.difference, same.p) == (0, 1)
    worse = text.strict(["啊" + h[::-1] for h in hypotheses], references)["bleu4_zh"]
    test = paired_bootstrap(a.statistics, worse.statistics, a.reduce, resamples=400)
    assert test.difference == pytest.approx(a.score - worse.score)
    assert test.p == 1 / 401
    assert test.low is not None
    assert test.high is not None
    assert 0 < test.low < test.difference < test.high
    assert test == paired_bootstrap(a.statistics, worse.statistics, a.reduce, resamples=400)  # seeded


def test_bootstrap_interval_of_a_mean_is_the_normal_one() -> None:
    values = np.random.default_rng(0).normal(10, 2, size=400)
    statistics = np.stack([values, np.ones(400)], axis=1)
    low, high = bootstrap_interval(statistics, lambda sums: sums[:, 0] / sums[:, 1], resamples=4000)
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.03)


def test_tests_refuse_unpaired_and_empty_input() -> None:
    with pytest.raises(ValueError, match="same pairs"):
        paired_permutation(np.ones(3), np.ones(4))
    with pytest.raises(ValueError, match="no pairs"):
        paired_bootstrap(np.ones((0, 2)), np.ones((0, 2)), lambda sums: sums[:, 0])


def test_holm_by_hand() -> None:
    adjusted = holm({"a": 0.04, "b": 0.01, "c": 0.03, "d": 0.9})
    # sorted: 0.01 × 4, 0.03 × 3, 0.04 × 2 lifted to 0.09, 0.9 × 1
    assert adjusted == pytest.approx({"a": 0.09, "b": 0.04, "c": 0.09, "d": 0.9})
    assert list(adjusted) == ["a", "b", "c", "d"]
    assert holm({"a": 0.7, "b": 0.6}) == {"a": 1.0, "b": 1.0}


def test_over_seeds() -> None:
    spread = over_seeds([1.0, 2.0, 3.0])
    assert (spread.mean, spread.sd, spread.n) == (2.0, 1.0, 3)
    assert spread.high == pytest.approx(2 + 4.302653 / math.sqrt(3), abs=1e-5)  # t(0.975, 2)
    assert spread.low == pytest.approx(4 - (spread.high or 0))
    assert over_seeds([5.0]).sd is None
    with pytest.raises(ValueError, match="no seeds"):
        over_seeds([])
