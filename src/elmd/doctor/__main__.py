"""The command line of the doctor: everything that a configuration needs, one line each."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from elmd.checks import CHECKS, Inspection, results
from elmd.cli import command
from elmd.config import Config
from elmd.engine.keys import check_ranges
from elmd.errors import ElmdError
from elmd.log import is_main, table

if TYPE_CHECKING:
    from accelerate import Accelerator

#: If more bytes of weights than this have no known checksum yet, the doctor does not compute them.
PATIENCE = 2**30

#: GiB free below which the doctor warns: one training's checkpoints and caches take about as much.
ROOM = 1


@dataclass(frozen=True)
class Finding:
    """A line of the doctor's table; `fix` is empty where nothing is to be done."""

    name: str
    seen: str
    fix: str = ""
    missing: bool = False


def doctor(cfg: Config, accelerator: Accelerator) -> None:
    """Print every finding and the memory that training takes; exit code 1 if something is missing.

    Raises:
        ConfigError: a number is out of its range, so that nothing else can be judged.
    """
    check_ranges(cfg)
    inspection = Inspection(cfg)
    findings = [*machine(cfg, accelerator), *checked(inspection)]
    if not any(finding.missing for finding in findings):
        findings += stages(cfg, accelerator)
    table(
        f"What {cfg.experiment_name} needs",
        ["", "found", "to do"],
        [(("✗ " if f.missing else "· " if f.fix else "✓ ") + f.name, f.seen, f.fix) for f in findings],
    )
    if is_main() and inspection.has_llm and not any(f.name == "llm.dtype" and f.missing for f in findings):
        estimate(inspection, accelerator)
    if is_main():
        print(_summary(sum(f.missing for f in findings)), file=sys.stderr)
    accelerator.wait_for_everyone()  # a launcher stops all processes as soon as one leaves with an error
    if any(finding.missing for finding in findings):
        sys.exit(1)


def _summary(missing: int) -> str:
    if not missing:
        return "Nothing is missing."
    things = "1 thing" if missing == 1 else f"{missing} things"
    return f"{things} missing; see the last column. Which stages are done shows when nothing is missing."


def checked(inspection: Inspection) -> Iterator[Finding]:
    """The result of every check that applies to the configuration."""
    for check, result in results(CHECKS, inspection):
        if isinstance(result, ElmdError):
            where = f"{result.where}: " if result.where else ""
            yield Finding(check.name, f"{where}{result.what}", result.fix or "", True)
        elif result is not None:
            yield Finding(check.name, result.text, result.advice)


def estimate(inspection: Inspection, accelerator: Accelerator) -> None:
    """Print how much memory training takes with this language model; nothing where its shape is not known."""
    import torch

    from elmd.doctor.memory import GIB, public_config, show
    from elmd.models.sharding import sharding

    own = inspection.llm_config_if_readable
    config = own or public_config(inspection.cfg)
    if config is None:
        return
    here = None
    if accelerator.device.type == "cuda":
        here = torch.cuda.get_device_properties(accelerator.device).total_memory / GIB
    try:
        share = accelerator.num_processes if sharding(accelerator) else 1
        show(inspection.cfg, config, assumed=own is None, share=share, here=here)
    except ElmdError as error:
        print(error, file=sys.stderr)


def machine(cfg: Config, accelerator: Accelerator) -> Iterator[Finding]:
    """Libraries, device and disk."""
    import torch

    from elmd.engine.provenance import versions
    from elmd.stages import LIBRARIES

    for library, version in versions(LIBRARIES).items():
        missing = version == "not installed" and library != "faiss-cpu"  # an extra; a check of its own asks for it
        yield Finding(library, version, "pip install it (see pyproject.toml)" if missing else "", missing)
    if accelerator.device.type == "cuda":
        memory = torch.cuda.get_device_properties(accelerator.device).total_memory / 2**30
        yield Finding("device", f"{torch.cuda.get_device_name()}, {memory:.0f} GiB × {accelerator.num_processes}")
    else:
        yield Finding("device", f"CPU, {os.cpu_count()} cores", "enough for the tiny world; real backbones want a GPU")
    root = Path(cfg.runs_dir).absolute()
    nearest = next(p for p in (root, *root.parents) if p.exists())
    free = shutil.disk_usage(nearest).free / 2**30
    seen = f"{cfg.runs_dir}, {free:.{0 if free >= 10 else 1}f} GiB free"
    if not os.access(nearest, os.W_OK):
        yield Finding("runs_dir", seen, "choose a folder you may write", True)
    else:
        full = f"less than {ROOM} GiB: make room, or choose another disk"
        yield Finding("runs_dir", seen, "" if free >= ROOM else full)


def stages(cfg: Config, accelerator: Accelerator) -> Iterator[Finding]:
    """Which stages of the chain are up to date; nothing where its inputs are not there yet."""
    from elmd.stages import chain_of

    if (size := unhashed(cfg)) > PATIENCE:
        fix = f"their names need checksums of {size / 1e9:.0f} GB of weights, which the first stage computes, once"
        yield Finding("stages", "not looked at", fix)
        return
    chain = chain_of(cfg, accelerator)
    try:
        names = list(chain.order("generate"))
    except ElmdError:
        return
    for name in names:
        fingerprint = chain.node(name).fingerprint
        if chain.store.finished(name, fingerprint):
            yield Finding(f"stage {name}", f"up to date ({fingerprint})")
        elif chain.store.partial(name, fingerprint).exists():
            yield Finding(f"stage {name}", "interrupted", "resumes where it stopped")
        else:
            how = "python -m elmd.evaluate" if name == "generate" else "stage=all"
            yield Finding(f"stage {name}", "not made yet", f"{how} makes it")


def unhashed(cfg: Config) -> int:
    """Bytes of weights in folders whose checksums are not remembered in `runs_dir`."""
    cache = Path(cfg.runs_dir) / ".hashes.json"
    remembered = cache.read_text(encoding="utf-8") if cache.is_file() else ""
    folders = [Path(path) for path in (cfg.llm.path, cfg.vision.path, cfg.retriever.path) if path is not None]
    files = [file for folder in folders if folder.is_dir() for file in folder.rglob("*.safetensors")]
    return sum(file.stat().st_size for file in files if json.dumps(str(file.resolve())) not in remembered)


main = command("doctor", doctor, checked=False)

if __name__ == "__main__":
    main()
