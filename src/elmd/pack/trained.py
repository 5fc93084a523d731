"""The finished job whose model is exported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elmd.config import BOOTSTRAP, BaselineName
from elmd.engine.files import read_json
from elmd.engine.store import read_manifest
from elmd.errors import ArtifactError, ConfigError, DataError
from elmd.evaluation.jobs import ARTIFACTS, JobFolder
from elmd.log import logger


@dataclass(frozen=True)
class Trained:
    """A job whose model can be exported.

    Attributes:
        scores: the content of its scores.json; None where there is none, or it is of an earlier training.
    """

    job: JobFolder
    scores: dict[str, Any] | None

    @property
    def config(self) -> Mapping[str, Any]:
        """The job's resolved configuration."""
        return self.job.config

    def artifact(self, role: str) -> Path:
        """The finished result that plays a role ("generator", "retriever", "samples", …).

        Raises:
            ArtifactError: there is none.
        """
        return self._result(self.job.roles[role])

    def manifest(self, role: str) -> dict[str, Any]:
        return read_manifest(self.artifact(role))

    def checkpoint(self, group: str) -> Path:
        """Where the language model (`llm`) or vision encoder (`vision`) lies that the run used."""
        path = self.config[group]["path"]
        return self._result(f"bootstrap/{group}") if path == BOOTSTRAP else Path(path)

    def _result(self, stage: str) -> Path:
        if stage not in self.job.artifacts:
            raise ArtifactError(
                f"stage {stage} of this run is not finished",
                where=self.job.folder,
                fix="run python -m elmd.train with the same choices",
            )
        return self.job.artifacts[stage]


def read_trained(folder: Path) -> Trained:
    """A finished job that can be exported.

    Args:
        folder: `runs/experiments/<name>[/<job>]` with `artifacts.json`.

    Raises:
        ArtifactError: it is no folder of a run.
        ConfigError: the job trained no adapter or projector of a language model, or is a control.
    """
    try:
        job = JobFolder.read(folder / ARTIFACTS)
    except DataError as error:
        if jobs := sorted(path.parent for path in folder.glob(f"*/{ARTIFACTS}")):
            raise ArtifactError(
                f"is a sweep of {len(jobs)} jobs", where=folder, fix=f"name one of them, such as {jobs[0]}"
            ) from error
        raise ArtifactError(
            f"is no folder of a run ({ARTIFACTS} is missing or damaged)",
            where=folder,
            fix="give runs/experiments/NAME of a finished run",
        ) from error
    baseline = BaselineName(job.config["baseline"]["name"])
    if baseline.own_model:
        raise ConfigError(
            f"{baseline} is a network of its own and no adapter of a language model",
            where=folder,
            fix="export a run of ELMD, or of baseline=visualglm",
        )
    if job.config["vision"]["shuffle"]:
        raise ConfigError(
            "was trained with clips permuted among samples, which is a control and no model to use",
            where=folder,
            fix="export a run with vision.shuffle=false",
        )
    return Trained(job, _scores(job))


def _scores(job: JobFolder) -> dict[str, Any] | None:
    """The job's scores; those of an earlier configuration may still lie in its folder."""
    path, generated = job.folder / "scores.json", job.artifacts.get(job.roles["replies"])
    if not path.is_file():
        logger.warning("%s: not scored yet, so the card has no scores (python -m elmd.evaluate)", job.folder)
        return None
    scores = read_json(path)
    if generated is None or Path(scores.get("predictions", "")).parent.name != generated.name:
        logger.warning("%s is not of this training, so the card has no scores (python -m elmd.evaluate)", path)
        return None
    return scores
