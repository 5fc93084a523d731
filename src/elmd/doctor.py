"""`python -m elmd.doctor …`: what a configuration needs and what of it is missing, before hours are spent."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from elmd.cli import command
from elmd.config import BOOTSTRAP, Config, Reader, VisionKind, check
from elmd.errors import ElmdError
from elmd.log import table

if TYPE_CHECKING:
    from accelerate import Accelerator

#: Where the public checkpoints and data sets come from; data/README.md says more.
HOMES = {
    "chatglm2_6b": "huggingface.co/THUDM/chatglm2-6b, in transformers' Glm layout (a converter is still to come)",
    "visualglm": "huggingface.co/THUDM/visualglm-6b, in the BLIP-2 layout (a converter is still to come)",
    "blip2": "huggingface.co/Salesforce/blip2-opt-2.7b",
    "m3e_base": "huggingface.co/moka-ai/m3e-base",
    "m3ed": "github.com/AIM3-RUC/RUCM3ED",
    "cped": "github.com/scutcyr/CPED",
}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; `fix` is empty where nothing is to be done."""

    what: str
    found: str
    fix: str = ""
    missing: bool = False


def doctor(cfg: Config, accelerator: Accelerator) -> None:
    """Print every finding; exit code 1 if something is missing."""
    findings = [*machine(cfg, accelerator), *data(cfg), *checkpoints(cfg)]
    if not any(finding.missing for finding in findings):
        findings += list(rules(cfg)) or stages(cfg, accelerator)
    table(
        f"What {cfg.experiment_name} needs",
        ["", "found", "to do"],
        [(("✗ " if f.missing else "· " if f.fix else "✓ ") + f.what, f.found, f.fix) for f in findings],
    )
    if missing := sum(f.missing for f in findings):
        told = f"{missing} thing{'s' if missing > 1 else ''} missing; see the last column."
        print(f"{told} Which stages are done shows when nothing is missing.", file=sys.stderr)
        sys.exit(1)
    print("Nothing is missing.", file=sys.stderr)


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
    yield Finding(
        "runs_dir",
        f"{cfg.runs_dir}, {free:.0f} GiB free",
        "" if writable else "choose a folder you may write",
        not writable,
    )


def data(cfg: Config) -> Iterator[Finding]:
    name = f"data={cfg.data.name}"
    if cfg.data.reader is Reader.tiny:
        yield Finding(name, "the tiny world", "made by stage=bootstrap")
    elif cfg.data.path is None:
        yield Finding(
            name, "data.path is not set", f"data.path=…; {HOMES.get(cfg.data.name, 'see data/README.md')}", True
        )
    else:
        path = Path(cfg.data.path)
        wanted = path / "annotation.json" if cfg.data.reader is Reader.m3ed and not path.is_file() else path
        there = wanted.exists()
        yield Finding(
            name, str(wanted), "" if there else f"not there: {HOMES.get(cfg.data.name, 'check it')}", not there
        )
    if cfg.data.video_root is not None:
        there = Path(cfg.data.video_root).is_dir()
        yield Finding("videos", cfg.data.video_root, "" if there else "no such folder", not there)
    elif cfg.sees_video and cfg.data.reader in (Reader.m3ed, Reader.cped):
        yield Finding(
            "videos", "data.video_root is not set", "set it, or choose vision=precomputed or vision=none", missing=True
        )


def checkpoints(cfg: Config) -> Iterator[Finding]:
    groups = [("llm", cfg.llm.name, cfg.llm.path)]
    if cfg.vision.kind is VisionKind.encoder:
        groups.append(("vision", cfg.vision.name, cfg.vision.path))
    if cfg.retrieves:
        groups.append(("retriever", cfg.retriever.name, cfg.retriever.path))
    for group, name, path in groups:
        what, home = f"{group}={name}", HOMES.get(name, "a folder with config.json and safetensors weights")
        if path is None:
            yield Finding(what, f"{group}.path is not set", f"{group}.path=…; {home}", True)
        elif path == BOOTSTRAP:
            yield Finding(what, "a stand-in", "made by stage=bootstrap")
        elif Path(path).is_dir():
            weights = any(Path(path).rglob("*.safetensors"))
            config = (Path(path) / "config.json").is_file() or (Path(path) / "modules.json").is_file()
            good = weights and config
            lacks = " and ".join(w for w, there in (("config.json", config), ("*.safetensors", weights)) if not there)
            yield Finding(what, path, "" if good else f"the folder lacks {lacks}; {home}", not good)
        elif path.count("/") == 1 and not path.startswith((".", "/", "~")):
            from huggingface_hub import try_to_load_from_cache

            cached = isinstance(try_to_load_from_cache(path, "config.json"), str)
            yield Finding(what, f"hub id {path}", "" if cached else "not in the hub's cache: downloaded at first use")
        else:
            yield Finding(what, path, f"no such folder; {home}", True)


def rules(cfg: Config) -> Iterator[Finding]:
    try:
        check(cfg)
    except ElmdError as error:
        yield Finding("configuration", error.what, error.fix or "", True)


def stages(cfg: Config, accelerator: Accelerator) -> Iterator[Finding]:
    """What of the chain is up to date; nothing where its inputs are not there yet."""
    from elmd.stages.chain import Chain

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
            yield Finding(f"stage {name}", "not made yet", "stage=all makes it")


main = command("train", doctor, checked=False)

if __name__ == "__main__":
    main()
