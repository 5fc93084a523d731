"""Finished jobs of every kind of model, for the tests of packs: random weights, real stages' files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

import clips
from elmd.cli import compose
from elmd.config import AdapterKind, Config, VisionKind
from elmd.data.samples import load_samples, save_samples
from elmd.engine.files import write_json
from elmd.engine.keys import plain
from elmd.engine.stage import Job
from elmd.models.adapter import Adapter, Lora, Prefix
from elmd.models.elmd import Elmd
from elmd.models.llm import load_llm
from elmd.models.projector import Projector
from elmd.pack.packing import export
from elmd.pack.trained import read_trained
from elmd.stages import STAGES
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


#: Makes, once, the finished job of a kind: its folder below runs/experiments, and its configuration.
Runs = Callable[[str], tuple[Path, Config]]

SCORES = {
    "split": "test", "n": 4, "signatures": {}, "predictions": "generate/9/predictions.jsonl",
    "systems": {"ELMD": {
        "n": 4, "paper": {"bleu2_char": 33.6, "rouge1_char": 43.15}, "emotion": {"accuracy": 0.875, "missing": 0},
        "sd": {"paper": {"bleu2_char": 0.65}}, "intervals": {"paper": {"bleu2_char": [32.4, 34.8]}},
    }},
    "floors": {"most common reply": {"n": 4, "paper": {"bleu2_char": 10.8, "rouge1_char": 23.4}}},
}  # fmt: skip


def make_runs(root: Path, llm_folder: Path, trained_folder: Path) -> Runs:
    """
    Args:
        root: where runs/ will be.
        llm_folder, trained_folder: of the language model and the trained retriever.
    """
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
        artifacts = {name: path.as_posix() for name, path in places.items()}
        roles = {stage.role: name for name, stage in STAGES.items() if stage.applies(cfg)}
        about = {"config": plain(cfg), "artifacts": artifacts, "roles": roles, "axes": None}
        write_json(folder / "artifacts.json", about)
        made[kind] = folder, cfg
        return made[kind]

    return make


def pack_of(job: Path, out: Path, *args: Any, **given: Any) -> Path:
    """The pack of a job's folder, see `export`."""
    return export(read_trained(job), out, *args, **given)


def samples_of(job: Path) -> list[Sample]:
    return load_samples(job / "../../prepare/1/samples.jsonl")


def job_with(source: Path, folder: Path, scores: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A copy of a job's folder with other choices, by dotted key with `__` for the dot; `artifacts` adds some."""
    about = json.loads((source / "artifacts.json").read_text(encoding="utf-8"))
    artifacts = {name: str((source / path).resolve()) for name, path in about["artifacts"].items()}
    about["artifacts"] = artifacts | changes.pop("artifacts", {})
    for key, value in changes.items():
        group = about["config"]
        *groups, last = key.split("__")
        for name in groups:
            group = group[name]
        group[last] = value
    if scores is not None:
        write_json(folder / "generate/9/manifest.json", {})
        about["artifacts"]["generate"] = str(folder / "generate/9")
        write_json(folder / "scores.json", scores)
    write_json(folder / "artifacts.json", about)
    return folder


def change(pack: Path, **facts: Any) -> None:
    """Write other values into a pack's facts."""
    before = json.loads((pack / "elmd.json").read_text(encoding="utf-8"))
    write_json(pack / "elmd.json", {**before, **facts})
