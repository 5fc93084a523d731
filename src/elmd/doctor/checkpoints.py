"""Whether the checkpoints are there, in a form that can be read, and whether they agree with each other.

Configuration and tokenizer files are read, weights never: of them only sizes and headers are looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GlmConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from elmd.config import BOOTSTRAP, BaselineName, Config, Sampling, VisionKind
from elmd.convert.chatglm2 import CHATGLM2_6B, native_config
from elmd.data.encode import Encoder
from elmd.doctor.findings import HOMES, Finding, read_json
from elmd.dtypes import pick_dtype
from elmd.engine.hub import is_hub_id
from elmd.errors import CheckpointError, ConfigError, reason
from elmd.labels import WORDS
from elmd.models.adapter import prefix_shape
from elmd.stages.parts import encoder_of, shortest_prompt

#: Files smaller than this (bytes) hold no weights: what git leaves where large files were not fetched.
_POINTER = 1024

#: How the names of a BLIP-2 model's weights begin that are read; its language model need not be there.
_ENCODER = ("vision_model.", "qformer.", "query_tokens")

_GROUP_WANTS = {
    "llm": "a causal language model",
    "vision": "a BLIP-2 encoder",
    "resnet": "a ResNet",
    "retriever": "a sentence encoder",
}


def checkpoints(cfg: Config) -> Iterator[Finding]:
    """One finding for each checkpoint that this configuration uses."""
    if not cfg.baseline.name.own_model:
        yield _checkpoint("llm", cfg.llm.name, cfg.llm.path)
    if cfg.vision.kind is VisionKind.encoder and cfg.baseline.name is not BaselineName.dialogpt:
        yield _checkpoint("vision", cfg.vision.name, cfg.vision.path)
    if cfg.vision.kind is VisionKind.resnet:
        yield _checkpoint("resnet", cfg.vision.name, cfg.baseline.resnet)
    if cfg.retrieves and not cfg.baseline.name.own_model:
        yield _checkpoint("retriever", cfg.retriever.name, cfg.retriever.path)


def _checkpoint(group: str, name: str, path: str | None) -> Finding:
    what = f"{group}={name}"
    home = HOMES.get(name, f"give {_GROUP_WANTS[group]}'s folder: config.json and safetensors weights")
    if path is None:
        return Finding(what, f"{group}.path is not set", home, True)
    if path == BOOTSTRAP:
        return Finding(what, "a stand-in", "made by stage=bootstrap")
    if Path(path).is_dir():
        wrong = _original(group, Path(path), home) or _incomplete(group, Path(path), home)
        return Finding(what, path) if wrong is None else Finding(what, *wrong, True)
    if is_hub_id(path):
        from huggingface_hub import constants, try_to_load_from_cache

        if isinstance(try_to_load_from_cache(path, "config.json"), str):
            return Finding(what, f"hub id {path}, in the hub's cache")
        if constants.HF_HUB_OFFLINE:
            return Finding(what, f"hub id {path}, not in the hub's cache, and HF_HUB_OFFLINE is set", home, True)
        return Finding(what, f"hub id {path}", "not in the hub's cache: downloaded at first use")
    return Finding(what, path, f"no such folder; {home}", True)


def _original(group: str, path: Path, home: str) -> tuple[str, str] | None:
    """(what is found, what to do) for a checkpoint in a layout that has to be converted; None for any other."""
    config = read_json(path / "config.json") or {}
    visual = "eva_config" in config or (path / "model_config.json").is_file()
    if not visual and config.get("model_type") != "chatglm":
        return None
    if group == "llm" and visual:
        return f"{path}: VisualGLM, whose language model is not ChatGLM2", home
    if group == "vision" and not visual:
        return f"{path}: a ChatGLM, which has no image encoder", home
    if group == "llm":
        try:
            native_config(config)
        except CheckpointError as error:  # ChatGLM3 and GLM-4's first form call themselves chatglm too
            return f"{path}: {error.what}", error.fix or home
    script, end = ("convert_visualglm", "-vision") if visual else ("convert_chatglm2", "-converted")
    name = "VisualGLM" if visual else "ChatGLM2"
    new = f"{path}{end}"
    return (
        f"{path}: {name} as published, not converted yet",
        f"run python scripts/{script}.py {path} {new}, then {group}.path={new}",
    )


def _incomplete(group: str, path: Path, home: str) -> tuple[str, str] | None:
    """(what is found, what to do) for a folder that lacks something; None for a good one."""
    config = read_json(path / "config.json")
    if config is None and not (group == "retriever" and (path / "modules.json").is_file()):
        state = "cannot be read" if (path / "config.json").is_file() else "is not there"
        return f"{path}: its config.json {state}", home
    config = config or {}
    if group == "llm" and config.get("model_type") not in CONFIG_MAPPING:
        kind = config.get("model_type")
        told = f"{path}: transformers knows no model_type {kind!r}, and code that comes with a checkpoint is not run"
        return told, "choose one that AutoModelForCausalLM loads without remote code"
    if group == "vision" and not {"vision_config", "qformer_config"} <= config.keys():
        return f"{path}: its config.json has no vision_config and qformer_config", home
    weights = sorted(path.rglob("*.safetensors") if group == "retriever" else path.glob("model*.safetensors"))
    if not weights:
        if any(path.rglob("*.bin")):
            return f"{path}: its weights are .bin files", "save them as safetensors, the only format that is read"
        return f"{path}: has no weights (model*.safetensors)", home
    for index in path.glob("*.safetensors.index.json"):
        files = (read_json(index) or {}).get("weight_map", {})
        named = {file for name, file in files.items() if group != "vision" or name.startswith(_ENCODER)}
        if gone := sorted(name for name in named if not (path / name).is_file()):
            return f"{path}: lacks {len(gone)} of {len(named)} files of weights, the first is {gone[0]}", "fetch them"
    if small := [file for file in weights if file.stat().st_size < _POINTER]:
        return f"{small[0]}: not the weights but git's pointer to them", "fetch them with git lfs pull"
    for file in weights:
        if isinstance(read := header(file), str):
            return f"{file}: is damaged or cut short ({read})", "fetch this file again"
    return None


def header(file: Path) -> dict[str, tuple[int, ...]] | str:
    """Names and shapes in a safetensors file, which is as long as they say, or what is wrong with it."""
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        return str(error).strip().partition("\n")[0].rstrip(".")


def llm_config(cfg: Config) -> tuple[PretrainedConfig, bool] | None:
    """The language model's configuration, and whether it is the checkpoint's own.

    Where the checkpoint is not there, that of the public model of this name; None for a stand-in or an unknown one.
    """
    path = cfg.llm.path
    if path == BOOTSTRAP:
        return None
    if path is not None and not _checkpoint("llm", cfg.llm.name, path).missing:
        try:
            return AutoConfig.from_pretrained(path, local_files_only=True), True
        except (OSError, ValueError):
            pass  # a hub id that is not in the cache
    public = {"chatglm2_6b": lambda: native_config(CHATGLM2_6B), "glm4_9b": GlmConfig}
    return (public[cfg.llm.name](), False) if cfg.llm.name in public else None


def visual_shape(cfg: Config) -> tuple[int, int]:
    """Visual tokens of a sample (V = m + o) and their width q; (0, 0) without video.

    BLIP-2's own where the checkpoint cannot be read, or a user's arrays are not described.
    """
    if not cfg.sees_video:
        return 0, 0
    tokens, width = cfg.vision.shape or (32, 768)
    config = read_json(Path(cfg.vision.path) / "config.json") if cfg.vision.path else None
    if config is not None and cfg.vision.kind is VisionKind.encoder:
        tokens = config.get("num_query_tokens", tokens)
        width = (config.get("qformer_config") or {}).get("hidden_size", width)
    return tokens + (cfg.vision.frames if cfg.vision.sampling is Sampling.uniform else 0), width


def loading(cfg: Config) -> Iterator[Finding]:
    """What of `dtype` and `attention` the models cannot be loaded with; nothing where all is well."""
    for key, name, used in (
        ("llm.dtype", cfg.llm.dtype, True),
        ("vision.dtype", cfg.vision.dtype, cfg.vision.kind is VisionKind.encoder),
    ):
        try:
            pick_dtype(name, torch.device("cpu"))
        except CheckpointError as error:
            if used:
                yield Finding(key, error.what, error.fix or "", True)
    known = llm_config(cfg)
    config = GlmConfig(num_hidden_layers=1) if known is None else known[0]
    try:
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(config, attn_implementation=cfg.llm.attention)
    except (ImportError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        if isinstance(error, ImportError) or "attn_implementation" in reason:
            told = f"{cfg.llm.attention} cannot be used here ({reason})"
            yield Finding("llm.attention", told, "install its package, or set llm.attention=sdpa", True)
        else:
            yield Finding(f"llm={cfg.llm.name}", reason, "choose one that AutoModelForCausalLM loads", True)


def projector(cfg: Config) -> Iterator[Finding]:
    """Whether the projector that REP begins with is one, and of this encoder and this language model."""
    if not cfg.sees_video or cfg.rep.projector_from is None:
        return
    what, file = "rep.projector_from", Path(cfg.rep.projector_from)
    if not file.is_file():
        yield Finding(what, str(file), "no such file: correct the path, or leave it out", True)
        return
    tensors = header(file)
    if isinstance(tensors, str) or len(tensors.get("linear.weight", ())) != 2 or "linear.bias" not in tensors:
        reason = f" ({tensors})" if isinstance(tensors, str) else ""
        yield Finding(
            what,
            f"{file}: is no visual projector{reason}",
            "give glm_proj.safetensors of scripts/convert_visualglm.py, or projector.safetensors of a stage=rep",
            True,
        )
        return
    hidden, width = tensors["linear.weight"]
    known, q = llm_config(cfg), _width(cfg)
    wanted = (hidden if known is None else known[0].get_text_config(decoder=True).hidden_size, q or width)
    good = (hidden, width) == wanted
    fix = f"features of {wanted[1]} are to become {wanted[0]}: take one of this encoder and this language model"
    yield Finding(what, f"{file}: {width} → {hidden} numbers", "" if good else fix, not good)


def _width(cfg: Config) -> int | None:
    """q where a file or the configuration tells it."""
    if cfg.vision.kind is VisionKind.precomputed:
        return cfg.vision.shape[1] if cfg.vision.shape else None
    config = read_json(Path(cfg.vision.path) / "config.json") if cfg.vision.path else None
    return visual_shape(cfg)[1] if config is not None else None


def agreement(cfg: Config) -> Iterator[Finding]:
    """Whether tokenizer, language model, prompt, visual tokens and prefix go together; nothing without a checkpoint."""
    known = llm_config(cfg)
    if known is None or not known[1] or cfg.llm.path is None:
        return
    config = known[0].get_text_config(decoder=True)
    try:
        tokenizer = AutoTokenizer.from_pretrained(cfg.llm.path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        yield Finding("tokenizer", f"cannot be loaded ({reason(error)})", "fetch or convert the checkpoint again", True)
        return
    yield from _ids(cfg.llm.path, tokenizer, config)
    try:
        encoder = encoder_of(tokenizer, cfg.prompt)
        yield _words(encoder)
        yield from _lengths(cfg, encoder, config)
    except (CheckpointError, ConfigError) as error:
        yield Finding("prompt", error.what, error.fix or "", True)
    if cfg.sees_video:
        tokens, width = visual_shape(cfg)
        yield Finding("projector", f"{tokens} visual tokens a sample, {width} → {config.hidden_size} numbers each")
    yield from prefix(Path(cfg.llm.path) / "adapter", config)
    if cfg.eerg.adapter_from is not None:
        start = Path(cfg.eerg.adapter_from)
        if read_json(start / "adapter_config.json") is None:
            told = f"{start}: its adapter_config.json is not there or cannot be read"
            yield Finding("eerg.adapter_from", told, "give an adapter's folder, or leave it out", True)
        yield from prefix(start, config)


def _ids(path: str, tokenizer: Any, config: PretrainedConfig) -> Iterator[Finding]:
    highest, rows = max(tokenizer.get_vocab().values()), config.vocab_size
    yield Finding(
        "tokenizer",
        f"ids to {highest:,}, {rows:,} rows of embeddings",
        "" if highest < rows else "tokenizer and weights are of different models: fetch both from one place",
        highest >= rows,
    )
    ends = {"config.json": config.eos_token_id}
    if generation := read_json(Path(path) / "generation_config.json"):
        ends["generation_config.json"] = generation.get("eos_token_id")
    eos = tokenizer.eos_token_id
    others = [
        f"{name}: {value}"
        for name, value in ends.items()
        if value is not None and eos not in (value if isinstance(value, list) else [value])
    ]
    # None at all is the encoder's to tell. ELMD pads by the mask, so a model without a padding token is as good.
    if eos is not None:
        yield Finding(
            "end of text",
            f"id {eos}" + (f"; {', '.join(others)}" if others else "") + f"; padding {tokenizer.pad_token_id}",
            "targets will end in the tokenizer's" if others else "",
        )


def _words(encoder: Encoder) -> Finding:
    words = {word: tuple(encoder.text(word)) for word in WORDS.values()}
    unknown = encoder.tokenizer.unk_token_id
    lost = [word for word, ids in words.items() if not ids or unknown in ids]
    if lost or len(set(words.values())) < len(words):
        told = f"{' '.join(lost)} not in the vocabulary" if lost else "not distinct in ids"
        return Finding("emotion words", told, "choose a model whose tokenizer knows Chinese", True)
    counts = sorted({len(ids) for ids in words.values()})
    return Finding("emotion words", f"{len(words)} distinct, of {' or '.join(map(str, counts))} tokens")


def _lengths(cfg: Config, encoder: Encoder, config: PretrainedConfig) -> Iterator[Finding]:
    """The shortest prompt there can be, and the longest row."""
    slots, limit = visual_shape(cfg)[0], cfg.prompt.max_prompt_tokens
    yield Finding(
        "prompt", f"{shortest_prompt(encoder, slots)} tokens of {limit:,} before any dialogue, {slots} of them visual"
    )
    longest, positions = limit + cfg.prompt.max_target_tokens, getattr(config, "max_position_embeddings", None)
    if positions is not None:
        yield Finding(
            "longest row",
            f"{longest:,} tokens, the model has {positions:,} positions",
            "" if longest <= positions else "lower prompt.max_prompt_tokens or prompt.max_target_tokens",
            longest > positions,
        )


def prefix(folder: Path, config: PretrainedConfig) -> Iterator[Finding]:
    """Whether an adapter folder's prefix has this model's shape; nothing where the folder has none."""
    saved = read_json(folder / "adapter_config.json")
    if saved is None or saved.get("peft_type") != "PREFIX_TUNING":
        return
    wanted = prefix_shape(config)
    found = tuple(saved.get(key) for key in ("num_layers", "num_attention_heads", "token_dim"))
    shape = "{} layers, {} KV heads, {} numbers".format
    good = found == wanted
    yield Finding(
        f"prefix in {folder}",
        f"{saved.get('num_virtual_tokens')} virtual tokens of {shape(*found)}",
        "" if good else f"this language model has {shape(*wanted)}: train or convert the prefix with it",
        not good,
    )
