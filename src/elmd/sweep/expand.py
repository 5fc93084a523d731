"""From a command line to the jobs of a sweep, each with its checked configuration."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import open_dict
from omegaconf.errors import OmegaConfBaseException

from elmd.cli import axes, composition_error, config_dir, experiment_folder, register, typed
from elmd.config import Config, StageName
from elmd.errors import ConfigError, ElmdError


@dataclass(frozen=True)
class Job:
    """One job of a sweep.

    Attributes:
        name: of its folder below the experiment's, of its log, and in tables.
        overrides: its command line without `job=…`.
        cfg: what they compose to, checked, with `job` set.
        axes: what they set, see `elmd.cli.axes`.
    """

    name: str
    overrides: tuple[str, ...]
    cfg: Config
    axes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return experiment_folder(self.cfg)


def expand(arguments: Sequence[str]) -> list[Job]:
    """The jobs of a command line, checked, in the order in which they start.

    The product of the experiment's `hydra.sweeper.params` and the comma lists of the command line, which wins where
    both have a key: Hydra's own sweeper does it. The seed varies fastest, because jobs of different seeds share the
    least and so wait for each other the least.

    Raises:
        ConfigError: a job does not compose, names are not unique, or something is set that a sweep cannot have.
    """
    register()
    with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        given = parser.parse_overrides(list(arguments))
        fixed = [str(override.input_line) for override in given if not override.is_sweep_override()]
        base = hydra.compose("train", fixed, return_hydra_config=True)
        swept = [f"{key}={values}" for key, values in (base.hydra.sweeper.params or {}).items()]
        of_hydra = [str(override.input_line) for override in given if override.is_hydra_override()]
        choices = [str(override.input_line) for override in given if not override.is_hydra_override()]
        ((*product,),) = BasicSweeper.split_arguments(parser.parse_overrides(swept + choices), None)
        jobs = [_job(overrides, of_hydra) for overrides in product]
    _check(jobs)
    by_setting: dict[tuple[str, ...], list[Job]] = {}
    for job in jobs:
        setting = tuple(override for override in job.overrides if not override.startswith("seed="))
        by_setting.setdefault(setting, []).append(job)
    return [job for group in by_setting.values() for job in group]


def sweepable() -> list[str]:
    """The experiments that are sweeps."""
    files = sorted((config_dir() / "experiment").glob("*.yaml"))
    return [path.stem for path in files if "\n  sweeper:" in path.read_text(encoding="utf-8")]


def _job(overrides: Sequence[str], of_hydra: Sequence[str]) -> Job:
    try:
        raw = hydra.compose("train", [*of_hydra, *overrides], return_hydra_config=True)
        # The name becomes a folder and stands on a command line: it keeps what has no meaning to either.
        name = re.sub(r"[^\w.,=+@~:\[\]-]", "_", raw.hydra.job.override_dirname) or "job"
        own = raw.hydra
        with open_dict(raw):
            del raw["hydra"]
        cfg = replace(typed(raw), job=name)
    except (HydraException, OmegaConfBaseException, ElmdError) as error:
        cause = error if isinstance(error, ElmdError) else composition_error(error)
        where = ": ".join(filter(None, [f"job {' '.join(overrides)}", cause.where]))
        raise ConfigError(cause.what, where=where, fix=cause.fix) from error
    return Job(experiment_folder(cfg).name, (*of_hydra, *overrides), cfg, axes(own, cfg))


def _check(jobs: Sequence[Job]) -> None:
    """
    Raises:
        ConfigError: a job sets what no job of a sweep may set, or two jobs cannot be told apart.
    """
    for job in jobs:
        if any(override.startswith(("job=", "+job=", "++job=")) for override in job.overrides):
            raise ConfigError("names a sweep's jobs and is set by the launcher", where="job", fix="leave job= out")
        if job.cfg.stage is not StageName.all or job.cfg.predictions is not None:
            raise ConfigError(
                "a job of a sweep is trained and evaluated as a whole",
                where="stage" if job.cfg.predictions is None else "predictions",
                fix="leave it out; python -m elmd.train -m … stage=… sweeps over one stage",
            )
        if job.cfg.force:
            raise ConfigError(
                "would take away what other jobs of the sweep are reading",
                where="force",
                fix="run that stage again first: python -m elmd.train stage=… force=true with the same choices",
            )
    if len(folders := sorted({str(job.folder.parent) for job in jobs})) > 1:
        raise ConfigError(
            f"the jobs belong to {len(folders)} folders, as {folders[0]} and {folders[1]}",
            where="experiment_name, runs_dir",
            fix="start a sweep for each",
        )
    by_name: dict[str, Job] = {}
    for job in jobs:
        if other := by_name.get(job.name):
            raise ConfigError(
                f"two jobs would have this name: {' '.join(other.overrides)} and {' '.join(job.overrides)}",
                where=job.name,
                fix="leave out what does not tell jobs apart, or start a sweep for each with an experiment_name",
            )
        by_name[job.name] = job
