"""Sentences to turns, turns to pairs, and the filters of pairs."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dialogues import HAPPY, NEUTRAL, SAD, sentence, talk, utterance
from elmd.data.pairs import FILTERS, pairs
from elmd.data.readers.source import Notes, RawDialogue
from elmd.data.turns import main_emotion, merge
from elmd.labels import EMOTIONS, Emotion
from elmd.types import Clip, Dialogue


@pytest.mark.parametrize(
    ("turn", "expected"),
    [
        ([("a", SAD), ("b", HAPPY), ("c", SAD), ("dddddd", HAPPY), ("e", SAD)], SAD),  # majority before length
        ([("aaa", SAD), ("b", HAPPY)], SAD),  # tie: longest
        ([("a", SAD), ("bb", HAPPY), ("cc", SAD), ("d", HAPPY)], HAPPY),  # tie of both: last
        ([("aa", SAD), ("a", HAPPY), ("aaa", HAPPY), ("aa", SAD)], SAD),
        ([("aa", NEUTRAL), ("aa", HAPPY), ("aa", SAD)], SAD),
    ],
)
def test_main_emotion(turn: list[tuple[str, Emotion]], expected: Emotion) -> None:
    assert main_emotion([sentence("A", text, emotion) for text, emotion in turn]) is expected


@given(st.lists(st.tuples(st.text("x", min_size=1, max_size=3), st.sampled_from(EMOTIONS)), min_size=1, max_size=9))
def test_main_emotion_equals_the_rule_written_slowly(turn: list[tuple[str, Emotion]]) -> None:
    emotions = [emotion for _, emotion in turn]
    best = [e for e in set(emotions) if emotions.count(e) == max(emotions.count(x) for x in emotions)]
    length = {e: sum(len(text) for text, emotion in turn if emotion is e) for e in best}
    best = [e for e in best if length[e] == max(length.values())]
    slow = next(e for e in reversed(emotions) if e in best)
    assert main_emotion([sentence("A", text, emotion) for text, emotion in turn]) is slow


def test_merge_joins_texts_spans_and_tags() -> None:
    raw = RawDialogue(
        "d",
        "s",
        (
            sentence("甲", "一", clip=Clip("/v.mp4", 1.0, 2.0), tags=("x",)),
            sentence("甲", "二", clip=None),
            sentence("甲", "三", clip=Clip("/v.mp4", 3.0, 4.5), tags=("x", "y")),
            sentence("乙", "四", clip=Clip("/v.mp4", 5.0, None)),
            sentence("甲", "五"),
        ),
    )
    dialogue = merge(raw, "背景", Notes())
    assert [(u.id, u.speaker, u.text) for u in dialogue.utterances] == [
        ("甲一", "甲", "一 二 三"),
        ("乙四", "乙", "四"),
        ("甲五", "甲", "五"),
    ]
    assert [u.clip for u in dialogue.utterances] == [Clip("/v.mp4", 1.0, 4.5), Clip("/v.mp4", 5.0, None), None]
    assert dialogue.utterances[0].tags == ("x", "y")
    assert dialogue.background == "背景"


def test_a_turn_over_several_files_takes_its_longest_sentence_and_says_so() -> None:
    notes = Notes()
    raw = RawDialogue("d", "s", (
        sentence("甲", "短", clip=Clip("/1.mp4"), features="/1.npy"),
        sentence("甲", "长一点", clip=Clip("/2.mp4"), features="/2.npy"),
    ))  # fmt: skip
    utterance = merge(raw, None, notes).utterances[0]
    assert (utterance.clip, utterance.features) == (Clip("/2.mp4"), "/2.npy")
    assert {what.split(",")[0]: n["count"] for what, n in notes.as_dict().items()} == {
        "turn over several clips": 1,
        "turn over several feature files": 1,
        "dialogue of one speaker": 1,
    }


def test_pairs_have_history_before_u() -> None:
    dialogue = merge(talk(turns=4), None, Notes())
    samples = [pair.sample("train", text_only=False) for pair in pairs([dialogue])]
    assert [sample.id for sample in samples] == ["d#1", "d#2", "d#3"]
    for at, sample in enumerate(samples, start=1):
        assert (*sample.history, sample.utterance, sample.response) == dialogue.utterances[: at + 1]


def test_each_filter_keeps_and_drops(tmp_path: Path) -> None:
    (tmp_path / "1.mp4").touch()
    here, gone = str(tmp_path / "1.mp4"), str(tmp_path / "2.mp4")
    two = Dialogue("d", "s", (utterance("甲", "在吗", here), utterance("乙", "在。", gone), utterance("甲", "好的")))
    three = Dialogue("e", "s", (*two.utterances, utterance("丙", "谁")))
    keeps = {name: [keep(pair) for pair in pairs([two, three])] for name, keep in FILTERS.items()}
    assert keeps == {
        "two_speakers": [True, True, False, False, False],
        "clip_of_u": [True, False, True, False, False],
        "with_history": [False, True, False, True, True],
        "response_of_two_characters": [False, True, False, True, False],
    }
