"""Random encoders of the smallest size, of frames and of sentences, and samples for a retriever."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

from elmd.labels import Emotion
from elmd.types import Sample, Split, Utterance
from elmd.vision.encoder import VisionEncoder, VisionShape

WIDTH = 16
CHARACTERS = "我你他好不开心难过生气害怕讨厌惊讶今天的是了吗呢，。！"


def tiny(seed: int = 0, **changes: object) -> VisionEncoder:
    torch.manual_seed(seed)
    shape = VisionShape(
        vision_config={
            "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": 32, "patch_size": 8, "initializer_range": 0.02,
        },
        qformer_config={
            "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2,
        },
        num_query_tokens=5,
        **changes,
    )  # fmt: skip
    encoder = VisionEncoder(shape)
    for parameter in encoder.parameters():  # not the near-zero initial values, which hide mistakes
        torch.nn.init.normal_(parameter, std=0.3)
    return encoder


def write_resnet(folder: Path) -> Path:
    """A random ResNet with a classifier, as published ones have, and a mean of its own."""
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    shape = ResNetConfig(embedding_size=4, hidden_sizes=[4, 6], depths=[1, 1], layer_type="basic", num_labels=3)
    model = ResNetForImageClassification(shape).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.4, 0.3], "do_resize": true}')
    return folder


def write_bert(folder: Path) -> Path:
    """A bare BERT folder with random weights, as transformers writes it."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys(CHARACTERS)]
    (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    BertTokenizerFast(vocab=str(folder / "vocab.txt"), model_max_length=64).save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=len(words), hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        BertModel(config).save_pretrained(folder)
    return folder


def make_samples(dialogues: int = 12, length: int = 4, tags: bool = False) -> list[Sample]:
    """Dialogues d0, d1, …; the last two are valid and test. One word in a text of noise tells its emotion."""
    words = {Emotion.HAPPY: "开心", Emotion.SAD: "难过", Emotion.ANGER: "生气", Emotion.FEAR: "害怕"}
    emotions = list(words)
    samples = []
    for d in range(dialogues):
        split: Split = "test" if d == dialogues - 1 else "valid" if d == dialogues - 2 else "train"
        turns = []
        for t in range(length + 1):
            emotion = emotions[(d * 5 + t * t) % 4]
            noise = random.Random(f"{d} {t}").choices("我你他好今天的是了吗呢", k=9)
            text = "".join(noise[:5]) + words[emotion] + "".join(noise[5:])
            tag = ("text_shows",) if tags and t % 2 == 0 else ()
            turns.append(Utterance(f"d{d}:{t}", "AB"[t % 2], text, emotion, tags=tag))
        samples += [
            Sample(f"d{d}#{t}", f"d{d}", "show", split, tuple(turns[: t - 1]), turns[t - 1], turns[t])
            for t in range(1, length + 1)
        ]
    return samples
