"""scripts/evaluate_runs.py on files and folders, one of them broken."""

from __future__ import annotations

import csv
import runpy
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from conftest import ROOT
from elmd.evaluation.predictions import Prediction, read_predictions, write_predictions
from elmd.evaluation.score import score
from experiments import config, job, predictions

SCRIPT = ROOT / "scripts" / "evaluate_runs.py"
REFERENCES = ["今天真的好高兴啊", "你怎么了？", "我也不知道。"]


def run(hypotheses: Sequence[str]) -> list[Prediction]:
    return [Prediction(f"d#{i}", h, r) for i, (h, r) in enumerate(zip(hypotheses, REFERENCES, strict=True))]


@pytest.fixture
def main() -> Callable[[list[str]], int]:
    return runpy.run_path(str(SCRIPT))["main"]


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    """A good file, a broken one (line 2 cut short), another good one."""
    paths = [tmp_path / f"{name}.jsonl" for name in ("gold_run", "broken", "other")]
    write_predictions(paths[0], run(REFERENCES))
    write_predictions(paths[2], run(["今天好高兴", "怎么", "不知道"]))
    whole = paths[2].read_text(encoding="utf-8")
    paths[1].write_text(whole[: whole.index("\n") + 20], encoding="utf-8")
    return paths


def test_a_broken_file_is_named_and_does_not_stop_the_others(
    main: Callable[[list[str]], int], three: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main([*map(str, three), "--out", str(out), "--protocol", "paper"]) == 1
    streams = capsys.readouterr()
    assert streams.out == ""
    logged = "".join(streams.err.split())  # log lines are wrapped
    assert f"{three[1]}:2:isnotJSON" in logged
    assert "2scored,1couldnotbescored" in logged
    assert "bleu4_char" in streams.err

    md = (out / "scores.md").read_text(encoding="utf-8")
    assert "| gold_run | 3 | 100.00 | 100.00 |" in md
    other = score(run(["今天好高兴", "怎么", "不知道"]), ["paper"])["paper"]
    cells = " | ".join(f"{other[name]:.2f}" for name in other)
    assert f"| other | 3 | {cells} |" in md
    assert f"## Could not be scored\n\n- broken: {three[1]}:2: is not JSON" in md
    assert "strict" not in md
    rows = list(csv.DictReader((out / "scores.csv").open(encoding="utf-8")))
    assert [row["system"] for row in rows] == ["gold_run", "other"]
    assert float(rows[1]["paper/rougeL_char"]) == other["rougeL_char"]
    assert r"gold\_run & 3 & 100.00" in (out / "scores.tex").read_text(encoding="utf-8")


def test_all_protocols_and_success(main: Callable[[list[str]], int], three: list[Path], tmp_path: Path) -> None:
    assert main([str(three[0]), str(three[2]), "--out", str(tmp_path / "out")]) == 0
    md = (tmp_path / "out" / "scores.md").read_text(encoding="utf-8")
    for metric in ("bleu4_char", "meteor_char", "rougeL_char", "bleu4_zh", "rouge1_jieba"):
        assert f" {metric} |" in md
    assert "Could not be scored" not in md


def test_folders_are_searched(
    main: Callable[[list[str]], int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifacts, experiments = tmp_path / "generate", tmp_path / "experiments"
    for name in ("aa", "bb", "cc.partial"):
        (artifacts / name).mkdir(parents=True)
        write_predictions(artifacts / name / "predictions.jsonl", run(REFERENCES))
    (experiments / "demo").mkdir(parents=True)
    (experiments / "demo" / "eval").symlink_to(artifacts / "aa", target_is_directory=True)
    (experiments / "demo" / "loop").symlink_to(experiments, target_is_directory=True)
    (tmp_path / "empty").mkdir()
    paths = [str(experiments), str(artifacts), str(artifacts / "bb" / "predictions.jsonl"), str(tmp_path / "empty")]
    assert main([*paths, "--out", str(tmp_path / "out"), "--protocol", "paper"]) == 1
    rows = list(csv.DictReader((tmp_path / "out" / "scores.csv").open(encoding="utf-8")))
    assert [row["system"] for row in rows] == ["experiments/demo/eval", "generate/bb"]
    logged = "".join(capsys.readouterr().err.split())
    assert "cc.partialisnotfinished:leftout" in logged
    assert logged.count("scoredonce") == 2
    assert f"{tmp_path / 'empty'}couldnotbescored:holdsnopredictions.jsonl" in logged


def test_an_experiment_is_compared_with_floors_and_third_parties(
    main: Callable[[list[str]], int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, theirs = tmp_path / "experiments" / "demo", tmp_path / "theirs.jsonl"
    for seed in (0, 1):
        job(folder / f"ablation=none,seed={seed}", config(seed=seed), predictions(["好"] * 3, REFERENCES))
    job(folder / "baseline=livebot,seed=0", config(baseline__name="livebot"), predictions(["嗯"] * 3, REFERENCES))
    write_predictions(theirs, [Prediction(f"d{i}#1", "好啊", r) for i, r in enumerate(REFERENCES)])
    out = tmp_path / "out"
    arguments = [str(tmp_path / "experiments"), f"their = system={theirs}", "--out", str(out), "--protocol", "paper"]
    assert main(arguments) == 1
    assert "cannot be read" in " ".join(capsys.readouterr().err.split())  # the first equals sign ends the name

    arguments[1] = f"theirs={theirs}"
    assert main(arguments) == 0
    rows = list(csv.DictReader((out / "comparison.csv").open(encoding="utf-8")))
    assert list(dict.fromkeys(row["system"] for row in rows)) == [
        "Livebot", "ELMD", "theirs", "floor: random response", "floor: most common reply", "floor: retrieval only",
    ]  # fmt: skip
    assert {row["reference"] for row in rows} == {"ELMD"}
    md = (out / "comparison.md").read_text(encoding="utf-8")
    assert "# Systems of demo" in md
    assert "- Livebot, seed 1: there is no run of this seed" in md
    runs = list(csv.DictReader((out / "scores.csv").open(encoding="utf-8")))
    assert [row["system"] for row in runs] == [
        "experiments/demo/ablation=none,seed=0", "experiments/demo/ablation=none,seed=1",
        "experiments/demo/baseline=livebot,seed=0", "theirs",
    ]  # fmt: skip
    logged = "".join(capsys.readouterr().err.split())
    assert "missing:Livebot,seed1:" in logged

    single = folder / "ablation=none,seed=0"  # a path with an equals sign
    assert main([str(single), "--out", str(tmp_path / "one"), "--protocol", "paper"]) == 0
    assert "| ELMD | 1 × 1 |" in (tmp_path / "one" / "comparison.md").read_text(encoding="utf-8")


def test_a_comparison_that_cannot_be_made_does_not_stop_the_others(
    main: Callable[[list[str]], int], tmp_path: Path
) -> None:
    good, bad = (tmp_path / "experiments" / name for name in ("good", "bad"))
    job(good, config("good"), predictions(["好"] * 3, REFERENCES))
    job(bad / "a", config("bad"), predictions(["好"] * 3, REFERENCES))
    job(bad / "b", config("bad"), predictions(["嗯"] * 3, REFERENCES))
    out = tmp_path / "out"
    cut = job(tmp_path / "experiments" / "cut", config("cut"), predictions(["好"] * 3, REFERENCES)) / "artifacts.json"
    assert main([str(tmp_path / "experiments"), "--out", str(out), "--protocol", "paper"]) == 1
    assert sorted(path.name for path in out.glob("*.md")) == ["comparison_cut.md", "comparison_good.md", "scores.md"]
    md = (out / "scores.md").read_text(encoding="utf-8")
    assert "- comparison of bad: ELMD with seed 0 is there twice" in md
    assert len(list(csv.DictReader((out / "scores.csv").open(encoding="utf-8")))) == 4

    cut.write_text("{", encoding="utf-8")
    assert main([str(cut.parent), "--out", str(tmp_path / "cut"), "--protocol", "paper"]) == 1
    assert "artifacts.json: is not what elmd.train writes" in (tmp_path / "cut" / "scores.md").read_text("utf-8")


def test_files_of_one_name_stay_apart(main: Callable[[list[str]], int], tmp_path: Path) -> None:
    paths = [tmp_path / side / "demo" / "predictions.jsonl" for side in "ab"]
    for path in paths:
        write_predictions(path, run(REFERENCES))
    missing = tmp_path / "nowhere.jsonl"
    arguments = [*map(str, paths), str(missing), "--out", str(tmp_path / "out"), "--protocol", "paper"]
    assert main(arguments) == 1
    md = (tmp_path / "out" / "scores.md").read_text(encoding="utf-8")
    assert "| demo | 3 |" in md
    assert f"| {paths[1]} | 3 |" in md
    assert f"- nowhere: {missing}: cannot be read (No such file or directory)" in md
    assert len(read_predictions(paths[1])) == 3


def test_wrong_arguments(main: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["x.jsonl", "--out", "o", "--protocol", "papr"])
    assert caught.value.code == 2
    assert "invalid choice: 'papr'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main(["x.jsonl", "--out", str(SCRIPT)])
    assert caught.value.code == 2
    assert "is a file; name a folder" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main(["mine.jsonl", "mine=theirs.jsonl", "--out", "o"])
    assert caught.value.code == 2
    assert "mine is the name of a run; give the file another" in capsys.readouterr().err


def test_nothing_could_be_scored(main: Callable[[list[str]], int], tmp_path: Path) -> None:
    assert main([str(tmp_path / "nowhere.jsonl"), "--out", str(tmp_path / "out")]) == 1
    assert not (tmp_path / "out").exists()


def test_a_name_may_hold_anything_and_what_exists_is_a_path(tmp_path: Path) -> None:
    given = runpy.run_path(str(SCRIPT))["given"]
    file, job = tmp_path / "theirs.jsonl", tmp_path / "ablation=none,seed=0"
    file.touch()
    job.mkdir()
    assert given(f"<script>a</script>={file}") == ("<script>a</script>", file)
    assert given("Theirs=missing.jsonl") == ("Theirs", Path("missing.jsonl"))
    for path in (job, file, tmp_path / "missing" / "ablation=none"):
        assert given(str(path)) == path
