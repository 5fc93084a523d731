"""What must hold between the configuration's fields; no file is read."""

from __future__ import annotations

from collections.abc import Callable

from elmd.checks.base import Check, Inspection
from elmd.config import (
    ATTENTION,
    AdapterKind,
    BaselineName,
    BootstrapText,
    Config,
    Key,
    Sampling,
    StageName,
    VisionKind,
)
from elmd.data.readers import dataset
from elmd.dtypes import check_dtype
from elmd.errors import ConfigError

#: Where the public checkpoints and data sets come from; data/README.md says more.
DOWNLOADS = {
    "chatglm2_6b": "download huggingface.co/THUDM/chatglm2-6b to SRC, run python scripts/convert_chatglm2.py SRC DST, "
    "then llm.path=DST",
    "glm4_9b": "download huggingface.co/THUDM/glm-4-9b-chat-hf, then llm.path=FOLDER; or give the hub id itself",
    "visualglm": "download huggingface.co/THUDM/visualglm-6b to SRC, run python scripts/convert_visualglm.py SRC DST, "
    "then vision.path=DST",
    "blip2": "download huggingface.co/Salesforce/blip2-opt-2.7b, then vision.path=FOLDER; or give the hub id itself",
    "m3e_base": "download huggingface.co/moka-ai/m3e-base, then retriever.path=FOLDER; or give the hub id itself",
    "resnet": "download huggingface.co/microsoft/resnet-18, then baseline.resnet=FOLDER; or give the hub id itself",
    "m3ed": "get it from github.com/AIM3-RUC/RUCM3ED, then data.path=FOLDER",
    "cped": "get it from github.com/scutcyr/CPED, then data.path=FILE.csv",
}

#: What each group's checkpoint is.
KINDS = {
    "llm": "a causal language model",
    "vision": "a BLIP-2 encoder",
    "resnet": "a ResNet",
    "retriever": "a sentence encoder",
}


def how_to_get(group: str, name: str) -> str:
    """How to get the checkpoint called `name`: from its public place, where we know it."""
    return DOWNLOADS.get(name, f"give {KINDS[group]}'s folder ({group}.path=…): config.json and safetensors weights")


def attention(cfg: Config) -> None:
    if cfg.llm.attention not in ATTENTION and "/" not in cfg.llm.attention:
        raise ConfigError(
            f"there is no attention {cfg.llm.attention!r}",
            where="llm.attention",
            fix=f"choose from {', '.join(ATTENTION)}, or name a repository of kernels at the hub",
        )


def llm_dtype(cfg: Config) -> None:
    check_dtype(cfg.llm.dtype, "llm.dtype")


def vision_dtype(cfg: Config) -> None:
    check_dtype(cfg.vision.dtype, "vision.dtype")


def data_path(cfg: Config) -> None:
    if dataset(cfg.data.reader).upstream is None and cfg.data.path is None:
        fix = DOWNLOADS.get(cfg.data.name, "give it: data.path=/path/to/the/data")
        raise ConfigError(f"data={cfg.data.name} has no source", where="data.path", fix=fix)


def bootstrap_text(cfg: Config) -> None:
    if cfg.bootstrap.text is BootstrapText.data and dataset(cfg.data.reader).upstream:
        raise ConfigError(
            "bootstrap.text=data needs a data set of its own, and data=tiny is drawn from the tiny world",
            where="bootstrap.text",
            fix="set bootstrap.text=tiny, or choose data=cped, m3ed or jsonl",
        )


def seeds(cfg: Config) -> None:
    if not cfg.generate.seeds:
        raise ConfigError("there is no seed to decode with", where="generate.seeds", fix="use [0], or several")


def stage(cfg: Config) -> None:
    own = (StageName.prepare, StageName.features, StageName.bootstrap, StageName.baseline, StageName.all)
    if cfg.baseline.name.own_model and cfg.stage not in own:
        raise ConfigError(
            f"baseline={cfg.baseline.name} has no stage {cfg.stage.value}",
            where="stage",
            fix="use stage=baseline, or leave it out",
        )


def llm_path(cfg: Config) -> None:
    if not cfg.baseline.name.own_model:
        _has_path("llm", cfg.llm.name, cfg.llm.path)


def vision_path(cfg: Config) -> None:
    if cfg.vision.kind is VisionKind.encoder:
        _has_path("vision", cfg.vision.name, cfg.vision.path)


def retriever_path(cfg: Config) -> None:
    if cfg.retrieves and not cfg.baseline.name.own_model:
        _has_path("retriever", cfg.retriever.name, cfg.retriever.path)


def _has_path(group: str, name: str, path: str | None) -> None:
    if path is None:
        raise ConfigError(f"{group}={name} names no checkpoint", where=f"{group}.path", fix=how_to_get(group, name))


def erm_weights(cfg: Config) -> None:
    if cfg.retrieves and cfg.erm.emotion_weight == cfg.erm.separation_weight == 0:
        raise ConfigError(
            "both losses of eq. 4 have weight 0, so there is nothing to train",
            where="erm.emotion_weight, erm.separation_weight",
            fix="set one of them, or use ablation=no_erm",
        )


def retriever_key(cfg: Config) -> None:
    if cfg.retriever.key is Key.E_s and cfg.retrieves and cfg.erm.separation_weight == 0:
        raise ConfigError(
            "E_s is the output of self-separation, which erm.separation_weight=0 leaves untrained",
            where="retriever.key",
            fix="set retriever.key=e_u, as ablation=no_ssc does",
        )


def vision_frames(cfg: Config) -> None:
    if cfg.vision.sampling is Sampling.random and cfg.vision.frames != 1:
        raise ConfigError(
            f"sampling=random takes one frame, not {cfg.vision.frames}",
            where="vision.frames",
            fix="set vision.frames=1, or vision.sampling=uniform",
        )


def vision_kind(cfg: Config) -> None:
    if cfg.vision.kind is VisionKind.resnet and cfg.baseline.name is not BaselineName.livebot:
        raise ConfigError(
            "ResNet's features are for Livebot; ELMD's projector takes those of a ViT and Q-Former",
            where="vision.kind",
            fix="choose another vision=…, or baseline=livebot",
        )


def adapter(cfg: Config) -> None:
    if cfg.eerg.adapter is AdapterKind.none and not cfg.sees_video:
        raise ConfigError(
            "without an adapter and without video there is nothing to train",
            where="eerg.adapter, vision",
            fix="set eerg.adapter=prefix or lora, or choose a vision=… that sees video",
        )


def _rule(name: str, holds: Callable[[Config], None]) -> Check:
    def run(inspection: Inspection) -> None:
        holds(inspection.cfg)

    return Check(name, "config", run)


RULES = (
    _rule("llm.attention", attention),
    _rule("llm.dtype", llm_dtype),
    _rule("vision.dtype", vision_dtype),
    _rule("data.path", data_path),
    _rule("bootstrap.text", bootstrap_text),
    _rule("stage", stage),
    _rule("generate.seeds", seeds),
    _rule("llm.path", llm_path),
    _rule("vision.path", vision_path),
    _rule("retriever.path", retriever_path),
    _rule("erm weights", erm_weights),
    _rule("retriever.key", retriever_key),
    _rule("vision.frames", vision_frames),
    _rule("vision.kind", vision_kind),
    _rule("eerg.adapter", adapter),
)
