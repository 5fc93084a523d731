"""Raters' files to Table 4: means with intervals, agreement of the raters, paired comparisons."""

from __future__ import annotations

import csv
import io
import itertools
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from elmd.engine.files import read_json, write_json, write_text
from elmd.errors import DataError
from elmd.evaluation.comparison import DIFFERS, LEAST_SAMPLES, LEVEL, NOISE, TOO_FEW
from elmd.evaluation.paper import paper_kappa, paper_table
from elmd.evaluation.significance import bootstrap_interval, holm, paired_permutation
from elmd.evaluation.systems import FULL
from elmd.evaluation.tables import LATEX_NEEDS, latex_table, markdown_escape, markdown_table
from elmd.human.page import METRICS, SCORES
from elmd.human.study import FORMAT, GROUND_TRUTH, KEY

#: How disagreement is weighted: every one alike, or by its square.
WEIGHTS: tuple[Literal["unweighted", "quadratic"], ...] = ("unweighted", "quadratic")


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
        found = read_json(path)
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})", where=path, fix="check the path") from None
    except ValueError as error:  # also what is not UTF-8
        raise DataError(f"is not JSON ({error})", where=path, fix=again) from None
    if not isinstance(found, dict) or found.get("format") != FORMAT or not isinstance(found.get("ratings"), dict):
        raise DataError("is not a file that a rating page exports", where=path, fix="give the raters' files")
    if found.get("study") != key["study"]:
        fix = "score it with the folder of its own study"
        raise DataError(f"belongs to another study ({found.get('study')!r})", where=path, fix=fix)
    rater = found.get("rater")
    if isinstance(rater, bool) or not isinstance(rater, int) or str(rater) not in key["raters"]:
        known = ", ".join(key["raters"])
        raise DataError(f"names the rater {rater!r}, and the study has {known}", where=path, fix=again)
    items = [list(item["responses"]) for item in key["raters"][str(rater)]]
    scores = found["ratings"]
    owner = {id_: number for number, sheet in key["raters"].items() for item in sheet for id_ in item["responses"]}
    for id_, row in scores.items():
        if owner.get(id_) != str(rater):
            whose = f"a response of rater {owner[id_]}" if id_ in owner else f"the unknown response {id_!r}"
            raise DataError(f"rates {whose} as rater {rater}", where=path, fix=again)
        for metric, score in row.items() if isinstance(row, dict) else [("a response", row)]:
            if metric not in METRICS or isinstance(score, bool) or score not in SCORES or not isinstance(score, int):
                told = f"{SCORES[0]} to {SCORES[-1]}"
                raise DataError(f"has {score!r} as {metric} of {id_!r}, not {told}", where=path, fix=again)
    open_ = [
        (number, sum(metric not in scores.get(id_, {}) for id_ in ids for metric in METRICS))
        for number, ids in enumerate(items, start=1)
    ]
    lacking = {number: count for number, count in open_ if count}
    if lacking:
        first = ", ".join(map(str, itertools.islice(lacking, 8))) + (", …" if len(lacking) > 8 else "")
        raise DataError(
            f"is incomplete: {sum(lacking.values())} scores are missing in {len(lacking)} of {len(items)} dialogues "
            f"(number {first} of rater {rater}'s page)",
            where=path,
            fix="let the rater finish and export again",
        )
    if found.get("checksum") != checksum(str(found["study"]), rater, scores):
        raise DataError("has been changed since its export, or is damaged", where=path, fix=again)
    return Ratings(rater, path, scores)


def checksum(study: str, rater: int, scores: Mapping[str, Mapping[str, int]]) -> str:
    """FNV-1a (32 bits, hex) over format, study, rater and the scores by sorted response id: what the page computes."""
    rows = (":".join([id_, *(str(scores[id_].get(metric, 0)) for metric in METRICS)]) for id_ in sorted(scores))
    value = 0x811C9DC5
    for byte in "|".join([FORMAT, study, str(rater), *rows]).encode():
        value = (value ^ byte) * 0x01000193 % 2**32
    return f"{value:08x}"


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
        one = read_ratings(path, key)
        if one.rater in ratings:
            raise DataError(
                f"is of rater {one.rater}, as {ratings[one.rater].path} is", where=path, fix="give one file per rater"
            )
        ratings[one.rater] = one
    names = [*key["systems"], GROUND_TRUTH]
    chosen = reference or (FULL if FULL in key["systems"] else None)
    if chosen is not None and chosen not in names:
        raise DataError(f"there is no system {chosen!r}", where="--reference", fix=f"choose from {', '.join(names)}")
    raters = sorted(ratings)
    samples = sorted(item["sample"] for item in key["raters"][str(raters[0])])
    # [raters, metrics, systems, samples]
    table = np.array([_values(ratings[rater], key, names, samples) for rater in raters])
    printed = paper_table("Table 4", key["paper"])
    systems: dict[str, Any] = {}
    for j, name in enumerate(names):
        systems[name] = dict(key["systems"].get(name, {"seed": None, "decode_seed": None, "path": None}))
        systems[name].pop("sha256", None)
        for m, metric in enumerate(METRICS):
            values = table[:, m, j]
            systems[name][metric] = {
                **_mean(values.mean(axis=0), resamples),
                "raters": {str(rater): float(values[i].mean()) for i, rater in enumerate(raters)},
                "paper": printed.printed.get(name, {}).get(metric),
            }
    result = {
        "study": key["study"],
        "seed": key["seed"],
        "n": len(samples),
        "responses": sum(len(item["responses"]) for item in key["raters"][str(raters[0])]),
        "raters": raters,
        "data": key["data"],
        "notes": key["notes"],
        "systems": systems,
        "paper": {"table": printed.table, "dataset": printed.dataset, "kappa": paper_kappa(printed.dataset)},
        "kappa": {metric: _agreement([ratings[one] for one in raters], key, metric, resamples) for metric in METRICS},
        "reference": chosen,
        "comparison": _compare(table.mean(axis=0), names, chosen, resamples) if chosen else {},
    }
    return result | {"warnings": _warnings(result, len(key["raters"]))}


def _values(one: Ratings, key: Mapping[str, Any], names: Sequence[str], samples: Sequence[str]) -> np.ndarray:
    """A rater's scores [metrics, systems, samples]."""
    ids = {
        (name, item["sample"]): id_
        for item in key["raters"][str(one.rater)]
        for id_, given in item["responses"].items()
        for name in given
    }
    return np.array([[[one.scores[ids[name, s]][m] for s in samples] for name in names] for m in METRICS], dtype=float)


def _mean(values: np.ndarray, resamples: int) -> dict[str, float]:
    """Mean of values [n] with its bootstrap interval."""
    low, high = bootstrap_interval(
        np.column_stack([values, np.ones_like(values)]), lambda sums: sums[:, 0] / sums[:, 1], resamples=resamples
    )
    return {"mean": float(values.mean()), "low": low, "high": high}


def _compare(table: np.ndarray, names: Sequence[str], reference: str, resamples: int) -> dict[str, Any]:
    """Every system against the reference, on scores [metrics, systems, samples] averaged over raters."""
    base = table[:, names.index(reference)]
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for j, name in enumerate(names):
        if name == reference:
            continue
        found[name] = {}
        for m, metric in enumerate(METRICS):
            gap = _mean(table[m, j] - base[m], resamples)
            test = paired_permutation(table[m, j], base[m])
            found[name][metric] = {"difference": gap["mean"], "low": gap["low"], "high": gap["high"], "p": test.p}
    adjusted = holm({f"{name}\n{metric}": row["p"] for name, rows in found.items() for metric, row in rows.items()})
    for both, p in adjusted.items():
        name, metric = both.split("\n")
        few = table.shape[2] < LEAST_SAMPLES
        verdict = TOO_FEW if few else NOISE if p >= LEVEL else DIFFERS
        found[name][metric] |= {"p_holm": p, "verdict": verdict}
    return found


# ------------------------------------------------------------------------------------------------------------ agreement
def kappas(counts: np.ndarray, weights: Literal["unweighted", "quadratic"]) -> np.ndarray:
    """Cohen's kappa [R] of confusion matrices [R, c, c] (1968 with weights); NaN where chance cannot disagree."""
    size = counts.shape[-1]
    i, j = np.indices((size, size))
    weight = ((i - j) ** 2 if weights == "quadratic" else i != j).astype(float)
    expected = counts.sum(axis=2)[:, :, None] * counts.sum(axis=1)[:, None, :] / counts.sum(axis=(1, 2))[:, None, None]
    with np.errstate(invalid="ignore", divide="ignore"):
        return 1 - (weight * counts).sum(axis=(1, 2)) / (weight * expected).sum(axis=(1, 2))


def _agreement(raters: Sequence[Ratings], key: Mapping[str, Any], metric: str, resamples: int) -> dict[str, Any]:
    rows = [_units(one, key, metric) for one in raters]
    pairs: list[dict[str, Any]] = []
    for a, b in itertools.combinations(range(len(raters)), 2):
        pair: dict[str, Any] = {"raters": [raters[a].rater, raters[b].rater]}
        for weights in WEIGHTS:
            pair[weights] = _kappa(rows[a], rows[b], weights, resamples)
        pairs.append(pair)
    means: dict[str, float | None] = {}
    for weights in WEIGHTS:
        values = [pair[weights]["kappa"] for pair in pairs]
        means[weights] = float(np.mean(values)) if values and None not in values else None
    return {"pairs": pairs, **means}


def _units(one: Ratings, key: Mapping[str, Any], metric: str) -> list[list[int]]:
    """A rater's scores of every rated response, sample by sample, in an order that all raters share."""
    items = sorted(key["raters"][str(one.rater)], key=lambda item: item["sample"])
    return [
        [one.scores[id_][metric] for id_, _ in sorted(item["responses"].items(), key=lambda pair: pair[1])]
        for item in items
    ]


def _kappa(
    first: Sequence[Sequence[int]], second: Sequence[Sequence[int]], weights: Literal["unweighted", "quadratic"],
    resamples: int,
) -> dict[str, float | None]:  # fmt: skip
    """Kappa of two raters' scores, sample by sample, with its bootstrap interval over samples."""
    from sklearn.metrics import cohen_kappa_score

    flat = [[score for row in rows for score in row] for rows in (first, second)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a kappa that is not defined: it becomes a dash
        value = float(
            cohen_kappa_score(*flat, labels=list(SCORES), weights="quadratic" if weights == "quadratic" else None)
        )
    size = len(SCORES)
    counts = np.zeros((len(first), size, size))
    for sample, (a, b) in enumerate(zip(first, second, strict=True)):
        np.add.at(counts[sample], (np.array(a) - SCORES[0], np.array(b) - SCORES[0]), 1)
    low, high = bootstrap_interval(
        counts.reshape(len(first), -1),
        lambda sums: kappas(sums.reshape(-1, size, size), weights),
        resamples=resamples,
    )
    found = {"kappa": value, "low": low, "high": high}
    return {name: None if math.isnan(number) else number for name, number in found.items()}


# --------------------------------------------------------------------------------------------------------------- tables
def _warnings(result: Mapping[str, Any], invited: int) -> list[str]:
    found = []
    if result["n"] < LEAST_SAMPLES:
        found.append(f"{TOO_FEW}: {result['n']} samples, and a verdict takes {LEAST_SAMPLES}.")
    if len(result["raters"]) < invited:
        found.append(f"{len(result['raters'])} of {invited} raters' files are scored.")
    if len(result["raters"]) == 1:
        found.append("With one rater agreement is unknown, and one person's taste passes for a result.")
    for name, rows in result["comparison"].items():
        noise = [metric for metric, row in rows.items() if row["verdict"] == NOISE]
        if noise:
            found.append(f"Within noise of {result['reference']}: {name} in {' and '.join(noise)}.")
    return found


def rows(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and formatted rows of Table 4: mean with interval, Holm's p against the reference, the paper's number."""
    systems = result["systems"]
    compared = bool(result["comparison"])
    printed = any(one["R1"]["paper"] for name, one in systems.items() if name != GROUND_TRUTH)
    columns = ["system", "n"]
    for metric in METRICS:
        columns += [metric, "95 %", *(["p"] if compared else []), *([f"{metric}, paper"] if printed else [])]
    body = []
    for name, one in systems.items():
        line = [name, str(result["n"])]
        for metric in METRICS:
            found, test = one[metric], result["comparison"].get(name, {}).get(metric)
            line += [f"{found['mean']:.3f}", f"{found['low']:.2f}–{found['high']:.2f}"]
            line += [_p(test["p_holm"]) if test else "–"] if compared else []
            line += [found["paper"] or "–"] if printed else []
        body.append(line)
    return columns, body


def kappa_rows(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and formatted rows of the raters' agreement: each pair, and the mean where there are several."""
    columns = ["raters"]
    for metric in METRICS:
        columns += [f"{metric}, {weights}" for weights in WEIGHTS]
    kappa = result["kappa"]
    body = []
    for at, pair in enumerate(kappa["R1"]["pairs"]):
        cells = [_with_interval(kappa[metric]["pairs"][at][weights]) for metric in METRICS for weights in WEIGHTS]
        body.append([" and ".join(map(str, pair["raters"])), *cells])
    if len(body) != 1:
        cells = [_number(kappa[metric][weights]) for metric in METRICS for weights in WEIGHTS]
        body.append(["mean" if body else "one only", *cells])
    return columns, body


def markdown(result: Mapping[str, Any]) -> str:
    """human.md: both tables, warnings, and what the numbers are."""
    parts = ["# Human evaluation (Table 4)", markdown_table(*rows(result)), "## Cohen's kappa"]
    parts += [markdown_table(*kappa_rows(result))]
    if result["warnings"]:
        parts += ["## Warnings", _list(result["warnings"])]
    return "\n\n".join([*parts, "## What this is", _list(notes(result))]) + "\n"


def latex(result: Mapping[str, Any]) -> str:
    """human.tex: both tables; needs `\\usepackage{booktabs}` (and ctex for Chinese names)."""
    first = f"Human evaluation: R1 contextual, R2 emotional relevance; {_size(result)}."
    tables = [
        latex_table(*rows(result), first),
        latex_table(*kappa_rows(result), "Agreement of the raters: Cohen's kappa with 95 % intervals."),
    ]
    return LATEX_NEEDS + "\n\n".join(tables) + "\n"


def csv_text(result: Mapping[str, Any]) -> str:
    """human.csv: one row per system in full precision; the raters' agreement is in human.json."""
    lines = []
    for name, one in result["systems"].items():
        line = {"system": name, "n": result["n"], "raters": len(result["raters"])}
        line |= {"seed": one["seed"], "decode_seed": one["decode_seed"]}
        for metric in METRICS:
            found, test = one[metric], result["comparison"].get(name, {}).get(metric, {})
            line |= {metric: found["mean"], f"{metric}_low": found["low"], f"{metric}_high": found["high"]}
            line |= {f"{metric}_{what}": test.get(what) for what in ("difference", "p", "p_holm")}
        lines.append(line)
    out = io.StringIO()
    writer = csv.DictWriter(out, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


def write_result(folder: Path, result: Mapping[str, Any]) -> list[Path]:
    """Write human.json, .md, .csv and .tex, each atomically, and return their paths."""
    texts = {"md": markdown(result), "csv": csv_text(result), "tex": latex(result)}
    write_json(folder / "human.json", result)
    for ending, text in texts.items():
        write_text(folder / f"human.{ending}", text)
    return [folder / f"human.{ending}" for ending in ("json", *texts)]


def notes(result: Mapping[str, Any]) -> list[str]:
    """What the tables do not say of themselves, a sentence each."""
    paper, reference = result["paper"], result["reference"]
    test = f"p: paired permutation against {reference}, Holm's correction over the table."
    other = f", and these are other data ({result['data']}): no yardstick"
    return [
        f"{_size(result)}, drawn with seed {result['seed']}; scores from 1 to 5, anchors ours.",
        "Intervals are 95 % bootstrap intervals over samples; a sample's score is the mean of its raters'.",
        *([test] if result["comparison"] else []),
        "Kappa is over all rated responses, Ground-Truth among them; equal responses to one sample were rated once.",
        f"Rated runs (seed of training, of decoding): {_runs(result['systems'])}.",
        f"The paper's {paper['table']} is on {paper['dataset']}{other if _foreign(result) else ''}; its kappa there, "
        f"one for both metrics and without a word on weights, is {paper['kappa']:.2f} (§5.2).",
        *result["notes"],
    ]


def _foreign(result: Mapping[str, Any]) -> bool:
    """Whether the paper's Table 4 is of other data. MMED's readers have names of their own, and were told apart."""
    return result["paper"]["dataset"] == "M3ED" and result["data"] != "m3ed"


def _runs(systems: Mapping[str, Any]) -> str:
    told = {
        name: ", ".join("unknown" if one[seed] is None else str(one[seed]) for seed in ("seed", "decode_seed"))
        for name, one in systems.items()
        if name != GROUND_TRUTH
    }
    if len(set(told.values())) == 1:
        return f"{next(iter(told.values()))} for all"
    return "; ".join(f"{name} {seeds}" for name, seeds in told.items())


def _size(result: Mapping[str, Any]) -> str:
    count = len(result["raters"])
    return f"{result['n']} samples, {count} rater{'s' if count > 1 else ''}"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _with_interval(found: Mapping[str, float | None]) -> str:
    if found["low"] is None:
        return _number(found["kappa"])
    return f"{_number(found['kappa'])} [{_number(found['low'])}, {_number(found['high'])}]"


def _list(sentences: Sequence[str]) -> str:
    return "\n".join(f"- {markdown_escape(sentence)}" for sentence in sentences)
