"""A loaded pack replies as stage `generate` does, and refuses what is not whole or not what it was trained with."""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

import clips
import elmd.models.decode
import elmd.pack.model
import elmd.reply
import elmd.stages.generate
from elmd.config import AdapterKind, Decoder
from elmd.engine.files import write_json
from elmd.engine.stage import Job
from elmd.errors import CheckpointError, ClipError, ConfigError, DataError
from elmd.evaluation.predictions import read_predictions
from elmd.pack import load_pack, to_sample
from elmd.pack.bases import named_base
from elmd.pack.folder import file_facts, read_facts
from encoders import tiny
from trained_runs import KINDS, Runs, change, job_with, pack_of, samples_of


def spied(monkeypatch: pytest.MonkeyPatch, module: Any) -> list[list[list[int]]]:
    """The ids of every later call of `generate` in a module."""
    seen: list[list[list[int]]] = []
    true = module.generate_all

    def generate(*args: Any, **settings: Any) -> Any:
        seen.append(true(*args, **settings))
        return seen[-1]

    monkeypatch.setattr(module, "generate_all", generate)
    return seen


# ------------------------------------------------------------------------------------------------ equal to generate
@pytest.mark.parametrize("temperature", [0.0, 0.95])
@pytest.mark.parametrize("kind", KINDS)
def test_a_pack_gives_the_ids_of_stage_generate(
    runs: Runs, kind: str, temperature: float, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder, cfg = runs(kind)
    pack = pack_of(folder, tmp_path / "pack")
    cfg.generate.temperature, cfg.generate.seeds = temperature, [5]
    artifacts = json.loads((folder / "artifacts.json").read_text(encoding="utf-8"))["artifacts"]
    upstream = {name: folder / path for name, path in artifacts.items()}
    job = Job(tmp_path, {**upstream, "generator": upstream["eerg"]}, Accelerator(cpu=True))
    theirs = spied(monkeypatch, elmd.models.decode)
    elmd.stages.generate.run(cfg, job)

    ours = spied(monkeypatch, elmd.pack.model)
    model = load_pack(pack, llm=cfg.llm.path, vision=cfg.vision.path, cpu=True)
    model.cfg.generate.temperature = temperature
    samples = [sample for sample in samples_of(folder) if sample.split == "test"]
    replies = model.reply_all(samples, seed=5)
    assert ours == theirs
    assert any(ours[0]), "there is something to compare"
    predictions = read_predictions(tmp_path / "predictions.jsonl")
    assert [(r.emotion, r.text, r.demonstration) for r in replies] == [
        (p.predicted_emotion, p.hypothesis, p.demonstration) for p in predictions
    ]
    assert all((reply.demonstration is not None) == cfg.retrieves for reply in replies)
    assert (pack / "adapter").exists() == (cfg.eerg.adapter is not AdapterKind.none)
    assert (pack / "projector.safetensors").exists() == cfg.sees_video
    if kind == "full":  # each alone, in another order
        alone = [model.reply_all([sample], seed=5)[0] for sample in reversed(samples)]
        assert alone[::-1] == replies


def test_reply_is_reply_all_of_the_same_dialogue(runs: Runs, tmp_path: Path) -> None:
    folder, cfg = runs("clips")
    model = load_pack(pack_of(folder, tmp_path / "pack"), llm=cfg.llm.path, vision=cfg.vision.path, cpu=True)
    clip = folder / "../../media/1.mp4"
    history = [("甲", "在吗？"), ("乙", "怎么了？"), ("甲", "你听我说。")]
    seen = model.reply(("甲", "我好开心！"), history, clip=clip, background="两人是朋友。", seed=2)
    sample = to_sample(("甲", "我好开心！"), history, clip=clip, background="两人是朋友。")
    assert [turn.text for turn in sample.history] == ["在吗？", "怎么了？"]
    assert sample.utterance.text == "你听我说。 我好开心！", "one speaker's sentences are one turn, as in training"
    assert sample.response.speaker == "乙"
    assert [seen] == model.reply_all([sample], seed=2)
    assert model.reply_all([]) == []
    clips.cut_half(clip, tmp_path / "half.mp4")
    with pytest.raises(ClipError, match=r"half\.mp4"):
        model.reply(("甲", "你好"), clip=tmp_path / "half.mp4")
    with pytest.raises(DataError, match="two samples have the same id"):
        model.reply_all([sample, sample])
    with pytest.raises(DataError, match="nothing to reply to"):
        model.reply(("甲", " "))
    for wrong in ("x", [("甲", "在吗？", "乙")], ["在吗"], [("甲", 1)], {"甲": "在吗？"}, 5):
        with pytest.raises(DataError, match=r"^history: is no list of turns.*; give \[\["):
            model.reply(("甲", "你好"), history=wrong)  # type: ignore[arg-type]
    for lone in ("你好", ("甲",), ("甲", None)):
        with pytest.raises(DataError, match=r"^utterance: is no pair of texts; give \(speaker, text\)"):
            model.reply(lone)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="甲 cannot reply to 甲"):
        model.reply(("甲", "你好"), responder="甲")
    blind = load_pack(tmp_path / "pack", llm=cfg.llm.path, cpu=True)
    assert blind.reply(("甲", "你好")).text == model.reply(("甲", "你好")).text, "no clip, no vision encoder"
    with pytest.raises(CheckpointError, match=r"a clip needs the vision encoder.*give vision"):
        blind.reply(("甲", "你好"), clip=clip)
    with pytest.raises(ClipError, match=r"^nothere\.mp4: there is no such clip; check the path\.$"):
        blind.reply(("甲", "你好"), clip="nothere.mp4")


def test_clips_are_read_by_what_this_machine_has(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """decord has no wheels for some machines; its pixels equal PyAV's."""
    pack = pack_of(runs("clips")[0], tmp_path / "pack")
    for installed, decoder in ((True, Decoder.decord), (False, Decoder.pyav)):
        monkeypatch.setattr("elmd.vision.find_spec", lambda _, installed=installed: installed or None)
        assert elmd.pack.model._config(pack, read_facts(pack)).vision.decoder is decoder


def test_clips_are_refused_where_they_would_not_be_seen(runs: Runs, full_pack: Path, tmp_path: Path) -> None:
    folder, cfg = runs("w/o V")
    model = load_pack(pack_of(folder, tmp_path / "blind"), llm=cfg.llm.path, cpu=True)
    with pytest.raises(ConfigError, match="was trained without video"):
        model.reply(("甲", "你好"), clip="x.mp4")
    with pytest.raises(ConfigError, match="uses no vision encoder"):
        load_pack(tmp_path / "blind", llm=cfg.llm.path, vision=cfg.llm.path, cpu=True)
    with pytest.raises(ConfigError, match=r"reads feature arrays.*reply_all"):
        load_pack(full_pack, llm=cfg.llm.path, cpu=True).reply(("甲", "你好"), clip="x.mp4")


def test_a_folder_of_the_same_name_does_not_hide_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "THUDM" / "chatglm2-6b").mkdir(parents=True)
    assert named_base({"hub": True, "model": "THUDM/chatglm2-6b"}) == "THUDM/chatglm2-6b"
    assert named_base({"hub": True, "model": "/etc/passwd"}) is None
    assert named_base({"hub": False, "model": "THUDM/chatglm2-6b"}) is None


def test_missing_and_foreign_language_models_are_refused(full_pack: Path, llm_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no part of a pack.*give llm the folder or hub id of auto \(llm"):
        load_pack(full_pack, cpu=True)
    for role in ("llm", "vision"):
        with pytest.raises(CheckpointError, match=rf"none: no such folder; check the path given as {role}\.$"):
            load_pack(tmp_path / "not looked at", **{"llm": llm_folder, role: tmp_path / "none"}, cpu=True)
    with pytest.raises(CheckpointError, match=r"holds no model \(config\.json is missing\); give llm the folder"):
        load_pack(full_pack, llm=tmp_path, cpu=True)
    other = tmp_path / "other"
    shutil.copytree(llm_folder, other)
    weights = load_file(other / "model.safetensors")
    save_file({name: tensor + 0.1 for name, tensor in weights.items()}, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"its weights are not those that elmd-.* was trained with"):
        load_pack(full_pack, llm=other, cpu=True)
    half = {name: tensor.bfloat16() for name, tensor in weights.items()}
    names = sorted(half)
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: half[name] for name in part}, other / f"part-{number}.safetensors", {"format": "pt"})
    where = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(names)}
    write_json(other / "model.safetensors.index.json", {"metadata": {}, "weight_map": where})
    (other / "model.safetensors").unlink()
    load_pack(full_pack, llm=other, cpu=True)  # the same weights, stored in halves and in other files
    config = json.loads((other / "config.json").read_text(encoding="utf-8"))
    write_json(other / "config.json", {**config, "num_hidden_layers": 1})
    with pytest.raises(CheckpointError, match=r"is not the language model .* was trained with \(layers 1 for 2\)"):
        load_pack(full_pack, llm=other, cpu=True)


def test_another_vision_encoder_is_refused(runs: Runs, tmp_path: Path) -> None:
    folder, cfg = runs("clips")
    pack = pack_of(folder, tmp_path / "pack")
    tiny(seed=1).save(tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"its weights are not those.*give vision"):
        load_pack(pack, llm=cfg.llm.path, vision=tmp_path / "other", cpu=True)


def test_a_stand_in_is_named_by_its_artifact(runs: Runs, llm_folder: Path, tmp_path: Path) -> None:
    folder, cfg = runs("clips")
    places = {"bootstrap/llm": "runs/bootstrap/llm/17fd", "bootstrap/vision": "runs/bootstrap/vision/43e2"}
    artifacts = {stage: str(tmp_path / place) for stage, place in places.items()}
    shutil.copytree(llm_folder, artifacts["bootstrap/llm"])
    shutil.copytree(str(cfg.vision.path), artifacts["bootstrap/vision"])
    for artifact in artifacts.values():
        write_json(Path(artifact) / "manifest.json", {})
    settings = {"llm__path": "bootstrap", "vision__path": "bootstrap", "artifacts": artifacts}
    job = job_with(folder, tmp_path / "job", **settings)
    pack = pack_of(job, tmp_path / "pack")
    with pytest.raises(CheckpointError, match="give llm the folder of artifact bootstrap/llm/17fd under the runs/ it"):
        load_pack(pack, cpu=True)
    model = load_pack(pack, llm=tmp_path / "runs/bootstrap/llm/17fd", cpu=True)
    with pytest.raises(
        CheckpointError, match="give vision the folder of artifact bootstrap/vision/43e2 under the runs/"
    ):
        model.reply(("甲", "你好"), clip=folder / "../../media/1.mp4")
    assert "| tiny (bootstrap/vision/43e2); not packed" in (pack / "README.md").read_text(encoding="utf-8")
    assert str(tmp_path) not in (pack / "elmd.json").read_text(encoding="utf-8")


def test_a_pack_that_is_not_whole_or_leads_elsewhere_is_refused(
    full_pack: Path, llm_folder: Path, tmp_path: Path
) -> None:
    def refused(message: str, error: type[Exception] = CheckpointError) -> None:
        with pytest.raises(error, match=message):
            load_pack(full_pack, llm=llm_folder, cpu=True)

    kept = json.loads((full_pack / "elmd.json").read_text(encoding="utf-8"))
    files = kept["files"]
    (full_pack / "adapter/adapter_model.bin").write_bytes(b"\x80")
    refused(r"holds adapter/adapter_model\.bin, which elmd\.json does not list")
    (full_pack / "adapter/adapter_model.bin").unlink()
    (tmp_path / "outside.json").write_text("{}")
    for name in ("../outside.json", str(tmp_path / "outside.json"), "run.py"):
        change(full_pack, files={**files, name: {"bytes": 2, "sha256": ""}})
        refused("which no pack has")
    change(full_pack, files={**files, "gone.json": {"bytes": 2, "sha256": ""}})
    refused("gone.json is missing")
    for config, message in (
        ({"generate": {"top_p": 7.0}}, "out of range"),
        ({"llm": {"path": "${oc.env:HOME}"}}, "refers to something outside"),
        ({"vision": {"frames": "many"}}, "cannot be read"),
        ({"launch": 1}, "cannot be read"),
    ):
        change(full_pack, files=files, config={**kept["config"], **config})
        refused(message)
    change(full_pack, config=kept["config"], format=3)
    refused("update ELMD", ConfigError)
    change(full_pack, format=2)
    modules = full_pack / "retriever/modules.json"
    old = modules.read_text(encoding="utf-8")
    modules.write_text(old.replace('"1_Pooling"', '"../../x"'), encoding="utf-8")
    refused(r"modules\.json is not as it was packed")
    change(full_pack, files={**files, "retriever/modules.json": file_facts(modules)})
    refused("leads to")
    (full_pack / "elmd.json").write_text("[]")
    refused("is no packed model")
    with pytest.raises(CheckpointError, match="no such folder"):
        load_pack(tmp_path / "nothing", cpu=True)
    with pytest.raises(CheckpointError, match=r"as a hub id it cannot be had.*download the repository"):
        load_pack("somebody/elmd-test", cpu=True)


def test_a_hub_repository_is_loaded_from_its_data_files_alone(
    full_pack: Path, llm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (full_pack / "adapter/adapter_model.bin").write_bytes(b"\x80")
    (full_pack / "modeling.py").write_text("raise SystemExit")
    asked = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append(name)
        for path in full_pack.rglob("*"):
            inside = path.relative_to(full_pack).as_posix()
            if path.is_file() and any(fnmatch(inside, pattern) for pattern in allow_patterns):
                (tmp_path / "cache" / inside).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, tmp_path / "cache" / inside)
        return str(tmp_path / "cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    model = load_pack("somebody/elmd-test", llm=llm_folder, cpu=True)
    assert asked == ["somebody/elmd-test"]
    assert model.reply(("甲", "你好")) == load_pack(tmp_path / "cache", llm=llm_folder, cpu=True).reply(("甲", "你好"))
    loaded = {path.name for path in (tmp_path / "cache").rglob("*")}
    assert {"adapter_model.bin", "modeling.py"} & loaded == set()
    assert "README.md" in loaded


def test_the_language_model_of_the_hub_is_taken_where_the_pack_names_one(full_pack: Path) -> None:
    base = json.loads((full_pack / "elmd.json").read_text(encoding="utf-8"))["llm"]
    change(full_pack, llm={**base, "hub": True, "model": "somebody/llm"})
    with pytest.raises(
        CheckpointError, match=r"somebody/llm: is no folder, and as a hub id it cannot be loaded.*; give llm"
    ):
        load_pack(full_pack, cpu=True)  # offline here
    change(full_pack, llm={**base, "hub": True, "model": "../llm"})
    with pytest.raises(CheckpointError, match="is no part of a pack"):
        load_pack(full_pack, cpu=True)
