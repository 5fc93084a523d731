"""Checkpoints read shard by shard: what is damaged is refused, and a result is written whole or not at all."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from chatglm2_reference import random_checkpoint, write_shards
from elmd.convert import shards
from elmd.convert.chatglm2 import convert_chatglm2
from elmd.errors import CheckpointError


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    random_checkpoint(tmp_path / "src", layers=2, shards=2, format="bin", prefix=5)
    return tmp_path / "src"


def test_a_large_file_is_cut(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    convert_chatglm2(checkpoint, whole)
    monkeypatch.setattr(shards, "LARGEST", 100_000)
    assert convert_chatglm2(checkpoint, cut).written.files > 2
    assert all(file.stat().st_size < 110_000 + 1000 for file in cut.glob("*.safetensors"))
    expected, actual = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (whole, cut))
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


def test_shards_without_an_index(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "pytorch_model.bin.index.json").unlink()
    assert convert_chatglm2(checkpoint, tmp_path / "dst").written.files == 2


def test_one_file_of_swissarmytransformer(tmp_path: Path) -> None:
    """`.pt` with the tensors under "module", some of them not wanted."""
    path, weights = tmp_path / "mp_rank_00_model_states.pt", {"a.x": torch.ones(2, 3), "b.x": torch.zeros(1).half()}
    torch.save({"module": weights, "iteration": 3}, path)
    source = shards.Source(path)
    assert (source.files, source.shapes) == ([path], {"a.x": (2, 3), "b.x": (1,)})
    assert source.dtypes == {"a.x": torch.float32, "b.x": torch.float16}
    ((file, tensors),) = source.shards()
    assert file == path
    assert torch.equal(tensors["a.x"], weights["a.x"])
    written = shards.convert(
        source, lambda name, tensor: {name.upper(): tensor.T}, {"A.X": (3, 2)}, tmp_path / "dst", lambda _: None,
        what="x", keep=lambda name: name.startswith("a"),
    )  # fmt: skip
    assert written == shards.Written(tensors=1, parameters=6, files=1, bytes=24)
    assert torch.equal(load_file(tmp_path / "dst/model.safetensors")["A.X"], weights["a.x"].T)


# --- damaged and taken ---

FIRST, SECOND = "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"
INDEX = "pytorch_model.bin.index.json"


def _index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    content = json.loads((folder / INDEX).read_text())
    change(content["weight_map"])
    (folder / INDEX).write_text(json.dumps(content))


def _weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """One file in place of the shards, with `change` made to the weights."""
    weights = torch.load(folder / FIRST, weights_only=True) | torch.load(folder / SECOND, weights_only=True)
    for path in (FIRST, SECOND, INDEX):
        (folder / path).unlink()
    change(weights)
    write_shards(folder, weights, 1, "bin")


def _cut(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size * 2 // 3)


def _as_safetensors(folder: Path) -> Path:
    weights = torch.load(folder / FIRST, weights_only=True) | torch.load(folder / SECOND, weights_only=True)
    save_file(weights, folder / "model.safetensors")
    return folder / "model.safetensors"


QKV = "transformer.encoder.layers.1.self_attention.query_key_value.weight"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "src: is not a folder"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: is missing"),
    "config cut": (lambda f: _cut(f / "config.json"), "config.json: is not JSON"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "config.json: is not a JSON object"),
    "tokenizer a pointer": (
        lambda f: (f / "tokenizer.model").write_text(POINTER), "tokenizer.model: is not a SentencePiece model"
    ),
    "no weights": (lambda f: [p.unlink() for p in f.glob("*.bin*")], "src: holds no weights"),
    "shard missing": (lambda f: (f / SECOND).unlink(), f"{SECOND}: is missing, but {INDEX} names it"),
    "shard missing, no index": (
        lambda f: [(f / SECOND).unlink(), (f / INDEX).unlink()], "holds 1 of 2 files pytorch_model-"
    ),
    "shard cut": (lambda f: _cut(f / SECOND), f"{SECOND}: cannot be read"),
    "shard empty": (lambda f: (f / SECOND).write_bytes(b""), f"{SECOND}: is no checkpoint"),
    "safetensors cut": (lambda f: _cut(_as_safetensors(f)), "model.safetensors: cannot be read"),
    "pointer": (lambda f: (f / SECOND).write_text(POINTER), f"{SECOND}: is a Git LFS pointer.*git lfs pull"),
    "safetensors pointer": (lambda f: _as_safetensors(f).write_text(POINTER), "model.safetensors: is a Git LFS pointe"),
    "web page": (lambda f: (f / SECOND).write_text("<!DOCTYPE html>"), f"{SECOND}: is a web page"),
    "code": (lambda f: torch.save({"x": Path("x")}, f / SECOND), f"{SECOND}: holds other objects than tensors"),
    "numbers": (lambda f: torch.save({"x": 1}, f / SECOND), f"{SECOND}: is not a dictionary of tensors"),
    "old format": (
        lambda f: torch.save({"x": torch.ones(1)}, f / SECOND, _use_new_zipfile_serialization=False),
        f"{SECOND}: is no checkpoint in PyTorch's format",
    ),
    "index empty": (lambda f: (f / INDEX).write_text("{}"), f"{INDEX}: has no weight_map"),
    "index names too few": (
        lambda f: _index(f, lambda m: m.pop(QKV)), f"the index says that {QKV} is in no file, but it is in {SECOND}"
    ),
    "index names too many": (
        lambda f: _index(f, lambda m: m.update(x=FIRST)), f"the index says that x is in {FIRST}, but it is in no file"
    ),
    "index names another file": (
        lambda f: _index(f, lambda m: m.update({QKV: FIRST})), f"{QKV} is in {FIRST}, but it is in {SECOND}"
    ),
    "twice": (
        lambda f: [torch.save(torch.load(f / FIRST, weights_only=True), f / SECOND), (f / INDEX).unlink()],
        f"{SECOND}: transformer.* is in {FIRST} too",
    ),
    "one missing": (lambda f: _weights(f, lambda w: w.pop(QKV)), r"nothing that becomes .*1\.self_attn\.k_proj"),
    "one too many": (
        lambda f: _weights(f, lambda w: w.update({QKV.replace(".1.", ".2."): w[QKV]})),
        r"becomes model\.layers\.2\.self_attn\.q_proj\.weight, which the model does not have",
    ),
    "under two names": (
        lambda f: _weights(f, lambda w: w.update({QKV.removeprefix("transformer."): w[QKV]})), "both become"
    ),
    "unknown": (
        lambda f: _weights(f, lambda w: w.update(other=w[QKV])), "bin: other is no tensor of ChatGLM2"
    ),
    "rows": (lambda f: _weights(f, lambda w: w.update({QKV: w[QKV][1:]})), "has 127 rows, but .* 64 \\+ 32 \\+ 32"),
    "columns": (lambda f: _weights(f, lambda w: w.update({QKV: w[QKV][:, 1:]})), r"\[64, 63\], but .* is \[64, 64\]"),
    "quantised": (
        lambda f: _weights(f, lambda w: w.update({QKV: w[QKV].to(torch.int8)})), "holds int8 numbers: it is quantised"
    ),
    "prefix inside": (
        lambda f: _weights(f, lambda w: w.update({"transformer.prefix_encoder.embedding.weight": w[QKV]})),
        "belongs to P-Tuning v2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files(checkpoint: Path, tmp_path: Path, damage: str) -> None:
    act, message = DAMAGE[damage]
    act(checkpoint)
    with pytest.raises(CheckpointError, match=message) as caught:
        convert_chatglm2(checkpoint, tmp_path / "dst")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir() if path.name != "src"] == []


def test_two_at_once_do_not_spoil_each_other(checkpoint: Path, tmp_path: Path) -> None:
    partial = tmp_path / "dst.partial"
    partial.mkdir()
    (partial / "model.safetensors").write_text("the other's")
    handle = os.open(partial, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(CheckpointError, match="dst: is being written by another process; wait for it"):
        convert_chatglm2(checkpoint, tmp_path / "dst")
    assert (partial / "model.safetensors").read_text() == "the other's"
    os.close(handle)  # as if it had been killed
    convert_chatglm2(checkpoint, tmp_path / "dst")
    AutoModelForCausalLM.from_pretrained(tmp_path / "dst")
    assert not partial.exists()


def test_a_folder_that_is_taken_is_left_alone(checkpoint: Path, tmp_path: Path) -> None:
    dst = tmp_path / "dst"
    dst.mkdir()
    convert_chatglm2(checkpoint, dst)  # an empty one is not taken
    before = {path: path.stat().st_mtime_ns for path in dst.iterdir()}
    with pytest.raises(CheckpointError, match="dst: exists already; move it away"):
        convert_chatglm2(checkpoint, dst)
    assert {path: path.stat().st_mtime_ns for path in dst.iterdir()} == before


def test_a_disk_that_is_too_small(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match=r"the result takes 0\.0 GB, the disk has 0\.0 GB left; make room"):
        convert_chatglm2(checkpoint, tmp_path / "dst")
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(28, "No space left on device"), RuntimeError("bug")])
def test_nothing_is_left_after_a_failure(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    (tmp_path / "dst.partial").mkdir()  # left by a process that was killed
    write, done = shards.save_file, []

    def second_fails(tensors: dict, path: Path, **others: object) -> None:
        if done:
            raise failure
        done.append(path)
        write(tensors, path, **others)

    monkeypatch.setattr(shards, "save_file", second_fails)
    expected = CheckpointError if isinstance(failure, OSError) else type(failure)
    with pytest.raises(expected, match="No space left" if isinstance(failure, OSError) else None):
        convert_chatglm2(checkpoint, tmp_path / "dst")
    assert done
    assert [path.name for path in tmp_path.iterdir()] == ["src"]
