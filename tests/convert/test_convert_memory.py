"""Conversion in the memory of one shard, measured on shards of half a gigabyte."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from chatglm2_reference import random_checkpoint, write_shards

CONVERT = """
import re, sys
from pathlib import Path
from elmd.convert.chatglm2 import convert_chatglm2
print(re.search(r"RssAnon:\\s*(\\d+)", Path("/proc/self/status").read_text())[1], flush=True)
sys.stdin.readline()
convert_chatglm2(Path(sys.argv[1]), Path(sys.argv[2]))
"""


def peak_of(src: Path, dst: Path) -> tuple[int, int, float]:
    """Anonymous resident bytes of a converting process: after its imports, and at most; and its seconds."""
    child = subprocess.Popen(
        [sys.executable, "-c", CONVERT, src, dst], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdin
    assert child.stdout
    before = int(child.stdout.readline()) * 1024
    peak, start, status = before, time.monotonic(), Path(f"/proc/{child.pid}/status")
    child.stdin.write("\n")
    child.stdin.flush()
    while child.poll() is None:
        for line in status.read_text().splitlines():
            if line.startswith("RssAnon"):
                peak = max(peak, int(line.split()[1]) * 1024)
        time.sleep(0.002)
    child.communicate()
    assert child.returncode == 0
    return before, peak, time.monotonic() - start


@pytest.mark.slow
def test_one_shard_at_a_time(tmp_path: Path) -> None:
    if not Path("/proc/self/status").is_file():
        pytest.skip("needs Linux's /proc to measure memory")
    if shutil.disk_usage(tmp_path).free < 4e9:
        pytest.skip("needs 4 GB of disk")
    src, dst = tmp_path / "src", tmp_path / "dst"
    try:
        _, weights = random_checkpoint(
            src, layers=28, hidden=1024, heads=16, groups=2, width=64, ffn=5120, rows=8192, shards=2,
            dtype=torch.float16,
        )  # fmt: skip
        name = "transformer.encoder.layers.27.self_attention.query_key_value.weight"
        for format in ("safetensors", "bin"):
            if format == "bin":
                for file in src.glob("model*"):
                    file.unlink()
                write_shards(src, weights, 2, format)
            sizes = [file.stat().st_size for file in (*src.glob("model-*"), *src.glob("pytorch_model-*"))]
            assert len(sizes) == 2
            assert min(sizes) > 500e6
            before, peak, seconds = peak_of(src, dst)
            print(
                f"{format}: {before / 1e6:.0f} MB after imports, at most {(peak - before) / 1e6:.0f} MB more "
                f"(largest shard {max(sizes) / 1e6:.0f} MB), {seconds / sum(sizes) * 1e9:.1f} s/GB"
            )
            assert peak < before + 1.2 * max(sizes) + 100e6
            with safe_open(dst / "model-00002-of-00002.safetensors", "pt") as found:
                parts = [found.get_tensor(f"model.layers.27.self_attn.{letter}_proj.weight") for letter in "qkv"]
            assert torch.equal(torch.cat(parts), weights[name])
            shutil.rmtree(dst)
    finally:
        shutil.rmtree(src, ignore_errors=True)
        shutil.rmtree(dst, ignore_errors=True)
