"""Predictions files: JSONL, one response of a system beside the reference per line.

`id`, `hypothesis` and `reference` are required; `demonstration`, `gold_emotion`, `predicted_emotion`, `seed` and `tags`
are read where they stand; anything else (prompt parts) is kept.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from elmd.engine.files import DuplicateKeyError, parse_json, write_lines
from elmd.errors import DataError
from elmd.labels import Emotion

REQUIRED = ("id", "hypothesis", "reference")


@dataclass(frozen=True, slots=True)
class Prediction:
    """One generated response (emotion word split off) beside the reference.

    Attributes:
        id: sample id; unique per `seed`.
        demonstration: the nearest retrieved response r', None where the prompt had none.
        gold_emotion: emotion of the reference. predicted_emotion: None where the model named none.
        seed: decode seed; None where only one decoding exists.
        tags: free words to report by subset.
        extra: everything else the line holds, e.g. `{"prompt": {...}}`.
    """

    id: str
    hypothesis: str
    reference: str
    demonstration: str | None = None
    gold_emotion: Emotion | None = None
    predicted_emotion: Emotion | None = None
    seed: int | None = None
    tags: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)


def write_predictions(path: Path, predictions: Sequence[Prediction]) -> None:
    """Write one JSON object per line, atomically. Optional fields that say nothing are left out."""
    lines = []
    for p in predictions:
        line: dict[str, Any] = {"id": p.id, "hypothesis": p.hypothesis, "reference": p.reference}
        for name in ("demonstration", "gold_emotion", "predicted_emotion", "seed"):
            if (value := getattr(p, name)) is not None:
                line[name] = value
        if p.tags:
            line["tags"] = list(p.tags)
        lines.append(line | dict(p.extra))
    write_lines(path, lines)


def read_predictions(path: Path) -> list[Prediction]:
    """Read a predictions file; blank lines, CRLF and a byte order mark are accepted.

    Raises:
        DataError: naming `path:line`: not JSON, not UTF-8, a missing key, a wrong type, an unknown emotion, an empty
            reference, an id twice; or the file: unreadable, no prediction in it, seeds that cover different samples.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})", where=path, fix="check the path") from None
    predictions: list[Prediction] = []
    seen: dict[tuple[str, int | None], int] = {}
    for number, raw in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not raw.strip():
            continue
        where = f"{path}:{number}"
        prediction = _prediction(raw, where)
        key = (prediction.id, prediction.seed)
        if key in seen:
            again = f"id {prediction.id!r}" + (f" with seed {prediction.seed}" if prediction.seed is not None else "")
            raise DataError(f"{again} occurs again", where=where, fix=f"it is first in line {seen[key]}; keep one")
        seen[key] = number
        predictions.append(prediction)
    if not predictions:
        raise DataError("holds no predictions", where=path, fix="each line must be one JSON object")
    by_seed_of(predictions, str(path))
    return predictions


def by_seed_of(predictions: Sequence[Prediction], where: str) -> dict[int | None, list[Prediction]]:
    """Predictions of each decode seed, all in the order of the first seed's samples.

    Raises:
        DataError: none there, a sample twice, or seeds that cover different samples; `where` is named.
    """
    by_seed: dict[int | None, dict[str, Prediction]] = {}
    for p in predictions:
        rows = by_seed.setdefault(p.seed, {})
        if p.id in rows:
            raise DataError(f"id {p.id!r} occurs twice with seed {p.seed}", where=where, fix="keep one of them")
        rows[p.id] = p
    if not by_seed:
        raise DataError("no predictions to score", where=where, fix="check what was generated")
    (first, order), *_ = by_seed.items()
    for seed, rows in by_seed.items():
        if odd := sorted(order.keys() ^ rows.keys()):
            what = f"seeds {first} and {seed} do not cover the same samples ({len(odd)} differ, e.g. {odd[0]!r})"
            raise DataError(what, where=where, fix="generate the missing ones, or give every line a seed")
        for id_, p in rows.items():
            if (p.reference, p.gold_emotion) != (order[id_].reference, order[id_].gold_emotion):
                what = f"id {id_!r} has another reference or gold emotion with seed {seed} than with seed {first}"
                raise DataError(what, where=where, fix="score runs on the same data")
    return {seed: [rows[id_] for id_ in order] for seed, rows in by_seed.items()}


def references_of(predictions: Sequence[Prediction]) -> dict[str, str]:
    """The reference of each sample, by id."""
    return {p.id: p.reference for p in predictions}


def check_same(first: dict[str, str], second: dict[str, str], name: str, other: str) -> None:
    """Refuse two sets of references that are not the same, naming how many and the first id that differs.

    Raises:
        DataError: they differ.
    """
    if alone := sorted(first.keys() ^ second.keys()):
        what = f"{name} and {other} were not run on the same samples ({len(alone)} are in one only, e.g. {alone[0]!r})"
        raise DataError(what, fix="score them on one split of one data set")
    if odd := sorted(id_ for id_ in first if first[id_] != second[id_]):
        what = f"{name} and {other} have different references for {len(odd)} samples, e.g. {odd[0]!r}"
        raise DataError(what, fix="score them on one split of one data set, letter by letter")


def _prediction(raw: bytes, where: str) -> Prediction:
    try:
        line = parse_json(raw.decode("utf-8"))
    except UnicodeDecodeError:
        raise DataError("is not UTF-8", where=where, fix="save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        fix = "each line must be one whole JSON object"
        raise DataError(f"is not JSON ({error.msg} at column {error.colno})", where=where, fix=fix) from None
    except DuplicateKeyError as error:
        raise DataError(f"holds the key {error.key!r} twice", where=where, fix="keep one of them") from None
    if not isinstance(line, dict):
        raise DataError(f"is a JSON {type(line).__name__}, not an object", where=where, fix='write {"id": ..., ...}')
    if missing := [key for key in REQUIRED if key not in line]:
        fix = f"every prediction needs {', '.join(REQUIRED)}"
        raise DataError(f"lacks {' and '.join(repr(key) for key in missing)}", where=where, fix=fix)
    id_, hypothesis, reference = (_text(line.pop(key), key, where) for key in REQUIRED)
    if not reference.strip():
        raise DataError("has an empty reference", where=where, fix="give the gold response or leave the line out")
    demonstration, seed, tags = line.pop("demonstration", None), line.pop("seed", None), line.pop("tags", [])
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool)):
        raise DataError(f"has the seed {seed!r}", where=where, fix="write a whole number or leave it out")
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise DataError(f"has the tags {tags!r}", where=where, fix="write a list of strings")
    return Prediction(
        id=id_,
        hypothesis=hypothesis,
        reference=reference,
        demonstration=None if demonstration is None else _text(demonstration, "demonstration", where),
        gold_emotion=_emotion(line.pop("gold_emotion", None), "gold_emotion", where),
        predicted_emotion=_emotion(line.pop("predicted_emotion", None), "predicted_emotion", where),
        seed=seed,
        tags=tuple(tags),
        extra=line,
    )


def _text(value: Any, key: str, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"has {value!r} as {key!r}", where=where, fix="write a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"has half a surrogate pair in {key!r}", where=where, fix="write the whole character") from None
    return value


def _emotion(value: Any, key: str, where: str) -> Emotion | None:
    if value is None:
        return None
    try:
        return Emotion(value)
    except ValueError:
        emotions = ", ".join(Emotion)
        raise DataError(
            f"has the unknown {key} {value!r}", where=where, fix=f"write one of {emotions}, or null"
        ) from None
