"""What each stage's result is a function of: its fingerprint covers exactly what the function here returns.

They stand apart from what the stages do, so that a chain is told to be up to date without the libraries it works with.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from elmd.config import (
    BOOTSTRAP,
    AdapterKind,
    BaselineName,
    BootstrapText,
    Config,
    ProjectorInit,
    Reader,
    Sampling,
    Search,
    SplitRule,
    VisionKind,
    plain,
)
from elmd.data.readers import cped
from elmd.data.readers.jsonl import media_files
from elmd.engine.files import digest
from elmd.errors import ConfigError
from elmd.stages.base import Depends, Stage

WORLD = "bootstrap/world"


def checkpoint(path: str | None, role: str) -> Depends:
    """A checkpoint: the stand-in that `stage=bootstrap` makes, or the files named."""
    if path == BOOTSTRAP:
        return Depends(upstream=(f"bootstrap/{role}",))
    return Depends(files={role: Path(path or "")})


# ------------------------------------------------------------------------------------------------- data and stand-ins
def prepare(cfg: Config) -> Depends:
    data = cfg.data
    tiny = data.reader is Reader.tiny
    files = {} if tiny else _source_files(cfg)
    for role, path in (("emotion_map", data.emotion_map), ("background", data.background)):
        if path is not None:
            files[role] = Path(path)
    config: dict[str, Any] = {
        "reader": data.reader.value,
        "split": data.split.value,
        "split_seed": None if data.split is SplitRule.official else data.split_seed,
        "filters": list(data.filters),
        "on_missing_clip": data.on_missing_clip.value,
        "media": _media(cfg),
    }
    return Depends(config=config, upstream=(WORLD,) if tiny else (), files=files)


def _source_files(cfg: Config) -> dict[str, Path]:
    """The files that the reader opens: a folder of M3ED or CPED may hold the videos as well."""
    assert cfg.data.path is not None, "elmd.stages.checks has seen to it"
    path = Path(cfg.data.path)
    names = {
        Reader.m3ed: ("annotation.json", "splitInfo"),
        Reader.cped: tuple(cped.FILES.values()),
    }
    inside = [path / name for name in names.get(cfg.data.reader, ()) if (path / name).exists()]
    return {file.name: file for file in inside} if inside else {"data": path}


def _media(cfg: Config) -> dict[str, Any] | None:
    """Where the samples' clips lie and which exist, by name and size: samples.jsonl says both.

    What is *in* a clip counts in `stage=features`. None: the data set names no clip of its own.
    """
    data = cfg.data
    if data.reader is Reader.jsonl and data.path is not None:
        template, folder, files = None, Path(data.path).parent, media_files(Path(data.path))
        if not files:
            return None
    elif data.reader in (Reader.m3ed, Reader.cped) and data.video_root is not None:
        template, folder = data.video_template, Path(data.video_root)
        files = sorted(Path(at) / name for at, _, names in os.walk(folder) for name in names)
    else:
        return None
    listing = [(os.path.relpath(file, folder), _size(file)) for file in files]
    return {"folder": str(folder.resolve()), "template": template, "files": digest(listing)}


def _size(file: Path) -> int | None:
    try:
        return file.stat().st_size
    except OSError:
        return None


def world(cfg: Config) -> Depends:
    return Depends(config=plain(cfg.data.world))


def standin_text(cfg: Config) -> Depends:
    """Whatever the text of a stand-in is made of."""
    boot = cfg.bootstrap
    config: dict[str, Any] = {"text": boot.text.value, "seed": boot.seed}
    if boot.text is BootstrapText.data:
        return Depends(config=config, upstream=("prepare",))
    return Depends(config={**config, "dialogues": boot.dialogues})


def standin_llm(cfg: Config) -> Depends:
    others = ("vocab_size", "dialogues")  # data is read so often that there are as many dialogues as are made else
    boot = {key: value for key, value in plain(cfg.bootstrap).items() if key.startswith("llm_") or key in others}
    return standin_text(cfg) | Depends(config={**boot, "prompt": plain(cfg.prompt)})


def standin_vision(cfg: Config) -> Depends:
    boot = {key: value for key, value in plain(cfg.bootstrap).items() if key.startswith("vision_")}
    return Depends(config={**boot, "seed": cfg.bootstrap.seed})


def standin_retriever(cfg: Config) -> Depends:
    boot = {key: value for key, value in plain(cfg.bootstrap).items() if key.startswith("retriever_")}
    return standin_text(cfg) | Depends(config=boot)


# -------------------------------------------------------------------------------------------- retrieval and features
def erm(cfg: Config) -> Depends:
    if not cfg.retrieves:
        raise ConfigError("this configuration retrieves nothing", where="retriever.k", fix="there is no ERM to train")
    settings = _without(plain(cfg.erm), "checkpoint_every")
    return Depends(
        config={"erm": settings, "max_tokens": cfg.retriever.max_tokens, "key": cfg.retriever.key.value},
        upstream=["prepare"],
        seed=cfg.seed,
    ) | checkpoint(cfg.retriever.path, "retriever")


def index(cfg: Config) -> Depends:
    # How many candidates there are is known by prepare; beyond that, what auto comes to is a matter of what is
    # installed, so the manifest tells it. A choice counts by itself.
    chosen = {} if cfg.retriever.search is Search.auto else {"search": cfg.retriever.search.value}
    return Depends(
        config={
            "k": cfg.retriever.k,
            "key": cfg.retriever.key.value,
            "allow_same_dialogue": cfg.retriever.allow_same_dialogue,
            **chosen,
        },
        upstream=["prepare", "erm"],
    )


def features(cfg: Config) -> Depends:
    vision, upstream = cfg.vision, ("prepare",)
    if vision.kind is VisionKind.precomputed:
        return Depends(config={"kind": vision.kind.value, "shape": vision.shape}, upstream=upstream)
    # dtype changes the numbers; what `auto` becomes depends on the device, which is no part of a fingerprint
    config = {
        "kind": vision.kind.value, "frames": vision.frames, "sampling": vision.sampling.value,
        "decoder": vision.decoder.value, "dtype": vision.dtype,
    }  # fmt: skip
    return Depends(config=config, upstream=upstream) | checkpoint(vision_weights(cfg), "vision")


def vision_weights(cfg: Config) -> str | None:
    """Where the encoder lies. Not `vision.path` for a ResNet: in a sweep that is the other systems' encoder."""
    return cfg.baseline.resnet if cfg.vision.kind is VisionKind.resnet else cfg.vision.path


# ------------------------------------------------------------------------------------------------ training and replies
def rep(cfg: Config) -> Depends:
    if not cfg.sees_video:
        raise ConfigError(
            "REP trains the visual projector, and vision=none has none",
            where="stage",
            fix="choose a vision=… that sees video, or go on with stage=eerg",
        )
    settings = _without(plain(cfg.rep), "micro_tokens", "checkpoint_every", "projector_from")
    files = {"projector": Path(cfg.rep.projector_from)} if cfg.rep.projector_from else {}
    return parts(cfg) | Depends(config={"rep": settings}, files=files, seed=cfg.seed)


def eerg(cfg: Config) -> Depends:
    settings = _without(plain(cfg.eerg), "micro_tokens", "checkpoint_every")
    if not cfg.sees_video:
        settings = _without(settings, "projector_from", "lr_projector")
    others = {AdapterKind.prefix: ("lora_",), AdapterKind.lora: ("prefix_",)}
    unread = others.get(cfg.eerg.adapter, ("lora_", "prefix_", "lr_adapter"))
    settings = {key: value for key, value in settings.items() if not key.startswith(unread)}
    start = settings.pop("adapter_from")
    return parts(cfg) | Depends(
        config={"eerg": settings},
        upstream=("rep",) if starts_from_rep(cfg) else (),
        files={"adapter": Path(start)} if start else {},
        seed=cfg.seed,
    )


def starts_from_rep(cfg: Config) -> bool:
    """Whether EERG's projector comes from REP; w/o V there is none, w/o REP it starts at random."""
    return cfg.sees_video and cfg.eerg.projector_from is ProjectorInit.rep


def parts(cfg: Config) -> Depends:
    """What REP, EERG and replies read, as far as the configuration has it (w/o ERM: no index; w/o V: no features)."""
    upstream = ["prepare"]
    if cfg.retrieves:
        upstream.append("index")
    if cfg.sees_video:
        upstream.append("features")
    config: dict[str, Any] = {
        "prompt": plain(cfg.prompt),
        "llm": {"dtype": cfg.llm.dtype, "attention": cfg.llm.attention},
        "shuffle": _shuffle(cfg),
    }
    return Depends(config=config, upstream=tuple(upstream)) | checkpoint(cfg.llm.path, "llm")


def _shuffle(cfg: Config) -> int | bool:
    """The seed by which clips are permuted among samples; False where they are not."""
    return cfg.data.split_seed if cfg.vision.shuffle and cfg.sees_video else False


def baseline(cfg: Config) -> Depends:
    settings = _without(plain(cfg.baseline), "micro_tokens", "checkpoint_every", "vocab", "resnet")
    files = {"vocab": Path(cfg.baseline.vocab)} if cfg.baseline.vocab else {}
    return baseline_rows(cfg) | Depends(config={"baseline": settings}, files=files, seed=cfg.seed)


def baseline_rows(cfg: Config) -> Depends:
    """What a baseline reads, in training and generation.

    Raises:
        ConfigError: the configuration names no baseline of this kind, or sizes that do not go together.
    """
    chosen = cfg.baseline
    if not chosen.name.own_model:
        raise ConfigError(
            f"baseline={chosen.name} has no network of its own to train",
            where="stage",
            fix="choose baseline=dialogpt or livebot, or leave the stage out",
        )
    if chosen.width % (2 * chosen.heads):
        raise ConfigError(
            f"{chosen.width} cannot be parted among {chosen.heads} heads of even width",
            where="baseline.width",
            fix=f"use a multiple of {2 * chosen.heads}",
        )
    if not baseline_sees_video(cfg):
        return Depends(upstream=("prepare",))
    video = {"frames": frame_rows(cfg), "shuffle": _shuffle(cfg)}
    return Depends(config={"video": video}, upstream=("prepare", "features"))


def baseline_sees_video(cfg: Config) -> bool:
    """Whether the baseline looks at frames: Livebot, where the run has video."""
    return cfg.baseline.name is BaselineName.livebot and cfg.sees_video


def frame_rows(cfg: Config) -> int | None:
    """How many of the last rows of a sample's features are its frames; None: all of them.

    V_c = [V_t ; V_s] ends in V_s, the mean over each frame's query tokens (eq. 8). A ResNet's rows are frames, and a
    user's own arrays are taken as they are.
    """
    pooled = cfg.vision.kind is VisionKind.encoder and cfg.vision.sampling is Sampling.uniform
    return cfg.vision.frames if pooled else None


def generate(cfg: Config) -> Depends:
    """
    Raises:
        ConfigError: DialoGPT has no positions for so many new tokens.
    """
    decoding = _without(plain(cfg.generate), "batch_tokens")
    own = Depends(config={"generate": decoding}, upstream=("baseline" if cfg.baseline.name.own_model else "eerg",))
    if not cfg.baseline.name.own_model:
        return parts(cfg) | own
    most = cfg.baseline.max_tokens
    if cfg.baseline.name is BaselineName.dialogpt and cfg.generate.max_new_tokens > most:
        raise ConfigError(
            f"a reply may have {cfg.generate.max_new_tokens} tokens, and DialoGPT learns {most} at most",
            where="generate.max_new_tokens",
            fix="lower it, or raise baseline.max_tokens before training",
        )
    return baseline_rows(cfg) | own


def _without(settings: dict[str, Any], *unread: str) -> dict[str, Any]:
    """Settings but those that change how a stage runs and not what comes out, or that count otherwise."""
    return {key: value for key, value in settings.items() if key not in unread}


#: Every stage by name.
STAGES = {
    stage.name: stage
    for stage in (
        Stage(WORLD, 2, world, "bootstrap:world"),
        Stage("bootstrap/llm", 3, standin_llm, "bootstrap:llm"),
        Stage("bootstrap/vision", 1, standin_vision, "bootstrap:vision"),
        Stage("bootstrap/retriever", 2, standin_retriever, "bootstrap:retriever"),
        Stage("prepare", 1, prepare, "prepare:run"),
        Stage("erm", 2, erm, "erm:run"),
        Stage("index", 1, index, "index:run"),
        Stage("features", 1, features, "features:run"),
        Stage("rep", 2, rep, "rep:run"),
        Stage("eerg", 1, eerg, "eerg:run"),
        Stage("baseline", 1, baseline, "baseline:run"),
        Stage("generate", 1, generate, "generate:run"),
    )
}
