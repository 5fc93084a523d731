"""Made-up dialogues, as objects and in the files of each data set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from elmd.data.readers.cped import COLUMNS
from elmd.data.readers.source import RawDialogue, Source
from elmd.labels import Emotion
from elmd.types import Clip, Sentence, Utterance

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
    """The only note of a source that holds `words`."""
    matches = [value for what, value in source.notes.as_dict().items() if words in what]
    assert len(matches) == 1, source.notes.as_dict()
    return matches[0]


def utterance(speaker: str, text: str, clip: str | None = None) -> Utterance:
    return Utterance(f"{speaker}{text}", speaker, text, NEUTRAL, Clip(clip) if clip else None)


def many(n: int = 30) -> Source:
    return Source([talk(f"d{i}", turns=2 + i % 4, show=f"s{i % 3}") for i in range(n)])
