"""The doctor's estimate: how much memory training takes on one GPU, and how large a micro-batch fits on usual ones."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import GlmConfig, PretrainedConfig

from elmd.checks.agreement import visual_shape
from elmd.config import BOOTSTRAP, AdapterKind, Config, EergConfig, RepConfig
from elmd.convert.chatglm2 import CHATGLM2_6B, native_config
from elmd.dtypes import pick_dtype
from elmd.log import table
from elmd.models.memory import SHARE, StepMemory, adapter_size, step_memory

GIB = 2**30

#: GiB that torch sees of usual GPUs, by the size that they are sold as.
CARDS = {"24 GB": 23.6, "40 GB": 39.4, "80 GB": 79.1, "141 GB": 139.8}

#: GiB that CUDA itself takes in each process.
CONTEXT = 0.6

#: Columns of REP's target: an emotion word of two or three tokens, EOS, and one.
REP_TARGETS = 5

#: Part of REP's tokens that lie before the video slots, as counted on real television dialogue.
REP_FREE = 0.7


@dataclass(frozen=True)
class Estimate:
    """A stage's training step at its configured micro-batch: `rows` of `length` tokens, the longest there can be.

    `batch` rows make a whole global batch.
    """

    stage: str
    checkpointing: bool
    rows: int
    length: int
    batch: int
    memory: StepMemory

    def fits(self, gib: float) -> int:
        """Rows that fit on a GPU of that size; a step's memory is proportional to them."""
        free = SHARE * (gib - CONTEXT) * GIB - self.memory.weights - self.memory.trainables
        return max(0, int(free / (self.memory.step / self.rows)))


def public_config(cfg: Config) -> PretrainedConfig | None:
    """The configuration of the public model that has the name `cfg.llm.name`; None for any other name."""
    public = {"chatglm2_6b": lambda: native_config(CHATGLM2_6B), "glm4_9b": GlmConfig}
    return public[cfg.llm.name]() if cfg.llm.name in public and cfg.llm.path != BOOTSTRAP else None


def estimates(cfg: Config, config: PretrainedConfig, *, share: int = 1) -> Iterator[Estimate]:
    """REP's and EERG's step, each without and with activation checkpointing.

    Args:
        config: of the language model; its weights count in bfloat16 where `llm.dtype` is auto, as on a GPU.
        share: over how many GPUs the frozen weights are spread (FSDP).
    """
    text, width, prompt = config.get_text_config(decoder=True), visual_shape(cfg)[1], cfg.llm.max_prompt_tokens
    projector = (width + 1) * text.hidden_size if cfg.sees_video else 0
    config = deepcopy(config)
    # All but eager are fused kernels, and their packages need not be here to count.
    config._attn_implementation = "eager" if cfg.llm.attention == "eager" else "sdpa"

    def step(
        stage: str, own: RepConfig | EergConfig, targets: int, trainables: int, **others: Any
    ) -> Iterator[Estimate]:
        length = prompt + targets - 1
        rows = min(own.batch_size, max(1, own.micro_tokens // length))
        for checkpointing in (False, True):
            memory = step_memory(
                config,
                dtype=pick_dtype(cfg.llm.dtype, torch.device("cuda")),
                rows=rows,
                length=length,
                targets=targets,
                trainables=trainables,
                checkpointing=checkpointing,
                **others,
            )
            if share > 1:  # a layer's weights are whole while it runs, the next one's arrive meanwhile
                gathered = 2 * memory.weights // text.num_hidden_layers
                memory = replace(memory, weights=memory.weights // share + gathered)
            yield Estimate(stage, checkpointing, rows, length, own.batch_size, memory)

    free = int(REP_FREE * prompt)
    if cfg.sees_video:
        yield from step("REP", cfg.rep, REP_TARGETS, projector, free_tokens=free)
    kind = cfg.eerg.adapter
    virtual = cfg.eerg.prefix_length if kind is AdapterKind.prefix else 0
    rank = cfg.eerg.lora_rank if kind is AdapterKind.lora else 0
    yield from step(
        "EERG",
        cfg.eerg,
        cfg.llm.max_target_tokens + 1,
        projector + adapter_size(config, virtual=virtual, lora_rank=rank),
        virtual=virtual,
        lora_rank=rank,
        free_tokens=free if kind is AdapterKind.none else 0,
    )


def show(
    cfg: Config, config: PretrainedConfig, *, assumed: bool = False, share: int = 1, here: float | None = None
) -> None:
    """Print the estimate, and what fits on usual GPUs.

    Args:
        config, share: as in `estimates`.
        assumed: whether `config` is not the checkpoint's own.
        here: GiB of this machine's GPU.

    Raises:
        CheckpointError: the model's memory cannot be predicted.
    """
    steps = list(estimates(cfg, config, share=share))
    spread = f", weights spread over {share} GPUs" if share > 1 else ""
    shape = " (assumed: the public model's shape)" if assumed else ""
    memory = [
        [
            _name(step),
            f"{step.rows} × {step.length:,}",
            *(
                f"{size / GIB:.1f}" if size > GIB else f"{size / GIB:.2f}"
                for size in (
                    step.memory.weights, step.memory.trainables, step.memory.activations, step.memory.logits,
                    step.memory.workspace, step.memory.total,
                )
            ),
        ]
        for step in steps
    ]  # fmt: skip
    table(
        f"GiB on each GPU for one micro-batch of longest rows: llm={cfg.llm.name}{shape}{spread}",
        ["stage", "rows × tokens", "weights", "trained", "activations", "logits", "workspace", "sum"],
        memory,
    )
    cards = CARDS if here is None else {**CARDS, "here": here}
    rows = [[_name(step), *(_fitting(step, size) for size in cards.values())] for step in steps]
    table(
        "Tokens of a micro-batch that fit (rep.micro_tokens, eerg.micro_tokens), and longest rows",
        ["stage", *cards],
        rows,
    )


def _name(step: Estimate) -> str:
    return f"{step.stage}, checkpointing" if step.checkpointing else step.stage


def _fitting(step: Estimate, gib: float) -> str:
    rows = step.fits(gib)
    if rows >= step.batch:
        return f"a whole batch ({step.batch})"
    return f"{rows * step.length:,} ({rows})" if rows else "none"
