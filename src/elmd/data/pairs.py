"""Adjacent pairs (u, r) of a dialogue (§3.1), and the filters that choose among them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from elmd.types import Dialogue, Sample, Split, Utterance


@dataclass(frozen=True, slots=True)
class Pair:
    """The adjacent pair (u, r) of a dialogue whose response r is utterance number `at` (from 0)."""

    dialogue: Dialogue
    at: int

    @property
    def id(self) -> str:
        return f"{self.dialogue.id}#{self.at}"

    @property
    def utterance(self) -> Utterance:
        return self.dialogue.utterances[self.at - 1]

    @property
    def response(self) -> Utterance:
        return self.dialogue.utterances[self.at]

    def sample(self, split: Split, *, text_only: bool) -> Sample:
        """As a sample of a split; `text_only` leaves out the clip and features of u."""
        u = self.utterance
        return Sample(
            id=self.id,
            dialogue=self.dialogue.id,
            show=self.dialogue.show,
            split=split,
            history=self.dialogue.utterances[: self.at - 1],
            utterance=replace(u, clip=None, features=None) if text_only else u,
            response=self.response,
            background=self.dialogue.background,
        )


def pairs(dialogues: Iterable[Dialogue]) -> list[Pair]:
    """All adjacent pairs (u, r), in order."""
    return [Pair(dialogue, at) for dialogue in dialogues for at in range(1, len(dialogue.utterances))]


def has_vision(utterance: Utterance) -> bool:
    """Whether the utterance names a clip or a feature array that exists; it is not opened."""
    paths = (utterance.clip.path if utterance.clip else None, utterance.features)
    return any(path is not None and _exists(path) for path in paths)


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except OSError:  # a name that no file system takes
        return False


#: Optional filters by name: what a pair must fulfil to be kept. The paper does not say which it used (Table 1).
FILTERS: dict[str, Callable[[Pair], bool]] = {
    "two_speakers": lambda pair: len({u.speaker for u in pair.dialogue.utterances}) == 2,
    "clip_of_u": lambda pair: has_vision(pair.utterance),
    "with_history": lambda pair: pair.at >= 2,
    "response_of_two_characters": lambda pair: len(re.findall(r"\w", pair.response.text)) >= 2,
}
