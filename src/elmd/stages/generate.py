"""Generate responses with a trained model: predictions.jsonl, one line per sample and decode seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from elmd.config import BaselineName, Config
from elmd.data.prompts import SLOTS, Prompt
from elmd.data.samples import load_samples
from elmd.engine.stage import Inputs, Job, Outcome
from elmd.errors import ConfigError
from elmd.evaluation.jobs import PREDICTIONS
from elmd.evaluation.predictions import Prediction, write_predictions
from elmd.labels import Emotion
from elmd.log import table
from elmd.stages import baseline
from elmd.stages.eerg import task_of
from elmd.stages.parts import load_parts, place, reads_parts
from elmd.types import Sample


@dataclass(frozen=True)
class Answer:
    """What a model wrote for a sample.

    Attributes:
        ended: whether it came to an end before `max_new_tokens`.
        prompt: the texts that the model read, by part.
        emotion: that it named, None where it named none.
        demonstration: the retrieved response in the prompt.
    """

    text: str
    ended: bool
    prompt: dict[str, str]
    emotion: Emotion | None = None
    demonstration: str | None = None


@dataclass(frozen=True)
class Author:
    """A trained model before its samples.

    Attributes:
        write: replies to all samples, for each decode seed.
        names_emotions: whether it was taught to name one.
        counts: for the manifest, beside those of the answers.
    """

    samples: list[Sample]
    write: Callable[[Sequence[int]], list[list[Answer]]]
    names_emotions: bool
    counts: dict[str, Any]


def reads(cfg: Config) -> Inputs:
    """
    Raises:
        ConfigError: DialoGPT has no positions for so many new tokens.
    """
    own = Inputs(("generate",), ("generator",))
    if not cfg.baseline.name.own_model:
        return reads_parts(cfg) | own | Inputs(("baseline.name", "eerg.with_emotion"))
    most = cfg.baseline.max_tokens
    if cfg.baseline.name is BaselineName.dialogpt and cfg.generate.max_new_tokens > most:
        raise ConfigError(
            f"a reply may have {cfg.generate.max_new_tokens} tokens, and DialoGPT learns {most} at most",
            where="generate.max_new_tokens",
            fix="lower it, or raise baseline.max_tokens before training",
        )
    return baseline.rows(cfg) | own


def run(cfg: Config, job: Job) -> Outcome:
    author = (_baseline if cfg.baseline.name.own_model else _elmd)(cfg, job)
    predictions, unnamed, unfinished = [], 0, 0
    for seed, answers in zip(cfg.generate.seeds, author.write(cfg.generate.seeds), strict=True):
        for sample, answer in zip(author.samples, answers, strict=True):
            unnamed += answer.emotion is None
            unfinished += not answer.ended
            predictions.append(
                Prediction(
                    id=sample.id,
                    hypothesis=answer.text,
                    reference=sample.response.text,
                    demonstration=answer.demonstration,
                    gold_emotion=sample.response.emotion,
                    predicted_emotion=answer.emotion,
                    seed=seed,
                    tags=sample.utterance.tags,
                    extra={"prompt": answer.prompt},
                )
            )
    if job.accelerator.is_main_process:
        write_predictions(job.folder / PREDICTIONS, predictions)
    counts = {
        "samples": len(author.samples),
        "predictions": len(predictions),
        "empty": sum(not p.hypothesis for p in predictions),
        **({"without_emotion_word": unnamed} if author.names_emotions else {}),
        "cut_at_max_new_tokens": unfinished,
        **author.counts,
    }
    table(
        f"Generated: {cfg.generate.split}",
        ["", "count"],
        [[k.replace("_", " "), v] for k, v in counts.items() if k != "cut"],
    )
    return Outcome(counts=counts)


def _elmd(cfg: Config, job: Job) -> Author:
    """ELMD, and VisualGLM of its parts."""
    from elmd.models.decode import generate_all
    from elmd.models.elmd import Elmd

    parts = load_parts(cfg, job)
    # The prompt is the one that the model was trained with, whatever the configuration says now.
    parts.encoder.prompt = Prompt.load(job.upstream["generator"] / "prompt.json")
    model = place(Elmd.load(job.upstream["generator"], parts.llm), job.accelerator)
    samples, task = parts.split(cfg.generate.split), task_of(cfg)
    examples = parts.examples(samples, task, with_target=False)
    tokenizer, prompt = parts.encoder.tokenizer, parts.encoder.prompt

    def write(seeds: Sequence[int]) -> list[list[Answer]]:
        ids = generate_all(
            model,
            examples,
            cfg.generate.batch_tokens,
            job.accelerator,
            eos=tokenizer.eos_token_id,
            max_new_tokens=cfg.generate.max_new_tokens,
            top_p=cfg.generate.top_p,
            temperature=cfg.generate.temperature,
            seeds=seeds,
        )
        answers: list[list[Answer]] = [[] for _ in seeds]
        for sample, row, of_seeds in zip(samples, examples.rows, ids, strict=True):
            demonstrations = parts.demonstrations.get(sample.id, [])
            read = prompt.parts(sample, demonstrations, task, video=row.slots > 0)
            for new, of_seed in zip(of_seeds, answers, strict=True):
                emotion, text = prompt.split_target(tokenizer.decode(new, skip_special_tokens=True), task)
                of_seed.append(
                    Answer(
                        text=text,
                        ended=len(new) < cfg.generate.max_new_tokens,
                        prompt={part: text.replace(SLOTS, "<video>") for part, text in read.items()},
                        emotion=emotion,
                        demonstration=demonstrations[0].response if demonstrations else None,
                    )
                )
        return answers

    return Author(samples, write, cfg.eerg.with_emotion, {"cut": dict(parts.encoder.cuts)})


def _baseline(cfg: Config, job: Job) -> Author:
    """DialoGPT or Livebot: they read the dialogue's text (and frames), name no emotion and see no demonstration."""
    from elmd.baselines import base as baselines

    all_splits = load_samples(job.upstream["prepare"] / "samples.jsonl")
    samples = [sample for sample in all_splits if sample.split == cfg.generate.split]
    model, vocabulary = baseline.load(cfg, job.upstream["generator"])
    model.to(job.accelerator.device)
    video, width = baseline.frames_of(cfg, job, all_splits)
    rows = baseline.rows_for(cfg, model, vocabulary, video, width)(samples, with_reply=False)

    def write(seed: int) -> list[Answer]:
        ids = baselines.generate_all(
            model,
            rows,
            cfg.generate.batch_tokens,
            job.accelerator,
            max_new_tokens=cfg.generate.max_new_tokens,
            top_p=cfg.generate.top_p,
            temperature=cfg.generate.temperature,
            seed=seed,
        )
        return [
            Answer(
                text=vocabulary.decode(new),
                ended=len(new) < cfg.generate.max_new_tokens,
                prompt={
                    "history": "".join(f"{turn.speaker}: {turn.text}\n" for turn in sample.history),
                    "utterance": f"{sample.utterance.speaker}: {sample.utterance.text}\n",
                },
            )
            for sample, new in zip(samples, ids, strict=True)
        ]

    return Author(
        samples,
        lambda seeds: [write(seed) for seed in seeds],
        False,
        {"unknown_tokens_read": rows.unknown, "cut": dict(rows.cuts)},
    )
