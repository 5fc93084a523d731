"""Stage `index`: index the training utterances and retrieve every sample's demonstration, once (§3.3 end)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from elmd.config import Config
from elmd.data.samples import load_samples
from elmd.errors import DataError
from elmd.log import table
from elmd.retrieval.index import DEMONSTRATIONS, Index, demonstrations, save_demonstrations
from elmd.retrieval.retriever import encode, load_retriever
from elmd.stages.base import Depends, Job, Outcome, Stage
from elmd.types import SPLITS, Demonstration, Sample


def depends(cfg: Config) -> Depends:
    return Depends(
        config={
            "k": cfg.retriever.k,
            "key": cfg.retriever.key.value,
            "allow_same_dialogue": cfg.retriever.allow_same_dialogue,
        },
        upstream=["prepare", "erm"],
    )


def run(cfg: Config, job: Job) -> Outcome:
    if not job.accelerator.is_main_process:
        return Outcome()
    key, k, leak = cfg.retriever.key.value, cfg.retriever.k, cfg.retriever.allow_same_dialogue
    path = job.upstream["prepare"] / "samples.jsonl"
    samples = load_samples(path)
    train = [i for i, sample in enumerate(samples) if sample.split == "train"]
    if not train:
        raise DataError("there is no training sample to index", where=path, fix="look at what stage=prepare counted")
    model = load_retriever(job.upstream["erm"] / "model", device=job.accelerator.device)
    vectors = encode(model, [sample.utterance.text for sample in samples], what="encode utterances")
    candidates = {samples[i].id: samples[i] for i in train}
    index = Index.build(list(candidates.values()), {name: rows[train] for name, rows in vectors.items()})
    found = demonstrations(index, candidates, samples, vectors[key], key=key, k=k, allow_same_dialogue=leak)
    index.save(job.folder)
    save_demonstrations(job.folder / DEMONSTRATIONS, found)

    by_split = {split: [sample for sample in samples if sample.split == split] for split in SPLITS}
    report: dict[str, Any] = {split: audit(some, candidates, found, leak) for split, some in by_split.items() if some}
    counts: dict[str, Any] = {split: len(some) for split, some in by_split.items()} | {
        "candidates": len(candidates),
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


STAGE = Stage("index", 1, depends, run)


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
