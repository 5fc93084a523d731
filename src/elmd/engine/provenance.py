"""Where a result comes from: the commit of the source tree, and the versions of libraries."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def git_state() -> dict[str, Any] | None:
    """Commit and dirty flag of the source tree that runs, None where it is no git checkout."""

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout

    try:
        return {"commit": git("rev-parse", "HEAD").strip(), "dirty": bool(git("status", "--porcelain").strip())}
    except (OSError, subprocess.CalledProcessError):
        return None


def versions(libraries: Iterable[str]) -> dict[str, str]:
    """Installed versions of Python and of these libraries."""
    result = {"python": sys.version.split()[0]}
    for library in libraries:
        try:
            result[library] = version(library)
        except PackageNotFoundError:
            result[library] = "not installed"
    return result
