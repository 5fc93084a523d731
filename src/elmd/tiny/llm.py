"""The stand-in for ChatGLM2-6B: a GLM of its shape that reads the lessons of `elmd.tiny.lessons`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import GlmConfig, GlmForCausalLM

from elmd.data.encode import Encoder
from elmd.tiny.lessons import Lesson, Line, encode_lessons
from elmd.tiny.standins import Standin, Training
from elmd.training.loop import Positions

#: Roles of tokens in a line that are learnt: of the prompt, the target's first, its others.
PROMPT, WORD, REST = 1, 2, 3
SHARE = 0.4  # of a prompt's tokens that are learnt each time; with 0.25 emotions and copying come later


def train_llm(
    texts: Sequence[Lesson],
    held: Sequence[Lesson],
    encoder: Encoder,
    *,
    hidden: int,
    layers: int,
    batch: int,
    training: Training,
) -> tuple[Any, dict[str, float]]:
    """A GLM of ChatGLM2's shape, trained on `texts`.

    Args:
        held: texts of other dialogues, to measure on.

    Returns:
        the model, and `perplexity` (per target token of `held`), `parameters`.
    """
    vocabulary = len(encoder.tokenizer)
    config = GlmConfig(
        vocab_size=-(-vocabulary // 64) * 64, hidden_size=hidden, num_hidden_layers=layers,
        intermediate_size=2 * hidden, num_attention_heads=hidden // 32, num_key_value_heads=2, head_dim=32,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        attention_bias=True, tie_word_embeddings=False, rms_norm_eps=1e-5, max_position_embeddings=2048,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=hidden**-0.5,
    )  # fmt: skip
    torch.manual_seed(training.seed)
    model = GlmForCausalLM(config)
    with torch.no_grad():  # layers begin as the identity: copying is then learnt in half the steps
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    model.to(training.accelerator.device)
    draw = Random(f"llm-{training.seed}")
    lines, unseen = (encode_lessons(lessons, encoder, draw) for lessons in (texts, held))
    metrics = LanguageModel(model, lines, unseen, batch, training.seed).train(training, "language model")
    return model, {**metrics, "parameters": sum(p.numel() for p in model.parameters())}


class LanguageModel(Standin):
    """Learns to go on with lines; a batch holds lines of about one length, which wastes no padding."""

    metric = "perplexity"
    higher_is_better = False

    def __init__(self, model: Any, lines: Sequence[Line], held: Sequence[Line], size: int, seed: int):
        self.model, self.lines, self.held, self.size, self.seed = model, lines, held, size, seed
        self.modules = {"llm": model}

    def batches(self, epoch: int) -> list[Positions]:
        draw = Random(f"llm-{self.seed}-{epoch}")
        noise = [len(line.ids) + 8 * draw.random() for line in self.lines]
        order = sorted(range(len(noise)), key=noise.__getitem__)
        batches: list[Positions] = [
            order[i : i + self.size] for i in range(0, max(1, len(order) - self.size + 1), self.size)
        ]
        draw.shuffle(batches)
        return batches

    def loss(self, batch: Positions) -> tuple[Tensor, int]:
        self.model.train()
        lines = [self.lines[i] for i in batch]
        prompt, word, rest = line_losses(self.model, lines)
        # The first word of most targets is the emotion: one token in many, and the one that everything turns on.
        return 0.5 * prompt.mean() + word.mean() + rest.mean(), sum(len(line.ids) for line in lines)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        self.model.eval()
        lines = sorted(self.held, key=lambda line: len(line.ids))
        parts = [line_losses(self.model, lines[i : i + 64])[1:] for i in range(0, len(lines), 64)]
        return {"perplexity": math.exp(torch.cat([nll for part in parts for nll in part]).mean().item())}


def line_losses(model: Any, lines: Sequence[Line]) -> tuple[Tensor, Tensor, Tensor]:
    """Negative log-likelihood of tokens of the prompts, of the targets' first tokens, and of their other tokens; flat.

    Of the prompts, `SHARE` of the tokens in training and none otherwise.
    """
    length, device = max(len(line.ids) for line in lines), model.device
    ids = torch.zeros(len(lines), length, dtype=torch.long)
    role = torch.zeros(len(lines), length, dtype=torch.long)
    for i, line in enumerate(lines):
        ids[i, : len(line.ids)] = torch.tensor(line.ids)
        role[i, : len(line.ids)] = PROMPT
        role[i, line.at] = WORD
        role[i, line.at + 1 : len(line.ids)] = REST
    # A share of a prompt's tokens teaches as much in less time.
    role[(role == PROMPT) & (torch.rand(role.shape) >= (SHARE if model.training else 0))] = 0
    role, ids = role[:, 1:].to(device), ids.to(device)
    # Padded on the right: what is behind a line's end is never looked back at, and needs no mask.
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    asked = role > 0
    nll = F.cross_entropy(model.lm_head(hidden[asked]), ids[:, 1:][asked], reduction="none")
    role = role[asked]
    return nll[role == PROMPT], nll[role == WORD], nll[role == REST]
