"""The configuration: dataclass schemas that refuse unknown keys and wrong types, and what must hold between fields.

`configs/` holds the values; here are their names, types and meaning. A value that comes from the paper has its
section beside it, there and here.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from enum import Enum, StrEnum
from operator import attrgetter
from typing import Any

from omegaconf import MISSING

from elmd.errors import ConfigError

#: A checkpoint path with this value stands for the stand-in made by `stage=bootstrap`.
BOOTSTRAP = "bootstrap"

#: What transformers calls its ways to compute attention; all but the first two take a package or a GPU of their own.
ATTENTION = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention")


class StageName(Enum):  # no StrEnum: `index` is a method of strings
    bootstrap = "bootstrap"
    prepare = "prepare"
    erm = "erm"
    index = "index"
    features = "features"
    rep = "rep"
    eerg = "eerg"
    baseline = "baseline"
    all = "all"


class Reader(StrEnum):
    tiny = "tiny"
    m3ed = "m3ed"
    cped = "cped"
    jsonl = "jsonl"


class SplitRule(StrEnum):
    paper = "paper"
    dialogue = "dialogue"
    official = "official"


class OnMissingClip(StrEnum):
    error = "error"
    text_only = "text_only"
    drop = "drop"


class VisionKind(StrEnum):
    encoder = "encoder"  # BLIP-2's classes: ViT and Q-Former
    resnet = "resnet"  # one vector per frame, for baseline=livebot
    precomputed = "precomputed"
    none = "none"


class Sampling(StrEnum):
    uniform = "uniform"  # m frames, evenly spread
    random = "random"  # one frame, drawn by the sample's id (§4.2, VisualGLM)


class Decoder(StrEnum):
    decord = "decord"
    pyav = "pyav"


class Key(StrEnum):
    e_u = "e_u"
    E_s = "E_s"


class Search(StrEnum):
    auto = "auto"  # exact up to `stages.index.MANY` candidates; beyond, faiss where it is installed
    exact = "exact"
    faiss = "faiss"  # HNSW; its recall is measured


class Separation(StrEnum):
    mlp = "mlp"
    linear = "linear"


class ProjectorInit(StrEnum):
    rep = "rep"
    random = "random"


class Checkpointing(StrEnum):
    """Activation checkpointing; not `on` and `off`, which YAML reads as booleans."""

    auto = "auto"
    always = "always"
    never = "never"


class AdapterKind(StrEnum):
    prefix = "prefix"
    lora = "lora"
    none = "none"


class BaselineName(StrEnum):
    """Table 2's systems that are not ELMD; `none` is ELMD."""

    none = "none"
    dialogpt = "dialogpt"
    livebot = "livebot"
    visualglm = "visualglm"

    @property
    def own_model(self) -> bool:
        """Whether it is a network of its own, and not ELMD's parts configured otherwise."""
        return self in (BaselineName.dialogpt, BaselineName.livebot)


class PaperDataset(StrEnum):
    """The paper's two data sets, as its tables call them."""

    m3ed = "M3ED"
    mmed = "MMED"


class SelectionSplit(StrEnum):
    """Splits a choice may be made on. `test` is not among them, so choosing by it cannot be written down."""

    train = "train"
    valid = "valid"


class EvalSplit(StrEnum):
    train = "train"
    valid = "valid"
    test = "test"


class BootstrapText(StrEnum):
    tiny = "tiny"
    data = "data"


@dataclass
class WorldConfig:
    """Size of the tiny world (data=tiny): samples per split."""

    train: int = 1200
    valid: int = 150
    test: int = 660  # half of them hide the emotion from the text, and a claim needs 300 of those
    seed: int = 0


@dataclass
class DataConfig:
    name: str = MISSING
    reader: Reader = MISSING
    path: str | None = None  # CPED: a csv file; M3ED: the folder with annotation.json and splitInfo/; JSONL: a file
    split: SplitRule = SplitRule.dialogue
    split_seed: int = 0
    filters: list[str] = field(default_factory=list)  # named filters of elmd.data.samples.FILTERS
    emotion_map: str | None = None  # csv label,emotion that overrides the reader's own table
    video_root: str | None = None
    video_template: str = "{show}/{dialogue}.mp4"
    on_missing_clip: OnMissingClip = OnMissingClip.error
    background: str | None = None  # JSON object: show or dialogue id -> text
    world: WorldConfig = field(default_factory=WorldConfig)


@dataclass
class LlmConfig:
    name: str = MISSING
    path: str | None = None
    dtype: str = "auto"  # auto: bfloat16 on a GPU, float32 on CPU
    attention: str = "sdpa"  # see ATTENTION
    checkpointing: Checkpointing = Checkpointing.auto  # auto: only where the activations would not fit


@dataclass
class VisionConfig:
    name: str = MISSING
    kind: VisionKind = MISSING
    path: str | None = None
    frames: int = 8  # m; not in the paper, ours
    sampling: Sampling = Sampling.uniform
    decoder: Decoder = Decoder.decord
    workers: int = 0  # processes that decode; 0: one for each core that this process may use but one
    timeout_s: float = 60.0  # per clip
    batch_frames: int = 64
    dtype: str = "auto"
    shuffle: bool = False  # permute clips among samples: same parameters, no information (a control)
    shape: list[int] | None = None  # precomputed: [o, q] of the user's arrays; None reads it from the first


@dataclass
class RetrieverConfig:
    name: str = MISSING
    path: str | None = None
    k: int = 1  # demonstrations in the prompt; 0: none (w/o ERM). §3.3 "select a u'"
    key: Key = Key.E_s  # §3.3 end
    allow_same_dialogue: bool = False  # true only shows the leak
    max_tokens: int = 128
    search: Search = Search.auto


@dataclass
class PromptConfig:
    """Text of the six parts (Fig. 4 is not public: ours). Fields in braces are filled in."""

    instruction: str = MISSING
    background: str = MISSING
    turn: str = MISSING
    utterance: str = MISSING
    video: str = MISSING
    demonstration: str = MISSING
    rep: str = MISSING
    eerg: str = MISSING
    reply: str = MISSING
    emotion_end: str = "。"
    max_prompt_tokens: int = 1024
    max_target_tokens: int = 128


@dataclass
class ErmConfig:
    epochs: int = 5
    batch_size: int = 32  # §4.3
    lr: float = 5e-5  # §4.3
    temperature: float = 0.5  # τ, §4.3
    slots: int = 4  # s, §4.3
    separation: Separation = Separation.mlp  # MLP of Algorithm 1
    emotion_weight: float = 1.0  # λ of eq. 4; its value is not in the paper. 0: w/o ERT
    separation_weight: float = 1.0  # 0: w/o SSC
    one_positive: bool = False  # the literal eq. 2: one positive drawn per anchor
    warmup: float = 0.1
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    select_on: SelectionSplit = SelectionSplit.valid
    checkpoint_every: int = 200


@dataclass
class RepConfig:
    projector_from: str | None = None  # a projector's file, such as VisualGLM's own glm_proj, converted; None: random
    epochs: int = 3
    batch_size: int = 16  # §4.3
    lr: float = 2e-5  # §4.3
    warmup: float = 0.05
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    micro_tokens: int = 4096  # tokens per micro-batch, padding included
    select_on: SelectionSplit = SelectionSplit.valid
    checkpoint_every: int = 200


@dataclass
class EergConfig:
    steps: int = 3000  # ChatGLM2's own p-tuning
    batch_size: int = 16  # §4.3
    adapter: AdapterKind = AdapterKind.prefix  # §4.3: P-tuning of the language model; lora and none are ours
    adapter_from: str | None = None  # an adapter's folder to begin with, such as a converted prefix; None: a new one
    lr_adapter: float = 2e-2  # §4.3
    lr_projector: float = 2e-2  # §4.3 (preset `paper`; preset `safe` has 2e-5)
    projector_from: ProjectorInit = ProjectorInit.rep
    with_emotion: bool = True  # eq. 11: the emotion, then the response; false: the response alone (VisualGLM)
    prefix_length: int = 128
    prefix_dropout: float = 0.1
    lora_rank: int = 8
    lora_alpha: int = 16
    lora_dropout: float = 0.05
    warmup: float = 0.0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    micro_tokens: int = 4096
    evaluate_every: int = 500
    select_on: SelectionSplit = SelectionSplit.valid
    checkpoint_every: int = 200


@dataclass
class BaselineConfig:
    """DialoGPT and Livebot: Transformers trained from scratch on the training split (§4.2)."""

    name: BaselineName = BaselineName.none
    vocab: str | None = None  # a BERT vocab.txt; None: the characters of the training text
    resnet: str = "microsoft/resnet-18"  # Livebot with vision.kind=resnet: a folder or hub id, in safetensors format
    layers: int = 12
    width: int = 768
    heads: int = 12
    ff: int = 3072
    dropout: float = 0.1
    max_tokens: int = 300  # of a context, whose oldest history goes first, and of a reply
    epochs: int = 40
    batch_size: int = 16
    lr: float = 2.6e-5
    warmup: float = 0.1
    weight_decay: float = 0.01
    max_grad_norm: float = 2.0
    micro_tokens: int = 4096
    evaluate_every: int = 500
    select_on: SelectionSplit = SelectionSplit.valid
    checkpoint_every: int = 200


@dataclass
class LauncherConfig:
    """How `python -m elmd.sweep` starts a sweep's jobs; nothing else reads it."""

    slots: int = 0  # jobs at a time; 0: as many as the GPUs allow, one without a GPU
    gpus: int = 1  # GPUs of a job


@dataclass
class BootstrapConfig:
    """Sizes and lengths of training of the three stand-in checkpoints."""

    text: BootstrapText = BootstrapText.tiny
    seed: int = 0
    dialogues: int = 12000  # text=tiny: made for the stand-ins alone; text=data: samples are read until so many texts
    vocab_size: int = 2000  # pieces, 256 bytes included; then most phrases of the tiny world are one or two tokens
    llm_hidden: int = 128
    llm_layers: int = 2  # copying from a demonstration takes two; a third learns no faster in this time
    llm_steps: int = 6000
    llm_batch: int = 16
    llm_lr: float = 2e-3
    vision_hidden: int = 64  # q
    vision_steps: int = 400
    vision_lr: float = 3e-3
    retriever_hidden: int = 128  # d; with 64 the ERM falls back to one vector for all texts
    retriever_steps: int = 300
    retriever_lr: float = 2e-3


@dataclass
class GenerateConfig:
    split: EvalSplit = EvalSplit.test
    top_p: float = 0.7  # §4.3
    temperature: float = 0.95  # §4.3; 0: greedy
    max_new_tokens: int = 128
    seeds: list[int] = field(default_factory=lambda: [0])
    batch_tokens: int = 8192  # prompt tokens per batch, padding included


@dataclass
class Config:
    stage: StageName = StageName.all
    seed: int = 0
    experiment_name: str = "default"
    job: str | None = None  # a sweep's job: its folder below the experiment's; set by the launcher
    runs_dir: str = "runs"
    force: bool = False
    cpu: bool = False
    threads: int = 0  # torch CPU threads; 0 leaves torch's own choice
    data: DataConfig = field(default_factory=DataConfig)
    llm: LlmConfig = field(default_factory=LlmConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    retriever: RetrieverConfig = field(default_factory=RetrieverConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    bootstrap: BootstrapConfig = field(default_factory=BootstrapConfig)
    erm: ErmConfig = field(default_factory=ErmConfig)
    rep: RepConfig = field(default_factory=RepConfig)
    eerg: EergConfig = field(default_factory=EergConfig)
    baseline: BaselineConfig = field(default_factory=BaselineConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    launcher: LauncherConfig = field(default_factory=LauncherConfig)
    predictions: str | None = None  # evaluate only: a predictions JSONL to score instead of generating
    ablation_name: str = "none"
    paper_dataset: PaperDataset = PaperDataset.m3ed  # whose numbers in the paper stand beside this run's in tables

    @property
    def sees_video(self) -> bool:
        return self.vision.kind is not VisionKind.none

    @property
    def retrieves(self) -> bool:
        return self.retriever.k > 0


#: Keys that a job of a sweep may set without becoming another system: how fast and where it runs.
INCIDENTAL = (
    "llm.checkpointing", "llm.attention", "vision.workers", "vision.timeout_s", "vision.batch_frames",
    "rep.micro_tokens", "eerg.micro_tokens", "baseline.micro_tokens", "erm.checkpoint_every", "rep.checkpoint_every",
    "eerg.checkpoint_every", "baseline.checkpoint_every", "generate.batch_tokens", "predictions",
)  # fmt: skip


def plain(config: Any) -> dict[str, Any]:
    """A sub-config as JSON-ready values, for fingerprints and manifests."""
    return asdict(config, dict_factory=lambda items: {k: v.value if isinstance(v, Enum) else v for k, v in items})


@dataclass(frozen=True)
class Range:
    """Numbers that a key may have: from `least` to `most`, without these where `above` or `below`."""

    least: float
    most: float = math.inf
    above: bool = False
    below: bool = False
    times: int = 1  # a multiple of it

    def __contains__(self, value: float) -> bool:
        # Written so that NaN is outside.
        low = value > self.least if self.above else value >= self.least
        high = value < self.most if self.below else value <= self.most
        return low and high and (self.times == 1 or value % self.times == 0)

    def __str__(self) -> str:
        if self.times > 1:
            return f"a multiple of {self.times}"
        low = f"more than {self.least}" if self.above else f"{self.least}"
        if self.most == math.inf:
            return low if self.above else f"{low} or more"
        return f"{low} to {'less than ' if self.below else ''}{self.most}"


_ANY, _SOME, _POSITIVE = Range(0), Range(1), Range(0, above=True)
_SHARE, _DROPOUT = Range(0, 1), Range(0, 1, below=True)

#: What each number may be, by dotted key; seeds may be any.
RANGES = {
    "threads": _ANY,
    "data.world.train": _SOME, "data.world.valid": _SOME, "data.world.test": _SOME,
    "vision.frames": _SOME, "vision.workers": _ANY, "vision.timeout_s": _POSITIVE, "vision.batch_frames": _SOME,
    "retriever.k": _ANY, "retriever.max_tokens": _SOME,
    "prompt.max_prompt_tokens": _SOME, "prompt.max_target_tokens": Range(2),  # one, and the end
    "bootstrap.dialogues": Range(2), "bootstrap.vocab_size": _SOME,
    "bootstrap.llm_hidden": Range(64, times=64), "bootstrap.llm_layers": _SOME, "bootstrap.llm_steps": _ANY,
    "bootstrap.llm_batch": _SOME, "bootstrap.llm_lr": _ANY,
    "bootstrap.vision_hidden": Range(4, times=4), "bootstrap.vision_steps": _ANY, "bootstrap.vision_lr": _ANY,
    "bootstrap.retriever_hidden": Range(32, times=32), "bootstrap.retriever_steps": _ANY,
    "bootstrap.retriever_lr": _ANY,
    "erm.epochs": _ANY, "erm.batch_size": Range(2), "erm.lr": _ANY, "erm.temperature": _POSITIVE, "erm.slots": _SOME,
    "erm.emotion_weight": _ANY, "erm.separation_weight": _ANY, "erm.warmup": _SHARE, "erm.weight_decay": _ANY,
    "erm.max_grad_norm": _POSITIVE, "erm.checkpoint_every": _SOME,
    "rep.epochs": _SOME, "rep.batch_size": _SOME, "rep.lr": _ANY, "rep.warmup": _SHARE, "rep.weight_decay": _ANY,
    "rep.max_grad_norm": _POSITIVE, "rep.micro_tokens": _SOME, "rep.checkpoint_every": _SOME,
    "eerg.steps": _ANY, "eerg.batch_size": _SOME, "eerg.lr_adapter": _ANY, "eerg.lr_projector": _ANY,
    "eerg.prefix_length": _SOME, "eerg.prefix_dropout": _DROPOUT,
    "eerg.lora_rank": _SOME, "eerg.lora_alpha": _SOME, "eerg.lora_dropout": _DROPOUT,
    "eerg.warmup": _SHARE, "eerg.weight_decay": _ANY, "eerg.max_grad_norm": _POSITIVE, "eerg.micro_tokens": _SOME,
    "eerg.evaluate_every": _SOME, "eerg.checkpoint_every": _SOME,
    "baseline.layers": _SOME, "baseline.width": _SOME, "baseline.heads": _SOME, "baseline.ff": _SOME,
    "baseline.dropout": _DROPOUT, "baseline.max_tokens": Range(8), "baseline.epochs": _SOME,
    "baseline.batch_size": _SOME, "baseline.lr": _ANY, "baseline.warmup": _SHARE, "baseline.weight_decay": _ANY,
    "baseline.max_grad_norm": _POSITIVE, "baseline.micro_tokens": _SOME, "baseline.evaluate_every": _SOME,
    "baseline.checkpoint_every": _SOME,
    "launcher.slots": _ANY, "launcher.gpus": _SOME,
    "generate.top_p": Range(0, 1, above=True), "generate.temperature": _ANY, "generate.max_new_tokens": _SOME,
    "generate.batch_tokens": _SOME,
}  # fmt: skip

#: Keys of the adapters that are not chosen, which nothing reads.
_UNREAD = {
    AdapterKind.prefix: ("eerg.lora_",),
    AdapterKind.lora: ("eerg.prefix_",),
    AdapterKind.none: ("eerg.lora_", "eerg.prefix_"),
}


def check_ranges(cfg: Config) -> None:
    """What each number may be.

    Raises:
        ConfigError: naming one that is out of its range, and the range.
    """
    for key, allowed in RANGES.items():
        value = attrgetter(key)(cfg)
        if value not in allowed and not key.startswith(_UNREAD[cfg.eerg.adapter]):
            raise ConfigError(f"{value} is out of range", where=key, fix=f"use {allowed}")
    if not cfg.generate.seeds:
        raise ConfigError("there is no seed to decode with", where="generate.seeds", fix="use [0], or several")
