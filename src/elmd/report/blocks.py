"""What a page is made of: plain blocks that sections gather and the template renders; nothing here knows HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar


@dataclass(frozen=True, slots=True)
class Cell:
    """A table's cell.

    Attributes:
        href: where its number comes from. hint: shown on hovering.
        shade: 0 … 1, how dark the ground is; None: plain.
        small: a second, smaller line (or lines). strong: bold.
    """

    text: str
    href: str | None = None
    hint: str | None = None
    shade: float | None = None
    small: str | None = None
    strong: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells under columns, the first column naming the row. `groups`: a heading above the row of that index."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]  # of each a Cell, several, or text
    title: str = ""
    notes: Sequence[str] = ()
    groups: dict[int, str] = field(default_factory=dict)
    prose: bool = False  # cells are sentences: they wrap, and begin at the left
    kind: ClassVar[str] = "table"


@dataclass(frozen=True, slots=True)
class Heading:
    """The name of an experiment, where a section tells of several."""

    text: str
    kind: ClassVar[str] = "heading"


@dataclass(frozen=True, slots=True)
class Text:
    """A paragraph; `tone` is "", "note" (smaller) or "warning"."""

    text: str
    tone: str = ""
    kind: ClassVar[str] = "text"


@dataclass(frozen=True, slots=True)
class Plots:
    """Pictures side by side (SVG made by `elmd.report.svg`), under one legend of (style, name)."""

    pictures: Sequence[str]
    legend: Sequence[tuple[int, str]] = ()
    title: str = ""
    note: str = ""
    glyphs: bool = False  # the legend shows markers, not lines
    kind: ClassVar[str] = "plots"


@dataclass(frozen=True, slots=True)
class Verbatim:
    """Text as it stands in a file."""

    title: str
    text: str
    kind: ClassVar[str] = "verbatim"


@dataclass(frozen=True, slots=True)
class Files:
    """Links to files beside the page."""

    title: str
    files: Sequence[Cell]
    kind: ClassVar[str] = "files"


@dataclass(frozen=True, slots=True)
class Runs:
    """The table of runs: (id of the row or "", system, seed, links to what it made), one row per run."""

    rows: Sequence[tuple[str, str, str, Sequence[Cell]]]
    kind: ClassVar[str] = "runs"


@dataclass(frozen=True, slots=True)
class Fold:
    """Blocks that open on demand."""

    title: str
    blocks: Sequence[Any]
    kind: ClassVar[str] = "fold"


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page. One without blocks is named among what was left out, with `absent` as the reason."""

    id: str
    title: str
    blocks: Sequence[Any]
    absent: str = ""
