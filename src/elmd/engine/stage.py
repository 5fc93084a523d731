"""What a stage is: a name, a declaration of all that it reads, and one function that makes its result."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elmd.engine.keys import View, counted, described, expand

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Inputs:
    """All that a stage reads. Its result is a function of exactly this, which is what its fingerprint covers.

    Attributes:
        keys: dotted keys of the configuration, or names of groups; those that do not count (see `KeyInfo`) may be read
            without being named.
        upstream: stages whose results it reads, each by its name, or by its role ("generator"), which stands for the
            last stage of that role that the configuration has.
        files: external files or folders (data, checkpoints), by a word for each; their *contents* count.
        facts: what else counts, JSON-ready, such as the listing of a folder whose files are only named in the result.
    """

    keys: Sequence[str] = ()
    upstream: Sequence[str] = ()
    files: Mapping[str, Path] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __or__(self, other: Inputs) -> Inputs:
        """Both together."""
        return Inputs(
            keys=tuple(dict.fromkeys([*self.keys, *other.keys])),
            upstream=tuple(dict.fromkeys([*self.upstream, *other.upstream])),
            files={**self.files, **other.files},
            facts={**self.facts, **other.facts},
        )

    def counted(self, config: Any) -> dict[str, Any]:
        """What of the configuration goes into the fingerprint, by dotted key."""
        return {**counted(config, self.keys), **self.facts}

    def view(self, config: Any) -> Any:
        """The configuration as the stage may see it: reading any other key is an AttributeError."""
        incidental = {name for name, info in described(type(config)) if not info.counts}
        return View(config, frozenset(incidental | expand(type(config), self.keys).keys()))


@dataclass(frozen=True)
class Job:
    """Where a stage writes, what it reads, and how it reaches the other ranks.

    Attributes:
        folder: the work-in-progress folder, possibly holding the checkpoints of an earlier, killed attempt.
        upstream: folders of finished results, by the words of `Inputs.upstream`.
        accelerator: ranks, device, gather.
    """

    folder: Path
    upstream: Mapping[str, Path]
    accelerator: Accelerator


@dataclass
class Outcome:
    """What a stage adds to its manifest: `primary` names the metric that sums the stage up."""

    metrics: dict[str, Any] = field(default_factory=dict)
    primary: str | None = None
    counts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """A step of the chain.

    Attributes:
        role: what its result is to others, who ask for the role and not for the stage: "generator", "retriever", ….
        version: raised when the code changes what the result means.
        reads: what it reads under a configuration.
        run: makes the result in `Job.folder`. It is handed the configuration as `Inputs.view` shows it.
        applies: whether the configuration has this stage at all.
    """

    name: str
    role: str
    version: int
    reads: Callable[[Any], Inputs]
    run: Callable[[Any, Job], Outcome]
    applies: Callable[[Any], bool] = lambda config: True
