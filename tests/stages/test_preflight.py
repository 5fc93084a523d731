"""What is wrong with a language model is told before the stages that take hours, and in one sentence."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from elmd.cli import compose
from elmd.convert.tokenizer import chatglm2_tokenizer, train_pieces
from elmd.errors import CheckpointError, ConfigError, ElmdError
from elmd.models.llm import load_llm
from elmd.stages.parts import check_parts

#: What a chain that has nothing of these yet will run.
LAST_STAGES = ("index", "rep", "eerg")


def test_a_language_model_is_looked_at_before_the_long_stages(llm_folder: Path, tmp_path: Path) -> None:
    """stage=all would come to it after the retriever's training and all clips."""

    def told(*choices: str, change: Callable[[Path], object] | None = None) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(llm_folder, folder)
        if change:
            change(folder)
        cfg = compose(["llm=auto", f"llm.path={folder}", *choices])
        with pytest.raises(ElmdError) as caught:
            check_parts(cfg, LAST_STAGES)
        return str(caught.value)

    check_parts(compose(["llm=auto", f"llm.path={llm_folder}"]), LAST_STAGES)
    check_parts(compose([]), LAST_STAGES)  # the stand-in is still to be made

    def other_tokenizer(folder: Path) -> None:
        chatglm2_tokenizer(train_pieces(["今天我们去公园玩，好不好？"] * 50, 275)).save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))

    def no_tokenizer(folder: Path) -> None:
        for path in folder.glob("*token*"):
            path.unlink()

    def published(folder: Path) -> None:
        (folder / "config.json").write_text('{"model_type": "chatglm"}')

    def without_template(folder: Path) -> None:
        (folder / "chat_template.jinja").unlink()

    assert "its tokenizer has ids up to" in told(change=other_tokenizer)
    assert "has no tokenizer that AutoTokenizer loads" in told(change=no_tokenizer)
    assert "is ChatGLM as published" in told(change=published)
    assert "has no chat template" in told(change=without_template)
    assert "cannot be used here" in told("llm.attention=flash_attention_2")
    assert "'int8' is no floating dtype" in told("llm.dtype=int8")
    assert "exceed 12 tokens" in told("prompt.max_prompt_tokens=12")
    assert "is no visual projector" in told(f"rep.projector_from={llm_folder}/model.safetensors")


def test_a_search_that_is_not_installed_is_told_before_there_is_anything_to_search(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    check_parts(compose(["retriever.search=auto"]), LAST_STAGES)
    with pytest.raises(ConfigError, match="FAISS is not installed"):
        check_parts(compose(["retriever.search=faiss"]), LAST_STAGES)
    check_parts(compose(["retriever.search=faiss"]), ["rep", "eerg"])


def test_a_truncated_shard_is_no_bug(llm_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(llm_folder, tmp_path / "llm")
    with (tmp_path / "llm" / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(CheckpointError, match=r"cannot be loaded as a language model .* in whole safetensors files"):
        load_llm(tmp_path / "llm")
