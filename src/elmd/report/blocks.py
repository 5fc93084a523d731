"""What a page is made of beside tables: plain blocks that sections gather and the template renders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from elmd.evaluation.tables import Cell


@dataclass(frozen=True, slots=True)
class Heading:
    """The name of an experiment, where a section is about several."""

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
    """Pictures side by side (SVG made by `elmd.report.svg`), under a shared legend of (style, name)."""

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
