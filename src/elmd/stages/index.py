"""Stage `index`: index the training utterances and retrieve the demonstrations of every sample, once (§3.3 end)."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from torch import Tensor

from elmd.config import Config, Search
from elmd.data.samples import load_samples
from elmd.engine.stage import Inputs, Job, Outcome
from elmd.errors import ConfigError, DataError
from elmd.log import logger, table
from elmd.retrieval.demonstrations import DEMONSTRATIONS, demonstrations, save_demonstrations
from elmd.retrieval.index import Index, Queries
from elmd.retrieval.search import load_faiss
from elmd.retrieval.strategy import STRATEGIES, Settings
from elmd.types import SPLITS, Demonstration, Sample, Utterance

#: Candidates up to which search=auto is exact.
MANY = 100_000
#: Queries of all splits together whose recall is measured.
RECALLED = 1000


def reads(cfg: Config) -> Inputs:
    keys = ("retriever.k", "retriever.key", "retriever.allow_same_dialogue", "retriever.search")
    return Inputs(keys, ("prepare", "erm"))


def run(cfg: Config, job: Job) -> Outcome:
    from elmd.retrieval.retriever import encode, load_retriever

    if not job.accelerator.is_main_process:
        return Outcome()
    # 1. Samples and the vectors of their utterances; those of the training split are the index.
    path = job.upstream["prepare"] / "samples.jsonl"
    samples = load_samples(path)
    train = [i for i, sample in enumerate(samples) if sample.split == "train"]
    if not train:
        raise DataError("there is no training sample to index", where=path, fix="look at what stage=prepare counted")
    settings = Settings(
        key=cfg.retriever.key.value,
        k=cfg.retriever.k,
        allow_same_dialogue=cfg.retriever.allow_same_dialogue,
        approximately=approximately(cfg.retriever.search, len(train)),
    )
    model = load_retriever(job.upstream["erm"] / "model", device=job.accelerator.device)
    vectors = encode(model, [sample.utterance.text for sample in samples], what="encode utterances")
    index = Index.build([samples[i] for i in train], {name: rows[train] for name, rows in vectors.items()})

    # 2. Demonstrations.
    candidates = {samples[i].id: samples[i] for i in train}
    shown = demonstrations(index, candidates, samples, vectors[settings.key], settings)
    index.save(job.folder)
    save_demonstrations(job.folder / DEMONSTRATIONS, shown)

    # 3. Report what they give away and, where the search is approximate, what it misses.
    by_split = {split: rows for split in SPLITS if (rows := [i for i, s in enumerate(samples) if s.split == split])}
    report: dict[str, Any] = {
        split: audit([samples[i] for i in rows], candidates, shown, settings.allow_same_dialogue)
        for split, rows in by_split.items()
    }
    if settings.approximately:
        for split, rows in by_split.items():
            report[split] |= recall(index, samples, vectors[settings.key], rows, shown, settings)
            logger.info(
                "%s: FAISS finds %.1f %% of the %d nearest (%d queries are searched exactly, too)",
                split, 100 * report[split][f"recall@{settings.k}"], settings.k, report[split]["recall_queries"],
            )  # fmt: skip
    counts: dict[str, Any] = {split: len(by_split.get(split, ())) for split in SPLITS} | {
        "candidates": len(candidates),
        "search": "faiss" if settings.approximately else "exact",
        "demonstrations": sum(map(len, shown.values())),
    }
    table(
        f"Demonstrations by {settings.key}, k = {settings.k}: r' against the gold response r",
        ["split", "samples", "r' = r", "chance", "same emotion", "chance", "own dialogue", "cosine"],
        [
            (split, counts[split], *(row[name] for name in (
                "gold_response", "gold_response_chance", "emotion_match", "emotion_match_chance", "own_dialogue",
                "similarity",
            )))
            for split, row in report.items()
        ],
    )  # fmt: skip
    return Outcome(metrics=report, counts=counts)


def approximately(search: Search, candidates: int) -> bool:
    """Whether FAISS searches that many candidates.

    Raises:
        ConfigError: FAISS is asked for and not installed.
    """
    if search is Search.exact or (search is Search.auto and candidates <= MANY):
        return False
    try:
        load_faiss()
    except ConfigError:
        if search is Search.faiss:
            raise
        logger.warning(
            "%d candidates are searched exactly; pip install 'elmd[faiss]' searches more than %d of them faster, with "
            "measured recall",
            candidates,
            MANY,
        )
        return False
    return True


def recall(
    index: Index,
    samples: Sequence[Sample],
    vectors: Tensor,
    rows: Sequence[int],
    shown: Mapping[str, Sequence[Demonstration]],
    settings: Settings,
) -> dict[str, float]:
    """The share of demonstrations from an approximate search that are as near as the k-th nearest of the exact one.

    Args:
        vectors: of all `samples`' utterances [len(samples), width].
        rows: the samples of one split, by position.

    Returns:
        `recall@k`, and `recall_queries`, of how many queries: a third of `RECALLED` at most, drawn with a fixed seed.
    """
    drawn = sorted(random.Random(0).sample(rows, min(len(rows), RECALLED // len(SPLITS))))
    queries = Queries.of(vectors[drawn], [samples[i] for i in drawn])
    exact = STRATEGIES[settings.strategy](index, queries, replace(settings, approximately=False))
    kth = exact.similarity[:, -1].tolist()
    hits = [r.similarity >= least for i, least in zip(drawn, kth, strict=True) for r in shown[samples[i].id]]
    return {f"recall@{settings.k}": fmean(hits), "recall_queries": len(drawn)}


def audit(
    samples: Sequence[Sample],
    candidates: Mapping[str, Sample],
    shown: Mapping[str, Sequence[Demonstration]],
    allow_same_dialogue: bool = False,
) -> dict[str, float]:
    """What demonstrations give away, beside what a random admissible training response would: shares in [0, 1].

    Returns:
        `gold_response`: r' is word for word the gold response; `emotion_match`: it has the gold response's emotion;
        each with `_chance`; `own_dialogue`: it is from the sample's own dialogue (0 unless that is allowed);
        `similarity`: the mean cosine.
    """
    texts = Counter(c.response.text for c in candidates.values())
    emotions = Counter(c.response.emotion for c in candidates.values())
    by_dialogue: dict[str, list[Utterance]] = {}
    for candidate in candidates.values():
        by_dialogue.setdefault(candidate.dialogue, []).append(candidate.response)
    rows = []
    for sample in samples:
        response, ranked = sample.response, shown[sample.id]
        own = [] if allow_same_dialogue else by_dialogue.get(sample.dialogue, [])  # responses that are not admissible
        left = len(candidates) - len(own)
        same_text = texts[response.text] - sum(r.text == response.text for r in own)
        same_emotion = emotions[response.emotion] - sum(r.emotion == response.emotion for r in own)
        rows.append(
            {
                "gold_response": fmean(r.response == response.text for r in ranked),
                "gold_response_chance": same_text / left,
                "emotion_match": fmean(r.emotion == response.emotion for r in ranked),
                "emotion_match_chance": same_emotion / left,
                "own_dialogue": fmean(candidates[r.source].dialogue == sample.dialogue for r in ranked),
                "similarity": fmean(r.similarity for r in ranked),
            }
        )
    return {name: fmean(row[name] for row in rows) for name in rows[0]}
