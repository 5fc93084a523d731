"""How sure a difference is: bootstrap intervals, paired tests, Holm's correction, spread over seeds.

A metric on n pairs is `statistics` [n, S] and `reduce` (totals [R, S] -> scores [R]), as `elmd.metrics.text.Metric`
keeps them, so a resampled corpus is one row of counts times the statistics. Everything is seeded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Reduce = Callable[[np.ndarray], np.ndarray]
CHUNK = 256  # resamples or permutations at a time: bounds memory to CHUNK × n


@dataclass(frozen=True, slots=True)
class PairedTest:
    """A paired comparison: `difference` = a − b, its interval where it has one, and the two-sided p-value."""

    difference: float
    p: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Spread:
    """A mean over seeds with sample standard deviation and t interval; those are None for one seed."""

    mean: float
    sd: float | None
    low: float | None
    high: float | None
    n: int


def bootstrap_interval(
    statistics: np.ndarray, reduce: Reduce, *, seed: int = 0, resamples: int = 1000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of a score over resampled pairs; a mean of values and corpus BLEU alike.

    Raises:
        ValueError: no pairs.
    """
    weights = _resampled(len(statistics), seed, resamples)
    scores = np.concatenate([reduce(chunk @ statistics) for chunk in weights])
    return _percentiles(scores, level)


def paired_bootstrap(
    a: np.ndarray, b: np.ndarray, reduce: Reduce, *, seed: int = 0, resamples: int = 1000, level: float = 0.95
) -> PairedTest:
    """Whether system a differs from b in a corpus score (Koehn 2004; both resampled with the same pairs).

    The p-value is two-sided, as sacrebleu computes it: how often the resampled difference lies as far from its mean
    as the observed difference lies from 0, plus one over plus one.

    Args:
        a, b: statistics [n, S] of the two systems on the same pairs.

    Raises:
        ValueError: no pairs, or unequal shapes.
    """
    _check_paired(a, b)
    observed = float(reduce(a.sum(axis=0, keepdims=True))[0] - reduce(b.sum(axis=0, keepdims=True))[0])
    weights = _resampled(len(a), seed, resamples)
    differences = np.concatenate([reduce(chunk @ a) - reduce(chunk @ b) for chunk in weights])
    extreme = np.abs(differences - differences.mean()) >= abs(observed) - 1e-12
    return PairedTest(observed, float((extreme.sum() + 1) / (resamples + 1)), *_percentiles(differences, level))


def paired_permutation(a: np.ndarray, b: np.ndarray, *, seed: int = 0, permutations: int = 10_000) -> PairedTest:
    """Whether two means over the same pairs differ: each pair's scores change places or not.

    All 2^n ways are counted where there are no more than `permutations` of them (an exact p-value); else that many
    are drawn, plus one over plus one. Two-sided.

    Args:
        a, b: [n] values of the two systems on the same pairs.

    Raises:
        ValueError: no pairs, or unequal shapes.
    """
    _check_paired(a, b)
    difference = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    n, observed = len(difference), float(difference.mean())
    limit = abs(observed) - 1e-12 * max(1.0, abs(observed))  # sums in another order differ in their last digits
    exact = n < 63 and 2**n <= permutations
    rng = np.random.default_rng(seed)
    extreme = 0
    total = 2**n if exact else permutations
    for at in range(0, total, CHUNK):
        size = min(CHUNK, total - at)
        flips = (np.arange(at, at + size)[:, None] >> np.arange(n)) & 1 if exact else rng.integers(0, 2, (size, n))
        extreme += int((np.abs((1 - 2 * flips) @ difference / n) >= limit).sum())
    return PairedTest(observed, extreme / total if exact else (extreme + 1) / (total + 1))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's (1979) adjusted p-values of a family of tests, in the order given."""
    adjusted: dict[str, float] = {}
    highest = 0.0
    for i, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        highest = max(highest, min(1.0, (len(p_values) - i) * p_values[name]))
        adjusted[name] = highest
    return {name: adjusted[name] for name in p_values}


def welch(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Whether two means over training seeds differ: the two-sided p-value of Welch's t test.

    None where it cannot be asked: a side with fewer than two seeds, or no spread on either. With three seeds a side it
    has little power: the means must lie more than about 2.3 standard deviations apart for p < 0.05. It is unpaired:
    the same seed does not mean the same luck in another system.
    """
    if min(len(a), len(b)) < 2 or (np.ptp(a) == 0 and np.ptp(b) == 0):
        return None
    from scipy.stats import ttest_ind_from_stats

    sides = (float(x) for side in (a, b) for x in (np.mean(side), np.std(side, ddof=1), len(side)))
    return float(ttest_ind_from_stats(*sides, equal_var=False).pvalue)


def over_seeds(values: Sequence[float], level: float = 0.95) -> Spread:
    """Mean, standard deviation (n − 1) and Student's t interval of one score over seeds.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("no seeds to average")
    mean, n = float(np.mean(values)), len(values)
    if n == 1:
        return Spread(mean, None, None, None, 1)
    from scipy.stats import t

    sd = float(np.std(values, ddof=1))
    half = float(t.ppf((1 + level) / 2, n - 1)) * sd / n**0.5
    return Spread(mean, sd, mean - half, mean + half, n)


def _resampled(n: int, seed: int, resamples: int) -> Iterator[np.ndarray]:
    """Chunks [r, n] of how often each pair is drawn."""
    if n == 0:
        raise ValueError("no pairs to resample")
    rng = np.random.default_rng(seed)
    for at in range(0, resamples, CHUNK):
        size = min(CHUNK, resamples - at)
        drawn = rng.integers(0, n, (size, n)) + n * np.arange(size)[:, None]  # each row counts in its own n bins
        yield np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n).astype(np.float64)


def _percentiles(scores: np.ndarray, level: float) -> tuple[float, float]:
    low, high = np.percentile(scores, [50 * (1 - level), 50 * (1 + level)])
    return float(low), float(high)


def _check_paired(a: np.ndarray, b: np.ndarray) -> None:
    if np.shape(a) != np.shape(b):
        raise ValueError(f"paired tests need the same pairs, not shapes {np.shape(a)} and {np.shape(b)}")
    if len(a) == 0:
        raise ValueError("no pairs to test")
