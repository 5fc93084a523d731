"""Runs of an experiment: names, order, what is missing, third parties."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from elmd.errors import ArtifactError, DataError
from elmd.evaluation.predictions import Prediction, write_predictions
from elmd.evaluation.runs import Missing, read_experiment
from elmd.evaluation.systems import system_name
from experiments import config, job, predictions

REFERENCES = ["今天真的好高兴啊", "你怎么了？", "我也不知道。"]


def answers(text: str = "好的。") -> list[Prediction]:
    return predictions([text] * 3, REFERENCES)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "experiments" / "demo"


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "ELMD"),
        ({"ablation_name": "no_erm"}, "w/o ERM"),
        ({"ablation_name": "no_v"}, "w/o V"),
        ({"ablation_name": "mine"}, "ELMD, mine"),
        ({"baseline__name": "dialogpt"}, "DialoGPT"),
        ({"baseline__name": "visualglm"}, "VisualGLM-style"),
        ({"baseline__name": "livebot", "ablation_name": "no_v"}, "Livebot, w/o V"),
    ],
)
def test_names(changes: dict[str, Any], name: str) -> None:
    assert system_name(config(**changes)) == name


def test_runs_come_in_the_order_of_the_papers_tables(folder: Path) -> None:
    for i, (key, value) in enumerate(
        [("ablation_name", "no_rep"), ("ablation_name", "no_erm"), ("ablation_name", "none"),
         ("baseline__name", "visualglm"), ("baseline__name", "dialogpt"), ("baseline__name", "livebot")]
    ):  # fmt: skip
        for seed in (1, 0):
            job(folder / f"{i},{seed}", config(seed=seed, **{key: value}), answers())
    experiment = read_experiment(folder)
    assert experiment.name == "demo"
    assert list(experiment.systems) == ["Livebot", "DialoGPT", "VisualGLM-style", "ELMD", "w/o ERM", "w/o REP"]
    assert all([run.seed for run in runs] == [0, 1] for runs in experiment.systems.values())
    assert experiment.missing == []
    run = experiment.systems["w/o ERM"][0]
    assert (run.folder, run.path) == (folder / "1,0", folder / "1,0" / "predictions.jsonl")
    assert run.predictions == answers()
    assert run.manifest("samples") == {"stage": "prepare"}
    assert run.artifact("generator") is None
    with pytest.raises(ArtifactError, match=r"1,0: has no finished eerg \(finished: prepare\)"):
        run.manifest("generator")
    assert len(experiment.samples()) == 12
    assert any("VisualGLM-style: ELMD's parts" in note for note in experiment.notes)
    assert not any("text only" in note for note in experiment.notes)


def test_a_single_run_is_an_experiment(folder: Path) -> None:
    job(folder, config(vision__kind="none"), answers())
    experiment = read_experiment(folder)
    assert [(run.system, run.seed) for run in experiment.runs] == [("ELMD", 0)]
    assert any("ELMD is text only here" in note for note in experiment.notes)


def vary(folder: Path, name: str, predicted: list[Prediction] | None, ablation: str = "none", **axes: Any) -> None:
    """A sweep's job that sets keys as `erm__slots=2`."""
    made = config(ablation_name=ablation, **axes)
    job(folder / name, made, predicted, axes={key.replace("__", "."): value for key, value in axes.items()})


def test_what_a_sweep_varies_becomes_part_of_the_name(folder: Path) -> None:
    for slots in (16, 2, 4):
        vary(folder, f"s{slots}", answers(), erm__slots=slots, vision__frames=8)
    assert list(read_experiment(folder).systems) == ["ELMD, s = 2", "ELMD, s = 4", "ELMD, s = 16"]
    vary(folder, "other", answers(), "no_ert", erm__slots=4)
    assert list(read_experiment(folder).systems)[-1] == "w/o ERT, s = 4"


def test_a_run_outside_the_sweep_is_named_by_its_value(folder: Path) -> None:
    job(folder / "a", config(), answers())
    vary(folder, "b", answers(), retriever__key="e_u")
    assert list(read_experiment(folder).systems) == ["ELMD, retriever.key=E_s", "ELMD, retriever.key=e_u"]


def test_a_group_is_named_by_its_choice(folder: Path) -> None:
    job(folder / "a", config(llm__name="qwen", llm__path="/x"), answers(), axes={"llm": "qwen"})
    job(folder / "b", config(), answers(), axes={})
    assert list(read_experiment(folder).systems) == ["ELMD, llm=qwen", "ELMD, llm=tiny"]


def test_long_values_become_a_digest(folder: Path) -> None:
    vary(folder, "a", answers())
    vary(folder, "b", answers(), prompt__instruction="很长" * 40)
    names = list(read_experiment(folder).systems)
    assert len(set(names)) == 2
    assert all(len(name) < 60 for name in names)


def test_settings_that_are_mixed_are_named_for_every_system(folder: Path) -> None:
    vary(folder, "a", answers(), eerg__steps=10)
    vary(folder, "b", answers(), eerg__steps=20)
    vary(folder, "c", answers(), "no_erm", eerg__steps=20)
    job(folder / "d", config(baseline__name="dialogpt", eerg__steps=20), answers(), axes={"eerg.steps": 20})
    experiment = read_experiment(folder)
    assert set(experiment.systems) == {
        "DialoGPT", "ELMD, eerg.steps=10", "ELMD, eerg.steps=20", "w/o ERM, eerg.steps=20",
    }  # fmt: skip
    assert any(
        note.startswith("Runs of several settings are mixed here (ELMD, eerg.steps=10") for note in experiment.notes
    )


def test_settings_that_changed_between_seeds_are_noted(folder: Path) -> None:
    """As where a YAML file is edited between two sweeps: no axis shows it."""
    for seed in (0, 1):
        made = {f"eerg{seed}": {"depends": {"config": {"eerg": {"steps": 10 + seed, "batch_size": 16}}}}}
        path = job(folder / f"{seed}", config(seed=seed), answers(), made, axes={}) / "artifacts.json"
        about = json.loads(path.read_text(encoding="utf-8"))
        about["artifacts"]["eerg"] = about["artifacts"].pop(f"eerg{seed}")
        path.write_text(json.dumps(about), encoding="utf-8")
    note = "The runs of ELMD differ in what stage eerg was made with (eerg.steps): their spread is not"
    assert any(text.startswith(note) for text in read_experiment(folder).notes)


def test_missing_are_holes_of_the_grid_and_what_was_not_evaluated(folder: Path) -> None:
    job(folder / "a", config(seed=0), answers())
    job(folder / "b", config(seed=1), answers())
    job(folder / "c", config(seed=0, ablation_name="no_erm"), answers())
    job(folder / "d", config(seed=1, ablation_name="no_ssc"), None, {"erm": {"stage": "erm"}})
    missing = read_experiment(folder).missing
    assert [(job.system, job.seed) for job in missing] == [("w/o SSC", 1), ("w/o ERM", 1)]
    assert "d has no predictions.jsonl (last stage done: erm)" in missing[0].why
    assert missing[1].why == "there is no run of this seed, and there is of others"
    job(folder / "e", config(seed=1, erm__slots=9), None, axes={"erm.slots": 9})
    assert "ELMD, s = 9" in [job.system for job in read_experiment(folder).missing]
    assert "ELMD" in read_experiment(folder).systems


def sweep(folder: Path, *jobs: dict[str, Any]) -> None:
    rest = {"system": "ELMD", "seed": 0, "axes": {}, "status": "done", "stage": None, "error": None, "log": None}
    text = json.dumps({"experiment": "demo", "jobs": [{**rest, **state} for state in jobs]})
    (folder / "sweep.json").write_text(text, encoding="utf-8")


def test_a_sweep_says_what_failed(folder: Path) -> None:
    job(folder / "a", config(seed=0), answers())
    job(folder / "b", config(seed=1), answers("旧的。"))  # of an earlier sweep: its job has failed since
    job(folder / "d", config(ablation_name="no_v"), None)
    sweep(
        folder,
        {"job": "a", "axes": {"baseline": "none"}},
        {"job": "b", "seed": 1, "status": "failed", "stage": "train", "log": "logs/b.log",
         "error": "no GPU; get one."},
        {"job": "c", "system": "Livebot", "axes": {"baseline": "livebot_tiny"}, "status": "waiting"},
        {"job": "d", "system": "w/o V", "axes": {"ablation": "no_v", "erm.slots": 8}},
    )  # fmt: skip
    experiment = read_experiment(folder)
    assert [(run.system, run.seed) for run in experiment.runs] == [("ELMD", 0)]
    assert experiment.missing == [
        Missing("ELMD", 1, "failed in train: no GPU; get one.", folder / "logs" / "b.log"),
        Missing("Livebot", 0, "not begun; run the sweep again to resume it", None),
        Missing("w/o V, s = 8", 0, "is recorded as done and has no predictions; run the sweep again", None),
    ]


def test_third_parties_join_on_the_same_samples(folder: Path, tmp_path: Path) -> None:
    job(folder, config(), answers())
    theirs = tmp_path / "theirs.jsonl"
    write_predictions(theirs, [Prediction(p.id, "嗯", p.reference) for p in reversed(answers())])
    experiment = read_experiment(folder, {"their system": theirs})
    last = experiment.runs[-1]
    assert (last.system, last.seed, last.folder, last.config, last.artifacts) == ("their system", None, None, {}, {})
    with pytest.raises(DataError, match=r"theirs\.jsonl: 'ELMD' is a system of this experiment; give another name"):
        read_experiment(folder, {"ELMD": theirs})
    write_predictions(theirs, [Prediction(p.id, "嗯", p.reference) for p in answers()[:2]])
    with pytest.raises(DataError, match=r"theirs\.jsonl were not run on the same samples \(1 are in one only"):
        read_experiment(folder, {"their system": theirs})
    write_predictions(theirs, [Prediction(p.id, "嗯", p.reference + "啊") for p in answers()])
    with pytest.raises(DataError, match=r"have different references for 3 samples, e\.g\. 'd0#1'"):
        read_experiment(folder, {"their system": theirs})


def test_one_seed_twice_is_refused_and_one_file_twice_is_not(folder: Path) -> None:
    job(folder / "a", config(), answers())
    job(folder / "b", config(), answers())
    with pytest.raises(DataError, match=r"ELMD with seed 0 is there twice, in .*/demo/a and in .*/demo/b; move one"):
        read_experiment(folder)
    (folder / "b" / "predictions.jsonl").unlink()
    (folder / "b" / "predictions.jsonl").symlink_to(folder / "a" / "predictions.jsonl")
    assert len(read_experiment(folder).runs) == 1


def test_runs_on_other_samples_are_refused(folder: Path) -> None:
    job(folder / "a", config(), answers())
    job(folder / "b", config(seed=1), answers()[:2])
    with pytest.raises(DataError, match="were not run on the same samples"):
        read_experiment(folder)


def test_nothing_to_read_says_what_to_run(folder: Path) -> None:
    with pytest.raises(DataError, match=r"demo: is no folder; name an experiment's folder"):
        read_experiment(folder)
    folder.mkdir(parents=True)
    with pytest.raises(DataError, match=r"holds no run with predictions; name runs/experiments/<name> after"):
        read_experiment(folder)
    sweep(folder, {"job": "a", "status": "failed", "stage": "train", "error": "no data"})
    with pytest.raises(DataError, match=r"no run with predictions \(ELMD, seed 0: failed in train: no data\)"):
        read_experiment(folder)
    (folder / "sweep.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match=r"sweep\.json: is not what elmd\.sweep writes"):
        read_experiment(folder)
    (folder / "sweep.json").unlink()
    (folder / "artifacts.json").write_text("[]", encoding="utf-8")
    with pytest.raises(DataError, match=r"artifacts\.json: is not what elmd\.train writes"):
        read_experiment(folder)
