"""Sentences, utterances, dialogues and samples: what passes between the parts of ELMD."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from elmd.labels import Emotion

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")


@dataclass(frozen=True, slots=True)
class Clip:
    """A span of a video file; `start` and `end` in seconds, None for the file's own ends.

    `path` is absolute. It may be a video file or a folder of frames.
    """

    path: str
    start: float | None = None
    end: float | None = None


@dataclass(frozen=True, slots=True)
class Sentence:
    """One annotated line of a dialogue, as the data set holds it.

    `features` is the absolute path of a user's own array for this line (vision=precomputed).
    `tags` are free words carried along so that scores can be reported by subset.
    """

    id: str
    speaker: str
    text: str
    emotion: Emotion
    clip: Clip | None = None
    features: str | None = None
    tags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Utterance(Sentence):
    """A speaker's turn: consecutive sentences of one speaker, merged (§4.1)."""


@dataclass(frozen=True, slots=True)
class Dialogue:
    """Utterances in order. `split` is set where the data set itself assigns one (its official split)."""

    id: str
    show: str
    utterances: tuple[Utterance, ...]
    background: str | None = None
    split: Split | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """One adjacent pair (u, r) with its history H and the clip V of u (§3.1), in one split.

    `id` is `<dialogue id>#<position of r>`, unique in a data set.
    """

    id: str
    dialogue: str
    show: str
    split: Split
    history: tuple[Utterance, ...]
    utterance: Utterance
    response: Utterance
    background: str | None = None


@dataclass(frozen=True, slots=True)
class Demonstration:
    """The response r' retrieved for a sample (§3.3): where it comes from, and how near its u' is to u."""

    sample: str
    source: str
    utterance: str
    response: str
    emotion: Emotion
    similarity: float
