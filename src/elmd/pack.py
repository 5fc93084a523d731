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

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from accelerate import Accelerator
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError, safe_open
from torch import Tensor

from elmd.config import Config, VisionKind, check_ranges
from elmd.data.encode import Encoder
from elmd.data.examples import Examples, Features, no_features
from elmd.data.prompts import Prompt
from elmd.data.samples import Pair, load_samples, merge
from elmd.data.source import Notes, RawDialogue
from elmd.errors import CheckpointError, ClipError, ConfigError, DataError, reason
from elmd.hub import is_hub_id, snapshot
from elmd.labels import Emotion
from elmd.log import logger
from elmd.models.elmd import ADAPTER, PROJECTOR, Elmd
from elmd.models.inference import generate
from elmd.models.llm import load_llm, open_llm
from elmd.models.sharding import sharding
from elmd.retrieval import load_retriever
from elmd.retrieval.index import Index, demonstrations
from elmd.retrieval.retriever import encode
from elmd.stages.base import Job
from elmd.stages.eerg import task_of
from elmd.stages.features import Encoded, Precomputed, Shards
from elmd.stages.parts import check_ids, place
from elmd.training.artifacts import digest
from elmd.types import Clip, Demonstration, Sample, Sentence

#: Raised when a folder that this version writes could not be read by an earlier one.
FORMAT = 1
FACTS, CARD, PROMPT, RETRIEVER, INDEX = "elmd.json", "README.md", "prompt.json", "retriever", "index"
TEXTS = f"{INDEX}/samples.jsonl"

#: Endings of all that a pack may hold: none of them can carry code.
ENDINGS = (".json", ".jsonl", ".safetensors", ".txt", ".model", ".md")

#: The choices of a run that a reply depends on, by group of its configuration.
CHOICES = {
    "data": ("name", "reader", "split", "split_seed", "filters"),
    "llm": ("name", "dtype", "attention"),
    "vision": (
        "name", "kind", "frames", "sampling", "decoder", "workers", "timeout_s", "batch_frames", "dtype", "shape",
    ),
    "retriever": ("name", "k", "key", "allow_same_dialogue"),
    "prompt": ("max_prompt_tokens", "max_target_tokens"),
    "eerg": ("adapter", "with_emotion"),
    "generate": ("top_p", "temperature", "max_new_tokens", "seeds", "batch_tokens"),
}  # fmt: skip

_PROBE = "[Round 1]\n问：你怎么才来？ 2024\n\n答：Ωé…"
#: Tensors of a vision checkpoint that are the encoder's; a BLIP-2 folder also holds a language model.
VISION_PARTS = ("vision_model.", "qformer.", "query_tokens")


@dataclass(frozen=True)
class Reply:
    """What the model says.

    `emotion` is None where it named none, or was not trained to; `demonstration` is the r' it was shown first.
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
        base = facts["llm"]
        path = cfg.llm.path
        assert path is not None, "load_pack has seen to it"
        try:
            config, tokenizer = open_llm(path, attention=cfg.llm.attention)
        except CheckpointError as error:
            if Path(path).is_dir():
                raise
            what = f"is no folder, and as a hub id it {error.what}"
            raise CheckpointError(what, where=path, fix=_give("llm", base)) from error
        if (found := shape_of(config, tokenizer)) != base["shape"]:
            pairs = [(key, found[key], value) for key, value in base["shape"].items() if found.get(key) != value]
            wrong = ", ".join(f"{key} {here} for {there}" for key, here, there in pairs)
            raise CheckpointError(
                f"is not the language model that {facts['name']} was trained with ({wrong})",
                where=path,
                fix=_give("llm", base),
            )
        check_weights(path, base, facts["name"], "llm")
        llm, tokenizer = load_llm(
            path, dtype=cfg.llm.dtype, attention=cfg.llm.attention, device=accelerator.device,
            onto="cpu" if sharding(accelerator) else None,
        )  # fmt: skip
        check_ids(tokenizer, llm.config, path)
        limits = cfg.prompt
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
        self._eyes: Encoded | None = None  # loaded at the first clip
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
        shown = self._demonstrations(samples)
        features, lost = self._features(samples)
        task, decoding, tokenizer = task_of(self.cfg), self.cfg.generate, self.encoder.tokenizer
        examples = Examples(samples, self.encoder, shown, features, task, with_target=False)
        ids = generate(
            self.model, examples, decoding.batch_tokens, self.accelerator, eos=tokenizer.eos_token_id,
            max_new_tokens=decoding.max_new_tokens, top_p=decoding.top_p, temperature=decoding.temperature,
            seeds=[seed],
        )  # fmt: skip
        replies = []
        for sample, [new] in zip(samples, ids, strict=True):
            emotion, text = self.encoder.prompt.split_target(tokenizer.decode(new, skip_special_tokens=True), task)
            several = shown.get(sample.id)
            replies.append(Reply(emotion, text, several[0].response if several else None))
        return replies, lost

    def _demonstrations(self, samples: Sequence[Sample]) -> dict[str, list[Demonstration]]:
        if self.index is None:
            return {}
        chosen = self.cfg.retriever
        vectors = encode(self.retriever, [sample.utterance.text for sample in samples])[chosen.key.value]
        return demonstrations(
            self.index, self.candidates, samples, vectors, key=chosen.key.value, k=chosen.k,
            allow_same_dialogue=chosen.allow_same_dialogue,
        )  # fmt: skip

    def _features(self, samples: Sequence[Sample]) -> tuple[Features, dict[str, str]]:
        """V_c of each sample, as stage `features` makes it, and the error of each clip that was lost."""
        if not self.cfg.sees_video or not any(s.utterance.clip or s.utterance.features for s in samples):
            return no_features, {}
        work: Encoded | Precomputed
        if self.cfg.vision.kind is VisionKind.precomputed:
            work = Precomputed(self.cfg, samples)
        elif self.cfg.vision.path is None:
            raise CheckpointError(
                "a clip needs the vision encoder, which is no part of a pack",
                where=self.facts["name"],
                fix=_give("vision", self.facts["vision"]),
            )
        else:
            if self._eyes is None:
                self._eyes = Encoded(self.cfg, Job(self.folder, {}, self.accelerator))
            self._eyes.look(samples)
            work = self._eyes
        seen = _Seen()
        lost = work.make(sorted(work.sources), seen)
        projector = self.model.projector
        assert projector is not None, "the constructor has seen to it"
        for key, tokens in seen.waiting.items():
            if tokens.shape[-1] != (width := projector.linear.in_features):
                raise DataError(
                    f"visual tokens are {tokens.shape[-1]} wide, and the projector reads {width}",
                    where=str(work.sources[key]),
                    fix="make them with the encoder that the model was trained with",
                )
        keys = work.keys

        def features(sample: str) -> Tensor | None:
            key = keys[sample]
            return seen.waiting[key].float() if key is not None and key not in lost else None

        return features, lost


class _Seen(Shards):
    """Features kept in memory, in the half precision of the files."""

    def __init__(self) -> None:
        self.waiting: dict[str, Tensor] = {}

    def add(self, features: Mapping[str, Tensor]) -> None:
        self.waiting |= features

    def flush(self) -> None:
        """There is no file."""


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
            _check_given(role, str(path))
    folder = _fetch(str(source))
    facts = read_facts(folder)
    _check_files(folder, facts["files"])
    cfg = _config(folder, facts)
    cfg.cpu = cpu
    cfg.llm.path = str(llm) if llm is not None else _hub(facts["llm"])
    if cfg.llm.path is None:
        raise CheckpointError(
            "the language model is no part of a pack, and this one was trained with a local folder of it",
            where=facts["name"],
            fix=_give("llm", facts["llm"]),
        )
    if cfg.vision.kind is VisionKind.encoder:
        cfg.vision.path = str(vision) if vision is not None else _hub(facts["vision"])
        if cfg.vision.path is not None:
            check_weights(cfg.vision.path, facts["vision"], facts["name"], "vision", VISION_PARTS)
    elif vision is not None:
        raise ConfigError(f"{facts['name']} uses no vision encoder", where="vision", fix="leave it out")
    return Pack(folder, facts, cfg, Accelerator(cpu=cpu))


def to_sample(
    utterance: tuple[str, str],
    history: Sequence[tuple[str, str]] = (),
    *,
    clip: str | Path | None = None,
    background: str | None = None,
    responder: str | None = None,
    id: str = "reply",
) -> Sample:
    """A sample of a new dialogue, for `Pack.reply_all`.

    Consecutive turns of one speaker are joined, as in training (§4.1).

    Args:
        utterance: u, as (speaker, text).
        history: H, oldest first.
        clip: a video of u, or a folder of frames.
        background: B.
        responder: who is to reply; None: who last spoke in the history apart from the speaker of u.
        id: of the dialogue, unlike all that were trained on; the draw of a sampled reply depends on it.

    Raises:
        DataError: u or a turn of H is no pair of texts, u has no text, or its speaker is to reply.
        ClipError: there is no such clip.
    """
    if not _is_turn(utterance):
        raise DataError("is no pair of texts", where="utterance", fix="give (speaker, text)")
    speaker, text = utterance
    history = turns(history, "history")
    if clip is not None:
        check_clip(Path(clip))
    if responder == speaker:
        raise DataError(f"{speaker} cannot reply to {speaker}", where="responder", fix="name another speaker")
    if not text.strip():
        raise DataError("there is nothing to reply to", where="utterance", fix="give its text")
    if responder is None:
        others = [name for name, _ in history if name != speaker]
        responder = others[-1] if others else next(name for name in ("A", "B") if name != speaker)
    seen = Clip(str(Path(clip).absolute())) if clip is not None else None
    lines = [*((name, said, None) for name, said in history), (speaker, text, seen), (responder, "", None)]
    # No emotion of an earlier turn is read; the reply's own is what the model is to say.
    sentences = tuple(
        Sentence(str(i), name, said, Emotion.NEUTRAL, shown) for i, (name, said, shown) in enumerate(lines)
    )
    dialogue = merge(RawDialogue(id, "", sentences), background, Notes())
    return Pair(dialogue, len(dialogue.utterances) - 1).sample("test", text_only=False)


def turns(found: object, where: str | Path) -> list[tuple[str, str]]:
    """Turns of a dialogue as (speaker, text), out of what a user gave for them.

    Raises:
        DataError: it is something else.
    """
    if isinstance(found, str) or not isinstance(found, Sequence) or not all(map(_is_turn, found)):
        raise DataError(
            "is no list of turns, each a speaker and a text",
            where=where,
            fix='give [["A", "…"], ["B", "…"]], oldest first',
        )
    return [(speaker, text) for speaker, text in found]


def _is_turn(found: object) -> bool:
    return isinstance(found, tuple | list) and len(found) == 2 and all(isinstance(part, str) for part in found)


def check_clip(path: Path) -> None:
    """
    Raises:
        ClipError: there is nothing at the path.
    """
    if not path.exists():
        raise ClipError("there is no such clip", where=path, fix="check the path")


# --- the folder ----------------------------------------------------------------------------------------------------


def read_facts(folder: Path) -> dict[str, Any]:
    """The content of `elmd.json`.

    Raises:
        CheckpointError: the folder is no pack.
        ConfigError: it was written by a later version.
    """
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        number, whole = facts["format"], {"name", "config", "llm", "vision", "index", "files"} <= facts.keys()
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"is no packed model ({FACTS} is missing or damaged)",
            where=folder,
            fix="make one: python -m elmd.export JOB_FOLDER --out DIR",
        ) from error
    if number != FORMAT or not whole:
        raise ConfigError(
            f"format {number!r} is not {FORMAT}, which this version reads", where=folder / FACTS, fix="update ELMD"
        )
    return facts


def packed_files(folder: Path) -> list[str]:
    """Names of the files of a pack that replies are made with: all that may be opened, and no other."""
    inside = [path for part in (ADAPTER, RETRIEVER, INDEX) for path in sorted((folder / part).rglob("*"))]
    found = [path for path in (folder / PROMPT, folder / PROJECTOR, *inside) if path.is_file()]
    return [path.relative_to(folder).as_posix() for path in found if not path.name.startswith(".")]


def file_facts(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def shape_of(config: Any, tokenizer: Any) -> dict[str, Any]:
    """What must be equal for a language model to take the place of another: sizes, and how text becomes ids."""
    text = config.get_text_config(decoder=True)
    words = [sorted(tokenizer.get_vocab().items()), tokenizer.chat_template, tokenizer.encode(_PROBE)]
    return {
        "model_type": config.model_type,
        "hidden_size": text.hidden_size,
        "layers": text.num_hidden_layers,
        "vocabulary": text.vocab_size,
        "tokenizer": digest(words),
    }


def fingerprint(path: str, parts: tuple[str, ...] = ("",)) -> str | None:
    """16 hex digits of a folder's weights: of the first row of each tensor in bfloat16, so that neither the shards nor
    the stored precision matter, and gigabytes need not be read. None for a hub id, which stands for itself.

    Args:
        parts: tensors whose names begin so.

    Raises:
        CheckpointError: the folder holds no whole safetensors files.
    """
    folder = Path(path)
    if not folder.is_dir() and is_hub_id(path):
        return None
    rows: dict[str, list[Any]] = {}
    try:
        index = folder / "model.safetensors.index.json"
        shards = {"model.safetensors"}
        if index.is_file():
            listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            shards = {shard for name, shard in listed.items() if name.startswith(parts)}
        for shard in shards:
            with safe_open(folder / shard, "pt") as file:
                for name in file.keys():  # noqa: SIM118  (not a dict)
                    if name.startswith(parts):
                        size = file.get_slice(name).get_shape()
                        row = file.get_slice(name)[:1] if size else file.get_tensor(name)
                        raw = row.to(torch.bfloat16).flatten().view(torch.uint8).numpy().tobytes()
                        rows[name] = [size, hashlib.sha256(raw).hexdigest()]
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(
            f"its weights cannot be read ({reason(error)})", where=path, fix="give a folder of whole safetensors files"
        ) from error
    return digest(rows)


def check_weights(path: str, base: Mapping[str, Any], name: str, role: str, parts: tuple[str, ...] = ("",)) -> None:
    """
    Raises:
        CheckpointError: the folder's weights are not those that the pack was trained with.
    """
    found = fingerprint(path, parts)
    if None not in (found, base["fingerprint"]) and found != base["fingerprint"]:
        raise CheckpointError(
            f"its weights are not those that {name} was trained with",
            where=path,
            fix=_give(role, base),
        )


def _give(role: str, base: Mapping[str, Any]) -> str:
    """What to do about a base model that is missing or wrong; `role` is an argument here and an option of commands."""
    if artifact := base.get("artifact"):
        return f"give {role} the folder of artifact {artifact} under the runs/ it was trained in"
    return f"give {role} the folder or hub id of {base['model']}"


def _check_given(role: str, path: str) -> None:
    """
    Raises:
        CheckpointError: neither a model's folder nor, by its form, a hub id.
    """
    if Path(path).is_dir():
        if not (Path(path) / "config.json").is_file():
            raise CheckpointError(
                "holds no model (config.json is missing)", where=path, fix=f"give {role} the folder that has it"
            )
    elif not is_hub_id(path):
        raise CheckpointError("no such folder", where=path, fix=f"check the path given as {role}")


def _hub(base: Mapping[str, Any]) -> str | None:
    """The checkpoint that the pack itself names, where others can have it too."""
    return base["model"] if base["hub"] and is_hub_id(base["model"]) else None


def _fetch(source: str) -> Path:
    if Path(source).is_dir():
        return Path(source)
    if not is_hub_id(source):
        raise CheckpointError("no such folder", where=source, fix="check the path")
    places = (f"{ADAPTER}/", f"{RETRIEVER}/", f"{INDEX}/")
    patterns = [FACTS, CARD, PROMPT, PROJECTOR, *(f"{place}*{ending}" for place in places for ending in ENDINGS)]
    return snapshot(
        source, patterns, "check the name and the connection, or download the repository and give its folder"
    )


def _check_files(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """
    Raises:
        CheckpointError: a file leads out of the folder, is of a kind that no pack has, or is not as it was packed.
    """
    for name, known in files.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or path.suffix not in ENDINGS:
            raise CheckpointError(f"lists {name!r}, which no pack has", where=folder / FACTS, fix="do not use it")
        if not (folder / path).is_file():
            raise CheckpointError(f"{name} is missing", where=folder, fix="get the pack again, whole")
        if file_facts(folder / path) != known:
            raise CheckpointError(f"{name} is not as it was packed", where=folder, fix="get the pack again")
    if unlisted := sorted(set(packed_files(folder)) - files.keys()):
        raise CheckpointError(
            f"holds {unlisted[0]}, which {FACTS} does not list", where=folder, fix="get the pack again"
        )
    if (modules := folder / RETRIEVER / "modules.json").is_file():
        for entry in json.loads(modules.read_text(encoding="utf-8")):
            if not re.fullmatch(r"\w*", entry["path"]):
                raise CheckpointError(f"leads to {entry['path']!r}", where=modules, fix="do not use this pack")


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
    except (OmegaConfBaseException, ValueError, TypeError, ConfigError) as error:
        raise CheckpointError(
            f"its choices cannot be read ({reason(error)})", where=folder / FACTS, fix="export the model again"
        ) from error
    return cfg
