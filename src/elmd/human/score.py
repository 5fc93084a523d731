"""Raters' files to Table 4: means with intervals, agreement of the raters, paired comparisons."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from elmd.errors import DataError
from elmd.evaluation.paired import compare_metrics, mean_metric
from elmd.evaluation.paper import paper_kappa, paper_table
from elmd.evaluation.significance import bootstrap_interval
from elmd.evaluation.systems import FULL
from elmd.evaluation.verdicts import DIFFERS, LEAST_SAMPLES, LEVEL, NOISE, TOO_FEW, few_samples
from elmd.human.page import METRICS, SCORES
from elmd.human.ratings import Ratings, read_ratings
from elmd.human.study import GROUND_TRUTH
from elmd.metrics.text import Metric

Weights = Literal["unweighted", "quadratic"]
#: How disagreement is weighted: every one alike, or by its square.
WEIGHTS: tuple[Weights, ...] = ("unweighted", "quadratic")


def score(
    key: Mapping[str, Any], files: Sequence[Path], reference: str | None = None, *, resamples: int = 1000
) -> dict[str, Any]:
    """The content of human.json.

    Args:
        key: of the study.
        files: what the raters exported, at least one and no rater twice.
        reference: the system that the others are compared with; None: ELMD if it is there, else nothing is compared.

    Returns:
        `study`, `data`, `seed` (of the draw), `n` samples, `responses` (rated ones, equal texts counted once), `raters`
        (numbers), `notes`, `warnings` (sentences);
        `systems`: name (Ground-Truth last) -> `seed`, `decode_seed`, `path` (None for Ground-Truth) and per metric
        (R1, R2) `mean`, `low`, `high` (95 % bootstrap over samples), `raters` (number -> mean), `paper` (Table 4's
        number as printed, None where it has none);
        `kappa`: metric -> `pairs` (`raters` [a, b], `unweighted` and `quadratic`, each `kappa`, `low`, `high`), and
        `unweighted`, `quadratic`: the mean over pairs. None where it is not defined: one rater, or raters who gave one
        score only. The interval resamples samples with all their responses;
        `paper`: `table`, `dataset`, `kappa` (one number for both metrics);
        `reference`; `comparison`: system -> metric -> `difference` (system − reference), `low`, `high`, `p` (paired
        permutation over samples), `p_holm` (over all of them), `verdict` (as in `elmd.evaluation.comparison`).

    Raises:
        DataError: a file that is refused; a rater twice; an unknown reference.
    """
    ratings: dict[int, Ratings] = {}
    for path in files:
        rated = read_ratings(path, key)
        if rated.rater in ratings:
            raise DataError(
                f"is of rater {rated.rater}, as {ratings[rated.rater].path} is",
                where=path,
                fix="give one file per rater",
            )
        ratings[rated.rater] = rated
    names = [*key["systems"], GROUND_TRUTH]
    chosen = reference or (FULL if FULL in key["systems"] else None)
    if chosen is not None and chosen not in names:
        raise DataError(f"there is no system {chosen!r}", where="--reference", fix=f"choose from {', '.join(names)}")
    raters = sorted(ratings)
    sheet = key["raters"][str(raters[0])]
    samples = sorted(item["sample"] for item in sheet)
    # [raters, metrics, systems, samples]
    table = np.array([_values(ratings[rater], key, names, samples) for rater in raters])
    metrics = {
        name: {metric: mean_metric(table[:, m, j].mean(axis=0)) for m, metric in enumerate(METRICS)}
        for j, name in enumerate(names)
    }
    printed = paper_table("Table 4", key["paper"])
    systems: dict[str, Any] = {}
    for j, name in enumerate(names):
        systems[name] = dict(key["systems"].get(name, {"seed": None, "decode_seed": None, "path": None}))
        systems[name].pop("sha256", None)
        for m, metric in enumerate(METRICS):
            systems[name][metric] = {
                **_with_interval("mean", metrics[name][metric], resamples),
                "raters": {str(rater): float(table[i, m, j].mean()) for i, rater in enumerate(raters)},
                "paper": printed.printed.get(name, {}).get(metric),
            }
    result = {
        "study": key["study"],
        "seed": key["seed"],
        "n": len(samples),
        "responses": sum(len(item["responses"]) for item in sheet),
        "raters": raters,
        "data": key["data"],
        "notes": key["notes"],
        "systems": systems,
        "paper": {"table": printed.table, "dataset": printed.dataset, "kappa": paper_kappa(printed.dataset)},
        "kappa": {metric: _agreement([ratings[r] for r in raters], key, metric, resamples) for metric in METRICS},
        "reference": chosen,
        "comparison": _compare(metrics, chosen, resamples) if chosen else {},
    }
    return result | {"warnings": _warnings(result, len(key["raters"]))}


def _values(rated: Ratings, key: Mapping[str, Any], names: Sequence[str], samples: Sequence[str]) -> np.ndarray:
    """A rater's scores [metrics, systems, samples]."""
    ids = {
        (name, item["sample"]): id_
        for item in key["raters"][str(rated.rater)]
        for id_, given in item["responses"].items()
        for name in given
    }
    scores = rated.scores
    return np.array([[[scores[ids[name, s]][m] for s in samples] for name in names] for m in METRICS], dtype=float)


def _with_interval(name: str, metric: Metric, resamples: int) -> dict[str, float]:
    """The score under `name`, with its bootstrap interval."""
    low, high = bootstrap_interval(metric.statistics, metric.reduce, resamples=resamples)
    return {name: metric.score, "low": low, "high": high}


def _compare(
    metrics: Mapping[str, Mapping[str, Metric]], reference: str, resamples: int
) -> dict[str, dict[str, dict[str, Any]]]:
    """Every system against the reference, on scores averaged over raters."""
    others = {name: scores for name, scores in metrics.items() if name != reference}
    compared: dict[str, dict[str, dict[str, Any]]] = {}
    for name, tests in compare_metrics(metrics[reference], others).items():
        compared[name] = {}
        for metric, test in tests.items():
            values, base = others[name][metric].values, metrics[reference][metric].values
            few, noise = len(values) < LEAST_SAMPLES, test["p_holm"] >= LEVEL
            compared[name][metric] = {
                **_with_interval("difference", mean_metric(values - base), resamples),
                "p": test["p"],
                "p_holm": test["p_holm"],
                "verdict": TOO_FEW if few else NOISE if noise else DIFFERS,
            }
    return compared


# ------------------------------------------------------------------------------------------------------------ agreement
def kappas(counts: np.ndarray, weights: Weights) -> np.ndarray:
    """Cohen's kappa [R] of confusion matrices [R, c, c] (1968 with weights); NaN where chance cannot disagree."""
    size = counts.shape[-1]
    i, j = np.indices((size, size))
    weight = ((i - j) ** 2 if weights == "quadratic" else i != j).astype(float)
    expected = counts.sum(axis=2)[:, :, None] * counts.sum(axis=1)[:, None, :] / counts.sum(axis=(1, 2))[:, None, None]
    with np.errstate(invalid="ignore", divide="ignore"):
        return 1 - (weight * counts).sum(axis=(1, 2)) / (weight * expected).sum(axis=(1, 2))


def _agreement(raters: Sequence[Ratings], key: Mapping[str, Any], metric: str, resamples: int) -> dict[str, Any]:
    rows = [_by_sample(rated, key, metric) for rated in raters]
    pairs = [
        {
            "raters": [raters[a].rater, raters[b].rater],
            **{weights: _kappa(rows[a], rows[b], weights, resamples) for weights in WEIGHTS},
        }
        for a, b in itertools.combinations(range(len(raters)), 2)
    ]
    means: dict[str, float | None] = {}
    for weights in WEIGHTS:
        values = [pair[weights]["kappa"] for pair in pairs]  # type: ignore[call-overload, index]
        means[weights] = float(np.mean(values)) if values and None not in values else None
    return {"pairs": pairs, **means}


def _by_sample(rated: Ratings, key: Mapping[str, Any], metric: str) -> list[list[int]]:
    """A rater's scores of every rated response, sample by sample, in an order that all raters share."""
    items = sorted(key["raters"][str(rated.rater)], key=lambda item: item["sample"])
    return [
        [rated.scores[id_][metric] for id_, _ in sorted(item["responses"].items(), key=lambda pair: pair[1])]
        for item in items
    ]


def _kappa(
    first: Sequence[Sequence[int]], second: Sequence[Sequence[int]], weights: Weights, resamples: int
) -> dict[str, float | None]:
    """Kappa of two raters' scores, sample by sample, with its bootstrap interval over samples; None where undefined."""
    size = len(SCORES)
    counts = np.zeros((len(first), size, size))
    for sample, (a, b) in enumerate(zip(first, second, strict=True)):
        np.add.at(counts[sample], (np.array(a) - SCORES[0], np.array(b) - SCORES[0]), 1)
    metric = Metric(
        counts.reshape(len(first), -1), lambda sums: kappas(sums.reshape(-1, size, size), weights), mean=False
    )
    values = _with_interval("kappa", metric, resamples)
    return {name: None if np.isnan(value) else value for name, value in values.items()}


def _warnings(result: Mapping[str, Any], invited: int) -> list[str]:
    warnings = few_samples(result["n"])
    if len(result["raters"]) < invited:
        warnings.append(f"{len(result['raters'])} of {invited} raters' files are scored.")
    if len(result["raters"]) == 1:
        warnings.append("With one rater agreement is unknown, and one person's taste passes for a result.")
    for name, tests in result["comparison"].items():
        noise = [metric for metric, test in tests.items() if test["verdict"] == NOISE]
        if noise:
            warnings.append(f"Within noise of {result['reference']}: {name} in {' and '.join(noise)}.")
    return warnings
