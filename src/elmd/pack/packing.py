"""Writing a pack: the files of what was trained, `elmd.json` and the model card. docs/sharing_a_model.md shows how.

Importing this takes seconds; `read_trained` and `earlier_export` say before that what is wrong with either folder.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from elmd.config import BOOTSTRAP, Config
from elmd.data.prompts import Prompt
from elmd.data.samples import load_samples, save_samples
from elmd.engine.files import read_json, replace_folder, write_json
from elmd.engine.hub import is_hub_id
from elmd.engine.keys import described
from elmd.errors import CheckpointError
from elmd.log import logger
from elmd.models import ADAPTER, PROJECTOR
from elmd.models.llm import open_llm
from elmd.pack.bases import VISION_PARTS, fingerprint, shape_of
from elmd.pack.card import model_card, one_line
from elmd.pack.folder import (
    CARD,
    ENDINGS,
    FACTS,
    FORMAT,
    INDEX,
    PROMPT,
    RETRIEVER,
    TEXTS,
    earlier_export,
    file_facts,
    packed_files,
)
from elmd.pack.trained import Trained
from elmd.retrieval.index import Index
from elmd.types import Sample


def export(
    trained: Trained,
    out: Path,
    name: str | None = None,
    license: str | None = None,
    language: str | None = None,
    with_index: bool = True,
) -> Path:
    """Write the pack `out`, whole or not at all.

    An `out` that exists is replaced where it is empty or holds an earlier export and nothing else.

    Args:
        name: title of the card; None: from the experiment's name.
        license: of what was trained, as the hub names licenses; None: that of the earlier export, or `unknown`.
        language: ISO code of the dialogues' language; None: that of the earlier export, or `zh`.
        with_index: pack the training texts that demonstrations are drawn from.

    Raises:
        ArtifactError: a stage is not finished, or `out` holds something else.
        CheckpointError: what was trained, or the base models it used, cannot be read.
    """
    earlier = earlier_export(out)
    given = {"license": license, "language": language}
    kept = {key: str(earlier[key]) for key, value in given.items() if not value and earlier.get(key)}
    license = one_line(license or kept.get("license", "")) or None
    language = one_line(language or kept.get("language", "zh"))
    title = one_line(name) if name else f"elmd-{one_line(str(trained.config['experiment_name']))}"
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent, prefix=f".{out.name[:100]}-") as unfinished:
        folder = Path(unfinished) / "pack"
        folder.mkdir()
        indexed = _copy(trained, folder, with_index)
        facts = _facts(trained, folder, title, indexed) | {"license": license, "language": language}
        write_json(folder / FACTS, facts)
        model_card(trained, facts, license=license, language=language).save(folder / CARD)
        replace_folder(folder, out)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    logger.info("%s: %.1f MB in %d files", out, size / 1e6, len(facts["files"]) + 2)
    if kept:
        values = ", ".join(f"{key} {value}" for key, value in kept.items())
        logger.info("%s: kept from the earlier export: %s", out, values)
    if indexed:
        logger.warning(
            "%s holds the texts of the training samples, which stay under the license of the data set; "
            "--no-index leaves them out",
            out / INDEX,
        )
    return out


def _copy(trained: Trained, folder: Path, with_index: bool) -> bool:
    """Copy what was trained into `folder`; returns whether the index is among it."""
    generator = trained.artifact("generator")
    Prompt.load(generator / PROMPT)
    for name in (PROMPT, PROJECTOR):
        if (generator / name).is_file():
            shutil.copyfile(generator / name, folder / name)
    if (generator / ADAPTER).is_dir():
        _copy_adapter(generator / ADAPTER, folder / ADAPTER)
    if not (folder / ADAPTER).exists() and not (folder / PROJECTOR).exists():
        raise CheckpointError("holds neither a projector nor an adapter", where=generator, fix="train it again")
    chosen = trained.config["retriever"]
    if chosen["k"] == 0:
        return False
    _copy_tree(trained.artifact("retriever") / "model", folder / RETRIEVER)
    if not with_index:
        return False
    index, key = Index.load(trained.artifact("demonstrations")), chosen["key"]
    Index(index.ids, index.dialogues, {key: index.vectors[key]}).save(folder / INDEX)
    samples = {sample.id: sample for sample in load_samples(trained.artifact("samples") / "samples.jsonl")}
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


def _facts(trained: Trained, folder: Path, title: str, indexed: bool) -> dict[str, Any]:
    """The content of `elmd.json`."""
    config, manifest = trained.config, trained.manifest("generator")
    sees_clips = config["vision"]["kind"] == "encoder"
    return {
        "format": FORMAT,
        "name": title,
        "config": _choices(config),
        "llm": _base(trained, "llm") | {"shape": shape_of(*open_llm(trained.checkpoint("llm")))},
        "vision": _base(trained, "vision", VISION_PARTS) if sees_clips else None,
        "index": indexed,
        "experiment": config["experiment_name"],
        "ablation": config["ablation_name"],
        "baseline": config["baseline"]["name"],
        "seed": manifest["seed"],
        "commit": manifest["git"],
        "versions": manifest["versions"],
        "artifacts": {stage: path.name for stage, path in sorted(trained.job.artifacts.items())},
        "files": {name: file_facts(folder / name) for name in packed_files(folder)},
    }


def _choices(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What replies depend on after training, by group. A key that is younger than the run keeps its default."""
    choices: dict[str, dict[str, Any]] = {}
    for name, info in described(Config):
        group, _, key = name.partition(".")
        if info.packed and key in config[group]:
            choices.setdefault(group, {})[key] = config[group][key]
    return choices


def _base(trained: Trained, group: str, parts: tuple[str, ...] = ("",)) -> dict[str, Any]:
    """How others can find a base model: its hub id, otherwise what this project calls it and its folder's name.

    `artifact` is the place below the run's own runs/ of a stand-in that stage `bootstrap` made, otherwise None.
    """
    settings, path = trained.config[group], trained.checkpoint(group)
    artifact = f"bootstrap/{group}/{path.resolve().name}" if settings["path"] == BOOTSTRAP else None
    hub = artifact is None and is_hub_id(str(path))
    model = str(path) if hub else f"{settings['name']} ({artifact or path.resolve().name})"
    return {"model": model, "hub": hub, "artifact": artifact, "fingerprint": fingerprint(str(path), parts)}
