"""Checkpoints of a training in progress: what trains, the optimizer and the position; nothing frozen.

`checkpoints/step-00000200/` holds `model.safetensors`, `optimizer.safetensors` and `state.json`. It is written under
another name and renamed when complete, and the one before is removed only then: whenever the process is killed, a
whole checkpoint is there. `best.safetensors` beside it is the best model so far. Both go when the stage's result is
finished, and not before, so a run killed at its very end still resumes. Random numbers are a function of seed, step and
rank (see `loop`), so none are saved.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from elmd.engine.files import atomic, read_json
from elmd.errors import CheckpointError

Modules = Mapping[str, nn.Module]


def tensors(modules: Modules) -> dict[str, Tensor]:
    """What trains, by `<module>.<parameter>`; frozen parameters and buffers are left out."""
    return {
        f"{name}.{key}": parameter.detach()
        for name, module in modules.items()
        for key, parameter in module.named_parameters()
        if parameter.requires_grad
    }


def save_tensors(path: Path, values: Mapping[str, Tensor]) -> None:
    """Write tensors to a safetensors file atomically."""
    with atomic(path) as new:
        save_file({key: value.detach().cpu().contiguous() for key, value in values.items()}, new)


def load_tensors(path: Path, modules: Modules) -> None:
    """Copy saved tensors into what trains.

    Raises:
        CheckpointError: the file is missing or its names or shapes are not those of the modules.
    """
    if not path.is_file():
        raise CheckpointError("no such checkpoint", where=path, fix="train it first")
    saved, wanted = load_file(path), tensors(modules)
    if missing := sorted(wanted.keys() ^ saved.keys()):
        raise CheckpointError(
            f"holds other tensors than the model trains, first {missing[0]!r}", where=path, fix="train it again"
        )
    with torch.no_grad():
        for key, value in wanted.items():
            if value.shape != saved[key].shape:
                raise CheckpointError(
                    f"{key} has shape {list(saved[key].shape)}, the model's is {list(value.shape)}",
                    where=path,
                    fix="use the configuration that it was trained with",
                )
            value.copy_(saved[key])


def save(folder: Path, step: int, modules: Modules, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Write the checkpoint of `step` and remove the older ones."""
    new = folder / f"step-{step:08d}.tmp"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    save_tensors(new / "model.safetensors", tensors(modules))
    save_tensors(new / "optimizer.safetensors", _optimizer_tensors(optimizer))
    (new / "state.json").write_text(json.dumps({**state, "step": step}))
    final = folder / f"step-{step:08d}"
    shutil.rmtree(final, ignore_errors=True)
    new.rename(final)
    for old in folder.glob("step-*"):
        if old.name != final.name:
            shutil.rmtree(old)


def load_latest(folder: Path, modules: Modules, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
    """Restore the newest whole checkpoint; returns its state, or None where there is none."""
    whole = sorted(p for p in folder.glob("step-????????") if p.is_dir()) if folder.is_dir() else []
    if not whole:
        return None
    load_tensors(whole[-1] / "model.safetensors", modules)
    _load_optimizer(optimizer, load_file(whole[-1] / "optimizer.safetensors"))
    return read_json(whole[-1] / "state.json")


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    states = optimizer.state_dict()["state"]
    return {f"{i}.{key}": value for i, state in states.items() for key, value in state.items()}


def _load_optimizer(optimizer: torch.optim.Optimizer, saved: Mapping[str, Tensor]) -> None:
    whole = optimizer.state_dict()
    whole["state"] = {}
    for name, value in saved.items():
        i, key = name.split(".", 1)
        whole["state"].setdefault(int(i), {})[key] = value
    optimizer.load_state_dict(whole)
