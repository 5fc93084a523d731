"""Good data sets in each form, the ways to make them bad, and what is said of each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from elmd.data.readers.cped import COLUMNS

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
HTML = "<!DOCTYPE html>\n<html><body>404</body></html>\n"


# --- good data sets, and the ways to spoil them --------------------------------------------------------------------


def m3ed(folder: Path) -> Path:
    """Thirty dialogues of two sentences in three shows, one for each official split."""
    shows: dict[str, Any] = {}
    for i in range(30):
        show = f"show{i % 3}"
        shows.setdefault(show, {})[f"{show}_{i}"] = {
            "SpeakerInfo": {letter: {"Name": name} for letter, name in zip("AB", "甲乙", strict=True)},
            "Dialog": {
                f"{show}_{i}_{j}": {
                    "StartTime": f"00:00:0{j}:00",
                    "EndTime": f"00:00:0{j}:20",
                    "Text": f"第{i}句",
                    "Speaker": "AB"[j - 1],
                    "EmoAnnotation": {"final_mul_emo": "Happy", "final_main_emo": "Happy"},
                }
                for j in (1, 2)
            },
        }
    (folder / "splitInfo").mkdir(parents=True)
    (folder / "annotation.json").write_text(json.dumps(shows, ensure_ascii=False, indent=1), encoding="utf-8")
    for i, name in enumerate(("train", "val", "test")):
        (folder / "splitInfo" / f"movie_list_{name}.txt").write_text(f"show{i}")
    return folder


def cped(path: Path) -> Path:
    rows = [f"1,1_{i:03},1_{i:03}_{j:03},{'甲乙'[j]},happy,第{i}句" for i in range(30) for j in range(2)]
    path.write_text("\n".join([",".join(COLUMNS), *rows, ""]), encoding="utf-8-sig")
    return path


def jsonl(path: Path, **changes: Any) -> Path:
    """Thirty dialogues; `changes` go into the second utterance of the fourth."""
    records = []
    for i in range(30):
        lines = [{"speaker": speaker, "text": "好", "emotion": "Happy"} for speaker in "甲乙"]
        if i == 3:
            lines[1] = {key: value for key, value in {**lines[1], **changes}.items() if value is not ...}
        records.append({"id": f"d{i}", "utterances": lines})
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


def edit(file: Path, old: str, new: str, encoding: str = "utf-8") -> None:
    text = file.read_text(encoding="utf-8" if encoding == "utf-8" else "utf-8-sig")
    assert old in text, f"the case spoils nothing: {old!r} is not in {file}"
    file.write_bytes(text.replace(old, new, 1).encode(encoding))


Make = Callable[[Path], tuple[str, Path]]


def annotation(old: str, new: str) -> Make:
    def make(folder: Path) -> tuple[str, Path]:
        edit(m3ed(folder / "m3ed") / "annotation.json", old, new)
        return "m3ed", folder / "m3ed"

    return make


def shows(name: str, text: str) -> Make:
    def make(folder: Path) -> tuple[str, Path]:
        (m3ed(folder / "m3ed") / "splitInfo" / f"movie_list_{name}.txt").write_text(text)
        return "m3ed", folder / "m3ed"

    return make


def table(old: str, new: str, encoding: str = "utf-8") -> Make:
    def make(folder: Path) -> tuple[str, Path]:
        edit(cped(folder / "cped.csv"), old, new, encoding)
        return "cped", folder / "cped.csv"

    return make


def whole(reader: str, text: str) -> Make:
    """The data file replaced by `text`."""

    def make(folder: Path) -> tuple[str, Path]:
        if reader == "m3ed":
            (m3ed(folder / "m3ed") / "annotation.json").write_text(text, encoding="utf-8")
            return reader, folder / "m3ed"
        (folder / "data").write_text(text, encoding="utf-8")
        return reader, folder / "data"

    return make


def lines(**changes: Any) -> Make:
    return lambda folder: ("jsonl", jsonl(folder / "d.jsonl", **changes))


def line(old: str, new: str) -> Make:
    def make(folder: Path) -> tuple[str, Path]:
        edit(jsonl(folder / "d.jsonl"), old, new)
        return "jsonl", folder / "d.jsonl"

    return make


def tabs(folder: Path) -> tuple[str, Path]:
    file = cped(folder / "cped.csv")
    file.write_text(file.read_text(encoding="utf-8").replace(",", "\t"), encoding="utf-8")
    return "cped", file


def cut_off(folder: Path) -> tuple[str, Path]:
    file = m3ed(folder / "m3ed") / "annotation.json"
    file.write_bytes(file.read_bytes()[:-3000])
    return "m3ed", folder / "m3ed"


def linked_out(folder: Path) -> tuple[str, Path]:
    (folder / "data").mkdir()
    (folder / "secret.mp4").touch()
    (folder / "data" / "1.mp4").symlink_to(folder / "secret.mp4")
    return "jsonl", jsonl(folder / "data" / "d.jsonl", clip="1.mp4")


FIRST = r"annotation\.json: show0/show0_0/show0_0_1: "
FOURTH = r"d\.jsonl:4: utterance 2: "
CSV_LINE_2 = "1_000_000,甲,happy,第0句"

CASES: dict[str, tuple[Make, str]] = {
    # M3ED
    "m3ed, cut off": (
        cut_off,
        r"annotation\.json:\d{3}: broken JSON at column \d+ \(.*\), cut off perhaps; correct the line or",
    ),
    "m3ed, key twice": (
        annotation('"Text": "第0句",', '"Text": "第0句", "Text": "又一句",'),
        r"annotation\.json: show0/show0_0/Dialog/show0_0_1: the key 'Text' occurs twice",
    ),
    "m3ed, sentence id twice": (
        annotation('"show0_0_2"', '"show0_0_1"'),
        r"annotation\.json: show0/show0_0/Dialog: the key 'show0_0_1' occurs twice",
    ),
    "m3ed, misspelt label": (
        annotation('"final_mul_emo": "Happy"', '"final_mul_emo": "Hapy"'),
        FIRST + r"unknown emotion label 'Hapy'; did you mean 'Happy'\?",
    ),
    "m3ed, unknown label": (
        annotation('"final_mul_emo": "Happy"', '"final_mul_emo": "??"'),
        FIRST + r"unknown emotion label '\?\?'; known: Happy, Surprise",
    ),
    "m3ed, unknown speaker": (
        annotation('"Speaker": "A"', '"Speaker": "C"'),
        FIRST + "speaker 'C' is not in SpeakerInfo; known: A, B",
    ),
    "m3ed, blank text": (annotation('"Text": "第0句"', '"Text": " \\u200b"'), FIRST + "the text is blank"),
    "m3ed, half a character": (
        annotation('"Text": "第0句"', '"Text": "\\ud83d"'),
        FIRST + "the text holds half of a surrogate",
    ),
    "m3ed, key missing": (
        annotation('"Speaker": "A"', '"speeker": "A"'),
        FIRST + "the key 'Speaker' is missing; add it; did you mean 'speeker'",
    ),
    "m3ed, no time": (
        annotation('"00:00:01:00"', '"00:00:01.5"'),
        FIRST + r"StartTime '00:00:01.5' is not HH:MM:SS:FF",
    ),
    "m3ed, id without number": (
        annotation('"show0_0_2"', '"show0_0_x"'),
        r"show0/show0_0: the id 'show0_0_x' does not end in a number",
    ),
    "m3ed, same number": (
        annotation('"show0_0_2"', '"show0_0_01"'),
        "'show0_0_1' and 'show0_0_01' have the same number",
    ),
    "m3ed, dialogue in two shows": (
        annotation('"show1_1"', '"show0_0"'),
        "the dialogue id 'show0_0' occurs in 'show0' and in 'show1'",
    ),
    "m3ed, a list for an object": (whole("m3ed", "[]"), r"annotation\.json: the file must be an object, not list"),
    "m3ed, no dialogue": (whole("m3ed", "{}"), r"annotation\.json: the file holds no dialogue"),
    "m3ed, LFS pointer": (whole("m3ed", LFS), r"annotation\.json:1: this is a Git LFS pointer.*git lfs pull"),
    "m3ed, web page": (whole("m3ed", HTML), r"annotation\.json:1: this is a web page, not the data"),
    "m3ed, empty": (whole("m3ed", ""), r"annotation\.json: the file is empty"),
    "m3ed, unknown show in a list": (
        shows("val", "show1\nshov2"),
        r"movie_list_val\.txt:2: show 'shov2' is not in annotation\.json; did you mean 'show2'\?",
    ),
    "m3ed, show in two lists": (
        shows("test", "show2\n\nshow0\n"),
        r"movie_list_test\.txt:3: show 'show0' is also in movie_list_train\.txt:1; keep it in one list",
    ),
    # CPED
    "cped, misspelt label": (
        table("happy", "hapy"),
        r"cped\.csv:2: unknown emotion label 'hapy'; did you mean 'happy'\?",
    ),
    "cped, blank text": (table(CSV_LINE_2, '1_000_000,甲,happy,"  "'), r"cped\.csv:2: the text is blank"),
    "cped, blank speaker": (table(CSV_LINE_2, "1_000_000,,happy,好"), r"cped\.csv:2: the speaker is blank"),
    "cped, blank id": (table("1_000_001", ""), r"cped\.csv:3: a blank TV_ID, Dialogue_ID or Utterance_ID"),
    "cped, id twice": (
        table("1_000_001", "1_000_000"),
        r"cped\.csv:3: utterance '1_000_000' is also at .*cped\.csv:2;",
    ),
    "cped, dialogue in two shows": (
        table("\n1,1_000,1_000_001", "\n2,1_000,1_000_001"),
        r"cped\.csv:3: dialogue '1_000' belongs to TV_ID '1' and '2'",
    ),
    "cped, column missing": (
        table("Utterance\n", "Uterance\n"),
        r"cped\.csv:1: the column 'Utterance' is missing; .*did you mean 'Uterance'\?",
    ),
    "cped, tabs": (tabs, r"cped\.csv:1: the fields are separated by tabs, not commas"),
    "cped, ragged": (table("第1句", "第1句，真的,真的"), r"cped\.csv:4: 7 fields, but the header names 6; quote texts"),
    "cped, open quote": (table("第1句", '"第1句'), r"cped\.csv:4: the row that begins here is not valid csv"),
    "cped, GBK": (
        table("第0句", "第0句", "gbk"),
        r"cped\.csv:\d+: the file is not UTF-8 \(GBK perhaps\); convert it with `iconv -f GB18030",
    ),
    "cped, UTF-16": (
        table("第0句", "第0句", "utf-16"),
        r"cped\.csv:1: the file is UTF-16 \(or binary\), not UTF-8; convert it with",
    ),
    "cped, header only": (whole("cped", ",".join(COLUMNS) + "\n"), "data: the file holds no dialogue"),
    "cped, LFS pointer": (whole("cped", LFS), "data:1: this is a Git LFS pointer, not the data"),
    "cped, web page": (whole("cped", HTML), "data:1: this is a web page, not the data"),
    # JSONL
    "jsonl, cut off": (whole("jsonl", '{"id": "a",\n'), r"data:1: broken JSON at column \d+"),
    "jsonl, key twice": (
        line('"text": "好"', '"text": "好", "text": "不"'),
        r"d\.jsonl:1: the key 'text' occurs twice",
    ),
    "jsonl, dialogue twice": (line('"d4"', '"d1"'), r"d\.jsonl:5: the dialogue id 'd1' is also on line 2"),
    "jsonl, misspelt label": (
        lines(emotion="happy"),
        FOURTH + r"unknown emotion label 'happy'; did you mean 'Happy'\?",
    ),
    "jsonl, blank text": (lines(text=" "), FOURTH + "the text is blank"),
    "jsonl, key missing": (lines(speaker=...), FOURTH + "the key 'speaker' is missing"),
    "jsonl, no text": (lines(text=3), FOURTH + "the value of 'text' must be a text, not int"),
    "jsonl, end before start": (lines(clip="1.mp4", start=2, end=1.5), FOURTH + r"end 1.5 lies before start 2.0"),
    "jsonl, no number": (
        lines(clip="1.mp4", start=float("nan")),
        FOURTH + "'start' must be seconds from the start of the clip, not nan",
    ),
    "jsonl, negative time": (lines(clip="1.mp4", start=-1), FOURTH + "'start' must be seconds"),
    "jsonl, tags": (lines(tags="x"), FOURTH + "'tags' must be a list of texts"),
    "jsonl, path with ..": (lines(clip="../1.mp4"), FOURTH + r"clip '../1.mp4' does not lie inside the data's folder"),
    "jsonl, absolute path": (lines(features="/etc/passwd"), FOURTH + "features '/etc/passwd' does not lie inside"),
    "jsonl, backslashes": (lines(clip="..\\1.mp4"), FOURTH + "clip .* does not lie inside"),
    "jsonl, link to outside": (linked_out, FOURTH + "clip '1.mp4' does not lie inside"),
    "jsonl, unknown split": (
        line('"id": "d0"', '"id": "d0", "split": "val"'),
        r"d\.jsonl:1: unknown split 'val'; did you mean 'valid'\?",
    ),
    "jsonl, clip missing": (
        lines(clip="1.mp4"),
        r"data.on_missing_clip: the clip of u is missing for 30 of 30 samples, first: d0#1 \(names none\), d1#1",
    ),
    "jsonl, empty": (whole("jsonl", "\n \n"), "data: the file is empty"),
    "jsonl, web page": (whole("jsonl", HTML), "data:1: this is a web page"),
}
