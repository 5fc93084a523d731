"""A job's folder, read: what of it can be packed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from elmd.config import BOOTSTRAP, BaselineName
from elmd.engine.files import read_json
from elmd.engine.store import read_manifest
from elmd.errors import ArtifactError, ConfigError
from elmd.log import logger


@dataclass(frozen=True)
class Trained:
    """A job's folder, read.

    Attributes:
        config: its resolved configuration.
        stages: finished artifact folder by stage.
        scores: the content of scores.json where it is of this very run, else None.
    """

    folder: Path
    config: dict[str, Any]
    stages: dict[str, Path]
    scores: dict[str, Any] | None

    def manifest(self, stage: str) -> dict[str, Any]:
        return read_manifest(self.need(stage))

    def need(self, stage: str) -> Path:
        """
        Raises:
            ArtifactError: the stage is not finished.
        """
        folder = self.stages.get(stage)
        if folder is None or not folder.is_dir():
            raise ArtifactError(
                f"stage {stage} of this run is not finished",
                where=self.folder,
                fix="run python -m elmd.train with the same choices",
            )
        return folder

    def checkpoint(self, role: str) -> Path:
        """Where the language model or vision encoder lies that the run used."""
        path = self.config[role]["path"]
        return self.need(f"bootstrap/{role}") if path == BOOTSTRAP else Path(path)


def read_job(folder: Path) -> Trained:
    """A finished job that can be packed.

    Raises:
        ArtifactError, ConfigError: see `elmd.pack.packing.export`.
    """
    path = folder / "artifacts.json"
    try:
        found = read_json(path)
        config, places = found["config"], found["artifacts"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        if jobs := sorted(inside.parent for inside in folder.glob("*/artifacts.json")):
            raise ArtifactError(
                f"is a sweep of {len(jobs)} jobs", where=folder, fix=f"name one of them, such as {jobs[0]}"
            ) from error
        raise ArtifactError(
            "is no folder of a run (artifacts.json is missing or damaged)",
            where=folder,
            fix="give runs/experiments/NAME of a finished run",
        ) from error
    baseline = BaselineName(config.get("baseline", {}).get("name", BaselineName.none))
    if baseline.own_model:
        raise ConfigError(
            f"{baseline} is a network of its own and no adapter of a language model",
            where=folder,
            fix="export a run of ELMD, or of baseline=visualglm",
        )
    if config["vision"].get("shuffle"):
        raise ConfigError(
            "was trained with clips permuted among samples, which is a control and no model to use",
            where=folder,
            fix="export a run with vision.shuffle=false",
        )
    trained = Trained(folder, config, {stage: folder / place for stage, place in places.items()}, None)
    return replace(trained, scores=_scores(trained))


def _scores(trained: Trained) -> dict[str, Any] | None:
    """The run's scores; those of an earlier configuration may still lie in its folder."""
    path, generated = trained.folder / "scores.json", trained.stages.get("generate")
    if not path.is_file():
        logger.warning("%s: not scored yet, so the card has no scores (python -m elmd.evaluate)", trained.folder)
        return None
    scores = read_json(path)
    if generated is None or Path(scores.get("predictions", "")).parent.name != generated.name:
        logger.warning("%s is not of this training, so the card has no scores (python -m elmd.evaluate)", path)
        return None
    return scores
