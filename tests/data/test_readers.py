"""The readers of M3ED, CPED and JSONL, on hand-made data and on the shared real dialogues; the table of all."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dialogues import HAPPY, SAD, line, note, write_cped, write_jsonl, write_m3ed
from elmd.data.readers import DATASETS, dataset
from elmd.data.readers.cped import read_cped
from elmd.data.readers.jsonl import read_jsonl
from elmd.data.readers.m3ed import read_m3ed
from elmd.data.readers.source import ClipTemplate, RawDialogue, Source
from elmd.data.samples import prepare
from elmd.errors import ConfigError, DataError
from elmd.labels import Emotion
from elmd.types import SPLITS, Clip, Sentence

# --- the shared real dialogues -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(shared: Path) -> dict[str, Source]:
    """The same dialogues in the forms of CPED and of M3ED."""
    data = shared / "data"
    return {"cped": read_cped(data / "cped/valid_split.csv"), "m3ed": read_m3ed(data / "m3ed_like")}


@pytest.mark.parametrize(("form", "split"), [("cped", "dialogue"), ("m3ed", "official")])
def test_both_shared_forms_give_the_same_counts(real: dict[str, Source], form: str, split: Any) -> None:
    counts = prepare(real[form], split=split).counts
    assert [counts[name] for name in ("dialogues", "sentences", "turns", "pairs")] == [934, 11137, 3633, 2699]
    assert sum(counts["samples"].values()) == 2699
    for kind in ("utterance", "response"):
        assert sum(sum(counts["emotions"][part][kind].values()) for part in SPLITS) == 2699
    if split == "official":
        assert counts["samples"] == {"train": 1844, "valid": 320, "test": 535}  # README of m3ed_like
    else:
        assert note_counts(counts) == {"其他": 1418, "white space": 29, "line break": 1}


def note_counts(counts: dict[str, Any]) -> dict[str, int]:
    return {
        key: sum(n["count"] for what, n in counts["notes"].items() if key in what)
        for key in ("其他", "white space", "line break")
    }


def test_the_shared_forms_hold_the_same_turns(real: dict[str, Source]) -> None:
    cped, m3ed = (Counter(tuple(s.emotion for s in d.sentences) for d in source.dialogues) for source in real.values())
    assert cped == m3ed


# --- M3ED ----------------------------------------------------------------------------------------------------------


def test_m3ed_reads_times_order_and_labels(tmp_path: Path) -> None:
    sentences = {
        "S_1_10": {"Text": "后来", "Speaker": "B", "StartTime": "00:01:00:24", "EndTime": " 00:1:02:30"},
        "S_1_9": {"EmoAnnotation": {"final_mul_emo": "Sad,Anger", "final_main_emo": "Sad"}, "EndTime": "00:00:01:00"},
        "S_1_2": {"EmoAnnotation": {"final_mul_emo": "", "final_main_emo": "Fear"}},
    }
    source = read_m3ed(
        write_m3ed(tmp_path / "m", {"S_1": sentences}), clips=ClipTemplate(tmp_path, "{show}/{dialogue}.mp4")
    )
    lines = source.dialogues[0].sentences
    assert [s.id for s in lines] == ["S_1_2", "S_1_9", "S_1_10"]
    assert [s.speaker for s in lines] == ["甲", "甲", "乙"]
    assert [s.emotion for s in lines] == [Emotion.FEAR, SAD, HAPPY]
    video = str(tmp_path / "S" / "S_1.mp4")
    assert [s.clip for s in lines] == [Clip(video, 1.0, 2.2), None, Clip(video, 60.96, 63.2)]
    for words in (
        "gap in",
        "not in the order",
        "several emotions",
        "no final_mul_emo",
        "with spaces",
        "25 or more",
        "zero-length",
    ):
        assert note(source, words)["count"] == 1, words
        assert "annotation.json: S/S_1" in note(source, words)["example"]


def test_m3ed_template_with_utterance_names_whole_files(tmp_path: Path) -> None:
    folder = write_m3ed(tmp_path / "m", {"S_1": {"S_1_1": {}}})
    source = read_m3ed(folder, clips=ClipTemplate(tmp_path, "{dialogue}/{utterance}.mp4"))
    assert source.dialogues[0].sentences[0].clip == Clip(str(tmp_path / "S_1" / "S_1_1.mp4"))
    assert read_m3ed(folder).dialogues[0].sentences[0].clip is None


def test_m3ed_speakers_of_one_name_are_not_merged(tmp_path: Path) -> None:
    folder = write_m3ed(tmp_path / "m", {"S_1": {"S_1_1": {}, "S_1_2": {"Speaker": "B"}}})
    file = folder / "annotation.json"
    file.write_text(file.read_text(encoding="utf-8").replace('"乙"', '"甲"'), encoding="utf-8")
    source = read_m3ed(folder)
    assert [s.speaker for s in source.dialogues[0].sentences] == ["甲A", "甲B"]
    assert note(source, "one name")["count"] == 1


def test_m3ed_official_split_needs_every_show(tmp_path: Path) -> None:
    folder = write_m3ed(tmp_path / "m", {"S_1": {"S_1_1": {}, "S_1_2": {"Speaker": "B"}}})
    with pytest.raises(DataError, match="show 'S' is in no official split"):
        prepare(read_m3ed(folder), split="official")


# --- CPED ----------------------------------------------------------------------------------------------------------


def test_cped_accepts_bom_crlf_and_quoted_line_breaks(tmp_path: Path) -> None:
    rows = [("1", "1_0", "1_0_0", "甲", "worried", "等 一下"), ("1", "1_0", "1_0_1", "乙", "happy", "好\r\n的，行")]
    source = read_cped(write_cped(tmp_path / "c.csv", rows, end="\r\n"))
    assert [(s.speaker, s.text, s.emotion) for s in source.dialogues[0].sentences] == [
        ("甲", "等 一下", Emotion.FEAR),
        ("乙", "好 的，行", HAPPY),
    ]
    assert note(source, "line break") == {"count": 1, "example": f"{tmp_path / 'c.csv'}:4"}


def test_cped_emotion_map_overrides_single_rows(tmp_path: Path) -> None:
    rows = [("1", "1_0", "1_0_0", "甲", "worried", "等"), ("1", "1_0", "1_0_1", "乙", "relaxed", "好")]
    (tmp_path / "map.csv").write_text("mine,theirs\nworried,Sad\n")
    source = dataset("cped").source(write_cped(tmp_path / "c.csv", rows), tmp_path / "map.csv", None, "")
    assert [s.emotion for s in source.dialogues[0].sentences] == [SAD, HAPPY]


def test_cped_folder_has_the_official_split(tmp_path: Path) -> None:
    for i, name in enumerate(("train", "valid", "test")):
        write_cped(tmp_path / f"{name}_split.csv", [(f"{i}", f"{i}_0", f"{i}_0_0", "甲", "happy", "好")])
    assert [d.split for d in read_cped(tmp_path).dialogues] == ["train", "valid", "test"]


def test_cped_clips_are_a_file_each(tmp_path: Path) -> None:
    file = write_cped(tmp_path / "c.csv", [("1", "1_0", "1_0_0", "甲", "happy", "好")])
    source = read_cped(file, clips=ClipTemplate(tmp_path, "{show}/{utterance}.mp4"))
    assert source.dialogues[0].sentences[0].clip == Clip(str(tmp_path / "1" / "1_0_0.mp4"))
    with pytest.raises(ConfigError, match=r"data.video_template: .* does not name \{utterance\}"):
        read_cped(file, clips=ClipTemplate(tmp_path, "{show}/{dialogue}.mp4"))


# --- JSONL ---------------------------------------------------------------------------------------------------------


def test_jsonl_reads_every_field(tmp_path: Path) -> None:
    record = {
        "id": "d1", "show": "家", "split": "valid", "background": "他们是兄妹。",
        "utterances": [
            line("甲", "我没事", "Sad", id="x", clip="1.mp4", start=0.5, end=2, features="f/1.npy", tags=["face"]),
            line("乙", "真的？\u2028嗯", "Surprise"),
        ],
    }  # fmt: skip
    source = read_jsonl(write_jsonl(tmp_path / "d.jsonl", record))
    first = Sentence(
        "x", "甲", "我没事", SAD, Clip(str(tmp_path / "1.mp4"), 0.5, 2.0), str(tmp_path / "f/1.npy"), ("face",)
    )
    second = Sentence("d1_2", "乙", "真的？ 嗯", Emotion.SURPRISE)
    assert source.dialogues == [RawDialogue("d1", "家", (first, second), "他们是兄妹。", "valid")]


def test_jsonl_passes_over_unknown_keys_aloud(tmp_path: Path) -> None:
    source = read_jsonl(
        write_jsonl(tmp_path / "d.jsonl", {"id": "d", "backgroud": "x", "utterances": [line("甲", "好", start=1)]})
    )
    assert note(source, "unknown key 'backgroud', ignored; did you mean 'background'?")["example"].endswith("d.jsonl:1")
    assert note(source, "without a clip, ignored")["example"].endswith("d.jsonl:1: utterance 1")


# --- the table -----------------------------------------------------------------------------------------------------


def test_an_unknown_data_set_is_one_sentence() -> None:
    with pytest.raises(
        ConfigError, match=r"data.reader: there is no reader 'm3d'; did you mean 'm3ed'\? choices: tiny"
    ):
        dataset("m3d")


@pytest.mark.parametrize("name", DATASETS)
def test_every_data_set_has_the_seven_emotions_and_an_example_in_configs(name: str) -> None:
    assert set(DATASETS[name].labels.values()) == set(Emotion)
    text = (Path(__file__).parents[2] / "configs" / "data" / f"{name}.yaml").read_text(encoding="utf-8")
    assert f"reader: {name}\n" in text


def test_video_root_is_not_read_where_the_data_name_their_clips(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "d.jsonl", {"id": "d", "utterances": [line("甲", "好", clip="1.mp4")]})
    source = dataset("jsonl").source(file, None, tmp_path / "nothing", "{show}.mp4")
    assert source.dialogues[0].sentences[0].clip == Clip(str(tmp_path / "1.mp4"))
