"""Samples: filters and missing clips as counted, background, and the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dialogues import many, note, sentence, talk
from elmd.data.audit import audit
from elmd.data.readers.source import RawDialogue, Source, load_background
from elmd.data.samples import load_samples, prepare, save_samples
from elmd.errors import ConfigError, DataError
from elmd.labels import EMOTIONS
from elmd.types import SPLITS, Clip, Sample, Utterance


def test_filters_are_counted_alone_and_in_turn() -> None:
    counts = prepare(many(), split="dialogue", filters=["with_history", "two_speakers"]).counts
    assert counts["pairs"] == 8 * 1 + 8 * 2 + 7 * 3 + 7 * 4
    assert counts["dropped"] == {"filter with_history": 30, "filter two_speakers": 0}
    assert counts["filters"]["with_history"] == {"chosen": True, "drops_alone": 30}
    assert counts["filters"]["clip_of_u"] == {"chosen": False, "drops_alone": counts["pairs"]}
    with pytest.raises(ConfigError, match=r"data.filters: unknown filter 'x'; known: two_speakers, clip_of_u"):
        prepare(many(), split="dialogue", filters=["x"])


def with_clips(folder: Path) -> Source:
    """Thirty dialogues of one pair: u's clip is there in 27, named but absent in two, and not named in one."""
    dialogues = []
    for i in range(30):
        clip = Clip(str(folder / f"{i}.mp4")) if i < 29 else None
        if i < 27:
            (folder / f"{i}.mp4").touch()
        dialogues.append(RawDialogue(f"d{i}", "s", (sentence("甲", "你好", clip=clip), sentence("乙", "好"))))
    return Source(dialogues)


def test_missing_clips_are_an_error_by_default(tmp_path: Path) -> None:
    with pytest.raises(
        DataError,
        match=r"data.on_missing_clip: the clip of u is missing for 3 of 30 samples, first: d27#1 \(.*27.mp4\)",
    ):
        prepare(with_clips(tmp_path), split="paper")


@pytest.mark.parametrize(("rule", "left", "bare"), [("text_only", 30, 3), ("drop", 27, 0)])
def test_missing_clips_can_be_kept_or_dropped(tmp_path: Path, rule: Any, left: int, bare: int) -> None:
    result = prepare(with_clips(tmp_path), split="paper", on_missing_clip=rule)
    assert len(result.samples) == left
    assert sum(sample.utterance.clip is None for sample in result.samples) == bare == result.counts["text_only"]
    assert result.counts["dropped"] == ({} if rule == "text_only" else {"clip missing": 3})
    assert sum(audit(result.samples)["clips"][split]["present"] for split in SPLITS) == 27


def test_a_text_only_data_set_misses_nothing() -> None:
    assert prepare(many(), split="dialogue").counts["text_only"] == 0


def test_background_of_a_dialogue_comes_before_that_of_its_show(tmp_path: Path) -> None:
    (tmp_path / "b.json").write_text('{"s0": "剧情", "d3": "自己的", "s9": "没有"}', encoding="utf-8")
    source = many()
    source.dialogues[6] = talk("d6", show="s0", background="记录里的")
    samples = prepare(source, split="paper", background=load_background(tmp_path / "b.json")).samples
    texts = {sample.dialogue: sample.background for sample in samples}
    assert (texts["d0"], texts["d3"], texts["d6"], texts["d1"]) == ("剧情", "自己的", "记录里的", None)
    assert note(source, "no known show")["example"] == "s9"


# --- the file ------------------------------------------------------------------------------------------------------

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
clips = st.none() | st.builds(Clip, texts, st.none() | st.floats(0, 1e5), st.none() | st.floats(0, 1e5))
utterances = st.builds(
    Utterance,
    texts,
    texts,
    texts,
    st.sampled_from(EMOTIONS),
    clips,
    st.none() | texts,
    st.lists(texts, max_size=2).map(tuple),
)
samples = st.builds(
    Sample,
    texts,
    texts,
    texts,
    st.sampled_from(SPLITS),
    st.lists(utterances, max_size=2).map(tuple),
    utterances,
    utterances,
    st.none() | texts,
)


@settings(max_examples=40)
@given(st.lists(samples, min_size=1, max_size=3))
def test_samples_survive_the_file_exactly(tmp_path_factory: pytest.TempPathFactory, some: list[Sample]) -> None:
    path = tmp_path_factory.mktemp("s") / "samples.jsonl"
    save_samples(path, some)
    assert load_samples(path) == some
    assert [file.name for file in path.parent.iterdir()] == ["samples.jsonl"]


def test_a_broken_samples_file_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    with pytest.raises(
        DataError, match=r"samples.jsonl: cannot be read \(No such file or directory\); run stage=prepare"
    ):
        load_samples(path)
    save_samples(path, prepare(many(), split="paper").samples)
    good = path.read_text(encoding="utf-8").split("\n")
    for broken, message in (
        (good[1][:-9], "JSONDecodeError"),
        (good[1].replace("Neutral", "Neutrall", 1), "Neutrall"),
        (good[1].replace('"split": "', '"split": "x'), "unknown split"),
        (good[1].replace('"show"', '"shows"'), "shows"),
        ("[]", "TypeError"),
    ):
        path.write_text("\n".join([good[0], broken, *good[2:]]), encoding="utf-8")
        with pytest.raises(DataError, match=rf"samples.jsonl:2: not a sample \(.*{message}.*run stage=prepare again"):
            load_samples(path)
