"""What all readers share: the form they return, the record of what they changed, and how they refuse a bad file."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from elmd.engine import files
from elmd.errors import ConfigError, DataError
from elmd.labels import BY_NAME, Emotion
from elmd.types import Sentence, Split

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RawDialogue:
    """A dialogue as the data set holds it: sentences in order, not merged yet (see `elmd.data.turns.merge`)."""

    id: str
    show: str
    sentences: tuple[Sentence, ...]
    background: str | None = None
    split: Split | None = None


class Notes:
    """What was legal but odd and was changed or ignored: how often, and where first."""

    def __init__(self) -> None:
        self._notes: dict[str, tuple[int, str]] = {}

    def add(self, what: str, where: str) -> None:
        count, first = self._notes.get(what, (0, where))
        self._notes[what] = (count + 1, first)

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """`{what: {"count": n, "example": place}}`, JSON-ready."""
        return {what: {"count": count, "example": first} for what, (count, first) in self._notes.items()}


@dataclass(frozen=True, slots=True)
class Source:
    """What a reader returns: dialogues with unique ids, and what the reader noted."""

    dialogues: list[RawDialogue]
    notes: Notes = field(default_factory=Notes)


def suggest(wrong: str, names: Iterable[str], listed_as: str = "known") -> str:
    """The end of an error's `fix`: the nearest of `names`, and the names themselves."""
    names = list(names)
    folded = {name.casefold(): name for name in names}
    near = get_close_matches(wrong.casefold(), folded, n=1, cutoff=0.5)
    shown = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
    return (f"did you mean {folded[near[0]]!r}? " if near else "") + f"{listed_as}: {shown}"


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without its byte order mark.

    Raises:
        DataError: no such file; empty; a Git LFS pointer or web page in its place; not UTF-8 (the line is named).
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise DataError("no such file", where=path, fix="check data.path and the layout in data/README.md") from None
    except OSError as error:
        raise DataError(
            f"cannot be read ({error.strerror})", where=path, fix="give the file that data/README.md names"
        ) from None
    head = raw[:512].lstrip().lower()
    if not raw.strip():
        raise DataError("the file is empty", where=path, fix="download it again")
    if head.startswith(b"version https://git-lfs"):
        raise DataError(
            "this is a Git LFS pointer, not the data", where=f"{path}:1", fix="fetch it with `git lfs pull`"
        )
    if head.removeprefix(b"\xef\xbb\xbf").startswith((b"<!doctype", b"<html", b"<?xml")):
        raise DataError("this is a web page, not the data", where=f"{path}:1", fix="download the raw file instead")
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in raw[:512]:
        raise DataError(
            "the file is UTF-16 (or binary), not UTF-8",
            where=f"{path}:1",
            fix=f"convert it with `iconv -f UTF-16 -t UTF-8 {path.name}`",
        )
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            "the file is not UTF-8 (GBK perhaps)",
            where=f"{path}:{line}",
            fix=f"convert it with `iconv -f GB18030 -t UTF-8 {path.name}`",
        ) from None


def parse_json(text: str, path: Path, line: int | None = None) -> Any:
    """The value of a JSON text; `line` is where the text stands in its file when it is one line of a JSONL file.

    Raises:
        DataError: broken JSON (with the line), or a key twice in one object (with the keys that lead to it).
    """
    try:
        return files.parse_json(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"broken JSON at column {error.colno} ({error.msg}), cut off perhaps",
            where=f"{path}:{line or error.lineno}",
            fix="correct the line or download the file again",
        ) from None
    except files.DuplicateKeyError as error:
        trail = "/".join(error.trail)
        where = f"{path}:{line}" if line else f"{path}: {trail}" if trail else f"{path}"
        raise DataError(
            f"the key {error.key!r} occurs twice in one object", where=where, fix="keep one of them"
        ) from None
    except ValueError:  # nested too deeply, or a number of thousands of digits
        raise DataError(
            "JSON that no data set would hold", where=path, fix="compare it with the layout in data/README.md"
        ) from None


def get(record: dict[str, Any], key: str, kind: type[T], where: str) -> T:
    """`record[key]`, which must be there and be a `kind`.

    Raises:
        DataError: the key is missing or its value is of another type.
    """
    if key not in record:
        raise DataError(f"the key {key!r} is missing", where=where, fix=f"add it; {suggest(key, record, 'the keys')}")
    return of_kind(record[key], kind, f"the value of {key!r}", where)


def of_kind(value: Any, kind: type[T], what: str, where: str) -> T:
    """`value`, which must be a `kind`.

    Raises:
        DataError: it is not.
    """
    if not isinstance(value, kind):
        name = "an object" if kind is dict else "a list" if kind is list else "a text"
        raise DataError(
            f"{what} must be {name}, not {type(value).__name__}",
            where=where,
            fix="compare it with the layout in data/README.md",
        )
    return value


def clean(text: str, what: str, where: str, notes: Notes) -> str:
    """A sentence or name without white space at its ends and without line breaks (those become a space).

    Raises:
        DataError: nothing readable is left, or the text cannot be written as UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"the {what} holds half of a surrogate pair", where=where, fix="replace the broken character"
        ) from None
    if not any(char.isprintable() and not char.isspace() for char in text):
        raise DataError(f"the {what} is blank", where=where, fix=f"give it a {what} or delete the whole sentence")
    if re.search(r"[\r\n\u2028\u2029]", text.strip()):
        notes.add(f"line break inside a {what}, replaced by a space", where)
    elif text != text.strip():
        notes.add(f"white space around a {what}, removed", where)
    return re.sub(r"\s*[\r\n\u2028\u2029]+\s*", " ", text.strip())


def label(word: str, labels: Mapping[str, Emotion], where: str) -> Emotion:
    """The emotion of a data set's label.

    Raises:
        DataError: the data set has no such label; the nearest is named.
    """
    if word not in labels:
        raise DataError(
            f"unknown emotion label {word!r}",
            where=where,
            fix=f"{suggest(word, labels)}; correct it or map it with data.emotion_map",
        )
    return labels[word]


def emotion_table(default: Mapping[str, Emotion], path: Path | None) -> Mapping[str, Emotion]:
    """The emotion of each label: `default`, of which a csv file `label,emotion` (first row: header) replaces some.

    Raises:
        DataError: the file is broken, has no header, names a label twice or an emotion that does not exist.
    """
    if path is None:
        return default
    rows = list(csv.reader(io.StringIO(read_text(path), newline="")))
    if rows[0][-1].strip() in BY_NAME:
        raise DataError("the first row must be a header", where=f"{path}:1", fix="put `label,emotion` above it")
    table: dict[str, Emotion] = {}
    for line, row in enumerate(rows[1:], start=2):
        cells = [cell.strip() for cell in row]
        if not any(cells):
            continue
        if len(cells) != 2 or not cells[0]:
            raise DataError(
                f"{len(cells)} fields where `label,emotion` is expected", where=f"{path}:{line}", fix="correct the row"
            )
        if cells[0] in table:
            raise DataError(
                f"the label {cells[0]!r} is mapped twice", where=f"{path}:{line}", fix="keep one of the rows"
            )
        if cells[1] not in BY_NAME:
            raise DataError(
                f"{cells[1]!r} is none of the seven emotions", where=f"{path}:{line}", fix=suggest(cells[1], BY_NAME)
            )
        table[cells[0]] = BY_NAME[cells[1]]
    return {**default, **table}


def in_order(ids: Sequence[str], where: str, notes: Notes) -> list[int]:
    """Positions of `ids` sorted by their trailing number, which is their order in time (`x_10` follows `x_9`).

    Raises:
        DataError: an id without a number at its end, or two ids with the same one.
    """
    numbers = []
    for name in ids:
        match = re.search(r"\d+$", name)
        if match is None:
            raise DataError(
                f"the id {name!r} does not end in a number, so its place is unknown", where=where, fix="number it"
            )
        numbers.append(int(match.group()))
    order = sorted(range(len(ids)), key=lambda i: numbers[i])
    for a, b in pairwise(order):
        if numbers[a] == numbers[b]:
            raise DataError(
                f"{ids[a]!r} and {ids[b]!r} have the same number", where=where, fix="give each sentence its own"
            )
        if numbers[b] - numbers[a] > 1:
            notes.add("gap in the numbering of sentences, ignored", f"{where}: between {ids[a]} and {ids[b]}")
    if order != list(range(len(ids))):
        notes.add("sentences not in the order of their numbers, sorted", where)
    return order


def unique(dialogues: list[RawDialogue], path: Path) -> list[RawDialogue]:
    """`dialogues`, at least one, each with an id of its own.

    Raises:
        DataError: there is none, or an id occurs twice.
    """
    if not dialogues:
        raise DataError("the file holds no dialogue", where=path, fix="compare it with the layout in data/README.md")
    show_of: dict[str, str] = {}
    for dialogue in dialogues:
        if dialogue.id in show_of:
            raise DataError(
                f"the dialogue id {dialogue.id!r} occurs in {show_of[dialogue.id]!r} and in {dialogue.show!r}",
                where=path,
                fix="give each dialogue its own id",
            )
        show_of[dialogue.id] = dialogue.show
    return dialogues


class ClipTemplate:
    """Where the clips of a data set lie: `root` and a relative path with {show}, {dialogue} and {utterance}.

    Raises:
        ConfigError: the root is no folder, the template holds other fields or leads out of the root.
    """

    _FIELD = re.compile(r"\{(show|dialogue|utterance)\}")

    def __init__(self, root: Path, template: str):
        if not root.is_dir():
            raise ConfigError(f"no such folder: {root}", where="data.video_root", fix="give the folder of the videos")
        if re.search(r"[{}]", self._FIELD.sub("", template)):
            raise ConfigError(
                f"{template!r} holds a field that does not exist",
                where="data.video_template",
                fix="use {show}, {dialogue} and {utterance}",
            )
        if Path(template).is_absolute() or ".." in Path(template).parts:
            raise ConfigError(
                f"{template!r} leads out of data.video_root", where="data.video_template", fix="make it relative to it"
            )
        self.root, self.template = root.resolve(), template
        #: Whether each sentence has a file of its own, so that times within the dialogue's video do not apply.
        self.per_utterance = "{utterance}" in template

    def path(self, show: str, dialogue: str, utterance: str, where: str) -> str:
        """The absolute path of a sentence's video, whether it exists or not.

        Raises:
            DataError: an id is no plain file name, so that it could lead out of the root.
        """
        values = {"show": show, "dialogue": dialogue, "utterance": utterance}
        for match in self._FIELD.finditer(self.template):
            value = values[match.group(1)]
            if value in ("", ".", "..") or re.search(r"[/\\\0]", value):
                raise DataError(
                    f"{match.group(1)} id {value!r} cannot be part of a path below data.video_root",
                    where=where,
                    fix="rename it, or leave it out of data.video_template",
                )
        return str(self.root / self._FIELD.sub(lambda match: values[match.group(1)], self.template))


def load_background(path: Path) -> dict[str, str]:
    """A JSON object of show or dialogue id -> text (what happened before; part B of the prompt).

    Raises:
        DataError: broken JSON, a text that is no text, or a blank one.
    """
    texts = of_kind(parse_json(read_text(path), path), dict, "the file", str(path))
    notes = Notes()
    return {key: clean(get(texts, key, str, f"{path}: {key}"), "background", f"{path}: {key}", notes) for key in texts}
