"""A tiny random language model and made-up samples for trainings of seconds; nothing from a hub."""

from __future__ import annotations

from pathlib import Path

from elmd.labels import Emotion
from elmd.types import Demonstration, Sample, Utterance

LINES = [
    "今天我们去公园玩，好不好？",
    "我不想去，你别管我。",
    "太好了！明天见。",
    "怎么会这样，我真的没想到。",
    "对不起，都是我的错。",
    "你到底想怎么样？",
]


def write_llm(folder: Path, layers: int = 2) -> Path:
    """A random ChatGLM2-shaped model with its tokenizer."""
    import torch
    from transformers import GlmConfig, GlmForCausalLM

    from elmd.convert.tokenizer import chatglm2_tokenizer, train_pieces

    words = "高兴惊讶悲伤厌恶愤怒恐惧中性。：\n"
    tokenizer = chatglm2_tokenizer(train_pieces([line + words for line in LINES * 20], 400))
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = GlmConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, partial_rotary_factor=0.5, attention_bias=True,
        tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.3,
    )  # fmt: skip
    GlmForCausalLM(config).save_pretrained(folder)
    return folder


def make_samples(count: int = 12) -> list[Sample]:
    """Samples of uneven lengths in two dialogues, the last quarter in valid and test."""
    emotions = list(Emotion)
    samples = []
    for i in range(count):
        turns = tuple(
            Utterance(f"d{i % 2}u{j}", "AB"[j % 2], LINES[(i + j) % len(LINES)] * (1 + j % 2), emotions[(i + j) % 7])
            for j in range(2 + i % 4)
        )
        split = "train" if i < count * 3 // 4 else ("valid", "test")[i % 2]
        samples.append(
            Sample(
                id=f"d{i}#{len(turns) - 1}", dialogue=f"d{i}", show="s", split=split, history=turns[:-2],
                utterance=turns[-2], response=turns[-1], background="他们是老朋友。" if i % 3 else None,
            )
        )  # fmt: skip
    return samples


def make_demonstrations(samples: list[Sample]) -> dict[str, list[Demonstration]]:
    """One demonstration for every sample but the first."""
    return {s.id: [Demonstration(s.id, samples[0].id, LINES[0], LINES[2], Emotion.HAPPY, 0.5)] for s in samples[1:]}
