"""What a pack holds beside its card: the files of what was trained, and `elmd.json`."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from elmd.config import BOOTSTRAP
from elmd.data.prompts import Prompt
from elmd.data.samples import load_samples, save_samples
from elmd.engine.files import read_json, write_json
from elmd.engine.hub import is_hub_id
from elmd.errors import CheckpointError
from elmd.models import ADAPTER, PROJECTOR
from elmd.models.llm import open_llm
from elmd.pack.folder import (
    CHOICES,
    ENDINGS,
    FORMAT,
    INDEX,
    PROMPT,
    RETRIEVER,
    TEXTS,
    VISION_PARTS,
    file_facts,
    fingerprint,
    packed_files,
    shape_of,
)
from elmd.pack.job import Trained
from elmd.retrieval.index import Index
from elmd.types import Sample


def pack_files(trained: Trained, folder: Path, with_index: bool) -> bool:
    """Copy what was trained into `folder`; returns whether the index is among it."""
    eerg = trained.need("eerg")
    trained.manifest("eerg")  # finished
    Prompt.load(eerg / PROMPT)
    for name in (PROMPT, PROJECTOR):
        if (eerg / name).is_file():
            shutil.copyfile(eerg / name, folder / name)
    if (eerg / ADAPTER).is_dir():
        _copy_adapter(eerg / ADAPTER, folder / ADAPTER)
    if not (folder / ADAPTER).exists() and not (folder / PROJECTOR).exists():
        raise CheckpointError("holds neither a projector nor an adapter", where=eerg, fix="train it again (stage=eerg)")
    chosen = trained.config["retriever"]
    if chosen["k"] == 0:
        return False
    _copy_tree(trained.need("erm") / "model", folder / RETRIEVER)
    if not with_index:
        return False
    index, key = Index.load(trained.need("index")), chosen["key"]
    Index(index.ids, index.dialogues, {key: index.vectors[key]}).save(folder / INDEX)
    samples = {sample.id: sample for sample in load_samples(trained.need("prepare") / "samples.jsonl")}
    save_samples(folder / TEXTS, [_bare(samples[id]) for id in index.ids])
    return True


def _bare(sample: Sample) -> Sample:
    """An indexed sample with what a demonstration takes of it, and without names and paths."""
    u, r = (
        replace(turn, speaker="", clip=None, features=None, tags=()) for turn in (sample.utterance, sample.response)
    )
    return replace(sample, history=(), background=None, utterance=u, response=r)


def _copy_adapter(source: Path, target: Path) -> None:
    target.mkdir()
    shutil.copyfile(source / "adapter_model.safetensors", target / "adapter_model.safetensors")
    settings = read_json(source / "adapter_config.json")
    settings["base_model_name_or_path"] = None  # a path of this machine; elmd.json names the model
    write_json(target / "adapter_config.json", settings)


def _copy_tree(source: Path, target: Path) -> None:
    for path in sorted(source.rglob("*")):
        if not path.is_file() or path.name.startswith(".") or path.suffix == ".md":
            continue
        if path.suffix not in ENDINGS:
            raise CheckpointError(
                f"a pack holds no {path.suffix or 'such'} files", where=path, fix="train the retriever from safetensors"
            )
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)


def pack_facts(trained: Trained, folder: Path, title: str, indexed: bool) -> dict[str, Any]:
    """The content of `elmd.json`."""
    config, manifest = trained.config, trained.manifest("eerg")
    llm = str(trained.checkpoint("llm"))
    shape = shape_of(*open_llm(llm))
    vision = None
    if config["vision"]["kind"] == "encoder":
        path = str(trained.checkpoint("vision"))
        vision = _base(trained, "vision") | {"fingerprint": fingerprint(path, VISION_PARTS)}
    return {
        "format": FORMAT,
        "name": title,
        # Keys that are younger than the run are left to their defaults, which is what it did.
        "config": {
            group: {key: config[group][key] for key in keys if key in config[group]} for group, keys in CHOICES.items()
        },
        "llm": _base(trained, "llm") | {"fingerprint": fingerprint(llm), "shape": shape},
        "vision": vision,
        "index": indexed,
        "experiment": config["experiment_name"],
        "ablation": config["ablation_name"],
        "baseline": config.get("baseline", {}).get("name", "none"),
        "seed": manifest["seed"],
        "commit": manifest["git"],
        "versions": manifest["versions"],
        "artifacts": {stage: path.name for stage, path in sorted(trained.stages.items())},
        "files": {name: file_facts(folder / name) for name in packed_files(folder)},
    }


def _base(trained: Trained, role: str) -> dict[str, Any]:
    """How others can find a base model: its hub id, or else what this project calls it and its folder's name.

    `artifact` is the place below the run's own runs/ of a stand-in that stage `bootstrap` made, else None.
    """
    chosen, path = trained.config[role], trained.checkpoint(role)
    artifact = f"bootstrap/{role}/{path.resolve().name}" if chosen["path"] == BOOTSTRAP else None
    hub = artifact is None and is_hub_id(str(path))
    model = str(path) if hub else f"{chosen['name']} ({artifact or path.resolve().name})"
    return {"model": model, "hub": hub, "artifact": artifact}
