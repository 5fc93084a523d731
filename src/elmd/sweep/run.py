"""Runs the jobs of a sweep in slots, each in a session of its own, and stops them so that they save."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import psutil

from elmd.cli import config_dir
from elmd.config import Config
from elmd.errors import ConfigError
from elmd.log import bar, logger
from elmd.sweep.expand import Job
from elmd.sweep.state import Record, State, duration, why

#: What a job runs, one after the other, and what sweep.json calls them.
MODULES = {"train": "elmd.train", "evaluate": "elmd.evaluate"}

TICK = 0.2  # seconds between looks at the jobs
GRACE = 100.0  # seconds a job has to save when the sweep is asked to stop; Slurm's example gives 120


def launch(job: Job, module: str) -> list[str]:
    """The command that runs one module for a job: `accelerate launch` with a process per GPU, or one."""
    gpus = job.cfg.launcher.gpus
    settings = config_dir() / "accelerate" / ("ddp.yaml" if gpus > 1 else "single.yaml")  # ddp.yaml takes a free port
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(settings)]
    return [*accelerate, "--num_processes", str(gpus), "-m", module, *job.overrides, f"job='{job.cfg.job}'"]


def slots_for(cfg: Config, gpus: Sequence[str]) -> list[tuple[str, ...]]:
    """The GPUs of each slot, () on CPU; as many jobs run at a time.

    Args:
        gpus: the names of those that may be used.

    Raises:
        ConfigError: more GPUs are asked for than there are.
    """
    slots, each = cfg.launcher.slots, cfg.launcher.gpus
    if not gpus and each == 1:
        return [()] * (slots or 1)
    if max(slots, 1) * each > len(gpus):
        raise ConfigError(
            f"{max(slots, 1)} × {each} GPUs are asked for, and {len(gpus)} can be used",
            where="launcher.slots, launcher.gpus",
            fix="ask for fewer; launcher.slots=0 takes as many slots as there are GPUs for",
        )
    return [tuple(gpus[i * each : (i + 1) * each]) for i in range(slots or len(gpus) // each)]


def visible_gpus() -> list[str]:
    """GPUs that this process may hand out, by what CUDA_VISIBLE_DEVICES calls them."""
    import torch

    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named else [str(i) for i in range(count)]


@dataclass
class Running:
    """A job that runs, in its slot; `process` is that of its current stage."""

    job: Job
    state: State
    gpus: tuple[str, ...]
    process: subprocess.Popen[bytes]
    stages: Iterator[str]  # those still to come
    started: float  # of time.monotonic()
    log_start: int = 0  # where in its log, in bytes, this stage begins
    asked: set[int] = field(default_factory=set)  # processes that have been asked to stop

    @property
    def seconds(self) -> float:
        return round(time.monotonic() - self.started, 1)

    def ask_to_stop(self) -> None:
        """Ask the processes that train to stop; the launcher above them ends when they have saved.

        `accelerate launch` of one process would die of the signal itself and leave its child running.
        """
        with suppress(psutil.NoSuchProcess):
            launcher = psutil.Process(self.process.pid)
            for process in launcher.children() or [launcher]:
                if process.pid not in self.asked:
                    process.terminate()
                    self.asked.add(process.pid)

    def lives(self) -> bool:
        """Whether anything of it runs: Slurm signals every process, and a launcher dies before its child has saved."""
        if self.process.poll() is None:
            return True
        for other in psutil.process_iter():
            with suppress(ProcessLookupError, psutil.NoSuchProcess):
                if os.getpgid(other.pid) == self.process.pid and other.status() != psutil.STATUS_ZOMBIE:
                    return True
        return False

    def kill(self, number: signal.Signals) -> None:
        """Send a signal to everything that this job started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


class Sweep:
    """Runs jobs in slots, and keeps `sweep.json` and a log per job.

    Args:
        folder: the experiment's, `runs/experiments/<name>`.
        done: names of jobs that there is nothing to do for.
        slots: the GPUs of each slot.
        environment: of the jobs, to which each slot adds its GPUs.
        command: what runs a module for a job.
    """

    def __init__(
        self,
        folder: Path,
        jobs: Sequence[Job],
        slots: Sequence[tuple[str, ...]],
        *,
        done: Collection[str],
        environment: dict[str, str],
        command: Callable[[Job, str], list[str]] = launch,
    ):
        self.folder, self.slots, self.environment, self.command = folder, list(slots), environment, command
        self.record = Record(folder, jobs, done)
        self._waiting = [job for job in jobs if job.name not in done]
        self._running: list[Running] = []
        self._stopped_by: signal.Signals | None = None
        self._bar = bar("jobs", total=len(jobs), initial=len(done), unit="job")

    def run(self) -> None:
        """Run every job that is not done; returns when none runs and none waits.

        Raises:
            SystemExit: 128 + the signal after SIGINT or SIGTERM, with the jobs stopped so that they can be resumed.
        """
        free, shown = list(self.slots), time.monotonic()
        self.record.write()
        with self._signals():
            while self._waiting or self._running:
                while self._waiting and free:
                    self._running.append(self._start(self._waiting.pop(0), free.pop(0)))
                time.sleep(TICK)
                if self._stopped_by is not None:  # before looking at jobs: those ended by it have not failed
                    break
                for running in [running for running in self._running if not self._continues(running)]:
                    self._running.remove(running)
                    free.append(running.gpus)
                    self._show(now=False)
                    self._bar.update()
                if time.monotonic() - shown > (1 if sys.stderr.isatty() else 60):
                    shown = time.monotonic()
                    self._show(now=True)
            if self._stopped_by is not None:
                self._stop(self._stopped_by)
        self._bar.close()

    def _start(self, job: Job, gpus: tuple[str, ...]) -> Running:
        state, stages, started = self.record.states[job.name], iter(MODULES), time.monotonic()
        state.status, state.error = "running", None
        self._say("%s: begins%s", job.name, f" on GPU {','.join(gpus)}" if gpus else "")
        stage = next(stages)
        process, log_start = self._launch(job, state, stage, gpus)
        self._enter(state, stage, 0.0)
        return Running(job, state, gpus, process, stages, started, log_start)

    def _launch(self, job: Job, state: State, stage: str, gpus: tuple[str, ...]) -> tuple[subprocess.Popen[bytes], int]:
        """Start a stage of a job; also returns where in its log the stage begins."""
        path = self.folder / state.log
        path.parent.mkdir(parents=True, exist_ok=True)
        command = self.command(job, MODULES[stage])
        environment = {**self.environment, **({"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {})}
        with path.open("ab") as file:  # earlier attempts stay above
            file.write(f"$ {shlex.join(command)}\n".encode())
            start = file.tell()
            file.flush()
            # A session of its own: Ctrl-C on the terminal reaches the sweep alone, which lets jobs save.
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment, start_new_session=True
            )
        return process, start

    def _enter(self, state: State, stage: str | None, seconds: float) -> None:
        state.stage, state.seconds = stage, seconds
        self.record.write()

    def _continues(self, running: Running) -> bool:
        """Whether a job still runs; where a stage has ended well, the next one is started."""
        job, state = running.job, running.state
        if (code := running.process.poll()) is None:
            return True
        if code != 0:
            running.kill(signal.SIGTERM)  # a launcher that was killed leaves its processes on the slot's GPUs
            state.status, state.error = "failed", why(self.folder / state.log, running.log_start, code)
            self._enter(state, state.stage, running.seconds)
            self._say("%s: failed in %s: %s", job.name, state.stage, state.error)
            return False
        stage = next(running.stages, None)
        if stage is None:
            state.status = "done"
            self._say("%s: done in %s", job.name, duration(running.seconds))
        else:
            running.process, running.log_start = self._launch(job, state, stage, running.gpus)
        self._enter(state, stage, running.seconds)
        return stage is not None

    def _stop(self, number: signal.Signals) -> NoReturn:
        count = len(self._running)
        if count:
            self._say("%s: %d jobs are asked to save and stop; once more ends them at once", number.name, count)
        deadline = time.monotonic() + GRACE
        self._stopped_by = None
        alive = list(self._running)
        while alive := [running for running in alive if running.lives()]:
            if self._stopped_by is not None or time.monotonic() > deadline:
                for running in alive:
                    running.kill(signal.SIGKILL)
            for running in alive:
                running.ask_to_stop()
            time.sleep(TICK)
        for running in self._running:
            running.kill(signal.SIGTERM)  # whatever a launcher started at the moment of the stop
            running.state.status, running.state.seconds = "waiting", running.seconds
        self.record.write()
        self._bar.close()
        done, failed, waiting = (self.record.count(status) for status in ("done", "failed", "waiting"))
        print(
            f"stopped by {number.name}: {done} jobs done, {failed} failed, {count} stopped, {waiting - count} not "
            "begun; run the same command to resume.",
            file=sys.stderr,
        )
        raise SystemExit(128 + number)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def note(number: int, frame: Any) -> None:
            self._stopped_by = signal.Signals(number)

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _show(self, *, now: bool) -> None:
        """Say beside the bar how many jobs fail and run; it is drawn `now`, or when it moves next."""
        counts = {status: self.record.count(status) for status in ("failed", "running")}
        self._bar.set_postfix_str(", ".join(f"{n} {status}" for status, n in counts.items() if n), refresh=now)

    def _say(self, message: str, *values: object) -> None:
        self._bar.clear()
        logger.info(message, *values)
