"""Runs stages: decides what is up to date, waits for others, keeps manifests, in the order the stages depend on."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from elmd.config import Config, StageName, plain
from elmd.engine.files import digest, write_json
from elmd.engine.store import Store, read_manifest
from elmd.errors import ArtifactError, ElmdError
from elmd.log import logger
from elmd.stages.base import Depends, Job, Outcome, Stage
from elmd.stages.checks import preflight
from elmd.stages.depends import STAGES

T = TypeVar("T")

#: Libraries whose versions a manifest records.
LIBRARIES = (
    "torch",
    "transformers",
    "peft",
    "sentence-transformers",
    "accelerate",
    "safetensors",
    "numpy",
    "faiss-cpu",
)


#: The stage whose result plays each role, for those who read a run; of a baseline with a network of its own, that
#: network is the generator.
ROLES = {
    "samples": "prepare", "retriever": "erm", "demonstrations": "index", "features": "features", "projector": "rep",
    "generator": "eerg", "replies": "generate",
}  # fmt: skip


@dataclass(frozen=True)
class Node:
    """A stage with what it depends on resolved: its fingerprint says where its result is or will be."""

    stage: Stage
    depends: Depends
    upstream: dict[str, str]
    files: dict[str, Any]
    fingerprint: str


class Chain:
    """The stages of one configuration."""

    def __init__(self, cfg: Config, accelerator: Accelerator):
        self.cfg, self.accelerator = cfg, accelerator
        self.store = Store(Path(cfg.runs_dir))
        self._nodes: dict[str, Node] = {}
        self._forced: set[str] = set()

    def node(self, name: str) -> Node:
        """The stage called `name`, and through it everything that it stands on."""
        if name not in self._nodes:
            stage = STAGES[name]
            depends = stage.depends(self.cfg)
            upstream = {other: self.node(other).fingerprint for other in depends.upstream}
            files = self._first(lambda: {role: self.store.content(path) for role, path in depends.files.items()})
            fingerprint = digest([stage.name, stage.version, depends.config, upstream, files, depends.seed])
            self._nodes[name] = Node(stage, depends, upstream, files, fingerprint)
        return self._nodes[name]

    def folder(self, name: str) -> Path:
        """Where the finished result of a stage is, or will be."""
        return self.store.folder(name, self.node(name).fingerprint)

    def order(self, name: str) -> Iterator[str]:
        """The stages that `name` stands on, each before those that need it, `name` last."""
        seen: set[str] = set()

        def visit(current: str) -> Iterator[str]:
            if current not in seen:
                seen.add(current)
                for other in self.node(current).depends.upstream:
                    yield from visit(other)
                yield current

        return visit(name)

    @property
    def last(self) -> str:
        """The training whose result generates: EERG's, or that of a baseline with a model of its own."""
        return "baseline" if self.cfg.baseline.name.own_model else "eerg"

    def run(self, name: StageName) -> None:
        """Run what the command line's `stage=` names: one stage, all stand-ins, or the whole chain."""
        if name is StageName.all:
            names = list(self.order(self.last))
            self._first(lambda: self._preflight(names))
        elif name is StageName.bootstrap:
            names = [n for n in self.order(self.last) if n.startswith("bootstrap/")]
            if not names:
                logger.info("nothing to make: no group of this configuration uses a stand-in")
        else:
            names = [name.value]
        for one in names:
            self.run_one(one)

    def _preflight(self, names: Sequence[str]) -> None:
        """Find early what would stop a later stage."""
        todo = [n for n in names if self.cfg.force or not self.store.finished(n, self.node(n).fingerprint)]
        preflight(self.cfg, todo)

    def run_one(self, name: str) -> Path:
        """Make a stage's result, or find it made already; prints `artifact: PATH`.

        Raises:
            ArtifactError: something that it needs has not been made.
        """
        node, rank = self.node(name), self.accelerator.process_index
        done = self._first(lambda: {other: self.store.finished(other, found) for other, found in node.upstream.items()})
        for other, fingerprint in node.upstream.items():
            if not done[other]:
                raise ArtifactError(
                    f"{name} needs the result of {other}, which has not been made for this configuration",
                    where=self.store.folder(other, fingerprint),
                    fix=f"run python -m elmd.train with the same choices and stage={other.partition('/')[0]} first, or "
                    "with stage=all",
                )
        if rank == 0:
            with self.store.lock(name, node.fingerprint):
                folder = self._make(node)
        else:
            folder = self._make(node)
        if rank == 0:
            sys.stderr.flush()
            print(f"artifact: {folder}", flush=True)
        return folder

    def _make(self, node: Node) -> Path:
        name, fingerprint = node.stage.name, node.fingerprint
        if self.cfg.force and self.accelerator.is_main_process and name not in self._forced:
            if aside := self.store.set_aside(name, fingerprint):
                logger.info("force=true: the earlier result of %s is now %s", name, aside)
            self._forced.add(name)
        folder = self.store.folder(name, fingerprint)
        if self._first(lambda: self.store.finished(name, fingerprint)):
            logger.info("%s: up to date, reused (%s)", name, folder)
            return folder

        partial = self.store.partial(name, fingerprint)
        if self.accelerator.is_main_process:
            logger.info("%s: %s", name, "going on with an interrupted run" if partial.exists() else "running")
            partial.mkdir(parents=True, exist_ok=True)
        self.accelerator.wait_for_everyone()
        started = time.time()
        upstream = {other: self.store.folder(other, found) for other, found in node.upstream.items()}
        try:
            outcome = node.stage.run(self.cfg, Job(partial, upstream, self.accelerator))
        except ElmdError:
            if self.accelerator.is_main_process:
                self.store.discard_if_empty(name, fingerprint)
            raise
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self.store.finish(name, fingerprint, self._manifest(node, outcome, time.time() - started))
        self.accelerator.wait_for_everyone()
        return folder

    def _first(self, ask: Callable[[], T]) -> T:
        """What rank 0 finds, or its error, for all ranks.

        One process reads gigabytes of weights for their checksums and not all; and other machines may see an older
        state of a shared disk.
        """
        found: list[Any] = [None, None]
        if self.accelerator.is_main_process:
            try:
                found[0] = ask()
            except ElmdError as error:
                found[1] = error
        broadcast_object_list(found)
        if found[1] is not None:
            raise found[1]
        return found[0]

    def _manifest(self, node: Node, outcome: Outcome, seconds: float) -> dict[str, Any]:
        return {
            "stage": node.stage.name,
            "fingerprint": node.fingerprint,
            "stage_version": node.stage.version,
            "depends": {k: v for k, v in asdict(node.depends).items() if k != "files"},
            "upstream": node.upstream,
            "files": node.files,
            "seed": node.depends.seed,
            "command": sys.argv,
            "config": plain(self.cfg),
            "git": git_state(),
            "versions": versions(),
            "device": str(self.accelerator.device),
            "world_size": self.accelerator.num_processes,
            "wall_seconds": round(seconds, 2),
            "primary": {"name": outcome.primary, "value": _lookup(outcome.metrics, outcome.primary)}
            if outcome.primary
            else None,
            "metrics": outcome.metrics,
            "counts": outcome.counts,
        }

    def point(self, folder: Path, axes: Mapping[str, Any] | None) -> None:
        """Write `artifacts.json`: the results that this command used or made, for those who read the run.

        It holds `config`; `artifacts`: stage -> folder, relative to `folder`; `roles`: role -> the stage that plays it
        in this configuration; `job` and `axes`: the job's name and what it sets, null for a single run.

        Args:
            axes: of a sweep's job, see `elmd.cli.axes`; None outside a sweep.
        """
        if self.accelerator.is_main_process:
            artifacts = {
                name: os.path.relpath(self.folder(name), folder)
                for name, node in self._nodes.items()
                if self.store.finished(name, node.fingerprint)
            }
            about = {
                "config": plain(self.cfg),
                "artifacts": artifacts,
                "roles": {**ROLES, "generator": self.last},
                "job": None if axes is None else folder.name,
                "axes": axes,
            }
            write_json(folder / "artifacts.json", about)

    def manifest(self, name: str) -> dict[str, Any]:
        return read_manifest(self.folder(name))


def _lookup(metrics: dict[str, Any], dotted: str) -> Any:
    value: Any = metrics
    for key in dotted.split("."):
        value = value[key]
    return value


def git_state() -> dict[str, Any] | None:
    """Commit and dirty flag of the source tree that runs, None where it is no git checkout."""
    where = Path(__file__).parent
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=where, capture_output=True, text=True, check=True
        ).stdout.strip()
        dirty = subprocess.run(
            ["git", "status", "--porcelain"], cwd=where, capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"commit": commit, "dirty": bool(dirty.strip())}


def versions() -> dict[str, str]:
    """Installed versions of the libraries that results depend on."""
    found = {"python": sys.version.split()[0]}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            found[library] = "not installed"
    return found
