"""The configuration: dataclass schemas that refuse unknown keys and wrong types, and what must hold between fields.

`configs/` holds the values; here are their names, types and meaning. A value that comes from the paper has its
section beside it, there and here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import Any

from omegaconf import MISSING

from elmd.engine.keys import ANY, DROPOUT, POSITIVE, SHARE, SOME, Range, setting
from elmd.vision import default_decoder

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

    train: int = setting(1200, SOME)
    valid: int = setting(150, SOME)
    test: int = setting(660, SOME)  # half of them hide the emotion from the text, and a claim needs 300 of those
    seed: int = 0


@dataclass
class DataConfig:
    name: str = setting(MISSING, packed=True)
    reader: str = setting(MISSING, packed=True)  # a name in elmd.data.readers.DATASETS
    path: str | None = setting(
        None, place=True
    )  # CPED: a csv file; M3ED: the folder with annotation.json; JSONL: a file
    split: SplitRule = setting(SplitRule.dialogue, packed=True)
    split_seed: int = setting(0, packed=True)
    filters: list[str] = setting(list, packed=True)  # named filters of elmd.data.pairs.FILTERS
    emotion_map: str | None = setting(None, place=True)  # csv label,emotion that overrides the reader's own table
    video_root: str | None = setting(None, place=True)
    video_template: str = setting("{show}/{dialogue}.mp4", when=lambda cfg: cfg.data.video_root is not None)
    on_missing_clip: OnMissingClip = OnMissingClip.error
    background: str | None = setting(None, place=True)  # JSON object: show or dialogue id -> text
    world: WorldConfig = field(default_factory=WorldConfig)


@dataclass
class LlmConfig:
    name: str = setting(MISSING, packed=True)
    path: str | None = setting(None, place=True)
    dtype: str = setting("auto", packed=True)  # auto: bfloat16 on a GPU, float32 on CPU
    attention: str = setting("sdpa", packed=True)  # see ATTENTION
    checkpointing: Checkpointing = setting(Checkpointing.auto, counts=False)  # auto: where activations would not fit
    max_prompt_tokens: int = setting(1024, SOME, packed=True)
    max_target_tokens: int = setting(128, Range(2), packed=True)  # of training: a token, and the end


def _looks(cfg: Any) -> bool:
    """Whether frames are looked at here, and not by whoever made the arrays."""
    return cfg.vision.kind in (VisionKind.encoder, VisionKind.resnet)


@dataclass
class VisionConfig:
    name: str = setting(MISSING, packed=True)
    kind: VisionKind = setting(MISSING, packed=True)
    path: str | None = setting(None, place=True)
    frames: int = setting(
        8, SOME, packed=True, when=_looks
    )  # m; not in the paper. A turn lasts a few seconds; 4 and 16 are the sweep
    sampling: Sampling = setting(Sampling.uniform, packed=True, when=_looks)
    # decord where it is installed, else pyav; their pixels are equal
    decoder: Decoder = setting(lambda: Decoder(default_decoder()), packed=True, when=_looks)
    workers: int = setting(0, ANY, counts=False, packed=True)  # processes that decode; 0: a core each, but one
    timeout_s: float = setting(60.0, POSITIVE, counts=False, packed=True)  # per clip
    batch_frames: int = setting(64, SOME, counts=False, packed=True)
    dtype: str = setting("auto", packed=True, when=_looks)
    shuffle: bool = False  # permute clips among samples: same parameters, no information (a control)
    shape: list[int] | None = setting(
        None, packed=True
    )  # precomputed: [o, q] of the arrays; None reads it from the first


@dataclass
class RetrieverConfig:
    name: str = setting(MISSING, packed=True)
    path: str | None = setting(None, place=True)
    k: int = setting(1, ANY, packed=True, paper='§3.3: "select a u\'"')  # demonstrations in the prompt; 0: w/o ERM
    key: Key = setting(Key.E_s, packed=True, paper="§3.3 end")
    allow_same_dialogue: bool = setting(False, packed=True)  # true only shows the leak
    max_tokens: int = setting(128, SOME)
    #: what auto comes to is a matter of what is installed, which the manifest tells
    search: Search = setting(Search.auto, when=lambda cfg: cfg.retriever.search is not Search.auto)


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
    emotion_end: str = MISSING


@dataclass
class ErmConfig:
    epochs: int = setting(5, ANY)
    batch_size: int = setting(32, Range(2), paper="§4.3")
    lr: float = setting(5e-5, ANY, paper="§4.3")
    temperature: float = setting(0.5, POSITIVE, paper="§4.3")  # τ
    slots: int = setting(4, SOME, paper="§4.3")  # s
    separation: Separation = Separation.mlp  # MLP of Algorithm 1
    emotion_weight: float = setting(1.0, ANY)  # λ of eq. 4; its value is not in the paper. 0: w/o ERT
    separation_weight: float = setting(1.0, ANY)  # 0: w/o SSC
    one_positive: bool = False  # the literal eq. 2: one positive drawn per anchor
    warmup: float = setting(0.1, SHARE)
    weight_decay: float = setting(0.01, ANY)
    max_grad_norm: float = setting(1.0, POSITIVE)
    select_on: SelectionSplit = SelectionSplit.valid
    checkpoint_every: int = setting(200, SOME, counts=False)


@dataclass
class RepConfig:
    #: a projector's file, such as VisualGLM's own glm_proj, converted; None: random
    projector_from: str | None = setting(None, place=True, named=True)
    epochs: int = setting(3, SOME)
    batch_size: int = setting(16, SOME, paper="§4.3")
    lr: float = setting(2e-5, ANY, paper="§4.3")
    warmup: float = setting(0.05, SHARE)
    weight_decay: float = setting(0.0, ANY)
    max_grad_norm: float = setting(1.0, POSITIVE)
    micro_tokens: int = setting(4096, SOME, counts=False)  # tokens per micro-batch, padding included
    select_on: SelectionSplit = SelectionSplit.valid
    checkpoint_every: int = setting(200, SOME, counts=False)


def _prefix(cfg: Any) -> bool:
    return cfg.eerg.adapter is AdapterKind.prefix


def _lora(cfg: Any) -> bool:
    return cfg.eerg.adapter is AdapterKind.lora


def _adapter(cfg: Any) -> bool:
    return cfg.eerg.adapter is not AdapterKind.none


def _sees_video(cfg: Any) -> bool:
    return cfg.sees_video


@dataclass
class EergConfig:
    steps: int = setting(3000, ANY)  # ChatGLM2's own p-tuning
    batch_size: int = setting(16, SOME, paper="§4.3")
    #: P-tuning of the language model; lora and none are ours
    adapter: AdapterKind = setting(AdapterKind.prefix, packed=True, paper="§4.3")
    #: an adapter's folder to begin with, such as a converted prefix; None: a new one
    adapter_from: str | None = setting(None, place=True, named=True)
    lr_adapter: float = setting(2e-2, ANY, paper="§4.3", when=_adapter)
    lr_projector: float = setting(2e-2, ANY, paper="§4.3", when=_sees_video)  # preset `safe` has 2e-5
    projector_from: ProjectorInit = setting(ProjectorInit.rep, when=_sees_video)
    #: eq. 11: the emotion, then the response; false: the response alone (VisualGLM)
    with_emotion: bool = setting(True, packed=True, paper="eq. 11")
    prefix_length: int = setting(128, SOME, when=_prefix)
    prefix_dropout: float = setting(0.1, DROPOUT, when=_prefix)
    lora_rank: int = setting(8, SOME, when=_lora)
    lora_alpha: int = setting(16, SOME, when=_lora)
    lora_dropout: float = setting(0.05, DROPOUT, when=_lora)
    warmup: float = setting(0.0, SHARE)
    weight_decay: float = setting(0.0, ANY)
    max_grad_norm: float = setting(1.0, POSITIVE)
    micro_tokens: int = setting(4096, SOME, counts=False)
    evaluate_every: int = setting(500, SOME)
    select_on: SelectionSplit = SelectionSplit.valid
    checkpoint_every: int = setting(200, SOME, counts=False)


@dataclass
class BaselineConfig:
    """DialoGPT and Livebot: Transformers trained from scratch on the training split (§4.2)."""

    name: BaselineName = BaselineName.none
    vocab: str | None = setting(None, place=True)  # a BERT vocab.txt; None: the characters of the training text
    #: Livebot with vision.kind=resnet: a folder or hub id, in safetensors format
    resnet: str = setting("microsoft/resnet-18", place=True)
    layers: int = setting(12, SOME)
    width: int = setting(768, SOME)
    heads: int = setting(12, SOME)
    ff: int = setting(3072, SOME)
    dropout: float = setting(0.1, DROPOUT)
    max_tokens: int = setting(300, Range(8))  # of a context, whose oldest history goes first, and of a reply
    epochs: int = setting(40, SOME)
    batch_size: int = setting(16, SOME)
    lr: float = setting(2.6e-5, ANY)
    warmup: float = setting(0.1, SHARE)
    weight_decay: float = setting(0.01, ANY)
    max_grad_norm: float = setting(2.0, POSITIVE)
    micro_tokens: int = setting(4096, SOME, counts=False)
    evaluate_every: int = setting(500, SOME)
    select_on: SelectionSplit = SelectionSplit.valid
    checkpoint_every: int = setting(200, SOME, counts=False)


@dataclass
class LauncherConfig:
    """How `python -m elmd.sweep` starts a sweep's jobs; nothing else reads it."""

    slots: int = setting(0, ANY, counts=False)  # jobs at a time; 0: as many as the GPUs allow, one without a GPU
    gpus: int = setting(1, SOME, counts=False)  # GPUs of a job


@dataclass
class BootstrapConfig:
    """Sizes and lengths of training of the three stand-in checkpoints."""

    text: BootstrapText = BootstrapText.tiny
    seed: int = 0
    #: text=tiny: made for the stand-ins alone; text=data: samples are read until so many texts
    dialogues: int = setting(12000, Range(2))
    vocab_size: int = setting(
        2000, SOME
    )  # 256 bytes included; then most phrases of the tiny world are one or two tokens
    llm_hidden: int = setting(128, Range(64, times=64))
    #: copying from a demonstration takes two; a third learns no faster in this time
    llm_layers: int = setting(2, SOME)
    llm_steps: int = setting(2000, ANY)
    llm_batch: int = setting(16, SOME)
    llm_lr: float = setting(3e-3, ANY)
    vision_hidden: int = setting(64, Range(4, times=4))  # q
    vision_steps: int = setting(300, ANY)
    vision_lr: float = setting(5e-3, ANY)
    retriever_hidden: int = setting(
        128, Range(32, times=32)
    )  # d; with 64 the ERM falls back to one vector for all texts
    retriever_steps: int = setting(300, ANY)
    retriever_lr: float = setting(2e-3, ANY)


@dataclass
class GenerateConfig:
    split: EvalSplit = EvalSplit.test
    top_p: float = setting(0.7, Range(0, 1, above=True), packed=True, paper="§4.3")
    temperature: float = setting(0.95, ANY, packed=True, paper="§4.3")  # 0: greedy
    max_new_tokens: int = setting(128, SOME, packed=True)
    seeds: list[int] = setting(lambda: [0], packed=True)
    batch_tokens: int = setting(8192, SOME, counts=False, packed=True)  # prompt tokens per batch, padding included


@dataclass
class Config:
    stage: StageName = setting(StageName.all, counts=False)
    seed: int = 0
    experiment_name: str = setting("default", counts=False)
    job: str | None = setting(
        None, counts=False
    )  # a sweep's job: its folder below the experiment's; set by the launcher
    runs_dir: str = setting("runs", counts=False)
    force: bool = setting(False, counts=False)
    cpu: bool = setting(False, counts=False)
    #: torch CPU threads; None: 1 with a stand-in, otherwise torch's choice
    threads: int | None = setting(None, SOME, counts=False)
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
    predictions: str | None = setting(
        None, counts=False
    )  # evaluate only: a predictions JSONL to score, not to generate
    ablation_name: str = setting("none", counts=False)
    #: whose numbers in the paper stand beside this run's in tables
    paper_dataset: PaperDataset = setting(PaperDataset.m3ed, counts=False)

    @property
    def sees_video(self) -> bool:
        return self.vision.kind is not VisionKind.none

    @property
    def retrieves(self) -> bool:
        return self.retriever.k > 0
