"""Stage `index`: index the training utterances and retrieve every sample's demonstration, once (§3.3 end)."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from elmd.config import Config, Search
from elmd.data.samples import load_samples
from elmd.errors import ConfigError, DataError
from elmd.log import logger, table
from elmd.retrieval.index import DEMONSTRATIONS, Index, Queries, demonstrations, save_demonstrations
from elmd.retrieval.retriever import encode, load_retriever
from elmd.retrieval.search import load_faiss
from elmd.stages.base import Job, Outcome
from elmd.types import SPLITS, Demonstration, Sample

#: Candidates up to which search=auto is exact.
MANY = 100_000
#: Queries that recall is measured on.
RECALLED = 1000


def run(cfg: Config, job: Job) -> Outcome:
    if not job.accelerator.is_main_process:
        return Outcome()
    key, k, leak = cfg.retriever.key.value, cfg.retriever.k, cfg.retriever.allow_same_dialogue
    path = job.upstream["prepare"] / "samples.jsonl"
    samples = load_samples(path)
    train = [i for i, sample in enumerate(samples) if sample.split == "train"]
    if not train:
        raise DataError("there is no training sample to index", where=path, fix="look at what stage=prepare counted")
    nearly = approximately(cfg.retriever.search, len(train))
    model = load_retriever(job.upstream["erm"] / "model", device=job.accelerator.device)
    vectors = encode(model, [sample.utterance.text for sample in samples], what="encode utterances")
    candidates = {samples[i].id: samples[i] for i in train}
    index = Index.build(list(candidates.values()), {name: rows[train] for name, rows in vectors.items()})
    found = demonstrations(
        index, candidates, samples, vectors[key], key=key, k=k, allow_same_dialogue=leak, approximately=nearly
    )
    index.save(job.folder)
    save_demonstrations(job.folder / DEMONSTRATIONS, found)

    by_split = {split: [sample for sample in samples if sample.split == split] for split in SPLITS}
    report: dict[str, Any] = {split: audit(some, candidates, found, leak) for split, some in by_split.items() if some}
    if nearly:
        for split, row in recall(index, samples, vectors[key], found, key=key, k=k, allow_same_dialogue=leak).items():
            report[split] |= row
            logger.info(
                "%s: FAISS finds %.1f %% of the %d nearest (%d queries searched exactly, too)",
                split, 100 * row[f"recall@{k}"], k, row["recall_queries"],
            )  # fmt: skip
    counts: dict[str, Any] = {split: len(some) for split, some in by_split.items()} | {
        "candidates": len(candidates),
        "search": "faiss" if nearly else "exact",
        "demonstrations": sum(map(len, found.values())),
    }
    table(
        f"Demonstrations by {key}, k = {k}: r' against the gold response r",
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
        ConfigError: it is asked for and not installed.
    """
    if search is Search.exact or (search is Search.auto and candidates <= MANY):
        return False
    try:
        load_faiss()
    except ConfigError:
        if search is Search.faiss:
            raise
        logger.warning(
            "%d candidates are searched exactly; pip install 'elmd[faiss]' has more than %d searched faster, with "
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
    found: Mapping[str, Sequence[Demonstration]],
    *,
    key: str,
    k: int,
    allow_same_dialogue: bool = False,
) -> dict[str, dict[str, float]]:
    """What share of what an approximate search found is as near as the k-th nearest of the exact one.

    Returns:
        By split: `recall@k`, and of how many queries (up to 1000 in all, drawn by the sample's place).
    """
    by_split = {split: [i for i, one in enumerate(samples) if one.split == split] for split in SPLITS}
    result: dict[str, dict[str, float]] = {}
    for split, members in by_split.items():
        if not members:
            continue
        drawn = sorted(random.Random(0).sample(members, min(len(members), RECALLED // len(SPLITS))))
        queries = Queries.of(vectors[drawn], [samples[i] for i in drawn])
        exact = index.search(key, queries, k, allow_same_dialogue=allow_same_dialogue).similarity[:, -1].tolist()
        hits = [one.similarity >= least for i, least in zip(drawn, exact, strict=True) for one in found[samples[i].id]]
        result[split] = {f"recall@{k}": _mean(hits), "recall_queries": len(drawn)}
    return result


def audit(
    samples: Sequence[Sample],
    candidates: Mapping[str, Sample],
    found: Mapping[str, Sequence[Demonstration]],
    allow_same_dialogue: bool = False,
) -> dict[str, float]:
    """What demonstrations give away, beside what a random admissible training response would: shares in [0, 1].

    Returns:
        `gold_response`: r' is word for word the gold response; `emotion_match`: it has the gold response's emotion;
        each with `_chance`; `own_dialogue`: it is from the sample's own dialogue (0 but where that is allowed);
        `similarity`: the mean cosine.
    """
    texts, emotions, sizes = Counter[tuple[str | None, str]](), Counter[tuple[str | None, str]](), Counter[str | None]()
    for one in candidates.values():
        for group in (None, one.dialogue):  # of all dialogues, and of this one
            texts[group, one.response.text] += 1
            emotions[group, one.response.emotion] += 1
            sizes[group] += 1
    totals: Counter[str] = Counter()
    for sample in samples:
        own = None if allow_same_dialogue else sample.dialogue
        left = sizes[None] - (sizes[own] if own is not None else 0)
        several = found[sample.id]
        row = {
            "gold_response": _mean([one.response == sample.response.text for one in several]),
            "gold_response_chance": _chance(texts, sample.response.text, own) / left,
            "emotion_match": _mean([one.emotion == sample.response.emotion for one in several]),
            "emotion_match_chance": _chance(emotions, sample.response.emotion, own) / left,
            "own_dialogue": _mean([candidates[one.source].dialogue == sample.dialogue for one in several]),
            "similarity": _mean([one.similarity for one in several]),
        }
        for name, value in row.items():
            totals[name] += value  # type: ignore[assignment]
    return {name: value / len(samples) for name, value in totals.items()}


def _chance(counts: Mapping[tuple[str | None, str], int], value: str, own: str | None) -> int:
    """Admissible candidates that have this value: all of them less those of the sample's own dialogue."""
    return counts[None, value] - (counts[own, value] if own is not None else 0)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
