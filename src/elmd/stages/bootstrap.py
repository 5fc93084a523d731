"""Stage `bootstrap`: the tiny world, and small stand-ins for the public checkpoints in the formats of the real ones.

Four results, each with its own fingerprint, so that a run makes and remakes only what it uses. The stand-ins learn from
dialogues apart from the world's own (`bootstrap.text=tiny`) or from the training part of the chosen data (`data`).
"""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch

from elmd.config import BootstrapText, Config, plain
from elmd.data.encode import Encoder
from elmd.data.samples import load_samples, pairs
from elmd.data.world import pretraining, topic_of, write_world
from elmd.log import table
from elmd.metrics.retrieval import match_scores
from elmd.retrieval.retriever import encode
from elmd.stages.base import Depends, Job, Outcome, Stage
from elmd.stages.parts import prompt_of
from elmd.training.artifacts import replace_folder
from elmd.training.standins import lessons, train_llm, train_retriever, train_tokenizer, train_vision
from elmd.types import Sample, Utterance

#: How often a demonstration in the pretraining text answers the same emotion, as a good retriever's would.
ALIKE = 0.7


# --- the world -----------------------------------------------------------------------------------------------------


def world_depends(cfg: Config) -> Depends:
    world = plain(cfg.data.world)
    del world["bootstrap"]
    return Depends(config={"world": world})


def make_world(cfg: Config, job: Job) -> Outcome:
    size = cfg.data.world
    if job.accelerator.is_main_process:
        facts = write_world(job.folder, size.seed, {"train": size.train, "valid": size.valid, "test": size.test})
        hidden = facts["samples_whose_text_hides_the_emotion"]
        table(
            "Tiny world",
            ["split", "dialogues", "samples", "text hides the emotion"],
            [[split, facts["dialogues"][split], n, hidden[split]] for split, n in facts["samples"].items()],
        )
        return Outcome(metrics=facts["reply_emotion"], counts={"samples": facts["samples"]})
    return Outcome()


# --- the text that the stand-ins learn from --------------------------------------------------------------------------


def _reads(cfg: Config, *settings: str) -> Depends:
    """What a stand-in that learns from text depends on, with those of its settings that it reads."""
    chosen = {key: value for key, value in plain(cfg.bootstrap).items() if key in ("text", "seed", *settings)}
    if cfg.bootstrap.text is BootstrapText.data:
        return Depends(config={"bootstrap": chosen}, upstream=("prepare",))
    return Depends(config={"bootstrap": chosen, "dialogues": cfg.data.world.bootstrap})


def _text(cfg: Config, job: Job) -> list[Sample]:
    """Training samples of the chosen data, or samples of the pretraining dialogues."""
    if cfg.bootstrap.text is BootstrapText.data:
        return [s for s in load_samples(job.upstream["prepare"] / "samples.jsonl") if s.split == "train"]
    made = (dialogue for dialogue, _ in pretraining(cfg.bootstrap.seed, cfg.data.world.bootstrap))
    return [pair.sample("train", text_only=True) for pair in pairs(made)]


# --- language model --------------------------------------------------------------------------------------------------


def llm_depends(cfg: Config) -> Depends:
    return _reads(cfg, "vocab_size", "llm_hidden", "llm_layers", "llm_steps", "llm_lr") | Depends(
        config={"prompt": plain(cfg.prompt)}
    )


def make_llm(cfg: Config, job: Job) -> Outcome:
    if not job.accelerator.is_main_process:
        return Outcome()
    settings, prompt = cfg.bootstrap, prompt_of(cfg.prompt)
    samples = _text(cfg, job)
    scenes = settings.text is BootstrapText.tiny  # nothing is known of the faces in real data's text
    texts = list(lessons(samples, alike(samples), prompt, settings.seed, scenes=scenes))
    tokenizer = train_tokenizer(texts, settings.vocab_size)
    encoder = Encoder(tokenizer, prompt, cfg.prompt.max_prompt_tokens, cfg.prompt.max_target_tokens)
    model, measured = train_llm(
        texts, encoder, hidden=settings.llm_hidden, layers=settings.llm_layers, steps=settings.llm_steps,
        lr=settings.llm_lr, seed=settings.seed,
    )  # fmt: skip
    with _written(job.folder) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return _report("Stand-in: language model", measured | {"texts": len(texts), "vocabulary": len(tokenizer)})


def alike(samples: Sequence[Sample]) -> Callable[[Sample, Random], Sample | None]:
    """Draws the sample whose response is another's demonstration: of the same show, never of the same dialogue."""
    shows: dict[str, list[Sample]] = defaultdict(list)
    feeling: dict[tuple[str, str], list[Sample]] = defaultdict(list)
    for sample in samples:
        shows[sample.show].append(sample)
        feeling[sample.show, sample.utterance.emotion].append(sample)

    def draw_one(sample: Sample, draw: Random) -> Sample | None:
        same = draw.random() < ALIKE
        pool = feeling[sample.show, sample.utterance.emotion] if same else shows[sample.show]
        for _ in range(10):  # a show with one dialogue has none to give
            other = draw.choice(pool)
            if other.dialogue != sample.dialogue:
                return other
        return None

    return draw_one


# --- vision tower ----------------------------------------------------------------------------------------------------


def vision_depends(cfg: Config) -> Depends:
    chosen = {key: value for key, value in plain(cfg.bootstrap).items() if key == "seed" or key.startswith("vision_")}
    return Depends(config={"bootstrap": chosen})


def make_vision(cfg: Config, job: Job) -> Outcome:
    if not job.accelerator.is_main_process:
        return Outcome()
    settings = cfg.bootstrap
    encoder, measured = train_vision(
        hidden=settings.vision_hidden, steps=settings.vision_steps, lr=settings.vision_lr, seed=settings.seed
    )
    with _written(job.folder) as folder:
        encoder.save(folder)
    return _report("Stand-in: vision tower and Q-Former", measured)


# --- sentence encoder ------------------------------------------------------------------------------------------------


def retriever_depends(cfg: Config) -> Depends:
    return _reads(cfg, "retriever_hidden", "retriever_steps", "retriever_lr")


def make_retriever(cfg: Config, job: Job) -> Outcome:
    if not job.accelerator.is_main_process:
        return Outcome()
    settings, samples = cfg.bootstrap, _text(cfg, job)
    with _written(job.folder) as folder:
        model, measured = train_retriever(
            [(sample.utterance.text, sample.response.text) for sample in samples], folder / "work",
            hidden=settings.retriever_hidden, steps=settings.retriever_steps, lr=settings.retriever_lr,
            seed=settings.seed,
        )  # fmt: skip
        model.save_pretrained(str(folder), create_model_card=False)
        shutil.rmtree(folder / "work")
    if settings.text is BootstrapText.tiny:
        measured["topic_match@1"] = topic_match(model, cfg)
    return _report("Stand-in: sentence encoder", measured)


def topic_match(model: Any, cfg: Config) -> float:
    """How often a turn's nearest turn of another dialogue is about the same topic, on dialogues it has not seen."""
    fresh = [dialogue for dialogue, _ in pretraining(cfg.bootstrap.seed + 1, 200)]
    turns: list[tuple[Utterance, str]] = [(turn, dialogue.id) for dialogue in fresh for turn in dialogue.utterances]
    vectors = encode(model, [turn.text for turn, _ in turns])["e_u"]
    unit = torch.nn.functional.normalize(torch.as_tensor(vectors), dim=-1)
    topics, owners = [topic_of(turn.text) for turn, _ in turns], [owner for _, owner in turns]
    return float(match_scores(unit @ unit.T, topics, topics, owners, owners)["match@1"])


class _written:  # noqa: N801 - reads as a verb at its uses
    """A folder to write into; what is in it lands in the job's folder only when the block ends well."""

    def __init__(self, folder: Path):
        self.folder, self.new = folder, folder / "new"

    def __enter__(self) -> Path:
        shutil.rmtree(self.new, ignore_errors=True)
        self.new.mkdir(parents=True)
        return self.new

    def __exit__(self, kind: Any, *_: object) -> None:
        if kind is None:
            for path in self.new.iterdir():
                if path.is_dir():
                    replace_folder(path, self.folder / path.name)
                else:
                    path.replace(self.folder / path.name)
        shutil.rmtree(self.new, ignore_errors=True)


def _report(title: str, measured: dict[str, Any]) -> Outcome:
    table(title, ["", "value"], [[name.replace("_", " "), value] for name, value in measured.items()])
    return Outcome(metrics=measured)


WORLD = Stage("bootstrap/world", 1, world_depends, make_world)
LLM = Stage("bootstrap/llm", 1, llm_depends, make_llm)
VISION = Stage("bootstrap/vision", 1, vision_depends, make_vision)
RETRIEVER = Stage("bootstrap/retriever", 1, retriever_depends, make_retriever)
