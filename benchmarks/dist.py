"""Two processes against one: what they compute, what passes between them, and how long it takes."""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.forks import train, write_llm
from benchmarks.harness import Case, Way
from elmd.engine.store import CHECKPOINTS

BATCH = 8  # samples of a step of fit_script.py


class Run:
    """A training in so many processes (see `benchmarks.forks`), always anew, into `out`."""

    def __init__(self, world: int, llm: Path, out: Path, steps: int):
        self.world, self.llm, self.out, self.steps = world, llm, out, steps

    def clear(self) -> None:
        shutil.rmtree(self.out, ignore_errors=True)

    def __call__(self) -> dict[str, Any]:
        """Losses of steps and evaluations, and the weights at the end."""
        code = train(self.llm, self.out, self.steps, world=self.world, NO_DROPOUT="1", TELL="1")
        assert code == 0, self.out.with_suffix(".0.log").read_text()
        losses = [entry.get("loss", entry.get("valid/loss")) for entry in self._metrics()]
        last = max((self.out / CHECKPOINTS).iterdir())
        return {"losses": torch.tensor(losses, dtype=torch.float64), **load_file(last / "model.safetensors")}

    def facts(self) -> dict[str, float]:
        report = json.loads((self.out / "report-0.json").read_text())
        steps = [BATCH / entry["samples_per_s"] for entry in self._metrics() if "samples_per_s" in entry]
        in_steps = sum(size for name, size in report["bytes"].items() if name.startswith("step:"))
        outside = sum(report["bytes"].values()) - in_steps
        return {
            "ms per step": 1000 * statistics.median(steps),
            "bytes handed to each step's collectives": in_steps / self.steps,
            "bytes outside of steps": outside,
            "bytes that train": 4 * report["trained"],
            "bytes that are frozen": report["whole_bytes"],
        }

    def _metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.out / "metrics.jsonl").read_text().splitlines()]


def cases(small: bool) -> Iterator[Case]:
    steps, layers = (3, 2) if small else (12, 4)
    with TemporaryDirectory() as name:
        folder = Path(name)
        llm = write_llm(folder / "llm", layers)
        one, two = (Run(world, llm, folder / f"world-{world}", steps) for world in (1, 2))
        yield Case(
            "Two processes (gloo) against one",
            f"GLM of 32 × {layers}, prefix of 4; {steps} steps of {BATCH} samples, whatever the number of processes",
            [
                Way("elmd, one process", one, one.facts, before=one.clear),
                Way("elmd, two processes", two, two.facts, before=two.clear),
            ],
            tolerance=1e-5,
            note="Losses of all steps and evaluations, and the weights that train. Loading libraries is not in it; in "
            "steps of so small a model the work around them weighs most.",
        )
