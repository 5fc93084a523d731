"""The seven emotions of M3ED (§4.1) and the words that stand for them in prompts and targets."""

from __future__ import annotations

from enum import StrEnum


class Emotion(StrEnum):
    """An emotion label; the value is M3ED's spelling, the order is that of §4.1."""

    HAPPY = "Happy"
    SURPRISE = "Surprise"
    SAD = "Sad"
    DISGUST = "Disgust"
    ANGER = "Anger"
    FEAR = "Fear"
    NEUTRAL = "Neutral"


EMOTIONS: tuple[Emotion, ...] = tuple(Emotion)

#: Each emotion by its own name.
BY_NAME: dict[str, Emotion] = {emotion.value: emotion for emotion in EMOTIONS}

#: The Chinese word of each emotion, used in prompts and as the target of Response Emotion Prediction (eq. 10).
WORDS: dict[Emotion, str] = {
    Emotion.HAPPY: "高兴",
    Emotion.SURPRISE: "惊讶",
    Emotion.SAD: "悲伤",
    Emotion.DISGUST: "厌恶",
    Emotion.ANGER: "愤怒",
    Emotion.FEAR: "恐惧",
    Emotion.NEUTRAL: "中性",
}

#: Position of each emotion in confusion matrices and label tensors.
INDEX: dict[Emotion, int] = {emotion: i for i, emotion in enumerate(EMOTIONS)}
