"""Stage `erm`: train the Emotional Retrieval Module on the utterances of the training split (§3.3, eq. 1-4)."""

from __future__ import annotations

import random
import shutil
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

from elmd.config import Config
from elmd.data.samples import load_samples
from elmd.engine.files import replace_folder
from elmd.engine.stage import Inputs, Job, Outcome
from elmd.errors import ConfigError, DataError
from elmd.labels import EMOTIONS, INDEX
from elmd.log import table
from elmd.losses import retriever_loss
from elmd.metrics.retrieval import match_scores
from elmd.retrieval.index import Index
from elmd.retrieval.retriever import Tokens, add_separation, cut_texts, embed, encode, load_retriever, separation_of
from elmd.stages.checkpoints import checkpoint, checkpoint_path
from elmd.training.loop import Positions, fit
from elmd.training.plan import Plan
from elmd.types import Sample


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
    samples = load_samples(job.upstream["prepare"] / "samples.jsonl")
    splits = {split: [s for s in samples if s.split == split] for split in ("train", "valid", "test")}
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
        splits["train"],
        splits[cfg.erm.select_on.value],
        batch_size=cfg.erm.batch_size,
        seed=cfg.seed,
        temperature=cfg.erm.temperature,
        emotion_weight=cfg.erm.emotion_weight,
        separation_weight=cfg.erm.separation_weight,
        one_positive=cfg.erm.one_positive,
    )
    per_epoch = task.batches(0)

    # 2. Score, train, score again.
    tested = {split: splits[split] for split in ("valid", "test") if splits[split]}
    raw = {split: scores(model, splits["train"], queries) for split, queries in tested.items()}
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
    trained = {split: scores(model, splits["train"], queries) for split, queries in tested.items()}

    # 3. Keep the retriever.
    if job.accelerator.is_main_process:
        new = job.folder / "model.new"
        shutil.rmtree(new, ignore_errors=True)
        model.save_pretrained(str(new), create_model_card=False)
        replace_folder(new, job.folder / "model")

    # 4. Say what came out.
    matches = {
        split: {
            subset: {f"raw {key}": value for key, value in raw[split][subset].items()} | trained[split][subset]
            for subset in trained[split]
        }
        for split in tested
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
        "anchors_without_positive_per_epoch": task.lonely(per_epoch),
        "utterances_cut": cut_texts(model, task.texts),
    }
    metrics: dict[str, Any] = {"emotion_match": matches, "best_step": progress.best_step}
    if progress.best is not None:
        metrics["emotion_match@1"] = progress.best
    return Outcome(metrics=metrics, primary="emotion_match@1", counts=counts)


class Erm:
    """What the loop trains: encoder and self-separation, by eq. 4 on emotion-aware batches.

    Contrast within a batch is not additive, so each global batch is one loss: every rank encodes its part, the
    vectors are gathered with gradient, and every rank computes 1/world of the whole loss.

    Args:
        model: the retriever; without self-separation where `separation_weight` is 0.
        train: training samples; batches are positions in it.
        selection: samples whose utterances are the queries of `evaluate`.
        batch_size, temperature, emotion_weight (λ), separation_weight, one_positive: see `losses.retriever_loss`.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        train: Sequence[Sample],
        selection: Sequence[Sample],
        *,
        batch_size: int,
        seed: int,
        temperature: float,
        emotion_weight: float = 1.0,
        separation_weight: float = 1.0,
        one_positive: bool = False,
    ):
        self.model, self.train, self.selection = model, train, selection
        self.texts = [sample.utterance.text for sample in train]
        self.tokens = Tokens(model, self.texts)
        self.labels = [INDEX[sample.utterance.emotion] for sample in train]
        self.batch_size, self.seed = batch_size, seed
        self.temperature, self.one_positive = temperature, one_positive
        self.emotion_weight, self.separation_weight = emotion_weight, separation_weight
        # BERT's pooler sees no gradient under mean pooling; left to train, weight decay alone would move it.
        for name, parameter in model[0].named_parameters():
            if ".pooler." in name:
                parameter.requires_grad_(False)
        self.separation = separation_of(model)
        trained: dict[str, nn.Module | None] = {"encoder": model[0], "separation": self.separation}
        self.modules: Mapping[str, nn.Module] = {name: module for name, module in trained.items() if module is not None}

    def batches(self, epoch: int) -> list[Positions]:
        return emotion_batches(self.labels, self.batch_size, self.seed, epoch)

    def weight(self, batch: Positions) -> float:
        return 1.0

    def losses(self, batch: Positions, rank: int, world: int) -> Iterator[tuple[Tensor, int]]:
        self.model.train()
        sizes = [len(batch) // world + (r < len(batch) % world) for r in range(world)]
        start = sum(sizes[:rank])
        # A rank without a share still encodes a text: it must take part in the gathering.
        mine = batch[start : start + sizes[rank]] or batch[:1]
        e_u, tokens = embed(self.model, self.tokens, mine)
        yield self.loss(gather_rows(e_u[: sizes[rank]], sizes, rank), batch) / world, tokens

    def loss(self, e_u: Tensor, batch: Positions) -> Tensor:
        """Eq. 4 of a whole batch from its e_u [B, d]."""
        generator = None
        if self.one_positive:  # the same draw on every rank, and again after a resume
            generator = torch.Generator().manual_seed(zlib.crc32(repr((self.seed, *batch)).encode()))
        return retriever_loss(
            e_u,
            None if self.separation is None else self.separation.separate(e_u),
            torch.tensor([self.labels[i] for i in batch], device=e_u.device),
            self.temperature,
            emotion_weight=self.emotion_weight,
            separation_weight=self.separation_weight,
            one_positive=generator,
        ).total

    def evaluate(self) -> dict[str, float]:
        found = scores(self.model, self.train, self.selection)["all"]
        return {f"emotion_{name}/{key}": found[key][name] for key in found for name in ("match@1", "match@5", "mrr")}

    def lonely(self, batches: Sequence[Positions]) -> int:
        """Anchors that have no sample of their emotion in their batch; eq. 2 leaves them out."""
        return sum([self.labels[i] for i in batch].count(self.labels[j]) == 1 for batch in batches for j in batch)


def emotion_batches(labels: Sequence[int], size: int, seed: int, epoch: int) -> list[Positions]:
    """An epoch's batches: each sample once, no batch over `size`, and in each batch at least two of each emotion in it.

    Samples of one emotion are paired at random (an odd one makes a triple), and pairs are dealt to the batches so that
    these are as even as can be: a last batch of a few samples would have few negatives. Only the one sample of an
    emotion that has no other stays alone. A function of its arguments, so every rank and every resume agree.

    Raises:
        ConfigError: `size` is under 4, too small for two emotions.
    """
    if size < 4:
        raise ConfigError(
            f"a batch of {size} has no room for a positive and negatives", where="erm.batch_size", fix="use 4 or more"
        )
    draw = random.Random(f"erm {seed} {epoch}")
    by_label: dict[int, list[int]] = defaultdict(list)
    for position, label in enumerate(labels):
        by_label[label].append(position)
    groups: list[list[int]] = []
    for label in sorted(by_label):
        members = draw.sample(by_label[label], len(by_label[label]))
        pairs = [members[i : i + 2] for i in range(0, len(members), 2)]
        if len(pairs) > 1 and len(pairs[-1]) == 1:
            odd = pairs.pop()
            pairs[-1] += odd
        groups += pairs
    draw.shuffle(groups)
    groups.sort(key=len, reverse=True)  # the few triples first, so that pairs even them out
    number = -(-len(labels) // size)
    while (dealt := _deal(groups, number, size)) is None:
        number += 1
    for batch in dealt:
        draw.shuffle(batch)
    draw.shuffle(dealt)
    return list(dealt)


def _deal(groups: Sequence[Sequence[int]], number: int, size: int) -> list[list[int]] | None:
    """Each group to the emptiest of `number` batches; None where one would exceed `size`."""
    batches: list[list[int]] = [[] for _ in range(number)]
    for group in groups:
        emptiest = min(batches, key=len)
        if len(emptiest) + len(group) > size:
            return None
        emptiest += group
    return batches


def gather_rows(mine: Tensor, sizes: Sequence[int], rank: int) -> Tensor:
    """Rows of all ranks in rank order [sum(sizes), d], with gradient: that of every rank's loss reaches `mine`.

    Args:
        mine: this rank's rows [sizes[rank], d].
        sizes: rows of each rank; they may differ.
    """
    return mine if len(sizes) == 1 else _GatherRows.apply(mine, tuple(sizes), rank)


class _GatherRows(torch.autograd.Function):
    """Forward: concatenation over ranks. Backward: the sum over ranks of the gradient of this rank's rows."""

    @staticmethod
    def forward(ctx: Any, mine: Tensor, sizes: tuple[int, ...], rank: int) -> Tensor:
        ctx.rows = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        padded = mine.new_zeros(max(sizes), *mine.shape[1:])  # collectives want equal shapes
        padded[: len(mine)] = mine
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total[ctx.rows], None, None


Scores = dict[str, dict[str, dict[str, float]]]


def scores(model: SentenceTransformer, train: Sequence[Sample], queries: Sequence[Sample]) -> Scores:
    """Emotion-match@1/5, MRR and chance of utterances `queries` against those of `train`, own dialogues left out.

    Returns:
        By subset (`all`, and each tag that utterances carry) and key (`e_u`, and `E_s` where the model has it).
    """
    vectors = encode(model, [sample.utterance.text for sample in [*train, *queries]])
    index = Index.build(train, {key: rows[: len(train)] for key, rows in vectors.items()})
    subsets: Mapping[str, list[int]] = {"all": list(range(len(queries)))} | {
        tag: [i for i, sample in enumerate(queries) if tag in sample.utterance.tags]
        for tag in sorted({tag for sample in queries for tag in sample.utterance.tags})
    }
    result: Scores = {subset: {} for subset in subsets}
    for key, rows in vectors.items():
        similarity = index.similarity(key, rows[len(train) :])
        for subset, members in subsets.items():
            result[subset][key] = match_scores(
                similarity[members],
                [queries[i].utterance.emotion for i in members],
                [sample.utterance.emotion for sample in train],
                [queries[i].dialogue for i in members],
                [sample.dialogue for sample in train],
            )
    return result
