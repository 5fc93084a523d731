"""The reader of M3ED [37]: `annotation.json` and the lists of shows in `splitInfo/`. Layout: data/README.md."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from elmd.data.readers.source import (
    ClipTemplate,
    Notes,
    RawDialogue,
    Source,
    clean,
    get,
    in_order,
    label,
    of_kind,
    parse_json,
    read_text,
    suggest,
    unique,
)
from elmd.errors import DataError
from elmd.labels import BY_NAME, Emotion
from elmd.types import Clip, Sentence, Split

FRAMES_PER_SECOND = 25
_LISTS: dict[Split, str] = {
    "train": "movie_list_train.txt",
    "valid": "movie_list_val.txt",
    "test": "movie_list_test.txt",
}


def read_m3ed(path: Path, labels: Mapping[str, Emotion] = BY_NAME, clips: ClipTemplate | None = None) -> Source:
    """Dialogues of a folder with `annotation.json` and, for the official split, `splitInfo/movie_list_*.txt`.

    Args:
        path: the folder.
        labels: the emotion of each label.
        clips: where the videos lie; None: no clips. Times are relative to the dialogue's video; a template with
            {utterance} names a whole file for each sentence instead.

    Raises:
        DataError: with the file and the line, or the show, dialogue and sentence.
    """
    if not path.is_dir():
        raise DataError("no such folder", where=path, fix="give the folder that holds annotation.json and splitInfo/")
    file = path / "annotation.json"
    shows = of_kind(parse_json(read_text(file), file), dict, "the file", str(file))
    if not shows:
        raise DataError("the file holds no dialogue", where=file, fix="download it again")
    splits = _read_splits(path / "splitInfo", shows)
    notes = Notes()
    dialogues = []
    for show in shows:
        where = f"{file}: {show}"
        for dialogue, record in of_kind(shows[show], dict, "a show", where).items():
            place = f"{where}/{dialogue}"
            record = of_kind(record, dict, "a dialogue", place)
            names = _names(get(record, "SpeakerInfo", dict, place), place, notes)
            lines = get(record, "Dialog", dict, place)
            if not lines:
                raise DataError("the dialogue holds no sentence", where=place, fix="delete it")
            ids = list(lines)
            sentences = tuple(
                _sentence(show, dialogue, ids[i], lines[ids[i]], names, labels, clips, f"{place}/{ids[i]}", notes)
                for i in in_order(ids, place, notes)
            )
            dialogues.append(RawDialogue(dialogue, show, sentences, split=splits.get(show)))
    return Source(unique(dialogues, file), notes)


def _names(info: dict[str, Any], where: str, notes: Notes) -> dict[str, str]:
    """Name by letter; speakers who share a name (路人) get their letter after it, so that they are not merged."""
    names = {}
    for letter in info:
        name = of_kind(info[letter], dict, f"speaker {letter!r}", where).get("Name")
        if isinstance(name, str) and name.strip():
            names[letter] = clean(name, "name", f"{where}/SpeakerInfo/{letter}", notes)
        else:
            notes.add("speaker without a name, called by the letter", f"{where}/SpeakerInfo/{letter}")
            names[letter] = letter
    shared = {name for name, count in Counter(names.values()).items() if count > 1}
    if shared:
        notes.add("speakers of one name, distinguished by their letters", where)
    return {letter: f"{name}{letter}" if name in shared else name for letter, name in names.items()}


def _sentence(
    show: str,
    dialogue: str,
    id_: str,
    record: Any,
    names: dict[str, str],
    labels: Mapping[str, Emotion],
    clips: ClipTemplate | None,
    where: str,
    notes: Notes,
) -> Sentence:
    record = of_kind(record, dict, "a sentence", where)
    text = clean(get(record, "Text", str, where), "text", where, notes)
    letter = get(record, "Speaker", str, where)
    if letter.strip() != letter and letter.strip() in names:
        notes.add("white space around a speaker letter, removed", where)
        letter = letter.strip()
    if letter not in names:
        raise DataError(f"speaker {letter!r} is not in SpeakerInfo", where=where, fix=suggest(letter, names))
    emotion = label(_main_label(get(record, "EmoAnnotation", dict, where), where, notes), labels, where)
    start = _seconds(get(record, "StartTime", str, where), "StartTime", where, notes)
    end = _seconds(get(record, "EndTime", str, where), "EndTime", where, notes)
    clip = None
    if end < start:
        notes.add("EndTime before StartTime: text kept, without a clip", where)
    elif end == start:
        notes.add("zero-length span: text kept, without a clip", where)
    elif clips:
        span = (None, None) if clips.per_utterance else (start, end)
        clip = Clip(clips.path(show, dialogue, id_, where), *span)
    return Sentence(id_, names[letter], text, emotion, clip)


def _main_label(votes: dict[str, Any], where: str, notes: Notes) -> str:
    """`final_mul_emo` is one label or a comma list, the main one first; `final_main_emo` where it is blank."""
    emotions = votes.get("final_mul_emo")
    if not isinstance(emotions, str) or not emotions.strip():
        word = get(votes, "final_main_emo", str, where)
        notes.add("no final_mul_emo, final_main_emo taken", where)
    else:
        words = re.split(r"[,，、]", emotions)
        word = words[0]
        if len(words) > 1:
            notes.add("several emotions, the first taken", where)
    if word != word.strip():
        notes.add("white space around an emotion, removed", where)
    return word.strip()


def _seconds(time: str, name: str, where: str, notes: Notes) -> float:
    """Seconds of `HH:MM:SS:FF`, FF being frames at 25 a second (not milliseconds)."""
    match = re.fullmatch(r"\s*(\d+)\s*[:：]\s*(\d+)\s*[:：]\s*(\d+)\s*[:：]\s*(\d+)\s*", time)
    if match is None:
        raise DataError(f"{name} {time!r} is not HH:MM:SS:FF", where=where, fix="write it as 00:01:02:24")
    if not re.fullmatch(r"\d\d:\d\d:\d\d:\d\d", time):
        notes.add("time with spaces or another number of digits, read as intended", where)
    hours, minutes, seconds, frames = (int(part) for part in match.groups())
    if frames >= FRAMES_PER_SECOND:
        notes.add(f"frame number of {FRAMES_PER_SECOND} or more, carried over into the seconds", where)
    if minutes >= 60 or seconds >= 60:
        notes.add("minutes or seconds of 60 or more, carried over", where)
    return (hours * 60 + minutes) * 60 + seconds + frames / FRAMES_PER_SECOND


def _read_splits(folder: Path, shows: dict[str, Any]) -> dict[str, Split]:
    """Split by show; empty where there is no such folder.

    Raises:
        DataError: a list is missing, names a show that the annotation does not hold, or names one twice.
    """
    splits: dict[str, Split] = {}
    if not folder.is_dir():
        return splits
    place_of: dict[str, str] = {}
    for split, name in _LISTS.items():
        file = folder / name
        for line, entry in enumerate(read_text(file).split("\n"), start=1):
            show = entry.strip()
            if not show:
                continue
            place = f"{file}:{line}"
            if show not in shows:
                raise DataError(f"show {show!r} is not in annotation.json", where=place, fix=suggest(show, shows))
            if show in place_of:
                raise DataError(f"show {show!r} is also in {place_of[show]}", where=place, fix="keep it in one list")
            splits[show], place_of[show] = split, f"{file.name}:{line}"
    return splits
