"""The errors a user can cause and correct. Anything else that is raised is a bug in ELMD."""

from __future__ import annotations

from functools import partial
from os import PathLike
from typing import Any


class ElmdError(Exception):
    """One clear sentence: what is wrong, where, and what to do next.

    Args:
        what: what is wrong, without a final full stop.
        where: the file (with `:line` where known), id or setting that is at fault.
        fix: what the user should do next, without a final full stop.
    """

    def __init__(self, what: str, *, where: str | PathLike[str] | None = None, fix: str | None = None):
        self.what, self.where, self.fix = what, str(where) if where is not None else None, fix
        text = f"{self.where}: {what}" if self.where else what
        super().__init__(f"{text}; {fix}." if fix else f"{text}.")

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        """Errors travel between processes."""
        return partial(type(self), where=self.where, fix=self.fix), (self.what,)


class ConfigError(ElmdError):
    """The configuration contradicts itself or names something that does not exist."""


class DataError(ElmdError):
    """A file of dialogues, samples or predictions cannot be used as it is."""


class ClipError(ElmdError):
    """One video clip cannot be decoded; the rest of the run is not affected."""


class CheckpointError(ElmdError):
    """A folder of weights is missing, incomplete or of another shape than the configuration says."""


class ArtifactError(ElmdError):
    """A stage's result is missing, locked or was made by something else."""


class TrainingError(ElmdError):
    """Training cannot continue: a loss that is not finite, a rank that died, an impossible batch."""


def reason(error: BaseException) -> str:
    """What another library's error says, as a part of our sentence: its first line without the full stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")
