"""Emotion scores against scikit-learn and by hand."""

from __future__ import annotations

import random

import pytest

from elmd.labels import EMOTIONS, Emotion
from elmd.metrics.emotion import confusion_matrix, emotion_scores


def test_emotion_scores_equal_scikit_learn() -> None:
    from sklearn.metrics import accuracy_score, f1_score
    from sklearn.metrics import confusion_matrix as reference_matrix

    rng = random.Random(1)
    gold = rng.choices(EMOTIONS[:5], k=200)  # two emotions never occur in gold, one of them in no prediction either
    predicted = [g if rng.random() < 0.4 else rng.choice(EMOTIONS[:6]) for g in gold]
    scores = emotion_scores(gold, predicted)
    assert scores["accuracy"] == pytest.approx(accuracy_score(gold, predicted))
    assert scores["weighted_f1"] == pytest.approx(f1_score(gold, predicted, average="weighted", zero_division=0))
    assert scores["macro_f1"] == pytest.approx(f1_score(gold, predicted, average="macro", zero_division=0))
    assert (confusion_matrix(gold, predicted)[:, :-1] == reference_matrix(gold, predicted, labels=EMOTIONS)).all()
    assert scores["missing"] == 0


def test_missing_emotion_is_wrong_and_counted() -> None:
    happy, sad = Emotion.HAPPY, Emotion.SAD
    scores = emotion_scores([happy, happy, sad, sad], [happy, None, sad, happy])
    assert (scores["accuracy"], scores["missing"], scores["n"], scores["majority"]) == (0.5, 1, 4, 0.5)
    # happy: 1 right, 2 gold, 2 named: 1/2; sad: 1 right, 2 gold, 1 named: 2/3
    assert scores["macro_f1"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert scores["confusion"]["counts"][0] == [1, 0, 0, 0, 0, 0, 0, 1]
    with pytest.raises(ValueError, match="no gold emotion"):
        emotion_scores([], [])
