"""The engine with stages of its own: it knows nothing of ELMD."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator

from elmd.engine.chain import Chain
from elmd.engine.keys import setting
from elmd.engine.stage import Inputs, Job, Outcome, Stage
from elmd.errors import ArtifactError, ElmdError


@dataclass
class Numbers:
    start: int = 2
    times: int = 3
    fast: bool = setting(False, counts=False)
    doubles: bool = False


@dataclass
class Settings:
    numbers: Numbers = field(default_factory=Numbers)


def value(folder: Path) -> int:
    return json.loads((folder / "value.json").read_text())


def write(job: Job, number: int) -> Outcome:
    if number > 1000:
        raise ElmdError("it is too large")
    (job.folder / "value.json").write_text(json.dumps(number))
    return Outcome(metrics={"value": {"of": number}}, primary="value.of")


STAGES = {
    stage.name: stage
    for stage in (
        Stage("start", "number", 1, lambda c: Inputs(("numbers.start",)), lambda c, job: write(job, c.numbers.start)),
        Stage(
            "times", "number", 1, lambda c: Inputs(("numbers.times",), ("start",)),
            lambda c, job: write(job, value(job.upstream["start"]) * c.numbers.times),
        ),
        Stage(
            "double", "number", 1, lambda c: Inputs((), ("times",)),
            lambda c, job: write(job, value(job.upstream["times"]) * 2), applies=lambda c: c.numbers.doubles,
        ),
        Stage(
            "last", "end", 1, lambda c: Inputs((), ("number",)),
            lambda c, job: write(job, value(job.upstream["number"])),
        ),
        Stage("nosy", "nosy", 1, lambda c: Inputs(("numbers.start",)), lambda c, job: write(job, c.numbers.times)),
    )
}  # fmt: skip


def chain(tmp_path: Path, force: bool = False, stages: dict[str, Stage] = STAGES, **numbers: Any) -> Chain:
    settings = Settings(Numbers(**numbers))
    return Chain(settings, stages, Accelerator(cpu=True), root=tmp_path / "runs", force=force, program="it")


def make(tmp_path: Path, **numbers: Any) -> tuple[int, list[str]]:
    """The last value, and the stages that had to run for it."""
    made = chain(tmp_path, **numbers)
    names = list(made.order("last"))
    missing = made.missing(names)
    for name in names:
        made.run(name)
    return value(made.folder("last")), missing


def test_a_chain_makes_what_is_missing_and_reuses_the_rest(tmp_path: Path) -> None:
    assert make(tmp_path) == (6, ["start", "times", "last"])
    assert make(tmp_path) == (6, [])
    assert make(tmp_path, fast=True) == (6, []), "how it runs is in no fingerprint"
    assert make(tmp_path, times=5) == (10, ["times", "last"])
    manifest = chain(tmp_path).manifest("times")
    assert manifest["reads"] == {"numbers.times": 3}
    assert manifest["primary"] == {"name": "value.of", "value": 6}


def test_a_role_is_played_by_the_last_stage_that_the_configuration_has(tmp_path: Path) -> None:
    assert chain(tmp_path).role("number") == "times"
    assert make(tmp_path, doubles=True) == (12, ["start", "times", "double", "last"])
    with pytest.raises(KeyError):
        chain(tmp_path).role("nothing")
    made = chain(tmp_path, doubles=True)
    list(made.order("last"))
    made.point(tmp_path / "here", job="j")
    about = json.loads((tmp_path / "here" / "artifacts.json").read_text())
    assert about["roles"] == {"number": "double", "end": "last", "nosy": "nosy"}
    assert about["job"] == "j"
    assert value(tmp_path / "here" / about["artifacts"]["double"]) == 12


def test_what_a_stage_reads_without_declaring_it_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(AttributeError, match=r"reads numbers\.times"):
        chain(tmp_path).run("nosy")


def test_a_stage_needs_what_it_stands_on(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"times needs the result of start.*run it with .* stage=start first"):
        chain(tmp_path).run("times")


def test_force_sets_aside_and_an_error_leaves_nothing(tmp_path: Path) -> None:
    make(tmp_path)
    chain(tmp_path, force=True).run("start")
    assert len([path for path in (tmp_path / "runs" / "start").iterdir() if ".old-" in path.name]) == 1
    failing = chain(tmp_path, start=5000)
    with pytest.raises(ElmdError, match="too large"):
        failing.run("start")
    assert not failing.store.partial("start", failing.node("start").fingerprint).exists()
