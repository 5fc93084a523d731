"""`python -m elmd.report EXPERIMENT…`: tables, plots, cases and cards as one page; the tables as files too."""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from elmd import log
from elmd.cli import guard
from elmd.errors import DataError
from elmd.log import logger

if TYPE_CHECKING:
    from elmd.evaluation.runs import Experiment

PAGE, ERRORS = "report.html", "errors.html"
CASES = 60


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m elmd.report",
        description=(
            "Write report.html (one file: no network, for phones too) and the same tables as Markdown, CSV and LaTeX."
        ),
        epilog=(
            "example: python -m elmd.report runs/experiments/demo_table2 'somebody else=theirs.jsonl' "
            "runs/experiments/demo_fig6 --human runs/experiments/demo_table2/human"
        ),
    )
    parser.add_argument(
        "what", nargs="+", metavar="EXPERIMENT|NAME=FILE",
        help="an experiment's folder; or predictions (JSONL) that join the experiment before them, or stand alone",
    )  # fmt: skip
    parser.add_argument(
        "--human", type=Path, metavar="DIR", help="folder of a scored study (python -m elmd.human score)"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="default: report/ in the first folder, or beside the first file"
    )
    parser.add_argument(
        "--cases", type=int, default=CASES, metavar="N", help="samples of each gallery (default: %(default)s)"
    )
    given = parser.parse_args(arguments)
    if given.cases < 0:
        parser.error("--cases: must be 0 or more")
    log.setup()
    guard(lambda: report(given.what, human=given.human, out=given.out, cases=given.cases))


def report(what: Sequence[str], *, human: Path | None = None, out: Path | None = None, cases: int = CASES) -> Path:
    """Make the report; returns its folder.

    Raises:
        DataError: something that is named cannot be read, or does not belong together.
    """
    from elmd.report.study import Study

    started = time.monotonic()
    study = None if human is None else Study.read(human)
    given = group(what)

    import transformers

    from elmd.engine.files import write_text
    from elmd.evaluation.comparison import compare_systems, reference_of
    from elmd.evaluation.comparison_tables import write_comparison
    from elmd.report.links import Links
    from elmd.report.page import Part, render, sections

    transformers.utils.logging.disable_progress_bar()
    first = given[0].folder or next(iter(given[0].others.values())).parent
    folder = out or first / "report"
    parts = []
    for number, named in enumerate(given):
        experiment = named.read()
        logger.info("scoring %d predictions files of %s", len(experiment.runs), experiment.name)
        comparison = compare_systems(experiment, reference_of(experiment))
        parts.append(Part(experiment, comparison, Links.of(folder, number, experiment)))
    whole = sections(parts, study, cases)
    for section in whole:
        if not section.blocks:
            logger.info("left out: %s (%s)", section.title, section.absent)
    title = "Report: " + ", ".join(part.experiment.name for part in parts)
    text = render(title, whole)
    missing = [section for section in whole if section.id == "missing" and section.blocks]
    for part in parts:
        write_comparison(folder, part.comparison, title=part.experiment.name, stem=part.experiment.name)
    if human is not None:
        for ending in ("md", "csv", "tex"):
            shutil.copy(human / f"human.{ending}", folder)
    (folder / ERRORS).unlink(missing_ok=True)
    if missing:
        write_text(folder / ERRORS, render(f"What is missing: {title.removeprefix('Report: ')}", missing))
    write_text(folder / PAGE, text)
    seconds = time.monotonic() - started
    logger.info("%s: %.1f MB, in %.0f s", folder / PAGE, len(text.encode()) / 1e6, seconds)
    print(f"artifact: {folder / PAGE}", flush=True)
    return folder


@dataclass
class Given:
    """An experiment of the command line: its folder (None: predictions files alone), and the files that join it."""

    folder: Path | None
    others: dict[str, Path] = field(default_factory=dict)

    def read(self) -> Experiment:
        """
        Raises:
            DataError: a file that cannot be read, or runs that do not belong together.
        """
        from elmd.evaluation.runs import Experiment, Run, read_experiment

        if self.folder is not None:
            logger.info("reading %s", self.folder)
            return read_experiment(self.folder, self.others)
        runs = [Run.of_file(name, path) for name, path in self.others.items()]
        return Experiment("predictions", runs, [])


def group(what: Sequence[str]) -> list[Given]:
    """Experiments' folders, each with the predictions files named after it; files before any folder stand alone.

    Raises:
        DataError: a word that is neither folder nor NAME=FILE; a name or an experiment given twice.
    """
    groups: list[Given] = []
    for word in what:
        if Path(word).is_dir():
            name = Path(word).absolute().name  # their tables are files of this name
            if name in [other.folder.absolute().name for other in groups if other.folder is not None]:
                raise DataError("is given twice", where=word, fix="name each experiment once")
            groups.append(Given(Path(word)))
            continue
        name, equals, path = word.partition("=")
        if not equals or not name:
            raise DataError("is no folder", where=word, fix="name an experiment's folder, or NAME=FILE")
        if not groups:
            groups.append(Given(None))
        if name in groups[-1].others:
            raise DataError(f"the name {name!r} is given twice", where=word, fix="give another name")
        groups[-1].others[name] = Path(path)
    return groups


if __name__ == "__main__":
    main()
