"""What a stage is: a name, what its result depends on, and one function that makes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elmd.config import BOOTSTRAP, Config

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Depends:
    """Everything a stage's result is a function of; its fingerprint covers exactly this.

    Attributes:
        config: the values it reads, JSON-ready (see `elmd.config.plain`). Not in it: device, workers, world size,
            micro-batch, logging, paths.
        upstream: names of the stages whose artifacts it reads.
        files: external files or folders (data sources, checkpoints) whose *contents* count, by role.
        seed: the run's seed where the stage draws random numbers, else None.
    """

    config: dict[str, Any] = field(default_factory=dict)
    upstream: Sequence[str] = ()
    files: dict[str, Path] = field(default_factory=dict)
    seed: int | None = None

    def __or__(self, other: Depends) -> Depends:
        """Both together."""
        return Depends(
            config={**self.config, **other.config},
            upstream=tuple(dict.fromkeys([*self.upstream, *other.upstream])),
            files={**self.files, **other.files},
            seed=self.seed if other.seed is None else other.seed,
        )


@dataclass(frozen=True)
class Job:
    """What a stage is handed: where to write, what to read, and how to reach the other ranks.

    Attributes:
        folder: the work-in-progress folder, possibly holding an earlier, killed attempt's checkpoints.
        upstream: finished artifact folder of each stage named in `Depends.upstream`.
        accelerator: ranks, device, gather.
    """

    folder: Path
    upstream: dict[str, Path]
    accelerator: Accelerator


@dataclass
class Outcome:
    """What a stage adds to its manifest: `primary` names the metric that sums the stage up."""

    metrics: dict[str, Any] = field(default_factory=dict)
    primary: str | None = None
    counts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """One step of the chain.

    Attributes:
        version: raised when the code changes what the result means.
        depends: what the result is a function of.
        does: the function that makes it, `module:function` below `elmd.stages`; imported when it is to run.
    """

    name: str
    version: int
    depends: Callable[[Config], Depends]
    does: str

    def run(self, cfg: Config, job: Job) -> Outcome:
        module, _, function = self.does.partition(":")
        outcome: Outcome = getattr(import_module(f"elmd.stages.{module}"), function)(cfg, job)
        return outcome


def checkpoint_path(path: str | None, role: str, job: Job) -> Path:
    """Where a checkpoint lies: the stand-in that `stage=bootstrap` made, or what is named."""
    return job.upstream[f"bootstrap/{role}"] if path == BOOTSTRAP else Path(path or "")
