"""What REP, EERG and generation read: samples, demonstrations, features, the language model and its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator

from elmd.config import Checkpointing, Config, PromptConfig
from elmd.data.encode import Encoder
from elmd.data.examples import Examples, Features, no_features, shuffled
from elmd.data.prompts import Prompt, Task
from elmd.data.samples import load_samples
from elmd.engine.stage import Inputs, Job
from elmd.errors import ArtifactError, CheckpointError
from elmd.labels import EMOTIONS, WORDS, Emotion
from elmd.log import logger
from elmd.retrieval.demonstrations import DEMONSTRATIONS, load_demonstrations
from elmd.stages.checkpoints import checkpoint, checkpoint_path
from elmd.types import Demonstration, Sample, Utterance
from elmd.vision.store import FeatureStore

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from elmd.models.elmd import Elmd
    from elmd.training.tokens import ElmdObjective


def reads_parts(cfg: Config) -> Inputs:
    """What REP, EERG and replies read, as far as the configuration has it (w/o ERM: no index; w/o V: no features)."""
    upstream = ["prepare"]
    keys = ["prompt", "llm.dtype", "llm.attention", "llm.max_prompt_tokens", "llm.max_target_tokens"]
    keys += ["vision.kind", "retriever.k"]
    if cfg.retrieves:
        upstream.append("index")
    if cfg.sees_video:
        upstream.append("features")
        keys += shuffling(cfg)
    return Inputs(keys, upstream) | checkpoint("llm", cfg.llm.path)


def shuffling(cfg: Config) -> list[str]:
    """Keys that say how clips are permuted among samples."""
    return ["vision.shuffle", *(["data.split_seed"] if cfg.vision.shuffle else [])]


@dataclass
class Parts:
    """`width` is q, the width of the features; 0 without video."""

    samples: list[Sample]
    demonstrations: dict[str, list[Demonstration]]
    features: Features
    width: int
    llm: PreTrainedModel
    encoder: Encoder

    def split(self, name: str) -> list[Sample]:
        """Samples of a split.

        Raises:
            ArtifactError: it has none.
        """
        samples = [sample for sample in self.samples if sample.split == name]
        if not samples:
            raise ArtifactError(f"the data has no {name} samples", fix="look at the counts that stage=prepare printed")
        return samples

    def with_clip(self, samples: Sequence[Sample]) -> list[Sample]:
        """Those that the projector learns from; where nothing else trains, the others would teach nothing.

        Raises:
            ArtifactError: there is none.
        """
        seen = [sample for sample in samples if self.features(sample.id) is not None]
        if not seen:
            raise ArtifactError(
                "no training sample has a clip to learn from", fix="look at what stage=features counted"
            )
        if len(seen) < len(samples):
            left = len(samples) - len(seen)
            logger.warning(
                "%d of %d samples left out: only the projector trains, and they have no clip", left, len(samples)
            )
        return seen

    def examples(self, samples: Sequence[Sample], task: Task, *, with_target: bool, video: bool = True) -> Examples:
        features = self.features if video else no_features
        return Examples(samples, self.encoder, self.demonstrations, features, task, with_target=with_target)

    def checkpointing(self, cfg: Config, objective: ElmdObjective, steps: int) -> bool:
        """Whether to checkpoint activations: as configured; `auto`: if the largest micro-batch would not fit."""
        from elmd.models.adapter import Lora
        from elmd.models.memory import needs_checkpointing

        if cfg.llm.checkpointing is not Checkpointing.auto:
            return cfg.llm.checkpointing is Checkpointing.always
        model = objective.model
        needed = needs_checkpointing(
            self.llm.config,
            objective.shapes(steps),
            device=self.llm.device,
            dtype=self.llm.dtype,
            trainables=sum(p.numel() for p in model.parameters() if p.requires_grad),
            virtual=0 if model.adapter is None else model.adapter.length,
            lora_rank=model.adapter.rank if isinstance(model.adapter, Lora) else 0,
        )
        if needed:
            logger.info("activation checkpointing is on: the activations of a micro-batch would not fit")
        return needed

    @property
    def hidden(self) -> int:
        """H, the width of the language model's embeddings."""
        weight = self.llm.get_input_embeddings().weight
        assert isinstance(weight, torch.Tensor)
        return weight.shape[1]

    @property
    def words(self) -> list[list[int]]:
        """Ids of each emotion's word, EOS included, in the order of `EMOTIONS`."""
        return [[*self.encoder.text(WORDS[e]), self.encoder.tokenizer.eos_token_id] for e in EMOTIONS]


def load_parts(cfg: Config, job: Job) -> Parts:
    """Read it all from the upstream artifacts."""
    from elmd.models.llm import load_llm
    from elmd.models.sharding import sharding

    samples = load_samples(job.upstream["prepare"] / "samples.jsonl")
    demonstrations = load_demonstrations(job.upstream["index"] / DEMONSTRATIONS) if cfg.retrieves else {}
    features: Features = no_features
    width = 0
    if cfg.sees_video:
        store = FeatureStore(job.upstream["features"])
        features, width = store.get, store.width
        if cfg.vision.shuffle:
            features = shuffled(features, samples, seed=cfg.data.split_seed)
    llm, tokenizer = load_llm(
        checkpoint_path("llm", cfg.llm.path, job),
        dtype=cfg.llm.dtype,
        attention=cfg.llm.attention,
        device=job.accelerator.device,
        onto="cpu" if sharding(job.accelerator) else None,  # the GPU may hold a part only
    )
    check_ids(tokenizer, llm.config, cfg.llm.path)
    return Parts(samples, demonstrations, features, width, llm, encoder_of(tokenizer, cfg))


def check_ids(tokenizer: Any, config: PreTrainedConfig, path: str | Path | None) -> None:
    """
    Raises:
        CheckpointError: the tokenizer has ids that the embedding has no row for.
    """
    highest, rows = max(tokenizer.get_vocab().values()), config.get_text_config(decoder=True).vocab_size
    if highest >= rows:
        raise CheckpointError(
            f"its tokenizer has ids up to {highest}, its embedding {rows} rows",
            where=path,
            fix="tokenizer and weights are of different models: fetch both from one place",
        )


def place(model: Elmd, accelerator: Accelerator) -> Elmd:
    """The whole model on its device; where the launcher asks for it, with the frozen weights shared out over ranks."""
    from elmd.models.sharding import shard, sharding

    if sharding(accelerator):
        shard(model.llm, accelerator)
    return model.to(accelerator.device)


def shortest_prompt(encoder: Encoder, slots: int) -> int:
    """Tokens of a prompt without anything to tell.

    Raises:
        ConfigError: that is too long already.
    """
    turn = Utterance("", "A", "…", Emotion.NEUTRAL)
    return encoder(Sample("", "", "", "train", (), turn, turn), (), "eerg", slots, with_target=False).length


def encoder_of(tokenizer: Any, cfg: Config) -> Encoder:
    """The encoder of a configuration."""
    return Encoder(tokenizer, prompt_of(cfg.prompt), cfg.llm.max_prompt_tokens, cfg.llm.max_target_tokens)


def prompt_of(config: PromptConfig) -> Prompt:
    """The prompt object of a configuration."""
    return Prompt(**{field.name: getattr(config, field.name) for field in fields(Prompt)})
