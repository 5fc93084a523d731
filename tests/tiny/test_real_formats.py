"""The chain with checkpoints as users have them: converted ChatGLM2 and VisualGLM, a Qwen, a Llama with LoRA."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

import chatglm2_reference
import visualglm_reference
from conftest import ROOT
from elmd.tiny.world import pretraining
from llms import write_llm

pytestmark = pytest.mark.slow

#: A small world, and lengths for random weights; every group but the language model's and the vision tower's is tiny.
SMALL = [
    "stage=all", "threads=1", "data.world.train=40", "data.world.valid=8", "data.world.test=8",
    "bootstrap.dialogues=300", "bootstrap.retriever_steps=5", "bootstrap.vision_steps=5", "erm.epochs=1",
    "llm.max_prompt_tokens=260", "llm.max_target_tokens=24", "rep.epochs=1", "eerg.steps=3",
    "eerg.prefix_length=4", "generate.max_new_tokens=6",
]  # fmt: skip


def python(folder: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "ELMD_DEBUG"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("formats")


def train(work: Path, *choices: str) -> dict[str, Path]:
    """Stage -> artifact of a whole chain."""
    done = python(work, "-m", "elmd.train", *SMALL, *choices)
    paths = [Path(line.split(": ", 1)[1]) for line in done.stdout.splitlines() if line.startswith("artifact: ")]
    return {path.parent.name: path for path in paths}


def test_converted_chatglm2_and_visualglm(work: Path) -> None:
    chatglm2_reference.random_checkpoint(work / "chatglm2", layers=3, shards=2, format="bin", prefix=6)
    visualglm_reference.random_checkpoint(work / "visualglm", visualglm_reference.Sizes(llm_hidden=64), shards=2)
    python(work, ROOT / "scripts/convert_chatglm2.py", "chatglm2", "llm")
    python(work, ROOT / "scripts/convert_visualglm.py", "visualglm", "vision")
    groups = ["llm=chatglm2_6b", "llm.path=llm", "vision=visualglm", "vision.path=vision", "vision.frames=2"]
    groups.append("rep.projector_from=vision/glm_proj.safetensors")
    made = train(work, *groups)
    manifest = json.loads((work / made["eerg"] / "manifest.json").read_text("utf-8"))
    assert manifest["metrics"]["trained"] == {"adapter": 4 * 3 * 2 * 2 * 16, "projector": 24 * 64 + 64}
    assert not (work / "runs/bootstrap/llm").exists(), "no stand-in was made"
    assert not (work / "runs/bootstrap/vision").exists()
    # A prefix that the original's p-tuning trained: beside the model it changes nothing; EERG goes on from it.
    python(work, ROOT / "scripts/convert_chatglm2.py", "llm", "--ptuning", "chatglm2/ptuning")
    again = train(work, *groups, "eerg.adapter_from=llm/adapter", "eerg.steps=0")
    assert again["rep"] == made["rep"]
    assert again["eerg"] != made["eerg"]
    saved, converted = (
        load_file(work / one / "adapter_model.safetensors") for one in (again["eerg"] / "adapter", "llm/adapter")
    )
    assert saved["prompt_embeddings"].shape == (6, 3 * 2 * 2 * 16)
    assert saved["prompt_embeddings"].equal(converted["prompt_embeddings"])
    python(work, "-m", "elmd.evaluate", *[one for one in SMALL if one != "stage=all"], *groups)
    scores = json.loads((work / "runs/experiments/tiny/scores.json").read_text("utf-8"))
    assert scores["n"] == 8


@pytest.mark.parametrize(("family", "eerg"), [("qwen3", "paper"), ("llama", "lora")])
def test_other_language_models(work: Path, family: str, eerg: str) -> None:
    texts = [turn.text for dialogue in pretraining(0, 60) for turn in dialogue.utterances]
    write_llm(work / family, family, texts, vocab_size=1500)
    made = train(work, "llm=auto", f"llm.path={family}", f"eerg={eerg}")
    adapter = json.loads((work / made["eerg"] / "adapter/adapter_config.json").read_text("utf-8"))
    assert adapter["peft_type"] == {"paper": "PREFIX_TUNING", "lora": "LORA"}[eerg]
    assert json.loads((work / made["rep"] / "rep.json").read_text("utf-8"))["test/projector"]["n"] == 8
