"""The three rules of splitting, and the audit of their leaks."""

from __future__ import annotations

import json
import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dialogues import many, talk, utterance
from elmd.data.audit import audit, normalised
from elmd.data.pairs import Pair, pairs
from elmd.data.readers.source import Notes, Source
from elmd.data.samples import prepare
from elmd.data.splits import assign
from elmd.data.turns import merge
from elmd.errors import DataError
from elmd.types import Dialogue, Sample


def test_paper_split_is_over_samples() -> None:
    kept = pairs(merge(raw, None, Notes()) for raw in many(100).dialogues)
    splits = assign(kept, "paper", 0)
    assert Counter(splits) == {"test": 25, "valid": 25, "train": 200}
    assert audit([p.sample(s, text_only=False) for p, s in zip(kept, splits, strict=True)])["shared_dialogues"][
        "train/test"
    ]["dialogues"]


@given(st.lists(st.integers(2, 20), min_size=30, max_size=40), st.integers(0, 9))
def test_dialogue_split_shares_no_dialogue_and_is_about_8_1_1(sizes: list[int], seed: int) -> None:
    kept = [
        Pair(Dialogue(f"d{i}", "s", (utterance("甲", "好"),) * size), at)
        for i, size in enumerate(sizes)
        for at in range(1, size)
    ]
    splits = assign(kept, "dialogue", seed)
    split_of: dict[str, str] = {}
    for pair, split in zip(kept, splits, strict=True):
        assert split_of.setdefault(pair.dialogue.id, split) == split
    for split in ("valid", "test"):
        assert 0 <= splits.count(split) - len(kept) / 10 <= max(sizes)  # type: ignore[arg-type]


@pytest.mark.parametrize("by", ["paper", "dialogue"])
def test_drawn_splits_depend_on_the_seed_and_not_on_the_order(by: Any) -> None:
    kept = pairs(merge(raw, None, Notes()) for raw in many(60).dialogues)
    mixed = random.Random(1).sample(kept, len(kept))
    first = dict(zip((p.id for p in kept), assign(kept, by, 0), strict=True))
    assert dict(zip((p.id for p in mixed), assign(mixed, by, 0), strict=True)) == first
    assert dict(zip((p.id for p in kept), assign(kept, by, 1), strict=True)) != first


def test_an_empty_split_is_an_error() -> None:
    with pytest.raises(DataError, match=r"data.split: the paper split leaves valid and test empty \(2 samples\)"):
        prepare(Source([talk()]), split="paper")


def test_audit_finds_leaks() -> None:
    def sample(dialogue: str, split: Any, response: str) -> Sample:
        return Sample(f"{dialogue}#1", dialogue, "s", split, (), utterance("甲", "嗯"), utterance("乙", response))

    report = audit([
        sample("a", "train", "好的。"), sample("b", "train", "……"), sample("a", "test", "好的。"),
        sample("c", "test", "好 的！"), sample("d", "test", "？"), sample("e", "valid", "不"),
    ])  # fmt: skip
    assert report["shared_dialogues"]["train/test"] == {"dialogues": 1, "examples": ["a"]}
    assert report["shared_dialogues"]["train/valid"]["dialogues"] == 0
    assert report["responses_in_train"]["test"] == {"samples": 3, "exact": 1, "normalised": 2}
    assert report["clips"]["train"] == {"present": 0, "missing": 0, "none": 2}
    assert json.loads(json.dumps(report)) == report


def test_normalised_ignores_width_case_space_and_punctuation() -> None:
    assert normalised("ＯＫ， 好_的！") == normalised("ok好的") == "ok好的"
