"""Tables of a comparison. For each group of metrics one table of scores and one of the tests against the reference, so
that no score of a system stands without its interval and its verdict.

Marks: ° not distinguishable from the reference; † a floor is as good.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from elmd.engine.files import write_json
from elmd.evaluation.comparison import Comparison
from elmd.evaluation.score_tables import GROUPS, digits, meanings
from elmd.evaluation.tables import NONE, Cell, Document, Table, bullets, interval_text, markdown_escape, p_text
from elmd.evaluation.verdicts import DIFFERS, Row, Score

#: How to read the tables, below each set of them.
LEGEND = (
    "Scores: mean ± standard deviation over training seeds (the random floor's over its draws, retrieval only's over "
    "the retrievers of those seeds); in brackets the 95 % bootstrap interval over samples, all seeds of a sample taken "
    "together. Bold: the best system, floors left out.",
    "°: within noise of the reference, or n too small to say. †: a floor is as good or better.",
    "p: paired permutation (means over samples) or paired bootstrap (BLEU, chrF, F1), after Holm over all tests of the "
    "table. p of seeds: Welch's t over training seeds, not corrected; with three seeds it sees only differences of "
    "about 2.3 standard deviations. A difference counts where both are below 0.05 and it is larger than the spread "
    "over seeds.",
)


def metrics_of(comparison: Comparison, group: str) -> list[str]:
    """The metrics that any system has in a group, in order."""
    return list(dict.fromkeys(metric for row in comparison.rows for metric in row.cells.get(group, {})))


def score_table(
    comparison: Comparison,
    group: str,
    cell: Callable[[Row, str, Score], Any] | None = None,
    seeds: Callable[[Row], Any] | None = None,
) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of a group's scores, the paper's numbers beside ours; empty where no system has the group.

    Args:
        cell: makes a cell of (row, metric, score). seeds: makes the cell of a row's seeds. Default: for Markdown and
            LaTeX.
    """
    if cell is None:

        def cell(row: Row, metric: str, score: Score) -> Cell:
            interval = interval_text(score.low, score.high, digits(group, metric))
            return Cell(score_text(score, group, metric), small=interval, strong=score.best)

    metrics = metrics_of(comparison, group)
    beside = {m for m in metrics if group == "paper" and any(m in row.paper for row in comparison.rows)}
    columns = ["system", "seeds"]
    for metric in metrics:
        columns += [metric, "paper"] if metric in beside else [metric]
    rows = []
    for row in comparison.rows:
        if group not in row.cells:
            continue
        line: list[Any] = [row.name, (seeds or seeds_text)(row)]
        for metric in metrics:
            score = row.cells[group].get(metric)
            line.append(cell(row, metric, score) if score else NONE)
            if metric in beside:
                line.append(row.paper.get(metric, NONE))
        rows.append(line)
    return (columns, rows) if rows else ([], [])


def verdict_table(comparison: Comparison, group: str) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of a group's tests against the reference, a row per system and metric; empty if none."""
    columns = ["system", "metric", "difference", "p (Holm)", "p (seeds)", "verdict"]
    rows = [
        [row.name, metric, signed(score.difference, group, metric), p_text(score.p_holm), p_text(score.p_seeds),
         score.verdict or NONE]
        for row in comparison.rows
        for metric, score in row.cells.get(group, {}).items()
        if score.difference is not None
    ]  # fmt: skip
    return (columns, rows) if rows else ([], [])


def seeds_text(row: Row) -> str:
    """Training seeds × decodings of each; a third party's trainings are not known, floors have none."""
    trained = str(len(row.seeds)) if row.kind == "system" else NONE
    return trained if row.kind == "floor" else f"{trained} × {row.decodings}"


def score_text(score: Score, group: str, metric: str) -> str:
    """Mean ± standard deviation, with its marks."""
    places = digits(group, metric)
    spread = f" ± {score.sd:.{places}f}" if score.sd is not None else ""
    marks = ("°" if score.verdict not in (None, DIFFERS) else "") + ("†" if score.floor else "")
    return f"{score.mean:.{places}f}{spread}{marks}"


def signed(difference: float | None, group: str, metric: str) -> str:
    """A difference with its sign, and a real minus."""
    return NONE if difference is None else f"{difference:+.{digits(group, metric)}f}".replace("-", "−")


def comparison_document(comparison: Comparison, title: str) -> Document:
    """Warnings first, then the tables of each group, how to read them, notes, and what is missing."""
    about = about_text(comparison)
    parts: list[str | Table] = [about]
    if comparison.warnings:
        parts.append("\n>\n".join(f"> {markdown_escape(warning)}" for warning in comparison.warnings))
    gone = f" Missing: {'; '.join(map(missing_text, comparison.missing))}." if comparison.missing else ""
    for group, heading in GROUPS.items():
        columns, rows = score_table(comparison, group)
        if not rows:
            continue
        marks = " ° within noise or too few to say; † a floor is as good." if group in comparison.tests else ""
        caption = f"{title}. {heading}. {about}{marks}{gone}"
        parts.append(Table(columns, rows, heading, meanings(metrics_of(comparison, group)), caption))
        columns, rows = verdict_table(comparison, group)
        if rows:
            tests, reference = comparison.tests[group], comparison.reference
            caption = f"{title}. {heading}: tests against {reference}, Holm over {tests}."
            heading = f"Against {markdown_escape(reference)} ({tests} tests)"
            parts.append(Table(columns, rows, heading, caption=caption, level=3))
    signatures = [f"`{name}`: `{text}`" for name, text in comparison.signatures.items()]
    parts.append(bullets([*LEGEND, *comparison.notes, *signatures]))
    if comparison.missing:
        missing = [markdown_escape(missing_text(job)) for job in comparison.missing]
        parts += ["## Missing", bullets(missing)]
    return Document(title, parts, _records(comparison))


def _records(comparison: Comparison) -> list[Mapping[str, Any]]:
    """One record per system, group and metric, in full precision."""
    return [
        {
            "system": row.name, "kind": row.kind, "group": group, "metric": metric, "n": comparison.n,
            "seeds": len(row.seeds), "decodings": row.decodings, "mean": score.mean, "sd": score.sd, "low": score.low,
            "high": score.high, "reference": comparison.reference, "difference": score.difference, "p": score.p,
            "p_holm": score.p_holm, "p_seeds": score.p_seeds, "verdict": score.verdict, "best": score.best,
            "floor_as_good": score.floor, "paper": row.paper.get(metric) if group == "paper" else None,
        }
        for row in comparison.rows
        for group, scores in row.cells.items()
        for metric, score in scores.items()
    ]  # fmt: skip


def about_text(comparison: Comparison) -> str:
    """What was compared, in one sentence."""
    trained = sorted({seed for row in comparison.rows for seed in row.seeds if seed is not None})
    return (
        f"{comparison.name}: data {comparison.data}, split {comparison.split}, {comparison.n} samples, training seeds "
        f"{', '.join(map(str, trained))}."
    )


def missing_text(missing: Mapping[str, Any]) -> str:
    """One missing job: which, why, and its log."""
    log = f" (log: {missing['log']})" if missing["log"] else ""
    return f"{missing['system']}, seed {missing['seed']}: {missing['why']}{log}"


def write_comparison(folder: Path, comparison: Comparison, *, title: str, stem: str = "comparison") -> list[Path]:
    """Write `<stem>.md`, `.csv`, `.tex` and `.json` into `folder`, each atomically, and return their paths."""
    paths = [*comparison_document(comparison, title).write(folder, stem), folder / f"{stem}.json"]
    write_json(paths[-1], asdict(comparison))
    return paths
