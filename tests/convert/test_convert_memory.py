"""Conversion in the memory of one shard, measured in a process of its own on shards of 30 MB."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from chatglm2_reference import random_checkpoint, write_shards
from elmd.convert.chatglm2 import convert_chatglm2
from elmd.convert.shards import Source

SHARDS = 4


def anonymous(pid: int | str) -> int:
    """Anonymous resident bytes of a process: pages of its own, not those of files. 0 once it has ended."""
    match = re.search(r"RssAnon:\s*(\d+)", Path(f"/proc/{pid}/status").read_text())
    return int(match[1]) * 1024 if match else 0


def growth(work: Callable[[], object]) -> int:
    """By how many bytes a process grows at most during its work. It is forked, so that it imports nothing."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # memory that was freed and kept would hide what is taken
    ready, begin = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.set_num_threads(1)  # the pool of threads is not there after a fork
            os.read(ready, 1)
            work()
            status = 0
        finally:
            os._exit(status)
    before = peak = anonymous(child)
    os.write(begin, b"x")
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        peak = max(peak, anonymous(child))
        time.sleep(0.001)
    os.close(ready)
    os.close(begin)
    assert ended[1] == 0
    return peak - before


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux's /proc to measure memory")
@pytest.mark.parametrize("format", ["safetensors", "bin"])
def test_one_shard_at_a_time(tmp_path: Path, format: str) -> None:
    src, dst = tmp_path / "src", tmp_path / "dst"
    sizes = {"layers": 8, "hidden": 512, "heads": 8, "groups": 2, "width": 64, "ffn": 4096, "rows": 8192}
    _, weights = random_checkpoint(src, **sizes, shards=SHARDS, dtype=torch.float16)
    if format == "bin":
        for file in src.glob("model*"):
            file.unlink()
        write_shards(src, weights, SHARDS, format)
    name = "encoder.layers.7.self_attention.query_key_value.weight"
    qkv = weights.pop(f"transformer.{name}")
    weights.clear()
    files = [file.stat().st_size for file in (*src.glob("model-*"), *src.glob("pytorch_model-*"))]
    assert len(files) == SHARDS
    convert_chatglm2(src, dst)  # imports what a conversion needs
    shutil.rmtree(dst)
    grown = growth(lambda: convert_chatglm2(src, dst))
    print(f"{format}: at most {grown / 1e6:.0f} MB more (largest shard {max(files) / 1e6:.0f} MB)")
    assert grown < 1.5 * max(files) < sum(files) / 2
    assert growth(lambda: [t.clone() for _, part in Source(src).shards() for t in part.values()]) > 0.9 * sum(files)
    with safe_open(dst / f"model-0000{SHARDS}-of-0000{SHARDS}.safetensors", "pt") as file:
        parts = [file.get_tensor(f"model.layers.7.self_attn.{letter}_proj.weight") for letter in "qkv"]
    assert torch.equal(torch.cat(parts), qkv)
