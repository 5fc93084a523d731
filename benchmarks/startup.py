"""Seconds until a command answers: help, a mistake in what was typed, a plan of jobs. What works, works after that."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
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

        def start(line: list[str]) -> int:
            return subprocess.run([sys.executable, *line], cwd=folder, capture_output=True).returncode

        def answers(line: list[str], code: int) -> Callable[[], bool]:
            return lambda: start(line) == code

        def cpu(line: list[str]) -> Callable[[], Mapping[str, float]]:
            def facts() -> Mapping[str, float]:
                before = resource.getrusage(resource.RUSAGE_CHILDREN)
                start(line)
                after = resource.getrusage(resource.RUSAGE_CHILDREN)
                return {"CPU, s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}

            return facts

        commands = dict(list(COMMANDS.items())[:1]) if small else COMMANDS
        lines = {name: (arguments(name), code) for name, code in commands.items()}
        if not small:
            lines["import torch"] = ["-c", "import torch"], 0
            lines["import transformers, peft, sentence_transformers"] = (
                ["-c", "import transformers, peft, sentence_transformers"], 0,
            )  # fmt: skip
        for name, (line, code) in lines.items():
            assert start(line) == code, f"{name}: another exit code than {code}"  # and files are in the cache
        yield Case(
            "Until a command answers",
            "a new process of Python each time, files in the page cache",
            [Way(name, answers(line, code), cpu(line)) for name, (line, code) in lines.items()],
            note="The last lines are for comparison: what a script that loads its libraries first waits for.",
        )
        if small:
            return
        chain = ["-m", "elmd.train", *TINY, "runs_dir=runs", "threads=1"]
        made = {f"stage={stage}": [*chain, f"stage={stage}"] for stage in ("all", "prepare")}
        assert start(made["stage=all"]) == 0
        yield Case(
            "Until elmd.train says that all is made already",
            "a new process of Python each time; the tiny chain, made before",
            [Way(f"elmd.train {name}", answers(line, 0), cpu(line)) for name, line in made.items()],
            note="torch and accelerate are loaded in each, since ranks must agree on what there is.",
        )
