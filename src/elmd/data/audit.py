"""The audit of a data set's splits: what leaks from train into test, and which clips are missing."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from elmd.data.pairs import has_vision
from elmd.types import SPLITS, Sample


def normalised(text: str) -> str:
    """The text without white space, punctuation, case and width, so that 「好 的！」 equals 「好的」."""
    return re.sub(r"[\W_]", "", unicodedata.normalize("NFKC", text)).casefold()


def audit(samples: Sequence[Sample]) -> dict[str, Any]:
    """Leaks between splits and missing clips, JSON-ready.

    Returns:
        `shared_dialogues`: for each two splits, how many dialogues they share, and a few ids.
        `responses_in_train`: for valid and test, how many of the `samples` have a response that occurs in train: as
            it is (`exact`), and after `normalised`.
        `clips`: per split, samples whose u has a clip or features (`present`), names one that is not there
            (`missing`), or names none (`none`).
    """
    parts = {split: [sample for sample in samples if sample.split == split] for split in SPLITS}
    dialogues = {split: {sample.dialogue for sample in part} for split, part in parts.items()}
    shared = {}
    for first, second in (("train", "valid"), ("train", "test"), ("valid", "test")):
        both = sorted(dialogues[first] & dialogues[second])  # type: ignore[index]
        shared[f"{first}/{second}"] = {"dialogues": len(both), "examples": both[:3]}
    exact = {sample.response.text for sample in parts["train"]}
    loose = {normalised(text) for text in exact} - {""}
    return {
        "shared_dialogues": shared,
        "responses_in_train": {
            split: {
                "samples": len(part),
                "exact": sum(sample.response.text in exact for sample in part),
                "normalised": sum(normalised(sample.response.text) in loose for sample in part),
            }
            for split, part in parts.items()
            if split != "train"
        },
        "clips": {split: _clips(part) for split, part in parts.items()},
    }


def _clips(part: Sequence[Sample]) -> dict[str, int]:
    present = sum(has_vision(sample.utterance) for sample in part)
    with_name = sum(bool(sample.utterance.clip or sample.utterance.features) for sample in part)
    return {"present": present, "missing": with_name - present, "none": len(part) - with_name}
