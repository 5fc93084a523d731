"""What a check is, and what checks look at."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from elmd.config import BOOTSTRAP, Config
from elmd.engine.files import read_object
from elmd.engine.hub import is_hub_id
from elmd.errors import CheckpointError, ElmdError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from elmd.data.encode import Encoder

Level = Literal["config", "preflight", "doctor"]


class Seen(NamedTuple):
    """What a check that passed has seen; `advice` where a person may still want to do something."""

    text: str
    advice: str = ""


class Inspection:
    """What checks look at: a configuration and the files that it names, each read once.

    Args:
        todo: the stages that will run. None: whatever the configuration has, and nothing is downloaded (the doctor).
    """

    def __init__(self, cfg: Config, todo: Collection[str] | None = None):
        self.cfg, self.todo = cfg, todo

    def runs(self, *stages: str) -> bool:
        """Whether one of these stages will run."""
        return self.todo is None or any(stage in self.todo for stage in stages)

    @property
    def has_llm(self) -> bool:
        """Whether the configuration generates with a language model; two of the baselines have none."""
        return not self.cfg.baseline.name.own_model

    @property
    def llm_at_hand(self) -> bool:
        """Whether the language model's configuration and tokenizer can be read now."""
        path = self.cfg.llm.path
        if path is None or path == BOOTSTRAP:
            return False
        return Path(path).is_dir() or (is_hub_id(path) and (self.todo is not None or in_hub_cache(path)))

    @cached_property
    def llm_config(self) -> PreTrainedConfig:
        """The language model's own configuration.

        Raises:
            CheckpointError: it cannot be read.
        """
        from elmd.models.llm import open_config

        return open_config(str(self.cfg.llm.path))

    @property
    def llm_config_if_readable(self) -> PreTrainedConfig | None:
        try:
            return self.llm_config if self.llm_at_hand else None
        except CheckpointError:
            return None

    @cached_property
    def tokenizer(self) -> Any:
        """The language model's tokenizer.

        Raises:
            CheckpointError: it cannot be read.
        """
        from elmd.models.llm import open_tokenizer

        return open_tokenizer(str(self.cfg.llm.path))

    @cached_property
    def encoder(self) -> Encoder:
        """The encoder of prompts.

        Raises:
            CheckpointError: the tokenizer lacks something that it needs.
        """
        from elmd.stages.parts import encoder_of

        return encoder_of(self.tokenizer, self.cfg)


@dataclass(frozen=True)
class Check:
    """One thing that must hold.

    Attributes:
        name: as the doctor shows it.
        run: raises an `ElmdError` where it does not hold; returns what it has seen, None if that is not worth a line.
        when: whether it applies to this configuration and these stages.
        needs: names of the checks that must have passed before this one makes sense.
    """

    name: str
    level: Level
    run: Callable[[Inspection], Seen | None]
    when: Callable[[Inspection], bool] = lambda _: True
    needs: tuple[str, ...] = ()


def results(checks: Iterable[Check], inspection: Inspection) -> Iterator[tuple[Check, Seen | ElmdError | None]]:
    """Run the checks that apply, each with its result or its error."""
    passed: set[str] = set()
    for check in checks:
        if not passed.issuperset(check.needs) or not check.when(inspection):
            continue
        try:
            seen = check.run(inspection)
        except ElmdError as error:
            yield check, error
        else:
            passed.add(check.name)
            yield check, seen


def object_in(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None where there is none that can be read."""
    try:
        return read_object(path, CheckpointError, fix="")
    except CheckpointError:
        return None


def in_hub_cache(name: str) -> bool:
    """Whether a hub repository's config.json is in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, "config.json"), str)
