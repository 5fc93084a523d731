"""The files of an image encoder's checkpoint: a local folder or a hub id, its JSON files, its safetensors."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from elmd.engine.files import read_object
from elmd.engine.hub import is_hub_id, snapshot, unfetched
from elmd.errors import CheckpointError

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
#: How the names of the encoder's weights begin in a BLIP-2 model.
PARTS = ("vision_model.", "qformer.", "query_tokens")


def fetch(path: str | Path) -> Path:
    """The folder itself, or a hub id's folder in the hub's cache with the files that the encoder needs.

    Raises:
        CheckpointError: the hub does not give the files.
    """
    folder, name = Path(path), str(path)
    if not is_hub_id(name):
        return folder
    small = [CONFIG, PREPROCESSOR, WEIGHTS_INDEX]
    fix = "check vision.path (of a ResNet: baseline.resnet) and the connection, or download it and give its folder"
    shards = weight_files(snapshot(name, small, fix))
    folder = snapshot(name, [*small, *shards], fix)
    # Without a connection the hub's client may return the incomplete folder of an interrupted download.
    if missing := [file for file in (CONFIG, *shards) if not (folder / file).is_file()]:
        raise unfetched(name, f"it lacks {missing[0]}", fix)
    return folder


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of the checkpoint.

    Raises:
        CheckpointError: the file is missing, or is no JSON object.
    """
    fix = "check vision.path in the configuration (of a ResNet: baseline.resnet), or get the file again"
    return read_object(path, CheckpointError, fix)


def read_preprocessor(folder: Path) -> dict[str, Any]:
    """`preprocessor_config.json`, with the mean and std of the normalisation; empty where there is none."""
    path = folder / PREPROCESSOR
    return read_json(path) if path.is_file() else {}


def shape_fields(config: dict[str, Any]) -> dict[str, Any]:
    """The fields of a public config.json that shape the network, without its dtype, its name and the like."""
    drop = {"model_type", "dtype", "torch_dtype", "architectures", "transformers_version", "_name_or_path"}
    return {key: value for key, value in config.items() if key not in drop}


def weight_files(folder: Path) -> list[str]:
    """The names of the files that hold the encoder's weights, from the index where there is one."""
    index = folder / WEIGHTS_INDEX
    if not index.is_file():
        return [WEIGHTS]
    file_of: dict[str, str] = read_json(index).get("weight_map", {})
    return sorted({file for name, file in file_of.items() if name.startswith(PARTS)})


def read_weights(folder: Path, dtype: torch.dtype, device: torch.device | str) -> dict[str, Tensor]:
    """The encoder's tensors by name: the ViT's in `dtype`, the others in float32.

    Each is cast as it is read, so that a second copy of the model is never in memory.

    Raises:
        CheckpointError: a file is missing, or is not in safetensors format.
    """
    from safetensors import SafetensorError, safe_open

    weights: dict[str, Tensor] = {}
    for name in weight_files(folder):
        try:
            with safe_open(folder / name, "pt") as file:
                for key in file.keys():  # noqa: SIM118  (not a dict)
                    if key.startswith(PARTS):
                        target = dtype if key.startswith("vision_model.") else torch.float32
                        weights[key] = file.get_tensor(key).to(device=device, dtype=target)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"cannot be read ({error})", where=folder / name, fix="get the file again, in safetensors format"
            ) from error
    return weights


def fingerprint(encoder: nn.Module, about: Any) -> str:
    """SHA-256 of `about` (JSON-ready) and of every weight, as it is loaded."""
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
