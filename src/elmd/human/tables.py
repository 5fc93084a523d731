"""Table 4 and the raters' agreement of a scored study, as files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from elmd.engine.files import write_json
from elmd.evaluation.tables import NONE, Document, Table, bullets, interval_text, markdown_escape, p_text
from elmd.human.page import METRICS
from elmd.human.score import WEIGHTS
from elmd.human.study import GROUND_TRUTH


def write_result(folder: Path, result: Mapping[str, Any]) -> list[Path]:
    """Write human.json, .md, .csv and .tex, each atomically, and return their paths."""
    write_json(folder / "human.json", result)
    return [folder / "human.json", *human_document(result).write(folder, "human")]


def human_document(result: Mapping[str, Any]) -> Document:
    """Both tables, warnings, and what the numbers are. The CSV file has no agreement: that is in human.json."""
    caption = f"Human evaluation: R1 contextual, R2 emotional relevance; {_size(result)}."
    agreement = "Agreement of the raters: Cohen's kappa with 95 % intervals."
    parts: list[str | Table] = [
        Table(*rows(result), caption=caption),
        Table(*kappa_rows(result), "Cohen's kappa", caption=agreement),
    ]
    for heading, sentences in (("Warnings", result["warnings"]), ("What this is", notes(result))):
        if sentences:
            parts += [f"## {heading}", bullets([markdown_escape(sentence) for sentence in sentences])]
    return Document("Human evaluation (Table 4)", parts, [_record(result, name) for name in result["systems"]])


def rows(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and formatted rows of Table 4: mean with interval, Holm's p against the reference, the paper's number."""
    systems = result["systems"]
    compared = bool(result["comparison"])
    printed = any(system["R1"]["paper"] for name, system in systems.items() if name != GROUND_TRUTH)
    columns = ["system", "n"]
    for metric in METRICS:
        columns += [metric, "95 %", *(["p"] if compared else []), *([f"{metric}, paper"] if printed else [])]
    body = []
    for name, system in systems.items():
        line = [name, str(result["n"])]
        for metric in METRICS:
            score, test = system[metric], result["comparison"].get(name, {}).get(metric)
            line += [f"{score['mean']:.3f}", f"{score['low']:.2f}–{score['high']:.2f}"]
            line += [p_text(test and test["p_holm"])] if compared else []
            line += [score["paper"] or NONE] if printed else []
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
        values = [kappa[metric]["pairs"][at][weights] for metric in METRICS for weights in WEIGHTS]
        cells = [_kappa(value["kappa"], interval_text(value["low"], value["high"], 2)) for value in values]
        body.append([" and ".join(map(str, pair["raters"])), *cells])
    if len(body) != 1:
        cells = [_kappa(kappa[metric][weights]) for metric in METRICS for weights in WEIGHTS]
        body.append(["mean" if body else "one only", *cells])
    return columns, body


def notes(result: Mapping[str, Any]) -> list[str]:
    """What the tables do not say of themselves, a sentence each."""
    paper, reference = result["paper"], result["reference"]
    test = f"p: paired permutation against {reference}, Holm's correction over the table."
    # MMED is read by readers of other names: where the paper's data set is M3ED, the name of the data tells.
    foreign = paper["dataset"] == "M3ED" and result["data"] != "m3ed"
    other = f", and these are other data ({result['data']}): no yardstick" if foreign else ""
    return [
        f"{_size(result)}, drawn with seed {result['seed']}; scores from 1 to 5, anchors ours.",
        "Intervals are 95 % bootstrap intervals over samples; a sample's score is the mean of its raters'.",
        *([test] if result["comparison"] else []),
        "Kappa is over all rated responses, Ground-Truth among them; equal responses to one sample were rated once.",
        f"Rated runs (seed of training, of decoding): {_seeds(result['systems'])}.",
        f"The paper's {paper['table']} is on {paper['dataset']}{other}; its kappa there, "
        f"one for both metrics and without a word on weights, is {paper['kappa']:.2f} (§5.2).",
        *result["notes"],
    ]


def _record(result: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A system in full precision."""
    system = result["systems"][name]
    record = {"system": name, "n": result["n"], "raters": len(result["raters"])}
    record |= {"seed": system["seed"], "decode_seed": system["decode_seed"]}
    for metric in METRICS:
        score, test = system[metric], result["comparison"].get(name, {}).get(metric, {})
        record |= {metric: score["mean"], f"{metric}_low": score["low"], f"{metric}_high": score["high"]}
        record |= {f"{metric}_{what}": test.get(what) for what in ("difference", "p", "p_holm")}
    return record


def _seeds(systems: Mapping[str, Any]) -> str:
    """The seeds of training and decoding of the rated runs."""
    seeds_of = {
        name: ", ".join("unknown" if system[seed] is None else str(system[seed]) for seed in ("seed", "decode_seed"))
        for name, system in systems.items()
        if name != GROUND_TRUTH
    }
    if len(set(seeds_of.values())) == 1:
        return f"{next(iter(seeds_of.values()))} for all"
    return "; ".join(f"{name} {seeds}" for name, seeds in seeds_of.items())


def _size(result: Mapping[str, Any]) -> str:
    count = len(result["raters"])
    return f"{result['n']} samples, {count} rater{'s' if count > 1 else ''}"


def _kappa(value: float | None, interval: str | None = None) -> str:
    return NONE if value is None else f"{value:.2f} {interval or ''}".rstrip()
