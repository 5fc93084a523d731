"""`fit_script.py` in processes of its own: ELMD's loop on a tiny model, which can kill itself and counts bytes.

Processes are forked, so that none pays for loading libraries: `python -m benchmarks startup` shows what that costs.
"""

from __future__ import annotations

import importlib
import os
import runpy
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from accelerate.state import AcceleratorState

from benchmarks import tiny

SCRIPT = Path(__file__).with_name("fit_script.py")

#: What the script loads; a forked process has what its parent had.
LIBRARIES = ("elmd.stages.eerg", "matplotlib.pyplot", "torch.utils.tensorboard")


def forked(work: Callable[[], object], log: Path, **environment: str) -> Callable[[], int]:
    """Start `work` in a process of its own, which writes into `log`.

    Returns:
        Waits for its end: the exit code, negative where a signal ended it.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return lambda: os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.environ.update(environment)
        torch.set_num_threads(1)  # a pool's threads are not forked
        AcceleratorState._reset_state(reset_partial_state=True)  # the child may be one of several, its parent was not
        work()
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(code)  # whatever happens, the child must not go on as the benchmark
    raise AssertionError


def load() -> None:
    """Load what `train` needs, so that its processes have it already."""
    for name in LIBRARIES:
        importlib.import_module(name)


def write_llm(folder: Path, layers: int = 2) -> Path:
    """See `tiny.write_llm`; loads what `train` needs."""
    load()
    log = folder.with_suffix(".log")
    assert forked(lambda: tiny.write_llm(folder, layers), log)() == 0, log.read_text()
    return folder


def train(llm: Path, out: Path, steps: int, *stop: str, world: int = 1, **environment: str) -> int:
    """So many steps of `SCRIPT` in `world` processes; the exit code of the first that did not end well, or 0.

    Args:
        stop: see `SCRIPT`, as the environment is.
    """

    def script() -> None:
        sys.argv = [str(SCRIPT), str(llm), str(out), str(steps), str(world), *stop]
        runpy.run_path(str(SCRIPT), run_name="__main__")

    ranks: list[Mapping[str, str]] = [{}]
    if world > 1:  # what a launcher hands to its processes
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = str(server.getsockname()[1])
        common = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ranks = [{"RANK": str(i), "LOCAL_RANK": str(i), **common} for i in range(world)]
    ends = [forked(script, out.with_suffix(f".{i}.log"), **environment, **rank) for i, rank in enumerate(ranks)]
    return next(filter(None, [end() for end in ends]), 0)
