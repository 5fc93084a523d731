"""`python -m elmd.sweep experiment=… seed=0,1,2 …`: the jobs of a sweep, each in processes of its own.

The sweep is the one that `python -m elmd.train -m …` would run. Here a job is trained and evaluated under `accelerate
launch`, several at a time where there are GPUs or slots for them, and one that fails does not stop the others. Jobs
share stages through `runs/`: whoever comes second to a stage waits for the first.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import hydra
import psutil
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import open_dict
from omegaconf.errors import OmegaConfBaseException

from elmd import log
from elmd.cli import axes, composition_error, config_dir, experiment_folder, guard, register, typed
from elmd.config import Config, StageName, plain
from elmd.engine.files import read_json, write_json
from elmd.engine.store import Store
from elmd.errors import ConfigError, ElmdError
from elmd.evaluation.systems import system_name
from elmd.log import logger

#: What a job runs, one after the other, and what sweep.json calls them.
MODULES = {"train": "elmd.train", "evaluate": "elmd.evaluate"}

STATE = "sweep.json"
TICK = 0.2  # seconds between looks at the jobs
GRACE = 100.0  # seconds a job has to save when the sweep is told to stop; Slurm's example gives 120


@dataclass(frozen=True)
class Job:
    """One job of a sweep.

    Attributes:
        name: of its folder below the experiment's, of its log, and in tables.
        overrides: its command line, `job=…` not among them.
        cfg: what they compose to, checked, with `job` set.
        axes: what they set, see `elmd.cli.axes`.
    """

    name: str
    overrides: tuple[str, ...]
    cfg: Config
    axes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return experiment_folder(self.cfg)


@dataclass
class State:
    """What stands of a job in `sweep.json`; a job that was stopped is waiting, in the stage that it had come to.

    `system`, `seed` and `axes` say what the job is where it leaves nothing else behind.
    """

    job: str
    overrides: list[str]
    system: str
    seed: int
    axes: Mapping[str, Any]
    status: str = "waiting"  # done, failed, running, waiting
    stage: str | None = None  # train, evaluate; None before and after
    error: str | None = None  # one sentence
    log: str = ""  # relative to the sweep's folder
    seconds: float = 0.0  # of the last run, its end or the last change of stage


def expand(arguments: Sequence[str]) -> list[Job]:
    """The jobs of a command line, checked, in the order they start.

    The product of the experiment's `hydra.sweeper.params` and the comma lists of the command line, which wins where
    both have a key: Hydra's own sweeper does it. The seed varies fastest, because jobs of different seeds share the
    least and so wait for each other the least.

    Raises:
        ConfigError: a job does not compose, names are not unique, or something is set that a sweep cannot have.
    """
    register()
    with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        given = parser.parse_overrides(list(arguments))
        whole = [one for one in given if not one.is_sweep_override()]
        base = hydra.compose("train", [str(one.input_line) for one in whole], return_hydra_config=True)
        swept = [f"{key}={values}" for key, values in (base.hydra.sweeper.params or {}).items()]
        hydras = [str(one.input_line) for one in given if one.is_hydra_override()]
        choices = [str(one.input_line) for one in given if not one.is_hydra_override()]
        ((*product,),) = BasicSweeper.split_arguments(parser.parse_overrides(swept + choices), None)
        jobs = [_job(overrides, hydras) for overrides in product]
    _check(jobs)
    by_setting: dict[tuple[str, ...], list[Job]] = {}
    for job in jobs:
        by_setting.setdefault(tuple(one for one in job.overrides if not one.startswith("seed=")), []).append(job)
    return [job for group in by_setting.values() for job in group]


def _job(overrides: Sequence[str], hydras: Sequence[str]) -> Job:
    try:
        raw = hydra.compose("train", [*hydras, *overrides], return_hydra_config=True)
        # Of a name that becomes a folder and stands on a command line, only what means nothing to either.
        name = re.sub(r"[^\w.,=+@~:\[\]-]", "_", raw.hydra.job.override_dirname) or "job"
        hydras_own = raw.hydra
        with open_dict(raw):
            del raw["hydra"]
        cfg = replace(typed(raw), job=name)
    except (HydraException, OmegaConfBaseException, ElmdError) as error:
        told = error if isinstance(error, ElmdError) else composition_error(error)
        where = ": ".join(filter(None, [f"job {' '.join(overrides)}", told.where]))
        raise ConfigError(told.what, where=where, fix=told.fix) from error
    return Job(experiment_folder(cfg).name, (*hydras, *overrides), cfg, axes(hydras_own, cfg))


def _check(jobs: Sequence[Job]) -> None:
    """What must hold of the jobs together, and what no job of a sweep may set."""
    for one in jobs:
        if any(override.startswith(("job=", "+job=", "++job=")) for override in one.overrides):
            raise ConfigError("names a sweep's jobs and is set by the launcher", where="job", fix="leave job= out")
        if one.cfg.stage is not StageName.all or one.cfg.predictions is not None:
            raise ConfigError(
                "a job of a sweep is trained and evaluated as a whole",
                where="stage" if one.cfg.predictions is None else "predictions",
                fix="leave it out; python -m elmd.train -m … stage=… sweeps over one stage",
            )
        if one.cfg.force:
            raise ConfigError(
                "would take away what other jobs of the sweep are reading",
                where="force",
                fix="make the stage anew first: python -m elmd.train stage=… force=true with the same choices",
            )
    if len(folders := sorted({str(one.folder.parent) for one in jobs})) > 1:
        raise ConfigError(
            f"the jobs belong to {len(folders)} folders, as {folders[0]} and {folders[1]}",
            where="experiment_name, runs_dir",
            fix="start a sweep for each",
        )
    seen: dict[str, Job] = {}
    for one in jobs:
        if other := seen.get(one.name):
            raise ConfigError(
                f"two jobs would have this name: {' '.join(other.overrides)} and {' '.join(one.overrides)}",
                where=one.name,
                fix="leave out what does not tell jobs apart, or start a sweep for each with an experiment_name",
            )
        seen[one.name] = one


def launch(job: Job, module: str) -> list[str]:
    """The command that runs one module for a job: `accelerate launch` with a process per GPU, or one."""
    gpus = job.cfg.launcher.gpus
    way = config_dir() / "accelerate" / ("ddp.yaml" if gpus > 1 else "single.yaml")  # ddp.yaml takes a free port
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(way)]
    return [*accelerate, "--num_processes", str(gpus), "-m", module, *job.overrides, f"job='{job.cfg.job}'"]


def slots_for(cfg: Config, gpus: Sequence[str]) -> list[tuple[str, ...]]:
    """The GPUs of each slot, () on CPU; as many jobs run at a time.

    Args:
        gpus: the names of those that may be used.

    Raises:
        ConfigError: more GPUs are asked for than there are.
    """
    wanted, each = cfg.launcher.slots, cfg.launcher.gpus
    if not gpus and each == 1:
        return [()] * (wanted or 1)
    if max(wanted, 1) * each > len(gpus):
        raise ConfigError(
            f"{max(wanted, 1)} × {each} GPUs are asked for, and {len(gpus)} can be used",
            where="launcher.slots, launcher.gpus",
            fix="ask for fewer; launcher.slots=0 takes as many slots as there are GPUs for",
        )
    return [tuple(gpus[i * each : (i + 1) * each]) for i in range(wanted or len(gpus) // each)]


def visible_gpus() -> list[str]:
    """GPUs that this process may hand out, by what CUDA_VISIBLE_DEVICES calls them."""
    import torch

    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named else [str(i) for i in range(count)]


def up_to_date(jobs: Sequence[Job]) -> set[str]:
    """Names of the jobs whose predictions are made and scored, by the fingerprints that the stages go by.

    Raises:
        ElmdError: what a job needs cannot be read; the job is named.
    """
    from accelerate import Accelerator

    from elmd.stages.chain import Chain

    alone, found = Accelerator(cpu=True), set()
    for job in jobs:
        try:
            made = Chain(job.cfg, alone).folder("generate")
        except ElmdError as error:
            where = ": ".join(filter(None, [f"job {job.name}", error.where]))
            raise type(error)(error.what, where=where, fix=error.fix) from error
        scores = job.folder / "scores.json"
        if scores.is_file():
            scored = Path(job.cfg.runs_dir) / read_json(scores)["predictions"]
            if scored.is_file() and scored.parent.resolve() == made.resolve():
                found.add(job.name)
    return found


@dataclass
class Running:
    """A job that runs, in its slot."""

    job: Job
    state: State
    gpus: tuple[str, ...]
    stages: Iterator[str]
    started: float
    process: subprocess.Popen[bytes] | None = None
    log_from: int = 0  # where in its log this stage begins
    told: set[int] = field(default_factory=set)  # processes that have been asked to stop

    def signal_stop(self) -> None:
        """Ask the processes that train to stop; the launcher above them ends when they have saved.

        `accelerate launch` of one process would die of the signal itself and leave its child running.
        """
        assert self.process is not None
        with suppress(psutil.NoSuchProcess):
            launcher = psutil.Process(self.process.pid)
            for process in launcher.children() or [launcher]:
                if process.pid not in self.told:
                    process.terminate()
                    self.told.add(process.pid)

    def lives(self) -> bool:
        """Whether anything of it runs: Slurm signals every process, and a launcher dies before its child has saved."""
        assert self.process is not None
        if self.process.poll() is None:
            return True
        for other in psutil.process_iter():
            with suppress(ProcessLookupError, psutil.NoSuchProcess):
                if os.getpgid(other.pid) == self.process.pid and other.status() != psutil.STATUS_ZOMBIE:
                    return True
        return False

    def kill(self, number: signal.Signals) -> None:
        """Send a signal to all that this job started."""
        assert self.process is not None
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
        done: set[str],
        environment: dict[str, str],
        command: Callable[[Job, str], list[str]] = launch,
    ):
        self.folder, self.jobs, self.slots, self.command = folder, jobs, list(slots), command
        self.environment = environment
        self.states = {
            job.name: State(
                job.name, list(job.overrides), system_name(plain(job.cfg)), job.cfg.seed, job.axes,
                log=f"logs/{job.name}.log",
            )
            for job in jobs
        }  # fmt: skip
        before = {state["job"]: state for state in self._recorded()}
        for name in done:
            self.states[name] = replace(
                self.states[name], status="done", seconds=before.get(name, {}).get("seconds", 0.0)
            )
        self.stopped: signal.Signals | None = None
        self._bar = log.bar("jobs", total=len(jobs), initial=len(done), unit="job")

    def run(self) -> None:
        """Run every job that is not done; returns when none runs and none waits.

        Raises:
            SystemExit: 128 + the signal after SIGINT or SIGTERM, with the jobs stopped so that they can go on.
        """
        waiting = [job for job in self.jobs if self.states[job.name].status != "done"]
        running: list[Running] = []
        free, shown = list(self.slots), time.monotonic()
        self._record()
        with self._signals():
            while waiting or running:
                while waiting and free:
                    running.append(self._start(waiting.pop(0), free.pop(0)))
                time.sleep(TICK)
                if self.stopped is not None:  # and jobs that ended by the same signal have not failed
                    break
                for one in [one for one in running if not self._goes_on(one)]:
                    running.remove(one)
                    free.append(one.gpus)
                    self._show(now=False)
                    self._bar.update()
                if time.monotonic() - shown > (1 if sys.stderr.isatty() else 60):
                    shown = time.monotonic()
                    self._show(now=True)
            if self.stopped is not None:
                self._stop(running, self.stopped)
        self._bar.close()

    def count(self, status: str) -> int:
        return sum(state.status == status for state in self.states.values())

    def _start(self, job: Job, gpus: tuple[str, ...]) -> Running:
        one = Running(job, self.states[job.name], gpus, iter(MODULES), time.monotonic())
        one.state.status, one.state.error = "running", None
        self._say("%s: begins%s", job.name, f" on GPU {','.join(gpus)}" if gpus else "")
        self._next_stage(one)
        return one

    def _next_stage(self, one: Running) -> bool:
        """Start what comes next for a job; False where nothing does."""
        stage = next(one.stages, None)
        one.state.stage = stage
        one.state.seconds = round(time.monotonic() - one.started, 1)
        if stage is None:
            one.state.status = "done"
        else:
            path = self.folder / one.state.log
            path.parent.mkdir(parents=True, exist_ok=True)
            command = self.command(one.job, MODULES[stage])
            environment = {**self.environment, **({"CUDA_VISIBLE_DEVICES": ",".join(one.gpus)} if one.gpus else {})}
            with path.open("ab") as file:  # earlier attempts stay above
                file.write(f"$ {shlex.join(command)}\n".encode())
                one.log_from = file.tell()
                file.flush()
                # A session of its own: Ctrl-C on the terminal reaches the sweep alone, which lets jobs save.
                one.process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment, start_new_session=True
                )
        self._record()
        return stage is not None

    def _goes_on(self, one: Running) -> bool:
        """Whether a job still runs; the next stage is started when one has ended well."""
        assert one.process is not None
        if (code := one.process.poll()) is None:
            return True
        if code == 0 and self._next_stage(one):
            return True
        if code == 0:
            self._say("%s: done in %s", one.job.name, duration(one.state.seconds))
        else:
            one.kill(signal.SIGTERM)  # a launcher that was killed leaves its processes on the slot's GPUs
            one.state.status, one.state.seconds = "failed", round(time.monotonic() - one.started, 1)
            one.state.error = why(self.folder / one.state.log, one.log_from, code)
            self._record()
            self._say("%s: failed in %s: %s", one.job.name, one.state.stage, one.state.error)
        return False

    def _stop(self, running: list[Running], number: signal.Signals) -> NoReturn:
        if running:
            self._say("%s: %d jobs are asked to save and stop; once more ends them at once", number.name, len(running))
        deadline = time.monotonic() + GRACE
        self.stopped = None
        left = list(running)
        while left := [one for one in left if one.lives()]:
            if self.stopped is not None or time.monotonic() > deadline:
                for one in left:
                    one.kill(signal.SIGKILL)
            for one in left:
                one.signal_stop()
            time.sleep(TICK)
        for one in running:
            one.kill(signal.SIGTERM)  # whatever a launcher started in the moment that it was told to stop
            one.state.status, one.state.seconds = "waiting", round(time.monotonic() - one.started, 1)
        self._record()
        self._bar.close()
        print(
            f"stopped by {number.name}: {self.count('done')} jobs done, {self.count('failed')} failed, {len(running)} "
            f"stopped, {self.count('waiting') - len(running)} not begun; run the same command to go on.",
            file=sys.stderr,
        )
        raise SystemExit(128 + number)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def note(number: int, frame: Any) -> None:
            self.stopped = signal.Signals(number)

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _recorded(self) -> list[dict[str, Any]]:
        path = self.folder / STATE
        return read_json(path)["jobs"] if path.is_file() else []

    def _record(self) -> None:
        """Write what stands; jobs that another sweep has, or had, in the same folder stay as they are."""
        with Store(self.folder.parents[1]).lock("sweep", self.folder.name):
            others = [state for state in self._recorded() if state["job"] not in self.states]
            mine = [asdict(state) for state in self.states.values()]
            write_json(self.folder / STATE, {"experiment": self.folder.name, "jobs": others + mine})

    def _show(self, *, now: bool) -> None:
        """Say beside the bar how many jobs fail and run; it is drawn `now`, or when it moves next."""
        told = [f"{self.count(status)} {status}" for status in ("failed", "running") if self.count(status)]
        self._bar.set_postfix_str(", ".join(told), refresh=now)

    def _say(self, message: str, *values: object) -> None:
        self._bar.clear()
        logger.info(message, *values)


def why(path: Path, begin: int, code: int) -> str:
    """What a job's log says of its failure: its last `error:` line, or the signal that ended it."""
    with path.open("rb") as file:
        file.seek(begin)
        text = file.read().decode(errors="replace")
    if told := re.findall(r"^error: (.+)$", text, re.MULTILINE):
        return told[-1].strip()
    if signals := re.findall(r"\bSIG[A-Z]+\b", text):
        return f"it was ended by {signals[-1]} (SIGKILL: mostly for want of memory); see its log."
    return f"it ended with exit code {code} and no error of its own; see its log."


def duration(seconds: float) -> str:
    """Seconds as 4:05 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def sweepable() -> list[str]:
    """The experiments that are sweeps."""
    found = sorted((config_dir() / "experiment").glob("*.yaml"))
    return [path.stem for path in found if "\n  sweeper:" in path.read_text(encoding="utf-8")]


def summary(states: Sequence[State]) -> None:
    """Show what stands of each job."""
    rows = [(s.job, s.status, duration(s.seconds) if s.seconds else "–", s.error or "–") for s in states]
    log.table("Jobs", ["job", "status", "time", "error"], rows)


def sweep(arguments: Sequence[str], *, dry: bool = False) -> None:
    """Run, or only list, the jobs of a command line."""
    environment = dict(os.environ)  # as it was before any library wrote into it
    log.setup()
    jobs = expand(arguments)
    folder = jobs[0].folder.parent
    if dry:
        for job in jobs:
            print(f"# {job.name}", *(shlex.join(launch(job, module)) for module in MODULES.values()), sep="\n")
        logger.info("%d jobs of %s; nothing is started", len(jobs), folder)
        return
    slots = slots_for(jobs[0].cfg, [] if jobs[0].cfg.cpu else visible_gpus())
    done = up_to_date(jobs)
    logger.info(
        "%d jobs, %d of them up to date, %d at a time; logs: %s", len(jobs), len(done), len(slots), folder / "logs"
    )
    running = Sweep(folder, jobs, slots, done=done, environment=environment)
    running.run()
    summary(list(running.states.values()))
    logger.info("tables, figures and what is missing: python -m elmd.report %s", folder)
    print(f"artifact: {folder}", flush=True)
    if failed := running.count("failed"):
        print(
            f"error: {failed} of {len(jobs)} jobs failed; mend what their logs say and run it again.", file=sys.stderr
        )
        sys.exit(1)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m elmd.sweep",
        description="Train and evaluate every job of a sweep, each in processes of its own under accelerate launch.",
        epilog=f"""\
examples:
  python -m elmd.sweep experiment=demo_table2 seed=0,1,2
  python -m elmd.sweep experiment=demo_table3 seed=0 launcher.slots=2    two jobs at a time on CPU
  python -m elmd.sweep experiment=table3_m3ed seed=0,1,2 launcher.gpus=2 data.path=…    a job takes two GPUs
  python -m elmd.sweep experiment=demo ablation=none,no_v erm.slots=2,4  any comma list
  then: python -m elmd.report runs/experiments/NAME

experiments that are sweeps: {" ".join(sweepable())}

launcher.slots=N   jobs at a time (0: as many as there are GPUs for, one without a GPU)
launcher.gpus=N    GPUs of a job (1)

On CPU a job has one thread; OMP_NUM_THREADS=N gives it more. Run the same command again to go on after a break or to
try failed jobs again: what is done is reused.""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dry-run", action="store_true", help="list the jobs and their commands, start nothing")
    parser.add_argument("override", nargs="*", help="as of python -m elmd.train; a comma list is swept over")
    given = parser.parse_intermixed_args()
    guard(lambda: sweep(given.override, dry=given.dry_run))


if __name__ == "__main__":
    main()
