"""The tiny world: what is promised of it holds in the files that it writes."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from elmd.data.readers.jsonl import read_jsonl
from elmd.labels import EMOTIONS, WORDS, Emotion
from elmd.tiny.faces import FRAMES, GEOMETRY, SIZE, WORDS_FOR, Actor, describe, geometry, write_clip
from elmd.tiny.world import (
    HIDES_TAG,
    NOISE,
    RELATIONS,
    RULES,
    SHOWS_TAG,
    TOPICS,
    WORDINGS,
    describe_world,
    dialogues,
    pretraining,
    topic_of,
    write_world,
)
from elmd.types import Clip, Dialogue, Split
from elmd.vision.video import read_clip

SMALL: dict[Split, int] = {"train": 12, "valid": 4, "test": 6}
LARGE: dict[Split, int] = {"train": 1500, "valid": 600, "test": 600}
ALL_WORDINGS = [wording for wordings in WORDINGS.values() for wording in wordings]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, 0, SMALL)
    return folder


@pytest.fixture(scope="module")
def large() -> list[Dialogue]:
    return dialogues(0, LARGE)


def contents(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "dialogues.jsonl").read_text(encoding="utf-8").splitlines()]


def relation_of(dialogue: Dialogue) -> str:
    told = dialogue.background or ""
    return next(name for name, words in RELATIONS.items() if any(f"是{word}，" in told for word in words))


def test_equal_seeds_give_equal_bytes_and_other_seeds_do_not(world: Path, tmp_path: Path) -> None:
    write_world(tmp_path / "again", 0, SMALL)
    write_world(tmp_path / "other", 1, SMALL)
    first, again, other = contents(world), contents(tmp_path / "again"), contents(tmp_path / "other")
    assert first == again
    assert first["dialogues.jsonl"] != other["dialogues.jsonl"]
    shared = [name for name in first.keys() & other.keys() if name.endswith(".mp4")]
    assert shared
    assert all(first[name] != other[name] for name in shared)


def test_goes_on_with_the_clips_of_a_killed_run(world: Path, tmp_path: Path) -> None:
    write_world(tmp_path, 0, SMALL)
    clips = sorted((tmp_path / "clips").iterdir())
    kept = clips[0].stat().st_mtime_ns
    clips[1].unlink()
    clips[2].unlink()
    clips[2].with_suffix(".partial").write_bytes(b"half a clip")
    (tmp_path / "dialogues.jsonl").unlink()
    write_world(tmp_path, 0, SMALL)
    assert contents(tmp_path) == contents(world)
    assert clips[0].stat().st_mtime_ns == kept


def test_is_read_as_the_documented_format(world: Path) -> None:
    source = read_jsonl(world / "dialogues.jsonl")
    assert source.notes.as_dict() == {}
    pairs = Counter(d.split for d in source.dialogues for _ in d.sentences[1:])
    assert pairs == SMALL
    for dialogue in source.dialogues:
        assert all(a.speaker != b.speaker for a, b in zip(dialogue.sentences, dialogue.sentences[1:], strict=False))
        assert len({sentence.speaker for sentence in dialogue.sentences}) == 2


def test_answered_turns_have_a_clip_that_decodes(world: Path) -> None:
    named = []
    for record in records(world):
        *answered, last = record["utterances"]
        assert "clip" not in last
        named += [utterance["clip"] for utterance in answered]
    assert len(named) == sum(SMALL.values())
    assert sorted(named) == sorted(f"clips/{path.name}" for path in (world / "clips").iterdir())
    for name in named:
        frames = read_clip(Clip(str(world / name)), FRAMES, SIZE, "decord")
        assert frames.shape == (FRAMES, SIZE, SIZE, 3)
        assert np.abs(frames[0].astype(int) - frames[-1]).mean() > 0.3, "the face does not move"


def test_a_clip_shows_the_frames_that_were_drawn(tmp_path: Path) -> None:
    draw = Random(0)
    frames = Actor(draw).act(geometry(Emotion.FEAR, draw), draw)
    write_clip(frames, tmp_path / "clip.mp4")
    decoded = read_clip(Clip(str(tmp_path / "clip.mp4")), FRAMES, SIZE, "decord")
    assert np.abs(decoded.astype(int) - frames).mean() < 6  # of 255: what the codec costs


def test_no_show_and_no_dialogue_is_in_two_splits(large: list[Dialogue]) -> None:
    shows = {split: {d.show for d in large if d.split == split} for split in LARGE}
    assert not shows["train"] & (shows["valid"] | shows["test"])
    assert not shows["valid"] & shows["test"]
    assert len({d.id for d in large}) == len(large)
    assert {split: sum(len(d.utterances) - 1 for d in large if d.split == split) for split in LARGE} == LARGE


def test_a_third_of_the_wordings_is_new_in_valid_and_test(large: list[Dialogue]) -> None:
    new = {wording for words in WORDINGS.values() for wording in words[2 * len(words) // 3 :]}
    assert len(new) == len(ALL_WORDINGS) / 3
    said = {
        split: [w for d in large if d.split == split for u in d.utterances for w in ALL_WORDINGS if w in u.text]
        for split in LARGE
    }
    assert not new & set(said["train"])
    assert set(ALL_WORDINGS) - new == set(said["train"])
    for split in ("valid", "test"):
        assert 0.25 < sum(w in new for w in said[split]) / len(said[split]) < 0.42


def test_tags_tell_whether_the_text_shows_the_emotion(large: list[Dialogue]) -> None:
    tags: Counter[str] = Counter()
    for utterance in (u for d in large for u in d.utterances):
        (tag,) = utterance.tags
        tags[tag] += 1
        own = any(wording in utterance.text for wording in WORDINGS[utterance.emotion])
        others = any(w in utterance.text for e, words in WORDINGS.items() if e is not utterance.emotion for w in words)
        assert (own, others) == ((True, False) if tag == SHOWS_TAG else (False, False)), utterance
    assert 0.45 < tags[HIDES_TAG] / tags.total() < 0.55


def test_replies_follow_emotion_and_relation_up_to_the_ceiling(large: list[Dialogue]) -> None:
    answers = [
        (relation_of(d), u.emotion, r.emotion)
        for d in large
        for u, r in zip(d.utterances, d.utterances[1:], strict=False)
    ]
    by_rule = sum(RULES[relation][EMOTIONS.index(u)] is r for relation, u, r in answers) / len(answers)
    facts = describe_world(0, large)["reply_emotion"]
    assert facts["ceiling"] == 1 - NOISE == pytest.approx(by_rule, abs=0.02)
    # Knowing the relation alone, on first turns: the best guess per relation, as counted.
    first = [(relation_of(d), d.utterances[1].emotion) for d in large]
    best = [Counter(r for name, r in first if name == relation).most_common(1)[0][1] for relation in RULES]
    assert facts["relation_only"] == pytest.approx(sum(best) / len(first), abs=0.06)
    assert facts["relation_only"] < 0.3


def test_replies_to_like_emotions_open_alike(large: list[Dialogue]) -> None:
    openers: dict[Emotion, set[str]] = {}
    for d in large:
        for u, r in zip(d.utterances, d.utterances[1:], strict=False):
            openers.setdefault(u.emotion, set()).add(r.text.split("，")[0])
    assert {len(found) for found in openers.values()} == {1}
    assert len(set.union(*openers.values())) == len(EMOTIONS)


def test_pretraining_holds_no_dialogue_of_the_world(large: list[Dialogue]) -> None:
    made = list(pretraining(0, 500))
    again = list(pretraining(0, 500))
    assert made == again
    assert not {d.show for d in made} & {d.show for d in large}
    told = {tuple(u.text for u in d.utterances) for d in large if d.split != "train"}
    same = [d for d in made if tuple(u.text for u in d.utterances) in told]
    assert not same
    assert {w for d in made for u in d.utterances for w in ALL_WORDINGS if w in u.text} == set(ALL_WORDINGS)
    habits = {(d.show, u.emotion, r.text.split("，")[0]) for d in made for u, r in zip(d.utterances, d.utterances[1:])}  # noqa: B905
    assert len({(show, emotion) for show, emotion, _ in habits}) == len(habits), "a show has one opener per emotion"


def test_every_text_names_its_topic(large: list[Dialogue]) -> None:
    for d in large:
        topics = {topic_of(u.text) for u in d.utterances}
        assert len(topics) == 1
        assert topics.pop() in (d.background or "")
    assert {topic_of(d.utterances[0].text) for d in large} == set(TOPICS)


def test_scene_words_tell_emotions_apart_without_naming_them() -> None:
    draw = Random(0)
    state_of = {phrase: state for state, phrases in WORDS_FOR.items() for phrase in phrases}
    assert not [p for p in state_of for word in WORDS.values() if word in p]
    usual: dict[Emotion, frozenset[str]] = {}
    for emotion in EMOTIONS:
        seen = Counter(frozenset(state_of[p] for p in describe(geometry(emotion, draw), draw)) for _ in range(300))
        usual[emotion], count = seen.most_common(1)[0]
        assert count > 270, (emotion, seen)
    assert len(set(usual.values())) == len(EMOTIONS)


def test_each_number_of_the_geometry_is_seen_in_the_drawing() -> None:
    actor, rest = Actor(Random(0)), np.zeros(len(GEOMETRY), dtype=np.float32)
    still = actor.draw(rest).astype(int)
    assert (actor.draw(rest) == still).all()
    for i, name in enumerate(GEOMETRY):
        face = rest.copy()
        face[i] = 1
        assert np.abs(actor.draw(face).astype(int) - still).max() > 30, name
