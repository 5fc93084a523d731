"""Where the page's numbers come from: paths relative to it, ready for an `href`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from elmd.engine.store import MANIFEST
from elmd.evaluation.runs import Experiment, Run
from elmd.evaluation.tables import Cell


@dataclass(frozen=True, slots=True)
class Links:
    """Links of a page that lies in `folder`, for the numbers of one experiment.

    A number that one artifact gave links to its manifest. A mean over several links to its system's row of the page's
    table of runs, where the manifest of every run is linked.
    """

    folder: Path
    number: int  # of the experiment on this page
    systems: tuple[str, ...]

    @classmethod
    def of(cls, folder: Path, number: int, experiment: Experiment) -> Links:
        return cls(folder, number, tuple(experiment.systems))

    def to(self, path: Path) -> str:
        """A relative, quoted address of a file."""
        return quote(os.path.relpath(path.resolve(), self.folder.resolve()), safe="/=,+@")

    def anchor(self, system: str) -> str:
        """The id of a system's row in the table of runs."""
        return f"runs-{self.number}-{self.systems.index(system)}"

    def run(self, run: Run) -> str:
        """The manifest of what generated a run's predictions; a third party's predictions themselves."""
        made = run.artifact("replies")
        return self.to(run.path if made is None else made / MANIFEST)

    def cell(self, text: str, system: str, artifacts: Sequence[Path]) -> Cell:
        """A number of a system, made from these artifacts."""
        return self._of(text, system, [self.to(artifact / MANIFEST) for artifact in artifacts])

    def score(self, text: str, system: str, runs: Sequence[Run], **shown: Any) -> Cell:
        """A score of a system over its runs; `shown` as in `Cell`."""
        return self._of(text, system, [self.run(run) for run in runs], **shown)

    def _of(self, text: str, system: str, sources: Sequence[str], **shown: Any) -> Cell:
        if len(sources) == 1:
            return Cell(text, sources[0], **shown)
        return Cell(text, f"#{self.anchor(system)}", f"mean of {len(sources)} runs", **shown)
