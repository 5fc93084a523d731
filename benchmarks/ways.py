"""The ways of a training step of REP and EERG, on models with random weights and samples of random ids.

All of a task's ways compute the loss and the gradient of one global batch; `benchmarks.gpu_step` tells what they are.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import AutoModelForCausalLM

from benchmarks.samples import WIDTH, MadeUp
from elmd.convert.chatglm2 import CHATGLM2_6B, native_config
from elmd.data.collate import IGNORED, Batch, Shape, bin_pack
from elmd.models.adapter import Prefix
from elmd.models.elmd import Elmd
from elmd.models.llm import freeze
from elmd.models.memory import step_memory
from elmd.models.projector import Projector
from elmd.training.tokens import ElmdObjective
from elmd.vision.encoder import VisionShape

REP_TARGET = 3  # an emotion word and the end of text
OPTIMISER = "optimiser"
FRAMES_PER_CLIP = 8

R = TypeVar("R")


@dataclass(frozen=True)
class Scale:
    """Sizes. `llm` is put over ChatGLM2-6B's own configuration; the rest are ELMD's defaults."""

    llm: dict[str, Any] = field(default_factory=dict)
    vision: VisionShape = field(default_factory=VisionShape)
    prefix: int = 128
    batch: int = 16
    micro_tokens: int = 4096
    frames: int = 64


def small_llm(layers: int, vocabulary: int, heads: int, width: int = 32) -> dict[str, Any]:
    hidden = heads * width
    return {
        "num_layers": layers, "padded_vocab_size": vocabulary, "hidden_size": hidden, "kv_channels": width,
        "ffn_hidden_size": hidden * 10 // 3, "num_attention_heads": heads, "seq_length": 2048,
    }  # fmt: skip


def _small_vision(hidden: int) -> VisionShape:
    return VisionShape(
        {
            "hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": 4, "num_attention_heads": 4,
            "image_size": 112, "patch_size": 14,
        },
        {"vocab_size": 2, "hidden_size": hidden, "num_hidden_layers": 2, "num_attention_heads": 4,
         "intermediate_size": 4 * hidden},
    )  # fmt: skip


#: The vocabulary of `cpu` is so small that the output layer weighs 8 % of the decoder, at 6B it is 5 %.
SCALES = {
    "6b": Scale(),
    "cpu": Scale(small_llm(8, 2000, 8), _small_vision(128)),
    "smoke": Scale(small_llm(2, 300, 2, 16), _small_vision(16), prefix=4, batch=4, micro_tokens=500, frames=8),
}


class Samples(MadeUp):
    """Notes the shape of every batch that is made of it."""

    def __init__(self, *args: Any, **others: Any):
        super().__init__(*args, **others)
        self.shapes: set[Shape] = set()

    def batch(self, positions: Sequence[int], *, split: bool = False, columns: int = 0) -> Batch:
        """Args: columns: pad to so many."""
        batch = super().batch(positions, split=split)
        more = max(0, columns - batch.ids.shape[1])
        fills: dict[str, Any] = {"ids": 0, "slots": False, "mask": False, "positions": 0, "labels": IGNORED}
        for name, fill in fills.items():
            setattr(batch, name, F.pad(getattr(batch, name), (more, 0), value=fill))
        rows, length = batch.ids.shape
        self.shapes.add(Shape(rows, length, batch.keep, batch.free, len(batch.at)))
        return batch


@dataclass(frozen=True)
class Step:
    """How a step is computed: yields parts of a global batch's loss, each sent backward before the next is made."""

    name: str
    parts: Callable[[Sequence[int]], Iterator[Tensor]]
    checkpointing: bool = False
    all_logits: bool = False
    rows: int | None = None


class Task:
    """REP or EERG at a scale, with its ways."""

    def __init__(self, name: str, llm: Any, scale: Scale, samples: Samples, longest: int):
        torch.manual_seed(0)
        device, hidden = llm.device, llm.config.hidden_size
        self.name, self.llm, self.scale, self.samples, self.longest = name, llm, scale, samples, longest
        # No dropout: its draws would differ from way to way.
        self.prefix = Prefix.create(llm, scale.prefix, dropout=0.0) if name == "eerg" else None
        projector = Projector(WIDTH, hidden) if samples.slots else None
        self.model = Elmd(llm, projector, self.prefix).to(device).train()
        self.again = Elmd(llm, self.model.projector, self.prefix, checkpointing=True).train()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        # At rate 0 a step does all its work, and every way starts from the same values.
        self.optimizer = torch.optim.AdamW(self.trained, lr=0.0, weight_decay=0.0)
        self.decoder = sum(p.numel() for p in llm.get_decoder().layers.parameters())
        self.head = llm.get_output_embeddings().weight.numel()
        halves = [scale.batch // 2**i for i in range(scale.batch.bit_length())]
        stock = "peft" if self.prefix else "transformers"
        ptuning = Step("p-tuning", self._one_by_one, checkpointing=True, all_logits=True, rows=1)
        #: For each way what to try, the first that fits counts.
        self.ways = [
            [Step("elmd", self.elmd(self.model))],
            [Step("elmd, checkpointing", self.elmd(self.again), checkpointing=True)],
            [Step(stock, self._stock(rows), all_logits=True, rows=rows) for rows in halves],
            [ptuning] if self.prefix else [Step("elmd, no split", self._no_split)],
        ]

    @property
    def steps(self) -> dict[str, Step]:
        """The first to try of each way, by name."""
        return {candidates[0].name: candidates[0] for candidates in self.ways}

    def flops(self, batch: Sequence[int]) -> int:
        """Useful work of a global batch."""
        rows = [self.samples.rows[i] for i in batch]
        free = 0 if self.prefix else sum(len(row.before) for row in rows)
        return step_flops(self.decoder, self.head, self.tokens(batch), free, self.samples.targets(batch))

    def tokens(self, batch: Sequence[int]) -> int:
        """Real tokens of a global batch, visual ones included."""
        return sum(self.samples.lengths[i] for i in batch)

    def gradient(self, way: Step, batch: Sequence[int]) -> list[Tensor]:
        """The loss and the gradient of each trained tensor; they stay in the tensors."""
        total = torch.zeros((), device=self.llm.device)
        for part in way.parts(batch):
            part.backward()
            total += part.detach().float()
        return [total, *(p.grad for p in self.trained if p.grad is not None)]

    def step(self, way: Step, batch: Sequence[int]) -> None:
        """A whole training step; a profile finds its end under `OPTIMISER`."""
        self.gradient(way, batch)
        with record_function(OPTIMISER):
            torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def predicted(self, way: Step, shapes: set[Shape]) -> int:
        """Bytes that the largest of these micro-batches takes for a moment, by `elmd.models.memory`."""
        return max(
            step_memory(
                self.llm.config, dtype=self.llm.dtype, rows=one.rows, length=one.length, free_tokens=one.free,
                targets=one.keep + 1, target_tokens=one.targets, checkpointing=way.checkpointing,
                trainables=sum(p.numel() for p in self.trained), virtual=self.scale.prefix if self.prefix else 0,
            ).step
            for one in (
                {one._replace(keep=one.length - 1, targets=one.rows * (one.length - 1)) for one in shapes}
                if way.all_logits else shapes
            )
        )  # fmt: skip

    def elmd(self, model: Elmd) -> Callable[[Sequence[int]], Iterator[Tensor]]:
        objective = ElmdObjective(
            model, {}, self.samples, Accelerator(cpu=self.llm.device.type == "cpu"), batch_size=self.scale.batch,
            micro_tokens=self.scale.micro_tokens, seed=0, evaluate=dict,
        )  # fmt: skip

        def parts(batch: Sequence[int]) -> Iterator[Tensor]:
            for loss, _ in objective.losses(batch, rank=0, world=1):
                yield loss / objective.weight(batch)

        return parts

    def _no_split(self, batch: Sequence[int]) -> Iterator[Tensor]:
        order = sorted(batch, key=lambda i: self.samples.lengths[i])
        for positions in bin_pack(self.samples.lengths, order, self.scale.micro_tokens):
            micro = self.samples.batch(positions).to(self.llm.device)
            yield self.model.loss(micro).sum() / self.samples.targets(batch)

    def _stock(self, rows: int) -> Callable[[Sequence[int]], Iterator[Tensor]]:
        def parts(batch: Sequence[int]) -> Iterator[Tensor]:
            forward = self.prefix.peft if self.prefix else self.llm
            moved = self.prefix.length if self.prefix else 0
            for i in range(0, len(batch), rows):
                micro = self.samples.batch(batch[i : i + rows]).to(self.llm.device)
                yield forward(
                    inputs_embeds=self.model.embed(micro), attention_mask=micro.mask.long(), labels=micro.labels,
                    position_ids=micro.positions - moved, num_items_in_batch=self.samples.targets(batch),
                ).loss  # fmt: skip

        return parts

    def _one_by_one(self, batch: Sequence[int]) -> Iterator[Tensor]:
        for i in batch:
            micro = self.samples.batch([i], columns=self.longest).to(self.llm.device)
            # The original averages over each sample first; weighted by tokens, the cost is the same.
            yield self.llm.loss_function(
                logits=self.again(micro, keep=0).logits, labels=micro.labels, vocab_size=self.llm.config.vocab_size,
                num_items_in_batch=self.samples.targets(batch),
            )  # fmt: skip


def fits(work: Callable[[], R], task: Task | None = None) -> R | None:
    """What `work` gives; None where the device has not the memory for it, and then its memory is free again.

    Args:
        task: whose gradients `work` computes.
    """
    try:
        return work()
    except torch.OutOfMemoryError:
        pass
    if task is not None:
        task.optimizer.zero_grad(set_to_none=True)  # outside of the handler, whose traceback holds the step's tensors
    gc.collect()
    torch.cuda.empty_cache()
    return None


def tried(about: dict[str, Any], work: Callable[[], dict[str, Any]], task: Task | None = None) -> dict[str, Any]:
    """A row of a table: what it is about, whether `work` `fits`, and what it finds if so."""
    found = fits(work, task)
    return {**about, "fits": found is not None, **(found or {})}


def step_flops(decoder: int, head: int, tokens: int, free: int, targets: int) -> int:
    """Useful work of a step by the formula of `benchmarks.gpu_step`, for parameters of decoder and output layer."""
    return 4 * decoder * (tokens - free) + 2 * decoder * free + 4 * head * targets


def difference(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Largest relative difference over the tensors; NaN where there is one."""
    return torch.stack([(a - b).norm() / b.norm() for a, b in zip(found, wanted, strict=True)]).max().item()


def language_model(scale: Scale, device: torch.device, dtype: torch.dtype) -> Any:
    """The frozen language model with random weights, made where and as it stays: no second copy."""
    torch.manual_seed(0)
    with torch.device(device):
        return freeze(
            AutoModelForCausalLM.from_config(
                native_config(CHATGLM2_6B | scale.llm), dtype=dtype, attn_implementation="sdpa"
            )
        )


def peak_bytes(work: Callable[[], Any], device: torch.device | None = None) -> int:
    """The most that torch's allocator holds at once while `work` runs, above what stands before; None: on the CPU."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    assert seen.profiler is not None
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def saved_bytes(task: Task, step: Step, batch: Sequence[int]) -> int:
    """Bytes that a step's micro-batches keep for their backward passes, all of them together, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in (*task.llm.parameters(), *task.model.parameters())}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    total = 0
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        for part in step.parts(batch):
            total += sum(kept.values())
            kept.clear()
            part.backward()
    task.optimizer.zero_grad(set_to_none=True)
    return total
