"""What a chain that is up to date has to load."""

from __future__ import annotations

import subprocess
import sys

SLOW = ("transformers", "peft", "sentence_transformers", "sklearn", "scipy", "av", "decord", "matplotlib")


def test_stages_are_declared_without_the_libraries_that_they_work_with() -> None:
    code = f"import sys, elmd.stages; print(*(name for name in {SLOW} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
