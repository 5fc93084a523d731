"""One list of everything that must hold before hours are spent, for its three users.

| level       | what it reads                                | run by                                        |
|-------------|----------------------------------------------|-----------------------------------------------|
| `config`    | the configuration alone                      | `check`: every command line, before it starts |
| `preflight` | small files of checkpoints, never weights    | `preflight`: `stage=all`, before its stages   |
| `doctor`    | what else a person should see beforehand     | `python -m elmd.doctor`, which runs them all  |

To add a check: write a function that raises an `ElmdError`, and one entry in the list of its file. This package
imports no torch: command lines check their configuration in well under a second.
"""

from __future__ import annotations

from collections.abc import Collection

from elmd.checks.agreement import AGREEMENT
from elmd.checks.base import Check, Inspection, Level, Seen, results
from elmd.checks.files import FILES
from elmd.checks.rules import RULES
from elmd.config import Config
from elmd.engine.keys import check_ranges
from elmd.errors import ElmdError

__all__ = ["CHECKS", "Check", "Inspection", "Seen", "check", "preflight", "results"]

CHECKS: tuple[Check, ...] = (*RULES, *FILES, *AGREEMENT)


def check(cfg: Config) -> None:
    """Whether numbers are in range and fields agree with each other.

    Raises:
        ConfigError: names the fields that do not, and what to change.
    """
    check_ranges(cfg)
    _require("config", Inspection(cfg))


def preflight(cfg: Config, todo: Collection[str]) -> None:
    """Whether the stages that are about to run will find what they read; reads no weights.

    Args:
        todo: names of the stages that will run.

    Raises:
        ElmdError: that of the first check that fails.
    """
    _require("preflight", Inspection(cfg, todo))


def _require(level: Level, inspection: Inspection) -> None:
    levels = ("config",) if level == "config" else ("config", level)
    for _, result in results([check for check in CHECKS if check.level in levels], inspection):
        if isinstance(result, ElmdError):
            raise result
