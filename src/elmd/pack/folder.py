"""The folder of a pack: what lies in it, and what is checked before any of it is opened.

Loads no library that takes seconds, so that what is wrong with a folder is told at once; `elmd.pack` loads the model.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from elmd.engine.files import digest, read_json
from elmd.engine.hub import is_hub_id, is_hub_name, snapshot
from elmd.errors import CheckpointError, ConfigError, reason
from elmd.models import ADAPTER, PROJECTOR

#: Raised when a folder that this version writes could not be read by an earlier one.
FORMAT = 1
FACTS, CARD, PROMPT, RETRIEVER, INDEX = "elmd.json", "README.md", "prompt.json", "retriever", "index"
TEXTS = f"{INDEX}/samples.jsonl"

#: Endings of all that a pack may hold: none of them can carry code.
ENDINGS = (".json", ".jsonl", ".safetensors", ".txt", ".model", ".md")

#: The choices of a run that a reply depends on, by group of its configuration.
CHOICES = {
    "data": ("name", "reader", "split", "split_seed", "filters"),
    "llm": ("name", "dtype", "attention"),
    "vision": (
        "name", "kind", "frames", "sampling", "decoder", "workers", "timeout_s", "batch_frames", "dtype", "shape",
    ),
    "retriever": ("name", "k", "key", "allow_same_dialogue"),
    "prompt": ("max_prompt_tokens", "max_target_tokens"),
    "eerg": ("adapter", "with_emotion"),
    "generate": ("top_p", "temperature", "max_new_tokens", "seeds", "batch_tokens"),
}  # fmt: skip

_PROBE = "[Round 1]\n问：你怎么才来？ 2024\n\n答：Ωé…"
#: Tensors of a vision checkpoint that are the encoder's; a BLIP-2 folder also holds a language model.
VISION_PARTS = ("vision_model.", "qformer.", "query_tokens")


def fetch(source: str) -> Path:
    """The folder of a pack; of a hub repository only data files are downloaded, once.

    Raises:
        CheckpointError: there is no such folder, and nothing at the hub.
    """
    if Path(source).is_dir():
        return Path(source)
    if not is_hub_id(source):
        raise CheckpointError("no such folder", where=source, fix="check the path")
    places = (f"{ADAPTER}/", f"{RETRIEVER}/", f"{INDEX}/")
    patterns = [FACTS, CARD, PROMPT, PROJECTOR, *(f"{place}*{ending}" for place in places for ending in ENDINGS)]
    return snapshot(
        source, patterns, "check the name and the connection, or download the repository and give its folder"
    )


def check_files(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """
    Raises:
        CheckpointError: a file leads out of the folder, is of a kind that no pack has, or is not as it was packed.
    """
    for name, known in files.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or path.suffix not in ENDINGS:
            raise CheckpointError(f"lists {name!r}, which no pack has", where=folder / FACTS, fix="do not use it")
        if not (folder / path).is_file():
            raise CheckpointError(f"{name} is missing", where=folder, fix="get the pack again, whole")
        if file_facts(folder / path) != known:
            raise CheckpointError(f"{name} is not as it was packed", where=folder, fix="get the pack again")
    if unlisted := sorted(set(packed_files(folder)) - files.keys()):
        raise CheckpointError(
            f"holds {unlisted[0]}, which {FACTS} does not list", where=folder, fix="get the pack again"
        )
    if (modules := folder / RETRIEVER / "modules.json").is_file():
        for entry in read_json(modules):
            if not re.fullmatch(r"\w*", entry["path"]):
                raise CheckpointError(f"leads to {entry['path']!r}", where=modules, fix="do not use this pack")


def read_facts(folder: Path) -> dict[str, Any]:
    """The content of `elmd.json`.

    Raises:
        CheckpointError: the folder is no pack.
        ConfigError: it was written by a later version.
    """
    try:
        facts = read_json(folder / FACTS)
        number, whole = facts["format"], {"name", "config", "llm", "vision", "index", "files"} <= facts.keys()
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"is no packed model ({FACTS} is missing or damaged)",
            where=folder,
            fix="make one: python -m elmd.export JOB_FOLDER --out DIR",
        ) from error
    if number != FORMAT or not whole:
        raise ConfigError(
            f"format {number!r} is not {FORMAT}, which this version reads", where=folder / FACTS, fix="update ELMD"
        )
    return facts


def packed_files(folder: Path) -> list[str]:
    """Names of the files of a pack that replies are made with: all that may be opened, and no other."""
    inside = [path for part in (ADAPTER, RETRIEVER, INDEX) for path in sorted((folder / part).rglob("*"))]
    found = [path for path in (folder / PROMPT, folder / PROJECTOR, *inside) if path.is_file()]
    return [path.relative_to(folder).as_posix() for path in found if not path.name.startswith(".")]


def file_facts(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


# ----------------------------------------------------------------------------------------------- the models it needs
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
    import torch  # seconds, which nothing else here needs
    from safetensors import SafetensorError, safe_open

    folder = Path(path)
    if not folder.is_dir() and is_hub_id(path):
        return None
    rows: dict[str, list[Any]] = {}
    try:
        index = folder / "model.safetensors.index.json"
        shards = {"model.safetensors"}
        if index.is_file():
            listed = read_json(index)["weight_map"]
            shards = {shard for name, shard in listed.items() if name.startswith(parts)}
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
    found = fingerprint(path, parts)
    if None not in (found, base["fingerprint"]) and found != base["fingerprint"]:
        raise CheckpointError(
            f"its weights are not those that {name} was trained with",
            where=path,
            fix=give_base(role, base),
        )


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
