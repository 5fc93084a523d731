"""What an experiment has produced: its runs by system and training seed, what is missing and why, third parties' files.

A job's folder holds `artifacts.json` (configuration, and where its artifacts lie) and, once evaluated,
`predictions.jsonl`. An experiment's folder is one such folder, or holds one per job of a sweep.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elmd.data.samples import load_samples
from elmd.engine.files import digest, read_json
from elmd.engine.store import MANIFEST, read_manifest
from elmd.errors import ArtifactError, DataError
from elmd.evaluation.score import Prediction, check_same, read_predictions, references_of
from elmd.log import logger
from elmd.types import Sample

ARTIFACTS, PREDICTIONS, SWEEP = "artifacts.json", "predictions.jsonl", "sweep.json"

#: The full model's name in every table; "ours" in the paper's.
FULL = "ELMD"

#: Baselines by `baseline.name`, in Table 2's order. VisualGLM itself is ChatGLM-1, which is not run here: ELMD's parts
#: arranged as VisualGLM, on another backbone, must not pass for it.
BASELINES = {"livebot": "Livebot", "dialogpt": "DialoGPT", "visualglm": "VisualGLM-style"}

#: Baselines that are networks of their own, and the keys that are ELMD's and nothing to them.
NETWORKS = ("livebot", "dialogpt")
ELMDS_OWN = ("llm.", "retriever.", "prompt.", "bootstrap.", "erm.", "rep.", "eerg.")

#: Ablations by `ablation_name`, in Table 3's order.
ABLATIONS = {"no_erm": "w/o ERM", "no_ert": "w/o ERT", "no_ssc": "w/o SSC", "no_v": "w/o V", "no_rep": "w/o REP"}

#: What the paper calls the numbers that its figures vary.
SYMBOLS = {"erm.slots": "s", "vision.frames": "m"}

#: Keys (or groups, with the dot) that may differ between runs of one system: where and how fast it runs, or what the
#: name says already.
INCIDENTAL = (
    "stage", "seed", "experiment_name", "job", "runs_dir", "force", "cpu", "threads", "launcher.", "predictions",
    "data.path", "data.video_root", "baseline.name", "ablation_name", "llm.checkpointing", "llm.attention",
    "vision.workers", "vision.timeout_s", "vision.batch_frames", "rep.micro_tokens", "eerg.micro_tokens",
    "baseline.micro_tokens", "erm.checkpoint_every", "rep.checkpoint_every", "eerg.checkpoint_every",
    "baseline.checkpoint_every", "generate.batch_tokens",
)  # fmt: skip

#: Longest value spelt out in a system's name; a longer one (a prompt's text) is told apart by its digest.
LONGEST_VALUE = 24


@dataclass(frozen=True)
class Run:
    """One system's predictions from one training (one seed), or a third party's file.

    Attributes:
        system: the name in tables, as `system_name` gives it, or the one a third party's file was given.
        seed: of training; None for a third party's.
        path: the predictions file. folder: the job's; None for a third party's.
        config: resolved configuration; empty for a third party's.
        artifacts: finished artifact folders by stage; empty for a third party's.
    """

    system: str
    seed: int | None
    path: Path
    folder: Path | None
    config: dict[str, Any]
    artifacts: dict[str, Path]
    predictions: list[Prediction]

    def manifest(self, stage: str) -> dict[str, Any]:
        """What the artifact of a stage says of itself.

        Raises:
            ArtifactError: this run has no finished result of that stage.
        """
        if stage not in self.artifacts:
            known = ", ".join(self.artifacts) or "none"
            raise ArtifactError(f"has no finished {stage} (finished: {known})", where=self.folder or self.path)
        return read_manifest(self.artifacts[stage])


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
        found: dict[str, list[Run]] = {}
        for run in self.runs:
            found.setdefault(run.system, []).append(run)
        return found

    @property
    def notes(self) -> list[str]:
        """What a reader of any table of these systems has to know, one sentence each."""
        own = [run for run in self.runs if run.config]
        found = []
        if any(system_name(run.config) == FULL and _setting(run.config, "vision.kind") == "none" for run in own):
            found.append(f"{FULL} is text only here (vision=none): without video slots, and so without REP.")
        if any(_baseline(run.config) == "visualglm" for run in own):
            found.append(
                "VisualGLM-style: ELMD's parts arranged as the paper's VisualGLM (one random frame, no retrieval, no "
                "REP), on the language model of this experiment and not on ChatGLM-6B."
            )
        full = {run.system for run in own if (_baseline(run.config), _ablation(run.config)) == ("none", "none")}
        if len(full) > 1 and len({(_baseline(run.config), _ablation(run.config)) for run in own}) > 1:
            found.append(
                f"Runs of several settings are mixed here ({', '.join(sorted(full))}), and all systems are tested "
                "against one of them: give each setting an experiment_name of its own."
            )
        if any(_ablation(run.config) == "no_v" for run in own):
            found.append("w/o V has no REP either: read it beside w/o REP.")
        return found

    def samples(self) -> list[Sample]:
        """All samples of the data set, every split.

        Raises:
            ArtifactError: the result of stage prepare is gone.
        """
        run = self.runs[0]
        run.manifest("prepare")
        return load_samples(run.artifacts["prepare"] / "samples.jsonl")


def system_name(config: Mapping[str, Any], varied: Iterable[str] = ()) -> str:
    """What tables call the system of a resolved configuration: "ELMD", "w/o ERM", "DialoGPT", "ELMD, s = 2".

    Args:
        varied: dotted keys in which runs of one baseline and ablation differ; they become part of the name.
    """
    baseline, ablation = _baseline(config), _ablation(config)
    parts = [BASELINES.get(baseline, baseline)] if baseline != "none" else []
    if ablation != "none":
        parts.append(ABLATIONS.get(ablation, ablation if parts else f"{FULL}, {ablation}"))
    return ", ".join([*(parts or [FULL]), *(_label(key, _setting(config, key)) for key in varied)])


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
    jobs = [Job.read(path) for path in sorted(folder.rglob(ARTIFACTS))]
    swept = _sweep(folder)
    unfinished = {folder / one["job"]: one for one in swept or () if one["status"] != "done"}
    done = [job for job in jobs if job.evaluated and job.folder not in unfinished]
    varied = _labels(done)
    runs = _unique([job.run(varied[job.kind]) for job in done])
    missing = _not_done(folder, swept or [])
    missing += [
        Missing(_beside(job, done, varied), job.seed, job.why_missing, None)
        for job in jobs
        if not job.evaluated and job.folder not in {folder / one["job"] for one in swept or ()}
    ]
    if not runs:
        first = f" ({missing[0].system}, seed {missing[0].seed}: {missing[0].why})" if missing else ""
        raise DataError(
            f"holds no run with predictions{first}",
            where=folder,
            fix="name runs/experiments/<name> after elmd.sweep, or after elmd.train and elmd.evaluate",
        )
    if swept is None:
        known = {(run.system, run.seed) for run in runs} | {(one.system, one.seed) for one in missing}
        names, seeds = dict.fromkeys(run.system for run in runs), sorted({run.seed or 0 for run in runs})
        holes = [(name, seed) for name in names for seed in seeds if (name, seed) not in known]
        missing += [Missing(name, seed, "there is no run of this seed, and there is of others", None)
                    for name, seed in holes]  # fmt: skip
    runs += _third_parties(others, {run.system for run in runs})
    _check_comparable(runs)
    return Experiment(folder.absolute().name, runs, missing)


@dataclass(frozen=True)
class Job:
    """One training of an experiment: its folder, its configuration, and the artifact of each stage that is done."""

    folder: Path
    config: dict[str, Any]
    artifacts: dict[str, Path]

    @classmethod
    def read(cls, path: Path) -> Job:
        """From the `artifacts.json` that training writes beside what it made.

        Raises:
            DataError: the file is not that.
        """
        try:
            found = read_json(path)
            config, where = found["config"], found["artifacts"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            fix = "run python -m elmd.evaluate with this job's choices again"
            raise DataError(f"is not what elmd.train writes ({type(error).__name__})", where=path, fix=fix) from None
        artifacts = {stage: (path.parent / one).resolve() for stage, one in where.items()}
        finished = {stage: one for stage, one in artifacts.items() if (one / MANIFEST).is_file()}
        return cls(path.parent, config, finished)

    @property
    def seed(self) -> int:
        return self.config["seed"]

    @property
    def kind(self) -> tuple[str, str]:
        return _baseline(self.config), _ablation(self.config)

    @property
    def evaluated(self) -> bool:
        return (self.folder / PREDICTIONS).is_file()

    @property
    def why_missing(self) -> str:
        last = next((stage for stage in reversed(self.artifacts)), "nothing")
        return f"{self.folder.name} has no {PREDICTIONS} (last stage done: {last}); run python -m elmd.evaluate for it"

    def run(self, varied: Sequence[str]) -> Run:
        path = self.folder / PREDICTIONS
        name = system_name(self.config, varied)
        return Run(name, self.seed, path, self.folder, self.config, self.artifacts, read_predictions(path))


def _order(run: Run) -> tuple[Any, ...]:
    """Sort key: kind of system, then values of what varies by size (s = 2 before s = 16), then seed."""
    baseline, ablation = _baseline(run.config), _ablation(run.config)
    known_baselines, known_ablations = [*BASELINES, "none"], ["none", *ABLATIONS]
    position = [
        known.index(name) if name in known else len(known)
        for name, known in ((baseline, known_baselines), (ablation, known_ablations))
    ]
    values = [part.rpartition("=")[2].strip() for part in run.system.split(", ")[1:]]
    numbers = [(0, float(value), "") if _is_number(value) else (1, 0.0, value) for value in values]
    return *position, ablation, numbers, run.system, run.seed


def _unique(runs: Sequence[Run]) -> list[Run]:
    """Runs in table order; one file reached by two folders is one run, two trainings of one seed are an error."""
    found: dict[tuple[str, int | None], Run] = {}
    for run in sorted(runs, key=_order):
        other = found.setdefault((run.system, run.seed), run)
        if other is run:
            continue
        if other.path.resolve() != run.path.resolve():
            raise DataError(
                f"{run.system} with seed {run.seed} is there twice, in {other.folder} and in {run.folder}",
                fix="move one of them out of the experiment's folder",
            )
        logger.warning("%s and %s hold the same run: read once", other.folder, run.folder)
    return list(found.values())


def _not_done(folder: Path, jobs: Sequence[Mapping[str, Any]]) -> list[Missing]:
    """Jobs that a sweep lists and that did not end well."""
    overrides = {one["job"]: dict(_override(text) for text in one["overrides"]) for one in jobs}
    varied = [key for key in dict.fromkeys(key for one in overrides.values() for key in one)
              if len({one.get(key) for one in overrides.values()}) > 1]  # fmt: skip
    labelled = [key for key in varied if key not in ("baseline", "ablation") and not _incidental(key)]
    found = []
    for one in jobs:
        chosen = overrides[one["job"]]
        if one["status"] == "done" and (folder / one["job"] / PREDICTIONS).is_file():
            continue
        config = {
            "baseline": {"name": chosen.get("baseline", "none").removesuffix("_tiny")},
            "ablation_name": chosen.get("ablation", "none"),
        }
        labels = [_label(key, chosen[key]) for key in labelled if key in chosen]
        found.append(
            Missing(
                ", ".join([system_name(config), *labels]),
                int(chosen.get("seed", 0)),
                _state(one),
                folder / one["log"] if one.get("log") else None,
            )
        )
    return found


def _state(job: Mapping[str, Any]) -> str:
    """Why a job of a sweep is not in the tables, in words."""
    stage = f" in {job['stage']}" if job.get("stage") else ""
    if job["status"] == "waiting":
        return f"{'stopped' + stage if stage else 'not begun'}; run the sweep again to go on"
    if job["status"] == "done":
        return "said to be done, but has no predictions; run the sweep again"
    return f"{job['status']}{stage}" + (f": {job['error']}" if job.get("error") else "")


def _override(text: str) -> tuple[str, str]:
    key, _, value = text.partition("=")
    return key.lstrip("+~"), value


def _sweep(folder: Path) -> list[dict[str, Any]] | None:
    """The jobs of sweep.json, None where there is none."""
    path = folder / SWEEP
    if not path.is_file():
        return None
    try:
        jobs = read_json(path)["jobs"]
        if not all({"job", "overrides", "status"} <= one.keys() for one in jobs):
            raise KeyError("job, overrides, status")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        fix = "run the sweep again; it goes on where it stopped"
        raise DataError(f"is not what elmd.sweep writes ({type(error).__name__})", where=path, fix=fix) from None
    return jobs


def _third_parties(others: Mapping[str, Path], taken: set[str]) -> list[Run]:
    for name in others:
        if name in taken:
            raise DataError(f"{name!r} is a system of this experiment", where=others[name], fix="give another name")
    return [Run(name, None, path, None, {}, {}, read_predictions(path)) for name, path in others.items()]


def _check_comparable(runs: Sequence[Run]) -> None:
    first, *rest = runs
    references = references_of(first.predictions)
    for run in rest:
        check_same(references, references_of(run.predictions), str(first.path), str(run.path))


def _labels(jobs: Sequence[Job]) -> dict[tuple[str, str], list[str]]:
    """By kind of system, the keys that its runs' names must tell.

    A key in which the runs of any kind differ is told of all kinds that read it: w/o ERM of one setting must not pass
    for that of another. What differs between kinds alone is what makes them different systems.
    """
    kinds = {job.kind: [one.config for one in jobs if one.kind == job.kind] for job in jobs}
    keys = dict.fromkeys(key for configs in kinds.values() for key in _varied(configs))
    return {kind: [key for key in keys if kind[0] not in NETWORKS or not key.startswith(ELMDS_OWN)] for kind in kinds}


def _varied(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Dotted keys in which configurations differ and that say what the system is; not those younger than one of them.

    Where a group's name differs (llm=…), the rest of the group follows from it and stays unsaid.
    """
    flat = [_flat(config) for config in configs]
    keys = dict.fromkeys(key for one in flat for key in one)
    differ = [
        key
        for key in keys
        if not _incidental(key) and len({json.dumps(one[key], default=str) for one in flat if key in one}) > 1
    ]
    groups = {key.removesuffix("name") for key in differ if key.endswith(".name")}
    return [key for key in differ if key.endswith(".name") or not key.startswith(tuple(groups))]


def _beside(job: Job, done: Sequence[Job], varied: Mapping[tuple[str, str], list[str]]) -> str:
    """The name of a run that was not evaluated, told apart from those that were."""
    others = [one.config for one in done if one.kind == job.kind]
    differ = _varied([others[0], job.config]) if others else []
    return system_name(job.config, dict.fromkeys([*varied.get(job.kind, ()), *differ]))


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found


def _incidental(key: str) -> bool:
    return any(key == one or (one.endswith(".") and key.startswith(one)) for one in INCIDENTAL)


def _label(key: str, value: Any) -> str:
    said = str(value).lower() if isinstance(value, bool) else str(value)
    said = said if len(said) <= LONGEST_VALUE else digest(said)[:6]
    return f"{SYMBOLS[key]} = {said}" if key in SYMBOLS else f"{key.removesuffix('.name')}={said}"


def _setting(config: Mapping[str, Any], key: str) -> Any:
    return _flat(config).get(key)


def _baseline(config: Mapping[str, Any]) -> str:
    return str(_setting(config, "baseline.name") or "none")


def _ablation(config: Mapping[str, Any]) -> str:
    return str(config.get("ablation_name", "none"))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
