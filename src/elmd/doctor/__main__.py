"""The command line of the doctor: everything that a configuration needs, one line each."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from elmd.cli import command
from elmd.config import Config, OnMissingClip, Reader, check, check_ranges
from elmd.doctor.findings import HOMES, Finding
from elmd.errors import ElmdError
from elmd.log import is_main, table
from elmd.vision.video import IMAGES

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PretrainedConfig

#: Bytes of weights whose checksums are not known yet, from which on the doctor does not wait for them.
PATIENCE = 2**30

#: GiB free below which the doctor warns: one training's checkpoints and caches take about as much.
ROOM = 1


def doctor(cfg: Config, accelerator: Accelerator) -> None:
    """Print every finding and the memory that training takes; exit code 1 if something is missing.

    Raises:
        ConfigError: a number is out of its range, so that nothing can be said of it.
    """
    from elmd.doctor.checkpoints import agreement, checkpoints, llm_config, loading, projector

    check_ranges(cfg)
    findings = [*machine(cfg, accelerator), *data(cfg), *checkpoints(cfg)]
    wrong, known = [], None
    if not cfg.baseline.name.own_model:  # those have no language model
        wrong, known = list(loading(cfg)), llm_config(cfg)
        findings += [*wrong, *agreement(cfg), *projector(cfg)]
    if not any(finding.missing for finding in findings):
        findings += list(rules(cfg)) or stages(cfg, accelerator)
    table(
        f"What {cfg.experiment_name} needs",
        ["", "found", "to do"],
        [(("✗ " if f.missing else "· " if f.fix else "✓ ") + f.what, f.found, f.fix) for f in findings],
    )
    if known is not None and is_main() and not any(f.what == "llm.dtype" for f in wrong):
        estimate(cfg, *known, accelerator)
    missing = sum(f.missing for f in findings)
    told = f"{missing} thing{'s' if missing > 1 else ''} missing; see the last column."
    if is_main():
        later = "Which stages are done shows when nothing is missing."
        print(f"{told} {later}" if missing else "Nothing is missing.", file=sys.stderr)
    accelerator.wait_for_everyone()  # a launcher stops all as soon as one leaves with an error
    if missing:
        sys.exit(1)


def estimate(cfg: Config, config: PretrainedConfig, own: bool, accelerator: Accelerator) -> None:
    """Print how much memory training takes with this language model.

    Args:
        own: whether the configuration is the checkpoint's own.
    """
    import torch

    from elmd.doctor.memory import GIB, show
    from elmd.models.sharding import sharding

    here = None
    if accelerator.device.type == "cuda":
        here = torch.cuda.get_device_properties(accelerator.device).total_memory / GIB
    try:
        share = accelerator.num_processes if sharding(accelerator) else 1
        show(cfg, config, assumed=not own, share=share, here=here)
    except ElmdError as error:
        print(error, file=sys.stderr)


def machine(cfg: Config, accelerator: Accelerator) -> Iterator[Finding]:
    import torch

    from elmd.stages.chain import versions

    for library, version in versions().items():
        gone = version == "not installed"
        yield Finding(library, version, "pip install it (see pyproject.toml)" if gone else "", gone)
    if accelerator.device.type == "cuda":
        memory = torch.cuda.get_device_properties(accelerator.device).total_memory / 2**30
        yield Finding("device", f"{torch.cuda.get_device_name()}, {memory:.0f} GiB × {accelerator.num_processes}")
    else:
        yield Finding("device", f"CPU, {os.cpu_count()} cores", "enough for the tiny world; real backbones want a GPU")
    root = Path(cfg.runs_dir).absolute()
    nearest = next(p for p in (root, *root.parents) if p.exists())
    writable = os.access(nearest, os.W_OK)
    free = shutil.disk_usage(nearest).free / 2**30
    told = "" if free >= ROOM else f"less than {ROOM} GiB: make room, or choose another disk"
    yield Finding(
        "runs_dir",
        f"{cfg.runs_dir}, {free:.{0 if free >= 10 else 1}f} GiB free",
        told if writable else "choose a folder you may write",
        not writable,
    )


def data(cfg: Config) -> Iterator[Finding]:
    name = f"data={cfg.data.name}"
    if cfg.data.reader is Reader.tiny:
        yield Finding(name, "the tiny world", "made by stage=bootstrap")
    elif cfg.data.path is None:
        yield Finding(name, "data.path is not set", HOMES.get(cfg.data.name, "data.path=…, see data/README.md"), True)
    else:
        path = Path(cfg.data.path)
        wanted = path / "annotation.json" if cfg.data.reader is Reader.m3ed and not path.is_file() else path
        there = wanted.exists()
        yield Finding(
            name, str(wanted), "" if there else f"not there: {HOMES.get(cfg.data.name, 'check it')}", not there
        )
    if cfg.data.video_root is not None:
        yield videos(cfg, Path(cfg.data.video_root))
    elif cfg.sees_video and cfg.data.reader in (Reader.m3ed, Reader.cped):
        yield Finding(
            "videos", "data.video_root is not set", "set it, or choose vision=precomputed or vision=none", missing=True
        )


def videos(cfg: Config, root: Path) -> Finding:
    """Whether there is a single file that ends as `data.video_template` says; where that has no ending, or a frame."""
    if not root.is_dir():
        return Finding("videos", str(root), "no such folder", True)
    ending = Path(cfg.data.video_template).suffix

    def counts(name: str) -> bool:
        suffix = Path(name).suffix
        return suffix == ending or (not ending and suffix.lower() in IMAGES)

    read = cfg.data.reader in (Reader.m3ed, Reader.cped)
    needed = read and (cfg.sees_video or cfg.data.on_missing_clip is OnMissingClip.error)
    if not needed or any(counts(name) for _, _, names in os.walk(root, followlinks=True) for name in names):
        return Finding("videos", str(root))
    told = f"{root}: holds no {ending} file" if ending else f"{root}: holds no frames"
    return Finding("videos", told, "correct data.video_root, or data.video_template where they end otherwise", True)


def rules(cfg: Config) -> Iterator[Finding]:
    try:
        check(cfg)
    except ElmdError as error:
        yield Finding("configuration", error.what, error.fix or "", True)


def stages(cfg: Config, accelerator: Accelerator) -> Iterator[Finding]:
    """What of the chain is up to date; nothing where its inputs are not there yet."""
    from elmd.stages.chain import Chain

    if (size := unread(cfg)) > PATIENCE:
        told = f"their names need checksums of {size / 1e9:.0f} GB of weights, which the first stage computes, once"
        yield Finding("stages", "not looked at", told)
        return
    chain = Chain(cfg, accelerator)
    try:
        names = list(chain.order("generate"))
    except ElmdError:
        return
    for name in names:
        fingerprint = chain.node(name).fingerprint
        if chain.store.finished(name, fingerprint):
            yield Finding(f"stage {name}", f"up to date ({fingerprint})")
        elif chain.store.partial(name, fingerprint).exists():
            yield Finding(f"stage {name}", "interrupted", "goes on where it stopped")
        else:
            how = "python -m elmd.evaluate" if name == "generate" else "stage=all"
            yield Finding(f"stage {name}", "not made yet", f"{how} makes it")


def unread(cfg: Config) -> int:
    """Bytes of weights in folders whose checksums `runs/` does not hold."""
    remembered = Path(cfg.runs_dir) / ".hashes.json"
    known = remembered.read_text(encoding="utf-8") if remembered.is_file() else ""
    folders = [Path(path) for path in (cfg.llm.path, cfg.vision.path, cfg.retriever.path) if path is not None]
    files = [file for folder in folders if folder.is_dir() for file in folder.rglob("*.safetensors")]
    return sum(file.stat().st_size for file in files if json.dumps(str(file.resolve())) not in known)


main = command("doctor", doctor, checked=False)

if __name__ == "__main__":
    main()
