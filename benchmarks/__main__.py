"""Speed of ELMD's ways against what one would otherwise run, in turn in one process: `python -m benchmarks [NAME …]`.

Each benchmark first shows that all ways give the same results. Times are of this machine; compare ratios.
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import re
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from elmd.cli import guard
from elmd.engine.files import write_json
from elmd.errors import ConfigError

#: By name: the module, whose function `cases(small)` yields the cases, and what is compared.
BENCHMARKS = {
    "step-eerg": ("benchmarks.step_eerg", "a training step of EERG: peft, HF Trainer, TRL, p-tuning's defaults"),
    "step-rep": ("benchmarks.step_rep", "a training step of REP: without the causal split"),
    "erm": ("benchmarks.erm", "a training step of ERM: sentence-transformers' trainer, loops"),
    "encode": ("benchmarks.encode", "utterances to vectors: sentence-transformers one by one and in batches"),
    "retrieval": ("benchmarks.retrieval", "neighbours among 1e3 … 1e6 candidates: exact, FAISS"),
    "video": ("benchmarks.video", "frames of clips: PyAV one by one; features from the shards"),
    "generate": ("benchmarks.generation", "replies: HF generate one by one and in padded batches"),
    "resume": ("benchmarks.resume", "what an interruption costs, and what a finished chain costs"),
    "startup": ("benchmarks.startup", "seconds until a command begins its work"),
    "dist": ("benchmarks.dist", "two processes against one: losses, bytes that pass between them"),
}
PACKAGES = (
    "torch", "transformers", "peft", "accelerate", "sentence-transformers", "trl", "faiss-cpu", "decord", "av",
)  # fmt: skip


def main() -> None:
    names = "\n".join(f"  {name:<10} {purpose}" for name, (_, purpose) in BENCHMARKS.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=f"Ways give equal results, which is shown first; over 1, ELMD is faster.\n\n{names}",
        epilog="Peers come with pip install -e '.[bench]'; python -m benchmarks.curves draws costs against sizes.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(BENCHMARKS)}; default: all")
    parser.add_argument("--rounds", type=int, default=5, help="times that each way is run (default: %(default)s)")
    parser.add_argument("--small", action="store_true", help="smallest sizes: shows that it runs, not how fast")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the measurements there too")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error("--rounds must be 1 or more")
    guard(lambda: run(args.names, rounds=args.rounds, small=args.small, path=args.json))


def run(names: Sequence[str], *, rounds: int, small: bool, path: Path | None) -> None:
    """Run these benchmarks, or all of them, and print what was measured; exits with 1 where one of `names` cannot run.

    Raises:
        ConfigError: there is no such benchmark.
    """
    if unknown := [name for name in names if name not in BENCHMARKS]:
        raise ConfigError(f"there is no benchmark {unknown[0]!r}", fix=f"choose from {', '.join(BENCHMARKS)}")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read as torch is loaded: its profiler tells of itself at length
    from benchmarks.harness import measure  # which loads torch: not for --help

    warnings.filterwarnings("ignore", message="`(is_)?gradient_checkpointing`", category=FutureWarning)
    about, missing = environment(), []
    print(", ".join(f"{name} {value}" for name, value in about.items()), end="\n\n")
    if small:
        print("Smallest sizes: read no times.\n")
    measured: dict[str, list[dict[str, Any]]] = {}
    for name in names or BENCHMARKS:
        try:
            module = importlib.import_module(BENCHMARKS[name][0])
        except ModuleNotFoundError as error:
            missing.append(name)
            print(f"{name}: left out, {error.name} is not installed (pip install -e '.[bench]')\n", file=sys.stderr)
            continue
        print(f"## {name}: {BENCHMARKS[name][1]}\n")
        measured[name] = []
        for case in module.cases(small):
            found = measure(case, rounds)
            measured[name].append(found.json())
            print(found.markdown(), end="\n\n", flush=True)
            if path:
                write_json(path, {"environment": about, "rounds": rounds, "small": small, "benchmarks": measured})
    if missing and names:
        sys.exit(1)


def environment() -> dict[str, str]:
    """Device, threads, commit and versions."""
    import torch

    from elmd.engine.provenance import git_state

    cpu = re.search(r"model name\s*: (.*)", cpus.read_text()) if (cpus := Path("/proc/cpuinfo")).is_file() else None
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu[1] if cpu else platform.machine()
    git = git_state()
    found = {"device": device, "cores": str(os.cpu_count()), "threads": str(torch.get_num_threads())}
    found["commit"] = f"{git['commit'][:7]}{' and changes' * git['dirty']}" if git else "unknown"
    found["python"] = platform.python_version()
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    main()
