"""Several ranks of one run as forked processes, which therefore load no library again."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from elmd.cli import guard, leave


def run_ranks(work: Callable[[Accelerator], object], world: int, folder: Path) -> list[tuple[int, str]]:
    """Call `work` on `world` ranks, as a command would: an ElmdError becomes exit code 1.

    Returns:
        Of each rank, its exit code (negative: the signal that ended it) and what it wrote to its terminal.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    common = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    logs = [folder / f"rank-{rank}.log" for rank in range(world)]
    children = [_fork(work, log, {**common, "RANK": str(i), "LOCAL_RANK": str(i)}) for i, log in enumerate(logs)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return [(code, log.read_text()) for code, log in zip(codes, logs, strict=True)]


def _fork(work: Callable[[Accelerator], object], log: Path, environment: dict[str, str]) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # not what pytest captures
        os.environ.update(environment)
        torch.set_num_threads(1)  # the threads of a pool are not forked
        AcceleratorState._reset_state(reset_partial_state=True)
        guard(lambda: work(Accelerator(cpu=True)))
        leave()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(code)  # whatever happens, the child must not run the rest of the tests
