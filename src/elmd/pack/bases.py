"""The models of others that a pack needs, language model and vision encoder: their identity, and how they are found."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from elmd.engine.files import digest, read_json
from elmd.engine.hub import is_hub_id, is_hub_name
from elmd.errors import CheckpointError, reason

#: Text whose ids are part of a tokenizer's identity: Chinese, digits, another alphabet, ChatGLM2's own prompt.
_PROBE = "[Round 1]\n问：你怎么才来？ 2024\n\n答：Ωé…"
#: Tensors of a vision checkpoint that are the encoder's; a BLIP-2 folder also holds a language model.
VISION_PARTS = ("vision_model.", "qformer.", "query_tokens")


def shape_of(config: Any, tokenizer: Any) -> dict[str, Any]:
    """What must be equal for a language model to take the place of another: sizes, and how text becomes ids."""
    text = config.get_text_config(decoder=True)
    words = [sorted(tokenizer.get_vocab().items()), tokenizer.chat_template, tokenizer.encode(_PROBE)]
    return {
        "model_type": config.model_type,
        "hidden_size": text.hidden_size,
        "layers": text.num_hidden_layers,
        "vocabulary": text.vocab_size,
        "tokenizer": digest(words),
    }


def fingerprint(path: str, parts: tuple[str, ...] = ("",)) -> str | None:
    """16 hex digits of a folder's weights: of the first row of each tensor in bfloat16, so that neither the shards nor
    the stored precision matter, and gigabytes need not be read. None for a hub id, which stands for itself.

    Args:
        parts: tensors whose names begin so.

    Raises:
        CheckpointError: the folder holds no whole safetensors files.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    folder = Path(path)
    if not folder.is_dir() and is_hub_id(path):
        return None
    rows: dict[str, list[Any]] = {}
    try:
        index = folder / "model.safetensors.index.json"
        shards = {"model.safetensors"}
        if index.is_file():
            shard_of = read_json(index)["weight_map"]
            shards = {shard for name, shard in shard_of.items() if name.startswith(parts)}
        for shard in shards:
            with safe_open(folder / shard, "pt") as file:
                for name in file.keys():  # noqa: SIM118  (not a dict)
                    if name.startswith(parts):
                        size = file.get_slice(name).get_shape()
                        row = file.get_slice(name)[:1] if size else file.get_tensor(name)
                        raw = row.to(torch.bfloat16).flatten().view(torch.uint8).numpy().tobytes()
                        rows[name] = [size, hashlib.sha256(raw).hexdigest()]
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(
            f"its weights cannot be read ({reason(error)})", where=path, fix="give a folder of whole safetensors files"
        ) from error
    return digest(rows)


def check_weights(path: str, base: Mapping[str, Any], name: str, role: str, parts: tuple[str, ...] = ("",)) -> None:
    """
    Raises:
        CheckpointError: the folder's weights are not those that the pack was trained with.
    """
    own = fingerprint(path, parts)
    if None not in (own, base["fingerprint"]) and own != base["fingerprint"]:
        raise CheckpointError(
            f"its weights are not those that {name} was trained with", where=path, fix=give_base(role, base)
        )


def open_base_llm(path: str, attention: str, base: Mapping[str, Any], name: str) -> Any:
    """The tokenizer of the language model that a pack was trained with.

    Args:
        base: what the pack says of its language model.
        name: of the pack.

    Raises:
        CheckpointError: it cannot be opened, or its sizes, tokenizer or weights are others.
    """
    from elmd.models.llm import open_llm

    try:
        config, tokenizer = open_llm(path, attention=attention)
    except CheckpointError as error:
        if Path(path).is_dir():
            raise
        what = f"is no folder, and as a hub id it {error.what}"
        raise CheckpointError(what, where=path, fix=give_base("llm", base)) from error
    shape = shape_of(config, tokenizer)
    if others := [key for key, value in base["shape"].items() if shape.get(key) != value]:
        differences = ", ".join(f"{key} {shape.get(key)} for {base['shape'][key]}" for key in others)
        raise CheckpointError(
            f"is not the language model that {name} was trained with ({differences})",
            where=path,
            fix=give_base("llm", base),
        )
    check_weights(path, base, name, "llm")
    return tokenizer


def give_base(role: str, base: Mapping[str, Any]) -> str:
    """What to do about a base model that is missing or wrong; `role` is an argument here and an option of commands."""
    if artifact := base.get("artifact"):
        return f"give {role} the folder of artifact {artifact} under the runs/ it was trained in"
    return f"give {role} the folder or hub id of {base['model']}"


def check_base(role: str, path: str) -> None:
    """
    Raises:
        CheckpointError: neither a model's folder nor, by its form, a hub id.
    """
    if Path(path).is_dir():
        if not (Path(path) / "config.json").is_file():
            raise CheckpointError(
                "holds no model (config.json is missing)", where=path, fix=f"give {role} the folder that has it"
            )
    elif not is_hub_id(path):
        raise CheckpointError("no such folder", where=path, fix=f"check the path given as {role}")


def named_base(base: Mapping[str, Any]) -> str | None:
    """The checkpoint that the pack itself names, where others can have it too."""
    return base["model"] if base["hub"] and is_hub_name(base["model"]) else None
