"""Each benchmark once at its smallest size: it agrees with its alternative, measures, and tells a ratio."""

from __future__ import annotations

import re
import subprocess
import sys
from types import ModuleType

import pytest
import torch

from conftest import ROOT


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT)
    import benchmarks.__main__

    return benchmarks.__main__


def test_each_benchmark_tells_medians_and_a_ratio() -> None:
    command = [sys.executable, "-m", "benchmarks", "--small", "--rounds", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    names = re.findall(r"^(\S+): ", done.stdout, re.MULTILINE)
    assert names == ["step-eerg", "erm-loss"]
    for way in ("ours", "other"):
        assert len(re.findall(rf"^  {way} +median +[\d.]+ ms", done.stdout, re.MULTILINE)) == len(names)
    ratios = re.findall(r"^  ratio ([\d.]+) .*1 rounds", done.stdout, re.MULTILINE)
    assert len(ratios) == len(names)
    assert all(float(ratio) > 0 for ratio in ratios)


def test_ways_that_differ_are_not_compared(bench: ModuleType) -> None:
    with pytest.raises(AssertionError, match=r"the two ways differ by 1\.0e-03"):
        bench.compare(lambda: [torch.tensor([1.001])], lambda: [torch.tensor([1.0])], 1)


@pytest.mark.parametrize(("argument", "code"), [("--help", 0), ("erm", 2)])
def test_help_and_mistakes_list_the_names(
    bench: ModuleType, argument: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["benchmarks", argument])
    with pytest.raises(SystemExit) as stop:
        bench.main()
    told = "".join(capsys.readouterr())
    assert stop.value.code == code
    assert "step-eerg, erm-loss" in told
