"""Shared beginnings, the opening and the causal split change nothing but the work."""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GlmConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MptConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
)

from elmd.data.collate import collate
from elmd.data.encode import Encoded
from elmd.data.examples import Examples
from elmd.models import prefill
from elmd.models.decode import generate_batch
from elmd.models.elmd import Elmd
from elmd.models.prefill import Prefill, read_prompt, read_text, run_opening
from elmd.models.projector import Projector
from elmd.training.tokens import ElmdObjective
from oracle import slow_loss, slow_reply
from tiny_elmd import SEEN, build, examples

SIZES: dict[str, Any] = {
    "vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "initializer_range": 0.3,
}  # fmt: skip


def test_what_rows_begin_with_is_read_once(llm, encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = build(llm), examples(encoder, with_target=False)
    batch, tokens = data.batch(range(len(data))), []
    run = llm[0].forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        tokens.append(kwargs["inputs_embeds"].shape[:2].numel())
        return run(*args, **kwargs)

    monkeypatch.setattr(llm[0], "forward", watched)
    shared, (cache, mask) = read_prompt(model, batch, model.embed(batch))
    monkeypatch.setattr("elmd.models.prefill.is_sharded", lambda _: True)
    plain, (whole, _) = read_prompt(model, batch, model.embed(batch))
    assert sum(tokens[:2]) < 0.9 * tokens[2] == 0.9 * batch.ids.numel()
    assert len(tokens) == 3
    assert torch.allclose(shared, plain, atol=1e-4)
    assert mask.sum(1).equal(batch.mask.sum(1))
    assert cache.get_seq_length() == whole.get_seq_length()


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
    "config",
    [
        GlmConfig(**SIZES, attention_bias=True),
        LlamaConfig(**SIZES),
        Qwen2Config(**SIZES),
        Gemma3TextConfig(**SIZES, layer_types=["sliding_attention", "full_attention"] * 2),
        Phi3Config(**SIZES),
        GPT2Config(vocab_size=100, n_embd=32, n_layer=4, n_head=4, initializer_range=0.3),
    ],
    ids=lambda value: getattr(value, "model_type", str(value)),
)
def test_reading_stops_at_the_last_keys_and_changes_nothing(
    config: PretrainedConfig, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    llm = AutoModelForCausalLM.from_config(config).requires_grad_(False)
    model = Elmd(llm, Projector(6, 32)).train()
    draw = random.Random(0)
    rows = [
        Encoded([*range(5, 25), *(draw.randrange(3, 90) for _ in range(i))], 3, [7, i + 3], [4, 2]) for i in (1, 4, 6)
    ]
    batch = collate(rows, [torch.randn(3, 6) for _ in rows], split=True)
    batch = batch if shared else replace(batch, shared=None)
    assert shared == (batch.shared is not None)
    whole = {"last layer": 0, "output layer": 0}

    def count(name: str, module: torch.nn.Module) -> None:
        def seen(*_: Any) -> None:
            whole[name] += 1

        module.register_forward_hook(seen)

    def step() -> tuple[Prefill, list[Tensor]]:
        read = read_text(model, batch)
        assert type(read.past).update is read.past.update.__func__, "nothing is left behind"
        model.zero_grad()
        loss = model.loss(batch).sum()
        loss.backward()
        return read, [loss.detach(), *(p.grad for p in model.projector.parameters())]

    decoder = llm.get_decoder()
    count("last layer", (decoder.h if config.model_type == "gpt2" else decoder.layers)[-1])
    count("output layer", llm.get_output_embeddings())
    read, found = step()
    assert set(whole.values()) == {1}, "of the columns with gradient only"
    monkeypatch.setattr(prefill, "_fill", lambda model, *columns: model.run(*columns, keep=1))
    plain, wanted = step()
    assert set(whole.values()) == {6 if shared and model.allows_gaps else 4}
    assert torch.equal(read.mask, plain.mask)
    for one, other in zip(read.past.layers, plain.past.layers, strict=True):
        assert torch.equal(one.keys, other.keys)
        assert torch.equal(one.values, other.values)
    assert len(read.past.layers) == 4
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "config",
    [
        MistralConfig(**SIZES, sliding_window=12),
        Gemma3TextConfig(**SIZES, sliding_window=12, layer_types=["sliding_attention", "full_attention"] * 2),
        MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=100, initializer_range=0.3),
    ],
    ids=lambda config: config.model_type,
)
def test_models_that_count_columns_get_no_holes(config: PretrainedConfig) -> None:
    torch.manual_seed(0)
    llm = AutoModelForCausalLM.from_config(config).requires_grad_(False)
    model = Elmd(llm, Projector(6, 32)).train()
    draw = random.Random(0)
    rows = [
        Encoded([*range(5, 25), *(draw.randrange(3, 90) for _ in range(i))], 3, [7, i + 3] * i, [4, 2])
        for i in (1, 4, 6)
    ]
    visual = [torch.randn(3, 6) for _ in rows]
    data = SimpleNamespace(
        rows=rows,
        lengths=[row.length for row in rows],
        batch=lambda at, split: collate([rows[i] for i in at], [visual[i] for i in at], split=split),
    )
    objective = ElmdObjective(
        model, {}, cast(Examples, data), Accelerator(cpu=True), batch_size=3, micro_tokens=400, seed=0, evaluate=dict,
    )  # fmt: skip
    assert objective.before is None, "all tokens run with gradient"
    assert model.opening is None
    found = sum(loss.item() for loss, _ in objective.losses([0, 1, 2], 0, 1))
    wanted = [slow_loss(model, row, one) for row, one in zip(rows, visual, strict=True)]
    assert found == pytest.approx(sum(wanted).item(), rel=1e-5)
    holed = model.loss(collate(rows, visual, split=True)).sum().item()
    assert holed != pytest.approx(found, rel=1e-3), "there was a window to mind"
    asked = [Encoded(row.before, row.slots, row.after, []) for row in rows]
    batch = collate(asked, visual)
    assert batch.shared is not None
    written = generate_batch(model, batch, lambda logits, *_: logits.argmax(-1), eos=99, max_new_tokens=6)
    assert written == [slow_reply(model, row, one, 99, 6) for row, one in zip(asked, visual, strict=True)]


def test_ranks_that_share_the_model_out_read_to_the_end(llm, encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, ends = examples(encoder, "rep", samples=SEEN).batch([0, 1, 2], split=True), []
    hook = llm[0].get_output_embeddings().register_forward_hook(lambda *_: ends.append(1))
    try:
        read_text(build(llm, prefix=0), batch)
        assert not ends
        monkeypatch.setattr("elmd.models.prefill.is_sharded", lambda _: True)
        read_text(build(llm, prefix=0), batch)
        assert len(ends) == 1
    finally:
        hook.remove()


def test_errors_while_reading_come_through(llm, encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = build(llm, prefix=0), examples(encoder, "rep", samples=SEEN).batch([0, 1], split=True)
    monkeypatch.setattr(llm[0].get_decoder().layers[0].mlp, "forward", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        read_text(model, batch)


def test_an_opening_is_run_once_and_changes_nothing(llm, encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    data, model = examples(encoder, "rep", samples=SEEN), build(llm, prefix=0)
    batches = [data.batch(at, split=True) for at in ([0, 1, 2], [3, 4], [4, 2, 0])]
    assert all(batch.shared is not None and len(batch.shared.firsts) == 1 for batch in batches)
    wanted = [model.loss(batch) for batch in batches]
    fills: list[int] = []
    fill = prefill._fill

    def counted(model: Elmd, embeddings: Tensor, *others: Any) -> None:
        fills.append(embeddings.shape[:2].numel())
        fill(model, embeddings, *others)

    monkeypatch.setattr(prefill, "_fill", counted)
    ElmdObjective(model, {}, data, Accelerator(cpu=True), batch_size=4, micro_tokens=400, seed=0, evaluate=dict)
    opening = model.opening
    assert fills == [len(opening.ids)]
    assert all(tuple(row.before[: len(opening.ids)]) == opening.ids for row in data.rows)
    assert len({row.before[len(opening.ids)] for row in data.rows}) > 1, "and no longer"
    fills.clear()
    for batch, losses in zip(batches, wanted, strict=True):
        torch.testing.assert_close(model.loss(batch), losses, rtol=1e-5, atol=1e-5)
    assert len(fills) == len(batches), "only what follows the opening"
    assert model.opening is opening


def test_rows_that_begin_otherwise_do_without_the_opening(llm) -> None:
    model = build(llm, prefix=0)
    model.opening = run_opening(model, [5] * 20)
    for first, count in ((5, 20), (6, 20), (5, 30), (5, 12)):
        rows = [Encoded([first] * count + [7 + i, 8 + i], 3, [9], [4, 2]) for i in range(3)]
        batch = collate(rows, [torch.randn(3, 6)] * 3, split=True)
        wanted = [slow_loss(model, row, batch.visual[:3]) for row in rows]
        assert model.loss(batch).tolist() == pytest.approx([one.item() for one in wanted], rel=1e-4)
