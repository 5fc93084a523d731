"""Train a baseline that is a network of its own (§4.2): DialoGPT on the dialogue's text, Livebot on text and frames."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from elmd.config import BaselineName, Config, Sampling, VisionKind
from elmd.data.examples import Features, no_features, shuffled
from elmd.data.samples import load_samples
from elmd.engine.stage import Inputs, Job, Outcome
from elmd.errors import ConfigError
from elmd.log import table
from elmd.stages.parts import shuffling
from elmd.training.plan import Plan
from elmd.types import Sample
from elmd.vision.store import FeatureStore

if TYPE_CHECKING:
    from elmd.baselines.base import Baseline, Rows
    from elmd.baselines.vocabulary import Vocabulary


def reads(cfg: Config) -> Inputs:
    files = {"vocab": Path(cfg.baseline.vocab)} if cfg.baseline.vocab else {}
    return rows(cfg) | Inputs(("baseline", "seed"), files=files)


def rows(cfg: Config) -> Inputs:
    """What a baseline reads, in training and generation.

    Raises:
        ConfigError: the configuration names no baseline of this kind, or sizes that do not go together.
    """
    chosen = cfg.baseline
    if not chosen.name.own_model:
        raise ConfigError(
            f"baseline={chosen.name} has no network of its own to train",
            where="stage",
            fix="choose baseline=dialogpt or livebot, or leave the stage out",
        )
    if chosen.width % (2 * chosen.heads):
        raise ConfigError(
            f"{chosen.width} cannot be parted among {chosen.heads} heads of even width",
            where="baseline.width",
            fix=f"use a multiple of {2 * chosen.heads}",
        )
    keys = ["baseline", *(["vision.kind"] if cfg.baseline.name is BaselineName.livebot else [])]
    if not sees_video(cfg):
        return Inputs(keys, ("prepare",))
    return Inputs((*keys, "vision.sampling", "vision.frames", *shuffling(cfg)), ("prepare", "features"))


def sees_video(cfg: Config) -> bool:
    """Whether the baseline looks at frames: Livebot, where the run has video."""
    return cfg.baseline.name is BaselineName.livebot and cfg.sees_video


def frame_rows(cfg: Config) -> int | None:
    """How many of the last rows of a sample's features are its frames; None: all of them.

    V_c = [V_t ; V_s] ends in V_s, the mean over each frame's query tokens (eq. 8). A ResNet's rows are frames, and a
    user's own arrays are taken as they are.
    """
    pooled = cfg.vision.kind is VisionKind.encoder and cfg.vision.sampling is Sampling.uniform
    return cfg.vision.frames if pooled else None


def run(cfg: Config, job: Job) -> Outcome:
    """Writes `config.json` and `model.safetensors` (DialoGPT: of transformers' GPT-2), and `vocab.txt`."""
    from elmd.baselines.base import fit
    from elmd.baselines.vocabulary import VOCABULARY, Vocabulary

    baseline = cfg.baseline
    samples = load_samples(job.upstream["prepare"] / "samples.jsonl")
    train = [sample for sample in samples if sample.split == "train"]
    texts = (turn.text for s in train for turn in (*s.history, s.utterance, s.response))
    vocabulary = Vocabulary.load(Path(baseline.vocab)) if baseline.vocab else Vocabulary.of(texts)
    video, width = frames_of(cfg, job, samples)
    torch.manual_seed(cfg.seed)
    model = create(cfg, vocabulary, width).to(job.accelerator.device)

    rows = rows_for(cfg, model, vocabulary, video, width)
    learnt = rows(train, with_reply=True)
    selection = rows([s for s in samples if s.split == baseline.select_on], with_reply=True)
    plan = Plan.of(
        baseline,
        rates={"model": baseline.lr},
        steps=baseline.epochs * math.ceil(len(learnt) / baseline.batch_size),
        seed=cfg.seed,
        select="loss",
        higher_is_better=False,
        evaluate_every=baseline.evaluate_every,
    )
    done = fit(
        model,
        learnt,
        selection,
        plan,
        job.folder,
        job.accelerator,
        type(model).__name__,
        batch_size=baseline.batch_size,
        micro_tokens=baseline.micro_tokens,
    )

    if job.accelerator.is_main_process:
        model.save(job.folder)
        vocabulary.save(job.folder / VOCABULARY)
    size = sum(p.numel() for p in model.parameters())
    counts = {
        "train": len(learnt),
        "train_with_clip": sum(learnt.video(sample.id) is not None for sample in train) if width else 0,
        "vocabulary": len(vocabulary),
        "unknown": {"train": learnt.unknown, baseline.select_on.value: selection.unknown},
        "cut": {"train": dict(learnt.cuts), baseline.select_on.value: dict(selection.cuts)},
    }
    table(
        f"{type(model).__name__}: baseline",
        ["", "value"],
        [
            ["training samples", len(learnt)],
            ["  with a clip", counts["train_with_clip"] if width else "text only"],
            ["vocabulary", len(vocabulary)],
            [f"  [UNK] among {learnt.tokens:,} training tokens", learnt.unknown],
            [f"  [UNK] among {selection.tokens:,} tokens of {baseline.select_on}", selection.unknown],
            ["steps", done.step],
            ["validation loss per token, best", done.best],
            ["  at step", done.best_step],
            ["parameters trained", size],
        ],
    )
    return Outcome(
        metrics={"valid_loss": done.best, "best_step": done.best_step, "history": done.history, "trained": size},
        primary="valid_loss",
        counts=counts,
    )


def create(cfg: Config, vocabulary: Vocabulary, width: int) -> Baseline:
    """The model of a configuration, with random weights; `width` is q of the frame features, 0 without video."""
    from elmd.baselines.dialogpt import DialoGPT
    from elmd.baselines.livebot import Livebot, Sizes

    sizes = cfg.baseline
    if sizes.name is BaselineName.dialogpt:
        return DialoGPT.create(
            vocabulary,
            layers=sizes.layers,
            width=sizes.width,
            heads=sizes.heads,
            ff=sizes.ff,
            dropout=sizes.dropout,
            max_tokens=sizes.max_tokens,
        )
    return Livebot(
        Sizes(
            vocabulary=len(vocabulary),
            video=width,
            layers=sizes.layers,
            width=sizes.width,
            heads=sizes.heads,
            ff=sizes.ff,
            dropout=sizes.dropout,
            start=vocabulary.start,
        )
    )


def load(cfg: Config, folder: Path) -> tuple[Baseline, Vocabulary]:
    """A trained model and its vocabulary."""
    from elmd.baselines.dialogpt import DialoGPT
    from elmd.baselines.livebot import Livebot
    from elmd.baselines.vocabulary import VOCABULARY, Vocabulary

    kind = DialoGPT if cfg.baseline.name is BaselineName.dialogpt else Livebot
    return kind.load(folder), Vocabulary.load(folder / VOCABULARY)


def rows_for(cfg: Config, model: Baseline, vocabulary: Vocabulary, video: Features, width: int) -> partial[Rows]:
    """What makes samples ready for a model: `(samples, with_reply=…)`."""
    from elmd.baselines.base import Rows

    return partial(
        Rows,
        vocabulary=vocabulary,
        max_tokens=cfg.baseline.max_tokens,
        loss_on_context=model.loss_on_context,
        video=video,
        width=width,
    )


def frames_of(cfg: Config, job: Job, samples: Sequence[Sample]) -> tuple[Features, int]:
    """Frame features [F, q] by sample id, and q; 0 without video."""
    if not sees_video(cfg):
        return no_features, 0
    store, last = FeatureStore(job.upstream["features"]), frame_rows(cfg)

    def frames(sample: str) -> Tensor | None:
        features = store.get(sample)
        return features if features is None or last is None else features[-last:]

    return shuffled(frames, samples, seed=cfg.data.split_seed) if cfg.vision.shuffle else frames, store.width
