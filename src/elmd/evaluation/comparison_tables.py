"""A comparison of systems as Markdown, CSV, LaTeX and JSON.

For each group of metrics one table of scores and one of the tests against the reference, so that no score of a system
stands without its interval and its verdict. Marks: ° not told apart from the reference; † a floor is as good.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from elmd.engine.files import write_json, write_text
from elmd.evaluation.comparison import DIFFERS, Cell, Comparison, Row
from elmd.evaluation.tables import (
    GROUPS,
    LATEX_NEEDS,
    Bold,
    CellText,
    digits,
    latex_table,
    markdown_escape,
    markdown_table,
)
from elmd.metrics.text import MEANING

#: Where a system has no such score.
NONE = "–"

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
    comparison: Comparison, group: str, *, intervals: Literal["beside", "below"] | None = "beside"
) -> tuple[list[str], list[list[CellText]]]:
    """Columns and rows of a group's scores, the paper's numbers beside ours; empty where no system has the group.

    Args:
        intervals: the bootstrap intervals in the scores' cells, or in a row of their own below each system's.
    """
    metrics = metrics_of(comparison, group)
    beside = [m for m in metrics if group == "paper" and any(m in row.paper for row in comparison.rows)]
    columns = ["system", "seeds"]
    for metric in metrics:
        columns += [metric, "paper"] if metric in beside else [metric]
    rows: list[list[CellText]] = []
    for row in comparison.rows:
        if group not in row.cells:
            continue
        line: list[CellText] = [row.name, seeds_text(row)]
        below: list[CellText] = ["", ""]
        for metric in metrics:
            cell = row.cells[group].get(metric)
            interval = interval_text(cell, group, metric) if cell else ""
            text = cell_text(cell, group, metric) if cell else NONE
            text = f"{text} {interval}" if intervals == "beside" and interval else text
            line.append(Bold(text) if cell and cell.best else text)
            below.append(interval)
            if metric in beside:
                line.append(row.paper.get(metric, NONE))
                below.append("")
        rows.append(line)
        if intervals == "below" and any(below):
            rows.append(below)
    return (columns, rows) if rows else ([], [])


def verdict_table(comparison: Comparison, group: str) -> tuple[list[str], list[list[CellText]]]:
    """Columns and rows of a group's tests against the reference, a row per system and metric; empty if none."""
    columns = ["system", "metric", "difference", "p (Holm)", "p (seeds)", "verdict"]
    rows: list[list[CellText]] = [
        [row.name, metric, signed(cell.difference, group, metric), p_text(cell.p_holm), p_text(cell.p_seeds),
         cell.verdict or NONE]
        for row in comparison.rows
        for metric, cell in row.cells.get(group, {}).items()
        if cell.difference is not None
    ]  # fmt: skip
    return (columns, rows) if rows else ([], [])


def seeds_text(row: Row) -> str:
    """Training seeds × decodings of each; a third party's trainings are not known, floors have none."""
    trained = str(len(row.seeds)) if row.kind == "system" else NONE
    return trained if row.kind == "floor" else f"{trained} × {row.decodings}"


def cell_text(cell: Cell, group: str, metric: str) -> str:
    """Mean ± standard deviation, with its marks."""
    places = digits(group, metric)
    spread = f" ± {cell.sd:.{places}f}" if cell.sd is not None else ""
    marks = ("°" if cell.verdict not in (None, DIFFERS) else "") + ("†" if cell.floor else "")
    return f"{cell.mean:.{places}f}{spread}{marks}"


def interval_text(cell: Cell, group: str, metric: str) -> str:
    """The bootstrap interval in brackets, empty where there is none."""
    if cell.low is None or cell.high is None:
        return ""
    places = digits(group, metric)
    return f"[{cell.low:.{places}f}, {cell.high:.{places}f}]"


def signed(difference: float | None, group: str, metric: str) -> str:
    """A difference with its sign, and a real minus."""
    return NONE if difference is None else f"{difference:+.{digits(group, metric)}f}".replace("-", "−")


def p_text(p: float | None) -> str:
    """A p-value as papers print it."""
    return NONE if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def comparison_markdown(comparison: Comparison, title: str) -> str:
    """Warnings first, then the tables of each group, how to read them, notes, and what is missing."""
    parts = [f"# {title}", about(comparison)]
    if comparison.warnings:
        parts.append(
            "\n".join(f"> {markdown_escape(warning)}\n>" for warning in comparison.warnings).removesuffix("\n>")
        )
    for group, heading in GROUPS.items():
        columns, rows = score_table(comparison, group)
        if not rows:
            continue
        parts += [f"## {heading}", markdown_table(columns, rows)]
        parts.append(
            "\n".join(f"- `{name}`: {MEANING[name]}" for name in metrics_of(comparison, group) if name in MEANING)
        )
        columns, tests = verdict_table(comparison, group)
        if tests:
            parts.append(f"### Against {markdown_escape(comparison.reference)} ({comparison.tests[group]} tests)")
            parts.append(markdown_table(columns, tests))
    signed_by = [f"`{name}`: `{text}`" for name, text in comparison.signatures.items()]
    parts.append("\n".join(f"- {note}" for note in (*LEGEND, *comparison.notes, *signed_by)))
    if comparison.missing:
        parts.append("## Missing")
        parts.append("\n".join(f"- {markdown_escape(missing_text(one))}" for one in comparison.missing))
    return "\n\n".join(part for part in parts if part) + "\n"


def comparison_latex(comparison: Comparison, title: str) -> str:
    """Two booktabs tables per group (scores; tests), their caption saying data, seeds and what is missing."""
    tables = []
    for group, heading in GROUPS.items():
        caption = f"{title}. {heading}. {about(comparison)}".replace("`", "")
        columns, rows = score_table(comparison, group, intervals="below")
        if not rows:
            continue
        marks = " ° within noise or too few to say; † a floor is as good." if group in comparison.tests else ""
        gone = f" Missing: {'; '.join(map(missing_text, comparison.missing))}." if comparison.missing else ""
        tables.append(latex_table(columns, rows, f"{caption}{marks}{gone}"))
        columns, tests = verdict_table(comparison, group)
        if tests:
            told = f"{title}. {heading}: tests against {comparison.reference}, Holm over {comparison.tests[group]}."
            tables.append(latex_table(columns, tests, told.replace("`", "")))
    return LATEX_NEEDS + "\n\n".join(tables) + "\n"


def comparison_csv(comparison: Comparison) -> str:
    """One line per system, group and metric, in full precision."""
    lines: list[Mapping[str, Any]] = [
        {
            "system": row.name, "kind": row.kind, "group": group, "metric": metric, "n": comparison.n,
            "seeds": len(row.seeds), "decodings": row.decodings, "mean": cell.mean, "sd": cell.sd, "low": cell.low,
            "high": cell.high, "reference": comparison.reference, "difference": cell.difference, "p": cell.p,
            "p_holm": cell.p_holm, "p_seeds": cell.p_seeds, "verdict": cell.verdict, "best": cell.best,
            "floor_as_good": cell.floor, "paper": row.paper.get(metric) if group == "paper" else None,
        }
        for row in comparison.rows
        for group, cells in row.cells.items()
        for metric, cell in cells.items()
    ]  # fmt: skip
    out = io.StringIO()
    writer = csv.DictWriter(out, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


def about(comparison: Comparison) -> str:
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
    texts = {
        "md": comparison_markdown(comparison, title),
        "csv": comparison_csv(comparison),
        "tex": comparison_latex(comparison, title),
    }
    paths = [folder / f"{stem}.{ending}" for ending in (*texts, "json")]
    for path, text in zip(paths, texts.values(), strict=False):
        write_text(path, text)
    write_json(paths[-1], asdict(comparison))
    return paths
