"""Readers, merging, splits, the samples' file and the audit, on hand-made data and on the shared real dialogues."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elmd.config import Config, DataConfig, OnMissingClip, Reader, SplitRule
from elmd.data.audit import audit, normalised
from elmd.data.readers.cped import COLUMNS, read_cped
from elmd.data.readers.jsonl import read_jsonl
from elmd.data.readers.m3ed import read_m3ed
from elmd.data.readers.source import Notes, RawDialogue, Source, load_background
from elmd.data.samples import (
    FILTERS,
    Pair,
    assign,
    load_samples,
    main_emotion,
    merge,
    pairs,
    prepare,
    save_samples,
)
from elmd.errors import ConfigError, DataError
from elmd.labels import EMOTIONS, Emotion
from elmd.stages import depends
from elmd.stages import prepare as stage
from elmd.stages.base import Job
from elmd.types import SPLITS, Clip, Dialogue, Sample, Sentence, Utterance

HAPPY, SAD, NEUTRAL = Emotion.HAPPY, Emotion.SAD, Emotion.NEUTRAL


def sentence(speaker: str, text: str, emotion: Emotion = NEUTRAL, **more: Any) -> Sentence:
    return Sentence(f"{speaker}{text}", speaker, text, emotion, **more)


def talk(id_: str = "d", turns: int = 3, **more: Any) -> RawDialogue:
    lines = tuple(sentence("甲乙"[i % 2], f"第{i}句{id_}") for i in range(turns))
    return RawDialogue(id_, more.pop("show", "s"), lines, **more)


def write_m3ed(folder: Path, dialogues: dict[str, dict[str, Any]], **lists: list[str]) -> Path:
    """M3ED's layout; `dialogues`: id -> {sentence id -> changes to a good sentence}, all of show S."""
    folder.mkdir(exist_ok=True)
    info = {
        letter: {"Name": name, "Age": "young", "Gender": "male", "OtherName": []}
        for letter, name in zip("AB", "甲乙", strict=True)
    }
    good = {"StartTime": "00:00:01:00", "EndTime": "00:00:02:05", "Text": "你好", "Speaker": "A"}
    show = {
        dialogue: {
            "SpeakerInfo": info,
            "Dialog": {
                id_: {**good, "EmoAnnotation": {"final_mul_emo": "Happy", "final_main_emo": "Happy"}, **changes}
                for id_, changes in sentences.items()
            },
        }
        for dialogue, sentences in dialogues.items()
    }
    (folder / "annotation.json").write_text(json.dumps({"S": show}, ensure_ascii=False, indent=1), encoding="utf-8")
    if lists:
        (folder / "splitInfo").mkdir(exist_ok=True)
        for name in ("train", "val", "test"):
            (folder / "splitInfo" / f"movie_list_{name}.txt").write_text("\n".join(lists.get(name, [])) + " ")
    return folder


def write_cped(
    path: Path, rows: list[tuple[str, str, str, str, str, str]], *, end: str = "\n", bom: str = "\ufeff"
) -> Path:
    body = [",".join(COLUMNS), *(",".join(f'"{cell}"' for cell in row) for row in rows)]
    path.write_bytes((bom + end.join(body) + end).encode())
    return path


def write_jsonl(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def line(speaker: str, text: str, emotion: str = "Happy", **more: Any) -> dict[str, Any]:
    return {"speaker": speaker, "text": text, "emotion": emotion, **more}


def note(source: Source, words: str) -> dict[str, Any]:
    found = [value for what, value in source.notes.as_dict().items() if words in what]
    assert len(found) == 1, source.notes.as_dict()
    return found[0]


# --- the shared real dialogues -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "split"), [("cped/valid_split.csv", "dialogue"), ("m3ed_like", "official")])
def test_both_shared_forms_give_the_same_counts(shared: Path, form: str, split: Any) -> None:
    path = shared / "data" / form
    counts = prepare(read_m3ed(path) if path.is_dir() else read_cped(path), split=split).counts
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


def test_the_shared_forms_hold_the_same_turns(shared: Path) -> None:
    cped, m3ed = read_cped(shared / "data/cped/valid_split.csv"), read_m3ed(shared / "data/m3ed_like")
    shape = [
        Counter((len(d.sentences), tuple(s.emotion for s in d.sentences)) for d in s.dialogues) for s in (cped, m3ed)
    ]
    assert shape[0] == shape[1]


# --- merging -------------------------------------------------------------------------------------------------------


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
    found = [pair.sample("train", text_only=False) for pair in pairs([dialogue])]
    assert [sample.id for sample in found] == ["d#1", "d#2", "d#3"]
    for at, sample in enumerate(found, start=1):
        assert (*sample.history, sample.utterance, sample.response) == dialogue.utterances[: at + 1]


# --- M3ED ----------------------------------------------------------------------------------------------------------


def test_m3ed_reads_times_order_and_labels(tmp_path: Path) -> None:
    sentences = {
        "S_1_10": {"Text": "后来", "Speaker": "B", "StartTime": "00:01:00:24", "EndTime": " 00:1:02:30"},
        "S_1_9": {"EmoAnnotation": {"final_mul_emo": "Sad,Anger", "final_main_emo": "Sad"}, "EndTime": "00:00:01:00"},
        "S_1_2": {"EmoAnnotation": {"final_mul_emo": "", "final_main_emo": "Fear"}},
    }
    source = read_m3ed(write_m3ed(tmp_path / "m", {"S_1": sentences}), video_root=tmp_path)
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
        "stray spaces",
        "25 or more",
        "zero-length",
    ):
        assert note(source, words)["count"] == 1, words
        assert "annotation.json: S/S_1" in note(source, words)["example"]


def test_m3ed_template_with_utterance_names_whole_files(tmp_path: Path) -> None:
    folder = write_m3ed(tmp_path / "m", {"S_1": {"S_1_1": {}}})
    source = read_m3ed(folder, video_root=tmp_path, video_template="{dialogue}/{utterance}.mp4")
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
    source = read_cped(write_cped(tmp_path / "c.csv", rows), emotion_map=tmp_path / "map.csv")
    assert [s.emotion for s in source.dialogues[0].sentences] == [SAD, HAPPY]


def test_cped_folder_has_the_official_split(tmp_path: Path) -> None:
    for i, name in enumerate(("train", "valid", "test")):
        write_cped(tmp_path / f"{name}_split.csv", [(f"{i}", f"{i}_0", f"{i}_0_0", "甲", "happy", "好")])
    assert [d.split for d in read_cped(tmp_path).dialogues] == ["train", "valid", "test"]


def test_cped_clips_are_a_file_each(tmp_path: Path) -> None:
    file = write_cped(tmp_path / "c.csv", [("1", "1_0", "1_0_0", "甲", "happy", "好")])
    source = read_cped(file, video_root=tmp_path, video_template="{show}/{utterance}.mp4")
    assert source.dialogues[0].sentences[0].clip == Clip(str(tmp_path / "1" / "1_0_0.mp4"))
    with pytest.raises(ConfigError, match=r"data.video_template: .* does not name \{utterance\}"):
        read_cped(file, video_root=tmp_path, video_template="{show}/{dialogue}.mp4")


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
    assert note(source, "unknown key 'backgroud', passed over; did you mean 'background'?")["example"].endswith(
        "d.jsonl:1"
    )
    assert note(source, "without a clip, left out")["example"].endswith("d.jsonl:1: utterance 1")


# --- filters, clips, background ------------------------------------------------------------------------------------


def utterance(speaker: str, text: str, clip: str | None = None) -> Utterance:
    return Utterance(f"{speaker}{text}", speaker, text, NEUTRAL, Clip(clip) if clip else None)


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


def many(n: int = 30) -> Source:
    return Source([talk(f"d{i}", turns=2 + i % 4, show=f"s{i % 3}") for i in range(n)])


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
    found = prepare(with_clips(tmp_path), split="paper", on_missing_clip=rule)
    assert len(found.samples) == left
    assert sum(sample.utterance.clip is None for sample in found.samples) == bare == found.counts["text_only"]
    assert found.counts["dropped"] == ({} if rule == "text_only" else {"clip missing": 3})
    assert sum(audit(found.samples)["clips"][split]["present"] for split in SPLITS) == 27


def test_a_text_only_data_set_misses_nothing() -> None:
    assert prepare(many(), split="dialogue").counts["text_only"] == 0


def test_background_of_a_dialogue_comes_before_that_of_its_show(tmp_path: Path) -> None:
    (tmp_path / "b.json").write_text('{"s0": "剧情", "d3": "自己的", "s9": "没有"}', encoding="utf-8")
    source = many()
    source.dialogues[6] = talk("d6", show="s0", background="记录里的")
    found = prepare(source, split="paper", background=load_background(tmp_path / "b.json"))
    told = {sample.dialogue: sample.background for sample in found.samples}
    assert (told["d0"], told["d3"], told["d6"], told["d1"]) == ("剧情", "自己的", "记录里的", None)
    assert note(source, "no known show")["example"] == "s9"


# --- splits --------------------------------------------------------------------------------------------------------


def test_paper_split_is_over_samples() -> None:
    kept = pairs(merge(raw, None, Notes()) for raw in many(100).dialogues)
    splits = assign(kept, "paper", 0)
    assert Counter(splits) == {"test": 25, "valid": 25, "train": 200}
    assert audit([p.sample(s, text_only=False) for p, s in zip(kept, splits, strict=True)])["shared_dialogues"][
        "train/test"
    ]["dialogues"]


@given(st.lists(st.integers(2, 40), min_size=30, max_size=80), st.integers(0, 9))
def test_dialogue_split_shares_no_dialogue_and_is_about_8_1_1(sizes: list[int], seed: int) -> None:
    kept = [
        Pair(Dialogue(f"d{i}", "s", (utterance("甲", "好"),) * size), at)
        for i, size in enumerate(sizes)
        for at in range(1, size)
    ]
    splits = assign(kept, "dialogue", seed)
    home: dict[str, str] = {}
    for pair, split in zip(kept, splits, strict=True):
        assert home.setdefault(pair.dialogue.id, split) == split
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


# --- file and audit ------------------------------------------------------------------------------------------------

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


@given(st.lists(samples, min_size=1, max_size=3))
def test_samples_survive_the_file_exactly(tmp_path_factory: pytest.TempPathFactory, found: list[Sample]) -> None:
    path = tmp_path_factory.mktemp("s") / "samples.jsonl"
    save_samples(path, found)
    assert load_samples(path) == found
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


# --- the stage -----------------------------------------------------------------------------------------------------


def config(**data: Any) -> Config:
    return Config(data=DataConfig(name="x", **{"split": SplitRule.dialogue, **data}))


def job(folder: Path, upstream: dict[str, Path] | None = None) -> Job:
    return Job(folder, upstream or {}, SimpleNamespace(is_main_process=True))  # type: ignore[arg-type]


def talks(path: Path, n: int = 30, **more: Any) -> Path:
    return write_jsonl(
        path, *({"id": f"d{i}", "utterances": [line("甲", "你好", **more), line("乙", "好")]} for i in range(n))
    )


def test_the_stage_writes_samples_and_audit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    cfg = config(reader=Reader.jsonl, path=str(talks(tmp_path / "d.jsonl")))
    outcome = stage.run(cfg, job(out))
    assert sorted(file.name for file in out.iterdir()) == ["audit.json", "samples.jsonl"]
    assert Counter(s.split for s in load_samples(out / "samples.jsonl")) == outcome.counts["samples"]
    assert json.loads((out / "audit.json").read_text()) == audit(load_samples(out / "samples.jsonl"))
    assert json.loads(json.dumps(outcome.counts)) == outcome.counts
    printed = capsys.readouterr().err
    for words in ("sentences", "with clip", "Neutral", "two_speakers"):
        assert words in printed


def test_the_stage_reads_the_tiny_world_from_bootstrap(tmp_path: Path) -> None:
    (tmp_path / "world").mkdir()
    (tmp_path / "out").mkdir()
    records = [{"id": s, "split": s, "utterances": [line("甲", "你好"), line("乙", "好")]} for s in SPLITS]
    write_jsonl(tmp_path / "world" / "dialogues.jsonl", *records)
    cfg = config(reader=Reader.tiny, split=SplitRule.official)
    assert depends.prepare(cfg).upstream == ("bootstrap/world",)
    assert not depends.prepare(cfg).files
    counts = stage.run(cfg, job(tmp_path / "out", {"bootstrap/world": tmp_path / "world"})).counts
    assert counts["samples"] == dict.fromkeys(SPLITS, 1)


def test_depends_on_contents_and_not_on_places(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    first, second = (config(reader=Reader.jsonl, path=str(talks(tmp_path / name / "d.jsonl"))) for name in "ab")
    assert depends.prepare(first).config == depends.prepare(second).config
    assert depends.prepare(first).seed is None
    assert set(depends.prepare(first).files) == {"data"}
    official = config(reader=Reader.jsonl, path=first.data.path, split=SplitRule.official, split_seed=5)
    assert depends.prepare(official).config["split_seed"] is None
    for changed in ({"split_seed": 1}, {"filters": ["two_speakers"]}, {"on_missing_clip": OnMissingClip.drop}):
        other = config(reader=Reader.jsonl, path=first.data.path, **changed)
        assert depends.prepare(other).config != depends.prepare(first).config, changed


@pytest.mark.parametrize("kind", ["jsonl", "video_root"])
def test_a_clip_that_appears_makes_another_artifact(tmp_path: Path, kind: str) -> None:
    if kind == "jsonl":
        cfg = config(reader=Reader.jsonl, path=str(talks(tmp_path / "d.jsonl", clip="1.mp4")))
    else:
        file = write_cped(tmp_path / "c.csv", [("1", "1_0", "1_0_0", "甲", "happy", "好")])
        cfg = config(reader=Reader.cped, path=str(file), video_root=str(tmp_path), video_template="{utterance}.mp4")
    before = depends.prepare(cfg).config
    assert depends.prepare(cfg).config == before
    (tmp_path / "1.mp4").write_bytes(b"x")
    assert depends.prepare(cfg).config != before


def test_m3ed_depends_on_its_annotation_and_not_on_videos_beside_it(tmp_path: Path) -> None:
    folder = write_m3ed(tmp_path / "m", {"S_1": {"S_1_1": {}}}, train=["S"])
    assert set(depends.prepare(config(reader=Reader.m3ed, path=str(folder))).files) == {"annotation.json", "splitInfo"}
