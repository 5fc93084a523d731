"""The model against slow oracles: loss, masks, batches, prefix, generation, scoring, saving."""

from __future__ import annotations

import hashlib
import itertools
import math
import random
from dataclasses import replace
from pathlib import Path
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

from benchmarks.tiny import make_demonstrations, make_samples
from elmd.data.collate import IGNORED, WORTHWHILE, Batch, bin_pack, collate, shared_beginning
from elmd.data.encode import Encoded, Encoder
from elmd.data.examples import Examples, shuffled
from elmd.data.prompts import SLOTS, Prompt
from elmd.errors import CheckpointError, ConfigError
from elmd.labels import EMOTIONS, WORDS, Emotion
from elmd.models import prefill
from elmd.models.adapter import Prefix
from elmd.models.decode import generate_all, generate_batch, greedy, nucleus, predict_emotions
from elmd.models.elmd import Elmd
from elmd.models.llm import load_llm
from elmd.models.prefill import Prefill, read_prompt, read_text, run_opening
from elmd.models.projector import Projector
from elmd.training import checkpoint
from elmd.training.loop import fit
from elmd.training.plan import Plan
from elmd.training.tokens import ElmdObjective, token_loss
from oracle import slow_loss, slow_reply

PROMPT = Prompt(
    instruction="{task}\n", background="{background}\n", turn="{speaker}：{text}\n", utterance="{speaker}：{text}\n",
    video="画面：{video}\n", demonstration="参考：{response}\n", rep="情感？", eerg="回复？", reply="说？",
)  # fmt: skip
SAMPLES = make_samples()
VISUAL = {s.id: torch.randn(3 + i % 2, 6, generator=torch.Generator().manual_seed(i)) for i, s in enumerate(SAMPLES)}
VISUAL[SAMPLES[3].id] = None  # a sample without a clip


SIZES: dict[str, Any] = {
    "vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "initializer_range": 0.3,
}  # fmt: skip


@pytest.fixture(scope="module")
def llm(llm_folder: Path):
    return load_llm(llm_folder)


@pytest.fixture(scope="module")
def encoder(llm) -> Encoder:
    return Encoder(llm[1], PROMPT, 200, 40)


def build(llm, *, prefix: int = 4, seed: int = 0) -> Elmd:
    torch.manual_seed(seed)
    return Elmd(llm[0], Projector(6, 32), Prefix.create(llm[0], prefix, 0.0) if prefix else None).eval()


#: Samples that the projector can learn from; stage `rep` trains on these alone.
SEEN = [sample for sample in SAMPLES if VISUAL[sample.id] is not None]


def examples(encoder: Encoder, task: str = "eerg", *, with_target: bool = True, samples=SAMPLES) -> Examples:
    return Examples(samples, encoder, make_demonstrations(SAMPLES), VISUAL.get, task, with_target=with_target)


@pytest.mark.parametrize("prefix", [0, 4])
def test_loss_equals_the_slow_sum_over_unpadded_samples(llm, encoder, prefix: int) -> None:
    model, data = build(llm, prefix=prefix), examples(encoder)
    everything = list(range(len(data)))
    found = model.loss(data.batch(everything))
    for i in everything:
        slow = slow_loss(model, data.rows[i], VISUAL[SAMPLES[i].id])
        assert found[i].item() == pytest.approx(slow.item(), rel=2e-5)


def test_gradients_of_prefix_and_projector_equal_the_slow_ones(llm, encoder) -> None:
    model, data = build(llm), examples(encoder)
    model.loss(data.batch([0, 1, 4])).sum().backward()
    fast = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    for i in (0, 1, 4):
        slow_loss(model, data.rows[i], VISUAL[SAMPLES[i].id]).backward()
    slow = [p.grad for p in model.parameters() if p.requires_grad]
    assert len(fast) == len(slow) == 3  # table, weight, bias: nothing of the language model
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_labels_are_exactly_the_target_and_eos(encoder) -> None:
    draw = random.Random(0)
    for trial in range(200):
        rows = [
            Encoded(
                before=[draw.randrange(3, 90) for _ in range(draw.randrange(1, 9))],
                slots=draw.choice([0, 3]),
                after=[draw.randrange(3, 90) for _ in range(draw.randrange(0, 6))],
                target=[*(draw.randrange(3, 90) for _ in range(draw.randrange(0, 6))), 2],
            )
            for _ in range(draw.randrange(1, 5))
        ]
        visual = [torch.full((row.slots, 2), float(i)) if row.slots else None for i, row in enumerate(rows)]
        split = draw.random() < 0.5
        batch = collate(rows, visual, split=split)
        assert not batch.slots[:, : batch.free].any()
        assert (batch.free > 0) <= split
        for i, row in enumerate(rows):
            real = batch.mask[i]
            assert real.sum() == row.length, trial
            for part in (real[: batch.free], real[batch.free :]):
                assert part.tolist() == sorted(part.tolist()), "padding is on the left of each part"
            assert batch.labels[i][batch.labels[i] != IGNORED].tolist() == row.target
            assert batch.labels[i, len(real) - len(row.target) :].tolist() == row.target
            words = [*row.before, *[0] * row.slots, *row.after, *row.target]
            assert batch.ids[i][real].tolist() == words
            assert batch.positions[i][real].tolist() == list(range(row.length))
            assert batch.slots[i][real].tolist() == [
                len(row.before) <= j < len(row.before) + row.slots for j in range(row.length)
            ]
        if batch.visual is not None:
            owners = batch.slots.nonzero()[:, 0].float()
            assert torch.equal(batch.visual[:, 0], owners), "features stand in row order"
        assert batch.keep == max(len(row.target) for row in rows)


def test_target_is_emotion_then_response_and_splits_back(encoder) -> None:
    row = examples(encoder).rows[1]
    text = encoder.tokenizer.decode(row.target, skip_special_tokens=True)
    gold = SAMPLES[1].response
    assert row.target[-1] == encoder.tokenizer.eos_token_id
    assert PROMPT.split_target(text, "eerg") == (gold.emotion, gold.text)
    assert PROMPT.split_target("我不知道", "eerg") == (None, "我不知道")
    assert PROMPT.split_target("高兴", "eerg") == (Emotion.HAPPY, "")
    assert examples(encoder, "rep").rows[1].target == [*encoder.text(WORDS[gold.emotion]), 2]


def test_a_reply_alone_names_no_emotion() -> None:
    assert PROMPT.target(Emotion.HAPPY, "高兴死了", "reply") == "高兴死了"
    assert PROMPT.split_target("高兴死了", "reply") == (None, "高兴死了")
    parts = PROMPT.parts(SAMPLES[0], [], "reply", video=False)
    assert parts["instruction"] == "说？\n"


def test_prompt_does_not_depend_on_the_target_and_parts_stand_in_order(encoder) -> None:
    with_target, without = examples(encoder).rows[5], examples(encoder, with_target=False).rows[5]
    assert (with_target.before, with_target.after) == (without.before, without.after)
    assert without.target == []
    parts = PROMPT.parts(SAMPLES[5], make_demonstrations(SAMPLES)[SAMPLES[5].id], "eerg", video=True)
    assert list(parts) == ["instruction", "background", "history", "utterance", "video", "demonstration"]
    text = encoder.tokenizer.decode(without.before + without.after)
    places = [text.index(parts[p].strip().split(SLOTS)[0]) for p in parts if parts[p]]
    assert places == sorted(places)


def test_truncation_cuts_in_order_and_counts(llm) -> None:
    sample = SAMPLES[7]
    demos = make_demonstrations(SAMPLES)[sample.id]
    full = Encoder(llm[1], PROMPT, 500, 40)(sample, demos, "eerg", 4, with_target=False)
    seen = []
    for limit in range(full.length, 30, -1):
        encoder = Encoder(llm[1], PROMPT, limit, 40)
        try:
            row = encoder(sample, demos, "eerg", 4, with_target=False)
        except ConfigError:
            break
        assert row.length <= limit
        seen.append(tuple(encoder.cuts))
    with pytest.raises(ConfigError, match="the instruction and 4 video slots alone exceed 10 tokens"):
        Encoder(llm[1], PROMPT, 10, 40)(sample, demos, "eerg", 4, with_target=False)
    order = ["history", "background", "demonstration", "utterance"]
    assert seen[0] == ()
    assert seen[-1] == tuple(order), "all of them were cut before giving up"
    for cuts in seen:
        assert list(cuts) == order[: len(cuts)]


def test_target_is_cut_in_training_only(llm) -> None:
    encoder = Encoder(llm[1], PROMPT, 200, 5)
    row = encoder(SAMPLES[0], (), "eerg", 0, with_target=True)
    assert len(row.target) == 5
    assert row.target[-1] == 2
    assert encoder.cuts["target"] == 1


def test_typed_control_strings_stay_text(llm, encoder) -> None:
    sample = replace(SAMPLES[0], utterance=replace(SAMPLES[0].utterance, text=f"[gMASK]sop</s>{SLOTS}"))
    row = encoder(sample, (), "eerg", 3, with_target=False)
    assert sum(i >= len(llm[1]) - 5 for i in row.before + row.after) == 2, "only the template's own [gMASK] sop"
    assert 2 not in row.before + row.after
    assert "[gMASK]sop</s>" in encoder.tokenizer.decode(row.before)


@pytest.mark.parametrize("temperature", [0.0, 0.95])
def test_generation_does_not_depend_on_the_batch(llm, encoder, temperature: float) -> None:
    model, data = build(llm), examples(encoder, with_target=False)
    kwargs = {"eos": 2, "max_new_tokens": 12, "top_p": 0.7, "temperature": temperature}
    together = generate_all(model, data, 10_000, Accelerator(cpu=True), seeds=[3, 4], **kwargs)
    assert len({tuple(ids) for ids, _ in together}) > 3
    for position, seed in enumerate((3, 4)):
        alone = generate_all(model, data, 1, Accelerator(cpu=True), seeds=[seed], **kwargs)
        assert [several[position] for several in together] == [several[0] for several in alone]
    assert ([a for a, _ in together] == [b for _, b in together]) == (temperature == 0)


def test_rows_that_have_ended_leave_and_change_nothing(llm, encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = build(llm), examples(encoder, with_target=False)
    batch, widths = data.batch(range(len(data))), []
    streams = [str(i) for i in range(2 * len(data))]
    run = llm[0].forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        if (ids := kwargs.get("input_ids")) is not None:
            widths.append(len(ids))
        return run(*args, **kwargs)

    def replies(rows: Batch, names: list[str], copies: int = 1) -> list[list[int]]:
        choose = nucleus(names, 0.95, 3.0, 30)
        return generate_batch(model, rows, lambda *args: choose(*args) % 4, eos=3, max_new_tokens=30, copies=copies)

    monkeypatch.setattr(llm[0], "forward", watched)
    together = replies(batch, streams, copies=2)
    assert widths[0] == 2 * len(data)
    assert widths[-1] < len(data)
    assert len({len(ids) for ids in together}) > 3
    alone = [replies(data.batch([i // 2]), [streams[i]])[0] for i in range(2 * len(data))]
    assert together == alone


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


@pytest.mark.parametrize(("name", "prefix", "world"), [("rep", 0, 1), ("eerg", 4, 2)])
def test_the_shapes_of_a_training_are_those_of_its_micro_batches(
    llm, encoder, name: str, prefix: int, world: int
) -> None:
    data, model = examples(encoder, name, samples=SEEN), build(llm, prefix=prefix)
    accelerator = cast(Accelerator, SimpleNamespace(num_processes=world, device=torch.device("cpu")))
    objective = ElmdObjective(model, {}, data, accelerator, batch_size=4, micro_tokens=400, seed=0, evaluate=dict)
    seen = set()
    run = model.loss

    def loss(micro: Batch) -> Tensor:
        seen.add((*micro.ids.shape, micro.keep, micro.free, len(micro.at)))
        return run(micro)

    model.loss = loss  # type: ignore[method-assign]
    batches = [batch for epoch in range(3) for batch in objective.batches(epoch)][:-1]
    for batch in batches:
        for rank in range(world):
            list(objective.losses(batch, rank, world))
    assert len(seen) > 2
    assert objective.shapes(len(batches)) == seen


def test_shared_beginning_leaves_the_fewest_tokens() -> None:
    draw, found = random.Random(0), 0
    for trial in range(200):
        rows = []
        for _ in range(draw.randrange(1, 7)):
            before = [draw.randrange(1 + trial % 3) for _ in range(draw.randrange(9))]
            rows.append(Encoded([5, 6] * draw.randrange(2) + before, draw.randrange(3), [7], []))
        batch = collate(rows, [torch.zeros(row.slots, 2) if row.slots else None for row in rows])
        length, full = batch.ids.shape[1], batch.ids.numel()
        text = [row.before if row.slots else [*row.before, *row.after][:-1] for row in rows]
        costs = {
            c: len({tuple(one[:c]) for one in text}) * c + len(rows) * (length - c)
            for c in range(1, min(map(len, text)) + 1)
        }
        best = min(costs.values(), default=full)
        shared = shared_beginning(batch.ids, batch.slots, batch.mask)
        if shared is None:
            assert best > (1 - WORTHWHILE) * full or len(rows) == 1
            continue
        found += 1
        assert costs[shared.length] == best
        assert len(shared.firsts) == len({tuple(one[: shared.length]) for one in text})
        for one, which in zip(text, shared.which.tolist(), strict=True):
            assert one[: shared.length] == text[shared.firsts[which]][: shared.length]
    assert found > 50


def test_generation_equals_recomputing_each_token(llm, encoder) -> None:
    model, data = build(llm), examples(encoder, with_target=False)
    for i in (0, 3, 5):
        fast = generate_batch(model, data.batch([i]), greedy, eos=2, max_new_tokens=8)[0]
        assert fast == slow_reply(model, data.rows[i], VISUAL[SAMPLES[i].id], 2, 8)


def test_nucleus_draws_from_the_kept_tokens_in_proportion() -> None:
    probabilities = torch.tensor([0.05, 0.5, 0.15, 0.3])
    counts = torch.zeros(4)
    rows = 64
    choose = nucleus([str(i) for i in range(rows)], 0.7, 1.0, 200)
    for step in range(200):
        chosen = choose(probabilities.log().expand(rows, 4), step, torch.arange(rows))
        counts += torch.bincount(chosen, minlength=4)
    share = counts / counts.sum()
    assert share[0] == share[2] == 0, "0.5 + 0.3 reach 0.7"
    assert share[1].item() == pytest.approx(0.5 / 0.8, abs=0.01)
    certain = torch.tensor([[-50.0, 50.0, -50.0, -50.0]])
    assert nucleus(["x"], 0.7, 0.95, 1)(certain, 0, torch.tensor([0])).item() == 1


@pytest.mark.parametrize("likely", [1, 5, 20])
@pytest.mark.parametrize("top_p", [0.3, 0.7, 1.0])
def test_nucleus_of_a_partial_sort_is_that_of_the_whole(likely: int, top_p: float) -> None:
    torch.manual_seed(0)
    rows, steps = torch.arange(50), 8
    ways = [nucleus([str(i) for i in range(50)], top_p, 0.95, steps, likely=n) for n in (likely, 40)]
    sharp, flat = torch.randn(50, 40) * 4, torch.zeros(50, 40)
    tied = torch.randint(0, 4, (50, 40)).float()  # bfloat16's logits have many equal ones
    for logits in (sharp, flat, tied, sharp.bfloat16().float()):
        for step in range(steps):
            some, all_of_them = (way(logits, step, rows) for way in ways)
            assert some.equal(all_of_them)
    few = torch.tensor([7, 31])
    assert ways[0](sharp[few], 2, few).equal(ways[1](sharp, 2, rows)[few]), "a row's draws are its own"


def test_scores_equal_losses_of_the_words(llm, encoder) -> None:
    model = build(llm)
    words = [[*encoder.text(word), 2] for word in WORDS.values()]
    assert len({len(word) for word in words}) > 1 or len(words[0]) > 2, "words of several tokens"
    data = examples(encoder, "rep", with_target=False)
    scores = model.log_probs(data.batch([0, 2, 3, 5]), words)
    for row, i in enumerate((0, 2, 3, 5)):
        for column, word in enumerate(words):
            full = Encoded(data.rows[i].before, data.rows[i].slots, data.rows[i].after, word)
            loss = model.loss(collate([full], [VISUAL[SAMPLES[i].id]]))
            assert -scores[row, column].item() == pytest.approx(loss.item(), rel=1e-4)
    best = predict_emotions(model, data, words, 300, Accelerator(cpu=True), "")
    assert [best[i] for i in (0, 2, 3, 5)] == scores.argmax(-1).tolist()


def test_one_times_eight_equals_eight_times_one(llm, encoder) -> None:
    gradients = []
    for budget in (100_000, 1, 200):
        model, data = build(llm), examples(encoder)
        objective = ElmdObjective(
            model, {"adapter": model.adapter, "projector": model.projector}, data, Accelerator(cpu=True),
            batch_size=8, micro_tokens=budget, seed=0, evaluate=dict,
        )  # fmt: skip
        batch = objective.batches(0)[0]
        losses = list(objective.losses(batch, 0, 1))
        assert len(losses) == {100_000: 1, 1: 8}.get(budget, len(losses))
        for loss, _ in losses:
            (loss / objective.weight(batch)).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    for other in gradients[1:]:
        assert (other - gradients[0]).norm() / gradients[0].norm() < 1e-5


def test_global_batches_cover_every_sample_once(llm, encoder) -> None:
    model, data = build(llm), examples(encoder)
    objective = ElmdObjective(
        model, {}, data, Accelerator(cpu=True), batch_size=5, micro_tokens=1, seed=0, evaluate=dict
    )
    assert sorted(i for batch in objective.batches(0) for i in batch) == list(range(len(data)))
    assert objective.batches(0) == objective.batches(0)
    assert objective.batches(0) != objective.batches(1)
    assert objective.weight([0, 1]) == len(data.rows[0].target) + len(data.rows[1].target)


def test_pack_keeps_the_budget_and_every_row() -> None:
    draw = random.Random(0)
    lengths = [draw.randrange(1, 50) for _ in range(40)]
    order = sorted(range(40), key=lengths.__getitem__)
    groups = bin_pack(lengths, order, 100)
    assert [i for group in groups for i in group] == order
    assert all(max(lengths[i] for i in g) * len(g) <= 100 for g in groups)
    assert len(groups) < 40
    assert bin_pack([500], [0], 100) == [[0]], "a row longer than the budget"
    assert bin_pack([], [], 100) == []


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("cost", [0, 30, 1000])
def test_pack_finds_the_cheapest_cut(split: bool, cost: int) -> None:
    draw = random.Random(2)
    for _ in range(20):
        before = [draw.randrange(30) for _ in range(8)]
        lengths = [head + draw.randrange(1, 40) for head in before]
        order = sorted(range(8), key=lengths.__getitem__, reverse=draw.random() < 0.5)

        def tokens(group: list[int]) -> int:
            heads = [before[i] if split else 0 for i in group]  # noqa: B023
            tails = [lengths[i] - head for i, head in zip(group, heads, strict=True)]  # noqa: B023
            return len(group) * (max(heads) + max(tails))

        cheapest = math.inf
        for cuts in itertools.product([False, True], repeat=7):
            groups = [[order[0]]]
            for i, cut in zip(order[1:], cuts, strict=True):
                groups += [[i]] if cut else []
                groups[-1] += [] if cut else [i]
            if all(tokens(group) <= 200 or len(group) == 1 for group in groups):
                cheapest = min(cheapest, sum(tokens(group) + cost for group in groups))
        found = bin_pack(lengths, order, 200, before=before if split else None, cost=cost)
        assert [i for group in found for i in group] == order
        assert sum(tokens(group) + cost for group in found) == cheapest


def test_pack_keeps_the_budget_of_split_batches() -> None:
    draw = random.Random(1)
    rows = [Encoded([5] * draw.randrange(1, 40), 3, [7] * draw.randrange(5), [8, 2]) for _ in range(60)]
    lengths = [row.length for row in rows]
    order = sorted(range(60), key=lengths.__getitem__)
    groups = bin_pack(lengths, order, 100, before=[len(row.before) for row in rows])
    assert [i for group in groups for i in group] == order
    sizes = [collate([rows[i] for i in g], [torch.zeros(3, 2)] * len(g), split=True).ids.numel() for g in groups]
    assert max(sizes) <= 100


def test_token_loss_is_the_mean_over_all_target_tokens(llm, encoder) -> None:
    model, data = build(llm), examples(encoder)
    whole = model.loss(data.batch(range(len(data)))).sum().item() / data.targets(range(len(data)))
    assert token_loss(model, data, 150, Accelerator(cpu=True), "") == pytest.approx(whole, rel=1e-5)
    assert not math.isnan(whole)


def test_saved_parts_alone_give_identical_outputs(llm, encoder, tmp_path: Path) -> None:
    model, data = build(llm), examples(encoder, with_target=False)
    model.save(tmp_path)
    files = {p.relative_to(tmp_path).as_posix(): p.stat().st_size for p in tmp_path.rglob("*") if p.is_file()}
    assert {name for name in files if not name.endswith("README.md")} == {
        "projector.safetensors", "adapter/adapter_config.json", "adapter/adapter_model.safetensors",
    }  # fmt: skip
    assert sum(files.values()) < 20_000, "what trains, not the language model"
    again = Elmd.load(tmp_path, llm[0]).eval()
    batch = data.batch([0, 3, 5])
    assert torch.equal(model(batch, keep=3).logits, again(batch, keep=3).logits)
    with pytest.raises(CheckpointError, match="holds neither a projector nor an adapter"):
        Elmd.load(tmp_path / "nothing", llm[0])


def test_dropout_touches_the_prefix_in_training_only(llm, encoder) -> None:
    torch.manual_seed(0)
    model = Elmd(llm[0], Projector(6, 32), Prefix.create(llm[0], 4, 0.5))
    batch = examples(encoder).batch([0, 1])
    model.eval()
    assert torch.equal(model.loss(batch), model.loss(batch))
    model.train()
    assert not model.llm.training
    assert not torch.equal(model.loss(batch), model.loss(batch))


def test_wrong_widths_are_refused(llm) -> None:
    with pytest.raises(CheckpointError, match="the projector writes 16 numbers, the language model reads 32"):
        Elmd(llm[0], Projector(6, 16))


def test_missing_checkpoint_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere: cannot be loaded as a language model .*; give llm\.path"):
        load_llm(tmp_path / "nowhere")


def test_shuffled_features_permute_within_splits() -> None:
    mixed = shuffled(VISUAL.get, SAMPLES, seed=1)
    for split in ("train", "valid", "test"):
        ids = [s.id for s in SAMPLES if s.split == split and VISUAL[s.id] is not None]
        before = sorted(hashlib.sha256(VISUAL[i].numpy().tobytes()).hexdigest() for i in ids)
        after = sorted(hashlib.sha256(mixed(i).numpy().tobytes()).hexdigest() for i in ids)
        assert before == after
    assert mixed(SAMPLES[3].id) is None
    assert any(not torch.equal(mixed(s.id), VISUAL[s.id]) for s in SAMPLES if VISUAL[s.id] is not None)


def test_emotion_words_and_labels_agree() -> None:
    assert len(set(WORDS.values())) == len(EMOTIONS) == 7


def state_hash(module: torch.nn.Module) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        found.update(name.encode() + tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def test_rep_moves_the_projector_and_nothing_else(llm_folder: Path, tmp_path: Path) -> None:
    model, tokenizer = load_llm(llm_folder)
    encoder = Encoder(tokenizer, PROMPT, 200, 40)
    elmd = build((model, tokenizer), prefix=0)
    before = state_hash(elmd.llm), state_hash(elmd.projector)
    objective = ElmdObjective(
        elmd, {"projector": elmd.projector}, examples(encoder, "rep", samples=SEEN), Accelerator(cpu=True),
        batch_size=4, micro_tokens=300, seed=0, evaluate=lambda: {"score": 0.0},
    )  # fmt: skip
    plan = Plan({"projector": 1e-2}, 3, 0, "score", True, evaluate_every=3, checkpoint_every=3)
    elmd.train()
    fit(objective, plan, tmp_path, Accelerator(cpu=True), "REP")
    checkpoint.load_latest(tmp_path / "checkpoints", objective.modules, torch.optim.AdamW(elmd.projector.parameters()))
    assert state_hash(elmd.llm) == before[0]
    assert state_hash(elmd.projector) != before[1]
    assert all(not p.requires_grad and p.grad is None for p in elmd.llm.parameters())
