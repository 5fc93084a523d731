"""The frozen language model FSDP-sharded: for GPUs too small for the whole of it.

Each rank keeps 1/world of every frozen weight; a layer's weights are gathered just before it runs, forward and
backward, and dropped after. What trains (projector, prefix, LoRA) is on every rank, and its gradients go through the
loop's own sum. Frozen weights have no gradients, so nothing is ever reduced here.

Gathering takes all ranks at once, so all must run the language model equally often, in the same order: see `in_step`
for batches and `anywhere` for generation.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import PreTrainedModel

from elmd.data.collate import PASS
from elmd.errors import CheckpointError


def sharding(accelerator: Accelerator) -> bool:
    """Whether the launcher asked for FSDP: several processes, and `distributed_type: FSDP` in its configuration.

    The launcher says so through its environment variable; `accelerator.distributed_type` repeats it on GPUs only.
    """
    return accelerator.num_processes > 1 and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def shard(llm: PreTrainedModel, accelerator: Accelerator) -> PreTrainedModel:
    """FSDP-shard the frozen weights of a language model, in place; every rank calls this with the same weights.

    Parameters that require gradients stay whole.

    Args:
        llm: any decoder of transformers. On CPU, whatever the rank's device is: weights move there layer by layer, so
            the device never holds them all. Weights read in the dtype that they are stored in are mapped from the file,
            once for all ranks of a machine; else every rank needs memory for all of them for a moment.

    Raises:
        CheckpointError: the launcher made transformers load the weights on the first rank only.
    """
    if os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "false").lower() == "true":
        raise CheckpointError(
            "only the first process would load the weights, and they are not sent to the others",
            where="fsdp_cpu_ram_efficient_loading",
            fix="set it to false in the configuration of accelerate, as configs/accelerate/fsdp.yaml does",
        )
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    whole = {parameter for parameter in llm.parameters() if parameter.requires_grad}
    words, head = llm.get_input_embeddings(), llm.get_output_embeddings()
    if head.weight is words.weight:  # tied; frozen, so two parameters of the same values are the same model
        head.weight = nn.Parameter(words.weight.detach().clone(), requires_grad=False)
    kinds = set(llm._no_split_modules or ())
    units: list[nn.Module] = [module for module in llm.modules() if type(module).__name__ in kinds]
    # Embeddings are a unit of their own: ELMD calls them by themselves, before the model.
    for unit in (*units, words, head, llm):
        fully_shard(unit, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    llm.to(accelerator.device)  # what stays whole
    # The first module that runs becomes the root of all; that must be the model and not its embeddings.
    with torch.no_grad():
        llm(input_ids=torch.zeros(1, 1, dtype=torch.long, device=accelerator.device), use_cache=False)
    return llm


def in_step(shares: Sequence[Sequence[list[int]]], rank: int, *, level: bool) -> list[tuple[list[int], bool]]:
    """The batches that a rank runs, each with whether its result counts.

    Args:
        shares: of each rank, its batches (positions of samples).
        level: whether all ranks are to run as many as the rank with most (`sharding`): the extra ones repeat the
            smallest batch and do not count.
    """
    batches = [(batch, True) for batch in shares[rank]]
    if level and (extra := max(map(len, shares)) - len(batches)):
        spare = min((batch for share in shares for batch in share), key=len)
        batches += [(spare, False)] * extra
    return batches


def pass_cost(accelerator: Accelerator) -> int:
    """What a pass of the language model costs beside its tokens, in tokens (see `data.collate.bin_pack`).

    On a GPU an estimate for 6B: kernels are started for 10 ms and weights read for 5, against 50 microseconds a token.
    Where the model is FSDP-sharded, its 12 GiB also pass between ranks, at some 200 GB/s.
    """
    cost = PASS if accelerator.device.type == "cpu" else 2 * PASS
    return 8 * cost if sharding(accelerator) else cost


def is_sharded(llm: nn.Module) -> bool:
    """Whether this model is FSDP-sharded, so that all ranks must run it equally often."""
    return isinstance(llm, FSDPModule)


def anywhere(count: int, llm: PreTrainedModel) -> bool:
    """Whether there is any, on any rank where `llm` is sharded, else on this one."""
    if not is_sharded(llm):
        return count > 0
    number = torch.tensor(count, device=llm.device)
    dist.all_reduce(number, op=dist.ReduceOp.MAX)
    return bool(number.item())
