"""The retriever: a SentenceTransformer of encoder, pooling and (once trained) self-separation (§3.3, eq. 1).

d is the sentence width, s the number of slots. `e_u` [N, d] is the pooled encoder output, `E_s` [N, s·d] the
flattened output of self-separation; a raw retriever, not trained by ELMD, has `e_u` only.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from sentence_transformers.util import batch_to_device, load_file_path
from torch import Tensor

from elmd.data.collate import bin_pack
from elmd.engine.files import read_json
from elmd.engine.hub import is_hub_id
from elmd.errors import CheckpointError, reason
from elmd.log import logger, progress
from elmd.retrieval.self_separation import SelfSeparation

_SELF_SEPARATION = f"{SelfSeparation.__module__}.{SelfSeparation.__name__}"
_THEIRS: dict[str, Any] = {"Transformer": Transformer, "Pooling": Pooling, "Normalize": Normalize}
#: Weights come as safetensors or not at all; they are trained and compared in fp32 whatever they were stored in.
_MODEL_KWARGS: dict[str, Any] = {"use_safetensors": True, "dtype": torch.float32}


def load_retriever(
    path: str | PathLike[str], *, max_tokens: int | None = None, device: str | torch.device = "cpu"
) -> SentenceTransformer:
    """A retriever from its folder (or hub id), equal to the saved one bit for bit.

    `SentenceTransformer(path)` refuses the trained retriever, because self-separation is none of its own modules.
    Here `modules.json` is read, and only Transformer, Pooling, Normalize and our SelfSeparation are accepted; no
    class is imported by the name that the file gives. A folder without `modules.json` is a bare encoder, pooled by
    its mean.

    Args:
        path: a folder written by `save_pretrained` of sentence-transformers or transformers.
        max_tokens: cut longer texts to this many tokens, where the checkpoint itself does not cut earlier.
        device: where to put it.

    Raises:
        CheckpointError: nothing there, a module of another class, or weights that cannot be read.
    """
    source = str(path)
    if not Path(source).is_dir() and not is_hub_id(source):
        raise CheckpointError("no such folder", where=source, fix="check retriever.path")
    listing = load_file_path(source, "modules.json")
    try:
        if listing is None:
            encoder = Transformer(source, model_kwargs=dict(_MODEL_KWARGS))
            modules = [encoder, Pooling(encoder.get_embedding_dimension(), "mean")]
        else:
            modules = [_load_module(source, entry) for entry in read_json(Path(listing))]
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"cannot be loaded as a sentence encoder ({reason(error)})",
            where=source,
            fix="give a folder of sentence-transformers or a BERT-like encoder with safetensors weights",
        ) from error
    kinds = [type(module) for module in modules]
    if kinds[:2] != [Transformer, Pooling] or SelfSeparation in kinds[:-1]:
        raise CheckpointError(
            f"the modules {', '.join(kind.__name__ for kind in kinds) or '(none)'} are not those of a retriever",
            where=listing,
            fix="expected Transformer, Pooling and after them Normalize or SelfSeparation",
        )
    prompts = _prompts(source)
    model = SentenceTransformer(modules=modules, device=str(device), similarity_fn_name="cosine", **prompts)
    if max_tokens is not None:
        model.max_seq_length = min(max_tokens, model.max_seq_length or max_tokens)
    return model.eval()


def _load_module(source: str, entry: dict[str, str]) -> Any:
    kind = entry["type"]
    cls = SelfSeparation if kind == _SELF_SEPARATION else None
    if kind.startswith("sentence_transformers."):
        cls = _THEIRS.get(kind.rsplit(".", 1)[1])
    if cls is None:
        raise CheckpointError(
            f"module {kind!r} is not one a retriever may have",
            where=Path(source, "modules.json"),
            fix="only Transformer, Pooling and Normalize of sentence-transformers and ELMD's SelfSeparation are loaded",
        )
    if cls is Transformer:
        return cls.load(source, subfolder=entry["path"], model_kwargs=dict(_MODEL_KWARGS))
    return cls.load(source, subfolder=entry["path"])


def _prompts(source: str) -> dict[str, Any]:
    """The text that the checkpoint puts before each text, if any; a retriever keeps it."""
    path = load_file_path(source, "config_sentence_transformers.json")
    settings = read_json(Path(path)) if path else {}
    return {name: settings[name] for name in ("prompts", "default_prompt_name") if settings.get(name)}


def add_separation(model: SentenceTransformer, slots: int, kind: str) -> SentenceTransformer:
    """The encoder of `model` with a new, random self-separation on top; weights of the encoder are shared.

    A Normalize of the checkpoint is left out: e_u is not normalised before c_i is added (cosines do not change).
    """
    modules: list[Any] = [module for module in model.children() if isinstance(module, Transformer | Pooling)]
    if len(modules) < len(model):
        logger.info("retriever: Normalize left out, e_u is not normalised before self-separation")
    width = modules[1].pooling_output_dimension
    separation = SelfSeparation(width, slots, kind).to(model.device)
    prompts: Any = model.prompts  # sentence-transformers declares values None that its constructor does not take
    return SentenceTransformer(
        modules=[*modules, separation], device=str(model.device), prompts=prompts,
        default_prompt_name=model.default_prompt_name, similarity_fn_name="cosine",
    )  # fmt: skip


def separation_of(model: SentenceTransformer) -> SelfSeparation | None:
    """The self-separation of a trained retriever; None for a raw one."""
    last = model[-1]
    return last if isinstance(last, SelfSeparation) else None


class Tokens:
    """Texts as the encoder takes them; each different text is tokenised once.

    Attributes:
        row_of: the row of each text.
        rows: the encoder's inputs [texts, longest], by name; half as large as what tokenizers return.
    """

    def __init__(self, model: SentenceTransformer, texts: Sequence[str]):
        self.row_of = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        prompt = model.prompts.get(model.default_prompt_name) if model.default_prompt_name else None
        features = model.preprocess(list(self.row_of), prompt=prompt)
        self.rows = {name: value.int() for name, value in features.items() if _is_row(value)}
        self.settings = {name: value for name, value in features.items() if not _is_row(value)}

    def batch(self, members: Tensor) -> dict[str, Any]:
        """The texts in the rows `members` [B], padded to the longest of them."""
        used = self.rows["attention_mask"][members].any(dim=0)  # padding may stand on either side
        return {name: value[members][:, used].long() for name, value in self.rows.items()} | self.settings


def _is_row(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 2


class Embedded(NamedTuple):
    """e_u [B, d] and the number of tokens that were run, padding included."""

    e_u: Tensor
    tokens: int


def embed(model: SentenceTransformer, tokens: Tokens, texts: Sequence[str]) -> Embedded:
    """Eq. 1 of B texts, in that order, with gradient where enabled.

    They are encoded in groups of like length, so that short ones do not pay for a long one's padding; without dropout
    the result and its gradient are those of one padded batch.

    Args:
        tokens: of these texts, and perhaps of others.
    """
    encoder = [module for module in model.children() if not isinstance(module, SelfSeparation)]
    members = torch.tensor([tokens.row_of[text] for text in texts])  # [B]
    lengths, order = tokens.rows["attention_mask"][members].sum(dim=1).sort(stable=True)
    parts, run = [], 0
    cost = PASS_TOKENS.get(model.device.type, 1024)
    for group in bin_pack(lengths.tolist(), range(len(texts)), sys.maxsize, cost=cost):
        features = batch_to_device(tokens.batch(members[order[group]]), model.device)
        run += features["attention_mask"].numel()
        for module in encoder:
            features = module(features)
        parts.append(features["sentence_embedding"])
    return Embedded(torch.cat(parts)[order.argsort().to(model.device)], run)


#: The fixed cost of a pass over the encoder, as a number of tokens that take as long: reading the weights and adding to
#: their gradient, or launching kernels. Measured on one CPU core as 55 to 100 tokens (BERT of 128 x 2 to 768 x 12,
#: forward and backward). On a GPU it is an estimate: 450 launches at 25 us against 10 us a token.
PASS_TOKENS = {"cpu": 64, "cuda": 1024}


@torch.no_grad()
def encode(
    model: SentenceTransformer,
    texts: Sequence[str],
    *,
    batch_size: int = 128,
    tokens: Tokens | None = None,
    what: str | None = None,
) -> dict[str, Tensor]:
    """The keys that N texts are retrieved by, on CPU in fp32: `e_u` [N, d] and, if the model has it, `E_s` [N, s·d].

    Equal texts are encoded once and so get equal vectors. Which batch a text is in may change the last bits of its
    vector, so it depends on the other texts in its seventh digit.

    Args:
        tokens: of these texts and perhaps of others; None tokenises each batch as it comes.
        what: a progress bar's label; None shows none.
    """
    if not texts:
        raise ValueError("there is no text to encode")
    training = model.training
    model.eval()
    by_length = sorted(dict.fromkeys(texts), key=len)
    batches: Any = [by_length[i : i + batch_size] for i in range(0, len(by_length), batch_size)]
    parts = [
        embed(model, tokens or Tokens(model, batch), batch).e_u.float()
        for batch in (progress(batches, what, unit="batch") if what else batches)
    ]
    row_of = {text: row for row, text in enumerate(by_length)}
    rows = torch.tensor([row_of[text] for text in texts])  # [N]
    keys = {"e_u": torch.cat(parts).cpu()[rows]}
    if (separation := separation_of(model)) is not None:
        slots = [separation.separate(part).flatten(1).cpu() for part in torch.cat(parts).split(1024)]
        keys["E_s"] = torch.cat(slots)[rows]
    model.train(training)
    return keys


def cut_texts(model: SentenceTransformer, texts: Sequence[str]) -> int:
    """How many of the texts are longer than what the retriever reads."""
    limit = model.max_seq_length
    return 0 if limit is None else sum(len(ids) > limit for ids in model.tokenizer(list(texts))["input_ids"])
