"""Runs stages: decides what is up to date, waits for others, writes manifests, in the order of what reads what."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from elmd.engine.files import digest, write_json
from elmd.engine.keys import plain
from elmd.engine.provenance import git_state, versions
from elmd.engine.stage import Inputs, Job, Outcome, Stage
from elmd.engine.store import Store, read_manifest
from elmd.errors import ArtifactError, ElmdError
from elmd.log import logger

T = TypeVar("T")


@dataclass(frozen=True)
class Node:
    """A stage with its inputs resolved; its fingerprint says where its result is or will be.

    Attributes:
        upstream: names of stages, by the words of `Inputs.upstream`.
        config: what of the configuration counts.
        files: contents of external files, by the words of `Inputs.files`.
    """

    stage: Stage
    inputs: Inputs
    upstream: dict[str, str]
    config: dict[str, Any]
    files: dict[str, Any]
    fingerprint: str


class Chain:
    """The stages of one configuration.

    Args:
        config: a dataclass whose fields are described by `elmd.engine.keys`.
        stages: every stage by name, each after those that it reads.
        root: the folder of all results.
        force: make the results of the stages that run again; earlier ones are set aside.
        program: the command that runs a stage, for messages.
        libraries: whose versions manifests record.
    """

    def __init__(
        self,
        config: Any,
        stages: Mapping[str, Stage],
        accelerator: Accelerator,
        *,
        root: Path,
        force: bool = False,
        program: str = "",
        libraries: Sequence[str] = (),
    ):
        self.config, self.stages, self.accelerator, self.force = config, stages, accelerator, force
        self.program, self.libraries = program, libraries
        self.store = Store(root)
        self._nodes: dict[str, Node] = {}
        self._forced: set[str] = set()

    # ------------------------------------------------------------------------------------------- what there is to run
    def role(self, role: str) -> str:
        """The last stage of a role that the configuration has.

        Raises:
            KeyError: it has none.
        """
        names = [stage.name for stage in self.stages.values() if stage.role == role and stage.applies(self.config)]
        if not names:
            raise KeyError(role)
        return names[-1]

    def node(self, name: str) -> Node:
        """The stage called `name`, and through it everything that it stands on."""
        if name not in self._nodes:
            stage = self.stages[name]
            inputs = stage.reads(self.config)
            upstream = {word: word if word in self.stages else self.role(word) for word in inputs.upstream}
            config = inputs.counted(self.config)
            files = self._on_first_rank(lambda: {word: self.store.content(p) for word, p in inputs.files.items()})
            below = {other: self.node(other).fingerprint for other in upstream.values()}
            fingerprint = digest([name, stage.version, config, below, files])
            self._nodes[name] = Node(stage, inputs, upstream, config, files, fingerprint)
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
                for other in self.node(current).upstream.values():
                    yield from visit(other)
                yield current

        return visit(name)

    def missing(self, names: Collection[str]) -> list[str]:
        """Those of `names` that running them would make."""
        nodes = [self.node(name) for name in names]
        return self._on_first_rank(lambda: [n.stage.name for n in nodes if self.force or not self._finished(n)])

    def manifest(self, name: str) -> dict[str, Any]:
        return read_manifest(self.folder(name))

    # ---------------------------------------------------------------------------------------------------------- run it
    def run(self, name: str) -> Path:
        """Make a stage's result, or find it made already; prints `artifact: PATH`.

        Raises:
            ArtifactError: something that it needs has not been made.
        """
        node = self.node(name)
        below = [self.node(other) for other in node.upstream.values()]
        for other in self._on_first_rank(lambda: [n.stage.name for n in below if not self._finished(n)]):
            raise ArtifactError(
                f"{name} needs the result of {other}, which has not been made for this configuration",
                where=self.folder(other),
                fix=f"run {self.program} with the same choices and stage={other.partition('/')[0]} first, or "
                "with stage=all",
            )
        if self.accelerator.is_main_process:
            with self.store.lock(name, node.fingerprint):
                folder = self._make(node)
            sys.stderr.flush()
            print(f"artifact: {folder}", flush=True)
            return folder
        return self._make(node)

    def _make(self, node: Node) -> Path:
        name, fingerprint, main = node.stage.name, node.fingerprint, self.accelerator.is_main_process
        if self.force and main and name not in self._forced:
            if aside := self.store.set_aside(name, fingerprint):
                logger.info("force=true: the earlier result of %s is now %s", name, aside)
            self._forced.add(name)
        folder = self.store.folder(name, fingerprint)
        if self._on_first_rank(lambda: self._finished(node)):
            logger.info("%s: up to date, reused (%s)", name, folder)
            return folder

        partial = self.store.partial(name, fingerprint)
        if main:
            logger.info("%s: %s", name, "resuming an interrupted run" if partial.exists() else "running")
            partial.mkdir(parents=True, exist_ok=True)
        self.accelerator.wait_for_everyone()
        started = time.time()
        job = Job(partial, {word: self.folder(other) for word, other in node.upstream.items()}, self.accelerator)
        try:
            outcome = node.stage.run(node.inputs.view(self.config), job)
        except ElmdError:
            if main:
                self.store.discard_if_empty(name, fingerprint)
            raise
        self.accelerator.wait_for_everyone()
        if main:
            self.store.finish(name, fingerprint, self._manifest(node, outcome, time.time() - started))
        self.accelerator.wait_for_everyone()
        return folder

    def _finished(self, node: Node) -> bool:
        return self.store.finished(node.stage.name, node.fingerprint)

    def _on_first_rank(self, ask: Callable[[], T]) -> T:
        """What `ask` gives on rank 0, or its error, for all ranks.

        One process reads gigabytes of weights for their checksums and not all; and other machines may see an older
        state of a shared disk.
        """
        answer: list[Any] = [None, None]
        if self.accelerator.is_main_process:
            try:
                answer[0] = ask()
            except ElmdError as error:
                answer[1] = error
        broadcast_object_list(answer)
        if answer[1] is not None:
            raise answer[1]
        return answer[0]

    # ------------------------------------------------------------------------------------------ what is written down
    def _manifest(self, node: Node, outcome: Outcome, seconds: float) -> dict[str, Any]:
        primary = outcome.primary
        return {
            "stage": node.stage.name,
            "role": node.stage.role,
            "fingerprint": node.fingerprint,
            "stage_version": node.stage.version,
            "reads": node.config,
            "upstream": {other: self.node(other).fingerprint for other in node.upstream.values()},
            "files": node.files,
            "seed": node.config.get("seed"),
            "command": sys.argv,
            "config": plain(self.config),
            "git": git_state(),
            "versions": versions(self.libraries),
            "device": str(self.accelerator.device),
            "world_size": self.accelerator.num_processes,
            "wall_seconds": round(seconds, 2),
            "primary": None if primary is None else {"name": primary, "value": _at(outcome.metrics, primary)},
            "metrics": outcome.metrics,
            "counts": outcome.counts,
        }

    def point(self, folder: Path, **about: Any) -> None:
        """Write `artifacts.json`: the results that this command used or made, for those who read the run.

        It holds `config`; `artifacts`: stage -> folder, relative to `folder`; `roles`: role -> the stage that plays it
        in this configuration; and what `about` adds.
        """
        if not self.accelerator.is_main_process:
            return
        artifacts = {
            name: os.path.relpath(self.folder(name), folder)
            for name, node in self._nodes.items()
            if self._finished(node)
        }
        roles = {stage.role: name for name, stage in self.stages.items() if stage.applies(self.config)}
        write_json(
            folder / "artifacts.json",
            {"config": plain(self.config), "artifacts": artifacts, "roles": roles, **about},
        )


def _at(metrics: Mapping[str, Any], dotted: str) -> Any:
    """The value below nested keys, `test.accuracy`."""
    value: Any = metrics
    for name in dotted.split("."):
        value = value[name]
    return value
