"""Stage `erm`: train the Emotional Retrieval Module on the utterances of the training split (§3.3, eq. 1-4)."""

from __future__ import annotations

import shutil
from typing import Any

import torch

from elmd.config import Config
from elmd.data.samples import load_samples
from elmd.engine.files import replace_folder
from elmd.engine.stage import Inputs, Job, Outcome
from elmd.errors import ConfigError, DataError
from elmd.labels import EMOTIONS
from elmd.log import table
from elmd.stages.checkpoints import checkpoint, checkpoint_path
from elmd.training.loop import fit
from elmd.training.plan import Plan
from elmd.types import SPLITS, Sample

#: Splits whose utterances are scored before and after training.
TESTED = ("valid", "test")


def reads(cfg: Config) -> Inputs:
    """
    Raises:
        ConfigError: the configuration has no retriever.
    """
    if not cfg.retrieves:
        raise ConfigError("this configuration retrieves nothing", where="retriever.k", fix="there is no ERM to train")
    keys = ("erm", "retriever.max_tokens", "retriever.key", "seed")
    return Inputs(keys, ("prepare",)) | checkpoint("retriever", cfg.retriever.path)


def run(cfg: Config, job: Job) -> Outcome:
    # 1. Data, and the raw encoder with a new self-separation.
    from elmd.retrieval.retriever import add_separation, cut_texts, load_retriever
    from elmd.training.contrast import Erm

    samples = load_samples(job.upstream["prepare"] / "samples.jsonl")
    splits: dict[str, list[Sample]] = {split: [s for s in samples if s.split == split] for split in SPLITS}
    path = checkpoint_path("retriever", cfg.retriever.path, job)
    model = load_retriever(path, max_tokens=cfg.retriever.max_tokens, device=job.accelerator.device)
    if cfg.erm.separation_weight:  # w/o SSC there is nothing that would train it
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cfg.seed)
            model = add_separation(model, cfg.erm.slots, cfg.erm.separation.value)
    for split in ("train", cfg.erm.select_on.value):
        if not splits[split]:
            raise DataError(
                f"there is no sample in split {split}",
                where=job.upstream["prepare"],
                fix="look at what stage=prepare counted, or choose another data.split",
            )
    task = Erm(
        model,
        splits,
        cfg.erm.select_on.value,
        batch_size=cfg.erm.batch_size,
        seed=cfg.seed,
        temperature=cfg.erm.temperature,
        emotion_weight=cfg.erm.emotion_weight,
        separation_weight=cfg.erm.separation_weight,
        one_positive=cfg.erm.one_positive,
    )
    per_epoch = task.batches(0)

    # 2. Score, train, score again.
    raw = {split: task.match.scores(split) for split in TESTED if splits[split]}
    plan = Plan.of(
        cfg.erm,
        rates=dict.fromkeys(task.modules, cfg.erm.lr),
        steps=cfg.erm.epochs * len(per_epoch),
        seed=cfg.seed,
        select=f"emotion_match@1/{cfg.retriever.key.value}",
        higher_is_better=True,
        evaluate_every=len(per_epoch),
    )
    progress = fit(task, plan, job.folder, job.accelerator, "ERM")
    trained = {split: task.match.scores(split) for split in raw}

    # 3. Keep the retriever.
    if job.accelerator.is_main_process:
        new = job.folder / "model.new"
        shutil.rmtree(new, ignore_errors=True)
        model.save_pretrained(str(new), create_model_card=False)
        replace_folder(new, job.folder / "model")

    # 4. Report.
    matches = {
        split: {
            subset: {f"raw {key}": value for key, value in raw[split][subset].items()} | trained[split][subset]
            for subset in trained[split]
        }
        for split in raw
    }
    table(
        f"ERM: does the nearest training utterance share the query's emotion? (best at step {progress.best_step})",
        ["split", "queries", "key", "match@1", "match@5", "MRR", "chance", "n"],
        [
            (split, subset, key, *(value[name] for name in ("match@1", "match@5", "mrr", "chance", "n")))
            for split, subsets in matches.items()
            for subset, keys in subsets.items()
            for key, value in keys.items()
        ],
    )
    labels = [s.utterance.emotion for s in splits["train"]]
    counts = {
        "train": len(splits["train"]),
        "train_by_emotion": {e.value: labels.count(e) for e in EMOTIONS},
        "steps": plan.steps,
        "batches_per_epoch": len(per_epoch),
        "anchors_without_positive_per_epoch": task.without_positive(per_epoch),
        "utterances_cut": cut_texts(model, task.texts),
    }
    metrics: dict[str, Any] = {"emotion_match": matches, "best_step": progress.best_step}
    if progress.best is not None:
        metrics["emotion_match@1"] = progress.best
    return Outcome(metrics=metrics, primary="emotion_match@1", counts=counts)
