"""Response Emotion Prediction (§3.4): the projector learns to name the response's emotion; all else is frozen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from elmd.config import Config
from elmd.data.examples import Examples
from elmd.engine.files import write_json
from elmd.engine.stage import Inputs, Job, Outcome
from elmd.errors import CheckpointError, ConfigError
from elmd.labels import EMOTIONS
from elmd.log import logger, table
from elmd.metrics.emotion import emotion_scores
from elmd.models.projector import Projector
from elmd.plots import confusion
from elmd.stages.parts import Parts, load_parts, place, reads_parts
from elmd.training.loop import fit
from elmd.training.plan import Plan
from elmd.types import Sample

if TYPE_CHECKING:
    from elmd.models.elmd import Elmd


def reads(cfg: Config) -> Inputs:
    """
    Raises:
        ConfigError: the configuration has no projector.
    """
    if not cfg.sees_video:
        raise ConfigError(
            "REP trains the visual projector, and vision=none has none",
            where="stage",
            fix="choose a vision=… that sees video, or run stage=eerg",
        )
    start = cfg.rep.projector_from
    return reads_parts(cfg) | Inputs(("rep", "seed"), files={"projector": Path(start)} if start else {})


def run(cfg: Config, job: Job) -> Outcome:
    from elmd.models.elmd import Elmd
    from elmd.training.tokens import ElmdObjective

    parts = load_parts(cfg, job)
    torch.manual_seed(cfg.seed)
    start = cfg.rep.projector_from
    projector = Projector.load(Path(start)) if start else Projector(parts.width, parts.hidden)
    hidden, width = projector.linear.weight.shape
    if (hidden, width) != (parts.hidden, parts.width):
        raise CheckpointError(
            f"turns {width} numbers into {hidden}, but features of {parts.width} are to become {parts.hidden}",
            where=f"rep.projector_from={start}",
            fix="take the projector of this vision encoder and this language model, or leave it out",
        )
    model = place(Elmd(parts.llm, projector), job.accelerator)

    train = parts.examples(parts.with_clip(parts.split("train")), "rep", with_target=True)
    select = parts.split(cfg.rep.select_on)
    selection = parts.examples(select, "rep", with_target=False)

    def evaluate() -> dict[str, float]:
        scores = _scores(model, parts, selection, cfg, job)
        return {key: scores[key] for key in ("accuracy", "weighted_f1")}

    steps = cfg.rep.epochs * math.ceil(len(train) / cfg.rep.batch_size)
    assert model.projector is not None
    objective = ElmdObjective(
        model,
        {"projector": model.projector},
        train,
        job.accelerator,
        batch_size=cfg.rep.batch_size,
        micro_tokens=cfg.rep.micro_tokens,
        seed=cfg.seed,
        evaluate=evaluate,
    )
    free = sum(objective.before or ())
    if not model.allows_gaps:
        logger.warning("this language model counts columns, so all tokens run with gradient (no causal split)")
    model.checkpointing = parts.checkpointing(cfg, objective, steps)
    plan = Plan.of(
        cfg.rep,
        rates={"projector": cfg.rep.lr},
        steps=steps,
        seed=cfg.seed,
        select="accuracy",
        higher_is_better=True,
        evaluate_every=max(1, steps // cfg.rep.epochs),
    )
    fit(objective, plan, job.folder, job.accelerator, "REP")
    outcome = _finish(model, parts, cfg, job)
    outcome.metrics["share_of_tokens_without_gradient"] = free / sum(train.lengths)
    outcome.counts |= {"train": len(train), "train_without_clip": len(parts.split("train")) - len(train)}
    return outcome


def _finish(model: Elmd, parts: Parts, cfg: Config, job: Job) -> Outcome:
    """Score the best projector on valid and test, beside the same language model without video."""
    results, rows = {}, []
    for split in ("valid", "test"):
        samples = parts.split(split)
        for name, video in (("projector", True), ("text only", False)):
            examples = parts.examples(samples, "rep", with_target=False, video=video)
            scores = _scores(model, parts, examples, cfg, job)
            results[f"{split}/{name.replace(' ', '_')}"] = scores
            rows.append([f"{split}, {name}", *(scores[k] for k in ("n", "accuracy", "weighted_f1", "majority"))])
            rows += [
                [f"  tag {tag}", s["n"], s["accuracy"], s["weighted_f1"], s["majority"]]
                for tag, s in scores["tags"].items()
            ]
    if job.accelerator.is_main_process:
        parts.encoder.prompt.save(job.folder / "prompt.json")
        model.save(job.folder)
        write_json(job.folder / "rep.json", results)
        labels = [emotion.value for emotion in EMOTIONS]
        counts = results["test/projector"]["confusion"]["counts"]
        confusion(counts, labels, job.folder / "confusion.png", title="REP, test: emotion of the response")
    table("REP: response emotion", ["", "n", "accuracy", "weighted F1", "majority class"], rows)
    best = results["test/projector"]
    return Outcome(
        metrics={
            "test": {k: best[k] for k in ("accuracy", "weighted_f1", "majority", "n")},
            "test_text_only": results["test/text_only"]["accuracy"],
            "valid": {k: results["valid/projector"][k] for k in ("accuracy", "weighted_f1")},
            "tags": {tag: s["accuracy"] for tag, s in best["tags"].items()},
        },
        primary="test.accuracy",
        counts={"cut": dict(parts.encoder.cuts)},
    )


def _scores(model: Elmd, parts: Parts, examples: Examples, cfg: Config, job: Job) -> dict:
    """Accuracy, F1 and confusion over `examples`, and the same within each tag of their utterances."""
    from elmd.models.decode import predict_emotions

    gold = [sample.response.emotion for sample in examples.samples]
    numbers = predict_emotions(model, examples, parts.words, cfg.rep.micro_tokens, job.accelerator, "predict emotions")
    predicted = [EMOTIONS[i] for i in numbers]

    def of(positions: Sequence[int]) -> dict:
        return emotion_scores([gold[i] for i in positions], [predicted[i] for i in positions])

    return {**of(range(len(gold))), "tags": {tag: of(at) for tag, at in by_tag(examples.samples).items()}}


def by_tag(samples: Sequence[Sample]) -> dict[str, list[int]]:
    """Positions of the samples whose utterance carries each tag."""
    positions: dict[str, list[int]] = {}
    for i, sample in enumerate(samples):
        for tag in sample.utterance.tags:
            positions.setdefault(tag, []).append(i)
    return dict(sorted(positions.items()))
