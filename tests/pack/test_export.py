"""Packing a trained model with its card, and loading it: equal to stage `generate`, and refusing what is not whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

import clips
import elmd.pack.model
import elmd.reply
import elmd.stages.generate
from elmd.cli import compose
from elmd.config import AdapterKind, Config, Decoder, VisionKind
from elmd.data.samples import save_samples
from elmd.engine.files import write_json
from elmd.engine.keys import plain
from elmd.engine.stage import Job
from elmd.errors import ArtifactError, CheckpointError, ClipError, ConfigError, DataError
from elmd.evaluation.predictions import read_predictions
from elmd.export import main
from elmd.models.adapter import Adapter, Lora, Prefix
from elmd.models.elmd import Elmd
from elmd.models.llm import load_llm
from elmd.models.projector import Projector
from elmd.pack import load_pack, to_sample
from elmd.pack.card import model_card
from elmd.pack.folder import file_facts, named_base, read_facts
from elmd.pack.job import read_job
from elmd.pack.packing import export
from elmd.stages import features as features_stage
from elmd.stages import index as index_stage
from elmd.stages.parts import prompt_of
from elmd.types import Clip, Sample
from encoders import make_samples, tiny

#: What each kind of model sets apart from the full one, which reads arrays.
KINDS: dict[str, list[str]] = {
    "full": [],
    "lora": ["eerg.adapter=lora"],
    "projector only": ["eerg.adapter=none"],
    "w/o V": ["vision=none"],
    "w/o ERM": ["retriever=none"],
    "clips": ["vision=tiny", "vision.frames=2", "vision.decoder=pyav", "vision.workers=1"],
    "VisualGLM-style": [
        "vision=tiny", "vision.frames=1", "vision.sampling=random", "vision.decoder=pyav", "vision.workers=1",
        "retriever=none", "eerg.with_emotion=false", "eerg.projector_from=random",
    ],
}  # fmt: skip
WIDTH = 12  # q of the tiny encoder and of the arrays
SECRET = "张三丰"  # a speaker's name, which must not travel


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, llm_folder: Path, trained_folder: Path
) -> Callable[[str], tuple[Path, Config]]:
    """Makes, once, the finished job of a kind: its folder below runs/experiments, and its configuration."""
    root = tmp_path_factory.mktemp("made") / "runs"
    made: dict[str, tuple[Path, Config]] = {}
    media = root / "media"
    media.mkdir(parents=True)
    tiny().save(root / "vision")
    for number in range(2):
        clips.write_video(media / f"{number}.mp4", base=60 * number)
        array = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(number))
        np.save(media / f"{number}.npy", array.numpy())
    samples = []
    for i, sample in enumerate(make_samples(6)):
        u = replace(sample.utterance, speaker=SECRET)
        if i % 4:  # the others have no clip
            u = replace(u, clip=Clip(str(media / f"{i % 2}.mp4")), features=str(media / f"{i % 2}.npy"))
        samples.append(replace(sample, utterance=u, background="两人是朋友。" if i % 2 else None))

    def stage(name: str, manifest: dict[str, Any] | None = None) -> Path:
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "manifest.json", manifest or {})
        return folder

    prepare = stage("prepare/1", {"counts": {"samples": {"train": 16, "valid": 4, "test": 4}}})
    save_samples(prepare / "samples.jsonl", samples)
    leaks = {"shared_dialogues": {"train/test": {"dialogues": 0, "examples": []}}}
    write_json(prepare / "audit.json", {**leaks, "responses_in_train": {"test": {"samples": 4, "exact": 1}}})
    erm = stage("erm/1")
    shutil.copytree(trained_folder, erm / "model")

    def make(kind: str) -> tuple[Path, Config]:
        if kind in made:
            return made[kind]
        number = len(made)
        cfg = compose(
            ["llm=auto", f"llm.path={llm_folder}", "vision=precomputed",
             "generate.max_new_tokens=8", "llm.max_prompt_tokens=400", "cpu=true", *KINDS[kind]]
        )  # fmt: skip
        if cfg.vision.kind is VisionKind.encoder:
            cfg.vision.path = str(root / "vision")
        places = {"prepare": prepare, "erm": erm}
        job = Job(stage(f"features/{number}"), {"prepare": prepare, "erm": erm}, Accelerator(cpu=True))
        if cfg.sees_video:
            features_stage.run(cfg, job)
            places["features"] = job.folder
        if cfg.retrieves:
            places["index"] = stage("index/1")
            index_stage.run(cfg, replace(job, folder=places["index"]))
        places["eerg"] = stage(
            f"eerg/{number}",
            {"seed": 3, "git": {"commit": "c" * 40, "dirty": True}, "versions": {"torch": torch.__version__}},
        )
        torch.manual_seed(number)
        llm, _ = load_llm(llm_folder)
        adapter: Adapter | None = None
        if cfg.eerg.adapter is AdapterKind.prefix:
            adapter = Prefix.create(llm, 4, 0.0)
        elif cfg.eerg.adapter is AdapterKind.lora:
            adapter = Lora.create(llm, 2, 4, 0.0)
            for parameter in adapter.parameters():  # a new LoRA changes nothing
                torch.nn.init.normal_(parameter, std=0.3)
        projector = Projector(WIDTH, 32) if cfg.sees_video else None
        if projector is not None:
            torch.nn.init.normal_(projector.linear.weight)
        Elmd(llm, projector, adapter).save(places["eerg"])
        prompt_of(cfg.prompt).save(places["eerg"] / "prompt.json")
        folder = root / "experiments" / f"job {number}"
        places = {name: Path("../..") / path.relative_to(root) for name, path in places.items()}
        found = {name: path.as_posix() for name, path in places.items()}
        write_json(folder / "artifacts.json", {"config": plain(cfg), "artifacts": found})
        made[kind] = folder, cfg
        return made[kind]

    return make


@pytest.fixture
def full(runs: Callable[[str], tuple[Path, Config]], tmp_path: Path) -> Path:
    return export(runs("full")[0], tmp_path / "pack")


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
    runs: Callable[[str], tuple[Path, Config]], kind: str, temperature: float, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder, cfg = runs(kind)
    pack = export(folder, tmp_path / "pack")
    cfg.generate.temperature, cfg.generate.seeds = temperature, [5]
    found = json.loads((folder / "artifacts.json").read_text(encoding="utf-8"))["artifacts"]
    job = Job(tmp_path, {name: folder / path for name, path in found.items()}, Accelerator(cpu=True))
    theirs = spied(monkeypatch, elmd.stages.generate)
    elmd.stages.generate.run(cfg, job)

    ours = spied(monkeypatch, elmd.pack.model)
    model = load_pack(pack, llm=cfg.llm.path, vision=cfg.vision.path, cpu=True)
    model.cfg.generate.temperature = temperature
    samples = [sample for sample in load(folder) if sample.split == "test"]
    replies = model.reply_all(samples, seed=5)
    assert ours == theirs
    assert any(ours[0]), "there is something to compare"
    told = read_predictions(tmp_path / "predictions.jsonl")
    assert [(r.emotion, r.text, r.demonstration) for r in replies] == [
        (p.predicted_emotion, p.hypothesis, p.demonstration) for p in told
    ]
    assert all((reply.demonstration is not None) == cfg.retrieves for reply in replies)
    assert (pack / "adapter").exists() == (cfg.eerg.adapter is not AdapterKind.none)
    assert (pack / "projector.safetensors").exists() == cfg.sees_video
    if kind == "full":  # each alone, in another order
        alone = [model.reply_all([sample], seed=5)[0] for sample in reversed(samples)]
        assert alone[::-1] == replies


def load(folder: Path) -> list[Sample]:
    from elmd.data.samples import load_samples

    return load_samples(folder / "../../prepare/1/samples.jsonl")


def test_reply_is_reply_all_of_the_same_dialogue(runs: Callable[[str], tuple[Path, Config]], tmp_path: Path) -> None:
    folder, cfg = runs("clips")
    model = load_pack(export(folder, tmp_path / "pack"), llm=cfg.llm.path, vision=cfg.vision.path, cpu=True)
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


def test_clips_are_read_by_what_this_machine_has(
    runs: Callable[[str], tuple[Path, Config]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """decord has no wheels for some machines; its pixels equal PyAV's."""
    pack = export(runs("clips")[0], tmp_path / "pack")
    for installed, decoder in ((True, Decoder.decord), (False, Decoder.pyav)):
        monkeypatch.setattr("elmd.vision.find_spec", lambda _, installed=installed: installed or None)
        assert elmd.pack.model._config(pack, read_facts(pack)).vision.decoder is decoder


def test_clips_are_refused_where_they_would_not_be_seen(
    runs: Callable[[str], tuple[Path, Config]], full: Path, tmp_path: Path
) -> None:
    folder, cfg = runs("w/o V")
    model = load_pack(export(folder, tmp_path / "blind"), llm=cfg.llm.path, cpu=True)
    with pytest.raises(ConfigError, match="was trained without video"):
        model.reply(("甲", "你好"), clip="x.mp4")
    with pytest.raises(ConfigError, match="uses no vision encoder"):
        load_pack(tmp_path / "blind", llm=cfg.llm.path, vision=cfg.llm.path, cpu=True)
    with pytest.raises(ConfigError, match=r"reads feature arrays.*reply_all"):
        load_pack(full, llm=cfg.llm.path, cpu=True).reply(("甲", "你好"), clip="x.mp4")


# -------------------------------------------------------------------------------------------------- what is packed
def test_a_pack_holds_its_listed_files_and_nothing_of_this_machine(full: Path, llm_folder: Path) -> None:
    facts = json.loads((full / "elmd.json").read_text(encoding="utf-8"))
    files = {path.relative_to(full).as_posix() for path in full.rglob("*") if path.is_file()}
    assert files == {*facts["files"], "elmd.json", "README.md"}
    assert {"adapter/adapter_model.safetensors", "projector.safetensors", "prompt.json", "index/samples.jsonl",
            "index/index.safetensors", "retriever/modules.json", "retriever/model.safetensors"} <= files  # fmt: skip
    assert {Path(name).suffix for name in files} <= {".json", ".jsonl", ".safetensors", ".txt", ".md"}
    for name in files:
        content = (full / name).read_bytes()
        assert str(llm_folder.parent).encode() not in content, name
        assert b"/media/" not in content, name
        assert SECRET.encode() not in content, name
        assert not content.startswith(b"\x80"), "a pickle"
    assert set(load_file(full / "index/index.safetensors")) == {"E_s"}, "the key that is searched by"
    assert (facts["format"], facts["seed"], facts["llm"]["hub"]) == (1, 3, False)
    assert [path.name for path in full.parent.iterdir()] == ["pack"], "no work in progress is left"


def test_without_the_index_no_text_travels_and_replies_have_no_demonstration(
    runs: Callable[[str], tuple[Path, Config]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, cfg = runs("full")
    pack = export(folder, tmp_path / "pack", with_index=False)
    assert not (pack / "index").exists()
    assert (pack / "retriever").is_dir()
    text = load(folder)[0].response.text.encode()
    assert not any(text in path.read_bytes() for path in pack.rglob("*") if path.is_file())
    assert "no demonstration" in (pack / "README.md").read_text(encoding="utf-8")
    assert load_pack(pack, llm=cfg.llm.path, cpu=True).reply(("甲", "你好")).demonstration is None


def test_an_earlier_export_is_replaced_and_nothing_else(
    runs: Callable[[str], tuple[Path, Config]], full: Path, tmp_path: Path
) -> None:
    job = runs("full")[0]
    (tmp_path / "other").mkdir()
    export(job, tmp_path / "other")  # empty
    (tmp_path / "other/notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"also holds notes\.txt"):
        export(job, tmp_path / "other")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="exists and is no earlier export"):
        export(job, tmp_path / "thesis")
    assert (tmp_path / "thesis/chapter.txt").read_text() == "mine"
    export(runs("w/o ERM")[0], full)
    assert not (full / "retriever").exists()


def test_a_new_export_keeps_the_license_and_language_of_the_earlier_one(
    runs: Callable[[str], tuple[Path, Config]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job, pack = runs("w/o ERM")[0], tmp_path / "pack"

    def card(**given: Any) -> tuple[str, str]:
        data = ModelCard.load(export(job, pack, **given) / "README.md").data
        return data.license, data.language

    assert card(license="apache-2.0", language="yue") == ("apache-2.0", "yue")
    with caplog.at_level("INFO", "elmd"):
        assert card() == ("apache-2.0", "yue")
    assert "kept from the earlier export: license apache-2.0, language yue" in caplog.text
    assert card(license="mit") == ("mit", "yue")
    assert card(language="zh") == ("mit", "zh")


# ------------------------------------------------------------------------------------------------------------ card
SCORES = {
    "split": "test", "n": 4, "signatures": {}, "predictions": "generate/9/predictions.jsonl",
    "systems": {"ELMD": {
        "n": 4, "paper": {"bleu2_char": 33.6, "rouge1_char": 43.15}, "emotion": {"accuracy": 0.875, "missing": 0},
        "sd": {"paper": {"bleu2_char": 0.65}}, "intervals": {"paper": {"bleu2_char": [32.4, 34.8]}},
    }},
    "floors": {"most common reply": {"n": 4, "paper": {"bleu2_char": 10.8, "rouge1_char": 23.4}}},
}  # fmt: skip


def job_with(source: Path, folder: Path, scores: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A copy of a job's folder with other choices, by dotted key."""
    found = json.loads((source / "artifacts.json").read_text(encoding="utf-8"))
    found["artifacts"] = {name: str((source / path).resolve()) for name, path in found["artifacts"].items()}
    for key, value in changes.items():
        place = found["config"]
        *groups, last = key.split("__")
        for group in groups:
            place = place[group]
        place[last] = value
    if scores is not None:
        found["artifacts"]["generate"] = str(folder / "generate" / "9")
        write_json(folder / "scores.json", scores)
    write_json(folder / "artifacts.json", found)
    return folder


def test_the_card_parses_back_with_its_scores(runs: Callable[[str], tuple[Path, Config]], tmp_path: Path) -> None:
    job = job_with(runs("full")[0], tmp_path / "job", SCORES, llm__path="THUDM/chatglm2-6b")
    with pytest.raises(CheckpointError, match="THUDM/chatglm2-6b"):
        export(job, tmp_path / "pack")  # not to be had offline, and nothing is left
    assert not (tmp_path / "pack").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".pack")]
    job = job_with(runs("full")[0], tmp_path / "job", SCORES)
    card = ModelCard.load(export(job, tmp_path / "pack", license="apache-2.0") / "README.md")
    data = card.data
    assert (data.language, data.license, data.library_name) == ("zh", "apache-2.0", "elmd")
    assert data.datasets is None, "what a data set is called here is no id of the hub"
    assert data.metrics == ["accuracy", "bleu", "rouge"]
    values = {result.metric_name: result.metric_value for result in data.eval_results}
    assert values == {
        "bleu2_char (paper protocol)": 33.6, "rouge1_char (paper protocol)": 43.15,
        "accuracy (emotion of the response)": 0.875,
    }  # fmt: skip
    assert {(r.dataset_name, r.dataset_split) for r in data.eval_results} == {("tiny", "test")}
    for said in (
        "| `bleu2_char` | 33.60 ± 0.65 [32.40, 34.80] | 10.80 |", "floor: most common reply", "load_pack(",
        "| train | 16 |", "word for word a training response: 1 of 4", "Training seed 3", "top-p 0.7",
        "commit cccccccccccc with local changes", "Not for clinical use", "10.1145/3652583.3658104",
        "**This folder holds data.**", "apache-2.0",
    ):  # fmt: skip
        assert said in card.text, said


def test_a_folder_of_the_same_name_does_not_hide_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "THUDM" / "chatglm2-6b").mkdir(parents=True)
    assert named_base({"hub": True, "model": "THUDM/chatglm2-6b"}) == "THUDM/chatglm2-6b"
    assert named_base({"hub": True, "model": "/etc/passwd"}) is None
    assert named_base({"hub": False, "model": "THUDM/chatglm2-6b"}) is None


def test_the_card_names_base_models_of_the_hub(
    runs: Callable[[str], tuple[Path, Config]], full: Path, tmp_path: Path
) -> None:
    facts = json.loads((full / "elmd.json").read_text(encoding="utf-8"))
    facts["llm"] |= {"hub": True, "model": "zai-org/chatglm2-6b", "fingerprint": None}
    model_card(read_job(runs("full")[0]), facts, license=None, language="zh").save(tmp_path / "card.md")
    card = ModelCard.load(tmp_path / "card.md")
    assert card.data.base_model == ["zai-org/chatglm2-6b"]
    assert card.data.base_model_relation == "adapter"
    assert 'load_pack("path/to/this/folder")' in card.text, "it needs no other path"


def test_scores_of_another_training_stay_off_the_card(
    runs: Callable[[str], tuple[Path, Config]], tmp_path: Path
) -> None:
    other = {**SCORES, "predictions": "generate/8/predictions.jsonl"}
    job = job_with(runs("full")[0], tmp_path / "job", other)
    card = ModelCard.load(export(job, tmp_path / "pack") / "README.md")
    assert card.data.eval_results is None
    assert card.data.license == "unknown"
    assert "Not scored when it was exported." in card.text


def test_users_text_stays_text_in_the_card(runs: Callable[[str], tuple[Path, Config]], tmp_path: Path) -> None:
    evil = 'x\n---\nlicense: mit\n<script>alert("{{ 7 * 7 }}")</script> | `a` *b*: [c](d)'
    job = job_with(runs("full")[0], tmp_path / "job", SCORES, data__name=evil, experiment_name=evil)
    pack = export(job, tmp_path / "pack", name=f"我的: {evil}", license=evil)
    card, line = ModelCard.load(pack / "README.md"), " ".join(evil.split())
    assert card.data.license == line
    assert card.data.model_name == f"我的: {line}"
    assert set(card.data.to_dict()) == set(
        ModelCard.load(export(runs("full")[0], tmp_path / "plain") / "README.md").data.to_dict()
    ) | {"metrics", "model-index"}
    assert "<script>" not in card.text
    assert "49" not in card.text.split("## What is in it")[0]
    assert r"\`a\` \*b\*: \[c\](d)" in card.text


# --------------------------------------------------------------------------------------------------- what is refused
def test_what_cannot_be_packed_is_refused_in_a_sentence(
    runs: Callable[[str], tuple[Path, Config]], tmp_path: Path
) -> None:
    source = runs("full")[0]
    with pytest.raises(ArtifactError, match=r"is a sweep of \d+ jobs; name one of them, such as .*job 0"):
        export(source.parent, tmp_path / "pack")
    with pytest.raises(ArtifactError, match="is no folder of a run"):
        export(tmp_path, tmp_path / "pack")
    for name in ("dialogpt", "livebot"):
        job = job_with(source, tmp_path / name, baseline={"name": name})
        with pytest.raises(ConfigError, match=f"{name} is a network of its own"):
            export(job, tmp_path / "pack")
    with pytest.raises(ConfigError, match="permuted among samples"):
        export(job_with(source, tmp_path / "shuffled", vision__shuffle=True), tmp_path / "pack")
    job = job_with(source, tmp_path / "unfinished")
    found = json.loads((job / "artifacts.json").read_text(encoding="utf-8"))
    del found["artifacts"]["eerg"]
    write_json(job / "artifacts.json", found)
    with pytest.raises(ArtifactError, match="stage eerg of this run is not finished"):
        export(job, tmp_path / "pack")
    job = job_with(source, tmp_path / "pickled")
    found = json.loads((job / "artifacts.json").read_text(encoding="utf-8"))
    shutil.copytree(found["artifacts"]["erm"], tmp_path / "erm")
    (tmp_path / "erm/model/pytorch_model.bin").write_bytes(b"\x80")
    write_json(job / "artifacts.json", {**found, "artifacts": {**found["artifacts"], "erm": str(tmp_path / "erm")}})
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: a pack holds no \.bin files"):
        export(job, tmp_path / "pack")
    assert not (tmp_path / "pack").exists()


def test_missing_and_foreign_language_models_are_refused(full: Path, llm_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no part of a pack.*give llm the folder or hub id of auto \(llm"):
        load_pack(full, cpu=True)
    for role in ("llm", "vision"):
        with pytest.raises(CheckpointError, match=rf"none: no such folder; check the path given as {role}\.$"):
            load_pack(tmp_path / "not looked at", **{"llm": llm_folder, role: tmp_path / "none"}, cpu=True)
    with pytest.raises(CheckpointError, match=r"holds no model \(config\.json is missing\); give llm the folder"):
        load_pack(full, llm=tmp_path, cpu=True)
    other = tmp_path / "other"
    shutil.copytree(llm_folder, other)
    weights = load_file(other / "model.safetensors")
    save_file({name: tensor + 0.1 for name, tensor in weights.items()}, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"its weights are not those that elmd-.* was trained with"):
        load_pack(full, llm=other, cpu=True)
    half = {name: tensor.bfloat16() for name, tensor in weights.items()}
    names = sorted(half)
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: half[name] for name in part}, other / f"part-{number}.safetensors", {"format": "pt"})
    where = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(names)}
    write_json(other / "model.safetensors.index.json", {"metadata": {}, "weight_map": where})
    (other / "model.safetensors").unlink()
    load_pack(full, llm=other, cpu=True)  # the same weights, stored in halves and in other files
    config = json.loads((other / "config.json").read_text(encoding="utf-8"))
    write_json(other / "config.json", {**config, "num_hidden_layers": 1})
    with pytest.raises(CheckpointError, match=r"is not the language model .* was trained with \(layers 1 for 2\)"):
        load_pack(full, llm=other, cpu=True)


def test_another_vision_encoder_is_refused(runs: Callable[[str], tuple[Path, Config]], tmp_path: Path) -> None:
    folder, cfg = runs("clips")
    pack = export(folder, tmp_path / "pack")
    tiny(seed=1).save(tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"its weights are not those.*give vision"):
        load_pack(pack, llm=cfg.llm.path, vision=tmp_path / "other", cpu=True)


def test_a_stand_in_is_named_by_its_artifact(
    runs: Callable[[str], tuple[Path, Config]], llm_folder: Path, tmp_path: Path
) -> None:
    folder, cfg = runs("clips")
    job = job_with(folder, tmp_path / "job", llm__path="bootstrap", vision__path="bootstrap")
    found = json.loads((job / "artifacts.json").read_text(encoding="utf-8"))
    shutil.copytree(llm_folder, tmp_path / "runs/bootstrap/llm/17fd")
    shutil.copytree(str(cfg.vision.path), tmp_path / "runs/bootstrap/vision/43e2")
    for role, name in (("llm", "17fd"), ("vision", "43e2")):
        found["artifacts"][f"bootstrap/{role}"] = str(tmp_path / "runs/bootstrap" / role / name)
    write_json(job / "artifacts.json", found)
    pack = export(job, tmp_path / "pack")
    with pytest.raises(CheckpointError, match="give llm the folder of artifact bootstrap/llm/17fd under the runs/ it"):
        load_pack(pack, cpu=True)
    model = load_pack(pack, llm=tmp_path / "runs/bootstrap/llm/17fd", cpu=True)
    with pytest.raises(
        CheckpointError, match="give vision the folder of artifact bootstrap/vision/43e2 under the runs/"
    ):
        model.reply(("甲", "你好"), clip=folder / "../../media/1.mp4")
    assert "| tiny (bootstrap/vision/43e2); not packed" in (pack / "README.md").read_text(encoding="utf-8")
    assert str(tmp_path) not in (pack / "elmd.json").read_text(encoding="utf-8")


def change(pack: Path, **facts: Any) -> None:
    found = json.loads((pack / "elmd.json").read_text(encoding="utf-8"))
    write_json(pack / "elmd.json", {**found, **facts})


def test_a_pack_that_is_not_whole_or_leads_elsewhere_is_refused(full: Path, llm_folder: Path, tmp_path: Path) -> None:
    def refused(message: str, error: type[Exception] = CheckpointError) -> None:
        with pytest.raises(error, match=message):
            load_pack(full, llm=llm_folder, cpu=True)

    kept = json.loads((full / "elmd.json").read_text(encoding="utf-8"))
    files = kept["files"]
    (full / "adapter/adapter_model.bin").write_bytes(b"\x80")
    refused(r"holds adapter/adapter_model\.bin, which elmd\.json does not list")
    (full / "adapter/adapter_model.bin").unlink()
    (tmp_path / "outside.json").write_text("{}")
    for name in ("../outside.json", str(tmp_path / "outside.json"), "run.py"):
        change(full, files={**files, name: {"bytes": 2, "sha256": ""}})
        refused("which no pack has")
    change(full, files={**files, "gone.json": {"bytes": 2, "sha256": ""}})
    refused("gone.json is missing")
    for config, message in (
        ({"generate": {"top_p": 7.0}}, "out of range"),
        ({"llm": {"path": "${oc.env:HOME}"}}, "refers to something outside"),
        ({"vision": {"frames": "many"}}, "cannot be read"),
        ({"launch": 1}, "cannot be read"),
    ):
        change(full, files=files, config={**kept["config"], **config})
        refused(message)
    change(full, config=kept["config"], format=2)
    refused("update ELMD", ConfigError)
    change(full, format=1)
    modules = full / "retriever/modules.json"
    old = modules.read_text(encoding="utf-8")
    modules.write_text(old.replace('"1_Pooling"', '"../../x"'), encoding="utf-8")
    refused(r"modules\.json is not as it was packed")
    change(full, files={**files, "retriever/modules.json": file_facts(modules)})
    refused("leads to")
    (full / "elmd.json").write_text("[]")
    refused("is no packed model")
    with pytest.raises(CheckpointError, match="no such folder"):
        load_pack(tmp_path / "nothing", cpu=True)
    with pytest.raises(CheckpointError, match=r"as a hub id it cannot be had.*download the repository"):
        load_pack("somebody/elmd-test", cpu=True)


def test_a_hub_repository_is_loaded_from_its_data_files_alone(
    full: Path, llm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (full / "adapter/adapter_model.bin").write_bytes(b"\x80")
    (full / "modeling.py").write_text("raise SystemExit")
    asked = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append(name)
        for path in full.rglob("*"):
            inside = path.relative_to(full).as_posix()
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


def test_the_language_model_of_the_hub_is_taken_where_the_pack_names_one(full: Path) -> None:
    base = json.loads((full / "elmd.json").read_text(encoding="utf-8"))["llm"]
    change(full, llm={**base, "hub": True, "model": "somebody/llm"})
    with pytest.raises(
        CheckpointError, match=r"somebody/llm: is no folder, and as a hub id it cannot be loaded.*; give llm"
    ):
        load_pack(full, cpu=True)  # offline here
    change(full, llm={**base, "hub": True, "model": "../llm"})
    with pytest.raises(CheckpointError, match="is no part of a pack"):
        load_pack(full, cpu=True)


# ------------------------------------------------------------------------------------------------------- commands
def test_the_commands(
    runs: Callable[[str], tuple[Path, Config]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    job, cfg = runs("full")
    monkeypatch.delenv("ELMD_DEBUG", raising=False)

    def call(action: Callable[[], None], *arguments: Any) -> tuple[str, str]:
        monkeypatch.setattr("sys.argv", ["elmd", *map(str, arguments)])
        action()
        return capsys.readouterr()

    out, told = call(main, job, "--out", tmp_path / "pack", "--name", "Mine")
    assert out == f"artifact: {tmp_path / 'pack'}\n"
    assert "stay under the license of the data set" in " ".join(told.split())
    (tmp_path / "history.json").write_text('[["A", "在吗？"], ["B", "怎么了？"]]', encoding="utf-8")
    arguments = [tmp_path / "pack", "--llm", cfg.llm.path, "--history", tmp_path / "history.json", "--cpu"]
    out, _ = call(elmd.reply.main, *arguments, "--utterance", "我好开心！", "--seed", 4)
    reply = load_pack(tmp_path / "pack", llm=cfg.llm.path, cpu=True).reply(
        ("A", "我好开心！"), [("A", "在吗？"), ("B", "怎么了？")], seed=4
    )
    assert out == f"{reply.emotion or '–'}\t{' '.join(reply.text.split())}\n"
    (tmp_path / "history.json").write_text('["A", "在吗？"]', encoding="utf-8")
    with pytest.raises(SystemExit):
        call(elmd.reply.main, *arguments, "--utterance", "你好")
    assert "history.json: is no list of turns" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        call(elmd.reply.main, tmp_path / "pack", "--utterance", "你好", "--clip", tmp_path / "nothere.mp4")
    assert "nothere.mp4: there is no such clip; check the path." in capsys.readouterr().err
    with pytest.raises(SystemExit):
        call(main, tmp_path, "--out", tmp_path / "pack2")
    told = capsys.readouterr().err
    assert "is no folder of a run" in told
    assert "Traceback" not in told
