"""Result tables as Markdown, CSV and LaTeX, always made from score objects, never typed.

Layout and escapes of every table are here: `markdown_table` and `latex_table` take plain text, whoever wrote it.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elmd.engine.files import write_text
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


@dataclass(frozen=True, slots=True)
class Bold:
    """Text of a cell that stands out."""

    text: str

    def __str__(self) -> str:
        return self.text


CellText = str | Bold


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[CellText]]) -> str:
    """A Markdown table of escaped text, the first column left, the others right."""
    lines: list[Sequence[CellText]] = [columns, *rows]
    told = ["| " + " | ".join(_markdown_cell(cell) for cell in line) + " |" for line in lines]
    return "\n".join([told[0], "| --- |" + " ---: |" * (len(columns) - 1), *told[1:]])


def latex_table(columns: Sequence[str], rows: Sequence[Sequence[CellText]], caption: str) -> str:
    """A booktabs table of escaped text, the first column left, the others right; needs `\\usepackage{booktabs}`."""
    return "\n".join(
        [
            r"\begin{table}[t]",
            r"\centering",
            rf"\caption{{{latex_escape(caption)}}}",
            rf"\begin{{tabular}}{{l{'r' * (len(columns) - 1)}}}",
            r"\toprule",
            " & ".join(latex_escape(column) for column in columns) + r" \\",
            r"\midrule",
            *(" & ".join(_latex_cell(cell) for cell in row) + r" \\" for row in rows),
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
    )


#: First line of every LaTeX file.
LATEX_NEEDS = "% needs \\usepackage{booktabs}, and ctex where names are Chinese\n"


def digits(group: str, metric: str) -> int:
    """Decimals that a score is shown with."""
    return 2 if group in PROTOCOLS or metric == "length_char" else 4


def with_floors(scores: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The rows of a table from the content of scores.json: systems, then floors by the name `floor: …`."""
    signatures = {"signatures": scores.get("signatures", {})}
    rows = {**scores["systems"], **{f"floor: {name}": floor for name, floor in scores["floors"].items()}}
    return {name: {**signatures, **row} for name, row in rows.items()}


def group_table(scores: Scores, group: str) -> tuple[list[str], list[list[str]]]:
    """Columns and formatted rows of one group; a dash where a system lacks the score. Empty if none has the group."""
    names = _metrics(scores, group)
    rows = [
        [system, str(one["n"]), *(_cell(one, group, name) for name in names)]
        for system, one in scores.items()
        if group in one
    ]
    return (["system", "n", *names], rows) if rows else ([], [])


def markdown(scores: Scores, *, title: str, notes: Sequence[str] = (), failed: Mapping[str, str] | None = None) -> str:
    """One table per group with the meaning of its metrics, then notes, then what could not be scored (name -> why)."""
    parts = [f"# {title}"]
    for group, heading in GROUPS.items():
        columns, rows = group_table(scores, group)
        if not rows:
            continue
        parts.append(f"## {heading}")
        parts.append(markdown_table(columns, rows))
        parts.append("\n".join(f"- `{name}`: {MEANING[name]}" for name in columns if name in MEANING))
    if any("sd" in one for one in scores.values()):
        notes = [*notes, "Scores with ± are means over decode seeds with their standard deviation."]
    signatures = {name: text for one in scores.values() for name, text in one.get("signatures", {}).items()}
    notes = [*notes, *(f"`{name}`: `{text}`" for name, text in signatures.items())]
    if notes:
        parts.append("\n".join(f"- {note}" for note in notes))
    if failed:
        parts.append("## Could not be scored")
        parts.append("\n".join(f"- {markdown_escape(name)}: {markdown_escape(why)}" for name, why in failed.items()))
    return "\n\n".join(part for part in parts if part) + "\n"


def csv_text(scores: Scores) -> str:
    """One row per system in full precision: `group/metric`, and its `_sd`, `_low`, `_high` where they are known."""
    rows = []
    for system, one in scores.items():
        row: dict[str, Any] = {"system": system, "n": one["n"]}
        for group in GROUPS:
            for name in _metrics(scores, group):
                key = f"{group}/{name}"
                row[key] = one.get(group, {}).get(name)
                if (sd := one.get("sd", {}).get(group, {}).get(name)) is not None:
                    row[f"{key}_sd"] = sd
                if (interval := one.get("intervals", {}).get(group, {}).get(name)) is not None:
                    row[f"{key}_low"], row[f"{key}_high"] = interval
        rows.append(row)
    columns = list(dict.fromkeys(column for row in sorted(rows, key=len, reverse=True) for column in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, columns or ["system", "n"], restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def latex(scores: Scores, *, title: str) -> str:
    """One booktabs table per group."""
    tables = []
    for group, heading in GROUPS.items():
        columns, rows = group_table(scores, group)
        if rows:
            tables.append(latex_table(columns, rows, f"{title}. {heading}".replace("`", "")))
    return LATEX_NEEDS + "\n\n".join(tables) + "\n"


def write_tables(
    folder: Path,
    scores: Scores,
    *,
    title: str,
    stem: str = "scores",
    notes: Sequence[str] = (),
    failed: Mapping[str, str] | None = None,
) -> list[Path]:
    """Write `<stem>.md`, `.csv` and `.tex` into `folder`, each atomically, and return their paths.

    Args:
        scores: what `elmd.evaluation.score.score` gives, by system; of a scores.json, `with_floors(it)`.
        notes: sentences under the Markdown tables.
        failed: what could not be scored: name -> why; listed in Markdown.
    """
    texts = {
        "md": markdown(scores, title=title, notes=notes, failed=failed),
        "csv": csv_text(scores),
        "tex": latex(scores, title=title),
    }
    paths = [folder / f"{stem}.{ending}" for ending in texts]
    for path, text in zip(paths, texts.values(), strict=True):
        write_text(path, text)
    return paths


def _metrics(scores: Scores, group: str) -> list[str]:
    """Names of a group's plain scores, in the order of the system that has most of them."""
    found = sorted((one[group] for one in scores.values() if group in one), key=len, reverse=True)
    names = dict.fromkeys(name for one in found for name, value in one.items() if not isinstance(value, dict))
    return [name for name in names if name != "n"]  # every table opens with n


def _cell(one: Mapping[str, Any], group: str, name: str) -> str:
    value = one[group].get(name)
    if value is None:
        return "–"
    if isinstance(value, int):
        return str(value)
    places = digits(group, name)
    sd = one.get("sd", {}).get(group, {}).get(name)
    return f"{value:.{places}f}" if sd is None else f"{value:.{places}f} ± {sd:.{places}f}"


def markdown_escape(text: str) -> str:
    """`text` in one line, so that Markdown shows it as it is."""
    return "".join(f"\\{character}" if character in "\\|*<`" else character for character in " ".join(text.split()))


def _markdown_cell(cell: CellText) -> str:
    return f"**{markdown_escape(cell.text)}**" if isinstance(cell, Bold) else markdown_escape(cell)


#: Brackets and stars too: after the end of a row, LaTeX takes them for an option of it.
_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", "±": r"$\pm$", "×": r"$\times$", "–": "--", "−": r"$-$", "[": "{[}", "]": "{]}", "*": "{*}",
    "°": r"$^{\circ}$", "†": r"$^{\dagger}$",
}  # fmt: skip


def latex_escape(text: str) -> str:
    """`text` in one line, so that LaTeX prints it as it is."""
    return "".join(_LATEX.get(character, character) for character in " ".join(text.split()))


def _latex_cell(cell: CellText) -> str:
    return rf"\textbf{{{latex_escape(cell.text)}}}" if isinstance(cell, Bold) else latex_escape(cell)
