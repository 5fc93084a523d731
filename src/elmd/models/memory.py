"""How much memory a training step takes: predicted without weights and without a GPU.

The step itself is run on the meta device, where tensors have sizes but no contents: ELMD's own forward and backward
pass around a language model of the same configuration. Every operation reports what it allocates, and what nobody holds
any more is subtracted, so the highest sum is the peak: no formula per architecture, and nothing to keep in step with
the model's code.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv

from elmd.data.collate import Batch, Shape
from elmd.errors import CheckpointError, reason
from elmd.models.adapter import Adapter, Lora, Prefix
from elmd.models.elmd import Elmd

#: Share of the free memory that a step may be predicted to take; the rest is for gaps that an allocator leaves.
SHARE = 0.9

#: Bytes per number that trains: value, gradient and AdamW's two moments, float32 each.
TRAINED = 16

_FUSED = "elmd_fused_sizes"


@dataclass(frozen=True)
class StepMemory:
    """Bytes on one GPU at the peak of a training step.

    Attributes:
        weights: the frozen language model.
        trainables: what trains, with its gradients and the optimizer's moments.
        activations: what the decoder keeps for its backward pass.
        logits: of target positions, with their copies and gradients in the loss.
        workspace: by how much the peak exceeds all of these: what passes through a layer in its backward pass.
    """

    weights: int
    trainables: int
    activations: int
    logits: int
    workspace: int

    @property
    def step(self) -> int:
        """What a micro-batch takes and gives back."""
        return self.activations + self.logits + self.workspace

    @property
    def total(self) -> int:
        return self.weights + self.trainables + self.step


def step_memory(
    config: PretrainedConfig,
    *,
    dtype: torch.dtype,
    rows: int,
    length: int,
    targets: int,
    trainables: int,
    virtual: int = 0,
    lora_rank: int = 0,
    free_tokens: int = 0,
    target_tokens: int | None = None,
    checkpointing: bool = False,
) -> StepMemory:
    """The peak of the forward and backward pass of one micro-batch; a third of a second for a model of 6B.

    Args:
        config: of the language model. Attention counts as a fused kernel (transformers' `sdpa`) unless it says `eager`.
        dtype: of the language model.
        rows: B.
        length: L, padding included.
        targets: tokens of the longest target, plus 1.
        trainables: how many numbers are trained.
        virtual: P, of a prefix.
        lora_rank: of LoRA updates.
        free_tokens: first columns that are read without gradient (REP's causal split).
        target_tokens: of all rows, which are the logits computed; None: all targets are as long as the longest.
        checkpointing: whether each layer is computed again for its backward pass.

    Raises:
        CheckpointError: what the model computes depends on contents (a mixture of experts), so it cannot be predicted.
    """
    config = deepcopy(config)
    attention = "eager" if getattr(config, "_attn_implementation", None) == "eager" else _FUSED
    AttentionInterface.register(_FUSED, _fused)
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
        llm.requires_grad_(False)
        weights = sum(p.nbytes for p in llm.parameters())
        adapter = _adapter(llm, virtual, lora_rank)
        model = _Sizes(llm, None, adapter, checkpointing=checkpointing).train()
        ids = torch.empty(rows, length, dtype=torch.long)
        at = torch.empty(rows * (targets - 1) if target_tokens is None else target_tokens, dtype=torch.long)
    batch = Batch(ids, ids.bool(), ids.bool(), ids, ids, visual=None, keep=targets - 1, at=at, free=free_tokens)
    live, decoder = _Live(llm, model), _Decoder()
    llm.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: decoder.done(live, inputs[0]))
    try:
        with live:
            model.loss(batch).sum().backward()
    except RuntimeError as error:
        raise CheckpointError(
            f"the memory of this {config.model_type} model cannot be predicted ({reason(error)})",
            where=config.name_or_path or None,
            fix="set llm.checkpointing=always or never",
        ) from error
    peak = max(decoder.peak, live.peak)
    logits = decoder.loss_peak - decoder.kept
    return StepMemory(weights, TRAINED * trainables, decoder.kept, logits, max(0, peak - decoder.kept - logits))


def needs_checkpointing(
    config: PretrainedConfig,
    shapes: Collection[Shape],
    *,
    device: torch.device,
    dtype: torch.dtype,
    trainables: int,
    virtual: int = 0,
    lora_rank: int = 0,
) -> bool:
    """Whether a step without activation checkpointing does not fit into the free memory, weights loaded already.

    Args:
        shapes: of all micro-batches. Those are predicted that have the most of something that takes memory: tokens
            with gradient, tokens in all, scores of attention, logits. At 6B and CPED's lengths the largest of all
            thousands was among them, or a shape within 0.3 % of it.
        others: as in `step_memory`.
    """
    if not shapes:
        return False  # no step is to be made
    sizes: tuple[Callable[[Shape], int], ...] = (
        lambda shape: shape.rows * (shape.length - shape.free),
        lambda shape: shape.rows * shape.length,
        lambda shape: shape.rows * (shape.length - shape.free) * (virtual + shape.length),
        lambda shape: shape.targets,
    )
    worst = 0
    for shape in {max(shapes, key=size) for size in sizes}:
        memory = step_memory(
            config, dtype=dtype, rows=shape.rows, length=shape.length, targets=shape.keep + 1,
            target_tokens=shape.targets, free_tokens=shape.free, trainables=trainables, virtual=virtual,
            lora_rank=lora_rank,
        )  # fmt: skip
        worst = max(worst, memory.step + memory.trainables)
    return worst > SHARE * free_memory(device)


def adapter_size(config: PretrainedConfig, *, virtual: int = 0, lora_rank: int = 0) -> int:
    """How many numbers train in a prefix or in LoRA updates for this language model."""
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(deepcopy(config)).requires_grad_(False)
        adapter = _adapter(llm, virtual, lora_rank)
    return 0 if adapter is None else sum(p.numel() for p in adapter.parameters())


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still allocate: on a GPU with what torch holds unused, else in main memory."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return psutil.virtual_memory().available


def _adapter(llm: PreTrainedModel, virtual: int, lora_rank: int) -> Adapter | None:
    if virtual:
        return Prefix.create(llm, virtual, 0.1)
    return Lora.create(llm, lora_rank, 1, 0.1) if lora_rank else None


class _Sizes(Elmd):
    """ELMD whose input embeddings carry a gradient, as they do behind the projector."""

    def embed(self, batch: Batch) -> Tensor:
        weight: Any = self.llm.get_input_embeddings().weight
        return weight.new_empty(*batch.ids.shape, weight.shape[1]).requires_grad_()


class _Live(TorchDispatchMode):
    """Bytes of the tensors alive, and the most there were, but for the parameters of some modules."""

    def __init__(self, *apart: nn.Module):
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, Any] = {}
        for module in apart:
            for tensor in (*module.parameters(), *module.buffers()):
                storage = tensor.untyped_storage()
                self._seen[storage._cdata] = storage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._add(value.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return

        def gone(_: Any) -> None:
            del self._seen[key]
            self.now -= size

        self._seen[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


@dataclass
class _Decoder:
    """Parts a step's peak at the end of the decoder (`kept`, `peak`) and at the end of the loss (`loss_peak`)."""

    kept: int = 0
    peak: int = 0
    loss_peak: int = 0

    def done(self, live: _Live, hidden: Tensor) -> None:
        # Tokens that are read without gradient pass here first where the last layers have no keys of their own.
        if not hidden.requires_grad:
            return
        self.kept, self.peak, live.peak = live.now, live.peak, live.now

        def back(_: Tensor) -> None:
            self.loss_peak = live.peak

        hidden.register_hook(back)


class _FusedKernel(torch.autograd.Function):
    """What a fused attention kernel keeps and allocates; on the meta device torch would write out the L × L matrix."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        logsumexp = query.new_empty(query.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, bias, out, logsumexp)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


def _fused(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **others: Any
) -> tuple[Tensor, None]:
    """transformers' `sdpa` by its sizes: [B, h, L, d], keys and values [B, g, P + L, d] -> [B, L, h, d].

    There always is a mask (a batch is padded, or a prefix stands before it), so keys and values are repeated for all
    heads, and the mask, boolean before, becomes a bias of the query's dtype in every layer.
    """
    repeats = query.shape[1] // key.shape[1]
    bias = query.new_empty(query.shape[0], 1, query.shape[2], key.shape[2])
    out = _FusedKernel.apply(query, repeat_kv(key, repeats), repeat_kv(value, repeats), bias)
    return out.transpose(1, 2).contiguous(), None
