"""The whole method as users type it, on a tenth of the demo's world: every stage, every artifact, reuse, resume."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from conftest import ROOT

pytestmark = pytest.mark.slow

#: A tenth of the demo's world, and trainings just long enough to leave every artifact.
SMALL = [
    "experiment=demo", "threads=1",
    "data.world.train=120", "data.world.valid=30", "data.world.test=60", "bootstrap.dialogues=300",
    "bootstrap.llm_steps=40", "bootstrap.retriever_steps=30", "bootstrap.vision_steps=30",
    "erm.epochs=2", "erm.checkpoint_every=3", "rep.epochs=2", "rep.checkpoint_every=3",
    "eerg.steps=12", "eerg.evaluate_every=6", "eerg.checkpoint_every=3", "generate.max_new_tokens=16",
]  # fmt: skip


def run(
    runs: Path, *overrides: str, module: str = "elmd.train", code: int = 0, kill_at: str = ""
) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "ELMD_DEBUG"} | {"KILL_AT": kill_at}
    command = ["-m", module] if module.startswith("elmd") else [module]
    done = subprocess.run(
        [sys.executable, *command, *SMALL, f"runs_dir={runs}", *overrides],
        cwd=runs.parent, env=environment, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == code, done.stderr[-4000:]
    return done


def artifacts(done: subprocess.CompletedProcess[str]) -> dict[str, Path]:
    """Stage -> folder, from the lines that scripts chain by."""
    paths = [
        Path(line.removeprefix("artifact: ")) for line in done.stdout.splitlines() if line.startswith("artifact: ")
    ]
    return {path.parent.relative_to(_runs(path)).as_posix(): path for path in paths}


def _runs(path: Path) -> Path:
    return next(parent for parent in path.parents if parent.name == "runs")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chain") / "runs"


@pytest.fixture(scope="module")
def chain(runs: Path) -> dict[str, Path]:
    return artifacts(run(runs, "stage=all"))


def test_every_stage_leaves_its_artifact(chain: dict[str, Path]) -> None:
    expected = {
        "bootstrap/world": ["dialogues.jsonl", "world.json"],
        "bootstrap/llm": ["config.json", "model.safetensors", "tokenizer.json"],
        "bootstrap/vision": ["config.json", "model.safetensors"],
        "bootstrap/retriever": ["modules.json", "model.safetensors"],
        "prepare": ["samples.jsonl", "audit.json"],
        "erm": ["model/modules.json", "metrics.jsonl", "curves.png"],
        "index": ["index.safetensors", "ids.json", "demonstrations.jsonl"],
        "features": ["index.json"],
        "rep": ["projector.safetensors", "prompt.json", "rep.json", "confusion.png", "curves.png", "metrics.jsonl"],
        "eerg": ["projector.safetensors", "adapter/adapter_model.safetensors", "prompt.json", "curves.png"],
    }
    assert chain.keys() == expected.keys()
    for stage, files in expected.items():
        for name in [*files, "manifest.json"]:
            assert (chain[stage] / name).is_file(), f"{stage}: {name}"
        manifest = json.loads((chain[stage] / "manifest.json").read_text(encoding="utf-8"))
        assert manifest["stage"] == stage
        assert manifest["fingerprint"] == chain[stage].name
        for other, fingerprint in manifest["upstream"].items():
            assert chain[other].name == fingerprint
    pickles = [p for p in _runs(chain["eerg"]).rglob("*") if p.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")]
    assert pickles == []
    frozen = (chain["bootstrap/llm"] / "model.safetensors").stat().st_size
    trained = sum(p.stat().st_size for p in chain["eerg"].rglob("*.safetensors"))
    assert trained < frozen / 10, "a checkpoint holds only what trains"


def test_no_demonstration_comes_from_the_own_dialogue(chain: dict[str, Path]) -> None:
    samples = [json.loads(line) for line in (chain["prepare"] / "samples.jsonl").read_text("utf-8").splitlines()]
    dialogue = {s["id"]: s["dialogue"] for s in samples}
    train = {s["id"] for s in samples if s["split"] == "train"}
    demos = [json.loads(line) for line in (chain["index"] / "demonstrations.jsonl").read_text("utf-8").splitlines()]
    assert {d["sample"] for d in demos} == dialogue.keys(), "every sample of every split has one"
    for d in demos:
        assert d["source"] in train
        assert dialogue[d["source"]] != dialogue[d["sample"]]


def test_generates_and_scores(runs: Path, chain: dict[str, Path]) -> None:
    done = run(runs, module="elmd.evaluate")
    folder = runs / "experiments" / "demo"
    scores = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    assert set(scores["protocols"]) == {"paper", "strict", "chatglm"}
    assert scores["floors"].keys() == {"random response", "most common reply", "retrieval only"}
    assert set(scores["stages"]) == {"erm", "index", "rep"}
    assert 0 <= scores["stages"]["rep"]["test"]["accuracy"] <= 1
    assert scores["n"] == 60
    for ending in ("md", "csv", "tex"):
        assert (folder / f"scores.{ending}").is_file()
    predictions = (artifacts(done)["generate"] / "predictions.jsonl").read_text("utf-8").splitlines()
    line = json.loads(predictions[0])
    assert {"id", "hypothesis", "reference", "demonstration", "gold_emotion", "prompt", "seed"} <= line.keys()
    assert list(line["prompt"]) == ["instruction", "background", "history", "utterance", "video", "demonstration"]
    assert "ELMD" in done.stderr, "the table is shown"
    script = ROOT / "scripts" / "evaluate_runs.py"
    subprocess.run([sys.executable, script, folder, "--out", runs.parent / "tables"], check=True, capture_output=True)
    table = (runs.parent / "tables" / "scores.md").read_text("utf-8")
    assert f"{scores['systems']['ELMD']['paper']['rouge1_char']:.2f}" in table, "an experiment's folder is scored alike"


def test_the_second_run_reuses_everything(runs: Path, chain: dict[str, Path]) -> None:
    manifests = {stage: (folder / "manifest.json").stat().st_mtime_ns for stage, folder in chain.items()}
    done = run(runs, "stage=all", "rep.micro_tokens=999", "vision.workers=1")  # neither changes a result
    assert artifacts(done) == chain
    assert done.stderr.count("up to date, reused") == len(chain)
    assert {stage: (folder / "manifest.json").stat().st_mtime_ns for stage, folder in chain.items()} == manifests


def test_ablations_share_what_they_do_not_change(runs: Path, chain: dict[str, Path]) -> None:
    done = run(runs, "-m", "stage=all", "ablation=no_erm,no_v,no_rep")
    made = [line.removeprefix("artifact: ") for line in done.stdout.splitlines() if line.startswith("artifact: ")]
    by_stage: dict[str, set[str]] = {}
    for path in map(Path, made):
        by_stage.setdefault(path.parent.relative_to(_runs(path)).as_posix(), set()).add(path.name)
    for stage in ("bootstrap/world", "bootstrap/llm", "bootstrap/vision", "prepare", "erm", "index", "features"):
        assert by_stage[stage] == {chain[stage].name}, stage
    assert len(by_stage["eerg"]) == 3
    assert chain["eerg"].name not in by_stage["eerg"]
    assert len(by_stage["rep"]) == 1, "no_v and no_rep train no REP; no_erm has a prompt of its own"
    jobs = [path for path in (runs / "experiments" / "demo").glob("*/artifacts.json") if "ablation" in path.parent.name]
    told = [json.loads(path.read_text(encoding="utf-8"))["config"]["ablation_name"] for path in jobs]
    assert sorted(told) == ["no_erm", "no_rep", "no_v"], "each job has a folder of its own"


@pytest.mark.parametrize(("stage", "weights"), [("erm", "model/model"), ("eerg", "projector")])
def test_a_stage_killed_in_a_step_and_at_its_very_end_resumes_exactly(
    runs: Path, chain: dict[str, Path], stage: str, weights: str, tmp_path: Path
) -> None:
    """All points where the loop may be killed: `tests/training/test_loop.py`."""
    again, script = tmp_path / "runs", str(ROOT / "tests" / "killed_train.py")
    shutil.copytree(runs, again, ignore=shutil.ignore_patterns(stage, "experiments"))
    run(again, f"stage={stage}", module=script, code=-9, kill_at="step:5")
    partial = next((again / stage).glob("*.partial"))
    assert len(list((partial / "checkpoints").glob("step-????????"))) == 1
    killed = run(again, f"stage={stage}", module=script, code=-9, kill_at="finish:1")
    assert "resuming from the checkpoint of step 3" in " ".join(killed.stderr.split())
    result = artifacts(run(again, f"stage={stage}"))[stage]
    assert result.name == chain[stage].name
    first, second = (load_file(folder / f"{weights}.safetensors") for folder in (chain[stage], result))
    assert all((first[name] == second[name]).all() for name in first)
    assert not any((result / name).exists() for name in ("checkpoints", "best.safetensors"))


def test_a_missing_upstream_names_the_command(tmp_path: Path) -> None:
    done = run(tmp_path / "runs", "stage=eerg", code=1)
    assert "which has not been made for this configuration" in done.stderr
    assert "run python -m elmd.train with the same choices and stage=prepare first" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


def test_force_sets_the_old_result_aside(runs: Path, chain: dict[str, Path]) -> None:
    done = run(runs, "stage=index", "force=true")
    assert artifacts(done)["index"] == chain["index"]
    assert (chain["index"].with_name(f"{chain['index'].name}.old-1") / "manifest.json").is_file()
    old = chain["index"].with_name(f"{chain['index'].name}.old-1") / "demonstrations.jsonl"
    assert old.read_bytes() == (chain["index"] / "demonstrations.jsonl").read_bytes()


def test_two_processes_make_the_same(runs: Path, chain: dict[str, Path], tmp_path: Path) -> None:
    again = tmp_path / "runs"
    shutil.copytree(runs, again, ignore=shutil.ignore_patterns("rep", "eerg", "generate", "experiments"))
    launch = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1", "--master-port=29512"]
    found: dict[str, Path] = {}
    for module, overrides in (("elmd.train", ["stage=all", "cpu=true"]), ("elmd.evaluate", ["cpu=true"])):
        done = subprocess.run(
            [sys.executable, *launch, "-m", module, *SMALL, f"runs_dir={again}", *overrides],
            cwd=tmp_path, capture_output=True, text=True, timeout=500,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
        found |= artifacts(done)
    for stage in ("rep", "eerg"):
        manifest = json.loads((found[stage] / "manifest.json").read_text(encoding="utf-8"))
        assert manifest["world_size"] == 2
        assert found[stage].name == chain[stage].name, "the number of processes is no part of a result"
    one, two = (load_file(folder["rep"] / "projector.safetensors") for folder in (chain, found))
    assert all((one[name] - two[name]).norm() / one[name].norm() < 1e-4 for name in one)
    lines = (found["generate"] / "predictions.jsonl").read_text("utf-8").splitlines()
    ids = [json.loads(line)["id"] for line in lines]
    assert len(ids) == len(set(ids)) == 60, "every sample exactly once"
