"""Scores of predictions, and floors that need no model. Comparing systems is `elmd.evaluation.comparison`.

Scores of the protocols are × 100; shares, accuracy and F1 are fractions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from random import Random
from typing import Any

import numpy as np

from elmd.errors import DataError
from elmd.evaluation.predictions import Prediction, by_seed_of, check_same, references_of
from elmd.evaluation.significance import bootstrap_interval, over_seeds
from elmd.metrics.emotion import emotion_scores
from elmd.metrics.text import PROTOCOLS, Metric, signatures, surface, versions

ALL_PROTOCOLS = tuple(PROTOCOLS)
FLOOR_SEEDS = 5  # draws of the random floor that are averaged


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
    with_demonstration = (p for p in systems.values() if any(q.demonstration is not None for q in p))
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
        name: replace(metric, statistics=np.sum([metrics[name].statistics for metrics in several], axis=0))
        for name, metric in several[0].items()
    }


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
    """Each sample once, without emotions."""
    first = next(iter(by_seed_of(predictions, "predictions").values()))
    return [replace(p, seed=None, gold_emotion=None, predicted_emotion=None, extra={}) for p in first]


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
        groups[protocol] = [{name: metric.score for name, metric in run.items()} for run in metrics]
        intervals[protocol] = {
            name: list(bootstrap_interval(metric.statistics, metric.reduce)) for name, metric in pool(metrics).items()
        }
    groups["surface"] = [surface([p.hypothesis for p in run], [p.demonstration for p in run]) for run in runs]
    if emotions := _emotions(runs):
        groups["emotion"] = emotions
    result: dict[str, Any] = {"n": len(runs[0]), "seeds": list(by_seed)}
    result |= {group: _average(per_seed) for group, per_seed in groups.items()}
    result["intervals"] = {
        protocol: {name: list(pair) for name, pair in pairs.items()} for protocol, pairs in intervals.items()
    }
    if len(runs) > 1:
        result["sd"] = {group: _deviation(per_seed) for group, per_seed in groups.items()}
    return result


def _emotions(runs: Sequence[Sequence[Prediction]]) -> list[dict[str, Any]]:
    """Emotion scores per seed over the samples that have a gold emotion; empty if none has.

    A system that never names an emotion was not asked to: it gets counts, not an accuracy of 0.
    """
    by_seed = [[(p.gold_emotion, p.predicted_emotion) for p in run if p.gold_emotion is not None] for run in runs]
    if not by_seed[0]:
        return []
    if all(predicted is None for pairs in by_seed for _, predicted in pairs):
        return [{"n": len(pairs), "missing": len(pairs)} for pairs in by_seed]
    return [emotion_scores([gold for gold, _ in pairs], [predicted for _, predicted in pairs]) for pairs in by_seed]


def _average(per_seed: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Scores averaged over seeds; counts (n, missing, confusion) are summed."""
    result: dict[str, Any] = {}
    for name, value in per_seed[0].items():
        values = [scores[name] for scores in per_seed if scores[name] is not None]
        if name == "confusion":
            result[name] = {**value, "counts": np.sum([matrix["counts"] for matrix in values], axis=0).tolist()}
        elif isinstance(value, dict):
            result[name] = _average(values)
        elif isinstance(value, int):
            result[name] = sum(values)
        else:
            result[name] = over_seeds(values).mean if values else None
    return result


def _deviation(per_seed: Sequence[dict[str, Any]]) -> dict[str, float]:
    return {
        name: float(np.std([scores[name] for scores in per_seed], ddof=1))
        for name in per_seed[0]
        if all(isinstance(scores[name], float) for scores in per_seed)
    }
