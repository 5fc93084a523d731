"""The reader of one's own data: a JSONL file, one dialogue a line; data/README.md describes every field."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from elmd.data.readers.source import (
    ClipTemplate,
    Notes,
    RawDialogue,
    Source,
    clean,
    get,
    label,
    of_kind,
    parse_json,
    read_text,
    suggest,
    unique,
)
from elmd.errors import DataError
from elmd.labels import BY_NAME, Emotion
from elmd.types import SPLITS, Clip, Sentence

DIALOGUE_KEYS = ("id", "show", "split", "background", "utterances")
UTTERANCE_KEYS = ("id", "speaker", "text", "emotion", "clip", "start", "end", "features", "tags")


def read_jsonl(path: Path, labels: Mapping[str, Emotion] = BY_NAME, clips: ClipTemplate | None = None) -> Source:
    """Dialogues of a JSONL file; clips and features are named relative to its folder and must lie in it.

    Args:
        path: the file.
        labels: the emotion of each label.
        clips: not used: the file names its clips.

    Raises:
        DataError: with the file and line, and the utterance's position in it.
    """
    notes = Notes()
    dialogues = []
    line_of: dict[str, int] = {}
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        record = of_kind(parse_json(line, path, number), dict, "a line", where)
        dialogue = _dialogue(record, labels, path.parent, where, notes)
        if dialogue.id in line_of:
            raise DataError(
                f"the dialogue id {dialogue.id!r} is also on line {line_of[dialogue.id]}",
                where=where,
                fix="give each dialogue its own id",
            )
        line_of[dialogue.id] = number
        dialogues.append(dialogue)
    return Source(unique(dialogues, path), notes)


def media_files(path: Path) -> list[Path]:
    """Clips and features that a JSONL file names, sorted. Broken lines are skipped; `read_jsonl` refuses them."""
    named = set()
    for line in path.read_text("utf-8-sig", errors="replace").split("\n") if path.is_file() else ():
        try:
            utterances = json.loads(line)["utterances"]
            named |= {path.parent / u[key] for u in utterances for key in ("clip", "features") if u.get(key)}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
    return sorted(named)


def _dialogue(
    record: dict[str, Any], labels: Mapping[str, Emotion], folder: Path, where: str, notes: Notes
) -> RawDialogue:
    _note_unknown_keys(record, DIALOGUE_KEYS, where, notes)
    id_ = clean(get(record, "id", str, where), "id", where, notes)
    split = record.get("split")
    if split is not None and split not in SPLITS:
        raise DataError(f"unknown split {split!r}", where=where, fix=suggest(str(split), SPLITS))
    utterances = get(record, "utterances", list, where)
    if not utterances:
        raise DataError("the dialogue holds no utterance", where=where, fix="delete the line")
    sentences = []
    ids: set[str] = set()
    for i, item in enumerate(utterances, start=1):
        place = f"{where}: utterance {i}"
        sentence = _sentence(of_kind(item, dict, "an utterance", place), f"{id_}_{i}", labels, folder, place, notes)
        if sentence.id in ids:
            raise DataError(f"the utterance id {sentence.id!r} occurs twice", where=place, fix="give it its own")
        ids.add(sentence.id)
        sentences.append(sentence)
    show = of_kind(record.get("show") or "", str, "the value of 'show'", where)
    background = record.get("background")
    if background is not None:
        background = clean(get(record, "background", str, where), "background", where, notes)
    return RawDialogue(id_, show, tuple(sentences), background, split)


def _sentence(
    record: dict[str, Any], default_id: str, labels: Mapping[str, Emotion], folder: Path, where: str, notes: Notes
) -> Sentence:
    _note_unknown_keys(record, UTTERANCE_KEYS, where, notes)
    tags = record.get("tags") or []
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise DataError("'tags' must be a list of texts", where=where, fix='write it as ["tag"]')
    return Sentence(
        id=clean(get(record, "id", str, where), "id", where, notes) if record.get("id") is not None else default_id,
        speaker=clean(get(record, "speaker", str, where), "speaker", where, notes),
        text=clean(get(record, "text", str, where), "text", where, notes),
        emotion=label(get(record, "emotion", str, where).strip(), labels, where),
        clip=_clip(record, folder, where, notes),
        features=_inside(folder, record, "features", where),
        tags=tuple(tags),
    )


def _clip(record: dict[str, Any], folder: Path, where: str, notes: Notes) -> Clip | None:
    path = _inside(folder, record, "clip", where)
    start, end = (_time(record, key, where) for key in ("start", "end"))
    if start is not None and end is not None and end < start:
        raise DataError(f"end {end} lies before start {start}", where=where, fix="swap or correct them")
    if path is None:
        if start is not None or end is not None:
            notes.add("start or end without a clip, ignored", where)
        return None
    if end is not None and end == (start or 0.0):
        notes.add("zero-length span: text kept, without a clip", where)
        return None
    return Clip(path, start, end)


def _time(record: dict[str, Any], key: str, where: str) -> float | None:
    value = record.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise DataError(
            f"{key!r} must be seconds from the start of the clip, not {value!r}", where=where, fix="correct it"
        )
    return float(value)


def _inside(folder: Path, record: dict[str, Any], key: str, where: str) -> str | None:
    """The absolute path of a file named relative to `folder`; it may be missing, but must not lie outside."""
    if record.get(key) is None:
        return None
    name = get(record, key, str, where)
    root = folder.resolve()
    parts = PurePosixPath(name.replace("\\", "/"))
    inside = bool(name.strip()) and "\0" not in name and not parts.is_absolute() and ".." not in parts.parts
    if inside:
        inside = (root / name).resolve().is_relative_to(root)  # a link inside may lead outside
    if not inside:
        raise DataError(
            f"{key} {name!r} does not lie inside the data's folder",
            where=where,
            fix="name it relative to the JSONL file",
        )
    return str(root / name)


def _note_unknown_keys(record: dict[str, Any], keys: tuple[str, ...], where: str, notes: Notes) -> None:
    for key in record:
        if key not in keys:
            notes.add(f"unknown key {key!r}, ignored; {suggest(key, keys)}", where)
