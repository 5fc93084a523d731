"""The sweep launcher: Hydra's expansion, slots and GPUs, failed jobs, stopping, resuming."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra
import psutil
import pytest
from hydra.core.hydra_config import HydraConfig

from conftest import ROOT
from elmd.cli import compose, config_dir, register
from elmd.config import LauncherConfig
from elmd.engine.files import write_json
from elmd.errors import ConfigError, ElmdError
from elmd.sweep.__main__ import main
from elmd.sweep.expand import Job, expand, sweepable
from elmd.sweep.run import Sweep, launch, slots_for
from elmd.sweep.state import up_to_date, why

GIVEN = ["data.path=x", "llm.path=x", "vision.path=x"]  # what no experiment can know


@pytest.mark.parametrize(
    "arguments",
    [
        ["experiment=demo_claims", "seed=5", "ablation=none,no_v", "runs_dir=other"],  # the command line wins
        ["experiment=demo_table3", "erm.slots=range(1,3)", "ablation=glob(no_*,exclude=no_e*)", "eerg=safe"],
        ["ablation=none,no_v", "generate.seeds=[0,1],[2]", "threads=1", "prompt.emotion_end=': '", "launcher.slots=3"],
    ],
)
def test_jobs_are_those_of_hydra(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs: dict[str, list[str]] = {}

    @hydra.main(version_base="1.3", config_path=str(config_dir()), config_name="train")
    def note(_: Any) -> None:
        job = HydraConfig.get()
        theirs[job.job.override_dirname.replace("'", "_").replace(" ", "_")] = sorted(job.overrides.task)

    register()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train", "-m", *arguments])
    try:
        note()
    finally:
        HydraConfig.instance().cfg = None  # or this process passes for a job of a sweep
    assert len(theirs) >= 2
    assert {job.name: sorted(job.overrides) for job in expand(arguments)} == theirs


def test_a_jobs_configuration_is_what_it_says() -> None:
    jobs = {job.name: job.cfg for job in expand(["experiment=demo_table3", "ablation=no_ssc,none", "seed=3,4"])}
    assert len(jobs) == 4
    cfg = jobs["ablation=no_ssc,seed=4"]
    assert (cfg.job, cfg.seed, cfg.erm.separation_weight) == ("ablation=no_ssc,seed=4", 4, 0)
    assert cfg.generate.seeds == [0, 1, 2, 3, 4]


def test_the_seed_varies_fastest() -> None:
    names = [job.name for job in expand(["seed=0,1", "ablation=none,no_erm"])]
    assert names == [
        "ablation=none,seed=0",
        "ablation=none,seed=1",
        "ablation=no_erm,seed=0",
        "ablation=no_erm,seed=1",
    ]


def test_long_names_are_those_of_the_folders() -> None:
    long = [f"erm.{key}=0.25" for key in ("lr", "warmup", "weight_decay", "max_grad_norm", "temperature")]
    jobs = expand([*long, "prompt.emotion_end='。'", "bootstrap.llm_lr=0.25", "bootstrap.vision_lr=0.25", "seed=0,1"])
    assert len({job.name for job in jobs}) == 2
    for job in jobs:
        assert "…" in job.name
        assert job.folder.name == job.name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["ablation=none,no_v,no_x"],
            r"^job ablation=no_x: ablation: there is no choice 'no_x'; choose from no_erm, no_ert",
        ),
        (["erm.slots=1,0", "seed=0"], r"^job erm.slots=0 seed=0: erm.slots: 0 is out of range; use 1 or more\.$"),
        (["erm.slot=1,2"], r"^job erm.slot=1: configuration: there is no key 'erm.slot'; did you mean erm.slots\.$"),
        (["experiment=table3_m3ed"], r"^job ablation=none experiment=table3_m3ed: data.path: data=m3ed has no source"),
        (["seed=0,1", "stage=erm"], r"^stage: a job of a sweep is trained and evaluated as a whole; leave it out"),
        (["seed=0,1", "predictions=a.jsonl"], r"^predictions: a job of a sweep is trained and evaluated as a whole"),
        (
            ["seed=0,1", "force=true"],
            r"^force: would take away what other jobs of the sweep are reading; run that stage again",
        ),
        (["seed=0,1", "job=mine"], r"^job: names a sweep's jobs and is set by the launcher; leave job= out\.$"),
        (["seed=0,0"], r"^seed=0: two jobs would have this name: seed=0 and seed=0; leave out what does not tell"),
        (["threads=1,2"], r"^job: two jobs would have this name: threads=1 and threads=2; leave out"),
        (
            ["experiment=demo_claims,demo_table3"],
            r"^experiment_name, runs_dir: the jobs belong to 2 folders, as runs/experiments/demo_claims and "
            r"runs/experiments/demo_table3; start a sweep for each\.$",
        ),
    ],
)
def test_a_bad_job_is_named(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        expand(arguments)


def test_every_experiment_that_is_a_sweep_expands() -> None:
    jobs_of = {name: expand([f"experiment={name}", "seed=0", *GIVEN]) for name in sweepable()}
    assert {name: len(jobs) for name, jobs in jobs_of.items()} == {
        "table2_m3ed": 4, "table2_mmed": 4, "table3_m3ed": 6, "fig6_m3ed": 5, "frames_m3ed": 3,
        "demo_table2": 4, "demo_table3": 6, "demo_fig6": 5, "demo_frames": 3, "demo_claims": 6,
        "cped_table2": 4, "cped_table3": 4,
    }  # fmt: skip
    for name, jobs in jobs_of.items():
        assert {job.folder.parent for job in jobs} == {Path("runs/experiments") / name}
        assert len({job.name for job in jobs}) == len(jobs)
        if not name.endswith(("m3ed", "mmed")):
            assert all(job.cfg.generate.seeds == [0, 1, 2, 3, 4] for job in jobs), "five decode seeds"
    for real, demo in (("fig6_m3ed", "demo_fig6"), ("frames_m3ed", "demo_frames"), ("table3_m3ed", "demo_table3")):
        assert [job.name for job in jobs_of[real]] == [job.name for job in jobs_of[demo]], "twins sweep over the same"
    assert [job.cfg.erm.slots for job in jobs_of["fig6_m3ed"]] == [1, 2, 4, 8, 16]
    assert [job.cfg.vision.frames for job in jobs_of["frames_m3ed"]] == [4, 8, 16]


@pytest.mark.parametrize(
    ("slots", "gpus", "there", "expected"),
    [
        (0, 1, "", [()]),
        (3, 1, "", [(), (), ()]),
        (0, 1, "0123", [("0",), ("1",), ("2",), ("3",)]),
        (2, 1, "0123", [("0",), ("1",)]),
        (0, 2, "01234", [("0", "1"), ("2", "3")]),
        (1, 4, "0123", [("0", "1", "2", "3")]),
    ],
)
def test_gpus_are_shared_out(slots: int, gpus: int, there: str, expected: list[tuple[str, ...]]) -> None:
    cfg = replace(compose(), launcher=LauncherConfig(slots, gpus))
    assert slots_for(cfg, list(there)) == expected


@pytest.mark.parametrize(("slots", "gpus", "there"), [(0, 2, ""), (0, 4, "012"), (5, 1, "0123"), (2, 2, "012")])
def test_more_gpus_than_there_are_is_refused(slots: int, gpus: int, there: str) -> None:
    cfg = replace(compose(), launcher=LauncherConfig(slots, gpus))
    with pytest.raises(ConfigError, match=rf"GPUs are asked for, and {len(there)} can be used; ask for fewer"):
        slots_for(cfg, list(there))


def test_what_a_job_sets_is_recorded() -> None:
    """Paths, slots and what only changes how fast it runs are not: they tell no results apart."""
    given = ["experiment=demo", "erm.slots=2", "eerg=lora", "++data.world.seed=4", "generate.seeds=[0,1]"]
    (job,) = expand([*given, "eerg.micro_tokens=99", "launcher.slots=2", "data.path=/x"])
    assert job.axes == {"erm.slots": 2, "eerg": "lora", "data.world.seed": 4, "generate.seeds": [0, 1]}


def test_the_launcher_takes_its_file_by_the_number_of_gpus() -> None:
    (job,) = expand(["experiment=demo", "launcher.gpus=2", "erm.slots=2"])
    command = launch(job, "elmd.train")
    assert command[:3] == [sys.executable, "-m", "accelerate.commands.launch"]
    assert command[3:7] == ["--config_file", str(ROOT / "configs/accelerate/ddp.yaml"), "--num_processes", "2"]
    assert command[7:] == ["-m", "elmd.train", *job.overrides, "job='erm.slots=2'"]
    (job,) = expand(["experiment=demo"])
    assert launch(job, "elmd.evaluate")[4:7] == [str(ROOT / "configs/accelerate/single.yaml"), "--num_processes", "1"]
    assert compose([*job.overrides, launch(job, "elmd.train")[-1]]) == job.cfg, "what the job reads is what was checked"


#: Stands for a job: notes when it began and ended and on which GPUs; `act` is what it does in between.
FAKE = """
import os, sys, time
name, module, act, notes = sys.argv[1:]
def note(what):
    with open(notes, "a") as file:
        file.write(f"{time.monotonic()} {what} {name} {module} {os.environ.get('CUDA_VISIBLE_DEVICES', '')}\\n")
note("begin")
code = 0
exec(act)
note("end")
sys.exit(code)
"""


class Fake:
    """Jobs that do as `act` says, and what they noted."""

    def __init__(
        self, folder: Path, names: str, act: Callable[[str, str], str] = lambda name, module: "time.sleep(0.05)"
    ):
        self.folder, self.notes = folder / "runs" / "experiments" / "fake", folder / "notes"
        cfg = replace(compose(["experiment=demo", f"runs_dir={folder}/runs"]), experiment_name="fake")
        self.jobs = [Job(name, (f"seed={name}",), replace(cfg, job=name)) for name in names]
        self.act = act

    def command(self, job: Job, module: str) -> list[str]:
        return [sys.executable, "-S", "-c", FAKE, job.name, module, self.act(job.name, module), str(self.notes)]

    def sweep(self, slots: Sequence[tuple[str, ...]] = ((), ()), done: Sequence[str] = ()) -> Sweep:
        return Sweep(self.folder, self.jobs, slots, done=set(done), environment=dict(os.environ), command=self.command)

    def noted(self) -> list[list[str]]:
        """Every line: when, what, job, module, GPUs."""
        return [line.split(" ") for line in self.notes.read_text().splitlines()] if self.notes.exists() else []

    def states(self) -> dict[str, dict[str, Any]]:
        record = json.loads((self.folder / "sweep.json").read_text(encoding="utf-8"))
        assert record["experiment"] == "fake"
        return {state["job"]: state for state in record["jobs"]}


def test_a_failed_job_does_not_stop_the_others(tmp_path: Path) -> None:
    def act(name: str, module: str) -> str:
        if (name, module) == ("b", "elmd.train"):
            return "print('error: early'); print('error: data.path: is gone; put it back.', file=sys.stderr); code = 1"
        return "code = 3" if (name, module) == ("c", "elmd.evaluate") else "print('fine')"

    fake = Fake(tmp_path, "abcd", act)
    running = fake.sweep()
    running.run()
    states = fake.states()
    assert {name: (s["status"], s["stage"], s["error"]) for name, s in states.items()} == {
        "a": ("done", None, None),
        "b": ("failed", "train", "data.path: is gone; put it back."),
        "c": ("failed", "evaluate", "it ended with exit code 3 and no error of its own; see its log."),
        "d": ("done", None, None),
    }
    keys = "job overrides system seed axes status stage error log seconds"
    assert set(states["a"]) == set(keys.split())
    assert states["a"]["overrides"] == ["seed=a"]
    assert (fake.folder / states["b"]["log"]).read_text().splitlines()[-1] == "error: data.path: is gone; put it back."
    began = [(job, module) for _, what, job, module, _ in fake.noted() if what == "begin"]
    assert sorted(began) == [
        (n, m) for n in "abcd" for m in ("elmd.evaluate", "elmd.train") if (n, m) != ("b", "elmd.evaluate")
    ]
    assert running.record.count("failed") == 2

    # Run again, corrected: only what is not done runs, and its log keeps the earlier attempt.
    fake.act = lambda name, module: "print('corrected')"
    fake.notes.unlink()
    fake.sweep(done="ad").run()
    assert {job for _, _, job, _, _ in fake.noted()} == {"b", "c"}
    assert {state["status"] for state in fake.states().values()} == {"done"}
    assert fake.states()["b"]["error"] is None
    assert fake.states()["a"]["seconds"] == states["a"]["seconds"], "what it took is not forgotten"
    text = (fake.folder / "logs" / "b.log").read_text()
    assert text.index("error: data.path") < text.index("corrected")


@pytest.mark.parametrize("slots", [[(), (), ()], [("0",), ("1",)], [("0", "1"), ("4", "5")], [()]])
def test_slots_are_respected_and_gpus_are_never_shared(slots: list[tuple[str, ...]], tmp_path: Path) -> None:
    # However slow the machine, the first jobs end only when every slot has one.
    wait = f"while open(notes).read().count(' begin ') < {len(slots)}: time.sleep(0.01)"
    fake = Fake(tmp_path, "abcdef", lambda name, module: wait)
    fake.sweep(slots).run()
    at_work: dict[str, str] = {}
    most, used = 0, set()
    for _, what, job, _, gpus in sorted(fake.noted(), key=lambda line: float(line[0])):
        if what == "end":
            del at_work[job]
            continue
        assert gpus == "" or gpus not in at_work.values(), "one job per GPU"
        at_work[job] = gpus
        used.add(gpus)
        most = max(most, len(at_work))
    assert most == len(slots), "as many as there are slots, at some time, and never more"
    assert used == {",".join(gpus) for gpus in slots}
    assert len(fake.noted()) == 6 * 2 * 2


#: A launcher as accelerate's: it dies of SIGTERM itself, and its child is what trains and saves.
TRAINS = """
import subprocess
child = "import signal, sys, time\\ndef save(*_): time.sleep(0.5); print('saved', flush=True); sys.exit(143)\\n"
child += "signal.signal(signal.SIGTERM, save)\\nprint('trains', flush=True)\\ntime.sleep(60)"
code = 1 if subprocess.run([sys.executable, "-c", child]).returncode == 143 else 2
"""
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('trains', flush=True); time.sleep(60)"


def stopped(fake: Fake, *signals: int, to_all: bool = False) -> int:
    """Run two slots and send the signals once both jobs train, a second apart; returns the exit code.

    Args:
        to_all: as Slurm does, also to the launchers and their children.
    """

    def send() -> None:
        logs = [fake.folder / "logs" / f"{job.name}.log" for job in fake.jobs[:2]]
        while not all(log.exists() and "trains" in log.read_text().splitlines() for log in logs):
            time.sleep(0.05)
        for number in signals:
            others = psutil.Process().children(recursive=True) if to_all else []
            os.kill(os.getpid(), number)
            for process in others:
                process.send_signal(number)
            time.sleep(1)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    with pytest.raises(SystemExit) as end:
        fake.sweep().run()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is before
    assert not psutil.Process().children(recursive=True), "nothing runs on"
    assert isinstance(end.value.code, int)
    return end.value.code


@pytest.mark.parametrize(
    ("number", "to_all", "code"),
    [(signal.SIGTERM, False, 143), (signal.SIGTERM, True, 143), (signal.SIGINT, False, 130)],
)
def test_a_stop_lets_jobs_save(
    number: int, to_all: bool, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = Fake(tmp_path, "abc", lambda name, module: TRAINS)
    assert stopped(fake, number, to_all=to_all) == code
    states = fake.states()
    assert [(s["status"], s["stage"], s["error"]) for s in states.values()] == [
        ("waiting", "train", None), ("waiting", "train", None), ("waiting", None, None)
    ]  # fmt: skip
    for name in "ab":
        assert (fake.folder / "logs" / f"{name}.log").read_text().splitlines()[-1] == "saved"
    assert not (fake.folder / "logs" / "c.log").exists()
    last = capsys.readouterr().err.splitlines()[-1]
    name = signal.Signals(number).name
    assert last == f"stopped by {name}: 0 jobs done, 0 failed, 2 stopped, 1 not begun; run the same command to resume."


def test_a_second_stop_ends_jobs_at_once(tmp_path: Path) -> None:
    fake = Fake(tmp_path, "ab", lambda name, module: STUBBORN)
    began = time.monotonic()
    assert stopped(fake, signal.SIGINT, signal.SIGINT) == 130
    assert time.monotonic() - began < 10


def test_two_sweeps_keep_one_record(tmp_path: Path) -> None:
    Fake(tmp_path, "ab").sweep().run()
    fake = Fake(tmp_path, "bc", lambda name, module: "code = 1")
    fake.sweep().run()
    assert {name: state["status"] for name, state in fake.states().items()} == {
        "a": "done",
        "b": "failed",
        "c": "failed",
    }
    assert not (tmp_path / "runs" / ".locks").exists(), "no lock is left"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("error: first.\nTraceback\nerror: x: last; do this.\nsubprocess.CalledProcessError: …\n", "x: last; do this."),
        ("CalledProcessError: Command … died with <Signals.SIGKILL: 9>.\n", "it was ended by SIGKILL (SIGKILL: mostly"),
        ("", "it ended with exit code 7 and no error of its own; see its log."),
    ],
)
def test_why_a_job_failed(text: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text(earlier := "error: of an earlier attempt.\n")
    with path.open("a") as file:
        file.write(text)
    assert why(path, len(earlier), 7).startswith(reason)


def test_what_is_scored_is_not_run_again(tmp_path: Path) -> None:
    from accelerate import Accelerator

    from elmd.stages import chain_of

    jobs = expand([f"runs_dir={tmp_path}", "experiment=demo", "seed=0,1,2,3"])
    alone = Accelerator(cpu=True)
    for job, scored in zip(jobs[:3], ("made", "other", None), strict=True):
        made = chain_of(job.cfg, alone).folder("generate")
        other = made.with_name("0" * 16)
        for folder in (made, other):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "predictions.jsonl").touch()
        if scored:
            folder = made if scored == "made" else other
            name = (folder / "predictions.jsonl").relative_to(tmp_path)
            write_json(job.folder / "scores.json", {"predictions": str(name)})
    assert up_to_date(jobs) == {"seed=0"}


def test_what_a_job_lacks_is_told_before_any_begins(tmp_path: Path) -> None:
    jobs = expand([f"data.path={tmp_path}/gone.jsonl", f"runs_dir={tmp_path}", "data=jsonl", "seed=0,1"])
    with pytest.raises(ElmdError, match=r"^job data=jsonl,seed=0: .*gone\.jsonl"):
        up_to_date(jobs)


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs `python -m elmd.sweep` in an empty folder; exit code, standard output, standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ELMD_DEBUG", raising=False)

    def run(*arguments: str) -> tuple[int, str, str]:
        code: Any = 0
        try:
            main(arguments)
        except SystemExit as end:
            code = end.code or 0
        return (code, *capsys.readouterr())

    return run


Command = Callable[..., tuple[int, str, str]]


def test_a_dry_run_lists_and_starts_nothing(command: Command, tmp_path: Path) -> None:
    code, out, err = command("experiment=demo_table3", "--dry-run", "ablation=none", "seed=0,1", "launcher.slots=2")
    assert code == 0, err
    lines = out.splitlines()
    assert len(lines) == 2 * 3
    assert lines[3] == "# ablation=none,seed=1"
    assert "-m elmd.train ablation=none experiment=demo_table3 seed=1 launcher.slots=2" in lines[4]
    assert "-m elmd.evaluate ablation=none" in lines[5]
    assert "2 jobs of runs/experiments/demo_table3; nothing is started" in err
    assert not any(tmp_path.iterdir())


def test_mistakes_are_one_sentence_and_start_nothing(command: Command, tmp_path: Path) -> None:
    code, _, err = command("experiment=demo", "ablation=none,no_x")
    assert code == 1
    assert err.startswith("error: job experiment=demo ablation=no_x: ablation: there is no choice 'no_x'")
    assert len(err.splitlines()) == 1
    assert not any(tmp_path.iterdir())


def test_help_has_examples_and_the_experiments(command: Command) -> None:
    code, out, _ = command("--help")
    assert code == 0
    for words in (
        "python -m elmd.sweep experiment=demo_table2 seed=0,1,2",
        "launcher.gpus=N",
        "table2_m3ed",
        "cped_table3",
    ):
        assert words in out
    assert len(sweepable()) == 12


@pytest.mark.slow
def test_a_real_sweep(command: Command, tmp_path: Path) -> None:
    """Two jobs under accelerate launch, one of which cannot run, and then the same again."""
    small = [
        "experiment=demo", "vision=none", "retriever=none", "threads=1", "data.world.train=60", "data.world.valid=15",
        "data.world.test=30", "bootstrap.dialogues=100", "bootstrap.llm_steps=10", "eerg.steps=4",
        "generate.max_new_tokens=8", "llm.max_prompt_tokens=200,12", "launcher.slots=2",
    ]  # fmt: skip
    code, out, err = command(*small)
    assert code == 1, err
    assert out == "artifact: runs/experiments/demo\n"
    last = "error: 1 of 2 jobs failed; correct what their logs say and run the same command again."
    assert last in err.splitlines()
    folder = tmp_path / "runs" / "experiments" / "demo"
    good, bad = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))["jobs"]
    assert (good["status"], good["stage"], good["error"]) == ("done", None, None)
    assert (bad["status"], bad["stage"]) == ("failed", "train")
    assert bad["error"].startswith("llm.max_prompt_tokens: the instruction and 0 video slots alone exceed 12 tokens")
    scores = json.loads((folder / good["job"] / "scores.json").read_text(encoding="utf-8"))
    assert scores["n"] == 30
    assert (folder / good["job"] / "artifacts.json").is_file()
    assert not (folder / bad["job"] / "scores.json").exists()
    code, _, err = command(*small[:-2], "llm.max_prompt_tokens=200", "launcher.slots=2")
    assert code == 0, err
    assert "1 jobs, 1 of them up to date" in err
