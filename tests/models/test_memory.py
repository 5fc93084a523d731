"""Predicted memory of a training step against what real steps allocate and keep."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GlmConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    PretrainedConfig,
)

from elmd.data.collate import Batch, Shape
from elmd.errors import CheckpointError
from elmd.models import memory
from elmd.models.adapter import Lora, Prefix
from elmd.models.elmd import Elmd
from elmd.models.memory import StepMemory, free_memory, needs_checkpointing, step_memory

SIZES: dict[str, Any] = {
    "vocab_size": 2000, "hidden_size": 256, "intermediate_size": 856, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GLM = GlmConfig(**SIZES, attention_bias=True)

#: The public ChatGLM2-6B.
CHATGLM2 = GlmConfig(
    vocab_size=65024, hidden_size=4096, intermediate_size=13696, num_hidden_layers=28, num_attention_heads=32,
    num_key_value_heads=2, head_dim=128, attention_bias=True, pad_token_id=0, eos_token_id=2,
)  # fmt: skip

KINDS: dict[str, dict[str, Any]] = {
    "projector": {},
    "prefix": {"virtual": 32},
    "lora": {"lora_rank": 4},
    "split": {"free_tokens": 180},
    "prefix, checkpointing": {"virtual": 32, "checkpointing": True},
    "split, checkpointing": {"free_tokens": 180, "checkpointing": True},
    "lora, checkpointing": {"lora_rank": 4, "checkpointing": True},
}
SHAPE = {"rows": 3, "length": 256, "targets": 33}


class Probe(Elmd):
    """ELMD with random input embeddings that carry a gradient, as behind the projector."""

    def embed(self, batch: Batch) -> Tensor:
        weight: Any = self.llm.get_input_embeddings().weight
        return torch.randn(*batch.ids.shape, weight.shape[1], dtype=weight.dtype, device=weight.device).requires_grad_()


def real(
    config: PretrainedConfig,
    *,
    device: str = "cpu",
    virtual: int = 0,
    lora_rank: int = 0,
    free_tokens: int = 0,
    checkpointing: bool = False,
    dtype: torch.dtype = torch.float32,
    rows: int = SHAPE["rows"],
    length: int = SHAPE["length"],
    targets: int = SHAPE["targets"],
) -> tuple[Probe, Batch]:
    """A model with weights, and a batch with padding."""
    torch.manual_seed(0)
    llm = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").requires_grad_(False)
    llm.to(device)
    adapter = (
        Prefix.create(llm, virtual, 0.1) if virtual else Lora.create(llm, lora_rank, 1, 0.1) if lora_rank else None
    )
    mask = torch.ones(rows, length, dtype=torch.bool)
    mask[1:, :5] = False
    ids = torch.randint(3, 50, (rows, length))
    batch = Batch(
        ids,
        torch.zeros_like(mask),
        mask,
        (mask.long().cumsum(-1) - 1).clamp(min=0),
        ids,
        None,
        targets - 1,
        torch.arange(rows * (targets - 1)),
        free_tokens,
    )
    model = Probe(llm, None, adapter, checkpointing=checkpointing).to(device).train()
    return model, batch.to(torch.device(device))


def predicted(config: PretrainedConfig, dtype: torch.dtype = torch.float32, **kind: Any) -> StepMemory:
    return step_memory(config, **({"dtype": dtype, "trainables": 0} | SHAPE | kind))


def allocated(model: Probe, batch: Batch) -> int:
    """Most bytes that torch's CPU allocator held at once, over a step that comes after another."""
    model.loss(batch).sum().backward()
    model.zero_grad()
    model.llm.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        model.loss(batch).sum().backward()
    assert seen.profiler is not None
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert events
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("kind", KINDS)
def test_the_peak_is_what_a_real_step_allocates(kind: str) -> None:
    assert predicted(GLM, **KINDS[kind]).step == pytest.approx(allocated(*real(GLM, **KINDS[kind])), rel=0.03)


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SIZES),
        Gemma3TextConfig(**SIZES),
        OPTConfig(vocab_size=2000, hidden_size=256, ffn_dim=856, num_hidden_layers=4, num_attention_heads=8),
    ],
    ids=lambda config: config.model_type,
)
def test_other_decoders_need_no_formula(config: PretrainedConfig) -> None:
    assert predicted(config, virtual=32).step == pytest.approx(allocated(*real(config, virtual=32)), rel=0.03)


@pytest.mark.parametrize("kind", ["projector", "prefix", "lora", "split"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_activations_are_what_autograd_keeps(kind: str, dtype: torch.dtype) -> None:
    model, batch = real(GLM, dtype=dtype, **KINDS[kind])
    frozen = {p.untyped_storage().data_ptr() for module in (model, model.llm) for p in module.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in frozen:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    found: list[int] = []
    model.llm.get_output_embeddings().register_forward_pre_hook(
        lambda _, inputs: found.append(sum(kept.values())) if inputs[0].requires_grad else None
    )
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.loss(batch)
    # What lives besides: hidden states that nothing will need again.
    assert predicted(GLM, dtype=dtype, **KINDS[kind]).activations == pytest.approx(found[0], rel=0.15)


def test_the_shape_of_chatglm2_6b() -> None:
    """Figures of the documentation: bytes per token and layer."""
    shape: dict[str, Any] = {"dtype": torch.bfloat16, "rows": 4, "length": 1024, "targets": 129, "trainables": 10**6}

    def per_token(**kind: Any) -> float:
        return step_memory(CHATGLM2, **(shape | kind)).activations / (4 * 1024 * 28 * 1024)

    whole = step_memory(CHATGLM2, **shape, virtual=128)
    assert whole.weights == 12487168064 - 64, "the original's files without its rotary table"
    assert whole.trainables == 16 * 10**6
    assert whole.total == whole.weights + whole.trainables + whole.activations + whole.logits + whole.workspace
    assert whole.logits == pytest.approx(3 * 4 * 4 * 128 * 65024, rel=0.15), (
        "three float32 copies of B × T × vocabulary"
    )
    assert per_token(virtual=128) == pytest.approx(150, abs=3)
    assert per_token(free_tokens=717, targets=4) == pytest.approx(58, abs=3)
    assert per_token(virtual=128, checkpointing=True) == pytest.approx(9, abs=1)


def test_more_of_anything_takes_more() -> None:
    base = predicted(GLM).step
    assert predicted(GLM, rows=6).step == pytest.approx(2 * base, rel=0.02)
    assert predicted(GLM, length=512).step > 2 * base, "the mask grows with the square"
    more = predicted(GLM, targets=65).logits - predicted(GLM, targets=33).logits
    copies = 3 * 4 * SHAPE["rows"] * 32 * 2000
    assert more == pytest.approx(copies, rel=1e-3), "three float32 copies of B × T × vocabulary; places of targets"
    assert predicted(GLM, dtype=torch.bfloat16).step < base
    assert predicted(GLM, checkpointing=True).step < base / 2
    eager = GlmConfig(**SIZES, attention_bias=True)
    eager._attn_implementation = "eager"
    matrices = 4 * SHAPE["rows"] * 8 * SHAPE["length"] ** 2 * 4  # layers × rows × heads × L × L × float32
    assert predicted(eager).activations > predicted(GLM).activations + matrices / 2
    assert eager._attn_implementation == "eager", "the caller's configuration stays as it was"


def test_what_depends_on_contents_is_told() -> None:
    config = MixtralConfig(**SIZES, num_local_experts=4)
    config._experts_implementation = "eager"
    with pytest.raises(
        CheckpointError, match=r"memory of this mixtral model cannot be predicted .*llm\.checkpointing=always"
    ):
        predicted(config)


@pytest.mark.parametrize(("free", "needed"), [(1.2, False), (1.05, True), (0.5, True)])
def test_checkpointing_is_needed_where_the_step_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, free: float, needed: bool
) -> None:
    step = predicted(GLM, trainables=10**6, virtual=32)
    monkeypatch.setattr(memory, "free_memory", lambda device: int(free * (step.step + step.trainables)))
    shapes = [Shape(3, 256, 32, 0, 96), Shape(1, 256, 32, 0, 32), Shape(3, 200, 32, 0, 96)]
    asked = needs_checkpointing(
        GLM, shapes, device=torch.device("cpu"), dtype=torch.float32, trainables=10**6, virtual=32
    )
    assert asked is needed


def test_many_short_rows_count_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal tokens in shorter rows hold more targets, and so more logits."""
    config = GlmConfig(**(SIZES | {"vocab_size": 60000}), attention_bias=True)
    long, short = (predicted(config, rows=rows, length=length).step for rows, length in ((1, 1024), (16, 64)))
    assert short > 1.3 * long
    monkeypatch.setattr(memory, "free_memory", lambda device: int(1.2 * long))
    ask: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32, "trainables": 0}
    few, many = Shape(1, 1024, 32, 0, 32), Shape(16, 64, 32, 0, 16 * 32)
    assert needs_checkpointing(config, [few, many], **ask)
    assert not needs_checkpointing(config, [few], **ask)


def test_what_runs_without_gradient_counts_little(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parted = (predicted(GLM, rows=4, length=256, free_tokens=free).step for free in (0, 192))
    monkeypatch.setattr(memory, "free_memory", lambda device: (whole + parted) // 2)
    ask: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32, "trainables": 0}
    assert needs_checkpointing(GLM, [Shape(4, 256, 32, 0, 4 * 32)], **ask)
    assert not needs_checkpointing(GLM, [Shape(4, 256, 32, 192, 4 * 32)], **ask)


def test_no_step_needs_no_memory() -> None:
    assert not needs_checkpointing(GLM, set(), device=torch.device("cpu"), dtype=torch.float32, trainables=0)


def test_free_memory_of_the_machine() -> None:
    assert 2**26 < free_memory(torch.device("cpu")) < 2**46


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_the_peak_on_a_gpu(kind: str) -> None:
    config = GlmConfig(
        **(SIZES | {"hidden_size": 1024, "intermediate_size": 3424, "head_dim": 128}), attention_bias=True
    )
    shape = {"rows": 8, "length": 512, "targets": 65, "dtype": torch.bfloat16}
    model, batch = real(config, device="cuda", **shape, **KINDS[kind])
    model.loss(batch).sum().backward()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model.loss(batch).sum().backward()
    measured = torch.cuda.max_memory_allocated() - before
    assert predicted(config, **shape, **KINDS[kind]).step == pytest.approx(measured, rel=0.15)
    assert free_memory(torch.device("cuda")) <= torch.cuda.get_device_properties(0).total_memory
