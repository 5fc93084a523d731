"""`python -m elmd.train stage=bootstrap|prepare|erm|index|features|rep|eerg|all …`: run a stage, or the chain."""

from __future__ import annotations

from typing import TYPE_CHECKING

from elmd.checks import preflight
from elmd.cli import command, experiment_folder, job_about
from elmd.config import Config, StageName
from elmd.log import logger

if TYPE_CHECKING:
    from accelerate import Accelerator


def train(cfg: Config, accelerator: Accelerator) -> None:
    from elmd.stages import chain_of

    chain = chain_of(cfg, accelerator)
    names = [cfg.stage.value]
    if cfg.stage in (StageName.all, StageName.bootstrap):
        names = list(chain.order(chain.role("generator")))
    if cfg.stage is StageName.all:
        preflight(cfg, chain.missing(names))
    if cfg.stage is StageName.bootstrap:
        names = [name for name in names if name.startswith("bootstrap/")]
        if not names:
            logger.info("nothing to make: no group of this configuration uses a stand-in")
    for name in names:
        chain.run(name)
    chain.point(experiment_folder(cfg), **job_about(cfg))


main = command("train", train)

if __name__ == "__main__":
    main()
