"""The one writer of tables: others hand it columns, rows and notes, and it makes Markdown, CSV and LaTeX of them.

HTML is made of the same objects by the report's template. Layout and escapes are here; the text of a cell is plain,
whoever wrote it.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from elmd.engine.files import write_text

#: Where a row has no such number.
NONE = "–"

#: First line of every LaTeX file.
LATEX_NEEDS = "% needs \\usepackage{booktabs}, and ctex where names are Chinese\n"


@dataclass(frozen=True, slots=True)
class Cell:
    """A table's cell; plain text stands for one without the rest.

    Attributes:
        href: where its number comes from. hint: shown on hovering. shade: 0 … 1, how dark the ground is; None: plain.
            These three are for HTML only.
        small: a second, smaller line (or lines): beside the text in Markdown, in a row below in LaTeX.
        strong: bold.
    """

    text: str
    href: str | None = None
    hint: str | None = None
    shade: float | None = None
    small: str | None = None
    strong: bool = False

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells under columns, the first column naming the row.

    Attributes:
        rows: of each a Cell, text, or (for HTML only) several of them.
        title: the heading above it, with backticks where Markdown has code; a Markdown file has it at `level`.
        notes: sentences below it.
        caption: in LaTeX.
        groups: for HTML only, a heading above the row of that index. prose: likewise, cells are sentences: they wrap,
            and begin at the left.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    title: str = ""
    notes: Sequence[str] = ()
    caption: str = ""
    level: int = 2
    groups: Mapping[int, str] = field(default_factory=dict)
    prose: bool = False
    kind: ClassVar[str] = "table"

    @property
    def markdown(self) -> str:
        """Title, table (the first column left, the others right) and notes."""
        rule = "| --- |" + " ---: |" * (len(self.columns) - 1)
        head, *body = ["| " + " | ".join(map(_markdown_cell, row)) + " |" for row in (self.columns, *self.rows)]
        table = "\n".join([head, rule, *body])
        heading = f"{'#' * self.level} {self.title}" if self.title else ""
        return "\n\n".join(filter(None, [heading, table, bullets(self.notes)]))

    @property
    def latex(self) -> str:
        """A booktabs table, the first column left, the others right."""
        lines = [" & ".join(map(latex_escape, self.columns)) + r" \\", r"\midrule"]
        for row in self.rows:
            lines.append(" & ".join(map(_latex_cell, row)) + r" \\")
            below = [cell.small or "" if isinstance(cell, Cell) else "" for cell in row]
            if any(below):
                lines.append(" & ".join(map(latex_escape, below)) + r" \\")
        return "\n".join(
            [
                r"\begin{table}[t]",
                r"\centering",
                rf"\caption{{{latex_escape(self.caption.replace('`', ''))}}}",
                rf"\begin{{tabular}}{{l{'r' * (len(self.columns) - 1)}}}",
                r"\toprule",
                *lines,
                r"\bottomrule",
                r"\end{tabular}",
                r"\end{table}",
            ]
        )


@dataclass(frozen=True)
class Document:
    """Tables with the text around them, as files of one name.

    Attributes:
        parts: in order: tables, and paragraphs in Markdown that only the Markdown file has.
        records: the rows of the CSV file, in full precision; a key that some lack is left empty there.
    """

    title: str
    parts: Sequence[str | Table]
    records: Sequence[Mapping[str, Any]]

    @property
    def markdown(self) -> str:
        parts = [part if isinstance(part, str) else part.markdown for part in self.parts]
        return "\n\n".join(filter(None, [f"# {self.title}", *parts])) + "\n"

    @property
    def latex(self) -> str:
        return LATEX_NEEDS + "\n\n".join(part.latex for part in self.parts if isinstance(part, Table)) + "\n"

    @property
    def csv(self) -> str:
        columns = dict.fromkeys(key for record in sorted(self.records, key=len, reverse=True) for key in record)
        out = io.StringIO()
        writer = csv.DictWriter(out, list(columns), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.records)
        return out.getvalue()

    def write(self, folder: Path, stem: str) -> list[Path]:
        """Write `<stem>.md`, `.csv` and `.tex` into `folder`, each atomically, and return their paths."""
        texts = {"md": self.markdown, "csv": self.csv, "tex": self.latex}
        for ending, text in texts.items():
            write_text(folder / f"{stem}.{ending}", text)
        return [folder / f"{stem}.{ending}" for ending in texts]


def bullets(sentences: Sequence[str]) -> str:
    """Sentences in Markdown as a list."""
    return "\n".join(f"- {sentence}" for sentence in sentences)


def p_text(p: float | None) -> str:
    """A p-value as papers print it."""
    return NONE if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def interval_text(low: float | None, high: float | None, places: int, scale: float = 1) -> str | None:
    """An interval in brackets, None where there is none."""
    return None if low is None or high is None else f"[{scale * low:.{places}f}, {scale * high:.{places}f}]"


def markdown_escape(text: str) -> str:
    """`text` in one line, so that Markdown shows it as it is."""
    return "".join(f"\\{character}" if character in "\\|*<`" else character for character in " ".join(text.split()))


def _markdown_cell(cell: str | Cell) -> str:
    if isinstance(cell, str):
        return markdown_escape(cell)
    text = markdown_escape(f"{cell.text} {cell.small}" if cell.small else cell.text)
    return f"**{text}**" if cell.strong else text


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


def _latex_cell(cell: str | Cell) -> str:
    text = latex_escape(str(cell))
    return rf"\textbf{{{text}}}" if isinstance(cell, Cell) and cell.strong else text
