"""DialoGPT and Livebot: learning by heart, padding and masks, vocabulary, decoding, and the stage around them."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.nn import functional as F

from benchmarks.tiny import LINES, make_samples
from elmd.baselines.base import Baseline, Rows, TextBatch, fit, generate_all
from elmd.baselines.dialogpt import DialoGPT
from elmd.baselines.livebot import Livebot, Sizes
from elmd.baselines.vocabulary import Vocabulary
from elmd.cli import compose
from elmd.config import BootstrapText
from elmd.data.samples import save_samples
from elmd.engine.files import write_json
from elmd.engine.stage import Inputs, Job
from elmd.errors import CheckpointError, ConfigError
from elmd.evaluation.predictions import read_predictions
from elmd.models.decode import greedy, nucleus, stream
from elmd.stages import baseline, bootstrap, parts
from elmd.stages import baseline as stage
from elmd.stages import generate as generate_stage
from elmd.stages import generate as writing
from elmd.training.plan import Plan
from elmd.types import Sample
from elmd.vision.store import index_of, read_shards, write_shard

WIDTH, FRAMES, MOST = 6, 3, 64  # q, frames per clip, max_tokens
SAMPLES = make_samples(8)
VOCABULARY = Vocabulary.of(LINES)
CLIPS = {sample.id: torch.randn(FRAMES, WIDTH, generator=torch.manual_seed(i)) for i, sample in enumerate(SAMPLES)}
WITHOUT = SAMPLES[2].id  # has no clip


def clips(sample: str) -> torch.Tensor | None:
    return None if sample == WITHOUT else CLIPS[sample]


def dialogpt(dropout: float = 0.0) -> DialoGPT:
    torch.manual_seed(0)
    return DialoGPT.create(
        VOCABULARY, layers=2, width=32, heads=4, ff=64, dropout=dropout, max_tokens=MOST
    ).eval()  # fmt: skip


def livebot(dropout: float = 0.0, video: int = WIDTH) -> Livebot:
    torch.manual_seed(0)
    sizes = Sizes(len(VOCABULARY), video, layers=2, width=32, heads=4, ff=64, dropout=dropout, start=VOCABULARY.start)
    return Livebot(sizes).eval()


def text_livebot(dropout: float = 0.0) -> Livebot:
    return livebot(dropout, video=0)


MODELS = pytest.mark.parametrize("create", [dialogpt, livebot, text_livebot])
Create = Callable[..., Baseline]


def rows(model: Baseline, samples: list[Sample] = SAMPLES, *, with_reply: bool = True, most: int = MOST) -> Rows:
    width = model.sizes.video if isinstance(model, Livebot) else 0
    return Rows(
        samples, VOCABULARY, max_tokens=most, with_reply=with_reply, loss_on_context=model.loss_on_context,
        video=clips, width=width,
    )  # fmt: skip


def slow_logits(model: Baseline, ids: list[int], reply: list[int], video: torch.Tensor | None) -> torch.Tensor:
    """Logits after each token of the reply so far (Livebot) or of all (DialoGPT), of one sample without padding."""
    if isinstance(model, DialoGPT):
        return model.gpt(input_ids=torch.tensor([[*ids, *reply]])).logits[0]
    assert isinstance(model, Livebot)

    def embed(tokens: list[int]) -> torch.Tensor:
        out = model.embedding(torch.tensor(tokens))
        for i in range(len(tokens)):
            for j in range(0, 32, 2):
                angle = torch.tensor(i / 10000 ** (j / 32))
                out[i, j], out[i, j + 1] = out[i, j] + angle.sin(), out[i, j + 1] + angle.cos()
        return out

    def run(stack, x: torch.Tensor, memories: list[torch.Tensor | None], causal: bool = False) -> torch.Tensor:
        later = torch.triu(torch.full((len(x), len(x)), -torch.inf), 1) if causal else None
        for block in stack.blocks:
            norms, attentions = list(block.norms), list(block.attentions)
            h = norms[0](x)
            x = x + attentions[0](h, h, h, attn_mask=later)[0]
            for norm, attention, memory in zip(norms[1:-1], attentions[1:], memories, strict=True):
                if memory is not None:
                    x = x + attention(norm(x), memory, memory)[0]
            x = x + block.feed_forward(norms[-1](x))
        return stack.norm(x)

    seen: list[torch.Tensor | None] = []
    if model.sizes.video:
        seen = [None if video is None else run(model.video_encoder, model.project(video), [])]
    text = run(model.text_encoder, embed(ids), seen)
    return model.output(run(model.decoder, embed([VOCABULARY.start, *reply]), [*seen, text], causal=True))


# ------------------------------------------------------------------------------------------------------------ learning
@MODELS
def test_eight_samples_are_learnt_by_heart_and_said_back(create: Create, tmp_path: Path) -> None:
    model, accelerator = create(dropout=0.1), Accelerator(cpu=True)
    train = rows(model)
    plan = Plan(
        rates={"model": 1e-2}, steps=80, seed=0, select="loss", higher_is_better=False, evaluate_every=80,
        checkpoint_every=1000, warmup=0.1, max_grad_norm=2.0,
    )  # fmt: skip
    done = fit(model, train, train, plan, tmp_path, accelerator, "test", batch_size=8, micro_tokens=1000)
    assert done.best is not None
    # DialoGPT also learns the contexts, and with which line a dialogue begins cannot be known.
    assert done.best < (0.15 if model.loss_on_context else 0.02)

    asked = rows(model, with_reply=False)
    how = {"max_new_tokens": MOST, "top_p": 0.7, "temperature": 0, "seed": 0}
    ids = generate_all(model, asked, 100, accelerator, **how)
    assert [VOCABULARY.decode(row) for row in ids] == [sample.response.text for sample in SAMPLES]

    model.save(tmp_path / "saved")
    again = type(model).load(tmp_path / "saved")
    assert generate_all(again, asked, 100, accelerator, **how) == ids
    assert {"config.json", "model.safetensors"} <= {path.name for path in (tmp_path / "saved").iterdir()}


def test_the_video_alone_can_tell_replies_apart(tmp_path: Path) -> None:
    """Equal texts with different clips and replies: only a model that looks can learn them."""
    twins = [
        replace(s, history=(), utterance=SAMPLES[0].utterance, response=replace(s.response, text=text))
        for s, text in zip(SAMPLES[3:6], ("好。", "不去！", "怎么了"), strict=True)
    ]
    model = livebot()
    train = rows(model, twins)
    plan = Plan(
        rates={"model": 1e-2}, steps=60, seed=0, select="loss", higher_is_better=False, evaluate_every=60,
        checkpoint_every=1000, warmup=0.1,
    )  # fmt: skip
    done = fit(model, train, train, plan, tmp_path, Accelerator(cpu=True), "test", batch_size=3, micro_tokens=1000)
    assert done.best is not None
    assert done.best < 0.05


# ---------------------------------------------------------------------------------------------------- loss and padding
@MODELS
def test_the_loss_is_that_of_each_sample_alone_without_padding(create: Create) -> None:
    model = create()
    made = rows(model)
    with torch.no_grad():
        found = model.loss(made.batch(range(len(made))))
        for i, (sample, row) in enumerate(zip(SAMPLES, made.rows, strict=True)):
            logits = slow_logits(model, row.context, row.reply, clips(sample.id))
            ids = [*row.context, *row.reply]
            if model.loss_on_context:
                expected = F.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="sum")
            else:
                expected = F.cross_entropy(logits[:-1], torch.tensor(row.reply), reduction="sum")
            torch.testing.assert_close(found[i], expected, atol=1e-4, rtol=1e-5)
            torch.testing.assert_close(model.loss(made.batch([i]))[0], expected, atol=1e-4, rtol=1e-5)
    counted = sum(len(row.reply) + (len(row.context) - 1) * model.loss_on_context for row in made.rows)
    assert made.targets(range(len(made))) == counted


@MODELS
def test_gradients_do_not_depend_on_micro_batches(create: Create, tmp_path: Path) -> None:
    def gradients(micro_tokens: int) -> dict[str, torch.Tensor]:
        model = create()
        made = rows(model)
        seen = {}
        plan = Plan(
            rates={"model": 0.0}, steps=1, seed=0, select="loss", higher_is_better=False, evaluate_every=1,
            checkpoint_every=1000, max_grad_norm=1e9,
        )  # fmt: skip
        for name, parameter in model.named_parameters():
            parameter.register_hook(lambda g, n=name: seen.__setitem__(n, seen.get(n, 0) + g))
        fit(
            model, made, made, plan, tmp_path / str(micro_tokens), Accelerator(cpu=True), "test", batch_size=8,
            micro_tokens=micro_tokens,
        )  # fmt: skip
        return seen

    whole, single = gradients(10_000), gradients(1)
    assert whole.keys() == single.keys()
    assert len(whole) > 20
    for name in whole:
        assert whole[name].isfinite().all(), name
        torch.testing.assert_close(whole[name], single[name], atol=1e-5, rtol=1e-4, msg=name)


@MODELS
def test_what_stands_in_padding_changes_nothing(create: Create) -> None:
    model = create()
    batch = rows(model).batch(range(len(SAMPLES)))
    assert not batch.context_mask.all()
    assert not batch.reply_mask.all()
    filled = replace(
        batch,
        context=batch.context.masked_fill(~batch.context_mask, 7),
        reply=batch.reply.masked_fill(~batch.reply_mask, 7),
        video=None if batch.video is None else batch.video.masked_fill(~batch.frames[..., None], 9.0),
    )
    wider = widened(batch)
    with torch.no_grad():
        expected = model.loss(batch)
        assert expected.isfinite().all()
        torch.testing.assert_close(model.loss(filled), expected)
        torch.testing.assert_close(model.loss(wider), expected, atol=1e-4, rtol=1e-5)


def widened(batch: TextBatch) -> TextBatch:
    """The same rows with three more columns of padding everywhere."""
    left, right = (lambda t: F.pad(t, (3, 0))), (lambda t: F.pad(t, (0, 3)))
    return TextBatch(
        left(batch.context), left(batch.context_mask), right(batch.reply), right(batch.reply_mask),
        None if batch.video is None else F.pad(batch.video, (0, 0, 0, 3), value=5.0),
        None if batch.frames is None else right(batch.frames),
    )  # fmt: skip


@MODELS
def test_a_later_token_never_changes_an_earlier_logit(create: Create) -> None:
    model = create()
    context, reply = rows(model).rows[0].context, [9, 10, 11, 12]
    with torch.no_grad():
        a, b = (after(model, context, [*reply[:2], last, 8]) for last in (11, 20))
    assert torch.equal(a[:-2], b[:-2])
    assert not torch.allclose(a[-2], b[-2])


def after(model: Baseline, context: list[int], reply: list[int]) -> torch.Tensor:
    """Logits after each token of a reply, as the model itself computes them."""
    ids = torch.tensor([reply])
    if isinstance(model, DialoGPT):
        return model.gpt(input_ids=torch.tensor([[*context, *reply]])).logits[0]
    assert isinstance(model, Livebot)
    seen = torch.ones(1, len(context), dtype=torch.bool)
    video = CLIPS[SAMPLES[0].id][None] if model.sizes.video else None
    batch = TextBatch(torch.tensor([context]), seen, ids, torch.ones_like(ids, dtype=torch.bool), video,
                      None if video is None else torch.ones(1, FRAMES, dtype=torch.bool))  # fmt: skip
    return model.decode(ids, torch.ones_like(ids, dtype=torch.bool), model.read(batch))[0]


def test_a_clip_counts_and_a_row_without_one_goes_around_the_attention_to_it() -> None:
    model = livebot()
    made = rows(model)
    batch = made.batch(range(4))
    assert batch.video is not None
    assert batch.frames is not None
    assert batch.frames.any(-1).tolist() == [True, True, False, True]
    with torch.no_grad():
        loss, other = model.loss(batch), model.loss(replace(batch, video=batch.video + 1))
    assert (loss != other).tolist() == [True, True, False, True]
    alone = made.batch([2])
    with torch.no_grad():
        torch.testing.assert_close(model.loss(alone)[0], loss[2], atol=1e-4, rtol=1e-5)


def test_a_text_livebot_has_no_video_parts() -> None:
    names = {name.split(".")[0] for name, _ in text_livebot().named_parameters()}
    assert names == {"embedding", "text_encoder", "decoder", "output"}
    attentions = {name for name, _ in text_livebot().named_modules() if name.endswith("attentions.2")}
    assert not attentions, "the decoder attends to itself and the text"


# ------------------------------------------------------------------------------------------------------------ decoding
@MODELS
def test_replies_equal_those_of_a_slow_loop_and_do_not_depend_on_the_batch(create: Create) -> None:
    model = create()
    for parameter in model.parameters():  # sharper choices than those of fresh weights
        parameter.data *= 1.5
    few = SAMPLES[:4]  # with the one that has no clip
    asked, accelerator, most = rows(model, few, with_reply=False), Accelerator(cpu=True), 8
    for temperature in (0.0, 0.95):
        how = {"max_new_tokens": most, "top_p": 0.7, "temperature": temperature, "seed": 3}
        together, one_by_one = (generate_all(model, asked, budget, accelerator, **how) for budget in (10_000, 1))
        assert together == one_by_one
        for i, sample in enumerate(few):
            choose = greedy if temperature == 0 else nucleus([stream(3, sample.id)], 0.7, temperature, most)
            ids: list[int] = []
            while len(ids) < most:
                with torch.no_grad():
                    logits = slow_logits(model, asked.rows[i].context, ids, clips(sample.id))[-1:]
                logits[:, VOCABULARY.never_written] = -torch.inf
                token = int(choose(logits, len(ids), torch.tensor([0])))
                if token == VOCABULARY.end:
                    break
                ids.append(token)
            assert together[i] == ids
    assert len({tuple(ids) for ids in together}) > 1
    assert generate_all(model, asked, 10_000, accelerator, **{**how, "seed": 4}) != together


@MODELS
def test_control_tokens_are_never_written(create: Create) -> None:
    model = create()
    made = rows(model, with_reply=False)
    begin = model.begin

    def wants_unknown(batch: TextBatch) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        step = begin(batch)

        def logits(new: torch.Tensor, running: torch.Tensor) -> torch.Tensor:
            found = step(new, running)
            found[:, VOCABULARY.never_written] = 1e4
            return found

        return logits

    model.begin = wants_unknown  # type: ignore[method-assign]
    ids = generate_all(model, made, 10_000, Accelerator(cpu=True), max_new_tokens=4, top_p=0.7, temperature=1.0, seed=0)
    assert ids
    assert not {i for row in ids for i in row} & {*VOCABULARY.never_written, VOCABULARY.end}


# ---------------------------------------------------------------------------------------------------------- vocabulary
def test_gpt2_s_own_ids_are_those_of_the_vocabulary() -> None:
    config = dialogpt().gpt.config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (2, 3, 0)
    assert [VOCABULARY.tokens[i] for i in (2, 3, 0)] == ["[CLS]", "[SEP]", "[PAD]"]
    assert config.vocab_size == len(VOCABULARY)


def test_a_vocabulary_is_bert_s(tmp_path: Path) -> None:
    from transformers import BertTokenizer

    made = Vocabulary.of(["你好 OK了，2024年！", "好吗"])
    assert made.tokens[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert {"你", "好", "o", "##k", "##0"} <= set(made.tokens)
    made.save(tmp_path / "vocab.txt")
    theirs = BertTokenizer(vocab={token: i for i, token in enumerate(made.tokens)})
    for text in ("你好 OK了", "好吗，2024", "不好", "Ok k"):
        assert made.encode(text) == theirs.encode(text, add_special_tokens=False), text
    again = Vocabulary.load(tmp_path / "vocab.txt")
    assert again.tokens == made.tokens
    assert again.decode(again.encode("你好 OK OK了，2024年 ！")) == "你好ok ok了，2024年！"
    assert made.encode("不") == [made.unknown]
    assert made.decode([made.start, *made.encode("好不好"), made.end]) == "好好", "what is unknown is never text"
    assert made.end not in made.encode("你[SEP]好"), "a user's text holds no control token"


def test_a_file_that_is_no_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n你\n")
    with pytest.raises(
        CheckpointError, match=r"vocab\.txt: is no BERT vocabulary: it lacks \[CLS\], \[SEP\], \[MASK\]"
    ):
        Vocabulary.load(tmp_path / "vocab.txt")
    (tmp_path / "vocab.txt").write_bytes("你好".encode("gbk"))
    with pytest.raises(CheckpointError, match="cannot be read as a vocabulary"):
        Vocabulary.load(tmp_path / "vocab.txt")


def test_a_context_that_is_too_long_loses_its_oldest_turns_first() -> None:
    model = dialogpt()
    long = max(SAMPLES, key=lambda s: len(s.history))
    turns = [VOCABULARY.encode(turn.text) for turn in (*long.history, long.utterance)]
    assert len(turns) >= 3
    whole = rows(model, [long], most=300)
    assert whole.rows[0].context == [VOCABULARY.start, *(i for turn in turns for i in [*turn, VOCABULARY.end])]
    assert not whole.cuts

    room = 1 + len(turns[-1]) + 1 + len(turns[-2]) + 1
    cut = rows(model, [long], most=room)
    assert cut.rows[0].context == [VOCABULARY.start, *turns[-2], VOCABULARY.end, *turns[-1], VOCABULARY.end]
    assert dict(cut.cuts) == {"history": 1}
    assert rows(model, [long], most=room - 1).rows[0].context == [VOCABULARY.start, *turns[-1], VOCABULARY.end]

    short = rows(model, [long], most=8)
    assert short.rows[0].context == [VOCABULARY.start, *turns[-1][-6:], VOCABULARY.end]
    assert short.rows[0].reply == [*VOCABULARY.encode(long.response.text)[:7], VOCABULARY.end]
    assert dict(short.cuts) == {"utterance": 1, "history": 1, "reply": 1}


def test_unknown_tokens_are_counted() -> None:
    strange = replace(SAMPLES[0], utterance=replace(SAMPLES[0].utterance, text="龘龘好"))
    assert rows(dialogpt(), [strange]).unknown == 2
    assert rows(dialogpt(), SAMPLES).unknown == 0


# --------------------------------------------------------------------------------------------------------------- stage
SMALL = ["baseline.layers=1", "baseline.width=16", "baseline.heads=2", "baseline.ff=16", "baseline.epochs=1"]


def reads_of(*overrides: str) -> Inputs:
    return baseline.reads(compose([*SMALL, *overrides]))


def counted(*overrides: str) -> dict[str, Any]:
    return reads_of(*overrides).counted(compose([*SMALL, *overrides]))


@pytest.mark.parametrize("name", ["dialogpt", "livebot", "dialogpt_tiny", "livebot_tiny"])
def test_presets_compose(name: str) -> None:
    cfg = compose([f"baseline={name}"])
    assert cfg.baseline.name.value == name.removesuffix("_tiny")
    assert baseline.reads(cfg).counted(cfg)["seed"] == 0


def test_published_sizes_are_the_defaults() -> None:
    gpt, live = (compose([f"baseline={name}"]).baseline for name in ("dialogpt", "livebot"))
    assert (gpt.layers, gpt.width, gpt.heads, gpt.lr, gpt.warmup, gpt.max_grad_norm) == (12, 768, 12, 2.6e-5, 0.1, 2.0)
    assert (live.layers, live.width, live.heads, live.ff) == (6, 512, 8, 2048)
    assert compose(["baseline=livebot"]).vision.frames == 5


def test_a_permutation_counts_by_its_seed_and_only_where_there_is_one() -> None:
    for reads, choices in ((parts.reads_parts, []), (baseline.reads, ["baseline=livebot_tiny"])):
        first, second = (compose([*SMALL, *choices, f"data.split_seed={seed}"]) for seed in (1, 2))
        assert reads(first).counted(first) == reads(second).counted(second)
        first.vision.shuffle = second.vision.shuffle = True
        assert reads(first).counted(first) != reads(second).counted(second)


def test_a_stand_in_of_data_counts_how_often_that_is_read() -> None:
    cfg = compose(SMALL)
    cfg.bootstrap.text = BootstrapText.data
    before = bootstrap.reads_llm(cfg).counted(cfg)
    cfg.bootstrap.dialogues += 1
    assert bootstrap.reads_llm(cfg).counted(cfg) != before


def test_a_baseline_depends_on_what_it_reads_and_no_more(tmp_path: Path) -> None:
    assert reads_of("baseline=dialogpt_tiny").upstream == ("prepare",)
    assert reads_of("baseline=livebot_tiny").upstream == ("prepare", "features")
    assert reads_of("baseline=livebot_tiny", "vision=none").upstream == ("prepare",)
    assert baseline.frame_rows(compose(["baseline=livebot_tiny"])) == 4
    assert baseline.frame_rows(compose(["baseline=livebot"])) is None, "all rows are frames"
    cfg = compose(["baseline=dialogpt_tiny", *SMALL])
    for key, value, read in (
        ("baseline.micro_tokens", 7, False), ("baseline.checkpoint_every", 7, False), ("llm.path", "x", False),
        ("retriever.k", 0, False), ("eerg.steps", 1, False),
        ("baseline.lr", 0.5, True), ("baseline.max_tokens", 9, True), ("seed", 1, True),
    ):  # fmt: skip
        other = deepcopy(cfg)
        *groups, name = key.split(".")
        setattr(attrgetter(*groups)(other) if groups else other, name, value)
        assert (baseline.reads(other).counted(other) != baseline.reads(cfg).counted(cfg)) is read, key
    given = ["baseline=dialogpt_tiny", f"baseline.vocab={tmp_path}/vocab.txt"]
    assert reads_of(*given).files == {"vocab": tmp_path / "vocab.txt"}
    assert counted(*given) == counted("baseline=dialogpt_tiny")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "stage: baseline=none has no network of its own to train"),
        (["baseline=visualglm"], "stage: baseline=visualglm has no network of its own"),
        (
            ["baseline=dialogpt_tiny", "baseline.heads=3"],
            r"baseline\.width: 16 cannot be parted among 3 heads .* multiple of 6",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        reads_of(*overrides)


def test_dialogpt_has_positions_for_so_many_tokens_and_no_more() -> None:
    with pytest.raises(
        ConfigError, match=r"max_new_tokens: a reply may have 32 tokens, and DialoGPT learns 31 at most"
    ):
        generate_stage.reads(compose(["baseline=dialogpt_tiny", "baseline.max_tokens=31"]))
    assert generate_stage.reads(compose(["baseline=dialogpt_tiny"])).upstream == ("prepare", "generator")
    assert set(generate_stage.reads(compose(["baseline=livebot_tiny"])).upstream) == {
        "prepare",
        "features",
        "generator",
    }


@pytest.mark.parametrize(
    "overrides", [["baseline=dialogpt_tiny"], ["baseline=livebot_tiny"], ["baseline=livebot_tiny", "vision=none"]]
)
def test_the_stage_trains_and_what_it_leaves_generates(overrides: list[str], tmp_path: Path) -> None:
    samples = make_samples(12)
    for name in ("prepare", "features", "baseline", "generate"):
        (tmp_path / name).mkdir()
    save_samples(tmp_path / "prepare/samples.jsonl", samples)
    rows = {sample.id: torch.randn(7, WIDTH) for sample in samples[1:]}
    write_shard(tmp_path / "features/shards/000-00000.safetensors", rows)
    owned = {sample.id: sample.id if sample.id in rows else None for sample in samples}
    write_json(tmp_path / "features/index.json", index_of(owned, read_shards(tmp_path / "features")))
    cfg = compose([*overrides, *SMALL, "generate.seeds=[0,1]", "generate.max_new_tokens=6"])
    upstream = {name: tmp_path / name for name in ("prepare", "features", "baseline")}

    outcome = stage.run(cfg, Job(tmp_path / "baseline", upstream, Accelerator(cpu=True)))
    assert {"config.json", "model.safetensors", "vocab.txt", "metrics.jsonl", "curves.png"} <= {
        path.name for path in (tmp_path / "baseline").iterdir()
    }
    assert outcome.metrics[outcome.primary or ""] > 0
    assert outcome.counts["train"] == 9
    assert outcome.counts["train_with_clip"] == (8 if overrides == ["baseline=livebot_tiny"] else 0)
    assert outcome.counts["unknown"]["train"] == 0

    made = writing.run(
        cfg, Job(tmp_path / "generate", upstream | {"generator": tmp_path / "baseline"}, Accelerator(cpu=True))
    )
    predictions = read_predictions(tmp_path / "generate/predictions.jsonl")
    test = [sample for sample in samples if sample.split == "test"]
    assert [(p.id, p.seed) for p in predictions] == [(s.id, seed) for seed in (0, 1) for s in test]
    assert made.counts["predictions"] == len(predictions)
    assert "without_emotion_word" not in made.counts
    for prediction, sample in zip(predictions, test, strict=False):
        assert prediction.predicted_emotion is None
        assert prediction.demonstration is None
        assert prediction.gold_emotion is sample.response.emotion
        assert sample.utterance.text in prediction.extra["prompt"]["utterance"]
        assert all(turn.text in prediction.extra["prompt"]["history"] for turn in sample.history)
