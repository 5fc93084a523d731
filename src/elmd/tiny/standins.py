"""Training of the small stand-ins for the public checkpoints: language model, vision, retriever.

Each function makes one checkpoint from plain arguments and returns it with what was measured. None sees an emotion
label but the language model, which reads them as words of its text, as a real one has.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from elmd.data.encode import Encoder
from elmd.data.prompts import SLOTS, Prompt, Task, clean
from elmd.log import bar
from elmd.tiny.faces import GEOMETRY, SIZE, Actor, describe, geometry
from elmd.types import Demonstration, Sample
from elmd.vision.encoder import VisionEncoder, VisionShape

T = TypeVar("T")

HOLD_OUT = 20  # one in so many samples is kept for measuring
#: Share of lessons that only ask to repeat a sentence: copying is what a demonstration needs, and is learnt late.
REPEATED = 0.1
#: Share of each kind of prompt among the other lessons; the one that a baseline asks with is not to be strange either.
TASKS: dict[Task, float] = {"rep": 0.45, "eerg": 0.4, "reply": 0.15}


def hold_out(items: Sequence[T]) -> tuple[list[T], list[T]]:
    """(what is measured on, what is trained on)."""
    return list(items[::HOLD_OUT]), [item for i, item in enumerate(items) if i % HOLD_OUT]


def descend(
    parameters: Iterable[nn.Parameter], losses: Callable[[int], Tensor], steps: int, lr: float, what: str
) -> None:
    """AdamW with a short warm-up and a cosine to zero; `losses(step)` draws the batch."""
    trained = list(parameters)
    optimizer = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    warm = max(1, steps // 20)
    shown = bar(what, range(steps), unit="step")
    for step in shown:
        share = (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm + 1)))
        optimizer.param_groups[0]["lr"] = lr * share
        loss = losses(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 10 == 0:
            shown.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


# --- language model ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lesson:
    """One text for the language model: a prompt with its target, in words.

    Attributes:
        content: the user's message; holds `SLOTS` where a scene is to stand.
        scene: phrases that say what the face does, repeated to fill the place of the slots; empty for none.
        target: what follows.
    """

    content: str
    scene: tuple[str, ...]
    target: str


def lessons(
    samples: Sequence[Sample],
    like: Callable[[Sample, Random], Sample | None],
    prompt: Prompt,
    seed: int,
    *,
    scenes: bool,
) -> Iterator[Lesson]:
    """Every sample as a prompt of a drawn kind: REP or EERG, with and without scene, demonstration and history.

    Args:
        like: draws the sample whose response is the demonstration.
        scenes: whether the text may describe the speaker's face.
    """
    for number, sample in enumerate(samples):
        draw = Random(f"lesson-{seed}-{number}")
        if draw.random() < REPEATED:
            sentence = clean(sample.response.text)
            yield Lesson(f"请重复：{sentence}", (), sentence)
            continue
        (task,) = draw.choices(tuple(TASKS), tuple(TASKS.values()))
        shown = scenes and draw.random() < 0.8
        other = like(sample, draw) if draw.random() < 0.6 else None
        kept = None if draw.random() < 0.7 else draw.randint(0, len(sample.history))
        demonstrations = (
            []
            if other is None
            else [
                Demonstration(
                    other.id, other.dialogue, other.utterance.text, other.response.text, other.response.emotion, 1.0
                )
            ]
        )
        parts = prompt.parts(sample, demonstrations, task, video=shown, history=kept)
        if draw.random() < 0.05:
            parts["background"] = ""
        scene = describe(geometry(sample.utterance.emotion, draw), draw) if shown else []
        yield Lesson(
            "".join(parts.values()), tuple(scene), prompt.target(sample.response.emotion, sample.response.text, task)
        )


def train_tokenizer(texts: Sequence[Lesson], vocab_size: int, *, coverage: float) -> Any:
    """ChatGLM2's tokenizer format on the text of the lessons, in the chat template's frame.

    Args:
        coverage: share of the characters that get pieces; the rarest others are written in bytes.
    """
    from elmd.convert.tokenizer import chatglm2_tokenizer, train_pieces

    lines = []
    for lesson in texts:
        for text in (f"[Round 1]\n问：{lesson.content}\n答：".replace(SLOTS, "\n"), *lesson.scene, lesson.target):
            lines += [line for line in text.split("\n") if line]
    return chatglm2_tokenizer(train_pieces(lines, vocab_size, coverage))


@dataclass(frozen=True)
class Line:
    """A lesson in ids; its target begins at `at`."""

    ids: list[int]
    at: int


def encode_lesson(lesson: Lesson, encoder: Encoder, draw: Random) -> Line:
    """Ids as `Encoder` makes them, with the scene's words, 4 to 18 tokens of them, where visual tokens will be.

    Too long a prompt loses its beginning.
    """
    before, after = encoder.wrap(lesson.content)
    scene: list[int] = []
    length = draw.randint(4, 18) if lesson.scene else 0
    while len(scene) < length:
        phrases = list(lesson.scene)
        draw.shuffle(phrases)
        scene += encoder.text("，".join(phrases) + "，")
    prompt = [*before, *scene[:length], *after][-encoder.max_prompt_tokens :]
    target = encoder.text(lesson.target)[: encoder.max_target_tokens - 1]
    return Line([*prompt, *target, encoder.tokenizer.eos_token_id], len(prompt))


def train_llm(
    texts: Sequence[Lesson],
    held: Sequence[Lesson],
    encoder: Encoder,
    *,
    hidden: int,
    layers: int,
    steps: int,
    lr: float,
    batch: int,
    seed: int,
) -> tuple[Any, dict[str, float]]:
    """A GLM of ChatGLM2's shape, trained on `texts`.

    Args:
        held: texts of other dialogues, to measure on.

    Returns:
        the model, and `perplexity` (per target token of `held`), `tokens_per_s`, `parameters`.
    """
    from transformers import GlmConfig, GlmForCausalLM

    torch.manual_seed(seed)
    vocabulary = len(encoder.tokenizer)
    config = GlmConfig(
        vocab_size=-(-vocabulary // 64) * 64, hidden_size=hidden, num_hidden_layers=layers,
        intermediate_size=2 * hidden, num_attention_heads=hidden // 32, num_key_value_heads=2, head_dim=32,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        attention_bias=True, tie_word_embeddings=False, rms_norm_eps=1e-5, max_position_embeddings=2048,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = GlmForCausalLM(config)
    draw = Random(f"llm-{seed}")
    lines, unseen = ([encode_lesson(text, encoder, draw) for text in some] for some in (texts, held))
    batches = like_lengths(lines, batch, draw)
    tokens = 0

    def loss(step: int) -> Tensor:
        nonlocal tokens
        chosen = next(batches)
        tokens += sum(len(line.ids) for line in chosen)
        prompt, word, rest = line_losses(model, chosen)
        # The first word of most targets is the emotion: one token in many, and the one that everything turns on.
        return 0.2 * prompt.mean() + word.mean() + rest.mean()

    model.train()
    started = time.perf_counter()
    descend(model.parameters(), loss, steps, lr, "language model")
    seconds = time.perf_counter() - started
    model.eval()
    with torch.no_grad():
        found = torch.cat(
            [torch.cat(line_losses(model, unseen[i : i + batch])[1:]) for i in range(0, len(unseen), batch)]
        )
    return model, {
        "perplexity": math.exp(found.mean().item()),
        "tokens_per_s": tokens / seconds,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def like_lengths(lines: Sequence[Line], size: int, draw: Random) -> Iterator[list[Line]]:
    """Batches without end, each of lines of about one length, which wastes no padding, in drawn order."""
    while True:
        order = sorted(lines, key=lambda line: len(line.ids) + 8 * draw.random())
        batches = [order[i : i + size] for i in range(0, len(order) - size + 1, size)] or [order]
        draw.shuffle(batches)
        yield from batches


def line_losses(model: Any, lines: Sequence[Line]) -> tuple[Tensor, Tensor, Tensor]:
    """Negative log-likelihood of the prompts' tokens, of the targets' first tokens, and of their other tokens; flat."""
    length = max(len(line.ids) for line in lines)
    ids = torch.zeros(len(lines), length, dtype=torch.long)
    role = torch.zeros(len(lines), length, dtype=torch.long)
    for i, line in enumerate(lines):
        ids[i, : len(line.ids)] = torch.tensor(line.ids)
        role[i, : len(line.ids)] = 1
        role[i, line.at] = 2
        role[i, line.at + 1 : len(line.ids)] = 3
    # Padded on the right: what is behind a line's end is never looked back at, and needs no mask.
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    role, ids = role[:, 1:], ids[:, 1:]
    asked = role > 1
    if model.training:  # a quarter of a prompt's tokens teaches as much in half the time
        asked |= (role == 1) & (torch.rand(role.shape) < 0.25)
    else:
        asked |= role == 1
    nll = F.cross_entropy(model.lm_head(hidden[asked]), ids[asked], reduction="none")
    role = role[asked]
    return nll[role == 1], nll[role == 2], nll[role == 3]


# --- vision tower --------------------------------------------------------------------------------------------------

#: Values a face may take while the tower learns, whatever they would express; see `GEOMETRY`.
_RANGES = {"mouth_open": (-0.2, 1.2), "nose": (-0.2, 1.2)}


def any_face(draw: Random) -> np.ndarray:
    """A face of no emotion in particular: each number apart, at rest or anywhere in its range."""
    return np.array(
        [0.0 if draw.random() < 0.25 else draw.uniform(*_RANGES.get(name, (-1.2, 1.2))) for name in GEOMETRY],
        dtype=np.float32,
    )


def portraits(count: int, draw: Random) -> tuple[Tensor, Tensor]:
    """`count` frames of new people with any face: uint8 [count, 64, 64, 3] and geometry [count, 7]."""
    faces = [any_face(draw) for _ in range(count)]
    sway = [(draw.uniform(-1.2, 1.2), draw.uniform(-0.6, 0.6)) for _ in range(count)]
    frames = np.stack([Actor(draw).draw(face, shift) for face, shift in zip(faces, sway, strict=True)])
    return torch.from_numpy(frames), torch.from_numpy(np.stack(faces))


class Reader(nn.Module):
    """Reads geometry off the query outputs [N, o, q]: query i tells number i alone, so each looks at its own part."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(len(GEOMETRY), width) * width**-0.5)
        self.bias = nn.Parameter(torch.zeros(len(GEOMETRY)))

    def forward(self, x: Tensor) -> Tensor:
        return (x[:, : len(GEOMETRY)] * self.weight).sum(-1) + self.bias


def train_vision(
    *, hidden: int, steps: int, lr: float, seed: int, batch: int = 48
) -> tuple[VisionEncoder, dict[str, float]]:
    """A BLIP-2 vision tower and Q-Former with a query per number of `GEOMETRY`, trained to tell that number.

    Returns:
        the encoder, and `geometry_r2` on people it has not seen, `frames_per_s` of training, `parameters`.
    """
    torch.manual_seed(seed)
    shape = VisionShape(
        vision_config={
            "hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": 2, "num_attention_heads": 4,
            "image_size": SIZE, "patch_size": 8, "initializer_range": hidden**-0.5,
        },
        qformer_config={
            "vocab_size": 2, "hidden_size": hidden, "num_hidden_layers": 1, "num_attention_heads": 4,
            "intermediate_size": 2 * hidden, "cross_attention_frequency": 1, "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 8, "initializer_range": hidden**-0.5,
        },
        num_query_tokens=len(GEOMETRY) + 1,
    )  # fmt: skip
    encoder = VisionEncoder(shape)
    with torch.no_grad():  # as strong as what the patches hold, or attention finds no place in so few steps
        encoder.vision_model.embeddings.position_embedding.normal_()
    reader = Reader(hidden)
    draw = Random(f"vision-{seed}")

    def loss(step: int) -> Tensor:
        frames, faces = portraits(batch, draw)
        return F.mse_loss(reader(encoder(encoder.pixels(frames))), faces)

    encoder.train()
    started = time.perf_counter()
    descend([*encoder.parameters(), *reader.parameters()], loss, steps, lr, "vision tower")
    seconds = time.perf_counter() - started
    encoder.eval()
    frames, faces = portraits(256, Random(f"vision-held-{seed}"))
    with torch.no_grad():
        told = reader(encoder(encoder.pixels(frames)))
    r2 = 1 - ((told - faces) ** 2).mean(0) / faces.var(0, unbiased=False)
    return encoder, {
        "geometry_r2": r2.mean().item(),
        "frames_per_s": steps * batch / seconds,
        "parameters": sum(p.numel() for p in encoder.parameters()),
    }


# --- sentence encoder ----------------------------------------------------------------------------------------------


def train_retriever(
    twins: Sequence[tuple[str, str]], *, hidden: int, steps: int, lr: float, seed: int, batch: int = 64
) -> tuple[Any, dict[str, float]]:
    """A BERT over characters with mean pooling, taught that two turns of one dialogue belong together.

    Args:
        twins: pairs of texts from one dialogue each; one in `HOLD_OUT` is held out.

    Returns:
        the encoder, a plain SentenceTransformer; `twin_match@1`: how often a held-out text's nearest among 64 is its
        twin; `parameters`.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling
    from transformers import BertConfig, BertModel, BertTokenizer

    torch.manual_seed(seed)
    letters = sorted({letter for pair in twins for text in pair for letter in text if not letter.isspace()})
    # A letter is a piece on its own and inside a word, so that words and numbers in Latin script are read too.
    inner = [f"##{letter}" for letter in letters if letter.isascii() or letter.isalpha()]
    vocabulary = {piece: i for i, piece in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *inner])}
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=hidden, num_hidden_layers=2, num_attention_heads=max(1, hidden // 32),
        intermediate_size=2 * hidden, max_position_embeddings=128, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, initializer_range=0.05,
    )  # fmt: skip
    with TemporaryDirectory() as start:  # Transformer begins from files only
        BertTokenizer(vocab=vocabulary, do_lower_case=False, model_max_length=128).save_pretrained(start)
        BertModel(config).save_pretrained(start)
        encoder = Transformer(start, max_seq_length=128)
    model = SentenceTransformer(
        modules=[encoder, Pooling(encoder.get_embedding_dimension(), "mean")], device="cpu", similarity_fn_name="cosine"
    )
    twins = [(first[:64], second[:64]) for first, second in twins]  # the topic of a long turn shows in its beginning
    held, kept = hold_out(twins)
    draw = Random(f"retriever-{seed}")

    spell = nn.Linear(hidden, len(vocabulary))

    def embed(texts: Sequence[str]) -> Tensor:
        return F.normalize(model(model.preprocess(list(texts)))["sentence_embedding"], dim=-1)

    def loss(step: int) -> Tensor:
        first, second = zip(*draw.sample(kept, min(batch, len(kept))), strict=True)
        read = model.preprocess(list(first + second))
        ids = read["input_ids"]
        e = model(read)["sentence_embedding"]
        cosine = F.normalize(e, dim=-1)
        scores = cosine[: len(first)] @ cosine[len(first) :].T / 0.1
        # A real encoder holds what a sentence says, not its topic alone: so it is also asked for the letters.
        said = torch.zeros(len(ids), len(vocabulary)).scatter_(1, ids, 1.0)[:, 5:]
        letters_loss = -(spell(e)[:, 5:].log_softmax(-1) * said).sum(-1) / said.sum(-1).clamp(min=1)
        return F.cross_entropy(scores, torch.arange(len(first))) + letters_loss.mean()

    model.train()
    descend([*model.parameters(), *spell.parameters()], loss, steps, lr, "sentence encoder")
    model.eval()
    hits = 0
    with torch.no_grad():
        for i in range(0, len(held), 64):
            first, second = zip(*held[i : i + 64], strict=True)
            hits += int(((embed(first) @ embed(second).T).argmax(-1) == torch.arange(len(first))).sum())
    return model, {"twin_match@1": hits / len(held), "parameters": sum(p.numel() for p in model.parameters())}
