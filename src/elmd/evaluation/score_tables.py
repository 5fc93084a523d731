"""Tables of scores.json: a row per system or run, a table per group of metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from elmd.evaluation.tables import NONE, Document, Table, bullets, markdown_escape
from elmd.metrics.text import MEANING, PROTOCOLS

#: What each table of a file holds, in this order; a group that no system has is left out.
GROUPS: dict[str, str] = {
    "paper": "Protocol `paper` (characters, × 100)",
    "strict": "Protocol `strict` (sacrebleu zh, × 100)",
    "chatglm": "Protocol `chatglm` (jieba words, × 100)",
    "surface": "What the responses look like (shares in [0, 1])",
    "emotion": "Emotion of the response (fractions)",
}
Scores = Mapping[str, Mapping[str, Any]]


def digits(group: str, metric: str) -> int:
    """Decimals that a score is shown with."""
    return 2 if group in PROTOCOLS or metric == "length_char" else 4


def meanings(metrics: Sequence[str]) -> list[str]:
    """What each metric is, in Markdown."""
    return [f"`{name}`: {MEANING[name]}" for name in metrics if name in MEANING]


def with_floors(scores: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The rows of a table from the content of scores.json: systems, then floors by the name `floor: …`."""
    signatures = {"signatures": scores.get("signatures", {})}
    rows = {**scores["systems"], **{f"floor: {name}": floor for name, floor in scores["floors"].items()}}
    return {name: {**signatures, **row} for name, row in rows.items()}


def group_table(scores: Scores, group: str) -> tuple[list[str], list[list[str]]]:
    """Columns and formatted rows of one group; a dash where a system lacks the score. Empty if none has the group."""
    names = _metrics(scores, group)
    rows = [
        [system, str(score["n"]), *(_cell(score, group, name) for name in names)]
        for system, score in scores.items()
        if group in score
    ]
    return (["system", "n", *names], rows) if rows else ([], [])


def score_document(
    scores: Scores, *, title: str, notes: Sequence[str] = (), failed: Mapping[str, str] | None = None
) -> Document:
    """One table per group with the meaning of its metrics, then notes, then what could not be scored.

    Args:
        scores: what `elmd.evaluation.score.score` gives, by system; of a scores.json, `with_floors(it)`.
        notes: sentences under the tables. failed: name -> why. Both are in the Markdown file only.
    """
    parts: list[str | Table] = []
    for group, heading in GROUPS.items():
        columns, rows = group_table(scores, group)
        if rows:
            parts.append(Table(columns, rows, heading, meanings(columns), f"{title}. {heading}"))
    if any("sd" in score for score in scores.values()):
        notes = [*notes, "Scores with ± are means over decode seeds with their standard deviation."]
    signatures = {name: text for score in scores.values() for name, text in score.get("signatures", {}).items()}
    parts.append(bullets([*notes, *(f"`{name}`: `{text}`" for name, text in signatures.items())]))
    if failed:
        parts.append("## Could not be scored")
        parts.append(bullets([f"{markdown_escape(name)}: {markdown_escape(why)}" for name, why in failed.items()]))
    return Document(title, parts, [_record(system, score, scores) for system, score in scores.items()])


def _record(system: str, score: Mapping[str, Any], scores: Scores) -> dict[str, Any]:
    """A row in full precision: `group/metric`, and its `_sd`, `_low`, `_high` where it has them."""
    record: dict[str, Any] = {"system": system, "n": score["n"]}
    for group in GROUPS:
        for name in _metrics(scores, group):
            key = f"{group}/{name}"
            record[key] = score.get(group, {}).get(name)
            if (sd := score.get("sd", {}).get(group, {}).get(name)) is not None:
                record[f"{key}_sd"] = sd
            if (interval := score.get("intervals", {}).get(group, {}).get(name)) is not None:
                record[f"{key}_low"], record[f"{key}_high"] = interval
    return record


def _metrics(scores: Scores, group: str) -> list[str]:
    """Names of a group's plain scores, in the order of the system that has most of them."""
    groups = sorted((score[group] for score in scores.values() if group in score), key=len, reverse=True)
    names = dict.fromkeys(name for values in groups for name, value in values.items() if not isinstance(value, dict))
    return [name for name in names if name != "n"]  # every table opens with n


def _cell(score: Mapping[str, Any], group: str, name: str) -> str:
    value = score[group].get(name)
    if value is None:
        return NONE
    if isinstance(value, int):
        return str(value)
    places = digits(group, name)
    sd = score.get("sd", {}).get(group, {}).get(name)
    return f"{value:.{places}f}" if sd is None else f"{value:.{places}f} ± {sd:.{places}f}"
