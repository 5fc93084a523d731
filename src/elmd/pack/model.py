"""A trained model in a folder of its own (`python -m elmd.export` writes it), and loading it by path or hub id.

    elmd.json               what it is: choices, decoding, base models with fingerprints, sizes and hashes of the files
    README.md               the model card
    prompt.json             the prompt that it was trained with
    adapter/                prefix or LoRA in PEFT's format; absent without one
    projector.safetensors   eq. 9; absent w/o V
    retriever/              the trained sentence encoder; absent w/o ERM
    index/                  vectors and texts of the training samples that demonstrations come from; may be left out

The language model and the vision encoder are others' weights and stay where they are: `elmd.json` names them. Nothing
in a pack is code or a pickle, and nothing in it is opened but the names above and what lies below them.

    model = load_pack("folder-or-hub-id", llm="/weights/chatglm2-6b", vision="/weights/visualglm-vision")
    reply = model.reply(("B", "你怎么才来？"), history=[("A", "…"), …], clip="u.mp4")
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor

from elmd.config import Config, Decoder, VisionKind
from elmd.data.encode import Encoder
from elmd.data.examples import Examples, Features, no_features
from elmd.data.prompts import Prompt
from elmd.data.samples import load_samples
from elmd.engine.keys import check_ranges
from elmd.errors import CheckpointError, ClipError, ConfigError, DataError, reason
from elmd.labels import Emotion
from elmd.log import logger
from elmd.models import PROJECTOR
from elmd.models.decode import generate_all
from elmd.models.elmd import Elmd
from elmd.models.llm import load_weights
from elmd.models.sharding import sharding
from elmd.pack.bases import VISION_PARTS, check_base, check_weights, give_base, named_base, open_base_llm
from elmd.pack.dialogue import to_sample
from elmd.pack.folder import FACTS, INDEX, PROMPT, RETRIEVER, TEXTS, check_files, fetch, read_facts
from elmd.retrieval import load_retriever
from elmd.retrieval.demonstrations import demonstrations
from elmd.retrieval.index import Index
from elmd.retrieval.retriever import encode
from elmd.retrieval.strategy import Settings
from elmd.stages.eerg import task_of
from elmd.stages.features import clip_encoder
from elmd.stages.parts import check_ids, place
from elmd.types import Demonstration, Sample
from elmd.vision import default_decoder
from elmd.vision.arrays import ArrayReader
from elmd.vision.clips import ClipEncoder, FeatureMaker


@dataclass(frozen=True)
class Reply:
    """What the model says.

    Attributes:
        emotion: None where it named none, or was not trained to.
        demonstration: the first r' in its prompt; None without one.
    """

    emotion: Emotion | None
    text: str
    demonstration: str | None


class Pack:
    """A loaded model; made by `load_pack`.

    Attributes:
        cfg: the choices it was trained and decoded with. `cfg.generate` (top_p, temperature, max_new_tokens,
            batch_tokens) may be changed between replies; temperature 0 is greedy.
        facts: the content of `elmd.json`.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any], cfg: Config, accelerator: Accelerator):
        self.folder, self.facts, self.cfg, self.accelerator = folder, facts, cfg, accelerator
        path = str(cfg.llm.path)
        tokenizer = open_base_llm(path, cfg.llm.attention, facts["llm"], facts["name"])
        llm = load_weights(
            path, dtype=cfg.llm.dtype, attention=cfg.llm.attention, device=accelerator.device,
            onto="cpu" if sharding(accelerator) else None,
        )  # fmt: skip
        check_ids(tokenizer, llm.config, path)
        limits = cfg.llm
        self.encoder = Encoder(
            tokenizer, Prompt.load(folder / PROMPT), limits.max_prompt_tokens, limits.max_target_tokens
        )
        self.model = place(Elmd.load(folder, llm), accelerator)
        if (self.model.projector is not None) != cfg.sees_video:
            raise CheckpointError(
                f"vision.kind is {cfg.vision.kind}, and {PROJECTOR} is {'missing' if cfg.sees_video else 'there'}",
                where=folder / FACTS,
                fix="export the model again",
            )
        self._clip_encoder: ClipEncoder | None = None  # loaded at the first clip
        self.index: Index | None = None
        if cfg.retrieves and facts["index"]:
            self.retriever = load_retriever(folder / RETRIEVER, device=accelerator.device)
            self.index = Index.load(folder / INDEX)
            self.candidates = {sample.id: sample for sample in load_samples(folder / TEXTS)}
            if missing := set(self.index.ids) - self.candidates.keys():
                raise CheckpointError(
                    f"lacks the text of {len(missing)} indexed samples", where=folder / TEXTS, fix="export it again"
                )
        elif cfg.retrieves:
            logger.warning("%s has no index: prompts have no demonstration, unlike in training", facts["name"])

    def reply(
        self,
        utterance: tuple[str, str],
        history: Sequence[tuple[str, str]] = (),
        *,
        clip: str | Path | None = None,
        background: str | None = None,
        responder: str | None = None,
        seed: int = 0,
    ) -> Reply:
        """The reply to one utterance; equal input and seed give an equal reply.

        Args:
            utterance, history, clip, background, responder: see `to_sample`.
            seed: of the sampling; without meaning at temperature 0.

        Raises:
            ConfigError: a clip for a model without video, or for one that reads arrays.
            ClipError: the clip is missing or cannot be decoded.
            DataError: see `to_sample`.
        """
        if clip is not None and self.cfg.vision.kind is not VisionKind.encoder:
            kind = "reads feature arrays" if self.cfg.sees_video else "was trained without video"
            raise ConfigError(
                f"{self.facts['name']} {kind}, so a clip would not be seen",
                where="clip",
                fix="name arrays in samples, and use reply_all" if self.cfg.sees_video else "leave it out",
            )
        sample = to_sample(utterance, history, clip=clip, background=background, responder=responder)
        replies, lost = self._reply([sample], seed)
        if lost:
            raise ClipError(next(iter(lost.values())).rstrip("."))
        return replies[0]

    def reply_all(self, samples: Sequence[Sample], seed: int = 0) -> list[Reply]:
        """A reply to the utterance of each sample, in order; the same as stage `generate` gives for this sample.

        A sample's reply depends on itself, its id and the seed, not on the others. The response of a sample is not
        read, but for the name of who speaks it. As in training, samples of an indexed dialogue get demonstrations
        from other dialogues only, and a clip that cannot be decoded leaves its sample text-only, which is logged.

        Raises:
            DataError: two samples have one id, or an array of features cannot be used.
        """
        if len({sample.id for sample in samples}) < len(samples):
            raise DataError("two samples have the same id", where="samples", fix="number them")
        if not self.cfg.sees_video and any(sample.utterance.clip for sample in samples):
            logger.warning("clips are passed over: %s was trained without video", self.facts["name"])
        replies, lost = self._reply(samples, seed)
        if lost:
            logger.warning("%d clips could not be used; their samples were text-only", len(lost))
        return replies

    def _reply(self, samples: Sequence[Sample], seed: int) -> tuple[list[Reply], dict[str, str]]:
        """Replies, and errors of the clips that were lost."""
        if not samples:
            return [], {}
        demonstrations = self._demonstrations(samples)
        features, lost = self._features(samples)
        task, decoding, tokenizer = task_of(self.cfg), self.cfg.generate, self.encoder.tokenizer
        examples = Examples(samples, self.encoder, demonstrations, features, task, with_target=False)
        ids = generate_all(
            self.model, examples, decoding.batch_tokens, self.accelerator, eos=tokenizer.eos_token_id,
            max_new_tokens=decoding.max_new_tokens, top_p=decoding.top_p, temperature=decoding.temperature,
            seeds=[seed],
        )  # fmt: skip
        replies = []
        for sample, [new] in zip(samples, ids, strict=True):
            emotion, text = self.encoder.prompt.split_target(tokenizer.decode(new, skip_special_tokens=True), task)
            shown = demonstrations.get(sample.id)
            replies.append(Reply(emotion, text, shown[0].response if shown else None))
        return replies, lost

    def _demonstrations(self, samples: Sequence[Sample]) -> dict[str, list[Demonstration]]:
        if self.index is None:
            return {}
        chosen = self.cfg.retriever
        settings = Settings(chosen.key.value, chosen.k, chosen.allow_same_dialogue)
        vectors = encode(self.retriever, [sample.utterance.text for sample in samples])[settings.key]
        return demonstrations(self.index, self.candidates, samples, vectors, settings)

    def _features(self, samples: Sequence[Sample]) -> tuple[Features, dict[str, str]]:
        """V_c of each sample, as stage `features` makes it, and the error of each clip that was lost."""
        if not self.cfg.sees_video or not any(s.utterance.clip or s.utterance.features for s in samples):
            return no_features, {}
        projector = self.model.projector
        assert projector is not None, "checked by the constructor"
        maker = self._feature_maker()
        plan = maker.plan(samples)
        made: dict[str, Tensor] = {}  # in half precision, as in the files of stage `features`
        lost: dict[str, str] = {}
        for key, result in maker.features(plan, sorted(plan.sources)):
            if isinstance(result, ClipError):
                lost[key] = str(result)
                continue
            if result.shape[-1] != (width := projector.linear.in_features):
                raise DataError(
                    f"visual tokens are {result.shape[-1]} wide, and the projector reads {width}",
                    where=plan.sources[key].path,
                    fix="make them with the encoder that the model was trained with",
                )
            made[key] = result

        def features(sample: str) -> Tensor | None:
            key = plan.keys[sample]
            return made[key].float() if key is not None and key in made else None

        return features, lost

    def _feature_maker(self) -> FeatureMaker:
        vision = self.cfg.vision
        if vision.kind is VisionKind.precomputed:
            return ArrayReader(vision.shape)
        if vision.path is None:
            raise CheckpointError(
                "a clip needs the vision encoder, which is no part of a pack",
                where=self.facts["name"],
                fix=give_base("vision", self.facts["vision"]),
            )
        if self._clip_encoder is None:
            self._clip_encoder = clip_encoder(vision, Path(vision.path), self.accelerator.device)
        return self._clip_encoder


def load_pack(
    source: str | Path, *, llm: str | Path | None = None, vision: str | Path | None = None, cpu: bool = False
) -> Pack:
    """A trained model from the folder that `python -m elmd.export` wrote, or from a hub id that holds one.

    Args:
        source: the folder, or the hub id; of a hub repository only data files are downloaded, once.
        llm: folder or hub id of the language model; None takes the one that the pack names, if that is a hub id.
        vision: folder or hub id of the vision encoder, likewise; needed at the first clip only.
        cpu: stay on the CPU where there is a GPU.

    Raises:
        CheckpointError: nothing there, a file is not as it was packed, or the language model or vision encoder is
            missing or another than in training.
        ConfigError: the pack needs a later version of ELMD, or uses no vision encoder and is given one.
    """
    for role, path in (("llm", llm), ("vision", vision)):
        if path is not None:
            check_base(role, str(path))
    folder = fetch(str(source))
    facts = read_facts(folder)
    check_files(folder, facts["files"])
    cfg = _config(folder, facts)
    cfg.cpu = cpu
    cfg.llm.path = str(llm) if llm is not None else named_base(facts["llm"])
    if cfg.llm.path is None:
        raise CheckpointError(
            "the language model is no part of a pack, and this one was trained with a local folder of it",
            where=facts["name"],
            fix=give_base("llm", facts["llm"]),
        )
    if cfg.vision.kind is VisionKind.encoder:
        cfg.vision.path = str(vision) if vision is not None else named_base(facts["vision"])
        if cfg.vision.path is not None:
            check_weights(cfg.vision.path, facts["vision"], facts["name"], "vision", VISION_PARTS)
    elif vision is not None:
        raise ConfigError(f"{facts['name']} uses no vision encoder", where="vision", fix="leave it out")
    return Pack(folder, facts, cfg, Accelerator(cpu=cpu))


def _config(folder: Path, facts: Mapping[str, Any]) -> Config:
    """The choices of `elmd.json` as a configuration.

    Raises:
        CheckpointError: an unknown key, a wrong type, or a number out of its range.
    """
    try:
        if "${" in json.dumps(facts["config"]):
            raise ValueError("it refers to something outside")
        texts = {"prompt": {field.name: "" for field in fields(Prompt)}}  # these are in prompt.json
        cfg = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), texts, facts["config"]))
        assert isinstance(cfg, Config)
        check_ranges(cfg)
        cfg.vision.decoder = Decoder(default_decoder())  # this machine's: its pixels equal those of training
    except (OmegaConfBaseException, ValueError, TypeError, ConfigError) as error:
        raise CheckpointError(
            f"its choices cannot be read ({reason(error)})", where=folder / FACTS, fix="export the model again"
        ) from error
    return cfg
