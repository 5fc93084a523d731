"""What people see: log lines, progress bars and tables, all on standard error.

Standard output carries only what scripts read (`artifact: PATH`), so both can be used at once.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.table import Table
from tqdm.auto import tqdm

T = TypeVar("T")

logger = logging.getLogger("elmd")


def is_main() -> bool:
    """Whether this process speaks for the run (rank 0, or the only one)."""
    return os.environ.get("RANK", "0") == "0"


def console() -> Console:
    """A console on the *current* standard error, wide enough for a table when that is not a terminal."""
    return Console(file=sys.stderr, width=None if sys.stderr.isatty() else 120)


def setup(level: int = logging.INFO) -> None:
    """Send ELMD's log lines to standard error; called by command lines only, never on import."""
    logger.handlers = [RichHandler(console=console(), show_path=False, markup=False, log_time_format="%H:%M:%S")]
    logger.setLevel(level if is_main() else logging.ERROR)  # the others would repeat every warning
    logger.propagate = False


def bar(
    what: str, items: Iterable[Any] | None = None, *, total: int | None = None, initial: int = 0, unit: str = "it",
    delay: float = 0,
) -> tqdm:  # fmt: skip
    """A progress bar on rank 0, a line every ten seconds where there is no terminal.

    Args:
        delay: seconds before it shows.
    """
    seen = sys.stderr.isatty()
    return tqdm(
        items, desc=what, total=total, initial=initial, unit=unit, disable=not is_main(),
        file=sys.stderr if seen else Lines(), delay=delay if seen else 10, mininterval=0.2 if seen else 10,
        dynamic_ncols=seen, ncols=None if seen else 100, leave=seen,
    )  # fmt: skip


class Lines:
    """Where bars go when there is no terminal: each state on a line of its own, so that log lines stay whole."""

    def write(self, text: str) -> None:
        if line := text.strip("\r\n "):
            sys.stderr.write(line + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


def progress(items: Iterable[T], what: str, *, total: int | None = None, unit: str = "it") -> Iterator[T]:
    """`items`, with a progress bar once a second has passed."""
    yield from bar(what, items, total=total, unit=unit, delay=1)


def cell(value: Any) -> str:
    """A table cell: floats to four significant digits or two decimals, None as a dash."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.2f}" if abs(value) >= 10 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print a table on rank 0; every column but the first is right-aligned."""
    if not is_main():
        return
    shown = Table(header_style="bold")
    for i, name in enumerate(columns):
        shown.add_column(name, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        shown.add_row(*(escape(cell(value)) for value in row))  # elmd[faiss] is no markup
    out = console()
    out.print(f"\n{title}", style="bold", markup=False, highlight=False)  # a Table's own title wraps at its width
    out.print(shown)
