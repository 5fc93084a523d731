"""A training step of ERM, and its parts: sentence-transformers' trainer, one padded batch, loops over samples."""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.sampler import DefaultBatchSampler
from sentence_transformers.sentence_transformer.losses import BatchAllTripletLoss, MultipleNegativesRankingLoss
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PrinterCallback, TrainerCallback

from benchmarks.encode import about, drawn_texts, retriever
from benchmarks.harness import Case, Way
from elmd.config import ErmConfig
from elmd.labels import EMOTIONS
from elmd.losses import emotion_loss, retriever_loss, separation_loss
from elmd.training.contrast import Erm
from elmd.types import Sample, Utterance

ERM = ErmConfig()


def cases(small: bool) -> Iterator[Case]:
    width, layers, size, steps = (32, 1, 6, 2) if small else (256, 4, ERM.batch_size, 6)
    samples = made_up(size * steps)
    yield losses(*(6, 16, 2) if small else (ERM.batch_size, 768, ERM.slots))
    yield encoding(retriever(width, layers, dropout=0.0), samples, size)
    # No dropout: its draws would differ from way to way.
    yield step(retriever(width, layers, dropout=0.0), retriever(width, layers, dropout=0.0), samples, size, steps)


def made_up(count: int) -> list[Sample]:
    """Samples with utterances of CPED's lengths, and each emotion as often as the others."""
    turns = [Utterance(str(i), "A", text, EMOTIONS[i % len(EMOTIONS)]) for i, text in enumerate(drawn_texts(count))]
    return [Sample(str(i), str(i), "show", "train", (), turn, turn) for i, turn in enumerate(turns)]


def task_of(model: SentenceTransformer, samples: Sequence[Sample], size: int) -> Erm:
    return Erm(
        model, {"train": samples, "valid": samples[:2]}, "valid", batch_size=size, seed=0, temperature=ERM.temperature
    )


def losses(batch: int, d: int, s: int) -> Case:
    """Eq. 2-4 with gradients: vectorised, against a loop over anchors and one over pairs of samples."""
    tau, generator = ERM.temperature, torch.Generator().manual_seed(0)
    e = torch.randn(batch, d, generator=generator).requires_grad_()
    slots = torch.randn(batch, s, d, generator=generator).requires_grad_()
    labels = torch.arange(batch) % min(len(EMOTIONS), batch // 2)

    def vectorised() -> list[Tensor]:
        loss = emotion_loss(e, labels, tau).loss + separation_loss(slots, tau)
        return [loss.detach(), *torch.autograd.grad(loss, (e, slots))]

    def looped() -> list[Tensor]:
        anchors, pairs = [], []
        for i in range(batch):
            others = [k for k in range(batch) if k != i]
            log_p = (F.cosine_similarity(e[i], e[others], dim=-1) / tau).log_softmax(0)
            positives = [at for at, k in enumerate(others) if labels[k] == labels[i]]
            anchors.append(-log_p[positives].mean())
            for j in range(i + 1, batch):
                similarity = F.cosine_similarity(slots[i][:, None], slots[j][None, :], dim=-1)  # [s, s]
                pairs.append(-(similarity / tau).log_softmax(1).diagonal().mean())
        loss = torch.stack(anchors).mean() + torch.stack(pairs).mean()
        return [loss.detach(), *torch.autograd.grad(loss, (e, slots))]

    return Case(
        "Eq. 2-4 of a batch, with gradients",
        f"batch {batch}, s = {s}, d = {d}",
        [Way("elmd", vectorised), Way("loops over anchors and pairs", looped)],
    )


def encoding(model: SentenceTransformer, samples: Sequence[Sample], size: int) -> Case:
    """A batch's loss and gradients: encoded in groups, against one padded batch and one text at a time."""
    task = task_of(model, samples, size)
    batch = task.batches(0)[0]
    texts = [task.texts[i] for i in batch]
    longest = max(len(text) for text in texts)

    def gradients(loss: Tensor) -> list[Tensor]:
        loss.backward()
        result = [loss.detach(), gradient(model)]
        model.zero_grad(set_to_none=True)
        return result

    def ours() -> list[Tensor]:
        ((loss, _),) = task.losses(batch, 0, 1)
        return gradients(loss)

    def in_batches(rows: int) -> list[Tensor]:
        e_u = [model(model.preprocess(texts[i : i + rows]))["e_u"] for i in range(0, len(texts), rows)]
        return gradients(task.loss(torch.cat(e_u), batch))

    def padding() -> Mapping[str, float]:
        with torch.no_grad():
            ((_, tokens),) = task.losses(batch, 0, 1)
        return {"tokens run": tokens}

    real = sum(min(len(text) + 2, 128) for text in texts)
    return Case(
        "A batch's loss and gradients (eq. 1-4), without dropout",
        f"{_of(model)}, {about(texts)}, {longest} the longest; {real} tokens without padding",
        [
            Way("elmd, groups of like length", ours, facts=padding),
            Way("one padded batch", lambda: in_batches(len(texts)), lambda: {"tokens run": _padded(model, texts)}),
            Way("one by one", lambda: in_batches(1), lambda: {"tokens run": real}),
        ],
    )


def gradient(model: nn.Module) -> Tensor:
    """All gradients, in one vector: those of the keys' biases alone are zero but for rounding."""
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def _padded(model: SentenceTransformer, texts: Sequence[str]) -> int:
    return model.preprocess(list(texts))["attention_mask"].numel()


def _of(model: SentenceTransformer) -> str:
    config = model[0].model.config
    return f"BERT of {config.hidden_size} × {config.num_hidden_layers}, vocabulary {config.vocab_size}"


def step(
    model: SentenceTransformer, theirs: SentenceTransformer, samples: Sequence[Sample], size: int, steps: int
) -> Case:
    """Encoder, losses, backward, clipping and optimizer, over the same batches, from the same weights."""
    task = task_of(model, samples, size)
    batches = task.batches(0)[:steps]
    trained = [p for module in task.modules.values() for p in module.parameters() if p.requires_grad]
    # At rate 0 a step does all its work, and every run starts from the same weights.
    optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=ERM.weight_decay)

    def ours() -> dict[str, Tensor]:
        losses, gradients = [], torch.zeros(())
        with frozen():
            for batch in batches:  # what elmd.training.loop.fit does between two log lines
                for loss, _ in task.losses(batch, 0, 1):
                    loss.backward()
                    losses.append(loss.detach())
                torch.nn.utils.clip_grad_norm_(trained, ERM.max_grad_norm)
                gradients = gradients + gradient(model)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        return {"losses": torch.stack(losses), "gradients": gradients}

    texts, labels = [task.texts[i] for batch in batches for i in batch], [task.labels[i] for b in batches for i in b]
    columns: dict[str, list[Any]] = {"sentence": texts, "label": labels}
    # The library's own losses get the encoder alone, so they do less: no slots, and one loss instead of two.
    encoder = SentenceTransformer(modules=list(theirs.children())[:2], device="cpu")
    pairs = [pair for batch in batches for pair in positives(batch, task.labels)]
    eq4 = Trained(theirs, columns, Eq4(theirs), batches)
    triplets = Trained(encoder, columns, BatchAllTripletLoss(encoder), batches)
    infonce = Trained(
        encoder,
        {"anchor": [task.texts[i] for i, _ in pairs], "positive": [task.texts[i] for _, i in pairs]},
        MultipleNegativesRankingLoss(encoder),
        [positives(batch, task.labels) for batch in batches],
    )
    name = "sentence-transformers' trainer"
    return Case(
        "A training step of ERM",
        f"{_of(model)}, without dropout; {len(batches)} batches of up to {size}: {about(texts)}",
        [
            Way("elmd", ours),
            Way(f"{name}, eq. 4", eq4.run, eq4.facts, eq4.before),
            Way(f"{name}, BatchAllTripletLoss", triplets.run, triplets.facts, triplets.before, same=False),
            Way(f"{name}, MultipleNegativesRankingLoss", infonce.run, infonce.facts, infonce.before, same=False),
        ],
        per=len(batches),
        unit="steps",
        note="Compared are each step's loss and the sum of the clipped gradients. The library has no supervised "
        "contrastive loss with all positives of an anchor in one softmax, so its trainer is given eq. 4 as a loss of "
        "one's own, over the whole model. The two last ways are losses that it has; they compute something else, so "
        "their results are not compared: triplets of all positives and negatives, and InfoNCE with one positive for "
        "each anchor, for which the batch's texts are paired by emotion (an odd one of an emotion is left out). They "
        "train the encoder alone, without self-separation and its loss.",
    )


class Eq4(nn.Module):
    """Eq. 4 as a loss for sentence-transformers' trainer, which asks for the attribute `model` and for `forward`."""

    def __init__(self, model: SentenceTransformer):
        super().__init__()
        self.model = model

    def forward(self, sentence_features: Sequence[dict[str, Tensor]], labels: Tensor) -> Tensor:
        """Of a batch's one column of texts; labels [B]."""
        (features,) = sentence_features
        keys = self.model(features)
        slots = keys["sentence_embedding"].unflatten(1, (ERM.slots, -1))
        return retriever_loss(keys["e_u"], slots, labels, ERM.temperature).total


@contextmanager
def frozen() -> Iterator[None]:
    """What there is stays: a trainer collects garbage once as it begins, half a second with all that is imported."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def positives(batch: Sequence[int], labels: Sequence[int]) -> list[tuple[int, int]]:
    """The batch's samples in pairs of one emotion."""
    by_label: dict[int, list[int]] = {}
    for i in batch:
        by_label.setdefault(labels[i], []).append(i)
    return [(some[i], some[i + 1]) for some in by_label.values() for i in range(0, len(some) - 1, 2)]


class Trained:
    """A short training by SentenceTransformerTrainer, whose batches are given; `before` sets it up again."""

    def __init__(
        self, model: SentenceTransformer, columns: dict[str, list[Any]], loss: Any, batches: Sequence[Sequence[Any]]
    ):
        self.model, self.loss, self.steps = model, loss, len(batches)
        self.data = Dataset.from_dict(columns)
        ends = [sum(map(len, batches[: i + 1])) for i in range(len(batches))]
        self.rows = [list(range(end - len(batch), end)) for end, batch in zip(ends, batches, strict=True)]
        self.clock = Clock()

    def before(self) -> None:
        rows = self.rows

        class Given(DefaultBatchSampler):
            def __iter__(self) -> Iterator[list[int]]:
                return iter(rows)

            def __len__(self) -> int:
                return len(rows)

        with tempfile.TemporaryDirectory() as folder:
            arguments = SentenceTransformerTrainingArguments(
                folder, max_steps=self.steps, per_device_train_batch_size=len(rows[0]), batch_sampler=Given,
                learning_rate=0.0, weight_decay=ERM.weight_decay, max_grad_norm=ERM.max_grad_norm, use_cpu=True,
                save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True,
            )  # fmt: skip
        self.trainer = SentenceTransformerTrainer(
            self.model, arguments, train_dataset=self.data, loss=self.loss, callbacks=[self.clock]
        )
        self.trainer.remove_callback(PrinterCallback)

    def run(self) -> dict[str, Tensor]:
        """Each step's loss, and the sum of the gradients."""
        losses: list[Tensor] = []
        hook = self.loss.register_forward_hook(lambda module, inputs, loss: losses.append(loss.detach()))
        self.clock.inside, self.clock.gradients, started = 0.0, torch.zeros(()), time.perf_counter()
        with frozen():
            self.trainer.train()
        self.clock.whole = time.perf_counter() - started
        hook.remove()
        assert self.trainer.state.global_step == self.steps
        return {"losses": torch.stack(losses), "gradients": self.clock.gradients}

    def facts(self) -> Mapping[str, float]:
        """How much of the last run was not in its steps: tokenising and padding, and what a training begins with."""
        return {"between steps, ms per step": 1000 * (self.clock.whole - self.clock.inside) / self.steps}


class Clock(TrainerCallback):
    """Seconds between the beginning and the end of each step, and the sum of the gradients."""

    inside, whole, started, gradients = 0.0, 0.0, 0.0, torch.zeros(())

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.started = time.perf_counter()

    def on_pre_optimizer_step(self, *_: Any, **others: Any) -> None:
        self.gradients = self.gradients + gradient(others["model"])

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.inside += time.perf_counter() - self.started
