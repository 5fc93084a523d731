"""What an experiment has produced: its runs by system and training seed, what is missing and why, third parties' files.

An experiment's folder is a job's folder, or holds one per job of a sweep.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elmd.data.samples import load_samples
from elmd.engine.store import read_manifest
from elmd.errors import ArtifactError, DataError
from elmd.evaluation.jobs import ARTIFACTS, PREDICTIONS, JobFolder, read_sweep
from elmd.evaluation.predictions import Prediction, check_same, read_predictions, references_of
from elmd.evaluation.systems import FULL, SHOWN, differing, kind_of, position, settings_of, with_labels
from elmd.log import logger
from elmd.types import Sample


@dataclass(frozen=True)
class Run:
    """One system's predictions from one training (one seed), or a third party's file.

    Attributes:
        system: the name in tables, or the one that a third party's file was given.
        path: the predictions file.
        seed: of training. folder: the job's. Both None for a third party's.
        config: resolved configuration. artifacts: finished artifact folders by stage. roles: the stage that plays each
            role. All empty for a third party's.
    """

    system: str
    path: Path
    predictions: list[Prediction]
    seed: int | None
    folder: Path | None
    config: Mapping[str, Any]
    artifacts: Mapping[str, Path]
    roles: Mapping[str, str]

    @classmethod
    def of_file(cls, system: str, path: Path) -> Run:
        """A third party's predictions."""
        return cls(system, path, read_predictions(path), None, None, {}, {}, {})

    @classmethod
    def of_job(cls, job: JobFolder, varied: Sequence[str]) -> Run:
        """The run of a job that is evaluated, named with the axes in `varied`."""
        name, path = with_labels(job.system, job.settings, varied), job.folder / PREDICTIONS
        predictions = read_predictions(path)
        return cls(name, path, predictions, job.seed, job.folder, job.config, job.artifacts, job.roles)

    def artifact(self, role: str) -> Path | None:
        """The finished artifact of a role ("generator", "retriever", …); None where this run has none (w/o ERM: no
        retriever)."""
        return self.artifacts.get(self.roles.get(role, ""))

    def need(self, role: str) -> Path:
        """The finished artifact of a role.

        Raises:
            ArtifactError: this run has none.
        """
        folder = self.artifact(role)
        if folder is None:
            finished = ", ".join(self.artifacts) or "none"
            stage = self.roles.get(role, role)
            raise ArtifactError(f"has no finished {stage} (finished: {finished})", where=self.folder or self.path)
        return folder

    def manifest(self, role: str) -> dict[str, Any]:
        """The manifest of a role's artifact.

        Raises:
            ArtifactError: this run has none.
        """
        return read_manifest(self.need(role))

    def samples(self) -> list[Sample]:
        """All samples of the run's data set, every split.

        Raises:
            ArtifactError: they are gone.
        """
        return load_samples(self.need("samples") / "samples.jsonl")


@dataclass(frozen=True)
class Missing:
    """A job that should be in the tables and is not: why, and its log where one was recorded."""

    system: str
    seed: int | None
    why: str
    log: Path | None


@dataclass(frozen=True)
class Experiment:
    """The runs of an experiment in table order, and what is missing.

    One order for every table: the baselines as Table 2 has them, the full model, its variants by rising value, the
    ablations as Table 3 has them, third parties' in the order given; within a system by seed. (Floors come last.)
    """

    name: str
    runs: list[Run]
    missing: list[Missing]

    @property
    def systems(self) -> dict[str, list[Run]]:
        """Runs by system, in table order."""
        systems: dict[str, list[Run]] = {}
        for run in self.runs:
            systems.setdefault(run.system, []).append(run)
        return systems

    @property
    def notes(self) -> list[str]:
        """What a reader of any table of these systems has to know, one sentence each."""
        own = [run for run in self.runs if run.config]
        kinds = {kind_of(run.config) for run in own}
        notes = []
        if any(kind_of(run.config) == ("none", "none") and run.config["vision"]["kind"] == "none" for run in own):
            notes.append(f"{FULL} is text only here (vision=none): without video slots, and so without REP.")
        if any(baseline == "visualglm" for baseline, _ in kinds):
            notes.append(
                "VisualGLM-style: ELMD's parts arranged as the paper's VisualGLM (one random frame, no retrieval, no "
                "REP), on the language model of this experiment and not on ChatGLM-6B."
            )
        full = {run.system for run in own if kind_of(run.config) == ("none", "none")}
        if len(full) > 1 and len(kinds) > 1:
            notes.append(
                f"Runs of several settings are mixed here ({', '.join(sorted(full))}), and all systems are tested "
                "against one of them: give each setting an experiment_name of its own."
            )
        if any(ablation == "no_v" for _, ablation in kinds):
            notes.append("w/o V has no REP either: read it beside w/o REP.")
        return [*notes, *self._changed_between_seeds()]

    def _changed_between_seeds(self) -> list[str]:
        """Systems whose runs were made with different settings that no name shows, as after an edit of a YAML file."""
        notes = []
        for name, runs in self.systems.items():
            for stage in runs[0].artifacts if len(runs) > 1 else ():
                manifests = [read_manifest(run.artifacts[stage]) for run in runs if stage in run.artifacts]
                keys = differing([settings_of(made.get("depends", {}).get("config", {}), {}) for made in manifests])
                if keys:
                    notes.append(
                        f"The runs of {name} differ in what stage {stage} was made with ({', '.join(keys)}): their "
                        "spread is not that of training seeds alone."
                    )
        return notes

    def samples(self) -> list[Sample]:
        """All samples of the data set, every split.

        Raises:
            ArtifactError: they are gone.
        """
        return self.runs[0].samples()


def read_experiment(folder: Path, others: Mapping[str, Path] = {}) -> Experiment:
    """The runs below an experiment's folder, with third parties' predictions beside them.

    Missing are: jobs that `sweep.json` lists and that are not done; folders that were trained and not evaluated; and,
    where there is no `sweep.json`, the holes in the grid of systems × seeds.

    Args:
        others: name -> predictions file of somebody else's system.

    Raises:
        DataError: no finished run; a file that cannot be read; one seed twice for one system; runs, or third parties'
            files, on other samples.
    """
    if not folder.is_dir():
        raise DataError("is no folder", where=folder, fix="name an experiment's folder, runs/experiments/<name>")
    jobs = [JobFolder.read(path) for path in sorted(folder.rglob(ARTIFACTS))]
    swept = read_sweep(folder)
    unfinished = [job for job, why, _ in swept or () if why]
    done = [job for job in jobs if job.evaluated and job.folder not in {job.folder for job in unfinished}]
    varied = _varied(done)
    runs = _unique([Run.of_job(job, varied) for job in done])
    listed = {job.folder for job, _, _ in swept or ()}
    trained = [job for job in jobs if not job.evaluated and job.folder not in listed]
    everything = [*done, *unfinished, *trained]
    missing = [Missing(_name_of_missing(job, varied, everything), job.seed, why, log)
               for job, why, log in swept or () if why]  # fmt: skip
    missing += [Missing(_name_of_missing(job, varied, everything), job.seed, job.why_missing, None) for job in trained]
    if not runs:
        first = f" ({missing[0].system}, seed {missing[0].seed}: {missing[0].why})" if missing else ""
        raise DataError(
            f"holds no run with predictions{first}",
            where=folder,
            fix="name runs/experiments/<name> after elmd.sweep, or after elmd.train and elmd.evaluate",
        )
    if swept is None:
        present = {(run.system, run.seed) for run in runs} | {(job.system, job.seed) for job in missing}
        names, seeds = dict.fromkeys(run.system for run in runs), sorted({run.seed or 0 for run in runs})
        holes = [(name, seed) for name in names for seed in seeds if (name, seed) not in present]
        missing += [Missing(name, seed, "there is no run of this seed, and there is of others", None)
                    for name, seed in holes]  # fmt: skip
    runs += _third_parties(others, {run.system for run in runs})
    _check_comparable(runs)
    return Experiment(folder.absolute().name, runs, missing)


def _varied(jobs: Sequence[JobFolder]) -> list[str]:
    """The axes that systems' names must show: those in which jobs of any one system differ.

    They are shown of all systems that read them: w/o ERM of one setting must not pass for that of another.
    """
    axes = dict.fromkeys(key for job in jobs for key in job.axes if key not in SHOWN)
    differ = {
        key
        for system in dict.fromkeys(job.system for job in jobs)
        for key in differing([job.settings for job in jobs if job.system == system])
    }
    return [key for key in axes if key in differ]


def _name_of_missing(job: JobFolder, varied: Sequence[str], jobs: Sequence[JobFolder]) -> str:
    """The name of a job without a run: as its run would have, and with its own axes that the other jobs have not."""
    own = [key for key in job.axes if key not in SHOWN]
    extra = [key for key in own if any(other.settings.get(key) != job.settings[key] for other in jobs)]
    return with_labels(job.system, job.settings, dict.fromkeys([*varied, *extra]))


def _unique(runs: Sequence[Run]) -> list[Run]:
    """Runs in table order; one file reached by two folders is one run, two trainings of one seed are an error."""
    first: dict[tuple[str, int | None], Run] = {}
    for run in sorted(runs, key=lambda run: (*position(run.config, run.system), run.seed)):
        other = first.setdefault((run.system, run.seed), run)
        if other is run:
            continue
        if other.path.resolve() != run.path.resolve():
            raise DataError(
                f"{run.system} with seed {run.seed} is there twice, in {other.folder} and in {run.folder}",
                fix="move one of them out of the experiment's folder",
            )
        logger.warning("%s and %s hold the same run: read once", other.folder, run.folder)
    return list(first.values())


def _third_parties(others: Mapping[str, Path], taken: set[str]) -> list[Run]:
    for name in others:
        if name in taken:
            raise DataError(f"{name!r} is a system of this experiment", where=others[name], fix="give another name")
    return [Run.of_file(name, path) for name, path in others.items()]


def _check_comparable(runs: Sequence[Run]) -> None:
    first, *rest = runs
    references = references_of(first.predictions)
    for run in rest:
        check_same(references, references_of(run.predictions), str(first.path), str(run.path))
