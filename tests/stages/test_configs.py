"""The configuration directory: everything composes, ablations differ in their declared keys only, errors are told."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT
from elmd.cli import compose, cpu_threads
from elmd.config import Config, Key
from elmd.engine.keys import described, plain
from elmd.errors import ConfigError

CONFIGS = ROOT / "configs"
EXPERIMENTS = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))
GIVEN = ["data.path=x", "llm.path=x", "vision.path=x"]  # what no experiment can know

#: What each ablation of Table 3 may change, and to what.
DECLARED = {
    "no_erm": {"retriever.k": 0},
    "no_ert": {"erm.emotion_weight": 0.0},
    "no_ssc": {"erm.separation_weight": 0.0, "retriever.key": "e_u"},
    "no_v": {"vision.kind": "none"},
    "no_rep": {"eerg.projector_from": "random"},
}


def flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, inner in value.items():
        values |= flat(inner, f"{prefix}{key}.") if isinstance(inner, dict) else {prefix + key: inner}
    return values


def test_the_directory_is_not_empty() -> None:
    assert len(EXPERIMENTS) == 15
    assert {path.stem for path in (CONFIGS / "ablation").glob("*.yaml")} == {"none", *DECLARED}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes(name: str) -> None:
    cfg = compose([f"experiment={name}", *GIVEN])
    assert cfg.experiment_name == name
    head = (CONFIGS / "experiment" / f"{name}.yaml").read_text(encoding="utf-8")
    assert re.search(rf"-m elmd\.(train|sweep) (-m )?experiment={name}\b", head), "opens with the command"
    for word in ("Hardware and time", "Held against"):
        assert word in head.partition("defaults:")[0], f"opens with {word}"


@pytest.mark.parametrize("group", ["data", "llm", "vision", "retriever", "prompt", "baseline"])
def test_every_choice_of_every_group_composes(group: str) -> None:
    choices = sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))
    assert len(choices) >= 2
    for choice in choices:
        extra = ["baseline=livebot_tiny"] if choice == "resnet" else []
        cfg = compose([f"{group}={choice}", *extra, *GIVEN])
        if group not in ("prompt", "baseline"):
            assert getattr(cfg, group).name == choice


@pytest.mark.parametrize("experiment", ["demo", "table2_m3ed", "cped_tiny"])
@pytest.mark.parametrize("ablation", DECLARED)
def test_ablations_differ_in_declared_keys_only(experiment: str, ablation: str) -> None:
    full = flat(plain(compose([f"experiment={experiment}", *GIVEN])))
    without = flat(plain(compose([f"experiment={experiment}", f"ablation={ablation}", *GIVEN])))
    assert full.keys() == without.keys()
    changed = {key: without[key] for key in full if full[key] != without[key]}
    expected = DECLARED[ablation] | {"ablation_name": ablation}
    if experiment == "cped_tiny":  # text only from the start
        expected.pop("vision.kind", None)
    assert changed == expected


@pytest.mark.parametrize("experiment", ["demo", "table2_m3ed", "cped_tiny"])
def test_visualglm_is_elmd_configured_otherwise(experiment: str) -> None:
    full = flat(plain(compose([f"experiment={experiment}", *GIVEN])))
    other = flat(plain(compose([f"experiment={experiment}", "baseline=visualglm", *GIVEN])))
    assert {key: other[key] for key in full if full[key] != other[key]} == {
        "baseline.name": "visualglm",
        "vision.frames": 1,
        "vision.sampling": "random",
        "retriever.k": 0,
        "eerg.projector_from": "random",
        "eerg.with_emotion": False,
    }


@pytest.mark.parametrize(
    ("choices", "threads"),
    [
        (["experiment=demo"], 1),
        (["experiment=cped_tiny"], 1),
        (["experiment=demo_table2", "baseline=livebot_tiny"], 1),
        (["experiment=demo", "threads=2"], 2),
        (["experiment=table2_m3ed"], None),
        (["experiment=table2_m3ed", "threads=4"], 4),
    ],
)
def test_tiny_models_run_with_one_thread_unless_told_otherwise(choices: list[str], threads: int | None) -> None:
    for command in ("train", "evaluate"):
        given = GIVEN if "experiment=table2_m3ed" in choices else ["data.path=x"]
        assert cpu_threads(compose([*choices, *given], command)) == threads


@pytest.mark.parametrize("ablation", DECLARED)
def test_ablations_survive_what_an_experiment_sets(ablation: str, tmp_path: Path) -> None:
    """An experiment that sets the very keys must still be overruled by the ablation, which comes after it."""
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\nretriever: {k: 3, key: E_s}\nerm: {emotion_weight: 2.0, separation_weight: 2.0}\n"
        "vision: {kind: encoder}\neerg: {projector_from: rep}\n"
    )
    cfg = compose([f"hydra.searchpath=[file://{tmp_path}]", "experiment=mine", f"ablation={ablation}", *GIVEN])
    values = flat(plain(cfg))
    assert {key: values[key] for key in DECLARED[ablation]} == DECLARED[ablation]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data=cped"], "data.path: data=cped has no source; get it from github.com/scutcyr/CPED, then data.path="),
        (["llm=chatglm2_6b"], "llm.path: llm=chatglm2_6b names no checkpoint"),
        (["bootstrap.text=data"], "bootstrap.text=data needs a data set of its own"),
        (["erm.separation_weight=0"], "retriever.key: E_s is the output of self-separation"),
        (
            ["erm.emotion_weight=0", "erm.separation_weight=0", "retriever.key=e_u"],
            "both losses of eq. 4 have weight 0",
        ),
        (["vision.sampling=random"], "vision.frames: sampling=random takes one frame, not 4; set vision.frames=1"),
        (["baseline=dialogpt_tiny", "stage=rep"], "stage: baseline=dialogpt has no stage rep; use stage=baseline"),
        (["vision.kind=resnet"], "vision.kind: ResNet's features are for Livebot"),
        (["generate.seeds=[]"], "generate.seeds: there is no seed to decode with; use [0], or several."),
    ],
)
def test_contradictions_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        compose(overrides)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("threads=0", "threads: 0 is out of range; use 1 or more."),
        ("data.world.train=0", "data.world.train: 0 is out of range; use 1 or more."),
        ("vision.frames=0", "vision.frames: 0 is out of range; use 1 or more."),
        ("vision.workers=-1", "vision.workers: -1 is out of range; use 0 or more."),
        ("vision.timeout_s=0", "vision.timeout_s: 0.0 is out of range; use more than 0."),
        ("vision.batch_frames=0", "vision.batch_frames: 0 is out of range; use 1 or more."),
        ("retriever.k=-1", "retriever.k: -1 is out of range; use 0 or more."),
        ("retriever.max_tokens=0", "retriever.max_tokens: 0 is out of range; use 1 or more."),
        ("llm.max_prompt_tokens=0", "llm.max_prompt_tokens: 0 is out of range; use 1 or more."),
        ("llm.max_target_tokens=1", "llm.max_target_tokens: 1 is out of range; use 2 or more."),
        ("bootstrap.dialogues=1", "bootstrap.dialogues: 1 is out of range; use 2 or more."),
        ("bootstrap.llm_hidden=96", "bootstrap.llm_hidden: 96 is out of range; use a multiple of 64."),
        ("bootstrap.vision_hidden=0", "bootstrap.vision_hidden: 0 is out of range; use a multiple of 4."),
        ("erm.batch_size=1", "erm.batch_size: 1 is out of range; use 2 or more."),
        ("erm.temperature=0", "erm.temperature: 0.0 is out of range; use more than 0."),
        ("erm.temperature=nan", "erm.temperature: nan is out of range; use more than 0."),
        ("erm.emotion_weight=-1", "erm.emotion_weight: -1.0 is out of range; use 0 or more."),
        ("erm.warmup=1.5", "erm.warmup: 1.5 is out of range; use 0 to 1."),
        ("rep.epochs=0", "rep.epochs: 0 is out of range; use 1 or more."),
        ("rep.batch_size=0", "rep.batch_size: 0 is out of range; use 1 or more."),
        ("rep.lr=-1", "rep.lr: -1.0 is out of range; use 0 or more."),
        ("rep.max_grad_norm=0", "rep.max_grad_norm: 0.0 is out of range; use more than 0."),
        ("eerg.steps=-1", "eerg.steps: -1 is out of range; use 0 or more."),
        ("eerg.micro_tokens=0", "eerg.micro_tokens: 0 is out of range; use 1 or more."),
        ("eerg.evaluate_every=0", "eerg.evaluate_every: 0 is out of range; use 1 or more."),
        ("eerg.checkpoint_every=0", "eerg.checkpoint_every: 0 is out of range; use 1 or more."),
        ("eerg.prefix_length=0", "eerg.prefix_length: 0 is out of range; use 1 or more."),
        ("eerg.prefix_dropout=1", "eerg.prefix_dropout: 1.0 is out of range; use 0 to less than 1."),
        ("generate.top_p=0", "generate.top_p: 0.0 is out of range; use more than 0 to 1."),
        ("generate.top_p=1.1", "generate.top_p: 1.1 is out of range; use more than 0 to 1."),
        ("generate.temperature=-1", "generate.temperature: -1.0 is out of range; use 0 or more."),
        ("generate.max_new_tokens=0", "generate.max_new_tokens: 0 is out of range; use 1 or more."),
        ("generate.batch_tokens=0", "generate.batch_tokens: 0 is out of range; use 1 or more."),
    ],
)
def test_numbers_out_of_range_are_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        compose([override])
    assert str(error.value) == message


@pytest.mark.parametrize(
    "overrides",
    [
        ["eerg.steps=0", "erm.epochs=0"],  # only evaluate
        ["rep.lr=0", "eerg.lr_adapter=0", "eerg.warmup=1"],
        ["generate.temperature=0", "generate.top_p=1"],
        ["eerg.lora_rank=0", "eerg.lora_dropout=1"],  # of an adapter that is not chosen
        ["eerg.adapter=lora", "eerg.prefix_length=0"],
        ["eerg.adapter=none", "eerg.prefix_length=0", "eerg.lora_rank=0"],
    ],
)
def test_numbers_at_the_edge_are_taken(overrides: list[str]) -> None:
    compose(overrides)


def test_an_adapter_that_is_chosen_is_checked() -> None:
    with pytest.raises(ConfigError, match=r"^eerg\.lora_rank: 0 is out of range; use 1 or more\.$"):
        compose(["eerg.adapter=lora", "eerg.lora_rank=0"])


def test_every_number_of_the_configuration_has_a_range() -> None:
    numbers = {key for key, value in flat(plain(compose(GIVEN))).items() if type(value) in (int, float)}
    assert {key for key, info in described(Config) if info.range} - {"threads"} == {
        key for key in numbers if not key.endswith("seed")
    }


def test_values_of_the_paper_stand_in_the_paper_presets() -> None:
    cfg = compose(["experiment=table2_m3ed", *GIVEN])
    assert (cfg.erm.slots, cfg.erm.lr, cfg.erm.batch_size, cfg.erm.temperature) == (4, 5e-5, 32, 0.5)  # §4.3
    assert (cfg.rep.batch_size, cfg.rep.lr) == (16, 2e-5)
    assert (cfg.eerg.batch_size, cfg.eerg.lr_adapter, cfg.eerg.lr_projector) == (16, 2e-2, 2e-2)
    assert (cfg.generate.top_p, cfg.generate.temperature) == (0.7, 0.95)
    assert (cfg.retriever.k, cfg.retriever.key, cfg.retriever.allow_same_dialogue) == (1, Key.E_s, False)
    assert (cfg.eerg.steps, cfg.eerg.prefix_length, cfg.vision.frames) == (3000, 128, 8)


def command(*arguments: str, cwd: Path, module: str = "elmd.train") -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "ELMD_DEBUG"}
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_help_lists_stages_groups_and_choices(tmp_path: Path) -> None:
    done = command("--help", cwd=tmp_path)
    assert done.returncode == 0
    for word in (
        "stage: bootstrap prepare erm index features rep eerg baseline all",
        "ablation: no_erm",
        "chatglm2_6b",
        "m3ed",
    ):
        assert word in done.stdout, word


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("elmd.evaluate", ["python -m elmd.evaluate predictions=FILE.jsonl", "accelerate is no group", "== Often"]),
        ("elmd.doctor", ["python -m elmd.doctor [", "what of it is missing", "chatglm2_6b", "Exit code 1"]),
    ],
)
def test_each_command_has_help_of_its_own(module: str, words: list[str], tmp_path: Path) -> None:
    done = command("--help", cwd=tmp_path, module=module)
    assert done.returncode == 0
    for word in words:
        assert word in done.stdout, word
    assert "stage=STAGE" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stage=reap"], "error: stage: Invalid value 'reap', expected one of [bootstrap, prepare,"),
        (["data=cpde"], "error: data: there is no choice 'cpde'; choose from cped, jsonl, m3ed, tiny."),
        (["erm.epoch=3"], "error: configuration: there is no key 'erm.epoch'; did you mean erm.epochs."),
        (["+erm.epoch=3"], "error: configuration: there is no key 'erm.epoch'; did you mean erm.epochs."),
        (["erm.epochs=many"], "error: erm.epochs: Value 'many' of type 'str' could not be converted to Integer"),
        (["rep.select_on=test"], "expected one of [train, valid]"),
        (["data=m3ed"], "error: data.path: data=m3ed has no source"),
    ],
)
def test_mistakes_on_the_command_line_are_told_in_short(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = command(*arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1, "one sentence"
    assert not any(tmp_path.iterdir()), "nothing is left behind"


def test_doctor_names_what_is_missing(tmp_path: Path) -> None:
    done = command("experiment=table2_m3ed", "data.path=m3ed", cwd=tmp_path, module="elmd.doctor")
    assert done.returncode == 1
    for word in (
        "llm.path: llm=chatglm2_6b names no",
        "data.video_root: no folder",
        "m3ed: not there",
        "things missing",
    ):
        assert word in " ".join(done.stderr.split()), word
    done = command("experiment=demo", cwd=tmp_path, module="elmd.doctor")
    assert done.returncode == 0, done.stderr
    assert "Nothing is missing" in done.stderr


def test_evaluate_scores_any_predictions_file(tmp_path: Path) -> None:
    good = tmp_path / "mine.jsonl"
    good.write_text('{"id": "a", "hypothesis": "你好。", "reference": "你好吗？"}\n', encoding="utf-8")
    done = command(f"predictions={good}", cwd=tmp_path, module="elmd.evaluate")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / done.stdout.strip().removeprefix("artifact: ")
    assert {path.name for path in folder.iterdir()} == {"scores.json", "scores.md", "scores.csv", "scores.tex"}
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"id": "a", "hypothesis": "你好。"}\n', encoding="utf-8")
    before = sorted(tmp_path.rglob("*"))
    done = command(f"predictions={broken}", cwd=tmp_path, module="elmd.evaluate")
    assert done.returncode == 1
    assert f"error: {broken}:1: lacks 'reference'" in done.stderr
    assert sorted(tmp_path.rglob("*")) == before, "nothing is left behind"
