"""The doctor: what is missing or does not go together, how to get it, and how much memory training takes."""

from __future__ import annotations

import json
import shutil
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import save

from elmd.cli import compose
from elmd.config import Config, Search
from elmd.doctor import __main__ as command
from elmd.doctor import memory
from elmd.doctor.memory import Estimate, estimates, public_config
from elmd.errors import ConfigError
from elmd.models.memory import StepMemory

WEIGHTS = save({"w": torch.zeros(512)})  # only its header is read


def config(*overrides: str, experiment: str = "table2_m3ed", **paths: str | None) -> Config:
    """A configuration whose checkpoints lie at `paths` (llm, vision, retriever); None: not given."""
    cfg = compose([f"experiment={experiment}", "data.path=x", "llm.path=x", "vision.path=x", *overrides])
    for group, path in paths.items():
        getattr(cfg, group).path = path
    return cfg


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(value) if isinstance(value, bytes) else path.write_text(json.dumps(value))


@pytest.fixture
def llm(llm_folder: Path, tmp_path: Path) -> Path:
    """A converted model without its weights: of them only the header of a whole file counts."""
    folder = tmp_path / "llm"
    shutil.copytree(llm_folder, folder)
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    return folder


def test_the_public_shape_stands_in_for_a_model_that_is_not_there() -> None:
    chatglm2, glm4 = public_config(config(llm=None)), public_config(config("llm=glm4_9b", llm="/nowhere"))
    assert chatglm2 is not None
    assert glm4 is not None
    assert (chatglm2.num_hidden_layers, chatglm2.vocab_size, glm4.num_hidden_layers) == (28, 65024, 40)
    assert public_config(config("llm=auto", llm=None)) is None
    assert public_config(config("llm=tiny", llm="bootstrap")) is None


def test_estimates_of_both_stages(llm: Path) -> None:
    from transformers import AutoConfig

    cfg, own = config(llm=str(llm)), AutoConfig.from_pretrained(llm)
    rep, rep_again, eerg, eerg_again = estimates(cfg, own)
    assert [step.stage for step in (rep, rep_again, eerg, eerg_again)] == ["REP", "REP", "EERG", "EERG"]
    assert (eerg.rows, eerg.length) == (3, 1152)
    assert rep.memory.trainables == 16 * 769 * 32
    assert eerg.memory.trainables == 16 * (769 * 32 + 128 * 2 * 2 * 2 * 8)
    assert rep_again.memory.activations < rep.memory.activations < eerg.memory.activations
    assert eerg_again.memory.step < eerg.memory.step
    weights = sum(p.numel() for p in _model(own).parameters()) * 2
    assert eerg.memory.weights == weights
    spread = list(estimates(cfg, own, share=4))
    assert spread[2].memory.weights == weights // 4 + 2 * weights // 2
    text_only = list(estimates(config("ablation=no_v", "eerg.adapter=lora", llm=str(llm)), own))
    assert [step.stage for step in text_only] == ["EERG", "EERG"]
    assert text_only[0].memory.trainables == 16 * sum(
        8 * (m.in_features + m.out_features)
        for name, m in _model(own).named_modules()
        if isinstance(m, torch.nn.Linear) and name != "lm_head"
    )


def _model(config: Any) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def test_rows_that_fit() -> None:
    gib = 2**30
    estimate = Estimate("EERG", False, 2, 100, 16, StepMemory(10 * gib, gib, 3 * gib, gib, 0))
    assert estimate.fits(12.6) == 0
    assert estimate.fits(20.6) == 3  # 0.9 × 20 - 11 = 7 GiB for rows of 2
    assert estimate.fits(100.6) == 39


def run(cfg: Config, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    try:
        command.doctor(cfg, Accelerator(cpu=True))
        code = 0
    except SystemExit as left:
        code = int(left.code or 0)
    return code, " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_nothing_given(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    public = memory.public_config

    def shallow(cfg: Config) -> Any:
        """The public shape with one of its 28 layers, each of which takes the estimate half a second."""
        shape: Any = public(cfg)
        shape.num_hidden_layers = 1
        return shape

    monkeypatch.setattr(memory, "public_config", shallow)
    cfg = config(llm=None, vision=None)
    cfg.data.path = None
    code, output = run(cfg, capsys)
    assert code == 1
    assert "5 things missing" in output  # data, videos, llm, vision, and the retriever, as tests run without the hub
    for word in (
        "RUCM3ED",
        "convert_chatglm2.py",
        "convert_visualglm.py",
        "moka-ai/m3e-base",
        "EERG, checkpointing",
        "141 GB",
        "llm=chatglm2_6b (assumed: the public model's shape)",
    ):
        assert word in output, word


@pytest.fixture
def complete(llm: Path, tmp_path: Path) -> Config:
    """Table 2 with everything in place, as far as the doctor looks."""
    write(tmp_path / "m3ed/annotation.json", {})
    write(tmp_path / "videos/show/1.mp4", b"")
    write(tmp_path / "vision/config.json", {"vision_config": {}, "qformer_config": {}})
    write(tmp_path / "vision/model.safetensors", WEIGHTS)
    write(tmp_path / "m3e/modules.json", [])
    write(tmp_path / "m3e/model.safetensors", WEIGHTS)
    paths = {"llm": str(llm), "vision": str(tmp_path / "vision"), "retriever": str(tmp_path / "m3e")}
    cfg = config(f"runs_dir={tmp_path / 'runs'}", f"data.video_root={tmp_path / 'videos'}", **paths)
    cfg.data.path = str(tmp_path / "m3ed")
    return cfg


def test_everything_there(
    complete: Config, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, output = run(complete, capsys)
    assert code == 0, output
    assert "Nothing is missing." in output
    assert "stage eerg not made yet stage=all makes it" in output
    assert "stage generate not made yet python -m elmd.evaluate makes it" in output
    assert "assumed" not in output
    assert "✗" not in output
    monkeypatch.setattr(command, "PATIENCE", 0)  # as if the weights were large
    code, output = run(complete, capsys)
    assert code == 0
    assert "stages not looked at" in output
    assert "checksums" in output


def test_one_thing_gone(complete: Config, capsys: pytest.CaptureFixture[str]) -> None:
    Path(str(complete.data.path), "annotation.json").unlink()
    code, output = run(complete, capsys)
    assert code == 1
    assert "1 thing missing" in output
    assert "✗ data" in output  # the path may be folded, so its words are shown in tests/checks


def test_a_model_whose_memory_cannot_be_predicted_is_no_reason_to_stop(
    complete: Config, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from elmd.errors import CheckpointError

    def refuse(*_: Any, **__: Any) -> None:
        raise CheckpointError("cannot be predicted")

    monkeypatch.setattr(memory, "step_memory", refuse)
    code, output = run(complete, capsys)
    assert code == 0
    assert "cannot be predicted." in output


@pytest.mark.parametrize(("key", "value"), [("attention", "fast"), ("dtype", "int8")])
def test_what_stops_a_model_from_loading_is_shown(
    complete: Config, capsys: pytest.CaptureFixture[str], key: str, value: str
) -> None:
    setattr(complete.llm, key, value)
    code, output = run(complete, capsys)
    assert code == 1
    assert f"✗ llm.{key}" in output
    assert ("EERG, checkpointing" in output) is (key != "dtype"), "the estimate needs no attention that runs here"


def test_faiss_is_missing_only_where_it_is_asked_for(
    complete: Config, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from elmd.engine import provenance

    monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.setattr(provenance, "version", lambda name: absent(name) if name == "faiss-cpu" else "1.0")
    code, output = run(complete, capsys)
    assert code == 0, output
    assert "✓ faiss-cpu not installed" in output
    complete.retriever.search = Search.faiss
    code, output = run(complete, capsys)
    assert code == 1
    assert "✗ faiss" in output
    assert "pip install 'elmd[faiss]'" in output


def absent(name: str) -> str:
    raise PackageNotFoundError(name)


def test_numbers_out_of_range_are_told_at_once(complete: Config) -> None:
    complete.eerg.batch_size = 0
    with pytest.raises(ConfigError, match=r"^eerg\.batch_size: 0 is out of range; use 1 or more\.$"):
        command.doctor(complete, Accelerator(cpu=True))


def test_a_full_disk_is_told(
    complete: Config, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**29))
    (disk,) = (line for line in command.machine(complete, Accelerator(cpu=True)) if line.name == "runs_dir")
    assert not disk.missing
    assert "0.5 GiB free" in disk.seen
    assert "less than 1 GiB" in disk.fix
