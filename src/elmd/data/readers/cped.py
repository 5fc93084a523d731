"""The reader of CPED: csv files, one sentence a row. Layout: data/README.md."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from pathlib import Path

from elmd.data.readers.source import (
    ClipTemplate,
    Notes,
    RawDialogue,
    Source,
    clean,
    in_order,
    label,
    read_text,
    suggest,
    unique,
)
from elmd.errors import ConfigError, DataError
from elmd.labels import Emotion
from elmd.types import Clip, Sentence, Split

#: CPED's 13 emotions as M3ED's seven. It keeps CPED's own column Sentiment apart (positive: Happy; neutral: Neutral;
#: negative: the other five); `negative-other`, `worried`, `relaxed` and `positive-other` are judgement calls, ours.
EMOTION_MAP: dict[str, Emotion] = {
    "happy": Emotion.HAPPY,
    "grateful": Emotion.HAPPY,
    "relaxed": Emotion.HAPPY,
    "positive-other": Emotion.HAPPY,
    "neutral": Emotion.NEUTRAL,
    "anger": Emotion.ANGER,
    "sadness": Emotion.SAD,
    "depress": Emotion.SAD,
    "disgust": Emotion.DISGUST,
    "negative-other": Emotion.DISGUST,
    "fear": Emotion.FEAR,
    "worried": Emotion.FEAR,
    "astonished": Emotion.SURPRISE,
}

COLUMNS = ("TV_ID", "Dialogue_ID", "Utterance_ID", "Speaker", "Emotion", "Utterance")
#: The files of CPED's official split.
FILES: dict[Split, str] = {"train": "train_split.csv", "valid": "valid_split.csv", "test": "test_split.csv"}


def read_cped(path: Path, labels: Mapping[str, Emotion] = EMOTION_MAP, clips: ClipTemplate | None = None) -> Source:
    """Dialogues of one csv file, or of a folder with all three (then each has its official split).

    Args:
        path: the csv file, or the folder with train_split.csv, valid_split.csv and test_split.csv.
        labels: the emotion of each label.
        clips: where the clips lie, a file for each sentence; None: no clips.

    Raises:
        DataError: with the file and line.
        ConfigError: the template of the clips does not name {utterance}.
    """
    if clips and not clips.per_utterance:
        raise ConfigError(
            f"{clips.template!r} does not name {{utterance}}, and CPED has no times within a longer video",
            where="data.video_template",
            fix="use a clip per sentence, such as {dialogue}/{utterance}.mp4",
        )
    notes = Notes()
    if path.is_dir():
        dialogues = []
        for split, name in FILES.items():
            dialogues += _read_file(path / name, split, labels, clips, notes)
    else:
        dialogues = _read_file(path, None, labels, clips, notes)
    return Source(unique(dialogues, path), notes)


def _read_file(
    path: Path, split: Split | None, labels: Mapping[str, Emotion], clips: ClipTemplate | None, notes: Notes
) -> list[RawDialogue]:
    shows: dict[str, str] = {}
    sentences: dict[str, list[Sentence]] = {}
    place_of: dict[str, str] = {}
    for place, row in _rows(path):
        show, dialogue, id_ = (row[name].strip() for name in COLUMNS[:3])
        if not (show and dialogue and id_):
            raise DataError("a blank TV_ID, Dialogue_ID or Utterance_ID", where=place, fix="fill it in")
        if shows.setdefault(dialogue, show) != show:
            raise DataError(
                f"dialogue {dialogue!r} belongs to TV_ID {shows[dialogue]!r} and {show!r}",
                where=place,
                fix="correct one of them",
            )
        if id_ in place_of:
            raise DataError(
                f"utterance {id_!r} is also at {place_of[id_]}", where=place, fix="delete or renumber one of them"
            )
        place_of[id_] = place
        if dialogue in sentences and next(reversed(sentences)) != dialogue:
            notes.add("rows of one dialogue in different places, put together", place)
        speaker = clean(row["Speaker"], "speaker", place, notes)
        if speaker == "其他":
            notes.add("speaker 其他 (may be different people), taken as one speaker", place)
        sentences.setdefault(dialogue, []).append(
            Sentence(
                id_,
                speaker,
                clean(row["Utterance"], "text", place, notes),
                label(row["Emotion"].strip(), labels, place),
                Clip(clips.path(show, dialogue, id_, place)) if clips else None,
            )
        )
    dialogues = []
    for dialogue, lines in sentences.items():
        order = in_order([line.id for line in lines], f"{path}: {dialogue}", notes)
        dialogues.append(RawDialogue(dialogue, shows[dialogue], tuple(lines[i] for i in order), split=split))
    return unique(dialogues, path)


def _rows(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Rows by column name, each with its place `file:line` (the line on which the row ends)."""
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    begins = 1
    try:
        header = [name.strip() for name in next(reader)]
        _check_header(header, path)
        begins = reader.line_num + 1
        for row in reader:
            place = f"{path}:{reader.line_num}"
            if row and len(row) != len(header):
                raise DataError(
                    f"{len(row)} fields, but the header names {len(header)}",
                    where=place,
                    fix="quote texts that hold commas or line breaks, and close every quote",
                )
            if row:
                yield place, dict(zip(header, row, strict=True))
            begins = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"the row that begins here is not valid csv ({error})",
            where=f"{path}:{begins}",
            fix="close or double its quotes",
        ) from None


def _check_header(header: list[str], path: Path) -> None:
    where = f"{path}:1"
    missing = [name for name in COLUMNS if name not in header]
    if not missing:
        if len(set(header)) < len(header):
            raise DataError("a column name occurs twice", where=where, fix="rename one of them")
        return
    for delimiter, name in (("\t", "tabs"), (";", "semicolons")):
        if len(header) == 1 and delimiter in header[0]:
            raise DataError(f"the fields are separated by {name}, not commas", where=where, fix="save it as comma csv")
    raise DataError(
        f"the column {missing[0]!r} is missing"
        if len(missing) == 1
        else f"the columns {', '.join(missing)} are missing",
        where=where,
        fix=f"name it in the first row; {suggest(missing[0], header, 'the columns')}",
    )
