"""Small plots as SVG text that takes its colours from the page, so that dark and light come from one picture."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

#: Stand for the page's text and grid while matplotlib draws; `inline` puts the page's variables in their place.
INK, GRID = "#0a0b0c", "#0a0b0d"

#: Begins every id of a picture; a page puts something else there for each of its pictures, so that none share an id.
PICTURE = "elmd-picture"

#: Paul Tol's `bright` scheme, made for colour-blind readers; the page has a lighter set for the dark (`--c0` …).
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb")
MARKERS = ("o", "^", "s", "D", "v", "P", "X")
GLYPHS = ("●", "▲", "■", "◆", "▼", "✚", "✖")  # the same for the page's legends
DASHES: tuple[Any, ...] = ("-", (0, (4, 2)), (0, (1, 1.5)))

_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "elmd",
    "text.parse_math": False,  # names are users' text
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
}


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a plot. `style` is a number that decides colour, marker and dashes, as `look` says."""

    label: str
    xs: Sequence[float]
    ys: Sequence[float]
    style: int = 0
    errors: Sequence[float | None] | None = None


def lines(
    title: str,
    drawn: Sequence[Line],
    *,
    xlabel: str,
    ylabel: str = "",
    ticks: Sequence[float] | None = None,
    log: bool = False,
    markers: bool = False,
    zero: bool = False,
) -> str:
    """Lines over one axis.

    Args:
        ticks: places of the x axis to name, and no others.
        log: logarithmic x axis to base 2 (s = 1, 2, 4, …).
        markers: mark every point; for few points that were measured, not for curves.
        zero: the y axis begins at 0; for costs, whose ratio is what counts.
    """

    def draw(axis: Any) -> None:
        for line in drawn:
            colour, marker, dashes = look(line.style)
            axis.errorbar(
                line.xs, line.ys, yerr=_errors(line.errors), color=colour, linestyle=dashes, capsize=2.5,
                marker=marker if markers or len(line.xs) == 1 else None, alpha=1 if markers else 0.85,
            )  # fmt: skip
        axis.set_xlabel(xlabel)
        axis.set_ylabel(ylabel)
        if log:
            axis.set_xscale("log", base=2)
        if zero:
            axis.set_ylim(0, 1.2 * max(max(line.ys) for line in drawn))
        if ticks is not None:
            axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axis.minorticks_off()

    return _figure(title, draw)


def points(title: str, places: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """A cloud of points per name, in the order of the palette; axes without meaning are left out."""

    def draw(axis: Any) -> None:
        for i, some in enumerate(places.values()):
            colour, marker, _ = look(i)
            if some:
                xs, ys = zip(*some, strict=True)
                axis.scatter(xs, ys, s=13, color=colour, marker=marker, linewidths=0, alpha=0.85)
        axis.set_axis_off()

    return _figure(title, draw, height=3.1)


def boxes(title: str, values: Mapping[str, Sequence[float]], *, xlabel: str) -> str:
    """Rows of boxes: quartiles, whiskers from the 5th to the 95th percentile, the mean as a point."""

    def draw(axis: Any) -> None:
        names = list(values)
        drawn = axis.boxplot(
            [list(values[name]) for name in names], orientation="horizontal", whis=(5, 95), showfliers=False,
            showmeans=True, widths=0.6, tick_labels=names, patch_artist=True,
        )  # fmt: skip
        for box in drawn["boxes"]:
            box.set(facecolor=COLOURS[0], edgecolor=INK, alpha=0.75)
        for line in (*drawn["whiskers"], *drawn["caps"], *drawn["medians"]):
            line.set_color(INK)
        for mean in drawn["means"]:
            mean.set(marker="o", markerfacecolor=INK, markeredgecolor=INK, markersize=3)
        axis.invert_yaxis()
        axis.grid(False, axis="y")
        axis.set_xlabel(xlabel)

    return _figure(title, draw, width=5.6, height=0.9 + 0.27 * len(values))


def look(position: int) -> tuple[str, str, Any]:
    """Colour, marker and dashes of the system (or emotion) at `position`; beyond the palette the dashes differ."""
    number, again = position % len(COLOURS), position // len(COLOURS)
    return COLOURS[number], MARKERS[number], DASHES[again % len(DASHES)]


def inline(svg: str, label: str) -> str:
    """A picture by matplotlib as an element of an HTML page.

    Colours become the page's variables, fonts the page's own, ids begin with `PICTURE`, and what names an address (XML
    namespaces, metadata) is left out.
    """
    _, width, height = re.search(r'viewBox="0 0 (([\d.]+) ([\d.]+))"', svg).groups()  # type: ignore[union-attr]
    body = svg[svg.index(">", svg.index("<svg")) + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", body, flags=re.DOTALL)
    body = body.replace("xlink:href", "href")
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', body))
    body = re.sub(r' id="([^"]+)"', lambda match: match[0] if match[1] in used else "", body)
    body = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{PICTURE}-", body)
    body = re.sub(r"font-family: [^;\"]*; ?", "", body)  # the page's own
    for i, colour in enumerate(COLOURS):
        body = body.replace(colour, f"var(--c{i})")
    body = body.replace(INK, "currentColor").replace(GRID, "var(--grid)")
    body = re.sub(r"\n\s*", "\n", body)
    # matplotlib's points at 72 an inch; the page's pixels are 96
    size = f"max-width:{float(width) * 4 / 3:.0f}px"
    return (
        f'<svg viewBox="0 0 {width} {height}" style="{size};stroke-linejoin:round" role="img" '
        f'aria-label="{html.escape(label, quote=True)}">{body}'
    )


def _errors(errors: Sequence[float | None] | None) -> list[float] | None:
    """None where there is no spread at all (one seed), so that no bars of length 0 look like certainty."""
    return [error or 0.0 for error in errors] if errors and any(error is not None for error in errors) else None


def _figure(title: str, draw: Callable[[Any], None], *, width: float = 3.6, height: float = 2.5) -> str:
    import matplotlib
    from matplotlib.figure import Figure  # no pyplot: it would keep state and look for a screen

    out = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        axis = figure.subplots()
        draw(axis)
        axis.set_title(title)
        figure.savefig(
            out, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    return inline(out.getvalue(), title)
