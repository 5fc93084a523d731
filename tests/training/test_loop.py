"""The loop: exact resume, guards, rates, checkpoints."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn

from benchmarks import forks
from elmd.engine.store import BEST
from elmd.errors import CheckpointError, TrainingError
from elmd.training import checkpoint
from elmd.training.loop import fit
from elmd.training.plan import Plan

#: Where a run is stopped, and its exit code.
STOPS = {"kill=step:2": -9, "kill=step:8": -9, "kill=checkpoint:1": -9, "kill=checkpoint:3": -9, "term=step:8": 143}

#: Environments of `benchmarks/fit_script.py`.
WAYS = {
    "prefix and projector": {},
    # REP's split, with an instruction long enough to be run once for all batches.
    "projector, prompts with an opening": {"ADAPTER": "none", "LONG": "12", "BUDGET": "1200"},
}


class Runs:
    """Runs of 12 steps that nothing disturbed, by way, each made once; processes are forked."""

    def __init__(self, llm: Path, folder: Path):
        forks.load()
        self.llm, self.folder = llm, folder

    def train(self, way: str, out: Path, *stop: str) -> int:
        code = forks.train(self.llm, out, 12, *stop, **WAYS[way])
        if code > 0 and code != 143:
            pytest.fail(out.with_suffix(".0.log").read_text()[-3000:])
        return code

    def whole(self, way: str) -> Path:
        out = self.folder / way
        if not out.exists():
            assert self.train(way, out) == 0
        return out


@pytest.fixture(scope="module")
def runs(llm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(llm_folder, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def whole(runs: Runs) -> Path:
    return runs.whole("prefix and projector")


@pytest.mark.parametrize(
    ("way", "stop"),
    [*(("prefix and projector", stop) for stop in STOPS), ("projector, prompts with an opening", "kill=step:8")],
)
def test_resume_is_exact(runs: Runs, tmp_path: Path, way: str, stop: str) -> None:
    out, whole = tmp_path / "run", runs.whole(way)
    assert runs.train(way, out, stop) == STOPS[stop]
    left = list((out / "checkpoints").glob("step-????????"))
    assert len(left) == (0 if stop in ("kill=step:2", "kill=checkpoint:1") else 1), "one whole checkpoint at most"
    assert runs.train(way, out) == 0
    assert (out / BEST).read_bytes() == (whole / BEST).read_bytes()
    for name in ("model", "optimizer"):
        last = f"checkpoints/step-00000012/{name}.safetensors"
        assert (out / last).read_bytes() == (whole / last).read_bytes()

    def lines(folder: Path) -> list[tuple]:
        entries = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        return [(e["step"], e.get("loss"), e.get("valid/loss")) for e in entries]

    assert lines(out) == lines(whole)


def test_the_loop_leaves_what_it_promises(whole: Path) -> None:
    assert {p.name for p in whole.iterdir()} == {
        BEST,
        "checkpoints",
        "curves.png",
        "events",
        "metrics.jsonl",
    }
    entries = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [e["step"] for e in entries if "loss" in e] == list(range(1, 13))
    assert [e["step"] for e in entries if "valid/loss" in e] == [0, 4, 8, 12]
    names = {name.split(".")[0] for name in load_file(whole / BEST)}
    assert names == {"adapter", "projector"}
    assert (whole / "curves.png").read_bytes().startswith(b"\x89PNG")


class Quadratic:
    """An objective whose loss can be made to fail."""

    def __init__(self, value: float = 1.0):
        self.modules = {"w": nn.Linear(2, 1)}
        self.value, self.seen = value, []

    def batches(self, epoch):
        return [[0, 1], [2]]

    def weight(self, batch):
        return len(batch)

    def losses(self, batch, rank, world):
        self.seen.append(list(batch))
        yield self.modules["w"](torch.ones(2)).pow(2).sum() * self.value, 1

    def evaluate(self):
        return {"score": -self.modules["w"].weight.abs().sum().item()}


def plan(**changes) -> Plan:
    base = {"rates": {"w": 0.1}, "steps": 5, "seed": 0, "select": "score", "higher_is_better": True,
            "evaluate_every": 2, "checkpoint_every": 2}  # fmt: skip
    return Plan(**{**base, **changes})


@pytest.mark.parametrize(("value", "shown"), [(math.nan, "nan"), (math.inf, "inf"), (0.0, "0.0")])
def test_a_loss_that_is_not_finite_or_zero_ends_the_run(tmp_path: Path, value: float, shown: str) -> None:
    with pytest.raises(TrainingError, match=f"the loss of step 1 is {shown}; lower the learning rate"):
        fit(Quadratic(value), plan(), tmp_path, Accelerator(cpu=True), "test")
    assert not (tmp_path / "checkpoints").exists()


#: What a collective says when the other process is gone: gloo's and NCCL's.
GONE = [
    RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:44417"),
    torch.distributed.DistBackendError("NCCL error in: NCCLUtils.cpp:60, remote process exited or there was a network"),
]


@pytest.mark.parametrize("error", GONE)
def test_a_peer_that_dies_in_an_evaluation_costs_no_step(tmp_path: Path, error: RuntimeError) -> None:
    torch.manual_seed(0)
    whole = fit(Quadratic(), plan(), tmp_path / "whole", Accelerator(cpu=True), "test")
    torch.manual_seed(0)
    objective, calls = Quadratic(), []

    def evaluate():
        calls.append(None)
        if len(calls) == 3:  # after the start and step 2: that of step 4
            raise error
        return Quadratic.evaluate(objective)

    objective.evaluate = evaluate
    with pytest.raises(
        TrainingError, match=r"another process of this run died at step 5; .* from step 4, which is saved"
    ):
        fit(objective, plan(), tmp_path / "cut", Accelerator(cpu=True), "test")
    resumed = fit(objective, plan(), tmp_path / "cut", Accelerator(cpu=True), "test")
    assert resumed.history == whole.history
    assert len(calls) == 3 + 2, "that of step 4 is made up for, then the last"


def test_another_error_is_not_taken_for_a_lost_peer(tmp_path: Path) -> None:
    objective = Quadratic()
    objective.evaluate = lambda: (_ for _ in ()).throw(RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        fit(objective, plan(), tmp_path, Accelerator(cpu=True), "test")


def test_steps_run_over_epochs_and_the_best_is_kept(tmp_path: Path) -> None:
    objective = Quadratic()
    progress = fit(objective, plan(), tmp_path, Accelerator(cpu=True), "test")
    assert objective.seen == [[0, 1], [2], [0, 1], [2], [0, 1]]
    assert [entry["step"] for entry in progress.history] == [0, 2, 4, 5]
    best = max(progress.history, key=lambda entry: entry["score"])
    assert (progress.best, progress.best_step) == (best["score"], best["step"])
    assert objective.evaluate()["score"] == pytest.approx(progress.best), "the best weights are left in the modules"


def test_rates_rise_then_fall() -> None:
    shape = [plan(steps=10, warmup=0.2).factor(step) for step in range(10)]
    assert shape[:3] == [0.5, 1.0, 1.0]
    assert shape[2:] == sorted(shape[2:], reverse=True)
    assert shape[-1] == pytest.approx(1 / 8)
    assert {plan(decay=False).factor(step) for step in range(5)} == {1.0}


def test_checkpoints_of_another_shape_are_refused(tmp_path: Path) -> None:
    checkpoint.save_tensors(tmp_path / "m.safetensors", checkpoint.tensors({"w": nn.Linear(2, 1)}))
    with pytest.raises(CheckpointError, match=r"w\.weight has shape \[1, 2\], the model's is \[1, 3\]"):
        checkpoint.load_tensors(tmp_path / "m.safetensors", {"w": nn.Linear(3, 1)})
    with pytest.raises(CheckpointError, match=r"holds other tensors than the model trains, first 'v\.bias'"):
        checkpoint.load_tensors(tmp_path / "m.safetensors", {"v": nn.Linear(2, 1)})
