"""Emotion-Enhanced Response Generation (§3.5): adapter and projector learn to write emotion and response."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from elmd.config import AdapterKind, Config, EergConfig, ProjectorInit
from elmd.data.prompts import Task
from elmd.engine.stage import Inputs, Job, Outcome
from elmd.errors import CheckpointError
from elmd.log import table
from elmd.models import PROJECTOR
from elmd.models.projector import Projector
from elmd.stages.parts import load_parts, place, reads_parts
from elmd.training.loop import fit
from elmd.training.plan import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from elmd.models.adapter import Adapter


def task_of(cfg: Config) -> Task:
    """What the prompt asks for and the target holds."""
    return "eerg" if cfg.eerg.with_emotion else "reply"


def create_adapter(llm: PreTrainedModel, eerg: EergConfig) -> Adapter | None:
    """The adapter that the configuration says, None for a projector alone."""
    from elmd.models.adapter import Lora, Prefix, load_adapter

    kinds = {AdapterKind.prefix: Prefix, AdapterKind.lora: Lora}
    if eerg.adapter_from is not None and eerg.adapter in kinds:
        adapter = load_adapter(llm, Path(eerg.adapter_from), trainable=True, dropout=eerg.prefix_dropout)
        if type(adapter) is not kinds[eerg.adapter]:
            raise CheckpointError(
                f"is a {type(adapter).__name__} adapter, and eerg.adapter={eerg.adapter}",
                where=eerg.adapter_from,
                fix="set eerg.adapter to what it is",
            )
        return adapter
    if eerg.adapter is AdapterKind.prefix:
        return Prefix.create(llm, eerg.prefix_length, eerg.prefix_dropout)
    if eerg.adapter is AdapterKind.lora:
        return Lora.create(llm, eerg.lora_rank, eerg.lora_alpha, eerg.lora_dropout)
    return None


def reads(cfg: Config) -> Inputs:
    start = cfg.eerg.adapter_from
    return reads_parts(cfg) | Inputs(
        ("eerg", "seed"),
        upstream=("rep",) if starts_from_rep(cfg) else (),
        files={"adapter": Path(start)} if start else {},
    )


def starts_from_rep(cfg: Config) -> bool:
    """Whether EERG's projector comes from REP; w/o V there is none, w/o REP it starts at random."""
    return cfg.sees_video and cfg.eerg.projector_from is ProjectorInit.rep


def run(cfg: Config, job: Job) -> Outcome:
    from elmd.models.elmd import Elmd
    from elmd.training.tokens import ElmdObjective, token_loss

    parts = load_parts(cfg, job)
    torch.manual_seed(cfg.seed)
    projector = None
    if starts_from_rep(cfg):
        projector = Projector.load(job.upstream["rep"] / PROJECTOR)
    elif cfg.sees_video:
        projector = Projector(parts.width, parts.hidden)
    adapter = create_adapter(parts.llm, cfg.eerg)
    trained: dict[str, torch.nn.Module] = {}
    if adapter is not None:
        trained["adapter"] = adapter
    if projector is not None:
        trained["projector"] = projector

    samples, task_name = parts.split("train"), task_of(cfg)
    train = parts.examples(parts.with_clip(samples) if adapter is None else samples, task_name, with_target=True)
    selection = parts.examples(parts.split(cfg.eerg.select_on), task_name, with_target=True)
    model = place(Elmd(parts.llm, projector, adapter), job.accelerator)

    def evaluate() -> dict[str, float]:
        return {"loss": token_loss(model, selection, cfg.eerg.micro_tokens, job.accelerator, "validation loss")}

    objective = ElmdObjective(
        model,
        trained,
        train,
        job.accelerator,
        batch_size=cfg.eerg.batch_size,
        micro_tokens=cfg.eerg.micro_tokens,
        seed=cfg.seed,
        evaluate=evaluate,
    )
    model.checkpointing = parts.checkpointing(cfg, objective, cfg.eerg.steps)
    plan = Plan.of(
        cfg.eerg,
        rates={"adapter": cfg.eerg.lr_adapter, "projector": cfg.eerg.lr_projector},
        steps=cfg.eerg.steps,
        seed=cfg.seed,
        select="loss",
        higher_is_better=False,
        evaluate_every=cfg.eerg.evaluate_every,
    )
    done = fit(objective, plan, job.folder, job.accelerator, "EERG")

    if job.accelerator.is_main_process:
        parts.encoder.prompt.save(job.folder / "prompt.json")
        model.save(job.folder)
    sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in trained.items()}
    frozen = sum(p.numel() for p in parts.llm.parameters() if not p.requires_grad)
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
            ["activation checkpointing", "yes" if model.checkpointing else "no"],
        ],
    )
    return Outcome(
        metrics={"valid_loss": done.best, "best_step": done.best_step, "history": done.history, "trained": sizes},
        primary="valid_loss",
        counts={"cut": dict(parts.encoder.cuts), "train": len(train), "train_left_out": len(samples) - len(train)},
    )
