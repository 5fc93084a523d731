"""Paired tests of systems on the same samples, and emotions as metrics that can be tested like any other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from elmd.evaluation.significance import holm, paired_bootstrap, paired_permutation
from elmd.labels import EMOTIONS, INDEX, Emotion
from elmd.metrics.text import Metric

#: Of paired tests: with fewer, the smallest possible p-value times a table's tests would not come below `LEVEL`.
RESAMPLES = 10_000


def compare_metrics(
    ours: Mapping[str, Metric], others: Mapping[str, Mapping[str, Metric]], *, seed: int = 0
) -> dict[str, dict[str, dict[str, float]]]:
    """Paired tests of one system's metrics against others' on the same samples in the same order.

    Corpus scores by paired bootstrap, means over samples by paired permutation; Holm's correction runs over the whole
    family (all systems × all metrics). A metric that a system lacks is left out of the family.

    Args:
        ours, others: metrics of one protocol, the seeds of a sample taken together (`elmd.evaluation.score.pool`).

    Returns:
        system -> metric -> `difference` (ours − theirs), `p`, `p_holm`.
    """
    result: dict[str, dict[str, dict[str, float]]] = {}
    for name, theirs in others.items():
        result[name] = {}
        for metric, a in ours.items():
            if (b := theirs.get(metric)) is None:
                continue
            test = (
                paired_permutation(a.values, b.values, seed=seed)
                if a.mean
                else paired_bootstrap(a.statistics, b.statistics, a.reduce, seed=seed, resamples=RESAMPLES)
            )
            result[name][metric] = {"difference": test.difference, "p": test.p}
    family = {f"{name}\n{metric}": row["p"] for name, rows in result.items() for metric, row in rows.items()}
    for key, p in holm(family).items():
        name, _, metric = key.rpartition("\n")
        result[name][metric]["p_holm"] = p
    return result


def mean_metric(values: np.ndarray) -> Metric:
    """The mean of values [n], one per sample, as a metric that can be resampled and tested."""
    return Metric(np.stack([values, np.ones_like(values)], axis=1), lambda sums: sums[:, 0] / sums[:, 1], mean=True)


def emotion_metrics(gold: Sequence[Emotion | None], predicted: Sequence[Emotion | None]) -> dict[str, Metric]:
    """Accuracy and weighted F1 of emotions as metrics that can be resampled; fractions, not × 100.

    Samples without a gold emotion are left out, so all systems must be given the same ones. A missing prediction is
    wrong. Empty where no sample has a gold emotion, or none was ever predicted: such a system was not asked to.
    """
    pairs = [(g, p) for g, p in zip(gold, predicted, strict=True) if g is not None]
    if not pairs or all(p is None for _, p in pairs):
        return {}
    right = np.array([g == p for g, p in pairs], dtype=np.float64)
    marks = np.zeros((len(pairs), 3, len(EMOTIONS)))  # gold, named, and both, by emotion
    for row, (g, p) in zip(marks, pairs, strict=True):
        row[0, INDEX[g]] = 1
        if p is not None:
            row[1, INDEX[p]] = 1
            row[2, INDEX[g]] = g == p
    return {
        "accuracy": mean_metric(right),
        "weighted_f1": Metric(marks.reshape(len(pairs), -1), _weighted_f1, mean=False),
    }


def _weighted_f1(sums: np.ndarray) -> np.ndarray:
    """2TP / (2TP + FP + FN) of each emotion, weighed by gold counts, from totals [R, 3 · C]."""
    support, named, right = sums.reshape(len(sums), 3, -1).transpose(1, 0, 2)
    f1 = 2 * right / np.maximum(support + named, 1)
    return (f1 * support).sum(axis=1) / support.sum(axis=1)
