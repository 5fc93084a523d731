"""The stage `prepare`: what it writes, and what its result depends on."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bad_data import CASES
from dialogues import line, write_cped, write_jsonl, write_m3ed
from elmd.cli import compose, guard, run
from elmd.config import Config, DataConfig, OnMissingClip, SplitRule
from elmd.data.audit import audit
from elmd.data.samples import load_samples
from elmd.engine.stage import Job
from elmd.stages import prepare as stage
from elmd.train import train
from elmd.types import SPLITS


def config(**data: Any) -> Config:
    return Config(data=DataConfig(name="x", **{"split": SplitRule.dialogue, **data}))


def job(folder: Path, upstream: dict[str, Path] | None = None) -> Job:
    return Job(folder, upstream or {}, SimpleNamespace(is_main_process=True))  # type: ignore[arg-type]


def talks(path: Path, n: int = 30, **more: Any) -> Path:
    return write_jsonl(
        path, *({"id": f"d{i}", "utterances": [line("甲", "你好", **more), line("乙", "好")]} for i in range(n))
    )


def test_the_stage_writes_samples_and_audit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    cfg = config(reader="jsonl", path=str(talks(tmp_path / "d.jsonl")))
    outcome = stage.run(cfg, job(out))
    assert sorted(file.name for file in out.iterdir()) == ["audit.json", "samples.jsonl"]
    assert Counter(s.split for s in load_samples(out / "samples.jsonl")) == outcome.counts["samples"]
    assert json.loads((out / "audit.json").read_text()) == audit(load_samples(out / "samples.jsonl"))
    assert json.loads(json.dumps(outcome.counts)) == outcome.counts
    printed = capsys.readouterr().err
    for words in ("sentences", "with clip", "Neutral", "two_speakers"):
        assert words in printed


def test_the_stage_reads_the_tiny_world_from_bootstrap(tmp_path: Path) -> None:
    (tmp_path / "world").mkdir()
    (tmp_path / "out").mkdir()
    records = [{"id": s, "split": s, "utterances": [line("甲", "你好"), line("乙", "好")]} for s in SPLITS]
    write_jsonl(tmp_path / "world" / "dialogues.jsonl", *records)
    cfg = config(reader="tiny", split=SplitRule.official)
    assert stage.reads(cfg).upstream == ("bootstrap/world",)
    assert not stage.reads(cfg).files
    counts = stage.run(cfg, job(tmp_path / "out", {"bootstrap/world": tmp_path / "world"})).counts
    assert counts["samples"] == dict.fromkeys(SPLITS, 1)


def test_depends_on_contents_and_not_on_places(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    first, second = (config(reader="jsonl", path=str(talks(tmp_path / name / "d.jsonl"))) for name in "ab")
    assert stage.reads(first).counted(first) == stage.reads(second).counted(second)
    assert "seed" not in stage.reads(first).keys
    assert set(stage.reads(first).files) == {"data"}
    official = config(reader="jsonl", path=first.data.path, split=SplitRule.official, split_seed=5)
    assert "data.split_seed" not in stage.reads(official).counted(official)
    for changed in ({"split_seed": 1}, {"filters": ["two_speakers"]}, {"on_missing_clip": OnMissingClip.drop}):
        other = config(reader="jsonl", path=first.data.path, **changed)
        assert stage.reads(other).counted(other) != stage.reads(first).counted(first), changed


@pytest.mark.parametrize("kind", ["jsonl", "video_root"])
def test_a_clip_that_appears_makes_another_artifact(tmp_path: Path, kind: str) -> None:
    if kind == "jsonl":
        cfg = config(reader="jsonl", path=str(talks(tmp_path / "d.jsonl", clip="1.mp4")))
    else:
        file = write_cped(tmp_path / "c.csv", [("1", "1_0", "1_0_0", "甲", "happy", "好")])
        cfg = config(reader="cped", path=str(file), video_root=str(tmp_path), video_template="{utterance}.mp4")
    before = stage.reads(cfg).counted(cfg)
    assert stage.reads(cfg).counted(cfg) == before
    (tmp_path / "1.mp4").write_bytes(b"x")
    assert stage.reads(cfg).counted(cfg) != before


def test_m3ed_depends_on_its_annotation_and_not_on_videos_beside_it(tmp_path: Path) -> None:
    folder = write_m3ed(tmp_path / "m", {"S_1": {"S_1_1": {}}}, train=["S"])
    assert set(stage.reads(config(reader="m3ed", path=str(folder))).files) == {"annotation.json", "splitInfo"}


# --- the command line ----------------------------------------------------------------------------------------------


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


#: Each format; a broken file, a broken row, a missing clip. All others leave the command line in the same way.
SHOWN = (
    "m3ed, cut off",
    "cped, column missing",
    "cped, open quote",
    "jsonl, no number",
    "jsonl, clip missing",
    "jsonl, empty",
)


@pytest.mark.parametrize("name", SHOWN)
def test_command_line_exits_with_1_and_writes_nothing(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, message = CASES[name]
    reader, path = make(tmp_path)
    runs = tmp_path / "runs"
    (runs / "prepare" / "0123456789abcdef").mkdir(parents=True)
    (runs / "prepare" / "0123456789abcdef" / "manifest.json").write_text("{}")
    before = snapshot(runs)
    overrides = ["stage=prepare", f"data={reader}", f"data.path={path}", "data.split=dialogue", f"runs_dir={runs}"]
    overrides += ["data.on_missing_clip=error", "vision=none", "retriever=none", "cpu=true"]
    with pytest.raises(SystemExit) as stopped:
        guard(lambda: run(compose(overrides), train))
    assert stopped.value.code == 1
    shown = capsys.readouterr()
    assert re.search("^error: .*" + message, shown.err, re.MULTILINE), shown.err
    assert "Traceback" not in shown.err
    assert "artifact:" not in shown.out
    assert snapshot(runs) == before
