"""Stage `bootstrap`: the tiny world, and small stand-ins for the public checkpoints in the formats of the real ones.

Four artifacts, each its own, so that an interrupted bootstrap goes on with the next and a change of one makes one anew:

- `bootstrap/world`: `dialogues.jsonl`, `clips/` and `world.json` (data=tiny);
- `bootstrap/llm`: a GLM of ChatGLM2's shape with ChatGLM2's tokenizer;
- `bootstrap/vision`: BLIP-2's vision tower and Q-Former;
- `bootstrap/retriever`: a BERT sentence encoder as a plain SentenceTransformer.

The text comes from dialogues made for the purpose (`bootstrap.text=tiny`) or from the training part of the chosen data
(`bootstrap.text=data`); no stand-in sees a dialogue of valid or test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from random import Random
from typing import Any

from elmd.config import BootstrapText, Config
from elmd.data.encode import Encoder
from elmd.data.pairs import pairs
from elmd.data.samples import load_samples
from elmd.engine.stage import Inputs, Job, Outcome
from elmd.errors import DataError
from elmd.log import table
from elmd.tiny.lessons import lessons, train_tokenizer
from elmd.tiny.standins import Training, hold_out
from elmd.tiny.world import pretraining, topic_of, write_world
from elmd.types import SPLITS, Sample

LIKE = 0.8  # share of the demonstrations in the language model's text that answer a like emotion


# --- the world -----------------------------------------------------------------------------------------------------


def reads_world(cfg: Config) -> Inputs:
    return Inputs(("data.world",))


def world(cfg: Config, job: Job) -> Outcome:
    if not job.accelerator.is_main_process:
        return Outcome()
    size = cfg.data.world
    facts = write_world(job.folder, size.seed, {"train": size.train, "valid": size.valid, "test": size.test})
    hidden = facts["samples_whose_text_hides_the_emotion"]
    table(
        "Tiny world",
        ("split", "dialogues", "samples", "emotion in the face only"),
        [(split, facts["dialogues"][split], facts["samples"][split], hidden[split]) for split in SPLITS],
    )
    best = {name: facts["reply_emotion"][name] for name in ("ceiling", "relation_only")}
    table(
        "Accuracy of the reply's emotion that can be reached",
        ("", "share"),
        [
            ("knowing the emotion answered and the relation: the ceiling", best["ceiling"]),
            ("knowing the relation alone, as in a first turn; the history can tell more", best["relation_only"]),
        ],
    )
    return Outcome(metrics=best, counts={name: facts[name] for name in ("dialogues", "samples")})


# --- text ----------------------------------------------------------------------------------------------------------


def reads_text(cfg: Config) -> Inputs:
    """Whatever the text of a stand-in is made of."""
    keys = ("bootstrap.text", "bootstrap.seed")
    if cfg.bootstrap.text is BootstrapText.data:
        return Inputs(keys, ("prepare",))
    return Inputs((*keys, "bootstrap.dialogues"))


def text_samples(cfg: Config, job: Job) -> list[Sample]:
    """Samples of the bootstrap text: dialogues of their own, or the training split.

    Raises:
        DataError: the data has fewer than 50 training samples.
    """
    if cfg.bootstrap.text is BootstrapText.tiny:
        made = pairs(pretraining(cfg.bootstrap.seed, cfg.bootstrap.dialogues))
        return [pair.sample("train", text_only=True) for pair in made]
    samples = [s for s in load_samples(job.upstream["prepare"] / "samples.jsonl") if s.split == "train"]
    if len(samples) < 50:
        raise DataError(
            f"{len(samples)} training samples are too few to learn a language from",
            where=job.upstream["prepare"],
            fix="set bootstrap.text=tiny, or use a public checkpoint",
        )
    return samples


def like(samples: Sequence[Sample], by_show: bool) -> Callable[[Sample, Random], Sample | None]:
    """Draws a demonstration for a sample from another dialogue, `LIKE` of them for a like emotion.

    Args:
        by_show: only from the same show; shows of the bootstrap text differ in their habits of speech.
    """
    pools: dict[Any, list[Sample]] = {}
    for sample in samples:
        show = sample.show if by_show else ""
        pools.setdefault(show, []).append(sample)
        pools.setdefault((show, sample.utterance.emotion), []).append(sample)

    def draw_one(sample: Sample, draw: Random) -> Sample | None:
        show = sample.show if by_show else ""
        keys = [(show, sample.utterance.emotion), show] if draw.random() < LIKE else [show]
        for key in keys:
            for _ in range(4 if key in pools else 0):
                other = draw.choice(pools[key])
                if other.dialogue != sample.dialogue:
                    return other
        return None

    return draw_one


# --- language model ------------------------------------------------------------------------------------------------


def reads_llm(cfg: Config) -> Inputs:
    # Real text is read so often that there are as many dialogues as are made otherwise.
    keys = ["bootstrap.vocab_size", "bootstrap.dialogues", "bootstrap.llm_hidden", "bootstrap.llm_layers"]
    keys += ["bootstrap.llm_steps", "bootstrap.llm_batch", "bootstrap.llm_lr"]
    return reads_text(cfg) | Inputs((*keys, "prompt", "llm.max_prompt_tokens", "llm.max_target_tokens"))


def llm(cfg: Config, job: Job) -> Outcome:
    from elmd.stages.parts import prompt_of
    from elmd.tiny.llm import train_llm

    samples = text_samples(cfg, job)
    boot, own = cfg.bootstrap, cfg.bootstrap.text is BootstrapText.tiny
    prompt = prompt_of(cfg.prompt)
    held, kept = hold_out(samples)
    # Little data is read several times, each time as other kinds of prompt.
    rounds = 1 if own else -(-boot.dialogues // len(kept))
    texts = [
        lesson
        for number in range(rounds)
        for lesson in lessons(kept, like(kept, own), prompt, boot.seed + number, scenes=own)
    ]
    unseen = list(lessons(held, like(kept, own), prompt, boot.seed, scenes=own))
    # Real text has thousands of characters; the rarest of them are left to bytes so that words become pieces too.
    tokenizer = train_tokenizer(texts[:4000], boot.vocab_size, coverage=1.0 if own else 0.99)
    encoder = Encoder(tokenizer, prompt, cfg.llm.max_prompt_tokens, cfg.llm.max_target_tokens)
    model, metrics = train_llm(
        texts, unseen, encoder, hidden=boot.llm_hidden, layers=boot.llm_layers, batch=boot.llm_batch,
        training=_training(cfg, job, boot.llm_steps, boot.llm_lr),
    )  # fmt: skip
    if job.accelerator.is_main_process:
        model.save_pretrained(job.folder)
        tokenizer.save_pretrained(job.folder)
    return _outcome("Stand-in language model", metrics, "perplexity", {"texts": len(texts), "pieces": len(tokenizer)})


# --- vision tower --------------------------------------------------------------------------------------------------


def reads_vision(cfg: Config) -> Inputs:
    return Inputs(("bootstrap.vision_hidden", "bootstrap.vision_steps", "bootstrap.vision_lr", "bootstrap.seed"))


def vision(cfg: Config, job: Job) -> Outcome:
    from elmd.tiny.vision import train_vision

    boot = cfg.bootstrap
    encoder, metrics = train_vision(
        hidden=boot.vision_hidden, training=_training(cfg, job, boot.vision_steps, boot.vision_lr)
    )
    if job.accelerator.is_main_process:
        encoder.save(job.folder)
    return _outcome("Stand-in vision tower", metrics, "geometry_r2", {})


# --- sentence encoder ----------------------------------------------------------------------------------------------


def reads_retriever(cfg: Config) -> Inputs:
    keys = ("bootstrap.retriever_hidden", "bootstrap.retriever_steps", "bootstrap.retriever_lr")
    return reads_text(cfg) | Inputs(keys)


def retriever(cfg: Config, job: Job) -> Outcome:
    from elmd.tiny.retriever import train_retriever

    samples = text_samples(cfg, job)
    boot = cfg.bootstrap
    twins = [(sample.utterance.text, sample.response.text) for sample in samples]
    model, metrics = train_retriever(
        twins, hidden=boot.retriever_hidden, training=_training(cfg, job, boot.retriever_steps, boot.retriever_lr)
    )
    primary = "twin_match@1"
    if boot.text is BootstrapText.tiny:
        primary = "topic_match@1"
        unseen = pairs(pretraining(boot.seed + 1, 400))
        metrics = {**metrics, primary: topic_match(model, [pair.utterance.text for pair in unseen])}
    if job.accelerator.is_main_process:
        model.save_pretrained(str(job.folder), create_model_card=False)
    return _outcome("Stand-in sentence encoder", metrics, primary, {"twins": len(twins)})


def topic_match(model: Any, texts: Iterable[str]) -> float:
    """How often the nearest other text has the same topic."""
    distinct = sorted(set(texts))
    vectors = model.encode(distinct, normalize_embeddings=True, convert_to_tensor=True, show_progress_bar=False)
    cosine = vectors @ vectors.T
    cosine.fill_diagonal_(-2)
    nearest = cosine.argmax(-1).tolist()
    return sum(topic_of(distinct[j]) == topic_of(text) for text, j in zip(distinct, nearest, strict=True)) / len(
        nearest
    )


def _training(cfg: Config, job: Job, steps: int, lr: float) -> Training:
    return Training(steps, lr, cfg.bootstrap.seed, job.folder, job.accelerator)


def _outcome(title: str, metrics: dict[str, float], primary: str, counts: dict[str, int]) -> Outcome:
    table(title, (*metrics, *counts), [(*metrics.values(), *counts.values())])
    return Outcome(metrics=metrics, primary=primary, counts=counts)
