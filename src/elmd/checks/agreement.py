"""Whether language model, tokenizer, prompt, visual tokens and what training begins with go together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from elmd.checks.base import Check, Inspection, Seen, object_in
from elmd.checks.files import shapes
from elmd.config import BOOTSTRAP, Config, Sampling, Search, VisionKind
from elmd.errors import CheckpointError, ConfigError
from elmd.labels import WORDS


def visual_shape(cfg: Config) -> tuple[int, int]:
    """Visual tokens of a sample (V = m + o) and their width q; (0, 0) without video.

    Where the checkpoint cannot be read, or a user's arrays are not described, BLIP-2's own. Of a stand-in's tokens,
    which are still to be made, m are counted.
    """
    if not cfg.sees_video:
        return 0, 0
    frames = cfg.vision.frames if cfg.vision.sampling is Sampling.uniform else 0
    tokens, width = _described(cfg) or (32, 768)
    return tokens + frames, width


def _described(cfg: Config) -> tuple[int, int] | None:
    """o and q as the configuration or the encoder's config.json says; None where neither does."""
    if cfg.vision.kind is VisionKind.precomputed:
        return (cfg.vision.shape[0], cfg.vision.shape[1]) if cfg.vision.shape else None
    if cfg.vision.path == BOOTSTRAP:
        return 0, cfg.bootstrap.vision_hidden
    config = object_in(Path(cfg.vision.path) / "config.json") if cfg.vision.path else None
    if config is None:
        return None
    return config.get("num_query_tokens", 32), (config.get("qformer_config") or {}).get("hidden_size", 768)


# ----------------------------------------------------------------------------------------------- can it be loaded here
def llm_config(of: Inspection) -> Seen:
    """transformers can read the model's configuration."""
    config = of.llm_config.get_text_config(decoder=True)
    return Seen(f"{config.model_type}, {config.num_hidden_layers} layers of width {config.hidden_size:,}")


def attention(of: Inspection) -> None:
    """The attention that is asked for can be used here; tried with a GLM where the checkpoint cannot be read yet."""
    from transformers import GlmConfig

    from elmd.models.llm import check_attention

    config = of.llm_config_if_readable
    check_attention(config or GlmConfig(num_hidden_layers=1), of.cfg.llm.attention, of.cfg.llm.path)


def faiss(of: Inspection) -> None:
    from elmd.retrieval.search import load_faiss

    load_faiss()


# ------------------------------------------------------------------------------------------------ tokenizer and prompt
def tokenizer(of: Inspection) -> Seen:
    """Every id of the tokenizer has its row in the embedding."""
    from elmd.stages.parts import check_ids

    check_ids(of.tokenizer, of.llm_config, of.cfg.llm.path)
    rows = of.llm_config.get_text_config(decoder=True).vocab_size
    return Seen(f"ids to {max(of.tokenizer.get_vocab().values()):,}, {rows:,} rows of embeddings")


def end_of_text(of: Inspection) -> Seen:
    """Which id ends a text: the tokenizer decides where the model says otherwise. Padding is masked, so any id does."""
    config = of.llm_config.get_text_config(decoder=True)
    ends = {"config.json": config.eos_token_id}
    if generation := object_in(Path(of.cfg.llm.path or "") / "generation_config.json"):
        ends["generation_config.json"] = generation.get("eos_token_id")
    eos = of.tokenizer.eos_token_id
    others = [
        f"{name}: {ids}"
        for name, ids in ends.items()
        if ids is not None and eos not in (ids if isinstance(ids, list) else [ids])
    ]
    text = "; ".join([f"id {eos}", *others, f"padding {of.tokenizer.pad_token_id}"])
    return Seen(text, "targets will end in the tokenizer's" if others else "")


def emotion_words(of: Inspection) -> Seen:
    """The seven words are distinct in ids, and none holds an unknown piece."""
    words = {word: tuple(of.tokenizer.encode(word, add_special_tokens=False)) for word in WORDS.values()}
    unknown = of.tokenizer.unk_token_id
    lost = [word for word, ids in words.items() if not ids or unknown in ids]
    if lost or len(set(words.values())) < len(words):
        what = f"{' '.join(lost)} not in the vocabulary" if lost else "the emotions' words are not distinct in ids"
        fix = "choose a model whose tokenizer knows Chinese"
        raise CheckpointError(what, where=of.cfg.llm.path, fix=fix)
    counts = sorted({len(ids) for ids in words.values()})
    return Seen(f"{len(words)} distinct, of {' or '.join(map(str, counts))} tokens")


def prompt(of: Inspection) -> Seen:
    """The prompt has room for the instruction and the video."""
    from elmd.stages.parts import shortest_prompt

    slots, limit = visual_shape(of.cfg)[0], of.cfg.llm.max_prompt_tokens
    length = shortest_prompt(of.encoder, slots)
    return Seen(f"{length} tokens of {limit:,} before any dialogue, {slots} of them visual")


def longest_row(of: Inspection) -> Seen | None:
    """The model has positions for the longest prompt and target."""
    longest = of.cfg.llm.max_prompt_tokens + of.cfg.llm.max_target_tokens
    positions = getattr(of.llm_config.get_text_config(decoder=True), "max_position_embeddings", None)
    if positions is None:
        return None
    seen = f"{longest:,} tokens, the model has {positions:,} positions"
    if longest > positions:
        fix = "lower llm.max_prompt_tokens or llm.max_target_tokens"
        raise ConfigError(seen, where="llm.max_prompt_tokens", fix=fix)
    return Seen(seen)


# -------------------------------------------------------------------------------------------- what training begins with
def visual_tokens(of: Inspection) -> Seen:
    """What the projector will take and give."""
    tokens, width = visual_shape(of.cfg)
    hidden = of.llm_config.get_text_config(decoder=True).hidden_size
    return Seen(f"{tokens} a sample, {width} → {hidden} numbers each")


def projector(of: Inspection) -> Seen:
    """The projector that REP begins with is one, and of this encoder and this language model."""
    file = Path(of.cfg.rep.projector_from or "")
    if not file.is_file():
        raise ConfigError(f"no such file: {file}", where="rep.projector_from", fix="correct the path, or leave it out")
    tensors, why = {}, ""
    try:
        tensors = shapes(file)
    except CheckpointError as error:
        why = f": it {error.what}"
    if len(tensors.get("linear.weight", ())) != 2 or "linear.bias" not in tensors:
        raise CheckpointError(
            f"is no visual projector{why}",
            where=file,
            fix="give glm_proj.safetensors of scripts/convert_visualglm.py, or projector.safetensors of a stage=rep",
        )
    hidden, width = tensors["linear.weight"]
    features, embedding = (_described(of.cfg) or (0, width))[1], hidden
    if config := of.llm_config_if_readable:
        embedding = config.get_text_config(decoder=True).hidden_size
    if (width, hidden) != (features, embedding):
        raise CheckpointError(
            f"takes {width} numbers to {hidden}, and features of {features} are to become {embedding}",
            where=file,
            fix="take the projector of this encoder and this language model",
        )
    return Seen(f"{file}: {width} → {hidden} numbers")


def adapter_from(of: Inspection) -> Seen:
    """The adapter that EERG begins with is one, and of this language model."""
    folder = Path(of.cfg.eerg.adapter_from or "")
    saved = object_in(folder / "adapter_config.json")
    if saved is None:
        raise ConfigError(
            f"{folder}: its adapter_config.json is not there or cannot be read",
            where="eerg.adapter_from",
            fix="give an adapter's folder, or leave it out",
        )
    return _prefix(of, folder, saved)


def adapter_beside(of: Inspection) -> Seen | None:
    """The prefix that a converted checkpoint brings is of this language model."""
    folder = Path(of.cfg.llm.path or "") / "adapter"
    saved = object_in(folder / "adapter_config.json")
    return None if saved is None else _prefix(of, folder, saved)


def _prefix(of: Inspection, folder: Path, saved: dict[str, Any]) -> Seen:
    if saved.get("peft_type") != "PREFIX_TUNING":
        return Seen(str(folder))
    from elmd.models.adapter import check_prefix

    layers, heads, numbers = check_prefix(saved, of.llm_config, folder)
    virtual = saved.get("num_virtual_tokens")
    return Seen(f"{folder}: {virtual} virtual tokens of {layers} layers, {heads} KV heads, {numbers} numbers")


def _generates(of: Inspection) -> bool:
    return of.has_llm and of.runs("rep", "eerg")


def _uses_faiss(of: Inspection) -> bool:
    return of.has_llm and of.cfg.retrieves and of.cfg.retriever.search is Search.faiss and of.runs("index")


def _opens_llm(of: Inspection) -> bool:
    return _generates(of) and of.llm_at_hand


_TOKENIZER = ("tokenizer",)
AGREEMENT = (
    Check("attention", "preflight", attention, when=_generates, needs=("llm.attention",)),
    Check(
        "faiss",
        "preflight",
        faiss,
        when=lambda of: (
            of.has_llm and of.cfg.retrieves and of.cfg.retriever.search is Search.faiss and of.runs("index")
        ),
    ),
    Check("language model", "preflight", llm_config, when=_opens_llm, needs=("llm",)),
    Check("tokenizer", "preflight", tokenizer, needs=("language model",)),
    Check("end of text", "doctor", end_of_text, needs=_TOKENIZER),
    Check("emotion words", "preflight", emotion_words, needs=_TOKENIZER),
    Check("prompt", "preflight", prompt, needs=_TOKENIZER),
    Check("longest row", "doctor", longest_row, needs=_TOKENIZER),
    Check("visual tokens", "doctor", visual_tokens, when=lambda of: of.cfg.sees_video, needs=_TOKENIZER),
    Check(
        "rep.projector_from",
        "preflight",
        projector,
        when=lambda of: of.has_llm and of.cfg.sees_video and of.cfg.rep.projector_from is not None and of.runs("rep"),
    ),
    Check(
        "eerg.adapter_from",
        "preflight",
        adapter_from,
        when=lambda of: of.cfg.eerg.adapter_from is not None and of.runs("eerg"),
        needs=("language model",),
    ),
    Check("llm's adapter", "doctor", adapter_beside, needs=("language model",)),
)
