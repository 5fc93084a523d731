"""Two processes against one, started as users start them: `accelerate launch` with the files of configs/accelerate."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from conftest import ROOT
from elmd.cli import compose
from elmd.engine.store import BEST
from elmd.errors import CheckpointError
from elmd.models.sharding import anywhere, in_step, shard, sharding

SCRIPT = ROOT / "benchmarks" / "fit_script.py"
WAYS = ["ddp", "fsdp"]
LAST = "checkpoints/step-00000006/model.safetensors"


def launch(way: str, llm: Path, out: Path, *more: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Six steps of fit_script.py: `single` in one process, `ddp` and `fsdp` in two."""
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        f"{ROOT}/configs/accelerate/{way}.yaml",
    ]
    world = "1" if way == "single" else "2"
    return subprocess.run(
        [*command, "--num_processes", world, str(SCRIPT), str(llm), str(out), "6", world, *more],
        env={**os.environ, "NO_DROPOUT": "1", **environment}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


class Runs:
    """Finished runs by way, each made once."""

    def __init__(self, llm: Path, folder: Path, **environment: str):
        self.llm, self.folder, self.environment = llm, folder, environment

    def __call__(self, way: str) -> Path:
        out = self.folder / way
        if not out.exists():
            done = launch(way, self.llm, out, TELL="1", **self.environment)
            assert done.returncode == 0, done.stderr[-3000:]
        return out


@pytest.fixture(scope="module")
def runs(llm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(llm_folder, tmp_path_factory.mktemp("runs"))


def told(out: Path, rank: int = 0) -> dict[str, Any]:
    return json.loads((out / f"report-{rank}.json").read_text())


def losses(out: Path) -> list[float]:
    """Of each step, and of each evaluation."""
    entries = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [entry.get("loss", entry.get("valid/loss")) for entry in entries]


def assert_the_same(one: Path, two: Path) -> None:
    assert len(losses(one)) == 6 + 3
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    first, second = load_file(one / LAST), load_file(two / LAST)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert (tensor - second[name]).norm() / tensor.norm() < 1e-5, name
    assert told(two)["ids"] == told(one)["ids"], "every sample's response once, in order"


@pytest.mark.parametrize("way", [pytest.param(way, marks=pytest.mark.slow) if way == "fsdp" else way for way in WAYS])
def test_two_processes_equal_one(runs: Runs, way: str) -> None:
    assert_the_same(runs("single"), runs(way))
    lengths = [len(row) for row in told(runs(way))["ids"]]
    assert len(lengths) == 23, "which two do not divide"
    assert min(lengths) < 10 < max(lengths) == 20, "a process that is done early waits for the other"
    tokens = [told(runs(way), rank)["micro_batches"] for rank in (0, 1)]
    # The last global batch is one sample, so the second process has nothing of its own to do.
    assert [len(found) for found in tokens] == ([10, 8] if way == "ddp" else [10, 10])
    assert tokens[1].count(0) == (0 if way == "ddp" else 2), "an idle process runs along on shards"


@pytest.mark.parametrize("way", WAYS)
def test_only_what_trains_is_reduced(runs: Runs, way: str) -> None:
    for rank in (0, 1):
        found = told(runs(way), rank)
        sent = found["bytes"]
        assert sent["step:allreduce_"] == 6 * 4 * (found["trained"] + 3), "gradients, loss, tokens and the stop flag"
        operations = {name.split(":")[1] for name in sent}
        assert not {name for name in operations if "broadcast" in name or "reduce_scatter" in name}
        if way == "ddp":
            assert {name for name in sent if name.startswith("step")} == {"step:allreduce_"}
            assert not {name for name in sent if name.startswith("before")}, "nothing is sent at the start"
            assert sum(sent.values()) - sent["step:allreduce_"] < found["whole_bytes"] / 20


def test_shards_halve_the_frozen_weights(runs: Runs) -> None:
    parts = [told(runs("fsdp"), rank) for rank in (0, 1)]
    assert sum(part["local_bytes"] for part in parts) == parts[0]["whole_bytes"]
    assert max(part["local_bytes"] for part in parts) < 0.51 * parts[0]["whole_bytes"]
    assert told(runs("ddp"))["local_bytes"] == parts[0]["whole_bytes"]


@pytest.mark.slow
@pytest.mark.parametrize(("adapter", "checkpointing"), [("lora", ""), ("none", ""), ("prefix", "1"), ("lora", "1")])
def test_every_adapter_trains_on_shards(llm_folder: Path, tmp_path: Path, adapter: str, checkpointing: str) -> None:
    runs = Runs(llm_folder, tmp_path, ADAPTER=adapter, CHECKPOINTING=checkpointing)
    assert_the_same(runs("single"), runs("fsdp"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "rank", "at", "step"),
    [("ddp", 1, "step:6", 5), ("fsdp", 1, "step:6", 5), ("ddp", 1, "evaluation:2", 4), ("ddp", 0, "step:6", 3)],
)
def test_a_process_that_dies_ends_the_run_and_it_resumes_exactly(
    runs: Runs, llm_folder: Path, tmp_path: Path, way: str, rank: int, at: str, step: int
) -> None:
    done = launch(way, llm_folder, tmp_path, f"kill={at}", KILL_RANK=str(rank))
    assert done.returncode == 1
    at_step = 5 if at.startswith("evaluation") else 6
    newest = "the newest checkpoint" if rank == 0 else f"step {step}, which is saved"
    told_by_survivor = [line for line in done.stderr.splitlines() if "error: test" in line]
    assert len(told_by_survivor) == 1
    assert told_by_survivor[0].endswith(
        f"error: test: another process of this run died at step {at_step}; see its own message, "
        f"and run the same command to resume from {newest}."
    )
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [f"step-{step:08d}"]

    assert launch(way, llm_folder, tmp_path).returncode == 0
    for name in (LAST, LAST.replace("model", "optimizer"), BEST):
        assert (tmp_path / name).read_bytes() == (runs(way) / name).read_bytes(), name
    assert losses(tmp_path) == losses(runs(way))


def test_batches_in_step() -> None:
    shares = [[[0, 1], [2]], [[3, 4]], []]
    assert in_step(shares, 1, level=False) == [([3, 4], True)]
    assert in_step(shares, 0, level=True) == [([0, 1], True), ([2], True)]
    assert in_step(shares, 1, level=True) == [([3, 4], True), ([2], False)]
    assert in_step(shares, 2, level=True) == [([2], False), ([2], False)]
    assert in_step([[]], 0, level=True) == []


@pytest.mark.parametrize("flag", [True, False])
def test_a_model_in_one_piece_asks_nobody(flag: bool) -> None:
    assert anywhere(int(flag), cast(PreTrainedModel, nn.Linear(1, 1))) is flag


class Processes:
    def __init__(self, number: int):
        self.num_processes = number


@pytest.mark.parametrize(
    ("number", "asked", "expected"), [(2, "true", True), (1, "true", False), (2, "false", False), (2, None, False)]
)
def test_shards_are_what_the_launcher_asks_for(
    monkeypatch: pytest.MonkeyPatch, number: int, asked: str | None, expected: bool
) -> None:
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    if asked is not None:
        monkeypatch.setenv("ACCELERATE_USE_FSDP", asked)
    assert sharding(Processes(number)) is expected


def test_a_launcher_that_loads_on_one_process_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    with pytest.raises(CheckpointError, match=r"only the first process would load the weights.*set it to false"):
        shard(nn.Linear(1, 1), Processes(2))


def test_the_launcher_takes_the_files(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    found = {path.stem: load_config_from_file(str(path)) for path in (ROOT / "configs/accelerate").glob("*.yaml")}
    assert {name: config.distributed_type.value for name, config in found.items()} == {
        "single": "NO", "ddp": "MULTI_GPU", "fsdp": "FSDP",
    }  # fmt: skip
    assert found["ddp"].num_processes == found["fsdp"].num_processes == 4, "§4.3"
    settings = yaml.safe_load((ROOT / "configs/accelerate/fsdp.yaml").read_text(encoding="utf-8"))["fsdp_config"]
    assert settings["fsdp_cpu_ram_efficient_loading"] is False


STUB = """#!/usr/bin/env bash
case "$1 $2" in
  "-c import"*) echo "${FOUND:-4}" ;;
  "-m elmd.doctor") echo "doctor ${*:3}" && exit "${SICK:-0}" ;;
  *) echo "$*" ;;
esac
"""


@pytest.fixture
def paper(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """scripts/launch_paper.sh with an interpreter that tells what it is asked to run."""
    stub = tmp_path / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)
    folders = {name: tmp_path / name for name in ("M3ED", "M3ED_VIDEOS", "CHATGLM2", "VISUALGLM")}
    for folder in folders.values():
        folder.mkdir()

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        given = {**{name: str(folder) for name, folder in folders.items()}, "PYTHON": str(stub), **environment}
        return subprocess.run(
            [ROOT / "scripts/launch_paper.sh", *arguments], env={**os.environ, **given}, capture_output=True, text=True
        )

    return run


def test_the_paper_run_asks_the_doctor_then_trains_and_evaluates(paper: Callable[..., Any], tmp_path: Path) -> None:
    done = paper("seed=1")
    assert (done.returncode, done.stderr) == (0, "")
    doctor, train, evaluate = done.stdout.splitlines()
    settings = (
        f"experiment=table2_m3ed data.path={tmp_path}/M3ED data.video_root={tmp_path}/M3ED_VIDEOS "
        f"llm.path={tmp_path}/CHATGLM2 vision.path={tmp_path}/VISUALGLM seed=1"
    )
    launch = f"-m accelerate.commands.launch --config_file {ROOT}/configs/accelerate/ddp.yaml --num_processes 4"
    assert doctor == f"doctor {settings}"
    assert train == f"{launch} -m elmd.train {settings} stage=all"
    assert evaluate == f"{launch} -m elmd.evaluate {settings}"
    known = compose(settings.split())
    assert known.rep.batch_size == known.eerg.batch_size == 16, "§4.3, whatever the number of GPUs"


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"VISUALGLM": ""}, "error: VISUALGLM is not set; give it a folder as shown above."),
        ({"M3ED": "/nowhere"}, "error: M3ED: there is no folder /nowhere; correct the path."),
        ({"GPUS": "four"}, "error: GPUS: 'four' is no number of GPUs; set it to 1 or more."),
        ({"FOUND": "1"}, "error: GPUS: 4 are asked for and this machine has 1; set GPUS=1."),
        ({"FOUND": "0"}, "error: torch sees no GPU on this machine, and this takes one; run it where nvidia-smi lists"),
        ({"WAY": "zero"}, "error: WAY: there is no zero; choose ddp or fsdp."),
        ({"PYTHON": "/no/python"}, "error: /no/python cannot import torch; activate the environment"),
    ],
)
def test_the_paper_run_says_what_is_missing(
    paper: Callable[..., Any], environment: dict[str, str], message: str
) -> None:
    done = paper(**environment)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1].startswith(message)


def test_a_sick_paper_run_does_not_train(paper: Callable[..., Any]) -> None:
    done = paper(SICK="1")
    assert done.returncode == 1
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["doctor"]


@pytest.mark.slow
def test_a_sweep_runs_in_one_launch(tmp_path: Path) -> None:
    turns = [{"speaker": speaker, "text": "你好。", "emotion": "Happy"} for speaker in "ABAB"]
    lines = [{"id": f"d{i}", "utterances": turns} for i in range(30)]
    (tmp_path / "d.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"{ROOT}/configs/accelerate/ddp.yaml",
        "--num_processes", "2", "-m", "elmd.train", "-m", "data=jsonl", "data.path=d.jsonl", "stage=prepare",
        "data.split_seed=0,1", "cpu=true",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    manifests = [json.loads(path.read_text("utf-8")) for path in tmp_path.glob("runs/prepare/*/manifest.json")]
    assert {(m["config"]["data"]["split_seed"], m["world_size"]) for m in manifests} == {(0, 2), (1, 2)}
    assert done.stdout.count("artifact: ") == 2, "one process speaks"
