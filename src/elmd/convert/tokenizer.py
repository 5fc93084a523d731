"""ChatGLM2's tokenizer as an ordinary Hugging Face fast tokenizer, built from its SentencePiece model.

The original is a slow class of remote code: byte-pair encoding with byte fallback, a space before the text,
`[gMASK] sop` before a single text, control ids after the n pieces, padding on the left. The folder that
`save_pretrained` writes is read by plain `AutoTokenizer`, with the same ids and no code of ours.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from elmd.errors import CheckpointError

#: The control tokens, whose ids follow the SentencePiece model's n pieces in this order.
CONTROL = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
PAD, BOS, EOS = "<unk>", "<s>", "</s>"  # ids 0, 1, 2: ChatGLM2 pads with the unknown piece

#: ChatGLM2's own prompt format; rendering leaves out `[gMASK] sop`, which the post-processor adds when encoding.
CHAT_TEMPLATE = (
    "{% set ns = namespace(round=0) %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{% set ns.round = ns.round + 1 %}"
    "{{ '[Round ' ~ ns.round ~ ']\n\n问：' ~ message['content'] ~ '\n\n答：' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] ~ '\n\n' }}"
    "{% else %}{{ raise_exception('ChatGLM2 knows the roles user and assistant only') }}{% endif %}"
    "{% endfor %}"
)


def train_pieces(texts: Iterable[str], vocab_size: int, coverage: float = 1.0) -> bytes:
    """A SentencePiece BPE model like ChatGLM2's: byte fallback, no normalisation, every digit a piece of its own.

    Args:
        texts: lines of the training text; white space counts.
        vocab_size: pieces at most, the 256 bytes included, the control ids not.
        coverage: share of the characters that get a piece of their own; the rarest others become bytes.

    Returns:
        the contents of a `tokenizer.model` file.

    Raises:
        CheckpointError: the text is too small for that many pieces, or has more characters than pieces.
    """
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=model, model_type="bpe", vocab_size=vocab_size,
            byte_fallback=True, character_coverage=coverage, normalization_rule_name="identity",
            remove_extra_whitespaces=False, split_digits=True, num_threads=1, minloglevel=2,
        )  # fmt: skip
    except RuntimeError as error:
        raise CheckpointError(
            f"SentencePiece cannot make {vocab_size} pieces from this text ({error})",
            fix="change bootstrap.vocab_size, or give more text",
        ) from error
    return model.getvalue()


def chatglm2_tokenizer(model: Path | bytes) -> PreTrainedTokenizerFast:
    """The fast tokenizer that gives the ids of ChatGLM2's original class.

    Control strings and `<unk>`, `<s>`, `</s>` typed by a user stay text (`split_special_tokens`, also after loading);
    only the post-processor adds control ids.

    Args:
        model: a `tokenizer.model` file or its contents.

    Raises:
        CheckpointError: it is not a SentencePiece BPE model with byte fallback, or normalises text, which ChatGLM2's
            does not.
    """
    where = str(model) if isinstance(model, Path) else None
    try:
        content = model.read_bytes() if isinstance(model, Path) else model
        pieces = SentencePieceProcessor(model_proto=content)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"is not a SentencePiece model ({error})", where=where) from error
    size = pieces.get_piece_size()
    if (pieces.unk_id(), pieces.bos_id(), pieces.eos_id()) != (0, 1, 2):
        raise CheckpointError("its ids of <unk>, <s>, </s> are not 0, 1, 2 as in ChatGLM2", where=where)
    # The behaviour is checked, not the declaration, which would need the protobuf package.
    if pieces.encode("\x01") == [0] or not any(pieces.is_byte(i) for i in range(size)):
        raise CheckpointError("has no byte fallback, so unknown characters would be lost", where=where)
    if pieces.normalize(" ａ  ﬁ ") != "▁▁ａ▁▁ﬁ▁":
        raise CheckpointError("normalises text or adds no leading space, unlike ChatGLM2's model", where=where)

    words = [pieces.id_to_piece(i) for i in range(size)]
    vocab = {word: i for i, word in enumerate(words)}
    whole = [i for i in range(size) if not (pieces.is_byte(i) or pieces.is_control(i) or pieces.is_unknown(i))]
    plain = {words[i] for i in whole}
    # SentencePiece merges the pair that makes the piece with the best score. So every split of a piece into two pieces
    # is a merge, ranked by the score of the piece; equal scores by id.
    merges = [
        (word[:cut], word[cut:])
        for _, _, word in sorted((-pieces.get_score(i), i, words[i]) for i in whole)
        for cut in range(1, len(word))
        if word[:cut] in plain and word[cut:] in plain
    ]
    fast = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=PAD, fuse_unk=True, byte_fallback=True))
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in (PAD, BOS, EOS, *CONTROL)])
    fast.post_processor = processors.TemplateProcessing(
        single="[gMASK] sop $A",
        pair=f"[gMASK] sop $A $B:0 {EOS}:0",
        special_tokens=[(word, fast.token_to_id(word)) for word in ("[gMASK]", "sop", EOS)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token=PAD, bos_token=BOS, eos_token=EOS, split_special_tokens=True,
        padding_side="left", chat_template=CHAT_TEMPLATE, clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
