"""The stages, one file each: what it reads (`reads`), and what it does (`run`), from top to bottom.

Libraries that take seconds to import are imported in the functions that need them, so that a chain that is up to date
is reported at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from elmd.config import Config
from elmd.engine.chain import Chain
from elmd.engine.stage import Stage
from elmd.stages import baseline, bootstrap, eerg, erm, features, generate, index, prepare, rep

if TYPE_CHECKING:
    from accelerate import Accelerator

#: Libraries whose versions a manifest records.
LIBRARIES = (
    "torch", "transformers", "peft", "sentence-transformers", "accelerate", "safetensors", "numpy", "faiss-cpu",
)  # fmt: skip


def _elmd(cfg: Config) -> bool:
    return not cfg.baseline.name.own_model


#: Every stage by name, each after those that it reads.
STAGES = {
    stage.name: stage
    for stage in (
        Stage("bootstrap/world", "world", 2, bootstrap.reads_world, bootstrap.world),
        Stage("prepare", "samples", 1, prepare.reads, prepare.run),
        Stage("bootstrap/llm", "stand-in", 4, bootstrap.reads_llm, bootstrap.llm),
        Stage("bootstrap/vision", "stand-in", 2, bootstrap.reads_vision, bootstrap.vision),
        Stage("bootstrap/retriever", "stand-in", 3, bootstrap.reads_retriever, bootstrap.retriever),
        Stage("erm", "retriever", 2, erm.reads, erm.run),
        Stage("index", "demonstrations", 1, index.reads, index.run),
        Stage("features", "features", 1, features.reads, features.run),
        Stage("rep", "projector", 2, rep.reads, rep.run),
        Stage("eerg", "generator", 1, eerg.reads, eerg.run, applies=_elmd),
        Stage("baseline", "generator", 1, baseline.reads, baseline.run, applies=lambda cfg: not _elmd(cfg)),
        Stage("generate", "replies", 1, generate.reads, generate.run),
    )
}


def chain_of(cfg: Config, accelerator: Accelerator) -> Chain:
    """The stages of a configuration."""
    return Chain(
        cfg, STAGES, accelerator, root=Path(cfg.runs_dir), force=cfg.force, program="python -m elmd.train",
        libraries=LIBRARIES,
    )  # fmt: skip
