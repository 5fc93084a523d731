"""The benchmarks of clips, resuming, start-up and processes, and the curves, at their smallest sizes."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks import curves, dist, resume, startup, video
from benchmarks.__main__ import BENCHMARKS
from benchmarks.harness import Unequal, measure


@pytest.mark.parametrize("command", startup.COMMANDS)
def test_a_command_reads_its_line_without_what_it_works_with(command: str, tmp_path: Path) -> None:
    line = [sys.executable, "-X", "importtime", *startup.arguments(command)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == startup.COMMANDS[command], done.stderr[-2000:]
    assert "import time:" in done.stderr
    assert startup.loaded(done.stderr) == set()


@pytest.mark.parametrize(("argument", "code"), [("--help", 0), ("erm-loss", 1)])
def test_names_of_benchmarks_are_told_without_loading_them(argument: str, code: int, tmp_path: Path) -> None:
    line = [sys.executable, "-X", "importtime", "-m", "benchmarks", argument]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == code
    told = [text for text in (done.stdout + done.stderr).splitlines() if not text.startswith("import time:")]
    if code:
        (sentence,) = told
        assert sentence.startswith("error: there is no benchmark 'erm-loss'; choose from step-eerg, step-rep, erm,")
    assert set(BENCHMARKS) <= set(re.findall(r"[a-z-]+", " ".join(told)))
    assert startup.loaded(done.stderr) == set()


@pytest.mark.parametrize(("stage", "lacks"), [("prepare", "bootstrap/world"), ("eerg", "prepare")])
def test_what_is_made_already_is_told_without_the_models(stage: str, lacks: str, tmp_path: Path) -> None:
    line = [sys.executable, "-X", "importtime", "-m", "elmd.train", "experiment=demo", f"stage={stage}", "cpu=true"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert f"{stage} needs the result of {lacks}" in done.stderr
    assert startup.loaded(done.stderr) == {"torch", "accelerate"}


def test_what_is_loaded_is_seen() -> None:
    code = "import scipy, xml.dom.minidom"
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, timeout=60)
    assert startup.loaded(done.stderr) == {"scipy"}


def test_a_worker_that_decodes_loads_no_torch() -> None:
    code = (
        "import sys; from elmd.vision.decode import load_quietly; load_quietly('decord'); "
        "print([name for name in ('torch', 'decord') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.stdout.strip() == "['decord']", done.stderr


@pytest.mark.parametrize(
    "module", [video, startup, *(pytest.param(one, marks=pytest.mark.slow) for one in (resume, dist))]
)
def test_its_ways_agree(module: ModuleType) -> None:
    for case in module.cases(small=True):
        found = measure(case, 1)
        assert (case.tolerance is None) == (module is startup)
        assert ("× elmd" in found.markdown()) == (module is not startup)
        if module is dist:
            one, two = (timing.facts for timing in found.timings)
            sent = "bytes handed to each step's collectives"
            assert one[sent] == 0
            assert two[sent] == two["bytes that train"] + 3 * 4, "gradients, loss, tokens and the stop flag"


def test_other_pixels_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = video.one_by_one
    monkeypatch.setattr(video, "one_by_one", lambda *sizes: plain(*sizes) + 1)
    cases = video.cases(small=True)  # which holds the clips
    with pytest.raises(Unequal, match="PyAV, one by one"):
        measure(next(cases), 1)


def test_how_long_the_encoder_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: half a second to encode a clip, and three times as long to decode it."""
    now = 0.0

    def lasting(seconds: float, work: Callable[..., Any]) -> Callable[..., Any]:
        def longer(*given: Any) -> Any:
            nonlocal now
            now += seconds
            return work(*given)

        return longer

    monkeypatch.setattr(video, "time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(video, "one_by_one", lasting(1.5, video.one_by_one))
    monkeypatch.setattr(video.VisionEncoder, "forward", lasting(0.5, video.VisionEncoder.forward))
    in_turn = video.encoding(tmp_path, True, video.SCALES["smoke"].vision).ways[-1]
    in_turn.run()
    assert in_turn.facts() == {"encoder waits, %": 75, "encoder alone, frames/s": video.FRAMES / 0.5}


def test_curves_are_drawn_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["curves", "--small", "--out", str(tmp_path)])
    curves.main()
    names = {path.stem for path in tmp_path.glob("*.png")}
    assert names == {path.stem for path in tmp_path.glob("*.csv")} == set(curves.CURVES)
    for path in tmp_path.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size <= 60 * 1024
        rows = list(csv.DictReader(path.with_suffix(".csv").open()))
        assert len(rows) >= 2
        assert all(0 < float(value) < float("inf") for row in rows for value in row.values())


def test_an_exponent_is_that_of_the_power() -> None:
    sizes = [1, 2, 4, 8]
    assert curves.exponent(sizes, [3 * size**1.5 for size in sizes]) == pytest.approx(1.5)
    assert curves.exponent(sizes, [7.0] * 4) == pytest.approx(0, abs=1e-9)
    assert curves.exponent(sizes, list(np.log(sizes) + 1)) < 1
