"""The states of a sweep's jobs: which are done already, and what `sweep.json` says of each."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from elmd.engine.files import read_json, write_json
from elmd.engine.keys import plain
from elmd.engine.store import Store
from elmd.errors import ElmdError
from elmd.evaluation.jobs import SWEEP
from elmd.evaluation.systems import system_name
from elmd.log import table
from elmd.sweep.expand import Job


@dataclass
class State:
    """What `sweep.json` says of a job; one that was stopped is waiting, in the stage that it had come to.

    `system`, `seed` and `axes` say what the job is where it leaves nothing else behind.
    """

    job: str
    overrides: list[str]
    system: str
    seed: int
    axes: Mapping[str, Any]
    status: str = "waiting"  # done, failed, running, waiting
    stage: str | None = None  # train, evaluate; None before and after
    error: str | None = None  # one sentence
    log: str = ""  # relative to the sweep's folder
    seconds: float = 0.0  # of the last run: at its end, or at the last change of stage


class Record:
    """The states of a sweep's jobs, by name, kept in the `sweep.json` of its folder.

    Args:
        folder: the experiment's, `runs/experiments/<name>`.
        done: names of jobs that there is nothing to do for.
    """

    def __init__(self, folder: Path, jobs: Sequence[Job], done: Collection[str]):
        self.folder = folder
        earlier = {state["job"]: state["seconds"] for state in self._recorded()}
        self.states = {
            job.name: State(
                job.name, list(job.overrides), system_name(plain(job.cfg)), job.cfg.seed, job.axes,
                status="done" if job.name in done else "waiting",
                log=f"logs/{job.name}.log",
                seconds=earlier.get(job.name, 0.0) if job.name in done else 0.0,
            )
            for job in jobs
        }  # fmt: skip

    def write(self) -> None:
        """Write every state; jobs that another sweep has, or had, in the same folder stay as they are."""
        with Store(self.folder.parents[1]).lock("sweep", self.folder.name):
            others = [state for state in self._recorded() if state["job"] not in self.states]
            ours = [asdict(state) for state in self.states.values()]
            write_json(self.folder / SWEEP, {"experiment": self.folder.name, "jobs": others + ours})

    def count(self, status: str) -> int:
        """How many of the jobs have this status."""
        return sum(state.status == status for state in self.states.values())

    def show(self) -> None:
        """Print a table of the states."""
        states = self.states.values()
        rows = [(s.job, s.status, duration(s.seconds) if s.seconds else "–", s.error or "–") for s in states]
        table("Jobs", ["job", "status", "time", "error"], rows)

    def _recorded(self) -> list[dict[str, Any]]:
        path = self.folder / SWEEP
        return read_json(path)["jobs"] if path.is_file() else []


def up_to_date(jobs: Sequence[Job]) -> set[str]:
    """Names of the jobs whose predictions are made and scored, by the fingerprints of their stages.

    Raises:
        ElmdError: what a job needs cannot be read; the job is named.
    """
    from accelerate import Accelerator

    from elmd.stages import chain_of

    accelerator, names = Accelerator(cpu=True), set()
    for job in jobs:
        try:
            folder = chain_of(job.cfg, accelerator).folder("generate")
        except ElmdError as error:
            where = ": ".join(filter(None, [f"job {job.name}", error.where]))
            raise type(error)(error.what, where=where, fix=error.fix) from error
        scores = job.folder / "scores.json"
        if scores.is_file():
            scored = Path(job.cfg.runs_dir) / read_json(scores)["predictions"]
            if scored.is_file() and scored.parent.resolve() == folder.resolve():
                names.add(job.name)
    return names


def why(log: Path, start: int, code: int) -> str:
    """Why a job failed: the last `error:` line of its log, or the signal that ended it.

    Args:
        start: where in the log, in bytes, this attempt begins.
        code: of its exit.
    """
    with log.open("rb") as file:
        file.seek(start)
        text = file.read().decode(errors="replace")
    if errors := re.findall(r"^error: (.+)$", text, re.MULTILINE):
        return errors[-1].strip()
    if signals := re.findall(r"\bSIG[A-Z]+\b", text):
        return f"it was ended by {signals[-1]} (SIGKILL: mostly out of memory); see its log."
    return f"it ended with exit code {code} and no error of its own; see its log."


def duration(seconds: float) -> str:
    """Seconds as 4:05 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
