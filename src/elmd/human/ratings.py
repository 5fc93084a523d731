"""What raters send back: the files that the pages export, checked against the study's key."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elmd.engine.files import read_json
from elmd.errors import DataError
from elmd.human.page import METRICS, SCORES
from elmd.human.study import FORMAT, KEY


@dataclass(frozen=True)
class Ratings:
    """A rater's complete file: score by response id and metric."""

    rater: int
    path: Path
    scores: Mapping[str, Mapping[str, int]]


def read_key(folder: Path) -> dict[str, Any]:
    """The key of the study in `folder`, as `elmd.human.study.write_study` describes it.

    Raises:
        DataError: it is missing, unreadable or no key.
    """
    path = folder / KEY
    try:
        key = read_json(path)
        if key["format"] != FORMAT or not key["raters"] or not key["systems"]:
            raise ValueError(f"format {key['format']!r}")
    except OSError as error:
        fix = "name the folder that `python -m elmd.human sample` made"
        raise DataError(f"cannot be read ({error.strerror})", where=path, fix=fix) from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"is no study's key ({type(error).__name__})", where=path, fix="restore it") from None
    return key


def read_ratings(path: Path, key: Mapping[str, Any]) -> Ratings:
    """A file that a rater exported, checked against the study's key.

    Its checksum shows damage and casual changes; who means to forge a file can compute it.

    Raises:
        DataError: naming the file: unreadable, not such a file, of another study or another rater's responses, a score
            that is none, incomplete (which dialogues, how many scores), changed after the export.
    """
    again = "ask the rater to export again"
    try:
        export = read_json(path)
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})", where=path, fix="check the path") from None
    except ValueError as error:  # also what is not UTF-8
        raise DataError(f"is not JSON ({error})", where=path, fix=again) from None
    if not isinstance(export, dict) or export.get("format") != FORMAT or not isinstance(export.get("ratings"), dict):
        raise DataError("is not a file that a rating page exports", where=path, fix="give the raters' files")
    if export.get("study") != key["study"]:
        fix = "score it with the folder of its own study"
        raise DataError(f"belongs to another study ({export.get('study')!r})", where=path, fix=fix)
    rater = export.get("rater")
    if isinstance(rater, bool) or not isinstance(rater, int) or str(rater) not in key["raters"]:
        raters = ", ".join(key["raters"])
        raise DataError(f"names the rater {rater!r}, and the study has {raters}", where=path, fix=again)
    items = [list(item["responses"]) for item in key["raters"][str(rater)]]
    scores = export["ratings"]
    owner = {id_: number for number, sheet in key["raters"].items() for item in sheet for id_ in item["responses"]}
    for id_, row in scores.items():
        if owner.get(id_) != str(rater):
            whose = f"a response of rater {owner[id_]}" if id_ in owner else f"the unknown response {id_!r}"
            raise DataError(f"rates {whose} as rater {rater}", where=path, fix=again)
        for metric, score in row.items() if isinstance(row, dict) else [("a response", row)]:
            if metric not in METRICS or isinstance(score, bool) or score not in SCORES or not isinstance(score, int):
                allowed = f"{SCORES[0]} to {SCORES[-1]}"
                raise DataError(f"has {score!r} as {metric} of {id_!r}, not {allowed}", where=path, fix=again)
    lacking = {
        number: count
        for number, ids in enumerate(items, start=1)
        if (count := sum(metric not in scores.get(id_, {}) for id_ in ids for metric in METRICS))
    }
    if lacking:
        first = ", ".join(map(str, itertools.islice(lacking, 8))) + (", …" if len(lacking) > 8 else "")
        raise DataError(
            f"is incomplete: {sum(lacking.values())} scores are missing in {len(lacking)} of {len(items)} dialogues "
            f"(number {first} of rater {rater}'s page)",
            where=path,
            fix="let the rater finish and export again",
        )
    if export.get("checksum") != checksum(str(export["study"]), rater, scores):
        raise DataError("has been changed since its export, or is damaged", where=path, fix=again)
    return Ratings(rater, path, scores)


def checksum(study: str, rater: int, scores: Mapping[str, Mapping[str, int]]) -> str:
    """FNV-1a (32 bits, hex) over format, study, rater and the scores by sorted response id: what the page computes."""
    rows = (":".join([id_, *(str(scores[id_].get(metric, 0)) for metric in METRICS)]) for id_ in sorted(scores))
    value = 0x811C9DC5
    for byte in "|".join([FORMAT, study, str(rater), *rows]).encode():
        value = (value ^ byte) * 0x01000193 % 2**32
    return f"{value:08x}"
