"""`python -m elmd.train stage=bootstrap|prepare|erm|index|features|rep|eerg|all …`: run a stage, or the chain."""

from __future__ import annotations

from typing import TYPE_CHECKING

from elmd.cli import command, experiment_folder, job_axes
from elmd.config import Config

if TYPE_CHECKING:
    from accelerate import Accelerator


def train(cfg: Config, accelerator: Accelerator) -> None:
    from elmd.stages.chain import Chain

    chain = Chain(cfg, accelerator)
    chain.run(cfg.stage)
    chain.point(experiment_folder(cfg), job_axes(cfg))


main = command("train", train)

if __name__ == "__main__":
    main()
