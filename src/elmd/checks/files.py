"""Whether data and checkpoints are there, in a form that can be read. Of weights, only sizes and headers are read."""

from __future__ import annotations

import os
from pathlib import Path

from elmd.checks.base import Check, Inspection, Seen, in_hub_cache, object_in
from elmd.checks.rules import DOWNLOADS, how_to_get
from elmd.config import BOOTSTRAP, BaselineName, OnMissingClip, VisionKind
from elmd.data.readers import dataset
from elmd.engine.hub import is_hub_id
from elmd.errors import CheckpointError, ConfigError, DataError, reason

#: Files smaller than this (bytes) hold no weights: what git leaves where large files were not fetched.
_POINTER = 1024

#: How the names of those weights of a BLIP-2 model begin that are read; its language model need not be there.
_ENCODER = ("vision_model.", "qformer.", "query_tokens")


# --------------------------------------------------------------------------------------------------------------- data
def data(of: Inspection) -> Seen:
    """The data set's file or folder."""
    cfg, kind = of.cfg.data, dataset(of.cfg.data.reader)
    if kind.upstream:
        return Seen(cfg.name, f"made by {kind.upstream}")
    path = Path(cfg.path or "")
    source = path / kind.files[0] if kind.files and path.is_dir() else path
    if not source.exists():
        raise DataError("not there", where=source, fix=DOWNLOADS.get(cfg.name, "correct data.path"))
    return Seen(f"{cfg.name}: {source}")


def videos(of: Inspection) -> Seen:
    """At least one file that ends as `data.video_template` says; where that has no ending, one image."""
    from elmd.vision.video import IMAGES

    cfg = of.cfg.data
    if cfg.video_root is None:
        raise ConfigError(
            "no folder of videos is named",
            where="data.video_root",
            fix="set it, or choose vision=precomputed or vision=none",
        )
    root, ending = Path(cfg.video_root), Path(cfg.video_template).suffix
    if not root.is_dir():
        raise DataError("no such folder", where=root, fix="correct data.video_root")

    def matches(name: str) -> bool:
        suffix = Path(name).suffix
        return suffix == ending or (not ending and suffix.lower() in IMAGES)

    needed = of.cfg.sees_video or cfg.on_missing_clip is OnMissingClip.error
    if needed and not any(matches(name) for _, _, names in os.walk(root, followlinks=True) for name in names):
        raise DataError(
            f"holds no {ending} file" if ending else "holds no frames",
            where=root,
            fix="correct data.video_root, or data.video_template if the files end otherwise",
        )
    return Seen(str(root))


def _names_videos(of: Inspection) -> bool:
    below_root = dataset(of.cfg.data.reader).media is None
    return below_root and (of.cfg.sees_video or of.cfg.data.video_root is not None)


# -------------------------------------------------------------------------------------------------------- checkpoints
def llm(of: Inspection) -> Seen:
    return _checkpoint("llm", of.cfg.llm.name, of.cfg.llm.path)


def vision(of: Inspection) -> Seen:
    return _checkpoint("vision", of.cfg.vision.name, of.cfg.vision.path)


def resnet(of: Inspection) -> Seen:
    return _checkpoint("resnet", of.cfg.vision.name, of.cfg.baseline.resnet)


def retriever(of: Inspection) -> Seen:
    return _checkpoint("retriever", of.cfg.retriever.name, of.cfg.retriever.path)


def _encodes(of: Inspection) -> bool:
    used = of.cfg.vision.kind is VisionKind.encoder and of.cfg.baseline.name is not BaselineName.dialogpt
    return used and of.runs("features")


def _runs_resnet(of: Inspection) -> bool:
    return of.cfg.vision.kind is VisionKind.resnet and of.runs("features")


def _retrieves(of: Inspection) -> bool:
    return of.cfg.retrieves and of.has_llm and of.runs("erm")


def _checkpoint(group: str, name: str, path: str | None) -> Seen:
    assert path is not None, "the rules have seen to it"
    if path == BOOTSTRAP:
        return Seen("a stand-in", "made by stage=bootstrap")
    if Path(path).is_dir():
        _refuse_original(group, name, Path(path))
        _refuse_incomplete(group, name, Path(path))
        return Seen(f"{name}: {path}")
    if not is_hub_id(path):
        raise CheckpointError("no such folder", where=path, fix=how_to_get(group, name))
    if in_hub_cache(path):
        return Seen(f"{name}: hub id {path}, in the hub's cache")
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        what = "this hub id is not in the hub's cache, and HF_HUB_OFFLINE is set"
        raise CheckpointError(what, where=path, fix=how_to_get(group, name))
    return Seen(f"{name}: hub id {path}", "not in the hub's cache: downloaded at first use")


def _refuse_original(group: str, name: str, path: Path) -> None:
    """
    Raises:
        CheckpointError: the folder's layout is a published one that has to be converted.
    """
    config = object_in(path / "config.json") or {}
    visual = "eva_config" in config or (path / "model_config.json").is_file()
    if not visual and config.get("model_type") != "chatglm":
        return
    if (group == "llm") is visual:
        what = "VisualGLM, whose language model is not ChatGLM2" if visual else "a ChatGLM, which has no image encoder"
        raise CheckpointError(what, where=path, fix=how_to_get(group, name))
    if group == "llm":
        from elmd.convert.chatglm2 import native_config

        try:
            native_config(config)
        except CheckpointError as error:  # ChatGLM3 and GLM-4's first form call themselves chatglm too
            raise CheckpointError(error.what, where=path, fix=error.fix or how_to_get(group, name)) from error
    model, script, ending = (
        ("VisualGLM", "convert_visualglm", "-vision") if visual else ("ChatGLM2", "convert_chatglm2", "-converted")
    )
    raise CheckpointError(
        f"{model} as published, not converted yet",
        where=path,
        fix=f"run python scripts/{script}.py {path} {path}{ending}, then {group}.path={path}{ending}",
    )


def _refuse_incomplete(group: str, name: str, path: Path) -> None:
    """
    Raises:
        CheckpointError: something is missing in the folder, damaged, or of a kind that is not read.
    """
    get = how_to_get(group, name)
    config = object_in(path / "config.json")
    if config is None and not (group == "retriever" and (path / "modules.json").is_file()):
        state = "cannot be read" if (path / "config.json").is_file() else "is not there"
        raise CheckpointError(f"its config.json {state}", where=path, fix=get)
    config = config or {}
    if group == "llm" and not _known_to_transformers(kind := config.get("model_type")):
        raise CheckpointError(
            f"transformers knows no model_type {kind!r}, and code that comes with a checkpoint is not run",
            where=path,
            fix="choose one that AutoModelForCausalLM loads without remote code",
        )
    if group == "vision" and not {"vision_config", "qformer_config"} <= config.keys():
        raise CheckpointError("its config.json has no vision_config and qformer_config", where=path, fix=get)
    weights = sorted(path.rglob("*.safetensors") if group == "retriever" else path.glob("model*.safetensors"))
    if not weights:
        if any(path.rglob("*.bin")):
            fix = "save them as safetensors, the only format that is read"
            raise CheckpointError("its weights are .bin files", where=path, fix=fix)
        raise CheckpointError("has no weights (model*.safetensors)", where=path, fix=get)
    for index in path.glob("*.safetensors.index.json"):
        file_of = (object_in(index) or {}).get("weight_map", {})
        files = {file for weight, file in file_of.items() if group != "vision" or weight.startswith(_ENCODER)}
        if missing := sorted(file for file in files if not (path / file).is_file()):
            raise CheckpointError(
                f"lacks {len(missing)} of {len(files)} files of weights, the first is {missing[0]}",
                where=path,
                fix="fetch them",
            )
    for file in weights:
        if file.stat().st_size < _POINTER:
            what = "not the weights but git's pointer to them"
            raise CheckpointError(what, where=file, fix="fetch them with git lfs pull")
        shapes(file)


def _known_to_transformers(model_type: str | None) -> bool:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return model_type in CONFIG_MAPPING


def shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor in a safetensors file.

    Raises:
        CheckpointError: the file is not as long as its header says, or has none.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        what = f"is damaged or cut short ({reason(error)})"
        raise CheckpointError(what, where=file, fix="fetch this file again") from error


FILES = (
    Check("data", "doctor", data, needs=("data.path",)),
    Check("videos", "doctor", videos, when=_names_videos),
    Check("llm", "preflight", llm, when=lambda of: of.runs("rep", "eerg") and of.has_llm, needs=("llm.path",)),
    Check("vision", "preflight", vision, when=_encodes, needs=("vision.path",)),
    Check("resnet", "preflight", resnet, when=_runs_resnet),
    Check("retriever", "preflight", retriever, when=_retrieves, needs=("retriever.path",)),
)
