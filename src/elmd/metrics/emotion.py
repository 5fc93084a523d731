"""Accuracy, F1 and confusion of predicted emotions. Scores are fractions in [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from elmd.labels import EMOTIONS, INDEX, Emotion


def confusion_matrix(gold: Sequence[Emotion], predicted: Sequence[Emotion | None]) -> np.ndarray:
    """Counts [C, C + 1]: rows are gold emotions, columns predicted ones in the order of `EMOTIONS`, then missing."""
    matrix = np.zeros((len(EMOTIONS), len(EMOTIONS) + 1), dtype=np.int64)
    for truth, guess in zip(gold, predicted, strict=True):
        matrix[INDEX[truth], len(EMOTIONS) if guess is None else INDEX[guess]] += 1
    return matrix


def emotion_scores(gold: Sequence[Emotion], predicted: Sequence[Emotion | None]) -> dict[str, Any]:
    """Accuracy, weighted and macro F1 with the confusion matrix, JSON-ready.

    A missing prediction (None) counts as wrong and is counted in `missing`. Weighted F1 weighs by gold counts;
    macro F1 averages the emotions that occur in gold or prediction (both as scikit-learn does by default).
    `majority` is the accuracy of always naming the most frequent gold emotion: the floor to beat.

    Raises:
        ValueError: nothing to score.
    """
    if not gold:
        raise ValueError("no gold emotion to score against")
    matrix = confusion_matrix(gold, predicted)
    square = matrix[:, :-1]
    support, named, right = matrix.sum(axis=1), square.sum(axis=0), np.diag(square)
    f1 = 2 * right / np.maximum(support + named, 1)  # 2TP / (2TP + FP + FN)
    return {
        "accuracy": float(right.sum() / support.sum()),
        "weighted_f1": float((f1 * support).sum() / support.sum()),
        "macro_f1": float(f1[support + named > 0].mean()),
        "majority": float(support.max() / support.sum()),
        "n": int(support.sum()),
        "missing": int(matrix[:, -1].sum()),
        "f1": {emotion.value: float(value) for emotion, value in zip(EMOTIONS, f1, strict=True)},
        "confusion": {
            "rows": [emotion.value for emotion in EMOTIONS],
            "columns": [emotion.value for emotion in EMOTIONS] + ["missing"],
            "counts": matrix.tolist(),
        },
    }
