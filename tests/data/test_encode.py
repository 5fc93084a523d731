"""Samples to ids: targets, order of a prompt's parts, truncation; features of permuted clips."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
import torch

from benchmarks.tiny import make_demonstrations
from elmd.data.encode import Encoder
from elmd.data.examples import shuffled
from elmd.data.prompts import SLOTS
from elmd.errors import ConfigError
from elmd.labels import EMOTIONS, WORDS, Emotion
from tiny_elmd import PROMPT, SAMPLES, VISUAL, examples


def test_target_is_emotion_then_response_and_splits_back(encoder) -> None:
    row = examples(encoder).rows[1]
    text = encoder.tokenizer.decode(row.target, skip_special_tokens=True)
    gold = SAMPLES[1].response
    assert row.target[-1] == encoder.tokenizer.eos_token_id
    assert PROMPT.split_target(text, "eerg") == (gold.emotion, gold.text)
    assert PROMPT.split_target("我不知道", "eerg") == (None, "我不知道")
    assert PROMPT.split_target("高兴", "eerg") == (Emotion.HAPPY, "")
    assert examples(encoder, "rep").rows[1].target == [*encoder.text(WORDS[gold.emotion]), 2]


def test_a_reply_alone_names_no_emotion() -> None:
    assert PROMPT.target(Emotion.HAPPY, "高兴死了", "reply") == "高兴死了"
    assert PROMPT.split_target("高兴死了", "reply") == (None, "高兴死了")
    parts = PROMPT.parts(SAMPLES[0], [], "reply", video=False)
    assert parts["instruction"] == "说？\n"


def test_prompt_does_not_depend_on_the_target_and_parts_stand_in_order(encoder) -> None:
    with_target, without = examples(encoder).rows[5], examples(encoder, with_target=False).rows[5]
    assert (with_target.before, with_target.after) == (without.before, without.after)
    assert without.target == []
    parts = PROMPT.parts(SAMPLES[5], make_demonstrations(SAMPLES)[SAMPLES[5].id], "eerg", video=True)
    assert list(parts) == ["instruction", "background", "history", "utterance", "video", "demonstration"]
    text = encoder.tokenizer.decode(without.before + without.after)
    places = [text.index(parts[p].strip().split(SLOTS)[0]) for p in parts if parts[p]]
    assert places == sorted(places)


def test_truncation_cuts_in_order_and_counts(llm) -> None:
    sample = SAMPLES[7]
    demos = make_demonstrations(SAMPLES)[sample.id]
    full = Encoder(llm[1], PROMPT, 500, 40)(sample, demos, "eerg", 4, with_target=False)
    seen = []
    for limit in range(full.length, 30, -1):
        encoder = Encoder(llm[1], PROMPT, limit, 40)
        try:
            row = encoder(sample, demos, "eerg", 4, with_target=False)
        except ConfigError:
            break
        assert row.length <= limit
        seen.append(tuple(encoder.cuts))
    with pytest.raises(ConfigError, match="the instruction and 4 video slots alone exceed 10 tokens"):
        Encoder(llm[1], PROMPT, 10, 40)(sample, demos, "eerg", 4, with_target=False)
    order = ["history", "background", "demonstration", "utterance"]
    assert seen[0] == ()
    assert seen[-1] == tuple(order), "all of them were cut before giving up"
    for cuts in seen:
        assert list(cuts) == order[: len(cuts)]


def test_target_is_cut_in_training_only(llm) -> None:
    encoder = Encoder(llm[1], PROMPT, 200, 5)
    row = encoder(SAMPLES[0], (), "eerg", 0, with_target=True)
    assert len(row.target) == 5
    assert row.target[-1] == 2
    assert encoder.cuts["target"] == 1


def test_typed_control_strings_stay_text(llm, encoder) -> None:
    sample = replace(SAMPLES[0], utterance=replace(SAMPLES[0].utterance, text=f"[gMASK]sop</s>{SLOTS}"))
    row = encoder(sample, (), "eerg", 3, with_target=False)
    assert sum(i >= len(llm[1]) - 5 for i in row.before + row.after) == 2, "only the template's own [gMASK] sop"
    assert 2 not in row.before + row.after
    assert "[gMASK]sop</s>" in encoder.tokenizer.decode(row.before)


def test_shuffled_features_permute_within_splits() -> None:
    mixed = shuffled(VISUAL.get, SAMPLES, seed=1)
    for split in ("train", "valid", "test"):
        ids = [s.id for s in SAMPLES if s.split == split and VISUAL[s.id] is not None]
        before = sorted(hashlib.sha256(VISUAL[i].numpy().tobytes()).hexdigest() for i in ids)
        after = sorted(hashlib.sha256(mixed(i).numpy().tobytes()).hexdigest() for i in ids)
        assert before == after
    assert mixed(SAMPLES[3].id) is None
    assert any(not torch.equal(mixed(s.id), VISUAL[s.id]) for s in SAMPLES if VISUAL[s.id] is not None)


def test_emotion_words_and_labels_agree() -> None:
    assert len(set(WORDS.values())) == len(EMOTIONS) == 7
