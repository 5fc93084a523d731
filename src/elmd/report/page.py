"""The whole page: gathers the sections of experiments and renders them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

from elmd.evaluation.comparison import Comparison
from elmd.evaluation.runs import Experiment, Run
from elmd.evaluation.systems import SYMBOLS
from elmd.labels import EMOTIONS
from elmd.report import cards, findings, results, svg
from elmd.report.blocks import Heading, Section, Text
from elmd.report.gallery import gallery
from elmd.report.links import Links
from elmd.report.study import Study, study_blocks
from elmd.report.sweeps import cost, sweep

#: The palette on a dark ground: the same hues, lighter where they were too dark to see.
DARK = ("#7ba3d0", "#f08a96", "#59b86a", "#d9cb63", "#7fd4f3", "#d06fae", "#9aa0a6")
LIGHT = (*svg.COLOURS[:6], "#8d9299")  # the scheme's grey is too pale for small marks on white


@dataclass(frozen=True)
class Part:
    """One experiment of the page: its main system is what the others are held against and whose cards are shown."""

    experiment: Experiment
    comparison: Comparison
    links: Links

    @property
    def main(self) -> str:
        return self.comparison.reference

    @property
    def first(self) -> Run:
        return self.experiment.systems[self.main][0]


def sections(parts: Sequence[Part], study: Study | None, cases: int) -> list[Section]:
    """All sections in reading order; those without blocks say why.

    Args:
        study: a scored human evaluation. cases: of the gallery of each experiment.
    """

    def each(id_: str, title: str, make: Callable[[Part], list[Any]], absent: str) -> Section:
        blocks: list[Any] = []
        for part in parts:
            if made := make(part):
                blocks += [Heading(part.experiment.name), *made] if len(parts) > 1 else made
        return Section(id_, title, blocks, "" if blocks else absent)

    first = parts[0]
    human = Section("human", "Human evaluation", [], "no study is given (--human DIR)")
    if study is not None:
        config = first.first.config
        dataset = config["paper_dataset"] if config else "M3ED"
        human = Section("human", "Human evaluation", study_blocks(study, dataset, first.links))
    whys: list[str] = []

    def vectors(part: Part) -> list[Any]:
        blocks, why = findings.vectors(part.experiment, part.main, part.links)
        whys.append(why)
        return blocks

    def distributions(part: Part) -> list[Any]:
        return [*findings.distributions(part.experiment), *cards.odd(part.experiment)]

    def sweeps(part: Part) -> list[Any]:
        pictures = [block for key in SYMBOLS for block in sweep(part.comparison, part.experiment, key)]
        return pictures + cost(part.comparison, part.experiment, part.links)

    return [
        each("summary", "Summary", summary, ""),
        each("tables", "Scores", lambda p: results.tables(p.comparison, p.experiment, p.links), ""),
        human,
        each("sweeps", "Sweeps", sweeps, "no number is varied here (s for Fig. 6, or m)"),
        each("training", "Training curves", lambda p: findings.curves(p.experiment, p.main),
             "no run here was trained by ELMD (predictions only)"),
        each("rep", "Response emotion prediction", lambda p: findings.rep(p.experiment, p.main, p.links),
             "no run here has the stage REP"),
        replace(each("vectors", "Utterances before and after ERM", vectors, ""), absent="; ".join(dict.fromkeys(whys))),
        each("distributions", "Lengths and emotions", distributions, ""),
        each("cases", "Cases", lambda p: [gallery(p.experiment, p.main, cases)] if cases else [], "--cases 0"),
        each("missing", "What is missing", lambda p: cards.missing(p.experiment), "nothing is missing"),
        each("data", "Data card", lambda p: cards.data(p.experiment, p.first, p.links), "no data set is known"),
        each("prompt", "Prompt card", lambda p: cards.prompt(p.first), "no prompt is known"),
        each("decoding", "Decoding and seeds", lambda p: cards.decoding(p.experiment), ""),
        each("provenance", "Code and machine", lambda p: cards.provenance(p.experiment), "no manifest is known"),
        each("runs", "Runs", lambda p: cards.runs(p.experiment, p.links), ""),
    ]  # fmt: skip


def summary(part: Part) -> list[Any]:
    """What was run, and what came out, in two paragraphs."""
    comparison, experiment = part.comparison, part.experiment
    own = [row for row in comparison.rows if row.kind == "system"]
    ran = f"{len(experiment.runs)} runs of {len(experiment.systems)} systems" if len(experiment.runs) > 1 else "One run"
    text = f"{ran}: {', '.join(experiment.systems)}."
    if own:
        seeds = sorted({seed for row in own for seed in row.seeds if seed is not None})
        config = part.first.config
        text += (
            f" Training seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}; language model "
            f"{config['llm']['name']}, vision {config['vision']['name']}, retriever {config['retriever']['name']}. "
            "Commits, versions and devices: under Code and machine."
        )
    if experiment.missing:
        n = len(experiment.missing)
        text += f" {n} job{'s are' if n > 1 else ' is'} missing: why is under What is missing."
    return [Text(results.headline(comparison), "lead"), Text(text)]


def render(title: str, sections: Sequence[Section]) -> str:
    """The page as HTML; all text is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("elmd.report", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=StrictUndefined,
    )  # fmt: skip
    number = count()
    environment.filters["numbered"] = lambda picture: picture.replace(svg.PICTURE, f"p{next(number)}")
    return environment.get_template("report.html.jinja").render(
        title=title,
        sections=[section for section in sections if section.blocks],
        absent=[section for section in sections if not section.blocks],
        emotions=[emotion.value for emotion in EMOTIONS],
        colours=len(svg.COLOURS),
        marks=svg.GLYPHS,
        light=LIGHT,
        dark=DARK,
    )
