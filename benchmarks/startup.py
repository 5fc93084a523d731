"""Seconds until a command answers: help, a mistake in what was typed, a plan of jobs. What works, works after that."""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.harness import Case, Way
from benchmarks.resume import TINY

ROOT = Path(__file__).parents[1]

#: What takes seconds to load; none of it is needed to read a command line.
HEAVY = (
    "torch", "transformers", "accelerate", "peft", "sentence_transformers", "sklearn", "scipy", "pandas", "matplotlib",
    "decord", "av", "nltk", "jieba",
)  # fmt: skip

#: What is typed, and the exit code.
COMMANDS = {
    "elmd.train --help": 0,
    "elmd.train --cfg job": 0,
    "elmd.train eerg.batchsize=3": 1,  # there is no such key
    "elmd.evaluate --help": 0,
    "elmd.doctor --help": 0,
    "elmd.sweep --help": 0,
    "elmd.sweep experiment=demo seed=0,1 --dry-run": 0,
    "elmd.report --help": 0,
    "elmd.report nowhere": 1,
    "elmd.human sample --help": 0,
    "elmd.export --help": 0,
    "elmd.export nowhere --out export": 1,
    "elmd.reply --help": 0,
    "elmd.reply nowhere --utterance x": 1,
    "scripts/convert_chatglm2.py --help": 0,
    "scripts/convert_visualglm.py --help": 0,
    "scripts/demo_claims.py --help": 0,
    "scripts/evaluate_runs.py --help": 0,
}


def arguments(command: str) -> list[str]:
    """What Python is started with."""
    name, *rest = command.split()
    return [str(ROOT / name), *rest] if name.endswith(".py") else ["-m", name, *rest]


def loaded(errors: str) -> set[str]:
    """Of `HEAVY`, what a process loaded that was started with `-X importtime`."""
    names = {line.rpartition("|")[2].strip() for line in errors.splitlines() if line.startswith("import time:")}
    return names & set(HEAVY)


def cases(small: bool) -> Iterator[Case]:
    with TemporaryDirectory() as folder:

        def way(name: str, line: list[str], code: int) -> Way:
            cpu: list[float] = []

            def answers() -> None:
                before = resource.getrusage(resource.RUSAGE_CHILDREN)
                done = subprocess.run([sys.executable, *line], cwd=folder, capture_output=True)
                after = resource.getrusage(resource.RUSAGE_CHILDREN)
                cpu.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
                assert done.returncode == code, f"{name}: exit code {done.returncode} and not {code}"

            # The first run, which is not timed, brings the files into the cache.
            return Way(name, answers, lambda: {"CPU, s": statistics.median(cpu[1:])})

        commands = dict(list(COMMANDS.items())[:1]) if small else COMMANDS
        lines = {name: (arguments(name), code) for name, code in commands.items()}
        if not small:
            lines["import torch"] = ["-c", "import torch"], 0
            lines["import transformers, peft, sentence_transformers"] = (
                ["-c", "import transformers, peft, sentence_transformers"], 0,
            )  # fmt: skip
        yield Case(
            "Until a command answers",
            "a new process of Python each time, files in the page cache",
            [way(name, line, code) for name, (line, code) in lines.items()],
            tolerance=None,
            reference=False,
            note="The last lines are for comparison: what a script that loads its libraries first waits for.",
        )
        if small:
            return
        chain = ["-m", "elmd.train", *TINY, "runs_dir=runs", "threads=1"]
        yield Case(
            "Until elmd.train says that all is made already",
            "a new process of Python each time; the tiny chain, made by the first run, which is not timed",
            [way(f"elmd.train stage={stage}", [*chain, f"stage={stage}"], 0) for stage in ("all", "prepare")],
            tolerance=None,
            reference=False,
            note="torch and accelerate are loaded in each, since ranks must agree on what there is.",
        )
