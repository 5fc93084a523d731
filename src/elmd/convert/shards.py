"""Read a checkpoint shard by shard, rename its tensors, write the result: whole or not at all.

A function `translate(name, tensor)` says what each tensor becomes. It runs twice: on meta tensors, so that all names
and shapes are checked before a byte is written, then on the memory-mapped weights. Neither checkpoint is ever in memory
as a whole: tensors that are read are pages of the file, and the writer gets at most `LARGEST` bytes at a time.
"""

from __future__ import annotations

import fcntl
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from elmd.engine.files import read_object, write_json
from elmd.errors import CheckpointError, reason
from elmd.log import progress

#: What a source tensor becomes: tensors by name, none where it is left out. It works on meta tensors too, keeps the
#: dtype, and raises CheckpointError for an unknown name.
Translate = Callable[[str, Tensor], dict[str, Tensor]]

#: Bytes of a written file at most, unless a single tensor is larger.
LARGEST = 2 * 10**9
#: Bytes that stay free on the disk beside what is written.
SPARE = 64 * 2**20

_AGAIN = "download the checkpoint again"
_STEMS = (("model", ".safetensors"), ("pytorch_model", ".bin"))


class Source:
    """A checkpoint's tensors, in safetensors or PyTorch's .bin/.pt files (weights only, memory-mapped).

    Args:
        path: a folder with `model.safetensors` or `pytorch_model.bin`, whole or in shards, with or without an index
            (safetensors first); or one file. `.pt` files of SwissArmyTransformer, `{"module": {name: tensor}, …}`,
            are unwrapped.

    Raises:
        CheckpointError: a file is missing, cut off, a Git LFS pointer, no checkpoint, holds other objects than tensors,
            or disagrees with the index; or a tensor is in two files.
    """

    def __init__(self, path: Path):
        self.path = path
        self.files, index = _find(path)
        #: The tensors of each file, on the meta device.
        self.meta: dict[Path, dict[str, Tensor]] = {}
        owner: dict[str, Path] = {}
        for file in self.files:
            self.meta[file] = {name: torch.empty_like(tensor, device="meta") for name, tensor in _open(file).items()}
            for name in self.meta[file]:
                if name in owner:
                    raise CheckpointError(f"{name} is in {owner[name].name} too", where=file, fix=_AGAIN)
                owner[name] = file
        places = owner if index is None else index
        for name in sorted({*owner, *places}):
            if places.get(name) != owner.get(name):
                listed, actual = (
                    f"in {file.name}" if file else "in no file" for file in (places.get(name), owner.get(name))
                )
                raise CheckpointError(
                    f"the index says that {name} is {listed}, but it is {actual}", where=path, fix=_AGAIN
                )

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors on the meta device: names, shapes and dtypes."""
        return {name: tensor for tensors in self.meta.values() for name, tensor in tensors.items()}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        return {name: tensor.dtype for name, tensor in self.tensors.items()}

    def shards(self) -> Iterator[tuple[Path, dict[str, Tensor]]]:
        """Each file with its tensors, opened when it is reached."""
        for file in self.files:
            yield file, _open(file)


@dataclass(frozen=True)
class Written:
    """What a conversion wrote."""

    tensors: int
    parameters: int
    files: int
    bytes: int


def convert(
    source: Source,
    translate: Translate,
    wanted: Mapping[str, tuple[int, ...]],
    folder: Path,
    finish: Callable[[Path], None],
    *,
    what: str,
    keep: Callable[[str], bool] | None = None,
) -> Written:
    """Write `folder`: the translated tensors as safetensors, and what `finish` adds. See `building`.

    Args:
        wanted: the shape of every tensor of the result by name; the result holds exactly these.
        folder: must not exist, or be empty.
        finish: writes configuration, tokenizer and the like into a folder.
        what: title of the progress bar.
        keep: whether a source tensor is converted; None: all are.

    Raises:
        CheckpointError: the result would not be what is `wanted`, the folder exists, or the disk is too small. Nothing
            has been written then.
    """
    refuse_taken(folder)
    parts, sizes = _plan(source, translate, wanted, keep)
    total = sum(sizes.values())
    with building(folder, total) as partial:
        files = [
            "model.safetensors" if len(parts) == 1 else f"model-{i:05d}-of-{len(parts):05d}.safetensors"
            for i in range(1, len(parts) + 1)
        ]
        weight_map: dict[str, str] = {}
        opened: tuple[Path, dict[str, Tensor]] | None = None
        for (file, names), target in progress(list(zip(parts, files, strict=True)), what, unit="file"):
            if opened is None or opened[0] != file:
                opened = file, _open(file)
            result = {
                name: tensor.contiguous()
                for original in names
                for name, tensor in translate(original, opened[1][original]).items()
            }
            save(result, partial / target)
            weight_map |= dict.fromkeys(result, target)
        if len(parts) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            write_json(partial / "model.safetensors.index.json", index)
        finish(partial)
    parameters = sum(torch.Size(shape).numel() for shape in wanted.values())
    return Written(len(wanted), parameters, len(files), total)


def save(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file that transformers and PEFT read, with the permissions of any other new file."""
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors writes files for the owner alone


def refuse_taken(folder: Path, fix: str = "move it away, or give another folder for the result") -> None:
    """
    Raises:
        CheckpointError: `folder` exists and is not empty.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise CheckpointError("exists already", where=folder, fix=fix)


@contextmanager
def building(folder: Path, size: int) -> Iterator[Path]:
    """`<folder>.partial/` to write into; it becomes `folder` at the end and is removed on any error.

    Args:
        size: bytes that will be written, about.

    Raises:
        CheckpointError: the disk is too small, writing failed, or another process is writing there.
    """
    partial = folder.with_name(folder.name + ".partial")
    disk = next(parent for parent in partial.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(disk).free
    if free < size + SPARE:
        raise CheckpointError(
            f"the result takes {size / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB left",
            where=folder, fix="make room, or write to another disk"
        )  # fmt: skip
    try:
        partial.mkdir(parents=True, exist_ok=True)
        handle = os.open(partial, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"cannot be written ({_reason(error)})", where=folder) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system frees it when a process is killed
    except BlockingIOError as error:
        os.close(handle)
        raise CheckpointError("is being written by another process", where=folder, fix="wait for it") from error
    try:
        for left in partial.iterdir():  # by a process that was killed
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        yield partial
        partial.rename(folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot be written ({_reason(error)})", where=folder) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(handle)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a checkpoint.

    Raises:
        CheckpointError: the file is missing or is not one.
    """
    return read_object(path, CheckpointError, _AGAIN)


def _plan(
    source: Source, translate: Translate, wanted: Mapping[str, tuple[int, ...]], keep: Callable[[str], bool] | None
) -> tuple[list[tuple[Path, list[str]]], dict[str, int]]:
    """For each file to write, its source file and tensors; and the bytes of each result. Checks all against `wanted`.

    A written file has tensors of one source file only, so that one is open at a time.
    """
    parts: list[tuple[Path, list[str]]] = []
    sizes: dict[str, int] = {}
    origin: dict[str, str] = {}
    for file, tensors in source.meta.items():
        filled = LARGEST
        for original, tensor in tensors.items():
            if keep is not None and not keep(original):
                continue
            try:
                results = translate(original, tensor)
            except CheckpointError as error:
                raise error if error.where else CheckpointError(error.what, where=file, fix=error.fix) from error
            size = 0
            for name, result in results.items():
                if name in origin:
                    raise CheckpointError(f"{original} and {origin[name]} both become {name}", where=file)
                if name not in wanted:
                    raise CheckpointError(f"{original} becomes {name}, which the model does not have", where=file)
                if tuple(result.shape) != tuple(wanted[name]):
                    raise CheckpointError(
                        f"{original} becomes {name} of shape {list(result.shape)}, "
                        f"but by the configuration it is {list(wanted[name])}",
                        where=file, fix="the weights belong to another configuration: check config.json"
                    )  # fmt: skip
                origin[name] = original
                sizes[name] = result.numel() * result.element_size()
                size += sizes[name]
            if not results:
                continue
            if filled + size > LARGEST:
                parts.append((file, []))
                filled = 0
            parts[-1][1].append(original)
            filled += size
    if missing := sorted(set(wanted) - set(origin)):
        some = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise CheckpointError(f"holds nothing that becomes {some}", where=source.path, fix=_AGAIN)
    return parts, sizes


def _find(path: Path) -> tuple[list[Path], dict[str, Path] | None]:
    """The files of a checkpoint, and the file of each tensor by the index; None where there is no index."""
    if path.is_file():
        return [path], None
    if not path.is_dir():
        raise CheckpointError("does not exist", where=path, fix="give a folder or file of weights")
    for stem, ending in _STEMS:
        index = path / f"{stem}{ending}.index.json"
        if index.is_file():
            places = read_json(index).get("weight_map")
            if not isinstance(places, dict) or not places or not all(isinstance(at, str) for at in places.values()):
                raise CheckpointError("has no weight_map", where=index, fix=_AGAIN)
            files = {name: path / at for name, at in places.items()}
            for file in sorted(set(files.values())):
                if not file.is_file():
                    raise CheckpointError(f"is missing, but {index.name} names it", where=file, fix=_AGAIN)
            return sorted(set(files.values())), files
        if (path / f"{stem}{ending}").is_file():
            return [path / f"{stem}{ending}"], None
        if shards := sorted(path.glob(f"{stem}-*-of-*{ending}")):
            count = int((re.search(r"-of-(\d+)\.", shards[0].name) or ["", "0"])[1])
            if count != len(shards):
                raise CheckpointError(f"holds {len(shards)} of {count} files {stem}-*{ending}", where=path, fix=_AGAIN)
            return shards, None
    raise CheckpointError(
        "holds no weights (model.safetensors, pytorch_model.bin, or their shards)",
        where=path, fix="give the folder of the downloaded checkpoint"
    )  # fmt: skip


def _open(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, memory-mapped: nothing is read yet."""
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise _unreadable(path, error) from error
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            "is a Git LFS pointer, not the weights themselves", where=path, fix="run git lfs pull in its repository"
        )
    if start.lstrip()[:1] == b"<":
        raise CheckpointError("is a web page, not weights", where=path, fix=_AGAIN)
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt") as opened:
                return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError) as error:
            raise _unreadable(path, error) from error
    if start[:4] != b"PK\x03\x04":
        raise CheckpointError(
            "is no checkpoint in PyTorch's format (since 1.6)", where=path, fix=f"{_AGAIN}, or save it again with torch"
        )
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            "holds other objects than tensors, which loading would run as code",
            where=path, fix="use a checkpoint in safetensors, or one of tensors only"
        ) from error  # fmt: skip
    except (OSError, RuntimeError, EOFError) as error:
        raise _unreadable(path, error) from error
    if isinstance(content, dict) and isinstance(content.get("module"), dict):
        content = content["module"]  # SwissArmyTransformer
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError("is not a dictionary of tensors", where=path)
    return content


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({_reason(error)})",
        where=path,
        fix=_AGAIN,
    )


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return reason(error)
