"""Jobs of an experiment, as their folders and the sweep's record describe them.

A job's folder holds `artifacts.json` (see `elmd.engine.chain.Chain.point`) and, once evaluated, `predictions.jsonl`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from elmd.engine.files import read_json
from elmd.engine.store import MANIFEST
from elmd.errors import DataError
from elmd.evaluation.systems import settings_of, system_name

ARTIFACTS, PREDICTIONS, SWEEP = "artifacts.json", "predictions.jsonl", "sweep.json"


@dataclass(frozen=True)
class JobFolder:
    """A job of an experiment: what it is, and the finished artifact of each stage, where it has come so far.

    Attributes:
        system: its name without what a sweep varies. axes: what the sweep sets for it.
        config, artifacts, roles: as in its `artifacts.json`; empty where only `sweep.json` knows the job.
    """

    folder: Path
    system: str
    seed: int
    axes: Mapping[str, Any]
    config: Mapping[str, Any]
    artifacts: Mapping[str, Path]
    roles: Mapping[str, str]

    @classmethod
    def read(cls, path: Path) -> JobFolder:
        """From the `artifacts.json` that training writes beside what it made.

        Raises:
            DataError: the file is not that.
        """
        try:
            about = read_json(path)
            config, roles, axes = about["config"], about["roles"], about["axes"] or {}
            artifacts = {stage: (path.parent / place).resolve() for stage, place in about["artifacts"].items()}
            finished = {stage: folder for stage, folder in artifacts.items() if (folder / MANIFEST).is_file()}
            return cls(path.parent, system_name(config), config["seed"], axes, config, finished, roles)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            fix = "run python -m elmd.evaluate with this job's choices again"
            raise DataError(f"is not what elmd.train writes ({type(error).__name__})", where=path, fix=fix) from None

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Every value of the job by dotted key, and the choice of each group by the group's name."""
        return settings_of(self.config, self.axes)

    @property
    def evaluated(self) -> bool:
        return (self.folder / PREDICTIONS).is_file()

    @property
    def why_missing(self) -> str:
        last = [*self.artifacts][-1] if self.artifacts else "nothing"
        return f"{self.folder.name} has no {PREDICTIONS} (last stage done: {last}); run python -m elmd.evaluate for it"


def read_sweep(folder: Path) -> list[tuple[JobFolder, str, Path | None]] | None:
    """The jobs of sweep.json, why each is not in the tables ("" where it is), and its log; None without that file."""
    path = folder / SWEEP
    if not path.is_file():
        return None
    try:
        jobs = []
        for state in read_json(path)["jobs"]:
            job = JobFolder(folder / state["job"], state["system"], state["seed"], state["axes"], {}, {}, {})
            log = folder / state["log"] if state["log"] else None
            jobs.append((job, "" if state["status"] == "done" and job.evaluated else _why(state), log))
        return jobs
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        fix = "run the sweep again; it resumes where it stopped"
        raise DataError(f"is not what elmd.sweep writes ({type(error).__name__})", where=path, fix=fix) from None


def _why(state: Mapping[str, Any]) -> str:
    """Why a job of a sweep is not in the tables, in words."""
    stage = f" in {state['stage']}" if state["stage"] else ""
    if state["status"] == "waiting":
        return f"{'stopped' + stage if stage else 'not begun'}; run the sweep again to resume it"
    if state["status"] == "done":
        return "is recorded as done and has no predictions; run the sweep again"
    return f"{state['status']}{stage}" + (f": {state['error']}" if state["error"] else "")
