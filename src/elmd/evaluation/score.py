"""Predictions: reading, writing, scoring, and floors. Comparing systems is `elmd.evaluation.comparison`.

A predictions file is JSONL, one object per line: `id`, `hypothesis` and `reference` are required; `demonstration`,
`gold_emotion`, `predicted_emotion`, `seed`, `tags` are read where they stand; anything else (prompt parts) is kept.
Scores of the protocols are × 100; shares, accuracy and F1 are fractions.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from elmd.engine.files import DuplicateKeyError, parse_json, write_lines
from elmd.errors import DataError
from elmd.evaluation.significance import bootstrap_interval, over_seeds
from elmd.labels import Emotion
from elmd.metrics.emotion import emotion_scores
from elmd.metrics.text import PROTOCOLS, Metric, signatures, surface, versions

REQUIRED = ("id", "hypothesis", "reference")
ALL_PROTOCOLS = tuple(PROTOCOLS)
FLOOR_SEEDS = 5  # draws of the random floor that are averaged


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


def score(predictions: Sequence[Prediction], protocols: Sequence[str] = ALL_PROTOCOLS) -> dict[str, Any]:
    """All scores of one system, JSON-ready.

    Several decode seeds are averaged: `sd` then holds the standard deviations. `intervals` are 95 % bootstrap
    intervals over samples, the seeds of a sample kept together.

    Returns:
        `n` samples, `seeds`, `protocols` (names); one object of metrics per protocol; `surface`; `emotion` where gold
        emotions are known (its confusion matrix sums the seeds); `intervals`; `sd`; `signatures` (sacrebleu);
        `versions`.

    Raises:
        DataError: no predictions, an unknown protocol, or seeds that cover different samples.
    """
    return _score(predictions, protocols) | _provenance(protocols)


def score_all(
    systems: Mapping[str, Sequence[Prediction]],
    train_responses: Sequence[str] | None = None,
    protocols: Sequence[str] = ALL_PROTOCOLS,
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """The content of scores.json: all systems on the same samples, and the floors below them.

    Args:
        systems: predictions by name of system.
        train_responses: responses of the training split, for the random and most-common floors; None leaves them out.

    Returns:
        `n`, `protocols`, `systems` and `floors` (name -> what `score` gives), `signatures`, `versions`.

    Raises:
        DataError: as `score`; or systems that were run on different samples.
    """
    if not systems:
        raise DataError("no predictions to score")
    first, *others = systems
    references = references_of(systems[first])
    for name in others:
        check_same(references, references_of(systems[name]), first, name)
    floors: dict[str, list[Prediction]] = {}
    if train_responses:
        floors["random response"] = random_floor(systems[first], train_responses, seed)
        floors["most common reply"] = common_floor(systems[first], train_responses)
    with_demonstration = (p for p in systems.values() if any(one.demonstration is not None for one in p))
    if (source := next(with_demonstration, None)) is not None:
        floors["retrieval only"] = retrieval_floor(source)
    return {
        "n": len(references),
        **_provenance(protocols),
        "systems": {name: _score(predictions, protocols) for name, predictions in systems.items()},
        "floors": {name: _score(predictions, protocols) for name, predictions in floors.items()},
    }


def measure(predictions: Sequence[Prediction], protocol: str) -> dict[str, Metric]:
    """The metrics of one decoding, on its predictions as they stand.

    Raises:
        DataError: an unknown protocol.
    """
    if protocol not in PROTOCOLS:
        raise DataError(f"unknown protocol {protocol!r}", fix=f"choose from {', '.join(PROTOCOLS)}")
    return PROTOCOLS[protocol]([p.hypothesis for p in predictions], [p.reference for p in predictions])


def pool(several: Sequence[Mapping[str, Metric]]) -> dict[str, Metric]:
    """Metrics of several decodings of the same samples as one, whose statistics sum those of each sample."""
    return {
        name: replace(metric, statistics=np.sum([one[name].statistics for one in several], axis=0))
        for name, metric in several[0].items()
    }


def by_seed_of(predictions: Sequence[Prediction], where: str) -> dict[int | None, list[Prediction]]:
    """Predictions of each decode seed, all in the order of the first seed's samples.

    Raises:
        DataError: none there, a sample twice, or seeds that cover different samples; `where` is named.
    """
    found: dict[int | None, dict[str, Prediction]] = {}
    for p in predictions:
        rows = found.setdefault(p.seed, {})
        if p.id in rows:
            raise DataError(f"id {p.id!r} occurs twice with seed {p.seed}", where=where, fix="keep one of them")
        rows[p.id] = p
    if not found:
        raise DataError("no predictions to score", where=where, fix="check what was generated")
    (first, order), *_ = found.items()
    for seed, rows in found.items():
        if odd := sorted(order.keys() ^ rows.keys()):
            what = f"seeds {first} and {seed} do not cover the same samples ({len(odd)} differ, e.g. {odd[0]!r})"
            raise DataError(what, where=where, fix="generate the missing ones, or give every line a seed")
        for id_, p in rows.items():
            if (p.reference, p.gold_emotion) != (order[id_].reference, order[id_].gold_emotion):
                what = f"id {id_!r} has another reference or gold emotion with seed {seed} than with seed {first}"
                raise DataError(what, where=where, fix="score runs on the same data")
    return {seed: [rows[id_] for id_ in order] for seed, rows in found.items()}


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


def random_floor(predictions: Sequence[Prediction], responses: Sequence[str], seed: int = 0) -> list[Prediction]:
    """A random training response for every sample, drawn `FLOOR_SEEDS` times so that its spread is known."""
    floor = []
    for draw in range(FLOOR_SEEDS):
        rng = Random(f"{seed} {draw}")
        floor += [replace(p, hypothesis=rng.choice(responses), seed=draw) for p in _bare(predictions)]
    return floor


def retrieval_floor(predictions: Sequence[Prediction]) -> list[Prediction]:
    """The demonstration r' as the response; empty (score 0) for samples that have none."""
    return [replace(p, hypothesis=p.demonstration or "") for p in _bare(predictions)]


def common_floor(predictions: Sequence[Prediction], responses: Sequence[str]) -> list[Prediction]:
    """The most common training response for every sample (of equals, the one that comes first in `responses`)."""
    (reply, _), *_ = Counter(responses).most_common(1)
    return [replace(p, hypothesis=reply) for p in _bare(predictions)]


def _bare(predictions: Sequence[Prediction]) -> list[Prediction]:
    """Each sample once, without what the system said of its emotion."""
    first = next(iter(by_seed_of(predictions, "predictions").values()))
    return [replace(p, seed=None, gold_emotion=None, predicted_emotion=None, extra={}) for p in first]


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
        known = ", ".join(Emotion)
        raise DataError(f"has the unknown {key} {value!r}", where=where, fix=f"write one of {known}, or null") from None


def _provenance(protocols: Sequence[str]) -> dict[str, Any]:
    strict = {"signatures": signatures()} if "strict" in protocols else {}
    return {"protocols": list(protocols), **strict, "versions": versions()}


def _score(predictions: Sequence[Prediction], protocols: Sequence[str]) -> dict[str, Any]:
    by_seed = by_seed_of(predictions, "predictions")
    runs = list(by_seed.values())
    groups: dict[str, list[dict[str, Any]]] = {}  # group -> scores of each seed
    intervals: dict[str, dict[str, list[float]]] = {}
    for protocol in protocols:
        metrics = [measure(run, protocol) for run in runs]
        groups[protocol] = [{name: metric.score for name, metric in one.items()} for one in metrics]
        intervals[protocol] = {
            name: list(bootstrap_interval(metric.statistics, metric.reduce)) for name, metric in pool(metrics).items()
        }
    groups["surface"] = [surface([p.hypothesis for p in run], [p.demonstration for p in run]) for run in runs]
    if emotions := _emotions(runs):
        groups["emotion"] = emotions
    result: dict[str, Any] = {"n": len(runs[0]), "seeds": list(by_seed)}
    result |= {group: _average(per_seed) for group, per_seed in groups.items()}
    result["intervals"] = {
        protocol: {name: list(pair) for name, pair in one.items()} for protocol, one in intervals.items()
    }
    if len(runs) > 1:
        result["sd"] = {group: _deviation(per_seed) for group, per_seed in groups.items()}
    return result


def _emotions(runs: Sequence[Sequence[Prediction]]) -> list[dict[str, Any]]:
    """Emotion scores per seed over the samples whose gold emotion is known; empty if none is.

    A system that never names an emotion was not asked to: it gets counts, not an accuracy of 0.
    """
    known = [[(p.gold_emotion, p.predicted_emotion) for p in run if p.gold_emotion is not None] for run in runs]
    if not known[0]:
        return []
    if all(predicted is None for pairs in known for _, predicted in pairs):
        return [{"n": len(pairs), "missing": len(pairs)} for pairs in known]
    return [emotion_scores([gold for gold, _ in pairs], [predicted for _, predicted in pairs]) for pairs in known]


def _average(per_seed: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Scores averaged over seeds; counts (n, missing, confusion) are summed."""
    result: dict[str, Any] = {}
    for name, value in per_seed[0].items():
        values = [one[name] for one in per_seed if one[name] is not None]
        if name == "confusion":
            result[name] = {**value, "counts": np.sum([one["counts"] for one in values], axis=0).tolist()}
        elif isinstance(value, dict):
            result[name] = _average(values)
        elif isinstance(value, int):
            result[name] = sum(values)
        else:
            result[name] = over_seeds(values).mean if values else None
    return result


def _deviation(per_seed: Sequence[dict[str, Any]]) -> dict[str, float]:
    return {
        name: float(np.std([one[name] for one in per_seed], ddof=1))
        for name in per_seed[0]
        if all(isinstance(one[name], float) for one in per_seed)
    }
