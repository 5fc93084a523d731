"""Generate responses with a trained model: predictions.jsonl, one line per sample and decode seed."""

from __future__ import annotations

from elmd.config import Config, plain
from elmd.data.prompts import SLOTS, Prompt
from elmd.evaluation.score import Prediction, write_predictions
from elmd.log import table
from elmd.models.elmd import Elmd
from elmd.models.inference import generate
from elmd.stages.base import Depends, Job, Outcome, Stage
from elmd.stages.eerg import task_of
from elmd.stages.parts import depends_on_parts, load_parts, place

PREDICTIONS = "predictions.jsonl"


def depends(cfg: Config) -> Depends:
    decoding = {key: value for key, value in plain(cfg.generate).items() if key != "batch_tokens"}
    return depends_on_parts(cfg) | Depends(config={"generate": decoding}, upstream=("eerg",))


def run(cfg: Config, job: Job) -> Outcome:
    parts = load_parts(cfg, job)
    # The prompt is the one that the model was trained with, whatever the configuration says now.
    parts.encoder.prompt = Prompt.load(job.upstream["eerg"] / "prompt.json")
    model = place(Elmd.load(job.upstream["eerg"], parts.llm), job.accelerator)
    samples, task = parts.split(cfg.generate.split), task_of(cfg)
    examples = parts.examples(samples, task, with_target=False)

    predictions, unnamed, unfinished = [], 0, 0
    tokenizer, prompt = parts.encoder.tokenizer, parts.encoder.prompt
    for seed in cfg.generate.seeds:
        ids = generate(
            model,
            examples,
            cfg.generate.batch_tokens,
            job.accelerator,
            eos=tokenizer.eos_token_id,
            max_new_tokens=cfg.generate.max_new_tokens,
            top_p=cfg.generate.top_p,
            temperature=cfg.generate.temperature,
            seed=seed,
        )
        for sample, row, new in zip(samples, examples.rows, ids, strict=True):
            emotion, response = prompt.split_target(tokenizer.decode(new, skip_special_tokens=True), task)
            unnamed += emotion is None
            unfinished += len(new) == cfg.generate.max_new_tokens
            demonstrations = parts.demonstrations.get(sample.id, [])
            parts_of_prompt = prompt.parts(sample, demonstrations, task, video=row.slots > 0)
            predictions.append(
                Prediction(
                    id=sample.id,
                    hypothesis=response,
                    reference=sample.response.text,
                    demonstration=demonstrations[0].response if demonstrations else None,
                    gold_emotion=sample.response.emotion,
                    predicted_emotion=emotion,
                    seed=seed,
                    tags=sample.utterance.tags,
                    extra={"prompt": {part: text.replace(SLOTS, "<video>") for part, text in parts_of_prompt.items()}},
                )
            )
    if job.accelerator.is_main_process:
        write_predictions(job.folder / PREDICTIONS, predictions)
    counts = {
        "samples": len(samples),
        "predictions": len(predictions),
        "empty": sum(not p.hypothesis for p in predictions),
        "without_emotion_word": unnamed,
        "cut_at_max_new_tokens": unfinished,
        "cut": dict(parts.encoder.cuts),
    }
    table(
        f"Generated: {cfg.generate.split}",
        ["", "count"],
        [[k.replace("_", " "), v] for k, v in counts.items() if k != "cut"],
    )
    return Outcome(counts=counts)


STAGE = Stage("generate", 1, depends, run)
