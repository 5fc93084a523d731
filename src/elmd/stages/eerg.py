"""Emotion-Enhanced Response Generation (§3.5): prefix and projector learn to write emotion and response."""

from __future__ import annotations

import torch

from elmd.config import Config, ProjectorInit, plain
from elmd.log import table
from elmd.models.elmd import PROJECTOR, Elmd
from elmd.models.prefix import Prefix
from elmd.models.projector import Projector
from elmd.stages.base import Depends, Job, Outcome, Stage
from elmd.stages.parts import depends_on_parts, load_parts
from elmd.training.loop import Plan, fit
from elmd.training.tokens import TokenTask, token_loss


def starts_from_rep(cfg: Config) -> bool:
    """Whether the projector comes from REP; w/o V there is none, w/o REP it starts at random."""
    return cfg.sees_video and cfg.eerg.projector_from is ProjectorInit.rep


def depends(cfg: Config) -> Depends:
    eerg = {key: value for key, value in plain(cfg.eerg).items() if key not in ("micro_tokens", "checkpoint_every")}
    if not cfg.sees_video:
        del eerg["projector_from"], eerg["lr_projector"]
    upstream = ("rep",) if starts_from_rep(cfg) else ()
    return depends_on_parts(cfg) | Depends(config={"eerg": eerg}, upstream=upstream, seed=cfg.seed)


def run(cfg: Config, job: Job) -> Outcome:
    parts = load_parts(cfg, job)
    torch.manual_seed(cfg.seed)
    projector = None
    if starts_from_rep(cfg):
        projector = Projector.load(job.upstream["rep"] / PROJECTOR)
    elif cfg.sees_video:
        projector = Projector(parts.width, parts.hidden)
    prefix = Prefix.create(parts.llm, cfg.eerg.prefix_length, cfg.eerg.prefix_dropout)
    model = Elmd(parts.llm, projector, prefix).to(job.accelerator.device)

    train = parts.examples(parts.split("train"), "eerg", with_target=True)
    selection = parts.examples(parts.split(cfg.eerg.select_on), "eerg", with_target=True)

    def evaluate() -> dict[str, float]:
        return {"loss": token_loss(model, selection, cfg.eerg.micro_tokens, job.accelerator, "validation loss")}

    trained: dict[str, torch.nn.Module] = {"prefix": prefix}
    if projector is not None:
        trained["projector"] = projector
    task = TokenTask(
        model,
        trained,
        train,
        job.accelerator,
        batch_size=cfg.eerg.batch_size,
        micro_tokens=cfg.eerg.micro_tokens,
        seed=cfg.seed,
        evaluate=evaluate,
    )
    plan = Plan(
        rates={"prefix": cfg.eerg.lr_prefix, "projector": cfg.eerg.lr_projector},
        steps=cfg.eerg.steps,
        seed=cfg.seed,
        select="loss",
        higher_is_better=False,
        evaluate_every=cfg.eerg.evaluate_every,
        checkpoint_every=cfg.eerg.checkpoint_every,
        warmup=cfg.eerg.warmup,
        weight_decay=cfg.eerg.weight_decay,
        max_grad_norm=cfg.eerg.max_grad_norm,
    )
    done = fit(task, plan, job.folder, job.accelerator, "EERG")

    if job.accelerator.is_main_process:
        parts.encoder.prompt.save(job.folder / "prompt.json")
        model.save(job.folder)
    sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in trained.items()}
    frozen = sum(p.numel() for p in parts.llm.parameters())
    table(
        "EERG: emotion and response",
        ["", "value"],
        [
            ["training samples", len(train)],
            ["steps", done.step],
            ["validation loss per token, best", done.best],
            ["  at step", done.best_step],
            *([f"parameters trained: {name}", size] for name, size in sizes.items()),
            ["parameters frozen: language model", frozen],
        ],
    )
    return Outcome(
        metrics={"valid_loss": done.best, "best_step": done.best_step, "history": done.history, "trained": sizes},
        primary="valid_loss",
        counts={"cut": dict(parts.encoder.cuts), "train": len(train)},
    )


STAGE = Stage("eerg", 1, depends, run)
