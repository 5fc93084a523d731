"""What a pack holds, what an export replaces and refuses, and the two commands."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from safetensors.torch import load_file

import elmd.pack.model
import elmd.reply
import elmd.stages.generate
from elmd.errors import ArtifactError, CheckpointError, ConfigError
from elmd.export import main
from elmd.pack import load_pack
from elmd.pack.trained import read_trained
from trained_runs import SECRET, Runs, job_with, pack_of, samples_of


# -------------------------------------------------------------------------------------------------- what is packed
def test_a_pack_holds_its_listed_files_and_nothing_of_this_machine(full_pack: Path, llm_folder: Path) -> None:
    facts = json.loads((full_pack / "elmd.json").read_text(encoding="utf-8"))
    files = {path.relative_to(full_pack).as_posix() for path in full_pack.rglob("*") if path.is_file()}
    assert files == {*facts["files"], "elmd.json", "README.md"}
    assert {"adapter/adapter_model.safetensors", "projector.safetensors", "prompt.json", "index/samples.jsonl",
            "index/index.safetensors", "retriever/modules.json", "retriever/model.safetensors"} <= files  # fmt: skip
    assert {Path(name).suffix for name in files} <= {".json", ".jsonl", ".safetensors", ".txt", ".md"}
    for name in files:
        content = (full_pack / name).read_bytes()
        assert str(llm_folder.parent).encode() not in content, name
        assert b"/media/" not in content, name
        assert SECRET.encode() not in content, name
        assert not content.startswith(b"\x80"), "a pickle"
    assert facts["config"]["llm"]["max_prompt_tokens"] == 400
    assert set(load_file(full_pack / "index/index.safetensors")) == {"E_s"}, "the key that is searched by"
    assert (facts["format"], facts["seed"], facts["llm"]["hub"]) == (2, 3, False)
    assert [path.name for path in full_pack.parent.iterdir()] == ["pack"], "no work in progress is left"


def test_without_the_index_no_text_travels_and_replies_have_no_demonstration(
    runs: Runs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, cfg = runs("full")
    pack = pack_of(folder, tmp_path / "pack", with_index=False)
    assert not (pack / "index").exists()
    assert (pack / "retriever").is_dir()
    text = samples_of(folder)[0].response.text.encode()
    assert not any(text in path.read_bytes() for path in pack.rglob("*") if path.is_file())
    assert "no demonstration" in (pack / "README.md").read_text(encoding="utf-8")
    assert load_pack(pack, llm=cfg.llm.path, cpu=True).reply(("甲", "你好")).demonstration is None


def test_an_earlier_export_is_replaced_and_nothing_else(runs: Runs, full_pack: Path, tmp_path: Path) -> None:
    job = runs("full")[0]
    (tmp_path / "other").mkdir()
    pack_of(job, tmp_path / "other")  # empty
    (tmp_path / "other/notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"also holds notes\.txt"):
        pack_of(job, tmp_path / "other")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="exists and is no earlier export"):
        pack_of(job, tmp_path / "thesis")
    assert (tmp_path / "thesis/chapter.txt").read_text() == "mine"
    pack_of(runs("w/o ERM")[0], full_pack)
    assert not (full_pack / "retriever").exists()


def test_a_new_export_keeps_the_license_and_language_of_the_earlier_one(
    runs: Runs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job, pack = runs("w/o ERM")[0], tmp_path / "pack"

    def card(**given: Any) -> tuple[str, str]:
        data = ModelCard.load(pack_of(job, pack, **given) / "README.md").data
        return data.license, data.language

    assert card(license="apache-2.0", language="yue") == ("apache-2.0", "yue")
    with caplog.at_level("INFO", "elmd"):
        assert card() == ("apache-2.0", "yue")
    assert "kept from the earlier export: license apache-2.0, language yue" in caplog.text
    assert card(license="mit") == ("mit", "yue")
    assert card(language="zh") == ("mit", "zh")


# --------------------------------------------------------------------------------------------------- what is refused
def test_what_cannot_be_packed_is_refused_in_a_sentence(runs: Runs, tmp_path: Path) -> None:
    source = runs("full")[0]
    with pytest.raises(ArtifactError, match=r"is a sweep of \d+ jobs; name one of them, such as .*job 0"):
        pack_of(source.parent, tmp_path / "pack")
    with pytest.raises(ArtifactError, match="is no folder of a run"):
        pack_of(tmp_path, tmp_path / "pack")
    for name in ("dialogpt", "livebot"):
        job = job_with(source, tmp_path / name, baseline={"name": name})
        with pytest.raises(ConfigError, match=f"{name} is a network of its own"):
            pack_of(job, tmp_path / "pack")
    with pytest.raises(ConfigError, match="permuted among samples"):
        pack_of(job_with(source, tmp_path / "shuffled", vision__shuffle=True), tmp_path / "pack")
    job = job_with(source, tmp_path / "unfinished", artifacts={"eerg": str(tmp_path / "gone")})
    with pytest.raises(ArtifactError, match="stage eerg of this run is not finished"):
        pack_of(job, tmp_path / "pack")
    shutil.copytree(read_trained(source).artifact("retriever"), tmp_path / "erm")
    (tmp_path / "erm/model/pytorch_model.bin").write_bytes(b"\x80")
    job = job_with(source, tmp_path / "pickled", artifacts={"erm": str(tmp_path / "erm")})
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: a pack holds no \.bin files"):
        pack_of(job, tmp_path / "pack")
    assert not (tmp_path / "pack").exists()


# ------------------------------------------------------------------------------------------------------- commands
def test_the_commands(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    job, cfg = runs("full")
    monkeypatch.delenv("ELMD_DEBUG", raising=False)

    def call(action: Callable[[], None], *arguments: Any) -> tuple[str, str]:
        monkeypatch.setattr("sys.argv", ["elmd", *map(str, arguments)])
        action()
        return capsys.readouterr()

    out, err = call(main, job, "--out", tmp_path / "pack", "--name", "Mine")
    assert out == f"artifact: {tmp_path / 'pack'}\n"
    assert "stay under the license of the data set" in " ".join(err.split())
    (tmp_path / "history.json").write_text('[["A", "在吗？"], ["B", "怎么了？"]]', encoding="utf-8")
    arguments = [tmp_path / "pack", "--llm", cfg.llm.path, "--history", tmp_path / "history.json", "--cpu"]
    out, _ = call(elmd.reply.main, *arguments, "--utterance", "我好开心！", "--seed", 4)
    reply = load_pack(tmp_path / "pack", llm=cfg.llm.path, cpu=True).reply(
        ("A", "我好开心！"), [("A", "在吗？"), ("B", "怎么了？")], seed=4
    )
    assert out == f"{reply.emotion or '–'}\t{' '.join(reply.text.split())}\n"
    (tmp_path / "history.json").write_text('["A", "在吗？"]', encoding="utf-8")
    with pytest.raises(SystemExit):
        call(elmd.reply.main, *arguments, "--utterance", "你好")
    assert "history.json: is no list of turns" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        call(elmd.reply.main, tmp_path / "pack", "--utterance", "你好", "--clip", tmp_path / "nothere.mp4")
    assert "nothere.mp4: there is no such clip; check the path." in capsys.readouterr().err
    with pytest.raises(SystemExit):
        call(main, tmp_path, "--out", tmp_path / "pack2")
    err = capsys.readouterr().err
    assert "is no folder of a run" in err
    assert "Traceback" not in err
